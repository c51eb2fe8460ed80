#!/usr/bin/env python3
"""Detects objects with incubate's weights by detectron2's own model, transforms and inference, and compares the detections.

  incubate detect CONFIG
  tools/check_detection.py INCUBATE RUN_DIR DETECTRON2      (needs torch, torchvision, timm, h5py, pillow, pycocotools, fvcore, iopath,
                                                             omegaconf, hydra-core; DETECTRON2 is a clone)

RUN_DIR holds detect.h5 and the config, whose detection.path must be a folder of COCO's layout. Both programs write results of the
test images. Of the detections with a score of at least 0.1, 95 % must have a counterpart of the same class with an IoU of at least
0.9 and a score that differs by at most 0.02, because a resized photograph may differ by one grey value. pycocotools evaluates both
programs' results. The figures that incubate prints must be those of its own results file, and the figures of the two programs may
differ by one point, since detections with nearly equal scores may change places. A larger difference gives exit code 1.
"""
import contextlib
import functools
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import types

import h5py
import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

TOLERANCE = 1.0
LEAST_SCORE, LEAST_IOU, LARGEST_STEP, LEAST_SHARE = 0.1, 0.9, 0.02, 0.95
NAMES = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]


def detectron2_model(clone, config):
    """detectron2's model `configs/common/models/mask_rcnn_vitdet.py`, with timm's blocks and a class token in the backbone."""
    sys.path.insert(0, clone)
    # The model uses none of the compiled operators.
    sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")
    from detectron2.config import LazyCall as L
    from detectron2.config import LazyConfig, instantiate
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import Backbone
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
    from detectron2.modeling.backbone.utils import window_partition, window_unpartition

    keys, net = config["detection"], config["model"]
    patch = net["patch_size"]

    class Windowed(torch.nn.Module):
        """Attention within windows, as in detectron2's `Block`; the class token attends to itself."""

        def __init__(self, attention):
            super().__init__()
            self.qkv, self.proj, self.attention = attention.qkv, attention.proj, [attention]

        def forward(self, tokens, **_):
            side, size = keys["crop"] // patch, keys["window"]
            windows, padded = window_partition(tokens[:, 1:].unflatten(1, (side, side)), size)
            mixed = self.attention[0](windows.flatten(1, 2)).unflatten(1, (size, size))
            mixed = window_unpartition(mixed, size, padded, (side, side)).flatten(1, 2)
            return torch.cat([self.attention[0](tokens[:, :1]), mixed], 1)

    class Tokens(Backbone):
        """The map of the tokens after the last block."""

        def __init__(self):
            super().__init__()
            self.vit = timm.models.VisionTransformer(
                img_size=keys["crop"], patch_size=patch, embed_dim=net["width"], depth=sum(net["depths"]), num_heads=net["heads"],
                mlp_ratio=net["mlp_ratio"], qkv_bias=net["qkv_bias"], num_classes=0,
                norm_layer=functools.partial(torch.nn.LayerNorm, eps=net["layer_norm_eps"]))
            self.vit.norm = torch.nn.Identity()
            blocks = len(self.vit.blocks)
            whole = [-(-quarter * blocks // 4) - 1 for quarter in range(1, 5)]
            for number, block in enumerate(self.vit.blocks):
                if keys["window"] and number not in whole:
                    block.attn = Windowed(block.attn)

        def forward(self, images):
            tokens = self.vit.forward_features(images)[:, 1:]
            side = keys["crop"] // patch
            return {"last_feat": tokens.transpose(1, 2).reshape(len(images), -1, side, side)}

        def output_shape(self):
            return {"last_feat": ShapeSpec(channels=net["width"], stride=patch)}

    class LastLevel(LastLevelMaxPool):
        def __init__(self, level):
            super().__init__()
            self.in_feature = level

    model = LazyConfig.load(os.path.join(clone, "configs/common/models/mask_rcnn_vitdet.py")).model
    model.backbone.in_feature = "last_feat"
    model.backbone.net = L(Tokens)()
    model.backbone.square_pad = keys["crop"]
    model.roi_heads.num_classes = keys["classes"]
    width, hidden = keys["width"], keys["hidden"]
    model.backbone.out_channels = model.proposal_generator.head.in_channels = width
    heads = model.roi_heads
    heads.box_head.input_shape, heads.mask_head.input_shape = (ShapeSpec(channels=width, height=side, width=side) for side in (7, 14))
    heads.box_head.conv_dims, heads.box_head.fc_dims, heads.mask_head.conv_dims = [width] * 4, [hidden], [width] * 5
    heads.box_predictor.input_shape = ShapeSpec(channels=hidden)
    model.pixel_mean, model.pixel_std = ([255 * value for value in config["data"][key]] for key in ("mean", "std"))
    strides = [patch / 4 * 2**level for level in range(5)]
    # detectron2 names a level after the logarithm of its stride.
    levels = [f"p{int(math.log2(stride))}" for stride in strides]
    model.backbone.top_block = L(LastLevel)(level=levels[3])
    model.proposal_generator.in_features = levels
    model.roi_heads.box_in_features = model.roi_heads.mask_in_features = levels[:4]
    model.proposal_generator.anchor_generator.strides = strides
    model.proposal_generator.anchor_generator.sizes = [[8 * stride] for stride in strides]
    for pooler in (model.roi_heads.box_pooler, model.roi_heads.mask_pooler):
        pooler.scales = [1 / stride for stride in strides[:4]]
        # A box of 14 patches is pooled from the map of the tokens.
        pooler.canonical_box_size, pooler.canonical_level = 14 * patch, int(math.log2(patch))
    if not keys["masks"]:
        for part in ("mask_in_features", "mask_pooler", "mask_head"):
            model.roi_heads[part] = None
    return instantiate(model)


def weights(path, net):
    """The parameters of detect.h5: those of the blocks by timm's names, all others by detectron2's names."""
    state, depths = {}, net["depths"]
    # detectron2 names a part of the pyramid after the logarithm of its stride. incubate uses the names for patches of 16 pixels.
    lower = 4 - int(math.log2(net["patch_size"]))
    with h5py.File(path) as file:
        for stage, group in file["stage"].items():
            for name, value in group.items():
                tensor = torch.from_numpy(np.asarray(value))
                if int(stage) < len(depths):
                    if name.startswith("blocks."):
                        number, rest = name.removeprefix("blocks.").split(".", 1)
                        name = f"blocks.{int(number) + sum(depths[:int(stage)])}.{rest}"
                    name = f"backbone.net.vit.{name}"
                name = re.sub(r"simfp_(\d)", lambda found: f"simfp_{int(found[1]) - lower}", name)
                state[name] = tensor
    return state


def results(model, config, coco):
    """The detections of all test images by detectron2."""
    from detectron2.data.transforms import ResizeShortestEdge
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    keys, ids = config["detection"], sorted(coco.getCatIds())
    resize = ResizeShortestEdge(keys["crop"], keys["crop"])
    found = []
    for image_id in sorted(coco.getImgIds()):
        file = os.path.join(keys["path"], "val2017", coco.loadImgs(image_id)[0]["file_name"])
        pixels = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
        resized = resize.get_transform(pixels).apply_image(pixels)
        image = torch.tensor(resized).permute(2, 0, 1).float()
        with torch.no_grad():
            output = model([{"image": image, "height": pixels.shape[0], "width": pixels.shape[1]}])[0]["instances"]
        for one in instances_to_coco_json(output, image_id):
            found.append({**one, "category_id": ids[one["category_id"]]})
    return found


def counterparts(ours, theirs):
    """The share of the detections `ours` with a score of at least LEAST_SCORE that have a counterpart in `theirs`."""
    kept = [one for one in ours if one["score"] >= LEAST_SCORE]
    found = 0
    for one in kept:
        others = [o for o in theirs if (o["image_id"], o["category_id"]) == (one["image_id"], one["category_id"])]
        overlaps = mask.iou([one["bbox"]], [o["bbox"] for o in others], [0] * len(others))[0] if others else []
        alike = [o for o, overlap in zip(others, overlaps, strict=True) if overlap >= LEAST_IOU]
        found += any(abs(o["score"] - one["score"]) <= LARGEST_STEP for o in alike)
    return found / max(len(kept), 1)


def figures(coco, found, kind):
    """COCO's first six figures in percent, by pycocotools."""
    if kind == "segm":
        found = [{key: value for key, value in one.items() if key != "bbox"} for one in found]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(found))), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NAMES, 100 * evaluation.stats[:6], strict=True))


