//! ADE20K's figures for semantic segmentation: sums over the whole set, at the size of the label maps.
//!
//! Label maps are PNGs of 0 to 150, where 0 is «other» and ignored (as mmsegmentation's `reduce_zero_label`): grey ones of 8
//! bits, or palette images of any depth, of which the indices count. Grey ones of fewer bits are refused, because readers
//! scale their values. A class that appears in neither labels nor predictions is left out of the mean (mmsegmentation) or
//! counts as 0 (the CSAIL benchmark): both are given.

use crate::svg;
use crate::{require, usage};
use anyhow::Result;
use serde::Serialize;
use std::fmt::Write;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

const CLASSES: usize = 150;
/// Several times the largest photograph in the set.
const MOST_PIXELS: u64 = 1 << 26;

/// All figures in percent.
#[derive(Debug, Serialize)]
pub struct Report {
    pub images: usize,
    /// Pixels whose label is one of the classes.
    pub pixels: u64,
    /// Share of these pixels that were given their class.
    #[serde(rename = "aAcc")]
    pub pixel_accuracy: f64,
    /// Means over the classes that are there.
    #[serde(rename = "mIoU")]
    pub mean_iou: f64,
    #[serde(rename = "mAcc")]
    pub mean_accuracy: f64,
    /// Means over all 150 classes.
    #[serde(rename = "mIoU150")]
    pub mean_iou_of_all: f64,
    #[serde(rename = "mAcc150")]
    pub mean_accuracy_of_all: f64,
    pub classes: Vec<Class>,
    #[serde(skip)]
    confusion: Confusion,
}

/// One class, numbered as in the label maps; none where it is not there.
#[derive(Debug, Serialize)]
pub struct Class {
    pub class: usize,
    pub iou: Option<f64>,
    pub accuracy: Option<f64>,
    pub pixels: u64,
}

/// Pixels by label (row) and prediction (column; the last is «other»), from class 1 on.
#[derive(Debug)]
struct Confusion(Vec<u64>);

/// Compares every label map in a folder with the prediction of the same name.
///
/// `zero_based` predictions number the classes from 0 and have no «other».
///
/// # Errors
/// A usage error that names the file: missing, malformed, of another size, or with a class that does not exist.
pub fn evaluate(labels: &Path, predictions: &Path, zero_based: bool) -> Result<Report> {
    let files = label_maps(labels)?;
    let mut confusion = Confusion(vec![0; CLASSES * (CLASSES + 1)]);
    for file in &files {
        let label = Map::read(file, 0, None)?;
        let prediction = Map::read(&prediction_of(file, predictions), u8::from(zero_based), Some(label.size))?;
        confusion.add(&label.classes, &prediction.classes);
    }
    Ok(confusion.report(files.len()))
}

fn label_maps(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
    let entries = entries.map_err(|e| usage!("{}: {e}", folder.display()))?;
    let files = entries.into_iter().map(|entry| entry.path());
    let is_label_map = |path: &PathBuf| {
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        !is_hidden && path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png"))
    };
    let mut files: Vec<PathBuf> = files.filter(is_label_map).collect();
    require!(!files.is_empty(), "{}: it holds no .png label maps", folder.display());
    files.sort();
    Ok(files)
}

/// The prediction of the label map's name, whose ending may be `.png` where the label map's is `.PNG` or the reverse.
fn prediction_of(label_map: &Path, predictions: &Path) -> PathBuf {
    let same = predictions.join(label_map.file_name().expect("a file of the folder has a name"));
    let other_endings = ["png", "PNG"].map(|ending| same.with_extension(ending));
    if same.exists() { same } else { other_endings.into_iter().find(|path| path.exists()).unwrap_or(same) }
}

/// A label map: 0 is «other».
struct Map {
    /// Width and height.
    size: (u32, u32),
    classes: Vec<u8>,
}

impl Map {
    /// Reads a map whose first class is `1 - shift`, of the size that is expected. Sizes are checked before memory is taken.
    fn read(path: &Path, shift: u8, expected: Option<(u32, u32)>) -> Result<Map> {
        let broken = |what: String| usage!("{}: {what}", path.display());
        let file = File::open(path).map_err(|e| broken(e.to_string()))?;
        let mut decoder = png::Decoder::new(BufReader::new(file));
        // A palette only colours the classes: the indices are wanted.
        decoder.set_transformations(png::Transformations::IDENTITY);
        let mut reader = decoder.read_info().map_err(|e| broken(format!("not a readable PNG: {e}")))?;
        let info = reader.info();
        let size = info.size();
        let pixels = u64::from(size.0) * u64::from(size.1);
        require!(
            pixels <= MOST_PIXELS,
            "{}: it claims {}×{} pixels; a label map has at most {MOST_PIXELS}",
            path.display(),
            size.0,
            size.1
        );
        if let Some((width, height)) = expected {
            require!(
                size == (width, height),
                "{}: {}×{} pixels, but its labels have {width}×{height}; predictions are compared at the size of the labels",
                path.display(),
                size.0,
                size.1
            );
        }
        let (color, bits) = (info.color_type, info.bit_depth as usize);
        let is_label_map = match color {
            png::ColorType::Grayscale => bits == 8,
            png::ColorType::Indexed => true,
            _ => false,
        };
        require!(
            is_label_map,
            "{}: {color:?} of {bits} bits; a label map has one channel of 8 bits, or a palette",
            path.display()
        );
        let bytes = reader.output_buffer_size().ok_or_else(|| broken("too large".into()))?;
        let mut packed = vec![0; bytes];
        let frame = reader.next_frame(&mut packed).map_err(|e| broken(format!("not a readable PNG: {e}")))?;
        let mut classes = if bits == 8 { packed } else { unpacked(&packed, frame.line_size, size.0 as usize, bits) };
        let largest = CLASSES as u8 - shift;
        if let Some(at) = classes.iter().position(|&class| class > largest) {
            return Err(usage!(
                "{}: class {} at row {}, column {}; classes end at {largest}",
                path.display(),
                classes[at],
                at / size.0 as usize,
                at % size.0 as usize
            ));
        }
        classes.iter_mut().for_each(|class| *class += shift);
        Ok(Map { size, classes })
    }
}

