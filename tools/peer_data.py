#!/usr/bin/env python3
"""Measures timm's DeiT transforms (Pillow, torchvision) on one core. tools/bench_data.py compares `incubate bench data` with it.

  python tools/peer_data.py FOLDER [--make 200] [--passes 2]

Prints one JSON line with the images per second of decoding, of the training transform and of the evaluation transform, over all
JPEG and PNG files below the folder. --make N instead draws N JPEGs into the folder, as large as small photographs (400-559 x
333-499, quality 92, about 80 kB). Needs torch, torchvision and timm.
"""

import argparse
import json
import os
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from timm.data import create_transform


def draw(folder, count):
    os.makedirs(folder, exist_ok=True)
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


def rates(folder, passes):
    """Measures the images per second on one thread, including the time to read the files."""
    # timm's RandAugment may posterize to 0 bits, which newer versions of Pillow refuse. 1 bit takes the same time.
    posterize = ImageOps.posterize
    ImageOps.posterize = lambda image, bits: posterize(image, max(bits, 1))
    torch.set_num_threads(1)
    files = sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names
                   if name.lower().endswith((".jpg", ".jpeg", ".png")))
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--make", type=int, default=0, help="draw this number of images instead of measuring")
    parser.add_argument("--passes", type=int, default=2, help="how often each image is read")
    a = parser.parse_args()
    if a.make:
        draw(a.folder, a.make)
    else:
        print(json.dumps(rates(a.folder, a.passes)))


if __name__ == "__main__":
    main()
