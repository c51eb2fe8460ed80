//! Decides which object a box must find, and which boxes train. Follows detectron2's `Matcher` and `subsample_labels`. But the
//! random draw takes its numbers from the caller's generator, not from torch's.

use super::boxes::{Corners, iou};
use crate::random::Random;
use rayon::prelude::*;

/// The limits of the overlap (IoU) by which a box gets its label.
#[derive(Debug, Clone, Copy)]
pub struct Matcher {
    /// A box is negative if its overlap with every object is below this limit, unless `keeps_best` makes it positive.
    negative_below: f32,
    /// A box is positive if its overlap with an object is at least this limit.
    positive_from: f32,
    /// Whether an object's best boxes are positive even below `positive_from`. The best boxes of an object are the boxes with the
    /// largest overlap with the object.
    keeps_best: bool,
}

pub const OF_ANCHORS: Matcher = Matcher { negative_below: 0.3, positive_from: 0.7, keeps_best: true };
pub const OF_PROPOSALS: Matcher = Matcher { negative_below: 0.5, positive_from: 0.5, keeps_best: false };

/// The role of a box in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Label {
    /// The box contains background.
    Negative,
    /// The box does not train.
    Ignored,
    /// The box must find the object with this number.
    Positive(usize),
}

impl Matcher {
    /// The label of each box. A positive box must find the object with which it overlaps most, even if it is the best box of
    /// another object. An object without any overlap has no best box.
    pub fn labels(self, boxes: &[Corners], objects: &[Corners]) -> Vec<Label> {
        let best = |a: &Corners| {
            let overlaps = objects.iter().map(|object| iou(object, a)).enumerate();
            overlaps.fold((0, 0.0), |best, (number, overlap)| if overlap > best.1 { (number, overlap) } else { best })
        };
        let largest_of = |object: &Corners| boxes.iter().map(|a| iou(object, a)).fold(0.0, f32::max);
        let largest: Vec<f32> = if self.keeps_best { objects.par_iter().map(largest_of).collect() } else { Vec::new() };
        let is_best = |a: &Corners| {
            let mut of_objects = objects.iter().zip(&largest);
            of_objects.any(|(object, &largest)| largest > 0.0 && iou(object, a) == largest)
        };
        let label = |a: &Corners| match best(a) {
            (number, overlap) if overlap >= self.positive_from => Label::Positive(number),
            // A box without any overlap is no object's best box.
            (number, overlap) if overlap > 0.0 && self.keeps_best && is_best(a) => Label::Positive(number),
            (_, overlap) if overlap < self.negative_below => Label::Negative,
            _ => Label::Ignored,
        };
        boxes.par_iter().map(label).collect()
    }
}

/// The boxes of an image that train, by their numbers in ascending order.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub positive: Vec<usize>,
    pub negative: Vec<usize>,
}

/// The largest number of boxes that train in one image, and the largest number of positive boxes among them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quota {
    pub all: usize,
    pub most_positive: usize,
}

impl Quota {
    /// Draws the boxes that train: as many positive boxes as are allowed, and negative boxes for the remaining places.
    pub fn draw(self, labels: &[Label], random: &mut Random) -> Sample {
        let of = |is_wanted: &dyn Fn(&Label) -> bool| {
            (0..labels.len()).filter(|&number| is_wanted(&labels[number])).collect::<Vec<_>>()
        };
        let positive = chosen(of(&|label| matches!(label, Label::Positive(_))), self.most_positive, random);
        let negative = chosen(of(&|label| *label == Label::Negative), self.all - positive.len(), random);
        Sample { positive, negative }
    }
}

/// Draws `count` of the numbers at random, or all numbers if there are fewer. Returns the drawn numbers in ascending order.
fn chosen(mut numbers: Vec<usize>, count: usize, random: &mut Random) -> Vec<usize> {
    let count = count.min(numbers.len());
    for i in 0..count {
        let other = i + random.below(numbers.len() - i);
        numbers.swap(i, other);
    }
    numbers.truncate(count);
    numbers.sort_unstable();
    numbers
}

#[cfg(test)]
mod tests {
    use super::super::tests::{corners, golden};
    use super::*;

    #[test]
    fn labels_are_detectron2s() {
        let golden = golden();
        let numbers = |name: &str| Vec::<i64>::try_from(&golden[name]).unwrap();
        let (boxes, objects) = (corners(&golden["matcher.boxes"]), corners(&golden["matcher.objects"]));
        for (name, matcher) in [("anchors", OF_ANCHORS), ("proposals", OF_PROPOSALS)] {
            let (matches, expected) =
                (numbers(&format!("matcher.{name}.matches")), numbers(&format!("matcher.{name}.labels")));
            let labels = matcher.labels(&boxes, &objects);
            for (number, label) in labels.iter().enumerate() {
                let ours = match label {
                    Label::Positive(object) => (1, *object as i64),
                    Label::Negative => (0, matches[number]),
                    Label::Ignored => (-1, matches[number]),
                };
                assert_eq!(ours, (expected[number], matches[number]), "{name}: box {number}");
            }
            for kind in [-1, 0, 1] {
                let count = expected.iter().filter(|&&label| label == kind).count();
                assert!(count > 0 || (kind, name) == (-1, "proposals"), "no box is {kind} for {name}");
            }
        }
        assert_eq!(OF_ANCHORS.labels(&boxes[..3], &[]), [Label::Negative; 3]);
    }

    #[test]
    fn a_draw_fills_the_places_that_positive_boxes_leave() {
        let mut labels = vec![Label::Negative; 1000];
        labels[..100].fill(Label::Positive(0));
        labels[900..].fill(Label::Ignored);
        let draw =
            |labels: &[Label], key: u64| Quota { all: 256, most_positive: 64 }.draw(labels, &mut Random::new(&[key]));
        let sample = draw(&labels, 1);
        assert_eq!((sample.positive.len(), sample.negative.len()), (64, 192));
        assert!(sample.positive.iter().all(|&i| i < 100) && sample.negative.iter().all(|&i| (100..900).contains(&i)));
        assert_eq!(draw(&labels, 1), sample);
        assert_ne!(draw(&labels, 2), sample);
        // If there are fewer boxes than places, all boxes train.
        let sample = draw(&labels[90..110], 1);
        assert_eq!((sample.positive, sample.negative), ((0..10).collect(), (10..20).collect()));
        // Each of the 800 negative boxes has the same chance of 192 / 800.
        let mut drawn = vec![0u32; 1000];
        (0..2000).for_each(|key| draw(&labels, key).negative.iter().for_each(|&i| drawn[i] += 1));
        assert!(drawn[100..900].iter().all(|&count| (380..=580).contains(&count)), "{drawn:?}");
    }
}
