mod variants;

use super::*;
use crate::random::Random;
use std::io::Write;
use tempfile::TempDir;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// A pickle as torch writes it, with a memo. It holds {"model": OrderedDict(a=tensor of shape (2, 3)), "epoch": 7, "args":
/// Namespace(lr)}.
const CHECKPOINT: &[u8] = b"\x80\x02}q\x00(X\x05\x00\x00\x00modelq\x01ccollections\nOrderedDict\nq\x02)Rq\x03\
    X\x01\x00\x00\x00aq\x04ctorch._utils\n_rebuild_tensor_v2\nq\x05((X\x07\x00\x00\x00storageq\x06ctorch\nFloatStorage\n\
    q\x07X\x01\x00\x00\x000q\x08X\x03\x00\x00\x00cpuq\x09K\x06tq\nQK\x00K\x02K\x03\x86q\x0bK\x03K\x01\x86q\x0c\x89\
    h\x02)Rq\rtq\x0eRq\x0fs}q\x10X\x09\x00\x00\x00_metadataq\x11Nsb\
    X\x05\x00\x00\x00epochq\x12K\x07X\x04\x00\x00\x00argsq\x13cargparse\nNamespace\nq\x14)\x81q\x15}q\x16\
    X\x02\x00\x00\x00lrq\x17G?PbM\xd2\xf1\xa9\xfcsbu.";

fn zip_of(folder: &TempDir, pickle: &[u8]) -> std::path::PathBuf {
    let path = folder.path().join("a.pth");
    std::fs::write(&path, zipped(pickle, &[vec![1; 24]])).unwrap();
    path
}

/// A zip as torch.save writes it, with this pickle and these storages.
fn zipped(pickle: &[u8], storages: &[Vec<u8>]) -> Vec<u8> {
    let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut add = |name: &str, bytes: &[u8]| {
        zip.start_file(format!("archive/{name}"), options).unwrap();
        zip.write_all(bytes).unwrap();
    };
    add("data.pkl", pickle);
    add("byteorder", b"little");
    storages.iter().enumerate().for_each(|(key, bytes)| add(&format!("data/{key}"), bytes));
    zip.finish().unwrap().into_inner()
}

/// A pickle of `model_stages`, whose tensors have these names and shapes. The pickle uses the memo, and each tensor has its own
/// storage.
fn stages_pickle(stages: &[Vec<(String, Vec<i64>)>]) -> Vec<u8> {
    let text = |text: &str| [&b"X"[..], &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let long = |number: i64| [&b"J"[..], &(number as u32).to_le_bytes()[..]].concat();
    // These values are stored in the memo and then remain at the bottom of the stack.
    let mut out = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00ctorch\nFloatStorage\nq\x01".to_vec();
    out.extend([&text("storage")[..], b"q\x02}", &text("model_stages"), b"]("].concat());
    let mut key = 0;
    for stage in stages {
        out.extend(b"ccollections\nOrderedDict\n)R(");
        for (name, shape) in stage {
            out.extend([&text(name)[..], b"h\x00((h\x02h\x01", &text(&key.to_string()), &text("cpu")].concat());
            out.extend([&long(shape.iter().product())[..], b"tQK\x00("].concat());
            shape.iter().for_each(|&size| out.extend(long(size)));
            out.extend(b"t(");
            (0..shape.len()).for_each(|axis| out.extend(long(shape[axis + 1..].iter().product())));
            out.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
            key += 1;
        }
        out.push(b'u');
    }
    out.extend(b"es.");
    out
}

/// The peak of this process's memory so far, in KiB.
fn peak_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn listed(path: &Path) -> Result<Listing> {
    list(&File::open(path).unwrap(), false)
}

fn as_role(role: Role) -> Choice {
    Choice { role: Some(role), ..Choice::default() }
}

fn refusal(pickle: &[u8]) -> String {
    format!("{:#}", machine::read(pickle).unwrap_err())
}

#[test]
fn a_checkpoint_of_torch_is_listed_and_its_numbers_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = zip_of(&folder, CHECKPOINT);
    let Listing::Flat(tensors) = listed(&path).unwrap() else { panic!("flat") };
    let (name, stored) = tensors.first_key_value().unwrap();
    assert_eq!((name.as_str(), &stored.sizes[..], tensors.len()), ("a", &[2, 3][..], 1));
    let tensor = stored.read(&File::open(&path).unwrap()).unwrap();
    assert_eq!(floats(&tensor), [f32::from_le_bytes([1; 4]); 6]);
}

