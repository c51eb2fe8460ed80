use super::*;
use serde_json::{Value, json};

/// Two images with four objects of three categories, whose ids have gaps and are not sorted.
fn dataset() -> Value {
    let object = |image_id: u32, category_id: u32, segmentation: Value| {
        json!({"image_id": image_id, "category_id": category_id, "bbox": [1, 2.5, 3, 4], "area": 6.5, "iscrowd": 0,
               "segmentation": segmentation, "attributes": {"of": ["another", "program"]}})
    };
    let mut crowd = object(7, 90, json!({"size": [4, 5], "counts": [3, 4, 13]}));
    crowd["iscrowd"] = json!(1);
    json!({
        "info": null,
        "images": [{"id": 9, "file_name": "b.jpg", "width": 40, "height": 30, "license": "any"},
                   {"id": 7, "file_name": "a.jpg", "width": 5, "height": 4}],
        "annotations": [
            object(9, 90, json!([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]])),
            crowd,
            object(7, 1, json!([[1, 2, 3, 4, 5]])),
            object(7, 13, json!([[0.5, 1, 2, 1, 2, 3]])),
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13}],
    })
}

fn read_value(dataset: &Value, purpose: Purpose, masks: bool) -> Result<Annotations, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("instances.json");
    std::fs::write(&file, dataset.to_string().replace("\"not a number\"", "NaN")).unwrap();
    read(&file, purpose, masks).map_err(|error| error.to_string())
}

/// The class and the outline of each object of each image.
fn outlines(purpose: Purpose, masks: bool) -> Vec<Vec<(usize, Outline)>> {
    let images = read_value(&dataset(), purpose, masks).unwrap().images;
    let objects = images.into_iter().map(|image| image.scene.objects);
    objects.map(|objects| objects.into_iter().map(|object| (object.class, object.outline)).collect()).collect()
}

#[test]
fn classes_are_ranks_of_ids_and_images_are_in_the_order_of_theirs() {
    let Annotations { categories, images } = read_value(&dataset(), Purpose::Evaluation, true).unwrap();
    let names: Vec<&str> = categories.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["person", "13", "toothbrush"]);
    let images: Vec<_> = images.iter().map(|image| (image.file_name.as_str(), image.scene.size)).collect();
    assert_eq!(images, [("a.jpg", [4, 5]), ("b.jpg", [30, 40])]);
}

#[test]
fn training_has_no_crowds_and_no_objects_without_a_polygon_and_evaluation_has_all_objects() {
    let triangle = |numbers: [f64; 6]| Outline::Polygons(vec![numbers.to_vec()]);
    let (small, first) = (triangle([0.5, 1.0, 2.0, 1.0, 2.0, 3.0]), triangle([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    assert_eq!(outlines(Purpose::Training, true), [vec![(1, small.clone())], vec![(2, first.clone())]]);
    let crowd = Outline::Runs(vec![3, 4, 13]);
    assert_eq!(
        outlines(Purpose::Evaluation, true),
        [vec![(2, crowd), (0, Outline::None), (1, small)], vec![(2, first)]]
    );
    let without = |classes: &[usize]| classes.iter().map(|&class| (class, Outline::None)).collect::<Vec<_>>();
    assert_eq!(outlines(Purpose::Training, false), [without(&[0, 1]), without(&[2])]);
    assert_eq!(outlines(Purpose::Evaluation, false), [without(&[2, 0, 1]), without(&[2])]);
}

#[test]
fn both_forms_of_run_lengths_are_decoded_as_by_pycocotools() {
    let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/coco_data.json")).unwrap();
    let codes = golden["codes"].as_array().unwrap();
    assert_eq!(codes.len(), 3);
    for code in codes {
        for counts in [&code["compressed"], &code["runs"]] {
            let mut dataset = dataset();
            dataset["images"][1]["height"] = json!(120);
            dataset["images"][1]["width"] = json!(160);
            dataset["annotations"][1]["segmentation"] = json!({"size": [120, 160], "counts": counts});
            let images = read_value(&dataset, Purpose::Evaluation, true).unwrap().images;
            let Outline::Runs(runs) = &images[0].scene.objects[0].outline else { panic!("no runs") };
            assert_eq!(json!(runs), code["runs"]);
        }
    }
}

#[test]
fn a_malformed_entry_is_named_with_the_cure() {
    let error = |path: &str, value: Value, purpose| {
        let mut dataset = dataset();
        match value {
            Value::Null => {
                _ = dataset
                    .pointer_mut(path.rsplit_once('/').unwrap().0)
                    .unwrap()
                    .as_object_mut()
                    .unwrap()
                    .remove(path.rsplit_once('/').unwrap().1)
            }
            value => *dataset.pointer_mut(path).unwrap() = value,
        }
        read_value(&dataset, purpose, true).map(|_| path.to_string()).unwrap_err()
    };
    let of = |path, value| error(path, value, Purpose::Evaluation);
    let code = json!({"size": [4, 5], "counts": [3, 4, 13]});
    for (error, words) in [
        (
            of("/annotations/2/category_id", json!(2)),
            &["entry 2 (from 0) of `annotations`", "category_id 2", "add the category"][..],
        ),
        (of("/annotations/0/bbox", json!([1, 2, 3])), &["entry 0", "bbox", "four finite numbers", "in pixels"]),
        (of("/annotations/0/bbox/2", json!("not a number")), &["entry 0", "bbox", "four finite numbers"]),
        (of("/annotations/3/area", Value::Null), &["entry 3", "add the area"]),
        (of("/annotations/3/segmentation", Value::Null), &["entry 3", "detection.masks = false"]),
        (of("/annotations/3/segmentation", json!(["x"])), &["entry 3", "segmentation that cannot be read"]),
        (of("/annotations/1/segmentation/size", json!([5, 4])), &["entry 1", "4×5", "5×4", "of one size"]),
        (of("/annotations/1/segmentation/counts", json!([3, 40])), &["entry 1", "cannot be decoded"]),
        (of("/annotations/1", json!(5)), &["entry 1 (from 0) of `annotations` is not an annotation", "integer"]),
        (of("/images/1/file_name", Value::Null), &["entry 1 (from 0) of `images`", "has no file_name"]),
        (of("/images/0/width", json!("wide")), &["entry 0 (from 0) of `images`", "width"]),
        (of("/images", json!([])), &["lists no `images`"]),
        (of("/categories/2/id", json!("z")), &["`categories` have the ids 1 and \"z\""]),
        (error("/annotations/3/segmentation", code, Purpose::Training), &["entry 3", "run-length code", "iscrowd = 1"]),
    ] {
        assert!(
            error.contains("instances.json: ") && words.iter().all(|word| error.contains(word)),
            "{words:?}: {error}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("torn.json");
    std::fs::write(&file, &dataset().to_string()[..200]).unwrap();
    let error = read(&file, Purpose::Training, true).unwrap_err().to_string();
    assert!(error.contains("torn.json: ") && error.contains("at line 1 column 200"), "{error}");
}

#[test]
fn objects_of_images_that_are_not_listed_are_ignored() {
    let mut dataset = dataset();
    dataset["annotations"][0]["image_id"] = json!(1000);
    let images = read_value(&dataset, Purpose::Evaluation, true).unwrap().images;
    assert_eq!(images.iter().map(|image| image.scene.objects.len()).collect::<Vec<_>>(), [3, 0]);
}
