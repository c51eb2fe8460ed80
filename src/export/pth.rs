//! `model.pth`, a plain dictionary under timm's names.

use super::{Whole, write_text, write_torch};
use anyhow::Result;
use std::path::Path;

pub fn write(whole: &Whole, folder: &Path) -> Result<()> {
    write_torch(folder, &whole.tensors, None)?;
    write_text(folder, "README.md", README)
}

const README: &str = "\
`model.pth`: the weights under timm's names, as a plain dictionary.

```python
import torch
weights = torch.load(\"model.pth\", weights_only=True, mmap=True)
```
";
