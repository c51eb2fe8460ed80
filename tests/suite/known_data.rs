//! A run knows its data: images that come or go, and classes with other names, are refused in every later phase.

use crate::classes::{draw, trained};
use crate::incubate::Incubate;
use incubate::store::artefact;
use std::fs;

fn accepted(run: &Incubate, file: &str) -> Vec<String> {
    artefact::read(&run.file(file)).unwrap().header.data.unwrap().accepted
}

#[test]
fn other_images_or_class_names_are_refused_until_they_are_accepted() {
    let run = trained(&["cat", "dog", "eel"]);
    let images = run.folder.path().join("images");
    let meta = artefact::read(&run.file("meta.h5")).unwrap().header.data.unwrap();
    assert_eq!((meta.train_images, meta.evaluation_images, meta.accepted.len()), (12, 12, 0));
    let refuses = |words: &[&str]| {
        for command in [&["meta"][..], &["module", "--index", "1"], &["assemble"], &["submit", "--dry-run"], &["run"]] {
            run.incubate(command).fails(2, words);
        }
    };

    let [dog, doe] = ["dog", "doe"].map(|name| ["train", "val"].map(|split| images.join(split).join(name)));
    let rename = |from: &[_; 2], to: &[_; 2]| from.iter().zip(to).for_each(|(from, to)| fs::rename(from, to).unwrap());
    rename(&dog, &doe);
    refuses(&["class 1 was \"dog\" and is \"doe\"", "--run-dir", "--accept-data"]);
    rename(&doe, &dog);
    let (one, moved) = (dog[1].join("9.jpg"), dog[1].join("8.jpg"));
    fs::rename(&one, &moved).unwrap();
    run.incubate(&["module"]).fails(2, &["names or labels of the 12 evaluation images have changed"]);
    fs::rename(&moved, &one).unwrap();
    // The images may have another path.
    let elsewhere = run.folder.path().join("elsewhere");
    fs::rename(&images, &elsewhere).unwrap();
    run.ok(&["module", "--index", "0", "--set", "data.path=elsewhere/"]);
    fs::rename(&elsewhere, &images).unwrap();

    fs::copy(dog[0].join("0.jpg"), dog[0].join("new.jpg")).unwrap();
    refuses(&["1 more training images (12 before, 13 now)", "--accept-data"]);
    run.ok(&["submit", "--dry-run", "--accept-data"]);
    refuses(&["1 more training images"]);
    run.ok(&["module", "--index", "1", "--accept-data"]);
    run.ok(&["run"]);
    assert!(accepted(&run, "meta.h5").is_empty() && accepted(&run, "module-0.h5").is_empty());
    for file in ["module-1.h5", "assembled.h5", "final.h5"] {
        assert_eq!(accepted(&run, file), ["1 more training images (12 before, 13 now)"], "{file}");
    }
}

#[test]
fn a_module_of_other_data_is_stale_and_a_run_without_a_record_goes_on() {
    let run = trained(&["cat", "dog", "eel"]);
    let other = run.fork(&["config.toml", "meta.h5"]);
    draw(&other.folder.path().join("images"), &["cat", "cow", "eel"]);
    // The fork has no record of its data yet, so it records the data that it finds.
    fs::remove_file(other.file("meta.h5")).unwrap();
    other.ok(&["meta"]);
    fs::copy(run.file("meta.h5"), other.file("meta.h5")).unwrap();
    other.incubate(&["module", "--index", "0"]).fails(3, &["meta.h5", "was trained on other data", "--accept-data"]);
    other.ok(&["module", "--index", "0", "--accept-data"]);
    assert_eq!(accepted(&other, "module-0.h5"), ["meta.h5 was trained on 12 images of another listing"]);

    fs::copy(other.file("module-0.h5"), run.file("module-0.h5")).unwrap();
    run.incubate(&["module", "--index", "0"]).fails(3, &["module-0.h5", "was trained on other data"]);
    fs::remove_file(run.file("module-0.h5")).unwrap();
    fs::write(run.file("dataset.json"), "{").unwrap();
    run.incubate(&["module", "--index", "0"]).fails(3, &["dataset.json", "delete it to go on with the present data"]);
    fs::remove_file(run.file("dataset.json")).unwrap();
    run.ok(&["module", "--index", "0"]);
    assert!(run.file("dataset.json").exists());
}
