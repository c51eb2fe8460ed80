//! Submitted runs on a real Slurm.

use crate::cluster::Cluster;
use crate::incubate::{Ended, Incubate, ended, plain};
use serde_json::Value;
use std::process::Command;

fn submit(cluster: &Cluster, run: &Incubate, more: &[&str]) -> Ended {
    let arguments: Vec<&str> = ["submit", "--json"].iter().chain(more).copied().collect();
    ended(cluster.client(&mut run.command(&arguments)).output().unwrap())
}

/// Submits a run. Returns the names and numbers of the jobs.
pub fn jobs(cluster: &Cluster, run: &Incubate) -> Vec<(String, String)> {
    let text = submit(cluster, run, &[]).ok().out;
    let jobs: Vec<Value> = serde_json::from_str(&text).unwrap();
    jobs.iter().map(|job| (job["name"].as_str().unwrap().into(), job["id"].as_str().unwrap().into())).collect()
}

pub fn log(run: &Incubate, name: &str, job: &str) -> String {
    std::fs::read_to_string(run.file(&format!("slurm/{name}-{job}.log"))).unwrap_or_default()
}

/// The number after the last occurrence of some words in a log.
pub fn number(log: &str, after: &str) -> u64 {
    let text = log.rsplit_once(after).unwrap_or_else(|| panic!("no {after:?} in {log}")).1;
    text.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

/// Checks that a job resumed at the step where the signal stopped it, so that no step is done twice.
pub fn resumed_where_it_stopped(log: &str) {
    assert_eq!(number(log, "checkpoint written at step "), number(log, "resuming at step "), "{log}");
}

/// The step of the newest checkpoint.
pub fn newest_checkpoint(run: &Incubate, phase: &str) -> u64 {
    let run = incubate::store::RunDir { path: run.run_dir.clone() };
    run.checkpoints(phase).unwrap()[0].0
}

/// The entry of a phase in `incubate status`.
pub fn status(cluster: &Cluster, run: &Incubate, phase: &str) -> Value {
    let mut command = plain(&["status", "--json", run.run_dir.to_str().unwrap()]);
    let ended = ended(cluster.client(&mut command).output().unwrap()).ok();
    let lines: Vec<Value> = serde_json::from_str(&ended.out).unwrap();
    lines.into_iter().find(|line| line["phase"] == phase).unwrap()
}

pub fn cancel(cluster: &Cluster, run: &Incubate, options: &[&str]) -> String {
    let mut command = plain(&[&["cancel", run.run_dir.to_str().unwrap()], options].concat());
    ended(cluster.client(&mut command).output().unwrap()).ok().out
}

pub fn until_checkpoint(cluster: &Cluster, run: &Incubate, phase: &str) {
    let run_dir = incubate::store::RunDir { path: run.run_dir.clone() };
    cluster.until("a checkpoint", || run_dir.checkpoints(phase).is_ok_and(|found| !found.is_empty()));
}

/// The demo on Fashion-MNIST with 2 % of the training images and one epoch in each phase.
fn fashion_mnist() -> Incubate {
    let mut run = Incubate::with(include_str!("../../configs/fashion-mnist.toml"));
    for set in ["data.train_fraction=0.02", "meta.epochs=1", "module.epochs=1", "finetune.epochs=1", "run.e2e=false"] {
        run = run.set(set);
    }
    run.set("train.warmup_epochs=0").set("train.eval_epochs=0")
}

#[test]
fn an_array_run_on_three_nodes_has_the_bits_of_a_local_run() {
    let cluster = Cluster::start();
    // The name holds commands, which no shell may run.
    let name = "run.name=\"$(touch x) `touch y`\"";
    let local = fashion_mnist().set(name);
    local.ok(&["run"]);
    // Each task takes three of a node's four cores, so no two tasks fit on a node.
    let run = fashion_mnist().set(name).set("slurm.cpus_per_rank=3");
    let script = run.folder.path().join("list.sbatch");
    let list = format!(
        "#!/bin/bash\n#SBATCH --output=/dev/null\nls \"$1\" > {}\n",
        run.folder.path().join("listed").display()
    );
    std::fs::write(&script, list).unwrap();
    let run = run.set(&format!("slurm.downstream=[\"{}\"]", script.display()));
    let dry = submit(&cluster, &run, &["--dry-run"]).ok();
    assert_eq!(dry.out.matches("to start at").count(), 4, "Slurm accepts all scripts: {}", dry.out);
    // A dry run refuses jobs that Slurm would refuse.
    submit(&cluster, &run, &["--dry-run", "--set", "slurm.partition=\"nowhere\""])
        .fails(2, &["sbatch refuses it", "nvalid partition"]);
    let jobs = jobs(&cluster, &run);
    let names: Vec<&str> = jobs.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["meta", "modules", "finalize", "downstream-list"]);
    jobs.iter().for_each(|(_, id)| cluster.until_completed(id));
    let nodes: std::collections::BTreeSet<String> =
        tasks(&cluster, &jobs[1].1).into_values().map(|task| task.1).collect();
    assert_eq!(nodes.len(), 3, "{nodes:?}");
    for file in ["meta.h5", "module-2.h5", "final.h5"] {
        assert!(local.bytes(file) == run.bytes(file), "{file}");
    }
    assert_eq!(std::fs::read_to_string(run.folder.path().join("listed")).unwrap(), "timm\n");
    let strays = ["x", "y"].iter().filter(|f| run.folder.path().join(f).exists() || run.file(f).exists()).count();
    assert_eq!(strays, 0);
    // Nothing is submitted for a finished run.
    assert_eq!(submit(&cluster, &run, &[]).ok().out.trim(), "[]");
    // If Slurm does not answer, no job counts as finished or cancelled.
    let nowhere = run.folder.path().join("slurm.conf");
    std::fs::write(&nowhere, "ClusterName=x\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=1\n").unwrap();
    for arguments in [["cancel"], ["submit"]] {
        let mut command = match arguments {
            ["cancel"] => plain(&["cancel", run.run_dir.to_str().unwrap()]),
            _ => run.command(&arguments),
        };
        ended(command.env("SLURM_CONF", &nowhere).output().unwrap()).fails(2, &["squeue cannot say", &jobs[0].1]);
    }
}

