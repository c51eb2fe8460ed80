//! `incubate detect` as a user runs it, on drawn images and on a small folder of COCO's layout.

use crate::images::png;
use crate::incubate::Incubate;
use incubate::store::artefact;
use serde_json::{Value, json};
use std::path::Path;

const DETECTION: &str = r#"
[detect]
epochs = 4
global_batch = 4
base_lr = 0.05
drop_path = 0.0
warmup_epochs = 0
eval_epochs = 2
[detection]
format = "shapes"
train_images = 8
test_images = 3
classes = 3
crop = 64
resize = [0.5, 1.5]
width = 8
hidden = 16
regions = 16
"#;

/// A tiny run whose detection has drawn images.
fn tiny() -> Incubate {
    Incubate::of_thin_stages_with(DETECTION)
}

/// The files of a run from which a detection of its final model can start.
const FILES: [&str; 2] = ["meta.h5", "final.h5"];

/// A run directory in which everything before the detection is done.
fn fine_tuned() -> Incubate {
    tiny().fine_tuned()
}

#[test]
fn a_run_with_annotated_objects_ends_with_a_detection_that_status_summary_and_report_show() {
    let run = tiny();
    let models: Value = serde_json::from_str(&run.ok(&["run", "--json"]).out).unwrap();
    let row = models["models"].as_array().unwrap().iter().find(|row| row["model"] == "detection").unwrap();
    let (header, _) = artefact::read_header(&run.file("detect.h5")).unwrap();
    assert_eq!((row["box_ap"].as_f64().unwrap(), 3.0), (header.metrics["box_ap"], header.metrics["images"]));
    assert_eq!(header.meta, Some(artefact::read_header(&run.file("final.h5")).unwrap().1), "it derives from final.h5");
    let evaluated = run.ok(&["evaluate", "--weights", run.file("detect.h5").to_str().unwrap(), "--json"]).out;
    let mut evaluated: Value = serde_json::from_str(&evaluated).unwrap();
    let classes = evaluated.as_object_mut().unwrap().remove("classes").unwrap();
    assert_eq!(evaluated, serde_json::to_value(&header.metrics).unwrap());
    assert!(classes.as_array().unwrap().len() == 3 && row["classes"] == classes, "{row}");
    let summary = run.ok(&["run"]);
    assert!(summary.out.contains("detect.h5") && summary.err.contains("detect: done already"), "{}", summary.out);
    let status = crate::incubate::plain(&["status", run.run_dir.to_str().unwrap()]).output().unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.lines().any(|line| line.starts_with("detect ") && line.contains("done")), "{status}");
    let page = String::from_utf8(run.bytes("report.html")).unwrap();
    assert!(page.contains("<h2>Detection</h2>") && page.contains("annotated ones at the right"));
    assert_eq!(page.matches("<img src=\"data:image/png;base64,iVBOR").count(), 3, "a picture of each test image");
    run.incubate(&["export", "--weights", run.file("detect.h5").to_str().unwrap()])
        .fails(2, &["detect.h5", "final.h5"]);
    run.incubate(&["detect", "--set", "detection.width=4"]).fails(2, &["detection.width (8 there, 4 here)"]);
}

#[test]
fn a_detection_that_is_killed_and_resumed_has_the_bits_of_an_uninterrupted_one() {
    let run = fine_tuned().set("detect.epochs=8").set("detect.eval_epochs=0").set("run.checkpoint_every=2 steps");
    let (run, interrupted) = (run.fork(&FILES), run.fork(&FILES));
    run.ok(&["detect"]);
    interrupted.ok_after_two_kills("detect");
    assert!(run.bytes("detect.h5") == interrupted.bytes("detect.h5"));
}

#[test]
fn a_detection_takes_images_one_by_one_and_other_phases_do_not() {
    let run = fine_tuned().set("run.micro_batch=1").set("detect.epochs=1");
    let (one, two) = (run.fork(&FILES), run.fork(&FILES));
    one.ok(&["detect"]);
    two.mpirun(2, &["detect"]).ok();
    let (one, two) = (one.losses("detect"), two.losses("detect"));
    assert!(one.len() == 2 && one.iter().zip(&two).all(|(a, b)| (a - b).abs() < 1e-3 * a), "{one:?} and {two:?}");
    let words = ["run.micro_batch = 1", "meta needs at least 2", "incubate detect CONFIG"];
    for command in [&["run"][..], &["meta"], &["plan"], &["submit", "--dry-run"]] {
        run.incubate(command).fails(2, &words);
    }
    run.set("segmentation.format=shapes")
        .set("segmentation.train_images=4")
        .set("segmentation.test_images=2")
        .set("segmentation.crop=32")
        .set("segment.global_batch=4")
        .incubate(&["segment"])
        .fails(2, &["run.micro_batch = 1", "segment needs at least 2"]);
}

