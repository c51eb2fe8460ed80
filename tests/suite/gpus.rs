//! Tests the messages about unusable GPUs, the plans for GPUs, and the scripts for machines with GPUs. These tests run the scripts
//! on a CPU. `tools/gpu_check.py` has the tests that need a GPU.

use crate::drawn;
use crate::incubate::{Ended, Incubate, ended, plain};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// A folder with a fake driver and a fake NCCL. The driver reports two GPUs, which libtorch's CUDA cannot use.
pub fn fake_driver() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/build.sh");
    assert!(Command::new(script).arg(folder.path()).status().unwrap().success());
    folder
}

/// Runs incubate with the fake driver and the fake NCCL.
fn with_fake_driver(run: &Incubate, arguments: &[&str]) -> Ended {
    let driver = fake_driver();
    ended(run.command(arguments).env("LD_LIBRARY_PATH", driver.path()).output().unwrap())
}

#[test]
fn doctor_names_driver_gpus_and_nccl_and_what_is_missing() {
    let found = with_fake_driver(&Incubate::new(), &["doctor"]);
    assert_eq!(found.code, Some(2), "{}", found.err);
    let line = |subject: &str| found.out.lines().find(|line| line[4..].starts_with(subject)).unwrap_or_default();
    assert!(line("driver").starts_with("ok ") && line("driver").contains("CUDA up to 13.0"), "{}", found.out);
    assert!(line("GPUs").contains("Fake GPU 0, 80.0 GiB at 0000:00:00.0; Fake GPU 1"), "{}", found.out);
    assert!(line("NCCL").contains("NCCL 2.27.7 (") && line("NCCL").contains("libnccl.so.2"), "{}", found.out);
    assert!(line("CUDA").starts_with("NOT") && line("CUDA").contains("libtorch"), "{}", found.out);
}

#[test]
fn gpus_that_libtorch_cannot_use_give_a_warning_or_an_error_if_the_config_asks_for_them() {
    let run = Incubate::new().set("meta.epochs=1");
    let trained = with_fake_driver(&run, &["meta"]).ok();
    let warning = trained.err.lines().find(|line| line.contains("WARN")).unwrap_or_default();
    assert!(warning.contains("this node's GPUs are not used") && warning.contains("2.11.0"), "{}", trained.err);
    let asked = with_fake_driver(&run.set("run.device=\"cuda\""), &["meta"]);
    asked.fails(2, &["run.device = \"cuda\"", "2.11.0", "run.device = \"cpu\""]);
}

#[test]
fn a_node_without_a_driver_computes_on_the_cpu_and_says_so() {
    // The test puts a broken driver first in the search path. So incubate finds no driver, even on a machine with a real driver.
    let none = tempfile::tempdir().unwrap();
    std::fs::write(none.path().join("libcuda.so.1"), "no library").unwrap();
    let with_none = |run: &Incubate, arguments: &[&str]| {
        ended(run.command(arguments).env("LD_LIBRARY_PATH", none.path()).output().unwrap())
    };
    let run = Incubate::new().set("meta.epochs=1");
    let trained = with_none(&run, &["meta"]).ok();
    assert!(trained.err.contains("computing on the CPU (this node has no NVIDIA driver"), "{}", trained.err);
    assert!(!trained.err.contains("WARN"), "a CPU node is nothing to warn of: {}", trained.err);
    assert!(with_none(&run, &["doctor"]).ok().out.contains("none, computing on the CPU"));
    let asked = run.set("run.device=\"cuda\"");
    with_none(&asked, &["meta"]).fails(2, &["run.device = \"cuda\"", "no NVIDIA driver", "run.device = \"cpu\""]);
    let doctor = with_none(&asked, &["doctor"]);
    assert!(doctor.code == Some(2) && doctor.out.contains("needs a GPU node"), "{}", doctor.out);
}

#[test]
fn plan_shows_the_devices_of_each_rank_and_what_they_train_together() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/imagenet-vit-l.toml");
    let plan = |sets: &[&str]| -> serde_json::Value {
        let sets = ["slurm.gpus_per_node=8", "slurm.ranks=4", "finetune.on=\"zero\""].iter().chain(sets);
        let sets = sets.flat_map(|set| ["--set", set]);
        let output = plain(&["plan", config, "--ranks", "4", "--rate", "100", "--json"]).args(sets).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let replicas = |plan: &serde_json::Value, phase: usize| plan["phases"][phase]["replicas"].as_u64().unwrap();
    let gpus = plan(&[]);
    assert_eq!(gpus["devices_per_rank"], 2);
    assert_eq!((replicas(&gpus, 0), replicas(&gpus, 1)), (8, 2), "the meta model on all, a module on its rank's");
    assert_eq!((gpus["phases"][5]["phase"].as_str(), replicas(&gpus, 5)), (Some("finetune"), 8), "the whole node");
    let cpu = plan(&["run.device=\"cpu\"", "run.replicas=3"]);
    assert_eq!((cpu["devices_per_rank"].as_u64(), replicas(&cpu, 0), replicas(&cpu, 5)), (Some(3), 12, 3));
}

