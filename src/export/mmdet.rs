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

Both configs inherit (`_base_`) from mmdetection's own configs, which they find through the installed package (`mmdet::`), and import
the ViTDet project from the clone. So both are needed: install the package from the clone, for example of v3.3.0, with torch and
mmcv 2.1 (`mim install mmcv==2.1.0`): `pip install -e . --no-build-isolation`.

The images and annotations of COCO must be in `data/coco` of the clone. `tools/dist_test.sh` with the same config evaluates a trained
model.
";
