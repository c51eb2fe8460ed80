#!/usr/bin/env python3
"""Writes tests/golden/segmentation.safetensors: results of mmsegmentation's heads, with which tests/suite/segmentation.rs compares
incubate's results.

  tools/golden_segmentation.py [FOLDER]      (needs torch, safetensors, mmsegmentation 1.2.2, mmcv-lite 2.1.0, mmengine 0.10.7)

Weights, maps and labels come from the formulas below, which the test computes too, so that only results are stored: for both
conventions of the mean the loss, the gradients of the maps and of every parameter, and BatchNorm's buffers after one step; then UPerHead's
logits in an evaluation.
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


def heads(avg_non_ignore):
    uper = head(UPerHead, avg_non_ignore, weight=1.0, in_channels=[WIDTH] * 4, in_index=[0, 1, 2, 3], channels=CHANNELS,
                pool_scales=(1, 2, 3, 6))
    fcn = head(FCNHead, avg_non_ignore, weight=0.4, in_channels=WIDTH, in_index=3, channels=AUXILIARY, num_convs=1,
               concat_input=False)
    both = torch.nn.ModuleDict({"decode_head": uper, "auxiliary_head": fcn})
    with torch.no_grad():
        for name, value in both.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            numbers = 0.1 * tensor(value.shape, sum(name.encode()))
            value.copy_(1 + numbers if name.endswith(("bn.weight", "running_var")) else numbers)
    return both


def main(folder):
    torch.set_num_threads(1)
    labels = np.arange(BATCH * CROP * CROP) // 5 % 10
    labels = np.where(labels < CLASSES, labels, 255).reshape(BATCH, CROP, CROP)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.from_numpy(map)[None])) for map in labels]
    results = {}
    for mean, avg_non_ignore in [("all", False), ("labelled", True)]:
        both = heads(avg_non_ignore).train()
        maps = [tensor((BATCH, WIDTH, GRID, GRID), 100.0 * tap).requires_grad_() for tap in range(4)]
        loss = sum(h.loss_by_feat(h(maps), samples)["loss_ce"] for h in both.values())
        loss.backward()
        results[f"{mean}.loss"] = loss.detach().reshape(1)
        results |= {f"{mean}.map.{tap}": map.grad for tap, map in enumerate(maps)}
        results |= {f"{mean}.{name}": p.grad for name, p in both.named_parameters()}
    results |= {name: b for name, b in both.named_buffers() if "running" in name}
    with torch.no_grad():
        results["logits"] = heads(False).eval()["decode_head"](maps)
    print("loss:", results["all.loss"], results["labelled.loss"], "logits up to", results["logits"].abs().max())
    save_file({name: value.contiguous() for name, value in results.items()}, os.path.join(folder, "segmentation.safetensors"))


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "..", "tests", "golden"))
