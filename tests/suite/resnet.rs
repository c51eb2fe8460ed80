//! Compares ResNets with results of plain PyTorch, which `tools/golden_resnet.py` has written.

use crate::parity::{BATCH, batch, wave};
use incubate::collective::Solo;
use incubate::config::Config;
use incubate::data::feed::batch::Batch;
use incubate::family::parameter::Parameter;
use incubate::model::{DropPath, Network, fresh};
use incubate::plan::{PhasePlan, Plan};
use incubate::run::table::{E2E, MODULE};
use incubate::task::{Loss, Part, Task};
use incubate::train::optimiser::Optimiser;
use incubate::train::step::Stepper;
use incubate::weights::Weights;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

const STEPS: usize = 20;

/// The same networks as `SHAPES` in tools/golden_resnet.py.
pub fn plan(shape: &str, frozen_norm: &str) -> Plan {
    let model = match shape {
        "even" => {
            "image_size = 12\nchannels = 3\nclasses = 5\nwidth = 4\nlayers = [2, 2, 2]\ndepths = [2, 2, 2]\nshortcut = \"A\""
        }
        "odd" => "image_size = 9\nchannels = 1\nclasses = 4\nwidth = 6\nlayers = [2, 3, 2]\ndepths = [1, 3, 3]",
        _ => "image_size = 8\nchannels = 3\nclasses = 3\nwidth = 2",
    };
    let channels = if shape == "odd" { 1 } else { 3 };
    let list = vec!["0.5"; channels].join(", ");
    let text = format!(
        "[model]\nfamily = \"resnet\"\nfrozen_norm = \"{frozen_norm}\"\n{model}\n[data]\nmean = [{list}]\nstd = [{list}]\n\
         repeats = 1\n[train]\nglobal_batch = {BATCH}\nepochs = {STEPS}\nwarmup_epochs = 5\n[module]\ndrop_path = 0\n\
         [e2e]\ndrop_path = 0"
    );
    Plan::new(Config::parse(&text, &[]).unwrap(), BATCH).unwrap()
}

/// The networks that have golden results: all targets, and except for «deep» each hybrid with both norms of frozen stages.
fn cases() -> Vec<(String, Plan, PhasePlan)> {
    let mut cases = Vec::new();
    for shape in ["even", "odd", "deep"] {
        let target = plan(shape, "running");
        cases.push((format!("resnet-{shape}-target"), target.clone(), target.phase(&E2E, None)));
        for norm in ["running", "batch"].into_iter().filter(|_| shape != "deep") {
            for stage in 0..3 {
                let plan = plan(shape, norm);
                let phase = plan.phase(&MODULE, Some(stage));
                cases.push((format!("resnet-{shape}-hybrid-{stage}-{norm}"), plan, phase));
            }
        }
    }
    cases
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR")))
}

pub fn weights(plan: &Plan, depths: &[usize]) -> Weights {
    let weight = |p: Parameter| {
        let name = plan.config.model.whole_name(&p, depths);
        let is_around_one = name.ends_with("running_var") || (p.shape.len() == 1 && name.ends_with("weight"));
        let mean = if is_around_one { 1.0 } else { 0.0 };
        let values: Vec<f32> = wave(p.count(), name.bytes().map(f64::from).sum())
            .map(|w| if is_around_one { (mean + 0.1 * w) as f32 } else { (0.1 * w) as f32 })
            .collect();
        ((p.stage, p.name), Tensor::from_slice(&values).view(&p.shape[..]))
    };
    plan.config.model.parameters(depths).into_iter().map(weight).collect()
}

fn network(plan: &Plan, phase: &PhasePlan) -> Network {
    // On a busy machine two threads would wait for each other in each of these tiny products.
    tch::set_num_threads(1);
    Network::new(&plan.config, &phase.depths, phase.trained.clone(), &[], &weights(plan, &phase.depths)).unwrap()
}

