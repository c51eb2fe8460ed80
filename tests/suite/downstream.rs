//! COCO's and ADE20K's figures against pycocotools and numpy, through what `tools/downstream_golden.py` wrote with them.

use crate::incubate::{Ended, ended, plain};
use incubate::error::exit_code;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn coco(annotations: &Path, results: &Path, more: &[&str]) -> Ended {
    let mut command = plain(&["evaluate", "coco"]);
    command.arg("--annotations").arg(annotations).arg("--results").arg(results).args(more);
    ended(command.output().unwrap())
}

fn ade20k(labels: &Path, predictions: &Path, more: &[&str]) -> Ended {
    let mut command = plain(&["evaluate", "ade20k"]);
    command.arg("--labels").arg(labels).arg("--predictions").arg(predictions).args(more);
    ended(command.output().unwrap())
}

#[test]
fn all_twelve_figures_of_coco_are_pycocotools() {
    let folder = golden("coco");
    let expected = json(&folder.join("figures.json"));
    for kind in ["bbox", "segm"] {
        let results = folder.join(format!("{kind}.json"));
        let out = coco(&folder.join("annotations.json"), &results, &["--iou", kind, "--json"]).ok().out;
        let report: Value = serde_json::from_str(&out).unwrap();
        let ours: Vec<f64> = report["figures"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).collect();
        let theirs: Vec<f64> = serde_json::from_value(expected[kind].clone()).unwrap();
        assert_eq!((ours.len(), theirs.len()), (12, 12));
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert!((ours - theirs).abs() < 1e-9, "{kind}: {ours} and {theirs} in {report}");
        }
        let aps: Vec<f64> = report["categories"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["ap"].as_f64().unwrap())
            .filter(|&ap| ap >= 0.0)
            .collect();
        let mean = aps.iter().sum::<f64>() / aps.len() as f64;
        assert!((mean - theirs[0]).abs() < 1e-9, "AP is the mean of the categories': {mean}");
    }
}

#[test]
fn masks_that_come_with_boxes_are_evaluated_without_them_as_the_frameworks_do() {
    let folder = golden("coco");
    let mut results = json(&folder.join("segm.json"));
    for one in results.as_array_mut().unwrap() {
        // pycocotools would take the size of the object from it.
        one["bbox"] = serde_json::json!([0, 0, 300, 200]);
    }
    let both = tempfile::tempdir().unwrap();
    let both = both.path().join("both.json");
    std::fs::write(&both, results.to_string()).unwrap();
    let out = coco(&folder.join("annotations.json"), &both, &["--iou", "segm", "--json"]).ok().out;
    let report: Value = serde_json::from_str(&out).unwrap();
    let ours: Vec<f64> = report["figures"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).collect();
    let theirs: Vec<f64> = serde_json::from_value(json(&folder.join("figures.json"))["segm"].clone()).unwrap();
    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-9), "{ours:?} and {theirs:?}");
}

#[test]
fn results_that_do_not_belong_to_the_annotations_are_refused() {
    let annotations = golden("coco/annotations.json");
    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("results.json");
    for (text, words) in [
        (
            "[{\"image_id\": 9, \"category_id\": 1, \"bbox\": [1, 2, 3, 4], \"score\": 0.5}]",
            ["results.json", "image_id 9"],
        ),
        (
            "[{\"image_id\": 10, \"category_id\": 2, \"bbox\": [1, 2, 3, 4], \"score\": 0.5}]",
            ["results.json", "category_id 2"],
        ),
        ("[{\"image_id\": 10, ", ["results.json", "EOF"]),
        (
            "[{\"image_id\": 10, \"category_id\": 1, \"bbox\": [1, 2, 3, 4]}]",
            ["results.json", "entry 0 (from 0) has no score"],
        ),
        ("{\"images\": []}", ["results.json", "expected a sequence"]),
    ] {
        std::fs::write(&results, text).unwrap();
        coco(&annotations, &results, &[]).fails(2, &words);
    }
    coco(&annotations, Path::new("nowhere.json"), &[]).fails(2, &["nowhere.json"]);
}

#[test]
fn ade20ks_figures_are_those_of_a_plain_numpy_computation() {
    let folder = golden("ade20k");
    let expected = json(&folder.join("figures.json"));
    let out = ade20k(&folder.join("labels"), &folder.join("predictions"), &["--json"]).ok().out;
    let report: Value = serde_json::from_str(&out).unwrap();
    for name in ["aAcc", "mIoU", "mAcc", "mIoU150", "mAcc150"] {
        let (ours, theirs) = (report[name].as_f64().unwrap(), expected[name].as_f64().unwrap());
        assert!((ours - theirs).abs() < 1e-9, "{name}: {ours} and {theirs}");
    }
    for (class, theirs) in report["classes"].as_array().unwrap().iter().zip(expected["iou"].as_array().unwrap()) {
        match theirs.as_f64() {
            Some(theirs) => assert!((class["iou"].as_f64().unwrap() - theirs).abs() < 1e-9, "{class}"),
            None => assert!(class["iou"].is_null(), "{class}"),
        }
    }
}

