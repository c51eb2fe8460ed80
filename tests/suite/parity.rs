//! Compares with results of timm and torch, which `tools/golden.py` has written. The environment variable INCUBATE_GOLDEN can name
//! a folder with other results, for example of newer versions.

use incubate::collective::Solo;
use incubate::config::{Config, Schedule};
use incubate::data::feed::batch::Batch;
use incubate::model::{DropPath, Network};
use incubate::plan::{PhasePlan, Plan};
use incubate::run::table::{E2E, MODULE};
use incubate::task::{Loss, Part, Task};
use incubate::train::optimiser::Optimiser;
use incubate::train::step::Stepper;
use incubate::weights::{Weights, floats};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tch::Tensor;

pub const BATCH: usize = 6;
const STEPS: usize = 20;

/// The same networks as `SHAPES` in tools/golden.py.
pub fn plan(shape: &str) -> Plan {
    let model = match shape {
        "gray" => {
            "image_size = 28\npatch_size = 7\nchannels = 1\nclasses = 10\nwidth = 24\nheads = 4\ndepths = [2, 2, 2, 2]"
        }
        "color" => {
            "image_size = 16\npatch_size = 4\nchannels = 3\nclasses = 7\nwidth = 32\nheads = 2\ndepths = [1, 2, 3]\n\
             qkv_bias = false\nlayer_norm_eps = 1e-5"
        }
        _ => "image_size = 24\npatch_size = 8\nchannels = 3\nclasses = 5\nwidth = 40\nheads = 5\ndepths = [3, 1]",
    };
    let channels = if shape == "gray" { 1 } else { 3 };
    let list = vec!["0.5"; channels].join(", ");
    let text = format!(
        "[model]\n{model}\n[data]\nmean = [{list}]\nstd = [{list}]\nrepeats = 1\n[train]\nglobal_batch = {BATCH}\n\
         base_lr = {}\nwarmup_epochs = 3\nepochs = {STEPS}\n[module]\nepochs = {STEPS}\ndrop_path = 0\n[e2e]\ndrop_path = 0\n\
         [finetune]\nepochs = {STEPS}",
        1e-3 * 512.0 / BATCH as f64
    );
    Plan::new(Config::parse(&text, &[]).unwrap(), BATCH).unwrap()
}

/// The networks that have golden results: the target, and each hybrid.
fn cases() -> Vec<(String, Plan, PhasePlan)> {
    let mut cases = Vec::new();
    for shape in ["gray", "color", "wide"] {
        let plan = plan(shape);
        cases.push((format!("{shape}-target"), plan.clone(), plan.phase(&E2E, None)));
        for i in 0..plan.config.model.stages() {
            cases.push((format!("{shape}-hybrid-{i}"), plan.clone(), plan.phase(&MODULE, Some(i))));
        }
    }
    cases
}

pub fn golden(name: &str) -> PathBuf {
    let folder = std::env::var("INCUBATE_GOLDEN").unwrap_or(format!("{}/tests/golden", env!("CARGO_MANIFEST_DIR")));
    PathBuf::from(folder).join(name)
}

/// Numbers that `tools/golden.py` and the other golden scripts compute in the same way, for weights and batches.
pub fn wave(count: usize, phase: f64) -> impl Iterator<Item = f64> {
    (0..count).map(move |k| (0.37 * k as f64 + phase).sin())
}

pub fn weights(plan: &Plan, depths: &[usize]) -> Weights {
    let weight = |p: incubate::family::parameter::Parameter| {
        let name = plan.config.model.whole_name(&p, depths);
        let mean = if name.contains("norm") && name.ends_with("weight") { 1.0 } else { 0.0 };
        let phase = name.bytes().map(f64::from).sum();
        let values: Vec<f32> = wave(p.count(), phase).map(|w| (mean + 0.1 * w) as f32).collect();
        ((p.stage, p.name), Tensor::from_slice(&values).view(&p.shape[..]))
    };
    plan.config.model.parameters(depths).into_iter().map(weight).collect()
}

pub fn batch(plan: &Plan, step: usize) -> (Tensor, Tensor) {
    let model = &plan.config.model;
    let (size, channels, classes) = (model.image_size(), model.channels(), model.classes());
    let images: Vec<f32> = wave(BATCH * channels * size * size, 1000.0 + step as f64).map(|v| v as f32).collect();
    let raw: Vec<f64> = wave(BATCH * classes, 2000.0 + step as f64).map(|v| (1.0 + v).powi(2)).collect();
    let targets: Vec<f32> =
        raw.chunks(classes).flat_map(|row| row.iter().map(|v| (v / row.iter().sum::<f64>()) as f32)).collect();
    let side = size as i64;
    (
        Tensor::from_slice(&images).view([BATCH as i64, channels as i64, side, side]),
        Tensor::from_slice(&targets).view([BATCH as i64, classes as i64]),
    )
}

/// The batch of a step as a loader makes it, in two micro-batches of different sizes, so that gradients accumulate.
pub fn micro_batches(plan: &Plan, step: usize) -> impl Iterator<Item = anyhow::Result<Batch>> + use<> {
    let (images, targets) = batch(plan, step);
    [0..4, 4..6].into_iter().map(move |positions| {
        let part = |t: &Tensor| t.narrow(0, positions.start as i64, positions.len() as i64);
        Ok(Batch::of(part(&images), part(&targets), positions.clone()))
    })
}

fn network(plan: &Plan, phase: &PhasePlan) -> Network {
    // On a busy machine two threads would wait for each other in each of these tiny products.
    tch::set_num_threads(1);
    Network::new(&plan.config, &phase.depths, phase.trained.clone(), &[], &weights(plan, &phase.depths)).unwrap()
}

