//! Networks whose stages learn from local losses. They are compared with plain PyTorch (`tools/golden_objectives.py`), and run as a
//! user runs them.

use crate::documents::root;
use crate::incubate::{Incubate, ended, plain};
use crate::parity::{BATCH, batch, golden, wave};
use crate::runs::stop_after_a_checkpoint;
use crate::{incubate as program, parity, resnet, resnet_runs};
use incubate::collective::Solo;
use incubate::config::Config;
use incubate::data::feed::batch::Batch;
use incubate::model::{DropPath, Network};
use incubate::plan::{PhasePlan, Plan};
use incubate::run::table::{DGL, E2E, INFOPRO, Row};
use incubate::store::artefact;
use incubate::task::{Given, Loss, Objective, Part};
use incubate::train::optimiser::Optimiser;
use incubate::train::step::Stepper;
use incubate::weights::{Weights, bytes};
use serde_json::Value;
use std::collections::BTreeMap;
use tch::Tensor;

/// The plan with other values of some keys.
fn with(mut plan: Plan, sets: &[&str]) -> Plan {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    plan.config = Config::parse(&plan.config.to_toml(), &sets).unwrap();
    plan
}

/// A network with the heads of its local losses and with the weights of the golden results, and its objective.
fn network(plan: &Plan, phase: &PhasePlan, mut weights: Weights) -> (Network, Objective) {
    tch::set_num_threads(1);
    let objective = Objective::of(&plan.config, &phase.borders);
    let auxiliary = objective.auxiliary();
    for parameter in &auxiliary {
        let is_norm = parameter.shape.len() == 1 && parameter.name.ends_with("weight");
        let start = if is_norm { 1.0 } else { 0.0 };
        let waves = wave(parameter.count(), parameter.name.bytes().map(f64::from).sum());
        let values: Vec<f32> = waves.map(|w| (start + 0.1 * w) as f32).collect();
        let value = Tensor::from_slice(&values).view(&parameter.shape[..]);
        weights.insert((parameter.stage, parameter.name.clone()), value);
    }
    let network = Network::new(&plan.config, &phase.depths, phase.trained.clone(), &auxiliary, &weights);
    (network.unwrap(), objective)
}

fn resnet_weights(plan: &Plan) -> Weights {
    resnet::weights(plan, plan.config.model.depths())
}

fn vit_weights(plan: &Plan) -> Weights {
    parity::weights(plan, plan.config.model.depths())
}

/// The loss of each segment (a range of stages that learn from one loss) and the gradients, after one batch. `targets_of` gives the
/// targets of a segment by its number.
fn trained(
    plan: &Plan,
    row: &'static Row,
    weights: Weights,
    targets_of: &dyn Fn(usize, &Tensor) -> Tensor,
) -> (Vec<f64>, Weights) {
    let phase = plan.phase(row, None);
    let (network, objective) = network(plan, &phase, weights);
    let (images_bchw, targets) = batch(plan, 0);
    let part = Part { group: &Solo, seed: 0, step: 0, positions: 0..BATCH, global_batch: BATCH as f64 };
    let (mut x, mut losses) = (images_bchw.shallow_clone(), Vec::new());
    for (number, segment) in objective.segments().iter().enumerate() {
        let given = Given { images_bchw: images_bchw.shallow_clone(), targets: targets_of(number, &targets) };
        let (outputs, end, tape) = network.train_stages(segment.stages.clone(), &x, &DropPath::none(), &segment.taps);
        let Loss { sum, gradients } = segment.loss(&network, &outputs, &given, &part).unwrap();
        network.backward(tape, gradients);
        losses.push(sum.double_value(&[]));
        x = end;
    }
    let named = network.flat().layout().named(network.flat().gradients());
    (losses, named.into_iter().map(|(key, gradient)| (key, gradient.copy())).collect())
}

/// The gradients after one batch.
fn gradients(plan: &Plan, row: &'static Row, weights: Weights) -> Weights {
    trained(plan, row, weights, &|_, targets| targets.shallow_clone()).1
}

/// The segment to which a parameter of the network or of a head belongs.
fn segment_of((stage, name): &(usize, String)) -> usize {
    let of_head = name.strip_prefix("local.").and_then(|rest| rest.split('.').next());
    of_head.map_or(*stage, |stage| stage.parse().unwrap())
}

