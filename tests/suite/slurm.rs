//! Submitted runs on a real Slurm.

use crate::cluster::Cluster;
use crate::incubate::{Ended, Incubate, ended, plain};
use serde_json::Value;
use std::process::Command;
use std::time::{Duration, Instant};

fn submit(cluster: &Cluster, run: &Incubate, more: &[&str]) -> Ended {
    let arguments: Vec<&str> = ["submit", "--json"].iter().chain(more).copied().collect();
    ended(cluster.client(&mut run.command(&arguments)).output().unwrap())
}

/// Submits and returns the jobs' numbers by name.
fn jobs(cluster: &Cluster, run: &Incubate) -> Vec<(String, String)> {
    let text = submit(cluster, run, &[]).ok().out;
    let jobs: Vec<Value> = serde_json::from_str(&text).unwrap();
    jobs.iter().map(|job| (job["name"].as_str().unwrap().into(), job["id"].as_str().unwrap().into())).collect()
}

/// What `incubate status` says of a phase.
fn status(cluster: &Cluster, run: &Incubate, phase: &str) -> Value {
    let mut command = plain(&["status", "--json", run.run_dir.to_str().unwrap()]);
    let ended = ended(cluster.client(&mut command).output().unwrap()).ok();
    let lines: Vec<Value> = serde_json::from_str(&ended.out).unwrap();
    lines.into_iter().find(|line| line["phase"] == phase).unwrap()
}

fn cancel(cluster: &Cluster, run: &Incubate) -> String {
    let mut command = plain(&["cancel", run.run_dir.to_str().unwrap()]);
    ended(cluster.client(&mut command).output().unwrap()).ok().out
}

/// A run whose meta model trains for a while, and one like it that nobody interrupts.
fn long_and_its_twin() -> (Incubate, Incubate) {
    let build = || Incubate::new().set("meta.epochs=60");
    let twin = build();
    twin.ok(&["meta"]);
    (build(), twin)
}

/// Submits, and waits until the meta model's job has written a checkpoint; returns the jobs.
fn submit_and_see_a_checkpoint(cluster: &Cluster, run: &Incubate) -> Vec<(String, String)> {
    let jobs = jobs(cluster, run);
    let written = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("meta-");
    cluster.until("a checkpoint", || {
        let entries = std::fs::read_dir(run.file("checkpoints"));
        entries.is_ok_and(|mut entries| entries.any(|e| e.is_ok_and(|e| written(&e.file_name()))))
    });
    jobs
}

fn until_restarted(cluster: &Cluster, job: &str) {
    cluster.until("the restart", || cluster.output("scontrol", &["-o", "show", "job", job]).contains("Restarts=1"));
}

/// The meta model's job ends with the twin's bits, having gone on from a checkpoint and had one writer at a time.
fn ends_as_its_twin(cluster: &Cluster, run: &Incubate, twin: &Incubate, jobs: &[(String, String)]) -> String {
    let (_, meta) = &jobs[0];
    cluster.until_completed(meta);
    assert!(twin.bytes("meta.h5") == run.bytes("meta.h5"));
    assert!(twin.losses("meta") == run.losses("meta"), "the curve has every step once");
    let log = std::fs::read_to_string(run.file(&format!("slurm/meta-{meta}.log"))).unwrap();
    assert!(log.contains("resuming at step"), "{log}");
    let line = status(cluster, run, "meta");
    assert!(line["restarts"] == 1 && line["goodput"].as_f64().is_some_and(|g| g > 0.0 && g <= 1.0), "{line}");
    cancel(cluster, run);
    log
}

