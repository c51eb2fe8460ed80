//! Artefacts and checkpoints. Each is one HDF5 file, which is written durably and verified when it is read.
//!
//! # Layout, format version 1
//! ```text
//! bytes 0–511     the seal (`seal.rs`): «incubate artefact, format 1», the length of the file, and the BLAKE3 hash of every
//!                 byte from 512 on, so that damage is found before any byte is parsed. The hash identifies the content:
//!                 a module records the hash of the meta model that it is trained in.
//! from byte 512   HDF5 (libver earliest; h5py, h5dump and HDFView open the file as it is)
//!   attributes of /   format_version, software, phase, index (modules only), depths, step, recipe, meta (the hash of the
//!                     artefact from which the weights derive, if any: the meta model or, for segmentation and detection,
//!                     the classifier), model (JSON: the config's [model]), metrics (JSON: the results of the evaluation, by
//!                     key), classes (JSON: the names of the classes in the order of the labels, if the training data has
//!                     names), data (JSON: the numbers of images, a fingerprint of their names and labels, and the changes
//!                     that the user accepted)
//!   /stage/{i}/{parameter}   fp32, contiguous. For a ViT, the `model_stages[i]` names of the official code of Deep
//!                            Incubation, with blocks numbered from 0 within the stage: stage 0 holds
//!                            patch_embed.proj.*, cls_token and pos_embed, the last stage norm.* and head.*
//!   every dataset of fp32 has the attribute blake3, the hash of its little-endian bytes
//! ```
//! Some tasks train more parameters than those of the network, such as the heads of segmentation. Their models also have the
//! attribute `auxiliary` (JSON), which lists these parameters. If the network has K stages, the group `/stage/{K}` holds them.
//!
//! A checkpoint holds the same attributes. Its `auxiliary` also lists the heads of local losses. Instead of `/stage` it holds flat
//! buffers. Writing a few large datasets takes half the time of writing hundreds of small datasets.
//! ```text
//!   /state/{name}            fp32: weights, the moments exp_avg and exp_avg_sq of AdamW or momentum of SGD, and with an EMA
//!                            `ema`. Each holds the tensors of the trained stages one after the other: the parameters with
//!                            weight decay, those without, then the buffers (BatchNorm's statistics), each part in the
//!                            order of the parameter table
//!   /state/parameters        the names of the parameters in that order, as above: stage/{i}/{parameter}
//!   /state/starts            the offset of each parameter in /state/{name}, counted in fp32 numbers
//! ```
//! The artefact and the checkpoints of module i hold stage i alone, with `depths[i]` blocks. All other files hold all stages.

use super::durable;
use super::lease::Fence;
use crate::error::Failure;
use crate::family::Model;
use crate::family::parameter::{Parameter, flat_order};
use crate::run::data::TrainedOn;
use crate::seal;
use crate::thread;
use crate::weights::{Weights, bytes, floats, floats_mut};
use anyhow::{Context, Result};
use hdf5::types::VarLenUnicode;
use hdf5::{Dataset, File, H5Type};
use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;
use tch::{Kind, Tensor};

const SEAL: seal::Kind =
    seal::Kind { name: "artefact", version: 1, cure: "delete it and start the phase again, or restore it from a copy" };

/// The attributes of an artefact.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// The name of the row in the run's table that wrote the file, such as `meta`, `module` or `finetune`.
    pub phase: String,
    /// The stage of a module, whose file holds that stage alone; none in other files.
    pub index: Option<usize>,
    /// The number of blocks of each stage of the network.
    pub depths: Vec<usize>,
    /// The number of optimiser steps in the phase so far; 0 if nothing was trained.
    pub step: u64,
    /// The hash of the config keys that change the artefact.
    pub recipe: String,
    /// The content hash of the artefact from which the weights derive, if any: the meta model or, for segmentation and detection,
    /// the classifier.
    pub meta: Option<String>,
    pub model: Model,
    /// Parameters that train in addition to the network's parameters: the heads of the task and, in a checkpoint, also the heads of
    /// local losses.
    pub auxiliary: Vec<Parameter>,
    pub metrics: BTreeMap<String, f64>,
    /// The names of the classes in the order of the labels; empty if the training data names no classes.
    pub class_names: Vec<String>,
    /// The data that the model was trained on. None for imported weights, for models of downstream tasks, and for artefacts of
    /// earlier versions.
    pub data: Option<TrainedOn>,
}

/// The content of an artefact or a checkpoint.
#[derive(Debug)]
pub struct Artefact {
    pub header: Header,
    pub weights: Weights,
    /// The flat buffers of a checkpoint by name, without the buffer of the weights. Empty in a finished artefact.
    pub state: BTreeMap<String, Tensor>,
    /// The content hash of the file.
    pub hash: String,
}

