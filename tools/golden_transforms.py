#!/usr/bin/env python3
"""Writes tests/golden/transforms.safetensors and transforms.json with timm, torchvision and Pillow: the results of decoding, of
each operation and of whole transforms on a few images, and histograms of 100,000 draws of every random parameter.

  tools/golden_transforms.py [FOLDER]      (needs those three, torch, numpy and safetensors; by default FOLDER is tests/golden)
"""
import io
import json
import math
import os
import random
import struct
import sys
import zlib

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import functional

SIZE, SMALL, DRAWS, MEAN = 40, 20, 100_000, (124, 116, 104)
OPERATIONS = [("AutoContrast", ()), ("Equalize", ()), ("Invert", ()), ("Posterize", (2,)), ("Solarize", (100,)),
              ("SolarizeAdd", (60,)), ("Color", (0.3,)), ("Color", (1.8,)), ("Contrast", (0.3,)), ("Contrast", (1.8,)),
              ("Brightness", (0.3,)), ("Brightness", (1.8,)), ("Sharpness", (0.3,)), ("Sharpness", (1.8,)),
              ("Rotate", (25.0,)), ("Rotate", (-11.5,)), ("ShearX", (0.27,)), ("ShearX", (-0.1,)), ("ShearY", (0.27,)),
              ("ShearY", (-0.1,)), ("TranslateXRel", (0.39,)), ("TranslateXRel", (-0.113,)), ("TranslateYRel", (0.39,)),
              ("TranslateYRel", (-0.113,))]


def picture(height, width):
    """An image of smooth colours, sharp edges and noise. It leaves out the extreme values, so that contrast can be stretched."""
    y, x = np.mgrid[:height, :width]
    planes = [110 + 70 * np.sin(0.11 * x + 0.07 * y + c) + 40 * ((x + 2 * y) % 37 < 12) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return Image.fromarray((np.stack(planes, -1) + noise).clip(12, 240).astype(np.uint8))


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def png(pixels, colour, interlaced=False):
    """A PNG, also of the kinds that Pillow cannot write: colours with 16 bits per channel, or interlaced."""
    depth = pixels.dtype.itemsize * 8
    height, width = pixels.shape[:2]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for top, left, down, right in passes if interlaced else [(0, 0, 1, 1)]:
        part = pixels[top::down, left::right].astype(pixels.dtype.newbyteorder(">"))
        rows += b"".join(b"\0" + row.tobytes() for row in part if part.size)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return np.frombuffer(data, np.uint8)


def files():
    """A file of every kind, and the pixels that Pillow decodes from it."""
    image = picture(45, 61)
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 3)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    kinds = {
        "420.jpg": encoded(image, format="JPEG", quality=92),
        "444.jpg": encoded(image, format="JPEG", quality=92, subsampling=0),
        "422.jpg": encoded(image, format="JPEG", quality=92, subsampling=1),
        "progressive.jpg": encoded(image, format="JPEG", quality=92, progressive=True),
        "gray.jpg": encoded(image.convert("L"), format="JPEG", quality=92),
        "cmyk.jpg": encoded(image.convert("CMYK"), format="JPEG", quality=92),
        "rotated.jpg": encoded(image, format="JPEG", quality=92, exif=orientation),
        "rgb.png": encoded(image, format="PNG"),
        "rgba.png": encoded(image.convert("RGBA"), format="PNG"),
        "gray.png": encoded(image.convert("L"), format="PNG"),
        "bilevel.png": encoded(image.convert("1"), format="PNG"),
        "palette.png": encoded(image.convert("P"), format="PNG"),
        "deep.png": encoded(deep, format="PNG"),
        "grayalpha.png": encoded(image.convert("LA"), format="PNG"),
        "deep-rgb.png": png(np.asarray(image).astype(np.uint16) * 257 - 99, 2),
        "deep-grayalpha.png": png(np.asarray(image)[..., :2].astype(np.uint16) * 257 - 99, 4),
        "interlaced.png": png(np.asarray(image), 2, interlaced=True),
    }
    result = {}
    for name, data in kinds.items():
        result[f"file.{name}"] = data
        result[f"decoded.{name}"] = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
    return result


