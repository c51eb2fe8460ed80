#!/usr/bin/env python3
"""Compares Deep Incubation with end-to-end training at equal cost: DeiT-T-32 on real images, in a few minutes on one GPU.

  incubate pack IMAGES pack --size 32                  # on any machine: IMAGES holds CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg
  tar -cJf pack.tar.xz pack                            # makes 19 MB of 60 MB of shards, to copy to the GPU machine
  python3 tools/gpu_study.py OUT --data pack.tar.xz    # on the GPU machine

The study first trains the meta model and the target for one epoch each. From their speed it chooses the numbers of epochs, so that
both methods have the same number of operations and the study ends within --seconds. It prints a table. OUT/gpu_study.json holds the
results so far. A study that ran out of time ends with exit code 75. If it is started again with the same --run-dir, it resumes with
the same numbers of epochs.
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_program import Program

CONFIG = """
[run]
name = "gpu-study"
e2e = true
checkpoint_every = "never"           # a checkpoint is written only if a signal stops the run
export = []
[model]
image_size = 32
classes = 10
patch_size = 4
width = 192
heads = 3
depths = [8, 8, 8, 8]
[data]
format = "packed"
mean = [0.4914, 0.4822, 0.4465]
std = [0.2470, 0.2435, 0.2616]
repeats = 1
[train]
global_batch = 512
base_lr = 1e-3
schedule = "cosine"
warmup_epochs = 0
eval_epochs = 0
"""
# The time that the program gets to write a checkpoint after a signal.
GRACE_SECONDS = 25


class Study:
    def __init__(self, a, scratch):
        self.program = Program(a.incubate.resolve(), scratch, a.device)
        self.config = self.program.config("gpu-study", CONFIG)
        self.share = a.share
        self.deadline = time.monotonic() + a.seconds
        self.run_dir = a.run_dir.resolve()
        self.sets = [f'data.path="{shards(a.data.resolve(), scratch)}"', *self.program.devices(a.precision), *a.sets]
        self.file = a.out / "gpu_study.json"
        self.report = {"device": a.device, "precision": a.precision, "complete": False}

    def note(self, **found):
        self.report.update(found)
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(self.report, indent=1))
        temporary.rename(self.file)

    def left(self):
        return self.deadline - time.monotonic()

    def run(self, command, run_dir, sets):
        """Runs the command of one phase, or `run`. Returns its standard output, or None if it was stopped at the deadline."""
        words = self.program.command([command, self.config, "--run-dir", run_dir], [*self.sets, *sets])
        errors = self.program.scratch / "stderr"
        with open(errors, "w") as sink:
            child = subprocess.Popen(words + (["--json"] if command == "run" else []), text=True, stderr=sink,
                                     stdout=subprocess.PIPE, env=self.program.environment)
            try:
                out, _ = child.communicate(timeout=max(self.left() - GRACE_SECONDS, 0.1))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGTERM)
                try:
                    out, _ = child.communicate(timeout=GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    out, _ = child.communicate()
        # The signal may come before the program heeds signals.
        if child.returncode not in (0, 75, -signal.SIGTERM, -signal.SIGKILL):
            last = errors.read_text().splitlines()[-15:]
            self.note(why=f"{command}: exit code {child.returncode}", last_lines=last)
            sys.exit(f"{command}: exit code {child.returncode}: {last}")
        return out if child.returncode == 0 else None

    def speed_of(self, phase):
        """Trains a phase for one epoch in the scratch folder. Returns the images per second of the second half of its steps,
        because the first steps are slow."""
        trial = self.program.scratch / f"trial-{phase}"
        if self.run(phase, trial, [f"{phase}.epochs=1", "run.log_steps=1"]) is None:
            sys.exit("no time is left after the first epochs: give more --seconds")
        lines = (trial / "logs" / phase / "metrics.jsonl").read_text().splitlines()
        speeds = [line["images_per_s"] for line in map(json.loads, lines) if "images_per_s" in line]
        return statistics.median(speeds[len(speeds) // 2 :])

    def epochs(self):
        """The number of epochs of each phase: that of an earlier start, or as many as the time allows."""
        kept = self.run_dir / "study-epochs.json"
        if kept.exists():
            return json.loads(kept.read_text())
        plan = json.loads(self.program.run(["plan", self.config, "--rate", 1, "--json"], self.sets).stdout)
        flops = {phase["phase"]: phase["flops"] / phase["epochs"] for phase in plan["phases"] if phase["epochs"]}
        images = {phase["phase"]: phase["images"] / phase["epochs"] for phase in plan["phases"] if phase["epochs"]}
        seconds = {phase: images[phase] / self.speed_of(phase) for phase in ("meta", "e2e")}
        self.note(seconds_of_an_epoch=seconds)
        epochs = chosen_epochs(flops, seconds, self.share * self.left())
        self.run_dir.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(epochs))
        return epochs

    def train(self):
        epochs = self.epochs()
        self.note(epochs=epochs)
        sets = [f"{phase}.epochs={count}" for phase, count in epochs.items()]
        out = self.run("run", self.run_dir, sets)
        if out is None:
            self.note(why=f"stopped at the deadline; goes on with --run-dir {self.run_dir}")
            return False
        models = [{key: row[key] for key in ("model", "top1", "seconds", "flops")} for row in json.loads(out)["models"]]
        self.note(complete=True, why=None, models=models)
        print(table(epochs, models))
        return True


def shards(data, scratch):
    """The folder of the shards: `data` itself, or the folder in this archive."""
    folder = data
    if not data.is_dir():
        folder = scratch / "data"
        try:
            shutil.unpack_archive(data, folder)
        except (OSError, shutil.ReadError) as error:
            sys.exit(f"--data {data}: {error}; give a folder that incubate pack has written, or a .tar.xz of it")
    first = next(folder.rglob("train-00000.h5"), None)
    if first is None:
        sys.exit(f"--data {data}: it holds no train-00000.h5; give a folder that incubate pack has written, or a .tar.xz of it")
    return first.parent


def chosen_epochs(flops, seconds, available):
    """The epochs of each phase, chosen so that each of the two methods takes about half of the available seconds. `flops` are the
    operations of an epoch of each phase, `seconds` the time of an epoch of the meta model and of the target."""
    # Seconds per operation. The speed of a hybrid lies between the speeds of the meta model and the target, so the lower of both is
    # assumed.
    slowness = {phase: seconds[phase] / flops[phase] for phase in seconds}
    modules = sum(count for phase, count in flops.items() if phase.startswith("module"))
    # The phases keep a fixed proportion: a unit is three epochs of the meta model and of each module, and one epoch of fine-tuning.
    unit = 3 * (flops["meta"] + modules) * max(slowness.values()) + seconds["e2e"]
    units = max(available / 2 / unit, 1 / 3)
    stages, finetune = max(round(3 * units), 1), max(round(units), 1)
    cost = stages * (flops["meta"] + modules) + finetune * flops["finetune"]
    return {"meta": stages, "module": stages, "finetune": finetune, "e2e": max(round(cost / flops["e2e"]), 1)}


def table(epochs, models):
    """The table for people: the epochs of each phase, and the operations, time and accuracy of each model."""
    lines = ["epochs: " + ", ".join(f"{phase} {count}" for phase, count in epochs.items())]
    lines.append(f"{'model':20} {'TFLOP':>9} {'seconds':>9} {'top-1 %':>9}")
    lines += [f"{row['model']:20} {row['flops'] / 1e12:9.2f} {row['seconds']:9.1f} {row['top1']:9.2f}" for row in models]
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for the report")
    parser.add_argument("--data", type=Path, required=True, help="the packed images: a folder, or an archive of it (.tar.xz)")
    parser.add_argument("--run-dir", type=Path, default=Path("/tmp/incubate-gpu-study"))
    parser.add_argument("--seconds", type=float, default=400, help="the time that the study may take [default: 400]")
    parser.add_argument("--share", type=float, default=0.8, help="the share of the time for training; the rest is for evaluations, artefacts and the program's starts [default: 0.8]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--incubate", type=Path, default=Path(__file__).resolve().parent.parent / "incubate")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config; may be given more than once")
    return parser.parse_args()


def main():
    a = arguments()
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return 0 if Study(a, Path(scratch)).train() else 75


if __name__ == "__main__":
    sys.exit(main())
