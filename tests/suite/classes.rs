//! Artefacts and exports carry the names of the classes, because other programs may number the same folders in another order.

use crate::drawn;
use crate::incubate::{Incubate, TINY};
use incubate::store::artefact;
use serde_json::{Value, json};
use std::path::Path;

/// Writes drawn images of a class for each name: four for training and four for evaluation.
pub fn draw(folder: &Path, names: &[&str]) {
    for (split, number) in [("train", 0), ("val", 9)] {
        for (class, name) in names.iter().enumerate() {
            let class_folder = folder.join(split).join(name);
            std::fs::create_dir_all(&class_folder).unwrap();
            for image in number..number + 4 {
                std::fs::write(class_folder.join(format!("{image}.jpg")), drawn::jpeg(class as u64, image, 20, 24))
                    .unwrap();
            }
        }
    }
}

/// A run whose meta model was trained on these classes for one epoch.
pub fn trained(names: &[&str]) -> Incubate {
    let tiny = TINY.replace("channels = 1", "channels = 3").replace("0.3", "0.3, 0.3, 0.3");
    let tiny = tiny.replace("format = \"shapes\"", "format = \"folder\"\npath = \"images\"").replace("= 512", "= 0");
    let tiny = tiny.replace("test_images = 128", "test_images = 0").replace("classes = 4", "classes = 3");
    let run = Incubate::with(&tiny).set("train.global_batch=4").set("meta.epochs=1");
    draw(&run.folder.path().join("images"), names);
    run.ok(&["meta"]);
    run
}

fn read(run: &Incubate, file: &str) -> Value {
    serde_json::from_slice(&run.bytes(&format!("export/meta/{file}"))).unwrap()
}

#[test]
fn exports_hold_the_names_of_the_classes_in_order() {
    let run = trained(&["1", "2", "10"]);
    // Classes are sorted as text; timm would sort them 1, 2, 10.
    let names = ["1", "10", "2"];
    let weights = run.file("meta.h5");
    assert_eq!(artefact::read(&weights).unwrap().header.class_names, names);
    run.ok(&[
        "export",
        "--weights",
        weights.to_str().unwrap(),
        "--format",
        "timm",
        "--format",
        "hf",
        "--format",
        "pth",
    ]);
    assert_eq!(run.bytes("export/meta/timm/class_map.txt"), b"1\n10\n2\n");
    let readme = String::from_utf8(run.bytes("export/meta/timm/README.md")).unwrap();
    assert!(readme.contains("--pretrained --class-map THIS_FOLDER/class_map.txt\n"), "{readme}");
    assert_eq!(read(&run, "timm/config.json")["label_names"], json!(names));
    let config = read(&run, "hf/config.json");
    assert_eq!(config["id2label"], json!({"0": "1", "1": "10", "2": "2"}));
    assert_eq!(config["label2id"], json!({"1": 0, "10": 1, "2": 2}));
    assert_eq!(read(&run, "pth/source.json")["classes"], json!(names));
}

#[test]
fn evaluate_refuses_data_whose_classes_are_not_the_artefacts() {
    let run = trained(&["cat", "dog", "eel"]);
    let weights = run.file("meta.h5");
    let evaluate = |images: &str| {
        let path = format!("data.path=\"{images}\"");
        run.incubate(&["evaluate", "--weights", weights.to_str().unwrap(), "--set", &path])
    };
    evaluate("images").ok();
    draw(&run.folder.path().join("others"), &["cat", "cow", "eel"]);
    evaluate("others").fails(2, &["meta.h5: class 1 is \"dog\" here, but \"cow\" in others"]);
    draw(&run.folder.path().join("fewer"), &["cat", "dog"]);
    evaluate("fewer").fails(2, &["class 2 is \"eel\" here, but none in fewer"]);
}

#[test]
fn artefacts_and_exports_of_data_without_class_names_have_none() {
    let run = Incubate::new().set("meta.epochs=1");
    run.ok(&["meta"]);
    let weights = run.file("meta.h5");
    assert!(artefact::read(&weights).unwrap().header.class_names.is_empty());
    // HDF5 writes the name of an attribute with a zero byte at its end.
    assert!(!run.bytes("meta.h5").windows(8).any(|bytes| bytes == b"classes\0"));
    run.ok(&["export", "--weights", weights.to_str().unwrap(), "--format", "timm", "--format", "hf"]);
    assert!(!run.file("export/meta/timm/class_map.txt").exists());
    assert!(!String::from_utf8(run.bytes("export/meta/timm/README.md")).unwrap().contains("--class-map"));
    assert!(read(&run, "timm/config.json").get("label_names").is_none());
    assert!(read(&run, "timm/source.json").get("classes").is_none());
    assert_eq!(read(&run, "hf/config.json")["id2label"]["3"], "LABEL_3");
}

#[test]
fn exporting_another_model_overwrites_no_export_of_the_final_model() {
    let run = Incubate::new().set("model.depths=[1, 1, 1, 1]").set("finetune.epochs=1").set("meta.epochs=1");
    run.ok(&["meta"]);
    // A copy of the meta model stands for the final model.
    let (meta, last) = (run.file("meta.h5"), run.file("final.h5"));
    std::fs::copy(&meta, &last).unwrap();
    run.ok(&["export", "--format", "pth"]);
    let before = run.bytes("export/pth/source.json");
    run.ok(&["export", "--format", "pth", "--weights", meta.to_str().unwrap()]);
    assert_eq!(run.bytes("export/pth/source.json"), before);
    assert!(read(&run, "pth/source.json")["file"].as_str().unwrap().ends_with("meta.h5"));
    run.ok(&["export", "--format", "pth", "--weights", last.to_str().unwrap()]);
    assert_eq!(run.bytes("export/pth/source.json"), before);
}
