//! Batches of images with annotated objects, drawn and from files in COCO's layout.

use incubate::coco::objects::{Outline, Scene};
use incubate::config::{Config, TaskKind};
use incubate::data::feed::Feed;
use incubate::data::feed::images::Handover;
use incubate::data::feed::loader::Loader;
use incubate::data::feed::objects::ObjectReading;
use incubate::data::feed::test_batches::test_batches;
use incubate::data::{self, Source};
use incubate::plan::Plan;
use incubate::plan::groups::{micro_batches, share};
use incubate::run::table::DETECT;
use incubate::weights::floats;
use serde_json::{Value, json};
use std::path::Path;
use tch::{Device, Tensor};

const SIDE: usize = 64;

fn config(sets: &[String]) -> Config {
    let text = format!(
        "[model]\nimage_size = 16\nwidth = 16\nheads = 2\ndepths = [1, 1]\nclasses = 3\n[detect]\nglobal_batch = 160\n\
         [detection]\ncrop = {SIDE}\nwindow = 0\nclasses = 2\n"
    );
    Config::parse(&text, sets).unwrap().of_task(TaskKind::Detection)
}

fn drawn() -> Vec<String> {
    ["detection.format=shapes", "detection.train_images=200", "detection.test_images=7"].map(String::from).to_vec()
}

/// The scenes in rows of numbers (batch, number).
fn scenes(rows: &Tensor) -> Vec<Scene> {
    let numbers = Vec::<Vec<f64>>::try_from(rows).unwrap();
    let scene = |row: &Vec<f64>| {
        let (scene, rest) = Scene::from_row(row).unwrap();
        assert!(rest.iter().all(|&number| number == 0.0), "zeros up to the longest row");
        scene
    };
    numbers.iter().map(scene).collect()
}

#[test]
fn images_and_objects_of_a_step_are_the_same_for_any_number_of_workers_ranks_and_micro_batches() {
    let config = config(&drawn());
    let source = data::open_read_only(&config).unwrap();
    let plan = Plan::new(config, source.train.len()).unwrap();
    let phase = plan.phase(&DETECT, None);
    let stream = |workers: usize, ranks: usize, micro: usize| -> (Vec<f32>, Vec<Scene>) {
        let feed = Feed { source: &source, workers };
        let (mut pixels, mut objects) = (Vec::new(), Vec::new());
        for rank in 0..ranks {
            let own = micro_batches(share(160, rank, ranks), micro);
            let count = own.len();
            for batch in Loader::start(&plan, &phase, feed, own, 1, Handover::Finished).unwrap().take(count) {
                let (images_bchw, rows, _lent) = batch.unwrap().on(Device::Cpu);
                assert_eq!(images_bchw.size(), [rows.size()[0], 3, SIDE as i64, SIDE as i64]);
                pixels.extend_from_slice(floats(&images_bchw));
                objects.extend(scenes(&rows));
            }
        }
        (pixels, objects)
    };
    let one = stream(1, 1, 160);
    assert!(one.1.len() == 160 && one.0.iter().all(|number| number.is_finite()));
    for (workers, ranks, micro) in [(3, 1, 160), (2, 1, 20), (2, 4, 40)] {
        assert!(stream(workers, ranks, micro) == one, "{workers} workers, {ranks} ranks, micro-batches of {micro}");
    }
    let objects = one.1.iter().flat_map(|scene| &scene.objects);
    assert!(objects.clone().count() > 160 && objects.clone().any(|object| object.class == 1));
    for scene in &one.1 {
        let [height, width] = scene.size.map(|length| length as f64);
        for object in &scene.objects {
            let [x, y, w, h] = object.bbox;
            assert!(x >= 0.0 && y >= 0.0 && w > 0.0 && h > 0.0 && x + w <= width + 1e-9 && y + h <= height + 1e-9);
            assert!(matches!(&object.outline, Outline::Polygons(polygons) if polygons.len() == 1));
        }
    }
}

#[test]
fn an_evaluation_gets_each_image_with_its_objects_in_the_images_own_pixels() {
    let config = config(&drawn());
    let source = data::open_read_only(&config).unwrap();
    let feed = Feed { source: &source, workers: 2 };
    let batches: Vec<_> =
        test_batches(&config, feed, 2..7, 4, Handover::Finished).unwrap().collect::<anyhow::Result<_>>().unwrap();
    assert_eq!(batches.len(), 5);
    for (index, batch) in (2..7).zip(&batches) {
        assert_eq!(scenes(&batch.labels), [source.test.scene(index).unwrap()]);
        let sizes: Vec<Vec<i64>> = batch.images.iter().map(|images| images.on(Device::Cpu).size()).collect();
        assert_eq!(sizes, [vec![1, 3, SIDE as i64, SIDE as i64]]);
    }
    let mut reader = ObjectReading::new(&config, &source.test, &source.bad).reader();
    let images_1chw = reader.image_alone(3).unwrap();
    let photo = reader.photo();
    assert_eq!([photo.height, photo.width], source.test.scene(3).unwrap().size);
    assert!(images_1chw[0] == batches[1].images[0].on(Device::Cpu));
}

