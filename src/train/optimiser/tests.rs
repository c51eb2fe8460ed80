//! Tests what the optimisers share, and that host and device compute the same.

use super::*;
use crate::config::Config;
use crate::model::fresh;
use crate::plan::{PhasePlan, Plan};
use crate::run::table::FINETUNE;
use std::sync::mpsc::channel;

#[test]
fn clipping_brings_a_long_gradient_to_the_limit_and_leaves_a_short_one() {
    let scale = clip_scale(norm(&[3.0, 4.0]), 1.0);
    assert!((f64::from(scale) * 5.0 - 1.0).abs() < 1e-5);
    assert_eq!(clip_scale(norm(&[0.3, 0.4]), 1.0), 1.0);
    assert_eq!(clip_scale(norm(&[3.0, 4.0]), 0.0), 1.0);
}

#[test]
fn the_norm_counts_every_number_once_for_any_number_of_threads() {
    for numbers in [0, 1, 4095, 4097, 3 * 4096 + 5, 100_000] {
        let gradients: Vec<f32> = (0..numbers).map(|i| ((i as f32) * 0.37).sin()).collect();
        let expected = gradients.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
        assert!((norm(&gradients) - expected).abs() <= 1e-6 * expected, "{numbers}");
    }
}

#[test]
fn weights_do_not_change_while_they_are_lent() {
    let config = Config::parse("[model]\nimage_size = 32\npatch_size = 4\nwidth = 64\nheads = 2", &[]).unwrap();
    let table = config.model.parameters(config.model.depths());
    let mut flat = FlatParameters::new(table.iter(), &fresh(table.iter(), 1), Kind::Float).unwrap();
    let mut optimiser = Optimiser::new(&config.meta, &flat);
    let _ = flat.gradients_mut().fill_(1.0);
    let mut change = |by_optimiser: bool| {
        let (loan, lent, before) = (flat.lend(), flat.buffer().shallow_clone(), flat.buffer().copy());
        let (begun, begins) = channel();
        let reader = std::thread::spawn(move || {
            begun.send(()).unwrap();
            let stays = (0..300).all(|_| lent == before);
            drop(loan);
            (stays, before)
        });
        begins.recv().unwrap();
        match by_optimiser {
            true => optimiser.step(&mut flat, 0.0, 0.1),
            false => flat.set(&(flat.buffer() + 1.0)),
        }
        let (stays, before) = reader.join().unwrap();
        assert!(stays, "they change while they are lent, by the optimiser: {by_optimiser}");
        assert_ne!(*flat.buffer(), before, "they change after the loan");
    };
    change(true);
    change(false);
}

#[test]
fn host_and_device_compute_the_same_weights_moments_and_average() {
    for sets in
        [&[][..], &["meta.optimiser=sgd"], &["meta.optimiser=sgd", "meta.nesterov=false", "meta.decay_all=true"]]
    {
        compute_the_same(sets);
    }
}

#[test]
fn layers_learn_at_the_rates_of_beit() {
    ["adamw", "sgd"].into_iter().for_each(learn_at_the_rates_of_beit);
}

