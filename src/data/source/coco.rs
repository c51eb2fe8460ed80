//! Images with annotated objects, as COCO lays them out: `train2017/` and `val2017/` (or `train/` and `val/`) with the images, and
//! `annotations/instances_SPLIT.json` with their objects. Images are numbered in the order of their ids, classes in the order of
//! their categories' ids.

use super::folder::read_file;
use super::listed::Listed;
use super::samples::{Samples, Stored};
use crate::coco::annotations::{self, AnnotatedImage, Annotations, Purpose};
use crate::coco::objects::Scene;
use crate::config::Detection;
use crate::{require, usage};
use anyhow::Result;
use std::path::{Component, Path, PathBuf};

/// One split.
#[derive(Debug)]
pub struct Coco {
    /// The folder of the images.
    folder: PathBuf,
    /// The names of the classes.
    classes: Vec<String>,
    images: Vec<AnnotatedImage>,
}

/// Opens the training and the evaluation split. The training split leaves out images without an object from which a network can
/// learn, as detectron2 does.
///
/// # Errors
/// A usage error that names the file and the cure, if a file is missing or malformed, or if the categories are not as many as
/// `detection.classes`.
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
    if kept < listed {
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

/// Reads the annotations of the split that has one of these names.
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
    /// The split of these annotations, all of whose images are there.
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
        Ok(Coco { folder, classes: categories.into_iter().map(|(_, name)| name).collect(), images })
    }

    /// Numbers the images.
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
}