fn largest_difference(ours: &Tensor, golden: &Tensor) -> f64 {
    assert_eq!(ours.size(), golden.size());
    (ours - golden).abs().max().double_value(&[])
}

/// PyTorch's name for a tensor of a stage.
fn torch_name(plan: &Plan, phase: &PhasePlan, stage: usize, name: &str) -> String {
    let table = plan.config.model.parameters(&phase.depths);
    let parameter = table.iter().find(|p| p.stage == stage && p.name == name).unwrap();
    plan.config.model.whole_name(parameter, &phase.depths)
}

#[test]
fn logits_gradients_and_statistics_equal_pytorchs_under_both_norms_of_frozen_stages() {
    for (case, plan, phase) in cases() {
        let golden: BTreeMap<String, Tensor> =
            Tensor::read_safetensors(golden(&format!("{case}.safetensors"))).unwrap().into_iter().collect();
        let mut network = network(&plan, &phase);
        let (images, targets) = batch(&plan, 0);
        let task = Task::of(&plan.config);
        let evaluated = network.forward(&images, &task.taps());
        let (outputs, tape) = network.train(&images, &DropPath::none(), &task.taps());
        let part = Part { group: &Solo, seed: 0, step: 0, positions: 0..BATCH, global_batch: BATCH as f64 };
        let Loss { sum, gradients } = task.loss(&network, &outputs, &targets, &part).unwrap();
        for (name, ours) in [("evaluated", &evaluated[0]), ("logits", &outputs[0]), ("loss", &sum.reshape([1]))] {
            let d = largest_difference(ours, &golden[name]);
            assert!(d < 1e-4, "{case}: {name} differs by {d:e}");
        }
        network.backward(tape, gradients);
        let layout = network.flat().layout().named(network.flat().gradients());
        let _ = network.flat().loss().fill_(1.0);
        network.flat_mut().move_buffers(BATCH as f64);
        let after = network.flat().layout().named(network.flat().buffer());
        // A rounding error in a gradient is compared with the largest of all of PyTorch's gradients, `scale`. In «deep», which has
        // 110 layers, such errors are larger.
        let rounding = if case.contains("deep") { 1e-3 } else { 1e-4 };
        let gradients = golden.iter().filter(|(name, _)| name.starts_with("grad."));
        let scale = gradients.map(|(_, t)| t.abs().max().double_value(&[])).fold(0.0, f64::max);
        for ((stage, name), gradient) in &layout {
            let own = torch_name(&plan, &phase, *stage, name);
            let is_buffer = own.contains("running_");
            let (ours, key, limit) = match is_buffer {
                true => (&after[&(*stage, name.clone())], format!("after.{own}"), 1e-4),
                false => (gradient, format!("grad.{own}"), rounding * scale),
            };
            let d = largest_difference(ours, &golden[&key]);
            assert!(d < limit, "{case}: {key} differs by {d:e} of {scale:e}");
        }
        assert_eq!(layout.len() + 3, golden.len(), "{case}: exactly the trained stage has gradients and statistics");
    }
}

#[test]
fn blocks_whose_inputs_alone_are_kept_give_the_same_gradients_and_statistics() {
    let numbers = |checkpointing: bool| {
        let mut plan = plan("odd", "running");
        plan.config.run.activation_checkpointing = checkpointing;
        let phase = plan.phase(&E2E, None);
        let network = network(&plan, &phase);
        let (images, _) = batch(&plan, 0);
        let taps = Task::of(&plan.config).taps();
        let scales = Tensor::from_slice(&[1.5f32, 0.0, 1.5, 1.5, 0.0, 1.5]).expand([7, BATCH as i64], false);
        let drop = DropPath::new(&scales.contiguous(), &incubate::weights::Staging::of_cpu());
        let (outputs, tape) = network.train(&images, &drop, &taps);
        network.backward(tape, vec![outputs[0].cos()]);
        (outputs[0].copy(), network.flat().gradients().copy())
    };
    let (kept, recomputed) = (numbers(false), numbers(true));
    assert_eq!(kept.0, recomputed.0);
    assert!(largest_difference(&kept.1, &recomputed.1) < 1e-4 * kept.1.abs().max().double_value(&[]));
}