fn learn_at_the_rates_of_beit(optimiser: &str) {
    let text = "[model]\nimage_size = 8\npatch_size = 4\nwidth = 8\nheads = 2\ndepths = [2, 3]\n[finetune]\nlayer_decay = 0.65";
    let plan = Plan::without_data(Config::parse(text, &[format!("finetune.optimiser={optimiser}")]).unwrap());
    let phase = plan.phase(&FINETUNE, None);
    let table = phase.parameters(&plan);
    let weights = fresh(table.iter(), 7);
    let after = |lr: f64, rates: Option<Vec<(Range<usize>, f64)>>, on_device: bool| {
        let mut flat = FlatParameters::new(table.iter(), &weights, Kind::Float).unwrap();
        let optimiser = Optimiser::new(&phase.training, &flat);
        let mut optimiser = if let Some(rates) = rates { optimiser.with_rates(rates) } else { optimiser };
        let _ = flat.gradients_mut().fill_(0.5);
        optimiser.steps = 1;
        tch::no_grad(|| match on_device {
            true => optimiser.step_on_device(&mut flat, 0.0, lr),
            false => optimiser.step_on_host(&mut flat, 0.0, lr),
        });
        flat.layout().named(flat.buffer())
    };
    // The expected factors are those of `LearningRateDecayOptimizerConstructor` of mmsegmentation 1.2.2 for a BEiT of five blocks
    // with a decay of 0.65.
    let expected = [0.075_418_890_625, 0.116_029_062_5, 0.178_506_25, 0.274_625, 0.422_5, 0.65, 1.0];
    let all = after(1e-2, Some(phase.rates(&plan, &[])), false);
    let on_device = after(1e-2, Some(phase.rates(&plan, &[])), true);
    for (layer, rate) in expected.into_iter().enumerate() {
        let alone = after(1e-2 * rate, None, false);
        let of_layer = table.iter().filter(|parameter| {
            let first = if parameter.stage == 0 { 1 } else { 3 };
            let rest = if ["norm.", "head."].iter().any(|e| parameter.name.starts_with(e)) { 6 } else { 0 };
            let block = parameter.name.strip_prefix("blocks.").map(|name| first + name[..1].parse::<usize>().unwrap());
            block.unwrap_or(rest) == layer
        });
        assert!(of_layer.clone().count() >= 4);
        for parameter in of_layer {
            let key = (parameter.stage, parameter.name.clone());
            assert!((&all[&key] - &alone[&key]).abs().max().double_value(&[]) < 1e-8, "{optimiser}: {key:?}");
            assert!((&all[&key] - &on_device[&key]).abs().max().double_value(&[]) < 1e-7, "{optimiser}: {key:?}");
        }
    }
    let without = PhasePlan { training: Training { layer_decay: 1.0, ..phase.training.clone() }, ..phase.clone() };
    assert_eq!(without.rates(&plan, &[]).len(), 1);
}

fn compute_the_same(sets: &[&str]) {
    let text = "[model]\nimage_size = 8\npatch_size = 4\nwidth = 8\nheads = 2\ndepths = [1]\n[train]\nema = 0.9";
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    let config = Config::parse(text, &sets).unwrap();
    let table = config.model.parameters(&[1]);
    let weights = fresh(table.iter(), 7);
    let flat = || FlatParameters::new(table.iter(), &weights, Kind::Float).unwrap();
    let (mut host, mut device) = (flat(), flat());
    let mut on_host = Optimiser::new(&config.meta, &host);
    let mut on_device = Optimiser::new(&config.meta, &device);
    let _guard = tch::no_grad_guard();
    tch::manual_seed(3);
    for (step, clip) in [0.0, 0.5, 1e9, 0.1].into_iter().enumerate() {
        let gradients = host.gradients().randn_like() * 0.1;
        for flat in [&mut host, &mut device] {
            flat.gradients_mut().copy_(&gradients);
        }
        let lr = 1e-2 * (step + 1) as f64;
        (on_host.steps, on_device.steps) = (step as u64 + 1, step as u64 + 1);
        on_host.step_on_host(&mut host, clip, lr);
        on_device.step_on_device(&mut device, clip, lr);
    }
    // With a loss or a gradient that is not finite, an update changes nothing, whether or not the gradients are clipped.
    for (flat, optimiser) in [(&mut host, &mut on_host), (&mut device, &mut on_device)] {
        let all = |flat: &FlatParameters, optimiser: &Optimiser| {
            optimiser.state().iter().map(|(_, t)| t.copy()).chain([flat.buffer().copy()]).collect::<Vec<_>>()
        };
        let before = all(flat, optimiser);
        let mut try_both = |flat: &mut FlatParameters| {
            for clip in [0.0, 1.0] {
                optimiser.step(flat, clip, 1.0);
                optimiser.step_on_device(flat, clip, 1.0);
            }
            assert_eq!(before, all(flat, optimiser), "the moments, the average and the weights");
        };
        let loss = flat.loss().copy();
        let _ = flat.loss().fill_(f64::NAN);
        try_both(flat);
        flat.loss().copy_(&loss);
        for value in [f64::NAN, f64::INFINITY] {
            let _ = flat.gradients().get(5).fill_(value);
            try_both(flat);
        }
    }
    let close = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) < 1e-6;
    assert!(close(host.buffer(), device.buffer()), "{sets:?}");
    assert!(!close(host.buffer(), flat().buffer()), "the weights have moved");
    for ((name, a), (_, b)) in on_host.state().into_iter().zip(on_device.state()) {
        assert!(close(a, b), "{sets:?}: {name}");
    }
}
