//! Segmentation: the heads compared with mmsegmentation's, and `incubate segment` as a user runs it, on images with label maps.

use crate::images::png;
use crate::incubate::Incubate;
use incubate::collective::Solo;
use incubate::config::{Config, TaskKind};
use incubate::model::{FP32_ON_HOST, Network, fresh};
use incubate::store::artefact;
use incubate::task::{Loss, Part, Task};
use incubate::weights::Weights;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

const BATCH: i64 = 2;
const WIDTH: i64 = 16;
const GRID: i64 = 8;
const CROP: i64 = 32;

/// The numbers of `tensor` in `tools/golden_segmentation.py`.
fn wave(shape: &[i64], phase: f64) -> Tensor {
    let count: i64 = shape.iter().product();
    (Tensor::arange(count, (Kind::Double, FP32_ON_HOST.1)) * 0.37 + phase).sin().to_kind(Kind::Float).view(shape)
}

fn config(mean: &str, neck: &str) -> Config {
    let text = format!(
        "[model]\nimage_size = 16\npatch_size = 4\nwidth = {WIDTH}\nheads = 2\ndepths = [1, 1, 1, 1]\nclasses = 3\n\
         [segmentation]\nformat = \"shapes\"\ntrain_images = 2\ntest_images = 2\nclasses = 7\ncrop = {CROP}\nwidth = 8\n\
         auxiliary_width = 6\nhead_dropout = 0.0\nreduce_zero_label = false\ninference = \"whole\"\nloss_mean = \"{mean}\"\n\
         neck = \"{neck}\""
    );
    Config::parse(&text, &[]).unwrap().of_task(TaskKind::Segmentation)
}

/// Fresh weights of the network, and for its neck and heads the weights that `tools/golden_segmentation.py` used.
fn weights(config: &Config, depths: &[usize]) -> Weights {
    let auxiliary = Task::of(config).parameters(depths.len());
    let mut weights = fresh(config.model.parameters(depths).iter(), 1);
    for parameter in auxiliary {
        let phase = parameter.name.bytes().map(f64::from).sum();
        let is_of_norm = [".bn.", "upsample_4x.1."].iter().any(|norm| parameter.name.contains(norm));
        let scale = if parameter.name.starts_with("neck.") && !is_of_norm { 1.0 } else { 0.1 };
        let numbers = wave(&parameter.shape, phase) * scale;
        let is_near_one =
            ["bn.weight", "upsample_4x.1.weight", "running_var"].iter().any(|end| parameter.name.ends_with(end));
        weights.insert((parameter.stage, parameter.name), if is_near_one { numbers + 1.0 } else { numbers });
    }
    weights
}

/// The tokens at a tap: a class token, which must not matter, and the map of `tools/golden_segmentation.py`.
fn tokens(tap: usize) -> Tensor {
    let map_bdhw = wave(&[BATCH, WIDTH, GRID, GRID], 100.0 * tap as f64);
    let tokens_bnd = map_bdhw.flatten(2, 3).transpose(1, 2);
    Tensor::cat(&[Tensor::full([BATCH, 1, WIDTH], 9.0, FP32_ON_HOST), tokens_bnd], 1)
}

fn labels() -> Tensor {
    let labels: Vec<u8> = (0..BATCH * CROP * CROP).map(|i| (i / 5 % 10) as u8).collect();
    let labels: Vec<u8> = labels.into_iter().map(|label| if label < 7 { label } else { 255 }).collect();
    Tensor::from_slice(&labels).view([BATCH, CROP, CROP])
}

#[track_caller]
fn assert_close(what: &str, ours: &Tensor, golden: &Tensor, tolerance: f64) {
    let largest = golden.abs().max().double_value(&[]);
    // The gradient of a bias before a norm is zero but for rounding.
    let scale = if largest < 1e-6 { 1e-2 } else { largest };
    let difference = (ours.view_as(golden) - golden).abs().max().double_value(&[]) / scale;
    assert!(difference < tolerance, "{what} differs by {difference:e}");
}

