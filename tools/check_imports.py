#!/usr/bin/env python3
"""Writes checkpoints in the layouts of the official code (`model`, `model_stages` and an optimiser), of DeiT and of timm, lets
incubate import and export each, and compares the tensors bit for bit. Then `check_exports.py` compares logits, and the pixels of
JPEG and PNG files of several sizes. «The official code» is that of Deep Incubation's authors.

  tools/check_imports.py INCUBATE [SIZE…] [-- ARGUMENTS OF check_exports.py]        (SIZE: small, b, l, h)

Needs torch, timm and Pillow, and for ViT-H about 12 GB of memory and 15 GB of disk. The exit code is 1 if anything differs.
"""
import os
import shutil
import subprocess
import sys
import tempfile

import torch
from PIL import Image
from safetensors.torch import save_file

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "configs")
SMALL = "image_size=28 patch_size=14 classes=5 width=32 heads=2 depths=[2,1,3]".split() + ["qkv_bias=false"]
# config, image side, patch side, classes, width, depths of the stages, qkv bias
SIZES = {
    "small": ("imagenet-vit-h", 28, 14, 5, 32, [2, 1, 3], False),
    "b": ("imagenet-vit-b", 224, 16, 1000, 768, [3] * 4, True),
    "l": ("imagenet-vit-l", 224, 16, 1000, 1024, [6] * 4, True),
    "h": ("imagenet-vit-h", 224, 14, 1000, 1280, [8] * 4, False),
}


def stages(size):
    """The list of the stages' state dicts, as the official code saves it. The random weights spread like trained weights."""
    _, image, patch, classes, width, depths, qkv_bias = SIZES[size]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, std=0.02):
        return torch.empty(*shape).normal_(0, std, generator=generator)

    made = []
    for i, depth in enumerate(depths):
        stage = {}
        if i == 0:
            stage["cls_token"], stage["pos_embed"] = draw(1, 1, width), draw(1, (image // patch) ** 2 + 1, width, std=0.2)
            stage["patch_embed.proj.weight"], stage["patch_embed.proj.bias"] = draw(width, 3, patch, patch), draw(width, std=0.2)
        for b in range(depth):
            for name, out, inner in [("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)]:
                stage[f"blocks.{b}.{name}.weight"] = draw(out * width, inner * width)
                if name != "attn.qkv" or qkv_bias:
                    stage[f"blocks.{b}.{name}.bias"] = draw(out * width)
            for name in ("norm1", "norm2"):
                stage[f"blocks.{b}.{name}.weight"], stage[f"blocks.{b}.{name}.bias"] = 1 + draw(width), draw(width)
        if i == len(depths) - 1:
            stage["norm.weight"], stage["norm.bias"] = 1 + draw(width), draw(width)
            stage["head.weight"], stage["head.bias"] = draw(classes, width), draw(classes)
        made.append(stage)
    return made


def flat(stage_weights):
    """The weights of all stages by the names that they have in the whole network."""
    whole, before = {}, 0
    for stage in stage_weights:
        blocks = 0
        for name, tensor in stage.items():
            if name.startswith("blocks."):
                _, block, rest = name.split(".", 2)
                blocks = max(blocks, int(block) + 1)
                name = f"blocks.{before + int(block)}.{rest}"
            whole[name] = tensor
        before += blocks
    return whole


# Widths and heights. Some give even margins at the centre crop, and some give odd margins. Some images are smaller than the
# network's input, and some are so large that training would decode them at a reduced size.
IMAGES = [(640, 427), (1024, 683), (427, 640), (500, 375), (333, 500), (225, 226), (97, 131), (2049, 1365)]


def photographs(folder):
    """Writes train/ and val/ of two classes: colour JPEG and PNG files and grey JPEG files of smooth shapes and noise."""
    generator = torch.Generator().manual_seed(2)
    for i, (width, height) in enumerate(IMAGES):
        coarse = torch.rand(1, 3, 9, 9, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].permute(1, 2, 0)
        noisy = 255 * smooth + 20 * torch.randn(height, width, 3, generator=generator)
        image = Image.fromarray(noisy.clamp(0, 255).to(torch.uint8).numpy())
        for name, mode, more in [("a.jpg", "RGB", {"quality": 90}), ("b.jpg", "L", {"quality": 75}), ("c.png", "RGB", {})]:
            for split in ("train", "val"):
                class_folder = os.path.join(folder, split, f"class-{i % 2}")
                os.makedirs(class_folder, exist_ok=True)
                image.convert(mode).save(os.path.join(class_folder, f"{width}x{height}-{name}"), **more)


def main():
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    (binary, *sizes), more = arguments[:split], arguments[split + 1:]
    failed = False
    for size in sizes or ["small"]:
        folder = tempfile.mkdtemp(prefix=f"incubate-{size}-")
        try:
            failed |= check(os.path.abspath(binary), size, folder, more)
        finally:
            shutil.rmtree(folder)
    sys.exit(failed)


def check(binary, size, folder, more):
    config = SIZES[size][0]
    images = os.path.join(folder, "images")
    photographs(images)
    sets = ["run.threads=2", "run.micro_batch=2", "data.format=folder", f"data.path={images}", "data.train_images=0",
            "data.test_images=0"]
    sets += [f"model.{s}" for s in SMALL] if size == "small" else []
    common = [os.path.join(CONFIGS, f"{config}.toml"), *(part for s in sets for part in ("--set", s)), "-q"]

    def run(directory, command, *rest):
        subprocess.run([binary, *command, *common, "--run-dir", os.path.join(folder, directory), *rest], check=True,
                       stdout=subprocess.DEVNULL)

    failed = check_layouts(run, size, folder)
    outputs = os.path.join(folder, "outputs.safetensors")
    run("official", ["evaluate"], "--outputs", outputs)
    run("official", ["export"], "--format", "all")
    checker = os.path.join(os.path.dirname(os.path.abspath(__file__)), "check_exports.py")
    return failed | bool(subprocess.run([sys.executable, checker, os.path.join(folder, "official/export"), outputs,
                                         "--images", os.path.join(images, "val"), *more]).returncode)


def check_layouts(run, size, folder):
    stage_weights = stages(size)
    whole = flat(stage_weights)
    official = {"model": whole, "model_stages": stage_weights, "epoch": 99, "scaler": {}, "lr_scheduler": {"base_values": [1e-3]},
                "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}}
    files = {"official": lambda p: torch.save(official, p), "timm": lambda p: torch.save(whole, p),
             "deit": lambda p: torch.save({"model": whole}, p), "safetensors": lambda p: save_file(whole, p)}
    failed = False
    for layout, save in files.items():
        path = os.path.join(folder, f"{layout}.{'safetensors' if layout == 'safetensors' else 'pth'}")
        save(path)
        run(layout, ["import", path])
        os.remove(path)
        run(layout, ["export"], "--format", "pth")
        got = torch.load(os.path.join(folder, layout, "export/pth/model.pth"), weights_only=True, mmap=True)
        equal = all(torch.equal(got[name], tensor) for name, tensor in whole.items())
        extra = [name for name in got if name not in whole and not (name.endswith("qkv.bias") and not got[name].any())]
        print(f"{'BAD' if extra or not equal else 'ok '} {size} {layout}: {len(whole)} tensors bit for bit {extra}", flush=True)
        failed |= bool(extra) or not equal
        del got
        if layout != "official":
            shutil.rmtree(os.path.join(folder, layout))
    return failed


main()
