//! Runs one phase on one group of ranks: skips it if it is done, else prepares its weights and runs the training loop.

use super::Job;
use super::micro_batch::{self, with_what_fits};
use super::record;
use super::shares::{check_micro_batch, check_share};
use crate::collective::replicas::on_replicas;
use crate::collective::{Collective, agree, ask_zero, on_zero};
use crate::config::ModuleStart;
use crate::data::feed::Feed;
use crate::data::{self, Source};
use crate::device::memory;
use crate::error::Failure;
use crate::family::Model;
use crate::family::parameter::{Grown, Parameter};
use crate::libtorch::empty_cache;
use crate::model::fresh;
use crate::plan::groups::share;
use crate::plan::{PhasePlan, Plan};
use crate::run::data::DataRecord;
use crate::run::graph::Node;
use crate::run::state::{Evidence, Found, State, state};
use crate::stop::stop_requested;
use crate::store::lease::Lease;
use crate::store::{Artefact, ArtefactCache, artefact};
use crate::train::{self, Setting};
use crate::usage;
use crate::weights::{Weights, on_device};
use anyhow::Result;
use std::sync::Mutex;
use tch::Device;

impl Job<'_> {
    /// Trains a phase on a group of ranks, unless it is done. If this rank fails, returns its error at once. The caller must then
    /// end the whole world, because other ranks may be waiting for this rank in a collective call.
    pub(super) fn train(&self, node: &Node, group: &dyn Collective) -> Result<()> {
        if ask_zero(group, || self.is_done(node))? {
            if group.is_zero() {
                log::info!("{}: done already ({})", node.name, self.run.file(&node.file).display());
            }
            return Ok(());
        }
        let lease = on_zero(group, || Lease::take(&self.run, &node.name, stop_requested))?;
        if lease.as_ref().is_some_and(|lease| lease.has_waited) {
            self.clock.leave_uncounted();
        }
        // While rank zero waited for the lease, the earlier holder of the lease may have finished the phase.
        if ask_zero(group, || self.is_done(node))? {
            return Ok(());
        }
        let trained = self.train_on(node, group, lease.as_ref());
        if let (Err(error), Some(lease)) = (&trained, &lease)
            && lease.fence().check().is_ok()
        {
            self.record_failure(node, error);
        }
        trained
    }

    /// Whether a node is done.
    ///
    /// # Errors
    /// The node's artefact is damaged or does not fit the node, for example because of another recipe, other data or another meta
    /// model.
    pub(super) fn is_done(&self, node: &Node) -> Result<bool> {
        let found = ArtefactCache::default().find(&self.run, node)?;
        let original = if found == Found::Nothing { None } else { self.original(node)? };
        let state = state(node, &Evidence::of_file(found), original.as_deref());
        Ok(state.or_refusal(node, self.run.file(&node.file))? == State::Done)
    }

    /// The hash of the original: the artefact from which a node's artefact must derive. None if the node has no original, or if
    /// the original is missing.
    pub(super) fn original(&self, node: &Node) -> Result<Option<String>> {
        let Some(position) = self.graph.original(node) else { return Ok(None) };
        let found = ArtefactCache::default().find(&self.run, &self.graph.nodes()[position])?;
        Ok(found.hash().map(str::to_string))
    }

    /// The plan and the images for the task of a node. Opens the images only if the job has not opened them. If this task is not
    /// the task of the job's plan, also records the images, or compares them with their earlier record.
    fn plan_and_source(&self, node: &Node, group: &dyn Collective) -> Result<(Plan, Source)> {
        let plan = self.plan.of_task(node.row.task());
        if plan.config.task == self.plan.config.task {
            return Ok((plan, self.source.clone()));
        }
        let source = match self.task == plan.config.task {
            true => self.source.clone(),
            false => agree(group, data::open(&plan.config))?,
        };
        on_zero(group, || record(&self.run, &plan.config, &source, (self.accept_data, &self.graph)))?;
        Ok((agree(group, Plan::new(plan.config, source.train.len()))?, source))
    }

    /// Runs the loop on each replica of each rank of the group.
    fn train_on(&self, node: &Node, group: &dyn Collective, lease: Option<&Lease>) -> Result<()> {
        let Job { run, devices, clock, .. } = self;
        let (plan, source) = &self.plan_and_source(node, group)?;
        // `self.data` describes the images for classification. So the artefacts of downstream tasks do not record the data on
        // which they were trained.
        let trained_on =
            self.data.as_ref().filter(|_| plan.config.task == self.plan.config.task).map(DataRecord::trained_on);
        let (data, ranks) = (trained_on.as_ref(), self.world.all_ranks().size());
        let feed = Feed::of_replica(&plan.config, source, devices.replicas());
        let phase = &plan.phase_of(node).expect("the node trains");
        let (start, meta) = agree(group, self.start(node, plan, phase))?;
        // Each replica takes its copy out of the list, so that no copy takes memory after training has begun.
        let starts = Mutex::new((0..devices.replicas()).map(|_| on_device(&start, Device::Cpu)).collect::<Vec<_>>());
        drop(start);
        on_replicas(group, devices.replicas(), devices.can_use_nccl(), &|replica| {
            devices.prepare_thread(replica.local)?;
            let device = devices.device(replica.local);
            let own = share(phase.training.global_batch, replica.rank(), replica.size()).len();
            let configured = plan.config.run.micro_batch.samples();
            let start = memory::catch(|| {
                // An earlier phase may have left memory on the device in libtorch's cache.
                empty_cache(device);
                replica.join_nccl()?;
                check_share(plan, phase, devices.replicas(), replica.size())?;
                let start = starts.lock().expect("taking does not panic").pop().expect("there is one for each");
                Ok(on_device(&start, device))
            })
            .map_err(|error| with_what_fits(error, (plan, phase), configured, own, device))?;
            let micro_batch = micro_batch::decide(plan, run, phase, &start, replica, device)
                .map_err(|error| with_what_fits(error, (plan, phase), configured, own, device))?;
            check_micro_batch(plan, phase, micro_batch, replica.size())?;
            let lease = lease.filter(|_| replica.is_zero());
            let setting = Setting { plan, run, feed, group: replica, device, micro_batch, lease, clock, ranks, data };
            memory::catch(|| train::run(&setting, phase, start, meta.as_deref()))
                .map_err(|error| with_what_fits(error, (plan, phase), micro_batch, own, device))
        })
    }

    /// All weights at step 0, and the hash that the phase's artefact will record: the hash of the artefact from which it derives
    /// by the run's table. This need not be the artefact with which the phase starts. Fine-tuning starts from the assembled model,
    /// but its artefact records the meta model's hash. The hash is none if the phase's artefact derives from no artefact.
    fn start(&self, node: &Node, plan: &Plan, phase: &PhasePlan) -> Result<(Weights, Option<String>)> {
        let parameters = phase.parameters(plan);
        let mut weights = fresh(parameters.iter(), phase.seed);
        let Some(from) = self.graph.start(node) else { return Ok((weights, None)) };
        let path = self.run.file(phase.extends.as_ref().unwrap_or(&from.file));
        if !path.exists() {
            return Err(usage!(
                "{}: phase {} starts from it; run the phases before it first",
                path.display(),
                phase.name
            ));
        }
        let Artefact { header, weights: mut stored, hash, .. } = artefact::read(&path)?;
        if phase.extends.is_none() {
            let evidence = Evidence::of_file(Found::Artefact(header.stamp(&hash, self.data.as_ref())));
            state(from, &evidence, None).or_refusal(from, path)?;
        } else if header.phase != node.row.name || header.depths != phase.depths {
            let what = format!("is no artefact of {}; restore the one that was extended", node.name);
            return Err(Failure::Damaged { path, what }.into());
        }
        // The stage that a module phase trains starts fresh or grows from the meta model's stage. All other stages, and all stages
        // of other phases, start with the stored weights.
        if let (Some(stage), ModuleStart::Meta) = (node.index, plan.config.module.start) {
            let own = parameters.iter().filter(|parameter| parameter.stage == stage);
            grow(&mut weights, &stored, &plan.config.model, own, phase.depths[stage]);
        }
        for parameter in parameters.iter().filter(|parameter| node.index != Some(parameter.stage)) {
            let key = (parameter.stage, parameter.name.clone());
            if let Some(tensor) = stored.remove(&key) {
                weights.insert(key, plan.config.model.resampled(parameter, tensor));
            }
        }
        let derives_from_it = node.row.model.is_some_and(|model| model.derives_from == Some(from.row.name));
        Ok((weights, if derives_from_it { Some(hash) } else { header.meta }))
    }
}