impl Header {
    /// The parameters that the file holds.
    pub fn parameters(&self) -> Vec<Parameter> {
        let all = self.model.parameters(&self.depths);
        let own = all.into_iter().filter(|p| self.index.is_none_or(|i| p.stage == i));
        own.chain(self.auxiliary.iter().cloned()).collect()
    }
}

impl Artefact {
    /// The weights to evaluate. For a checkpoint with an exponential moving average they are this average, else the weights
    /// themselves.
    pub fn averaged(self) -> Weights {
        match self.state.get("ema") {
            Some(average) => views(average, flat_order(self.header.parameters())),
            None => self.weights,
        }
    }
}

/// Writes a finished artefact durably and returns its content hash.
///
/// # Errors
/// The disk has no room for the file, the file cannot be written, or at the end `fence` says that another process has the phase.
pub fn write(path: &Path, header: &Header, weights: &Weights, fence: Option<&Fence>) -> Result<String> {
    let tensors: Vec<(String, &Tensor)> =
        weights.iter().map(|((stage, name), tensor)| (path_of(*stage, name), tensor)).collect();
    replace(path, &tensors, fence, |file| fill(file, header, &tensors))
}

/// Writes a checkpoint as [`write()`] writes an artefact: the flat buffers `weights`, `exp_avg`, … in the order of
/// [`flat_order`]. Calls `release` after it has read the buffers for the last time.
pub fn write_checkpoint(
    path: &Path,
    header: &Header,
    buffers: &[(&str, &Tensor)],
    fence: Option<&Fence>,
    release: impl FnOnce(),
) -> Result<String> {
    let tensors: Vec<(String, &Tensor)> =
        buffers.iter().map(|(name, tensor)| (format!("state/{name}"), *tensor)).collect();
    replace(path, &tensors, fence, |file| {
        fill(file, header, &tensors)?;
        release();
        let (mut names, mut starts) = (Vec::new(), Vec::new());
        for (start, parameter) in flat_order(header.parameters()) {
            names.push(text_of(&path_of(parameter.stage, &parameter.name))?);
            starts.push(start as u64);
        }
        dataset(file, "state/parameters", &[names.len()], &names)?;
        dataset(file, "state/starts", &[starts.len()], &starts)?;
        Ok(())
    })
}

/// Replaces the file `path` by a sealed file with the content that `fill` writes.
fn replace(
    path: &Path,
    tensors: &[(String, &Tensor)],
    fence: Option<&Fence>,
    fill: impl FnOnce(&File) -> Result<()>,
) -> Result<String> {
    let numbers: usize = tensors.iter().map(|(_, tensor)| tensor.numel()).sum();
    durable::require_space(path, 4 * numbers as u64 + (64 << 10))?;
    let mut hash = String::new();
    let write = |beside: &Path| {
        let file = File::with_options().with_fcpl(|p| p.userblock(seal::BLOCK)).create(beside)?;
        fill(&file)?;
        file.close()?;
        hash = SEAL.set(beside, 0..0)?;
        Ok(())
    };
    durable::replace_if(path, write, || fence.map_or(Ok(()), Fence::check))?;
    Ok(hash)
}

fn fill(file: &File, header: &Header, tensors: &[(String, &Tensor)]) -> Result<()> {
    file.new_attr::<i32>().create("format_version")?.write_scalar(&SEAL.version)?;
    file.new_attr::<u64>().create("step")?.write_scalar(&header.step)?;
    if let Some(index) = header.index {
        file.new_attr::<u64>().create("index")?.write_scalar(&(index as u64))?;
    }
    let depths: Vec<u64> = header.depths.iter().map(|&d| d as u64).collect();
    file.new_attr::<u64>().shape(depths.len()).create("depths")?.write_raw(&depths)?;
    text_attribute(file, "software", concat!("incubate ", env!("CARGO_PKG_VERSION")))?;
    text_attribute(file, "phase", &header.phase)?;
    text_attribute(file, "recipe", &header.recipe)?;
    if let Some(meta) = &header.meta {
        text_attribute(file, "meta", meta)?;
    }
    text_attribute(file, "model", &serde_json::to_string(&header.model)?)?;
    if !header.auxiliary.is_empty() {
        text_attribute(file, "auxiliary", &serde_json::to_string(&header.auxiliary)?)?;
    }
    text_attribute(file, "metrics", &serde_json::to_string(&header.metrics)?)?;
    if !header.class_names.is_empty() {
        text_attribute(file, "classes", &serde_json::to_string(&header.class_names)?)?;
    }
    if let Some(data) = &header.data {
        text_attribute(file, "data", &serde_json::to_string(data)?)?;
    }
    let contents: Vec<&[u8]> = tensors.iter().map(|(_, tensor)| bytes(tensor)).collect();
    // The tensors are hashed while they are written, since both take about the same time.
    let (datasets, hashes) = std::thread::scope(|scope| -> Result<_> {
        let hash_all = || contents.iter().map(|content| hash_of(content)).collect::<Vec<_>>();
        let hashing = thread::start_within(scope, "checksums", hash_all)?;
        let write = |(name, tensor): &(String, &Tensor)| {
            let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
            dataset(file, name, &shape, floats(tensor))
        };
        let datasets: Result<Vec<Dataset>> = tensors.iter().map(write).collect();
        let hashes = hashing.join().expect("hashing does not panic");
        datasets.map(|datasets| (datasets, hashes))
    })?;
    datasets.iter().zip(hashes).try_for_each(|(dataset, hash)| text_attribute(dataset, "blake3", &hash))
}