#[test]
fn a_pickle_that_would_run_code_is_refused_and_the_code_named() {
    for (pickle, word) in [
        (&b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R."[..], "\"os\".\"system\""),
        (b"\x80\x02cbuiltins\neval\n.", "\"builtins\".\"eval\""),
        (b"\x80\x02ctorch.serialization\nload\n.", "torch.serialization"),
        (b"\x80\x02(cos\nsystem\n", "os"),
        (b"\x80\x02(S'id'\nios\nsystem\n.", "0x53"),
        (b"\x80\x02(X\x02\x00\x00\x00idios\nsystem\n.", "0x69"),
        (b"\x80\x06.", "protocol 6"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "\"os\".\"system\""),
        (b"\x80\x02\x93.", "more values than it made"),
        (b"\x80\x02\x82\x01.", "0x82"),
    ] {
        assert!(refusal(pickle).contains(word), "{word} in {}", refusal(pickle));
    }
}

#[test]
fn a_tensor_larger_than_its_storage_or_not_contiguous_is_refused_before_memory_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let replaced = |from: &[u8], to: &[u8]| {
        let at = CHECKPOINT.windows(from.len()).position(|window| window == from).unwrap();
        let pickle = [&CHECKPOINT[..at], to, &CHECKPOINT[at + from.len()..]].concat();
        format!("{:#}", listed(&zip_of(&folder, &pickle)).unwrap_err())
    };
    let huge = b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86q\x0bJ\xff\xff\xff\x7fK\x01\x86";
    assert!(replaced(b"K\x02K\x03\x86q\x0bK\x03K\x01\x86", huge).contains("larger than what the file holds"));
    assert!(
        replaced(b"K\x02K\x03\x86q\x0bK\x03K\x01\x86", b"K\x02K\x03\x86q\x0bK\x01K\x02\x86").contains("not contiguous")
    );
    assert!(replaced(b"QK\x00", b"QK\x07").contains("outside of its storage"));
    assert!(replaced(b"QK\x00", b"QK\x01").contains("larger than what the file holds"));
    assert!(replaced(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001").contains("data/1"));
}

#[test]
fn nested_cyclic_and_endless_pickles_end_in_an_error_or_a_value() {
    let nested = [&b"\x80\x02)"[..], &[0x85; 1_000_000], b"."].concat();
    machine::read(&nested).unwrap();
    let cyclic = machine::read(b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.").unwrap();
    assert!(cyclic.get(cyclic.root(), "model").is_some());
    assert!(refusal(b"\x80\x02X\xff\xff\xff\xffa").contains("breaks off"));
    assert!(refusal(b"\x80\x02(((").contains("breaks off"));
    assert!(refusal(b"\x80\x02K\x01(\x85.").contains("more values than it made"));
}

#[test]
fn a_value_that_a_pickle_fetches_from_its_memo_takes_no_further_memory() {
    // A storage's key of one megabyte is used 3,000 times. This would take 3 GB if each use copied the key.
    let key = [&b"X\x00\x00\x10\x00"[..], &[b'k'; 1 << 20]].concat();
    let head = [&b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"[..], &key[..], b"NNtq\x00Q"].concat();
    let before = peak_kib();
    machine::read(&[&head[..], &b"h\x00Q".repeat(3000), b"."].concat()).unwrap();
    assert!(peak_kib() - before < 64 << 10, "{} KiB", peak_kib() - before);
    // A tensor's name of 5,000 bytes is refused.
    let folder = tempfile::tempdir().unwrap();
    let named = |name: &str| {
        format!("{:#}", listed(&zip_of(&folder, &stages_pickle(&[vec![(name.into(), vec![2, 3])]]))).unwrap_err())
    };
    assert!(named(&"n".repeat(5000)).contains("name has 5000 bytes"));
}

#[test]
fn values_stages_tensors_and_dimensions_have_limits() {
    assert!(refusal(&[&b"\x80\x02"[..], &[b']'; 2 << 20], b"."].concat()).contains("more than 1048576 values"));
    let folder = tempfile::tempdir().unwrap();
    let refused = |pickle: &[u8]| format!("{:#}", listed(&zip_of(&folder, pickle)).unwrap_err());
    // Every stage is the same dictionary, which the pickle fetches from its memo.
    let stage = |count: usize| -> Vec<(String, Vec<i64>)> { (0..count).map(|i| (i.to_string(), vec![1])).collect() };
    let repeated = |count: usize, times: usize| {
        let mut pickle = stages_pickle(&[stage(count)]);
        pickle.truncate(pickle.len() - 3);
        [&pickle[..], b"q\x07", &b"h\x07".repeat(times), b"es."].concat()
    };
    assert!(refused(&repeated(1, 300)).contains("301 stages"));
    let many = repeated(300, 250);
    let path = folder.path().join("many.pth");
    std::fs::write(&path, zipped(&many, &vec![vec![0; 4]; 300])).unwrap();
    assert!(format!("{:#}", listed(&path).unwrap_err()).contains("more than 65536 tensors"));
    assert!(refused(&stages_pickle(&[vec![("a".into(), vec![1; 9])]])).contains("9 dimensions"));
}

#[test]
fn a_storage_that_ends_after_the_file_by_the_zips_directory_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = zipped(CHECKPOINT, &[vec![1; 24]]);
    let at = bytes.windows(14).rposition(|window| window == b"archive/data/0").unwrap() - 46;
    bytes[at + 20..at + 28].copy_from_slice(&[0xf0, 0xff, 0xff, 0x7f, 0xf0, 0xff, 0xff, 0x7f]);
    let path = folder.path().join("a.pth");
    std::fs::write(&path, bytes).unwrap();
    let error = format!("{:#}", listed(&path).unwrap_err());
    assert!(error.contains("claims 2147483632 bytes, but the file ends before"), "{error}");
}

#[test]
fn block_numbers_beyond_all_counting_are_no_overflow() {
    let stored = Stored { number: globals::Number::F32, sizes: vec![1], start: 0 };
    let stage = BTreeMap::from([(format!("blocks.{}.a", usize::MAX), stored)]);
    let model = Config::parse("", &[]).unwrap().model;
    assert_eq!(Listing::Stages(vec![stage.clone(), stage]).blocks(&model), usize::MAX);
}

/// The config of a tiny model, and the pickle and storages of an official checkpoint that fits it.
fn tiny(folder: &TempDir) -> (Config, Vec<u8>, Vec<Vec<u8>>) {
    let run = format!("run.dir={:?}", folder.path().join("run"));
    let sets = [
        "model.image_size=8",
        "model.patch_size=4",
        "model.width=8",
        "model.heads=2",
        "model.classes=3",
        "model.depths=[1, 2]",
        "data.format=shapes",
        "data.train_images=8",
        "data.test_images=4",
        &run,
    ];
    let config = Config::parse("", &sets.map(String::from)).unwrap();
    let mut stages = vec![Vec::new(), Vec::new()];
    let mut storages = Vec::new();
    for parameter in config.model.parameters(config.model.depths()) {
        storages.push(vec![parameter.stage as u8 + 1; 4 * parameter.shape.iter().product::<i64>() as usize]);
        stages[parameter.stage].push((parameter.name, parameter.shape));
    }
    (config, stages_pickle(&stages), storages)
}

#[test]
fn a_thousand_mutated_checkpoints_are_imported_or_refused_in_one_line_and_nothing_else_happens() {
    let folder = tempfile::tempdir().unwrap();
    let (config, pickle, storages) = tiny(&folder);
    let intact = zipped(&pickle, &storages);
    let file = folder.path().join("mutated.pth");
    let attempt = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        let outcome = import(&config, &file, Choice::default());
        outcome.map(|path| std::fs::remove_file(path).unwrap())
    };
    attempt(&intact).unwrap();
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
        for bytes in [zipped(&mutate(&pickle), &storages), mutate(&intact)] {
            if let Err(error) = attempt(&bytes) {
                assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
                assert!(!format!("{error:#}").contains('\n'), "{error:#}");
                refused += 1;
            }
        }
    }
    assert!(refused > 1000, "of 2000 changed files, {refused} were refused");
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["mutated.pth", "run"]);
}

