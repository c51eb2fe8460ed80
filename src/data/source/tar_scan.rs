//! Lists the samples of one tar from the headers and labels of its members.

use super::index::sample_length;
use crate::stop;
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};

/// The size of a tar's block in bytes. Members begin and end at multiples of this size.
const BLOCK: u64 = 512;
/// The size of the largest .cls or .json file that is read, in bytes.
const LARGEST_LABEL: u64 = 1 << 20;

/// An image in a tar, with its label.
pub struct Sample {
    /// The path of the image within the tar.
    pub member: Vec<u8>,
    pub label: u32,
    /// The offset of the image's bytes in the tar.
    pub offset: u64,
    /// The length of the image in bytes.
    pub length: u32,
}

/// The sample whose members are being read.
#[derive(Default)]
struct Partial {
    /// The path of the sample's members up to the first dot of the file name.
    key: Vec<u8>,
    /// The path of the image within the tar, and the offset and the length of its bytes.
    image: Option<(Vec<u8>, u64, u32)>,
    /// The label, and the path of the member that holds it.
    label: Option<(u32, Vec<u8>)>,
    /// A member that does not count as the image, because its name has another dot before the extension, such as `photo.0.jpg`.
    dotted: Option<Vec<u8>>,
}

impl Partial {
    /// Adds a member if it is an image or a label. `extension` is the part of its name after the first dot, in lower case.
    fn add(&mut self, member: Vec<u8>, extension: &[u8], entry: &mut tar::Entry<&File>) -> Result<()> {
        match extension {
            _ if is_image(extension) => {
                let context = || format!("member {}", member.escape_ascii());
                ensure!(self.image.is_none(), "{}: the sample has a second image; remove one", context());
                let length = sample_length(entry.size()).with_context(context)?;
                self.image = Some((member, entry.raw_file_position(), length));
                Ok(())
            }
            b"cls" | b"json" => self.add_label(member, extension, entry),
            _ => {
                if is_image(extension.rsplit(|&byte| byte == b'.').next().unwrap_or_default()) {
                    self.dotted.get_or_insert(member);
                }
                Ok(())
            }
        }
    }

    /// Adds the label in a .cls or .json file. A .json file may lack the label, because a .cls file may hold the label.
    fn add_label(&mut self, member: Vec<u8>, extension: &[u8], entry: &mut tar::Entry<&File>) -> Result<()> {
        let context = || format!("member {}", member.escape_ascii());
        ensure!(
            entry.size() <= LARGEST_LABEL,
            "{} claims {} bytes of label, more than any label has; write the class number into it",
            context(),
            entry.size()
        );
        let mut text = String::new();
        entry.read_to_string(&mut text).with_context(context)?;
        let label = if extension == b"cls" { Some(number(&text)) } else { label_in_json(&text) };
        let Some(label) = label.transpose().with_context(context)? else { return Ok(()) };
        if let Some((other, other_member)) = &self.label {
            ensure!(
                *other == label,
                "{} says label {label}, but {} says {other}; correct one or remove it",
                context(),
                other_member.escape_ascii()
            );
        }
        self.label = Some((label, member));
        Ok(())
    }

    /// Adds the sample to `samples`. Fails if the sample has an image without a label, or a label without an image. Also fails if
    /// its only image has another dot before the extension. Does nothing if the sample has neither image nor label.
    fn finish(self, samples: &mut Vec<Sample>) -> Result<()> {
        match (self.image, self.label) {
            (Some((member, offset, length)), Some((label, _))) => {
                samples.push(Sample { member, label, offset, length })
            }
            (Some((member, ..)), None) => {
                bail!("{}: no .cls or .json beside the image has its label; add one", member.escape_ascii())
            }
            (None, _) if self.dotted.is_some() => {
                bail!(
                    "{}: a sample's key ends at the first dot of the file name, so this image belongs to no sample; rename it \
                     and its label without dots before the extension",
                    self.dotted.unwrap_or_default().escape_ascii()
                )
            }
            (None, Some(_)) => {
                bail!(
                    "{}: a label without an image (.jpg, .jpeg or .png) beside it; add the image",
                    self.key.escape_ascii()
                )
            }
            (None, None) => {}
        }
        Ok(())
    }
}

/// Lists the samples of one tar in order. Also returns the number of hidden members, which are ignored.
pub fn scan(path: &Path) -> Result<(Vec<Sample>, usize)> {
    // A pipe is refused before it is opened, because opening it would wait for a writer.
    ensure!(std::fs::metadata(path)?.is_file(), "it is not a regular file");
    let file = File::open(path)?;
    let file_length = file.metadata()?.len();
    require_uncompressed(&file)?;
    let mut archive = tar::Archive::new(&file);
    // In the output of `cat a.tar b.tar`, the end mark of the first tar is in the middle. The samples after this mark count too.
    archive.set_ignore_zeros(true);
    let mut hidden = 0;
    let mut samples = Vec::new();
    let mut partial = Partial::default();
    let mut end = 0;
    for entry in archive.entries_with_seek()? {
        let mut entry = entry.with_context(|| format!("damaged after byte {end}"))?;
        let member = entry.path_bytes().into_owned();
        stop::check("reading the headers of tars")?;
        end = end_of_member(&member, &mut entry, file_length)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        if is_hidden(&member) {
            hidden += 1;
            continue;
        }
        let Some((key, extension)) = key(&member) else { continue };
        if key != partial.key {
            std::mem::take(&mut partial).finish(&mut samples)?;
            partial.key = key.into();
        }
        let extension = extension.to_ascii_lowercase();
        partial.add(member, &extension, &mut entry)?;
    }
    partial.finish(&mut samples)?;
    ensure!(end + BLOCK <= file_length, "truncated: its end mark is missing after byte {end}; fetch it again");
    Ok((samples, hidden))
}