def main(incubate, run, clone):
    with open(os.path.join(run, "config.toml"), "rb") as file:
        config = tomllib.load(file)
    path, model = os.path.join(run, "detect.h5"), detectron2_model(clone, config).eval()
    missing, unknown = model.load_state_dict(weights(path, config["model"]), strict=False)
    missing = [name for name in missing if name not in ("pixel_mean", "pixel_std")]
    assert not missing and not unknown, (missing, unknown)
    heads = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone.net."))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(os.path.join(config["detection"]["path"], "annotations/instances_val2017.json"))
    print(f"all tensors of detect.h5 are detectron2's; pyramid and heads: {heads} parameters; {len(coco.getImgIds())} images")
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "results.json")
        output = subprocess.run([incubate, "-qq", "evaluate", os.path.join(run, "config.toml"), "--run-dir", run, "--weights", path,
                                 "--json", "--outputs", file], check=True, capture_output=True, text=True).stdout
        printed = json.loads(output)
        with open(file) as text:
            ours = json.load(text)
    theirs = results(model, config, coco)
    shares = counterparts(ours, theirs), counterparts(theirs, ours)
    is_bad = min(shares) < LEAST_SHARE
    print(f"detections: incubate {len(ours)}, detectron2 {len(theirs)}; with a counterpart: {shares[0]:.1%}, {shares[1]:.1%}"
          f"{'  DIFFERS' if is_bad else ''}")
    for kind, word in [("bbox", "box"), ("segm", "mask")][: 1 + config["detection"]["masks"]]:
        a, b = figures(coco, ours, kind), figures(coco, theirs, kind)
        for name in NAMES:
            # Without an object of this size, pycocotools gives −1, which is −100 %.
            shown = printed.get(f"{word}_{name}", -100.0)
            differs = abs(a[name] - b[name]) > TOLERANCE or abs(a[name] - shown) > 1e-6
            is_bad |= differs
            print(f"{word}_{name:<9} incubate {shown:7.3f}, its results file {a[name]:7.3f}, detectron2 {b[name]:7.3f}{'  DIFFERS' if differs else ''}")
    sys.exit(int(is_bad))


if __name__ == "__main__":
    main(*sys.argv[1:])
