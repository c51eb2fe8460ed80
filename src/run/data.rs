//! The record of a run's data, by which a run notices that the data have changed.

use serde::{Deserialize, Serialize};

/// The images of one split: their number, and hashes of their names and labels. The pixels are not hashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    pub images: usize,
    /// The hash of all names and labels in the order of the split.
    pub in_order: String,
    /// A hash of all names and labels that is the same in every order.
    pub in_any_order: String,
}

/// The images of both splits, and the names of the classes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataSet {
    pub train: Listing,
    pub evaluation: Listing,
    /// The names of the classes in the order of the labels; empty if the source does not name them.
    pub classes: Vec<String>,
}

/// The data of a run: the present data, and the earlier data if the user has accepted changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataRecord {
    pub present: DataSet,
    #[serde(default)]
    pub earlier: Vec<Earlier>,
}

/// Data that the run, or one of its artefacts, had before the user accepted a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Earlier {
    /// [`DataSet::fingerprint`].
    pub fingerprint: String,
    /// The differences that the user has accepted, in words.
    pub accepted: String,
}

/// The data of an artefact, as its header records them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainedOn {
    pub train_images: usize,
    pub evaluation_images: usize,
    /// [`DataSet::fingerprint`].
    pub fingerprint: String,
    /// The differences that the user had accepted before the artefact was written, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accepted: Vec<String>,
}

/// The largest number of classes that a message names.
const MOST_NAMED: usize = 3;

impl DataSet {
    /// One hash of both splits and the classes.
    pub fn fingerprint(&self) -> String {
        let text = format!("{} {} {:?}", self.train.in_order, self.evaluation.in_order, self.classes);
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }

    /// The differences between these data and `now`, in words; none if there are no differences.
    pub fn differences(&self, now: &DataSet) -> Option<String> {
        let classes = class_differences(&self.classes, &now.classes);
        let are_renamed = !classes.is_empty();
        let images = [("training", &self.train, &now.train), ("evaluation", &self.evaluation, &now.evaluation)];
        let images = images.into_iter().filter_map(|(split, before, now)| before.difference(now, split, are_renamed));
        let all: Vec<String> = classes.into_iter().chain(images).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

impl Listing {
    /// The difference of a split, in words. If classes have changed (`are_renamed`), the names of images change too. So a change of
    /// names or labels alone is then not reported.
    fn difference(&self, now: &Listing, split: &str, are_renamed: bool) -> Option<String> {
        let (before, images) = (self.images, now.images);
        match images.abs_diff(before) {
            0 if self.in_order == now.in_order => None,
            0 if self.in_any_order == now.in_any_order => {
                Some(format!("the {images} {split} images are in another order"))
            }
            0 if are_renamed => None,
            0 => Some(format!("names or labels of the {images} {split} images have changed")),
            number => {
                let change = if images > before { "more" } else { "fewer" };
                Some(format!("{number} {change} {split} images ({before} before, {images} now)"))
            }
        }
    }
}

/// The differences between the names of the classes. If one of the two sources names no classes, there are no differences.
fn class_differences(before: &[String], now: &[String]) -> Vec<String> {
    if before.is_empty() || now.is_empty() || before == now {
        return Vec::new();
    }
    if before.len() == now.len() {
        let renamed = before.iter().zip(now).enumerate().filter(|(_, (before, now))| before != now);
        let renamed = renamed.map(|(class, (before, now))| format!("class {class} was {before:?} and is {now:?}"));
        return vec![first_few(renamed.collect())];
    }
    let only_in_first = |first: &[String], second: &[String]| -> Vec<String> {
        let second: std::collections::BTreeSet<&String> = second.iter().collect();
        first.iter().filter(|name| !second.contains(name)).map(|name| format!("{name:?}")).collect()
    };
    let (added, removed) = (only_in_first(now, before), only_in_first(before, now));
    let changes = [("added", added), ("removed", removed)].into_iter().filter(|(_, names)| !names.is_empty());
    changes.map(|(change, names)| format!("{} class(es) {change}: {}", names.len(), first_few(names))).collect()
}

fn first_few(mut all: Vec<String>) -> String {
    let more = all.len().saturating_sub(MOST_NAMED);
    all.truncate(MOST_NAMED);
    let text = all.join(", ");
    if more > 0 { format!("{text} and {more} more") } else { text }
}

impl DataRecord {
    /// Whether the fingerprint is that of the run's present data or of earlier data.
    pub fn knows(&self, fingerprint: &str) -> bool {
        self.present.fingerprint() == fingerprint || self.earlier.iter().any(|data| data.fingerprint == fingerprint)
    }

    /// The record of the run's data for the header of an artefact.
    pub fn trained_on(&self) -> TrainedOn {
        TrainedOn {
            train_images: self.present.train.images,
            evaluation_images: self.present.evaluation.images,
            fingerprint: self.present.fingerprint(),
            accepted: self.earlier.iter().map(|data| data.accepted.clone()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(images: usize, order: &str, names: &str, classes: &[&str]) -> DataSet {
        let listing = |images| Listing { images, in_order: order.into(), in_any_order: names.into() };
        let classes = classes.iter().map(|name| name.to_string()).collect();
        DataSet { train: listing(images), evaluation: listing(2), classes }
    }

    #[test]
    fn a_difference_says_what_has_changed() {
        let before = data(9, "o", "n", &["ant", "bee", "cat", "dog", "eel"]);
        let differences = |now: DataSet| before.differences(&now).unwrap_or_default();
        let classes = ["ant", "bee", "cat", "dog", "eel"];
        assert_eq!(differences(before.clone()), "");
        assert_eq!(
            differences(data(12, "p", "m", &classes)),
            "3 more training images (9 before, 12 now); names or labels of the 2 evaluation images have changed"
        );
        assert!(differences(data(7, "p", "m", &classes)).starts_with("2 fewer training images (9 before, 7 now)"));
        let reordered = differences(data(9, "p", "n", &classes));
        assert!(reordered.starts_with("the 9 training images are in another order"), "{reordered}");
        let renamed = differences(data(9, "p", "m", &["ant", "wasp", "cat", "dog", "eel"]));
        assert_eq!(renamed, "class 1 was \"bee\" and is \"wasp\"");
        let renamed = differences(data(9, "p", "m", &["b", "c", "d", "e", "f"]));
        assert!(renamed.ends_with("class 2 was \"cat\" and is \"d\" and 2 more"), "{renamed}");
        let other = differences(data(9, "p", "m", &["ant", "bee", "cat", "fox"]));
        assert_eq!(other, "1 class(es) added: \"fox\"; 2 class(es) removed: \"dog\", \"eel\"");
    }
}
