//! Whole runs write their files, give the same results on any number of ranks, and resume after a stop.

use crate::incubate::{Incubate, TINY, plain};
use crate::wait::wait_until;
use hdf5::types::VarLenUnicode;
use incubate::store::artefact;
use incubate::store::progress::Progress;
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

#[test]
fn a_baseline_that_the_config_does_not_ask_for_has_its_line_in_the_status() {
    let run = Incubate::new();
    run.ok(&["e2e"]);
    let status = plain(&["status", run.run_dir.to_str().unwrap(), "--json"]).output().unwrap();
    let lines: Vec<Value> = serde_json::from_slice(&status.stdout).unwrap();
    let state = |phase: &str| lines.iter().find(|line| line["phase"] == phase).unwrap()["state"].clone();
    assert_eq!((state("e2e"), state("meta")), ("done".into(), "waiting".into()));
}

#[test]
fn a_run_trains_every_phase_exports_and_prints_the_table() {
    let run = Incubate::new().set("run.e2e=true").set("data.mixup=0").set("data.cutmix=0").set("data.erase=0");
    let run = run
        .set("meta.on=\"zero\"")
        .set("meta.epochs=12")
        .set("module.epochs=6")
        .set("finetune.epochs=12")
        .set("data.crop_padding=1");
    let began = Instant::now();
    let ended = run.mpirun(2, &["run"]).ok();
    let elapsed = began.elapsed().as_secs_f64();
    for model in ["meta model", "hybrid 0", "hybrid 3", "assembled", "fine-tuned", "end to end"] {
        assert!(ended.out.contains(model), "{model} in {}", ended.out);
    }
    for file in ["final.h5", "e2e.h5", "export/timm/model.safetensors", "report.html", "logs/meta/metrics.jsonl"] {
        assert!(run.file(file).exists(), "{file}");
    }
    let report = String::from_utf8(run.bytes("report.html")).unwrap();
    let modules = report.split("<svg").find(|picture| picture.contains("Modules: training loss")).unwrap();
    assert!((0..4).all(|index| modules.contains(&format!("hybrid {index}"))), "in one picture: {modules}");
    for phase in ["Meta model", "Modules", "Fine-tuned", "End to end"] {
        assert!(report.contains(&format!("{phase}: training loss")), "{phase}: {report}");
    }
    assert!(report.contains("<td>meta.base_lr</td><td>0.008</td>"), "the config: {report}");
    let rows: Vec<Value> = serde_json::from_slice(&run.bytes("summary.json")).unwrap();
    let final_top1 = rows[6]["top1"].as_f64().unwrap();
    assert!(final_top1 > 40.0, "four classes of drawn shapes, 25 % by chance: {final_top1} %");
    // The seconds of a phase do not include waiting, so the seconds of successive phases add up to no more than the elapsed time.
    // The meta model trains on the first rank, then each rank trains its modules, and then the other phases follow.
    for successive in [[0, 1, 3, 6, 7], [0, 2, 4, 6, 7]] {
        let seconds = successive.map(|row: usize| rows[row]["seconds"].as_f64().unwrap());
        assert!(seconds.iter().sum::<f64>() <= elapsed, "{seconds:?} in {elapsed} s");
    }

    // A new evaluation of the artefact gives the metrics that the run has written into it.
    let json = run.ok(&["evaluate", "--json"]).out;
    let metrics: BTreeMap<String, f64> = serde_json::from_str(&json).unwrap();
    assert_eq!(metrics["images"], 128.0);
    let stored = artefact::read(&run.file("final.h5")).unwrap().header.metrics;
    assert!((metrics["top1"] - stored["top1"]).abs() < 1e-9 && (metrics["loss"] / stored["loss"] - 1.0).abs() < 1e-5);
    // A module is evaluated within its hybrid.
    let module = run.file("module-2.h5");
    let json = run.ok(&["evaluate", "--json", "--weights", module.to_str().unwrap()]).out;
    let metrics: BTreeMap<String, f64> = serde_json::from_str(&json).unwrap();
    assert_eq!(metrics["top1"], artefact::read(&module).unwrap().header.metrics["top1"]);

    let again = run.ok(&["run", "--json"]);
    let outcome: Value = serde_json::from_str(&again.out).unwrap();
    assert_eq!(outcome["models"].as_array().unwrap(), &rows);
    assert_eq!(outcome["exported"][0], run.file("export/timm").to_str().unwrap());
    assert!(again.err.matches("done already").count() >= 7 && !again.err.contains(" step 1/"), "{}", again.err);
    let status = plain(&["status", run.run_dir.to_str().unwrap(), "--json"]).output().unwrap();
    let lines: Vec<Value> = serde_json::from_slice(&status.stdout).unwrap();
    assert!(lines.iter().all(|line| line["state"] == "done"), "{lines:?}");
    plain(&["verify", run.run_dir.to_str().unwrap()]).status().unwrap().success().then_some(()).unwrap();
}