#[test]
fn plan_for_a_gpu_by_name_gives_its_hours_its_memory_and_the_cost_of_the_precision() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/imagenet-vit-l.toml");
    let plan = |arguments: &[&str]| ended(plain(&["plan", config, "--gpu", "h200"]).args(arguments).output().unwrap());
    let json = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&plan(&[arguments, &["--json"]].concat()).ok().out).unwrap()
    };
    let (bf16, fp32) = (json(&[]), json(&["--set", "run.precision=\"fp32\""]));
    let hours = |plan: &serde_json::Value| plan["phases"][0]["device_hours"].as_f64().unwrap();
    assert_eq!(bf16["flops_per_s"], 0.4 * 989.4e12);
    assert!((hours(&fp32) / hours(&bf16) - 989.4 / 66.9).abs() < 1e-6, "the config itself asks for bf16");
    let memory = bf16["phases"][5]["memory_bytes_per_device"].as_f64().unwrap();
    assert!((0.3 * 141e9..0.9 * 141e9).contains(&memory), "the micro-batch fits the GPU: {memory}");
    let text = plan(&["--set", "run.precision=\"fp32\""]).ok().out;
    assert!(text.contains("40 % of h200's 67 TFLOP/s") && text.contains("bf16 are 15 times as fast"), "{text}");
    assert!(!plan(&[]).ok().out.contains("times as fast"));
    let refused = ended(plain(&["plan", config, "--gpu", "h1"]).output().unwrap());
    assert_eq!(refused.code, Some(2));
    assert!(refused.err.contains("h100, "), "{}", refused.err);
}

/// Runs a script of tools/ on a CPU, with this program and its libtorch. The script writes into the folder `out`.
fn script(name: &str, out: &Path, arguments: &[&str]) -> Ended {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let torch = std::env::var_os("LIBTORCH").unwrap_or_else(|| root.join(".deps/torch").into());
    let mut command = Command::new("python3");
    command.arg("-B").arg(root.join("tools").join(name)).arg(out).args(["--device", "cpu"]).args(arguments);
    command.args(["--incubate", env!("CARGO_BIN_EXE_incubate")]).env("LIBTORCH", torch);
    ended(command.output().unwrap())
}

fn report(out: &Path, name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(out.join(name)).unwrap()).unwrap()
}

#[test]
fn the_gpu_check_runs_whole_on_a_cpu_and_a_part_that_hangs_does_not_stop_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let done = script("gpu_check.py", folder.path(), &["--seconds", "9000", "--patience", "10", "--hang", "2"]);
    let report = report(folder.path(), "gpu_check.json");
    let text = report.to_string();
    let (hangs, others): (Vec<&Value>, Vec<&Value>) =
        report["parts"].as_array().unwrap().iter().partition(|part| part["part"] == "hang");
    assert_eq!((hangs.len(), hangs[0]["why"].as_str()), (1, Some("took longer than 2 s")), "{text}");
    assert!(others.len() > 12 && others.iter().all(|part| part["ok"] == true), "{text}");
    assert_eq!((done.code, &report["passed"]), (Some(1), &Value::Bool(false)));
    let figures = &others.iter().find(|part| part["part"] == "attention kernels").unwrap()["found"];
    assert!(figures["flash"].as_f64().unwrap() > 0.0, "{text}");
    let kernels = &others.iter().find(|part| part["part"] == "kernel table").unwrap()["found"];
    let names: Vec<&str> = kernels.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"aten::addmm") && names.contains(&"aten::linear"), "{text}");
    let off = &others.iter().find(|part| part["part"] == "parts switched off").unwrap()["found"];
    assert!(
        ["fp32-sums", "kept-samples", "byte-images"].iter().all(|name| off[name].as_f64().unwrap() > 0.0),
        "{text}"
    );
    let is_compiled = |part: &&Value| part["part"].as_str().unwrap().ends_with(", compiled");
    assert!(
        others.iter().rev().take_while(|part| is_compiled(part)).count() == 2,
        "nothing waits for a compiler: {text}"
    );
    assert_eq!(others.iter().filter(|part| is_compiled(part)).count(), 2, "{text}");
}