/// The restarts and the node of each task of an array, by the task's number.
fn tasks(cluster: &Cluster, array: &str) -> std::collections::BTreeMap<u64, (u64, String)> {
    let shown = cluster.output("scontrol", &["-o", "show", "job", array]);
    let task = |line: &str| -> Option<(u64, (u64, String))> {
        let field = |name: &str| line.split(name).nth(1)?.split_whitespace().next();
        let index = field(" ArrayTaskId=")?.parse().ok()?;
        Some((index, (field(" Restarts=")?.parse().ok()?, field(" NodeList=").unwrap_or_default().to_string())))
    };
    shown.lines().filter_map(task).collect()
}

#[test]
fn one_task_of_an_array_that_gets_the_early_signal_is_requeued_alone() {
    let cluster = Cluster::start();
    let build = || Incubate::new().set("module.epochs=40");
    let twin = build();
    twin.ok(&["run"]);
    let run = build();
    let jobs = jobs(&cluster, &run);
    let (_, array) = &jobs[1];
    until_checkpoint(&cluster, &run, "module-3");
    // The last task has the job ID of the whole array, but only this task may get the signal.
    cluster.output("scancel", &["-s", "USR2", "--batch", &format!("{array}_3")]);
    cluster.until("the restart", || tasks(&cluster, array).values().any(|(restarts, _)| *restarts > 0));
    jobs.iter().for_each(|(_, id)| cluster.until_completed(id));
    let restarts: Vec<u64> = tasks(&cluster, array).into_values().map(|task| task.0).collect();
    assert_eq!(restarts, [0, 0, 0, 1]);
    resumed_where_it_stopped(&log(&run, "modules", &format!("{array}_3")));
    assert!(twin.bytes("final.h5") == run.bytes("final.h5"));
}

#[test]
fn a_rank_that_is_killed_ends_its_job_and_the_run_goes_on_when_submitted_again() {
    let cluster = Cluster::start();
    let build = || Incubate::new().set("meta.epochs=60").set("slurm.mode=\"allocation\"").set("slurm.ranks=2");
    let twin = build();
    twin.mpirun(2, &["run"]).ok();
    let run = build().set("slurm.nodes=2");
    submit(&cluster, &run, &[]).ok();
    until_checkpoint(&cluster, &run, "meta");
    let (pid, _) = cluster.processes().into_iter().find(|(_, command)| command == "incubate").unwrap();
    // SAFETY: the signal goes to a process of this cluster's jobs.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    let job = status(&cluster, &run, "meta")["job"].as_str().unwrap().to_string();
    cluster.until("the end of the job", || cluster.state(&job) == "FAILED");
    let kept = newest_checkpoint(&run, "meta");
    let again = jobs(&cluster, &run);
    cluster.until_completed(&again[0].1);
    assert_eq!(number(&log(&run, "run", &again[0].1), "resuming at step "), kept);
    for file in ["meta.h5", "final.h5"] {
        assert!(twin.bytes(file) == run.bytes(file), "{file}");
    }
}

#[test]
fn doctor_in_a_job_names_ranks_and_gpus_that_are_not_used() {
    let run = Incubate::new();
    let job = [("SLURM_NTASKS", "4"), ("SLURM_GPUS_ON_NODE", "2")];
    let doctor = ended(run.command(&["doctor"]).envs(job).output().unwrap());
    assert_eq!(doctor.code, Some(2), "{}", doctor.out);
    let said = |words: &str| doctor.out.lines().any(|line| line.starts_with("NOT") && line.contains(words));
    assert!(said("a world of one in a job of 4 tasks") && said("given this job 2 GPU(s)"), "{}", doctor.out);
    assert!(doctor.out.contains("locks work") && doctor.out.contains(" is writable"), "{}", doctor.out);
    let job = ended(run.command(&["meta"]).envs(job).output().unwrap()).ok().err;
    assert!(job.contains("a world of one in a job of 4 tasks") && job.contains("given this job 2 GPU(s)"), "{job}");
}

