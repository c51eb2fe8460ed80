//! Compares the figures of COCO and ADE20K with those of pycocotools and numpy (written by `tools/downstream_golden.py`).

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
        // pycocotools would take the size of the object from this box.
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

/// The twelve figures of changed golden files, which are written into a temporary folder.
fn figures_of(annotations: &Value, results: &Value, kind: &str) -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    let [truth, found] = ["annotations.json", "results.json"].map(|name| folder.path().join(name));
    // Python writes NaN, which is not JSON, so serde_json cannot write it. Until here a text stands for it.
    std::fs::write(&truth, annotations.to_string().replace("\"not a number\"", "NaN")).unwrap();
    std::fs::write(&found, results.to_string()).unwrap();
    let report: Value = serde_json::from_str(&coco(&truth, &found, &["--iou", kind, "--json"]).ok().out).unwrap();
    report["figures"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).collect()
}

fn entries<'a>(file: &'a mut Value, list: &str) -> &'a mut Vec<Value> {
    file[list].as_array_mut().unwrap()
}

#[test]
fn fields_that_no_figure_needs_may_hold_what_other_programs_write_there() {
    let folder = golden("coco");
    let expected = json(&folder.join("figures.json"));
    let boxes = json(&folder.join("bbox.json"));
    type Change = fn(&mut Value);
    let changes: [(&str, Change); 8] = [
        ("as CVAT writes", |file| {
            file["info"] = serde_json::json!({"year": "", "date_created": 5});
            file["licenses"] = Value::Null;
            entries(file, "images").iter_mut().for_each(|image| image["date_captured"] = 0.into());
        }),
        ("licences that are not numbers", |file| {
            entries(file, "images").iter_mut().for_each(|image| image["license"] = "not a number".into());
        }),
        ("no sizes", |file| entries(file, "images").iter_mut().for_each(|image| image["height"] = Value::Null)),
        ("flat polygons", |file| {
            for one in entries(file, "annotations") {
                one["segmentation"] = serde_json::json!([1, 2, 3, 4, 5, 6]);
            }
        }),
        ("text ids of annotations", |file| {
            entries(file, "annotations").iter_mut().for_each(|one| one["id"] = one["id"].to_string().into());
        }),
        ("flags", |file| {
            entries(file, "annotations").iter_mut().for_each(|one| one["iscrowd"] = (one["iscrowd"] == 1).into());
        }),
        ("a category twice", |file| {
            let category = entries(file, "categories")[0].clone();
            entries(file, "categories").push(category);
        }),
        ("categories of pandas", |file| {
            for one in entries(file, "annotations") {
                one["category_id"] = one["category_id"].as_f64().unwrap().into();
            }
        }),
    ];
    let theirs: Vec<f64> = serde_json::from_value(expected["bbox"].clone()).unwrap();
    for (name, change) in changes {
        let mut annotations = json(&folder.join("annotations.json"));
        change(&mut annotations);
        let ours = figures_of(&annotations, &boxes, "bbox");
        assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-9), "{name}: {ours:?} and {theirs:?}");
    }
    // The text ids of images sort in the order of their numbers, so that detections with equal scores keep their order.
    let mut annotations = json(&folder.join("annotations.json"));
    let mut results = boxes;
    let text = |id: &Value| Value::from(format!("image {:06}", id.as_u64().unwrap()));
    entries(&mut annotations, "images").iter_mut().for_each(|image| image["id"] = text(&image["id"]));
    let objects = entries(&mut annotations, "annotations").iter_mut().chain(results.as_array_mut().unwrap());
    objects.for_each(|one| one["image_id"] = text(&one["image_id"]));
    let ours = figures_of(&annotations, &results, "bbox");
    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-9), "{ours:?} and {theirs:?}");
}

#[test]
fn an_entry_that_cannot_be_evaluated_is_refused_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let [truth, found] = ["annotations.json", "results.json"].map(|name| folder.path().join(name));
    type Change = fn(&mut Value, &mut Value);
    let changes: [(&str, Change, &[&str]); 14] = [
        (
            "bbox",
            |file, _| drop(file.as_object_mut().unwrap().remove("categories")),
            &["annotations.json", "`categories`"],
        ),
        ("bbox", |file, _| file["categories"] = serde_json::json!([]), &["annotations.json", "`categories`"]),
        ("bbox", |file, _| drop(file.as_object_mut().unwrap().remove("annotations")), &["no list `annotations`"]),
        (
            "bbox",
            |file, _| drop(entries(file, "annotations")[3].as_object_mut().unwrap().remove("bbox")),
            &["annotations.json: entry 3 (from 0) of `annotations` has no bbox"],
        ),
        (
            "bbox",
            |file, _| drop(entries(file, "annotations")[4].as_object_mut().unwrap().remove("id")),
            &["entry 4 (from 0) of `annotations` has no id"],
        ),
        ("segm", |file, _| entries(file, "annotations")[1]["area"] = Value::Null, &["entry 1 (from 0)", "has no area"]),
        (
            "bbox",
            |file, _| entries(file, "annotations")[1]["id"] = entries(file, "annotations")[0]["id"].clone(),
            &["entry 1 (from 0)", "of an earlier annotation"],
        ),
        ("bbox", |file, _| entries(file, "annotations")[0]["id"] = 0.into(), &["entry 0", "the id 0", "count from 1"]),
        (
            "segm",
            |file, _| entries(file, "annotations")[2]["segmentation"] = serde_json::json!([1, 2, 3, 4, 5, 6]),
            &["entry 2 (from 0)", "segmentation that is not a list of polygons"],
        ),
        ("bbox", |file, _| entries(file, "images")[0]["id"] = "a".into(), &["annotations.json", "numbers alone"]),
        (
            "bbox",
            |_, found| found.as_array_mut().unwrap().iter_mut().for_each(|one| one["bbox"] = Value::Null),
            &["results.json: entry 0 (from 0) has no bbox"],
        ),
        ("bbox", |_, found| found[2]["bbox"] = serde_json::json!([1, 2, 3]), &["entry 2 (from 0)", "not four numbers"]),
        ("bbox", |_, found| found[5]["score"] = "0.5".into(), &["entry 5 (from 0)", "score that is not a number"]),
        (
            "segm",
            |_, found| found[1]["segmentation"] = Value::Null,
            &["results.json: entry 1 (from 0) has no segmentation"],
        ),
    ];
    for (kind, change, words) in changes {
        let mut annotations = json(&golden("coco/annotations.json"));
        let mut results = json(&golden("coco").join(format!("{kind}.json")));
        change(&mut annotations, &mut results);
        std::fs::write(&truth, annotations.to_string()).unwrap();
        std::fs::write(&found, results.to_string()).unwrap();
        coco(&truth, &found, &["--iou", kind]).fails(2, words);
    }
    coco(&found, &truth, &[]).fails(2, &["results.json", "annotations are an object"]);
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
        ("{\"images\": []}", ["results.json", "a list of detections"]),
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

