#!/usr/bin/env python3
"""Evaluates a model that incubate has trained for segmentation by mmsegmentation's own model, transforms, inference and metric, and
compares the figures with incubate's.

  incubate segment CONFIG
  tools/check_segmentation.py INCUBATE RUN_DIR      (needs torch, h5py, opencv-python, mmsegmentation 1.2.2, mmcv-lite 2.1.0, mmengine)

RUN_DIR holds segment.h5 and the config, whose segmentation.path must be a folder. The script prints the number of parameters of the
neck and the heads. Then both programs evaluate the test images whole, in windows, and at several scales with mirror images. mIoU,
mAcc and aAcc may differ by 0.05 points, since a resized photograph may differ by one grey value. Any larger difference gives exit
code 1.
"""
import json
import os
import subprocess
import sys
import tomllib
import types

import cv2
import h5py
import numpy as np
import torch

# The model uses none of the compiled operators that mmcv-lite lacks.
operators = types.ModuleType("mmcv._ext")
operators.__getattr__ = lambda name: None
sys.modules["mmcv._ext"] = operators
import mmcv  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402
from mmseg.evaluation import IoUMetric  # noqa: E402
from mmseg.models import EncoderDecoder  # noqa: E402

TOLERANCE = 0.05
IGNORED = 255
CASES = [
    ("whole", ["segmentation.inference=whole"]),
    ("windows", ["segmentation.inference=slide"]),
    ("scales and mirror", ["segmentation.inference=whole", "segmentation.test_scales=[0.75, 1.0, 1.5]", "segmentation.test_flip=true"]),
]