#[test]
fn modules_have_the_same_bits_for_one_two_and_four_ranks() {
    let one = Incubate::new();
    one.ok(&["meta"]);
    let forks = [2, 4].map(|ranks| (ranks, one.fork(&["meta.h5", "config.toml"])));
    one.ok(&["module"]);
    for (ranks, fork) in forks {
        fork.mpirun(ranks, &["module"]).ok();
        for i in 0..4 {
            let file = format!("module-{i}.h5");
            assert!(one.bytes(&file) == fork.bytes(&file), "{file} differs with {ranks} ranks");
        }
    }
}

#[test]
fn a_group_of_ranks_has_the_loss_curve_of_one_rank_with_the_same_global_batch() {
    let one = Incubate::with(&TINY.replace("micro_batch = 32", "micro_batch = 16"))
        .set("module.drop_path=0.3")
        .set("data.mixup=0.8")
        .set("data.repeats=3");
    one.ok(&["meta"]);
    let eight = one.fork(&["meta.h5", "config.toml"]);
    one.ok(&["module"]);
    eight.mpirun(8, &["module"]).ok();
    for i in 0..4 {
        let (a, b) = (one.losses(&format!("module-{i}")), eight.losses(&format!("module-{i}")));
        assert_eq!((a.len(), b.len()), (16, 16));
        for (step, (a, b)) in a.iter().zip(&b).enumerate() {
            assert!((a / b - 1.0).abs() < 1e-4, "module {i} step {step}: {a} alone, {b} in a group");
        }
    }
}

#[test]
fn thirty_two_ranks_incubate_thirty_two_modules_on_whatever_cores_there_are() {
    let depths = vec!["1"; 32].join(", ");
    let config = TINY.replace("depths = [2, 2, 2, 2]", &format!("depths = [{depths}]"));
    let run = Incubate::with(&config).set("meta.on=\"zero\"").set("train.epochs=1").set("module.epochs=1");
    run.set("meta.epochs=1").set("finetune.epochs=1").mpirun(32, &["run"]).ok();
}

#[test]
fn the_number_of_data_workers_changes_nothing() {
    let one = Incubate::new();
    one.ok(&["meta"]);
    let seven = Incubate::new().set("run.workers=7");
    seven.ok(&["meta"]);
    assert!(one.bytes("meta.h5") == seven.bytes("meta.h5"));
}

#[test]
fn the_moving_average_of_the_weights_is_written_and_survives_a_stop() {
    let uninterrupted = Incubate::new().set("train.ema=0.9").set("meta.epochs=12");
    uninterrupted.ok(&["meta"]);
    let plain = Incubate::new().set("meta.epochs=12");
    plain.ok(&["meta"]);
    assert!(uninterrupted.bytes("meta.h5") != plain.bytes("meta.h5"));
    let stopped = Incubate::new().set("train.ema=0.9").set("meta.epochs=12");
    stop_after_a_checkpoint(&stopped, &["meta"]);
    stopped.ok(&["meta"]);
    assert!(uninterrupted.bytes("meta.h5") == stopped.bytes("meta.h5"));
}

#[test]
fn dropout_draws_the_same_masks_after_a_stop() {
    let build = || Incubate::new().set("model.dropout=0.2").set("meta.epochs=12");
    let (uninterrupted, stopped) = (build(), build());
    uninterrupted.ok(&["meta"]);
    stop_after_a_checkpoint(&stopped, &["meta"]);
    stopped.ok(&["meta"]);
    assert!(uninterrupted.bytes("meta.h5") == stopped.bytes("meta.h5"));
}

/// Starts the command, waits for the first checkpoint, and sends SIGTERM. The command must end with exit code 75.
pub fn stop_after_a_checkpoint(run: &Incubate, arguments: &[&str]) {
    stop_by(libc::SIGTERM, run.command(arguments), run);
}

