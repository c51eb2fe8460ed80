//! A disk that is full for a while costs time, but no trained step.

use crate::incubate::{Incubate, plain};
use crate::wait::wait_until;
use incubate::store::progress::Progress;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Starts the training on a disk that is full for artefacts and checkpoints. Returns the process, and the path of a file: the disk
/// is full as long as this file exists.
fn start_on_full_disk(run: &Incubate) -> (Child, PathBuf) {
    let (library, marker) = (run.folder.path().join("full_disk.so"), run.folder.path().join("full"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/full_disk.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
    assert!(built.unwrap().success());
    std::fs::write(&marker, "").unwrap();
    let mut command = run.command(&["meta"]);
    command.env("LD_PRELOAD", library).env("FULL_DISK", &marker).stderr(Stdio::piped());
    (command.spawn().unwrap(), marker)
}

/// Waits for a heartbeat that reports the full disk and for which `is_wanted` is true. Returns its step.
fn wait_for_trouble(run: &Incubate, is_wanted: impl Fn(&Progress) -> bool) -> u64 {
    let heartbeat =
        || Progress::read(&run.run_dir, "meta").filter(|heartbeat| heartbeat.trouble.is_some() && is_wanted(heartbeat));
    wait_until("a full disk", || heartbeat().is_some());
    heartbeat().unwrap().step
}

#[test]
fn training_goes_on_beside_a_full_disk_and_waits_for_space_at_its_end() {
    let build = || Incubate::new().set("meta.epochs=20");
    let (whole, run) = (build(), build());
    whole.ok(&["meta"]);
    let (child, marker) = start_on_full_disk(&run);
    wait_for_trouble(&run, |_| true);
    wait_for_trouble(&run, |heartbeat| heartbeat.step == heartbeat.steps);
    let status = plain(&["status", run.run_dir.to_str().unwrap()]).output().unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    let line = status.lines().find(|line| line.starts_with("meta")).unwrap();
    assert!(line.contains("running") && line.contains("No space left on device"), "{status}");
    assert!(!run.file("meta.h5").exists());
    std::fs::remove_file(marker).unwrap();
    let ended = crate::incubate::ended(child.wait_with_output().unwrap()).ok();
    assert!(ended.err.contains("free some space: it waits and tries again"), "{}", ended.err);
    assert!(whole.bytes("meta.h5") == run.bytes("meta.h5"));
    assert_eq!(Progress::read(&run.run_dir, "meta").unwrap().trouble, None);
}

#[test]
fn a_stop_waits_for_space_for_its_checkpoint() {
    let build = || Incubate::new().set("meta.epochs=100");
    let (whole, run) = (build(), build());
    whole.ok(&["meta"]);
    let (child, marker) = start_on_full_disk(&run);
    wait_for_trouble(&run, |_| true);
    // SAFETY: nobody has waited for the child yet.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let waits = |heartbeat: &Progress| heartbeat.trouble.as_ref().is_some_and(|trouble| trouble.contains("it waits"));
    let step = wait_for_trouble(&run, waits);
    assert!(!run.has_checkpoint() && step > 0);
    std::fs::remove_file(marker).unwrap();
    let ended = crate::incubate::ended(child.wait_with_output().unwrap());
    assert!(ended.code == Some(75) && ended.err.contains("the training goes on"), "{}", ended.err);
    assert!(run.ok(&["meta"]).err.contains("resuming at step"));
    assert!(whole.bytes("meta.h5") == run.bytes("meta.h5"));
}