def pictures():
    image = picture(SIZE, SIZE)
    result = {"image": np.asarray(image)}
    hparams = dict(img_mean=MEAN, interpolation=Image.Resampling.BICUBIC)
    for name, arguments in OPERATIONS:
        op = AugmentOp(name, prob=1.0, hparams=hparams)
        result["operation." + " ".join([name, *map(str, arguments)])] = np.asarray(
            op.aug_fn(image, *arguments, **dict(op.kwargs)))
    large = picture(90, 121)
    result["large"] = np.asarray(large)
    # The left edge, top edge, width and height of a crop that is resized to SIZE × SIZE: shrunk, enlarged, stretched.
    for left, top, width, height in [(0, 0, 121, 90), (7, 11, 80, 60), (30, 20, 25, 33), (100, 3, 21, 80)]:
        crop = large.crop((left, top, left + width, top + height))
        result[f"crop.{left} {top} {width} {height}"] = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    rotated = large.transpose(Image.Transpose.ROTATE_90)
    for size, image in [(40, large), (48, large), (40, rotated), (32, large), (28, rotated)]:
        if size > 32:
            transform = create_transform(size, is_training=False, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
        else:
            # DeiT resizes no image for inputs of at most 32 pixels, since it expects images of that size. incubate resizes the shorter
            # side to the input's size, and crops only the longer side.
            resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
            transform = transforms.Compose([resize, transforms.CenterCrop(size), transforms.ToTensor()])
        key = f"evaluation.{size} {image.width} {image.height}"
        result[key] = (transform(image) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    # Brightness, contrast and saturation, in ColorJitter's order.
    image = picture(SIZE, SIZE)
    adjust = {"Brightness": functional.adjust_brightness, "Contrast": functional.adjust_contrast,
              "Color": functional.adjust_saturation}
    for factors in ({"Contrast": 0.7, "Color": 1.35, "Brightness": 0.8}, {"Brightness": 1.4, "Color": 0.6, "Contrast": 1.3}):
        jittered = image
        for name, factor in factors.items():
            jittered = adjust[name](jittered, factor)
        result["jitter." + ", ".join(f"{name} {factor}" for name, factor in factors.items())] = np.asarray(jittered)
    result |= erased(image)
    # An image of a photograph's size, evaluated at the input sizes of the configs. Every seventh pixel of every seventh row is
    # kept.
    file = encoded(picture(450, 600).resize((600, 450)), format="JPEG", quality=85)
    result["photo.jpg"] = file
    photo = Image.open(io.BytesIO(file.tobytes())).convert("RGB")
    for size in (224, 384, 392):
        transform = create_transform(size, is_training=False, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
        pixels = (transform(photo) * 255).round().to(torch.uint8).permute(1, 2, 0)
        result[f"photo.evaluation {size}"] = pixels[::7, ::7].contiguous().numpy()
    return result | files() | small()


def small():
    """A colour and a gray image of 20 pixels, and each after the training transform of DeiT's build_transform for at most 32
    pixels, once with each operation. A key holds the padded crop's position in the image, whether the image is flipped, and the
    operation."""
    result = {}
    for mode in ("RGB", "L"):
        image = picture(SMALL, SMALL).convert(mode)
        result[f"small.{mode}"] = np.asarray(image)
        channels = len(image.getbands())
        mean = [value / 255 for value in MEAN[:channels]]
        transform = create_transform(SMALL, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1",
                                     interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1, mean=mean,
                                     std=[1.0] * channels)
        transform.transforms[0] = transforms.RandomCrop(SMALL, padding=4)
        crop, flip, augment, _, normalise, erase = transform.transforms
        names = [type(step).__name__ for step in (flip, augment, normalise, erase)]
        assert names == ["RandomHorizontalFlip", "RandAugment", "Normalize", "RandomErasing"], names
        augment.num_layers, normalise.mean, erase.probability = 1, torch.zeros(channels), 0.0
        hparams = augment.ops[0].hparams
        for number, (name, arguments) in enumerate(OPERATIONS):
            top, left, flip.p = number % 9, 2 * number % 9, number % 2
            crop.get_params = lambda *_, region=(top, left, SMALL, SMALL): region
            augment.ops = [AugmentOp(name, prob=1.0, hparams=hparams)]
            augment.ops[0].level_fn = lambda *_, arguments=arguments: arguments
            shown = (transform(image) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            draw = f"{top - 4} {left - 4} {flip.p}"
            result[f"small.{mode}.{draw}." + " ".join([name, *map(str, arguments)])] = shown
    return result


def erased(image):
    """An image with one erased rectangle. The key holds the rectangle's position and size."""
    planes = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    erasing = RandomErasing(probability=1.0, mode="pixel", device="cpu")
    after = planes.clone()
    erasing._erase(after, 3, SIZE, SIZE, torch.float32)
    rows, columns = (after != planes).any(0).nonzero(as_tuple=True)
    left, top = int(columns.min()), int(rows.min())
    width, height = int(columns.max()) - left + 1, int(rows.max()) - top + 1
    return {f"erased.{left} {top} {width} {height}": after.numpy()}


def histogram(values, low, high, bins=20):
    # The ranges are chosen so that no frequent value lies on the border of two bins, where rounding would choose the bin.
    counts, _ = np.histogram(values, bins, (low, high))
    assert counts.sum() == len(values), (min(values), max(values))
    return {"low": low, "high": high, "counts": counts.tolist()}


def draws():
    result = {}
    image = Image.new("RGB", (500, 375))
    crops = [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(DRAWS)]
    result["crop area"] = histogram([h * w / (500 * 375) for _, _, h, w in crops], 0.0, 1.0)
    result["crop ratio"] = histogram([math.log(w / h) for _, _, h, w in crops], -0.32, 0.32)
    result["crop left"] = histogram([j / 500 for _, j, _, _ in crops], -0.0007, 1.0)
    result["crop top"] = histogram([i / 375 for i, _, _, _ in crops], -0.0007, 1.0)

    taken = []
    policy = rand_augment_transform("rand-m9-mstd0.5-inc1", dict(img_mean=MEAN, interpolation=Image.Resampling.BICUBIC))
    for kind, op in enumerate(policy.ops):
        op.aug_fn = lambda image, *arguments, kind=kind, **_: taken.append((kind, *arguments)) or image
    for _ in range(DRAWS // 2):
        policy(None)
    names = [op.name for op in policy.ops]
    kinds = [names[kind] for kind, *_ in taken]
    result["operations"] = {name: kinds.count(name) for name in names} | {"none": DRAWS - len(kinds)}
    for kind, (name, low, high) in enumerate([
            (None, 0, 0), (None, 0, 0), (None, 0, 0), ("Rotate", -30, 30), ("Posterize", 0, 5), ("Solarize", 0, 257),
            ("SolarizeAdd", 0, 129), ("Color", 0, 2.0013), ("Contrast", 0, 2.0013), ("Brightness", 0, 2.0013), ("Sharpness", 0, 2.0013),
            ("ShearX", -0.3, 0.3), ("ShearY", -0.3, 0.3), ("TranslateX", -0.45, 0.45), ("TranslateY", -0.45, 0.45)]):
        if name:
            result["argument of " + name] = histogram([a[0] for k, *a in taken if k == kind], low, high)

    erasing = RandomErasing(probability=1.0, mode="pixel", device="cpu")
    areas, ratios = [], []
    for _ in range(DRAWS):
        image = torch.zeros(1, 224, 224)
        erased = Recorder(image)
        erasing._erase(erased, 1, 224, 224, torch.float32)
        areas.append(erased.height * erased.width / 224 ** 2)
        ratios.append(math.log(erased.height / erased.width) if erased.height else 0.0)
    result["erased area"] = histogram(areas, 0.0, 0.35)
    result["erased ratio"] = histogram(ratios, -1.3, 1.3)

    for name, mixup, cutmix in [("mixup", 0.8, 0.0), ("cutmix", 0.0, 1.0), ("both", 0.8, 1.0)]:
        mix = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, num_classes=1000)
        drawn = [mix._params_per_batch() for _ in range(DRAWS)]
        # CutMix corrects lambda to the area that is pasted.
        shape = (2, 3, 224, 224)
        lambdas = [cutmix_bbox_and_lam(shape, lam)[1] if cut else lam for lam, cut in drawn]
        result[f"{name} lambda"] = histogram([float(lam) for lam in lambdas], 0.0, 1.0)
        result[f"{name} cut"] = {"yes": sum(bool(cut) for _, cut in drawn), "no": sum(not cut for _, cut in drawn)}
    return result


class Recorder:
    """Records the size of the rectangle that RandomErasing writes, without writing."""
    def __init__(self, image):
        self.height = self.width = 0

    def __setitem__(self, slices, _):
        _, rows, columns = slices
        self.height, self.width = rows.stop - rows.start, columns.stop - columns.start


def main(folder):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    save_file({k: np.ascontiguousarray(v) for k, v in pictures().items()}, os.path.join(folder, "transforms.safetensors"))
    with open(os.path.join(folder, "transforms.json"), "w") as f:
        json.dump({"draws": DRAWS, **draws()}, f, indent=1)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..", "tests", "golden"))
