#!/usr/bin/env python3
"""`incubate bench data` side by side with timm's DeiT transform (Pillow, torchvision) on one core, in interleaved pairs over the
same folder of JPEGs: prints one table and one JSON line.

  tools/bench_data.py --incubate target/release/incubate --python python3 [--pairs 5] [--folder DIR]

--python has torch, torchvision and timm. Without --folder it draws 200 photo-like JPEGs (400-560 x 333-500, quality 92, some
80 kB) into a temporary one. Every ratio is to timm from the JPEG files, packed forms included: the median of the pairs' own
ratios, with the lowest and the highest.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

# What is measured here, and timm's figure that it is set beside.
ROWS = [
    ("decode", "decode_per_s_core", "decode"),
    ("training transform from JPEG files", "train_per_s_core", "train"),
    ("training transform from packed JPEG", "train_packed_jpeg_per_s_core", "train"),
    ("training transform from packed raw", "train_packed_raw_per_s_core", "train"),
    ("evaluation transform from JPEG files", "eval_per_s_core", "eval"),
]


def draw(folder, count):
    import numpy as np
    from PIL import Image, ImageDraw

    random = np.random.default_rng(0)
    for i in range(count):
        width, height = int(random.integers(400, 560)), int(random.integers(333, 500))
        coarse = random.integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
        pen = ImageDraw.Draw(image)
        for _ in range(30):
            x, y, r = (int(random.integers(0, limit)) for limit in (width, height, 80))
            pen.ellipse([x - r, y - r, x + r, y + r], fill=tuple(int(v) for v in random.integers(0, 255, 3)))
        noisy = np.asarray(image) + random.normal(0, 8, (height, width, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(os.path.join(folder, f"{i:05}.jpg"), quality=92)


def peer(folder, passes):
    """timm's images per second on one thread, reading included."""
    import torch
    from PIL import Image, ImageOps
    from timm.data import create_transform

    # timm may ask for 0 bits, which newer Pillows refuse; 1 costs the same.
    posterize = ImageOps.posterize
    ImageOps.posterize = lambda image, bits: posterize(image, max(bits, 1))
    torch.set_num_threads(1)
    files = sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names if name.endswith(".jpg"))
    train = create_transform(224, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1",
                             interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1)
    evaluate = create_transform(224, is_training=False, interpolation="bicubic")

    def rate(work):
        for file in files[:20]:
            work(Image.open(file).convert("RGB"))
        began = time.perf_counter()
        for file in passes * files:
            work(Image.open(file).convert("RGB"))
        return passes * len(files) / (time.perf_counter() - began)

    return {"decode": rate(lambda image: image.load()), "train": rate(train), "eval": rate(evaluate)}


def answer(command):
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{ended.stderr}")
    return json.loads(ended.stdout[ended.stdout.index("{"):])


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--incubate", default=os.path.join(here, "..", "target", "release", "incubate"))
    parser.add_argument("--python", default="python3", help="an interpreter with torch, torchvision and timm")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--folder", help="JPEGs to measure on instead of drawn ones")
    parser.add_argument("--step", choices=["draw", "peer"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.step == "draw":
        return draw(a.folder, 200)
    if a.step == "peer":
        return print(json.dumps(peer(a.folder, a.passes)))
    with tempfile.TemporaryDirectory() as drawn:
        folder = a.folder or drawn
        script = [a.python, os.path.abspath(__file__), "--folder", folder, "--passes", a.passes, "--step"]
        if not a.folder:
            subprocess.run([str(word) for word in [*script, "draw"]], check=True)
        pairs = []
        for number in range(a.pairs):
            ours = answer([a.incubate, "bench", "data", "--folder", folder, "--passes", a.passes, "--json"])
            pairs.append((ours, answer([*script, "peer"])))
            print(f"pair {number + 1} of {a.pairs}", file=sys.stderr)
    print("| work | here, images/s and core | timm, images/s and core | ratio | lowest to highest |")
    print("|---|---|---|---|---|")
    for name, here, there in ROWS:
        ratios = [ours[here] / theirs[there] for ours, theirs in pairs]
        here = statistics.median(ours[here] for ours, _ in pairs)
        there = statistics.median(theirs[there] for _, theirs in pairs)
        print(f"| {name} | {here:.0f} | {there:.0f} | {statistics.median(ratios):.2f} "
              f"| {min(ratios):.2f} to {max(ratios):.2f} |")
    print(json.dumps(pairs))


if __name__ == "__main__":
    main()
