#!/usr/bin/env python3
"""Writes tests/golden/resnet-*: results of tools/resnet_reference.py, with which tests/suite/resnet.rs compares incubate's
results.

  tools/golden_resnet.py [FOLDER]      (needs torch and safetensors; by default FOLDER is tests/golden)

Weights, buffers, images and targets come from the formulas below, which tests/suite/resnet.rs computes too. torch computes in
fp64. Each .safetensors file holds the results of one network: its logits in evaluation, and the logits, the loss, the gradients and
BatchNorm's statistics of one forward and backward pass in training. In a hybrid only the stage that trains has gradients and
statistics. resnet-curve.json holds the losses of 20 optimiser steps.
"""
import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from resnet_reference import ResNet
from safetensors.torch import save_file

# image side, channels, classes, width, blocks of each layer, shortcut, and for each hybrid the blocks of each layer and the range
# of blocks that train
SHAPES = {
    # depths = [2, 2, 2]
    "even": (12, 3, 5, 4, [2, 2, 2], "A", [([2, 1, 1], (0, 2)), ([1, 2, 1], (1, 3)), ([1, 1, 2], (2, 4))]),
    # depths = [1, 3, 3]: the second stage ends a layer and begins another
    "odd": (9, 1, 4, 6, [2, 3, 2], "B", [([1, 1, 1], (0, 1)), ([2, 2, 1], (1, 4)), ([1, 2, 2], (2, 5))]),
    # depths = [18, 18, 18]
    "deep": (8, 3, 3, 2, [18, 18, 18], "B", []),
}
BATCH, STEPS = 6, 20


def wave(count, phase):
    return np.sin(0.37 * np.arange(count, dtype=np.float64) + phase)


def network(shape, layers):
    _, channels, classes, width, _, shortcut, _ = SHAPES[shape]
    model = ResNet(layers, classes, width, channels, shortcut).double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            values = 0.1 * wave(tensor.numel(), sum(name.encode()))
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                values = 1 + values
            tensor.copy_(torch.from_numpy(values.astype(np.float32)).view(tensor.shape))
    return model


def batch(shape, step):
    image, channels, classes = SHAPES[shape][:3]
    images = wave(BATCH * channels * image * image, 1000.0 + step).astype(np.float32).reshape(BATCH, channels, image, image)
    raw = (1 + wave(BATCH * classes, 2000.0 + step).reshape(BATCH, classes)) ** 2
    return torch.from_numpy(images).double(), torch.from_numpy((raw / raw.sum(1, keepdims=True)).astype(np.float32)).double()


def loss_of(model, images, targets):
    logits = model(images)
    return logits, torch.sum(-targets * F.log_softmax(logits, -1), -1).mean()


def blocks(model):
    return [block for number in range(model.layers) for block in getattr(model, f"layer{number + 1}")]


def trained_parts(model, span):
    """The parts of a hybrid that train: the blocks of `span`. The stem belongs to the first block, and the head to the last."""
    parts = blocks(model)[span[0] : span[1]]
    parts += [model.conv1, model.bn1] if span[0] == 0 else []
    return parts + ([model.fc] if span[1] == len(blocks(model)) else [])


def results(shape, layers, span, frozen_norm):
    model = network(shape, layers)
    evaluated = model.eval()(batch(shape, 0)[0])
    trained = [model] if span is None else trained_parts(model, span)
    model.train(span is None or frozen_norm == "batch")
    for part in trained:
        part.train()
    logits, loss = loss_of(model, *batch(shape, 0))
    loss.backward()
    owned = {id(tensor) for part in trained for tensor in (*part.parameters(), *part.buffers())}
    found = {"logits": logits, "evaluated": evaluated, "loss": loss.reshape(1)}
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if id(p) in owned}
    found |= {f"after.{name}": b for name, b in model.named_buffers() if id(b) in owned and "running" in name}
    return {name: tensor.detach().float().contiguous() for name, tensor in found.items()}


def isda(lr, epoch, epochs, ramp, start):
    """The learning rate of ISDA's schedule in an epoch, counted from 1 (InfoPro's train.py:404-421 computes the same)."""
    cosine = 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))
    return cosine * (epoch - 1) / ramp + start * (ramp + 1 - epoch) / ramp if epoch <= ramp else cosine


def curve(shape):
    """The losses and learning rates of steps with InfoPro's optimiser, one step in an epoch, and a variance after the last step."""
    model = network(shape, SHAPES[shape][4]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr = isda(0.005, step + 1, STEPS, 5, 0.001)
        _, loss = loss_of(model, *batch(shape, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append([loss.item(), lr])
    return {"losses": losses, "last_variance": blocks(model)[-1].bn2.running_var.tolist()}


def main(folder):
    for shape, (*_, layers, _, hybrids) in SHAPES.items():
        cases = {f"resnet-{shape}-target": (layers, None, "running")}
        for number, (thin, span) in enumerate(hybrids):
            for norm in ("running", "batch"):
                cases[f"resnet-{shape}-hybrid-{number}-{norm}"] = (thin, span, norm)
        for case, arguments in cases.items():
            save_file(results(shape, *arguments), os.path.join(folder, f"{case}.safetensors"))
    with open(os.path.join(folder, "resnet-curve.json"), "w") as f:
        json.dump(curve("even"), f)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..", "tests", "golden"))
