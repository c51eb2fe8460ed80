#!/usr/bin/env python3
"""Writes the results of timm and torch with which tests/suite/parity.rs compares incubate's results.

  tools/golden.py [FOLDER]      (needs torch, timm, safetensors; by default FOLDER is tests/golden)

Weights, images and targets come from the formulas in `wave`, `network` and `batch` below. The tests compute them too, so that only
results are stored. Each .safetensors file holds the logits, the loss and the gradients of one network, by timm's names. In a hybrid
only the stage that trains has gradients. curves.json holds the losses and learning rates of 20 steps of each network, and the
learning rates of DeiT's schedule.
"""
import json
import os
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler import CosineLRScheduler

# image, patch, channels, classes, width, heads, depths, qkv bias, LayerNorm eps
SHAPES = {
    "gray": (28, 7, 1, 10, 24, 4, [2, 2, 2, 2], True, 1e-6),
    "color": (16, 4, 3, 7, 32, 2, [1, 2, 3], False, 1e-5),
    "wide": (24, 8, 3, 5, 40, 5, [3, 1], True, 1e-6),
}
BATCH, STEPS, WARMUP = 6, 20, 3


def wave(count, phase):
    return np.sin(0.37 * np.arange(count, dtype=np.float64) + phase)


def network(shape, depths):
    image, patch, chans, classes, width, heads, _, bias, eps = SHAPES[shape]
    model = VisionTransformer(img_size=image, patch_size=patch, in_chans=chans, num_classes=classes, embed_dim=width,
                              depth=sum(depths), num_heads=heads, qkv_bias=bias, norm_layer=partial(torch.nn.LayerNorm, eps=eps))
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = 0.1 * wave(p.numel(), sum(name.encode()))
            if "norm" in name and name.endswith("weight"):
                values = 1 + values
            p.copy_(torch.from_numpy(values.astype(np.float32)).view(p.shape))
    return model


def batch(shape, step):
    image, _, chans, classes = SHAPES[shape][:4]
    images = wave(BATCH * chans * image * image, 1000.0 + step).astype(np.float32).reshape(BATCH, chans, image, image)
    raw = (1 + wave(BATCH * classes, 2000.0 + step).reshape(BATCH, classes)) ** 2
    return torch.from_numpy(images), torch.from_numpy((raw / raw.sum(1, keepdims=True)).astype(np.float32))


def loss_of(model, images, targets):
    logits = model(images)
    return logits, torch.sum(-targets * F.log_softmax(logits, -1), -1).mean()


def stage_of(name, depths):
    if name.startswith("blocks."):
        return [s for s, d in enumerate(depths) for _ in range(d)][int(name.split(".")[1])]
    return 0 if name.startswith(("patch_embed", "pos_embed", "cls_token")) else len(depths) - 1


def no_decay(name, p):
    return p.ndim <= 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")


def main(folder):
    os.makedirs(folder, exist_ok=True)
    torch.set_num_threads(1)
    curves = {}
    for shape, (*_, target_depths, _, _) in SHAPES.items():
        stages = len(target_depths)
        cases = {"target": (target_depths, None)}
        for i in range(stages):
            cases[f"hybrid-{i}"] = ([d if s == i else 1 for s, d in enumerate(target_depths)], i)
        for case, (depths, index) in cases.items():
            model = network(shape, depths)
            logits, loss = loss_of(model, *batch(shape, 0))
            loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if index is None or stage_of(n, depths) == index}
            save_file({"logits": logits.detach(), "loss": loss.detach().reshape(1), **{f"grad.{n}": g for n, g in grads.items()}},
                      os.path.join(folder, f"{shape}-{case}.safetensors"))
            # 20 steps as in the code of Deep Incubation's authors: AdamW, and timm's scheduler stepped after each epoch, which is one
            # step here.
            model = network(shape, depths)
            trained = [(n, p) for n, p in model.named_parameters() if index is None or stage_of(n, depths) == index]
            optimizer = torch.optim.AdamW([{"params": [p for n, p in trained if no_decay(n, p)], "weight_decay": 0.0},
                                           {"params": [p for n, p in trained if not no_decay(n, p)]}],
                                          lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
            scheduler = CosineLRScheduler(optimizer, t_initial=STEPS, lr_min=1e-5, warmup_t=WARMUP, warmup_lr_init=1e-6)
            curve = []
            for step in range(STEPS):
                _, loss = loss_of(model, *batch(shape, step))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append([loss.item(), optimizer.param_groups[0]["lr"]])
                scheduler.step(step)
            curves[f"{shape}-{case}"] = curve
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=5e-4 * 2048 / 512)
    scheduler = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=20, warmup_lr_init=1e-6)
    rates = []
    for epoch in range(300):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    with open(os.path.join(folder, "curves.json"), "w") as f:
        json.dump({"curves": curves, "deit_schedule": rates}, f)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..", "tests", "golden"))
