#!/usr/bin/env python3
"""Writes tests/golden/objective-curves.json and infopro-*: losses and gradients of networks whose stages learn from local losses.
tests/suite/objectives.rs compares incubate's losses and gradients with them.

  tools/golden_objectives.py [FOLDER]      (needs torch, timm and safetensors; by default FOLDER is tests/golden)

As in DGL's code, each stage has an optimiser of its own, and its input is the detached output of the stage before it. The
networks, weights, images and targets are those of golden_resnet.py and golden.py; torch computes in fp64.
"""
import json
import os
import sys

import golden
import golden_resnet
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

STEPS = 20


class ClassToken(nn.Module):
    def forward(self, x):
        return x[:, 0]


def mlp_sr(channels, side, classes):
    """DGL's auxiliary classifier, imagenet_dgl/models/auxillary_classifier.py."""
    layers = [nn.AdaptiveAvgPool2d(-(-side // 4))]
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for _ in range(3):
        layers += [nn.Linear(4 * channels, 4 * channels), nn.BatchNorm1d(4 * channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4 * channels, classes))


def mean_head(channels, side, classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def token_head(width, classes):
    return nn.Sequential(ClassToken(), nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes))


class Grid(nn.Module):
    def forward(self, x):
        side = round((x.shape[1] - 1) ** 0.5)
        return x[:, 1:].transpose(1, 2).reshape(len(x), -1, side, side)


def decoder(channels, side, colours, *first):
    """InfoPro's Decoder without its sigmoid, auxiliary_nets.py."""
    up = nn.Upsample(size=(side, side), mode="bilinear", align_corners=True)
    return nn.Sequential(*first, up, nn.Conv2d(channels, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, colours, 3, 1, 1))


def net_1c2f(channels, widest, outputs):
    """InfoPro's AuxClassifier, auxiliary_nets.py."""
    inner, stride = (2 * channels, 2) if channels < widest else (channels, 1)
    return nn.Sequential(nn.Conv2d(channels, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(inner, 128), nn.ReLU(), nn.Linear(128, outputs))


def contrast(vectors, classes):
    """The supervised contrastive loss by its formula, as in InfoPro's losses.py with one view."""
    z, losses = F.normalize(vectors, dim=1), []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        similar = z[others] @ z[i] / 0.07
        pairs = [k for k, a in enumerate(others) if classes[a] == classes[i]]
        losses.append(-(similar[pairs] - torch.logsumexp(similar, 0)).sum() / max(len(pairs), 1))
    return torch.stack(losses).mean()


def filled(head, name):
    """Gives a head weights by the formula of golden.py, and returns the head in fp64."""
    with torch.no_grad():
        for own, parameter in head.named_parameters():
            values = 0.1 * golden.wave(parameter.numel(), sum(f"{name}.{own}".encode()))
            if parameter.ndim == 1 and own.endswith("weight"):
                values = 1 + values
            parameter.copy_(torch.from_numpy(values.astype("float32")).view(parameter.shape))
    return head.double()


class Stages:
    """The stages of a network. Each has a function and named parameters. Those of the last stage include the network's own head."""

    def __init__(self, functions, parameters):
        self.functions, self.parameters = functions, parameters


def resnet(shape, depths):
    model = golden_resnet.network(shape, golden_resnet.SHAPES[shape][4]).train()
    blocks, functions, parameters = golden_resnet.blocks(model), [], []
    for stage, depth in enumerate(depths):
        own, blocks = blocks[:depth], blocks[depth:]
        parts = ([model.conv1, model.bn1] if stage == 0 else []) + own
        body = nn.Sequential(*([model.conv1, model.bn1, nn.ReLU()] if stage == 0 else []), *own)
        functions.append(body)
        if stage == len(depths) - 1:
            parts.append(model.fc)
            functions[-1] = lambda x, body=body: model.fc(body(x).mean((2, 3)))
        owned = {id(p) for part in parts for p in part.parameters()}
        parameters.append([(name, p) for name, p in model.named_parameters() if id(p) in owned])
    return Stages(functions, parameters)


def vit(shape):
    depths = golden.SHAPES[shape][6]
    model = golden.network(shape, depths).double().train()
    named, functions, start = list(model.named_parameters()), [], 0
    for stage, depth in enumerate(depths):
        own = model.blocks[start : start + depth]
        functions.append(own)
        if stage == 0:
            functions[-1] = lambda x, own=own: own(model.norm_pre(model._pos_embed(model.patch_embed(x))))
        if stage == len(depths) - 1:
            functions[-1] = lambda x, own=own: model.head(model.norm(own(x))[:, 0])
        start += depth
    return Stages(functions, [[(n, p) for n, p in named if golden.stage_of(n, depths) == stage] for stage in range(len(depths))])


def cross_entropy(logits, targets):
    return torch.sum(-targets * F.log_softmax(logits, -1), -1).mean()


def dgl(stages, heads, optimizers, images, targets):
    """Takes one step of DGL, by each stage's own optimiser. Returns the sum of the stages' losses."""
    x, total = images, 0.0
    for stage, (function, optimizer) in enumerate(zip(stages.functions, optimizers, strict=False)):
        output = function(x)
        loss = cross_entropy(heads[stage](output) if stage < len(heads) else output, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        x, total = output.detach(), total + loss.item()
    return total


def resnet_curve(shape, depths, head, steps):
    """The sum of all stages' losses in each of `steps` steps. The norms of the head `mlp_sr` amplify rounding errors, so only its
    first steps can be compared."""
    stages = resnet(shape, depths)
    image, _, classes, width, *_ = golden_resnet.SHAPES[shape]
    heads = [filled(head(width << layer, -(-image // (1 << layer)), classes), f"local.{layer}.classes") for layer in (0, 1)]
    optimizers = []
    for stage, named in enumerate(stages.parameters):
        own = [p for _, p in named] + (list(heads[stage].parameters()) if stage < len(heads) else [])
        optimizers.append(torch.optim.SGD(own, lr=0.005, momentum=0.9, nesterov=True, weight_decay=1e-2))
    return [dgl(stages, heads, optimizers, *golden_resnet.batch(shape, step)) for step in range(steps)]


def vit_curve(shape):
    stages = vit(shape)
    _, _, _, classes, width = golden.SHAPES[shape][:5]
    heads = [filled(token_head(width, classes), f"local.{stage}.classes") for stage in range(len(stages.functions) - 1)]
    optimizers = []
    for stage, named in enumerate(stages.parameters):
        own = named + (list(heads[stage].named_parameters()) if stage < len(heads) else [])
        groups = [{"params": [p for n, p in own if golden.no_decay(n, p)], "weight_decay": 0.0},
                  {"params": [p for n, p in own if not golden.no_decay(n, p)]}]
        optimizers.append(torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05))
    batches = ([tensor.double() for tensor in golden.batch(shape, step)] for step in range(STEPS))
    return [dgl(stages, heads, optimizers, *batch) for batch in batches]


def infopro(stages, decoders, heads, loss, images, targets):
    """InfoPro's losses and gradients of one batch. From the first stage to the last one with a head, the weight of the decoder's
    loss falls from 1 to 0.5, and the weight of the classifier's loss rises from 0.5 to 1."""
    pixels, classes = (images * 0.5 + 0.5).clamp(0, 1), targets.argmax(1)
    x, found = images, {}
    for stage, function in enumerate(stages.functions):
        output = function(x)
        if stage < len(decoders):
            share = stage / max(len(decoders) - 1, 1)
            of_pixels = F.binary_cross_entropy(torch.sigmoid(decoders[stage](output)), pixels)
            of_head = heads[stage](output)
            of_classes = contrast(of_head, classes) if loss == "contrast" else cross_entropy(of_head, targets)
            total = (1 - 0.5 * share) * of_pixels + (0.5 + 0.5 * share) * of_classes
        else:
            total = cross_entropy(output, targets)
        total.backward()
        found[f"loss.{stage}"] = total.detach().reshape(1)
        x = output.detach()
    named = [pair for own in stages.parameters for pair in own]
    for stage, pair in enumerate(zip(decoders, heads, strict=False)):
        for head, word in zip(pair, ("decoder", "classes"), strict=False):
            named += [(f"local.{stage}.{word}.{name}", p) for name, p in head.named_parameters()]
    return {**found, **{f"grad.{name}": p.grad for name, p in named}}


def infopro_of_resnet(shape, depths, widths, loss):
    stages = resnet(shape, depths)
    image, channels, classes, width, layers, *_ = golden_resnet.SHAPES[shape]
    outputs = 128 if loss == "contrast" else classes
    decoders = [filled(decoder(w, image, channels), f"local.{i}.decoder") for i, w in enumerate(widths)]
    heads = [filled(net_1c2f(w, width << len(layers) - 1, outputs), f"local.{i}.classes") for i, w in enumerate(widths)]
    return infopro(stages, decoders, heads, loss, *golden_resnet.batch(shape, 0))


def infopro_of_vit(shape):
    stages = vit(shape)
    image, _, channels, classes, width = golden.SHAPES[shape][:5]
    borders = range(len(stages.functions) - 1)
    decoders = [filled(decoder(width, image, channels, Grid()), f"local.{i}.decoder") for i in borders]
    heads = [filled(token_head(width, classes), f"local.{i}.classes") for i in borders]
    images, targets = golden.batch(shape, 0)
    return infopro(stages, decoders, heads, "softmax", images.double(), targets.double())


def main(folder):
    torch.set_num_threads(1)
    cases = {"resnet-odd-softmax": infopro_of_resnet("odd", [1, 3, 3], (6, 12), "softmax"),
             "resnet-odd-contrast": infopro_of_resnet("odd", [1, 3, 3], (6, 12), "contrast"),
             "vit-color-softmax": infopro_of_vit("color")}
    for case, found in cases.items():
        tensors = {name: tensor.float().contiguous() for name, tensor in found.items()}
        save_file(tensors, os.path.join(folder, f"infopro-{case}.safetensors"))
    curves = {"resnet-even-mlp": resnet_curve("even", [2, 2, 2], mlp_sr, 4),
              "resnet-even-linear": resnet_curve("even", [2, 2, 2], mean_head, STEPS),
              "vit-gray": vit_curve("gray"), "vit-color": vit_curve("color")}
    with open(os.path.join(folder, "objective-curves.json"), "w") as f:
        json.dump(curves, f)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..", "tests", "golden"))
