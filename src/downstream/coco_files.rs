//! Reads COCO's two files, annotations and results, for the evaluation.
//!
//! A field that no figure needs may hold anything, because programs that write such files differ in these fields. An error names
//! an entry that lacks a field that a figure needs. Ids may be numbers or texts, as in pycocotools. pycocotools evaluates images
//! in the order of their ids, so the evaluation gets the position of each id in that order.

use crate::usage;
use anyhow::Result;
use hotcoco::{Annotation, COCO, Category, Dataset, Image, Segmentation};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Formatter};
use std::path::Path;

/// Both files, with ids replaced by positions.
pub struct Files {
    pub annotations: COCO,
    pub detections: COCO,
    /// The id and the name of every category, in the order of their positions.
    pub categories: Vec<(Id, String)>,
}

/// The id of an image, a category or an annotation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(untagged, from = "StoredId")]
pub enum Id {
    Number(i64),
    Text(String),
}

/// An id as it is written in JSON. pandas writes whole numbers as 1.0.
#[derive(Deserialize)]
#[serde(untagged)]
enum StoredId {
    Whole(i64),
    Float(f64),
    Text(String),
}

/// The value of a field: of the kind that the figures need, or of any other.
#[derive(Deserialize)]
#[serde(untagged)]
enum Value<T> {
    Needed(T),
    Other(IgnoredAny),
}

/// None if the field is absent or null.
type Field<T> = Option<Value<T>>;

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

#[derive(Deserialize)]
struct StoredCategory {
    id: Field<Id>,
    name: Field<String>,
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

#[derive(Deserialize)]
#[serde(untagged)]
enum Flag {
    Truth(bool),
    Number(f64),
}

/// Reads both files, for boxes or for masks.
///
/// # Errors
/// A usage error that names the file and the entry, if an entry is malformed or lacks a field that the figures need, or if a
/// detection is of an image or a category that the annotations do not list.
pub fn read(annotations: &Path, results: &Path, segm: bool) -> Result<Files> {
    let dataset: StoredDataset = parse(annotations, b'{')?;
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
    let detections = known.detections(parse(results, b'[')?, segm).map_err(|what| refusal(results, &what))?;
    let detections = annotated.load_res_anns(detections).map_err(|e| refusal(results, &e.to_string()))?;
    let lacks_box = |object: &Annotation| !segm && object.bbox.is_none();
    if let Some(entry) = detections.dataset.annotations.iter().position(lacks_box) {
        return Err(refusal(results, &at_entry("", entry, "has neither a bbox nor a mask that can be decoded")));
    }
    Ok(Files { annotations: annotated, detections, categories: known.categories.into_iter().collect() })
}

fn refusal(file: &Path, what: &str) -> anyhow::Error {
    usage!("{}: {what}", file.display())
}

/// Parses a file of JSON, which must begin with this bracket. It may hold `NaN` and `Infinity`, which Python writes although JSON
/// has neither.
fn parse<T: DeserializeOwned>(file: &Path, bracket: u8) -> Result<T> {
    let mut bytes = std::fs::read(file).map_err(|e| refusal(file, &e.to_string()))?;
    replace_nan_and_infinity(&mut bytes);
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes).trim_ascii_start();
    if text.first().is_some_and(|&first| first != bracket) {
        let expected = if bracket == b'[' {
            "results are a list of detections"
        } else {
            "annotations are an object with the lists images, annotations and categories"
        };
        return Err(refusal(file, &format!("it does not begin with {:?}; {expected}", char::from(bracket))));
    }
    serde_json::from_slice(text).map_err(|e| refusal(file, &e.to_string()))
}

/// Replaces `NaN` and `Infinity` outside of texts by an empty text. A field with a text is refused if a figure needs its number.
fn replace_nan_and_infinity(json: &mut [u8]) {
    let (mut in_text, mut at) = (false, 0);
    while at < json.len() {
        match json[at] {
            b'\\' if in_text => at += 1,
            b'"' => in_text = !in_text,
            b'N' | b'I' | b'-' if !in_text => {
                let words: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
                if let Some(word) = words.into_iter().find(|word| json[at..].starts_with(word)) {
                    json[at..at + word.len()].fill(b' ');
                    json[at..at + 2].fill(b'"');
                    at += word.len() - 1;
                }
            }
            _ => {}
        }
        at += 1;
    }
}