/// Checks a member, and returns the offset of the first block after the member.
fn end_of_member(member: &[u8], entry: &mut tar::Entry<&File>, file_length: u64) -> Result<u64> {
    let sparse = entry.header().entry_type().is_gnu_sparse() || has_sparse_header(entry)?;
    ensure!(!sparse, "member {}: it is stored sparse; write the tar without --sparse", member.escape_ascii());
    let end = entry.raw_file_position().saturating_add(entry.size()).saturating_add(BLOCK - 1) / BLOCK * BLOCK;
    let context = || format!("member {}", member.escape_ascii());
    ensure!(end <= file_length, "truncated: {} ends at byte {end} of {file_length}; fetch it again", context());
    require_inside(member).with_context(context)?;
    if let Some(target) = entry.link_name_bytes() {
        // The target of a symbolic link is relative to the link's folder, but the target of a hard link is relative to the root
        // of the tar.
        let symbolic = entry.header().entry_type().is_symlink();
        let folder = Path::new(OsStr::from_bytes(member)).parent().filter(|_| symbolic).unwrap_or(Path::new(""));
        require_inside(folder.join(OsStr::from_bytes(&target)).as_os_str().as_bytes()).with_context(context)?;
    }
    Ok(end)
}

/// Whether a file with this lower-case extension is an image.
fn is_image(extension: &[u8]) -> bool {
    matches!(extension, b"jpg" | b"jpeg" | b"png")
}

/// Whether the name of a member, or of a folder in its path, begins with a dot, such as the `._` files that macOS adds.
fn is_hidden(member: &[u8]) -> bool {
    member.split(|&byte| byte == b'/').any(|part| part.starts_with(b".") && !matches!(part, b"." | b".."))
}

/// Whether the extended headers of POSIX (pax) say that a member is stored sparse.
fn has_sparse_header(entry: &mut tar::Entry<&File>) -> Result<bool> {
    let Some(mut extensions) = entry.pax_extensions()? else { return Ok(false) };
    Ok(extensions.any(|extension| extension.is_ok_and(|extension| extension.key_bytes().starts_with(b"GNU.sparse."))))
}

/// Refuses a compressed tar, because its images could not be read at their offsets.
fn require_uncompressed(file: &File) -> Result<()> {
    let mut magic = [0; 6];
    let length = file.read_at(&mut magic, 0)?;
    let compressions: [(&[u8], &str, &str); 4] = [
        (b"\x1f\x8b", "gzip", "gunzip"),
        (b"BZh", "bzip2", "bunzip2"),
        (b"\xfd7zXZ\0", "xz", "unxz"),
        (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    ];
    match compressions.iter().find(|(start, ..)| magic[..length].starts_with(start)) {
        Some((_, name, program)) => bail!("it is compressed with {name}; unpack it with {program}"),
        None => Ok(()),
    }
}

/// A member's path up to the first dot of its file name, and the rest after this dot. None if the file name has no dot.
fn key(member: &[u8]) -> Option<(&[u8], &[u8])> {
    let name = member.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    let dot = name + member[name..].iter().position(|&byte| byte == b'.')?;
    Some((&member[..dot], &member[dot + 1..]))
}

/// Fails if the path of a member or of a link's target leaves the tar's folder. Members are never unpacked, but a tar with such a
/// path cannot be trusted.
fn require_inside(path: &[u8]) -> Result<()> {
    let mut depth = 0;
    let inside = Path::new(OsStr::from_bytes(path)).components().all(|part| {
        depth += match part {
            Component::Normal(_) => 1,
            Component::CurDir => 0,
            Component::ParentDir => -1,
            Component::RootDir | Component::Prefix(_) => i64::MIN / 2,
        };
        depth >= 0
    });
    ensure!(inside, "its path leaves the tar's folder; do not trust this tar");
    Ok(())
}

fn number(text: &str) -> Result<u32> {
    let text = text.trim();
    text.parse().ok().with_context(|| {
        format!("its label {:?} is not a class number; give 0, 1, …", text.chars().take(40).collect::<String>())
    })
}

/// The label in the text of a .json file. None if the text has no label.
fn label_in_json(text: &str) -> Option<Result<u32>> {
    let value: serde_json::Value = match serde_json::from_str(&standard_json(text)) {
        Ok(value) => value,
        Err(error) => return Some(Err(error.into())),
    };
    let label = value.get("label").or_else(|| value.get("cls"))?;
    Some(number(label.as_str().unwrap_or(&label.to_string())))
}

/// Makes JSON conform to the standard. Removes the byte order mark that Windows programs write. Python writes the numbers NaN,
/// Infinity and -Infinity, which JSON does not have. Each of these numbers becomes null.
fn standard_json(text: &str) -> String {
    let text = text.trim_start_matches('\u{feff}');
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let word = ["NaN", "-Infinity", "Infinity"].into_iter().find(|word| !in_string && rest.starts_with(word));
        out.push_str(word.map_or(&rest[..character.len_utf8()], |_| "null"));
        rest = &rest[word.map_or(character.len_utf8(), str::len)..];
        in_string ^= character == '"' && !escaped;
        escaped = in_string && character == '\\' && !escaped;
    }
    out
}