#[test]
fn loss_gradients_and_batch_norm_of_necks_and_heads_are_mmsegmentations() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/segmentation.safetensors");
    let golden: BTreeMap<String, Tensor> = Tensor::read_safetensors(path).unwrap().into_iter().collect();
    let depths = [1, 1, 1, 1];
    for (case, mean, neck) in
        [("all", "all", "none"), ("labelled", "labelled", "none"), ("mln", "all", "mln"), ("pyramid", "all", "pyramid")]
    {
        // The larger maps of a neck round more.
        let tolerance = if neck == "none" { 1e-4 } else { 1e-3 };
        let config = config(mean, neck);
        let task = Task::of(&config);
        let auxiliary = task.parameters(depths.len());
        let network = Network::new(&config, &depths, 0..4, &auxiliary, &weights(&config, &depths)).unwrap();
        let outputs: Vec<Tensor> = (0..4).map(tokens).collect();
        let part = Part { group: &Solo, seed: 1, step: 0, positions: 0..BATCH as usize, global_batch: BATCH as f64 };
        let Loss { sum, gradients } = task.loss(&network, &outputs, &labels(), &part).unwrap();
        assert_close("loss", &sum, &golden[&format!("{case}.loss")], tolerance);
        for (tap, gradient) in gradients.iter().enumerate() {
            let of_map = gradient.narrow(1, 1, GRID * GRID).transpose(1, 2).contiguous();
            assert_close(
                &format!("{case}: gradient of map {tap}"),
                &of_map,
                &golden[&format!("{case}.map.{tap}")],
                tolerance,
            );
            assert_eq!(gradient.narrow(1, 0, 1).abs().max().double_value(&[]), 0.0, "that of the class token");
        }
        let of_heads = network.flat().layout().named(network.flat().gradients());
        for parameter in &auxiliary {
            let name = &parameter.name;
            let ours = &of_heads[&(parameter.stage, name.clone())];
            if parameter.is_trainable() {
                assert_close(
                    &format!("{case}: gradient of {name}"),
                    ours,
                    &golden[&format!("{case}.{name}")],
                    tolerance,
                );
                continue;
            }
            // The flat buffer holds the sum of the statistics over all samples.
            let before = network.flat().get(parameter.stage, name, true).unwrap().value;
            let theirs = if neck == "none" { name.clone() } else { format!("{case}.{name}") };
            assert_close(name, &(before * 0.9 + ours / BATCH as f64 * 0.1), &golden[&theirs], tolerance);
        }
    }
}

#[test]
fn parts_of_a_batch_add_up_to_the_loss_of_the_batch_if_they_are_normalised_alike() {
    let config = config("all", "none");
    let task = Task::of(&config);
    let depths = [1, 1, 1, 1];
    let auxiliary = task.parameters(depths.len());
    let loss = |parts: i64| {
        let network = Network::new(&config, &depths, 0..4, &auxiliary, &weights(&config, &depths)).unwrap();
        // Two equal halves have the statistics of the whole.
        let twice = |tensor: &Tensor| Tensor::cat(&[tensor, tensor], 0);
        let each = 2 * BATCH / parts;
        let part_of = |number: i64| {
            let part = |tensor: Tensor| twice(&tensor).narrow(0, number * each, each);
            let outputs: Vec<Tensor> = (0..4).map(|tap| part(tokens(tap))).collect();
            let positions = (number * each) as usize..((number + 1) * each) as usize;
            let part_of_step = Part { group: &Solo, seed: 1, step: 0, positions, global_batch: 2.0 * BATCH as f64 };
            task.loss(&network, &outputs, &part(labels()), &part_of_step).unwrap().sum.double_value(&[])
        };
        let sum: f64 = (0..parts).map(part_of).sum();
        let trained = network.flat().gradients().narrow(0, 0, network.flat().trainable() as i64);
        (sum, trained.norm().double_value(&[]))
    };
    let ((whole, norm), (halves, of_halves)) = (loss(1), loss(2));
    assert!((whole - halves).abs() < 1e-5 * whole, "{whole} and {halves}");
    assert!((norm - of_halves).abs() < 1e-4 * norm, "{norm} and {of_halves}");
}

/// A tiny run whose segmentation has drawn images.
fn tiny() -> Incubate {
    Incubate::of_thin_stages_with(SEGMENTATION)
}

const SEGMENTATION: &str = r#"
[segment]
epochs = 4
global_batch = 4
base_lr = 0.5
drop_path = 0.0
eval_epochs = 2
[segmentation]
format = "shapes"
train_images = 16
test_images = 5
classes = 3
reduce_zero_label = false
crop = 32
width = 8
auxiliary_width = 8
"#;

