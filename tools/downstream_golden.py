#!/usr/bin/env python3
"""Writes tests/golden/coco and tests/golden/ade20k: generated annotations, results and label maps, and their figures. pycocotools
computes the figures of COCO. This script computes those of ADE20K in plain numpy.

  tools/downstream_golden.py [FOLDER [SEED IMAGES]]      (needs numpy, pycocotools, Pillow; by default FOLDER is tests/golden)

The annotations have crowds, ignored objects, images without objects, polygons, and compressed and uncompressed run-length
masks. Some results have equal scores.
"""
import contextlib
import io
import json
import os
import sys

import numpy as np
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

WIDTH, HEIGHT, CATEGORIES = 320, 240, 4


def polygon(rng, box):
    x, y, w, h = box
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
    return [float(v) for a in angles for v in (round(x + w / 2 * (1 + np.cos(a)), 2), round(y + h / 2 * (1 + np.sin(a)), 2))]


def box_of(rng):
    w, h = (float(round(v, 1)) for v in np.exp(rng.uniform(np.log(8), np.log(230), 2)))
    return [float(round(rng.uniform(0, WIDTH - min(w, WIDTH)))), float(round(rng.uniform(0, HEIGHT - min(h, HEIGHT)))), min(w, float(WIDTH)), min(h, float(HEIGHT))]


def moved(rng, box, by):
    x, y, w, h = box
    return [max(0.0, round(x + rng.normal(0, by * w), 1)), max(0.0, round(y + rng.normal(0, by * h), 1)),
            max(1.0, round(w * np.exp(rng.normal(0, by)), 1)), max(1.0, round(h * np.exp(rng.normal(0, by)), 1))]


def compressed(poly):
    rle = masks.merge(masks.frPyObjects([poly], HEIGHT, WIDTH))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(poly):
    flat = masks.decode(masks.merge(masks.frPyObjects([poly], HEIGHT, WIDTH))).flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [flat[-1] ^ 1]])))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def coco(folder, rng, images):
    truth = {"images": [{"id": 10 + i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in range(images)],
             "categories": [{"id": 2 * c + 1, "name": f"thing {c}"} for c in range(CATEGORIES)], "annotations": []}
    found = {"bbox": [], "segm": []}
    for image in truth["images"]:
        objects = 0 if rng.random() < 0.15 else rng.integers(1, 9)
        for _ in range(objects):
            box, category = box_of(rng), int(2 * rng.integers(CATEGORIES) + 1)
            poly, crowd = polygon(rng, box), int(rng.random() < 0.12)
            segmentation = uncompressed(poly) if crowd else ([poly] if rng.random() < 0.7 else compressed(poly))
            area = float(masks.area(masks.merge(masks.frPyObjects([poly], HEIGHT, WIDTH))))
            annotation = {"id": len(truth["annotations"]) + 1, "image_id": image["id"], "category_id": category, "bbox": box,
                   "area": area, "iscrowd": crowd, "segmentation": segmentation}
            if rng.random() < 0.1:
                annotation["ignore"] = 1
            truth["annotations"].append(annotation)
            for _ in range(rng.integers(0, 4)):
                near = moved(rng, box, rng.choice([0.02, 0.1, 0.3]))
                score = float(round(rng.random(), 1))
                found["bbox"].append({"image_id": image["id"], "category_id": category, "bbox": near, "score": score})
                mask = compressed(polygon(rng, near) if rng.random() < 0.5 else poly)
                if mask["counts"]:
                    found["segm"].append({"image_id": image["id"], "category_id": category, "segmentation": mask, "score": score})
        for _ in range(rng.integers(0, 3)):
            found["bbox"].append({"image_id": image["id"], "category_id": int(2 * rng.integers(CATEGORIES) + 1),
                                  "bbox": box_of(rng), "score": float(round(rng.random(), 1))})
    os.makedirs(folder, exist_ok=True)

    def write(name, value):
        with open(os.path.join(folder, name), "w") as file:
            json.dump(value, file, separators=(",", ":"))

    write("annotations.json", truth)
    figures = {}
    for kind, results in found.items():
        write(f"{kind}.json", results)
        with contextlib.redirect_stdout(io.StringIO()):
            gt = COCO(os.path.join(folder, "annotations.json"))
            e = COCOeval(gt, gt.loadRes(os.path.join(folder, f"{kind}.json")), kind)
            e.evaluate(), e.accumulate(), e.summarize()
        figures[kind] = e.stats.tolist()
    write("figures.json", figures)


def ade20k(folder, rng, images):
    for name in ("labels", "predictions"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    hits, labelled, predicted = np.zeros(150), np.zeros(150), np.zeros(150)
    for i in range(images):
        size = (int(rng.integers(20, 40)), int(rng.integers(20, 40)))
        classes = np.concatenate([[0], rng.integers(1, 100, 6)])
        label = rng.choice(classes, size).astype(np.uint8)
        guess = np.where(rng.random(size) < 0.6, label, rng.choice(np.concatenate([classes, [120]]), size)).astype(np.uint8)
        for name, values in (("labels", label), ("predictions", guess)):
            Image.fromarray(values).save(os.path.join(folder, name, f"ADE_val_{i:08}.png"), optimize=True)
        for c in range(1, 151):
            seen = label > 0
            hits[c - 1] += np.sum((label == c) & (guess == c))
            labelled[c - 1] += np.sum(label == c)
            predicted[c - 1] += np.sum((guess == c) & seen)
    with np.errstate(divide="ignore", invalid="ignore"):
        iou, accuracy = hits / (labelled + predicted - hits), hits / labelled
    figures = {"aAcc": hits.sum() / labelled.sum(), "mIoU": np.nanmean(iou), "mAcc": np.nanmean(accuracy),
               "mIoU150": np.nan_to_num(iou).mean(), "mAcc150": np.nan_to_num(accuracy).mean()}
    figures = {name: float(100 * value) for name, value in figures.items()}
    figures["iou"] = [None if np.isnan(v) else float(100 * v) for v in iou]
    json.dump(figures, open(os.path.join(folder, "figures.json"), "w"), separators=(",", ":"))


folder = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "golden")
seed, images = (int(v) for v in sys.argv[2:4]) if len(sys.argv) > 3 else (1, 24)
coco(os.path.join(folder, "coco"), np.random.default_rng(seed), images)
ade20k(os.path.join(folder, "ade20k"), np.random.default_rng(seed), min(images, 6))
