//! The tensors in a file, which are listed first and then read one by one.

use super::globals::Number;
use crate::family::Model;
use crate::weights::floats_mut;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use tch::{Device, Kind, Tensor};

/// The kind, shape and position of a tensor in a file. The tensor's numbers are contiguous in the file.
#[derive(Debug, Clone)]
pub struct Stored {
    pub number: Number,
    pub sizes: Vec<i64>,
    /// The offset in the file of the tensor's first byte.
    pub start: u64,
}

/// The tensors of a checkpoint by name.
#[derive(Debug)]
pub enum Listing {
    /// The tensors of the whole network. Blocks are numbered from the start of the network.
    Flat(BTreeMap<String, Stored>),
    /// The official code's `model_stages`: the tensors of each stage. Blocks are numbered from the start of the stage.
    Stages(Vec<BTreeMap<String, Stored>>),
}

impl Number {
    /// The size of one number in bytes. For a kind that cannot be read, the size is a lower bound, which suffices for the checks.
    fn size(self) -> u64 {
        match self {
            Number::F64 => 8,
            Number::F32 => 4,
            Number::F16 | Number::Bf16 => 2,
            Number::Integer => 1,
            Number::Narrow | Number::Other => 0,
        }
    }

    fn check_is_readable(self) -> Result<()> {
        let kind = match self {
            Number::F64 | Number::F32 | Number::F16 | Number::Bf16 => return Ok(()),
            Number::Integer => "integers",
            Number::Narrow => "floating-point numbers of 8 bits or fewer",
            Number::Other => "numbers that are complex, quantised or of an unknown kind",
        };
        bail!(
            "it holds {kind}, but weights can be read only from fp64, fp32, fp16 and bf16; convert it to one of these"
        )
    }
}

impl Stored {
    /// A tensor that begins at the byte `start`. Fails if it would end after the byte `end`.
    pub fn within(number: Number, sizes: Vec<i64>, start: u64, end: u64) -> Result<Stored> {
        let count = sizes.iter().try_fold(1u64, |n, &size| n.checked_mul(u64::try_from(size).ok()?));
        let last = count.and_then(|n| n.checked_mul(number.size())).and_then(|bytes| bytes.checked_add(start));
        ensure!(last.is_some_and(|last| last <= end), "its shape {sizes:?} is larger than what the file holds");
        Ok(Stored { number, sizes, start })
    }

    /// A tensor in a storage. The storage occupies `size` bytes of the file from the byte `start` on. The tensor begins at number
    /// `offset` of the storage.
    pub fn from_storage(number: Number, sizes: Vec<i64>, offset: i64, start: u64, size: u64) -> Result<Stored> {
        let skipped =
            u64::try_from(offset).ok().and_then(|n| n.checked_mul(number.size())).filter(|&bytes| bytes <= size);
        let skipped = skipped.context("it begins outside of its storage")?;
        let end = start.checked_add(size).context("the end of its storage overflows")?;
        Stored::within(number, sizes, start + skipped, end)
    }

    /// Reads the numbers as fp32.
    pub fn read(&self, file: &File) -> Result<Tensor> {
        self.number.check_is_readable()?;
        // Allocate no memory for bytes that the file does not have, whatever its header claims.
        Stored::within(self.number, self.sizes.clone(), self.start, file.metadata()?.len())?;
        let count: i64 = self.sizes.iter().product();
        let mut tensor = Tensor::zeros([count], (Kind::Float, Device::Cpu));
        let width = self.number.size() as usize;
        let mut buffer = vec![0; CHUNK * width];
        let mut offset = self.start;
        for out in floats_mut(&mut tensor).chunks_mut(CHUNK) {
            let bytes = &mut buffer[..out.len() * width];
            file.read_exact_at(bytes, offset).context("it cannot be read")?;
            offset += bytes.len() as u64;
            for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(width)) {
                *out = match (self.number, bytes) {
                    (Number::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                    (Number::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
                    (Number::Bf16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
                    _ => f64::from_le_bytes(bytes.try_into()?) as f32,
                };
            }
        }
        Ok(tensor.view(&self.sizes[..]))
    }
}

/// How many numbers are read at a time.
const CHUNK: usize = 1 << 18;

/// The prefixes that training programs put before names: `torch.compile`, data-parallel training, and modules that wrap the network
/// (two prefixes).
const PREFIXES: [&str; 4] = ["_orig_mod.", "module.", "model.", "backbone."];

/// Removes the prefixes from the names, also several prefixes of one name. If removing a prefix would give two tensors the same
/// name, or would leave an empty name, all names keep this prefix.
pub fn without_prefixes(mut tensors: BTreeMap<String, Stored>) -> BTreeMap<String, Stored> {
    loop {
        let is_removable = |prefix: &&str| {
            let mut stripped = tensors.keys().filter_map(|name| name.strip_prefix(prefix)).peekable();
            stripped.peek().is_some() && stripped.all(|name| !name.is_empty() && !tensors.contains_key(name))
        };
        let Some(prefix) = PREFIXES.into_iter().find(is_removable) else { return tensors };
        let stripped = |name: String| name.strip_prefix(prefix).map(String::from).unwrap_or(name);
        tensors = tensors.into_iter().map(|(name, stored)| (stripped(name), stored)).collect();
    }
}

impl Listing {
    /// The number of blocks of each stage. A flat listing counts as one stage.
    pub fn depths(&self, model: &Model) -> Vec<usize> {
        let blocks = |names: &BTreeMap<String, Stored>| model.blocks_in(&mut names.keys().map(String::as_str));
        match self {
            Listing::Flat(names) => vec![blocks(names)],
            Listing::Stages(stages) => stages.iter().map(blocks).collect(),
        }
    }

    /// The number of blocks of the whole network.
    pub fn blocks(&self, model: &Model) -> usize {
        self.depths(model).into_iter().fold(0, usize::saturating_add)
    }

    /// Removes a tensor and returns it. `stage` and `name` find it in a listing by stages, `flat_name` in a flat listing.
    pub fn take(&mut self, stage: usize, name: &str, flat_name: &str) -> Option<Stored> {
        match self {
            Listing::Flat(names) => names.remove(flat_name),
            Listing::Stages(stages) => stages.get_mut(stage)?.remove(name),
        }
    }

    /// The names of the tensors that have not been taken.
    pub fn names(&self) -> Vec<String> {
        match self {
            Listing::Flat(names) => names.keys().cloned().collect(),
            Listing::Stages(stages) => {
                let named = |(stage, names): (usize, &BTreeMap<String, Stored>)| {
                    names.keys().map(move |name| format!("model_stages[{stage}] {name}")).collect::<Vec<_>>()
                };
                stages.iter().enumerate().flat_map(named).collect()
            }
        }
    }
}
