//! Compares images that a device normalises with images that the workers normalise.

use super::Feed;
use super::images::{BatchImages, Handover};
use super::loader::Loader;
use super::test_batches::test_batches;
use crate::config::{Config, TaskKind};
use crate::data::source::{self, Source};
use crate::plan::Plan;
use crate::plan::groups::{micro_batches, share};
use crate::run::table::META;
use crate::weights::{Pinning, Staging, floats};
use tch::{Device, Tensor};

/// The samples of a step: two pieces of one block of mixed samples, and a part of the next block.
const GLOBAL_BATCH: usize = 160;

/// The side and the config keys of drawn images: gray and colour with the padded crop of small images, and colour with the
/// resized crop of larger images.
const DRAWN: [(usize, &str); 3] = [
    (16, "channels = 1\n[data]\nmean = [0.1307]\nstd = [0.3081]"),
    (24, "[data]\ncrop_border = \"reflect\""),
    (40, "[data]\nmean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]"),
];

/// A plan and a source of drawn images, half of which get a rectangle of noise in training.
fn drawn((side, keys): (usize, &str), sets: &[&str]) -> (Plan, Source) {
    let text = format!(
        "[model]\nimage_size = {side}\npatch_size = 8\nclasses = 5\n{keys}\nformat = \"shapes\"\ntrain_images = 320\n\
         test_images = 150\nerase = 0.5\n[train]\nglobal_batch = {GLOBAL_BATCH}\n"
    );
    let config = Config::parse(&text, &sets.iter().map(|set| set.to_string()).collect::<Vec<_>>()).unwrap();
    let source = source::open_read_only(&config).unwrap();
    (Plan::new(config, source.train.len()).unwrap(), source)
}

/// The bits of images and targets in two steps of all ranks, and the number of pieces that are bytes with noise.
fn stream((plan, source): &(Plan, Source), handover: &Handover, ranks: usize, micro: usize) -> (Vec<u32>, usize) {
    let phase = plan.phase(&META, None);
    let own = |rank| micro_batches(share(GLOBAL_BATCH, rank, ranks), micro);
    let feed = Feed { source, workers: 2 };
    let (mut bits, mut pieces_with_noise) = (Vec::new(), 0);
    for rank in 0..ranks {
        let loader = Loader::start(plan, &phase, feed, own(rank), 1, handover.clone()).unwrap();
        for batch in loader.take(2 * own(rank).len()) {
            let batch = batch.unwrap();
            let has_noise = |images: &BatchImages| matches!(images, BatchImages::Bytes { erased: Some(_), .. });
            pieces_with_noise += batch.pieces.iter().filter(|piece| has_noise(&piece.images)).count();
            let (images_bchw, targets_bc, _lent) = batch.on(Device::Cpu);
            bits.extend([&images_bchw, &targets_bc].into_iter().flat_map(floats).map(|number| number.to_bits()));
        }
    }
    (bits, pieces_with_noise)
}

#[test]
fn a_device_makes_the_bits_of_normalised_images_from_bytes_for_every_share_of_a_batch() {
    for recipe in DRAWN {
        let data = drawn(recipe, &[]);
        for (ranks, micro) in [(1, GLOBAL_BATCH), (2, 12), (3, 48)] {
            let (normalised, none) = stream(&data, &Handover::Unmixed(Staging::of_cpu()), ranks, micro);
            let (from_bytes, with_noise) = stream(&data, &Handover::Bytes(Staging::of_cpu()), ranks, micro);
            assert!(normalised == from_bytes, "{recipe:?}: {ranks} rank(s), micro-batches of {micro}");
            assert!(none == 0 && with_noise > 4, "{with_noise} pieces of bytes have noise");
        }
    }
}

#[test]
fn a_device_makes_the_bits_of_a_cpus_images_if_mixing_does_not_round() {
    for sets in [["data.mixup=0", "data.cutmix=1"], ["data.mixup=0", "data.cutmix=0"]] {
        let data = drawn(DRAWN[2], &sets);
        let (finished, _) = stream(&data, &Handover::Finished, 1, 32);
        let (from_bytes, with_noise) = stream(&data, &Handover::Bytes(Staging::of_cpu()), 1, 32);
        assert!(finished == from_bytes && with_noise > 0, "{sets:?}");
    }
}

#[test]
fn a_device_makes_the_bits_of_evaluated_images_from_bytes() {
    for recipe in DRAWN {
        let (plan, source) = drawn(recipe, &[]);
        let evaluated = |handover: Handover, as_bytes: bool| -> Vec<(Vec<f32>, Tensor)> {
            let feed = Feed { source: &source, workers: 2 };
            let batches = test_batches(&plan.config, feed, 3..150, 64, handover).unwrap();
            let numbers = batches.map(|batch| {
                let batch = batch.unwrap();
                let [images] = &batch.images[..] else { panic!("one scale") };
                assert_eq!(matches!(images, BatchImages::Bytes { .. }), as_bytes);
                (floats(&images.on(Device::Cpu)).to_vec(), batch.labels.shallow_clone())
            });
            numbers.collect()
        };
        let normalised = evaluated(Handover::Finished, false);
        assert_eq!(normalised.len(), 3);
        assert!(normalised == evaluated(Handover::Bytes(Staging::of_cpu()), true), "{recipe:?}");
    }
}

#[test]
fn a_gpu_gets_bytes_unless_they_are_switched_off_and_a_cpu_gets_finished_images() {
    let handover = |device, as_bytes| Handover::new(Staging::new(device, Pinning::default()), as_bytes);
    assert!(matches!(handover(Device::Cuda(0), true), Handover::Bytes(_)));
    assert!(matches!(handover(Device::Cuda(0), false), Handover::Unmixed(_)));
    assert!(matches!(handover(Device::Cpu, true), Handover::Finished));
    // Images with label maps or objects are normalised by the workers.
    let bytes = Handover::Bytes(Staging::of_cpu());
    let config = |task| Config { task, ..Config::parse("", &[]).unwrap() };
    let is_sent_as_bytes = |task| bytes.numbers(&config(task)).is_some();
    assert_eq!(
        [TaskKind::Classification, TaskKind::Segmentation, TaskKind::Detection].map(is_sent_as_bytes),
        [true, false, false]
    );
}
