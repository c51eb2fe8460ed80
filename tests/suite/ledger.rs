//! The costs of a run are the sums over all its starts, on any number of ranks and however they ended.

use crate::incubate::{Incubate, plain};
use crate::wait::wait_until;
use serde_json::Value;
use std::process::Stdio;

const BATCH: u64 = 64;

#[test]
fn the_costs_of_a_run_are_the_sums_of_all_its_starts() {
    let run = Incubate::new().set("meta.epochs=30").set("module.epochs=1").set("finetune.epochs=1");
    let mut child = run.command(&["meta"]).stderr(Stdio::null()).spawn().unwrap();
    wait_until("a checkpoint", || run.has_checkpoint());
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success());
    let resumed = run.mpirun(2, &["run", "--set", "run.precision=bf16"]).ok();
    assert!(resumed.err.contains("with run.precision = Bf16, after Fp32 before"), "{}", resumed.err);

    let lines = String::from_utf8(run.bytes("ledger/meta.jsonl")).unwrap();
    let starts: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [killed, last] = &starts[..] else { panic!("two starts: {lines}") };
    let number = |start: &Value, key: &str| start[key].as_u64().unwrap();
    assert_eq!((&killed["end"], &last["end"]), (&Value::Null, &"done".into()));
    assert_eq!((&killed["precision"], &last["precision"]), (&"fp32".into(), &"bf16".into()));
    assert_eq!(["ranks", "replicas"].map(|key| number(killed, key)), [1, 1]);
    assert_eq!(["ranks", "replicas"].map(|key| number(last, key)), [2, 2]);
    assert_eq!((number(killed, "from"), number(last, "to")), (0, 30 * 8));
    let again = number(killed, "to") - number(last, "from");
    assert!(number(last, "from") > 0, "it has resumed");

    let images = (30 * 8 + again) * BATCH;
    let summary: Vec<Value> = serde_json::from_slice(&run.bytes("summary.json")).unwrap();
    assert_eq!((&summary[0]["images"], &summary[0]["starts"]), (&images.into(), &2.into()));
    assert_eq!(summary[1]["images"], 8 * BATCH);
    let sum = |key: &str| starts.iter().map(|start| start[key].as_f64().unwrap()).sum::<f64>();
    let is_near = |a: &Value, b: f64| (a.as_f64().unwrap() / b - 1.0).abs() < 1e-9;
    assert!(is_near(&summary[0]["flops"], sum("flops")) && is_near(&summary[0]["seconds"], sum("seconds")));
    let device_seconds = sum("device_seconds");
    assert!(is_near(&summary[0]["device_hours"], device_seconds / 3600.0));
    assert!(device_seconds > sum("seconds"), "the second start had two replicas");
    let status = |arguments: &[&str]| {
        let output = plain(&[&["status", run.run_dir.to_str().unwrap()], arguments].concat()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let lines: Vec<Value> = serde_json::from_str(&status(&["--json"])).unwrap();
    assert_eq!(lines[0]["computed"]["images"], images);
    let all = images + 5 * 8 * BATCH;
    assert!(status(&[]).contains(&format!("computed so far: {all} images, ")), "{}", status(&[]));
    let report = String::from_utf8(run.bytes("report.html")).unwrap();
    let without_spaces = report.replace('\u{202f}', "");
    assert!(without_spaces.contains(&format!(">{images}</td>")), "{report}");
}
