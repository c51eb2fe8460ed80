#!/usr/bin/env python3
"""Writes tests/golden/segmentation.safetensors: results of mmsegmentation's heads, with which tests/suite/segmentation.rs compares
incubate's results.

  tools/golden_segmentation.py [FOLDER]      (needs torch, safetensors, mmsegmentation 1.2.2, mmcv-lite 2.1.0, mmengine 0.10.7)

Weights, maps and labels come from the formulas below, which the test computes too, so that only results are stored: the loss, the
gradients of the maps and of every parameter, BatchNorm's buffers after one step, and UPerHead's logits in an evaluation. There are
results for each neck. Without a neck, the loss and the gradients are stored twice: with a mean over all pixels ("all"), and with a
mean over the labelled pixels ("labelled").
"""
import os
import sys
import types

import numpy as np
import torch
from safetensors.torch import save_file

# The heads use none of the compiled operators that mmcv-lite lacks.
operators = types.ModuleType("mmcv._ext")
operators.__getattr__ = lambda name: None
sys.modules["mmcv._ext"] = operators
from mmengine.structures import PixelData  # noqa: E402
from mmseg.models.decode_heads import FCNHead, UPerHead  # noqa: E402
from mmseg.models.necks import Feature2Pyramid, MultiLevelNeck  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

BATCH, WIDTH, GRID, CROP, CLASSES, CHANNELS, AUXILIARY = 2, 16, 8, 32, 7, 8, 6


def wave(count, phase):
    return np.sin(0.37 * np.arange(count, dtype=np.float64) + phase)


def tensor(shape, phase):
    return torch.from_numpy(wave(int(np.prod(shape)), phase).astype(np.float32)).view(shape)


def head(kind, avg_non_ignore, **keys):
    loss = dict(type="CrossEntropyLoss", loss_weight=keys.pop("weight"), avg_non_ignore=avg_non_ignore)
    norm = dict(type="BN", requires_grad=True)
    return kind(num_classes=CLASSES, norm_cfg=norm, align_corners=False, dropout_ratio=0.0, loss_decode=loss, **keys)


def neck_of(name):
    if name == "mln":
        return MultiLevelNeck([WIDTH] * 4, WIDTH, scales=[4, 2, 1, 0.5])
    if name == "pyramid":
        return Feature2Pyramid(WIDTH, norm_cfg=dict(type="BN", requires_grad=True))
    return torch.nn.Identity()


def model(avg_non_ignore, neck):
    uper = head(UPerHead, avg_non_ignore, weight=1.0, in_channels=[WIDTH] * 4, in_index=[0, 1, 2, 3], channels=CHANNELS,
                pool_scales=(1, 2, 3, 6))
    fcn = head(FCNHead, avg_non_ignore, weight=0.4, in_channels=WIDTH, in_index=2 if neck == "pyramid" else 3, channels=AUXILIARY,
               num_convs=1, concat_input=False)
    parts = torch.nn.ModuleDict({"neck": neck_of(neck), "decode_head": uper, "auxiliary_head": fcn})
    norms = {name for name, part in parts.named_modules() if isinstance(part, torch.nn.BatchNorm2d)}
    with torch.no_grad():
        for name, value in parts.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            owner, _, part = name.rpartition(".")
            # Small weights of a neck would leave BatchNorm with variances near its epsilon.
            scale = 1.0 if name.startswith("neck.") and owner not in norms else 0.1
            numbers = scale * tensor(value.shape, sum(name.encode()))
            value.copy_(1 + numbers if owner in norms and part in ("weight", "running_var") else numbers)
    return parts


def trained(avg_non_ignore, neck, samples):
    """The loss and the gradients of one step, BatchNorm's buffers after it, and UPerHead's logits in an evaluation."""
    parts = model(avg_non_ignore, neck).train()
    maps = [tensor((BATCH, WIDTH, GRID, GRID), 100.0 * tap).requires_grad_() for tap in range(4)]
    levels = parts["neck"](maps)
    loss = sum(parts[head].loss_by_feat(parts[head](levels), samples)["loss_ce"] for head in ("decode_head", "auxiliary_head"))
    loss.backward()
    results = {"loss": loss.detach().reshape(1)}
    results |= {f"map.{tap}": map.grad for tap, map in enumerate(maps)}
    results |= {name: p.grad for name, p in parts.named_parameters()}
    buffers = {name: b for name, b in parts.named_buffers() if "running" in name}
    with torch.no_grad():
        evaluated = model(avg_non_ignore, neck).eval()
        logits = evaluated["decode_head"](evaluated["neck"]([map.detach() for map in maps]))
    return results, buffers, logits


def main(folder):
    torch.set_num_threads(1)
    labels = np.arange(BATCH * CROP * CROP) // 5 % 10
    labels = np.where(labels < CLASSES, labels, 255).reshape(BATCH, CROP, CROP)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.from_numpy(map)[None])) for map in labels]
    all_results = {}
    for case, avg_non_ignore, neck in [("all", False, "none"), ("labelled", True, "none"), ("mln", False, "mln"),
                                       ("pyramid", False, "pyramid")]:
        results, buffers, logits = trained(avg_non_ignore, neck, samples)
        all_results |= {f"{case}.{name}": value for name, value in results.items()}
        # Buffers and logits do not depend on the loss's mean, so without a neck they are stored once.
        prefix = "" if neck == "none" else f"{case}."
        all_results |= {prefix + name: value for name, value in buffers.items()} | {f"{prefix}logits": logits}
        print(case, "loss", float(results["loss"]), "logits up to", float(logits.abs().max()))
    save_file({name: value.contiguous() for name, value in all_results.items()}, os.path.join(folder, "segmentation.safetensors"))


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "..", "tests", "golden"))
