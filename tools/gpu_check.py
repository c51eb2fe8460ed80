#!/usr/bin/env python3
"""Checks on a machine with a GPU that incubate computes there what it computes on a CPU, and how fast.

  tools/gpu_check.py OUT                              # in a checkout on a GPU machine: builds the bundle and checks it
  tools/bundle.sh                                     # where the GPU machine has no Rust: build elsewhere; the tarball
  python3 incubate-*/tools/gpu_check.py OUT           # holds this script; unpacked, it needs no network either

Needs the Python of a torch 2.11.0 for CUDA, whose libtorch the program then uses; the benchmark's peer needs timm too.
Writes OUT/gpu_check.json and ends with 1 if a check failed. --device cpu tries the script itself where there is no GPU.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SMALL = """
[run]
device = "cpu"
threads = 1
micro_batch = 16
checkpoint_every = "5 steps"
log_steps = 1
[model]
image_size = 16
channels = 1
classes = 4
patch_size = 4
width = 64
heads = 4
depths = [2, 2, 2, 2]
[data]
format = "shapes"
train_images = 512
test_images = 128
mean = [0.3]
std = [0.3]
repeats = 1
mixup = 0.8
cutmix = 1.0
erase = 0
[train]
global_batch = 64
base_lr = 8e-3
schedule = "cosine"
warmup_epochs = 0
epochs = 8
eval_epochs = 0
[module]
epochs = 8
drop_path = 0.1
[finetune]
epochs = 8
clip_grad = 0.5
ema = 0.9
"""
# Largest relative difference of a loss in some 64 steps: rounding, not a mistake, which shows at once.
TOLERANCES = {"fp32": 2e-3, "tf32": 1e-2, "bf16": 3e-2}


class Program:
    """Runs the program on one run directory after another."""

    def __init__(self, path, scratch, device):
        self.path, self.scratch, self.device = path, scratch, device
        self.environment = dict(os.environ, LIBTORCH=str(Path(torch.__file__).parent))

    def config(self, name, text):
        file = self.scratch / f"{name}.toml"
        file.write_text(text)
        return file

    def command(self, arguments, sets=()):
        pairs = [word for item in sets for word in ("--set", item)]
        return [str(self.path), *map(str, arguments), *pairs]

    def run(self, arguments, sets=(), expect=0, **options):
        done = subprocess.run(self.command(arguments, sets), env=self.environment, text=True, capture_output=True,
                              timeout=540, **options)
        if done.returncode != expect:
            raise AssertionError(f"{arguments}: exit code {done.returncode}, expected {expect}: {done.stderr[-2000:]}")
        return done

    def train(self, command, run, sets=(), config=None, **options):
        config = config or self.config("small", SMALL)
        command = command.split()
        return self.run([command[0], config, *command[1:], "--run-dir", self.scratch / run], sets, **options)

    def losses(self, run, phase):
        lines = (self.scratch / run / "logs" / phase / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    def copy(self, files, source, target):
        (self.scratch / target).mkdir(exist_ok=True)
        for file in files:
            shutil.copy(self.scratch / source / file, self.scratch / target / file)

    def devices(self, precision=None):
        """What to set to compute on the device under test."""
        sets = [f'run.device="{self.device}"', "run.replicas=1"]
        return sets + ([f'run.precision="{precision}"'] if precision else [])


def difference(ours, reference):
    assert len(ours) == len(reference) > 0, f"{len(ours)} steps, expected {len(reference)}"
    return max(abs(a / b - 1.0) for a, b in zip(ours, reference, strict=True))


def within(found, tolerance):
    assert all(math.isfinite(value) and value <= tolerance for value in found.values()), f"{found} exceeds {tolerance}"
    return {"largest_relative_difference": found, "tolerance": tolerance}


def environment(program):
    smi = shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "gpus": subprocess.run(query, text=True, capture_output=True).stdout.splitlines() if smi else [],
        "incubate": program.run(["--version"]).stdout.strip(),
    }


def doctor(program):
    """Driver, CUDA and NCCL as the program sees them; on a GPU with a sum of an NCCL world of one."""
    config = program.config("doctor", SMALL)
    done = program.run(["doctor", config, "--run-dir", program.scratch / "doctor", "--json"], program.devices())
    findings = {finding["subject"]: finding["text"] for finding in json.loads(done.stdout)}
    if program.device == "cuda":
        assert "a sum of one works" in findings["NCCL"], findings
    return findings


def reference(program):
    """The run on the CPU in fp32 that everything else is held against."""
    program.train("run", "cpu")
    return {"losses": {phase: program.losses("cpu", phase)[-1] for phase in ("meta", "module-1", "finetune")}}


def same_results(precision, recomputed=False):
    def check(program):
        """Each phase from the CPU's weights, so that differences do not add up."""
        run = f"device-{precision}" + ("-recomputed" if recomputed else "")
        sets = program.devices(precision) + (["run.activation_checkpointing=true"] if recomputed else [])
        program.train("meta", run, sets)
        found = {"meta": difference(program.losses(run, "meta"), program.losses("cpu", "meta"))}
        program.copy(["meta.h5", *(f"module-{i}.h5" for i in (0, 2, 3)), "assembled.h5"], "cpu", run)
        for command, phase in (("module --index 1", "module-1"), ("finetune", "finetune")):
            program.train(command, run, sets)
            found[phase] = difference(program.losses(run, phase), program.losses("cpu", phase))
        return within(found, TOLERANCES[precision])

    return check


