//! Exported models, one small file per format over one table of names.
//!
//! No reader takes every file: each format writes the container, the names and the config that its reader wants, into a
//! folder of its own with a README that holds the one command to go on with. The weights are read once, and every format
//! names views of them, so that memory holds one copy of the model.

mod detectron2;
mod hf;
mod mmdet;
mod mmseg;
mod pth;
mod renamed;
mod safetensors;
mod timm;
mod torch_file;
mod vitdet;

use crate::config::{Config, ExportFormat};
use crate::data::image::recipe::evaluated_share;
use crate::error::Failure;
use crate::family::Model;
use crate::family::vit::Vit;
use crate::model::OPTIONS;
use crate::run::table::FINETUNE;
use crate::store::{Artefact, artefact, durable};
use crate::{require, usage};
use anyhow::Result;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// A tensor under the name that some reader has for it.
pub struct Named {
    pub name: String,
    pub tensor: Tensor,
}

/// A whole model as the formats take it.
struct Whole<'a> {
    config: &'a Config,
    model: Model,
    /// Blocks of the network.
    depth: usize,
    /// timm's names in timm's order; the qkv biases are always there.
    tensors: Vec<Named>,
    /// The names of the classes in the order of the labels; empty if they are unknown.
    class_names: Vec<String>,
}

/// The folder of all exports of `weights`. Those of the run's final model have `export` to themselves; `meta.h5` is exported
/// into `export/meta`, so that it overwrites nothing of the final model.
pub fn folder_for(config: &Config, weights: &Path) -> PathBuf {
    let exports = config.run.dir.join("export");
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let is_final = real(weights) == real(&config.run.dir.join(FINETUNE.writes));
    match weights.file_stem() {
        Some(name) if !is_final => exports.join(name),
        _ => exports,
    }
}

/// Writes `weights` (a whole model) in each format into a folder of its own, with a `source.json` that names them; returns
/// the folders.
///
/// # Errors
/// A usage error if the artefact is missing, a single module or too shallow for a format, or a folder cannot be made;
/// [`Failure::Damaged`] if its model is not the config's.
pub fn export(config: &Config, weights: &Path, formats: &[ExportFormat], into: &Path) -> Result<Vec<PathBuf>> {
    require!(
        weights.exists(),
        "{}: missing; run the phases that write it first, or give --weights FILE",
        weights.display()
    );
    let artefact = artefact::read(weights)?;
    require!(
        artefact.header.index.is_none(),
        "{}: a single module cannot be exported; give a whole model, such as final.h5",
        weights.display()
    );
    if artefact.header.model != config.model {
        let what = "its model differs from the config's [model]; export it with the config it was trained with".into();
        return Err(Failure::Damaged { path: weights.into(), what }.into());
    }
    let wanted = |format| formats.contains(&format) || formats.contains(&ExportFormat::All);
    let wanted: Vec<_> = FORMATS.into_iter().filter(|(format, ..)| wanted(*format)).collect();
    let is_vit = matches!(config.model, Model::Vit(_));
    if let Some((_, name, ..)) = wanted.iter().find(|(_, _, takes, _)| *takes == Takes::Vit && !is_vit) {
        return Err(usage!("{name}: this format takes Vision Transformers alone; give safetensors or pth"));
    }
    let source = source(weights, &artefact);
    let whole = Whole::new(config, artefact);
    let shallow = whole.depth < mmseg::LEAST_DEPTH;
    require!(
        !(shallow && formats.contains(&ExportFormat::Mmseg)),
        "{}: {} blocks, but mmseg's UPerNet taps {} different ones; leave that format out",
        weights.display(),
        whole.depth,
        mmseg::LEAST_DEPTH
    );
    let mut folders = Vec::new();
    for (format, name, _, write) in wanted {
        if shallow && format == ExportFormat::Mmseg {
            log::warn!("not exported for mmseg: UPerNet taps {} different blocks", mmseg::LEAST_DEPTH);
        } else {
            let folder = into.join(name);
            std::fs::create_dir_all(&folder).map_err(|e| usage!("{}: {e}", folder.display()))?;
            write(&whole, &folder)?;
            write_json(&folder, "source.json", &source)?;
            folders.push(folder);
        }
    }
    Ok(folders)
}