/// The numbers of `bits` bits each, of which every line of `line_size` bytes begins with `width`, the first in the highest bits.
fn unpacked(packed: &[u8], line_size: usize, width: usize, bits: usize) -> Vec<u8> {
    let per_byte = 8 / bits;
    let number = |line: &[u8], x: usize| {
        let shift = 8 - bits * (x % per_byte + 1);
        (line[x / per_byte] >> shift) & (u8::MAX >> (8 - bits))
    };
    packed.chunks_exact(line_size).flat_map(|line| (0..width).map(move |x| number(line, x))).collect()
}

impl Confusion {
    fn add(&mut self, labels: &[u8], predictions: &[u8]) {
        for (&label, &prediction) in labels.iter().zip(predictions) {
            if label > 0 {
                let column = if prediction == 0 { CLASSES } else { usize::from(prediction) - 1 };
                self.0[(usize::from(label) - 1) * (CLASSES + 1) + column] += 1;
            }
        }
    }

    fn report(self, images: usize) -> Report {
        let row = |class: usize| &self.0[class * (CLASSES + 1)..][..CLASSES + 1];
        let predicted = |class: usize| (0..CLASSES).map(|label| row(label)[class]).sum::<u64>();
        let percent = |part: u64, whole: u64| (whole > 0).then(|| 100.0 * part as f64 / whole as f64);
        let classes: Vec<Class> = (0..CLASSES)
            .map(|class| {
                let (hits, pixels) = (row(class)[class], row(class).iter().sum::<u64>());
                let iou = percent(hits, pixels + predicted(class) - hits);
                Class { class: class + 1, iou, accuracy: percent(hits, pixels), pixels }
            })
            .collect();
        let hits: u64 = (0..CLASSES).map(|class| row(class)[class]).sum();
        let pixels = self.0.iter().sum();
        let means = |of: fn(&Class) -> Option<f64>| {
            let there: Vec<f64> = classes.iter().filter_map(of).collect();
            let sum: f64 = there.iter().sum();
            (sum / there.len().max(1) as f64, sum / CLASSES as f64)
        };
        let ((mean_iou, mean_iou_of_all), (mean_accuracy, mean_accuracy_of_all)) =
            (means(|c| c.iou), means(|c| c.accuracy));
        Report {
            images,
            pixels,
            pixel_accuracy: percent(hits, pixels).unwrap_or(0.0),
            mean_iou,
            mean_accuracy,
            mean_iou_of_all,
            mean_accuracy_of_all,
            classes,
            confusion: self,
        }
    }
}

impl Report {
    /// The tables for people.
    pub fn text(&self) -> String {
        let mut text = format!("ADE20K, {} images, percent\n", self.images);
        let _ = writeln!(text, "{:<34} {:>6} {:>6} {:>6}", "", "mIoU", "mAcc", "aAcc");
        let mut line = |name: &str, iou: f64, accuracy: f64| {
            let _ = writeln!(text, "{name:<34} {iou:>6.2} {accuracy:>6.2} {:>6.2}", self.pixel_accuracy);
        };
        line("classes that are there (mmseg)", self.mean_iou, self.mean_accuracy);
        line("all 150 classes (CSAIL)", self.mean_iou_of_all, self.mean_accuracy_of_all);
        let _ = writeln!(text, "\n{:<5} {:>6} {:>6} {:>12}", "class", "IoU", "Acc", "pixels");
        let percent = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.2}"));
        for class in &self.classes {
            let (iou, accuracy) = (percent(class.iou), percent(class.accuracy));
            let _ = writeln!(text, "{:<5} {iou:>6} {accuracy:>6} {:>12}", class.class, class.pixels);
        }
        text
    }

    /// Each label's pixels (row) by prediction (column).
    pub fn plot(&self) -> String {
        let rows: Vec<&[u64]> = self.confusion.0.chunks(CLASSES + 1).collect();
        svg::matrix("ADE20K confusion", "predicted class", "labelled class", &rows)
    }
}
