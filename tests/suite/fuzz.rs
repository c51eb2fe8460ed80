//! Ten thousand randomly damaged inputs: each is read or named, none takes the program down. The damage is drawn from fixed
//! seeds, so that a failure can be repeated.

use crate::drawn;
use crate::incubate::{ended, plain};
use incubate::config::{Config, Format};
use incubate::data::decode::Decoder;
use incubate::data::pixels::Region;
use incubate::data::samples::{Split, Stored};
use incubate::data::{Source, open_unchecked};
use incubate::error::{Failure, exit_code};
use incubate::random::Random;
use std::path::Path;

const EACH: u64 = 2500;

/// The same bytes with one to four faults: changed bits or bytes, a run of zeros, a piece cut out, doubled or put elsewhere,
/// the end missing.
fn damaged(whole: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = whole.to_vec();
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

/// Decodes an image whole, or says what is wrong with it.
fn decode(decoder: &mut Decoder, bytes: &[u8], stored: Stored) -> Result<(usize, usize), String> {
    let decoded = decoder.open(bytes, stored).and_then(|(height, width)| {
        decoder.view(bytes, Region { left: 0, top: 0, width, height }, 1).map(|view| (view.height, view.width))
    });
    decoded.map_err(|error| format!("{error:#}"))
}

fn decode_damaged(seed: u64, files: &[Vec<u8>]) {
    let mut decoder = Decoder::new().unwrap();
    let (mut read, mut named) = (0, 0);
    for number in 0..EACH {
        let mut random = Random::new(&[seed, number]);
        let bytes = damaged(&files[number as usize % files.len()], &mut random);
        match decode(&mut decoder, &bytes, Stored::Encoded) {
            Ok((height, width)) => {
                assert!(height > 0 && width > 0);
                read += 1;
            }
            Err(text) => {
                assert!(!text.is_empty());
                named += 1;
            }
        }
    }
    assert!(read > 0 && named > 0, "{read} read, {named} named: the damage is too small or too large to tell anything");
}

#[test]
fn a_damaged_jpeg_is_decoded_or_named() {
    let files: Vec<_> = (0..8).map(|i| drawn::jpeg(i, 0, 24 + 8 * i as usize, 40)).collect();
    decode_damaged(1, &files);
}

#[test]
fn a_damaged_png_is_decoded_or_named() {
    let files: Vec<_> = (0..8).map(|i| drawn::png(i, 0, 24 + 8 * i as usize, 40)).collect();
    decode_damaged(2, &files);
}

/// Opens a folder of stored images whatever model they are for.
fn open(folder: &Path, format: Format) -> anyhow::Result<Source> {
    let mut config = Config::parse("", &[]).unwrap();
    (config.data.format, config.data.path) = (format, folder.into());
    config.run.dir = Default::default();
    open_unchecked(&config)
}

fn stored(split: &Split) -> &dyn incubate::data::samples::Samples {
    match split {
        Split::Stored(samples) => samples.as_ref(),
        Split::Small(_) => unreachable!("these formats are stored"),
    }
}

#[test]
fn a_damaged_tar_is_read_or_named() {
    let folder = tempfile::tempdir().unwrap();
    let whole = drawn::tar(3, 0..6);
    std::fs::write(folder.path().join("val-0.tar"), &whole).unwrap();
    let tar = folder.path().join("train-0.tar");
    let mut decoder = Decoder::new().unwrap();
    let (mut opened, mut refused, mut bytes) = (0, 0, Vec::new());
    for number in 0..EACH {
        std::fs::write(&tar, damaged(&whole, &mut Random::new(&[3, number]))).unwrap();
        match open(folder.path(), Format::Tar) {
            Err(error) => {
                assert!(format!("{error:#}").contains("train-0.tar"), "{error:#}");
                assert_eq!(exit_code(&error), 2);
                refused += 1;
            }
            Ok(source) => {
                let train = stored(&source.train);
                for index in 0..train.len() {
                    let read = train.read(index, &mut bytes);
                    let _ = read.map(|stored| decode(&mut decoder, &bytes, stored));
                    assert!(train.name(index).contains("train-0.tar"));
                }
                opened += 1;
            }
        }
    }
    assert!(opened > 100 && refused > 100, "{opened} opened, {refused} refused");
}

#[test]
fn a_damaged_pack_never_gives_other_bytes_than_were_packed() {
    let folder = tempfile::tempdir().unwrap();
    let (images, pack) = (folder.path().join("images"), folder.path().join("pack"));
    drawn::folder(&images, 2, 4, 1);
    ended(plain(&["pack"]).args([&images, &pack]).output().unwrap()).ok();
    let shard = pack.join("train-00000.h5");
    let whole = std::fs::read(&shard).unwrap();
    let source = open(&pack, Format::Packed).unwrap();
    let read_all = |source: &Source| -> Vec<anyhow::Result<Vec<u8>>> {
        let train = stored(&source.train);
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
        let mut bytes = damaged(&whole, &mut random);
        if bytes == whole {
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
                assert!(read.iter().any(Result::is_err), "a changed file whose samples are all as they were");
                opened += 1;
            }
        }
    }
    assert!(opened > 100 && refused > 100, "{opened} opened, {refused} refused");
}
