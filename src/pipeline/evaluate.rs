//! Evaluates any artefact on the config's test images: a module runs as its hybrid.

use crate::collective::Solo;
use crate::config::Config;
use crate::data;
use crate::data::loader::test_batches;
use crate::error::Failure;
use crate::model::Network;
use crate::plan::phases::META;
use crate::store::artefact::{self, Artefact};
use crate::store::durable;
use crate::train::evaluate;
use crate::weights::on_device;
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Tensor};

/// How many inputs [`outputs`] keeps where all of them would be more than so many bytes.
const INPUTS: usize = 16;
const SMALL: usize = 256 << 20;

/// The metrics of `weights` under `config`'s data, computed on a device.
pub fn evaluate(config: &Config, weights: &Path, device: Device) -> Result<BTreeMap<String, f64>> {
    let source = data::open(config)?;
    let network = network(config, weights, device)?;
    let metrics = evaluate::evaluate(&network, &source, config, config.run.micro_batch.samples(), &Solo)?;
    Ok(metrics.expect("a signal ends this command at once"))
}

/// Writes what another program's results can be compared with, as safetensors: `logits` (images, classes) and `labels` of
/// every test image, and `inputs` (images, channels, rows, columns) as the network sees them: all of a set of small images,
/// such as Fashion-MNIST's, or else the first 16.
pub fn outputs(config: &Config, weights: &Path, device: Device, into: &Path) -> Result<()> {
    let source = data::open(config)?;
    let network = network(config, weights, device)?;
    let (mut inputs, mut logits, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    let size = config.run.micro_batch.samples();
    let model = &config.model;
    let image = 4 * model.channels * model.image_size.pow(2);
    let kept = if source.test.len().saturating_mul(image) <= SMALL { source.test.len() } else { INPUTS };
    for batch in test_batches(config, &source, 0..source.test.len(), size, device) {
        let batch = batch?;
        logits.push(network.forward(&batch.images_bchw.to_device(device)).to_device(Device::Cpu));
        labels.push(batch.labels_b.shallow_clone());
        if inputs.len() * size < kept {
            // The batch's own memory is used again.
            inputs.push(batch.images_bchw.copy());
        }
    }
    let inputs = Tensor::cat(&inputs, 0);
    let inputs = inputs.narrow(0, 0, inputs.size()[0].min(kept as i64)).contiguous();
    let all = [("logits", Tensor::cat(&logits, 0)), ("labels", Tensor::cat(&labels, 0)), ("inputs", inputs)];
    durable::replace(into, |beside| Ok(Tensor::write_safetensors(&all, beside)?))
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
