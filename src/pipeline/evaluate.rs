//! Evaluates any artefact on the config's test images. A module runs inside the meta model with which it was trained.

use super::results::Results;
use crate::collective::Solo;
use crate::config::{Config, TaskKind};
use crate::data;
use crate::data::feed::Feed;
use crate::data::feed::test_batches::TestBatch;
use crate::error::Failure;
use crate::model::Network;
use crate::run::table::{META, TABLE};
use crate::store::artefact::{self, Artefact, Header};
use crate::store::durable;
use crate::task::Task;
use crate::train::evaluate::{self, Evaluation};
use crate::weights::on_device;
use crate::{require, usage};
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Tensor};

/// [`Outputs`] keeps all inputs if they have at most this many bytes.
const ALL_INPUTS_BYTES: usize = 256 << 20;
/// The number of inputs that [`Outputs`] keeps if all inputs together have more bytes.
const FEW_INPUTS: usize = 16;

/// Evaluates the artefact `weights` on the config's test images for the task that it was trained for. Returns this task and the
/// results.
///
/// If `outputs` is given, also writes this file. For segmentation, refuses `outputs`. For a detector, the file has COCO's format
/// for results. For a classifier, it is a safetensors file for comparisons with other programs. The safetensors file holds the
/// network's outputs and the labels of all test images, under names that the task gives, and `inputs` (images, channels, rows,
/// columns). If all inputs together have more than 256 MiB, only the first 16 inputs are written.
pub fn evaluate(config: &Config, weights: &Path, device: Device, outputs: Option<&Path>) -> Result<(Task, Evaluation)> {
    if let Some(folder) = outputs.and_then(Path::parent).filter(|folder| !folder.as_os_str().is_empty()) {
        require!(folder.is_dir(), "{}: no such folder; make it, or give --outputs another file", folder.display());
    }
    let artefact = artefact::read(weights)?;
    let config = &config.of_task(task_of(&artefact.header));
    require!(
        outputs.is_none() || config.task != TaskKind::Segmentation,
        "--outputs: label maps differ in size, so they do not fit into one file; leave it out"
    );
    let source = data::open(config)?;
    let network = network(config, artefact, (weights, source.test.classes()), device)?;
    let mut kept = outputs.map(|_| match config.task {
        TaskKind::Detection => Kept::Results(Results::new(config, &source.test)),
        _ => Kept::Outputs(Outputs::new(config, source.test.len())),
    });
    let mut see =
        |batch: &TestBatch, of_network: &[Tensor]| kept.iter_mut().for_each(|kept| kept.keep(batch, of_network));
    let batch = config.run.micro_batch.samples();
    let evaluation =
        evaluate::evaluate(&network, Feed::of_replica(config, &source, 1), config, batch, &Solo, &mut see)?;
    if let (Some(kept), Some(into)) = (kept, outputs) {
        kept.write(into)?;
    }
    Ok((Task::of(config), evaluation.expect("a signal ends this command at once")))
}

/// The results that are collected during an evaluation and written at its end.
enum Kept {
    Outputs(Outputs),
    Results(Results),
}

impl Kept {
    fn keep(&mut self, batch: &TestBatch, of_network: &[Tensor]) {
        match self {
            Kept::Outputs(outputs) => outputs.keep(batch, of_network),
            Kept::Results(results) => results.keep(&batch.labels, &of_network[0]),
        }
    }

    fn write(&self, into: &Path) -> Result<()> {
        match self {
            Kept::Outputs(outputs) => outputs.write(into),
            Kept::Results(results) => results.write(into),
        }
    }
}

/// Collects the tensors of an evaluation batch by batch, to write them at the end.
struct Outputs {
    task: Task,
    /// How many more inputs to keep.
    inputs_wanted: usize,
    kept: BTreeMap<&'static str, Vec<Tensor>>,
}

