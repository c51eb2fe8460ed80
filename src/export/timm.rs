//! timm's local folder: `config.json` and `model.safetensors`, for
//! `timm.create_model("local-dir:FOLDER", pretrained=True)` (timm 1.0, `models/_factory.py` and `_hub.py`).

use super::safetensors::write_tensors;
use super::{Whole, write_json, write_text};
use anyhow::Result;
use serde_json::json;
use std::path::Path;

pub fn write(whole: &Whole, folder: &Path) -> Result<()> {
    let eps = whole.model.layer_norm_eps;
    let own_eps = (eps - 1e-6).abs() > 1e-12;
    if own_eps {
        log::warn!("timm's config cannot carry layer_norm_eps = {eps:e}; {} says how to set it", folder.display());
    }
    write_tensors(folder, &whole.tensors)?;
    write_json(folder, "config.json", &description(whole))?;
    write_text(folder, "README.md", &readme(own_eps.then_some(eps)))
}

/// timm's config.json. `model_args` carries any size on one architecture name.
fn description(whole: &Whole) -> serde_json::Value {
    let (model, data) = (&whole.model, &whole.config.data);
    let size = model.image_size;
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
            "depth": whole.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
        },
        "pretrained_cfg": {
            "tag": "deep_incubation",
            "custom_load": false,
            "input_size": [model.channels, size, size],
            "fixed_input_size": true,
            "interpolation": "bicubic",
            "crop_pct": whole.crop(),
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

fn readme(own_eps: Option<f64>) -> String {
    let argument =
        own_eps.map_or(String::new(), |eps| format!(", norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps:e})"));
    format!(
        "A folder that timm loads, and transformers as `TimmWrapperForImageClassification`.\n\n```python\n\
         import functools, timm, torch\n\
         model = timm.create_model(\"local-dir:.\", pretrained=True{argument})\n```\n"
    )
}
