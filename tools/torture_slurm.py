"""A throw-away Slurm for tools/torture.py, and runs that are submitted to it and disturbed there."""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from torture_run import PATIENCE, Different, Run

NODES = 3
CONFIGURATION = Path(__file__).parents[1] / "tests/fake/slurm.conf"


class Cluster:
    """A Slurm of three virtual nodes on this machine. The daemons and commands are real. All files lie in one folder."""

    def __init__(self):
        # The path must be short, since PMIx puts its sockets below it, and munged requires that everybody can enter the folder.
        self.folder, self.daemons = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")), []
        self.folder.chmod(0o755)
        for name in ["munge", "state", "log", "run", "fakegpu", *(f"spool/n{i + 1}" for i in range(NODES))]:
            (self.folder / name).mkdir(parents=True)
        for i in range(NODES):
            (self.folder / f"tmp/n{i + 1}").mkdir(parents=True)
            (self.folder / f"tmp/n{i + 1}").chmod(0o1777)
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self.configure()
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def configure(self):
        fields = {"folder": self.folder, "user": getpass.getuser(), "host": socket.gethostname(), "patience": 60}
        fields |= {f"port{i}": port for i, port in enumerate(free_ports(NODES + 1))}
        text = CONFIGURATION.read_text()
        for name, value in fields.items():
            text = text.replace(f"{{{name}}}", str(value))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for i in range(4):
            (self.folder / f"fakegpu/gpu{i}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/fakegpu/gpu[0-3]\n")
        prolog = self.folder / "taskprolog.sh"
        shared = f"{self.folder}/tmp/$SLURMD_NODENAME"
        prolog.write_text(f"#!/bin/sh\necho export OMPI_MCA_btl_vader_backing_directory={shared}\n")
        prolog.chmod(0o755)

    def start(self):
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        munge.chmod(0o755)
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.daemon("munged", "-F", *(f"--{option}={munge / name}" for option, name in files.items()))
        until("munged", (munge / "sock").exists)
        self.daemon("slurmctld", "-D", "-i")
        until("slurmctld", lambda: "UP" in self.output("scontrol", "ping"))
        for i in range(NODES):
            self.daemon("slurmd", "-D", "-N", f"n{i + 1}")
        until("idle nodes", lambda: self.output("sinfo", "-h", "-N", "-o", "%T").count("idle") >= NODES)

    def daemon(self, *words):
        log = open(self.folder / f"log/{words[0]}-{len(self.daemons)}", "wb")
        self.daemons.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True))

    def output(self, *words):
        return subprocess.run(words, capture_output=True, text=True).stdout

    def queue(self):
        """The number, state, node list and reason of every job that is not over; None if Slurm did not answer."""
        answer = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T %N %r"], capture_output=True, text=True)
        if answer.returncode != 0:
            return None
        return [line.split(" ", 3) for line in answer.stdout.splitlines()]

    def mend(self, queue):
        """Does what an operator does after trouble: takes nodes back and releases jobs that Slurm holds."""
        states = self.output("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
        for node in [line.split()[0] for line in states if "down" in line or "drain" in line]:
            self.output("scontrol", "update", f"NodeName={node}", "State=RESUME")
        for job in [job for job, state, _, reason in queue if state == "PENDING" and "held" in reason.lower()]:
            self.output("scontrol", "release", job)

    def processes(self, name=None):
        """The processes that jobs have started, all or those of one name. They have inherited the variable SLURM_CONF."""
        mine, others = f"SLURM_CONF={self.folder}/slurm.conf".encode(), [os.getpid(), *(daemon.pid for daemon in self.daemons)]
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_mine = mine in (entry / "environ").read_bytes().split(b"\0")
                if is_mine and int(entry.name) not in others and name in (None, (entry / "comm").read_text().strip()):
                    found.append(int(entry.name))
        return found

    def close(self):
        self.output("scancel", "--full", "-u", getpass.getuser())
        for daemon in reversed(self.daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
            daemon.kill()
            daemon.wait()
        # The step daemons outlive slurmd.
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def free_ports(count):
    """Free ports below the range from which the system chooses ports."""
    ports = []
    for port in range(24_000 + 4 * (os.getpid() % 1_500), 32_000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError("no free ports")


def until(what, holds):
    """Waits until `holds()` is true. After too long a wait, the error names `what`."""
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.1)


class SubmittedRun(Run):
    """A run that is submitted to Slurm: with one rank as several jobs (mode `array`), else as one job (mode `allocation`)."""

    def __init__(self, binary, folder, ranks, replicas, cluster):
        super().__init__(binary, folder, ranks, replicas)
        self.cluster, self.mode = cluster, "array" if ranks == 1 else "allocation"

    def arguments(self, command):
        sets = {"slurm.mode": f'"{self.mode}"', "slurm.ranks": self.ranks, "slurm.nodes": {1: 1, 2: 2, 3: 3, 4: 2}[self.ranks]}
        return super().arguments(command) + [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]

    def logs(self):
        return sorted((self.dir / "slurm").glob("*.log"))

    def clear(self):
        self.is_cleared = True
        self.cluster.output("scancel", "--full", "-u", getpass.getuser())
        until("an empty queue", lambda: self.cluster.queue() == [])

    def submit(self):
        """Submits the parts of the run that are not done. Returns whether there were any."""
        if self.is_cleared:
            raise Different("the run was cancelled")
        words = self.arguments("submit") + ["--json"]
        answer = subprocess.run(words, cwd=self.folder, capture_output=True, text=True)
        if answer.returncode != 0:
            raise Different(f"submit: exit code {answer.returncode}: {answer.stderr}")
        self.is_done = json.loads(answer.stdout) == []
        return not self.is_done

    def wait_for_queue(self, lines=None):
        """Waits until no job is left, or until the logs have `lines` lines. Returns the jobs that run then."""
        seen, since, looked, queue = None, time.monotonic(), 0.0, None
        while True:
            if lines is not None and self.lines() >= lines:
                return [job for job in self.cluster.queue() or [] if job[1] == "RUNNING"]
            if time.monotonic() > looked + 1:
                queue, looked = self.cluster.queue(), time.monotonic()
                if queue == []:
                    return []
                if (queue, self.lines()) != seen:
                    seen, since = (queue, self.lines()), time.monotonic()
                if time.monotonic() > since + 15:
                    self.cluster.mend(queue or [])
                if time.monotonic() > since + PATIENCE:
                    raise Different(f"the queue does not move: {queue}")
            time.sleep(0.1)

    def finish(self):
        for submissions in range(1, 13):
            self.wait_for_queue()
            if not self.submit():
                return submissions
        raise Different(f"the run does not end: {self.news()[-3000:]}")

    def disturb(self, kind, rng, lines):
        """Disturbs a running job of the run after up to `lines` more lines of the logs. If no job is left, it first submits the run.
        Returns whether a job was disturbed."""
        if self.is_done or (self.cluster.queue() == [] and not self.submit()):
            return False
        running = self.wait_for_queue(self.lines() + rng.randrange(lines))
        time.sleep(rng.uniform(0, 0.3))
        return bool(running) and SLURM_KINDS[kind](self, rng.choice(running), rng)

    def scontrol(self, *words):
        return subprocess.run(["scontrol", *words], capture_output=True).returncode == 0

    def early_signal(self, job, _):
        return subprocess.run(["scancel", "-s", "USR2", "--batch", job[0]], capture_output=True).returncode == 0

    def requeue(self, job, _):
        return self.scontrol("requeue", job[0])

    def scancel(self, job, _):
        return subprocess.run(["scancel", job[0]], capture_output=True).returncode == 0

    def rank_killed(self, _, rng):
        ranks = self.cluster.processes("incubate")
        return bool(ranks) and self.send([rng.choice(ranks)], signal.SIGKILL)

    def node_down(self, job, rng):
        """Sets the first node of the job down, so that Slurm ends the job on it, and resumes the node after a moment."""
        node = self.cluster.output("scontrol", "show", "hostnames", job[2]).split()
        if not node or not self.scontrol("update", f"NodeName={node[0]}", "State=DOWN", "Reason=torture"):
            return False
        time.sleep(rng.uniform(0.5, 3))
        return self.scontrol("update", f"NodeName={node[0]}", "State=RESUME")

    def cancel(self, _job, _):
        answer = subprocess.run([self.binary, "cancel", self.dir], capture_output=True, text=True)
        if answer.returncode != 0:
            raise Different(f"cancel: exit code {answer.returncode}: {answer.stderr}")
        return True


SLURM_KINDS = {
    "slurm-signal": SubmittedRun.early_signal,
    "slurm-requeue": SubmittedRun.requeue,
    "slurm-scancel": SubmittedRun.scancel,
    "slurm-cancel": SubmittedRun.cancel,
    "slurm-kill": SubmittedRun.rank_killed,
    "slurm-node": SubmittedRun.node_down,
}
