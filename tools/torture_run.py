"""A tiny run for tools/torture.py: how it is started, disturbed and finished."""

import contextlib
import hashlib
import os
import random
import re
import signal
import subprocess
import time
from datetime import datetime
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
train_images = 256
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
eval_epochs = 2
ema = 0.9
[module]
epochs = 4
[finetune]
epochs = 4
"""

STOPPED, DAMAGED = 75, 3
# The exit codes of a start whose ranks were killed. A single rank ends by the signal. mpirun reports the signal, or the failure of
# another rank.
KILLED = [-signal.SIGKILL, 128 + signal.SIGKILL, 1]
# A busy machine may take long. But if the log of a run has no new line for this number of seconds, the run hangs.
PATIENCE = 3600
DAY = 86_400


class Different(Exception):
    """Says how a run did not end as it should."""


class Run:
    """A run on `ranks` ranks with `replicas` replicas each: its run directory, and the log of all its starts."""

    mode = ""

    def __init__(self, binary, folder, ranks, replicas, clock_library=None):
        """`clock_library` is preloaded if the run's clock is to jump."""
        self.binary, self.folder, self.ranks, self.replicas = binary, folder, ranks, replicas
        self.clock_library = clock_library
        # The small disk of the kind `full` is mounted on this folder.
        self.disk = folder / "disk"
        self.disk.mkdir(parents=True)
        self.dir, self.step_file = self.disk / "run", folder / "step"
        self.started, self.may_be_damaged, self.is_done, self.said = [], False, False, 0
        self.is_cleared = False
        self.sizes, self.seen, self.since = None, 0, time.monotonic()
        (folder / "config.toml").write_text(CONFIG)

    def arguments(self, command):
        return [self.binary, command, "config.toml", "--run-dir", self.dir, "--set", f"run.replicas={self.replicas}"]

    def start(self):
        words, environment = self.arguments("run"), dict(os.environ)
        # The throw-away Slurm finds the ranks of its jobs by this variable.
        environment.pop("SLURM_CONF", None)
        if self.clock_library:
            environment |= {"LD_PRELOAD": str(self.clock_library), "CLOCK_STEP": str(self.step_file)}
        if self.ranks > 1:
            mpirun = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(self.ranks)]
            words = mpirun + (["--allow-run-as-root"] if os.geteuid() == 0 else []) + words
        with open(self.folder / "log", "ab") as log:
            started = subprocess.Popen(words, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.started.append(started)
        if self.is_cleared:
            self.clear()
            raise Different("the run was killed")
        return started

    def pids(self, started):
        """The ranks of a started run. mpirun gives each a process group of its own, but they stay in its session."""
        found = subprocess.run(["pgrep", "-s", str(started.pid), "-f", "run config.toml"], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split() if self.ranks == 1 or int(pid) != started.pid]

    def clear(self):
        """Kills the processes of all starts, and refuses further starts."""
        self.is_cleared = True
        for started in self.started:
            for pid in self.pids(started) + ([started.pid] if started.poll() is None else []):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            started.wait()

    def logs(self):
        """The files that hold the log of all starts so far."""
        return [path for path in [self.folder / "log"] if path.exists()]

    def log(self):
        return b"".join(path.read_bytes() for path in self.logs())

    def lines(self):
        """The number of lines in the log.

        Raises `Different` if there was no new line for too long.
        """
        sizes = [(path, path.stat().st_size) for path in self.logs()]
        if sizes != self.sizes:
            self.sizes, self.seen, self.since = sizes, self.log().count(b"\n"), time.monotonic()
        if time.monotonic() > self.since + PATIENCE:
            raise Different(f"the run hangs: {self.news()[-3000:]}")
        return self.seen

    def news(self):
        """The part of the log that this function has not returned yet."""
        log = self.log()
        news, self.said = log[self.said :].decode(errors="replace"), len(log)
        return news

    def hashes(self):
        """The hash of every artefact and of every exported file, except source.json, which names the run's folder."""
        files = [*self.dir.glob("*.h5"), *self.dir.glob("export/**/*")]
        files = [path for path in files if path.is_file() and path.name != "source.json"]
        return {str(path.relative_to(self.dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def wait(self, started):
        """Waits until a start has ended, and returns its exit code."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return started.wait(timeout=10)
            self.lines()

    def end(self, *starts):
        """Waits until these starts have ended. Each is given with the exit codes that are allowed besides 0. Deletes the damaged
        files that the starts refuse with exit code 3, as a user would. Two starts at the same time may refuse the same file."""
        ended, said = [(self.wait(started), codes) for started, codes in starts], self.news()
        self.is_done = any(code == 0 for code, _ in ended)
        refused = re.findall(r"ERROR (?:\[\d+\] )?(.*?\.h5)", said) if self.may_be_damaged else []
        for code, codes in ended:
            if code not in (0, *codes, *([DAMAGED] if refused else [])):
                raise Different(f"exit code {code}: {said[-3000:]}")
        if any(code == DAMAGED for code, _ in ended):
            for path in refused:
                Path(path).unlink(missing_ok=True)

    def finish(self):
        """Starts the run, which nothing disturbs any more, until it is done. Returns the number of starts."""
        for starts in range(1, 13):
            self.end((self.start(), []))
            if self.is_done:
                return starts
        raise Different("the run refuses more files than were damaged")

    def disturb(self, kind, rng, lines):
        """Starts the run and disturbs it after up to `lines` more lines of its log. Returns whether the disturbance happened; it
        does not if the run has ended before."""
        if kind in ("torn", "flipped"):
            return self.damage(kind, rng, lines)
        if self.is_done:
            return False
        before, started = len(self.started), self.start()
        act, codes = KINDS[kind]
        happened = self.waited(started, rng, lines) and act(self, started, rng)
        # A disturbance may have started the run a second time.
        self.end((started, codes), *((other, []) for other in self.started[before + 1 :]))
        return happened

    def waited(self, started, rng, lines):
        """Waits for up to `lines` more lines of the log and a moment; one time in five only for a moment of at most 0.6 seconds, in
        which the run may still be starting. Returns whether the run still runs."""
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0.0, 0.6))
            return started.poll() is None
        until = self.lines() + rng.randrange(lines)
        while self.lines() < until and started.poll() is None:
            time.sleep(rng.uniform(0.01, 0.08))
        time.sleep(rng.uniform(0.0, 0.02))
        return started.poll() is None

    def send(self, pids, number):
        sent = 0
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                sent += 1
        return sent > 0

    def kill_ranks(self, started, _):
        return self.send(self.pids(started), signal.SIGKILL)

    def term(self, started, _):
        return self.send(self.pids(started), signal.SIGTERM)

    def usr2(self, started, _):
        return self.send(self.pids(started), signal.SIGUSR2)

    def hup(self, started, _):
        return self.send(self.pids(started), signal.SIGHUP)

    def peer(self, started, rng):
        pids = self.pids(started)
        return bool(pids) and self.send([rng.choice(pids)], signal.SIGKILL)

    def pause(self, started, rng):
        pids = self.pids(started)
        paused = rng.sample(pids, rng.randint(1, len(pids))) if pids else []
        happened = self.send(paused, signal.SIGSTOP)
        time.sleep(rng.uniform(0.1, 2))
        self.send(paused, signal.SIGCONT)
        return happened

    def full(self, started, rng):
        """Fills the small disk for a moment."""
        filler = self.disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(1 << 16))
        self.pause_for_trouble(started, rng)
        filler.unlink()
        return True

    def readonly(self, started, rng):
        """Makes every folder of the run read-only for a moment."""
        folders = [path for path in [self.dir, *self.dir.rglob("*")] if path.is_dir()]
        try:
            happened = all([read_only(folder, True) for folder in folders])
            self.pause_for_trouble(started, rng)
        finally:
            for folder in folders:
                read_only(folder, False)
        return happened and bool(folders)

    def pause_for_trouble(self, started, rng):
        """Waits up to two seconds, or until the start has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(rng.uniform(0.2, 2))

    def clock(self, started, rng):
        """Lets the run's clock jump, sometimes twice. Checks that the times in the log show a jump of many days."""
        for _ in range(rng.randint(1, 2)):
            step = rng.choice([-1, 1]) * rng.choice([2, 70, 4000, 40 * DAY])
            self.step_file.write_text(str(step))
            time.sleep(rng.uniform(0.05, 0.5))
        before = len(self.log())
        self.wait(started)
        stamps = re.findall(r"^(\d{4}-\S*)Z ", self.log()[before:].decode(errors="replace"), re.MULTILINE)
        if len(stamps) > self.ranks and abs(step) > DAY:
            shown = datetime.fromisoformat(f"{stamps[-1]}+00:00").timestamp() - time.time()
            if abs(shown - step) > DAY:
                raise Different(f"the ranks do not see that the clock jumped by {step} s; their clock is {shown:.0f} s ahead")
        return True

    def second(self, started, rng):
        """Starts the same run a second time on the same run directory, and in half of the cases kills the first start. The first
        start may also lose a phase to the second if it was too slow to renew its lease."""
        self.start()
        if rng.random() < 0.5:
            self.waited(started, random.Random(rng.random()), 60)
            self.send(self.pids(started), signal.SIGKILL)
        return True

    def damage(self, kind, rng, lines):
        """Kills the run if it is not done, and cuts a random file of it or flips a bit of the file. In half of the cases the file
        is an artefact or checkpoint. Returns whether there was a file. config.toml and dataset.json, which only a person can mend,
        stay whole."""
        if not self.is_done:
            started = self.start()
            if self.waited(started, rng, lines):
                self.kill_ranks(started, rng)
            self.end((started, KILLED))
        files = sorted(path for path in self.dir.rglob("*") if path.is_file() and path.stat().st_size > 0)
        files = [path for path in files if path.name not in ("config.toml", "dataset.json")]
        if rng.random() < 0.5:
            files = [path for path in files if path.suffix == ".h5"]
        if not files:
            return False
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        if kind == "torn":
            content = content[: rng.randrange(len(content))]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        self.may_be_damaged, self.is_done = True, False
        return True


def read_only(folder, wanted):
    """Makes a folder read-only or writable again, and returns whether that worked. Permissions do not bind root, but the file
    system's attribute `immutable` does."""
    if os.geteuid() != 0:
        folder.chmod(0o555 if wanted else 0o755)
        return True
    return subprocess.run(["chattr", "+i" if wanted else "-i", folder], stderr=subprocess.DEVNULL).returncode == 0


def stopped_by(number):
    """The exit codes of a start that got a signal: it stopped in order, or the signal came before the program had a handler."""
    return [STOPPED, -number, 128 + number]


# Every kind: the function that disturbs a start, and the exit codes besides 0 with which that start may end.
KINDS = {
    "kill": (Run.kill_ranks, KILLED),
    "peer": (Run.peer, KILLED),
    "term": (Run.term, stopped_by(signal.SIGTERM)),
    "usr2": (Run.usr2, stopped_by(signal.SIGUSR2)),
    "hup": (Run.hup, stopped_by(signal.SIGHUP)),
    "pause": (Run.pause, []),
    "clock": (Run.clock, []),
    "second": (Run.second, KILLED),
    "full": (Run.full, [1, 2]),
    "readonly": (Run.readonly, [1, 2]),
    "torn": (None, []),
    "flipped": (None, []),
}
