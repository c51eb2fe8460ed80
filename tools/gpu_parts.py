"""Runs the parts of a check, each in a process of its own with a time limit, under one deadline for all of them.

A part that hangs or crashes costs that part alone. What a part has found, with the last lines of its standard error if
it failed, is in the report as soon as it is there.
"""

import json
import os
import signal
import subprocess
import time
import traceback

# Below this a part is not begun.
LEAST_SECONDS = 5
LAST_LINES = 15


class Part:
    """A name, what it does, and the most seconds that it may take."""

    def __init__(self, name, act, limit=60):
        self.name, self.act, self.limit = name, act, limit

    def file_name(self):
        return self.name.replace(" ", "-").replace(",", "")


class Skipped(Exception):
    """A part that cannot be done here, with the reason."""


def do_part(part, found_file):
    """In the process of one part: does it, and returns its exit code. `note` keeps what is known so far."""

    def note(found):
        beside = found_file.with_suffix(".new")
        beside.write_text(json.dumps(found))
        beside.rename(found_file)

    try:
        note(part.act(note))
    except Skipped as reason:
        note(f"skipped: {reason}")
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run_part(command, part, seconds, scratch):
    """Runs a part by `command` for at most so many seconds."""
    found_file, errors = (scratch / f"{part.file_name()}.{end}" for end in ("json", "stderr"))
    began = time.monotonic()
    with open(errors, "w") as sink:
        child = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Also what a crashed part has left running.
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()
    result = {"part": part.name, "ok": code == 0, "seconds": round(time.monotonic() - began, 1)}
    result["found"] = json.loads(found_file.read_text()) if found_file.exists() else None
    if code != 0:
        result["why"] = f"took longer than {seconds:.0f} s" if code is None else f"exit code {code}"
        result["last_lines"] = errors.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return result


def run_parts(parts, command_of, seconds, scratch, file, head):
    """Runs the parts in order until `seconds` are over, and writes the report to `file` after each. Whether all are ok."""
    deadline = time.monotonic() + seconds
    results = []
    for part in parts:
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            result = {"part": part.name, "ok": False, "seconds": 0, "found": None, "why": "no time was left"}
        else:
            result = run_part(command_of(part), part, min(part.limit, left), scratch)
        results.append(result)
        print("ok " if result["ok"] else "NOT", part.name, result.get("why", ""), flush=True)
        report = {**head, "passed": all(result["ok"] for result in results), "parts": results}
        beside = file.with_suffix(".new")
        beside.write_text(json.dumps(report, indent=1))
        beside.rename(file)
    return all(result["ok"] for result in results)
