//! Reads data sets of the MNIST family: IDX files, plain or gzipped (yann.lecun.com/exdb/mnist). A file begins with the bytes 0,
//! 0, 8 (which stands for u8 values) and the number of dimensions. The size of each dimension follows as a big-endian u32, and
//! then the values follow.

use super::images::Images;
use crate::{require, usage};
use anyhow::Result;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Reads the training and the evaluation split from a folder that holds the four files under their usual names.
pub fn open(folder: &Path) -> Result<(Images, Images)> {
    Ok((split(folder, "train")?, split(folder, "t10k")?))
}

fn split(folder: &Path, prefix: &str) -> Result<Images> {
    let (path, sizes, pixels) = read(folder, &format!("{prefix}-images-idx3-ubyte"), 3)?;
    let (label_path, counts, labels) = read(folder, &format!("{prefix}-labels-idx1-ubyte"), 1)?;
    require!(
        sizes[0] == counts[0],
        "{} holds {} images, but {} holds {} labels; fetch both files again",
        path.display(),
        sizes[0],
        label_path.display(),
        counts[0]
    );
    require!(
        sizes[1] == sizes[2],
        "{}: images of {}×{} are not square; store them as PNG files and set data.format = \"folder\"",
        path.display(),
        sizes[1],
        sizes[2]
    );
    Ok(Images { pixels, labels: labels.into_iter().map(u32::from).collect(), channels: 1, size: sizes[1] })
}

/// Reads a file of `rank` dimensions. Returns its path, the size of each dimension, and the values.
fn read(folder: &Path, name: &str, rank: usize) -> Result<(PathBuf, Vec<usize>, Vec<u8>)> {
    let plain = folder.join(name);
    let gzipped = folder.join(format!("{name}.gz"));
    let path = if plain.exists() { plain } else { gzipped };
    let file = File::open(&path).map_err(|e| {
        usage!("{}: {e}; data.path = {:?} must hold {name} or {name}.gz", path.display(), folder.display())
    })?;
    let bytes: Box<dyn Read> = if path.extension().is_some_and(|e| e == "gz") {
        Box::new(flate2::read::MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    };
    let (sizes, bytes) = parse(bytes, rank).map_err(|what| usage!("{}: {what}", path.display()))?;
    Ok((path, sizes, bytes))
}

/// Parses a file of `rank` dimensions, and returns the size of each dimension and the values. Allocates memory for the values
/// that the file holds, not for the sizes that its header claims.
fn parse(mut source: impl Read, rank: usize) -> Result<(Vec<usize>, Vec<u8>), String> {
    let broken = |e: std::io::Error| format!("cannot be read: {e}; the file is damaged, fetch it again");
    let mut header = vec![0; 4 + 4 * rank];
    source.read_exact(&mut header).map_err(broken)?;
    if header[..4] != [0, 0, 8, rank as u8] {
        return Err(format!("not an IDX file of bytes in {rank} dimensions (it begins with {:02x?})", &header[..4]));
    }
    let sizes: Vec<usize> =
        header[4..].chunks_exact(4).map(|c| u32::from_be_bytes([c[0], c[1], c[2], c[3]]) as usize).collect();
    let expected = sizes.iter().try_fold(1usize, |n, &size| n.checked_mul(size)).ok_or("its sizes overflow")?;
    let mut bytes = Vec::new();
    source.take(expected as u64 + 1).read_to_end(&mut bytes).map_err(broken)?;
    if bytes.len() != expected {
        let found = if bytes.len() < expected { format!("only {} follow", bytes.len()) } else { "more follow".into() };
        return Err(format!("its header promises {expected} bytes ({sizes:?}), but {found}; fetch it again"));
    }
    Ok((sizes, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idx(sizes: &[u32], bytes: usize) -> Vec<u8> {
        let mut file = vec![0, 0, 8, sizes.len() as u8];
        file.extend(sizes.iter().flat_map(|s| s.to_be_bytes()));
        file.extend((0..bytes).map(|i| i as u8));
        file
    }

    #[test]
    fn a_well_formed_file_is_read() {
        let (sizes, bytes) = parse(&idx(&[2, 3, 3], 18)[..], 3).unwrap();
        assert_eq!((sizes, bytes.len(), bytes[17]), (vec![2, 3, 3], 18, 17));
    }

    #[test]
    fn malformed_files_are_refused_with_their_fault() {
        let fault = |bytes: &[u8]| parse(bytes, 3).unwrap_err();
        assert!(fault(&idx(&[2, 3, 3], 17)).contains("only 17 follow"));
        assert!(fault(&idx(&[2, 3, 3], 19)).contains("more follow"));
        assert!(fault(&idx(&[2, 9], 18)).contains("not an IDX file"));
        assert!(fault(&[0, 0]).contains("cannot be read"));
        // For a header that claims more bytes than memory holds, no memory is allocated.
        assert!(fault(&idx(&[u32::MAX, 1000, 1000], 5)).contains("only 5 follow"));
        assert!(fault(&idx(&[u32::MAX, u32::MAX, u32::MAX], 5)).contains("overflow"));
    }
}
