//! The objects of an image, and their encoding as a row of numbers. The loader hands the annotated objects to a task as such rows.
//! A task hands its detections to an evaluation as such rows. All lengths are in pixels. x counts columns and y counts rows, both
//! from the upper left corner of the image.

use anyhow::{Context, Result, ensure};

/// The number and the size of an image, and the objects that it contains.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Scene {
    /// The image's number in its split.
    pub image: usize,
    /// The height and width of the image. For a training crop, the height and width of the part that the image fills.
    pub size: [usize; 2],
    pub objects: Vec<Object>,
}

/// An annotated object.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// The class, counted from 0 in the order of the categories' ids.
    pub class: usize,
    /// Left, top, width and height.
    pub bbox: [f64; 4],
    /// The area in square pixels. From this area, an evaluation decides whether the object is small, medium or large.
    pub area: f64,
    /// Whether the annotation marks a crowd of objects. Networks do not train on crowds, and an evaluation ignores detections
    /// within them.
    pub is_crowd: bool,
    pub outline: Outline,
}

/// The pixels of an object.
#[derive(Debug, Clone, PartialEq)]
pub enum Outline {
    /// The outline is not known.
    None,
    /// Polygons, each as coordinates x, y, x, y …. The object is the union of the polygons.
    Polygons(Vec<Vec<f64>>),
    /// COCO's run lengths of the mask. The pixels are ordered column after column. The runs are alternately outside and inside of
    /// the object, and the first run is outside.
    Runs(Vec<u32>),
}

/// A detected object.
#[derive(Debug, Clone, PartialEq)]
pub struct Detected {
    pub class: usize,
    /// The score, from 0 to 1.
    pub score: f64,
    /// Left, top, width and height.
    pub bbox: [f64; 4],
    /// The run lengths of the object's mask, as in [`Outline::Runs`]. Empty if no masks are computed.
    pub runs: Vec<u32>,
}

impl Scene {
    /// Encodes the scene as a row of numbers. The first number is the length of the row.
    pub fn to_row(&self) -> Vec<f64> {
        let mut row = vec![0.0, self.image as f64, self.size[0] as f64, self.size[1] as f64, self.objects.len() as f64];
        for object in &self.objects {
            row.push(object.class as f64);
            row.extend(object.bbox);
            row.extend([object.area, f64::from(u8::from(object.is_crowd))]);
            match &object.outline {
                Outline::None => row.push(0.0),
                Outline::Polygons(polygons) => {
                    row.push(polygons.len() as f64);
                    for polygon in polygons {
                        row.push(polygon.len() as f64);
                        row.extend(polygon);
                    }
                }
                Outline::Runs(runs) => {
                    row.extend([-1.0, runs.len() as f64]);
                    row.extend(runs.iter().map(|&run| f64::from(run)));
                }
            }
        }
        row[0] = row.len() as f64;
        row
    }

    /// Reads a scene from the row at the beginning of `row`. Returns the scene, and the numbers after its row.
    ///
    /// # Errors
    /// Fails if the row is empty or too short for its content.
    pub fn from_row(row: &[f64]) -> Result<(Scene, &[f64])> {
        let (mut numbers, rest) = Numbers::begin(row)?;
        let image = numbers.count()?;
        let size = [numbers.count()?, numbers.count()?];
        let count = numbers.count()?;
        let objects = (0..count).map(|_| Object::read(&mut numbers)).collect::<Result<_>>()?;
        Ok((Scene { image, size, objects }, rest))
    }
}

impl Object {
    fn read(numbers: &mut Numbers) -> Result<Object> {
        let class = numbers.count()?;
        let bbox = numbers.bbox()?;
        let (area, is_crowd) = (numbers.next()?, numbers.next()? != 0.0);
        let outline = match numbers.next()? {
            0.0 => Outline::None,
            -1.0 => Outline::Runs(numbers.runs()?),
            count => {
                let polygon = |_| {
                    let length = numbers.count()?;
                    Ok(numbers.take(length)?.to_vec())
                };
                Outline::Polygons((0..count as usize).map(polygon).collect::<Result<_>>()?)
            }
        };
        Ok(Object { class, bbox, area, is_crowd, outline })
    }
}

