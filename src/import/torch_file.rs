//! A .pth of torch 1.6 or newer: a zip with a pickle and a file for each storage. See `export/torch_file.rs` for the layout.

use super::pickle::{Pickle, Tensor, Value};
use super::stored::{Listing, Stored};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use zip::{CompressionMethod, ZipArchive};

/// Far more than the names and shapes of any checkpoint's tensors need.
const LARGEST_PICKLE: u64 = 16 << 20;
/// A pickle may recall one dictionary as many stages, and one text as the beginning of many names.
const MOST_STAGES: usize = 256;
const MOST_TENSORS: usize = 1 << 16;
const LONGEST_NAME: usize = 1 << 10;
/// Where checkpoints keep the weights: DeiT and the official code, timm and mmseg.
const WRAPPERS: [&str; 2] = ["model", "state_dict"];

/// Lists the weights in the file, without reading them.
pub fn list(file: &File) -> Result<Listing> {
    let mut zip = ZipArchive::new(file).context("it is no zip (torch.save has written one since torch 1.6)")?;
    let mut root = None;
    for index in 0..zip.len() {
        let name = zip.by_index(index)?.name()?.into_owned();
        if let Some(folder) = name.strip_suffix("data.pkl") {
            root = Some(folder.to_string());
            break;
        }
    }
    let root = root.context("it holds no data.pkl, so torch.save did not write it")?;
    let pickle = Pickle::read(&small_entry(&mut zip, &format!("{root}data.pkl"))?)?;
    if zip.index_for_name(&format!("{root}byteorder")).is_some() {
        let order = small_entry(&mut zip, &format!("{root}byteorder"))?;
        ensure!(order == b"little", "it was written on a big-endian machine");
    }
    let mut storages = Storages { zip, root, length: file.metadata()?.len(), tensors: 0 };
    let top = pickle.root();
    let stages = pickle.get(top, "model_stages").map(|stages| pickle.members(stages)).unwrap_or_default();
    if !stages.is_empty() {
        ensure!(stages.len() <= MOST_STAGES, "it holds {} stages; {MOST_STAGES} is the most", stages.len());
        return Ok(Listing::Stages(stages.into_iter().map(|s| storages.tensors(&pickle, s)).collect::<Result<_>>()?));
    }
    let weights = WRAPPERS.iter().find_map(|key| pickle.get(top, key)).unwrap_or(top);
    let tensors = storages.tensors(&pickle, weights)?;
    ensure!(
        !tensors.is_empty(),
        "it holds no dictionary of tensors, neither by itself nor as `model`, `state_dict` or `model_stages`"
    );
    Ok(Listing::Flat(tensors))
}

fn small_entry(zip: &mut ZipArchive<&File>, name: &str) -> Result<Vec<u8>> {
    let entry = zip.by_name(name)?;
    ensure!(entry.size() <= LARGEST_PICKLE, "{name} claims {} bytes", entry.size());
    let mut bytes = Vec::new();
    entry.take(LARGEST_PICKLE).read_to_end(&mut bytes).with_context(|| format!("{name} cannot be read"))?;
    Ok(bytes)
}

struct Storages<'a> {
    zip: ZipArchive<&'a File>,
    root: String,
    /// Of the whole file, whatever its directory claims.
    length: u64,
    /// How many tensors have been listed.
    tensors: usize,
}

impl Storages<'_> {
    /// The tensors of a dictionary by name, without the `module.` of data-parallel training.
    fn tensors(&mut self, pickle: &Pickle, dict: &Value) -> Result<BTreeMap<String, Stored>> {
        let mut found = BTreeMap::new();
        for (name, value) in pickle.entries(dict) {
            if let Value::Tensor(tensor) = value {
                ensure!(name.len() <= LONGEST_NAME, "a tensor's name has {} bytes", name.len());
                self.tensors += 1;
                ensure!(self.tensors <= MOST_TENSORS, "it holds more than {MOST_TENSORS} tensors");
                let stored = self.locate(tensor).with_context(|| format!("tensor {name}"))?;
                found.insert(name.strip_prefix("module.").unwrap_or(name).to_string(), stored);
            }
        }
        Ok(found)
    }

    /// Where a tensor lies in the file.
    fn locate(&mut self, tensor: &Tensor) -> Result<Stored> {
        let mut expected = 1i64;
        for (&size, &stride) in tensor.sizes.iter().zip(&tensor.strides).rev() {
            ensure!(size <= 1 || stride == expected, "it does not lie in a row; save its .contiguous()");
            expected = expected.saturating_mul(size);
        }
        ensure!(
            tensor.sizes.len() == tensor.strides.len(),
            "it has {} sizes and {} strides",
            tensor.sizes.len(),
            tensor.strides.len()
        );
        let key = &tensor.storage.key;
        ensure!(key.len() <= LONGEST_NAME, "its storage's name has {} bytes", key.len());
        let name = format!("{}data/{key}", self.root);
        let entry = self.zip.by_name(&name).with_context(|| format!("its storage {name} is missing"))?;
        if entry.compression() != CompressionMethod::Stored {
            bail!("its storage {name} is compressed, which torch.save does not do");
        }
        let start = entry.data_start().with_context(|| format!("its storage {name} cannot be found"))?;
        let (number, size) = (tensor.storage.number, entry.size());
        let end = start.checked_add(size).filter(|&end| end <= self.length);
        end.with_context(|| format!("its storage {name} claims {size} bytes, but the file ends before"))?;
        Stored::from_storage(number, tensor.sizes.clone(), tensor.offset, start, size)
    }
}
