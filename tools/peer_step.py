#!/usr/bin/env python3
"""Measures a training step of PyTorch on timm's model. tools/bench_step.py compares `incubate bench step` with it.

  python tools/peer_step.py --model deit-ti --mode official --stage 0 --batch 32 --dtype float32

--mode e2e trains the whole target. In the other modes only --stage is deep and trains, and the other stages have one block each.
--mode frozen computes no weight gradients of the other stages. --mode official computes (and discards) the weight gradients of the
stages after --stage, as the code of Deep Incubation's authors does. --dtype bfloat16 uses autocast. On a GPU the optimiser is
PyTorch's fused AdamW, and each step uploads its images from pinned memory. Prints one JSON line. With --compile, standard error
shows which steps have begun and ended, because the first step may take minutes. Needs torch. Without timm the script measures the
same network from peer_vit.py.
"""

import argparse
import json
import resource
import statistics
import sys
import time

import torch

try:
    from timm.models.vision_transformer import VisionTransformer

    NETWORK = "timm"
except ImportError:
    from peer_vit import VisionTransformer

    NETWORK = "peer_vit"

MODELS = {  # image side, patch side, width, depth, heads, channels, classes: as in src/bench/step.rs
    "tiny-28": (28, 7, 48, 16, 4, 1, 10),
    "deit-ti": (224, 16, 192, 12, 3, 3, 1000),
    "deit-s": (224, 16, 384, 12, 6, 3, 1000),
    "vit-b": (224, 16, 768, 12, 12, 3, 1000),
    "vit-l": (224, 16, 1024, 24, 16, 3, 1000),
    "vit-h": (224, 14, 1280, 32, 16, 3, 1000),
    "deit-t-128": (32, 4, 192, 128, 3, 3, 100),
}
STAGES, WARM_UP = 4, 3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="deit-ti")
    parser.add_argument("--mode", choices=["e2e", "official", "frozen"], default="e2e")
    parser.add_argument("--stage", type=int, default=0, choices=range(STAGES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="the timed steps, after three steps to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    return parser.parse_args()


def network(options):
    """Returns the model, the trained parameters, and (channels, image side, classes).

    The caller gives weight decay to all parameters, because a second optimiser group without it would only add kernel launches.
    """
    side, patch, width, depth, heads, channels, classes = MODELS[options.model]
    deep_blocks = depth // STAGES
    depths = [deep_blocks if options.mode == "e2e" or stage == options.stage else 1 for stage in range(STAGES)]
    stage_of_block = [stage for stage, blocks in enumerate(depths) for _ in range(blocks)]
    model = VisionTransformer(img_size=side, patch_size=patch, in_chans=channels, num_classes=classes,
                              embed_dim=width, depth=sum(depths), num_heads=heads).to(options.device)

    def stage_of(name):
        if name.startswith("blocks."):
            return stage_of_block[int(name.split(".")[1])]
        return 0 if name.startswith(("patch_embed", "pos_embed", "cls_token")) else STAGES - 1

    trained = []
    for name, parameter in model.named_parameters():
        if options.mode == "e2e" or stage_of(name) == options.stage:
            trained.append(parameter)
        elif options.mode == "frozen" or stage_of(name) < options.stage:
            parameter.requires_grad_(False)
    return model, trained, (channels, side, classes)


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, trained, (channels, side, classes) = network(options)
    cuda = options.device.startswith("cuda")
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05, fused=cuda or None)
    if options.compile:
        model = torch.compile(model)
    host_images = torch.randn(options.batch, channels, side, side)
    host_targets = torch.softmax(torch.randn(options.batch, classes), -1)
    if cuda:
        host_images, host_targets = host_images.pin_memory(), host_targets.pin_memory()

    def step():
        images, targets = (host.to(options.device, non_blocking=True) for host in (host_images, host_targets))
        with torch.autocast(options.device.split(":")[0], dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"):
            logits = model(images)
        loss = torch.sum(-targets * torch.log_softmax(logits.float(), -1), -1).mean()
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()

    times = []
    for number in range(1, WARM_UP + options.steps + 1):
        if options.compile:
            print(f"torch.compile: step {number} of {WARM_UP + options.steps} begins", file=sys.stderr, flush=True)
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
        if options.compile:
            print(f"torch.compile: step {number} took {times[-1]:.3f} s", file=sys.stderr, flush=True)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # On a GPU the reported peak is all memory in use, including CUDA's context and PyTorch's cache, as in `incubate bench step`.
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    peak = total - free if cuda else resident
    print(json.dumps({
        "model": options.model, "mode": options.mode, "stage": options.stage, "batch": options.batch,
        "dtype": options.dtype, "device": options.device, "threads": options.threads, "compiled": options.compile,
        "torch": torch.__version__, "network": NETWORK,
        "images_per_s": options.batch / statistics.median(times[WARM_UP:]), "peak_mib": peak / 2**20,
    }))


if __name__ == "__main__":
    main()