#[test]
fn objects_are_those_of_the_upright_image_and_one_reading_gives_the_networks_input_and_the_photograph() {
    let folder = tempfile::tempdir().unwrap();
    let config = coco(folder.path(), |_| {});
    // Stored with 6 columns and 8 rows, the image is upright after a quarter turn clockwise.
    let red = |row: usize, column: usize| (30 * row + 5 * column) as u8;
    let stored: Vec<u8> = (0..48).flat_map(|i| [red(i / 6, i % 6), 0, 0]).collect();
    let turned: Vec<u8> = (0..48).map(|i| red(7 - i % 8, i / 8)).collect();
    let path = folder.path().join("val2017/3.png");
    let mut info = png::Info::with_size(6, 8);
    info.color_type = png::ColorType::Rgb;
    info.exif_metadata = Some(b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0".into());
    let encoder = png::Encoder::with_info(std::fs::File::create(&path).unwrap(), info).unwrap();
    encoder.write_header().unwrap().write_image_data(&stored).unwrap();
    let source = data::open_read_only(&config).unwrap();
    let mut reader = ObjectReading::new(&config, &source.test, &source.bad).reader();
    let (images_1chw, _) = reader.evaluate(0).unwrap();
    assert_eq!(images_1chw[0].size()[0], 1, "its upright size is that of its annotations");
    // The file is read only once, so a later change of it is not seen.
    std::fs::write(&path, b"no image").unwrap();
    let photo = reader.photo();
    let reds: Vec<u8> = photo.bytes.chunks(photo.channels).map(|pixel| pixel[0]).collect();
    assert_eq!((photo.width, photo.height, reds), (8, 6, turned));
}

/// Two training images and an evaluation image of 8 × 6 pixels, in COCO's layout.
fn coco(folder: &Path, edit: impl Fn(&mut Value)) -> Config {
    for split in ["train2017", "val2017", "annotations"] {
        std::fs::create_dir_all(folder.join(split)).unwrap();
    }
    let image = |id: u32| json!({"id": id, "file_name": format!("{id}.png"), "width": 8, "height": 6});
    let object = |image_id: u32| {
        json!({"image_id": image_id, "category_id": 4, "bbox": [1, 1, 4, 3], "area": 12, "iscrowd": 0,
               "segmentation": [[1, 1, 5, 1, 5, 4, 1, 4]]})
    };
    for (split, ids) in [("train2017", &[1, 2][..]), ("val2017", &[3])] {
        let mut dataset = json!({
            "images": ids.iter().map(|&id| image(id)).collect::<Vec<_>>(),
            "annotations": ids.iter().map(|&id| object(id)).collect::<Vec<_>>(),
            "categories": [{"id": 4, "name": "cat"}, {"id": 6, "name": "dog"}]
        });
        edit(&mut dataset);
        std::fs::write(folder.join(format!("annotations/instances_{split}.json")), dataset.to_string()).unwrap();
        for id in ids {
            let file = std::fs::File::create(folder.join(split).join(format!("{id}.png"))).unwrap();
            let mut encoder = png::Encoder::new(file, 8, 6);
            encoder.set_color(png::ColorType::Rgb);
            encoder.write_header().unwrap().write_image_data(&[100; 3 * 48]).unwrap();
        }
    }
    config(&[format!("detection.path={:?}", folder.display().to_string())])
}

fn evaluated(config: &Config, source: &Source) -> anyhow::Result<(Vec<Tensor>, Tensor)> {
    ObjectReading::new(config, &source.test, &source.bad).reader().evaluate(0)
}

#[test]
fn an_image_that_differs_in_size_from_its_annotations_is_an_error_with_the_cure_or_is_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = coco(folder.path(), |dataset| dataset["images"][0]["width"] = json!(9));
    let source = data::open_read_only(&config).unwrap();
    let error = evaluated(&config, &source).unwrap_err().to_string();
    let words = ["val2017/3.png: it has 8×6 pixels, but its annotations say 9×6", "make them of one size"];
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
    config.data.bad_images = 2;
    let source = data::open_read_only(&config).unwrap();
    let (images_1chw, rows) = evaluated(&config, &source).unwrap();
    assert_eq!((images_1chw[0].size()[0], rows.size()[0]), (0, 0));
    // The first training image is skipped too, and the second takes its place.
    let mut reader = ObjectReading::new(&config, &source.train, &source.bad).reader();
    let mut pixels = vec![0.0; 3 * SIDE * SIDE];
    let rows = reader.train(&[(0, [1, 2, 3, 4])], &mut pixels).unwrap();
    assert_eq!(scenes(&rows)[0].image, 1);
}

#[test]
fn a_changed_annotation_changes_the_listing_of_the_images_and_a_moved_folder_does_not() {
    let listed = |edit: &dyn Fn(&mut Value)| {
        let folder = tempfile::tempdir().unwrap();
        let config = coco(folder.path(), edit);
        data::data_set(&config, &data::open_read_only(&config).unwrap())
    };
    let one = listed(&|_| {});
    assert_eq!((one.classes.as_slice(), one.train.images), (&["cat".to_string(), "dog".to_string()][..], 2));
    assert!(listed(&|_| {}) == one, "another folder");
    for edit in [
        (|dataset: &mut Value| dataset["annotations"][0]["category_id"] = json!(6)) as fn(&mut Value),
        |dataset| dataset["annotations"][0]["segmentation"][0][2] = json!(6),
        |dataset| dataset["annotations"][0]["bbox"][0] = json!(0.5),
    ] {
        let other = listed(&edit);
        assert!(other.train != one.train && other.evaluation != one.evaluation);
    }
}
