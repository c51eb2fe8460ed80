//! Tests submitted runs on a real Slurm whose jobs are signalled, requeued, killed or preempted, or lose their node.

use crate::cluster::Cluster;
use crate::incubate::{Incubate, ended};
use crate::slurm::{cancel, jobs, log, newest_checkpoint, number, resumed_where_it_stopped, status, until_checkpoint};
use serde_json::Value;
use std::process::Command;

/// A run whose meta model will train for a while, and a twin whose meta model was trained without interruption.
fn long_run_and_twin() -> (Incubate, Incubate) {
    let build = || Incubate::new().set("meta.epochs=60");
    let twin = build();
    twin.ok(&["meta"]);
    (build(), twin)
}

/// Submits a run and waits until the job of the meta model has written a checkpoint. Returns the jobs.
fn submit_until_checkpoint(cluster: &Cluster, run: &Incubate) -> Vec<(String, String)> {
    let jobs = jobs(cluster, run);
    until_checkpoint(cluster, run, "meta");
    jobs
}

fn until_restarted(cluster: &Cluster, job: &str) {
    cluster.until("the restart", || cluster.output("scontrol", &["-o", "show", "job", job]).contains("Restarts=1"));
}

/// Waits until the job of the meta model (the first of `jobs`) has completed. Checks that the meta phase restarted once, resumed
/// from a checkpoint, logged each step once and ended with the twin's bits. Cancels the other jobs. Returns the log of the job.
fn ends_like_its_twin(cluster: &Cluster, run: &Incubate, twin: &Incubate, jobs: &[(String, String)]) -> String {
    let (_, meta) = &jobs[0];
    cluster.until_completed(meta);
    assert!(twin.bytes("meta.h5") == run.bytes("meta.h5"));
    assert!(twin.losses("meta") == run.losses("meta"), "the curve has every step once");
    let log = log(run, "meta", meta);
    assert!(log.contains("resuming at step"), "{log}");
    let line = status(cluster, run, "meta");
    assert!(line["restarts"] == 1 && line["goodput"].as_f64().is_some_and(|g| g > 0.0 && g <= 1.0), "{line}");
    cancel(cluster, run, &[]);
    log
}

#[test]
fn a_job_that_gets_the_early_signal_is_requeued_and_ends_with_the_same_bits() {
    let cluster = Cluster::start();
    let (run, twin) = long_run_and_twin();
    let jobs = submit_until_checkpoint(&cluster, &run);
    cluster.output("scancel", &["-s", "USR2", "--batch", &jobs[0].1]);
    until_restarted(&cluster, &jobs[0].1);
    let log = ends_like_its_twin(&cluster, &run, &twin, &jobs);
    resumed_where_it_stopped(&log);
}

#[test]
fn a_job_near_its_time_limit_is_stopped_in_time_and_resumes_in_a_new_start() {
    let cluster = Cluster::start();
    let run = Incubate::new().set("meta.epochs=100000").set("slurm.time=\"00:02:00\"").set("slurm.signal_lead=110");
    let jobs = submit_until_checkpoint(&cluster, &run);
    until_restarted(&cluster, &jobs[0].1);
    cluster.until("the resumption", || log(&run, "meta", &jobs[0].1).contains("resuming at step"));
    resumed_where_it_stopped(&log(&run, "meta", &jobs[0].1));
    let ids: Vec<&str> = jobs.iter().map(|(_, id)| id.as_str()).collect();
    assert_eq!(cancel(&cluster, &run, &[]), format!("cancelled {}\n", ids.join(", ")));
    cluster.until("the cancellation", || ids.iter().all(|id| cluster.state(id).starts_with("CANCELLED")));
    assert_eq!(cancel(&cluster, &run, &[]), "nothing to cancel\n");
    let json: Value = serde_json::from_str(&cancel(&cluster, &run, &["--json"])).unwrap();
    assert_eq!(json, serde_json::json!({"cancelled": []}));
}

#[test]
fn a_requeued_job_goes_on_with_the_same_bits() {
    let cluster = Cluster::start();
    let (run, twin) = long_run_and_twin();
    let jobs = submit_until_checkpoint(&cluster, &run);
    cluster.output("scontrol", &["requeue", &jobs[0].1]);
    until_restarted(&cluster, &jobs[0].1);
    ends_like_its_twin(&cluster, &run, &twin, &jobs);
}

#[test]
fn a_requeued_job_of_several_ranks_writes_a_checkpoint_before_it_ends() {
    let cluster = Cluster::start();
    let run = Incubate::new().set("meta.epochs=100000").set("run.checkpoint_every=\"1 epochs\"");
    let run = run.set("slurm.mode=\"allocation\"").set("slurm.ranks=2").set("slurm.nodes=2");
    let jobs = submit_until_checkpoint(&cluster, &run);
    cluster.output("scontrol", &["requeue", &jobs[0].1]);
    until_restarted(&cluster, &jobs[0].1);
    cluster.until("the resumption", || log(&run, "run", &jobs[0].1).contains("resuming at step"));
    resumed_where_it_stopped(&log(&run, "run", &jobs[0].1));
    cancel(&cluster, &run, &[]);
}

