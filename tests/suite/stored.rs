//! Folders of images: runs as a user starts them, and the stream of batches, which must not depend on workers, ranks or micro-batches.

use crate::incubate::Incubate;
use incubate::config::Config;
use incubate::data::feed::Feed;
use incubate::data::feed::images::Handover;
use incubate::data::feed::loader::Loader;
use incubate::data::image::decode::jpeg;
use incubate::plan::Plan;
use incubate::plan::groups::{micro_batches, share};
use incubate::random::Random;
use incubate::run::table::META;
use incubate::weights::{Staging, floats};
use std::path::Path;
use tch::Device;

/// Draws a folder of JPEGs. Each class has its own colour; the direction of the stripes repeats after 12 classes.
fn draw(folder: &Path, split: &str, classes: usize, per_class: usize) {
    for class in 0..classes {
        let folder = folder.join(split).join(format!("class-{class:02}"));
        std::fs::create_dir_all(&folder).unwrap();
        for number in 0..per_class {
            let mut random = Random::new(&[class as u64, number as u64, split.len() as u64]);
            let (height, width) = (40 + random.below(40), 40 + random.below(40));
            let pixel = |i: usize| {
                let (row, column) = (i / width, i % width);
                let stripe = if (class * row + column) % 12 < 6 { 40 } else { 0 };
                [class * 10 + stripe, 250 - class * 10 - stripe, 60 + stripe].map(|value| value as u8)
            };
            let rgb: Vec<u8> = (0..height * width).flat_map(pixel).collect();
            let file = jpeg::encode(&rgb, height, width, 90).unwrap();
            std::fs::write(folder.join(format!("{number:03}.jpg")), file).unwrap();
        }
    }
}

/// The paper's ImageNet config with a small model, on drawn images.
fn small_imagenet(classes: usize) -> Incubate {
    let config = format!("{}/configs/imagenet-vit-b.toml", env!("CARGO_MANIFEST_DIR"));
    let mut incubate = Incubate::with(&std::fs::read_to_string(config).unwrap());
    let path = incubate.folder.path().join("images");
    draw(&path, "train", classes, 16);
    draw(&path, "val", classes, 3);
    for set in [
        format!("data.path={:?}", path.display().to_string()),
        format!("model.classes={classes}"),
        "data.train_images=0".into(),
        "data.test_images=0".into(),
        "model.image_size=48".into(),
        "run.precision=\"fp32\"".into(),
        "model.patch_size=8".into(),
        "model.width=16".into(),
        "model.heads=2".into(),
        "model.depths=[2,2,2,2]".into(),
        "run.threads=1".into(),
        "run.micro_batch=16".into(),
        "run.workers=2".into(),
    ] {
        incubate = incubate.set(&set);
    }
    for phase in ["meta", "module", "finetune"] {
        for (key, value) in [("epochs", "1"), ("global_batch", "32"), ("warmup_epochs", "0"), ("eval_epochs", "0")] {
            incubate = incubate.set(&format!("{phase}.{key}={value}"));
        }
    }
    incubate
}

#[test]
fn the_imagenet_config_with_a_small_model_runs_on_a_folder_to_the_end() {
    let incubate = small_imagenet(20).set("e2e.global_batch=32");
    let run = incubate.ok(&["run"]);
    assert!(run.out.contains("fine-tuned") && !run.out.contains("unreadable"), "{}", run.out);
    assert!(run.err.contains("waiting for data"), "{}", run.err);
    assert!(incubate.ok(&["evaluate"]).out.contains("on 60 images"));
}

