//! Reads ten thousand randomly damaged inputs. Each is read, or refused with its name, and none crashes the program. The damage
//! comes from fixed seeds, so that a failure can be repeated.

use crate::drawn;
use crate::incubate::{ended, plain};
use incubate::config::{Config, Format};
use incubate::data::feed::reader::Reading;
use incubate::data::source::samples::{Samples, Split, Stored};
use incubate::data::{BadImages, Source, open_unchecked};
use incubate::error::{Failure, exit_code};
use incubate::random::Random;
use std::path::Path;
use std::sync::{Arc, LazyLock};

const EACH: u64 = 2500;

/// The bytes with one to four faults: a flipped bit, a changed byte, zeros, a piece removed or copied to another position, or the
/// end truncated.
fn damaged(intact: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = intact.to_vec();
    for _ in 0..1 + random.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.below(bytes.len());
        let piece = at..(at + 1 + random.below(64)).min(bytes.len());
        match random.below(8) {
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 | 3 => bytes[at] = random.below(256) as u8,
            4 => bytes[piece].fill(0),
            5 => drop(bytes.drain(piece)),
            6 => {
                let copy = bytes[piece].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// Files in memory.
struct Files {
    extension: &'static str,
    bytes: Vec<Vec<u8>>,
}

impl Samples for Files {
    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn label(&self, _index: usize) -> u32 {
        0
    }

    fn name(&self, index: usize) -> String {
        format!("damaged-{index}.{}", self.extension)
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> anyhow::Result<Stored> {
        bytes.clone_from(&self.bytes[index]);
        Ok(Stored::Encoded)
    }
}

const SIZE: usize = 48;

static CONFIG: LazyLock<Config> = LazyLock::new(|| Config::parse("", &[format!("model.image_size={SIZE}")]).unwrap());

/// Reads an image for evaluation and returns whether that succeeds. If not, the error must name the image and have this exit code.
fn is_read_or_named(split: &Split, index: usize, code: u8) -> bool {
    let mut out = [0.0; 3 * SIZE * SIZE];
    let mut reader = Reading::evaluation(&CONFIG, split, &Arc::new(BadImages::new(0))).reader();
    match reader.read_this(index, &Random::new(&[]), &mut out) {
        Ok(read) => assert!(read.is_some() && out.iter().all(|number| number.is_finite())),
        Err(error) => {
            let name = split.name(index);
            assert!(format!("{error:#}").starts_with(&name), "{name}: {error:#}");
            assert_eq!(exit_code(&error), code, "{error:#}");
            return false;
        }
    }
    true
}

/// Reads damaged files as evaluation and as training do. Evaluation must name each unreadable file, and training must skip it.
fn decode_damaged(seed: u64, extension: &'static str, files: &[Vec<u8>]) {
    let file = |number: u64| damaged(&files[number as usize % files.len()], &mut Random::new(&[seed, number]));
    let split: Split = Arc::new(Files { extension, bytes: (0..EACH).map(file).collect() });
    let is_read: Vec<bool> = (0..split.len()).map(|index| is_read_or_named(&split, index, 2)).collect();
    let read = is_read.iter().filter(|&&is_read| is_read).count();
    assert!(read > 0 && read < is_read.len(), "{read} read: the damage is too small or too large for this test");

    let bad = Arc::new(BadImages::new(split.len()));
    let mut reader = Reading::training(&CONFIG, &split, &bad).reader();
    let (mut out, mut trained) = ([0.0; 3 * SIZE * SIZE], 0);
    for key in 0..4 {
        for index in 0..split.len() {
            let read = reader.read_this(index, &Random::new(&[key, index as u64]), &mut out).unwrap();
            assert!(out.iter().all(|number| number.is_finite()));
            trained += usize::from(read.is_some());
        }
    }
    let skipped = bad.count();
    assert!(trained >= 4 * (split.len() - skipped) && skipped > 0, "{trained} trained, {skipped} skipped");
    // An image that cannot be read is replaced by the next readable image.
    for index in 0..split.len() {
        assert_eq!(reader.read(index, &Random::new(&[index as u64]), &mut out).unwrap(), 0);
    }
}

#[test]
fn a_damaged_jpeg_is_decoded_or_named() {
    let files: Vec<_> = (0..8).map(|i| drawn::jpeg(i, 0, 24 + 8 * i as usize, 40)).collect();
    decode_damaged(1, "jpg", &files);
}

#[test]
fn a_damaged_png_is_decoded_or_named() {
    let files: Vec<_> = (0..8).map(|i| drawn::png(i, 0, 24 + 8 * i as usize, 40)).collect();
    decode_damaged(2, "png", &files);
}

/// Opens a folder of stored images without checking that they fit the config's model.
fn open(folder: &Path, format: Format) -> anyhow::Result<Source> {
    let mut config = Config::parse("", &[]).unwrap();
    (config.data.format, config.data.path) = (format, folder.into());
    config.run.dir = Default::default();
    open_unchecked(&config)
}

#[test]
fn a_damaged_tar_is_read_or_named() {
    let folder = tempfile::tempdir().unwrap();
    let intact = drawn::tar(3, 0..6);
    std::fs::write(folder.path().join("val-0.tar"), &intact).unwrap();
    let tar = folder.path().join("train-0.tar");
    let (mut opened, mut refused, mut read, mut named) = (0, 0, 0, 0);
    for number in 0..EACH {
        std::fs::write(&tar, damaged(&intact, &mut Random::new(&[3, number]))).unwrap();
        match open(folder.path(), Format::Tar) {
            Err(error) => {
                assert!(format!("{error:#}").contains("train-0.tar"), "{error:#}");
                assert_eq!(exit_code(&error), 2);
                refused += 1;
            }
            Ok(source) => {
                for index in 0..source.train.len() {
                    assert!(source.train.name(index).contains("train-0.tar: "));
                    match is_read_or_named(&source.train, index, 2) {
                        true => read += 1,
                        false => named += 1,
                    }
                }
                opened += 1;
            }
        }
    }
    assert!(opened > 100 && refused > 100 && read > 100 && named > 20, "{opened}, {refused}, {read}, {named}");
}

#[test]
fn a_damaged_pack_never_gives_other_bytes_than_were_packed() {
    let folder = tempfile::tempdir().unwrap();
    let (images, pack) = (folder.path().join("images"), folder.path().join("pack"));
    drawn::folder(&images, 2, 4, 1);
    ended(plain(&["pack"]).args([&images, &pack]).output().unwrap()).ok();
    let shard = pack.join("train-00000.h5");
    let intact = std::fs::read(&shard).unwrap();
    let source = open(&pack, Format::Packed).unwrap();
    let read_all = |source: &Source| -> Vec<anyhow::Result<Vec<u8>>> {
        let train = &source.train;
        let read = |index| {
            let mut bytes = Vec::new();
            train.read(index, &mut bytes).map(|_| bytes)
        };
        (0..train.len()).map(read).collect()
    };
    let good: Vec<Vec<u8>> = read_all(&source).into_iter().map(Result::unwrap).collect();
    let (mut opened, mut refused) = (0, 0);
    for number in 0..EACH {
        let mut random = Random::new(&[4, number]);
        let mut bytes = damaged(&intact, &mut random);
        if bytes == intact {
            bytes[0] ^= 1;
        }
        std::fs::write(&shard, &bytes).unwrap();
        match open(&pack, Format::Packed) {
            Err(error) => {
                assert!(matches!(error.downcast_ref(), Some(Failure::Damaged { .. })), "{error:#}");
                assert!(format!("{error:#}").contains("train-00000.h5"), "{error:#}");
                refused += 1;
            }
            Ok(source) => {
                let read = read_all(&source);
                assert!(
                    read.iter().zip(&good).all(|(read, good)| read.as_ref().is_ok_and(|r| r == good) || read.is_err())
                );
                let damaged = read.iter().position(Result::is_err).expect("a change lies in a sample");
                assert!(!is_read_or_named(&source.train, damaged, 3));
                opened += 1;
            }
        }
    }
    assert!(opened > 100 && refused > 100, "{opened} opened, {refused} refused");
}
