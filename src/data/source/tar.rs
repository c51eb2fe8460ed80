//! Tar shards in webdataset's naming: `train-*.tar` and `val-*.tar`, or folders `train` and `val` of tars. In each, the
//! members of a sample follow each other and share their path up to the first dot of the file name: `KEY.jpg`, `KEY.jpeg`
//! or `KEY.png`, and `KEY.cls` (the label as text) or `KEY.json` (the label as `label` or `cls`). Other members are passed
//! over.
//!
//! Headers alone are read to build the index; samples are then read at their places, by all threads at the same time.

use super::index::{Cache, Index, fingerprint, sample_length};
use super::names::Names;
use super::open_files::OpenFiles;
use super::samples::{Samples, Stored};
use crate::{require, usage};
use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

const BLOCK: u64 = 512;
/// No label takes more.
const LARGEST_LABEL: u64 = 1 << 20;

/// The samples of one split.
#[derive(Debug)]
pub struct TarShards {
    index: Index,
    files: OpenFiles,
}

/// Opens both splits. `cache` is where their indexes are kept.
pub fn open(root: &Path, cache: Option<&Cache>) -> Result<(TarShards, TarShards)> {
    let split = |name: &str| TarShards::open(root, name, cache.map(|cache| cache.split(name)).as_ref());
    Ok((split("train")?, split("val")?))
}

/// Whether a folder holds tars of training images.
pub fn is_there(root: &Path) -> bool {
    tars(root, "train").is_ok()
}

