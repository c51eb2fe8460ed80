//! Several replicas in one rank compute the same as one replica, resume exactly, and fail together.

use crate::incubate::{Ended, Incubate, TINY, ended};
use crate::runs::stop_after_a_checkpoint;
use crate::wait::wait_until;
use incubate::collective::replicas::on_replicas;
use incubate::collective::{Collective, Solo};
use incubate::config::Config;
use incubate::data;
use incubate::data::feed::Feed;
use incubate::model::fresh;
use incubate::plan::Plan;
use incubate::run::table::MODULE;
use incubate::store::RunDir;
use incubate::store::progress::Progress;
use incubate::train::{self, Clock, Setting};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tch::{Device, Tensor};

fn config() -> Incubate {
    Incubate::with(&TINY.replace("micro_batch = 32", "micro_batch = 8"))
        .set("module.drop_path=0.3")
        .set("data.mixup=0.8")
        .set("data.repeats=3")
        .set("finetune.on=\"world\"")
        .set("finetune.clip_grad=0.5")
}

/// Runs of the same config on 2 ranks × 2 replicas, 4 × 1 and 1 × 4, each with its number of ranks.
fn forks(one: &Incubate) -> [(usize, Incubate); 3] {
    [(2, 2), (4, 1), (1, 4)].map(|(ranks, replicas)| (ranks, one.fork(&[]).set(&format!("run.replicas={replicas}"))))
}

#[track_caller]
fn assert_same_curve(phase: &str, one: &Incubate, other: &Incubate) {
    let (a, b) = (one.losses(phase), other.losses(phase));
    assert!(!a.is_empty() && a.len() == b.len(), "{phase}: {} and {} steps", a.len(), b.len());
    for (step, (a, b)) in a.iter().zip(&b).enumerate() {
        assert!((a / b - 1.0).abs() < 1e-4, "{phase} step {step}: {a} alone, {b} by replicas");
    }
}

#[test]
fn ranks_times_replicas_have_the_loss_curves_of_one_replica_with_the_same_global_batch() {
    let one = config();
    let forks = forks(&one);
    one.ok(&["run"]);
    for (ranks, many) in forks {
        many.mpirun(ranks, &["meta"]).ok();
        assert_same_curve("meta", &one, &many);
        // Each phase starts from the same weights, so that differences do not add up from phase to phase.
        for file in ["meta.h5", "module-0.h5", "module-1.h5", "module-3.h5", "assembled.h5"] {
            std::fs::copy(one.file(file), many.file(file)).unwrap();
        }
        many.mpirun(ranks, &["module", "--index", "2"]).ok();
        assert_same_curve("module-2", &one, &many);
        many.mpirun(ranks, &["finetune"]).ok();
        assert_same_curve("finetune", &one, &many);
    }
}

/// A collective that counts the numbers that it reduces.
struct Counting<'a>(&'a dyn Collective, &'a AtomicUsize);

impl Collective for Counting<'_> {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn size(&self) -> usize {
        self.0.size()
    }
    fn all_reduce(&self, values: &mut Tensor) -> anyhow::Result<()> {
        self.1.fetch_add(values.numel(), Ordering::Relaxed);
        self.0.all_reduce(values)
    }
    fn all_reduce_f64(&self, values: &mut [f64]) -> anyhow::Result<()> {
        self.0.all_reduce_f64(values)
    }
    fn barrier(&self) -> anyhow::Result<()> {
        self.0.barrier()
    }
}

#[test]
fn a_step_reduces_the_modules_gradients_and_two_numbers_and_nothing_of_the_frozen_stages() {
    let folder = tempfile::tempdir().unwrap();
    let sets = [format!("run.dir={:?}", folder.path()), "run.checkpoint_every=\"never\"".into()];
    let config = Config::parse(TINY, &sets).unwrap();
    let source = data::open(&config).unwrap();
    let run = RunDir::open(&config).unwrap();
    let plan = Plan::new(config, source.train.len()).unwrap();
    let phase = plan.phase(&MODULE, Some(1));
    let parameters = phase.parameters(&plan);
    let start = Mutex::new(fresh(parameters.iter(), phase.seed));
    let clock = Clock::of_process();
    let (between_ranks, of_replicas) = (AtomicUsize::new(0), AtomicUsize::new(0));
    on_replicas(&Counting(&Solo, &between_ranks), 2, false, &|replica| {
        let counted = Counting(replica, &of_replicas);
        let start = incubate::weights::on_device(&start.lock().unwrap(), Device::Cpu);
        let setting = Setting {
            plan: &plan,
            run: &run,
            feed: Feed { source: &source, workers: 1 },
            group: &counted,
            device: Device::Cpu,
            micro_batch: plan.config.run.micro_batch.samples(),
            lease: None,
            clock: &clock,
            ranks: 1,
            data: None,
        };
        train::run(&setting, &phase, start, None)
    })
    .unwrap();
    let of_module: usize = parameters.iter().filter(|p| p.stage == 1).map(|p| p.count()).sum();
    let per_step = of_module + 2;
    assert!(per_step < parameters.iter().map(|p| p.count()).sum());
    assert_eq!(between_ranks.into_inner(), phase.steps as usize * per_step);
    assert_eq!(of_replicas.into_inner(), 2 * phase.steps as usize * per_step);
}

