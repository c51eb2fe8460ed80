//! Reads tar shards in the layout of webdataset: `train-*.tar` and `val-*.tar`, or folders `train` and `val` of tars (or
//! `validation` or `test` in place of `val`). The members of a sample follow one another in the tar and share a key, the path up
//! to the first dot of the file name. A sample has an image, `KEY.jpg`, `KEY.jpeg` or `KEY.png`, and its label: the number in
//! `KEY.cls`, or the value of `label` or `cls` in `KEY.json`. Other members are ignored. But if a sample has only an image such as
//! `KEY.0.jpg`, this is an error.
//!
//! The index is built from the members' headers and labels. Afterwards many threads may read images at the same time, directly
//! from the tars at their offsets.

use super::index::{Index, IndexFile, IndexFolder, fingerprint};
use super::names::Names;
use super::open_files::OpenFiles;
use super::samples::{Samples, Stored};
use super::splits::{TRAINING, evaluation_split};
use super::tar_scan::{Sample, scan};
use crate::error::Failure;
use crate::{require, usage};
use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The samples of one split.
#[derive(Debug)]
pub struct TarShards {
    index: Index,
    files: OpenFiles,
}

/// Opens the training and the evaluation split. If `indexes` is given, the indexes of the splits are kept in this folder.
///
/// # Errors
/// A usage error if a split has no tars, or if there are several evaluation splits. Also if a tar is damaged or has a path that
/// leaves the tar's folder, or if a sample lacks its image or its label.
pub fn open(root: &Path, indexes: Option<&IndexFolder>) -> Result<(TarShards, TarShards)> {
    let split = |name: &str| TarShards::open(root, name, indexes.map(|indexes| indexes.file(name)).as_ref());
    let training = split(TRAINING)?;
    Ok((training, split(evaluation_split(root, |name| Ok(!find(root, name)?.is_empty()))?)?))
}

/// Whether a folder holds tars of training images.
pub fn has_training_tars(root: &Path) -> bool {
    find(root, TRAINING).is_ok_and(|tars| !tars.is_empty())
}

impl TarShards {
    /// Indexes the tars of a split. Reads the index from the file `kept` instead, if the tars have not changed since the file was
    /// written.
    ///
    /// # Errors
    /// A usage error if the split has no tars. Also if a tar is damaged or has a path that leaves the tar's folder, or if a sample
    /// lacks its image or its label.
    pub fn open(root: &Path, split: &str, kept: Option<&IndexFile>) -> Result<TarShards> {
        let tars = tars(root, split)?;
        let index = Index::cached(
            kept,
            // The fingerprint alone would not notice a new tar: if a tar is added to the split's folder, the stamps of `root` and
            // of the other tars stay the same. So the list of tars is compared too.
            |groups| {
                ensure!(*groups == tars, "the list of tars has changed");
                fingerprint(root, groups)
            },
            || {
                let before = fingerprint(root, &tars)?;
                Ok((build(root, tars.clone())?, before))
            },
        )?;
        let files = OpenFiles::new((0..tars.len()).map(|tar| root.join(tars.path(tar))).collect());
        Ok(TarShards { index, files })
    }
}

impl Samples for TarShards {
    fn len(&self) -> usize {
        self.index.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.index.label[index]
    }

    fn name(&self, index: usize) -> String {
        let tar = self.files.path(self.index.group[index] as usize);
        format!("{}: {}", tar.display(), self.index.names.get(index).escape_ascii())
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        let (tar, offset) = (self.index.group[index] as usize, self.index.offset[index]);
        self.files.read(tar, offset, self.index.length[index] as usize, bytes)?;
        Ok(Stored::Encoded)
    }
}

/// The paths of a split's tars relative to `root`, in order.
fn tars(root: &Path, split: &str) -> Result<Names> {
    let found = find(root, split)?;
    require!(
        !found.is_empty(),
        "{}: no tars of the split \"{split}\"; data.path must hold {split}-*.tar or a folder {split} of tars",
        root.display()
    );
    let mut names = Names::default();
    for path in found {
        names.push(path.strip_prefix(root).expect("it is below the root").as_os_str().as_bytes())?;
    }
    Ok(names)
}

/// The paths of a split's tars in order. If `root` has a folder with the split's name, the tars are in this folder. Otherwise the
/// tars are in `root`, and their names begin with the split's name and `-`. Hidden tars are left out.
fn find(root: &Path, split: &str) -> Result<Vec<PathBuf>> {
    let inside = root.join(split);
    let (folder, prefix) =
        if inside.is_dir() { (inside, String::new()) } else { (root.to_path_buf(), format!("{split}-")) };
    let entries = std::fs::read_dir(&folder).map_err(|e| usage!("{}: {e}; check data.path", folder.display()))?;
    let mut found: Vec<PathBuf> = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()
        .with_context(|| format!("{}", folder.display()))?
        .into_iter()
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().as_bytes();
            name.starts_with(prefix.as_bytes()) && name.ends_with(b".tar") && !name.starts_with(b".")
        })
        .collect();
    found.sort();
    Ok(found)
}