/// Writes a dataset and creates the missing groups of its name.
fn dataset<T: H5Type>(file: &File, name: &str, shape: &[usize], content: &[T]) -> Result<Dataset> {
    // Without time stamps the same content gives the same bytes.
    let dataset = file.new_dataset::<T>().obj_track_times(false).shape(shape).create(name)?;
    dataset.write_raw(content)?;
    Ok(dataset)
}

fn text_attribute(object: &hdf5::Location, name: &str, text: &str) -> Result<()> {
    Ok(object.new_attr::<VarLenUnicode>().create(name)?.write_scalar(&text_of(text)?)?)
}

fn text_of(text: &str) -> Result<VarLenUnicode> {
    VarLenUnicode::from_str(text).with_context(|| format!("{text:?} holds a NUL"))
}

/// The name of the dataset that holds a parameter in a finished artefact.
fn path_of(stage: usize, name: &str) -> String {
    format!("stage/{stage}/{name}")
}

fn hash_of(bytes: &[u8]) -> String {
    blake3::Hasher::new().update_rayon(bytes).finalize().to_hex().to_string()
}

/// Reads and verifies a whole artefact or checkpoint.
///
/// # Errors
/// [`Failure::Damaged`] if the file has changed since it was written, or does not hold the tensors that its attributes promise.
pub fn read(path: &Path) -> Result<Artefact> {
    let hash = SEAL.verify(path)?.hash;
    parse(path, hash).map_err(|error| match error.downcast::<Failure>() {
        Ok(failure) => failure.into(),
        Err(error) => Failure::Damaged { path: path.into(), what: format!("{error:#}") }.into(),
    })
}

/// Verifies the hash of the whole file, but reads only its attributes. Returns the attributes and the hash.
///
/// # Errors
/// As for [`read`].
pub fn read_header(path: &Path) -> Result<(Header, String)> {
    let hash = SEAL.verify(path)?.hash;
    let header = File::open(path).map_err(anyhow::Error::from).and_then(|file| parse_header(&file));
    header
        .map(|header| (header, hash))
        .map_err(|error| Failure::Damaged { path: path.into(), what: format!("{error:#}") }.into())
}

/// The program that wrote a verified artefact, such as `incubate 0.1.0`.
pub fn software(path: &Path) -> Result<String> {
    let file = File::open(path)?;
    read_text(&file, "software")
}

fn parse(path: &Path, hash: String) -> Result<Artefact> {
    let file = File::open(path)?;
    let header = parse_header(&file)?;
    let length = std::fs::metadata(path)?.len();
    let (weights, state) = if file.link_exists("state") {
        parse_checkpoint(&file, &header, length)?
    } else {
        (parse_weights(&file, &header, length)?, BTreeMap::new())
    };
    Ok(Artefact { header, weights, state, hash })
}

fn parse_weights(file: &File, header: &Header, length: u64) -> Result<Weights> {
    let mut weights = Weights::new();
    for parameter in header.parameters() {
        let tensor = read_dataset(file, &path_of(parameter.stage, &parameter.name), &parameter.shape, length)?;
        weights.insert((parameter.stage, parameter.name), tensor);
    }
    let stored: usize = file.group("stage")?.groups()?.iter().map(|g| g.len() as usize).sum();
    anyhow::ensure!(
        stored == weights.len(),
        "{stored} tensors are stored, but its attributes promise {}",
        weights.len()
    );
    Ok(weights)
}

