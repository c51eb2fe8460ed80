#!/usr/bin/env python3
"""Disturbs tiny runs of all phases in every way that a cluster knows, and checks that they end with the bits of an undisturbed run.

Usage: tools/torture.py [HOURS] [--binary FILE] [--seed N] [--count N] [--only KIND]

A round starts a run on 1 to 4 ranks with 1 or 2 replicas each, disturbs it up to three times, and starts it again until it
ends. Files that a disturbance has damaged may be refused with exit code 3; the round then deletes the file that the error names,
as a user would. The tally by kind goes to standard output. A round that differs keeps its folder and ends the script with
exit code 1.

The kinds `full` and `readonly` mount a small tmpfs, which needs root; without it they are left out.
"""

import argparse
import collections
import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """
[run]
threads = 1
micro_batch = 16
checkpoint_every = "3 steps"
log_steps = 1
device = "cpu"
[model]
image_size = 16
channels = 1
classes = 4
patch_size = 4
width = 16
heads = 2
depths = [1, 1, 1]
[data]
format = "shapes"
train_images = 512
test_images = 64
auto_augment = ""
color_jitter = 0.0
mean = [0.3]
std = [0.3]
[train]
global_batch = 64
base_lr = 8e-3
warmup_epochs = 0
epochs = 4
ema = 0.9
"""

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr2": signal.SIGUSR2, "hup": signal.SIGHUP}
STOPPED, DAMAGED = 75, 3


class Run:
    """A run directory on `ranks` ranks with `replicas` each."""

    def __init__(self, binary, folder, ranks, replicas):
        self.binary, self.folder, self.ranks, self.replicas = binary, folder, ranks, replicas
        self.dir = folder / "run"
        (folder / "config.toml").write_text(CONFIG)

    def start(self):
        words = [self.binary, "run", "config.toml", "--run-dir", self.dir, "--set", f"run.replicas={self.replicas}"]
        if self.ranks > 1:
            mpirun = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(self.ranks)]
            words = mpirun + (["--allow-run-as-root"] if os.geteuid() == 0 else []) + words
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(words, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)

    def processes(self, started):
        """The ranks of a started run."""
        if self.ranks == 1:
            return [started.pid]
        found = subprocess.run(["pgrep", "-g", str(started.pid), "-f", "run config.toml"], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split() if int(pid) != started.pid]

    def artefacts(self):
        """The hash of every artefact and of every file of the exports, but for source.json, which names the run's folder."""
        files = [*self.dir.glob("*.h5"), *self.dir.glob("export/**/*")]
        files = [path for path in files if path.is_file() and path.name != "source.json"]
        return {str(path.relative_to(self.dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def finish(self):
        """Starts the run until it ends well; deletes the damaged files that it refuses. Returns the number of starts."""
        for starts in range(1, 13):
            before = (self.folder / "log").stat().st_size if (self.folder / "log").exists() else 0
            code = self.start().wait(timeout=600)
            if code == 0:
                return starts
            said = (self.folder / "log").read_bytes()[before:].decode(errors="replace")
            refused = re.findall(r"ERROR (?:\[\d+\] )?(\S*\.h5)", said)
            if code == DAMAGED and refused:
                Path(refused[0]).unlink(missing_ok=True)
            elif code not in (STOPPED, 1, 2, 128 + signal.SIGKILL):
                raise AssertionError(f"exit code {code}: {said[-2000:]}")
        raise AssertionError(f"it does not end: {said[-2000:]}")


def send(run, started, number, rng, all_ranks):
    """Sends a signal to one rank, or to all of them."""
    ranks = run.processes(started)
    for pid in ranks if all_ranks else rng.sample(ranks, min(1, len(ranks))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def change_a_file(run, rng, change):
    """Changes a random artefact or checkpoint of a run at rest. False if there is none."""
    files = sorted(path for path in run.dir.rglob("*.h5") if path.is_file() and path.stat().st_size > 0)
    if not files:
        return False
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))
    return True


def flipped(content, rng):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def disturb(kind, run, rng, length):
    """Starts the run and disturbs it at a random moment of its usual length in seconds. False if it was over before."""
    started = run.start()
    try:
        started.wait(rng.uniform(0.02, 0.9) * length)
        return False
    except subprocess.TimeoutExpired:
        pass
    if kind in SIGNALS:
        send(run, started, SIGNALS[kind], rng, all_ranks=True)
    elif kind == "peer":
        send(run, started, signal.SIGKILL, rng, all_ranks=False)
    elif kind == "pause":
        send(run, started, signal.SIGSTOP, rng, all_ranks=False)
        time.sleep(rng.uniform(0.1, 2))
        send(run, started, signal.SIGCONT, rng, all_ranks=True)
    elif kind == "full":
        filler = run.folder / "filler"
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(rng.uniform(0.2, 2))
        filler.unlink()
    elif kind == "readonly":
        subprocess.run(["mount", "-o", "remount,ro", run.folder], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 2))
        subprocess.run(["mount", "-o", "remount,rw", run.folder], check=True)
    elif kind in ("torn", "flipped"):
        send(run, started, signal.SIGKILL, rng, all_ranks=True)
        started.wait(timeout=120)
        torn = lambda content: content[: rng.randrange(len(content))]  # noqa: E731
        return change_a_file(run, rng, torn if kind == "torn" else lambda content: flipped(content, rng))
    started.wait(timeout=600)
    return True


@contextlib.contextmanager
def on_small_disk(folder, wanted):
    """Mounts a tmpfs of 48 MB on the folder if that is wanted."""
    if wanted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "incubate", folder], check=True)
    try:
        yield
    finally:
        if wanted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def can_mount():
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "incubate", folder], stderr=subprocess.DEVNULL).returncode == 0
        if mounted:
            subprocess.run(["umount", folder], check=True)
        return mounted


