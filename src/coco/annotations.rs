//! Reads COCO's annotations (cocodataset.org, `instances_*.json`). For training, the rules of detectron2's `load_coco_json` decide
//! which objects are read. For an evaluation, all objects of the listed images are read.

use super::json::{
    self, Field, Flag, Id, NUMBER_OR_TEXT, StoredCategory, at_entry, check_ids, needed, positions, refusal,
};
use super::objects::{Object, Outline, Scene};
use super::polygons::is_polygon;
use anyhow::Result;
use hotcoco::Segmentation;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::path::Path;

/// Why annotations are read. This decides which objects are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Only objects from which a network can learn. No crowds are read. With masks, only objects with a valid polygon are read.
    /// Without masks, only objects whose box has an area are read.
    Training,
    /// All objects of the listed images.
    Evaluation,
}

/// The content of an annotation file.
#[derive(Debug)]
pub struct Annotations {
    /// The id and name of each category in the order of the ids, which is the order of the classes.
    pub categories: Vec<(Id, String)>,
    /// The images in the order of their ids. pycocotools evaluates images in this order.
    pub images: Vec<AnnotatedImage>,
}

/// An image that the file lists.
#[derive(Debug)]
pub struct AnnotatedImage {
    pub id: Id,
    /// The path of the image below the folder of the split.
    pub file_name: String,
    /// The image's objects, and its size as the file states it.
    pub scene: Scene,
}

#[derive(Deserialize)]
struct StoredDataset<'a> {
    images: Option<Vec<StoredImage>>,
    /// The JSON text of each entry. Several threads parse the entries later.
    #[serde(borrow)]
    annotations: Option<Vec<&'a RawValue>>,
    categories: Option<Vec<StoredCategory>>,
}

#[derive(Deserialize)]
struct StoredImage {
    id: Field<Id>,
    file_name: Field<String>,
    width: Field<u32>,
    height: Field<u32>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object with the fields of an annotation")]
struct StoredObject<'a> {
    image_id: Field<Id>,
    category_id: Field<Id>,
    bbox: Field<[f64; 4]>,
    area: Field<f64>,
    iscrowd: Field<Flag>,
    #[serde(borrow)]
    segmentation: Option<&'a RawValue>,
}

/// Reads an annotation file. The outlines of the objects are read only if `masks` is true.
///
/// # Errors
/// A usage error that names the file, if the file cannot be read or parsed, or lists no images or no categories. If an entry is
/// malformed or its category is not listed, the error also names the entry.
pub fn read(file: &Path, purpose: Purpose, masks: bool) -> Result<Annotations> {
    let bytes = json::read(file)?;
    let dataset = json::parse(file, &bytes, b'{')?;
    Annotations::of(dataset, purpose, masks).map_err(|what| refusal(file, &what))
}

impl Annotations {
    fn of(dataset: StoredDataset, purpose: Purpose, masks: bool) -> Result<Annotations, String> {
        let categories = json::categories(dataset.categories)?;
        let (ids, mut images): (Vec<Id>, Vec<AnnotatedImage>) =
            images(dataset.images.unwrap_or_default())?.into_iter().unzip();
        let entries = dataset.annotations.ok_or("has no list `annotations`; add the objects of its images")?;
        let reader = ObjectReader {
            images: positions(ids.iter()),
            classes: positions(categories.keys()),
            sizes: images.iter().map(|image| image.scene.size).collect(),
            purpose,
            masks,
        };
        let objects: Vec<Result<Entry, String>> = entries.par_iter().map(|text| reader.read(text.get())).collect();
        let mut unlisted = 0;
        for (entry, object) in objects.into_iter().enumerate() {
            match object.map_err(|what| at_entry("annotations", entry, &what))? {
                Entry::Of(image, object) => images[image].scene.objects.push(object),
                Entry::OfUnlistedImage => unlisted += 1,
                Entry::NotForTraining => {}
            }
        }
        if unlisted > 0 {
            log::warn!("{unlisted} annotations are ignored, because their images are not listed");
        }
        Ok(Annotations { categories: categories.into_iter().collect(), images })
    }
}

