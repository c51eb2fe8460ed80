//! Previews the assembled network while the modules still train. So the user notices early if a module spoils this network.

use super::statistics;
use crate::collective::Solo;
use crate::config::{Config, TaskKind};
use crate::data::feed::Feed;
use crate::data::source::samples::sample;
use crate::data::{self, Source};
use crate::error::Failure;
use crate::model::Network;
use crate::plan::Plan;
use crate::run::graph::Node;
use crate::run::state::{Evidence, Found, State, state};
use crate::run::table::{META, MODULE};
use crate::store::previews::{Preview, Previewed};
use crate::store::process::unix_time;
use crate::store::{RunDir, artefact};
use crate::task::Task;
use crate::train::evaluate;
use crate::usage;
use crate::weights::{Weights, on_device};
use anyhow::Result;
use std::fmt::Write;
use tch::Device;

/// The largest number of training images from which the running statistics of the assembled network are estimated.
const STATISTICS_IMAGES: usize = 1024;

/// The newest weights of a module.
struct Module {
    stage: usize,
    name: String,
    /// The number of steps that the weights have trained, and the number of steps of the module's phase.
    steps: (u64, u64),
    weights: Weights,
}

/// The values from which a preview builds and evaluates its networks.
struct Previewer {
    config: Config,
    /// The training images of the run, and a sample of its test images, on which the networks are evaluated.
    source: Source,
    device: Device,
    meta: Weights,
}

/// Evaluates networks on a sample of `images` test images: the meta model, the meta model with each single module in place, and the
/// meta model with all modules in place (the assembled network). A module has the weights of its artefact or of its newest
/// checkpoint. If a module has neither, the assembled network keeps the meta model's stage in its place. Adds the result to the run
/// directory.
///
/// # Errors
/// There is no meta model yet, no module has weights, or a file is damaged.
pub fn preview(config: Config, images: usize, device: Device) -> Result<Preview> {
    let source = data::open_read_only(&config)?;
    preview_of(&Plan::new(config, source.train.len())?, source, images, device)
}

/// Does the work of [`preview`] with the images of a source that is open.
pub(super) fn preview_of(plan: &Plan, source: Source, images: usize, device: Device) -> Result<Preview> {
    let run = RunDir { path: plan.config.run.dir.clone() };
    let meta_path = run.file(META.writes);
    if !meta_path.exists() {
        return Err(usage!("{}: missing; a preview needs the meta model", meta_path.display()));
    }
    let meta = artefact::read(&meta_path)?;
    let graph = plan.graph();
    let nodes = graph.nodes_of(&MODULE).map(|node| newest(plan, &run, node, &meta.hash));
    let modules: Vec<Module> = nodes.filter_map(Result::transpose).collect::<Result<_>>()?;
    if modules.is_empty() {
        return Err(usage!("{}: no module has a checkpoint yet; preview later", run.path.display()));
    }
    let test = sample(&source.test, images, plan.config.run.seed);
    let count = test.len();
    let source = Source { test, ..source };
    let previewer = Previewer { config: plan.config.clone(), source, device, meta: meta.weights };
    let preview = Preview {
        time: unix_time(),
        images: count,
        metric: Task::of(&plan.config).headline().key.into(),
        models: previewer.models((meta.header.step, meta.header.step), &modules)?,
    };
    run.add_preview(&preview)?;
    Ok(preview)
}

