//! A .safetensors: a JSON header with names and offsets, followed by the tensors one after the other.

use super::globals::Number;
use super::stored::{Listing, Stored, without_prefixes};
use anyhow::{Context, Result, ensure};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

/// Lists the weights in the file, without reading them.
pub fn list(mut file: &File) -> Result<Listing> {
    let length = file.metadata()?.len();
    let mut head = [0; 8];
    file.read_exact(&mut head).context("it breaks off")?;
    let header = u64::from_le_bytes(head);
    ensure!(header <= LARGEST_HEADER, "its header claims {header} bytes; {LARGEST_HEADER} is the most");
    ensure!(header + 8 <= length, "it breaks off within its header of {header} bytes; copy it again");
    let mut bytes = Vec::new();
    file.take(header).read_to_end(&mut bytes)?;
    let metadata: Metadata = serde_json::from_slice(&bytes).context("its header is malformed")?;
    let promised = (8 + header).saturating_add(metadata.data_len() as u64);
    ensure!(promised <= length, "it breaks off after {length} of {promised} bytes; copy it again");
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let number = match info.dtype {
            Dtype::F64 => Number::F64,
            Dtype::F32 => Number::F32,
            Dtype::F16 => Number::F16,
            Dtype::BF16 => Number::Bf16,
            Dtype::BOOL | Dtype::U8 | Dtype::I8 | Dtype::I16 | Dtype::U16 => Number::Integer,
            Dtype::I32 | Dtype::U32 | Dtype::I64 | Dtype::U64 => Number::Integer,
            Dtype::C64 => Number::Other,
            _ => Number::Narrow,
        };
        let sizes = info.shape.iter().map(|&n| n as i64).collect();
        let offset = |bytes: usize| (8 + header).checked_add(bytes as u64).context("an offset overflows");
        let (start, end) = (offset(info.data_offsets.0)?, offset(info.data_offsets.1)?);
        let stored = Stored::within(number, sizes, start, end.min(length)).with_context(|| format!("tensor {name}"))?;
        tensors.insert(name, stored);
    }
    Ok(Listing::Flat(without_prefixes(tensors)))
}

const LARGEST_HEADER: u64 = 16 << 20;