#[test]
fn a_run_with_label_maps_ends_with_a_segmentation_that_status_summary_and_evaluation_show() {
    let run = tiny();
    let models: serde_json::Value = serde_json::from_str(&run.ok(&["run", "--json"]).out).unwrap();
    let row = models["models"].as_array().unwrap().iter().find(|row| row["model"] == "segmentation").unwrap();
    let mean_iou = row["mIoU"].as_f64().unwrap();
    assert!(row["top1"].is_null() && mean_iou > 0.0 && mean_iou <= 100.0, "{row}");
    let (header, _) = artefact::read_header(&run.file("segment.h5")).unwrap();
    assert_eq!((header.metrics["mIoU"], header.metrics["images"]), (mean_iou, 5.0));
    assert_eq!(header.meta, Some(artefact::read_header(&run.file("final.h5")).unwrap().1), "it derives from final.h5");
    let evaluated = run.ok(&["evaluate", "--weights", run.file("segment.h5").to_str().unwrap(), "--json"]).out;
    let mut evaluated: serde_json::Value = serde_json::from_str(&evaluated).unwrap();
    let classes = evaluated.as_object_mut().unwrap().remove("classes").unwrap();
    assert_eq!(evaluated, serde_json::to_value(&header.metrics).unwrap());
    // The figures of the classes are also in the summary.
    let kept: serde_json::Value = serde_json::from_slice(&run.bytes("logs/segment/classes.json")).unwrap();
    assert!(classes == kept && row["classes"] == kept && models["models"][0]["classes"].is_null(), "{models}");
    let of_classes: Vec<f64> = classes.as_array().unwrap().iter().filter_map(|class| class["IoU"].as_f64()).collect();
    assert!((of_classes.iter().sum::<f64>() / of_classes.len() as f64 - mean_iou).abs() < 1e-9, "{classes}");
    let summary = run.ok(&["run"]);
    assert!(summary.out.contains("mIoU %") && summary.out.contains("segment.h5"), "{}", summary.out);
    assert!(summary.err.contains("segment: done already"), "{}", summary.err);
    let status = crate::incubate::plain(&["status", run.run_dir.to_str().unwrap()]).output().unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.lines().any(|line| line.starts_with("segment ") && line.contains("done")), "{status}");
    run.incubate(&["export", "--weights", run.file("segment.h5").to_str().unwrap()])
        .fails(2, &["segment.h5", "final.h5"]);
    // Other keys of the heads make another model.
    run.incubate(&["segment", "--set", "segmentation.width=4"]).fails(2, &["segmentation.width (8 there, 4 here)"]);
}

/// The files of a run from which a segmentation of its final model can start.
const FILES: [&str; 2] = ["meta.h5", "final.h5"];

/// A run directory in which everything before the segmentation is done.
fn fine_tuned() -> Incubate {
    tiny().fine_tuned()
}