/// Starts a command of a run, waits for the first checkpoint, and stops the command with a signal.
fn stop_by(signal: i32, mut command: Command, run: &Incubate) {
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    wait_until("a checkpoint", || {
        assert!(child.try_wait().unwrap().is_none(), "it ended before a checkpoint was seen");
        run.has_checkpoint()
    });
    // SAFETY: nobody has waited for the child yet.
    unsafe { libc::kill(child.id() as i32, signal) };
    assert_eq!(child.wait().unwrap().code(), Some(75));
}

#[test]
fn a_closed_terminal_stops_a_run_in_order_and_nohup_keeps_it_running() {
    let run = Incubate::new().set("meta.epochs=100000");
    // The tests themselves may run under nohup, whose children ignore the signal too.
    let command_with = |action: libc::sighandler_t| {
        let mut command = run.command(&["meta"]);
        // SAFETY: between fork and exec only a signal's action is set, as nohup does.
        unsafe {
            command.pre_exec(move || {
                libc::signal(libc::SIGHUP, action);
                Ok(())
            })
        };
        command
    };
    stop_by(libc::SIGHUP, command_with(libc::SIG_DFL), &run);
    let mut child = command_with(libc::SIG_IGN).stderr(Stdio::null()).spawn().unwrap();
    let step = || Progress::read(&run.run_dir, "meta").map_or(0, |progress| progress.step);
    let wait_for_step_beyond = |before: u64| wait_until("a later step", || step() > before);
    wait_for_step_beyond(step());
    // SAFETY: nobody has waited for the child yet.
    unsafe { libc::kill(child.id() as i32, libc::SIGHUP) };
    wait_for_step_beyond(step() + 5);
    // SAFETY: as above.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().code(), Some(75));
}

#[test]
fn a_checkpoint_holds_the_offset_of_each_parameter_in_its_buffers() {
    let run = Incubate::new().set("module.epochs=100000");
    run.ok(&["meta"]);
    stop_after_a_checkpoint(&run, &["module", "--index", "1"]);
    let path = std::fs::read_dir(run.file("checkpoints")).unwrap().next().unwrap().unwrap().path();
    let named = artefact::read(&path).unwrap().weights;
    let file = hdf5::File::open(&path).unwrap();
    let numbers: Vec<f32> = file.dataset("state/weights").unwrap().read_raw().unwrap();
    let names: Vec<VarLenUnicode> = file.dataset("state/parameters").unwrap().read_raw().unwrap();
    let starts: Vec<u64> = file.dataset("state/starts").unwrap().read_raw().unwrap();
    assert_eq!((names.len(), starts.len()), (named.len(), named.len()));
    for ((stage, name), tensor) in &named {
        let index = names.iter().position(|n| n.as_str() == format!("stage/{stage}/{name}")).unwrap();
        let start = starts[index] as usize;
        assert!(
            tensor.contiguous().view(-1) == tch::Tensor::from_slice(&numbers[start..start + tensor.numel()]),
            "{name}"
        );
    }
    assert_eq!(named.values().map(tch::Tensor::numel).sum::<usize>(), numbers.len());
}

#[test]
fn a_rank_that_fails_takes_the_job_down_with_its_message() {
    // Rank 1 finds a damaged artefact of its module; rank 0 would train on for hours.
    let run = Incubate::new().set("module.epochs=100000");
    run.ok(&["meta"]);
    std::fs::write(run.file("module-1.h5"), b"no artefact").unwrap();
    run.mpirun(2, &["module"]).fails(3, &["module-1.h5", "not an artefact of incubate"]);
}

#[test]
fn a_loss_that_is_not_finite_stops_with_step_rate_and_checkpoint() {
    let run = Incubate::new().set("train.base_lr=1e30").set("train.weight_decay=0");
    run.incubate(&["meta"]).fails(1, &["no longer finite at step", "learning rate", "last good checkpoint"]);
}

#[test]
fn ranks_that_do_not_find_each_other_are_refused_with_the_cure() {
    let run = Incubate::new();
    let slurm = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "4")];
    let output = run.command(&["run"]).envs(slurm).output().unwrap();
    crate::incubate::ended(output).fails(2, &["4 tasks", "srun --mpi=pmix"]);
    let output = run.command(&["run"]).envs([("PMI_SIZE", "2"), ("PMI_RANK", "0")]).output().unwrap();
    crate::incubate::ended(output).fails(2, &["PMI_SIZE says 2 ranks", "mpirun of the MPI it was built with"]);
}
