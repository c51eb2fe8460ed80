//! `model.pth`: a dictionary of the tensors under timm's names.

use super::{Exported, write_text, write_torch};
use anyhow::Result;
use std::path::Path;

pub fn write(exported: &Exported, folder: &Path) -> Result<()> {
    write_torch(folder, &exported.tensors, None)?;
    write_text(folder, "README.md", README)
}

const README: &str = "\
`model.pth`: the weights under timm's names, as a plain dictionary.

```python
import torch
weights = torch.load(\"model.pth\", weights_only=True, mmap=True)
```
";