/// The newest weights of a module's node that belong to the meta model with the hash `meta`, if there are any.
fn newest(plan: &Plan, run: &RunDir, node: &Node, meta: &str) -> Result<Option<Module>> {
    let (Some(stage), Some(expected), Some(phase)) = (node.index, &node.expected, plan.phase_of(node)) else {
        unreachable!("the row trains modules")
    };
    let module =
        |step: u64, weights: Weights| Module { stage, name: node.name.clone(), steps: (step, phase.steps), weights };
    // A module whose artefact is missing, damaged or stale may have a checkpoint.
    if let Ok(done) = artefact::read(&run.file(&node.file)) {
        let stamp = done.header.stamp(&done.hash, run.data(TaskKind::Classification)?.as_ref());
        if state(node, &Evidence::of_file(Found::Artefact(stamp)), Some(meta)) == State::Done {
            return Ok(Some(module(phase.steps, done.weights)));
        }
    }
    let read = || run.newest_checkpoint(&node.name, &expected.recipe, Some(meta));
    // The training may remove a checkpoint while it is read here. Then there is a newer checkpoint, and a second try finds it.
    let checkpoint = read().or_else(|_| read())?;
    Ok(checkpoint.map(|checkpoint| module(checkpoint.header.step, checkpoint.averaged())))
}

impl Previewer {
    /// Evaluates all models, the meta model first.
    fn models(&self, meta_steps: (u64, u64), modules: &[Module]) -> Result<Vec<Previewed>> {
        let model = &self.config.model;
        let previewed = |name: &str, steps, value| Previewed { name: name.into(), steps, value };
        let thin = self.value(&model.meta_depths(), &self.meta)?;
        let mut models = vec![previewed(META.name, Some(meta_steps), thin)];
        for module in modules {
            let (depths, weights) = self.with(std::slice::from_ref(module));
            models.push(previewed(&module.name, Some(module.steps), self.value(&depths, &weights)?));
        }
        let (depths, mut weights) = self.with(modules);
        if model.has_buffers() {
            let of = (&self.config, &self.source, self.device);
            let estimated = statistics::estimated_anew(of, &depths, &weights, STATISTICS_IMAGES)?;
            weights = estimated.ok_or_else(stopped)?;
        }
        models.push(previewed(ASSEMBLED, None, self.value(&depths, &weights)?));
        Ok(models)
    }

    /// The meta model with these modules in place of its stages. Returns the depths of the stages, and the weights.
    fn with(&self, modules: &[Module]) -> (Vec<usize>, Weights) {
        let mut depths = self.config.model.meta_depths();
        let mut weights = on_device(&self.meta, Device::Cpu);
        for Module { stage, weights: own, .. } in modules {
            depths[*stage] = self.config.model.depths()[*stage];
            weights.retain(|(other, _), _| other != stage);
            weights.extend(on_device(own, Device::Cpu));
        }
        (depths, weights)
    }

    /// The main metric of a network on the sample of test images.
    fn value(&self, depths: &[usize], weights: &Weights) -> Result<f64> {
        let config = &self.config;
        let network = Network::new(config, depths, 0..0, &[], &on_device(weights, self.device))?;
        let (feed, batch) = (Feed::of_replica(config, &self.source, 1), config.run.micro_batch.samples());
        let evaluation = evaluate::evaluate(&network, feed, config, batch, &Solo, &mut |_, _| ())?;
        Ok(evaluation.ok_or_else(stopped)?.metrics[Task::of(config).headline().key])
    }
}

/// The name, in a preview, of the network that the modules make together.
pub const ASSEMBLED: &str = "assembled so far";

fn stopped() -> anyhow::Error {
    Failure::Stopped { phase: "preview".into(), step: 0 }.into()
}

/// A preview as a table for people.
pub fn table(config: &Config, preview: &Preview) -> String {
    let headline = Task::of(config).headline();
    let mut out = format!("{:<16} {:>15} {:>8} {:>12}\n", "preview", "step", headline.title(), "against meta");
    for model in &preview.models {
        let apart = format!("{:+.*}", headline.decimals, preview.against_meta(model));
        let _ = writeln!(
            out,
            "{:<16} {:>15} {:>8} {apart:>12}",
            model.name,
            model.progress(),
            headline.number(model.value)
        );
    }
    let _ = writeln!(out, "on {} test images; each module is evaluated inside the meta model", preview.images);
    out
}
