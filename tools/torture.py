#!/usr/bin/env python3
"""Disturbs tiny runs, from the meta model to the export, and checks that they end with the bits of an undisturbed run.

Usage: tools/torture.sh [HOURS] [--binary FILE] [--seed N] [--count N] [--only KIND,…] [--jobs N]

A round starts a run on 1 to 4 ranks with 1 or 2 replicas each, disturbs it up to eight times, and starts it again until it is done.
Most disturbances come at a random line of the log, so the load of the machine hardly matters; the others come within 0.6 seconds of
a start. Outside of Slurm, each start must end with an exit code that belongs to its disturbance. The program may refuse damaged
files with exit code 3; the round then deletes the file that the error names, as a user would. In the end every artefact and every
exported file, except the source.json that names the run's folder, must have the same hash as in an undisturbed run.

    kill, peer                all ranks, or one of them, are killed
    term, usr2, hup           the ranks are told to stop
    pause                     some ranks are suspended for up to two seconds
    torn, flipped             the run is killed, and a file is cut or a bit of it is flipped
    full, readonly            the disk is full, or the run's folders are read-only, for up to two seconds
    clock                     the calendar clock jumps by 2 seconds to 40 days, forward or back
    second                    the run is started a second time on the same run directory
    slurm-signal, -requeue    a job of a throw-away Slurm is told to stop, or requeued by the operator
    slurm-scancel, -cancel    a job, or the whole run, is cancelled
    slurm-kill, -node         a rank of a job is killed, or its node is set down and resumed

The number of disturbances of each kind is printed every minute and at the end, also after an interruption. A round that fails ends
the script with exit code 1 and keeps its folder; only after `full` the run directory is lost, because it lay on a small tmpfs.
Kinds that this machine cannot do are named and left out: `full` needs root to mount the tmpfs, `readonly` as root needs a file
system with the attribute «immutable», `clock` needs cc, and the last six need Slurm's daemons and munge.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from torture_run import KINDS, Different, Run, read_only
from torture_slurm import SLURM_KINDS, Cluster, SubmittedRun

ROOT = Path(__file__).parents[1]
# The numbers of ranks and of replicas of each rank.
WORLDS = [(1, 1), (1, 1), (1, 1), (1, 2), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1)]
# Debian puts Slurm's daemons into a folder that is only in root's PATH.
os.environ["PATH"] += ":/usr/sbin:/sbin"


@contextlib.contextmanager
def small_disk(folder, wanted):
    """If `wanted`, mounts a tmpfs of 16 MB on the folder as long as the context lasts."""
    if wanted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "incubate", folder], check=True)
    try:
        yield
    finally:
        if wanted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def can_mount(folder):
    with contextlib.suppress(subprocess.CalledProcessError), small_disk(folder, True):
        return True
    return False


def can_be_read_only(folder):
    done = read_only(folder, True)
    return read_only(folder, False) and done


def possible_kinds(folder, clock_library):
    """The kinds of disturbances that this machine can do. Compiles the library of `clock`."""
    cc = shutil.which("cc") and subprocess.run(["cc", "-shared", "-fPIC", "-o", clock_library, ROOT / "tests/fake/clock.c"])
    lacks = {
        "full": not can_mount(folder),
        "readonly": not can_be_read_only(folder),
        "clock": not cc or cc.returncode != 0,
    }
    slurm = all(shutil.which(name) for name in ["munged", "slurmctld", "slurmd", "sbatch"])
    missing = [kind for kind, is_missing in lacks.items() if is_missing] + ([] if slurm else [*SLURM_KINDS])
    if missing:
        print(f"left out, since this machine cannot do them: {', '.join(missing)}", flush=True)
    return [kind for kind in [*KINDS, *SLURM_KINDS] if kind not in missing]


class Torture:
    """The rounds of one call, the undisturbed runs to compare with, and the tally."""

    def __init__(self, binary, seed, folder, only):
        self.binary, self.seed, self.folder = binary, seed, folder
        self.clock_library = folder / "clock.so"
        possible = possible_kinds(folder, self.clock_library)
        self.kinds = [kind for kind in possible if not only or kind in only]
        self.tally, self.rounds, self.failures = collections.Counter(), 0, []
        self.is_over, self.is_killed = False, False
        self.references, self.running = {}, set()
        self.lock, self.slurm_lock, self.cluster = threading.Lock(), threading.Lock(), None

    def reference(self, ranks, replicas):
        """The hashes of an undisturbed run's files, and the number of lines in its log. The first call trains the run."""
        with self.lock:
            # A lock, and after the first call the hashes and the number of lines.
            entry = self.references.setdefault((ranks, replicas), [threading.Lock()])
        with entry[0]:
            if len(entry) == 1:
                run = Run(self.binary, self.folder / f"reference-{ranks}-{replicas}", ranks, replicas)
                with self.tracked(run):
                    if run.finish() != 1:
                        raise Different("an undisturbed run does not end at its first start")
                entry += [run.hashes(), run.lines()]
        return entry[1:]

    @contextlib.contextmanager
    def tracked(self, run):
        """Keeps the run in `running`, so that `end` can kill its processes. Afterwards kills the processes that are left."""
        self.running.add(run)
        try:
            yield
        finally:
            run.clear()
            self.running.remove(run)

    def round(self, folder, rng):
        """Disturbs one run, either only on Slurm or only without it, and compares its files with those of an undisturbed run."""
        local, on_slurm = ([kind for kind in self.kinds if (kind in SLURM_KINDS) == slurm] for slurm in (False, True))
        ranks, replicas = rng.choice(WORLDS)
        expected_hashes, lines = self.reference(ranks, replicas)
        # There is only one Slurm, which one round uses at a time.
        with_slurm = rng.choice(self.kinds) in SLURM_KINDS and self.slurm_lock.acquire(blocking=not local)
        chosen = [rng.choice(on_slurm if with_slurm else local) for _ in range(rng.randint(1, 8))]
        try:
            if with_slurm:
                self.cluster = self.cluster or Cluster()
                run = SubmittedRun(self.binary, folder, ranks, replicas, self.cluster)
            else:
                run = Run(self.binary, folder, ranks, replicas, self.clock_library if "clock" in chosen else None)
            with small_disk(run.disk, "full" in chosen), self.tracked(run):
                # The disturbances are spread over the length of the run.
                happened = [kind for kind in chosen if run.disturb(kind, rng, 2 * lines // (len(chosen) + 1))]
                run.finish()
                found = run.hashes()
        finally:
            if with_slurm:
                self.slurm_lock.release()
        if found != expected_hashes:
            names = sorted(name for name in found.keys() | expected_hashes.keys() if found.get(name) != expected_hashes.get(name))
            raise Different(f"{ranks} ranks × {replicas} replicas after {happened}: {', '.join(names)} differ")
        with self.lock:
            self.tally.update(f"{run.mode} {kind}".strip() for kind in happened)
        shutil.rmtree(folder)

    def work(self, index, count):
        """Does one round after another until `count` disturbances have happened or the torture is over."""
        rng = random.Random(f"{self.seed}-{index}")
        while not self.is_over and self.tally.total() < count:
            with self.lock:
                self.rounds += 1
                folder = self.folder / f"round-{self.rounds}"
            try:
                self.round(folder, rng)
            except Exception as error:
                # If `end` has killed the runs, their errors show no fault of the program.
                if not self.is_killed:
                    self.failures.append(f"{error if isinstance(error, Different) else traceback.format_exc()}\nin {folder}")
                self.is_over = True

    def end(self):
        """Kills the processes of all runs."""
        self.is_over = self.is_killed = True
        for run in list(self.running):
            run.clear()

    def print_tally(self):
        with self.lock:
            counts = sorted(self.tally.items())
        print(f"{self.rounds} rounds, {sum(count for _, count in counts)} disturbances:")
        for kind, count in counts:
            print(f"  {count:5} {kind}", flush=True)


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("hours", type=float, nargs="?", default=1.0)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/incubate")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--count", type=int, default=sys.maxsize, help="end after this number of disturbances")
    parser.add_argument("--only", metavar="KIND,…", type=lambda text: text.split(","), help="only these kinds of disturbances")
    parser.add_argument("--jobs", type=int, default=1, help="the number of rounds at the same time")
    return parser.parse_args()


def main():
    arguments = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    torture = Torture(arguments.binary.resolve(), arguments.seed, folder, arguments.only)
    print(f"seed {arguments.seed}; kinds: {', '.join(torture.kinds)}", flush=True)
    workers = [threading.Thread(target=torture.work, args=(i, arguments.count)) for i in range(arguments.jobs)]
    end, printed = time.monotonic() + arguments.hours * 3600, time.monotonic()
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) and not torture.is_over:
            time.sleep(0.2)
            torture.is_over |= time.monotonic() > end
            if time.monotonic() > printed + 60:
                printed = time.monotonic()
                torture.print_tally()
        # The rounds under way are finished, unless one has failed.
        if torture.failures:
            torture.end()
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        torture.end()
        for worker in workers:
            worker.join()
        torture.print_tally()
        if torture.cluster:
            torture.cluster.close()
        if not torture.failures:
            shutil.rmtree(folder)
    if torture.failures:
        print("\n".join(torture.failures), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
