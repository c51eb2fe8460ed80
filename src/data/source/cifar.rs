//! Reads CIFAR-10 and CIFAR-100 in the binary version (cs.toronto.edu/~kriz/cifar.html). A record is one or two label bytes and
//! an image's three planes of 32 × 32 bytes.

use super::images::Images;
use crate::usage;
use anyhow::Result;
use std::path::Path;

/// The bytes of an image.
const PIXELS: usize = 3 * 32 * 32;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    Ten,
    Hundred,
}

/// Reads the training and the evaluation split from the folder of the unpacked files.
pub fn open(folder: &Path, variant: Variant) -> Result<(Images, Images)> {
    let (train, test): (Vec<String>, &str) = match variant {
        Variant::Ten => ((1..=5).map(|i| format!("data_batch_{i}.bin")).collect(), "test_batch.bin"),
        Variant::Hundred => (vec!["train.bin".into()], "test.bin"),
    };
    Ok((read(folder, &train, variant)?, read(folder, &[test.into()], variant)?))
}

fn read(folder: &Path, names: &[String], variant: Variant) -> Result<Images> {
    // In CIFAR-100 a coarse label comes before the fine label, and the fine label is the class.
    let label_bytes = if variant == Variant::Ten { 1 } else { 2 };
    let record = label_bytes + PIXELS;
    let mut images = Images { pixels: Vec::new(), labels: Vec::new(), channels: 3, size: 32 };
    for name in names {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).map_err(|e| {
            usage!("{}: {e}; data.path = {:?} must hold {}", path.display(), folder.display(), names.join(", "))
        })?;
        if bytes.is_empty() || bytes.len() % record != 0 {
            return Err(usage!(
                "{}: {} bytes are not whole records of {record}; the file is damaged, fetch it again",
                path.display(),
                bytes.len()
            ));
        }
        for record in bytes.chunks_exact(record) {
            images.labels.push(record[label_bytes - 1].into());
            images.pixels.extend(&record[label_bytes..]);
        }
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fine_label_of_cifar_100_is_taken_and_a_torn_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = vec![7, 42];
        record.resize(2 + PIXELS, 9);
        std::fs::write(folder.path().join("train.bin"), [record.clone(), record.clone()].concat()).unwrap();
        std::fs::write(folder.path().join("test.bin"), &record).unwrap();
        let (train, test) = open(folder.path(), Variant::Hundred).unwrap();
        assert_eq!((train.labels.len(), test.labels.len(), train.labels[1], train.image(1)[0]), (2, 1, 42, 9));
        std::fs::write(folder.path().join("test.bin"), &record[1..]).unwrap();
        let error = open(folder.path(), Variant::Hundred).unwrap_err().to_string();
        assert!(error.contains("test.bin") && error.contains("not whole records"), "{error}");
    }
}
