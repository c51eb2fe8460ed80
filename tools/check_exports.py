#!/usr/bin/env python3
"""Loads every exported folder with the programs that read it, and compares the outputs of these programs with incubate's.

  incubate export CONFIG --format all
  incubate evaluate CONFIG --outputs OUTPUTS
  tools/check_exports.py RUN_DIR/export OUTPUTS [--images DATA/val] [--detectron2 CLONE] [--mmdetection CLONE]
  tools/check_exports.py --large FILE     checks the .pth of more than 4 GiB that an ignored test of src/export/torch_file.rs writes
  tools/check_exports.py --keys CLONE     prints src/export/templates/keys.json, the names of the tensors in the readers' own
                                          classes (CLONE of detectron2)

Needs torch, torchvision, timm, transformers and safetensors. The backbone class of mmsegmentation is checked too if
mmsegmentation==1.2.2, mmengine and mmcv-lite==2.1.0 are installed. The ViTDet backbones of detectron2 and mmdetection, which no
package holds, are checked if their clones are given. A missing reader is named and skipped. Any difference gives exit code 1.

OUTPUTS holds incubate's logits of the test images, and these images as the network saw them: all of them if they are small, such
as Fashion-MNIST's, else the first ones. If the config has data.format = "folder", --images names the folder of its test images,
so that the preprocessing of timm and transformers can be compared too.
"""
import argparse
import functools
import json
import os
import resource
import sys
import types

import timm
import torch
import torch.nn.functional as F
from reader_classes import (
    detectron2_backbone,
    detectron2_norm_options,
    load_source,
    mmdet_backbone,
    mmdet_norm_options,
    mmseg_backbone,
    print_keys,
)
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
    """The largest absolute difference. If a number of b exceeds 10, the difference is divided by a tenth of b's largest number."""
    return ((a - b).abs().max() / (b.abs().max() / 10).clamp(min=1)).item()


def batched(model, inputs, size=100):
    return torch.cat([model(part) for part in inputs.split(size)])


def load(folder, wrapper=None):
    weights = torch.load(f"{folder}/model.pth", weights_only=True, mmap=True)
    return weights[wrapper] if wrapper else weights


def settings(path):
    """The values of the lines `name = VALUE` in a framework's config file, if VALUE is JSON."""
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


def unscaled_model(folder, scaled):
    """Returns timm's model with the weights as they were trained and with the epsilon of that training. Also checks the tensors of
    `scaled`, the exported timm model, in which the tensors that feed the residual stream are scaled for timm's epsilon."""
    weights = load_file(f"{folder}/safetensors/model.safetensors")
    eps = epsilon(folder)
    scale = (1e-6 / eps) ** 0.5
    into_stream = ("cls_token", "pos_embed", "patch_embed.", ".attn.proj.", ".mlp.fc2.")
    equal, largest = True, 0.0
    for name, tensor in scaled.state_dict().items():
        if abs(scale - 1) > 1e-6 and any(part in name for part in into_stream):
            largest = max(largest, difference(tensor, weights[name] * scale))
        else:
            equal &= torch.equal(tensor, weights[name])
    require("timm's unscaled tensors, bit for bit", equal)
    report("timm's scaled tensors", largest)
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


def check_pixels(what, got, inputs, std):
    """Compares pixels as bytes. Pillow rounds to bytes between the two passes of a resize, and another order of arithmetic may
    change that rounding. So any byte may be off by 1, and two bytes in a hundred thousand may be off by 2."""
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
        # The inputs have their final size, so only the normalisation is compared.
        bytes_ = ((inputs[:100] * std + mean) * 255).round().to(torch.uint8)
        got = processor([b for b in bytes_], input_data_format="channels_first", return_tensors="pt")["pixel_values"]
        check_pixels("transformers preprocessing", got, inputs[:100], std)
        return
    from PIL import Image
    paths = [os.path.join(images, c, f) for c in sorted(os.listdir(images)) for f in sorted(os.listdir(os.path.join(images, c)))]
    opened = [Image.open(path).convert("RGB") for path in paths[: len(inputs)]]
    inputs = inputs[: len(opened)]
    for path, image in zip(paths[: len(inputs)], opened, strict=True):
        print(f"    {os.path.basename(path)} {image.width}x{image.height}")
    model = types.SimpleNamespace(pretrained_cfg=config)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    check_pixels("timm preprocessing", torch.stack([transform(image) for image in opened]), inputs, std)
    transform = load_source("hf_evaluate", f"{folder}/hf/evaluate.py").transform(f"{folder}/hf")
    check_pixels("evaluate.py's preprocessing", torch.stack([transform(image) for image in opened]), inputs, std)
    # A centre crop halves the margins. torchvision rounds half a pixel to the even number, and most processors of transformers
    # round it down. So a processor must agree on the images for which both give the same margin.
    size = inputs.shape[-1]
    short = int(size / config["crop_pct"])
    margins = [(int(short * max(i.size) / min(i.size)) - size, short - size) for i in opened]
    same = [all(m % 2 == 0 or round(m / 2) == m // 2 for m in pair) for pair in margins]
    got = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in opened])
    name = type(processor).__name__
    check_pixels(f"transformers preprocessing by {name}, same margins", got[same], inputs[same], std)
    others = [not s for s in same]
    off = ((got - inputs)[others] * std * 255).abs().amax((1, 2, 3)).round().int().tolist() if any(others) else []
    print(f"    the other images by {name}, whose margins are rounded differently: off by at most {off}/255")


