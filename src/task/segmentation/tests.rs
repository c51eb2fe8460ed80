use super::*;
use crate::collective::Solo;
use crate::config::TaskKind;
use std::ops::Range;

/// The task of ViT-B at crops of 512×512 pixels, unless `sets` changes a key.
pub fn task(sets: &[&str]) -> Segmentation {
    Segmentation::of(&config(sets))
}

fn config(sets: &[&str]) -> Config {
    let shapes = ["segmentation.format=shapes", "segmentation.train_images=2", "segmentation.test_images=2"];
    let sets: Vec<String> = shapes.iter().chain(sets).map(|set| set.to_string()).collect();
    Config::parse("", &sets).unwrap().of_task(TaskKind::Segmentation)
}

#[test]
fn an_evaluation_has_the_logits_of_mmsegmentation() {
    // The formula of the numbers in tools/golden_segmentation.py.
    let wave = |shape: &[i64], phase: f64| {
        let count: i64 = shape.iter().product();
        (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 0.37 + phase).sin().to_kind(Kind::Float).view(shape)
    };
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/segmentation.safetensors");
    let golden: std::collections::BTreeMap<String, Tensor> =
        Tensor::read_safetensors(path).unwrap().into_iter().collect();
    for (neck, name) in [("none", "logits"), ("mln", "mln.logits"), ("pyramid", "pyramid.logits")] {
        let neck = format!("segmentation.neck={neck}");
        let config = config(&[
            "model.width=16",
            "model.heads=2",
            "model.patch_size=4",
            "model.depths=[1, 1]",
            "segmentation.width=8",
            "segmentation.auxiliary_weight=0.0",
            "segmentation.classes=7",
            "segmentation.crop=32",
            &neck,
        ]);
        let task = Segmentation::of(&config);
        let mut weights = crate::model::fresh(config.model.parameters(&[1, 1]).iter(), 1);
        for Parameter { stage, name, shape, .. } in task.parameters(2) {
            let is_of_neck = name.starts_with("neck.") && !name.contains("upsample_4x.1.");
            let scale = if is_of_neck { 1.0 } else { 0.1 };
            let numbers = wave(&shape, name.bytes().map(f64::from).sum()) * scale;
            let is_near_one =
                ["bn.weight", "upsample_4x.1.weight", "running_var"].iter().any(|end| name.ends_with(end));
            weights.insert((stage, name), if is_near_one { numbers + 1.0 } else { numbers });
        }
        let network = Network::new(&config, &[1, 1], 0..0, &task.parameters(2), &weights).unwrap();
        let maps: Vec<Tensor> = (0..4).map(|tap| wave(&[2, 16, 8, 8], 100.0 * f64::from(tap))).collect();
        let heads = Heads::new(task, &network, None);
        let logits = heads.uper(&heads.neck(maps).unwrap()).unwrap();
        let difference = (&logits - &golden[name]).abs().max().double_value(&[]);
        assert!(difference < 1e-4 * golden[name].abs().max().double_value(&[]), "{neck}: {difference}");
    }
}

#[test]
fn a_dropped_channel_depends_on_the_position_alone_and_channels_keep_their_mean() {
    let task = task(&["segmentation.head_dropout=0.25"]);
    let part = |positions: Range<usize>| Part { group: &Solo, seed: 3, step: 9, positions, global_batch: 8.0 };
    let [whole, _] = loss::masks(task, &part(0..8), Device::Cpu);
    let [later, _] = loss::masks(task, &part(6..8), Device::Cpu);
    assert_eq!(whole.narrow(0, 6, 2), later);
    assert!((whole.mean(Kind::Float).double_value(&[]) - 1.0).abs() < 0.05);
    let dropped = whole.eq(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
    assert!((dropped - 0.25).abs() < 0.04, "{dropped}");
}

#[test]
fn pixels_without_a_class_have_no_part_in_the_loss_even_if_there_are_no_others() {
    let logits = Tensor::randn([2, 3, 4, 4], (Kind::Float, Device::Cpu));
    let targets = Tensor::full([2, 16, 16], i64::from(IGNORED), (Kind::Uint8, Device::Cpu));
    let (sum, gradient) = loss::cross_entropy(&logits, &targets, 16);
    assert_eq!((sum.double_value(&[]), gradient.abs().max().double_value(&[])), (0.0, 0.0));
    let _ = targets.get(0).fill_(1);
    let (sum, gradient) = loss::cross_entropy(&logits, &targets, 16);
    assert!(sum.double_value(&[]) > 0.0 && gradient.get(0).abs().max().double_value(&[]) > 0.0);
    assert_eq!(gradient.get(1).abs().max().double_value(&[]), 0.0);
}