/// The images and categories that the file of annotations lists. If two entries have one id, the later counts, as in
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
        for (entry, category) in categories.unwrap_or_default().into_iter().enumerate() {
            let id = needed(category.id, "id", NUMBER_OR_TEXT).map_err(|what| at_entry("categories", entry, &what))?;
            let name = valid(category.name).unwrap_or_else(|| id.to_string().trim_matches('"').into());
            known.categories.insert(id, name);
        }
        for (list, ids) in
            [("images", known.images.keys().collect()), ("categories", known.categories.keys().collect())]
        {
            check_ids(list, ids)?;
        }
        known.images.values_mut().zip(0..).for_each(|(image, position)| image.id = position);
        Ok(known)
    }

    fn categories(&self) -> Vec<Category> {
        let category = |(name, id): (&String, u64)| Category { id, name: name.clone(), ..Category::default() };
        self.categories.values().zip(0..).map(category).collect()
    }

    /// Keeps the annotations of listed images and categories, and ignores the others as pycocotools does.
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
                let iscrowd = object.is_crowd().map_err(named)?;
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

    /// The detections, each with its box alone or its mask alone.
    fn detections(&self, objects: Vec<StoredObject>, segm: bool) -> Result<Vec<Annotation>, String> {
        let positions = positions(self.categories.keys());
        // If no detection has the shape that is evaluated, pycocotools makes boxes from masks, or masks from boxes.
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

    fn is_crowd(&self) -> Result<bool, String> {
        match &self.iscrowd {
            None => Ok(false),
            Some(Value::Needed(Flag::Truth(crowd))) => Ok(*crowd),
            Some(Value::Needed(Flag::Number(number))) if number.fract() == 0.0 => Ok(*number != 0.0),
            Some(_) => Err("has an iscrowd that is neither 0 nor 1".into()),
        }
    }

    /// The object with only its mask if `by_mask`, else with only its box. In results, a mask may replace a box, and a box may replace a
    /// mask.
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

const NUMBER_OR_TEXT: &str = "a whole number or a text";

fn needed<T>(field: Field<T>, name: &str, kind: &str) -> Result<T, String> {
    match field {
        Some(Value::Needed(value)) => Ok(value),
        Some(Value::Other(_)) => Err(format!("has a field {name} that is not {kind}")),
        None => Err(format!("has no {name}")),
    }
}

fn valid<T>(field: Field<T>) -> Option<T> {
    match field {
        Some(Value::Needed(value)) => Some(value),
        _ => None,
    }
}

/// An error's text, which begins with the entry. The list of results has no name: `list` is then empty.
fn at_entry(list: &str, entry: usize, what: &str) -> String {
    if list.is_empty() {
        format!("entry {entry} (from 0) {what}")
    } else {
        format!("entry {entry} (from 0) of `{list}` {what}")
    }
}

fn positions<'a>(ids: impl Iterator<Item = &'a Id>) -> BTreeMap<&'a Id, u64> {
    ids.zip(0..).collect()
}

/// Fails if there are no ids, or if they are numbers and texts, which have no common order.
fn check_ids(list: &str, ids: Vec<&Id>) -> Result<(), String> {
    match (ids.first(), ids.last()) {
        (Some(Id::Number(number)), Some(Id::Text(text))) => {
            Err(format!("its `{list}` have the ids {number} and {text:?}; give them numbers alone or texts alone"))
        }
        (None, _) => Err(format!("it lists no `{list}`, so that nothing can be evaluated")),
        _ => Ok(()),
    }
}

impl From<StoredId> for Id {
    fn from(id: StoredId) -> Id {
        match id {
            StoredId::Whole(number) => Id::Number(number),
            StoredId::Float(number) if number.fract() == 0.0 && number.abs() < 9e15 => Id::Number(number as i64),
            StoredId::Float(number) => Id::Text(number.to_string()),
            StoredId::Text(text) => Id::Text(text),
        }
    }
}

impl Display for Id {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Id::Number(number) => write!(f, "{number}"),
            Id::Text(text) => write!(f, "{text:?}"),
        }
    }
}
