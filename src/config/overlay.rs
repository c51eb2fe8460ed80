//! Merges the layers of a config: `--set` overrides the user's file, and the user's file overrides the defaults. A key that the
//! defaults lack is refused.

use super::{Config, PHASE_TABLES};
use crate::{require, usage};
use anyhow::Result;
use toml::{Table, Value};

/// Parses `key.path=value` into nested tables. A value that is not TOML counts as a string.
pub(super) fn parse_set(set: &str) -> Result<Table> {
    let (key, text) =
        set.split_once('=').ok_or_else(|| usage!("--set {set}: write key=value, such as --set module.epochs=10"))?;
    let value = format!("v = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(text.into()));
    Ok(key.trim().rsplit('.').fold(value, |inner, part| Value::Table(Table::from_iter([(part.to_string(), inner)]))))
        .and_then(|v| match v {
            Value::Table(table) => Ok(table),
            _ => Err(usage!("--set {set}: the key is missing")),
        })
}

/// Overrides `base` by `over`. Tables are merged, and every other value is replaced.
pub(super) fn lay_over(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(value)) => lay_over(inner, value),
            // An integer such as `base_lr = 1` becomes a float if it replaces a float.
            (Some(Value::Float(slot)), Value::Integer(value)) => *slot = value as f64,
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// Refuses a key that the defaults lack, and a value whose type does not fit the type of the default.
pub(super) fn check_keys(user: &Table, defaults: &Table) -> Result<()> {
    for (name, value) in user {
        let Some(known) = defaults.get(name).and_then(Value::as_table) else {
            return Err(usage!("unknown key `{name}`{}", suggestion(name, defaults.keys())));
        };
        let Some(table) = value.as_table() else {
            return Err(usage!("`{name}` is a table: write [{name}] and its keys below it"));
        };
        let mut known = known.clone();
        if PHASE_TABLES.contains(&name.as_str()) {
            // A phase table may also set any key of [train].
            let shared = defaults["train"].as_table().expect("[train] is a table");
            known.extend(shared.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        for (key, value) in table {
            let Some(default) = known.get(key) else {
                return Err(usage!("unknown key `{name}.{key}`{}", suggestion(key, known.keys())));
            };
            let same = default.type_str() == value.type_str()
                || (default.is_float() && value.is_integer())
                // `run.micro_batch` takes a number or a word, so its type is checked later.
                || (name == "run" && key == "micro_batch");
            require!(
                same,
                "`{name}.{key} = {}` is {}, but {} is expected, such as {default}",
                one_line(value),
                with_article(value.type_str()),
                with_article(default.type_str())
            );
        }
    }
    Ok(())
}

/// Finds the user's first key whose value cannot be read, and explains why. `error_of` returns the error of a config that sets only
/// this key, or none if there is no error.
pub(super) fn unreadable(
    user: &Table,
    defaults: &Table,
    error_of: impl Fn(Table) -> Option<toml::de::Error>,
) -> Option<anyhow::Error> {
    let tables = user.iter().filter_map(|(name, table)| Some((name, table.as_table()?)));
    let mut keys = tables.flat_map(|(name, table)| table.iter().map(move |(key, value)| (name, key, value)));
    keys.find_map(|(name, key, value)| {
        let alone = Table::from_iter([(key.clone(), value.clone())]);
        let error = error_of(Table::from_iter([(name.clone(), Value::Table(alone))]))?;
        let default = defaults.get(name).and_then(|table| table.get(key)).or_else(|| defaults["train"].get(key));
        let default = default.map_or(String::new(), |default| format!("; the default is {default}"));
        Some(usage!("{name}.{key} = {}: {}{default}", one_line(value), in_plain_words(error.message())))
    })
}

/// Takes the first line of serde's message, and replaces Rust's type names by plain words.
fn in_plain_words(message: &str) -> String {
    let mut text = message.lines().next().unwrap_or_default().to_string();
    for (rust, plain) in [
        ("expected u64", "expected a whole number of at least 0"),
        ("expected usize", "expected a whole number of at least 0"),
        ("expected f64", "expected a number"),
    ] {
        text = text.replace(rust, plain);
    }
    text
}

/// A value as one line of a message. The line is truncated if it is long.
fn one_line(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text: String = value.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn with_article(kind: &str) -> String {
    let article = if kind.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {kind}")
}

/// The end of an error about an unknown key: «; did you mean `epochs`?» if a known key is similar. Otherwise the end of the error
/// lists all known keys.
fn suggestion<'a>(wrong: &str, known: impl Iterator<Item = &'a String>) -> String {
    let known: Vec<&String> = known.collect();
    match known.iter().map(|k| (strsim::levenshtein(wrong, k), k)).min() {
        Some((d, key)) if d <= 2.max(wrong.len() / 3) => format!("; did you mean `{key}`?"),
        _ => format!("; known here: {}", known.iter().map(|k| k.as_str()).collect::<Vec<_>>().join(", ")),
    }
}

/// Every key, such as `meta.epochs`, with its value as TOML writes it.
pub(super) fn flatten(config: &Config) -> Vec<(String, String)> {
    let value = Value::try_from(config).expect("a config is plain data");
    let tables = value.as_table().expect("a config is a table");
    tables
        .iter()
        .flat_map(|(name, table)| {
            let table = table.as_table().expect("a config is a table of tables");
            table.iter().map(move |(key, value)| (format!("{name}.{key}"), value.to_string()))
        })
        .collect()
}