#[test]
fn an_array_run_on_three_nodes_has_the_bits_of_a_local_run() {
    let cluster = Cluster::start();
    // A hostile name stays a name.
    let name = "run.name=\"$(touch x) `touch y`\"";
    let local = Incubate::new().set(name);
    local.ok(&["run"]);
    let run = Incubate::new().set(name);
    let script = run.folder.path().join("list.sbatch");
    let list = format!(
        "#!/bin/bash\n#SBATCH --output=/dev/null\nls \"$1\" > {}\n",
        run.folder.path().join("listed").display()
    );
    std::fs::write(&script, list).unwrap();
    let run = run.set(&format!("slurm.downstream=[\"{}\"]", script.display()));
    let dry = submit(&cluster, &run, &["--dry-run"]).ok();
    assert_eq!(dry.out.matches("to start at").count(), 4, "Slurm accepts all scripts: {}", dry.out);
    let jobs = jobs(&cluster, &run);
    let names: Vec<&str> = jobs.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["meta", "modules", "finalize", "downstream-list"]);
    jobs.iter().for_each(|(_, id)| cluster.until_completed(id));
    for file in ["meta.h5", "module-2.h5", "final.h5"] {
        assert!(local.bytes(file) == run.bytes(file), "{file}");
    }
    assert_eq!(std::fs::read_to_string(run.folder.path().join("listed")).unwrap(), "timm\n");
    let strays = ["x", "y"].iter().filter(|f| run.folder.path().join(f).exists() || run.file(f).exists()).count();
    assert_eq!(strays, 0);
    // Submitting a finished run leaves the last job alone, which verifies and ends.
    let again = submit(&cluster, &run, &["--dry-run"]).ok();
    let again: Vec<Value> = serde_json::from_str(&again.out).unwrap();
    assert_eq!(again.iter().map(|job| &job["name"]).collect::<Vec<_>>(), ["finalize", "downstream-list"]);
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

    // The wrong plug-in would start two worlds of one.
    let began = Instant::now();
    let mut srun = Command::new("srun");
    srun.args(["--mpi=none", "--ntasks=2", "--nodes=2", env!("CARGO_BIN_EXE_incubate"), "run"]);
    srun.arg(run.folder.path().join("config.toml")).arg("--run-dir").arg(run.file("other"));
    ended(cluster.client(&mut srun).output().unwrap()).fails(2, &["2 tasks without PMIx", "srun --mpi=pmix"]);
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_module_that_fails_stops_the_rest_and_alone_is_submitted_again() {
    let cluster = Cluster::start();
    let local = Incubate::new();
    local.ok(&["run"]);
    let run = Incubate::new();
    // A folder in a checkpoint's place: module 1 cannot save.
    let obstacle = run.file("checkpoints/module-1-0000000005.h5");
    std::fs::create_dir_all(obstacle.join("x")).unwrap();
    let first = jobs(&cluster, &run);
    cluster.until("the end of the last job", || cluster.state(&first[2].1) == "CANCELLED");
    assert!(!run.file("final.h5").exists() && run.file("module-0.h5").exists());
    let line = status(&cluster, &run, "module-1");
    assert_eq!((&line["state"], &line["job"]), (&"failed".into(), &format!("{}_1", first[1].1).into()));
    assert!(line["why"].as_str().unwrap().contains("module-1-0000000005.h5"), "{line}");

    std::fs::remove_dir_all(&obstacle).unwrap();
    let text = submit(&cluster, &run, &[]).ok().out;
    let second: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(second.len(), 2, "modules and the rest: {text}");
    assert_eq!(second[0]["modules"], serde_json::json!([1]));
    submit(&cluster, &run, &[]).fails(2, &["already submitted", "incubate cancel"]);
    cluster.until_completed(second[1]["id"].as_str().unwrap());
    assert!(local.bytes("final.h5") == run.bytes("final.h5"));
}

#[test]
fn a_job_that_gets_the_early_signal_is_requeued_and_ends_with_the_same_bits() {
    let cluster = Cluster::start();
    let (run, twin) = long_and_its_twin();
    let jobs = submit_and_see_a_checkpoint(&cluster, &run);
    cluster.output("scancel", &["-s", "USR2", "--batch", &jobs[0].1]);
    until_restarted(&cluster, &jobs[0].1);
    let log = ends_as_its_twin(&cluster, &run, &twin, &jobs);
    // Not one step is done again: it resumes where it was stopped.
    let number = |from: &str| log.split(from).nth(1).unwrap().split_whitespace().next().unwrap().to_string();
    assert_eq!(number("checkpoint written at step "), number("resuming at step "), "{log}");
}

#[test]
fn a_job_near_its_time_limit_is_told_in_time_and_goes_on_in_a_new_one() {
    let cluster = Cluster::start();
    let run = Incubate::new().set("meta.epochs=100000").set("slurm.time=\"00:02:00\"").set("slurm.signal_lead=110");
    let jobs = submit_and_see_a_checkpoint(&cluster, &run);
    until_restarted(&cluster, &jobs[0].1);
    let log = || std::fs::read_to_string(run.file(&format!("slurm/meta-{}.log", jobs[0].1))).unwrap();
    cluster.until("the resumption", || log().contains("resuming at step"));
    assert!(log().contains("checkpoint written at step "), "{}", log());
    let number = |from: &str| log().split(from).nth(1).unwrap().split_whitespace().next().unwrap().to_string();
    assert_eq!(number("checkpoint written at step "), number("resuming at step "), "{}", log());
    let ids: Vec<&str> = jobs.iter().map(|(_, id)| id.as_str()).collect();
    assert_eq!(cancel(&cluster, &run), format!("cancelled {}\n", ids.join(", ")));
    cluster.until("the cancellation", || ids.iter().all(|id| cluster.state(id).starts_with("CANCELLED")));
    assert_eq!(cancel(&cluster, &run), "nothing to cancel\n");
}

