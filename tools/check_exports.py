#!/usr/bin/env python3
"""Loads every exported folder with the real readers and compares what they compute with what incubate computed.

  incubate export CONFIG --format all
  incubate evaluate CONFIG --outputs OUTPUTS
  tools/check_exports.py RUN_DIR/export OUTPUTS [--detectron2 CLONE] [--mmdetection CLONE]

Needs torch, timm, transformers and safetensors. With mmsegmentation 1.2.2, mmengine and mmcv (mmcv-lite does) also its
backbone class; with clones of detectron2 and mmdetection the backbones of their ViTDet, which are in no package. A reader that
is not there is named and skipped; anything unequal ends in exit code 1.

OUTPUTS holds incubate's logits of the test images and the first of these as the network saw them.
"""
import argparse, functools, importlib.util, json, os, sys, types
import timm, torch
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


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


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


def check_timm(folder, inputs, logits):
    eps = json.load(open(f"{folder}/hf/config.json"))["layer_norm_eps"]
    norm = functools.partial(torch.nn.LayerNorm, eps=eps)
    model = timm.create_model(f"local-dir:{folder}/timm", pretrained=True, norm_layer=norm).eval()
    got = model(inputs)
    report("timm logits", relative(got, logits))
    require("timm top-1", bool((got.argmax(1) == logits.argmax(1)).all()))
    return model


def check_transformers(folder, inputs, logits):
    from transformers import AutoImageProcessor, ViTForImageClassification
    model, info = ViTForImageClassification.from_pretrained(f"{folder}/hf", output_loading_info=True)
    keys = {kind: list(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    require("transformers keys", not any(keys.values()), keys if any(keys.values()) else "")
    report("transformers logits", relative(model.eval()(inputs).logits, logits))
    # The pixels that its processor makes of an image of the evaluated size, against the normalisation timm's config says.
    config = json.load(open(f"{folder}/timm/config.json"))["pretrained_cfg"]
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ("mean", "std"))
    if config["crop_pct"] == 1.0:
        processor = AutoImageProcessor.from_pretrained(f"{folder}/hf")
        pixels = ((inputs[0] * std + mean) * 255).round().to(torch.uint8)
        got = processor(pixels.numpy(), input_data_format="channels_first", return_tensors="pt")["pixel_values"][0]
        report("transformers preprocessing", ((got - inputs[0]) * std).abs().max().item(), 1 / 255)


def check_files(folder, reference):
    """The .pth files: equal bit for bit, mapped, aligned; names and shapes for readers that are not here."""
    for name, wrapped, prefix in [("pth", None, ""), ("mmdet", "model", ""), ("detectron2", "model", "backbone.net.")]:
        weights = load(f"{folder}/{name}", wrapped)
        require(f"{name} aligned", all(t.data_ptr() % 64 == 0 for t in weights.values()))
        resampled = ("patch_embed.proj.weight", "pos_embed") if name != "pth" else ()
        equal = all(k.startswith(prefix) and (k[len(prefix):].endswith(resampled or "-") or torch.equal(t, reference[k[len(prefix):]]))
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
        report("patch kernel as timm resamples it", relative(kernel, resample_patch_embed(reference["patch_embed.proj.weight"], size)))
    positions, whole = weights["backbone.net.pos_embed"], reference["pos_embed"]
    if positions.shape != whole.shape:
        old, new = (round((t.shape[1] - 1) ** 0.5) for t in (whole, positions))
        grid = whole[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
        report("position embeddings", relative(positions, torch.cat([whole[:, :1], grid], 1)))


def mmseg_backbone():
    """mmsegmentation's class alone: the rest of the package wants compiled operators."""
    import mmseg, mmseg.registry
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
    except ImportError as error:
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
                       max(relative(a, b) for a, b in zip(net(inputs), ours)))
            else:
                w = model.state_dict()
                bias = w["patch_embed.proj.bias"].view(1, 1, -1)
                grid, positions = img_size // c["patch_size"], w["pos_embed"]
                old = round((positions.shape[1] - 1) ** 0.5)
                resized = F.interpolate(positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2), size=(grid, grid),
                                        mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
                own = net.patch_embed.projection.bias
                got = net.pos_embed[:, 1:] + (0 if own is None else own.view(1, 1, -1))
                report(f"mmseg positions plus bias at {img_size}, patch_bias={patch_bias}", relative(got, resized + bias))


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
    report(f"{name} features", relative(got.flatten(2).transpose(1, 2), x))


def check_detectors(folder, inputs, model, detectron2, mmdetection):
    if detectron2:
        weights = {k.removeprefix("backbone.net."): v for k, v in load(f"{folder}/detectron2", "model").items()}
        norm = lambda eps: dict(norm_layer=functools.partial(torch.nn.LayerNorm, eps=eps))
        check_vitdet("detectron2", detectron2_backbone(detectron2), weights, norm, folder, inputs, model)
    else:
        print("--  detectron2 skipped: no clone given")
    if mmdetection:
        norm = lambda eps: dict(norm_cfg=dict(type="LN", eps=eps))
        check_vitdet("mmdet", mmdet_backbone(mmdetection), load(f"{folder}/mmdet", "model"), norm, folder, inputs, model)
    else:
        print("--  mmdetection skipped: no clone given")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder")
    arguments.add_argument("outputs")
    arguments.add_argument("--detectron2", metavar="CLONE")
    arguments.add_argument("--mmdetection", metavar="CLONE")
    arguments = arguments.parse_args()
    folder = os.path.abspath(arguments.folder)
    outputs = load_file(arguments.outputs)
    inputs = outputs["inputs"]
    logits = outputs["logits"][: len(inputs)]
    with torch.no_grad():
        model = check_timm(folder, inputs, logits)
        check_transformers(folder, inputs, logits)
        reference = model.state_dict()
        check_files(folder, reference)
        check_resampling(folder, reference)
        check_mmseg(folder, inputs, model)
        check_detectors(folder, inputs, model, arguments.detectron2, arguments.mmdetection)
    sys.exit(failed)


main()
