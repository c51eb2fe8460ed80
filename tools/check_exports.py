#!/usr/bin/env python3
"""Loads every exported folder with the real readers and compares what they compute with what incubate computed.

  incubate export CONFIG --format all
  incubate evaluate CONFIG --outputs OUTPUTS
  tools/check_exports.py RUN_DIR/export OUTPUTS [--images DATA/val] [--detectron2 CLONE] [--mmdetection CLONE]
  tools/check_exports.py --large FILE          a .pth of more than 4 GiB, as the ignored test of export/torch_file.rs keeps it
  tools/check_exports.py --keys CLONE          prints src/export/templates/keys.json: what the readers' own classes call their
                                               tensors (CLONE of detectron2)

Needs torch, torchvision, timm, transformers and safetensors. With mmsegmentation==1.2.2, mmengine and mmcv-lite==2.1.0 also its
backbone class; with clones of detectron2 and mmdetection the backbones of their ViTDet, which are in no package. A reader that
is not there is named and skipped; anything unequal ends in exit code 1.

OUTPUTS holds incubate's logits of the test images and these as the network saw them: all where they are small, as
Fashion-MNIST's, else the first. --images names the test images of a config with data.format = "folder", for timm's and
transformers' preprocessing to make the same pixels of.
"""
import argparse
import functools
import importlib.util
import json
import os
import re
import resource
import sys
import types

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

TOLERANCE = 1e-5
failed = False


def report(what, difference, limit=TOLERANCE):
    global failed
    failed |= not difference <= limit
    print(f"{'ok ' if difference <= limit else 'BAD'} {what}: largest difference {difference:.2e}, allowed {limit:.0e}", flush=True)


def require(what, holds, detail=""):
    global failed
    failed |= not holds
    print(f"{'ok ' if holds else 'BAD'} {what} {detail}", flush=True)


def difference(a, b):
    """The largest, absolute for numbers of order 1 to 10 and in proportion for larger ones."""
    return ((a - b).abs().max() / (b.abs().max() / 10).clamp(min=1)).item()


def batched(model, inputs, size=100):
    return torch.cat([model(part) for part in inputs.split(size)])


def load(folder, wrapped=None):
    weights = torch.load(f"{folder}/model.pth", weights_only=True, mmap=True)
    return weights[wrapped] if wrapped else weights


def settings(path):
    """The numbers that a framework's config begins with."""
    found = {}
    for line in open(path):
        name, _, value = line.partition(" = ")
        if name.isidentifier() and not line.startswith(("_", "#")):
            try:
                found[name] = json.loads(value)
            except ValueError:
                pass
    return found


def epsilon(folder):
    return json.load(open(f"{folder}/hf/config.json"))["layer_norm_eps"]


def check_timm(folder, inputs, logits):
    model = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
    got = batched(model, inputs)
    report(f"timm logits of {len(inputs)} images", difference(got, logits))
    require("timm top-1", bool((got.argmax(1) == logits.argmax(1)).all()), f"({len(inputs)} images)")
    return model


def exact(folder, scaled):
    """timm's model with the exported numbers as they are, and the epsilon they were trained with."""
    weights = load_file(f"{folder}/safetensors/model.safetensors")
    eps = epsilon(folder)
    scale = (1e-6 / eps) ** 0.5
    into_stream = ("cls_token", "pos_embed", "patch_embed.", ".attn.proj.", ".mlp.fc2.")
    same, away = True, 0.0
    for name, tensor in scaled.state_dict().items():
        if abs(scale - 1) > 1e-6 and any(part in name for part in into_stream):
            away = max(away, difference(tensor, weights[name] * scale))
        else:
            same &= torch.equal(tensor, weights[name])
    require("timm bits, but for what is scaled for its epsilon", same)
    report("timm's scaled tensors", away)
    norm = functools.partial(torch.nn.LayerNorm, eps=eps)
    model = timm.create_model(f"local-dir:{folder}/timm", pretrained=False, norm_layer=norm).eval()
    model.load_state_dict(weights)
    return model