#[test]
fn an_unreadable_image_is_named_and_stops_the_run_or_is_skipped_and_counted() {
    // Without repeats an epoch shows every image.
    let incubate = small_imagenet(4).set("e2e.global_batch=32").set("data.repeats=1");
    let images = incubate.folder.path().join("images");
    std::fs::write(images.join("train/class-01/003.jpg"), b"").unwrap();
    let truncated = images.join("val/class-02/001.jpg");
    let bytes = std::fs::read(&truncated).unwrap();
    std::fs::write(&truncated, &bytes[..bytes.len() / 2]).unwrap();
    incubate.incubate(&["meta"]).fails(2, &["class-01/003.jpg", "empty", "data.bad_images"]);
    let lenient = incubate.set("data.bad_images=2");
    // Two ranks may meet the same images, which still count as two. The second run reads no image, and takes the count from the notes
    // in the run directory.
    let run = lenient.mpirun(2, &["run"]).ok();
    assert!(run.err.contains("skipped, 1 of at most 2") && run.err.contains("class-02/001.jpg"), "{}", run.err);
    for run in [run, lenient.ok(&["run"])] {
        assert!(run.out.contains("unreadable images skipped: 2"), "{}", run.out);
        let rows: serde_json::Value = serde_json::from_slice(&lenient.bytes("summary.json")).unwrap();
        assert!(rows.as_array().unwrap().iter().all(|row| row["unreadable_images"] == 2), "{rows}");
        assert!(String::from_utf8(lenient.bytes("report.html")).unwrap().contains("2 image(s) could not be read"));
    }
    assert!(lenient.ok(&["evaluate"]).out.contains("on 11 images"));
    // A third unreadable image is one too many. This process meets only one of the other two, because the other is a training
    // image.
    std::fs::write(images.join("val/class-03/001.jpg"), b"GIF89a").unwrap();
    lenient.incubate(&["evaluate"]).fails(2, &["class-03/001.jpg", "data.bad_images = 2 are skipped already"]);
}

#[test]
fn plan_writes_nothing_and_a_run_keeps_the_index_of_its_folder() {
    let incubate = small_imagenet(3).set("e2e.global_batch=32");
    let plan = incubate.ok(&["plan", "--rate", "0.00001"]);
    assert!(plan.out.contains(" images/s, and ") && plan.out.contains("this node feeds them"), "{}", plan.out);
    assert!(!incubate.run_dir.exists());
    let json = incubate.ok(&["plan", "--rate", "1000000", "--json"]).out;
    let input = &serde_json::from_str::<serde_json::Value>(&json).unwrap()["input"];
    assert!(input["feeds"] == false && input["images_per_s_core"]["packed_raw"].as_f64().unwrap() > 0.0, "{input}");
    assert!(input["text"].as_str().unwrap().contains("incubate pack"), "{input}");
    incubate.ok(&["meta"]);
    assert!(incubate.file("index/train.index").exists());
}