#[test]
fn predictions_are_shown_as_pictures_of_masks_and_of_likely_classes() {
    let run = fine_tuned().set("segmentation.class_names=[\"ground\", \"red & round\", \"box\"]");
    run.ok(&["segment"]);
    let folder = run.folder.path();
    let photo = folder.join("photo.png");
    let pixels: Vec<u8> = (0..40 * 30 * 3).map(|i| (i * 7 % 256) as u8).collect();
    png(&photo, png::ColorType::Rgb, [40, 30], &pixels);
    let photo = photo.to_str().unwrap();
    // Two images of one name have two pictures.
    let seen = run.ok(&["predict", photo, photo, "--json"]).out;
    let seen: Vec<serde_json::Value> = serde_json::from_str(&seen).unwrap();
    let classes = seen[0]["classes"].as_array().unwrap();
    let sum: f64 = classes.iter().map(|class| class["percent"].as_f64().unwrap()).sum();
    assert!(
        (sum - 100.0).abs() < 1e-9 && ["ground", "red & round", "box"].contains(&classes[0]["name"].as_str().unwrap())
    );
    for name in ["photo", "photo-2"] {
        let [width, height, pixels] = read_png(&run.file(&format!("predictions/{name}.png")));
        assert!(width == 480 && height > 360, "{width}×{height}: the photograph twelve times as large, above a key");
        // The first pixel is the mean of the photograph's pixel and the colour of a class in PASCAL VOC, whose channels are 0 or
        // 128.
        assert!((0..3).all(|i| [0, 64].contains(&(pixels >> (8 * i) & 0xFF).wrapping_sub(7 * i / 2))), "{pixels:06x}");
    }
    let text = run.ok(&["predict", photo, "--weights", run.file("final.h5").to_str().unwrap(), "--into", "seen"]).out;
    assert!(text.contains(" %  ") && text.contains("picture: seen/photo.png"), "{text}");
    assert!(folder.join("seen/photo.png").exists());
    let text = run.ok(&["evaluate", "--weights", run.file("segment.h5").to_str().unwrap()]).out;
    assert!(text.lines().any(|line| line.starts_with("red & round ")) && text.contains("IoU"), "{text}");
    let json = run.ok(&["evaluate", "--weights", run.file("segment.h5").to_str().unwrap(), "--json"]).out;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["classes"][1]["name"], &json["classes"][1]["class"]), (&"red & round".into(), &1.into()));
    // A report shows the figures of each class, and pictures of test images.
    crate::incubate::plain(&["report", run.run_dir.to_str().unwrap()]).output().unwrap();
    let page = String::from_utf8(run.bytes("report-so-far.html")).unwrap();
    assert!(page.contains("red &amp; round") && page.contains("mIoU"), "the page names the classes");
    assert_eq!(page.matches("<img src=\"data:image/png;base64,iVBOR").count(), 4);
    let missing = folder.join("absent.jpg");
    run.incubate(&["predict", missing.to_str().unwrap()]).fails(2, &["absent.jpg", "no such file", "JPEG or PNG"]);
    std::fs::write(&missing, "no image").unwrap();
    run.incubate(&["predict", missing.to_str().unwrap()]).fails(2, &["absent.jpg", "neither a JPEG nor a PNG"]);
    run.set("segmentation.class_names=[\"one\"]").incubate(&["predict", photo]).fails(2, &["class_names", "1 names"]);
}

/// The width and the height of a PNG, and its first pixel: red in the lowest byte, then green and blue.
fn read_png(path: &Path) -> [u32; 3] {
    let mut reader =
        png::Decoder::new(std::io::BufReader::new(std::fs::File::open(path).unwrap())).read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    [info.width, info.height, u32::from(bytes[0]) | u32::from(bytes[1]) << 8 | u32::from(bytes[2]) << 16]
}

#[test]
fn a_segmentation_that_is_killed_and_resumed_has_the_bits_of_an_uninterrupted_one() {
    let run = fine_tuned();
    let interrupted = run.fork(&FILES);
    run.ok(&["segment"]);
    interrupted.ok_after_two_kills("segment");
    assert!(run.bytes("segment.h5") == interrupted.bytes("segment.h5"));
}

#[test]
fn two_ranks_give_the_losses_of_one_at_the_same_micro_batch() {
    let run = fine_tuned().set("run.micro_batch=2").set("segment.epochs=2");
    let (one, two) = (run.fork(&FILES), run.fork(&FILES));
    one.ok(&["segment"]);
    two.mpirun(2, &["segment"]).ok();
    let (one, two) = (one.losses("segment"), two.losses("segment"));
    assert_eq!(one.len(), 8);
    assert!(one.iter().zip(&two).all(|(a, b)| (a - b).abs() < 1e-4 * a), "{one:?} and {two:?}");
}

#[test]
fn norms_over_the_step_give_ranks_and_replicas_the_losses_of_one_replica() {
    let run = fine_tuned().set("segmentation.norm_over=step").set("segment.global_batch=8").set("run.micro_batch=8");
    let (one, four) = (run.fork(&FILES), run.set("run.replicas=2").fork(&FILES));
    one.ok(&["segment"]);
    four.mpirun(2, &["segment"]).ok();
    let (alone, together) = (one.losses("segment"), four.losses("segment"));
    assert_eq!(alone.len(), 8);
    assert!(alone.iter().zip(&together).all(|(a, b)| (a - b).abs() < 1e-3 * a), "{alone:?} and {together:?}");
    let refused = one.fork(&FILES).set("run.micro_batch=4");
    refused.incubate(&["segment"]).fails(2, &["segmentation.norm_over", "8 samples", "run.micro_batch = 8"]);
}

