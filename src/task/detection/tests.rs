//! Compares results with detectron2's results, which tools/golden_detection.py has written. Also tests properties that any network
//! has.

use super::boxes::Corners;
use super::*;
use crate::coco::objects::{Object, Outline, detected_from_row};
use crate::collective::Solo;
use crate::config::TaskKind;
use crate::model::{DropPath, FP32_ON_HOST, fresh};
use tch::{Device, Kind};

pub fn golden() -> BTreeMap<String, Tensor> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/detection.safetensors");
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

pub fn corners(boxes: &Tensor) -> Vec<Corners> {
    let numbers = Vec::<f32>::try_from(boxes.flatten(0, -1)).unwrap();
    numbers.as_chunks().0.to_vec()
}

/// Asserts that no number differs from the expected number by more than `error`. If the largest expected magnitude is above 1,
/// `error` is relative to it.
pub fn assert_close(what: &str, numbers: &[f32], expected: &Tensor, error: f64) {
    let ours = Tensor::from_slice(numbers).view(expected.size().as_slice());
    let limit = error * expected.abs().max().double_value(&[]).max(1.0);
    let difference = (ours - expected.to_kind(Kind::Float)).abs().max().double_value(&[]);
    assert!(difference <= limit, "{what}: a difference of {difference:e}, of {limit:e} allowed");
}

fn config(sets: &[&str]) -> Config {
    let keys = [
        "detection.format=shapes",
        "detection.train_images=2",
        "detection.test_images=2",
        "detection.crop=32",
        "detection.classes=5",
        "detection.width=8",
        "detection.hidden=24",
        "detection.window=0",
        "model.width=16",
        "model.heads=2",
        "model.patch_size=4",
        "model.depths=[1, 1]",
    ];
    let sets: Vec<String> = keys.iter().chain(sets).map(|set| set.to_string()).collect();
    Config::parse("", &sets).unwrap().of_task(TaskKind::Detection)
}

/// Numbers from 0 to 1, by the formula of the weights and tokens in tools/golden_detection.py.
fn noise(shape: &[i64], phase: f64) -> Tensor {
    let count: i64 = shape.iter().product();
    let wave = (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 12.9898 + phase).sin() * 43758.5453;
    (&wave - wave.floor()).view(shape)
}

fn golden_weight(name: &str, shape: &[i64]) -> Tensor {
    let numbers = (noise(shape, name.bytes().map(f64::from).sum()) * 2.0 - 1.0).to_kind(Kind::Float);
    if name.contains(".norm.") || name.contains("simfp_2.1.") {
        return numbers * 0.1 + if name.ends_with("weight") { 1.0 } else { 0.0 };
    }
    if name.ends_with("bias") {
        return numbers * 0.1;
    }
    let is_transposed = ["deconv.", "simfp_2.0.", "simfp_2.3.", "simfp_3.0."].iter().any(|part| name.contains(part));
    let fan_in: i64 = if is_transposed { shape[0] } else { shape[1..].iter().product() };
    let is_of_deltas = name.contains("anchor_deltas") || name.contains("bbox_pred");
    numbers * if is_of_deltas { 0.3 } else { 2.0 } / (fan_in as f64).sqrt()
}

/// The model of tools/golden_detection.py.
fn golden_model() -> (Detection, Network) {
    let config = config(&[]);
    let everything = Quota { all: 5000, most_positive: 5000 };
    let limits = Limits { of_level: 100, all: 60 };
    let task = Detection { limits, drawn_anchors: everything, drawn_regions: everything, ..Detection::of(&config) };
    let mut weights = fresh(config.model.parameters(&[1, 1]).iter(), 1);
    for Parameter { stage, name, shape, .. } in task.parameters(2) {
        let numbers = golden_weight(&name, &shape);
        weights.insert((stage, name), numbers);
    }
    let network = Network::new(&config, &[1, 1], 0..0, &task.parameters(2), &weights).unwrap();
    (task, network)
}

