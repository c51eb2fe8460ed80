//! Two jobs on one run directory never write at the same time, and give the same bits as one job.

use crate::incubate::{Incubate, ended};
use crate::wait::wait_until;
use std::process::{Child, Stdio};

fn start(run: &Incubate, arguments: &[&str]) -> Child {
    run.command(arguments).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_second_job_waits_for_what_the_first_is_writing_and_both_end_well() {
    // The jobs log few lines, since nobody reads their pipes while they run.
    let build = || Incubate::new().set("meta.epochs=60").set("run.log_steps=50");
    let alone = build();
    alone.ok(&["run"]);
    let run = build();
    let jobs = [start(&run, &["run"]), start(&run, &["run"])];
    let [first, second] = jobs.map(|job| ended(job.wait_with_output().unwrap()).ok().err);
    let both = format!("{first}{second}");
    assert!(both.contains("is writing it; waiting"), "{both}");
    for phase in ["meta", "module-0", "module-3", "finetune"] {
        assert_eq!(both.matches(&format!("{phase}: done in")).count(), 1, "{phase} was trained once: {both}");
    }
    assert!(alone.bytes("final.h5") == run.bytes("final.h5"));
}

#[test]
fn a_job_that_was_silent_too_long_loses_its_phase_and_writes_nothing_more() {
    // The jobs log few lines, since nobody reads their pipes while they run.
    let build = || Incubate::new().set("meta.epochs=60").set("run.log_steps=50");
    let alone = build();
    alone.ok(&["meta"]);
    let run = build();
    let first = start(&run, &["meta"]);
    wait_until("a checkpoint", || run.has_checkpoint());
    let signal = |number| {
        // SAFETY: nobody has waited for the child yet.
        unsafe { libc::kill(first.id() as i32, number) };
    };
    signal(libc::SIGSTOP);
    let second = start(&run, &["meta"]);
    let taken = run.file("leases/meta.000002.json");
    wait_until("the second job to take over", || taken.exists());
    signal(libc::SIGCONT);
    ended(first.wait_with_output().unwrap()).fails(1, &["has taken it over", "without writing"]);
    let second = ended(second.wait_with_output().unwrap()).ok().err;
    assert!(second.contains("silent for 30 s") && second.contains("resuming at step"), "{second}");
    assert!(alone.bytes("meta.h5") == run.bytes("meta.h5"));
}
