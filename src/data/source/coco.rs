//! Reads images with annotated objects in the layout of COCO. The images are in `train2017/` and `val2017/` (or `train/` and
//! `val/`), and their objects are in `annotations/instances_SPLIT.json`. Images are numbered in the order of their ids. Classes are
//! COCO's categories, numbered in the order of the categories' ids.

use super::folder::read_file;
use super::listed::Listed;
use super::samples::{Samples, Stored};
use crate::coco::annotations::{self, AnnotatedImage, Annotations, Purpose};
use crate::coco::json::Id;
use crate::coco::objects::Scene;
use crate::coco::results::Ids;
use crate::config::Detection;
use crate::launcher::launched_rank;
use crate::{require, usage};
use anyhow::Result;
use std::path::{Component, Path, PathBuf};

/// One split.
#[derive(Debug)]
pub struct Coco {
    /// The folder of the images.
    folder: PathBuf,
    /// The id of each class in the annotations (`categories`).
    category_ids: Vec<Id>,
    /// The names of the classes.
    classes: Vec<String>,
    images: Vec<AnnotatedImage>,
}

/// Opens the training and the evaluation split. The training split leaves out images without an object from which a network can
/// learn, as detectron2 does.
///
/// # Errors
/// A usage error that names the cure, if a file is missing or malformed, or if the splits list different categories. Also if the
/// number of categories is not `detection.classes`, or if no training image has an object to learn from.
pub fn open(keys: &Detection) -> Result<(Coco, Coco)> {
    let (training_file, training) = split(keys, ["train2017", "train"], Purpose::Training)?;
    let (evaluation_file, evaluation) = split(keys, ["val2017", "val"], Purpose::Evaluation)?;
    require!(
        training.categories == evaluation.categories,
        "{} and {} list different `categories`; give both the same ids and names",
        training_file.0.display(),
        evaluation_file.0.display()
    );
    let mut training = Coco::new(training_file, training)?;
    let listed = training.images.len();
    training.images.retain(|image| !image.scene.objects.is_empty());
    let kept = training.images.len();
    require!(
        kept > 0,
        "{}: no image has an object from which a network can learn{}",
        training.folder.display(),
        if keys.masks { ", which needs a polygon; set detection.masks = false to train on boxes alone" } else { "" }
    );
    if kept < listed && launched_rank() == 0 {
        log::info!(
            "{}: {} of {listed} images have no object to learn from and are left out",
            training.folder.display(),
            listed - kept
        );
    }
    Ok((training.numbered(), Coco::new(evaluation_file, evaluation)?.numbered()))
}

/// The file of a split's annotations, and the folder of its images.
type Files = (PathBuf, PathBuf);

/// Reads the annotations of a split. Its folder has one of the two names. The first name counts if both folders exist.
fn split(keys: &Detection, names: [&str; 2], purpose: Purpose) -> Result<(Files, Annotations)> {
    let is_there = |name: &&str| keys.path.join(name).is_dir();
    let name = names.into_iter().find(is_there).unwrap_or(names[0]);
    let folder = keys.path.join(name);
    let file = keys.path.join("annotations").join(format!("instances_{name}.json"));
    for (path, is_there) in [(&folder, folder.is_dir()), (&file, file.is_file())] {
        require!(
            is_there,
            "{}: it is missing; detection.path must hold the images in train2017/ and val2017/, and their objects in \
             annotations/instances_train2017.json and annotations/instances_val2017.json (or train and val in all four names)",
            path.display()
        );
    }
    let annotations = annotations::read(&file, purpose, keys.masks)?;
    let categories = annotations.categories.len();
    require!(
        categories == keys.classes,
        "{}: it lists {categories} `categories`, but detection.classes = {}; set detection.classes = {categories}",
        file.display(),
        keys.classes
    );
    Ok(((file, folder), annotations))
}

impl Coco {
    /// Makes the split of these annotations. Fails if an image is missing, or if its path is not a plain path below the folder.
    fn new((file, folder): Files, Annotations { categories, images }: Annotations) -> Result<Coco> {
        let mut listed = Listed::default();
        for AnnotatedImage { file_name, .. } in &images {
            let is_below = Path::new(file_name).components().all(|part| matches!(part, Component::Normal(_)));
            require!(
                is_below && !file_name.is_empty(),
                "{}: the file_name {file_name:?} is not the path of a file below {}",
                file.display(),
                folder.display()
            );
            let path = folder.join(file_name);
            let is_there = listed.holds(&path).map_err(|e| usage!("{}: {e}", path.display()))?;
            require!(
                is_there,
                "{}: it is missing, but {} lists it; add the image, or remove it from the list",
                path.display(),
                file.display()
            );
        }
        let (category_ids, classes) = categories.into_iter().unzip();
        Ok(Coco { folder, category_ids, classes, images })
    }

    /// Writes each image's index in the split into its scene.
    fn numbered(mut self) -> Coco {
        self.images.iter_mut().enumerate().for_each(|(number, image)| image.scene.image = number);
        self
    }
}

impl Samples for Coco {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn label(&self, _: usize) -> u32 {
        0
    }

