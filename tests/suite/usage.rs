//! Every mistake of a user ends in one error with exit code 2, which names the key or file and the cure. Also tests the output of
//! the commands that only report.

use crate::incubate::{Incubate, TINY, ended, plain};
use clap::CommandFactory;
use incubate::cli::Cli;
use incubate::config::Config;
use incubate::plan::Plan;
use serde_json::Value;
use std::path::Path;

#[test]
fn mistakes_in_a_config_are_named_with_their_cure() {
    for (set, words) in [
        ("train.epoch=3", &["train.epoch", "did you mean `epochs`"][..]),
        ("modl.width=3", &["`modl`", "did you mean `model`"]),
        ("model.width=\"wide\"", &["`model.width = \"wide\"` is a string, but an integer is expected"]),
        ("model.image_size=[16]", &["`model.image_size = [16]` is an array, but an integer is expected"]),
        ("model.width=18", &["model.width = 18", "model.heads = 4", "try width = 20"]),
        ("model.image_size=15", &["model.image_size = 15", "patch_size = 4", "try image_size = 16"]),
        ("model.depths=[2, 0]", &["model.depths", "between 1 and"]),
        ("model.depths=[]", &["model.depths is empty"]),
        ("data.mean=[0.1, 0.2]", &["data.mean has 2 values", "model.channels = 1"]),
        ("data.auto_augment=rand-x1", &["data.auto_augment = \"rand-x1\"", "rand-m9-mstd0.5-inc1"]),
        ("data.flip=1.5", &["data.flip = 1.5", "between 0 and 1"]),
        ("data.train_fraction=0.0", &["data.train_fraction = 0", "(0, 1]"]),
        ("train.global_batch=63", &["global_batch = 63", "even", "try 64"]),
        ("train.global_batch=1024", &["meta.global_batch = 1024", "512 samples"]),
        ("meta.warmup_epochs=5", &["meta.warmup_epochs = 5", "meta.epochs = 3"]),
        ("module.on=world", &["module.on", "group"]),
        ("finetune.on=everywhere", &["finetune.on = \"everywhere\"", "`world`", "default is \"zero\""]),
        ("run.micro_batch=7", &["run.micro_batch = 7", "try 8"]),
        ("run.micro_batch=4000000", &["run.micro_batch = 4000000", "at most 1048576"]),
        ("run.checkpoint_every=\"2 hours\"", &["run.checkpoint_every = \"2 hours\"", "\"10 minutes\""]),
        ("run.log_steps=-1", &["run.log_steps = -1", "a whole number of at least 0", "default is 20"]),
        ("data.crop_scale=[0.1]", &["data.crop_scale = [0.1]", "an array of length 2", "default is [0.08, 1.0]"]),
        ("model.depths=[2, 2.5]", &["model.depths = [2, 2.5]", "a whole number", "default is [3, 3, 3, 3]"]),
        ("train.betas=[\"a\", \"b\"]", &["train.betas = [\"a\", \"b\"]", "expected a number", "[0.9, 0.999]"]),
        ("module.betas=[0.9]", &["module.betas = [0.9]", "an array of length 2", "[0.9, 0.999]"]),
        ("data.mean=[nan]", &["data.mean = [NaN]", "such as 0.5"]),
        ("data.std=[inf]", &["data.std = [inf]", "such as 0.5"]),
        ("module.eps=nan", &["module.eps = NaN", "such as 1e-8"]),
        ("module.eps=inf", &["module.eps = inf", "such as 1e-8"]),
        ("model.layer_norm_eps=nan", &["model.layer_norm_eps = NaN", "such as 1e-6"]),
        ("model.layer_norm_eps=inf", &["model.layer_norm_eps = inf", "such as 1e-6"]),
        ("run.workers=1000000000", &["run.workers = 1000000000", "at most 4096"]),
        ("run.threads=1000000000", &["run.threads = 1000000000", "at most 4096"]),
        ("run.replicas=1000000000", &["run.replicas = 1000000000", "at most 1024"]),
        ("model.width=1000000000", &["model.width = 1000000000", "at most 1048576"]),
        ("model.width=262144", &["model.width = 262144", "parameters", "lower"]),
        ("model.image_size=1000000000", &["model.image_size = 1000000000", "at most 16384"]),
        ("model.meta_depth=1000000000", &["model.meta_depth = 1000000000", "at most 10000"]),
        ("data.train_images=99999999999999", &["data.train_images = 99999999999999", "at most 4294967296"]),
        ("data.train_images=4000000000", &["data.train_images = 4000000000", "GiB", "lower"]),
        ("data.train_images=1", &["data.train_images = 1", "at least 2"]),
        ("module.epochs=9999999999", &["module.epochs = 9999999999", "at most 1000000"]),
        ("run", &["--set run", "key=value"]),
    ] {
        let slurm = "[slurm]\nnodes = 2\nranks = 4\n";
        let run = Incubate::with(&(TINY.replace("heads = 2", "heads = 4") + slurm)).set(set);
        let ended = run.incubate(&["meta"]).fails(2, words);
        let logged = |line: &&str| line.contains(" INFO ") || line.contains(" WARN ");
        assert_eq!(ended.err.lines().filter(|line| !logged(line)).count(), 1, "in one line: {}", ended.err);
        assert!(!run.run_dir.exists(), "{set}: refused before anything is written");
    }
}

