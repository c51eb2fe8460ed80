//! `incubate status --preview` evaluates what the modules have learnt so far, while they train. With `run.preview_epochs`, so does the
//! run itself.

use crate::incubate::{Ended, Incubate, ended, plain};
use crate::wait::wait_until;
use incubate::store::artefact;
use incubate::store::previews::Preview;
use serde_json::Value;
use std::fs;
use std::process::Stdio;
use tch::{Kind, Tensor};

fn preview(run: &Incubate, arguments: &[&str]) -> Ended {
    let words = [&["status", "--preview"], arguments].concat();
    ended(plain(&words).arg(&run.run_dir).output().unwrap())
}

/// A run whose meta model is done.
fn begun() -> Incubate {
    let run = Incubate::new().set("train.ema=0.5").set("train.eval_epochs=1");
    run.ok(&["meta"]);
    run
}

#[test]
fn a_preview_has_the_values_of_the_artefacts_and_disturbs_no_result() {
    let run = begun();
    preview(&run, &[]).fails(2, &["no module has a checkpoint yet"]);
    for index in ["0", "1", "2", "3"] {
        run.ok(&["module", "--index", index]);
    }
    let shown: Value = serde_json::from_str(&preview(&run, &["--json"]).ok().out).unwrap();
    assert_eq!((shown["images"].as_u64(), shown["metric"].as_str()), (Some(128), Some("top1")));
    ended(plain(&["report"]).arg(&run.run_dir).output().unwrap()).ok();
    let page = fs::read_to_string(run.file("report-so-far.html")).unwrap();
    assert!(page.contains("Preview of the assembly"));

    run.ok(&["run"]);
    let summary: Vec<Value> = serde_json::from_slice(&fs::read(run.file("summary.json")).unwrap()).unwrap();
    let models = shown["models"].as_array().unwrap();
    assert_eq!(models.len(), 6);
    for (previewed, model) in models.iter().zip(&summary) {
        assert_eq!(previewed["value"], model["top1"], "{previewed} {model}");
    }
    assert!(!fs::read_to_string(run.file("report.html")).unwrap().contains("Preview of the assembly"));
}

#[test]
fn a_preview_reads_checkpoints_and_leaves_stages_without_weights_thin() {
    let run = Incubate::new().set("train.ema=0.9").set("module.epochs=2000");
    preview(&run, &[]).fails(2, &["config.toml", "give the folder that a run wrote"]);
    run.ok(&["meta"]);
    let child = run.command(&["module", "--index", "2"]).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("a checkpoint", || run.has_checkpoint());
    // SAFETY: nobody has waited for the child yet.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let said = ended(child.wait_with_output().unwrap()).err;
    let mut digits = said.split("checkpoint written at step ").nth(1).unwrap().split(|c: char| !c.is_ascii_digit());
    let step: u64 = digits.next().unwrap().parse().unwrap();

    let file = run.file(&format!("checkpoints/module-2-{step:010}.h5"));
    let checkpoint = artefact::read(&file).unwrap();
    let average = checkpoint.state["ema"].abs().sum(None::<Kind>);
    let evaluated: Tensor = checkpoint.averaged().values().map(|tensor| tensor.abs().sum(None::<Kind>)).sum();
    assert!((&average - evaluated).abs().double_value(&[]) < 1e-3 * average.double_value(&[]));

    let shown: Value = serde_json::from_str(&preview(&run, &["--images", "50", "--json"]).ok().out).unwrap();
    let models = shown["models"].as_array().unwrap();
    assert_eq!(shown["images"], 50);
    let names: Vec<&str> = models.iter().map(|model| model["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["meta", "module-2", "assembled so far"]);
    assert_eq!(models[1]["steps"], serde_json::json!([step, 16_000]));
    assert_eq!(models[1]["value"], models[2]["value"], "with one module both are the same network");
    let table = preview(&run, &[]).ok().out;
    assert!(table.contains(&format!("{step}/16000")) && table.contains("on 128 test images"), "{table}");
}

/// The lines of `previews.jsonl`.
fn previews(run: &Incubate) -> Vec<Preview> {
    let text = fs::read_to_string(run.file("previews.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_rank_previews_after_each_module_that_it_has_trained_and_the_results_keep_their_bits() {
    let run = begun();
    let other = run.fork(&["meta.h5", "config.toml"]).set("run.preview_epochs=1");
    run.ok(&["run"]);
    assert!(!run.file("previews.jsonl").exists(), "no preview was asked for");

    let log = other.ok(&["run"]).err;
    assert!(log.contains("preview: top-1") && log.contains("module-2"), "{log}");
    let names = |preview: &Preview| preview.models.iter().map(|model| model.name.clone()).collect::<Vec<_>>().join(" ");
    let shown: Vec<String> = previews(&other).iter().map(names).collect();
    let all = ["module-0", "module-1", "module-2"];
    // After the last module the assembly follows, and a preview would only repeat it.
    let expected = (1..=3).map(|count| format!("meta {} assembled so far", all[..count].join(" ")));
    assert_eq!(shown, expected.collect::<Vec<_>>());
    for file in ["module-3.h5", "assembled.h5", "final.h5"] {
        assert!(run.bytes(file) == other.bytes(file), "{file}");
    }
}

#[test]
fn a_rank_that_waits_for_other_modules_previews_their_checkpoints() {
    let run = Incubate::new().set("module.epochs=80").set("run.preview_epochs=5").set("run.checkpoint_every=4 epochs");
    run.ok(&["meta"]);
    run.ok(&["module", "--index", "0"]);
    run.ok(&["module", "--index", "1"]);
    let before = previews(&run).len();
    run.mpirun(2, &["module"]).ok();
    let meanwhile = previews(&run).into_iter().skip(before);
    let is_partial = |steps: Option<u64>| steps.is_some_and(|step| step < 8 * 80);
    let partial = meanwhile
        .filter(|preview| is_partial(preview.steps_of("module-2")) || is_partial(preview.steps_of("module-3")));
    assert!(partial.count() >= 1, "the waiting rank has previewed no module that was still training");
}