/// Tokens (b, 1 + n, d) whose map is noise. The class token is 0.
fn golden_tokens(b: i64, phase: f64) -> Tensor {
    let map = (noise(&[b, 16, 64], phase) * 4.0 - 2.0).to_kind(Kind::Float).transpose(1, 2);
    Tensor::cat(&[map.narrow(1, 0, 1).zeros_like(), map], 1)
}

fn object(class: usize, bbox: [f64; 4], polygons: &[&[f64]]) -> Object {
    let outline = Outline::Polygons(polygons.iter().map(|polygon| polygon.to_vec()).collect());
    Object { class, bbox, area: bbox[2] * bbox[3], is_crowd: false, outline }
}

fn golden_scenes() -> Vec<Scene> {
    let first = vec![
        object(1, [3.0, 4.0, 16.0, 12.0], &[&[3.0, 4.0, 19.0, 4.0, 19.0, 16.0, 3.0, 16.0]]),
        object(
            4,
            [10.0, 9.0, 18.0, 20.0],
            &[&[10.0, 9.0, 28.0, 12.0, 20.0, 29.0], &[11.0, 20.0, 17.0, 22.0, 12.0, 27.0]],
        ),
        object(2, [1.0, 0.0, 30.0, 29.0], &[&[1.0, 5.0, 20.0, 0.0, 31.0, 14.0, 28.0, 29.0, 4.0, 25.0]]),
    ];
    let second = vec![
        object(0, [1.5, 2.0, 9.5, 20.0], &[&[1.5, 2.0, 11.0, 3.0, 9.0, 22.0, 2.0, 15.0]]),
        object(3, [1.0, 1.0, 27.0, 22.0], &[&[1.0, 1.0, 28.0, 1.0, 28.0, 23.0, 1.0, 23.0]]),
    ];
    let scene = |(image, (size, objects))| Scene { image, size, objects };
    [([32, 32], first), ([24, 30], second), ([32, 20], Vec::new())].into_iter().enumerate().map(scene).collect()
}

/// The rows of scenes, padded with zeros to the same length.
fn rows(scenes: &[Scene]) -> Tensor {
    let mut rows: Vec<Vec<f64>> = scenes.iter().map(Scene::to_row).collect();
    let longest = rows.iter().map(Vec::len).max().unwrap();
    rows.iter_mut().for_each(|row| row.resize(longest, 0.0));
    Tensor::from_slice(&rows.concat()).view([scenes.len() as i64, longest as i64])
}

fn part(positions: std::ops::Range<usize>, global_batch: f64) -> Part<'static> {
    Part { group: &Solo, seed: 3, step: 9, positions, global_batch }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.contiguous().flatten(0, -1)).unwrap()
}

#[test]
fn the_five_losses_and_all_gradients_are_detectron2s() {
    let (golden, (task, network)) = (golden(), golden_model());
    // The micro-batch is half of the global batch.
    let (losses, gradient) =
        loss::losses(task, &network, &golden_tokens(3, 1.0), &rows(&golden_scenes()), &part(0..3, 6.0)).unwrap();
    let losses: Vec<f32> = losses.iter().map(|loss| loss.double_value(&[]) as f32).collect();
    for (number, loss) in losses.iter().enumerate() {
        assert_close(&format!("loss {number}"), &[*loss], &golden["whole.losses"].narrow(0, number as i64, 1), 1e-5);
    }
    let close = |what: &str, ours: &Tensor, expected: &Tensor| {
        // The allowed error is relative to the largest gradient, however small it is.
        let largest = expected.abs().max().double_value(&[]);
        assert!(largest > 0.0, "{what}");
        assert_close(what, &floats(&(ours * 2.0 / largest)), &(expected / largest), 1e-4);
    };
    close("tokens", &task.map(&gradient), &golden["whole.tokens.gradient"]);
    assert_eq!(gradient.narrow(1, 0, 1).abs().max().double_value(&[]), 0.0, "the class token");
    let named = network.flat().layout().named(network.flat().gradients());
    assert_eq!(named.len(), task.parameters(2).len());
    for ((_, name), ours) in &named {
        close(name, ours, &golden[&format!("gradient.{name}")]);
    }
}

