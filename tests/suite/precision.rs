//! Precision and activation checkpointing change the speed and memory of a step. In bf16 the losses stay near those of fp32, and
//! activation checkpointing changes no bit. `bench step` measures both.

use crate::incubate::{Incubate, plain};
use crate::runs::stop_after_a_checkpoint;
use serde_json::Value;
use std::path::Path;

fn meta_losses(sets: &[&str]) -> Vec<f64> {
    // If images are neither mixed nor erased, the loss falls within these few epochs.
    let run = Incubate::new().set("meta.epochs=12").set("data.mixup=0").set("data.cutmix=0").set("data.erase=0");
    let run = sets.iter().fold(run.set("data.crop_padding=1"), |run, set| run.set(set));
    run.ok(&["meta"]);
    run.losses("meta")
}

#[test]
fn bf16_follows_the_loss_curve_of_fp32_within_six_per_cent_at_every_step_and_one_on_average() {
    let (exact, rounded) = (meta_losses(&[]), meta_losses(&["run.precision=bf16"]));
    assert!(exact[exact.len() - 1] < 0.95 * exact[0], "the loss falls: {exact:?}");
    assert!(exact != rounded && exact.len() == rounded.len(), "bf16 rounds, so its curve differs");
    for (step, (exact, rounded)) in exact.iter().zip(&rounded).enumerate() {
        assert!((rounded / exact - 1.0).abs() < 0.06, "step {step}: {rounded} in bf16, {exact} in fp32");
    }
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!((mean(&rounded) / mean(&exact) - 1.0).abs() < 0.01);
}

#[test]
fn activation_checkpointing_changes_no_bit() {
    let plain = Incubate::new().set("meta.drop_path=0.2").set("model.dropout=0.1");
    let saving = plain.fork(&[]).set("run.activation_checkpointing=true");
    for precision in ["fp32", "bf16"] {
        let set = format!("run.precision={precision}");
        let [plain, saving] = [&plain, &saving].map(|run| run.fork(&[]).set(&set));
        plain.ok(&["meta"]);
        saving.ok(&["meta"]);
        assert!(plain.bytes("meta.h5") == saving.bytes("meta.h5"), "{precision}");
    }
}

#[test]
fn a_bf16_run_has_the_same_bits_after_a_stop_and_for_one_and_two_ranks() {
    let uninterrupted = Incubate::new().set("run.precision=bf16").set("module.drop_path=0.1");
    uninterrupted.ok(&["meta"]);
    let (stopped, ranks) =
        (uninterrupted.fork(&["meta.h5", "config.toml"]), uninterrupted.fork(&["meta.h5", "config.toml"]));
    uninterrupted.ok(&["module"]);
    ranks.mpirun(2, &["module"]).ok();
    stop_after_a_checkpoint(&stopped, &["module"]);
    stopped.ok(&["module"]);
    for i in 0..4 {
        let file = format!("module-{i}.h5");
        assert!(uninterrupted.bytes(&file) == stopped.bytes(&file), "{file} differs after a stop");
        assert!(uninterrupted.bytes(&file) == ranks.bytes(&file), "{file} differs with two ranks");
    }
}

#[test]
fn bench_step_reports_the_speed_and_the_share_of_each_part() {
    for work in [["--e2e", "--batch=4"], ["--stage=1", "--batch=4"]] {
        let mut command = plain(&["bench", "step", "--model=tiny-28", "--steps=2", "--precision=bf16", "--json"]);
        let output = command.args(work).args(["--threads=1"]).output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        for key in ["images_per_s", "gflops", "matrix_product_gflops", "utilisation", "peak_mib"] {
            assert!(report[key].as_f64().unwrap() > 0.0, "{key} in {report}");
        }
        let shares = ["data", "forward", "backward", "all_reduce", "optimiser", "device"];
        let total: f64 = shares.iter().map(|part| report["share"][part].as_f64().unwrap()).sum();
        assert!((total - 1.0).abs() < 1e-6, "{report}");
        assert_eq!((&report["precision"], &report["threads"]), (&"bf16".into(), &1.into()));
    }
}

#[test]
fn bench_step_trains_with_the_heads_of_a_segmentation_or_a_detection() {
    let tiny = ["model.width=16", "model.heads=2", "model.patch_size=8", "segmentation.crop=32", "detection.crop=64"];
    let tiny = tiny.iter().chain(&[
        "segmentation.width=8",
        "segmentation.auxiliary_width=8",
        "detection.width=8",
        "detection.window=4",
    ]);
    let tiny: Vec<&str> =
        tiny.chain(&["detection.hidden=16", "detection.regions=8"]).flat_map(|key| ["--set", *key]).collect();
    for (work, name) in [(["--segment", "--batch=2"], "segment-e2e"), (["--detect", "--batch=1"], "detect-e2e")] {
        let mut command = plain(&["bench", "step", "--model=vit-b", "--steps=1", "--threads=1", "--json"]);
        let output = command.args(work).args(&tiny).output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
        assert!(report["work"] == name && report["gflops"].as_f64().unwrap() > 0.0, "{report}");
    }
}

#[test]
fn bench_step_records_the_functions_of_the_timed_steps_alone() {
    let folder = tempfile::tempdir().unwrap();
    let trace = |steps: &str, path: &Path| {
        let mut command = plain(&["bench", "step", "--model=tiny-28", "--batch=4", "--threads=1"]);
        crate::incubate::ended(command.args(["--steps", steps, "--trace"]).arg(path).output().unwrap())
    };
    let products = |steps: &str| {
        let path = folder.path().join(steps);
        trace(steps, &path).ok();
        let recorded: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let names = recorded["traceEvents"].as_array().unwrap().iter().filter_map(|event| event["name"].as_str());
        names.filter(|name| *name == "aten::addmm").count()
    };
    let of_one_step = products("1");
    assert!(of_one_step > 0 && products("3") == 3 * of_one_step, "the steps that warm up are left out");
    trace("1", &folder.path().join("none/trace.json")).fails(2, &["--trace", "none/trace.json", "No such file"]);
}

#[test]
fn bench_step_refuses_what_it_cannot_measure() {
    for (argument, word) in [
        ("--model=vit-xxl", "vit-xxl"),
        ("--stage=4", "stages are 0 to 3"),
        ("--batch=3", "even"),
        ("--batch=1", "even"),
    ] {
        let output = plain(&["bench", "step", argument]).output().unwrap();
        crate::incubate::ended(output).fails(2, &[word]);
    }
}
