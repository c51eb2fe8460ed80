//! A run that is killed at any moment and started again ends with the same bits as an uninterrupted run.

use crate::incubate::{Incubate, ended};
use crate::wait::wait_until;
use incubate::random::Random;
use incubate::store::progress::Progress;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

fn start(run: &Incubate) -> Child {
    run.command(&["run"]).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

/// Whether the process has begun to train this phase.
fn trains(child: &Child, run: &Incubate, phase: &str) -> bool {
    Progress::read(&run.run_dir, phase).is_some_and(|progress| progress.pid == child.id())
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "the run was over before it was killed: it is too short for this test");
}

#[test]
fn a_signal_during_an_evaluation_stops_the_run_which_resumes_there() {
    let build = || Incubate::new().set("data.test_images=60000").set("meta.epochs=1");
    let (uninterrupted, stopped) = (build(), build());
    uninterrupted.ok(&["meta"]);
    let child = stopped.command(&["meta"]).stderr(Stdio::piped()).spawn().unwrap();
    let is_evaluating = || Progress::read(&stopped.run_dir, "meta").is_some_and(|p| p.step == p.steps);
    wait_until("the last step", || stopped.losses("meta").len() == 8 || is_evaluating());
    // SAFETY: nobody has waited for the child yet.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let ended = ended(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(75), "{}", ended.err);
    assert!(ended.err.contains("checkpoint written at step 8"), "{}", ended.err);
    let resumed = stopped.ok(&["meta"]);
    assert!(resumed.err.contains("resuming at step 8 of 8"), "{}", resumed.err);
    assert!(uninterrupted.bytes("meta.h5") == stopped.bytes("meta.h5"));
}

#[test]
fn a_file_system_that_takes_no_heartbeat_for_a_while_does_not_end_the_training() {
    let run = Incubate::new().set("meta.epochs=60").set("run.log_steps=20");
    let mut child = run.command(&["meta"]).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the training", || trains(&child, &run, "meta"));
    std::fs::rename(run.file("progress"), run.file("away")).unwrap();
    let words = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut warnings = words.filter(|line| line.contains("training goes on"));
    assert!(warnings.next().is_some(), "a heartbeat that failed is warned of");
    std::fs::rename(run.file("away"), run.file("progress")).unwrap();
    assert_eq!(warnings.next(), None, "the next heartbeats are written");
    assert!(child.wait().unwrap().success());
    assert_eq!(run.losses("meta").len(), 24);
    let progress = Progress::read(&run.run_dir, "meta").unwrap();
    assert_eq!((progress.step, progress.steps), (480, 480));
}

#[test]
fn twenty_kills_at_random_moments_of_every_phase_leave_no_trace_in_the_result() {
    let build = || {
        Incubate::new()
            .set("train.eval_epochs=1")
            .set("meta.epochs=20")
            .set("module.epochs=20")
            .set("finetune.epochs=20")
    };
    let uninterrupted = build();
    uninterrupted.ok(&["run"]);
    let killed = build();
    let mut random = Random::new(&[20]);
    // These kills come within 0.3 s of the start, perhaps before a file is opened.
    for _ in 0..2 {
        let child = start(&killed);
        std::thread::sleep(Duration::from_secs_f64(random.between(0.0, 0.3)));
        kill(child);
    }
    // These kills come soon after the beginning of a phase.
    let phases = [("meta", 5), ("module-0", 4), ("module-1", 2), ("module-3", 3), ("finetune", 4)];
    for (phase, kills) in phases {
        for _ in 0..kills {
            let child = start(&killed);
            wait_until(phase, || trains(&child, &killed, phase));
            std::thread::sleep(Duration::from_secs_f64(random.between(0.0, 0.15)));
            kill(child);
        }
    }
    killed.ok(&["run"]);
    for file in ["meta.h5", "module-0.h5", "module-1.h5", "module-3.h5", "assembled.h5", "final.h5"] {
        assert!(uninterrupted.bytes(file) == killed.bytes(file), "{file} differs");
    }
    // The curves have each step once.
    assert_eq!(uninterrupted.losses("finetune"), killed.losses("finetune"));
    assert!(std::fs::read_dir(killed.file("checkpoints")).unwrap().next().is_none(), "checkpoints of done phases go");
}