def check_files(folder, reference):
    """Checks alignment, names and bits of the .pth and .safetensors files without the programs that read them."""
    for name, wrapper, prefix in [("pth", None, ""), ("mmdet", "model", ""), ("detectron2", "model", "backbone.net.")]:
        weights = load(f"{folder}/{name}", wrapper)
        require(f"{name} aligned", all(t.data_ptr() % 64 == 0 for t in weights.values()))
        # A tensor of another shape was resampled; `check_resampling` compares it.
        theirs = {k: reference[k.removeprefix(prefix)] for k in weights}
        equal = all(k.startswith(prefix) and (torch.equal(t, theirs[k]) if t.shape == theirs[k].shape else
                                              name != "pth" and k.endswith(("patch_embed.proj.weight", "pos_embed")))
                    for k, t in weights.items())
        require(f"{name} names and bits", equal, f"({len(weights)} tensors)")
    require("safetensors bits", all(torch.equal(t, reference[k]) for k, t in load_file(f"{folder}/safetensors/model.safetensors").items()))
    expected = {f"backbone.net.{k}" for k in reference if not k.startswith(("norm.", "head.", "cls_token"))}
    require("detectron2 has exactly the backbone's names", set(load(f"{folder}/detectron2", "model")) == expected, f"({len(expected)} tensors)")


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


def check_mmseg(folder, inputs, model):
    try:
        VisionTransformer = mmseg_backbone()
    # mmsegmentation asserts the version of mmcv.
    except (ImportError, AssertionError) as error:
        print(f"--  mmsegmentation skipped: {error}")
        return
    c = settings(f"{folder}/mmseg/upernet_80k.py")
    size = inputs.shape[-1]
    expected = model.forward_intermediates(inputs, indices=c["out_indices"], norm=False, intermediates_only=True)
    for patch_bias in (False, True):
        for img_size in {size, c["crop"]}:
            # At the training crop the class resizes the position embeddings itself; at the model's image size it does not.
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
                       max(difference(a, b) for a, b in zip(net(inputs), expected, strict=True)))
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


def check_vitdet(name, ViT, weights, norm_options, folder, inputs, model):
    c = settings(f"{folder}/{name}/mask_rcnn_1x.py")
    grid = c["pretrain_img_size"] // c["patch_size"]
    size = grid * c["patch_size"]
    # With windows as large as the image, windowed attention equals the attention that the model was trained with.
    net = ViT(img_size=size, patch_size=c["patch_size"], in_chans=c["in_chans"], embed_dim=c["embed_dim"], depth=c["depth"],
              num_heads=c["num_heads"], mlp_ratio=c["mlp_ratio"], use_rel_pos=True, window_size=grid,
              window_block_indexes=c["windowed_blocks"], pretrain_img_size=c["pretrain_img_size"], **norm_options(c["layer_norm_eps"]))
    keys = net.load_state_dict(weights, strict=False)
    missing = [k for k in keys.missing_keys if "rel_pos" not in k]
    require(f"{name} keys", not missing and not keys.unexpected_keys, f"{missing} {keys.unexpected_keys}" if missing else "")
    # The expected features are those of timm's blocks without the class token, which detectors drop. If the patches were
    # resampled, the backbone's own patch embedding feeds these blocks.
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
        check_vitdet("detectron2", backbone, weights, detectron2_norm_options, folder, inputs, model)
    else:
        print("--  detectron2 skipped: no clone given")
    if mmdetection:
        backbone, weights = mmdet_backbone(mmdetection), load(f"{folder}/mmdet", "model")
        check_vitdet("mmdet", backbone, weights, mmdet_norm_options, folder, inputs, model)
    else:
        print("--  mmdetection skipped: no clone given")


def check_large(path):
    """Checks the first and the last tensor of a memory-mapped file of more than 4 GiB."""
    weights = torch.load(path, weights_only=True, mmap=True)
    size = sum(t.numel() * t.element_size() for t in weights.values())
    require("larger than 4 GiB", size > 1 << 32, f"({len(weights)} tensors, {size / 2**30:.2f} GiB)")
    require("aligned", all(t.data_ptr() % 64 == 0 for t in weights.values()))
    expected = torch.arange(next(iter(weights.values())).numel(), dtype=torch.float32)
    first, last = list(weights.values())[0], list(weights.values())[-1]
    require("first and last bit for bit", torch.equal(first, expected) and torch.equal(last, expected))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"    peak memory {peak / 2**20:.2f} GiB, mapped pages included")


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
def check(folder, outputs, options):
    inputs = outputs["inputs"]
    logits = outputs["logits"][: len(inputs)]
    scaled = check_timm(folder, inputs, logits)
    check_transformers(folder, inputs, logits)
    check_preprocessing(folder, inputs, options.images)
    model = unscaled_model(folder, scaled)
    del scaled
    inputs, reference = inputs[:4], model.state_dict()
    check_files(folder, reference)
    check_resampling(folder, reference)
    check_mmseg(folder, inputs, model)
    check_detectors(folder, inputs, model, options.detectron2, options.mmdetection)


main()