/// Writes a PNG in which every channel of every pixel has this value.
fn flat_png(path: &Path, width: u32, height: u32, color: png::ColorType, value: u8) {
    let mut encoder = png::Encoder::new(std::fs::File::create(path).unwrap(), width, height);
    encoder.set_color(color);
    let pixels = vec![value; (width * height) as usize * color.samples()];
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
}

#[test]
fn palette_images_of_few_bits_and_endings_in_capitals_are_label_maps() {
    let folder = tempfile::tempdir().unwrap();
    let [labels, predictions] = ["labels", "predictions"].map(|name| folder.path().join(name));
    [&labels, &predictions].iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
    let write = |path: &Path, color: png::ColorType, depth: png::BitDepth, lines: &[u8]| {
        // A line has five pixels, so it ends within a byte.
        let mut encoder = png::Encoder::new(std::fs::File::create(path).unwrap(), 5, 2);
        encoder.set_color(color);
        encoder.set_depth(depth);
        if color == png::ColorType::Indexed {
            encoder.set_palette(vec![9; 3 * 16]);
        }
        encoder.write_header().unwrap().write_image_data(lines).unwrap();
    };
    use png::BitDepth::{Eight, Four, One, Two};
    use png::ColorType::{Grayscale, Indexed};
    write(&labels.join("a.png"), Indexed, One, &[0b1011_0000, 0b1110_1000]);
    write(&predictions.join("a.png"), Grayscale, Eight, &[1, 0, 1, 1, 0, 1, 1, 1, 0, 1]);
    write(&labels.join("b.PNG"), Indexed, Two, &[0b0111_1001, 0b0100_0000, 0, 0b1100_0000]);
    write(&predictions.join("b.png"), Grayscale, Eight, &[1, 3, 2, 1, 1, 0, 0, 0, 0, 3]);
    write(&labels.join("c.png"), Indexed, Four, &[0x1f, 0x23, 0x40, 0x56, 0x78, 0x90]);
    write(&predictions.join("c.PNG"), Grayscale, Eight, &[1, 15, 2, 3, 4, 5, 6, 7, 8, 9]);
    std::fs::write(labels.join("._c.png"), "of another system").unwrap();
    let out = ade20k(&labels, &predictions, &["--json"]).ok().out;
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&report["images"], &report["pixels"], &report["aAcc"]),
        (&3.into(), &23.into(), &100.0.into()),
        "{report}"
    );
    // Grey values of fewer bits than 8 are refused, because programs differ in whether they scale them.
    write(&labels.join("a.png"), Grayscale, One, &[0b1011_0000, 0b1110_1000]);
    ade20k(&labels, &predictions, &[]).fails(2, &["a.png", "Grayscale of 1 bits", "or a palette"]);
}

#[test]
fn label_maps_that_are_malformed_of_another_size_or_hold_an_unknown_class_are_named() {
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
    let intact = std::fs::read(labels.join("a.png")).unwrap();
    for length in [0, 20, 45, intact.len() - 15] {
        std::fs::write(&prediction, &intact[..length]).unwrap();
        refused(&["predictions/a.png", "not a readable PNG"]);
    }
    // The header claims a size that the file does not have, such as 1000 × (2³¹ − 1) pixels. No memory may be allocated for it. The
    // header has a checksum, which must be right.
    for (claimed, words) in [([1000, 3], "1000×3 pixels"), ([1000, 0x7fff_ffff], "at most 67108864")] {
        let mut bomb = intact.clone();
        bomb[16..24].copy_from_slice(&claimed.map(u32::to_be_bytes).concat());
        let sum = !bomb[12..29].iter().fold(!0u32, |sum, &byte| {
            (0..8).fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(sum & 1)))
        });
        bomb[29..33].copy_from_slice(&sum.to_be_bytes());
        std::fs::write(&prediction, &bomb).unwrap();
        refused(&["predictions/a.png", words]);
    }
    // With --zero-based, class 7 of the labels is predicted as 6.
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
        let error = format!("{name}/{config} is missing: write it with incubate export CONFIG --format {name}\n");
        assert!(refused.code == Some(2) && refused.err.ends_with(&error), "{}", refused.err);
        assert_eq!(refused.err.lines().count(), 1);
        let exported = folder.path().join("export").join(name);
        std::fs::create_dir_all(&exported).unwrap();
        std::fs::write(exported.join(config), "").unwrap();
        assert!(run().ok().out.starts_with("srun --cpus-per-task=7 python tools/"), "{name}");
    }
}