    fn name(&self, index: usize) -> String {
        self.folder.join(&self.images[index].file_name).display().to_string()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        read_file(&self.folder.join(&self.images[index].file_name), bytes)?;
        Ok(Stored::Encoded)
    }

    fn scene(&self, index: usize) -> Result<Scene> {
        Ok(self.images[index].scene.clone())
    }

    fn ids(&self) -> Option<Ids> {
        let images = self.images.iter().map(|image| image.id.clone()).collect();
        Some(Ids { images, categories: self.category_ids.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::folder::tests::folder;
    use super::*;
    use crate::config::Config;
    use serde_json::{Value, json};

    /// Writes three training images, and an evaluation image without objects. One training image has an object, one has only a
    /// crowd, and one has nothing. `edit` may change the annotations of both splits before they are written.
    fn source(edit: impl Fn(&mut Value, &mut Value)) -> tempfile::TempDir {
        let folder = folder(&["train2017/sub/3.jpg", "train2017/1.jpg", "train2017/2.jpg", "val2017/9.jpg"]);
        let image = |id: u32, file_name: &str| json!({"id": id, "file_name": file_name, "width": 8, "height": 6});
        let object = |image_id: u32, iscrowd: u32| {
            json!({"image_id": image_id, "category_id": 3, "bbox": [0, 0, 2, 2], "area": 2, "iscrowd": iscrowd,
                   "segmentation": [[0, 0, 2, 0, 2, 2]]})
        };
        let categories = json!([{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]);
        let mut training = json!({
            "images": [image(3, "sub/3.jpg"), image(2, "2.jpg"), image(1, "1.jpg")],
            "annotations": [object(3, 0), object(2, 1)], "categories": categories});
        let mut evaluation = json!({"images": [image(9, "9.jpg")], "annotations": [], "categories": categories});
        edit(&mut training, &mut evaluation);
        std::fs::create_dir(folder.path().join("annotations")).unwrap();
        for (split, dataset) in [("train2017", training), ("val2017", evaluation)] {
            let file = folder.path().join(format!("annotations/instances_{split}.json"));
            std::fs::write(file, dataset.to_string()).unwrap();
        }
        folder
    }

    fn keys(folder: &Path) -> Detection {
        let path = format!("detection.path={:?}", folder.display().to_string());
        Config::parse("", &[path, "detection.classes=2".into()]).unwrap().detection
    }

    #[test]
    fn training_leaves_out_images_without_objects_to_learn_from_and_evaluation_keeps_all() {
        let folder = source(|_, _| {});
        let (training, evaluation) = open(&keys(folder.path())).unwrap();
        assert_eq!((training.len(), evaluation.len()), (1, 1));
        assert_eq!(training.name(0), folder.path().join("train2017/sub/3.jpg").display().to_string());
        assert_eq!(
            (training.classes(), evaluation.scene(0).unwrap().objects.len()),
            (&["cat".into(), "dog".into()][..], 0)
        );
        let mut bytes = Vec::new();
        assert_eq!(training.read(0, &mut bytes).unwrap(), Stored::Encoded);
        assert_eq!(bytes, b"train2017/sub/3.jpg");
        let more = source(|training, _| training["annotations"][1]["iscrowd"] = json!(0));
        let (training, _) = open(&keys(more.path())).unwrap();
        assert_eq!([0, 1].map(|index| training.scene(index).unwrap().image), [0, 1]);
        assert!(training.name(0).ends_with("2.jpg") && training.name(1).ends_with("3.jpg"), "in the order of ids");
    }

    #[test]
    fn what_does_not_fit_is_named_with_the_cure() {
        let error = |edit: &dyn Fn(&mut Value, &mut Value)| open(&keys(source(edit).path())).unwrap_err().to_string();
        let missing = |path: &str| {
            let folder = source(|_, _| {});
            let path = folder.path().join(path);
            if path.is_dir() {
                std::fs::remove_dir_all(path).unwrap()
            } else {
                std::fs::remove_file(path).unwrap()
            }
            open(&keys(folder.path())).unwrap_err().to_string()
        };
        let third = json!([{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 6}]);
        for (error, words) in [
            (
                error(&|training, _| training["categories"] = third.clone()),
                &["instances_train2017.json", "3 `categories`", "set detection.classes = 3"][..],
            ),
            (
                error(&|_, other| other["categories"][1]["name"] = json!("cow")),
                &["different `categories`", "val2017.json"],
            ),
            (
                error(&|training, _| training["annotations"] = json!([])),
                &["train2017: no image has", "detection.masks = false"],
            ),
            (
                error(&|_, other| other["images"][0]["file_name"] = json!("../val2017/9.jpg")),
                &["instances_val2017.json", "\"../val2017/9.jpg\"", "below"],
            ),
            (missing("val2017/9.jpg"), &["val2017/9.jpg: it is missing", "instances_val2017.json", "add the image"]),
            (missing("train2017"), &["train2017: it is missing", "detection.path must hold"]),
            (missing("annotations/instances_val2017.json"), &["instances_val2017.json: it is missing", "must hold"]),
        ] {
            assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
        }
    }
}