def micro_batches(program):
    """Micro-batches are summed as one large one: the accumulation on the device."""
    program.train("meta", "device-accumulated", [*program.devices(), "run.micro_batch=64"])
    return within({"meta": difference(program.losses("device-accumulated", "meta"), program.losses("cpu", "meta"))},
                  TOLERANCES["fp32"])


def replicas(program):
    """Two replicas, on two GPUs by NCCL, have the curve of one."""
    if program.device == "cuda" and torch.cuda.device_count() < 2:
        return "skipped: there is one GPU"
    done = program.train("meta", "two", [f'run.device="{program.device}"', "run.replicas=2"])
    assert "through host memory" not in done.stderr, done.stderr
    return within({"meta": difference(program.losses("two", "meta"), program.losses("cpu", "meta"))}, TOLERANCES["fp32"])


def resumed(first, then):
    def check(program):
        """A checkpoint of one device goes on on another."""
        run = f"from-{first}-to-{then}"
        sets = {"cpu": [], "device": program.devices()}
        config = program.config("small", SMALL)
        command = program.command(["meta", config, "--run-dir", program.scratch / run], sets[first])
        child = subprocess.Popen(command, env=program.environment, stderr=subprocess.DEVNULL)
        checkpoints = program.scratch / run / "checkpoints"
        while child.poll() is None and not (checkpoints.is_dir() and any(checkpoints.glob("meta-*.h5"))):
            time.sleep(0.002)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 75, f"exit code {child.returncode}: it was over before it could be stopped"
        done = program.train("meta", run, sets[then])
        assert "resuming at step" in done.stderr, done.stderr
        return within({"meta": difference(program.losses(run, "meta"), program.losses("cpu", "meta"))},
                      TOLERANCES["fp32"])

    return check


def out_of_memory(program):
    """One error that names a micro-batch, which then fits."""
    cuda = program.device == "cuda"
    width, side, patch, batch = (1024, 224, 16, 1024) if cuda else (512, 16, 1, 512)
    depths = [6, 6, 6, 6] if cuda else [1, 1, 1, 1]
    text = SMALL.replace("[train]\nglobal_batch = 64", f"[train]\nglobal_batch = {batch}").replace("epochs = 8", "epochs = 1")
    text = text.replace("width = 64", f"width = {width}").replace("image_size = 16", f"image_size = {side}")
    text = text.replace("patch_size = 4", f"patch_size = {patch}").replace("depths = [2, 2, 2, 2]", f"depths = {depths}")
    text = text.replace("train_images = 512", f"train_images = {batch}")
    text = text.replace("micro_batch = 16", f"micro_batch = {batch}").replace("test_images = 128", "test_images = 4")
    config = program.config("large", text)
    limit = None if cuda else lambda: resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
    done = program.train("e2e", "large", program.devices(), config, expect=2, preexec_fn=limit)
    line = next(line for line in done.stderr.splitlines() if "ERROR" in line)
    assert "out of memory" in line and " fit: --set run.micro_batch=" in line, line
    if cuda:
        fitting = line.split("run.micro_batch=")[1].split()[0]
        program.train("e2e", "large", [*program.devices(), f"run.micro_batch={fitting}"], config)
    return line


