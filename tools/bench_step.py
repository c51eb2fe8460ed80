#!/usr/bin/env python3
"""Compares `incubate bench step` with PyTorch and timm (peer_step.py). The two programs run in turn, in pairs. Prints one table
and, unless --without is given, one JSON line.

  tools/bench_step.py --incubate target/release/incubate --python python3 [--pairs 5] [--only deit-ti]
  tools/bench_step.py --incubate target/release/incubate --without [--pairs 5]

--python is an interpreter with torch and timm. The ratio is the median of the pairs' ratios, so that a machine which slows down
for a while affects both programs. A row of several stages shows the mean over them. For a module, PyTorch computes by the «official
rule»: like the code of Deep Incubation's authors, it also computes the weight gradients of the frozen stages after the module.
--without compares incubate with itself instead, with one optimisation switched off at a time.
"""
import argparse
import json
import os
import statistics
import subprocess

STAGES = range(4)
# name, model, batch, threads, incubate's precision, PyTorch's dtype, the stages that train; None trains end to end.
ROWS = [
    ("e2e, fp32 / fp32", "deit-ti", 32, 2, "fp32", "float32", [None]),
    ("e2e, bf16 / bf16 autocast", "deit-ti", 32, 2, "bf16", "bfloat16", [None]),
    ("module, fp32 / official rule fp32", "deit-ti", 32, 2, "fp32", "float32", STAGES),
    ("module, bf16 / official rule fp32", "deit-ti", 32, 2, "bf16", "float32", STAGES),
    ("module 0, bf16 / official rule fp32", "vit-b", 8, 2, "bf16", "float32", [0]),
    ("e2e and modules, fp32 / fp32", "tiny-28", 128, 1, "fp32", "float32", [None, *STAGES]),
    ("e2e and modules, bf16 / fp32", "tiny-28", 128, 1, "bf16", "float32", [None, *STAGES]),
]
OPTIMISATIONS = ["kernels", "attention", "optimiser", "suffix", "memory"]
# name, model, batch, threads, stage: the fp32 steps in which optimisations are switched off.
STEPS_WITHOUT = [
    ("deit-ti module 0", "deit-ti", 32, 2, 0),
    ("tiny-28 e2e", "tiny-28", 128, 1, None),
    ("tiny-28 module 0", "tiny-28", 128, 1, 0),
]
HERE = os.path.dirname(os.path.abspath(__file__))


def answer(command):
    """Runs a command and returns the JSON object that it prints."""
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{ended.stderr}")
    return json.loads(ended.stdout[ended.stdout.index("{"):])


def size_options(a, model, batch, threads):
    return ["--model", model, "--batch", batch, "--threads", threads, "--steps", a.steps]


def step(a, sizes, stage, precision, *options):
    work = ["--e2e"] if stage is None else ["--stage", stage]
    return answer([a.incubate, "bench", "step", *sizes, *work, "--precision", precision, "--json", *options])


def pair(a, model, batch, threads, precision, dtype, stage):
    sizes = size_options(a, model, batch, threads)
    work = ["--mode", "e2e"] if stage is None else ["--mode", "official", "--stage", stage]
    ours = step(a, sizes, stage, precision)
    theirs = answer([a.python, os.path.join(HERE, "peer_step.py"), *sizes, *work, "--dtype", dtype])
    return ours, theirs


def without(a):
    """Prints how many times as long a step takes without each optimisation."""
    print(f"| off | {' | '.join(row[0] for row in STEPS_WITHOUT)} |\n|---|{'---|' * len(STEPS_WITHOUT)}")
    for optimisation in OPTIMISATIONS:
        ratios = []
        for _, *sizes, stage in STEPS_WITHOUT:
            common = (a, size_options(a, *sizes), stage, "fp32")
            pairs = [(step(*common)["step_s"], step(*common, "--without", optimisation)["step_s"]) for _ in range(a.pairs)]
            ratios.append(statistics.median(off / on for on, off in pairs))
        print(f"| {optimisation} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--incubate", default=os.path.join(HERE, "..", "target", "release", "incubate"))
    parser.add_argument("--python", default="python3", help="an interpreter with torch and timm")
    parser.add_argument("--pairs", type=int, default=5, help="how often both sides of a comparison are measured")
    parser.add_argument("--steps", type=int, default=8, help="the timed steps of a measurement")
    parser.add_argument("--only", choices=sorted({row[1] for row in ROWS}), help="only the rows of this model")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="only the rows in which incubate computes in this precision")
    parser.add_argument("--without", action="store_true", help="compare incubate with itself, with one optimisation switched off at a time")
    a = parser.parse_args()
    if a.without:
        return without(a)
    print("| model | work: here / PyTorch + timm | here, images/s | there, images/s | ratio | memory ratio |")
    print("|---|---|---|---|---|---|")
    results = []
    for name, *sizes, works in (row for row in ROWS if a.only in (None, row[1]) and a.precision in (None, row[4])):
        per_work = []
        for stage in works:
            pairs = [pair(a, *sizes, stage) for _ in range(a.pairs)]
            per_work.append({
                "stage": stage,
                "here": statistics.median(ours["images_per_s"] for ours, _ in pairs),
                "there": statistics.median(theirs["images_per_s"] for _, theirs in pairs),
                "ratio": statistics.median(ours["images_per_s"] / theirs["images_per_s"] for ours, theirs in pairs),
                "memory": statistics.median(ours["peak_mib"] / theirs["peak_mib"] for ours, theirs in pairs),
            })
        mean = {key: statistics.mean(work[key] for work in per_work) for key in ("here", "there", "ratio", "memory")}
        print(f"| {sizes[0]} | {name} | {mean['here']:.2f} | {mean['there']:.2f} | {mean['ratio']:.2f} "
              f"| {mean['memory']:.2f} |", flush=True)
        results.append({"model": sizes[0], "work": name, **mean, "each": per_work})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
