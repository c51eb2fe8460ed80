//! A run killed at any moment and started again ends with the same bits as one never interrupted.

use crate::incubate::Incubate;
use std::process::Stdio;
use std::time::Duration;

#[test]
fn twenty_kills_at_random_moments_leave_no_trace_in_the_result() {
    let build = || {
        Incubate::new()
            .set("train.eval_epochs=1")
            .set("meta.epochs=40")
            .set("module.epochs=12")
            .set("finetune.epochs=12")
    };
    let whole = build();
    whole.ok(&["run"]);
    let killed = build();
    let mut random = incubate::random::Random::new(&[20]);
    let mut kills = 0;
    while kills < 20 {
        let mut child = killed.command(&["run"]).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        // The moment is the point of the test: from before the first file is opened to well into the training.
        std::thread::sleep(Duration::from_secs_f64(random.between(0.1, 1.2)));
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            break;
        }
        kills += 1;
    }
    assert!(kills >= 20, "the run was over after {kills} kills: it is too short for this test");
    killed.ok(&["run"]);
    for file in ["meta.h5", "module-0.h5", "module-3.h5", "assembled.h5", "final.h5"] {
        assert!(whole.bytes(file) == killed.bytes(file), "{file} differs after {kills} kills");
    }
    // The curves have every step once.
    assert_eq!(whole.losses("finetune"), killed.losses("finetune"));
    assert!(std::fs::read_dir(killed.file("checkpoints")).unwrap().next().is_none(), "checkpoints of done phases go");
}
