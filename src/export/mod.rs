//! Exports a model for other programs. Each format has a small source file here. One table maps the names of a ViT's tensors to
//! the names that the formats use.
//!
//! Each format has a folder of its own. It contains the weights under the names that the format's reader expects, the reader's
//! config if there is one, and a README with the command that uses them. The weights are read once, and most formats use views of
//! them, so that memory holds little more than one copy of the model.

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
use crate::model::FP32_ON_HOST;
use crate::run::table::FINETUNE;
use crate::store::{Artefact, artefact, durable};
use crate::{require, usage};
use anyhow::Result;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// A tensor with a name: the name in the whole network, or the name that a format's reader expects.
pub struct Named {
    pub name: String,
    pub tensor: Tensor,
}

/// The model to export, in the form that every format takes.
struct Exported<'a> {
    config: &'a Config,
    model: Model,
    /// The number of blocks of the network.
    depth: usize,
    /// All tensors under the names that they have in the whole network. For a ViT these are timm's names, in timm's order, and the
    /// qkv biases are included even if the model has none.
    tensors: Vec<Named>,
    /// The names of the classes in the order of the labels; empty if they are unknown.
    class_names: Vec<String>,
}

/// The folder for the exports of `weights`. For the run's final model it is `export`. For any other file it is a folder inside
/// `export` named after the file, such as `export/meta` for `meta.h5`, so that no export of the final model is overwritten.
pub fn folder_for(config: &Config, weights: &Path) -> PathBuf {
    let exports = config.run.dir.join("export");
    let resolved = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let is_final = resolved(weights) == resolved(&config.run.dir.join(FINETUNE.writes));
    match weights.file_stem() {
        Some(name) if !is_final => exports.join(name),
        _ => exports,
    }
}

/// Exports the artefact in the file `weights`, which must hold a whole model, in the given formats. Each format gets its own folder
/// inside `into`. Returns these folders. Each folder also gets a `source.json` that names the artefact. If the network is too
/// shallow for mmseg, and `formats` has `All` but not `Mmseg`, the function leaves mmseg out with a warning.
///
/// # Errors
/// A usage error if the artefact is missing, holds a single module or the heads of segmentation or detection, or does not suit a
/// format, or if a folder cannot be made. [`Failure::Damaged`] if the artefact is damaged or its model is not the config's.
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
    require!(
        artefact.header.auxiliary.is_empty(),
        "{}: no format takes the heads of segmentation or detection yet; export the model that was fine-tuned, such as final.h5",
        weights.display()
    );
    if artefact.header.model != config.model {
        let what = "its model differs from the config's [model]; export it with the config it was trained with".into();
        return Err(Failure::Damaged { path: weights.into(), what }.into());
    }
    let is_wanted = |format| formats.contains(&format) || formats.contains(&ExportFormat::All);
    for format in formats {
        format.check_takes(&config.model)?;
    }
    let is_taken = |format: ExportFormat| is_wanted(format) && format.check_takes(&config.model).is_ok();
    let wanted = FORMATS.into_iter().filter(|(format, ..)| is_taken(*format));
    let source = source(weights, &artefact);
    let exported = Exported::new(config, artefact);
    let is_too_shallow = exported.depth < mmseg::LEAST_DEPTH;
    require!(
        !(is_too_shallow && formats.contains(&ExportFormat::Mmseg)),
        "{}: {} blocks, but mmseg's UPerNet taps {} different ones; leave that format out",
        weights.display(),
        exported.depth,
        mmseg::LEAST_DEPTH
    );
    let mut folders = Vec::new();
    for (format, name, write) in wanted {
        if is_too_shallow && format == ExportFormat::Mmseg {
            log::warn!("not exported for mmseg: UPerNet taps {} different blocks", mmseg::LEAST_DEPTH);
        } else {
            let folder = into.join(name);
            std::fs::create_dir_all(&folder).map_err(|e| usage!("{}: {e}", folder.display()))?;
            write(&exported, &folder)?;
            write_json(&folder, "source.json", &source)?;
            folders.push(folder);
        }
    }
    Ok(folders)
}

/// The content of `source.json`: the artefact that was exported, and the names of its classes in the order of the labels.
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

type Write = fn(&Exported, &Path) -> Result<()>;

/// Every format with the name of its folder and the function that writes it.
const FORMATS: [(ExportFormat, &str, Write); 7] = [
    (ExportFormat::Timm, "timm", timm::write),
    (ExportFormat::Hf, "hf", hf::write),
    (ExportFormat::Detectron2, "detectron2", detectron2::write),
    (ExportFormat::Mmdet, "mmdet", mmdet::write),
    (ExportFormat::Mmseg, "mmseg", mmseg::write),
    (ExportFormat::Safetensors, "safetensors", safetensors::write),
    (ExportFormat::Pth, "pth", pth::write),
];