#[test]
fn mask_targets_are_detectron2s() {
    let golden = golden();
    let counts = Vec::<i64>::try_from(&golden["whole.counts"]).unwrap();
    let boxes = corners(&golden["whole.mask_boxes"]);
    let mut fitting = 0;
    for (number, corners) in boxes.iter().enumerate() {
        let expected = Vec::<u8>::try_from(golden["whole.masks"].get(number as i64).flatten(0, -1)).unwrap();
        let scene = &golden_scenes()[usize::from(number >= counts[3] as usize)];
        let drawn = scene.objects.iter().map(|object| crate::coco::outlines::rasterised(&object.outline, *corners, 28));
        fitting += usize::from(drawn.into_iter().any(|drawn| drawn == expected));
    }
    assert_eq!(fitting, boxes.len());
}

#[test]
fn detections_are_detectron2s() {
    let (golden, (task, network)) = (golden(), golden_model());
    let heads = Heads::new(task.architecture, &network, false);
    let map = task.map(&golden_tokens(1, 2.0));
    let detected = tch::no_grad(|| infer::detected(task, &heads, &map, [24, 32], [45, 60]));
    let classes: Vec<i64> = detected.iter().map(|one| one.class as i64).collect();
    assert_eq!(classes, Vec::<i64>::try_from(&golden["found.classes"]).unwrap());
    let scores: Vec<f32> = detected.iter().map(|one| one.score as f32).collect();
    assert_close("scores", &scores, &golden["found.scores"], 1e-5);
    let boxes = detected
        .iter()
        .flat_map(|one| [one.bbox[0], one.bbox[1], one.bbox[0] + one.bbox[2], one.bbox[1] + one.bbox[3]]);
    let boxes: Vec<f32> = boxes.map(|length| length as f32).collect();
    assert_close("boxes", &boxes, &golden["found.boxes"], 1e-5);
    for (number, one) in detected.iter().enumerate().take(20) {
        let inside: u32 = one.runs.iter().skip(1).step_by(2).sum();
        let expected = golden["found.pasted"].get(number as i64).sum(Kind::Int64).int64_value(&[]);
        assert!((i64::from(inside) - expected).abs() <= 2, "mask {number}: {inside} and {expected} pixels");
    }
}

#[test]
fn drawn_boxes_depend_on_the_position_alone_and_parts_add_up() {
    let config = config(&["detection.regions=16"]);
    let task = Detection::of(&config);
    let (_, network) = golden_model();
    let (tokens, scenes) = (golden_tokens(2, 4.0), golden_scenes());
    let losses = |start: usize, count: usize, first: usize| {
        let tokens = tokens.narrow(0, start as i64, count as i64);
        let rows = rows(&scenes[start..start + count]);
        let (losses, gradient) =
            loss::losses(task, &network, &tokens, &rows, &part(first..first + count, 2.0)).unwrap();
        let losses: Vec<f64> = losses.iter().map(|loss| loss.double_value(&[])).collect();
        (losses, gradient)
    };
    let (both, first, second, elsewhere) = (losses(0, 2, 0), losses(0, 1, 0), losses(1, 1, 1), losses(1, 1, 0));
    // Each of the first four losses of two images is the mean of the images' losses, because both images have equally many
    // anchors and regions that train.
    for (number, both) in both.0.iter().enumerate().take(4) {
        let mean = (first.0[number] + second.0[number]) / 2.0;
        assert!((both - mean).abs() < 1e-5 * mean.max(1.0), "loss {number}: {both} and {mean}");
    }
    assert_ne!(second.0[0], elsewhere.0[0], "another position draws other anchors");
    assert_eq!(losses(0, 2, 0).1, both.1, "the same bits");
}

