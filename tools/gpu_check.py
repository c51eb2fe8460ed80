#!/usr/bin/env python3
"""Checks on a machine with a GPU that incubate computes there what it computes on a CPU, and measures how fast.

  tools/gpu_check.py OUT                          # in a checkout on the GPU machine: builds a bundle and checks it

If the GPU machine has no Rust, build the bundle on another machine. Its tarball holds this script:

  tools/bundle.sh                                 # on the other machine
  python3 incubate-*/tools/gpu_check.py OUT       # on the GPU machine, in the unpacked tarball; needs no network

The parts of the check run in the order of their value, each within its own time limit. All of them end after --seconds at the
latest, not counting the build in a checkout. OUT/gpu_check.json holds the result of each part as soon as the part has ended. The
exit code is 1 if a part failed or had no time left. The check needs the libtorch of a torch 2.11.0 for CUDA, from LIBTORCH or from
this Python's torch. Only the comparison with PyTorch needs torch itself. --device cpu tries the script on a machine without a GPU,
with smaller models; speed is then measured in fp32.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_parts import Part, Skipped, do_part, run_parts
from gpu_program import (
    DEIT_TI,
    SMALL,
    TOLERANCES,
    Program,
    difference,
    libtorch,
    within,
)

HERE = Path(__file__).resolve().parent
STEPS_TRACED = 4


def compared_config(program):
    """The config with which the parts «reference» and «same results …» train. With --device cpu it is smaller."""
    return DEIT_TI if program.on_gpu else SMALL.replace("epochs = 8", "epochs = 1")


def number_of_gpus():
    smi = shutil.which("nvidia-smi")
    return len(subprocess.run([smi, "-L"], text=True, capture_output=True).stdout.splitlines()) if smi else 0


def environment():
    smi = shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=name,memory.total,driver_version,clocks.max.sm", "--format=csv,noheader"]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "libtorch": libtorch(),
        "gpus": subprocess.run(query, text=True, capture_output=True).stdout.splitlines() if smi else [],
    }


def doctor(program):
    def act(note):
        """Runs `incubate doctor`, which tries the driver, CUDA, attention compared with fp64, and a sum by NCCL over one GPU."""
        config = program.config("doctor", SMALL)
        command = ["doctor", config, "--run-dir", program.scratch / "doctor", "--json"]
        done = subprocess.run(program.command(command, program.devices()), env=program.environment, text=True,
                              capture_output=True)
        findings = {finding["subject"]: finding["text"] for finding in json.loads(done.stdout)}
        note(findings)
        assert done.returncode == 0, done.stderr
        if program.on_gpu:
            assert "a sum of one works" in findings["NCCL"], findings["NCCL"]
        return findings

    return act


def bench(program, arguments, sets=()):
    # Threads that share the cores of a busy CPU wait for each other at every small operation.
    if not program.on_gpu:
        arguments = [*arguments, "--threads", 1]
    return json.loads(program.run(["bench", "step", *arguments, "--json"], sets).stdout)


def attention_kernels(program):
    def act(note):
        """Measures four steps of DeiT-Ti in bf16 with each kernel of attention. Only the kernel that training uses must work."""
        model, batch = ("deit-ti", 128) if program.on_gpu else ("tiny-28", 8)
        found = {}
        for kernel in ("flash", "efficient", "cudnn", "products"):
            arguments = ["--model", model, "--batch", batch, "--steps", 4, "--e2e", "--attention", kernel]
            try:
                found[kernel] = bench(program, arguments, program.devices(program.fast))["images_per_s"]
            except AssertionError as error:
                found[kernel] = str(error)[-600:]
            note(found)
        assert isinstance(found["flash"], float), "the kernel that training uses does not work"
        return found

    return act


def reference(program):
    def act(_):
        """Trains a whole run on the CPU in fp32. The parts «same results …» compare their losses with its losses."""
        program.train("run", "cpu", text=compared_config(program))
        return {"losses": {phase: program.losses("cpu", phase)[-1] for phase in ("meta", "module-1", "finetune")}}

    return act


def same_results(program, precision, recomputed=False):
    def act(note):
        """Trains three phases on the device and compares their losses with the CPU's. Module 1 and the fine-tuning start from the
        CPU's artefacts, so that the differences of earlier phases do not add up."""
        run = f"device-{precision}" + ("-recomputed" if recomputed else "")
        sets = program.devices(precision) + (["run.activation_checkpointing=true"] if recomputed else [])
        program.train("meta", run, sets, compared_config(program))
        found = {"meta": difference(program.losses(run, "meta"), program.losses("cpu", "meta"))}
        note(found)
        program.copy(["meta.h5", *(f"module-{i}.h5" for i in (0, 2, 3)), "assembled.h5"], "cpu", run)
        for command, phase in (("module --index 1", "module-1"), ("finetune", "finetune")):
            program.train(command, run, sets, compared_config(program))
            found[phase] = difference(program.losses(run, phase), program.losses("cpu", phase))
            note(found)
        return within(found, TOLERANCES[precision])

    return act