/// `source.json`: where an export comes from, and its classes, whose order no reader can guess.
fn source(weights: &Path, artefact: &Artefact) -> serde_json::Value {
    let mut source = serde_json::json!({
        "file": weights,
        "phase": artefact.header.phase,
        "content_hash": artefact.hash,
        "software": concat!("incubate ", env!("CARGO_PKG_VERSION")),
    });
    if !artefact.header.class_names.is_empty() {
        source["classes"] = artefact.header.class_names.as_slice().into();
    }
    source
}

type Write = fn(&Whole, &Path) -> Result<()>;

/// Which families a format takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    Any,
    Vit,
}

/// Every format, the folder it writes, which families it takes and how.
const FORMATS: [(ExportFormat, &str, Takes, Write); 7] = [
    (ExportFormat::Timm, "timm", Takes::Vit, timm::write),
    (ExportFormat::Hf, "hf", Takes::Vit, hf::write),
    (ExportFormat::Detectron2, "detectron2", Takes::Vit, detectron2::write),
    (ExportFormat::Mmdet, "mmdet", Takes::Vit, mmdet::write),
    (ExportFormat::Mmseg, "mmseg", Takes::Vit, mmseg::write),
    (ExportFormat::Safetensors, "safetensors", Takes::Any, safetensors::write),
    (ExportFormat::Pth, "pth", Takes::Any, pth::write),
];

impl Whole<'_> {
    fn new(config: &Config, artefact: Artefact) -> Whole<'_> {
        let header = artefact.header;
        let mut weights = artefact.weights;
        let mut tensors = Vec::new();
        for parameter in header.parameters() {
            let name = header.model.whole_name(&parameter, &header.depths);
            // A model without qkv biases is exactly one with biases of zero, which is what every reader expects.
            let zeros = || Tensor::zeros([parameter.shape[0]], OPTIONS);
            let bias = header.model.absent_bias(&name).map(|name| Named { name, tensor: zeros() });
            let tensor = weights.remove(&(parameter.stage, parameter.name)).expect("an artefact has been checked");
            tensors.push(Named { name, tensor });
            tensors.extend(bias);
        }
        let depth = header.depths.iter().sum();
        Whole { config, model: header.model, depth, tensors, class_names: header.class_names }
    }

    /// The model of a format that is a ViT's alone.
    fn vit(&self) -> &Vit {
        match &self.model {
            Model::Vit(vit) => vit,
            #[cfg(test)]
            Model::Toy(_) => unreachable!("the table of formats says which families a format takes"),
        }
    }

    /// The share of the resized image's shorter side that evaluation crops.
    fn crop(&self) -> f64 {
        evaluated_share(self.config)
    }

    /// The last block of each quarter, from 0: where segmentation heads tap the network and where ViTDet attends globally.
    fn quarter_ends(&self) -> Vec<usize> {
        let mut ends: Vec<usize> = (1..=4).map(|quarter| (self.depth * quarter / 4).saturating_sub(1)).collect();
        ends.dedup();
        ends
    }

    /// The value that detection and segmentation recipes choose by depth: for ViT-B, L or H.
    fn by_depth(&self, values: [f64; 3]) -> f64 {
        values[match self.depth {
            0..=12 => 0,
            13..=24 => 1,
            _ => 2,
        }]
    }

    /// Mean or deviation of pixels from 0 to 255.
    fn of_bytes(values: &[f64]) -> Vec<f64> {
        values.iter().map(|value| (value * 255.0 * 1e6).round() / 1e6).collect()
    }
}

/// Python lines `name = value`, for a framework's config file to begin with.
fn assignments(values: &[(&str, serde_json::Value)]) -> String {
    values.iter().map(|(name, value)| format!("{name} = {value}\n")).collect()
}

/// A whole number without the point that would make it a float in Python.
fn number(value: f64) -> serde_json::Value {
    if value.fract() == 0.0 { (value as i64).into() } else { value.into() }
}

fn write_text(folder: &Path, name: &str, text: &str) -> Result<()> {
    durable::replace_bytes(&folder.join(name), text.as_bytes())
}