/// Gives all segments except one other targets. The gradients of that segment must keep their bits. The other gradients must
/// change, if they depend on targets.
fn assert_isolated(plan: &Plan, row: &'static Row, weights: fn(&Plan) -> Weights) {
    let plain = gradients(plan, row, weights(plan));
    let stages = plan.config.model.stages();
    for own in 0..stages {
        let noise =
            |number: usize, targets: &Tensor| if number == own { targets.shallow_clone() } else { targets.flip([1]) };
        for (key, gradient) in trained(plan, row, weights(plan), &noise).1 {
            let (is_same, is_own) = (bytes(&gradient) == bytes(&plain[&key]), segment_of(&key) == own);
            // The statistics of norms and the gradients of decoders depend on no target. The gradient of the keys' bias is always zero.
            let may_be_same = [".decoder.", "running_", "qkv.bias"].iter().any(|word| key.1.contains(word));
            assert!(is_same == is_own || may_be_same, "{key:?} with the targets of segment {own} alone");
        }
    }
}

/// The keys for both losses of InfoPro at both borders of three stages, as in `tools/golden_objectives.py`.
const BOTH: [&str; 4] =
    ["infopro.reconstruction=[1, 0.5]", "infopro.classes=[0.5, 1]", "infopro.drop_path=0", "data.mixup=0"];

#[test]
fn the_gradients_of_a_stage_do_not_change_by_one_bit_if_the_targets_of_all_other_losses_do() {
    assert_isolated(&resnet::plan("even", "running"), &DGL, resnet_weights);
    assert_isolated(&resnet::plan("odd", "running"), &DGL, resnet_weights);
    assert_isolated(&parity::plan("color"), &DGL, vit_weights);
    assert_isolated(&with(resnet::plan("odd", "running"), &BOTH), &INFOPRO, resnet_weights);
    assert_isolated(&with(parity::plan("color"), &BOTH), &INFOPRO, vit_weights);
}

#[test]
fn a_network_of_one_stage_trains_end_to_end_to_the_bit() {
    let plan = with(resnet::plan("even", "running"), &["model.depths=[6]"]);
    let of = |row| gradients(&plan, row, resnet_weights(&plan));
    let whole = of(&E2E);
    for local in [of(&DGL), of(&INFOPRO)] {
        assert_eq!(local.len(), whole.len());
        assert!(whole.iter().all(|(key, gradient)| bytes(gradient) == bytes(&local[key])));
    }
}

#[test]
fn borders_without_losses_leave_the_last_stage_as_it_trains_end_to_end_and_the_others_untrained() {
    let plan = with(resnet::plan("odd", "running"), &["infopro.reconstruction=[0, 0]", "infopro.classes=[0, 0]"]);
    let [local, whole] = [&INFOPRO, &E2E].map(|row| gradients(&plan, row, resnet_weights(&plan)));
    assert_eq!(local.len(), whole.len(), "there are no heads");
    for (key, gradient) in local.iter().filter(|((_, name), _)| !name.contains("running_")) {
        let expected = if key.0 == 2 { whole[key].copy() } else { gradient.zeros_like() };
        assert!(bytes(gradient) == bytes(&expected), "{key:?}");
    }
}

#[test]
fn losses_and_gradients_of_infopro_are_pytorchs() {
    for case in ["resnet-odd-softmax", "resnet-odd-contrast", "vit-color-softmax"] {
        let golden = Tensor::read_safetensors(golden(&format!("infopro-{case}.safetensors"))).unwrap();
        let golden: BTreeMap<String, Tensor> = golden.into_iter().collect();
        let loss = format!("infopro.loss={}", case.rsplit('-').next().unwrap());
        let sets = [&BOTH[..], &["data.cutmix=0", loss.as_str()]].concat();
        let (plan, weights): (Plan, fn(&Plan) -> Weights) = match case.starts_with("resnet") {
            true => (with(resnet::plan("odd", "running"), &sets), resnet_weights),
            false => (with(parity::plan("color"), &sets), vit_weights),
        };
        let (losses, found) = trained(&plan, &INFOPRO, weights(&plan), &|_, targets| targets.shallow_clone());
        for (segment, loss) in losses.iter().enumerate() {
            let expected = golden[&format!("loss.{segment}")].double_value(&[0]);
            assert!((loss / expected - 1.0).abs() < 1e-5, "{case}: loss {segment}: {loss}, torch {expected}");
        }
        let largest = |tensor: &Tensor| tensor.abs().max().double_value(&[]);
        let scale =
            golden.iter().filter(|(name, _)| name.starts_with("grad.")).map(|(_, t)| largest(t)).fold(0.0, f64::max);
        let depths = plan.config.model.depths();
        let table = plan.config.model.parameters(depths);
        let mut seen = losses.len();
        for ((stage, name), gradient) in found.iter().filter(|((_, name), _)| !name.contains("running_")) {
            let own = table.iter().find(|parameter| parameter.stage == *stage && parameter.name == *name);
            let name = own.map_or(name.clone(), |parameter| plan.config.model.whole_name(parameter, depths));
            let expected = &golden[&format!("grad.{name}")];
            let difference = largest(&(gradient - expected));
            let limit = 1e-3 * largest(expected) + 1e-5 * scale;
            assert!(difference < limit, "{case}: gradient of {name} differs by {difference:e}");
            seen += 1;
        }
        assert_eq!(seen, golden.len(), "{case}");
    }
}

