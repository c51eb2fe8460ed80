//! Reads COCO's two files, annotations and results, for the evaluation.
//!
//! pycocotools evaluates images in the order of their ids. So this module replaces the id of each image and category by its
//! position in the order of the ids. If an entry lacks a field that the evaluation needs, the error names the entry.

pub use crate::coco::json::Id;
use crate::coco::json::{
    self, Field, Flag, NUMBER_OR_TEXT, StoredCategory, at_entry, check_ids, needed, positions, refusal, valid,
};
use anyhow::Result;
use hotcoco::{Annotation, COCO, Category, Dataset, Image, Segmentation};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The contents of both files. Positions replace the ids.
pub struct Files {
    pub annotations: COCO,
    pub detections: COCO,
    /// The id and the name of every category, in the order of the ids.
    pub categories: Vec<(Id, String)>,
}

#[derive(Deserialize)]
struct StoredDataset {
    images: Option<Vec<StoredImage>>,
    annotations: Option<Vec<StoredObject>>,
    categories: Option<Vec<StoredCategory>>,
}

#[derive(Deserialize)]
struct StoredImage {
    id: Field<Id>,
    width: Field<u32>,
    height: Field<u32>,
}

/// An annotation or a detection.
#[derive(Deserialize)]
struct StoredObject {
    id: Field<Id>,
    image_id: Field<Id>,
    category_id: Field<Id>,
    bbox: Field<[f64; 4]>,
    segmentation: Field<Segmentation>,
    area: Field<f64>,
    iscrowd: Field<Flag>,
    score: Field<f64>,
}

/// Reads both files, for an evaluation of masks if `segm` is true, else of boxes.
///
/// # Errors
/// A usage error if a file is malformed, if an entry lacks a needed field, or if a detection refers to an image or a category that
/// the annotations do not list. The error names the file and, if the cause is an entry, the entry.
pub fn read(annotations: &Path, results: &Path, segm: bool) -> Result<Files> {
    let dataset: StoredDataset = json::parse(annotations, &json::read(annotations)?, b'{')?;
    let known = Known::new(dataset.images, dataset.categories).map_err(|what| refusal(annotations, &what))?;
    let objects =
        dataset.annotations.ok_or("it has no list `annotations`, so there is nothing to evaluate".to_string());
    let objects = objects.and_then(|objects| known.annotations(objects, segm));
    let annotated = COCO::from_dataset(Dataset {
        images: known.images.values().cloned().collect(),
        annotations: objects.map_err(|what| refusal(annotations, &what))?,
        categories: known.categories(),
        ..Dataset::default()
    });
    let detections = json::parse(results, &json::read(results)?, b'[')?;
    let detections = known.detections(detections, segm).map_err(|what| refusal(results, &what))?;
    let detections = annotated.load_res_anns(detections).map_err(|e| refusal(results, &e.to_string()))?;
    let lacks_box = |object: &Annotation| !segm && object.bbox.is_none();
    if let Some(entry) = detections.dataset.annotations.iter().position(lacks_box) {
        return Err(refusal(results, &at_entry("", entry, "has neither a bbox nor a mask that can be decoded")));
    }
    Ok(Files { annotations: annotated, detections, categories: known.categories.into_iter().collect() })
}

/// The images and categories that the annotations file lists. If two entries have the same id, the later entry counts, as in
/// pycocotools.
struct Known {
    images: BTreeMap<Id, Image>,
    categories: BTreeMap<Id, String>,
}

impl Known {
    fn new(images: Option<Vec<StoredImage>>, categories: Option<Vec<StoredCategory>>) -> Result<Known, String> {
        let mut known = Known { images: BTreeMap::new(), categories: BTreeMap::new() };
        for (entry, image) in images.unwrap_or_default().into_iter().enumerate() {
            let id = needed(image.id, "id", NUMBER_OR_TEXT).map_err(|what| at_entry("images", entry, &what))?;
            let side = |side: Field<u32>| valid(side).unwrap_or(0);
            let image = Image { width: side(image.width), height: side(image.height), ..Image::default() };
            known.images.insert(id, image);
        }
        check_ids("images", known.images.keys())?;
        known.categories = json::categories(categories)?;
        known.images.values_mut().zip(0..).for_each(|(image, position)| image.id = position);
        Ok(known)
    }

    fn categories(&self) -> Vec<Category> {
        let category = |(name, id): (&String, u64)| Category { id, name: name.clone(), ..Category::default() };
        self.categories.values().zip(0..).map(category).collect()
    }