/// The largest difference, relative to the golden tensor's largest magnitude.
fn difference(ours: &Tensor, golden: &Tensor) -> f64 {
    assert_eq!(ours.size(), golden.size());
    let largest = golden.abs().max().double_value(&[]).max(1e-12);
    (ours - golden).abs().max().double_value(&[]) / largest
}

#[test]
fn logits_loss_and_every_gradient_equal_timms_and_frozen_stages_have_none() {
    for (case, plan, phase) in cases() {
        let golden: BTreeMap<String, Tensor> =
            Tensor::read_safetensors(golden(&format!("{case}.safetensors"))).unwrap().into_iter().collect();
        let network = network(&plan, &phase);
        let (images, targets) = batch(&plan, 0);
        let task = Task::of(&plan.config);
        let (outputs, tape) = network.train(&images, &DropPath::none(), &task.taps());
        let part = Part { group: &Solo, seed: 0, step: 0, positions: 0..BATCH, global_batch: BATCH as f64 };
        let Loss { sum, gradients } = task.loss(&network, &outputs, &targets, &part).unwrap();
        assert!(difference(&outputs[0], &golden["logits"]) < 1e-5, "{case}: logits");
        let evaluated = network.forward(&images, &task.taps());
        assert!(difference(&evaluated[0], &golden["logits"]) < 1e-5, "{case}: logits of an evaluation");
        assert!(difference(&sum.reshape([1]), &golden["loss"]) < 1e-5, "{case}: loss");

        network.backward(tape, gradients);
        let gradients = network.flat().layout().named(network.flat().gradients());
        assert_eq!(gradients.len() + 2, golden.len(), "{case}: exactly the trained parameters have gradients");
        for ((stage, name), gradient) in &gradients {
            let name = timm_name(&plan, &phase, *stage, name);
            let d = difference(gradient, &golden[&format!("grad.{name}")]);
            assert!(d < 1e-5, "{case}: gradient of {name} differs by {d:e}");
        }
    }
}

fn timm_name(plan: &Plan, phase: &PhasePlan, stage: usize, name: &str) -> String {
    let table = plan.config.model.parameters(&phase.depths);
    let parameter = table.iter().find(|p| p.stage == stage && p.name == name).unwrap();
    plan.config.model.whole_name(parameter, &phase.depths)
}

#[test]
fn twenty_adamw_steps_with_the_official_schedule_give_torchs_loss_curve() {
    let curves: Value = serde_json::from_slice(&std::fs::read(golden("curves.json")).unwrap()).unwrap();
    for (case, plan, phase) in cases() {
        let mut network = network(&plan, &phase);
        let mut optimiser = Optimiser::new(&phase.training, network.flat());
        let mut stepper = Stepper::new(&plan, &phase, &Solo, 2);
        let curve = curves["curves"][&case].as_array().unwrap();
        assert_eq!((curve.len(), phase.steps), (STEPS, STEPS as u64));
        for (step, golden) in curve.iter().enumerate() {
            let lr = phase.lr(step as u64);
            assert!((lr / golden[1].as_f64().unwrap() - 1.0).abs() < 1e-9, "{case}: learning rate of step {step}");
            let loss = stepper
                .step(&mut network, &mut optimiser, &mut micro_batches(&plan, step), step as u64, lr)
                .unwrap()
                .expect("on a CPU the outcome is known at once")
                .loss;
            let expected = golden[0].as_f64().unwrap();
            assert!((loss / expected - 1.0).abs() < 1e-4, "{case}: step {step} loss {loss}, torch {expected}");
        }
        let first = curve[0][0].as_f64().unwrap();
        assert!(curve[STEPS - 1][0].as_f64().unwrap() < first, "{case}: the loss falls");
    }
}

#[test]
fn the_deit_schedule_equals_timms_scheduler_stepped_as_the_official_code_steps_it() {
    let curves: Value = serde_json::from_slice(&std::fs::read(golden("curves.json")).unwrap()).unwrap();
    let meta = Config::parse("", &[]).unwrap().meta;
    assert_eq!(meta.schedule, Schedule::Deit);
    for (epoch, golden) in curves["deit_schedule"].as_array().unwrap().iter().enumerate() {
        let lr = incubate::plan::schedule::learning_rate(&meta, epoch as u64 * 625, 625);
        assert!((lr / golden.as_f64().unwrap() - 1.0).abs() < 1e-9, "epoch {epoch}: {lr} and {golden}");
    }
}

#[test]
fn clipping_bounds_what_the_optimiser_sees() {
    // One step from zero moments, with and without clipping. The moments are compared, because the scale of the gradient does not
    // change AdamW's first update.
    let (_, plan, phase) = cases().remove(0);
    let gradient_norm = |clip: f64| {
        let mut phase = phase.clone();
        phase.training.clip_grad = clip;
        let mut network = network(&plan, &phase);
        let mut optimiser = Optimiser::new(&phase.training, network.flat());
        let mut stepper = Stepper::new(&plan, &phase, &Solo, 2);
        stepper.step(&mut network, &mut optimiser, &mut micro_batches(&plan, 0), 0, 1e-3).unwrap();
        // After the first step exp_avg = 0.1 · gradient.
        floats(optimiser.state()[0].1).iter().map(|m| f64::from(m / 0.1).powi(2)).sum::<f64>().sqrt()
    };
    let free = gradient_norm(0.0);
    let limit = free / 3.0;
    assert!((gradient_norm(limit) / limit - 1.0).abs() < 1e-3);
    assert!((gradient_norm(10.0 * free) / free - 1.0).abs() < 1e-3);
}
