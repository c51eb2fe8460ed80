"""Loads the backbone classes of mmsegmentation, detectron2 and mmdetection without the parts of their packages that need compiled
operators, and prints the names that the readers of exports give to their tensors."""
import functools
import importlib.util
import json
import os
import re
import sys
import types

import timm
import torch


def stand_in(name, **contents):
    """Registers a module with only these contents under this name, unless a module of this name has been imported already."""
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules.setdefault(name, module)


def load_source(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mmseg_backbone():
    """The backbone class of the installed mmsegmentation."""
    import mmseg
    import mmseg.registry
    root = os.path.dirname(mmseg.__file__)
    for name in ("mmseg.models", "mmseg.models.backbones", "mmseg.models.utils"):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(root, *name.split(".")[1:])]
        sys.modules[name] = package
    utils = sys.modules["mmseg.models.utils"]
    from mmseg.models.utils.embed import PatchEmbed
    from mmseg.models.utils.wrappers import resize
    utils.PatchEmbed, utils.resize = PatchEmbed, resize
    from mmseg.models.backbones.vit import VisionTransformer
    return VisionTransformer


def detectron2_backbone(clone):
    """The backbone class in a clone of detectron2."""
    stand_in("fvcore"), stand_in("fvcore.nn"), stand_in("fvcore.nn.weight_init")
    stand_in("detectron2"), stand_in("detectron2.modeling"), stand_in("detectron2.modeling.backbone")
    stand_in("detectron2.layers", CNNBlockBase=torch.nn.Module, Conv2d=torch.nn.Conv2d, get_norm=None)
    stand_in("detectron2.modeling.backbone.fpn", _assert_strides_are_log2_contiguous=None)
    stand_in("detectron2.modeling.backbone.backbone", Backbone=torch.nn.Module)
    load_source("detectron2.modeling.backbone.utils", f"{clone}/detectron2/modeling/backbone/utils.py")
    return load_source("detectron2.modeling.backbone.vit", f"{clone}/detectron2/modeling/backbone/vit.py").ViT


def mmdet_backbone(clone):
    """The backbone class in a clone of mmdetection."""
    registry = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    stand_in("mmdet"), stand_in("mmdet.registry", MODELS=registry)
    return load_source("mmdet_vit", f"{clone}/projects/ViTDet/vitdet/vit.py").ViT


def detectron2_norm_options(eps):
    return {"norm_layer": functools.partial(torch.nn.LayerNorm, eps=eps)}


def mmdet_norm_options(eps):
    return {"norm_cfg": {"type": "LN", "eps": eps}}


def shapes_by_pattern(state):
    """The shapes of the tensors by name. A name with `{n}` stands for the tensors of n blocks, which have the same shape."""
    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            parts[number] = "{}"
        shapes = found.setdefault(".".join(parts), [])
        shapes.append(list(tensor.shape))
    assert all(shape == shapes[0] for shapes in found.values() for shape in shapes)
    return {name.replace("{}", f"{{{len(shapes)}}}"): shapes[0] for name, shapes in sorted(found.items())}


def print_keys(detectron2_clone):
    """Prints as JSON the names and shapes of the tensors of ViT-B, L and H in the classes of timm, transformers, mmsegmentation and
    detectron2."""
    from transformers import ViTConfig, ViTForImageClassification
    Mmseg, Detectron2 = mmseg_backbone(), detectron2_backbone(detectron2_clone)
    keys = {"timm": {}, "hf": {}, "mmseg": {}, "detectron2": {}}
    for size, width, depth, heads, patch in [("b", 768, 12, 12, 16), ("l", 1024, 24, 16, 16), ("h", 1280, 32, 16, 14)]:
        net = timm.create_model(f"vit_{dict(b='base', l='large', h='huge')[size]}_patch{patch}_224", num_classes=1000)
        keys["timm"][size] = shapes_by_pattern(net.state_dict())
        config = ViTConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
                           patch_size=patch, num_labels=1000)
        keys["hf"][size] = shapes_by_pattern(ViTForImageClassification(config).state_dict())
        net = Mmseg(img_size=224, patch_size=patch, patch_bias=True, embed_dims=width, num_layers=depth, num_heads=heads,
                    out_indices=(depth - 1,))
        keys["mmseg"][size] = shapes_by_pattern(net.state_dict())
        net = Detectron2(embed_dim=width, depth=depth, num_heads=heads, patch_size=16, window_size=14)
        keys["detectron2"][size] = shapes_by_pattern({k: t for k, t in net.state_dict().items() if "rel_pos" not in k})
    lines = json.dumps(keys, indent=1).replace(",\n    ", ", ")
    print(re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", lines))