#[test]
fn a_killed_task_is_named_and_goes_on_when_submitted_again() {
    let cluster = Cluster::start();
    let (run, twin) = long_run_and_twin();
    let jobs = submit_until_checkpoint(&cluster, &run);
    let (pid, _) = cluster.processes().into_iter().find(|(_, command)| command == "incubate").unwrap();
    // SAFETY: the signal goes to a process of this cluster's jobs.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    cluster.until("the end of what waits for it", || cluster.state(&jobs[2].1) == "CANCELLED");
    let kept = newest_checkpoint(&run, "meta");
    let line = status(&cluster, &run, "meta");
    assert!(line["state"] == "failed" && line["why"].as_str().unwrap().contains("NonZeroExitCode"), "{line}");
    assert_eq!(status(&cluster, &run, "module-2")["state"], "cancelled");
    let again = crate::slurm::jobs(&cluster, &run);
    let log = ends_like_its_twin(&cluster, &run, &twin, &again);
    assert_eq!(number(&log, "resuming at step "), kept, "{log}");
}

#[test]
fn a_preempted_job_comes_back_when_its_node_is_free_and_ends_with_the_same_bits() {
    let cluster = Cluster::start();
    let (run, twin) = long_run_and_twin();
    let jobs = submit_until_checkpoint(&cluster, &run);
    let mut high = Command::new("sbatch");
    high.args(["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]);
    ended(cluster.client(&mut high).output().unwrap()).ok();
    until_restarted(&cluster, &jobs[0].1);
    resumed_where_it_stopped(&ends_like_its_twin(&cluster, &run, &twin, &jobs));
}

#[test]
fn a_job_whose_node_dies_goes_on_elsewhere_with_the_same_bits() {
    let mut cluster = Cluster::start();
    let (run, twin) = long_run_and_twin();
    let jobs = submit_until_checkpoint(&cluster, &run);
    let node = cluster.node_of(&jobs[0].1);
    cluster.lose_node(node, true);
    let kept = newest_checkpoint(&run, "meta");
    until_restarted(&cluster, &jobs[0].1);
    let log = ends_like_its_twin(&cluster, &run, &twin, &jobs);
    assert_eq!(number(&log, "resuming at step "), kept, "{log}");
}

#[test]
fn a_ghost_on_a_node_that_slurm_gave_up_stops_without_writing() {
    let mut cluster = Cluster::start();
    let (run, twin) = (Incubate::new().set("meta.epochs=200"), Incubate::new().set("meta.epochs=200"));
    twin.ok(&["meta"]);
    let jobs = submit_until_checkpoint(&cluster, &run);
    let trains = |cluster: &Cluster| cluster.processes().iter().filter(|(_, command)| command == "incubate").count();
    assert_eq!(trains(&cluster), 1);
    let node = cluster.node_of(&jobs[0].1);
    cluster.lose_node(node, false);
    assert_eq!(trains(&cluster), 1, "the ghost lives");
    let log = ends_like_its_twin(&cluster, &run, &twin, &jobs);
    assert!(log.contains("has taken it over; this process stops without writing"), "{log}");
    assert_eq!(log.matches("meta: done in").count(), 1, "{log}");
}

#[test]
fn a_job_that_is_stopped_over_and_over_gives_up_at_the_cap_or_without_a_step_gained() {
    let cluster = Cluster::start();
    // The early signal of this run is one that the program itself does not handle.
    let run = Incubate::new().set("meta.epochs=2000").set("slurm.max_requeues=1").set("slurm.signal=\"USR1\"");
    // The other run is stopped before its second start has done anything: the start waits in its setup.
    let idle = Incubate::new().set("meta.epochs=2000");
    let hold = idle.folder.path().join("hold");
    let setup = format!("while [ -e {} ] && [ -z \"$stop_requested\" ]; do sleep 0.1; done", hold.display());
    let idle = idle.set(&format!("slurm.setup=['''{setup}''']"));
    let (jobs, idle_jobs) = (submit_until_checkpoint(&cluster, &run), submit_until_checkpoint(&cluster, &idle));
    let (meta, idle_meta) = (&jobs[0].1, &idle_jobs[0].1);
    std::fs::write(&hold, "").unwrap();
    cluster.output("scancel", &["-s", "USR2", "--batch", idle_meta]);
    let words = || log(&run, "meta", meta);
    for start in 1..=2 {
        cluster.until("training", || words().matches("training stages").count() == start);
        cluster.output("scancel", &["-s", "USR1", "--batch", meta]);
    }
    cluster.until("the second start", || {
        let job = cluster.output("scontrol", &["-o", "show", "job", idle_meta]);
        job.contains("Restarts=1") && job.contains("JobState=RUNNING")
    });
    cluster.output("scancel", &["-s", "USR2", "--batch", idle_meta]);
    for (run, jobs, why) in [
        (&run, &jobs, "requeued 1 times already: giving up"),
        (&idle, &idle_jobs, "stopped without a step gained since the last start: not requeued"),
    ] {
        let meta = &jobs[0].1;
        cluster.until("the end", || cluster.state(meta) == "FAILED");
        assert!(log(run, "meta", meta).contains(why), "{}", log(run, "meta", meta));
        assert!(cluster.output("scontrol", &["-o", "show", "job", meta]).contains("ExitCode=1:0"));
        cluster.until("the end of what waits for it", || cluster.state(&jobs[2].1) == "CANCELLED");
    }
}
