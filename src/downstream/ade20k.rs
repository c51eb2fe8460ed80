//! Computes ADE20K's metrics for semantic segmentation. They follow from pixel counts summed over all images, at the sizes of the
//! label maps.
//!
//! A label map is a PNG with values from 0 to 150. Pixels labelled 0, «other», are ignored, as with mmsegmentation's
//! `reduce_zero_label`. The PNG is grey with 8 bits, or has a palette of any bit depth, whose indices are the values. A grey PNG of
//! another depth is refused, because programs differ in whether they scale its values. A metric of a class may be undefined, such
//! as the IoU of a class without labels and predictions. mmsegmentation leaves such a class out of the mean, but the CSAIL
//! benchmark counts it as 0. The report gives both means.

use crate::data::image::decode::label_map::Labels;
use crate::svg;
use crate::{require, usage};
use anyhow::{Result, bail, ensure};
use serde::Serialize;
use std::fmt::Write;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

const CLASSES: usize = 150;
/// The largest number of pixels that a label map may have. It is several times that of the dataset's largest photograph.
const MOST_PIXELS: usize = 1 << 26;

/// The metrics of a folder of predictions. IoUs and accuracies are in percent.
#[derive(Debug, Serialize)]
pub struct Ade20kReport {
    pub images: usize,
    /// The number of pixels whose label is a class, not «other».
    pub pixels: u64,
    /// The percentage of these pixels whose prediction is right. 0 if there are no such pixels.
    #[serde(rename = "aAcc")]
    pub pixel_accuracy: f64,
    /// `mean_iou` and `mean_accuracy` are means over the classes for which the metric is defined.
    #[serde(rename = "mIoU")]
    pub mean_iou: f64,
    #[serde(rename = "mAcc")]
    pub mean_accuracy: f64,
    /// `mean_iou_of_all` and `mean_accuracy_of_all` are means over all 150 classes. A class for which the metric is undefined
    /// counts as 0.
    #[serde(rename = "mIoU150")]
    pub mean_iou_of_all: f64,
    #[serde(rename = "mAcc150")]
    pub mean_accuracy_of_all: f64,
    pub classes: Vec<Class>,
    #[serde(skip)]
    confusion: Confusion,
}

/// The metrics of one class. The classes are numbered as in the label maps. The IoU is none if the class has neither labels nor
/// predictions. The accuracy is none if the class has no labels.
#[derive(Debug, Serialize)]
pub struct Class {
    pub class: usize,
    pub iou: Option<f64>,
    pub accuracy: Option<f64>,
    pub pixels: u64,
}

/// The number of pixels for each pair of a label (row) and a prediction (column). Rows and columns begin with class 1. The last
/// column counts predictions of «other».
#[derive(Debug)]
struct Confusion(Vec<u64>);

