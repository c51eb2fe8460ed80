#!/usr/bin/env python3
"""Compares `incubate bench data` with `peer_data.py`, which measures timm's DeiT transforms. Both programs read the images of the
same folder, and run in turn. Prints one table and one JSON line.

  tools/bench_data.py --incubate target/release/incubate --python python3 [--pairs 5] [--folder DIR]

--python is an interpreter with torch, torchvision and timm. Without --folder, 200 JPEGs are drawn into a temporary folder.
Each ratio is incubate's rate divided by timm's rate on the files, even if incubate reads packed images. The table gives the
median of the pairs' ratios, the lowest and the highest.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from bench_step import HERE, answer

# Each row: its name, the JSON key of incubate's rate, and the JSON key of the rate of timm to compare with.
ROWS = [
    ("decode", "decode_per_s_core", "decode"),
    ("training transform from JPEG files", "train_per_s_core", "train"),
    ("training transform from packed JPEG", "train_packed_jpeg_per_s_core", "train"),
    ("training transform from packed raw", "train_packed_raw_per_s_core", "train"),
    ("evaluation transform from JPEG files", "eval_per_s_core", "eval"),
    ("evaluation transform from packed JPEG", "eval_packed_jpeg_per_s_core", "eval"),
    ("evaluation transform from packed raw", "eval_packed_raw_per_s_core", "eval"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--incubate", default=os.path.join(HERE, "..", "target", "release", "incubate"))
    parser.add_argument("--python", default="python3", help="an interpreter with torch, torchvision and timm")
    parser.add_argument("--pairs", type=int, default=5, help="how often each program runs")
    parser.add_argument("--passes", type=int, default=2, help="how often a run reads each image")
    parser.add_argument("--folder", help="the images to read instead of drawn ones")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as drawn:
        folder = a.folder or drawn
        peer = [a.python, os.path.join(HERE, "peer_data.py"), folder, "--passes", a.passes]
        if not a.folder:
            subprocess.run([*map(str, peer), "--make", "200"], check=True)
        pairs = []
        for number in range(a.pairs):
            ours = answer([a.incubate, "bench", "data", "--folder", folder, "--passes", a.passes, "--json"])
            pairs.append((ours, answer(peer)))
            print(f"pair {number + 1} of {a.pairs}", file=sys.stderr)
    print("| work | here, images/s and core | timm, images/s and core | ratio | lowest to highest |")
    print("|---|---|---|---|---|")
    for name, our, their in ROWS:
        here, there = [ours[our] for ours, _ in pairs], [theirs[their] for _, theirs in pairs]
        ratios = [each / peers for each, peers in zip(here, there, strict=True)]
        print(f"| {name} | {statistics.median(here):.0f} | {statistics.median(there):.0f} "
              f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")
    print(json.dumps(pairs))


if __name__ == "__main__":
    main()