def small_meta(program):
    """The losses of the small meta model on the CPU. Trains the model if this has not been done yet."""
    if not (program.scratch / "small" / "meta.h5").exists():
        program.train("meta", "small")
    return program.losses("small", "meta")


def same_meta(program, run, sets, **variables):
    """Checks that the small meta model has the CPU's losses if it trains with these settings and environment variables."""

    def act(_):
        if run == "two-replicas" and program.on_gpu and number_of_gpus() < 2:
            raise Skipped("there is one GPU")
        expected = small_meta(program)
        program.environment.update(variables)
        done = program.train("meta", run, sets)
        assert variables or "through host memory" not in done.stderr, done.stderr
        return within({"meta": difference(program.losses(run, "meta"), expected)}, TOLERANCES["fp32"])

    return act


def resumed(program, first, then):
    def act(_):
        """Checks that a phase that is stopped on one device resumes from its checkpoint on the other."""
        expected = small_meta(program)
        run = f"from-{first}-to-{then}"
        sets = {"cpu": [], "device": program.devices()}
        config = program.config("small", SMALL)
        command = program.command(["meta", config, "--run-dir", program.scratch / run], sets[first])
        child = subprocess.Popen(command, env=program.environment, stderr=subprocess.DEVNULL)
        checkpoints = program.scratch / run / "checkpoints"
        while child.poll() is None and not (checkpoints.is_dir() and any(checkpoints.glob("meta-*.h5"))):
            time.sleep(0.002)
        child.send_signal(signal.SIGTERM)
        code = child.wait()
        assert code == 75, f"exit code {code} instead of 75{': training ended before the signal' if code == 0 else ''}"
        done = program.train("meta", run, sets[then])
        assert "resuming at step" in done.stderr, done.stderr
        return within({"meta": difference(program.losses(run, "meta"), expected)}, TOLERANCES["fp32"])

    return act


def out_of_memory(program):
    def act(_):
        """Checks that a phase that runs out of memory ends with one error, which names a micro-batch. On a GPU, it must fit."""
        width, side, patch, batch = (1024, 224, 16, 1024) if program.on_gpu else (512, 16, 1, 512)
        depths = [6, 6, 6, 6] if program.on_gpu else [1, 1, 1, 1]
        sets = [f"model.width={width}", f"model.image_size={side}", f"model.patch_size={patch}", f"model.depths={depths}",
                f"data.train_images={batch}", "data.test_images=4", f"run.micro_batch={batch}",
                f"train.global_batch={batch}", "train.epochs=1", "module.epochs=1", "finetune.epochs=1"]
        sets += program.devices()
        limit = None if program.on_gpu else lambda: resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
        done = program.train("e2e", "large", sets, expect=2, preexec_fn=limit)
        line = next(line for line in done.stderr.splitlines() if "ERROR" in line)
        assert "out of memory" in line and " fit: --set run.micro_batch=" in line, line
        if program.on_gpu:
            fitting = line.split("run.micro_batch=")[1].split()[0]
            program.train("e2e", "large", [*sets, f"run.micro_batch={fitting}"])
        return line

    return act


def automatic_micro_batch(program):
    def act(_):
        """Checks that `run.micro_batch = "auto"` chooses a micro-batch that fits, records it, and trains to the CPU's losses."""
        expected = small_meta(program)
        done = program.train("meta", "auto", [*program.devices(), "run.micro_batch=auto"])
        progress = json.loads((program.scratch / "auto" / "progress" / "meta.json").read_text())
        assert f"micro-batches of {progress['micro_batch']} samples fit" in done.stderr, done.stderr
        return within({"meta": difference(program.losses("auto", "meta"), expected)}, TOLERANCES["fp32"])

    return act