/// Compares every label map in a folder with the prediction of the same name. Hidden files are no label maps.
///
/// If `zero_based` is true, the predictions number the classes from 0 and have no «other».
///
/// # Errors
/// A usage error if the folder has no label maps, or if a file is missing, malformed or too large. Also if a prediction has another
/// size than its label map, or if a file holds a class that does not exist. The error names the file or folder.
pub fn evaluate(labels: &Path, predictions: &Path, zero_based: bool) -> Result<Ade20kReport> {
    let files = label_maps(labels)?;
    let mut confusion = Confusion(vec![0; CLASSES * (CLASSES + 1)]);
    for file in &files {
        let label = ClassMap::read(file, 0, None)?;
        let prediction = ClassMap::read(&prediction_of(file, predictions), u8::from(zero_based), Some(label.size))?;
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

/// The path of the prediction for a label map. Both files have the same name, except that one may end in `.png` and the other in
/// `.PNG`.
fn prediction_of(label_map: &Path, predictions: &Path) -> PathBuf {
    let same_name = predictions.join(label_map.file_name().expect("a file of the folder has a name"));
    let other_endings = ["png", "PNG"].map(|ending| same_name.with_extension(ending));
    if same_name.exists() {
        same_name
    } else {
        other_endings.into_iter().find(|path| path.exists()).unwrap_or(same_name)
    }
}

/// The class of each pixel of an image. 0 is «other».
struct ClassMap {
    /// Width and height.
    size: (usize, usize),
    classes: Vec<u8>,
}

impl ClassMap {
    /// Reads a map and adds `shift` to its values, so that the first class is 1. Checks the size of the image before memory for its
    /// pixels is allocated.
    fn read(path: &Path, shift: u8, expected_size: Option<(usize, usize)>) -> Result<ClassMap> {
        let file = File::open(path).map_err(|e| usage!("{}: {e}", path.display()))?;
        let check = |height: usize, width: usize| check_size((width, height), expected_size);
        let read = Labels::read(BufReader::new(file), check);
        let Labels { height, width, labels: mut classes } =
            read.map_err(|error| usage!("{}: {error}", path.display()))?;
        let largest = CLASSES as u8 - shift;
        if let Some(pixel) = classes.iter().position(|&class| class > largest) {
            return Err(usage!(
                "{}: class {} at row {}, column {}; classes end at {largest}",
                path.display(),
                classes[pixel],
                pixel / width,
                pixel % width
            ));
        }
        classes.iter_mut().for_each(|class| *class += shift);
        Ok(ClassMap { size: (width, height), classes })
    }
}

/// Refuses a map with too many pixels, and a prediction whose size differs from the size of its label map.
fn check_size((width, height): (usize, usize), expected_size: Option<(usize, usize)>) -> Result<()> {
    ensure!(
        width.saturating_mul(height) <= MOST_PIXELS,
        "it claims {width}×{height} pixels; a label map has at most {MOST_PIXELS}"
    );
    if let Some(expected) = expected_size.filter(|&expected| expected != (width, height)) {
        bail!(
            "{width}×{height} pixels, but its labels have {}×{}; predictions are compared at the size of the labels",
            expected.0,
            expected.1
        );
    }
    Ok(())
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

    fn report(self, images: usize) -> Ade20kReport {
        let row = |class: usize| &self.0[class * (CLASSES + 1)..][..CLASSES + 1];
        let predicted = |class: usize| (0..CLASSES).map(|label| row(label)[class]).sum::<u64>();
        let percent = |part: u64, total: u64| (total > 0).then(|| 100.0 * part as f64 / total as f64);
        let classes: Vec<Class> = (0..CLASSES)
            .map(|class| {
                let (hits, pixels) = (row(class)[class], row(class).iter().sum::<u64>());
                let iou = percent(hits, pixels + predicted(class) - hits);
                Class { class: class + 1, iou, accuracy: percent(hits, pixels), pixels }
            })
            .collect();
        let hits: u64 = (0..CLASSES).map(|class| row(class)[class]).sum();
        let pixels = self.0.iter().sum();
        let means = |figure: fn(&Class) -> Option<f64>| {
            let figures: Vec<f64> = classes.iter().filter_map(figure).collect();
            let sum: f64 = figures.iter().sum();
            (sum / figures.len().max(1) as f64, sum / CLASSES as f64)
        };
        let ((mean_iou, mean_iou_of_all), (mean_accuracy, mean_accuracy_of_all)) =
            (means(|c| c.iou), means(|c| c.accuracy));
        Ade20kReport {
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

impl Ade20kReport {
    /// The metrics in percent, as text tables for people.
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

    /// An SVG of the confusion matrix: the number of pixels of each label (row) and prediction (column).
    pub fn plot(&self) -> String {
        let rows: Vec<&[u64]> = self.confusion.0.chunks(CLASSES + 1).collect();
        svg::matrix("ADE20K confusion", "predicted class", "labelled class", &rows)
    }
}
