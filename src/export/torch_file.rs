//! Writes PyTorch's .pth: the file that `torch.save` writes for a dictionary of fp32 tensors. `torch.load` reads the file, also
//! with `weights_only=True` and `mmap=True` (torch 2.11, `torch/serialization.py` and `torch/_weights_only_unpickler.py`).
//!
//! ```text
//! a zip whose entries lie in one folder, uncompressed (as mmap needs), their contents at multiples of 64 bytes
//!   model/data.pkl     pickle, protocol 2: {name: rebuild(storage key, offset, sizes, strides)}
//!   model/byteorder    "little"
//!   model/data/{key}   the numbers of one tensor
//!   model/version      "3\n"
//! ```

use super::Named;
use crate::weights::bytes;
use anyhow::Result;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

const ALIGNMENT: u16 = 64;
/// A zip entry of at least this many bytes needs 64-bit sizes.
const NEEDS_ZIP64: usize = u32::MAX as usize;

/// Writes a dictionary of the tensors. If `wrapper` is given, the file holds another dictionary, in which the dictionary of the
/// tensors is the value of the key `wrapper`. At most one tensor is copied in memory at a time.
pub fn write(path: &Path, tensors: &[Named], wrapper: Option<&str>) -> Result<()> {
    let mut zip = ZipWriter::new(BufWriter::with_capacity(1 << 20, File::create(path)?));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).with_alignment(ALIGNMENT);
    zip.start_file("model/data.pkl", options)?;
    zip.write_all(&pickle(tensors, wrapper))?;
    zip.start_file("model/byteorder", options)?;
    zip.write_all(b"little")?;
    for (key, Named { tensor, .. }) in tensors.iter().enumerate() {
        let tensor = tensor.contiguous();
        let numbers = bytes(&tensor);
        zip.start_file(format!("model/data/{key}"), options.large_file(numbers.len() >= NEEDS_ZIP64))?;
        zip.write_all(numbers)?;
    }
    zip.start_file("model/version", options)?;
    zip.write_all(b"3\n")?;
    zip.finish()?.flush()?;
    Ok(())
}

/// The opcodes that make an empty `OrderedDict`.
const ORDERED_DICT: &[u8] = b"ccollections\nOrderedDict\n)R";

/// The content of `data.pkl`: a pickle of protocol 2 without a memo.
fn pickle(tensors: &[Named], wrapper: Option<&str>) -> Vec<u8> {
    let mut out = b"\x80\x02".to_vec();
    if let Some(key) = wrapper {
        out.push(b'}');
        text(&mut out, key);
    }
    out.extend(ORDERED_DICT);
    out.push(b'(');
    for (key, Named { name, tensor }) in tensors.iter().enumerate() {
        let sizes = tensor.size();
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(b"ctorch\nFloatStorage\n");
        text(&mut out, &key.to_string());
        text(&mut out, "cpu");
        integer(&mut out, tensor.numel() as i64);
        out.extend(b"tQK\x00(");
        sizes.iter().for_each(|&size| integer(&mut out, size));
        out.extend(b"t(");
        let strides = (0..sizes.len()).map(|axis| sizes[axis + 1..].iter().product());
        strides.for_each(|stride| integer(&mut out, stride));
        out.extend(b"t\x89");
        out.extend(ORDERED_DICT);
        out.extend(b"tR");
    }
    out.push(b'u');
    if wrapper.is_some() {
        out.push(b's');
    }
    out.push(b'.');
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Writes a non-negative integer with the shortest opcode that holds it, as Python's pickler does. But a number of at least 2³¹
/// always takes 8 bytes, although Python would write fewer.
fn integer(out: &mut Vec<u8>, number: i64) {
    let bytes = number.to_le_bytes();
    match number {
        0..=0xff => out.extend([b'K', bytes[0]]),
        0x100..=0xffff => out.extend([b'M', bytes[0], bytes[1]]),
        0x1_0000..=0x7fff_ffff => {
            out.push(b'J');
            out.extend(&bytes[..4]);
        }
        _ => {
            out.extend([0x8a, 8]);
            out.extend(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use tch::{Device, Kind, Tensor};

    fn named(name: &str, tensor: Tensor) -> Named {
        Named { name: name.into(), tensor }
    }

    #[test]
    fn every_entry_is_stored_in_one_folder_at_a_multiple_of_64_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pth");
        let three_numbers = Tensor::from_slice(&[1f32, -2.5, 3e9]);
        write(
            &path,
            &[named("a", three_numbers), named("b.weight", Tensor::zeros([5, 7], (Kind::Float, Device::Cpu)))],
            None,
        )
        .unwrap();
        let mut zip = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
        let mut names = Vec::new();
        for index in 0..zip.len() {
            let entry = zip.by_index(index).unwrap();
            assert_eq!(entry.compression(), CompressionMethod::Stored);
            assert!(entry.data_start().unwrap().is_multiple_of(64), "entry {index}");
            names.push(entry.name().unwrap().into_owned());
        }
        assert_eq!(names, ["data.pkl", "byteorder", "data/0", "data/1", "version"].map(|n| format!("model/{n}")));
        let mut numbers = Vec::new();
        zip.by_name("model/data/0").unwrap().read_to_end(&mut numbers).unwrap();
        assert_eq!(numbers, [1f32, -2.5, 3e9].map(f32::to_le_bytes).concat());
    }

    #[test]
    #[ignore = "writes 5 GiB, to INCUBATE_LARGE_PTH if that is set; tools/check_exports.py --large reads that file"]
    fn a_file_of_more_than_4_gib_takes_the_memory_of_its_largest_tensor() {
        let folder = tempfile::tempdir().unwrap();
        let given_path = std::env::var_os("INCUBATE_LARGE_PTH");
        let path = given_path.map_or_else(|| folder.path().join("a.pth"), Into::into);
        let shared = Tensor::arange(1 << 26, (Kind::Float, Device::Cpu));
        let tensors: Vec<Named> = (0..20).map(|i| named(&i.to_string(), shared.shallow_clone())).collect();
        let peak = || -> usize {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let before = peak();
        write(&path, &tensors, None).unwrap();
        assert!(peak() - before < 64 << 10, "writing took 64 MiB more than the tensor itself");
        let mut zip = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
        let mut last = zip.by_name("model/data/19").unwrap();
        assert!(last.data_start().unwrap() > 1 << 32);
        let mut numbers = [0; 12];
        last.read_exact(&mut numbers).unwrap();
        assert_eq!(numbers, [0f32, 1.0, 2.0].map(f32::to_le_bytes).concat()[..]);
    }

    #[test]
    fn integers_take_pythons_opcodes() {
        let opcodes = |number| {
            let mut out = Vec::new();
            integer(&mut out, number);
            out
        };
        assert_eq!(opcodes(255), [b'K', 255]);
        assert_eq!(opcodes(256), [b'M', 0, 1]);
        assert_eq!(opcodes(65536), [b'J', 0, 0, 1, 0]);
        assert_eq!(opcodes(1 << 31), [0x8a, 8, 0, 0, 0, 0x80, 0, 0, 0, 0]);
    }
}