/// The listed images by their ids. If two entries have the same id, the later entry counts, as in pycocotools.
fn images(entries: Vec<StoredImage>) -> Result<BTreeMap<Id, AnnotatedImage>, String> {
    let mut images = BTreeMap::new();
    for (entry, image) in entries.into_iter().enumerate() {
        let named = |what: String| at_entry("images", entry, &what);
        let id = needed(image.id, "id", NUMBER_OR_TEXT).map_err(named)?;
        let file_name = needed(image.file_name, "file_name", "a text").map_err(named)?;
        let height = needed(image.height, "height", "a whole number").map_err(named)? as usize;
        let width = needed(image.width, "width", "a whole number").map_err(named)? as usize;
        // The source of the images sets the image's number later.
        let scene = Scene { image: 0, size: [height, width], objects: Vec::new() };
        images.insert(id.clone(), AnnotatedImage { id, file_name, scene });
    }
    check_ids("images", images.keys())?;
    Ok(images)
}

/// The result of reading one entry of the list `annotations`.
enum Entry {
    /// An object to keep, with the position of its image.
    Of(usize, Object),
    OfUnlistedImage,
    NotForTraining,
}

/// Reads entries of the list `annotations`.
struct ObjectReader<'a> {
    /// The position of each image.
    images: BTreeMap<&'a Id, u64>,
    /// The class of each category.
    classes: BTreeMap<&'a Id, u64>,
    /// The height and width of each image.
    sizes: Vec<[usize; 2]>,
    purpose: Purpose,
    masks: bool,
}

impl ObjectReader<'_> {
    fn read(&self, text: &str) -> Result<Entry, String> {
        let stored: StoredObject = serde_json::from_str(text).map_err(|e| format!("is not an annotation: {e}"))?;
        let image = needed(stored.image_id, "image_id", NUMBER_OR_TEXT)?;
        let category = needed(stored.category_id, "category_id", NUMBER_OR_TEXT)?;
        let Some(&image) = self.images.get(&image) else { return Ok(Entry::OfUnlistedImage) };
        let Some(&class) = self.classes.get(&category) else {
            return Err(format!(
                "has the category_id {category}, which `categories` do not list; add the category, or remove the annotation"
            ));
        };
        let bbox = needed(stored.bbox, "bbox", "four finite numbers; give left, top, width and height in pixels")?;
        let (is_crowd, is_training) = (json::is_crowd(&stored.iscrowd)?, self.purpose == Purpose::Training);
        let area = match json::valid(stored.area) {
            Some(area) => area,
            None if is_training => bbox[2] * bbox[3],
            None => return Err("has no number as its area, by which an evaluation sorts it; add the area".into()),
        };
        let has_no_pixels = bbox[2] <= 0.0 || bbox[3] <= 0.0;
        if is_training && (is_crowd || has_no_pixels && !self.masks) {
            return Ok(Entry::NotForTraining);
        }
        let image = image as usize;
        let outline = match stored.segmentation.filter(|_| self.masks) {
            Some(text) => self.outline(text.get(), self.sizes[image])?,
            None if self.masks && !is_training => {
                return Err("has no segmentation; set detection.masks = false to evaluate boxes alone".into());
            }
            None => Outline::None,
        };
        if is_training && self.masks && outline == Outline::None {
            return Ok(Entry::NotForTraining);
        }
        Ok(Entry::Of(image, Object { class: class as usize, bbox, area, is_crowd, outline }))
    }

    /// The outline of an object in an image of this height and width. [`Outline::None`] if the object has polygons but no valid
    /// polygon.
    fn outline(&self, text: &str, [height, width]: [usize; 2]) -> Result<Outline, String> {
        let stored: Segmentation =
            serde_json::from_str(text).map_err(|e| format!("has a segmentation that cannot be read: {e}"))?;
        let Some(code) = stored.rle_ref() else {
            let polygons = stored.polygons().unwrap_or_default().into_owned();
            let polygons: Vec<Vec<f64>> = polygons.into_iter().filter(|polygon| is_polygon(polygon)).collect();
            return Ok(if polygons.is_empty() { Outline::None } else { Outline::Polygons(polygons) });
        };
        if self.purpose == Purpose::Training {
            return Err(
                "has a run-length code as its segmentation, but training reads polygons; convert it to polygons, set \
                        iscrowd = 1, or set detection.masks = false"
                    .into(),
            );
        }
        let runs = code.to_rle().map_err(|e| format!("has a run-length code that cannot be decoded: {e}"))?;
        if [runs.h as usize, runs.w as usize] != [height, width] {
            return Err(format!(
                "has a run-length code of {}×{} pixels, but its image has {width}×{height}; make them of one size",
                runs.w, runs.h
            ));
        }
        Ok(Outline::Runs(runs.counts))
    }
}

#[cfg(test)]
mod tests;