/// Scans the tars on all threads, and makes the index of their samples.
fn build(root: &Path, tars: Names) -> Result<Index> {
    let scanned: Vec<(Vec<Sample>, usize)> = (0..tars.len())
        .into_par_iter()
        .map(|tar| {
            let path = root.join(tars.path(tar));
            scan(&path).map_err(|error| Failure::at(&path, error))
        })
        .collect::<Result<_>>()?;
    let hidden: usize = scanned.iter().map(|(_, hidden)| hidden).sum();
    if hidden > 0 {
        log::warn!("{}: {hidden} hidden members of its tars (names that begin with a dot) are ignored", root.display());
    }
    let mut index = Index { groups: tars, ..Index::default() };
    for (tar, (samples, _)) in scanned.into_iter().enumerate() {
        for sample in samples {
            index.names.push(&sample.member)?;
            index.group.push(tar as u32);
            index.label.push(sample.label);
            index.offset.push(sample.offset);
            index.length.push(sample.length);
        }
    }
    Ok(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = ::tar::Builder::new(Vec::new());
        for (name, bytes) in members {
            let mut header = ::tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            builder.append_data(&mut header, name, *bytes).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn opened(bytes: &[u8]) -> Result<TarShards> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("train-000.tar"), bytes).unwrap();
        TarShards::open(folder.path(), "train", None)
    }

    #[track_caller]
    fn refused(bytes: &[u8], words: &[&str]) {
        let error = opened(bytes).map(|_| ()).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 2);
        for word in ["train-000.tar"].iter().chain(words) {
            assert!(format!("{error:#}").contains(word), "{word:?} in {error:#}");
        }
    }

    #[test]
    fn samples_of_all_shards_are_read_at_their_offsets_and_other_members_ignored() {
        let root = tempfile::tempdir().unwrap();
        let long = format!("{}/n01.x.jpg", "deep".repeat(60));
        let first = tar(&[
            ("a/1.cls", b"7\n"),
            ("a/1.jpg", b"one"),
            ("a/1.txt", b"a caption"),
            ("README", b"about"),
            ("a/2.PNG", b"two"),
            ("a/2.json", br#"{"label": 3, "url": "x"}"#),
        ]);
        std::fs::create_dir(root.path().join("val")).unwrap();
        std::fs::write(root.path().join("val/0.tar"), first).unwrap();
        let n01 = long.replace(".x.jpg", ".cls");
        std::fs::write(root.path().join("val/1.tar"), tar(&[(&n01, b"1"), (&n01.replace("cls", "jpeg"), b"three")]))
            .unwrap();
        let kept = IndexFile { path: root.path().join("val.index"), may_write: true };
        for _ in 0..2 {
            let val = TarShards::open(root.path(), "val", Some(&kept)).unwrap();
            let mut bytes = Vec::new();
            let mut read = |i| {
                assert_eq!(val.read(i, &mut bytes).unwrap(), Stored::Encoded);
                (val.label(i), String::from_utf8(bytes.clone()).unwrap())
            };
            let found: Vec<_> = (0..val.len()).map(&mut read).collect();
            assert_eq!(found, [(7, "one".into()), (3, "two".into()), (1, "three".into())]);
            assert!(val.name(1).ends_with("val/0.tar: a/2.PNG"), "{}", val.name(1));
            assert!(kept.path.exists());
        }
    }

    #[test]
    fn the_evaluation_split_may_have_any_of_its_three_names_but_only_one() {
        let root = tempfile::tempdir().unwrap();
        let one = tar(&[("1.jpg", b"x"), ("1.cls", b"0")]);
        let write = |name: &str| std::fs::write(root.path().join(name), &one).unwrap();
        write("train-0.tar");
        for name in ["val-0.tar", "validation-0.tar", "test-0.tar"] {
            write(name);
            assert_eq!(open(root.path(), None).unwrap().1.len(), 1);
            std::fs::remove_file(root.path().join(name)).unwrap();
        }
        write("validation-0.tar");
        write("test-0.tar");
        let error = open(root.path(), None).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("validation and test"), "{error}");
    }

    #[test]
    fn a_key_with_dots_a_second_label_and_a_compressed_tar_are_refused_by_name() {
        let zero: &[u8] = b"0";
        refused(&tar(&[("photo.0.jpg", b"x"), ("photo.0.cls", zero)]), &["photo.0.jpg", "first dot", "rename"]);
        // `1.seg.png`, such as a label map, is ignored, because the sample has an image already.
        assert_eq!(opened(&tar(&[("1.jpg", b"x"), ("1.seg.png", b"y"), ("1.cls", zero)])).unwrap().len(), 1);
        let disagreeing = [("1.cls", zero), ("1.jpg", b"x"), ("1.json", br#"{"label": 1}"#)];
        refused(&tar(&disagreeing), &["1.json", "label 1", "1.cls says 0"]);
        for (magic, name) in [("\x1f\u{8b}", "gzip"), ("BZh9", "bzip2")] {
            let magic: Vec<u8> = magic.chars().map(|character| character as u8).collect();
            refused(&[magic, vec![7; 1024]].concat(), &[name, "unpack"]);
        }
        let folder = tempfile::tempdir().unwrap();
        let holes = std::fs::File::create(folder.path().join("1.jpg")).unwrap();
        std::os::unix::fs::FileExt::write_at(&holes, b"x", 1 << 20).unwrap();
        for format in ["gnu", "posix"] {
            let mut program = std::process::Command::new("tar");
            program.args(["--create", "--sparse", "--format", format, "--directory"]).arg(folder.path()).arg("1.jpg");
            refused(&program.output().unwrap().stdout, &["1.jpg", "sparse"]);
        }
    }

    #[test]
    fn concatenated_tars_hidden_members_and_the_json_of_other_programs_are_read() {
        let one = tar(&[("./._1.jpg", b"macOS"), ("./1.jpg", b"x"), ("./._1.cls", b"macOS"), ("./1.cls", b"0")]);
        let json = "\u{feff}{\"score\": NaN, \"low\": -Infinity, \"text\": \"a \\\"NaN\", \"label\": 1}";
        let two = tar(&[("2.jpg", b"y"), ("2.json", json.as_bytes())]);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("train-000.tar"), [one, two].concat()).unwrap();
        let both = TarShards::open(folder.path(), "train", None).unwrap();
        assert_eq!((both.label(0), both.label(1), both.len()), (0, 1, 2));
        let mut bytes = Vec::new();
        both.read(1, &mut bytes).unwrap();
        assert_eq!(bytes, b"y");
    }

    #[test]
    fn a_truncated_tar_is_refused() {
        let whole = tar(&[("1.jpg", &[5; 700]), ("1.cls", b"0"), ("2.jpg", &[6; 10]), ("2.cls", b"1")]);
        assert_eq!(opened(&whole).unwrap().len(), 2);
        for keep in (0..whole.len() - 1024).step_by(97) {
            assert!(opened(&whole[..keep]).is_err(), "{keep} of {} bytes", whole.len());
        }
        refused(&whole[..whole.len() - 1024], &["truncated", "end mark"]);
    }

    #[test]
    fn a_malicious_or_malformed_tar_is_refused_by_name() {
        let label: (&str, &[u8]) = ("1.cls", b"0");
        refused(&tar(&[("1.jpg", b"x")]), &["1.jpg", "no .cls or .json"]);
        refused(&tar(&[label]), &["label without an image"]);
        refused(&tar(&[("1.jpg", b"x"), ("1.png", b"x"), label]), &["1.png", "a second image"]);
        refused(&tar(&[("1.jpg", b"x"), ("1.cls", b"cat")]), &["1.cls", "\"cat\"", "not a class number"]);
        refused(&tar(&[("1.jpg", b"x"), ("1.cls", b"-1")]), &["not a class number"]);
        refused(&tar(&[("1.jpg", b"x"), ("1.json", b"{")]), &["1.json"]);
        // The tar builder refuses these names, so the test itself writes the names into the header.
        for name in ["../../etc/1.jpg", "/etc/1.jpg"] {
            refused(
                &with_header(|header| header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes())),
                &[name, "leaves"],
            );
        }
        for (kind, link) in [("Symlink", "../../etc"), ("Symlink", "/etc/passwd"), ("Link", "../1.jpg")] {
            let bytes = with_header(|header| {
                header.set_size(0);
                header.set_entry_type(if kind == "Link" { ::tar::EntryType::Link } else { ::tar::EntryType::Symlink });
                header.set_path("a/1.jpg").unwrap();
                header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
            });
            refused(&bytes, &["a/1.jpg", "leaves"]);
        }
        let folder = with_header(|header| {
            header.set_size(0);
            header.set_entry_type(::tar::EntryType::Directory);
            header.as_old_mut().name[..6].copy_from_slice(b"../../");
        });
        refused(&folder, &["../../", "leaves"]);
        refused(&with_header(|header| header.set_size(1 << 40)), &["truncated"]);
        refused(&with_header(|header| header.set_size(u64::MAX)), &["damaged"]);
        refused(b"no tar at all, but long enough to hold a header".repeat(20).as_slice(), &["damaged"]);
    }

    fn with_header(change: impl FnOnce(&mut ::tar::Header)) -> Vec<u8> {
        let mut header = ::tar::Header::new_gnu();
        header.set_size(3);
        change(&mut header);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(4096, 0);
        bytes
    }
}
