#!/usr/bin/env python3
"""Times training steps of ResNet-110 on the CPU, by incubate and by plain PyTorch in turn, and prints a table.

  tools/bench_resnet.py INCUBATE [--batch 64] [--pairs 4] [--steps 3] [--threads 2]      (needs torch)

PyTorch trains tools/resnet_reference.py end to end, and each module in its hybrid. Like the code of Deep Incubation's authors, it
then also computes the weight gradients of the frozen stages after the module. A ratio above 1 means that incubate is faster.
"""
import argparse
import json
import os
import statistics
import subprocess
import time

import torch
from resnet_reference import ResNet
from torch.nn import functional as F

CONFIG = os.path.join(os.path.dirname(__file__), "../configs/cifar-resnet-110.toml")
CASES = [("end to end", [18, 18, 18], None), ("module 0", [18, 1, 1], 0), ("module 1", [1, 18, 1], 1), ("module 2", [1, 1, 18], 2)]


def of_pytorch(layers, stage, options):
    """The seconds of a step of PyTorch. `layers` are the blocks of each layer; `stage` is the stage that trains, None for all."""
    model = ResNet(layers).train()
    parts = [[model.conv1, model.bn1, model.layer1], [model.layer2], [model.layer3, model.fc]]
    for number, part in enumerate(parts):
        for module in part:
            module.requires_grad_(stage is None or number >= stage)
    trained = model.parameters() if stage is None else [p for module in parts[stage] for p in module.parameters()]
    optimiser = torch.optim.SGD(trained, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images, labels = torch.randn(options.batch, 3, 32, 32), torch.randint(0, 100, (options.batch,))

    def step():
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()

    step()
    began = time.perf_counter()
    for _ in range(options.steps):
        step()
    return (time.perf_counter() - began) / options.steps


def of_incubate(stage, options):
    """The seconds of a step of incubate."""
    phase = ["--e2e"] if stage is None else ["--stage", str(stage)]
    sizes = [f"--{name}={getattr(options, name)}" for name in ("batch", "steps", "threads")]
    command = [options.incubate, "-qq", "bench", "step", "--model", CONFIG, "--json", *sizes, *phase]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["step_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("incubate", help="the program")
    for name, default in [("batch", 64), ("pairs", 4), ("steps", 3), ("threads", 2)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| ResNet-110 | incubate, s | PyTorch, s | ratio | lowest to highest pair |\n|---|---|---|---|---|")
    for name, layers, stage in CASES:
        pairs = []
        for number in range(options.pairs):
            # The first program of a pair may run at another clock rate than the second, so the programs take turns in being first.
            if number % 2:
                pairs.append((of_incubate(stage, options), of_pytorch(layers, stage, options)))
            else:
                theirs = of_pytorch(layers, stage, options)
                pairs.append((of_incubate(stage, options), theirs))
        ratios = [theirs / ours for ours, theirs in pairs]
        ours, theirs = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        print(f"| {name} | {ours:.3f} | {theirs:.3f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |", flush=True)


if __name__ == "__main__":
    main()
