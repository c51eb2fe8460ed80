//! A folder with `config.json` and `model.safetensors`, which timm loads by
//! `timm.create_model("local-dir:FOLDER", pretrained=True)` (timm 1.0, `models/_factory.py` and `_hub.py`).

use super::safetensors::write_tensors;
use super::{Exported, Named, write_json, write_text};
use anyhow::Result;
use serde_json::json;
use std::path::Path;

pub fn write(exported: &Exported, folder: &Path) -> Result<()> {
    let scale = residual_scale(exported.vit().layer_norm_eps);
    write_tensors(folder, &scaled(&exported.tensors, scale))?;
    write_json(folder, "config.json", &model_config(exported))?;
    let class_map = class_map(&exported.class_names);
    if let Some(lines) = &class_map {
        write_text(folder, CLASS_MAP_FILE, lines)?;
    }
    write_text(folder, "README.md", &readme(exported.vit().layer_norm_eps, scale, class_map.is_some()))
}

/// The epsilon of timm's layer norms, which its config cannot change.
const TIMM_EPS: f64 = 1e-6;

/// The factor s by which the residual stream must be multiplied, so that layer norms with timm's epsilon give the results of layer
/// norms with the epsilon `eps`. None if the two are equal.
///
/// With s² = 1e-6 / eps: s (x − µ) / √(s² σ² + 1e-6) = (x − µ) / √(σ² + eps).
fn residual_scale(eps: f64) -> Option<f64> {
    let scale = (TIMM_EPS / eps).sqrt();
    ((scale - 1.0).abs() > 1e-6).then_some(scale)
}

/// Multiplies by `scale` the tensors that add to the residual stream, and leaves the other tensors as they are.
fn scaled(tensors: &[Named], scale: Option<f64>) -> Vec<Named> {
    let is_added_to_stream = |name: &str| {
        matches!(name, "cls_token" | "pos_embed")
            || ["patch_embed.proj.", "attn.proj.", "mlp.fc2."].iter().any(|part| name.contains(part))
    };
    let scaled_tensor = |Named { name, tensor }: &Named| match scale {
        Some(scale) if is_added_to_stream(name) => Named { name: name.clone(), tensor: tensor * scale },
        _ => Named { name: name.clone(), tensor: tensor.shallow_clone() },
    };
    tensors.iter().map(scaled_tensor).collect()
}

/// A file with the names of the classes in the order of the labels. Without it, timm numbers the class folders of images in natural
/// order: 1, 2, 10.
const CLASS_MAP_FILE: &str = "class_map.txt";

/// The content of the class map, with one name per line. None if no names are known, or if timm would read other names from it.
fn class_map(names: &[String]) -> Option<String> {
    let fits_a_line = |name: &String| name.trim() == name && !name.is_empty() && name.lines().count() == 1;
    let can_be_read = !names.is_empty() && names.iter().all(fits_a_line);
    can_be_read.then(|| names.iter().map(|name| format!("{name}\n")).collect())
}

/// The content of `config.json`. Its `model_args` override the sizes of the named architecture, so the same architecture is named
/// for all sizes.
fn model_config(exported: &Exported) -> serde_json::Value {
    let (model, data) = (exported.vit(), &exported.config.data);
    let size = model.image_size;
    let mut config = json!({
        "architecture": "vit_base_patch16_224",
        "num_classes": model.classes,
        "num_features": model.width,
        "global_pool": "token",
        "model_args": {
            "img_size": size,
            "patch_size": model.patch_size,
            "in_chans": model.channels,
            "embed_dim": model.width,
            "depth": exported.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
        },
        "pretrained_cfg": {
            "tag": "deep_incubation",
            "custom_load": false,
            "input_size": [model.channels, size, size],
            "fixed_input_size": true,
            "interpolation": "bicubic",
            "crop_pct": exported.crop_share(),
            "crop_mode": "center",
            "mean": data.mean,
            "std": data.std,
            "num_classes": model.classes,
            "pool_size": null,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    });
    if exported.class_names.len() == model.classes {
        config["label_names"] = exported.class_names.as_slice().into();
    }
    config
}

fn readme(eps: f64, scale: Option<f64>, has_class_map: bool) -> String {
    let note = scale.map_or(String::new(), |scale| {
        format!(
            "\nThe model was trained with a layer norm epsilon of {eps:e}, but timm's is {TIMM_EPS:e}. In this folder alone, the tensors \
             that add to the residual stream are multiplied by {scale:.6}, so that every norm has the same result as in training.\n"
        )
    });
    let class_map = if has_class_map { " --class-map THIS_FOLDER/class_map.txt" } else { "" };
    format!("{}{note}", README.replace(" --pretrained\n", &format!(" --pretrained{class_map}\n")))
}

const README: &str = "\
A folder that timm loads, and transformers as `TimmWrapperForImageClassification`. To evaluate it on ImageNet, in a clone of
timm's repository (pytorch-image-models):

```sh
python validate.py --data-dir /data/imagenet --split val --model local-dir:THIS_FOLDER --pretrained
```

```python
import timm
model = timm.create_model(\"local-dir:.\", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
```
";

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_scaled_stream_gives_the_same_norms_under_timms_epsilon() {
        assert_eq!(residual_scale(1e-6), None);
        let scale = residual_scale(1e-5).unwrap();
        // These values are so small that the epsilon matters.
        let x = Tensor::from_slice(&(0..64).map(|i| 3e-3 * (0.7 * i as f64).sin()).collect::<Vec<_>>());
        let norm = |x: &Tensor, eps| x.layer_norm([64], None::<Tensor>, None::<Tensor>, eps, false);
        let expected = norm(&x, 1e-5);
        let error = |x: &Tensor| (norm(x, TIMM_EPS) - &expected).abs().max().double_value(&[]);
        assert!(error(&(&x * scale)) < 1e-9, "{}", error(&(&x * scale)));
        assert!(error(&x) > 0.1);
    }

    #[test]
    fn only_tensors_that_are_added_to_the_stream_are_scaled() {
        let one = Tensor::ones([1], (Kind::Float, Device::Cpu));
        let added =
            ["cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.3.attn.proj.weight", "blocks.3.mlp.fc2.bias"];
        let others =
            ["blocks.3.norm1.weight", "blocks.3.attn.qkv.weight", "blocks.3.mlp.fc1.bias", "norm.bias", "head.weight"];
        let tensors: Vec<Named> =
            added.iter().chain(&others).map(|n| Named { name: n.to_string(), tensor: one.shallow_clone() }).collect();
        let all: Vec<f64> = scaled(&tensors, Some(0.5)).iter().map(|n| n.tensor.double_value(&[0])).collect();
        assert_eq!(all, [[0.5; 5], [1.0; 5]].concat());
    }
}
