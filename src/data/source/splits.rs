//! The names of a source's splits.

use crate::usage;
use anyhow::Result;
use std::path::Path;

/// The name of the training split.
pub const TRAINING: &str = "train";

/// The names that an evaluation split may have.
const EVALUATION: [&str; 3] = ["val", "validation", "test"];

/// The name of the evaluation split in a folder. `holds` says whether the folder has a split with a given name. If the folder has
/// no evaluation split, the result is "val", so that the error of opening that split says what is missing.
///
/// # Errors
/// A usage error if the folder has several evaluation splits, or the error of `holds`.
pub fn evaluation_split(folder: &Path, holds: impl Fn(&str) -> Result<bool>) -> Result<&'static str> {
    let mut found = Vec::new();
    for name in EVALUATION {
        if holds(name)? {
            found.push(name);
        }
    }
    match found[..] {
        [] => Ok(EVALUATION[0]),
        [name] => Ok(name),
        _ => Err(usage!(
            "{}: holds the splits {}, and only one may be for evaluation; move all but that one out of the folder",
            folder.display(),
            found.join(" and ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_three_names_is_the_evaluation_split_and_several_are_refused_by_name() {
        let of = |there: &[&str]| evaluation_split(Path::new("images"), |name| Ok(there.contains(&name)));
        for name in ["val", "validation", "test"] {
            assert_eq!(of(&["train", name]).unwrap(), name);
        }
        assert_eq!(of(&["train"]).unwrap(), "val");
        let error = of(&["val", "test"]).unwrap_err().to_string();
        assert!(error.contains("images: ") && error.contains("val and test"), "{error}");
    }
}