#[test]
fn images_without_objects_train_the_background_alone() {
    let task = Detection::of(&config(&[]));
    let (_, network) = golden_model();
    let before = network.flat().gradients().copy();
    assert_eq!(before.abs().max().double_value(&[]), 0.0);
    let scenes = [Scene { image: 0, size: [32, 20], objects: Vec::new() }];
    let (losses, gradient) =
        loss::losses(task, &network, &golden_tokens(1, 4.0), &rows(&scenes), &part(0..1, 1.0)).unwrap();
    let losses: Vec<f64> = losses.iter().map(|loss| loss.double_value(&[])).collect();
    assert_eq!(losses.len(), 4, "there is no loss of masks");
    assert!(losses[0] > 0.0 && losses[2] > 0.0 && losses[1] == 0.0 && losses[3] == 0.0, "{losses:?}");
    assert!(gradient.isfinite().all().int64_value(&[]) == 1);
    let named = network.flat().layout().named(network.flat().gradients());
    let is_reached = |name: &str| named[&(2, name.to_string())].abs().max().double_value(&[]) > 0.0;
    assert!(is_reached("roi_heads.box_predictor.cls_score.weight"));
    let others = ["box_predictor.bbox_pred.weight", "mask_head.deconv.weight"];
    assert!(!others.iter().any(|name| is_reached(&format!("roi_heads.{name}"))));
}

#[test]
fn a_network_that_diverged_has_a_loss_that_says_so() {
    let (task, network) = golden_model();
    let tokens = golden_tokens(3, 1.0) * f64::NAN;
    let loss = task.loss(&network, &[tokens], &rows(&golden_scenes()), &part(0..3, 3.0)).unwrap();
    assert!(loss.sum.double_value(&[]).is_nan());
}

#[test]
fn a_small_network_trains_and_is_evaluated() {
    for (masks, precision) in [(true, "fp32"), (false, "bf16")] {
        let (of_masks, of_run) = (format!("detection.masks={masks}"), format!("run.precision={precision}"));
        let config = config(&[&of_masks, &of_run, "detection.regions=64"]);
        let task = crate::task::Task::of(&config);
        let parameters = task.parameters(2);
        let table = config.model.parameters(&[1, 1]);
        let weights = fresh(table.iter().chain(&parameters), 3);
        let mut network = Network::new(&config, &[1, 1], 0..2, &parameters, &weights).unwrap();
        let images = (Tensor::arange(2 * 3 * 32 * 32, FP32_ON_HOST) * 0.37).sin().view([2, 3, 32, 32]);
        let targets = task.random_targets(2);
        let mut losses = Vec::new();
        for _ in 0..10 {
            let _ = network.flat_mut().gradients_mut().zero_();
            let (outputs, tape) = network.train(&images, &DropPath::none(), &task.taps());
            let loss = task.loss(&network, &outputs, &targets, &part(0..2, 2.0)).unwrap();
            losses.push(loss.sum.double_value(&[]));
            network.backward(tape, loss.gradients);
            let length = network.flat().len() as i64;
            let gradients = network.flat().gradients().narrow(0, 0, length);
            let step = &gradients * (-0.1 / gradients.norm().double_value(&[]).max(1.0));
            let next = network.flat().buffer() + step;
            network.flat_mut().set(&next);
        }
        assert!(losses[9] < 0.95 * losses[0], "{losses:?}");
        let mut sums = task.sums();
        for image in 0..2 {
            let labels = targets.narrow(0, image, 1);
            let outputs = task.infer(&network, &[images.narrow(0, image, 1)], &labels).unwrap();
            task.add(&mut sums, &outputs, &labels);
            let (detected, rest) = detected_from_row(&Vec::<f64>::try_from(outputs[0].get(0)).unwrap())
                .map(|(detected, rest)| (detected, rest.len()))
                .unwrap();
            assert_eq!(rest, 0);
            for one in detected {
                let [left, top, width, height] = one.bbox;
                assert!(left >= 0.0 && top >= 0.0 && left + width <= 32.0001 && top + height <= 32.0001);
                assert_eq!(one.runs.iter().sum::<u32>(), if masks { 32 * 32 } else { 0 });
            }
        }
        let (values, classes) = task.figures(&sums, 2.0, &config, &[]);
        assert!(values["box_ap"] >= 0.0 && values.contains_key("mask_ap") == masks, "{values:?}");
        assert_eq!(classes.len(), 5);
        assert!(values.keys().all(|key| task.metrics().iter().any(|metric| metric.key == key)));
    }
}