#[test]
fn ranks_and_replicas_give_the_losses_and_the_figures_of_one_replica_at_the_same_micro_batch() {
    let run = fine_tuned().set("run.micro_batch=2").set("detect.global_batch=8");
    let (one, four) = (run.fork(&FILES), run.set("run.replicas=2").fork(&FILES));
    one.ok(&["detect"]);
    four.mpirun(2, &["detect"]).ok();
    let (alone, together) = (one.losses("detect"), four.losses("detect"));
    assert_eq!(alone.len(), 4);
    assert!(alone.iter().zip(&together).all(|(a, b)| (a - b).abs() < 1e-3 * a), "{alone:?} and {together:?}");
    // One run is evaluated by one replica, the other by four. Both count each image once.
    let [of_one, of_four] =
        [&one, &four].map(|run| artefact::read_header(&run.file("detect.h5")).unwrap().0.metrics["images"]);
    assert_eq!((of_one, of_four), (3.0, 3.0));
}

/// A folder of COCO's layout. Each image has 60×40 pixels and a red box, at another place in each image. The training images also
/// have a crowd. The categories have the ids 90, 3 and 17.
fn coco(folder: &Path) {
    for (split, count) in [("train2017", 6), ("val2017", 2)] {
        let (mut images, mut objects) = (Vec::new(), Vec::new());
        for number in 0..count {
            let (left, top) = (5 + 5 * number, 4 + 2 * number);
            let is_inside = |x: usize, y: usize| (left..left + 20).contains(&x) && (top..top + 16).contains(&y);
            let at = |i: usize| if is_inside(i % 60, i / 60) { [220, 30, 30] } else { [40, 90, 120] };
            let pixels: Vec<u8> = (0..60 * 40).flat_map(at).collect();
            let id = 100 + 7 * number;
            png(&folder.join(split).join(format!("{id}.png")), png::ColorType::Rgb, [60, 40], &pixels);
            images.push(json!({"id": id, "file_name": format!("{id}.png"), "width": 60, "height": 40}));
            let (right, bottom) = (left + 20, top + 16);
            objects.push(json!({"id": 10 * number + 1, "image_id": id, "category_id": 17, "iscrowd": 0, "area": 320,
                "bbox": [left, top, 20, 16], "segmentation": [[left, top, right, top, right, bottom, left, bottom]]}));
            if split == "train2017" {
                objects.push(json!({"id": 10 * number + 2, "image_id": id, "category_id": 3, "iscrowd": 1, "area": 5,
                    "bbox": [0, 0, 1, 5], "segmentation": {"size": [40, 60], "counts": [0, 5, 2395]}}));
            }
        }
        let categories =
            json!([{"id": 90, "name": "far"}, {"id": 3, "name": "near"}, {"id": 17, "name": "red & square"}]);
        let all = json!({"images": images, "annotations": objects, "categories": categories});
        std::fs::create_dir_all(folder.join("annotations")).unwrap();
        std::fs::write(folder.join(format!("annotations/instances_{split}.json")), all.to_string()).unwrap();
    }
}

/// A fine-tuned run with the folder `coco` beside its config.
fn with_coco() -> Incubate {
    let run = fine_tuned();
    let sets = ["detection.format=coco", "detection.path=coco", "detect.epochs=12", "detect.eval_epochs=0"];
    let run = sets.into_iter().fold(run, |run, set| run.set(set)).fork(&FILES);
    coco(&run.folder.path().join("coco"));
    run
}

