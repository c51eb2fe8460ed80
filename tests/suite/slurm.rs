//! Submitted runs on a real Slurm.

use crate::cluster::Cluster;
use crate::incubate::{Ended, Incubate, ended};
use serde_json::Value;

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

#[test]
fn an_array_run_on_three_nodes_has_the_bits_of_a_local_run() {
    let cluster = Cluster::start();
    // A hostile name stays a name.
    let name = "run.name=\"$(touch x) `touch y`\"";
    let local = Incubate::new().set(name);
    local.ok(&["run"]);
    let run = Incubate::new().set(name);
    let dry = submit(&cluster, &run, &["--dry-run"]).ok();
    assert_eq!(dry.out.matches("to start at").count(), 3, "Slurm accepts all three scripts: {}", dry.out);
    let jobs = jobs(&cluster, &run);
    assert_eq!(jobs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["meta", "modules", "finalize"]);
    jobs.iter().for_each(|(_, id)| cluster.until_completed(id));
    for file in ["meta.h5", "module-2.h5", "final.h5"] {
        assert!(local.bytes(file) == run.bytes(file), "{file}");
    }
    let strays = ["x", "y"].iter().filter(|f| run.folder.path().join(f).exists() || run.file(f).exists()).count();
    assert_eq!(strays, 0);
    // Submitting a finished run leaves the last job alone, which verifies and ends.
    let again = submit(&cluster, &run, &["--dry-run"]).ok();
    assert!(!again.out.contains("\"modules\":\"") && again.out.contains("finalize") && !again.out.contains("meta.sh"));
}

#[test]
fn a_job_that_gets_the_early_signal_is_requeued_and_ends_with_the_same_bits() {
    let cluster = Cluster::start();
    let build = || Incubate::new().set("meta.epochs=60");
    let local = build();
    local.ok(&["meta"]);
    let run = build();
    let jobs = jobs(&cluster, &run);
    let (_, meta) = &jobs[0];
    let checkpoints = run.file("checkpoints");
    cluster.until("a checkpoint", || std::fs::read_dir(&checkpoints).is_ok_and(|mut d| d.next().is_some()));
    cluster.output("scancel", &["-s", "USR2", "--batch", meta]);
    let restarted = || cluster.output("scontrol", &["-o", "show", "job", meta]).contains("Restarts=1");
    cluster.until("the requeue", restarted);
    cluster.until_completed(meta);
    assert!(local.bytes("meta.h5") == run.bytes("meta.h5"));
    let log = std::fs::read_to_string(run.file(&format!("slurm/meta-{meta}.log"))).unwrap();
    assert!(log.contains("stopped by a signal") && log.contains("resuming at step"), "{log}");
    cluster.output("scancel", &[&jobs[1].1, &jobs[2].1]);
}