def build(config):
    """mmsegmentation's model of the config, with BatchNorm in place of SyncBatchNorm."""
    keys, net = config["segmentation"], config["model"]
    depths, width = net["depths"], net["width"]
    stages = keys["taps"] or [-(-(level + 1) * len(depths) // 4) - 1 for level in range(4)]
    norm = dict(type="BN", requires_grad=True)
    head = dict(num_classes=keys["classes"], norm_cfg=norm, align_corners=False, dropout_ratio=keys["head_dropout"])
    uper = dict(type="UPerHead", in_channels=[width] * 4, in_index=[0, 1, 2, 3], channels=keys["width"], pool_scales=(1, 2, 3, 6), **head)
    fcn = dict(type="FCNHead", in_channels=width, in_index=2 if keys.get("neck", "none") == "pyramid" else 3, channels=keys["auxiliary_width"],
               num_convs=1, concat_input=False, **head)
    necks = {
        "none": None,
        "mln": dict(type="MultiLevelNeck", in_channels=[width] * 4, out_channels=width, scales=[4, 2, 1, 0.5]),
        "pyramid": dict(type="Feature2Pyramid", embed_dim=width, norm_cfg=norm),
    }
    backbone = dict(
        type="VisionTransformer", img_size=(keys["crop"],) * 2, patch_size=net["patch_size"], embed_dims=width, num_layers=sum(depths),
        num_heads=net["heads"], mlp_ratio=int(net["mlp_ratio"]), out_indices=[sum(depths[: stage + 1]) - 1 for stage in stages],
        qkv_bias=net["qkv_bias"], norm_cfg=dict(type="LN", eps=net["layer_norm_eps"]), patch_bias=True, final_norm=False)
    stride = keys["stride"] or max(2 * keys["crop"] // 3, 1)
    test = ConfigDict(mode="whole", crop_size=(keys["crop"],) * 2, stride=(stride,) * 2)
    # mmsegmentation's backbone gives the output of a block only once, even if two taps name it.
    assert len(set(stages)) == 4, "two taps are equal"
    parts = dict(backbone=backbone, neck=necks[keys.get("neck", "none")], decode_head=uper, auxiliary_head=fcn, test_cfg=test)
    return EncoderDecoder(**{name: part for name, part in parts.items() if part})


NAMES = [("attn.qkv.weight", "attn.attn.in_proj_weight"), ("attn.qkv.bias", "attn.attn.in_proj_bias"), ("attn.proj", "attn.attn.out_proj"),
         ("norm1", "ln1"), ("norm2", "ln2"), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1")]


def weights(path, depths):
    """The parameters of segment.h5 by mmsegmentation's names."""
    state = {}
    with h5py.File(path) as file:
        for stage, group in file["stage"].items():
            for name, value in group.items():
                tensor = torch.from_numpy(np.asarray(value))
                if int(stage) == len(depths):
                    state[name] = tensor
                    continue
                if name.startswith("blocks."):
                    number, rest = name.removeprefix("blocks.").split(".", 1)
                    for ours, theirs in NAMES:
                        rest = rest.replace(ours, theirs)
                    name = f"layers.{int(number) + sum(depths[:int(stage)])}.{rest}"
                state["backbone." + name.replace("patch_embed.proj", "patch_embed.projection")] = tensor
    return state


def pairs(config):
    """The test images in BGR with their label maps."""
    keys = config["segmentation"]
    images = next(p for p in (os.path.join(keys["path"], "images", s) for s in ("validation", "val", "test")) if os.path.isdir(p))
    for folder, _, files in sorted(os.walk(images, followlinks=True)):
        for name in sorted(files):
            path = os.path.join(folder, name)
            label = cv2.imread(os.path.splitext(path.replace("/images/", "/annotations/"))[0] + ".png", cv2.IMREAD_UNCHANGED)
            if keys["ignore"] < IGNORED:
                label[label == keys["ignore"]] = IGNORED
            if keys["reduce_zero_label"]:
                label[label == 0] = IGNORED
                label = np.where(label == IGNORED, label, label - 1)
            yield cv2.imread(path), label


def logits(model, config, image, scale, is_mirrored):
    """The logits of an image at its own size. For the model it is resized as mmsegmentation 0.x resizes at a ratio."""
    crop, data = config["segmentation"]["crop"], config["data"]
    resized = mmcv.imrescale(image, (int(4 * crop * scale), int(crop * scale)))
    mean, std = (255 * np.array(data[key], dtype=np.float32) for key in ("mean", "std"))
    pixels = torch.from_numpy(mmcv.imnormalize(resized, mean, std, to_rgb=True)).permute(2, 0, 1)[None]
    pixels = pixels.flip(3) if is_mirrored else pixels
    meta = dict(ori_shape=image.shape[:2], img_shape=pixels.shape[2:], pad_shape=pixels.shape[2:], padding_size=[0] * 4)
    output = model.inference(pixels, [meta])
    return torch.nn.functional.interpolate(output.flip(3) if is_mirrored else output, image.shape[:2], mode="bilinear")


def evaluate(model, config, sets):
    chosen = dict(s.split("=") for s in sets)
    scales = json.loads(chosen.get("segmentation.test_scales", "[1.0]"))
    flips = [False, True] if chosen.get("segmentation.test_flip") == "true" else [False]
    model.test_cfg["mode"] = chosen["segmentation.inference"]
    classes, areas = config["segmentation"]["classes"], []
    with torch.no_grad():
        for image, label in pairs(config):
            views = [logits(model, config, image, scale, flip) for scale in scales for flip in flips]
            mean = views[0] if len(views) == 1 else sum(view.softmax(1) for view in views)
            areas.append(IoUMetric.intersect_and_union(mean.argmax(1)[0], torch.from_numpy(label), classes, IGNORED))
    sums = [sum(parts) for parts in zip(*areas, strict=False)]
    figures = IoUMetric.total_area_to_metrics(*sums, metrics=["mIoU"])
    return {"mIoU": 100 * np.nanmean(figures["IoU"]), "mAcc": 100 * np.nanmean(figures["Acc"]), "aAcc": 100 * float(figures["aAcc"])}


def main(incubate, run):
    with open(os.path.join(run, "config.toml"), "rb") as file:
        config = tomllib.load(file)
    path, model = os.path.join(run, "segment.h5"), build(config).eval()
    missing, unknown = model.load_state_dict(weights(path, config["model"]["depths"]), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    assert not missing and not unknown, (missing, unknown)
    heads = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    print(f"all tensors of segment.h5 are mmsegmentation's; neck and heads: {heads} parameters; {len(list(pairs(config)))} images")
    is_bad = False
    for case, sets in CASES:
        arguments = [a for s in sets for a in ("--set", s)]
        output = subprocess.run([incubate, "-qq", "evaluate", os.path.join(run, "config.toml"), "--run-dir", run, "--weights", path,
                                 "--json", *arguments], check=True, capture_output=True, text=True).stdout
        ours, theirs = json.loads(output), evaluate(model, config, sets)
        difference = max(abs(ours[key] - theirs[key]) for key in theirs)
        is_bad |= difference > TOLERANCE
        both = ", ".join(f"{key} {ours[key]:.3f} / {theirs[key]:.3f}" for key in theirs)
        print(f"{case + ', incubate / mmsegmentation:':<44} {both}{'' if difference <= TOLERANCE else '  DIFFERS'}")
    sys.exit(int(is_bad))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