/// Writes a grey PNG whose pixels all have this value.
fn flat_png(path: &Path, width: u32, height: u32, color: png::ColorType, value: u8) {
    let mut encoder = png::Encoder::new(std::fs::File::create(path).unwrap(), width, height);
    encoder.set_color(color);
    let pixels = vec![value; (width * height) as usize * color.samples()];
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
}

#[test]
fn label_maps_that_are_malformed_of_another_size_or_hold_no_class_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let [labels, predictions] = ["labels", "predictions"].map(|name| folder.path().join(name));
    [&labels, &predictions].iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
    let refused = |words: &[&str]| {
        let error = incubate::downstream::ade20k::evaluate(&labels, &predictions, false).unwrap_err();
        assert_eq!(exit_code(&error), 2);
        words.iter().for_each(|word| assert!(format!("{error:#}").contains(word), "{word:?} in {error:#}"));
    };
    refused(&["labels", "no .png"]);
    flat_png(&labels.join("a.png"), 4, 3, png::ColorType::Grayscale, 7);
    refused(&["predictions/a.png", "No such file"]);
    let prediction = predictions.join("a.png");
    for (width, color, value, words) in [
        (3, png::ColorType::Grayscale, 7, ["predictions/a.png", "3×3 pixels"]),
        (4, png::ColorType::Grayscale, 200, ["class 200 at row 0, column 0", "end at 150"]),
        (4, png::ColorType::Rgb, 7, ["predictions/a.png", "one channel"]),
    ] {
        flat_png(&prediction, width, 3, color, value);
        refused(&words);
    }
    ade20k(&labels, &predictions, &[]).fails(2, &["predictions/a.png", "one channel"]);
    let whole = std::fs::read(labels.join("a.png")).unwrap();
    for length in [0, 20, 45, whole.len() - 15] {
        std::fs::write(&prediction, &whole[..length]).unwrap();
        refused(&["predictions/a.png", "not a readable PNG"]);
    }
    // Sizes that are only claimed take no memory: width 1000, height 2³¹ − 1, with the checksum of the PNG's header.
    for (claimed, words) in [([1000, 3], "1000×3 pixels"), ([1000, 0x7fff_ffff], "at most 67108864")] {
        let mut bomb = whole.clone();
        bomb[16..24].copy_from_slice(&claimed.map(u32::to_be_bytes).concat());
        let sum = !bomb[12..29].iter().fold(!0u32, |sum, &byte| {
            (0..8).fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(sum & 1)))
        });
        bomb[29..33].copy_from_slice(&sum.to_be_bytes());
        std::fs::write(&prediction, &bomb).unwrap();
        refused(&["predictions/a.png", words]);
    }
    // Numbered from 0, class 7 of the labels is 6.
    flat_png(&prediction, 4, 3, png::ColorType::Grayscale, 6);
    let out = ade20k(&labels, &predictions, &["--zero-based", "--json"]).ok().out;
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["mIoU"], 100.0);
}

#[test]
fn pictures_are_drawn_on_request_and_tables_printed_for_people() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("a.svg");
    let drawn = || {
        let text = std::fs::read_to_string(&picture).unwrap();
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"));
        text
    };
    let plot = ["--plot", picture.to_str().unwrap()];
    let out = coco(&golden("coco/annotations.json"), &golden("coco/bbox.json"), &plot).ok().out;
    assert!(out.contains("AP50") && out.contains("thing 3"), "{out}");
    assert_eq!(drawn().matches("stroke-width=\"3\"").count(), 10, "a curve for each IoU threshold");
    let out = ade20k(&golden("ade20k/labels"), &golden("ade20k/predictions"), &plot).ok().out;
    assert!(out.contains("mIoU") && out.contains("CSAIL"), "{out}");
    assert!(drawn().matches("<rect").count() > 20);
}

#[test]
fn downstream_scripts_name_the_export_that_is_missing_and_pass_their_cores_on() {
    let folder = tempfile::tempdir().unwrap();
    let srun = folder.path().join("srun");
    std::fs::write(&srun, "#!/bin/sh\necho srun \"$@\"\n").unwrap();
    std::fs::set_permissions(&srun, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    for (name, config) in [("detectron2", "mask_rcnn_1x.py"), ("mmdet", "mask_rcnn_1x.py"), ("mmseg", "upernet_80k.py")]
    {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("slurm/downstream/{name}.sbatch"));
        let run = || {
            let mut command = std::process::Command::new("bash");
            command.arg(&script).arg(folder.path().join("export")).env("PATH", &path).env("SLURM_CPUS_PER_TASK", "7");
            for clone in ["DETECTRON2", "MMDETECTION", "MMSEGMENTATION"] {
                command.env(clone, folder.path());
            }
            ended(command.output().unwrap())
        };
        let refused = run();
        let told = format!("{name}/{config} is missing: write it with incubate export CONFIG --format {name}\n");
        assert!(refused.code == Some(2) && refused.err.ends_with(&told), "{}", refused.err);
        assert_eq!(refused.err.lines().count(), 1);
        let exported = folder.path().join("export").join(name);
        std::fs::create_dir_all(&exported).unwrap();
        std::fs::write(exported.join(config), "").unwrap();
        assert!(run().ok().out.starts_with("srun --cpus-per-task=7 python tools/"), "{name}");
    }
}