impl Outputs {
    fn new(config: &Config, images: usize) -> Outputs {
        let model = &config.model;
        let image = 4 * model.channels() * model.image_size().pow(2);
        let all = images.saturating_mul(image) <= ALL_INPUTS_BYTES;
        Outputs { task: Task::of(config), inputs_wanted: if all { images } else { FEW_INPUTS }, kept: BTreeMap::new() }
    }

    fn keep(&mut self, batch: &TestBatch, of_network: &[Tensor]) {
        let images_bchw = batch.images[0].on(Device::Cpu);
        let taken = images_bchw.size()[0].min(self.inputs_wanted as i64);
        self.inputs_wanted -= taken as usize;
        // The inputs are copied, because the memory of the batch is reused.
        let inputs = images_bchw.narrow(0, 0, taken).copy();
        let named = self.task.named_outputs(of_network, &batch.labels).into_iter();
        for (name, tensor) in named.chain([("inputs", &inputs)]) {
            self.kept.entry(name).or_default().push(tensor.shallow_clone());
        }
    }

    fn write(&self, into: &Path) -> Result<()> {
        let all: Vec<(&str, Tensor)> = self.kept.iter().map(|(name, parts)| (*name, Tensor::cat(parts, 0))).collect();
        durable::replace(into, |beside| Ok(Tensor::write_safetensors(&all, beside)?))
    }
}

/// The task for which an artefact was trained. If its phase is unknown, the task is classification.
pub fn task_of(header: &Header) -> TaskKind {
    let row = TABLE.iter().find(|row| row.name == header.phase);
    row.map_or(TaskKind::Classification, |row| row.task())
}

/// Builds the network of an artefact that was read from the file `weights`. Refuses the artefact if its model differs from the
/// config's model, or its classes from the data's classes.
pub(super) fn network(
    config: &Config,
    artefact: Artefact,
    (weights, class_names): (&Path, &[String]),
    device: Device,
) -> Result<Network> {
    if artefact.header.model != config.model {
        let what =
            "its model differs from the config's [model]; evaluate it with the config it was trained with".into();
        return Err(Failure::Damaged { path: weights.into(), what }.into());
    }
    check_class_names(&artefact.header.class_names, class_names, weights, config.images_path())?;
    let artefact = completed(artefact, weights, &config.run.dir)?;
    let weights = on_device(&artefact.weights, device);
    Network::new(config, &artefact.header.depths, 0..0, &artefact.header.auxiliary, &weights)
}

/// Refuses data whose classes differ from the artefact's classes in name or order. If the data or the artefact has no class names,
/// nothing is compared.
fn check_class_names(ours: &[String], of_data: &[String], weights: &Path, data: &Path) -> Result<()> {
    if ours.is_empty() || of_data.is_empty() || ours == of_data {
        return Ok(());
    }
    let number = ours.iter().zip(of_data).take_while(|(ours, theirs)| ours == theirs).count();
    let name = |names: &[String]| names.get(number).map_or("none".into(), |name| format!("{name:?}"));
    Err(usage!(
        "{}: class {number} is {} here, but {} in {}; evaluate the artefact on data of the {} classes that it was trained on",
        weights.display(),
        name(ours),
        name(of_data),
        data.display(),
        ours.len()
    ))
}

/// If the artefact is a module, adds the frozen stages of the meta model in which it was trained. The meta model is in the folder
/// of the module or in the run directory. Returns any other artefact as it is.
fn completed(mut artefact: Artefact, path: &Path, run: &Path) -> Result<Artefact> {
    let Some(index) = artefact.header.index else { return Ok(artefact) };
    let beside = path.with_file_name(META.writes);
    let meta_path = if beside.exists() { beside } else { run.join(META.writes) };
    let meta = artefact::read(&meta_path)?;
    if artefact.header.meta.as_deref() != Some(&meta.hash) {
        let what = format!("was trained in another meta model than {}", meta_path.display());
        return Err(Failure::Damaged { path: path.into(), what }.into());
    }
    artefact.weights.extend(meta.weights.into_iter().filter(|((stage, _), _)| *stage != index));
    Ok(artefact)
}
