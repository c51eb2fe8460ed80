//! A backbone and configs for mmdetection's ViTDet project: Mask R-CNN on COCO.

use super::{Exported, vitdet, write_text, write_torch};
use anyhow::Result;
use std::path::Path;

pub fn write(exported: &Exported, folder: &Path) -> Result<()> {
    // mmdetection reads the tensors from the key `model` alone (projects/ViTDet/vitdet/vit.py, `init_weights`).
    write_torch(folder, &vitdet::backbone(exported), Some("model"))?;
    vitdet::write_configs(exported, folder, include_str!("templates/mmdet.py"))?;
    write_text(folder, "README.md", README)
}

const README: &str = "\
A backbone for mmdetection's ViTDet project and its configs for Mask R-CNN on COCO: `mask_rcnn_1x.py` and `mask_rcnn_3x.py`.

```sh
PYTHONPATH=. tools/dist_train.sh THIS_FOLDER/mask_rcnn_1x.py 8     # in a clone of mmdetection
```

The config begins from mmdetection's own, which it finds through the installed package (`mmdet::`): a clone that is only on the
path is not enough, and a package without the clone lacks the ViTDet project. In a clone of v3.3.0, with torch and mmcv 2.1
(`mim install mmcv==2.1.0`): `pip install -e . --no-build-isolation`.

Images in `data/coco`. `tools/dist_test.sh` with the same config and a trained model evaluates it.
";
