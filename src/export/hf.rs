//! A folder for transformers' `ViTForImageClassification.from_pretrained` (4.57 and 5.23 read the same names).

use super::renamed::renamed;
use super::safetensors::write_tensors;
use super::{Exported, write_json, write_text};
use anyhow::Result;
use serde_json::{Value, json};
use std::path::Path;

pub fn write(exported: &Exported, folder: &Path) -> Result<()> {
    write_tensors(folder, &renamed(&exported.tensors, |row| Some(row.transformers)))?;
    write_json(folder, "config.json", &model_config(exported))?;
    write_json(folder, "preprocessor_config.json", &preprocessor_config(exported))?;
    write_text(folder, "evaluate.py", include_str!("templates/hf.py"))?;
    write_text(folder, "README.md", README)
}

/// The content of `config.json`.
fn model_config(exported: &Exported) -> Value {
    let model = exported.vit();
    let name = |class: usize| exported.class_names.get(class).cloned().unwrap_or_else(|| format!("LABEL_{class}"));
    let names_by_label: serde_json::Map<_, _> = (0..model.classes).map(|c| (c.to_string(), name(c).into())).collect();
    let labels_by_name: serde_json::Map<_, _> = (0..model.classes).map(|c| (name(c), c.into())).collect();
    json!({
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": model.width,
        "num_hidden_layers": exported.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": model.hidden(),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        // transformers' own default is 1e-12.
        "layer_norm_eps": model.layer_norm_eps,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "qkv_bias": true,
        "id2label": names_by_label,
        "label2id": labels_by_name,
    })
}

/// The content of `preprocessor_config.json`, for the transform of incubate's evaluation: resize the shorter side, then crop the
/// centre.
///
/// `ViTImageProcessor` would squash the image to a square, and so would `ConvNextImageProcessor` for sizes from 384 on. The
/// processors differ if the margin of the crop is odd. torchvision, timm and the `ConvNextImageProcessorFast` of transformers 4
/// then round half a pixel to the even number. Every other processor of transformers 4 and 5 rounds it down, so its crop may be one
/// pixel off. `evaluate.py` crops as torchvision does.
fn preprocessor_config(exported: &Exported) -> Value {
    let (size, data) = (exported.model.image_size(), &exported.config.data);
    let mut config = json!({
        "do_resize": true,
        "resample": 3,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": data.mean,
        "image_std": data.std,
    });
    let geometry = if size < 384 {
        json!({
            "image_processor_type": "ConvNextImageProcessorFast",
            "size": {"shortest_edge": size},
            "crop_pct": exported.crop_share(),
        })
    } else {
        json!({
            "image_processor_type": "BitImageProcessorFast",
            "size": {"shortest_edge": (size as f64 / exported.crop_share()) as usize},
            "do_center_crop": true,
            "crop_size": {"height": size, "width": size},
        })
    };
    let geometry = geometry.as_object().expect("written above as an object").clone();
    config.as_object_mut().expect("written above as an object").extend(geometry);
    config
}

const README: &str = "\
A folder that transformers loads. To evaluate it on a folder of images, `CLASS/*` for each class:

```sh
python evaluate.py /data/imagenet/val          # needs torch, torchvision, transformers
```

```python
from transformers import AutoImageProcessor, ViTForImageClassification
model = ViTForImageClassification.from_pretrained(\".\")
processor = AutoImageProcessor.from_pretrained(\".\")
```

If the margin of the centre crop is odd, torchvision, timm and incubate round half a pixel to the even number. transformers 5, and
transformers 4 from 384 pixels on, round it down, so their crop may be one pixel off. `evaluate.py` crops as torchvision does.
";