#[test]
fn plan_and_submit_refuse_a_batch_that_the_ranks_cannot_train() {
    let run = Incubate::new().set("train.global_batch=4").set("slurm.ranks=4");
    for command in [&["plan", "--ranks", "4", "--rate", "1"][..], &["submit", "--dry-run"]] {
        run.incubate(command).fails(2, &["global_batch = 4 is too small for 4 replicas", "raise it to 8"]);
    }
    // In a job array each module has all ranks; in one allocation it has a quarter of them.
    let run = Incubate::new().set("module.global_batch=4").set("slurm.ranks=4");
    run.incubate(&["submit", "--dry-run"]).fails(2, &["module.global_batch = 4 is too small for 4 replicas"]);
    run.set("slurm.mode=\"allocation\"").ok(&["submit", "--dry-run"]);
    let run = Incubate::new().set("slurm.ranks=3").set("slurm.nodes=2");
    run.incubate(&["submit", "--dry-run"]).fails(2, &["slurm.ranks = 3 cannot be spread evenly over slurm.nodes = 2"]);
    let rate = run.incubate(&["plan", "--rate", "nan"]);
    assert!(rate.code == Some(2) && rate.err.contains("it must be a positive number"), "{}", rate.err);
}

#[test]
fn a_closed_pipe_is_no_error_and_a_full_disk_is_one() {
    let run = Incubate::new();
    let mut command = run.command(&["plan", "--rate", "1"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(ended(command.stdout(writer).output().unwrap()).ok().err, "");
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = run.command(&["plan", "--rate", "1"]);
    ended(command.stdout(full).output().unwrap()).fails(1, &["standard output", "No space left"]);
}

#[test]
fn a_config_that_is_missing_or_no_toml_is_named() {
    ended(plain(&["run", "nowhere.toml"]).output().unwrap()).fails(2, &["nowhere.toml", "No such file"]);
    Incubate::with("[run\n").incubate(&["run"]).fails(2, &["config.toml", "not valid TOML, line 1"]);
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.h5");
    std::fs::write(&model, b"\x89HDF\xff").unwrap();
    let swapped = plain(&["import", "config.toml", model.to_str().unwrap()]).output().unwrap();
    ended(swapped).fails(2, &["model.h5", "not text", "order of the arguments"]);
}

#[test]
fn another_config_in_the_same_run_directory_is_refused_naming_the_keys() {
    let run = Incubate::new();
    run.ok(&["meta"]);
    let other = run.fork(&["config.toml"]).set("meta.base_lr=1e-3").set("run.log_steps=7").set("run.e2e=true");
    let ended = other.incubate(&["meta"]).fails(2, &["meta.base_lr (0.008 there, 0.001 here)", "--run-dir"]);
    assert!(
        !ended.err.contains("log_steps") && !ended.err.contains("e2e"),
        "keys that do not change the result may differ: {}",
        ended.err
    );
}

#[test]
fn missing_and_malformed_data_are_named() {
    let text =
        TINY.replace("format = \"shapes\"", "format = \"idx\"").replace("train_images = 512\ntest_images = 128\n", "");
    let run = Incubate::with(&text).set("data.path=images");
    run.incubate(&["meta"]).fails(2, &["images/train-images-idx3-ubyte", "data.path"]);
    let folder = run.folder.path().join("images");
    std::fs::create_dir(&folder).unwrap();
    // A truncated gzip stream.
    std::fs::write(folder.join("train-images-idx3-ubyte.gz"), [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0x63]).unwrap();
    run.incubate(&["meta"]).fails(2, &["train-images-idx3-ubyte.gz", "cannot be read"]);
    for (format, file) in [("cifar10", "data_batch_1.bin"), ("cifar100", "train.bin")] {
        let text = TINY.replace("format = \"shapes\"", &format!("format = \"{format}\""));
        Incubate::with(&text).set("data.path=nowhere").incubate(&["meta"]).fails(2, &[file]);
    }
    let wrong_size = Incubate::new().set("data.train_images=0");
    wrong_size.incubate(&["meta"]).fails(2, &["data.train_images"]);
}

fn configs() -> Vec<std::path::PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "toml"))
        .collect()
}

/// The number of training images in Fashion-MNIST, which its configs do not give.
const FASHION: usize = 60_000;