/// Takes steps of DGL with one optimiser, and compares the losses with PyTorch's.
fn assert_curve(name: &str, plan: &Plan, weights: Weights, micro_batches: usize) {
    let curves: BTreeMap<String, Vec<f64>> =
        serde_json::from_slice(&std::fs::read(golden("objective-curves.json")).unwrap()).unwrap();
    let phase = plan.phase(&DGL, None);
    let (mut network, _) = network(plan, &phase, weights);
    let mut optimiser = Optimiser::new(&phase.training, network.flat());
    let mut stepper = Stepper::new(plan, &phase, &Solo, micro_batches);
    let lr = if name.starts_with("resnet") { 0.005 } else { 1e-3 };
    for (step, expected) in curves[name].iter().enumerate() {
        let (images, targets) = batch(plan, step);
        let mut whole = std::iter::once(Ok(Batch::of(images, targets, 0..BATCH)));
        let mut parts = parity::micro_batches(plan, step);
        let batches: &mut dyn Iterator<Item = _> = if micro_batches == 1 { &mut whole } else { &mut parts };
        let outcome = stepper.step(&mut network, &mut optimiser, batches, step as u64, lr).unwrap();
        let loss = outcome.expect("on a CPU the outcome is known at once").loss;
        assert!((loss / expected - 1.0).abs() < 2e-4, "{name}: step {step} loss {loss}, torch {expected}");
    }
}

#[test]
fn one_optimiser_makes_the_steps_of_an_optimiser_for_each_stage_with_its_head() {
    let sgd =
        ["optimiser=\"sgd\"", "weight_decay=1e-2", "decay_all=true", "drop_path=0"].map(|set| format!("dgl.{set}"));
    let sgd: Vec<&str> = sgd.iter().map(String::as_str).collect();
    let plan = with(resnet::plan("even", "running"), &sgd);
    assert_curve("resnet-even-mlp", &plan, resnet_weights(&plan), 1);
    let plan = with(plan, &["dgl.head=linear"]);
    assert_curve("resnet-even-linear", &plan, resnet_weights(&plan), 1);
    for shape in ["gray", "color"] {
        let plan = with(parity::plan(shape), &["dgl.drop_path=0"]);
        assert_curve(&format!("vit-{shape}"), &plan, vit_weights(&plan), 2);
    }
}

#[test]
fn a_run_has_the_baseline_with_local_losses_beside_the_others() {
    let run = Incubate::new().set("run.e2e=true").set("run.dgl=true").set("dgl.epochs=8");
    run.ok(&["run"]);
    let dgl = artefact::read(&run.file("dgl.h5")).unwrap();
    assert!(
        dgl.weights.keys().all(|(stage, _)| *stage < 4) && dgl.header.auxiliary.is_empty(),
        "heads are no part of it"
    );
    assert_eq!(dgl.weights.len(), artefact::read(&run.file("e2e.h5")).unwrap().weights.len());
    assert!(dgl.header.metrics["top1"] > 30.0, "{:?}", dgl.header.metrics);
    let status: Value =
        serde_json::from_str(&ended(plain(&["status", "--json"]).arg(&run.run_dir).output().unwrap()).ok().out)
            .unwrap();
    let is_done = |line: &Value| line["phase"] == "dgl" && line["state"] == "done";
    assert!(status.as_array().unwrap().iter().any(is_done), "{status}");
    let summary: Vec<Value> = serde_json::from_slice(&run.bytes("summary.json")).unwrap();
    let row = summary.iter().find(|row| row["model"] == "DGL").unwrap();
    let plan: Value = serde_json::from_str(&run.ok(&["plan", "--json"]).out).unwrap();
    let planned =
        |name: &str| plan["phases"].as_array().unwrap().iter().find(|phase| phase["phase"] == name).unwrap().clone();
    assert_eq!(row["flops"], planned("dgl")["flops"], "the planned cost is the computed one");
    let of_epoch = |name: &str| planned(name)["flops"].as_f64().unwrap() / planned(name)["epochs"].as_f64().unwrap();
    assert!(of_epoch("dgl") > of_epoch("e2e"), "heads cost");
    assert_eq!(planned("dgl")["parameters"], planned("e2e")["parameters"]);
    let page = String::from_utf8(run.bytes("report.html")).unwrap();
    assert!(
        page.contains(">DGL<") && page.contains("Here Deep Incubation"),
        "the verdict is about the baseline end to end"
    );
    let weights = run.file("dgl.h5");
    run.ok(&["evaluate", "--weights", weights.to_str().unwrap()]);
    run.ok(&["export", "--format", "timm", "--weights", weights.to_str().unwrap()]);
}