/// Sets the weights of a stage so that it computes the same function as the same stage of the meta model. The stage has `depth`
/// blocks and the parameters `own`. `meta` are the weights of the meta model.
fn grow<'a>(
    weights: &mut Weights,
    meta: &Weights,
    model: &Model,
    own: impl Iterator<Item = &'a Parameter>,
    depth: usize,
) {
    let meta_depths = model.meta_depths();
    for parameter in own {
        let stage = parameter.stage;
        let value = weights.get_mut(&(stage, parameter.name.clone())).expect("every parameter has a value");
        match model.grown(parameter, depth, meta_depths[stage]) {
            Grown::Fresh => {}
            Grown::Zeros => *value = value.zeros_like(),
            Grown::Copied(name) => *value = meta[&(stage, name)].copy(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::model::{DropPath, FP32_ON_HOST, Network, Tap};
    use crate::run::table::MODULE;
    use tch::Tensor;

    #[test]
    fn a_hybrid_whose_module_starts_from_the_meta_model_computes_what_the_meta_model_computes() {
        let text = "[module]\nstart = \"meta\"\n[model]\nimage_size = 8\npatch_size = 4\nwidth = 8\nheads = 2\ndepths = [5, 4]\nmeta_depth = 2";
        let plan = Plan::without_data(Config::parse(text, &[]).unwrap());
        let (config, meta_depths) = (&plan.config, [2, 2]);
        let meta = fresh(config.model.parameters(&meta_depths).iter(), 3);
        let images_bchw = (Tensor::arange(2 * 3 * 64, FP32_ON_HOST) * 0.37).sin().view([2, 3, 8, 8]);
        let logits = |depths: &[usize], weights: &Weights, trained| {
            let network = Network::new(config, depths, trained, &[], weights).unwrap();
            let (outputs, tape) = network.train(&images_bchw, &DropPath::none(), &[Tap::Head]);
            network.backward(tape, vec![outputs[0].ones_like()]);
            (outputs[0].copy(), network.flat().layout().named(network.flat().gradients()))
        };
        let (expected, _) = logits(&meta_depths, &meta, 0..2);
        for stage in 0..2 {
            let phase = plan.phase(&MODULE, Some(stage));
            let parameters = phase.parameters(&plan);
            let mut weights = fresh(parameters.iter(), phase.seed);
            let own = parameters.iter().filter(|parameter| parameter.stage == stage);
            grow(&mut weights, &meta, &config.model, own, phase.depths[stage]);
            weights.extend(
                meta.iter().filter(|((of, _), _)| *of != stage).map(|(key, value)| (key.clone(), value.copy())),
            );
            let (ours, gradients) = logits(&phase.depths, &weights, stage..stage + 1);
            assert!((&ours - &expected).abs().max().double_value(&[]) < 1e-6, "stage {stage}: {ours} {expected}");
            // Every block of the stage learns at the first step.
            for block in 0..phase.depths[stage] {
                let gradient = &gradients[&(stage, format!("blocks.{block}.mlp.fc2.weight"))];
                assert!(gradient.abs().max().double_value(&[]) > 0.0, "stage {stage}, block {block}");
            }
        }
    }
}
