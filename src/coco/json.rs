//! Reads the entries of COCO's JSON files.
//!
//! A field that is not needed may hold any value, because programs that write such files differ in these fields. The error text
//! about an entry is the end of a sentence, and [`at_entry`] puts the beginning before it, such as «entry 3 (from 0) of
//! `annotations`». Ids may be numbers or strings, as in pycocotools.

use crate::usage;
use anyhow::Result;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::{Display, Formatter};
use std::path::Path;

/// The id of an image or a category.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(untagged, from = "StoredId")]
pub enum Id {
    Number(i64),
    Text(String),
}

/// An id as it is written in JSON. Whole numbers may be written as 1.0, as pandas sometimes writes them.
#[derive(Deserialize)]
#[serde(untagged)]
enum StoredId {
    Whole(i64),
    Float(f64),
    Text(String),
}

/// The value of a field, which has the needed type `T` or any other type.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Value<T> {
    Needed(T),
    Other(IgnoredAny),
}

/// A field of an entry. None if the field is absent or null.
pub type Field<T> = Option<Value<T>>;

/// An entry of the list `categories`.
#[derive(Deserialize)]
pub struct StoredCategory {
    id: Field<Id>,
    name: Field<String>,
}

/// A truth value, which may be written as a number.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Flag {
    Truth(bool),
    Number(f64),
}

pub const NUMBER_OR_TEXT: &str = "a whole number or a text";

/// A usage error about a file.
pub fn refusal(file: &Path, what: &str) -> anyhow::Error {
    usage!("{}: {what}", file.display())
}

/// Reads a JSON file. Python writes `NaN`, `Infinity` and `-Infinity`, which JSON does not have. They are replaced by empty
/// strings.
///
/// # Errors
/// A usage error if the file cannot be read.
pub fn read(file: &Path) -> Result<Vec<u8>> {
    let mut bytes = std::fs::read(file).map_err(|e| refusal(file, &e.to_string()))?;
    replace_nan_and_infinity(&mut bytes);
    Ok(bytes)
}

/// Parses the bytes of a JSON file, which must begin with `bracket`. A byte order mark and white space before the bracket are
/// skipped.
///
/// # Errors
/// A usage error that names the file, if the bytes cannot be parsed.
pub fn parse<'a, T: Deserialize<'a>>(file: &Path, bytes: &'a [u8], bracket: u8) -> Result<T> {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii_start();
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

/// Replaces `NaN`, `Infinity` and `-Infinity` outside of strings by an empty string and spaces. If the field must be a number, the
/// empty string is refused later.
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

/// The value of a field that must be present. `kind` describes the needed type in the text of an error.
///
/// # Errors
/// Fails if the field is absent or has another type.
pub fn needed<T>(field: Field<T>, name: &str, kind: &str) -> Result<T, String> {
    match field {
        Some(Value::Needed(value)) => Ok(value),
        Some(Value::Other(_)) => Err(format!("has a field {name} that is not {kind}")),
        None => Err(format!("has no {name}")),
    }
}

/// The value of a field. None if the field is absent or has another type.
pub fn valid<T>(field: Field<T>) -> Option<T> {
    match field {
        Some(Value::Needed(value)) => Some(value),
        _ => None,
    }
}

/// Whether the field `iscrowd` is true or a number other than 0. An absent field counts as false.
///
/// # Errors
/// Fails if the value is neither a truth value nor a whole number.
pub fn is_crowd(field: &Field<Flag>) -> Result<bool, String> {
    match field {
        None => Ok(false),
        Some(Value::Needed(Flag::Truth(crowd))) => Ok(*crowd),
        Some(Value::Needed(Flag::Number(number))) if number.fract() == 0.0 => Ok(*number != 0.0),
        Some(_) => Err("has an iscrowd that is neither 0 nor 1".into()),
    }
}

/// The text of an error about an entry: the number of the entry and the name of its list, followed by `what`. `list` is empty for a
/// results file, whose only list has no name.
pub fn at_entry(list: &str, entry: usize, what: &str) -> String {
    if list.is_empty() {
        format!("entry {entry} (from 0) {what}")
    } else {
        format!("entry {entry} (from 0) of `{list}` {what}")
    }
}

/// The names of the categories in the order of their ids. If a category has no valid name, its id is its name. If two entries have
/// the same id, the later entry counts, as in pycocotools.
///
/// # Errors
/// Fails if an entry has no valid id, if there are no categories, or if some ids are numbers and others are strings.
pub fn categories(entries: Option<Vec<StoredCategory>>) -> Result<BTreeMap<Id, String>, String> {
    let mut categories = BTreeMap::new();
    for (entry, category) in entries.unwrap_or_default().into_iter().enumerate() {
        let id = needed(category.id, "id", NUMBER_OR_TEXT).map_err(|what| at_entry("categories", entry, &what))?;
        let name = valid(category.name).unwrap_or_else(|| id.to_string().trim_matches('"').into());
        categories.insert(id, name);
    }
    check_ids("categories", categories.keys())?;
    Ok(categories)
}

/// Fails if there are no ids. Also fails if some ids are numbers and others are strings, because numbers and strings have no common
/// order. The ids must be sorted, so that numbers come first.
///
/// # Errors
/// The error is a text that names the list.
pub fn check_ids<'a>(list: &str, ids: impl DoubleEndedIterator<Item = &'a Id>) -> Result<(), String> {
    let mut ids = ids;
    let first = ids.next();
    match (first, ids.next_back().or(first)) {
        (Some(Id::Number(number)), Some(Id::Text(text))) => {
            Err(format!("its `{list}` have the ids {number} and {text:?}; give them numbers alone or texts alone"))
        }
        (None, _) => Err(format!("it lists no `{list}`, so that nothing can be evaluated")),
        _ => Ok(()),
    }
}

/// The position of each id in `ids`, which must be sorted.
pub fn positions<'a>(ids: impl Iterator<Item = &'a Id>) -> BTreeMap<&'a Id, u64> {
    ids.zip(0..).collect()
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
