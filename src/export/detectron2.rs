//! A backbone and LazyConfigs for detectron2's ViTDet: Mask R-CNN on COCO.

use super::{Exported, Named, vitdet, write_text, write_torch};
use anyhow::Result;
use std::path::Path;

pub fn write(exported: &Exported, folder: &Path) -> Result<()> {
    write_torch(folder, &backbone(exported), Some("model"))?;
    vitdet::write_configs(exported, folder, include_str!("templates/detectron2.py"))?;
    write_text(folder, "README.md", README)
}

/// The backbone's tensors under the names that they have in the detector.
pub fn backbone(exported: &Exported) -> Vec<Named> {
    let mut tensors = vitdet::backbone(exported);
    tensors.iter_mut().for_each(|Named { name, .. }| *name = format!("backbone.net.{name}"));
    tensors
}

const README: &str = "\
A backbone for detectron2's ViTDet and its configs for Mask R-CNN on COCO: `mask_rcnn_1x.py` and `mask_rcnn_3x.py`.

```sh
tools/lazyconfig_train_net.py --config-file THIS_FOLDER/mask_rcnn_1x.py --num-gpus 8     # in a clone of detectron2
```

The images and annotations of COCO must be in `$DETECTRON2_DATASETS/coco`. To evaluate a trained model, add
`--eval-only train.init_checkpoint=MODEL`.
";
