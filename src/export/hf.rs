//! A folder for transformers' `ViTForImageClassification.from_pretrained` (4.57 and 5.23 read the same names).

use super::renamed::renamed;
use super::safetensors::write_tensors;
use super::{Whole, write_json, write_text};
use anyhow::Result;
use serde_json::{Value, json};
use std::path::Path;

pub fn write(whole: &Whole, folder: &Path) -> Result<()> {
    write_tensors(folder, &renamed(&whole.tensors, |row| Some(row.transformers)))?;
    write_json(folder, "config.json", &description(whole))?;
    write_json(folder, "preprocessor_config.json", &preprocessing(whole))?;
    write_text(folder, "evaluate.py", include_str!("templates/hf.py"))?;
    write_text(folder, "README.md", README)
}

fn description(whole: &Whole) -> Value {
    let model = whole.vit();
    let name = |class: usize| whole.class_names.get(class).cloned().unwrap_or_else(|| format!("LABEL_{class}"));
    let names: serde_json::Map<_, _> = (0..model.classes).map(|c| (c.to_string(), name(c).into())).collect();
    let numbers: serde_json::Map<_, _> = (0..model.classes).map(|c| (name(c), c.into())).collect();
    json!({
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": model.width,
        "num_hidden_layers": whole.depth,
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
        "id2label": names,
        "label2id": numbers,
    })
}

/// Our evaluation's: resize the shorter side, crop the centre. `ViTImageProcessor` would squash the image, and
/// `ConvNextImageProcessor` does so from 384 on. Of an odd margin, torchvision, timm and `ConvNextImageProcessorFast` of
/// transformers 4 round the half to even; every other processor of transformers 4 and 5 rounds down, and may crop one pixel
/// off. `evaluate.py` beside it crops as torchvision does.
fn preprocessing(whole: &Whole) -> Value {
    let (size, data) = (whole.model.image_size(), &whole.config.data);
    let mut all = json!({
        "do_resize": true,
        "resample": 3,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": data.mean,
        "image_std": data.std,
    });
    let own = if size < 384 {
        json!({
            "image_processor_type": "ConvNextImageProcessorFast",
            "size": {"shortest_edge": size},
            "crop_pct": whole.crop(),
        })
    } else {
        json!({
            "image_processor_type": "BitImageProcessorFast",
            "size": {"shortest_edge": (size as f64 / whole.crop()) as usize},
            "do_center_crop": true,
            "crop_size": {"height": size, "width": size},
        })
    };
    let own = own.as_object().expect("written above as one").clone();
    all.as_object_mut().expect("written above as one").extend(own);
    all
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

transformers 5, and transformers 4 from 384 pixels on, round half a pixel down when they crop an odd margin, where torchvision,
timm and incubate round to even: the crop may be one pixel off. `evaluate.py` crops as these do.
";