#[test]
fn every_shipped_config_is_planned_and_opens_with_the_command_that_runs_it_and_its_result() {
    assert!(configs().len() >= 8);
    for path in configs() {
        let name = path.display();
        let text = std::fs::read_to_string(&path).unwrap();
        let head: String = text.lines().take_while(|line| line.starts_with('#')).collect();
        assert!(head.contains("incubate ") || head.contains("tools/"), "{name}: the command that runs it");
        let has_result = [" % top-1", "top-1 ", " % mIoU", " % AP"].iter().any(|words| head.contains(words));
        assert!(has_result || name.to_string().contains("default"), "{name}");
        let config = Config::load(&path, &[]).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let images = if config.data.train_images > 0 { config.data.train_images } else { FASHION };
        let plan = Plan::new(config, images).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        for phase in plan.graph().nodes().iter().filter_map(|node| plan.phase_of(node)) {
            let mut by_stage = vec![0; phase.depths.len()];
            let parameters = phase.parameters(&plan);
            parameters.iter().filter(|p| p.is_trainable()).for_each(|p| by_stage[p.stage] += p.count());
            assert_eq!(by_stage, plan.config.model.counts(&phase.depths), "{name}, {}", phase.name);
            assert!(phase.steps > 0, "{name}, {}", phase.name);
        }
    }
}

#[test]
fn plan_prints_the_papers_models_steps_and_costs() {
    let config = |name: &str| format!("{}/configs/{name}", env!("CARGO_MANIFEST_DIR"));
    for (name, parameters, depths, steps) in [
        ("imagenet-vit-b.toml", 86_567_656u64, [3, 3, 3, 3], 625 * 300),
        ("imagenet-vit-l.toml", 304_326_632, [6, 6, 6, 6], 625 * 300),
        ("imagenet-vit-h.toml", 632_045_800 - 32 * 3 * 1280, [8, 8, 8, 8], 625 * 300),
    ] {
        let output = plain(&["plan", &config(name), "--ranks", "8", "--rate", "100", "--json"]).output().unwrap();
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(plan["parameters"], parameters, "{name}");
        assert_eq!(plan["depths"], serde_json::json!(depths), "{name}");
        assert_eq!(plan["phases"][0]["steps"], steps, "{name}: 1,281,024 samples in steps of 2048");
        // In the official schedule, the cosine begins at epoch 0, before the warm-up of 20 epochs ends. So the rate never reaches
        // 2e-3.
        let peak = 1e-5 + 0.5 * (2e-3 - 1e-5) * (1.0 + (std::f64::consts::PI * 20.0 / 300.0).cos());
        assert!((plan["phases"][0]["lr_peak"].as_f64().unwrap() - peak).abs() < 1e-12, "{name}");
        let device_hours = |i: usize| plan["phases"][i]["device_hours"].as_f64().unwrap();
        assert!(device_hours(1) > device_hours(4), "{name}: stage 0 costs more than stage 3");
        assert_eq!(plan["ranks"][5], serde_json::json!({"rank": 5, "modules": [2], "group": [4, 5]}), "{name}");
    }
}

#[test]
fn doctor_finds_a_run_directory_that_cannot_be_made() {
    let run = Incubate::new();
    run.ok(&["doctor"]);
    std::fs::write(&run.run_dir, b"a file").unwrap();
    let ended = run.incubate(&["doctor"]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.out.contains("NOT run directory"), "{}", ended.out);
}

#[test]
fn help_completions_and_man_pages_are_written() {
    for arguments in [&["--help"][..], &["run", "--help"], &["completions", "bash"]] {
        let output = plain(arguments).output().unwrap();
        assert!(output.status.success() && output.stdout.len() > 300, "{arguments:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(plain(&["man", folder.path().to_str().unwrap()]).status().unwrap().success());
    assert!(folder.path().join("incubate-run.1").exists());
    assert_eq!(plain(&["fly"]).output().unwrap().status.code(), Some(2));
}

#[test]
fn every_argument_of_every_command_has_a_help_text() {
    fn without_help(command: &clap::Command) -> Vec<String> {
        let own = command.get_arguments().filter(|argument| argument.get_help().is_none());
        let own = own.map(|argument| format!("{} {}", command.get_name(), argument.get_id()));
        own.chain(command.get_subcommands().flat_map(without_help)).collect()
    }
    assert!(without_help(&Cli::command()).is_empty(), "{:?}", without_help(&Cli::command()));
}

#[test]
fn setup_on_a_machine_without_a_libtorch_to_fetch_says_what_to_set() {
    let folder = tempfile::tempdir().unwrap();
    let uname = folder.path().join("uname");
    std::fs::write(&uname, "#!/bin/sh\necho aarch64\n").unwrap();
    std::fs::set_permissions(&uname, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let setup = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/setup.sh");
    let mut command = std::process::Command::new(setup);
    let output = command.arg("--print").env("PATH", path).env_remove("LIBTORCH").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(told.contains("aarch64") && told.contains("set LIBTORCH") && output.stdout.is_empty(), "{told}");
}
