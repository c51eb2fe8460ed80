//! `model.safetensors` with timm's names, without a config.

use super::{Exported, Named, write_text};
use crate::store::durable;
use crate::weights::bytes;
use ::safetensors::tensor::{Dtype, View};
use anyhow::Result;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use tch::Tensor;

pub fn write(exported: &Exported, folder: &Path) -> Result<()> {
    write_tensors(folder, &exported.tensors)?;
    write_text(folder, "README.md", README)
}

const README: &str = "\
`model.safetensors`: the weights under timm's names.

```python
from safetensors.torch import load_file
weights = load_file(\"model.safetensors\")
```
";

/// Writes `model.safetensors`. Its metadata say that PyTorch made the tensors, because transformers refuses a file that does not
/// say so.
pub fn write_tensors(folder: &Path, tensors: &[Named]) -> Result<()> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let entries = tensors.iter().map(|Named { name, tensor }| (name.as_str(), Entry::new(tensor)));
    durable::replace(&folder.join("model.safetensors"), |beside| {
        // `serialize_to_file` makes a file that only its owner may read. So give it the permissions of any new file.
        let permissions = File::create(beside)?.metadata()?.permissions();
        ::safetensors::serialize_to_file(entries, Some(metadata), beside)?;
        Ok(std::fs::set_permissions(beside, permissions)?)
    })
}

struct Entry {
    shape: Vec<usize>,
    tensor: Tensor,
}

impl Entry {
    fn new(tensor: &Tensor) -> Entry {
        Entry { shape: tensor.size().iter().map(|&n| n as usize).collect(), tensor: tensor.contiguous() }
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
        bytes(&self.tensor).into()
    }
    fn data_len(&self) -> usize {
        4 * self.tensor.numel()
    }
}