class Torture:
    def __init__(self, binary, seed, folder):
        self.binary, self.folder, self.rng = binary, folder, random.Random(seed)
        self.references, self.tally = {}, collections.Counter()

    def reference(self, ranks, replicas):
        """The artefacts of an undisturbed run, and its length in seconds."""
        if (ranks, replicas) not in self.references:
            folder = self.folder / f"reference-{ranks}-{replicas}"
            folder.mkdir()
            run, began = Run(self.binary, folder, ranks, replicas), time.monotonic()
            starts = run.finish()
            assert starts == 1, "an undisturbed run ends at its first start"
            self.references[ranks, replicas] = (run.artefacts(), time.monotonic() - began)
        return self.references[ranks, replicas]

    def round(self, number, kinds):
        ranks, replicas = self.rng.choice([(1, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1)])
        expected, length = self.reference(ranks, replicas)
        folder = self.folder / f"round-{number}"
        folder.mkdir()
        done = [self.rng.choice(kinds) for _ in range(self.rng.randint(1, 3))]
        with on_small_disk(folder, bool({"full", "readonly"} & set(done))):
            run = Run(self.binary, folder, ranks, replicas)
            happened = [kind for kind in done if disturb(kind, run, self.rng, length)]
            run.finish()
            found = run.artefacts()
        if found != expected:
            names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise AssertionError(f"{ranks} ranks × {replicas} replicas after {done}: {', '.join(names)} differ")
        shutil.rmtree(folder)
        self.tally.update(happened)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("hours", type=float, nargs="?", default=1.0)
    parser.add_argument("--binary", type=Path, default=Path(__file__).parents[1] / "target/release/incubate")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--count", type=int, default=sys.maxsize, help="end after so many disturbances")
    parser.add_argument("--only", help="one kind alone")
    arguments = parser.parse_args()
    kinds = [*SIGNALS, "peer", "pause", "torn", "flipped"] + (["full", "readonly"] if can_mount() else [])
    kinds = [arguments.only] if arguments.only else kinds
    print(f"seed {arguments.seed}; kinds: {', '.join(kinds)}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    torture, end, number, told = Torture(arguments.binary.resolve(), arguments.seed, folder), time.time() + arguments.hours * 3600, 0, 0
    try:
        while time.time() < end and torture.tally.total() < arguments.count:
            number += 1
            torture.round(number, kinds)
            if time.time() > told + 60:
                told = time.time()
                print(f"{number} rounds: {dict(torture.tally)}", flush=True)
    except AssertionError as error:
        print(f"round {number}: {error}\nits folder is {folder}/round-{number}", file=sys.stderr)
        return 1
    finally:
        print(f"{number} rounds, {torture.tally.total()} disturbances: {dict(torture.tally)}", flush=True)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