#[test]
fn the_stream_of_stored_images_has_the_same_bits_for_any_number_of_workers_and_ranks() {
    let folder = tempfile::tempdir().unwrap();
    draw(folder.path(), "train", 3, 40);
    draw(folder.path(), "val", 3, 1);
    // The first image cannot be read, and every number of ranks and workers skips it.
    std::fs::write(folder.path().join("train/class-00/000.jpg"), b"torn").unwrap();
    let stream = |workers: usize, ranks: usize, handover: &Handover| -> Vec<f32> {
        let sets = [
            format!("data.path={:?}", folder.path().display().to_string()),
            format!("run.dir={:?}", folder.path().join("run").display().to_string()),
            "model.classes=3".into(),
            "model.image_size=48".into(),
            "train.global_batch=32".into(),
            "run.micro_batch=4".into(),
            "data.bad_images=1".into(),
            "data.repeats=1".into(),
        ];
        let config = Config::parse("", &sets).unwrap();
        let source = incubate::data::open(&config).unwrap();
        let plan = Plan::new(config, source.train.len()).unwrap();
        let phase = plan.phase(&META, None);
        let own = |rank| micro_batches(share(32, rank, ranks), 4);
        let feed = Feed { source: &source, workers };
        let mut loaders: Vec<Loader> = (0..ranks)
            .map(|rank| Loader::start(&plan, &phase, feed, own(rank), 1, handover.clone()).unwrap())
            .collect();
        let mut numbers = Vec::new();
        for _step in 0..4 {
            for loader in &mut loaders {
                for batch in loader.take(8 / ranks) {
                    let batch = batch.unwrap();
                    let (images_bchw, targets_bc, _lent) = batch.on(Device::Cpu);
                    numbers.extend_from_slice(floats(&images_bchw));
                    numbers.extend_from_slice(floats(&targets_bc));
                }
            }
        }
        assert_eq!(source.bad.count(), 1);
        numbers
    };
    let one = stream(1, 1, &Handover::Finished);
    assert!(one.iter().all(|number| number.is_finite()));
    for (workers, ranks) in [(2, 1), (7, 1), (1, 4), (2, 4)] {
        assert!(stream(workers, ranks, &Handover::Finished) == one, "{workers} workers, {ranks} ranks");
    }
    // Images that the device mixes differ by rounding alone.
    let on_device = stream(2, 1, &Handover::Unmixed(Staging::of_cpu()));
    assert!(on_device.len() == one.len() && on_device.iter().zip(&one).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn a_global_batch_is_the_same_however_it_is_divided_and_is_mixed_in_blocks_of_128() {
    let stream = |micro: usize, ranks: usize| -> [Vec<f32>; 2] {
        let text = "[model]\nimage_size = 16\npatch_size = 4\nchannels = 1\nclasses = 4\n[data]\nformat = \"shapes\"\n\
                    train_images = 640\ntest_images = 4\nmean = [0.3]\nstd = [0.3]\nrepeats = 1\nlabel_smoothing = 0\n\
                    cutmix = 0\n[train]\nglobal_batch = 320\n";
        let config = Config::parse(text, &[format!("run.micro_batch={micro}"), "run.workers=3".into()]).unwrap();
        let source = incubate::data::open(&config).unwrap();
        let plan = Plan::new(config, source.train.len()).unwrap();
        let phase = plan.phase(&META, None);
        let mut streams = [vec![], vec![]];
        let own = |rank| micro_batches(share(320, rank, ranks), micro);
        let mut loaders: Vec<Loader> = (0..ranks)
            .map(|rank| {
                Loader::start(&plan, &phase, Feed { source: &source, workers: 3 }, own(rank), 0, Handover::Finished)
                    .unwrap()
            })
            .collect();
        for _step in 0..2 {
            for (rank, loader) in loaders.iter_mut().enumerate() {
                for batch in loader.take(own(rank).len()) {
                    let (images_bchw, targets_bc, _lent) = batch.unwrap().on(Device::Cpu);
                    streams[0].extend_from_slice(floats(&images_bchw));
                    streams[1].extend_from_slice(floats(&targets_bc));
                }
            }
        }
        streams
    };
    let reference = stream(320, 1);
    assert_eq!(reference.each_ref().map(Vec::len), [2 * 320 * 256, 2 * 320 * 4]);
    for (micro, ranks) in [(4, 1), (96, 1), (320, 3), (64, 3)] {
        assert!(stream(micro, ranks) == reference, "micro-batches of {micro} on {ranks} rank(s)");
    }
    // If two mixed images have different classes, the largest entry of the target of each is λ or 1 − λ, where λ is that of its block.
    let rows: Vec<&[f32]> = reference[1].chunks(4).collect();
    let lambda = |block: std::ops::Range<usize>| {
        let largest = rows[block].iter().map(|row| row.iter().copied().fold(0.0, f32::max));
        let mut mixed: Vec<u32> = largest.filter(|&share| share < 0.9999).map(f32::to_bits).collect();
        mixed.dedup();
        assert_eq!(mixed.len(), 1, "one λ in a block");
        mixed[0]
    };
    assert!(lambda(0..128) != lambda(128..256) && lambda(128..256) != lambda(256..320));
}