/// A folder of images of 40×32 pixels with label maps, in ADE20K's layout: the left half is of label 1, the right half of label 2.
fn pairs(folder: &Path) {
    let labels: Vec<u8> = (0..40 * 32).map(|i| if i % 40 < 20 { 1 } else { 2 }).collect();
    let pixels: Vec<u8> = labels.iter().flat_map(|&label| [60 * label, 200, 90 * label]).collect();
    for (split, count) in [("training", 4), ("validation", 2)] {
        for number in 0..count {
            let file = |kind: &str| folder.join(kind).join(split).join(format!("{number}.png"));
            png(&file("images"), png::ColorType::Rgb, [40, 32], &pixels);
            png(&file("annotations"), png::ColorType::Grayscale, [40, 32], &labels);
        }
    }
}

#[test]
fn bad_label_maps_end_in_one_error_with_the_file_and_the_cure() {
    let run =
        fine_tuned().set("segmentation.format=folder").set("segmentation.path=pairs").set("segmentation.classes=2");
    let run = run
        .set("segmentation.reduce_zero_label=true")
        .set("segment.warmup_epochs=0")
        .set("segment.epochs=1")
        .fork(&FILES);
    let folder = run.folder.path().join("pairs");
    let segment = || run.incubate(&["segment"]);
    segment().fails(2, &["pairs/images: no such folder", "annotations/SPLIT"]);
    pairs(&folder);
    let map = folder.join("annotations/training/1.png");
    std::fs::rename(&map, folder.join("away")).unwrap();
    segment().fails(2, &["training/1.png", "is missing", "remove the image"]);
    png(&map, png::ColorType::Grayscale, [32, 40], &[1; 40 * 32]);
    segment().fails(2, &["images/training/1.png", "40×32", "annotations/training/1.png", "32×40"]);
    png(&map, png::ColorType::Rgb, [40, 32], &[1; 3 * 40 * 32]);
    segment().fails(2, &["annotations/training/1.png", "Rgb of 8 bits", "store one label for each pixel"]);
    png(&map, png::ColorType::Grayscale, [40, 32], &[7; 40 * 32]);
    segment().fails(2, &["annotations/training/1.png", "label 7 at row 0, column 0", "segmentation.classes"]);
    std::fs::rename(folder.join("away"), &map).unwrap();
    segment().ok();
    // A segmentation of a final model opens no other images.
    assert!(!run.file("dataset.json").exists() && run.file("dataset-segmentation.json").exists());
    // Other label maps are noticed, although the images have kept their names.
    let e2e = || run.incubate(&["segment-e2e"]);
    e2e().fails(2, &["e2e.h5", "run the phases before it first"]);
    let noise: Vec<u8> = (0..40 * 32u32).map(|i| 1 + (i * i % 7 % 2) as u8).collect();
    png(&map, png::ColorType::Grayscale, [40, 32], &noise);
    e2e().fails(2, &["names or labels of the 4 training images have changed", "--accept-data"]);
    run.incubate(&["segment-e2e", "--accept-data"]).fails(2, &["e2e.h5"]);
    e2e().fails(2, &["e2e.h5"]);
}

#[test]
fn a_plan_and_a_summary_count_the_neck_and_the_heads() {
    let run = tiny();
    let phase = |set: &str| -> serde_json::Value {
        let plan = run.ok(&["plan", "--rate", "1", "--json", "--set", set]).out;
        let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
        plan["phases"].as_array().unwrap().iter().find(|phase| phase["phase"] == "segment").unwrap().clone()
    };
    let number = |phase: &serde_json::Value, key: &str| phase[key].as_f64().unwrap();
    let (plain, mln) = (phase("segmentation.neck=none"), phase("segmentation.neck=mln"));
    // The neck has four 1×1 convolutions, on maps of 8×8, and four 3×3 convolutions, on maps with sides 32, 16, 8 and 4. All have
    // 16 channels.
    assert_eq!(number(&mln, "parameters") - number(&plain, "parameters"), 4.0 * (256.0 + 16.0 + 9.0 * 256.0 + 16.0));
    let neck = 2.0 * 256.0 * (4.0 * 64.0 + 9.0 * (1024.0 + 256.0 + 64.0 + 16.0));
    assert!(number(&mln, "flops") - number(&plain, "flops") > 3.0 * 64.0 * neck, "and UPerNet reads larger maps");
    assert!(number(&mln, "memory_bytes_per_device") > number(&plain, "memory_bytes_per_device"));
    assert_eq!((number(&plain, "steps"), number(&plain, "images")), (16.0, 64.0));
}