#[test]
fn bf16_follows_fp32() {
    let outputs = |precision: &str| {
        tch::set_num_threads(1);
        let mut plan = plan("even", "running");
        plan.config = Config::parse(&plan.config.to_toml(), &[format!("run.precision={precision}")]).unwrap();
        let phase = plan.phase(&E2E, None);
        let weights = fresh(phase.parameters(&plan).iter(), 1);
        let network = Network::new(&plan.config, &phase.depths, phase.trained.clone(), &[], &weights).unwrap();
        tch::manual_seed(2);
        let images = Tensor::randn([32, 3, 12, 12], (Kind::Float, Device::Cpu));
        let (outputs, tape) = network.train(&images, &DropPath::none(), &Task::of(&plan.config).taps());
        network.backward(tape, vec![outputs[0].cos()]);
        assert_eq!(outputs[0].kind(), Kind::Float);
        [outputs[0].copy(), network.flat().gradients().copy()]
    };
    for (fp32, bf16) in outputs("fp32").iter().zip(&outputs("bf16")) {
        let d = ((fp32 - bf16).norm() / fp32.norm()).double_value(&[]);
        assert!((1e-6..0.1).contains(&d), "bf16 differs by {d:e}");
    }
}

#[test]
fn twenty_steps_of_sgd_with_the_schedule_of_isda_give_torchs_loss_curve_and_statistics() {
    let golden: Value = serde_json::from_slice(&std::fs::read(golden("resnet-curve.json")).unwrap()).unwrap();
    // The losses of the other networks depend too much on rounding.
    let shape = "even";
    let sets = [
        "optimiser=\"sgd\"",
        "schedule=\"isda\"",
        "weight_decay=1e-2",
        "decay_all=true",
        "warmup_lr=0.001",
        "min_lr=0",
        &format!("base_lr={}", 0.005 * 512.0 / BATCH as f64),
    ]
    .map(|set| format!("e2e.{set}"));
    let mut plan = plan(shape, "running");
    plan.config = Config::parse(&plan.config.to_toml(), &sets).unwrap();
    let phase = plan.phase(&E2E, None);
    let mut network = network(&plan, &phase);
    let mut optimiser = Optimiser::new(&phase.training, network.flat());
    let mut stepper = Stepper::new(&plan, &phase, &Solo, 1);
    for step in 0..STEPS {
        let [expected, rate] = [0, 1].map(|i| golden["losses"][step][i].as_f64().unwrap());
        let lr = phase.lr(step as u64);
        assert!((lr - rate).abs() < 1e-9, "{shape}: learning rate of step {step}: {lr}, {rate}");
        let (images, targets) = batch(&plan, step);
        let mut batches = std::iter::once(Ok(Batch::of(images, targets, 0..BATCH)));
        let outcome = stepper.step(&mut network, &mut optimiser, &mut batches, step as u64, lr).unwrap();
        let loss = outcome.expect("on a CPU the outcome is known at once").loss;
        assert!((loss / expected - 1.0).abs() < 2e-4, "{shape}: step {step} loss {loss}, torch {expected}");
    }
    let blocks = phase.depths[2] - 1;
    let variance = network.flat().get(2, &format!("blocks.{blocks}.bn2.running_var"), true).unwrap().value;
    let expected: Vec<f32> = serde_json::from_value(golden["last_variance"].clone()).unwrap();
    let d = largest_difference(&variance, &Tensor::from_slice(&expected));
    assert!(d < 1e-3 * variance.max().double_value(&[]), "{shape}: the last variance differs by {d:e}");
}
