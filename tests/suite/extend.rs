//! A finished fine-tuning continues for more epochs, and no earlier phase is trained again.

use crate::incubate::{Incubate, plain};
use crate::runs::stop_after_a_checkpoint;
use incubate::store::artefact;
use serde_json::Value;
use std::fs;

const ALL: [&str; 9] = [
    "config.toml",
    "dataset.json",
    "meta.h5",
    "module-0.h5",
    "module-1.h5",
    "module-2.h5",
    "module-3.h5",
    "assembled.h5",
    "final.h5",
];
const LONGER: [&str; 3] = ["finetune", "--extend", "finetune.epochs=3"];

#[test]
fn a_longer_fine_tuning_starts_from_the_final_model_and_survives_a_stop() {
    let run = Incubate::new().set("meta.epochs=1").set("module.epochs=1").set("finetune.epochs=1");
    run.ok(&["run"]);
    let before = run.bytes("final.h5");
    let early = run.fork(&ALL[..8]);
    early.incubate(&LONGER).fails(2, &["final.h5: missing; finish the fine-tuning of 1 epochs first"]);
    run.fork(&ALL)
        .set("finetune.epochs=3")
        .incubate(&["run"])
        .fails(2, &["finetune.epochs (1 there, 3 here)", "for more epochs, add --extend finetune.epochs=3"]);
    run.incubate(&["run", "--extend", "finetune.epochs=1"]).fails(2, &["has 1 epochs of fine-tuning; give more"]);
    let other = run.incubate(&["run", "--extend", "module.epochs=3"]);
    assert!(other.code == Some(2) && other.err.contains("write finetune.epochs=N"), "{}", other.err);
    let stopped = run.fork(&ALL);
    let interrupted = run.fork(&ALL);

    let extended = run.ok(&["run", "--extend", "finetune.epochs=3"]);
    assert!(run.bytes("final-1-epochs.h5") == before && run.bytes("final.h5") != before);
    assert_eq!((run.losses("finetune-1-epochs").len(), run.losses("finetune").len()), (8, 16));
    assert!(extended.err.matches("done already").count() == 6, "{}", extended.err);
    let meta = |file: &str| artefact::read(&run.file(file)).unwrap().header.meta;
    assert_eq!(meta("final.h5"), meta("final-1-epochs.h5"));
    let status = plain(&["status", run.run_dir.to_str().unwrap(), "--json"]).output().unwrap();
    let lines: Vec<Value> = serde_json::from_slice(&status.stdout).unwrap();
    assert!(lines.iter().all(|line| line["state"] == "done"), "{lines:?}");
    let after = run.bytes("final.h5");
    run.ok(&LONGER);
    assert!(run.bytes("final.h5") == after, "the same command does nothing more");
    run.incubate(&["run"]).fails(2, &["was extended: --extend finetune.epochs=3 goes on with it"]);

    stop_after_a_checkpoint(&stopped, &LONGER);
    stopped.ok(&LONGER);
    assert!(stopped.bytes("final.h5") == after, "a stop leaves no trace");
    // The folder is in the state that a kill just before the new config is written would leave.
    fs::rename(interrupted.file("final.h5"), interrupted.file("final-1-epochs.h5")).unwrap();
    interrupted.ok(&LONGER);
    assert!(interrupted.bytes("final.h5") == after);
    fs::remove_file(interrupted.file("final.h5")).unwrap();
    fs::copy(interrupted.file("meta.h5"), interrupted.file("final-1-epochs.h5")).unwrap();
    interrupted.incubate(&LONGER).fails(3, &["final-1-epochs.h5", "is no artefact of finetune"]);
}