fn write_json(folder: &Path, name: &str, value: &serde_json::Value) -> Result<()> {
    durable::replace_bytes(&folder.join(name), &serde_json::to_vec_pretty(value)?)
}

/// Writes `model.pth`.
fn write_torch(folder: &Path, tensors: &[Named], wrapped: Option<&str>) -> Result<()> {
    durable::replace(&folder.join("model.pth"), |beside| torch_file::write(beside, tensors, wrapped))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeMap;

    /// The sizes of the paper, as their configs say them.
    pub const SHAPES: [(&str, &str); 3] = [
        ("b", include_str!("../../configs/imagenet-vit-b.toml")),
        ("l", include_str!("../../configs/imagenet-vit-l.toml")),
        ("h", include_str!("../../configs/imagenet-vit-h.toml")),
    ];

    /// What `of` makes of a model of these shapes. Its tensors repeat one zero: even ViT-H takes no memory.
    pub fn shaped<T>(config: &str, of: impl Fn(&Whole) -> T) -> T {
        let config = Config::parse(config, &[]).unwrap();
        let model = config.model.clone();
        let mut tensors = Vec::new();
        let zeros = |shape: &[i64]| Tensor::zeros([1], OPTIONS).expand(shape, false);
        for parameter in model.parameters(model.depths()) {
            let name = model.whole_name(&parameter, model.depths());
            if let Some(name) = model.absent_bias(&name) {
                tensors.push(Named { name, tensor: zeros(&parameter.shape[..1]) });
            }
            tensors.push(Named { name, tensor: zeros(&parameter.shape) });
        }
        let depth = model.depths().iter().sum();
        of(&Whole { config: &config, model, depth, tensors, class_names: Vec::new() })
    }

    /// Names and shapes, with `{n}` where equal ones stand for n blocks; each name must be there for every block.
    fn grouped(tensors: Vec<Named>) -> BTreeMap<String, Vec<i64>> {
        let mut blocks: BTreeMap<String, (Vec<i64>, usize)> = BTreeMap::new();
        for Named { name, tensor } in tensors {
            let mut parts: Vec<&str> = name.split('.').collect();
            if let Some(number) = parts.iter().position(|part| part.parse::<usize>().is_ok()) {
                parts[number] = "{}";
            }
            let (shape, count) = blocks.entry(parts.join(".")).or_insert_with(|| (tensor.size(), 0));
            assert_eq!(shape, &tensor.size());
            *count += 1;
        }
        blocks.into_iter().map(|(name, (shape, n))| (name.replace("{}", &format!("{{{n}}}")), shape)).collect()
    }

    #[test]
    fn every_reader_is_given_the_names_and_shapes_of_its_own_class() {
        let keys: Value = serde_json::from_str(include_str!("templates/keys.json")).unwrap();
        for (size, config) in SHAPES {
            for (reader, tensors) in [
                ("timm", shaped(config, |whole| renamed::renamed(&whole.tensors, |row| Some(row.timm)))),
                ("hf", shaped(config, |whole| renamed::renamed(&whole.tensors, |row| Some(row.transformers)))),
                ("mmseg", shaped(config, mmseg::backbone)),
                ("detectron2", shaped(config, vitdet::backbone)),
            ] {
                let expected: BTreeMap<String, Vec<i64>> = serde_json::from_value(keys[reader][size].clone()).unwrap();
                assert!(expected.len() > 10);
                assert_eq!(grouped(tensors), expected, "{reader}, ViT-{size}");
            }
        }
    }

    #[test]
    fn the_exported_crop_is_the_one_that_evaluation_uses() {
        let crop = |sets: &[&str]| {
            let config = Config::parse("", &sets.iter().map(|s| s.to_string()).collect::<Vec<_>>()).unwrap();
            let model = config.model.clone();
            Whole { config: &config, model, depth: 12, tensors: Vec::new(), class_names: Vec::new() }.crop()
        };
        assert_eq!(crop(&["data.crop_percent=0.95"]), 0.95);
        assert_eq!(crop(&["data.format=packed", "data.crop_percent=0.95", "model.image_size=32"]), 1.0);
        assert_eq!(crop(&["data.format=shapes", "data.train_images=8", "data.test_images=4"]), 0.875);
    }
}