#[test]
fn a_detector_of_cocos_layout_writes_results_with_cocos_ids_and_marks_objects_in_pictures() {
    let run = with_coco();
    run.ok(&["detect"]);
    assert!(!run.file("dataset.json").exists() && run.file("dataset-detection.json").exists());
    let results = run.folder.path().join("results.json");
    let detector = run.file("detect.h5");
    let weights = ["--weights", detector.to_str().unwrap()];
    let evaluated =
        run.ok(&[&["evaluate", "--json", "--outputs", results.to_str().unwrap()][..], &weights].concat()).out;
    let evaluated: Value = serde_json::from_str(&evaluated).unwrap();
    assert_eq!(evaluated["classes"][1]["name"], "red & square");
    let entries: Vec<Value> = serde_json::from_slice(&std::fs::read(&results).unwrap()).unwrap();
    assert!(!entries.is_empty(), "it has learned nothing");
    for entry in &entries {
        assert!([100, 107].contains(&entry["image_id"].as_i64().unwrap()), "{entry}");
        assert!([3, 17, 90].contains(&entry["category_id"].as_i64().unwrap()), "{entry}");
        assert_eq!(entry["segmentation"]["size"], json!([40, 60]));
    }
    // `incubate evaluate coco` reads the results file and gives the same figures.
    let annotations = run.folder.path().join("coco/annotations/instances_val2017.json");
    for (iou, key) in [("bbox", "box_ap"), ("segm", "mask_ap")] {
        let files = ["--annotations", annotations.to_str().unwrap(), "--results", results.to_str().unwrap()];
        let out = crate::incubate::plain(&[&["evaluate", "coco", "--json", "--iou", iou][..], &files].concat())
            .output()
            .unwrap();
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        let ap = 100.0 * report["figures"]["AP"].as_f64().unwrap();
        assert!((ap - evaluated[key].as_f64().unwrap()).abs() < 1e-9, "{iou}: {ap} and {}", evaluated[key]);
    }
    let table = run.ok(&[&["evaluate"][..], &weights].concat()).out;
    assert!(table.lines().any(|line| line.starts_with("red & square ")), "{table}");
    let photo = run.folder.path().join("coco/val2017/100.png");
    let seen = run.ok(&[&["predict", photo.to_str().unwrap(), "--json"][..], &weights].concat()).out;
    let seen: Vec<Value> = serde_json::from_str(&seen).unwrap();
    for object in seen[0]["classes"].as_array().unwrap() {
        assert!(["near", "red & square", "far"].contains(&object["name"].as_str().unwrap()), "{object}");
        assert!(object["percent"].as_f64().unwrap() >= 50.0 && object["bbox"].as_array().unwrap().len() == 4);
    }
    assert!(run.file("predictions/100.png").exists());
}

#[test]
fn bad_annotations_end_in_one_error_with_the_file_and_the_cure() {
    let run = with_coco();
    let folder = run.folder.path().join("coco");
    let detect = |sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        run.incubate(&[&["detect"][..], &sets.collect::<Vec<_>>()].concat())
    };
    detect(&["detection.classes=80"]).fails(2, &["detection.classes = 80", "3"]);
    detect(&["detection.crop=40"]).fails(2, &["detection.crop = 40", "try 48"]);
    std::fs::rename(folder.join("annotations"), folder.join("away")).unwrap();
    detect(&[]).fails(2, &["annotations/instances_train2017.json", "is missing"]);
    std::fs::rename(folder.join("away"), folder.join("annotations")).unwrap();
    let file = folder.join("annotations/instances_train2017.json");
    let good = std::fs::read_to_string(&file).unwrap();
    for (from, to, words) in [
        ("\"category_id\":17", "\"category_id\":18", &["instances_train2017.json", "category_id 18"][..]),
        ("\"bbox\":[5,4,20,16]", "\"bbox\":[5,4,20]", &["instances_train2017.json", "bbox"]),
        ("}", "", &["instances_train2017.json"]),
    ] {
        assert!(good.contains(from));
        std::fs::write(&file, good.replacen(from, to, 1)).unwrap();
        detect(&[]).fails(2, words);
    }
    std::fs::write(&file, &good).unwrap();
    std::fs::rename(folder.join("train2017/100.png"), folder.join("away.png")).unwrap();
    detect(&[]).fails(2, &["train2017/100.png"]);
    std::fs::rename(folder.join("away.png"), folder.join("train2017/100.png")).unwrap();
    detect(&["detect.epochs=1"]).ok();
    // Other annotations of the same images are noticed.
    std::fs::write(&file, good.replace("\"bbox\":[5,4,20,16]", "\"bbox\":[5,4,20,15]")).unwrap();
    run.incubate(&["detect-e2e"]).fails(2, &["--accept-data"]);
}