/// The settings that make the study's model and batch tiny, and limit the program to one thread.
const TINY_STUDY: [&str; 6] = [
    "model.depths=[2,2,2,2]",
    "model.width=16",
    "model.heads=2",
    "model.classes=3",
    "train.global_batch=32",
    "run.threads=1",
];

#[test]
fn the_gpu_study_trains_both_ways_at_equal_cost_and_goes_on_if_it_had_no_time_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    drawn::folder(&folder.path().join("images"), 3, 64, 16);
    ended(plain(&["pack", &path("images"), &path("pack"), "--size", "32"]).output().unwrap()).ok();
    let archived = Command::new("tar").args(["-cJf", &path("pack.tar.xz"), "-C", &path(""), "pack"]).status();
    assert!(archived.unwrap().success());
    let (data, run_dir) = (path("pack.tar.xz"), path("run"));
    let mut arguments = vec!["--data", data.as_str(), "--run-dir", run_dir.as_str(), "--precision", "fp32"];
    arguments.extend(TINY_STUDY.iter().flat_map(|set| ["--set", set]));
    let study =
        |seconds: &str| script("gpu_study.py", folder.path(), &[&arguments[..], &["--seconds", seconds]].concat());
    std::fs::create_dir(&run_dir).unwrap();
    let epochs = serde_json::json!({"meta": 1, "module": 1, "finetune": 1, "e2e": 2});
    std::fs::write(folder.path().join("run/study-epochs.json"), epochs.to_string()).unwrap();
    let stopped = study("0");
    assert_eq!(stopped.code, Some(75), "{}", stopped.err);
    let found = report(folder.path(), "gpu_study.json");
    assert!(found["complete"] == false && found["why"].as_str().unwrap().contains("goes on with --run-dir"), "{found}");
    let done = study("600").ok();
    let found = report(folder.path(), "gpu_study.json");
    assert_eq!((&found["complete"], &found["epochs"]), (&Value::Bool(true), &epochs), "{}", done.err);
    let models = found["models"].as_array().unwrap();
    assert!(models.iter().any(|model| model["model"] == "end to end" && model["top1"].is_number()), "{found}");
    assert!(done.out.contains("end to end") && done.out.contains("top-1 %"), "{}", done.out);
}

#[test]
fn the_gpu_study_chooses_epochs_for_the_time_so_that_both_ways_have_the_same_number_of_operations() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run_dir) = (folder.path().join("pack").display().to_string(), folder.path().join("run"));
    let images = folder.path().join("images");
    drawn::folder(&images, 3, 64, 16);
    ended(plain(&["pack", &images.display().to_string(), &data, "--size", "32"]).output().unwrap()).ok();
    // The script gives training 1 % of the time that is left when it chooses the epochs. This is at most 6 seconds.
    let mut arguments =
        vec!["--data", &data, "--precision", "fp32", "--seconds", "600", "--share", "0.01", "--run-dir"];
    let run_dir = run_dir.display().to_string();
    arguments.push(&run_dir);
    arguments.extend(TINY_STUDY.iter().flat_map(|set| ["--set", set]));
    script("gpu_study.py", folder.path(), &arguments).ok();
    let found = report(folder.path(), "gpu_study.json");
    let epochs = |phase: &str| found["epochs"][phase].as_u64().unwrap();
    assert!(epochs("meta") == epochs("module") && epochs("meta") >= epochs("finetune"), "{found}");
    let flops = |name: &str| -> f64 {
        let models = found["models"].as_array().unwrap().iter();
        models
            .filter(|model| (model["model"] == "end to end") == (name == "e2e"))
            .map(|m| m["flops"].as_f64().unwrap())
            .sum()
    };
    // The speed of this machine decides the numbers above. Here the seconds of an epoch are given.
    let choose = "import json, gpu_study; print(json.dumps(gpu_study.chosen_epochs({'meta': 1, 'module-0': 2, 'module-1': 2, \
                  'finetune': 4, 'e2e': 4}, {'meta': 1, 'e2e': 4}, 190)))";
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools");
    let chosen = Command::new("python3").args(["-B", "-c", choose]).current_dir(tools).output().unwrap();
    let chosen: Value = serde_json::from_slice(&chosen.stdout).unwrap();
    assert_eq!(chosen, serde_json::json!({"meta": 15, "module": 15, "finetune": 5, "e2e": 24}), "95 s for each method");

    let one_epoch = flops("e2e") / epochs("e2e") as f64;
    assert!((flops("e2e") - flops("others")).abs() <= one_epoch, "{found}");
}