#[test]
fn our_own_artefact_of_another_image_size_is_imported_with_its_positions_resampled() {
    let folder = tempfile::tempdir().unwrap();
    let (config, pickle, storages) = tiny(&folder);
    let file = folder.path().join("official.pth");
    std::fs::write(&file, zipped(&pickle, &storages)).unwrap();
    let ours = import(&config, &file, as_role(Role::Final)).unwrap();
    let mut larger = config.clone();
    let Model::Vit(mut vit) = config.model.clone() else { unreachable!() };
    vit.image_size = 12;
    larger.model = Model::Vit(vit.clone());
    larger.run.dir = folder.path().join("larger");
    let path = import(&larger, &ours, as_role(Role::Assembled)).unwrap();
    let (before, after) = (artefact::read(&ours).unwrap(), artefact::read(&path).unwrap());
    assert_eq!((after.header.phase.as_str(), &after.header.model), ("assemble", &larger.model));
    for (name, tensor) in &after.weights {
        if name.1 == "pos_embed" {
            assert_eq!(tensor, &crate::family::vit::resample::positions(&before.weights[name], [3, 3]));
            assert_eq!(tensor.size(), [1, 10, 8]);
        } else {
            assert_eq!(tensor, &before.weights[name]);
        }
    }
    vit.mlp_ratio = 2.0;
    larger.model = Model::Vit(vit);
    larger.run.dir = folder.path().join("other");
    let error = import(&larger, &ours, Choice::default()).unwrap_err();
    assert!(format!("{error:#}").contains("in more than image_size"), "{error:#}");
}
