//! Evaluates any artefact on the config's test images: a module runs as its hybrid.

use crate::collective::Solo;
use crate::config::Config;
use crate::data;
use crate::data::feed::test_batches::TestBatch;
use crate::error::Failure;
use crate::model::Network;
use crate::plan::phases::META;
use crate::require;
use crate::store::artefact::{self, Artefact};
use crate::store::durable;
use crate::train::evaluate;
use crate::weights::on_device;
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Tensor};

/// How many inputs [`Outputs`] keeps where all of them would be more than so many bytes.
const INPUTS: usize = 16;
const SMALL: usize = 256 << 20;

/// The metrics of `weights` under `config`'s data, computed on a device. What another program's results can be compared with
/// goes into the safetensors file `outputs`: `logits` (images, classes) and `labels` of every test image, and `inputs`
/// (images, channels, rows, columns) as the network sees them: all of a set of small images, such as Fashion-MNIST's, or else
/// the first 16.
pub fn evaluate(
    config: &Config,
    weights: &Path,
    device: Device,
    outputs: Option<&Path>,
) -> Result<BTreeMap<String, f64>> {
    if let Some(folder) = outputs.and_then(Path::parent).filter(|folder| !folder.as_os_str().is_empty()) {
        require!(folder.is_dir(), "{}: no such folder; make it, or give --outputs another file", folder.display());
    }
    let source = data::open(config)?;
    let network = network(config, weights, device)?;
    let mut kept = Outputs::of(config, source.test.len());
    let mut seen = |batch: &TestBatch, logits_bc: &Tensor| {
        if outputs.is_some() {
            kept.keep(batch, logits_bc);
        }
    };
    let batch = config.run.micro_batch.samples();
    let metrics = evaluate::evaluate(&network, &source, config, batch, &Solo, &mut seen)?;
    outputs.map_or(Ok(()), |into| kept.write(into))?;
    Ok(metrics.expect("a signal ends this command at once"))
}

/// What is kept of an evaluation, batch by batch.
struct Outputs {
    /// How many inputs are wanted.
    wanted: usize,
    inputs: Vec<Tensor>,
    logits: Vec<Tensor>,
    labels: Vec<Tensor>,
}

impl Outputs {
    fn of(config: &Config, images: usize) -> Outputs {
        let model = &config.model;
        let image = 4 * model.channels() * model.image_size().pow(2);
        let wanted = if images.saturating_mul(image) <= SMALL { images } else { INPUTS };
        Outputs { wanted, inputs: vec![], logits: vec![], labels: vec![] }
    }

    fn keep(&mut self, batch: &TestBatch, logits_bc: &Tensor) {
        let taken = batch.images_bchw.size()[0].min(self.wanted as i64);
        // The batch's own memory is used again.
        self.inputs.push(batch.images_bchw.narrow(0, 0, taken).copy());
        self.wanted -= taken as usize;
        self.logits.push(logits_bc.shallow_clone());
        self.labels.push(batch.labels_b.shallow_clone());
    }

    fn write(&self, into: &Path) -> Result<()> {
        let all = [("logits", &self.logits), ("labels", &self.labels), ("inputs", &self.inputs)];
        let all = all.map(|(name, parts)| (name, Tensor::cat(parts, 0)));
        durable::replace(into, |beside| Ok(Tensor::write_safetensors(&all, beside)?))
    }
}

fn network(config: &Config, weights: &Path, device: Device) -> Result<Network> {
    let artefact = artefact::read(weights)?;
    if artefact.header.model != config.model {
        let what =
            "its model differs from the config's [model]; evaluate it with the config it was trained with".into();
        return Err(Failure::Damaged { path: weights.into(), what }.into());
    }
    let artefact = as_network(artefact, weights, &config.run.dir)?;
    let weights = on_device(&artefact.weights, device);
    Network::new(config, &artefact.header.depths, 0..0, &weights)
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