#[test]
fn a_requeued_job_goes_on_with_the_same_bits() {
    let cluster = Cluster::start();
    let (run, twin) = long_and_its_twin();
    let jobs = submit_and_see_a_checkpoint(&cluster, &run);
    cluster.output("scontrol", &["requeue", &jobs[0].1]);
    until_restarted(&cluster, &jobs[0].1);
    ends_as_its_twin(&cluster, &run, &twin, &jobs);
}

#[test]
fn a_killed_task_is_named_and_goes_on_when_submitted_again() {
    let cluster = Cluster::start();
    let (run, twin) = long_and_its_twin();
    let jobs = submit_and_see_a_checkpoint(&cluster, &run);
    let (pid, _) = cluster.processes().into_iter().find(|(_, command)| command == "incubate").unwrap();
    // SAFETY: a process of this cluster's jobs.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    cluster.until("the end of what waits for it", || cluster.state(&jobs[2].1) == "CANCELLED");
    let line = status(&cluster, &run, "meta");
    assert!(line["state"] == "failed" && line["why"].as_str().unwrap().contains("NonZeroExitCode"), "{line}");
    let again = self::jobs(&cluster, &run);
    ends_as_its_twin(&cluster, &run, &twin, &again);
}

#[test]
fn a_preempted_job_comes_back_when_its_node_is_free_and_ends_with_the_same_bits() {
    let cluster = Cluster::start();
    let (run, twin) = long_and_its_twin();
    let jobs = submit_and_see_a_checkpoint(&cluster, &run);
    let mut high = Command::new("sbatch");
    high.args(["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]);
    ended(cluster.client(&mut high).output().unwrap()).ok();
    until_restarted(&cluster, &jobs[0].1);
    ends_as_its_twin(&cluster, &run, &twin, &jobs);
}

#[test]
fn a_job_whose_node_dies_goes_on_elsewhere_with_the_same_bits() {
    let mut cluster = Cluster::start();
    let (run, twin) = long_and_its_twin();
    let jobs = submit_and_see_a_checkpoint(&cluster, &run);
    let node = cluster.node_of(&jobs[0].1);
    cluster.lose_node(node, true);
    until_restarted(&cluster, &jobs[0].1);
    ends_as_its_twin(&cluster, &run, &twin, &jobs);
}

#[test]
fn a_ghost_on_a_node_that_slurm_gave_up_stops_without_writing() {
    let mut cluster = Cluster::start();
    let (run, twin) = (Incubate::new().set("meta.epochs=200"), Incubate::new().set("meta.epochs=200"));
    twin.ok(&["meta"]);
    let jobs = submit_and_see_a_checkpoint(&cluster, &run);
    let trains = |cluster: &Cluster| cluster.processes().iter().filter(|(_, command)| command == "incubate").count();
    assert_eq!(trains(&cluster), 1);
    let node = cluster.node_of(&jobs[0].1);
    cluster.lose_node(node, false);
    assert_eq!(trains(&cluster), 1, "the ghost lives");
    let log = ends_as_its_twin(&cluster, &run, &twin, &jobs);
    assert!(log.contains("has taken it over; this process stops without writing"), "{log}");
    assert_eq!(log.matches("meta: done in").count(), 1, "{log}");
}

#[test]
fn a_job_that_is_stopped_over_and_over_gives_up_at_the_cap() {
    let cluster = Cluster::start();
    let run = Incubate::new().set("meta.epochs=2000").set("slurm.max_requeues=1");
    let jobs = submit_and_see_a_checkpoint(&cluster, &run);
    let (_, meta) = &jobs[0];
    let log = || std::fs::read_to_string(run.file(&format!("slurm/meta-{meta}.log"))).unwrap_or_default();
    for start in 1..=2 {
        cluster.until("training", || log().matches("training stages").count() == start);
        cluster.output("scancel", &["-s", "USR2", "--batch", meta]);
    }
    cluster.until("the end", || cluster.state(meta) == "FAILED");
    assert!(log().contains("requeued 1 times already: giving up"), "{}", log());
    assert!(cluster.output("scontrol", &["-o", "show", "job", meta]).contains("ExitCode=1:0"));
    cluster.until("the end of what waits for it", || cluster.state(&jobs[2].1) == "CANCELLED");
}
