#!/usr/bin/env python3
"""Deep Incubation beside end-to-end training at equal cost: DeiT-T-32 on real images, in a few minutes on one GPU.

  incubate pack CONFIG PACK --size 32               # elsewhere: CONFIG names CIFAR-10; the shards travel along
  python3 tools/gpu_study.py OUT --data PACK        # on the GPU machine

It trains the meta model and the target for one epoch each, and sets the epochs from their times so that both ways take the
same time on this device and all ends within --seconds. OUT/gpu_study.json holds what is known so far. A study that had no
time left goes on with the same --run-dir: its epochs are kept there.
"""

import argparse
import json
import signal
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
checkpoint_every = "never"           # but when it is stopped
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
# A part of the time is left to evaluations, artefacts and the program's starts.
SHARE = 0.8
# A signalled program writes a checkpoint in this time.
GRACE_SECONDS = 25


class Study:
    def __init__(self, a, scratch):
        self.program = Program(a.incubate.resolve(), scratch, a.device)
        self.config = self.program.config("gpu-study", CONFIG)
        self.deadline = time.monotonic() + a.seconds
        self.run_dir = a.run_dir.resolve()
        self.sets = [f'data.path="{a.data.resolve()}"', *self.program.devices(a.precision), *a.sets]
        self.file = a.out / "gpu_study.json"
        self.report = {"device": a.device, "precision": a.precision, "complete": False}

    def note(self, **found):
        self.report.update(found)
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps(self.report, indent=1))
        beside.rename(self.file)

    def left(self):
        return self.deadline - time.monotonic()

    def run(self, command, run_dir, sets):
        """Runs a phase or all; what it prints, or none if it was stopped at the deadline with a checkpoint."""
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

    def seconds_of_an_epoch(self, phase):
        """Trains a phase for one epoch elsewhere: the seconds of its steps."""
        trial = self.program.scratch / f"trial-{phase}"
        if self.run(phase, trial, [f"{phase}.epochs=1"]) is None:
            sys.exit("no time is left after the first epochs: give more --seconds")
        return json.loads((trial / "progress" / f"{phase}.json").read_text())["useful_s"]

    def epochs(self):
        """The epochs of each phase: those of an earlier start, or as many as the time allows."""
        kept = self.run_dir / "study-epochs.json"
        if kept.exists():
            return json.loads(kept.read_text())
        meta, target = self.seconds_of_an_epoch("meta"), self.seconds_of_an_epoch("e2e")
        self.note(seconds_of_an_epoch={"meta": meta, "e2e": target})
        epochs = chosen_epochs(meta, target, SHARE * self.left())
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
        models = json.loads(out)["models"]
        self.note(complete=True, why=None, models=[{key: row[key] for key in ("model", "top1", "seconds")} for row in models])
        return True


def chosen_epochs(meta, target, seconds):
    """The epochs of both ways, which take half of the seconds each, from the seconds of an epoch of the meta model and of
    the target. A module's hybrid has 11 of the target's 32 blocks, the meta model 4."""
    module = meta + (target - meta) * 7 / 28
    # Three epochs of the meta model and of each module for one of fine-tuning, as in the paper.
    unit = 3 * (meta + 4 * module) + target
    units = max(seconds / 2 / unit, 1 / 3)
    stages, finetune = max(round(3 * units), 1), max(round(units), 1)
    cost = stages * (meta + 4 * module) + finetune * target
    return {"meta": stages, "module": stages, "finetune": finetune, "e2e": max(round(cost / target), 1)}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="where the report goes")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the packed images")
    parser.add_argument("--run-dir", type=Path, default=Path("/tmp/incubate-gpu-study"))
    parser.add_argument("--seconds", type=float, default=400, help="the most that it may take [default: 400]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--incubate", type=Path, default=Path(__file__).resolve().parent.parent / "incubate")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="of the config")
    return parser.parse_args()


def main():
    a = arguments()
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return 0 if Study(a, Path(scratch)).train() else 75


if __name__ == "__main__":
    sys.exit(main())
