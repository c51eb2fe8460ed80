//! Evaluates any artefact on the config's test images: a module runs as its hybrid.

use crate::collective::Solo;
use crate::config::Config;
use crate::data;
use crate::error::Failure;
use crate::model::Network;
use crate::plan::phases::META;
use crate::store::artefact::{self, Artefact};
use crate::train::evaluate;
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::Path;

/// The metrics of `weights` under `config`'s data.
pub fn evaluate(config: &Config, weights: &Path) -> Result<BTreeMap<String, f64>> {
    let source = data::open(config)?;
    let artefact = artefact::read(weights)?;
    if artefact.header.model != config.model {
        let what =
            "its model differs from the config's [model]; evaluate it with the config it was trained with".into();
        return Err(Failure::Damaged { path: weights.into(), what }.into());
    }
    let artefact = as_network(artefact, weights, &config.run.dir)?;
    let network = Network::new(&config.model, &artefact.header.depths, 0..0, &artefact.weights)?;
    evaluate::evaluate(&network, &source, config, &Solo)
}

/// Completes a module with the frozen stages of the meta model that it grew in, beside it or in the run directory.
fn as_network(mut artefact: Artefact, path: &Path, run: &Path) -> Result<Artefact> {
    let Some(index) = artefact.header.index else { return Ok(artefact) };
    let beside = path.with_file_name(META.writes);
    let meta_path = if beside.exists() { beside } else { run.join(META.writes) };
    let meta = artefact::read(&meta_path)?;
    if artefact.header.meta.as_deref() != Some(&meta.hash) {
        let what = format!("grew in another meta model than {}", meta_path.display());
        return Err(Failure::Damaged { path: path.into(), what }.into());
    }
    artefact.weights.extend(meta.weights.into_iter().filter(|((stage, _), _)| *stage != index));
    Ok(artefact)
}