def automatic_micro_batch(program):
    """What the memory holds is chosen, recorded, and trains to the end."""
    done = program.train("meta", "auto", [*program.devices(), "run.micro_batch=auto"])
    progress = json.loads((program.scratch / "auto" / "progress" / "meta.json").read_text())
    assert f"micro-batches of {progress['micro_batch']} samples fit" in done.stderr, done.stderr
    return within({"meta": difference(program.losses("auto", "meta"), program.losses("cpu", "meta"))}, TOLERANCES["fp32"])


def step_benchmark(stage, pairs):
    def check(program):
        """In turn with PyTorch and timm, one work of ViT-L under bf16: the official rule under autocast."""
        cuda = program.device == "cuda"
        model, batch = ("vit-l", 64) if cuda else ("tiny-28", 32)
        steps = "20" if cuda else "4"
        sets = [*program.devices("bf16"), f"run.micro_batch={batch}"]
        ours = ["bench", "step", "--model", model, "--batch", str(batch), "--steps", steps, "--json"]
        peer = [sys.executable, str(HERE / "peer_step.py"), "--model", model, "--batch", str(batch), "--steps", steps,
                "--dtype", "bfloat16", "--device", program.device]
        ours += ["--e2e"] if stage is None else ["--stage", str(stage)]
        peer += ["--mode", "e2e"] if stage is None else ["--mode", "official", "--stage", str(stage)]
        reports, peers = [], []
        for _ in range(pairs):
            reports.append(json.loads(program.run(ours, sets).stdout))
            done = subprocess.run(peer, text=True, capture_output=True, timeout=540)
            # Our figure is worth keeping all the same.
            assert done.returncode == 0, f"the peer failed: {done.stderr[-2000:]}; ours: {reports}"
            peers.append(json.loads(done.stdout))
        ratios = [ours["images_per_s"] / theirs["images_per_s"] for ours, theirs in zip(reports, peers, strict=True)]
        return {"ratio": statistics.median(ratios), "ratios": ratios, "ours": reports[-1], "peer": peers[-1]}

    return check


def built(scratch):
    """The launcher of a bundle made from this checkout."""
    tarball = scratch / "bundle.tar.gz"
    subprocess.run([HERE / "bundle.sh", tarball], check=True)
    shutil.unpack_archive(tarball, scratch)
    return next(scratch.glob("incubate-*/incubate"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="where the report goes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--incubate", type=Path, help="a program [default: the bundle's that holds this script, else a new one's]")
    parser.add_argument("--pairs", type=int, default=3, help="of the benchmark; 0 leaves it out")
    parser.add_argument("--only", action="append", help="of these checks, and what they need")
    a = parser.parse_args()
    checks = {"environment": environment, "doctor": doctor, "reference": reference}
    checks |= {f"same results in {precision}": same_results(precision) for precision in TOLERANCES}
    checks["same results with activation checkpointing"] = same_results("fp32", recomputed=True)
    checks |= {"micro-batches": micro_batches, "two replicas": replicas}
    checks |= {f"resume from {a} to {b}": resumed(a, b) for a, b in (("cpu", "device"), ("device", "cpu"))}
    checks |= {"out of memory": out_of_memory, "automatic micro-batch": automatic_micro_batch}
    if a.pairs > 0:
        stages = range(4) if a.device == "cuda" else [0]
        checks |= {f"step benchmark, stage {i}": step_benchmark(i, a.pairs) for i in stages}
        checks["step benchmark, end to end"] = step_benchmark(None, a.pairs)
    needed = {"environment", "reference", *(a.only or checks)}
    a.out.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        launcher = HERE.parent / "incubate"
        path = a.incubate or (launcher if launcher.exists() else built(Path(scratch)))
        program = Program(path.resolve(), Path(scratch), a.device)
        for name, check in checks.items():
            if name not in needed:
                continue
            began = time.monotonic()
            try:
                ok, found = True, check(program)
            except Exception as error:
                ok, found = False, str(error) or traceback.format_exc()
            results.append({"check": name, "ok": ok, "seconds": round(time.monotonic() - began, 1), "found": found})
            print("ok " if ok else "NOT", name, "" if ok and isinstance(found, dict) else found, flush=True)
            report = {"device": a.device, "passed": all(result["ok"] for result in results), "checks": results}
            (a.out / "gpu_check.json").write_text(json.dumps(report, indent=1))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
