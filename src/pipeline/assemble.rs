//! The target from K modules: no training, but every module must have grown in the same meta model by the same recipe.

use super::{Job, is_done};
use crate::collective::Solo;
use crate::error::Failure;
use crate::model::Network;
use crate::plan::phases::{ASSEMBLED, META, MODULE};
use crate::store::lease::Lease;
use crate::store::{Header, artefact};
use crate::task::Task;
use crate::train::{evaluate, stop_requested};
use crate::usage;
use crate::weights::{Weights, on_device};
use anyhow::Result;
use std::path::Path;

/// Reads all modules, checks that they belong together, and writes the assembled target with its evaluation.
pub fn assemble(job: &Job) -> Result<()> {
    let (plan, run) = (&job.plan, &job.run);
    let model = &plan.config.model;
    let path = run.file(ASSEMBLED);
    let recipe = plan.recipe(MODULE.recipe);
    let lease = Lease::take(run, "assemble", stop_requested)?;
    let meta_file = run.file(META.writes);
    let meta = if meta_file.exists() { Some(artefact::read_header(&meta_file)?.1) } else { None };
    if is_done(&path, &recipe, meta.as_deref())? {
        log::info!("assemble: done already ({})", path.display());
        return Ok(());
    }
    let missing = |file: &Path, cure: String| usage!("{}: missing; train it with `incubate {cure}`", file.display());
    let meta = meta.ok_or_else(|| missing(&meta_file, "meta CONFIG".into()))?;
    let mut weights = Weights::new();
    for index in 0..model.stages() {
        let phase = plan.phase(&MODULE, Some(index));
        let file = run.file(&phase.file);
        if !file.exists() {
            return Err(missing(&file, format!("module CONFIG --index {index}")));
        }
        let module = artefact::read(&file)?;
        let foreign = |what: String| {
            let what = format!("{what}; delete {} and train module {index} again", phase.file);
            Failure::Damaged { path: file.clone(), what }
        };
        let header = &module.header;
        if header.index != Some(index) {
            let held = header.index.map_or("no single module".into(), |held| format!("module {held}"));
            return Err(foreign(format!("holds {held}, not module {index}")).into());
        }
        if header.depths != phase.depths {
            return Err(foreign(format!("has depths {:?}, expected {:?}", header.depths, phase.depths)).into());
        }
        if header.recipe != recipe {
            return Err(foreign("was trained by another recipe".into()).into());
        }
        if header.meta.as_deref() != Some(&meta) {
            return Err(foreign("grew in another meta model than this run's meta.h5".into()).into());
        }
        weights.extend(module.weights);
    }
    let network = Network::new(&plan.config, model.depths(), 0..0, &on_device(&weights, job.devices.device(0)))?;
    let evaluated = evaluate::evaluate(
        &network,
        &job.source,
        &plan.config,
        plan.config.run.micro_batch.samples(),
        &Solo,
        &mut |_, _| (),
    )?;
    let Some(metrics) = evaluated else { return Err(Failure::Stopped { phase: "assemble".into(), step: 0 }.into()) };
    log::info!("assemble: test {}", Task::of(&plan.config).text(&metrics));
    let header = Header {
        phase: "assemble".into(),
        index: None,
        depths: model.depths().to_vec(),
        step: 0,
        recipe,
        meta: Some(meta),
        model: model.clone(),
        metrics,
    };
    artefact::write(&path, &header, &weights, Some(lease.fence()))?;
    Ok(())
}
