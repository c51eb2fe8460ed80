//! Assembles the target from K modules, without training. All modules must have been trained in the same meta model with the same
//! recipe.

use super::{Job, statistics};
use crate::collective::Solo;
use crate::data::feed::Feed;
use crate::error::Failure;
use crate::model::Network;
use crate::run::data::DataRecord;
use crate::run::graph::Node;
use crate::run::state::{Evidence, Found, state};
use crate::stop::stop_requested;
use crate::store::lease::Lease;
use crate::store::{Header, artefact, full_disk};
use crate::task::Task;
use crate::train::evaluate;
use crate::usage;
use crate::weights::{Weights, on_device};
use anyhow::Result;
use std::collections::BTreeMap;

/// The largest number of training images from which the running statistics of the target are estimated.
const STATISTICS_IMAGES: usize = 20 * 1024;

/// Writes the assembled target with its evaluation, unless this is done already.
pub fn assemble(job: &Job, node: &Node) -> Result<()> {
    let path = job.run.file(&node.file);
    let lease = Lease::take(&job.run, &node.name, stop_requested)?;
    if job.is_done(node)? {
        log::info!("{}: done already ({})", node.name, path.display());
        return Ok(());
    }
    let meta = job.original(node)?;
    let mut weights = modules(job, node, meta.as_deref())?;
    if job.plan.config.model.has_buffers() {
        let before = evaluated(job, node, &weights)?;
        let of = (&job.plan.config, &job.source, job.devices.device(0));
        let estimated = statistics::estimated_anew(of, job.plan.config.model.depths(), &weights, STATISTICS_IMAGES)?;
        weights = estimated.ok_or_else(|| stopped(node))?;
        log::info!(
            "{}: test {} before its running statistics were estimated anew",
            node.name,
            Task::of(&job.plan.config).text(&before)
        );
    }
    let metrics = evaluated(job, node, &weights)?;
    log::info!("{}: test {}", node.name, Task::of(&job.plan.config).text(&metrics));
    let expected = node.expected.as_ref().expect("the row writes an artefact");
    let header = Header {
        phase: node.row.name.into(),
        index: None,
        depths: expected.depths.clone(),
        step: 0,
        recipe: expected.recipe.clone(),
        meta,
        model: job.plan.config.model.clone(),
        auxiliary: Vec::new(),
        metrics,
        class_names: job.source.train.classes().to_vec(),
        data: job.data.as_ref().map(DataRecord::trained_on),
    };
    full_disk::insist(|| artefact::write(&path, &header, &weights, Some(lease.fence())), &mut |_| ())?;
    Ok(())
}

/// The weights of all modules that the node needs. Fails if a module is missing, does not fit its node, or belongs to another meta
/// model.
fn modules(job: &Job, node: &Node, meta: Option<&str>) -> Result<Weights> {
    let mut weights = Weights::new();
    for need in job.graph.needs(node).filter(|need| need.expected.is_some()) {
        let path = job.run.file(&need.file);
        if !path.exists() {
            return Err(usage!("{}: missing; train it with `incubate {}`", path.display(), need.command()));
        }
        if need.index.is_some() {
            let module = artefact::read(&path)?;
            let evidence = Evidence::of_file(Found::Artefact(module.header.stamp(&module.hash, job.data.as_ref())));
            state(need, &evidence, meta).or_refusal(need, path)?;
            weights.extend(module.weights);
        }
    }
    Ok(weights)
}

/// The metrics of the assembled target on the test images.
fn evaluated(job: &Job, node: &Node, weights: &Weights) -> Result<BTreeMap<String, f64>> {
    let (config, micro_batch) = (&job.plan.config, job.plan.config.run.micro_batch.samples());
    let network = Network::new(config, config.model.depths(), 0..0, &[], &on_device(weights, job.devices.device(0)))?;
    let evaluation = evaluate::evaluate(
        &network,
        Feed::of_replica(config, &job.source, 1),
        config,
        micro_batch,
        &Solo,
        &mut |_, _| (),
    )?;
    evaluation.map(|evaluation| evaluation.metrics).ok_or_else(|| stopped(node))
}

fn stopped(node: &Node) -> anyhow::Error {
    Failure::Stopped { phase: node.name.clone(), step: 0 }.into()
}
