"""Runs the parts of a check, each in a process of its own with a time limit, under one deadline for all of them.

A part that hangs or crashes does not stop the others. As soon as a part has ended, the report holds what the part has found and,
if it failed, the last lines of its output.
"""

import json
import os
import signal
import subprocess
import time
import traceback

# With less time left, no part is begun.
LEAST_SECONDS = 5
LAST_LINES = 15


class Part:
    """A part of the check: its name, the function that does it, and the seconds that it may take."""

    def __init__(self, name, act, limit=60):
        self.name, self.act, self.limit = name, act, limit

    def file_name(self):
        return self.name.replace(" ", "-").replace(",", "")


class Skipped(Exception):
    """Ends a part that cannot be done on this machine, with the reason."""


def do_part(part, found_file):
    """Does a part in this process, and returns the exit code of the process. The part calls `note` to store its findings so far."""

    def note(found):
        temporary = found_file.with_suffix(".new")
        temporary.write_text(json.dumps(found))
        temporary.rename(found_file)

    try:
        note(part.act(note))
    except Skipped as reason:
        note(f"skipped: {reason}")
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run_part(command, part, seconds, scratch):
    """Runs a part by `command` for at most `seconds`, and returns its entry in the report."""
    found_file, output_file = (scratch / f"{part.file_name()}.{suffix}" for suffix in ("json", "output"))
    began = time.monotonic()
    with open(output_file, "w") as sink:
        child = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Also ends the processes that a crashed part has left running.
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()
    result = {"part": part.name, "ok": code == 0, "seconds": round(time.monotonic() - began, 1)}
    result["found"] = json.loads(found_file.read_text()) if found_file.exists() else None
    if code != 0:
        result["why"] = f"took longer than {seconds:.0f} s" if code is None else f"exit code {code}"
        result["last_lines"] = output_file.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return result


def run_parts(parts, command_of, seconds, scratch, file, context):
    """Runs the parts in order until `seconds` are over. After each part it writes the report to `file`, which begins with `context`.
    Returns whether all parts are ok."""
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
        report = {**context, "passed": all(result["ok"] for result in results), "parts": results}
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(report, indent=1))
        temporary.rename(file)
    return all(result["ok"] for result in results)
