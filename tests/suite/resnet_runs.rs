//! Runs of the program with a ResNet: it incubates, resumes, trains on replicas, and its exports come back.

use crate::incubate::{Incubate, ended, plain};
use crate::runs::stop_after_a_checkpoint;
use incubate::store::artefact;
use incubate::weights::{Weights, bytes};

/// Drawn images and a tiny ResNet, whose second stage ends a layer and begins another.
pub const TINY: &str = r#"
[run]
threads = 1
micro_batch = 16
checkpoint_every = "5 steps"
log_steps = 1
[model]
family = "resnet"
image_size = 16
channels = 1
classes = 4
width = 4
layers = [2, 2, 1]
depths = [1, 2, 2]
[data]
format = "shapes"
train_images = 512
test_images = 128
mean = [0.3]
std = [0.3]
crop_border = "reflect"
repeats = 1
mixup = 0.0
cutmix = 0.0
auto_augment = ""
color_jitter = 0.0
[train]
optimiser = "sgd"
decay_all = true
weight_decay = 1e-4
global_batch = 32
base_lr = 1.6
min_lr = 0.0
schedule = "isda"
warmup_epochs = 1
warmup_lr = 0.01
epochs = 6
eval_epochs = 0
[module]
epochs = 6
[finetune]
on = "world"
epochs = 6
warmup_epochs = 1
clip_grad = 0.0
[e2e]
epochs = 6
"#;

fn buffers(weights: &Weights) -> impl Iterator<Item = (&(usize, String), &tch::Tensor)> {
    weights.iter().filter(|((_, name), _)| name.contains("running_"))
}

#[test]
fn a_resnet_incubates_and_its_assembly_takes_statistics_of_the_target() {
    let run = Incubate::with(TINY).set("run.e2e=true");
    let log = run.ok(&["run", "--json"]).err;
    assert!(log.contains("before its running statistics were estimated anew"), "{log}");
    let read = |file: &str| artefact::read(&run.file(file)).unwrap();
    let (assembled, last) = (read("assembled.h5"), read("final.h5"));
    for stage in 0..3 {
        let module = read(&format!("module-{stage}.h5")).weights;
        for (key, tensor) in &module {
            let is_same = bytes(tensor) == bytes(&assembled.weights[key]);
            assert_ne!(is_same, key.1.contains("running_"), "{key:?}");
        }
    }
    let differs = |((stage, name), tensor): (&(usize, String), &tch::Tensor)| {
        bytes(tensor) != bytes(&assembled.weights[&(*stage, name.clone())])
    };
    assert!(buffers(&last.weights).all(differs), "fine-tuning moves every statistic");
    let top1 = |file: &str| read(file).header.metrics["top1"];
    assert!(top1("final.h5") > 40.0 && top1("e2e.h5") > 40.0, "{} and {}", top1("final.h5"), top1("e2e.h5"));
    let outcome: serde_json::Value = serde_json::from_str(&run.ok(&["run", "--json"]).out).unwrap();
    assert_eq!(outcome["exported"][0], run.file("export/pth").to_str().unwrap());
}

#[test]
fn a_stopped_resnet_resumes_with_the_bits_of_an_uninterrupted_run() {
    for command in [&["meta"][..], &["module", "--index", "1"]] {
        let build = || Incubate::with(TINY).set("run.replicas=2");
        let sets = ["meta.epochs=12", "module.epochs=12", "train.ema=0.9"];
        let [uninterrupted, stopped] = [build(), build()].map(|run| sets.into_iter().fold(run, Incubate::set));
        for run in [&uninterrupted, &stopped] {
            if command[0] == "module" {
                run.ok(&["meta"]);
            }
        }
        uninterrupted.ok(command);
        stop_after_a_checkpoint(&stopped, command);
        stopped.ok(command);
        let file = if command[0] == "module" { "module-1.h5" } else { "meta.h5" };
        assert!(uninterrupted.bytes(file) == stopped.bytes(file), "{file}");
    }
}

#[test]
fn ranks_times_replicas_train_a_resnet_as_one_replica_does_with_the_same_micro_batches() {
    let one = Incubate::with(&TINY.replace("micro_batch = 16", "micro_batch = 8"));
    let many = one.fork(&[]).set("run.replicas=2");
    one.ok(&["meta"]);
    many.mpirun(2, &["meta"]).ok();
    let (a, b) = (one.losses("meta"), many.losses("meta"));
    assert!(!a.is_empty() && a.len() == b.len());
    for (step, (a, b)) in a.iter().zip(&b).enumerate().take(20) {
        assert!((a / b - 1.0).abs() < 1e-3, "step {step}: {a} alone, {b} by replicas");
    }
}

#[test]
fn exports_of_a_resnet_come_back_bit_for_bit_and_formats_for_vits_are_refused() {
    let run = Incubate::with(TINY);
    run.ok(&["meta"]);
    let meta = run.file("meta.h5");
    let weights = ["--weights", meta.to_str().unwrap()];
    run.incubate(&["export", "--format", "timm", weights[0], weights[1]]).fails(2, &["timm", "safetensors or pth"]);
    let timm = Incubate::with(TINY).set("run.export=[\"timm\"]");
    timm.incubate(&["plan"]).fails(2, &["run.export", "timm", "safetensors or pth"]);
    run.ok(&["export", "--format", "all", weights[0], weights[1]]);
    let ours = artefact::read(&meta).unwrap();
    for file in ["pth/model.pth", "safetensors/model.safetensors"] {
        let other = run.fork(&[]);
        let mut command = plain(&["import"]);
        command.arg(run.file("export/meta").join(file)).args(["config.toml", "--as", "meta", "--run-dir"]);
        ended(command.arg(&other.run_dir).current_dir(&other.folder).output().unwrap()).ok();
        let theirs = artefact::read(&other.file("meta.h5")).unwrap();
        assert!(ours.weights.iter().all(|(name, tensor)| bytes(tensor) == bytes(&theirs.weights[name])), "{file}");
        other.ok(&["module", "--index", "0"]);
    }
}
