//! Tests the loop with a family that has a buffer and leaves its backward pass to libtorch's autograd.

use super::*;
use crate::collective::Solo;
use crate::collective::replicas::on_replicas;
use crate::config::Config;
use crate::data;
use crate::data::feed::Feed;
use crate::model::fresh;
use crate::run::table::{DGL, E2E, Row};
use crate::store::Artefact;
use anyhow::ensure;
use std::cell::Cell;
use std::path::Path;
use tch::Tensor;

const STEPS: u64 = 12;

fn plan(dir: &Path) -> Plan {
    let text = format!(
        "[run]\ndir = {dir:?}\ndevice = \"cpu\"\nworkers = 1\nmicro_batch = 4\ncheckpoint_every = \"5 steps\"\n\
         [model]\nfamily = \"toy\"\nimage_size = 8\n\
         [data]\nformat = \"shapes\"\ntrain_images = 48\ntest_images = 12\nrepeats = 1\nauto_augment = \"\"\n\
         color_jitter = 0\n\
         [train]\nepochs = 2\nglobal_batch = 8\nwarmup_epochs = 0\nbase_lr = 0.5\nema = 0.5\neval_epochs = 0"
    );
    Plan::new(Config::parse(&text, &[]).unwrap(), 48).unwrap()
}

/// A group of one member whose all-reduces fail after the given number of calls.
struct Failing(Cell<usize>);

impl Collective for Failing {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn all_reduce(&self, _: &mut Tensor) -> Result<()> {
        ensure!(self.0.get() > 0, "the network is gone");
        self.0.set(self.0.get() - 1);
        Ok(())
    }
    fn all_reduce_f64(&self, _: &mut [f64]) -> Result<()> {
        Ok(())
    }
    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}

/// Trains the target in the phase of a row on a group, always from the same fresh weights.
fn train(plan: &Plan, row: &'static Row, group: &dyn Collective) -> Result<Artefact> {
    let (run, source, phase) = (RunDir::open(&plan.config)?, data::open(&plan.config)?, plan.phase(row, None));
    assert_eq!(phase.steps, STEPS);
    let setting = Setting {
        plan,
        run: &run,
        feed: Feed { source: &source, workers: 1 },
        group,
        device: Device::Cpu,
        micro_batch: plan.config.run.micro_batch.samples(),
        lease: None,
        clock: &Clock::of_process(),
        ranks: 1,
        data: None,
    };
    super::run(&setting, &phase, fresh(phase.parameters(plan).iter(), 7), None)?;
    artefact::read(&run.file(&phase.file))
}

fn largest_difference(a: &Weights, b: &Weights) -> f64 {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    a.iter().map(|(key, tensor)| (tensor - &b[key]).abs().max().double_value(&[])).fold(0.0, f64::max)
}

#[test]
fn a_family_under_autograd_trains_resumes_with_the_same_bits_and_sums_over_replicas() {
    trains_resumes_and_sums(&E2E);
}

#[test]
fn a_local_loss_trains_a_head_that_checkpoints_keep_and_artefacts_do_not() {
    let (local, plain) = (trains_resumes_and_sums(&DGL), trains_resumes_and_sums(&E2E));
    assert!(largest_difference(&local.weights, &plain.weights) > 1e-3, "the local loss trains the first stage");
}

/// Returns the artefact of an undisturbed run.
fn trains_resumes_and_sums(row: &'static Row) -> Artefact {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    let [whole, resumed, shared] = ["whole", "resumed", "shared"].map(|name| plan(&folder.path().join(name)));

    let undisturbed = train(&whole, row, &Solo).unwrap();
    let mean = &undisturbed.weights[&(0, "embed.mean".to_string())];
    assert!(mean.abs().max().double_value(&[]) > 0.01, "the buffer follows the pixels and is saved: {mean}");
    for stage in 0..2 {
        // A bias starts at 0.
        let bias = &undisturbed.weights[&(stage, "0.bias".to_string())];
        assert!(bias.abs().max().double_value(&[]) > 1e-3, "stage {stage} learns: {bias}");
    }

    let error = train(&resumed, row, &Failing(Cell::new(7))).unwrap_err();
    assert!(format!("{error:#}").contains("the network is gone"), "{error:#}");
    let run = RunDir::open(&resumed.config).unwrap();
    let (step, checkpoint) = run.checkpoints(row.name).unwrap().swap_remove(0);
    assert_eq!(step, 5, "there is work to resume");
    let checkpoint = artefact::read(&checkpoint).unwrap();
    let auxiliary = checkpoint.weights.keys().filter(|(stage, _)| *stage == 2).count();
    assert_eq!(auxiliary, if row.name == "dgl" { 2 } else { 0 }, "{:?}", checkpoint.weights.keys());
    assert!(undisturbed.weights.keys().all(|(stage, _)| *stage < 2));
    let after_resuming = train(&resumed, row, &Solo).unwrap();
    assert_eq!(largest_difference(&undisturbed.weights, &after_resuming.weights), 0.0);
    assert_eq!(undisturbed.header.metrics, after_resuming.header.metrics);

    on_replicas(&Solo, 2, false, &|replica| train(&shared, row, replica).map(|_| ())).unwrap();
    let by_two = artefact::read(&folder.path().join("shared").join(row.writes)).unwrap();
    let difference = largest_difference(&undisturbed.weights, &by_two.weights);
    assert!(difference < 1e-5, "two replicas end as one: {difference:e}");
    undisturbed
}