def check_transformers(folder, inputs, logits):
    from transformers import ViTForImageClassification
    model, info = ViTForImageClassification.from_pretrained(f"{folder}/hf", output_loading_info=True)
    keys = {kind: list(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    require("transformers keys", not any(keys.values()), keys if any(keys.values()) else "")
    model.eval()
    got = batched(lambda part: model(part).logits, inputs)
    report(f"transformers logits of {len(inputs)} images", difference(got, logits))
    require("transformers top-1", bool((got.argmax(1) == logits.argmax(1)).all()), f"({len(inputs)} images)")


def pixels(what, got, inputs, std):
    """Bytes that differ. Pillow rounds to bytes between the rows and the columns of a resize, where torchvision's tensors and
    our resampling may round a hair differently: two bytes in a hundred thousand may be off by 2."""
    off = ((got - inputs) * std * 255).abs().round()
    worst, share = int(off.max()), (off > 1).double().mean().item()
    require(f"{what}: pixels of {len(inputs)} images", worst <= 1 or (worst <= 2 and share <= 2e-5),
            f"(off by at most {worst}/255; by 1: {(off == 1).double().mean().item():.1e}, by more: {share:.1e})")


def check_preprocessing(folder, inputs, images):
    from transformers import AutoImageProcessor
    config = json.load(open(f"{folder}/timm/config.json"))["pretrained_cfg"]
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ("mean", "std"))
    processor = AutoImageProcessor.from_pretrained(f"{folder}/hf")
    if not images:
        if config["crop_pct"] < 1:
            print("--  preprocessing skipped: no --images given")
            return
        # Images of the evaluated size already: only normalisation is left.
        bytes_ = ((inputs[:100] * std + mean) * 255).round().to(torch.uint8)
        got = processor([b for b in bytes_], input_data_format="channels_first", return_tensors="pt")["pixel_values"]
        pixels("transformers preprocessing", got, inputs[:100], std)
        return
    from PIL import Image
    paths = [os.path.join(images, c, f) for c in sorted(os.listdir(images)) for f in sorted(os.listdir(os.path.join(images, c)))]
    opened = [Image.open(path).convert("RGB") for path in paths[: len(inputs)]]
    inputs = inputs[: len(opened)]
    for path, image in zip(paths[: len(inputs)], opened, strict=True):
        print(f"    {os.path.basename(path)} {image.width}x{image.height}")
    model = types.SimpleNamespace(pretrained_cfg=config)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    pixels("timm preprocessing", torch.stack([transform(image) for image in opened]), inputs, std)
    own = load_source("hf_evaluate", f"{folder}/hf/evaluate.py").transform(f"{folder}/hf")
    pixels("evaluate.py's preprocessing", torch.stack([own(image) for image in opened]), inputs, std)
    # Where rounding an odd margin down, as most processors of transformers do, is what torchvision does.
    size = inputs.shape[-1]
    short = int(size / config["crop_pct"])
    margins = [(int(short * max(i.size) / min(i.size)) - size, short - size) for i in opened]
    same = [all(m % 2 == 0 or round(m / 2) == m // 2 for m in pair) for pair in margins]
    got = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in opened])
    name = type(processor).__name__
    pixels(f"transformers preprocessing by {name}, same margins", got[same], inputs[same], std)
    others = [not s for s in same]
    off = ((got - inputs)[others] * std * 255).abs().amax((1, 2, 3)).round().int().tolist() if any(others) else []
    print(f"    by {name} where a margin is odd and rounded: off by at most {off}/255")


def check_files(folder, reference):
    """The .pth files: equal bit for bit, mapped, aligned; names and shapes for readers that are not here."""
    for name, wrapped, prefix in [("pth", None, ""), ("mmdet", "model", ""), ("detectron2", "model", "backbone.net.")]:
        weights = load(f"{folder}/{name}", wrapped)
        require(f"{name} aligned", all(t.data_ptr() % 64 == 0 for t in weights.values()))
        # A tensor of another shape has been resampled, for which `check_resampling` is.
        theirs = {k: reference[k.removeprefix(prefix)] for k in weights}
        equal = all(k.startswith(prefix) and (torch.equal(t, theirs[k]) if t.shape == theirs[k].shape else
                                              name != "pth" and k.endswith(("patch_embed.proj.weight", "pos_embed")))
                    for k, t in weights.items())
        require(f"{name} names and bits", equal, f"({len(weights)} tensors)")
    require("safetensors bits", all(torch.equal(t, reference[k]) for k, t in load_file(f"{folder}/safetensors/model.safetensors").items()))
    expected = {f"backbone.net.{k}" for k in reference if not k.startswith(("norm.", "head.", "cls_token"))}
    require("detectron2 takes exactly", set(load(f"{folder}/detectron2", "model")) == expected, f"({len(expected)} tensors)")


def check_resampling(folder, reference):
    from timm.layers.patch_embed import resample_patch_embed
    weights = load(f"{folder}/detectron2", "model")
    kernel = weights["backbone.net.patch_embed.proj.weight"]
    size = list(kernel.shape[-2:])
    if size != list(reference["patch_embed.proj.weight"].shape[-2:]):
        report("patch kernel as timm resamples it", difference(kernel, resample_patch_embed(reference["patch_embed.proj.weight"], size)))
    positions, whole = weights["backbone.net.pos_embed"], reference["pos_embed"]
    if positions.shape != whole.shape:
        old, new = (round((t.shape[1] - 1) ** 0.5) for t in (whole, positions))
        grid = whole[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
        report("position embeddings", difference(positions, torch.cat([whole[:, :1], grid], 1)))


def mmseg_backbone():
    """mmsegmentation's class alone: the rest of the package wants compiled operators."""
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


def check_mmseg(folder, inputs, model):
    try:
        VisionTransformer = mmseg_backbone()
    # mmsegmentation asserts the version of mmcv.
    except (ImportError, AssertionError) as error:
        print(f"--  mmsegmentation skipped: {error}")
        return
    c = settings(f"{folder}/mmseg/upernet_80k.py")
    size = inputs.shape[-1]
    ours = [f for f in model.forward_intermediates(inputs, indices=c["out_indices"], norm=False, intermediates_only=True)]
    for patch_bias in (False, True):
        for img_size in {size, c["crop"]}:
            # At its own image size, and at the training crop, where the class resizes the position embeddings itself.
            net = VisionTransformer(
                img_size=img_size, patch_size=c["patch_size"], patch_bias=patch_bias, in_channels=c["in_channels"],
                embed_dims=c["embed_dims"], num_layers=c["num_layers"], num_heads=c["num_heads"], mlp_ratio=c["mlp_ratio"],
                out_indices=c["out_indices"], qkv_bias=True, norm_cfg=dict(type="LN", eps=c["layer_norm_eps"]),
                interpolate_mode="bicubic", pretrained=f"{folder}/mmseg/model.pth")
            net.init_weights()
            net.eval()
            if img_size == size:
                keys = net.load_state_dict(load(f"{folder}/mmseg", "state_dict"), strict=False)
                unexpected = [k for k in keys.unexpected_keys if patch_bias or k != "patch_embed.projection.bias"]
                require(f"mmseg keys, patch_bias={patch_bias}", not keys.missing_keys and not unexpected,
                        f"{keys.missing_keys} {unexpected}" if keys.missing_keys or unexpected else "")
                report(f"mmseg features, patch_bias={patch_bias}",
                       max(difference(a, b) for a, b in zip(net(inputs), ours, strict=True)))
            else:
                w = model.state_dict()
                bias = w["patch_embed.proj.bias"].view(1, 1, -1)
                grid, positions = img_size // c["patch_size"], w["pos_embed"]
                old = round((positions.shape[1] - 1) ** 0.5)
                resized = F.interpolate(positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2), size=(grid, grid),
                                        mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
                own = net.patch_embed.projection.bias
                got = net.pos_embed[:, 1:] + (0 if own is None else own.view(1, 1, -1))
                report(f"mmseg positions plus bias at {img_size}, patch_bias={patch_bias}", difference(got, resized + bias))


def stand_in(name, **contents):
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules.setdefault(name, module)


def load_source(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def detectron2_backbone(clone):
    """The class alone: its package wants compiled operators, none of which a plain ViT uses."""
    stand_in("fvcore"), stand_in("fvcore.nn"), stand_in("fvcore.nn.weight_init")
    stand_in("detectron2"), stand_in("detectron2.modeling"), stand_in("detectron2.modeling.backbone")
    stand_in("detectron2.layers", CNNBlockBase=torch.nn.Module, Conv2d=torch.nn.Conv2d, get_norm=None)
    stand_in("detectron2.modeling.backbone.fpn", _assert_strides_are_log2_contiguous=None)
    stand_in("detectron2.modeling.backbone.backbone", Backbone=torch.nn.Module)
    load_source("detectron2.modeling.backbone.utils", f"{clone}/detectron2/modeling/backbone/utils.py")
    return load_source("detectron2.modeling.backbone.vit", f"{clone}/detectron2/modeling/backbone/vit.py").ViT


def mmdet_backbone(clone):
    registry = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    stand_in("mmdet"), stand_in("mmdet.registry", MODELS=registry)
    return load_source("mmdet_vit", f"{clone}/projects/ViTDet/vitdet/vit.py").ViT


def detectron2_norm(eps):
    return {"norm_layer": functools.partial(torch.nn.LayerNorm, eps=eps)}


def mmdet_norm(eps):
    return {"norm_cfg": {"type": "LN", "eps": eps}}


def check_vitdet(name, ViT, weights, norm, folder, inputs, model):
    c = settings(f"{folder}/{name}/mask_rcnn_1x.py")
    grid = c["pretrain_img_size"] // c["patch_size"]
    size = grid * c["patch_size"]
    # Windows as large as the image: windowed attention is then the attention the model was trained with.
    net = ViT(img_size=size, patch_size=c["patch_size"], in_chans=c["in_chans"], embed_dim=c["embed_dim"], depth=c["depth"],
              num_heads=c["num_heads"], mlp_ratio=c["mlp_ratio"], use_rel_pos=True, window_size=grid,
              window_block_indexes=c["windowed_blocks"], pretrain_img_size=c["pretrain_img_size"], **norm(c["layer_norm_eps"]))
    keys = net.load_state_dict(weights, strict=False)
    missing = [k for k in keys.missing_keys if "rel_pos" not in k]
    require(f"{name} keys", not missing and not keys.unexpected_keys, f"{missing} {keys.unexpected_keys}" if missing else "")
    # Ours: timm's blocks without the class token, which detectors drop, on the resampled patches where there are any.
    images = F.interpolate(inputs, size=(size, size), mode="bicubic")
    x = net.patch_embed(images).flatten(1, 2) + weights["pos_embed"][:, 1:]
    if c["patch_size"] == model.patch_embed.patch_size[0]:
        x = model.patch_embed(images) + model.pos_embed[:, 1:]
    for block in model.blocks:
        x = block(x)
    got = net.eval()(images)
    got = got["last_feat"] if isinstance(got, dict) else got
    report(f"{name} features", difference(got.flatten(2).transpose(1, 2), x))


def check_detectors(folder, inputs, model, detectron2, mmdetection):
    if detectron2:
        weights = {k.removeprefix("backbone.net."): v for k, v in load(f"{folder}/detectron2", "model").items()}
        backbone = detectron2_backbone(detectron2)
        check_vitdet("detectron2", backbone, weights, detectron2_norm, folder, inputs, model)
    else:
        print("--  detectron2 skipped: no clone given")
    if mmdetection:
        backbone, weights = mmdet_backbone(mmdetection), load(f"{folder}/mmdet", "model")
        check_vitdet("mmdet", backbone, weights, mmdet_norm, folder, inputs, model)
    else:
        print("--  mmdetection skipped: no clone given")


def check_large(path):
    """More than 4 GiB, without reading them."""
    weights = torch.load(path, weights_only=True, mmap=True)
    size = sum(t.numel() * t.element_size() for t in weights.values())
    require("larger than 4 GiB", size > 1 << 32, f"({len(weights)} tensors, {size / 2**30:.2f} GiB)")
    require("aligned", all(t.data_ptr() % 64 == 0 for t in weights.values()))
    expected = torch.arange(next(iter(weights.values())).numel(), dtype=torch.float32)
    first, last = list(weights.values())[0], list(weights.values())[-1]
    require("first and last bit for bit", torch.equal(first, expected) and torch.equal(last, expected))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"    peak memory {peak / 2**20:.2f} GiB, mapped pages included")


def grouped(state):
    """Names and shapes, `{n}` for the numbers of n blocks."""
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


def print_keys(detectron2):
    from transformers import ViTConfig, ViTForImageClassification
    Mmseg, Detectron2 = mmseg_backbone(), detectron2_backbone(detectron2)
    keys = {"timm": {}, "hf": {}, "mmseg": {}, "detectron2": {}}
    for size, width, depth, heads, patch in [("b", 768, 12, 12, 16), ("l", 1024, 24, 16, 16), ("h", 1280, 32, 16, 14)]:
        net = timm.create_model(f"vit_{dict(b='base', l='large', h='huge')[size]}_patch{patch}_224", num_classes=1000)
        keys["timm"][size] = grouped(net.state_dict())
        config = ViTConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
                           patch_size=patch, num_labels=1000)
        keys["hf"][size] = grouped(ViTForImageClassification(config).state_dict())
        net = Mmseg(img_size=224, patch_size=patch, patch_bias=True, embed_dims=width, num_layers=depth, num_heads=heads,
                    out_indices=(depth - 1,))
        keys["mmseg"][size] = grouped(net.state_dict())
        net = Detectron2(embed_dim=width, depth=depth, num_heads=heads, patch_size=16, window_size=14)
        keys["detectron2"][size] = grouped({k: t for k, t in net.state_dict().items() if "rel_pos" not in k})
    lines = json.dumps(keys, indent=1).replace(",\n    ", ", ")
    print(re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", lines))


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", nargs="?")
    arguments.add_argument("outputs", nargs="?")
    arguments.add_argument("--images", metavar="DATA/val")
    arguments.add_argument("--detectron2", metavar="CLONE")
    arguments.add_argument("--mmdetection", metavar="CLONE")
    arguments.add_argument("--large", metavar="FILE")
    arguments.add_argument("--keys", metavar="CLONE")
    parsed = arguments.parse_args()
    if parsed.keys:
        print_keys(parsed.keys)
    elif parsed.large:
        check_large(parsed.large)
    elif not parsed.outputs:
        arguments.error("give the folder of exports and the outputs")
    else:
        check(os.path.abspath(parsed.folder), load_file(parsed.outputs), parsed)
    sys.exit(failed)


@torch.no_grad()
def check(folder, outputs, more):
    inputs = outputs["inputs"]
    logits = outputs["logits"][: len(inputs)]
    scaled = check_timm(folder, inputs, logits)
    check_transformers(folder, inputs, logits)
    check_preprocessing(folder, inputs, more.images)
    model = exact(folder, scaled)
    del scaled
    inputs, reference = inputs[:4], model.state_dict()
    check_files(folder, reference)
    check_resampling(folder, reference)
    check_mmseg(folder, inputs, model)
    check_detectors(folder, inputs, model, more.detectron2, more.mmdetection)


main()
