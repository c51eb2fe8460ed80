//! Shows people what a model sees in images: the likeliest classes of an image, a class for each of its pixels, or objects.

use super::evaluate::{network, task_of};
use super::seen::{Prediction, Share};
use super::{objects, results};
use crate::coco::objects::Scene;
use crate::config::{Config, IGNORED, TaskKind};
use crate::data::feed::objects::{ObjectReader, ObjectReading};
use crate::data::feed::pairs::{PairReader, PairReading};
use crate::data::feed::reader::{Reader, Reading};
use crate::data::image::pixels::View;
use crate::data::{Source, files};
use crate::model::Network;
use crate::store::artefact::{self, Header};
use crate::store::durable;
use crate::svg::bars::{Bar, Bars, Part};
use crate::svg::chart::Colour;
use crate::svg::{Picture, colour};
use crate::task::Task;
use crate::usage;
use crate::weights::upload;
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// The largest number of likely classes that a prediction names.
const BEST: usize = 5;
/// The largest number of classes or objects that the key of a picture names.
const NAMED: usize = 40;
/// The largest number of test images of which a run keeps pictures.
const KEPT: usize = 4;
/// The largest width, in pixels, of each half of a picture that compares predictions with annotations.
const HALF: usize = 480;

/// Predicts the image files in `images` with the artefact `weights`, and writes a picture of each prediction into the folder
/// `into`.
pub fn predict(
    config: &Config,
    weights: &Path,
    device: Device,
    images: &[PathBuf],
    into: &Path,
) -> Result<Vec<Prediction>> {
    let source = files::open(images)?;
    let seer = Seer::new(config, weights, device, &source)?;
    let mut reader = seer.reader();
    std::fs::create_dir_all(into).map_err(|e| usage!("{}: {e}; give another folder by --into", into.display()))?;
    let mut names = BTreeSet::new();
    let mut all = Vec::new();
    for (index, image) in images.iter().enumerate() {
        let title = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (picture, classes) = seer.see(&mut reader, index, &title)?;
        let stem = image.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut name = stem.clone();
        // Images in different folders may have the same name.
        for number in 2.. {
            if names.insert(name.clone()) {
                break;
            }
            name = format!("{stem}-{number}");
        }
        let file = into.join(format!("{name}.png"));
        durable::replace_bytes(&file, &picture.png())?;
        all.push(Prediction { image: image.clone(), picture: file, classes });
    }
    Ok(all)
}

/// Writes pictures of a few test images into a folder. Each picture shows the predictions of the model `weights` beside the
/// annotations. Writes none for classification.
pub fn compare(config: &Config, weights: &Path, device: Device, source: &Source, into: &Path) -> Result<()> {
    let seer = Seer::new(config, weights, device, source)?;
    let mut reader = seer.reader();
    std::fs::create_dir_all(into).with_context(|| into.display().to_string())?;
    let images = source.test.len();
    for number in 0..images.min(KEPT) {
        let index = number * images / images.min(KEPT);
        let compared = match &mut reader {
            ImageReader::OfClasses(_) => None,
            ImageReader::WithMaps(reader) => seer.compare_maps(reader, index)?,
            ImageReader::WithObjects(reader) => seer.compare_objects(reader, index)?,
        };
        let Some((halves, shares, words)) = compared else { continue };
        let halves = halves.map(|half| half.at_most(HALF));
        let both = halves[0].beside(&halves[1]).legible();
        let name = source.test.name(index);
        let name = Path::new(&name).file_name().unwrap_or_default().to_string_lossy();
        let key = seer.key(&format!("{name}: {words}"), &shares);
        durable::replace_bytes(&into.join(format!("{number}.png")), &both.above(&key).png())?;
    }
    Ok(())
}

/// A picture of the predictions and a picture of the annotations, the entries of their key, and a caption of both pictures.
type Compared = ([Picture; 2], Vec<Share>, &'static str);

/// Reads images as a network of the task takes them.
enum ImageReader {
    OfClasses(Reader),
    WithMaps(PairReader),
    WithObjects(ObjectReader),
}

/// A model, and the images for which it predicts.
struct Seer<'a> {
    config: Config,
    header: Header,
    network: Network,
    source: &'a Source,
}