#[test]
fn an_allocation_of_three_nodes_has_the_bits_of_three_local_ranks() {
    let cluster = Cluster::start();
    let local = Incubate::new();
    local.mpirun(3, &["run"]).ok();
    let run = Incubate::new().set("slurm.mode=\"allocation\"").set("slurm.nodes=3").set("slurm.ranks=3");
    let run = run.set("slurm.gpus_per_node=1");
    let jobs = jobs(&cluster, &run);
    assert_eq!(jobs.len(), 1);
    cluster.until_completed(&jobs[0].1);
    for file in ["meta.h5", "module-2.h5", "final.h5"] {
        assert!(local.bytes(file) == run.bytes(file), "{file}");
    }

    // The wrong plug-in would start two worlds of one rank.
    let mut srun = Command::new("srun");
    srun.args(["--mpi=none", "--ntasks=2", "--nodes=2", env!("CARGO_BIN_EXE_incubate"), "run"]);
    srun.arg(run.folder.path().join("config.toml")).arg("--run-dir").arg(run.file("other"));
    ended(cluster.client(&mut srun).output().unwrap()).fails(2, &["2 tasks without PMIx", "srun --mpi=pmix"]);
    // Open MPI does not support PMI-2.
    let mut srun = Command::new("srun");
    srun.args(["--mpi=pmi2", "--ntasks=2", "--nodes=2", env!("CARGO_BIN_EXE_incubate"), "run"]);
    srun.arg(run.folder.path().join("config.toml")).arg("--run-dir").arg(run.file("other"));
    ended(cluster.client(&mut srun).output().unwrap()).fails(2, &["2 tasks with PMI-2", "srun --mpi=pmix"]);
}

#[test]
fn a_module_that_fails_stops_the_rest_and_alone_is_submitted_again() {
    let cluster = Cluster::start();
    let local = Incubate::new();
    local.ok(&["run"]);
    let run = Incubate::new();
    // A folder has the name of a checkpoint, so module 1 cannot save.
    let obstacle = run.file("checkpoints/module-1-0000000005.h5");
    std::fs::create_dir_all(obstacle.join("x")).unwrap();
    let first = jobs(&cluster, &run);
    cluster.until("the end of the last job", || cluster.state(&first[2].1) == "CANCELLED");
    assert!(!run.file("final.h5").exists() && run.file("module-0.h5").exists());
    let line = status(&cluster, &run, "module-1");
    assert_eq!((&line["state"], &line["job"]), (&"failed".into(), &format!("{}_1", first[1].1).into()));
    assert!(line["why"].as_str().unwrap().contains("module-1-0000000005.h5"), "{line}");
    let line = status(&cluster, &run, "finetune");
    assert_eq!(line["state"], "cancelled", "{line}");

    std::fs::remove_dir_all(&obstacle).unwrap();
    // The new jobs use the config of this submission.
    let run = run.set("run.e2e=true");
    let text = submit(&cluster, &run, &[]).ok().out;
    let second: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(second.len(), 2, "modules and the rest: {text}");
    assert_eq!(second[0]["modules"], serde_json::json!([1]));
    submit(&cluster, &run, &[]).fails(2, &["already submitted", "incubate cancel"]);
    cluster.until_completed(second[1]["id"].as_str().unwrap());
    assert!(local.bytes("final.h5") == run.bytes("final.h5") && run.file("e2e.h5").exists());
}

#[test]
fn a_failed_module_is_submitted_again_while_its_siblings_train() {
    let cluster = Cluster::start();
    let local = Incubate::new().set("module.epochs=80");
    local.ok(&["run"]);
    let run = Incubate::new().set("module.epochs=80");
    let obstacle = run.file("checkpoints/module-1-0000000005.h5");
    std::fs::create_dir_all(obstacle.join("x")).unwrap();
    let first = jobs(&cluster, &run);
    cluster.until("the failure", || cluster.state(&format!("{}_1", first[1].1)) == "FAILED");
    std::fs::remove_dir_all(&obstacle).unwrap();
    let text = submit(&cluster, &run, &[]).ok().out;
    let second: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!((second.len(), &second[0]["modules"]), (2, &serde_json::json!([1])), "{text}");
    let waits: Vec<&str> = second[1]["after"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(waits.len() >= 2 && waits[1].starts_with(&format!("job {}_", first[1].1)), "siblings still train: {text}");
    assert!(cluster.state(&first[2].1).starts_with("CANCELLED"), "its place is taken");
    cluster.until_completed(second[1]["id"].as_str().unwrap());
    assert!(local.bytes("final.h5") == run.bytes("final.h5"));
}