#[test]
fn a_contrastive_loss_is_refused_where_images_have_no_class_and_where_its_blocks_would_be_divided() {
    let run = Incubate::with(resnet_runs::TINY).set("infopro.loss=contrast").set("infopro.global_batch=256");
    let error =
        ["infopro.loss = \"contrast\"", "micro-batches of 16", "set run.micro_batch = 128", "global_batch = 128"];
    run.incubate(&["infopro"]).fails(2, &error);
    let run = run.set("run.micro_batch=128").set("run.replicas=4");
    run.incubate(&["infopro"]).fails(2, &["on 4 replica(s)", "global_batch = 512"]);
    let mixed = Incubate::with(resnet_runs::TINY).set("infopro.loss=contrast").set("data.mixup=0.8");
    mixed.incubate(&["plan"]).fails(2, &["data.mixup = 0.8", "set infopro.loss = \"softmax\""]);
}

#[test]
fn a_stopped_phase_of_infopro_resumes_with_the_bits_of_an_uninterrupted_run_and_exports_no_decoder() {
    let build = || {
        let run = Incubate::with(resnet_runs::TINY).set("infopro.loss=contrast").set("infopro.global_batch=256");
        run.set("run.micro_batch=128").set("run.replicas=2").set("infopro.epochs=12").set("infopro.base_lr=0.2")
    };
    let (uninterrupted, stopped) = (build(), build());
    uninterrupted.ok(&["infopro"]);
    stop_after_a_checkpoint(&stopped, &["infopro"]);
    stopped.ok(&["infopro"]);
    assert!(uninterrupted.bytes("infopro.h5") == stopped.bytes("infopro.h5"));
    let weights = artefact::read(&stopped.file("infopro.h5")).unwrap().weights;
    assert!(weights.keys().all(|(_, name)| !name.starts_with("local.")));
}

#[test]
fn a_stopped_phase_of_local_losses_resumes_with_the_bits_of_an_uninterrupted_run() {
    let build = || Incubate::with(resnet_runs::TINY).set("run.replicas=2").set("dgl.epochs=12").set("train.ema=0.9");
    // The first stage is the stem alone.
    let build = || build().set("model.depths=[0, 2, 3]");
    let (uninterrupted, stopped) = (build(), build());
    uninterrupted.ok(&["dgl"]);
    stop_after_a_checkpoint(&stopped, &["dgl"]);
    let checkpoint =
        std::fs::read_dir(stopped.file("checkpoints")).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let heads = artefact::read(&checkpoint).unwrap().weights.into_keys().filter(|(_, name)| name.starts_with("local."));
    assert!(heads.count() > 20, "checkpoints keep the heads");
    stopped.ok(&["dgl"]);
    assert!(uninterrupted.bytes("dgl.h5") == stopped.bytes("dgl.h5"));
}

#[test]
fn ranks_times_replicas_train_with_local_losses_as_one_replica_does() {
    let tiny = resnet_runs::TINY.replace("micro_batch = 16", "micro_batch = 8");
    for (config, phase) in
        [(tiny.as_str(), "dgl"), (program::TINY, "dgl"), (tiny.as_str(), "infopro"), (program::TINY, "infopro")]
    {
        let one = Incubate::with(config).set("run.micro_batch=8").set("dgl.epochs=2").set("infopro.epochs=2");
        let many = one.fork(&[]).set("run.replicas=2");
        one.ok(&[phase]);
        many.mpirun(2, &[phase]).ok();
        let (a, b) = (one.losses(phase), many.losses(phase));
        assert!(!a.is_empty() && a.len() == b.len());
        for (step, (a, b)) in a.iter().zip(&b).enumerate().take(8) {
            assert!((a / b - 1.0).abs() < 1e-4, "step {step}: {a} alone, {b} by replicas");
        }
    }
}

#[test]
fn local_losses_need_the_memory_of_one_stage_at_a_time() {
    let config = root().join("configs/cifar-resnet-110.toml");
    let needed = |method: &str| -> f64 {
        let mut command = plain(&["bench", "step", method, "--batch=128", "--steps=1", "--threads=1", "--device=cpu"]);
        command.args(["--json", "--set=model.layers=[4, 4, 4]", "--set=model.depths=[2, 2, 4, 4]", "--model"]);
        let report: Value = serde_json::from_str(&ended(command.arg(&config).output().unwrap()).ok().out).unwrap();
        report["peak_mib"].as_f64().unwrap() - report["base_mib"].as_f64().unwrap()
    };
    let (end_to_end, local) = (needed("--e2e"), needed("--dgl"));
    assert!(local < 0.6 * end_to_end, "{local} MiB by DGL, {end_to_end} MiB end to end");
}