impl Exported<'_> {
    fn new(config: &Config, artefact: Artefact) -> Exported<'_> {
        let header = artefact.header;
        let mut weights = artefact.weights;
        let mut tensors = Vec::new();
        for parameter in header.parameters() {
            let name = header.model.whole_name(&parameter, &header.depths);
            // Every reader expects qkv biases. A model with biases of zero computes the same as a model without biases.
            let zeros = || Tensor::zeros([parameter.shape[0]], FP32_ON_HOST);
            let bias = header.model.absent_bias(&name).map(|name| Named { name, tensor: zeros() });
            let tensor =
                weights.remove(&(parameter.stage, parameter.name)).expect("reading has checked that it is there");
            tensors.push(Named { name, tensor });
            tensors.extend(bias);
        }
        let depth = header.depths.iter().sum();
        Exported { config, model: header.model, depth, tensors, class_names: header.class_names }
    }

    /// The model as a ViT, for the formats that take only ViTs.
    fn vit(&self) -> &Vit {
        match &self.model {
            Model::Vit(vit) => vit,
            _ => unreachable!("the families that a format takes were checked"),
        }
    }

    /// The side of evaluation's centre crop, as a share of the resized image's shorter side.
    fn crop_share(&self) -> f64 {
        evaluated_share(self.config)
    }

    /// The index of the last block of each quarter of the network. Segmentation heads read the outputs of these blocks, and ViTDet
    /// gives these blocks global attention.
    fn quarter_ends(&self) -> Vec<usize> {
        let mut ends: Vec<usize> = (1..=4).map(|quarter| (self.depth * quarter / 4).saturating_sub(1)).collect();
        ends.dedup();
        ends
    }

    /// Chooses by depth among three values, which a recipe has for ViT-B, ViT-L and ViT-H.
    fn by_depth(&self, values_blh: [f64; 3]) -> f64 {
        values_blh[match self.depth {
            0..=12 => 0,
            13..=24 => 1,
            _ => 2,
        }]
    }

    /// Scales means or standard deviations of pixels from the range 0 to 1 to the range 0 to 255.
    fn to_byte_range(values: &[f64]) -> Vec<f64> {
        values.iter().map(|value| (value * 255.0 * 1e6).round() / 1e6).collect()
    }
}

/// Python lines `name = value`, which a template of a config file gets in the place of `# NUMBERS`.
fn assignments(values: &[(&str, serde_json::Value)]) -> String {
    values.iter().map(|(name, value)| format!("{name} = {value}\n")).collect()
}

/// The value as JSON. A whole number gets no decimal point, so that Python reads it as an int.
fn number(value: f64) -> serde_json::Value {
    if value.fract() == 0.0 { (value as i64).into() } else { value.into() }
}

fn write_text(folder: &Path, name: &str, text: &str) -> Result<()> {
    durable::replace_bytes(&folder.join(name), text.as_bytes())
}

fn write_json(folder: &Path, name: &str, value: &serde_json::Value) -> Result<()> {
    durable::replace_bytes(&folder.join(name), &serde_json::to_vec_pretty(value)?)
}

/// Writes `model.pth`, a dictionary of the tensors. If `wrapper` is a key, such as `state_dict`, the file holds an outer dictionary
/// with this one key, whose value is the dictionary of the tensors.
fn write_torch(folder: &Path, tensors: &[Named], wrapper: Option<&str>) -> Result<()> {
    durable::replace(&folder.join("model.pth"), |beside| torch_file::write(beside, tensors, wrapper))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeMap;

    /// The configs of the paper's three model sizes.
    pub const PAPER_CONFIGS: [(&str, &str); 3] = [
        ("b", include_str!("../../configs/imagenet-vit-b.toml")),
        ("l", include_str!("../../configs/imagenet-vit-l.toml")),
        ("h", include_str!("../../configs/imagenet-vit-h.toml")),
    ];

    /// Calls `act` with the config's model. Each tensor repeats a single zero, so that even ViT-H takes almost no memory.
    pub fn with_zeros<T>(config: &str, act: impl Fn(&Exported) -> T) -> T {
        let config = Config::parse(config, &[]).unwrap();
        let model = config.model.clone();
        let mut tensors = Vec::new();
        let zeros = |shape: &[i64]| Tensor::zeros([1], FP32_ON_HOST).expand(shape, false);
        for parameter in model.parameters(model.depths()) {
            let name = model.whole_name(&parameter, model.depths());
            if let Some(name) = model.absent_bias(&name) {
                tensors.push(Named { name, tensor: zeros(&parameter.shape[..1]) });
            }
            tensors.push(Named { name, tensor: zeros(&parameter.shape) });
        }
        let depth = model.depths().iter().sum();
        act(&Exported { config: &config, model, depth, tensors, class_names: Vec::new() })
    }

    /// The names and shapes of the tensors. Tensors whose names differ only in the block number share one entry and must have the
    /// same shape. In the entry's name, the number of blocks in braces, such as `{12}`, takes the place of the block number.
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
        for (size, config) in PAPER_CONFIGS {
            for (reader, tensors) in [
                ("timm", with_zeros(config, |exported| renamed::renamed(&exported.tensors, |row| Some(row.timm)))),
                (
                    "hf",
                    with_zeros(config, |exported| renamed::renamed(&exported.tensors, |row| Some(row.transformers))),
                ),
                ("mmseg", with_zeros(config, mmseg::backbone)),
                ("detectron2", with_zeros(config, vitdet::backbone)),
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
            Exported { config: &config, model, depth: 12, tensors: Vec::new(), class_names: Vec::new() }.crop_share()
        };
        assert_eq!(crop(&["data.crop_percent=0.95"]), 0.95);
        assert_eq!(crop(&["data.format=packed", "data.crop_percent=0.95", "model.image_size=32"]), 1.0);
        assert_eq!(crop(&["data.format=shapes", "data.train_images=8", "data.test_images=4"]), 0.875);
    }
}
