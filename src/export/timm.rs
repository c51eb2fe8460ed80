//! timm's local folder: `config.json` and `model.safetensors`, for
//! `timm.create_model("local-dir:FOLDER", pretrained=True)` (timm 1.0, `models/_factory.py` and `_hub.py`).

use crate::config::{Config, Model};
use crate::plan::parameters::Parameter;
use crate::store::{Artefact, durable};
use crate::weights::floats;
use anyhow::Result;
use safetensors::tensor::{Dtype, View};
use serde_json::json;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use tch::Tensor;

/// Writes the folder's two files.
pub fn write(config: &Config, artefact: &Artefact, folder: &Path) -> Result<()> {
    let header = &artefact.header;
    let model = &header.model;
    if (model.layer_norm_eps - 1e-6).abs() > 1e-12 {
        log::warn!(
            "timm's config cannot carry layer_norm_eps = {:e}; set it by hand: create_model(…, norm_layer=partial(\
             LayerNorm, eps={:e}))",
            model.layer_norm_eps,
            model.layer_norm_eps
        );
    }
    let mut tensors = Vec::new();
    for parameter in header.parameters() {
        let tensor = &artefact.weights[&(parameter.stage, parameter.name.clone())];
        let name = parameter.timm_name(&header.depths);
        tensors.extend(zero_qkv_bias(model, &parameter, &name));
        tensors.push((name, Entry::new(tensor)));
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    durable::replace(&folder.join("model.safetensors"), |beside| {
        Ok(safetensors::serialize_to_file(tensors, Some(metadata), beside)?)
    })?;
    let text = serde_json::to_vec_pretty(&description(config, model, &header.depths))?;
    durable::replace_bytes(&folder.join("config.json"), &text)
}

/// A model without qkv bias is exactly one with a bias of zeros, which is what every reader expects.
fn zero_qkv_bias(model: &Model, parameter: &Parameter, name: &str) -> Option<(String, Entry)> {
    let block = name.strip_suffix("attn.qkv.weight").filter(|_| !model.qkv_bias)?;
    let zeros = Tensor::zeros([parameter.shape[0]], crate::model::OPTIONS);
    Some((format!("{block}attn.qkv.bias"), Entry::new(&zeros)))
}

/// timm's config.json. `model_args` carries any size on one architecture name.
fn description(config: &Config, model: &Model, depths: &[usize]) -> serde_json::Value {
    let (size, data) = (model.image_size, &config.data);
    // Small images are evaluated as they are; others resized to 256/224 of the size and cropped.
    let crop = if size <= 32 { 1.0 } else { 0.875 };
    json!({
        "architecture": "vit_base_patch16_224",
        "num_classes": model.classes,
        "num_features": model.width,
        "global_pool": "token",
        "model_args": {
            "img_size": size,
            "patch_size": model.patch_size,
            "in_chans": model.channels,
            "embed_dim": model.width,
            "depth": depths.iter().sum::<usize>(),
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
        },
        "pretrained_cfg": {
            "tag": "deep_incubation",
            "custom_load": false,
            "input_size": [model.channels, size, size],
            "fixed_input_size": true,
            "interpolation": "bicubic",
            "crop_pct": crop,
            "crop_mode": "center",
            "mean": data.mean,
            "std": data.std,
            "num_classes": model.classes,
            "pool_size": null,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    })
}

struct Entry {
    shape: Vec<usize>,
    tensor: Tensor,
}

impl Entry {
    fn new(tensor: &Tensor) -> Entry {
        Entry { shape: tensor.size().iter().map(|&n| n as usize).collect(), tensor: tensor.shallow_clone() }
    }
}

impl View for Entry {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        floats(&self.tensor).iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<u8>>().into()
    }
    fn data_len(&self) -> usize {
        4 * self.tensor.numel()
    }
}
