use super::pickle::Pickle;
use super::*;
use crate::random::Random;
use std::io::Write;
use tempfile::TempDir;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// A pickle as torch writes it: {"model": OrderedDict(a=tensor(2, 3)), "epoch": 7, "args": Namespace(), …}, with a memo.
const CHECKPOINT: &[u8] = b"\x80\x02}q\x00(X\x05\x00\x00\x00modelq\x01ccollections\nOrderedDict\nq\x02)Rq\x03\
    X\x01\x00\x00\x00aq\x04ctorch._utils\n_rebuild_tensor_v2\nq\x05((X\x07\x00\x00\x00storageq\x06ctorch\nFloatStorage\n\
    q\x07X\x01\x00\x00\x000q\x08X\x03\x00\x00\x00cpuq\x09K\x06tq\nQK\x00K\x02K\x03\x86q\x0bK\x03K\x01\x86q\x0c\x89\
    h\x02)Rq\rtq\x0eRq\x0fs}q\x10X\x09\x00\x00\x00_metadataq\x11Nsb\
    X\x05\x00\x00\x00epochq\x12K\x07X\x04\x00\x00\x00argsq\x13cargparse\nNamespace\nq\x14)\x81q\x15}q\x16\
    X\x02\x00\x00\x00lrq\x17G?PbM\xd2\xf1\xa9\xfcsbu.";

fn zip_of(folder: &TempDir, pickle: &[u8]) -> std::path::PathBuf {
    let path = folder.path().join("a.pth");
    let mut zip = ZipWriter::new(File::create(&path).unwrap());
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("data.pkl", pickle), ("byteorder", b"little"), ("data/0", &[1; 24])] {
        zip.start_file(format!("archive/{name}"), options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
    path
}

fn listed(path: &Path) -> Result<Listing> {
    list(&File::open(path).unwrap())
}

fn refusal(pickle: &[u8]) -> String {
    format!("{:#}", Pickle::read(pickle).unwrap_err())
}

#[test]
fn a_checkpoint_of_torch_is_listed_and_its_numbers_read_where_they_lie() {
    let folder = tempfile::tempdir().unwrap();
    let path = zip_of(&folder, CHECKPOINT);
    let Listing::Flat(tensors) = listed(&path).unwrap() else { panic!("flat") };
    let (name, stored) = tensors.first_key_value().unwrap();
    assert_eq!((name.as_str(), &stored.sizes[..], tensors.len()), ("a", &[2, 3][..], 1));
    let tensor = stored.read(&File::open(&path).unwrap()).unwrap();
    assert_eq!(floats(&tensor), [f32::from_le_bytes([1; 4]); 6]);
}

#[test]
fn what_would_run_something_is_refused_by_name() {
    for (pickle, word) in [
        (&b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R."[..], "\"os\".\"system\""),
        (b"\x80\x02cbuiltins\neval\n.", "\"builtins\".\"eval\""),
        (b"\x80\x02ctorch.serialization\nload\n.", "torch.serialization"),
        (b"\x80\x02(cos\nsystem\n", "os"),
        (b"\x80\x02(S'id'\nios\nsystem\n.", "0x53"),
        (b"\x80\x02(X\x02\x00\x00\x00idios\nsystem\n.", "0x69"),
        (b"\x80\x04\x95", "protocol 4"),
        (b"\x80\x02\x93.", "0x93"),
        (b"\x80\x02\x82\x01.", "0x82"),
    ] {
        assert!(refusal(pickle).contains(word), "{word} in {}", refusal(pickle));
    }
}

#[test]
fn a_tensor_larger_than_its_storage_or_out_of_order_is_refused_before_memory_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let replaced = |from: &[u8], to: &[u8]| {
        let at = CHECKPOINT.windows(from.len()).position(|window| window == from).unwrap();
        let pickle = [&CHECKPOINT[..at], to, &CHECKPOINT[at + from.len()..]].concat();
        format!("{:#}", listed(&zip_of(&folder, &pickle)).unwrap_err())
    };
    let huge = b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86q\x0bJ\xff\xff\xff\x7fK\x01\x86";
    assert!(replaced(b"K\x02K\x03\x86q\x0bK\x03K\x01\x86", huge).contains("larger than what the file holds"));
    assert!(replaced(b"K\x02K\x03\x86q\x0bK\x03K\x01\x86", b"K\x02K\x03\x86q\x0bK\x01K\x02\x86").contains("in a row"));
    assert!(replaced(b"QK\x00", b"QK\x07").contains("outside of its storage"));
    assert!(replaced(b"QK\x00", b"QK\x01").contains("larger than what the file holds"));
    assert!(replaced(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001").contains("data/1"));
}

#[test]
fn nested_cyclic_and_endless_pickles_end_in_an_error_or_a_value() {
    let nested = [&b"\x80\x02)"[..], &[0x85; 1_000_000], b"."].concat();
    Pickle::read(&nested).unwrap();
    let cyclic = Pickle::read(b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.").unwrap();
    assert!(cyclic.get(cyclic.root(), "model").is_some());
    assert!(refusal(b"\x80\x02X\xff\xff\xff\xffa").contains("breaks off"));
    assert!(refusal(b"\x80\x02(((").contains("breaks off"));
    assert!(refusal(b"\x80\x02K\x01(\x85.").contains("more values than it made"));
}

#[test]
fn a_thousand_mutated_pickles_and_files_neither_crash_nor_run_anything() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(zip_of(&folder, CHECKPOINT)).unwrap();
    let mutated = folder.path().join("mutated.pth");
    let mut refused = 0;
    for trial in 0..1000 {
        let mut random = Random::new(&[4, trial]);
        let mut mutate = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            for _ in 0..=random.below(4) {
                let at = random.below(bytes.len());
                match random.below(3) {
                    0 => bytes[at] = random.below(256) as u8,
                    1 => bytes.insert(at, random.below(256) as u8),
                    _ => drop(bytes.remove(at)),
                }
            }
            bytes
        };
        refused += usize::from(Pickle::read(&mutate(CHECKPOINT)).is_err());
        std::fs::write(&mutated, mutate(&whole)).unwrap();
        refused += usize::from(listed(&mutated).is_err());
    }
    assert!(refused > 1000, "most changes are found: {refused} of 2000");
}
