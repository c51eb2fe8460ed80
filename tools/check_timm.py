#!/usr/bin/env python3
"""Loads an exported timm folder with timm itself, and evaluates the model on test images of the MNIST family, with the
preprocessing of the exported config.

  tools/check_timm.py RUN_DIR/export/timm IMAGE_FOLDER        (needs torch, timm)

Prints one JSON line with top1, loss and the number of images, to compare with `incubate evaluate --json`.
"""
import gzip
import json
import os
import sys

import numpy as np
import timm
import torch
import torch.nn.functional as F


def read(folder, name, header):
    path = os.path.join(folder, name)
    opened = gzip.open(path + ".gz") if os.path.exists(path + ".gz") else open(path, "rb")
    with opened as f:
        return np.frombuffer(f.read()[header:], np.uint8)


folder, images = sys.argv[1:3]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
cfg = model.pretrained_cfg
channels, size, _ = cfg["input_size"]
pixels = read(images, "t10k-images-idx3-ubyte", 16).reshape(-1, channels, size, size)
labels = torch.from_numpy(read(images, "t10k-labels-idx1-ubyte", 8).astype(np.int64))
mean, std = (torch.tensor(cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
with torch.no_grad():
    logits = torch.cat([model((torch.from_numpy(p.astype(np.float32)) / 255 - mean) / std) for p in np.array_split(pixels, 50)])
print(json.dumps({"top1": 100 * (logits.argmax(1) == labels).double().mean().item(),
                  "loss": F.cross_entropy(logits, labels).item(), "images": len(labels)}))