#[test]
fn replicas_stopped_by_a_signal_resume_with_the_bits_of_an_uninterrupted_run() {
    let build = || config().set("run.replicas=3").set("meta.epochs=8");
    let uninterrupted = build();
    uninterrupted.ok(&["meta"]);
    let stopped = build();
    stop_after_a_checkpoint(&stopped, &["meta"]);
    stopped.ok(&["meta"]);
    assert!(uninterrupted.bytes("meta.h5") == stopped.bytes("meta.h5"));
    assert_eq!(uninterrupted.losses("meta"), stopped.losses("meta"));
}

/// The children of a process, such as the ranks of mpirun.
fn children(of: u32) -> Vec<i32> {
    let parent = |pid: &Path| {
        let stat = std::fs::read_to_string(pid.join("stat")).ok()?;
        stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse::<u32>().ok()
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let mut found: Vec<i32> = processes
        .filter(|path| parent(path) == Some(of))
        .map(|path| path.file_name().unwrap().to_str().unwrap().parse().unwrap())
        .collect();
    found.sort_unstable();
    found
}

#[test]
fn a_rank_killed_inside_a_sum_ends_the_job_with_its_name_and_the_run_resumes() {
    let build = || config().set("run.replicas=2").set("meta.epochs=12");
    let uninterrupted = build();
    uninterrupted.mpirun(2, &["meta"]).ok();
    let killed = build();
    let child = killed.mpirun_command(2, &["meta"]).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    wait_until("a checkpoint", || killed.has_checkpoint());
    let victim = *children(child.id()).last().unwrap();
    // SAFETY: the signals go to a rank that mpirun, our child, has started and waits for. The rank is stopped first, so that
    // it joins no further sum, and the other rank waits for it in that sum.
    unsafe {
        libc::kill(victim, libc::SIGSTOP);
        libc::kill(victim, libc::SIGKILL);
    }
    let end = ended(child.wait_with_output().unwrap());
    assert_ne!(end.code, Some(0));
    assert!(end.err.contains("signal 9 (Killed)") && end.err.contains("rank 1"), "{}", end.err);
    killed.mpirun(2, &["meta"]).ok();
    assert!(uninterrupted.bytes("meta.h5") == killed.bytes("meta.h5"));
}

/// Runs the command with a limit on its memory.
fn limited(run: &Incubate, arguments: &[&str], bytes: u64) -> Ended {
    let mut command = run.command(arguments);
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: between fork and exec only a limit is set.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_DATA, &limit) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    ended(command.output().unwrap())
}

#[test]
fn a_micro_batch_too_large_for_the_memory_is_one_error_that_names_one_that_fits() {
    let run = Incubate::new().set("run.replicas=2").set("run.micro_batch=256").set("meta.global_batch=512");
    let run = run.set("model.width=512").set("model.patch_size=1").set("data.repeats=1");
    let end = limited(&run, &["meta"], 1 << 30);
    end.fails(2, &["meta: run.micro_batch = 256 on cpu: out of memory", "128 may fit: --set run.micro_batch=128"]);
}

#[test]
fn an_automatic_micro_batch_is_halved_until_a_step_fits_and_is_reused() {
    let wide = |run: Incubate| {
        run.set("run.micro_batch=auto").set("model.width=128").set("model.patch_size=1").set("data.train_images=64")
    };
    let small = wide(Incubate::new()).set("data.test_images=8").set("meta.epochs=1");
    let end = limited(&small, &["meta"], 640 << 20).ok();
    let Progress { micro_batch, .. } = Progress::read(&small.run_dir, "meta").unwrap();
    let chosen = micro_batch.unwrap();
    assert!((2..64).contains(&chosen) && end.err.contains(&format!("micro-batches of {chosen} samples fit cpu")));
    // The config may set the same number, and a later start reuses the recorded number although there is room for more. Both give the
    // same bits.
    let by_hand = small.fork(&[]).set(&format!("run.micro_batch={chosen}"));
    by_hand.ok(&["meta"]);
    std::fs::remove_file(small.file("meta.h5")).unwrap();
    small.ok(&["meta"]);
    assert!(small.bytes("meta.h5") == by_hand.bytes("meta.h5"));
}

#[test]
fn what_replicas_cannot_do_is_refused_with_the_cure() {
    Incubate::new()
        .set("run.replicas=3")
        .set("meta.global_batch=4")
        .incubate(&["meta"])
        .fails(2, &["meta.global_batch = 4 is too small for 3 replicas", "raise it to 6"]);
    Incubate::new()
        .set("run.replicas=2")
        .set("model.dropout=0.1")
        .incubate(&["meta"])
        .fails(2, &["model.dropout = 0.1", "run.replicas = 1"]);
}
