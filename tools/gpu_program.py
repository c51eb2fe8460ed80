"""Starts incubate for gpu_check.py and gpu_study.py, and reads the losses of its runs."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

SMALL = """
[run]
device = "cpu"
threads = 1
micro_batch = 16
checkpoint_every = "5 steps"
log_steps = 1
[model]
image_size = 16
channels = 1
classes = 4
patch_size = 4
width = 64
heads = 4
depths = [2, 2, 2, 2]
[data]
format = "shapes"
train_images = 512
test_images = 128
mean = [0.3]
std = [0.3]
repeats = 1
auto_augment = ""
color_jitter = 0
mixup = 0.8
cutmix = 1.0
erase = 0
[train]
global_batch = 64
base_lr = 8e-3
schedule = "cosine"
warmup_epochs = 0
epochs = 8
eval_epochs = 0
[module]
epochs = 8
drop_path = 0.1
[finetune]
epochs = 8
clip_grad = 0.5
ema = 0.9
"""
# A network of the size of DeiT-Ti, so that kernels on a GPU get realistic shapes. Its steps are few and small, so that a CPU can do
# them too.
DEIT_TI = """
[run]
device = "cpu"
micro_batch = 16
log_steps = 1
[model]
image_size = 224
classes = 4
patch_size = 16
width = 192
heads = 3
depths = [3, 3, 3, 3]
[data]
format = "shapes"
train_images = 64
test_images = 16
repeats = 1
auto_augment = ""
color_jitter = 0
[train]
global_batch = 16
base_lr = 8e-3
schedule = "cosine"
warmup_epochs = 0
epochs = 2
eval_epochs = 0
[finetune]
drop_path = 0.5
clip_grad = 0.5
"""
# The largest relative difference of a loss that counts as rounding.
TOLERANCES = {"fp32": 2e-3, "bf16": 3e-2, "tf32": 1e-2}


class Program:
    """The program to check. Its configs and run directories lie in a scratch folder."""

    def __init__(self, path, scratch, device):
        self.path, self.scratch, self.device = path, scratch, device
        self.environment = dict(os.environ, LIBTORCH=libtorch())
        self.on_gpu = device == "cuda"
        # Most CPUs compute bf16 much more slowly than fp32.
        self.fast = "bf16" if self.on_gpu else "fp32"

    def config(self, name, text):
        file = self.scratch / f"{name}.toml"
        file.write_text(text)
        return file

    def command(self, arguments, sets=()):
        pairs = [word for item in sets for word in ("--set", item)]
        return [str(self.path), *map(str, arguments), *pairs]

    def run(self, arguments, sets=(), expect=0, **options):
        done = subprocess.run(self.command(arguments, sets), env=self.environment, text=True, capture_output=True,
                              **options)
        if done.returncode != expect:
            raise AssertionError(f"{arguments}: exit code {done.returncode}, expected {expect}: {done.stderr[-2000:]}")
        return done

    def train(self, command, run, sets=(), text=SMALL, **options):
        command = command.split()
        config = self.config(f"config-of-{run}", text)
        return self.run([command[0], config, *command[1:], "--run-dir", self.scratch / run], sets, **options)

    def losses(self, run, phase):
        lines = (self.scratch / run / "logs" / phase / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    def copy(self, files, source, target):
        (self.scratch / target).mkdir(exist_ok=True)
        for file in files:
            shutil.copy(self.scratch / source / file, self.scratch / target / file)

    def devices(self, precision=None):
        """The settings of the config (for --set) with which the program computes on the device to check."""
        sets = [f'run.device="{self.device}"', "run.replicas=1"]
        return sets + ([f'run.precision="{precision}"'] if precision else [])


def difference(ours, reference):
    assert len(ours) == len(reference) > 0, f"{len(ours)} steps, expected {len(reference)}"
    return max(abs(a / b - 1.0) for a, b in zip(ours, reference, strict=True))


def within(found, tolerance):
    assert all(math.isfinite(value) and value <= tolerance for value in found.values()), f"{found} exceeds {tolerance}"
    return {"largest_relative_difference": found, "tolerance": tolerance}


def libtorch():
    """The folder of the libtorch to compute with: LIBTORCH, or that of this Python's torch."""
    found = os.environ.get("LIBTORCH")
    if not found:
        spec = importlib.util.find_spec("torch")
        if spec is None:
            sys.exit("no torch: install torch 2.11.0, or set LIBTORCH to the folder of a libtorch 2.11.0")
        found = spec.submodule_search_locations[0]
    return str(Path(found).resolve())
