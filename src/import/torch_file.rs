//! Reads a .pth of torch 1.6 or newer: a zip with a pickle, and with a file for each storage. See `export/torch_file.rs` for the
//! layout.

use super::machine;
use super::pickle::{Pickle, Tensor, Value};
use super::stored::{Listing, Stored, without_prefixes};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use zip::{CompressionMethod, ZipArchive};

/// The largest pickle that is read, in bytes. The names and shapes of any checkpoint's tensors need far less.
const LARGEST_PICKLE: u64 = 16 << 20;
/// The next three limits are needed because a short pickle can use one value of its memo many times: one dictionary as many stages,
/// or one text as many names.
const MOST_STAGES: usize = 256;
const MOST_TENSORS: usize = 1 << 16;
const LONGEST_NAME: usize = 1 << 10;
/// The keys under which checkpoints hold the weights: `model` in DeiT and the official code, `state_dict` in timm and mmseg,
/// `model_state_dict` in other programs.
const WRAPPERS: [&str; 3] = ["model", "state_dict", "model_state_dict"];
/// The keys under which checkpoints of DeiT, timm and mmengine, in this order, hold the moving averages of the weights.
const AVERAGES: [&str; 3] = ["model_ema", "state_dict_ema", "ema_state_dict"];

/// Lists the weights in the file without reading them. If `ema` is true, lists the moving averages of the weights instead.
pub fn list(file: &File, ema: bool) -> Result<Listing> {
    let mut zip = ZipArchive::new(file).context("the directory at its end is missing or damaged; copy it again")?;
    let mut root = None;
    for index in 0..zip.len() {
        let name = zip.by_index(index)?.name()?.into_owned();
        if let Some(folder) = name.strip_suffix("data.pkl") {
            root = Some(folder.to_string());
            break;
        }
    }
    let root = root.context("it holds no data.pkl, so torch.save did not write it")?;
    let pickle = machine::read(&small_entry(&mut zip, &format!("{root}data.pkl"))?)?;
    if zip.index_for_name(&format!("{root}byteorder")).is_some() {
        let order = small_entry(&mut zip, &format!("{root}byteorder"))?;
        ensure!(order == b"little", "it was written on a big-endian machine");
    }
    let mut storages = Storages { zip, root, length: file.metadata()?.len(), tensors: 0 };
    let top = pickle.root();
    let stages = pickle.get(top, "model_stages").map(|stages| pickle.members(stages)).unwrap_or_default();
    if !stages.is_empty() && !ema {
        ensure!(stages.len() <= MOST_STAGES, "it holds {} stages; {MOST_STAGES} is the most", stages.len());
        return Ok(Listing::Stages(stages.into_iter().map(|s| storages.tensors(&pickle, s)).collect::<Result<_>>()?));
    }
    Ok(Listing::Flat(storages.tensors(&pickle, weights(&pickle, ema)?)?))
}

/// The dictionary of the weights or, if `ema` is true, the dictionary of their moving averages. If the file holds both, the log
/// says which dictionary was taken.
fn weights(pickle: &Pickle, ema: bool) -> Result<&Value> {
    let top = pickle.root();
    let first = |keys: &[&'static str]| {
        let entries = keys.iter().filter_map(|&key| Some((key, pickle.get(top, key)?)));
        entries.into_iter().find(|(_, value)| pickle.holds_tensors(value))
    };
    match (first(&WRAPPERS), first(&AVERAGES)) {
        (_, Some((averages, value))) if ema => {
            log::info!("imported the moving averages `{averages}`");
            Ok(value)
        }
        _ if ema => bail!("it holds no moving averages, such as `{}`; leave --ema out", AVERAGES.join("` or `")),
        (Some((weights, value)), averages) => {
            if let Some((averages, _)) = averages {
                log::warn!(
                    "imported the weights `{weights}`, not their moving averages `{averages}`; give --ema to import these"
                );
            }
            Ok(value)
        }
        (None, _) if pickle.holds_tensors(top) => Ok(top),
        (None, Some((averages, _))) => bail!("it holds only moving averages, `{averages}`; import them with --ema"),
        (None, None) => bail!(
            "it holds no dictionary of tensors, neither by itself nor as `model_stages` or `{}`",
            WRAPPERS.join("` or `")
        ),
    }
}

fn small_entry(zip: &mut ZipArchive<&File>, name: &str) -> Result<Vec<u8>> {
    let entry = zip.by_name(name)?;
    ensure!(entry.size() <= LARGEST_PICKLE, "{name} claims {} bytes; {LARGEST_PICKLE} is the most", entry.size());
    let mut bytes = Vec::new();
    entry.take(LARGEST_PICKLE).read_to_end(&mut bytes).with_context(|| format!("{name} cannot be read"))?;
    Ok(bytes)
}

/// The storages of the tensors, which are entries of the zip.
struct Storages<'a> {
    zip: ZipArchive<&'a File>,
    /// The folder of the entries, with its slash.
    root: String,
    /// The length of the file, which is compared with the sizes that the zip's directory claims.
    length: u64,
    /// How many tensors have been listed.
    tensors: usize,
}

impl Storages<'_> {
    /// The tensors of a dictionary, by their names without prefixes.
    fn tensors(&mut self, pickle: &Pickle, dict: &Value) -> Result<BTreeMap<String, Stored>> {
        let mut found = BTreeMap::new();
        for (name, value) in pickle.entries(dict) {
            if let Value::Tensor(tensor) = value {
                ensure!(name.len() <= LONGEST_NAME, "a tensor's name has {} bytes", name.len());
                self.tensors += 1;
                ensure!(self.tensors <= MOST_TENSORS, "it holds more than {MOST_TENSORS} tensors");
                let stored = self.locate(tensor).with_context(|| format!("tensor {name}"))?;
                found.insert(name.to_string(), stored);
            }
        }
        Ok(without_prefixes(found))
    }

    /// Finds the position of a tensor in the file. Fails if the tensor is not contiguous or reaches beyond its storage.
    fn locate(&mut self, tensor: &Tensor) -> Result<Stored> {
        let mut contiguous_stride = 1i64;
        for (&size, &stride) in tensor.sizes.iter().zip(&tensor.strides).rev() {
            ensure!(size <= 1 || stride == contiguous_stride, "its numbers are not contiguous; save its .contiguous()");
            contiguous_stride = contiguous_stride.saturating_mul(size);
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