impl<'a> Seer<'a> {
    fn new(config: &Config, weights: &Path, device: Device, source: &'a Source) -> Result<Seer<'a>> {
        let artefact = artefact::read(weights)?;
        let config = config.of_task(task_of(&artefact.header));
        let header = artefact.header.clone();
        let network = network(&config, artefact, (weights, &[]), device)?;
        Ok(Seer { config, header, network, source })
    }

    /// Compares the predicted classes of an image's pixels with the labels; none if the image is unreadable.
    fn compare_maps(&self, reader: &mut PairReader, index: usize) -> Result<Option<Compared>> {
        let (images_1chw, labels_1hw) = reader.evaluate(index)?;
        if images_1chw[0].size()[0] == 0 {
            return Ok(None);
        }
        let photo = picture(reader.photo());
        let (predicted, labels) = (self.map(&images_1chw, &labels_1hw)?, bytes(&labels_1hw));
        // Predictions on pixels without a label are not shown.
        let bare: Vec<u8> = predicted.iter().zip(&labels).map(|(&p, &l)| if l == IGNORED { l } else { p }).collect();
        let halves = [&bare, &labels].map(|classes| photo.painted(classes, |class| class == IGNORED));
        Ok(Some((halves, self.shares(&[bare, labels].concat()), "prediction, labels")))
    }

    /// Compares the detected objects of an image with the annotated objects; none if the image is unreadable.
    fn compare_objects(&self, reader: &mut ObjectReader, index: usize) -> Result<Option<Compared>> {
        let (images_1chw, labels) = reader.evaluate(index)?;
        if images_1chw[0].size()[0] == 0 {
            return Ok(None);
        }
        let seen = objects::shown(&self.infer(&images_1chw, &labels)?[0]);
        let photo = picture(reader.photo());
        let annotated = objects::mark_annotated(&photo, &results::scene(&labels))?;
        let shares = objects::shares(&seen, |class| self.class_name(class));
        Ok(Some(([objects::mark_detected(&photo, &seen), annotated], shares, "detected objects, annotated objects")))
    }

    /// The picture of an image's prediction under `title`, and the classes or objects that the model sees in the image.
    fn see(&self, reader: &mut ImageReader, index: usize, title: &str) -> Result<(Picture, Vec<Share>)> {
        match reader {
            ImageReader::OfClasses(reader) => {
                let (photo, classes) = self.best(reader, index)?;
                Ok((photo.legible().above(&ranking(title, &classes)), classes))
            }
            ImageReader::WithMaps(reader) => {
                let images_1chw = reader.image_alone(index)?;
                let photo = picture(reader.photo());
                let size_1hw = Tensor::zeros([1, photo.height as i64, photo.width as i64], (Kind::Uint8, Device::Cpu));
                let classes = self.map(&images_1chw, &size_1hw)?;
                let shares = self.shares(&classes);
                let picture = photo.painted(&classes, |_| false).legible();
                Ok((picture.above(&self.key(title, &shares)), shares))
            }
            ImageReader::WithObjects(reader) => {
                let images_1chw = reader.image_alone(index)?;
                let photo = picture(reader.photo());
                let scene = Scene { image: index, size: [photo.height, photo.width], objects: Vec::new() };
                let labels = Tensor::from_slice(&scene.to_row()).unsqueeze(0);
                let seen = objects::shown(&self.infer(&images_1chw, &labels)?[0]);
                let shares = objects::shares(&seen, |class| self.class_name(class));
                let picture = objects::mark_detected(&photo, &seen).legible();
                Ok((picture.above(&self.key(title, &shares)), shares))
            }
        }
    }

    /// The name of a class, as the artefact records it.
    fn class_name(&self, class: usize) -> String {
        self.header.class_names.get(class).cloned().unwrap_or_else(|| format!("class {class}"))
    }

    fn reader(&self) -> ImageReader {
        let (config, Source { test, bad, .. }) = (&self.config, self.source);
        match config.task {
            TaskKind::Classification => ImageReader::OfClasses(Reading::evaluation(config, test, bad).reader()),
            TaskKind::Segmentation => ImageReader::WithMaps(PairReading::new(config, test, bad).reader()),
            TaskKind::Detection => ImageReader::WithObjects(ObjectReading::new(config, test, bad).reader()),
        }
    }

    /// An image as it is stored, and its likeliest classes.
    fn best(&self, reader: &mut Reader, index: usize) -> Result<(Picture, Vec<Share>)> {
        let model = &self.config.model;
        let [channels, side] = [model.channels(), model.image_size()];
        let mut pixels = vec![0.0; channels * side * side];
        reader.image_alone(index, &mut pixels)?;
        let photo = picture(reader.photo());
        let image_bchw = Tensor::from_slice(&pixels).view([1, channels as i64, side as i64, side as i64]);
        let outputs = self.infer(&[image_bchw], &Tensor::zeros([1], (Kind::Int64, Device::Cpu)))?;
        let probabilities = outputs[0].to_kind(Kind::Float).softmax(1, Kind::Float).view(-1);
        let (values, classes) = probabilities.topk(BEST.min(model.classes()) as i64, 0, true, true);
        let both = Vec::<f32>::try_from(&values)?.into_iter().zip(Vec::<i64>::try_from(&classes)?);
        let share = |(value, class): (f32, i64)| {
            let class = class as usize;
            Share { class, name: self.class_name(class), percent: 100.0 * f64::from(value), bbox: None }
        };
        Ok((photo, both.map(share).collect()))
    }

    /// The class of each pixel of an image, at the size of `labels_1hw`. `images_1chw` is the image at each scale of the
    /// evaluation.
    fn map(&self, images_1chw: &[Tensor], labels_1hw: &Tensor) -> Result<Vec<u8>> {
        Ok(bytes(&self.infer(images_1chw, labels_1hw)?[0]))
    }

    fn infer(&self, images_bchw: &[Tensor], labels: &Tensor) -> Result<Vec<Tensor>> {
        let task = Task::of(&self.config);
        let images: Vec<Tensor> = images_bchw.iter().map(|images| upload(images, self.network.options().1)).collect();
        tch::no_grad(|| task.infer(&self.network, &images, labels))
    }

    /// The classes that occur, each with its share of the pixels that have a class, the largest share first.
    fn shares(&self, classes: &[u8]) -> Vec<Share> {
        let mut counts = [0usize; IGNORED as usize];
        classes.iter().filter(|&&class| class != IGNORED).for_each(|&class| counts[usize::from(class)] += 1);
        let all = counts.iter().sum::<usize>().max(1) as f64;
        let mut there: Vec<(usize, usize)> = counts.into_iter().enumerate().filter(|(_, count)| *count > 0).collect();
        there.sort_by_key(|(class, count)| (std::cmp::Reverse(*count), *class));
        let name = |class| self.config.segmentation.class_name(class);
        let share =
            |(class, count)| Share { class, name: name(class), percent: 100.0 * count as f64 / all, bbox: None };
        there.into_iter().map(share).collect()
    }

    /// The key to the colours of a picture, as SVG.
    fn key(&self, title: &str, shares: &[Share]) -> String {
        let part = |share: &Share| Part {
            name: format!("{} {:.1} %", share.name, share.percent),
            colour: Colour::Own(colour(share.class as u8)),
            // Paler than the class's own colour, because the colours over the photograph are half transparent.
            strength: 0.75,
        };
        Bars { title: title.into(), parts: shares.iter().take(NAMED).map(part).collect(), bars: Vec::new() }.svg()
    }
}

/// A chart of the probabilities of an image's likeliest classes, as SVG.
fn ranking(title: &str, classes: &[Share]) -> String {
    let bar = |share: &Share| Bar {
        name: share.name.clone(),
        // The second part fills each bar up to 100 %, so that the bars of all images have the same scale.
        parts: vec![share.percent, 100.0 - share.percent],
        label: format!("{:.1} %", share.percent),
    };
    let part = |name: &str, strength| Part { name: name.into(), colour: Colour::Incubation, strength };
    let parts = vec![part("probability", 1.0), part("rest", 0.12)];
    Bars { title: title.into(), parts, bars: classes.iter().map(bar).collect() }.svg()
}

fn bytes(classes: &Tensor) -> Vec<u8> {
    Vec::try_from(classes.to_device(Device::Cpu).contiguous().view(-1)).expect("a map of classes holds bytes")
}

/// The pixels of a view as a picture.
fn picture(View { bytes, channels, width, height, .. }: View) -> Picture {
    let pixels = bytes.chunks_exact(channels).take(height * width);
    Picture { width, height, rgb: pixels.map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect() }
}
