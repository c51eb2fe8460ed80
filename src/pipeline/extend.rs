//! `--extend finetune.epochs=N` continues a finished fine-tuning for more epochs.
//!
//! The final model is kept as `final-E-epochs.h5`, where E is the number of epochs so far. From its weights (the moving average, if
//! the phase keeps one) a new schedule of N − E epochs starts, with its own warm-up and decay. The optimiser's moments start fresh.
//! The config of the run directory then contains both N and E, so the recipe of the new final model depends on both.

use crate::collective::{Collective, on_zero};
use crate::config::Config;
use crate::run::graph::Graph;
use crate::run::state::{Evidence, State, state};
use crate::run::table::{FINETUNE, TABLE};
use crate::store::{ArtefactCache, RunDir, durable};
use crate::{require, usage};
use anyhow::Result;

/// Prepares the run directory for `epochs` epochs of fine-tuning in all, and returns the config with this number. All ranks of the
/// group must call this function together.
///
/// # Errors
/// A usage error if the fine-tuning so far is not done, or if another key of the config differs from the run's. Also a usage error
/// if the fine-tuning already has `epochs` epochs or more, unless an earlier extension set exactly `epochs`.
pub fn extend(group: &dyn Collective, config: Config, epochs: usize) -> Result<Config> {
    on_zero(group, || prepare(&config, epochs))?;
    let extended = RunDir::config_of(&config.run.dir)?.finetune;
    config.with_finetuning(extended.epochs, extended.epochs_before)
}

/// Renames the final model and writes the config with more epochs. If an earlier call was interrupted, completes its work.
fn prepare(config: &Config, epochs: usize) -> Result<()> {
    let before = RunDir::config_of(&config.run.dir)?;
    let (so_far, earlier) = (before.finetune.epochs, before.finetune.epochs_before);
    let run = RunDir::open(&config.clone().with_finetuning(so_far, earlier)?)?;
    if so_far == epochs && earlier > 0 {
        return Ok(());
    }
    require!(
        epochs > so_far,
        "--extend finetune.epochs={epochs}: the run in {} has {so_far} epochs of fine-tuning; give more",
        run.path.display()
    );
    let longer = config.clone().with_finetuning(epochs, so_far)?;
    let (last, kept) = (run.file(FINETUNE.writes), run.file(&FINETUNE.kept(so_far)));
    if last.exists() {
        let graph = Graph::new(&before, &TABLE);
        let node = graph.one(&FINETUNE);
        let state = state(node, &Evidence::of_file(ArtefactCache::default().find(&run, node)?), None);
        require!(state.or_refusal(node, last.clone())? == State::Done, "{}: not done", last.display());
        durable::rename(&last, &kept)?;
        keep_curves(&run, so_far);
    }
    require!(
        kept.exists(),
        "{}: missing; finish the fine-tuning of {so_far} epochs first, then extend it",
        last.display()
    );
    run.write_config(&longer)
}

/// Renames the logged curves of the epochs so far. If that fails, only warns, because the curves do not change the result.
fn keep_curves(run: &RunDir, epochs: usize) {
    let logs = run.logs(FINETUNE.name);
    let moved = std::fs::rename(&logs, run.logs(&format!("{}-{epochs}-epochs", FINETUNE.name)));
    moved.unwrap_or_else(|error| log::warn!("{}: the curves so far are not kept: {error}", logs.display()));
}

/// Reads the number of epochs from the value of `--extend`.
pub fn parse(text: &str) -> Result<usize> {
    let epochs = text.strip_prefix("finetune.epochs=").and_then(|number| number.parse().ok());
    epochs.ok_or_else(|| usage!("write finetune.epochs=N; no other phase can be extended"))
}
