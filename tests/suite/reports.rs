//! The page of `incubate report` has the numbers of the other commands, and says what it lacks.

use crate::incubate::{Ended, Incubate, ended, flip, plain};
use crate::wait::wait_until;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

fn report(paths: &[&Path], arguments: &[&str]) -> Ended {
    let paths: Vec<&str> = paths.iter().map(|path| path.to_str().unwrap()).collect();
    ended(plain(&[&["report"], &paths[..], arguments].concat()).output().unwrap())
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The rows of a CSV, each by the titles of its columns.
fn rows(path: &Path) -> Vec<BTreeMap<String, String>> {
    let mut reader = csv::Reader::from_path(path).unwrap();
    reader.deserialize().map(|row| row.unwrap()).collect()
}

fn json(path: &Path) -> Vec<Value> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A finished run with a baseline.
fn finished(seed: usize) -> Incubate {
    let run = Incubate::new().set("run.e2e=true").set("train.eval_epochs=1").set(&format!("run.seed={seed}"));
    run.ok(&["run"]);
    run
}

/// The report's words about the meta model, for a run with four modules.
fn words_of_the_meta_model(summary: &[Value]) -> String {
    let flops: f64 = summary[..7].iter().map(|row| row["flops"].as_f64().unwrap()).sum();
    let (share, top1) = (summary[0]["flops"].as_f64().unwrap() / flops, summary[0]["top1"].as_f64().unwrap());
    format!("{share:.2} of the computation of Deep Incubation, reaches top-1 {top1:.2} %")
}

#[test]
fn a_report_has_the_numbers_of_the_summary_and_of_the_status_and_needs_nothing_but_itself() {
    let run = finished(0);
    let figures = run.folder.path().join("figures");
    let done = report(&[&run.run_dir], &["--figures", figures.to_str().unwrap(), "--json"]).ok();
    let written: Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(written["page"], run.file("report.html").to_str().unwrap());

    let (models, summary) = (rows(&figures.join("models.csv")), json(&run.file("summary.json")));
    let status = ended(plain(&["status", run.run_dir.to_str().unwrap(), "--json"]).output().unwrap()).ok();
    let status: Vec<Value> = serde_json::from_str(&status.out).unwrap();
    assert_eq!((models.len(), summary.len(), status.len()), (8, 8, 8));
    for ((row, model), line) in models.iter().zip(&summary).zip(&status) {
        let number = |column: &str| row[column].parse::<f64>().unwrap();
        assert_eq!(row["model"], model["model"]);
        assert_eq!(number("top-1 %"), model["top1"]);
        assert_eq!(number("top-1 %"), line["top1"]);
        if row["model"] != "assembled" {
            for (column, key) in [("training images", "images"), ("FLOPs", "flops"), ("device-hours", "device_hours")] {
                assert_eq!(number(column), model[key].as_f64().unwrap(), "{column} of {}", row["model"]);
                assert_eq!(number(column), line["computed"][key].as_f64().unwrap(), "{column} of {}", row["model"]);
            }
        }
    }
    for row in rows(&figures.join("time.csv")) {
        let number = |column: &str| row[column].parse::<f64>().unwrap();
        let inside = ["computing", "all-reduce", "waiting for data", "steps done again"];
        let outside = ["evaluation", "waiting for checkpoints", "start-up, writing the model"];
        let parts = || inside.iter().chain(&outside).map(|part| number(part));
        assert!((parts().sum::<f64>() - number("seconds")).abs() < 1e-9, "{row:?}");
        assert!(parts().all(|part| part >= 0.0), "{row:?}");
        assert!(number("computing") > 0.0 && number("evaluation") > 0.0, "{row:?}");
    }

    for row in rows(&figures.join("memory.csv")).iter().filter(|row| row["phase"] != "assembled") {
        // libtorch alone takes more than 50 MiB.
        let peak: f64 = row["host's peak, MiB"].parse().unwrap();
        assert!((50.0..20_000.0).contains(&peak) && row["GPU's peak, MiB"].is_empty(), "{row:?}");
    }

    let page = text(&run.file("report.html"));
    for forbidden in ["<script", "http:", "https:", "src=", "@import", "url("] {
        let found = page.match_indices(forbidden).find(|(at, _)| !page[..*at].ends_with("xmlns=\""));
        assert!(found.is_none(), "{forbidden} in the page");
    }
    let lead = written["summary"].to_string();
    for words in
        ["Vision Transformer of 8 blocks", "512 images", "4 classes", "128 test images", "Here Deep Incubation"]
    {
        assert!(lead.contains(words) && page.contains(words), "{words}: {lead}");
    }
    assert!(page.contains(&format!("top-1 {:.2} %", summary[6]["top1"].as_f64().unwrap())), "{lead}");
    assert!(lead.contains(&words_of_the_meta_model(&summary)), "{lead}");
    assert!(page.contains("Test top-1 % against device-hours") && !page.contains("What this report lacks"));
    for name in [
        "accuracy-by-device-hours",
        "accuracy-by-FLOPs",
        "accuracy-by-elapsed-time",
        "meta-training-loss",
        "e2e-test-top-1",
        "time",
    ] {
        let svg = text(&figures.join(name).with_extension("svg"));
        assert!(svg.starts_with("<svg") && page.contains(&svg), "{name}");
        assert!(fs::read(figures.join(name).with_extension("png")).unwrap().starts_with(b"\x89PNG"), "{name}");
    }
}

#[test]
fn a_report_of_a_run_that_goes_on_says_so_and_does_not_mark_its_end() {
    let run = Incubate::new().set("meta.epochs=2000").set("train.eval_epochs=1");
    let mut child = run.command(&["run"]).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    wait_until("an evaluation", || {
        fs::read_to_string(run.file("logs/meta/metrics.jsonl")).is_ok_and(|t| t.contains("top1"))
    });
    let going = report(&[&run.run_dir], &[]).ok();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(going.out.contains("The run is still going: meta is at step "), "{}", going.out);
    assert!(going.out.contains("there is no end-to-end run to compare with"), "{}", going.out);
    let page = text(&run.file("report-so-far.html"));
    assert!(page.contains("at most one model was evaluated"), "no picture of a point");
    assert!(page.contains("Meta model: training loss"));
    assert!(!run.file("report.html").exists());
    let out = run.file("report.html");
    report(&[&run.run_dir], &["--out", out.to_str().unwrap()]).fails(2, &["report.html", "choose another --out"]);
}

#[test]
fn what_is_missing_torn_or_damaged_is_named_and_the_rest_is_shown() {
    let run = finished(0);
    let figures = run.folder.path().join("figures");
    fs::remove_dir_all(run.file("logs/meta")).unwrap();
    let torn = fs::OpenOptions::new().append(true).open(run.file("logs/finetune/metrics.jsonl"));
    torn.unwrap().write_all(b"{\"step\":1").unwrap();
    flip(&run.file("e2e.h5"), 5000);
    fs::remove_file(run.file("dataset.json")).unwrap();
    let done = report(&[&run.run_dir], &["--figures", figures.to_str().unwrap()]).ok();
    assert!(done.out.contains("open until both methods are done"), "{}", done.out);
    let page = text(&run.file("report.html"));
    let lacks = page.split("What this report lacks").nth(1).unwrap().split("</div>").next().unwrap();
    for words in
        ["curves of meta are missing", "1 torn line(s) of the curves of finetune", "e2e.h5 is damaged", "dataset.json"]
    {
        assert!(lacks.contains(words), "{words}: {lacks}");
    }
    assert!(page.contains("Fine-tuned: training loss") && !page.contains("Meta model: training loss"));
    let models = rows(&figures.join("models.csv"));
    assert_eq!((models[7]["state"].as_str(), models[7]["top-1 %"].as_str()), ("damaged", ""));
    assert_eq!(models[0]["FLOPs"], json(&run.file("summary.json"))[0]["flops"].to_string().replace(".0", ""));
}

#[test]
fn seeds_are_averaged_and_the_keys_that_differ_are_named() {
    let runs = [finished(0), finished(1)];
    let study = tempfile::tempdir().unwrap();
    let dirs: Vec<PathBuf> = ["a", "b"].iter().map(|name| study.path().join(name)).collect();
    runs.iter().zip(&dirs).for_each(|(run, dir)| fs::rename(&run.run_dir, dir).unwrap());
    let figures = study.path().join("figures");
    report(&[study.path()], &["--figures", figures.to_str().unwrap()]).ok();
    let top1 = |dir: &PathBuf, row: usize| json(&dir.join("summary.json"))[row]["top1"].as_f64().unwrap();
    let groups = rows(&figures.join("groups.csv"));
    for (group, row) in groups.iter().zip([6, 7]) {
        let (a, b) = (top1(&dirs[0], row), top1(&dirs[1], row));
        let number = |column: &str| group[column].parse::<f64>().unwrap();
        assert_eq!(number("runs"), 2.0);
        assert!((number("top-1 %") - (a + b) / 2.0).abs() < 1e-9);
        assert!((number("deviation") - (a - b).abs() / 2f64.sqrt()).abs() < 1e-9);
    }
    let keys: Vec<String> = rows(&figures.join("configs.csv")).iter().map(|row| row["key"].clone()).collect();
    assert_eq!(keys, ["run.seed"]);
    assert_eq!(rows(&figures.join("models.csv")).len(), 16);

    let both = report(&[&dirs[0], &dirs[1]], &[]).fails(2, &["--out FILE"]);
    assert!(both.out.is_empty());
    report(&[&figures], &[]).fails(2, &["neither a run directory nor a folder of run directories"]);
}
