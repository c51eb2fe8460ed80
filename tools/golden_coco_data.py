#!/usr/bin/env python3
"""Writes tests/golden/coco_data.safetensors and coco_data.json: images and objects transformed as by detectron2's large-scale
jitter, with Pillow for the pixels, shapely for the polygons and pycocotools for the masks.

  tools/golden_coco_data.py [FOLDER]      (needs those three, numpy and safetensors; by default FOLDER is tests/golden)
"""
import json
import os
import sys

import numpy as np
import shapely
from PIL import Image
from pycocotools import mask as masks
from safetensors.numpy import save_file
from shapely.geometry import Polygon, box

HEIGHT, WIDTH = 120, 160
# Each case: whether the image is flipped, the scale, and the share of the leftover rows and columns at which the crop begins. The
# scales give no simple ratio of the resized sides to the stored sides, which would give many numbers halfway between two bytes.
CASES = [(False, 0.7, 0.5), (True, 1.93, 0.3), (True, 0.1, 0.0), (False, 1.35, 0.9)]
# The sides of the square crop, for pixels and for masks.
SIDES = (64, 512)
OBJECTS = [
    [[20.5, 30, 80, 25.25, 95, 70, 60, 100.75, 15, 80]],
    # A U, which a crop may cut into two pieces.
    [[10, 10, 30, 10, 30, 80, 120, 80, 120, 10, 140, 10, 140, 110, 10, 110]],
    # Two polygons.
    [[100, 5, 150, 5, 150, 40, 100, 40], [5, 90, 60, 95, 40, 118]],
    # A frame around the middle that is open on one side: a crop of the middle holds none of it, or a part.
    [[0, 0, 160, 0, 160, 120, 60, 120, 60, 112, 152, 112, 152, 8, 8, 8, 8, 120, 0, 120]],
    # A small object near the lower right corner.
    [[150, 112, 158, 112, 158, 118, 150, 118]],
    # The whole image.
    [[0, 0, 160, 0, 160, 120, 0, 120]],
    # A hook that enters the last crop from the left, and goes on around the crop's upper left corner without entering it there.
    [[60, 55, 60, 65, 30, 65, 30, 0.1, 100, 0.1, 100, 0.9, 34, 0.9, 34, 55]],
]
SIZES = [(480, 640), (427, 640), (640, 427), (333, 500), (500, 334), (1, 700), (1024, 1024), (51, 2000), (612, 612), (375, 499)]


def picture():
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([(5 * x + 3 * (c + 1) * y + x * y // 7) % 256 for c in range(3)], -1).astype(np.uint8)


def placement(side, scale, share):
    """detectron2's ResizeScale and FixedSizeCrop: the resized (height, width), and the crop's offset (row, column) and size."""
    size = (HEIGHT, WIDTH)
    target = np.multiply((side, side), scale)
    factor = np.minimum(target[0] / size[0], target[1] / size[1])
    resized = np.round(np.multiply(size, factor)).astype(int)
    offset = np.round(np.multiply(np.maximum(np.subtract(resized, (side, side)), 0), share)).astype(int)
    return resized, offset, np.minimum(resized, side)


def crop(image, case, side, kernel):
    flipped, scale, share = case
    resized, (top, left), (height, width) = placement(side, scale, share)
    image = np.ascontiguousarray(image[:, ::-1]) if flipped else image
    image = np.asarray(Image.fromarray(image).resize((int(resized[1]), int(resized[0])), kernel))
    return np.ascontiguousarray(image[top:top + height, left:left + width])


def pieces(polygon, case, side):
    """fvcore's CropTransform.apply_polygons, after the flip and the resize: exact parts of the polygon within the crop."""
    flipped, scale, share = case
    resized, (top, left), (height, width) = placement(side, scale, share)
    points = np.asarray(polygon, float).reshape(-1, 2)
    if flipped:
        points[:, 0] = WIDTH - points[:, 0]
    points *= [resized[1] / WIDTH, resized[0] / HEIGHT]
    cut = Polygon(points).intersection(box(left, top, left + width, top + height))
    return [np.asarray(part.exterior.coords)[:-1] - [left, top] for part in shapely.get_parts(cut)
            if isinstance(part, Polygon) and not part.is_empty]


def raster(polygons, height, width):
    return masks.merge(masks.frPyObjects([list(np.asarray(p).flatten()) for p in polygons], int(height), int(width)))


def text(code):
    return code["counts"].decode()


def placed(polygons, case, side):
    parts = [piece for polygon in polygons for piece in pieces(polygon, case, side)]
    if not parts:
        return None
    points = np.concatenate(parts)
    low, high = points.min(0), points.max(0)
    height, width = placement(side, *case[1:])[2]
    mask = masks.decode(raster(polygons, HEIGHT, WIDTH))
    moved = crop(mask, case, side, Image.NEAREST)
    area = sum(shapely.area(Polygon(part)) for part in parts)
    return {"bbox": [*low.tolist(), *(high - low).tolist()], "area": float(area), "cut": text(raster(parts, height, width)),
            "moved": text(masks.encode(np.asfortranarray(moved)))}


def codes():
    """The masks of some objects in both forms of run-length encoding."""
    found = []
    for polygons in OBJECTS[:3]:
        code = raster(polygons, HEIGHT, WIDTH)
        flat = masks.decode(code).flatten(order="F")
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [flat[-1] ^ 1]])))
        runs = np.diff(np.concatenate([[0], edges])).tolist()
        found.append({"compressed": text(code), "runs": runs})
    return found


def fitted(height, width, side):
    """detectron2's ResizeShortestEdge.get_output_shape with both lengths `side`."""
    size = side * 1.0
    scale = size / min(height, width)
    rows, columns = (size, scale * width) if height < width else (scale * height, size)
    if max(rows, columns) > side:
        scale = side * 1.0 / max(rows, columns)
        rows, columns = rows * scale, columns * scale
    return int(rows + 0.5), int(columns + 0.5)


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..", "tests", "golden")
    image, (small, large) = picture(), SIDES
    arrays = {f"crop{number}": crop(image, case, small, Image.BILINEAR) for number, case in enumerate(CASES)}
    rows, columns = fitted(HEIGHT, WIDTH, small)
    arrays["evaluated"] = np.asarray(Image.fromarray(image).resize((columns, rows), Image.BILINEAR))
    cases = []
    for flipped, scale, share in CASES:
        case = flipped, scale, share
        cases.append({"flipped": flipped, "scale": scale, "share": share,
                      "placed": [placed(polygons, case, large) for polygons in OBJECTS]})
    golden = {"side": large, "cases": cases, "objects": OBJECTS, "codes": codes(),
              "fitted": [[*size, side, *fitted(*size, side)] for size in SIZES for side in (64, 512, 1024)]}
    save_file(arrays, os.path.join(folder, "coco_data.safetensors"))
    with open(os.path.join(folder, "coco_data.json"), "w") as file:
        json.dump(golden, file)


if __name__ == "__main__":
    main()