def module_work(program, stage):
    """The step that «module step …» measures: the arguments of `bench step` and of peer_step.py, and the number of samples."""
    model, batch, steps = ("vit-l", 128, 10) if program.on_gpu else ("tiny-28", 8, 2)
    return ["--model", model, "--batch", str(batch), "--steps", str(steps), "--stage", str(stage)], batch


def compared_with_peer(program, stage, name, options, note):
    """Measures a module's step, unless an earlier part has measured it, and the same step by peer_step.py with these options.
    `name` is the key of the peer's results."""
    work, batch = module_work(program, stage)
    file = program.scratch / f"module-step-stage-{stage}.json"
    earlier = json.loads(file.read_text()) if file.exists() else None
    if isinstance(earlier, dict):
        found = {"ours": earlier["ours"]}
    else:
        found = {"ours": bench(program, work, [*program.devices(program.fast), f"run.micro_batch={batch}"])}
    note(found)
    if importlib.util.find_spec("torch") is None:
        raise Skipped(f"no torch for peer_step.py; incubate: {json.dumps(found['ours'])}")
    dtype = "bfloat16" if program.on_gpu else "float32"
    peer = [sys.executable, str(HERE / "peer_step.py"), *work, "--mode", "official", "--dtype", dtype, "--device", program.device]
    # If the part fails or takes too long, the report shows the last lines of its output, which are those of peer_step.py.
    print(f"incubate is measured, and peer_step.py begins ({name})", flush=True)
    done = subprocess.run([*peer, *options], text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0, "peer_step.py failed"
    found[name] = json.loads(done.stdout)
    found[f"ratio_to_{name}"] = found["ours"]["images_per_s"] / found[name]["images_per_s"]
    return found


def module_step(program, stage):
    def act(note):
        """Measures a step of one module of ViT-L in bf16, and the same step by peer_step.py in PyTorch under autocast. Like Deep
        Incubation's official code, peer_step.py also computes the weight gradients of the later stages and uploads fp32 images."""
        return compared_with_peer(program, stage, "autocast", [], note)

    return act


def compiled_step(program, stage):
    def act(note):
        """Compares the step of `module_step` with the same step by peer_step.py under autocast and torch.compile."""
        return compared_with_peer(program, stage, "compiled", ["--compile"], note)

    return act


def kernel_table(program):
    def act(_):
        """Lists the kernels that take the most time in a module's step."""
        model, batch = ("vit-l", 128) if program.on_gpu else ("tiny-28", 8)
        trace = program.scratch / "trace.json"
        work = ["--model", model, "--batch", batch, "--steps", STEPS_TRACED, "--stage", 0, "--trace", trace]
        bench(program, work, [*program.devices(program.fast), f"run.micro_batch={batch}"])
        return table_of(json.loads(trace.read_text())["traceEvents"], program.on_gpu)

    return act


def table_of(events, on_gpu):
    """The 40 kernels of a trace (on a CPU: libtorch's functions) that take the most time: their calls and milliseconds per step,
    and their share in the sum of all times. A function's time includes the functions that it calls."""
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"} if on_gpu else {"cpu_op"}
    microseconds = {}
    for event in events:
        if event.get("cat") in kinds:
            microseconds.setdefault(event["name"][:120], []).append(event["dur"])
    whole = sum(map(sum, microseconds.values()))
    assert whole > 0, "the trace holds no kernels"
    rows = [
        {
            "name": name,
            "calls": len(durations) / STEPS_TRACED,
            "ms": round(sum(durations) / 1000 / STEPS_TRACED, 4),
            "share": round(sum(durations) / whole, 4),
        }
        for name, durations in microseconds.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:40]


def parts_switched_off(program):
    def act(note):
        """Measures how many times as long a step takes if an optimisation is switched off. The optimisations are those of
        `bench step --without` that need a GPU or stochastic depth."""
        deep, wide, batch = ("vit-l", "vit-b", 128) if program.on_gpu else ("tiny-28", "tiny-28", 8)
        works = {
            "fp32-sums": ["--model", deep, "--stage", 0],
            "kept-samples": ["--model", wide, "--e2e", "--set", "e2e.drop_path=0.5"],
            "byte-images": ["--model", wide, "--stage", 0],
        }
        found = {}
        for optimisation, work in works.items():
            sets = [*program.devices(program.fast), f"run.micro_batch={batch}"]
            work = [*work, "--batch", batch, "--steps", 10 if program.on_gpu else 2]
            whole, without = (bench(program, [*work, *off], sets) for off in ([], ["--without", optimisation]))
            found[optimisation] = without["step_s"] / whole["step_s"]
            note(found)
        return found

    return act


def hang(_):
    time.sleep(3600)


def all_parts(program):
    """The parts of the check, the most valuable first."""
    two = [f'run.device="{program.device}"', "run.replicas=2"]
    parts = [
        Part("doctor", doctor(program)),
        Part("attention kernels", attention_kernels(program), 75),
        Part("reference", reference(program), 75),
        *(Part(f"same results in {precision}", same_results(program, precision)) for precision in TOLERANCES),
        Part("resume from cpu to device", resumed(program, "cpu", "device")),
        Part("resume from device to cpu", resumed(program, "device", "cpu")),
        Part("out of memory", out_of_memory(program)),
        Part("module step, stage 0", module_step(program, 0), 90),
        Part("module step, stage 3", module_step(program, 3), 90),
        Part("kernel table", kernel_table(program)),
        Part("same results with activation checkpointing", same_results(program, "fp32", recomputed=True)),
        Part("micro-batches", same_meta(program, "accumulated", [*program.devices(), "run.micro_batch=64"])),
        Part("automatic micro-batch", automatic_micro_batch(program)),
        Part("two replicas", same_meta(program, "two-replicas", two)),
        Part("two replicas on one device", same_meta(program, "crowded", two, INCUBATE_TEST_SHARED_GPU="1")),
        Part("parts switched off", parts_switched_off(program), 90),
        # Compiling may take all the time that is left, so nothing comes after it.
        Part("module step, stage 0, compiled", compiled_step(program, 0), 90),
        Part("module step, stage 3, compiled", compiled_step(program, 3), 90),
    ]
    return parts


def build_bundle(scratch):
    """Builds a bundle from this checkout and unpacks it. Returns its launcher."""
    tarball = scratch / "bundle.tar.gz"
    subprocess.run([HERE / "bundle.sh", tarball], check=True)
    shutil.unpack_archive(tarball, scratch)
    return next(scratch.glob("incubate-*/incubate"))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for the report")
    parser.add_argument("--seconds", type=float, default=300, help="the time that all parts together may take [default: 300]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--incubate", type=Path, help="the program to check [default: that of the bundle with this script; in a checkout, that of a new bundle]")
    parser.add_argument("--only", action="append", metavar="PART", help="run only this part; may be given more than once. The parts «same results …» need the part reference")
    # For the script's own test: adds a part that hangs, and gives it this time limit.
    parser.add_argument("--hang", type=float, help=argparse.SUPPRESS)
    # For the script's own test on a busy machine: multiplies the time limits of the parts.
    parser.add_argument("--patience", type=float, default=1, help=argparse.SUPPRESS)
    # For the process of one part: the part's name, and the scratch folder of all parts.
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    a = arguments()
    with tempfile.TemporaryDirectory() as folder:
        scratch = a.scratch or Path(folder)
        launcher = HERE.parent / "incubate"
        path = a.incubate or (launcher if launcher.exists() else build_bundle(scratch))
        parts = all_parts(Program(path.resolve(), scratch, a.device))
        for part in parts:
            part.limit *= a.patience
        if a.hang:
            parts.insert(1, Part("hang", hang, a.hang))
        parts = [part for part in parts if part.name in (a.only or [part.name])]
        if a.part:
            part = next(part for part in parts if part.name == a.part)
            return do_part(part, scratch / f"{part.file_name()}.json")
        a.out.mkdir(parents=True, exist_ok=True)
        this = [sys.executable, str(Path(__file__).resolve()), str(a.out), "--device", a.device, "--incubate", str(path),
                "--scratch", str(scratch), *(["--hang", str(a.hang)] if a.hang else []), "--part"]
        context = {"device": a.device, "environment": environment()}
        passed = run_parts(parts, lambda part: [*this, part.name], a.seconds, scratch, a.out / "gpu_check.json", context)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
