#!/usr/bin/env python3
"""Compares the memory that `incubate module` needs for each module of ViT-L/16 with the memory that PyTorch needs to train
the whole model end to end. Prints one table and one JSON line.

  tools/bench_memory.py --incubate target/release/incubate --python python3

--python is an interpreter with torch and timm. Both run on the CPU in fp32 with 8 images at a time. `incubate` writes a
checkpoint after every step.
"""
import argparse
import json
import os
import subprocess
import tempfile

from bench_step import HERE, STAGES, answer

BATCH = 8
SETS = ["run.device=cpu", "run.precision=fp32", f"run.micro_batch={BATCH}", "run.checkpoint_every=1 steps", "data.format=shapes",
        f"data.train_images={3 * BATCH}", f"data.test_images={BATCH}", "data.repeats=1", "data.crop_padding=0",
        f"train.global_batch={BATCH}", "train.epochs=1", "train.warmup_epochs=0", "module.epochs=1"]


def peak_mib(command):
    """Runs a command and returns its peak resident memory in MiB."""
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--incubate", default=os.path.join(HERE, "..", "target", "release", "incubate"))
    parser.add_argument("--python", default="python3", help="an interpreter with torch and timm")
    a = parser.parse_args()
    config = os.path.join(HERE, "..", "configs", "imagenet-vit-l.toml")
    with tempfile.TemporaryDirectory() as folder:
        common = [config, "--run-dir", os.path.join(folder, "run"), *(word for s in SETS for word in ("--set", s))]
        peak_mib([a.incubate, "meta", *common])
        here = {stage: peak_mib([a.incubate, "module", *common, "--index", str(stage)]) for stage in STAGES}
    peer = [a.python, os.path.join(HERE, "peer_step.py"), "--model", "vit-l", "--mode", "e2e", "--batch", BATCH, "--steps", 1]
    there = answer(peer)["peak_mib"]
    print("| module | here, MiB | PyTorch end to end, MiB | ratio |")
    print("|---|---|---|---|")
    for stage, mib in here.items():
        print(f"| {stage} | {mib:.0f} | {there:.0f} | {mib / there:.2f} |")
    print(json.dumps({"modules_mib": here, "e2e_mib": there}))


if __name__ == "__main__":
    main()