    /// Converts the annotations whose images and categories are listed. Ignores the other annotations, as pycocotools does.
    fn annotations(&self, objects: Vec<StoredObject>, segm: bool) -> Result<Vec<Annotation>, String> {
        let positions = positions(self.categories.keys());
        let mut ids = BTreeSet::new();
        let mut annotations = Vec::new();
        let given = objects.len();
        for (entry, mut object) in objects.into_iter().enumerate() {
            let named = |what: String| at_entry("annotations", entry, &what);
            let id = needed(object.id.take(), "id", NUMBER_OR_TEXT).map_err(named)?;
            let (image, category) = object.image_and_category().map_err(named)?;
            if matches!(id, Id::Number(0)) {
                return Err(named("has the id 0, which pycocotools counts as no annotation; count from 1".into()));
            }
            if let Some(id) = ids.replace(id) {
                return Err(named(format!(
                    "has the id {id} of an earlier annotation; give each annotation an id of its own"
                )));
            }
            if let (Some(image), Some(&category)) = (self.images.get(&image), positions.get(&category)) {
                let position = annotations.len() as u64 + 1;
                let area = needed(object.area.take(), "area", "a number").map_err(named)?;
                let iscrowd = json::is_crowd(&object.iscrowd).map_err(named)?;
                let shape = object.shape(segm, segm, image).map_err(named)?;
                let placed = Annotation { id: position, image_id: image.id, category_id: category, ..shape };
                annotations.push(Annotation { area: Some(area), iscrowd, ..placed });
            }
        }
        if annotations.len() < given {
            log::warn!(
                "{} annotations are ignored, because their images or categories are not listed",
                given - annotations.len()
            );
        }
        Ok(annotations)
    }

    /// The detections, each with its box alone or with its mask alone.
    fn detections(&self, objects: Vec<StoredObject>, segm: bool) -> Result<Vec<Annotation>, String> {
        let positions = positions(self.categories.keys());
        // If no detection has the kind of shape that is evaluated, the other kind replaces it. pycocotools then also makes boxes
        // from masks, or masks from boxes.
        let has_shape = |object: &StoredObject| match segm {
            true => object.segmentation.is_some(),
            false => object.bbox.is_some(),
        };
        let by_mask = segm == objects.iter().any(has_shape);
        let detection = |(entry, mut object): (usize, StoredObject)| {
            let named = |what: String| at_entry("", entry, &what);
            let score = needed(object.score.take(), "score", "a number").map_err(named)?;
            let (image, category) = object.image_and_category().map_err(named)?;
            let unlisted = |field: &str, id: &Id| named(format!("has {field} {id}, which the annotations do not list"));
            let image = self.images.get(&image).ok_or_else(|| unlisted("image_id", &image))?;
            let &category_id = positions.get(&category).ok_or_else(|| unlisted("category_id", &category))?;
            let shape = object.shape(by_mask, segm, image).map_err(named)?;
            Ok(Annotation { image_id: image.id, category_id, score: Some(score), ..shape })
        };
        objects.into_iter().enumerate().map(detection).collect()
    }
}

impl StoredObject {
    /// The ids of the image and the category.
    fn image_and_category(&mut self) -> Result<(Id, Id), String> {
        let image = needed(self.image_id.take(), "image_id", NUMBER_OR_TEXT)?;
        Ok((image, needed(self.category_id.take(), "category_id", NUMBER_OR_TEXT)?))
    }

    /// Converts the object, with its mask alone if `by_mask` is true, else with its box alone. `segm` only decides which missing
    /// field an error names.
    fn shape(&mut self, by_mask: bool, segm: bool, image: &Image) -> Result<Annotation, String> {
        let needed_field = if segm { "segmentation" } else { "bbox" };
        if (by_mask && self.segmentation.is_none()) || (!by_mask && self.bbox.is_none()) {
            return Err(format!("has no {needed_field}"));
        }
        if !by_mask {
            let bbox = needed(self.bbox.take(), "bbox", "four numbers")?;
            return Ok(Annotation { bbox: Some(bbox), ..Annotation::default() });
        }
        let mask = self.segmentation.take();
        let mask = needed(mask, "segmentation", "a list of polygons or a run-length code")?;
        let decodes = match (&mask, mask.rle_ref()) {
            (_, Some(code)) => code.area().is_ok(),
            (Segmentation::Polygon(polygons), _) => {
                if image.width == 0 || image.height == 0 {
                    return Err("is a polygon, but the annotations do not say its image's width and height".into());
                }
                // pycocotools refuses a list whose first polygon has four numbers or fewer.
                polygons.first().is_some_and(|polygon| polygon.len() > 4)
            }
            _ => false,
        };
        if !decodes {
            return Err("has a segmentation that cannot be decoded".into());
        }
        Ok(Annotation { segmentation: Some(mask), ..Annotation::default() })
    }
}