/// The height and width to which an image of this height and width is resized, so that the longer side has `side` pixels. The
/// lengths are rounded as in detectron2's `ResizeShortestEdge`.
pub fn fitted(size: [usize; 2], side: usize) -> [usize; 2] {
    let scale = side as f64 / size[0].max(size[1]) as f64;
    size.map(|length| ((length as f64 * scale + 0.5) as usize).clamp(1, side))
}

/// Encodes detected objects as a row of numbers. The first number is the length of the row.
pub fn detected_to_row(detected: &[Detected]) -> Vec<f64> {
    let mut row = vec![0.0, detected.len() as f64];
    for one in detected {
        row.extend([one.class as f64, one.score]);
        row.extend(one.bbox);
        row.push(one.runs.len() as f64);
        row.extend(one.runs.iter().map(|&run| f64::from(run)));
    }
    row[0] = row.len() as f64;
    row
}

/// Reads detected objects from the row at the beginning of `row`. Returns the objects, and the numbers after their row.
///
/// # Errors
/// Fails if the row is empty or too short for its content.
pub fn detected_from_row(row: &[f64]) -> Result<(Vec<Detected>, &[f64])> {
    let (mut numbers, rest) = Numbers::begin(row)?;
    let count = numbers.count()?;
    let one = |_| {
        let (class, score) = (numbers.count()?, numbers.next()?);
        Ok(Detected { class, score, bbox: numbers.bbox()?, runs: numbers.runs()? })
    };
    Ok(((0..count).map(one).collect::<Result<_>>()?, rest))
}

/// The numbers of a row that are still to be read.
struct Numbers<'a>(&'a [f64]);

impl<'a> Numbers<'a> {
    /// The numbers of the first row without its first number, and the rows after this row.
    fn begin(rows: &'a [f64]) -> Result<(Numbers<'a>, &'a [f64])> {
        let length = *rows.first().context("the row of objects is empty")? as usize;
        ensure!((1..=rows.len()).contains(&length), "a row of {length} numbers does not fit into {}", rows.len());
        Ok((Numbers(&rows[1..length]), &rows[length..]))
    }

    fn take(&mut self, count: usize) -> Result<&'a [f64]> {
        let (taken, rest) = self.0.split_at_checked(count).context("the row of objects ends too early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn next(&mut self) -> Result<f64> {
        Ok(self.take(1)?[0])
    }

    fn count(&mut self) -> Result<usize> {
        Ok(self.next()? as usize)
    }

    fn bbox(&mut self) -> Result<[f64; 4]> {
        Ok(self.take(4)?.try_into().expect("four numbers were taken"))
    }

    fn runs(&mut self) -> Result<Vec<u32>> {
        let count = self.count()?;
        Ok(self.take(count)?.iter().map(|&run| run as u32).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_hold_all_that_was_written_one_after_another() {
        let object = |outline| Object { class: 7, bbox: [1.5, 2.0, 3.25, 4.0], area: 9.5, is_crowd: false, outline };
        let crowd = Object { is_crowd: true, ..object(Outline::Runs(vec![3, 4, 5])) };
        let polygons = Outline::Polygons(vec![vec![0.5, 1.0, 2.0, 3.0, 4.0, 5.0], vec![0.0; 8]]);
        let scene = Scene { image: 4, size: [48, 64], objects: vec![object(Outline::None), crowd, object(polygons)] };
        let detected = vec![
            Detected { class: 3, score: 0.25, bbox: [0.0, 1.0, 2.0, 3.0], runs: vec![1, 2] },
            Detected { class: 0, score: 1.0, bbox: [0.5; 4], runs: Vec::new() },
        ];
        let rows =
            [scene.to_row(), detected_to_row(&detected), Scene::default().to_row(), detected_to_row(&[])].concat();
        let (first, rest) = Scene::from_row(&rows).unwrap();
        let (second, rest) = detected_from_row(rest).unwrap();
        let (third, rest) = Scene::from_row(rest).unwrap();
        assert_eq!((first, second, third), (scene.clone(), detected, Scene::default()));
        assert_eq!(detected_from_row(rest).unwrap(), (Vec::new(), &[][..]));
        let mut torn = scene.to_row();
        torn.truncate(20);
        assert!(Scene::from_row(&torn).is_err());
    }
}
