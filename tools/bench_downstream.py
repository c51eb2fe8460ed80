#!/usr/bin/env python3
"""Times training steps of ViT-B for segmentation and detection on the CPU, by incubate and by mmsegmentation or detectron2 in turn.
Prints a table.

  tools/bench_downstream.py INCUBATE DETECTRON2 [--only detection] [--pairs 3] [--steps 2] [--threads 1]
      (needs what check_segmentation.py and check_detection.py need; DETECTRON2 is a clone)

Segmentation is UPerNet with an auxiliary FCN for 150 classes. Detection is Mask R-CNN with a simple feature pyramid for 80
categories, with attention in windows of 14×14 tokens. detectron2 gets timm's blocks with a class token, as in check_detection.py.
Images are random numbers. Labels are random, and each image has seven random octagons, as in `incubate bench step`. A step is
forward, backward and AdamW, without stochastic depth. Each measurement is a process of its own, whose peak of resident memory is
compared too. The table has the shortest step of all pairs, because other programs on the machine only lengthen a step. A ratio of
times above 1 means that incubate is faster. A ratio of memory below 1 means that it takes less.
"""
import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time

NET = {"depths": [3, 3, 3, 3], "width": 768, "patch_size": 16, "heads": 12, "mlp_ratio": 4.0, "qkv_bias": True, "layer_norm_eps": 1e-6}
SEGMENTATION = {"classes": 150, "head_dropout": 0.1, "width": 512, "auxiliary_width": 256, "taps": [], "stride": 0}
DETECTION = {"classes": 80, "masks": True, "width": 256, "hidden": 1024, "window": 14}
# name, task, crop, batch, neck
CASES = [
    ("segmentation, no neck", "segmentation", 512, 2, "none"),
    ("segmentation, MultiLevelNeck", "segmentation", 512, 2, "mln"),
    ("detection", "detection", 1024, 1, ""),
]
OBJECTS = 7


def segmentation_step(crop, batch, neck):
    """Returns a function that computes mmsegmentation's loss, and the model."""
    import torch
    from check_segmentation import build
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model = build({"model": NET, "segmentation": SEGMENTATION | {"crop": crop, "neck": neck}}).train()
    images, labels = torch.randn(batch, 3, crop, crop), torch.randint(0, 150, (batch, 1, crop, crop))
    meta = {"img_shape": (crop, crop), "ori_shape": (crop, crop)}
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=meta) for label in labels]
    return lambda: sum(value for name, value in model.loss(images, samples).items() if "loss" in name), model


def octagons(crop, drawn):
    """Boxes, classes and polygons as in src/task/detection/random_targets.rs."""
    corners = [(0.25, 0), (0.75, 0), (1, 0.25), (1, 0.75), (0.75, 1), (0.25, 1), (0, 0.75), (0, 0.25)]
    boxes, polygons = [], []
    for _ in range(OBJECTS):
        width, height = (crop * drawn.uniform(0.1, 0.5) for _ in range(2))
        left, top = drawn.uniform(0, crop - width), drawn.uniform(0, crop - height)
        boxes.append([left, top, left + width, top + height])
        polygons.append([[number for x, y in corners for number in (left + x * width, top + y * height)]])
    return boxes, [drawn.randrange(80) for _ in range(OBJECTS)], polygons


def detection_step(crop, batch, clone):
    """Returns a function that computes the sum of detectron2's losses, and the model."""
    import torch
    from check_detection import detectron2_model

    data = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    model = detectron2_model(clone, {"model": NET, "detection": DETECTION | {"crop": crop}, "data": data}).train()
    from detectron2.structures import Boxes, Instances, PolygonMasks
    from detectron2.utils.events import EventStorage

    drawn, inputs = random.Random(0), []
    for _ in range(batch):
        boxes, classes, polygons = octagons(crop, drawn)
        objects = Instances((crop, crop), gt_boxes=Boxes(torch.tensor(boxes)), gt_classes=torch.tensor(classes),
                            gt_masks=PolygonMasks(polygons))
        inputs.append({"image": 255 * torch.rand(3, crop, crop), "instances": objects, "height": crop, "width": crop})

    def loss():
        with EventStorage():
            return sum(model(inputs).values())

    return loss, model


def measure_peer(options):
    """Prints the seconds of a step, the peak memory and the number of parameters of the other program."""
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    _, task, crop, batch, neck = options.case
    loss, model = segmentation_step(crop, batch, neck) if task == "segmentation" else detection_step(crop, batch, options.detectron2)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-5)
    seconds = []
    for _ in range(1 + options.steps):
        began = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"step_s": statistics.median(seconds[1:]), "peak_mib": peak,
                      "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}))


def answer(command):
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{ended.stderr[-2000:]}")
    return json.loads(ended.stdout[ended.stdout.index("{"):])


def theirs(options, number):
    sizes = [f"--{name}={getattr(options, name)}" for name in ("steps", "threads", "crop")]
    return answer([sys.executable, __file__, options.incubate, options.detectron2, "--peer", number, *sizes])


def ours(options, task, crop, batch, neck):
    sets = [f"{task}.crop={crop}"] + ([f"segmentation.neck={neck}"] if neck else [])
    sets = [word for key in sets for word in ("--set", key)]
    return answer([options.incubate, "-qq", "bench", "step", "--model=vit-b", "--segment" if task == "segmentation" else "--detect",
                   f"--batch={batch}", f"--steps={options.steps}", f"--threads={options.threads}", "--json", *sets])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("incubate", help="the program")
    parser.add_argument("detectron2", help="a clone of detectron2")
    parser.add_argument("--only", default="", help="the beginning of the names of the rows to measure")
    for name, default in [("pairs", 3), ("steps", 2), ("threads", 1)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--crop", type=int, default=0, help="another size than that of the table")
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [(name, task, options.crop or crop, *rest) for name, task, crop, *rest in CASES]
    if options.peer is not None:
        options.case = cases[options.peer]
        return measure_peer(options)
    print("| ViT-B | pixels, batch | incubate, s | PyTorch, s | ratio | lowest to highest pair | memory, MiB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for number, (name, *case) in enumerate(cases):
        if not name.startswith(options.only):
            continue
        pairs = []
        for turn in range(options.pairs):
            # The first program of a pair may run at another clock rate than the second, so the programs take turns in being first.
            if turn % 2:
                pairs.append((ours(options, *case), theirs(options, number)))
            else:
                peer = theirs(options, number)
                pairs.append((ours(options, *case), peer))
        ratios = [peer["step_s"] / own["step_s"] for own, peer in pairs]
        (own, peer), (memory, of_peer) = ([min(pair[i][key] for pair in pairs) for i in (0, 1)] for key in ("step_s", "peak_mib"))
        print(f"| {name} | {case[1]}, {case[2]} | {own:.2f} | {peer:.2f} | {peer / own:.2f} "
              f"| {min(ratios):.2f} to {max(ratios):.2f} | {memory:.0f} / {of_peer:.0f} | {memory / of_peer:.2f} |", flush=True)


if __name__ == "__main__":
    main()