impl TarShards {
    /// Indexes the tars of a split, or takes the index kept at `cache`.
    ///
    /// # Errors
    /// A usage error that names the tar and member if one is damaged, unsafe or has no label.
    pub fn open(root: &Path, split: &str, cache: Option<&Cache>) -> Result<TarShards> {
        let tars = tars(root, split)?;
        let index = Index::cached(
            cache,
            // A tar that came or went shows in the list; the folder itself may change for other reasons.
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

/// The tars of a split in order of name, relative to `root`.
fn tars(root: &Path, split: &str) -> Result<Names> {
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
    require!(
        !found.is_empty(),
        "{}: no tars of the split \"{split}\"; data.path must hold {split}-*.tar or a folder {split} of tars",
        root.display()
    );
    found.sort();
    let mut names = Names::default();
    for path in found {
        names.push(path.strip_prefix(root).expect("found below it").as_os_str().as_bytes())?;
    }
    Ok(names)
}

fn build(root: &Path, tars: Names) -> Result<Index> {
    let scanned: Vec<Vec<Sample>> = (0..tars.len())
        .into_par_iter()
        .map(|tar| {
            let path = root.join(tars.path(tar));
            scan(&path).map_err(|error| usage!("{}: {error:#}", path.display()))
        })
        .collect::<Result<_>>()?;
    let mut index = Index { groups: tars, ..Index::default() };
    for (tar, samples) in scanned.into_iter().enumerate() {
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

struct Sample {
    member: Vec<u8>,
    label: u32,
    offset: u64,
    length: u32,
}

/// What is known of the sample whose members are being read.
#[derive(Default)]
struct Partial {
    key: Vec<u8>,
    image: Option<(Vec<u8>, u64, u32)>,
    label: Option<u32>,
}

impl Partial {
    fn finish(self, samples: &mut Vec<Sample>) -> Result<()> {
        match (self.image, self.label) {
            (Some((member, offset, length)), Some(label)) => samples.push(Sample { member, label, offset, length }),
            (Some((member, ..)), None) => {
                bail!("{}: no .cls or .json with its label beside it; each image needs one", member.escape_ascii())
            }
            (None, Some(_)) => {
                bail!("{}: a label without an image (.jpg, .jpeg or .png) beside it", self.key.escape_ascii())
            }
            (None, None) => {}
        }
        Ok(())
    }
}

/// The samples of one tar, in its order.
fn scan(path: &Path) -> Result<Vec<Sample>> {
    let file = File::open(path)?;
    let file_length = file.metadata()?.len();
    let mut archive = tar::Archive::new(&file);
    let mut samples = Vec::new();
    let mut partial = Partial::default();
    let mut end = 0;
    for entry in archive.entries_with_seek()? {
        let mut entry = entry.with_context(|| format!("damaged after byte {end}"))?;
        let member = entry.path_bytes().into_owned();
        let at = entry.raw_file_position();
        end = at.saturating_add(entry.size()).saturating_add(BLOCK - 1) / BLOCK * BLOCK;
        let context = || format!("member {}", member.escape_ascii());
        ensure!(end <= file_length, "truncated: {} ends at byte {end} of {file_length}; fetch it again", context());
        require_inside(&member).with_context(context)?;
        if let Some(target) = entry.link_name_bytes() {
            // A symbolic link is relative to its own folder, a hard link to the tar's.
            let symbolic = entry.header().entry_type().is_symlink();
            let folder = Path::new(OsStr::from_bytes(&member)).parent().filter(|_| symbolic).unwrap_or(Path::new(""));
            require_inside(folder.join(OsStr::from_bytes(&target)).as_os_str().as_bytes()).with_context(context)?;
        }
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let Some((key, extension)) = key(&member) else { continue };
        if key != partial.key {
            std::mem::take(&mut partial).finish(&mut samples)?;
            partial.key = key.into();
        }
        match extension.to_ascii_lowercase().as_slice() {
            b"jpg" | b"jpeg" | b"png" => {
                ensure!(partial.image.is_none(), "{}: a second image of the same sample", context());
                let length = sample_length(entry.size()).with_context(context)?;
                partial.image = Some((member, at, length));
            }
            kind @ (b"cls" | b"json") => {
                ensure!(entry.size() <= LARGEST_LABEL, "{} claims {} bytes of label", context(), entry.size());
                let mut text = String::new();
                entry.read_to_string(&mut text).with_context(context)?;
                // A .json may describe the image without saying its class, which a .cls then does.
                let label = if kind == b"cls" { Some(number(&text)) } else { label_in_json(&text) };
                if let Some(label) = label {
                    partial.label = Some(label.with_context(context)?);
                }
            }
            _ => {}
        }
    }
    partial.finish(&mut samples)?;
    ensure!(end + BLOCK <= file_length, "truncated: its end mark is missing after byte {end}; fetch it again");
    Ok(samples)
}

/// A member's path up to the first dot of its file name, and what follows that dot.
fn key(member: &[u8]) -> Option<(&[u8], &[u8])> {
    let name = member.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    let dot = name + member[name..].iter().position(|&byte| byte == b'.')?;
    Some((&member[..dot], &member[dot + 1..]))
}

/// Members are never unpacked; one that would leave its folder still says that nobody sane made this tar.
fn require_inside(member: &[u8]) -> Result<()> {
    let mut depth = 0;
    let inside = Path::new(OsStr::from_bytes(member)).components().all(|part| {
        depth += match part {
            Component::Normal(_) => 1,
            Component::CurDir => 0,
            Component::ParentDir => -1,
            Component::RootDir | Component::Prefix(_) => i64::MIN / 2,
        };
        depth >= 0
    });
    ensure!(inside, "its path leaves the tar's folder; this tar is not to be trusted");
    Ok(())
}

fn number(text: &str) -> Result<u32> {
    let text = text.trim();
    text.parse()
        .ok()
        .with_context(|| format!("its label {:?} is no class number from 0", text.chars().take(40).collect::<String>()))
}

/// The label, if the JSON has one.
fn label_in_json(text: &str) -> Option<Result<u32>> {
    let value: serde_json::Value = match serde_json::from_str(text) {
        Ok(value) => value,
        Err(error) => return Some(Err(error.into())),
    };
    let label = value.get("label").or_else(|| value.get("cls"))?;
    Some(number(label.as_str().unwrap_or(&label.to_string())))
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
    fn samples_of_all_shards_are_read_at_their_places_and_other_members_passed_over() {
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
        let cache = Cache { path: root.path().join("val.index"), keep: true };
        for _ in 0..2 {
            let val = TarShards::open(root.path(), "val", Some(&cache)).unwrap();
            let mut bytes = Vec::new();
            let mut read = |i| {
                assert_eq!(val.read(i, &mut bytes).unwrap(), Stored::Encoded);
                (val.label(i), String::from_utf8(bytes.clone()).unwrap())
            };
            let found: Vec<_> = (0..val.len()).map(&mut read).collect();
            assert_eq!(found, [(7, "one".into()), (3, "two".into()), (1, "three".into())]);
            assert!(val.name(1).ends_with("val/0.tar: a/2.PNG"), "{}", val.name(1));
            assert!(cache.path.exists());
        }
    }

    #[test]
    fn a_tar_that_is_cut_anywhere_is_refused() {
        let whole = tar(&[("1.jpg", &[5; 700]), ("1.cls", b"0"), ("2.jpg", &[6; 10]), ("2.cls", b"1")]);
        assert_eq!(opened(&whole).unwrap().len(), 2);
        for keep in (0..whole.len() - 1024).step_by(97) {
            assert!(opened(&whole[..keep]).is_err(), "{keep} of {} bytes", whole.len());
        }
        refused(&whole[..whole.len() - 1024], &["truncated", "end mark"]);
    }

    #[test]
    fn what_no_honest_tar_holds_is_refused_by_name() {
        let label: (&str, &[u8]) = ("1.cls", b"0");
        refused(&tar(&[("1.jpg", b"x")]), &["1.jpg", "no .cls or .json"]);
        refused(&tar(&[label]), &["label without an image"]);
        refused(&tar(&[("1.jpg", b"x"), ("1.png", b"x"), label]), &["1.png", "a second image"]);
        refused(&tar(&[("1.jpg", b"x"), ("1.cls", b"cat")]), &["1.cls", "\"cat\"", "no class number"]);
        refused(&tar(&[("1.jpg", b"x"), ("1.cls", b"-1")]), &["no class number"]);
        refused(&tar(&[("1.jpg", b"x"), ("1.json", b"{")]), &["1.json"]);
        // The builder refuses to write these names, so they are put in by hand.
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