/// Returns the weights, as views of their flat buffer, and all other flat buffers by name.
fn parse_checkpoint(file: &File, header: &Header, length: u64) -> Result<(Weights, BTreeMap<String, Tensor>)> {
    let order = flat_order(header.parameters());
    let names: Vec<VarLenUnicode> = file.dataset("state/parameters")?.read_raw()?;
    anyhow::ensure!(
        names.iter().map(VarLenUnicode::as_str).eq(order.iter().map(|(_, p)| path_of(p.stage, &p.name))),
        "state/parameters names other parameters than its depths promise"
    );
    let numbers: usize = order.iter().map(|(_, parameter)| parameter.count()).sum();
    let mut state = BTreeMap::new();
    for name in file.group("state")?.member_names()? {
        if !["parameters", "starts"].contains(&name.as_str()) {
            let tensor = read_dataset(file, &format!("state/{name}"), &[numbers as i64], length)?;
            state.insert(name, tensor);
        }
    }
    let flat = state.remove("weights").context("state/weights is missing")?;
    Ok((views(&flat, order), state))
}

/// The parameters in a flat buffer, as views of the buffer.
fn views(flat: &Tensor, order: Vec<(usize, Parameter)>) -> Weights {
    let view = |(start, parameter): (usize, Parameter)| {
        let tensor = flat.narrow(0, start as i64, parameter.count() as i64).view(&parameter.shape[..]);
        ((parameter.stage, parameter.name), tensor)
    };
    order.into_iter().map(view).collect()
}

fn parse_header(file: &File) -> Result<Header> {
    let number = |name: &str| -> Result<u64> { Ok(file.attr(name)?.read_scalar()?) };
    let depths: Vec<u64> = file.attr("depths")?.read_raw()?;
    let model: Model = serde_json::from_str(&read_text(file, "model")?)?;
    model.validate()?;
    let header = Header {
        phase: read_text(file, "phase")?,
        index: if has_attribute(file, "index") { Some(number("index")? as usize) } else { None },
        depths: depths.into_iter().map(|d| d as usize).collect(),
        step: number("step")?,
        recipe: read_text(file, "recipe")?,
        meta: if has_attribute(file, "meta") { Some(read_text(file, "meta")?) } else { None },
        model,
        auxiliary: if has_attribute(file, "auxiliary") {
            serde_json::from_str(&read_text(file, "auxiliary")?)?
        } else {
            Vec::new()
        },
        metrics: serde_json::from_str(&read_text(file, "metrics")?)?,
        class_names: if has_attribute(file, "classes") {
            serde_json::from_str(&read_text(file, "classes")?)?
        } else {
            Vec::new()
        },
        data: if has_attribute(file, "data") { Some(serde_json::from_str(&read_text(file, "data")?)?) } else { None },
    };
    let stages = header.model.stages();
    anyhow::ensure!(
        header.depths.len() == stages,
        "its model has {stages} stages, but it has {} depths",
        header.depths.len()
    );
    anyhow::ensure!(header.depths.iter().all(|&d| d <= 10_000), "its depths {:?} must be at most 10000", header.depths);
    anyhow::ensure!(
        header.index.is_none_or(|i| i < stages),
        "it is module {} of {stages} stages",
        header.index.unwrap_or(0)
    );
    Ok(header)
}

fn has_attribute(file: &File, name: &str) -> bool {
    file.attr_names().is_ok_and(|names| names.iter().any(|n| n == name))
}

fn read_text(object: &hdf5::Location, name: &str) -> Result<String> {
    let text: VarLenUnicode =
        object.attr(name)?.read_scalar().with_context(|| format!("its attribute {name} cannot be read"))?;
    Ok(text.to_string())
}

/// Reads a dataset of fp32. Checks its shape and size before it allocates memory, and its content by the checksum.
fn read_dataset(file: &File, name: &str, shape: &[i64], length: u64) -> Result<Tensor> {
    let dataset = file.dataset(name).map_err(|_| anyhow::anyhow!("{name} is missing"))?;
    let stored: Vec<i64> = dataset.shape().iter().map(|&n| n as i64).collect();
    anyhow::ensure!(stored == shape, "{name} has shape {stored:?}, but {shape:?} is expected");
    let numbers: u64 = stored.iter().map(|&n| n as u64).product();
    anyhow::ensure!(numbers.saturating_mul(4) <= length, "{name} claims {numbers} numbers in a file of {length} bytes");
    let mut tensor = Tensor::zeros(&stored, (Kind::Float, tch::Device::Cpu));
    dataset.read_into_raw(floats_mut(&mut tensor)).with_context(|| format!("reading {name}"))?;
    let (stored, found) = (read_text(&dataset, "blake3")?, hash_of(bytes(&tensor)));
    anyhow::ensure!(stored == found, "{name} does not match its checksum");
    Ok(tensor)
}
