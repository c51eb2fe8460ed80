//! Reads a study file, and combines the values of its axes.

use super::Method;
use crate::run::table::METHODS;
use crate::{require, usage};
use anyhow::Result;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The content of a study file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    #[serde(default)]
    base: Option<PathBuf>,
    dir: PathBuf,
    #[serde(default)]
    set: Table,
    axes: Table,
}

/// A study file with the texts of its base configs.
pub struct File {
    pub name: String,
    pub dir: PathBuf,
    base: Option<String>,
    set: Vec<String>,
    axes: Vec<Axis>,
}

struct Axis {
    name: String,
    values: Vec<AxisValue>,
}

/// A value of an axis.
#[derive(Clone)]
struct AxisValue {
    name: String,
    /// The method of the cells with this value. None if the value sets no method.
    method: Option<Method>,
    /// The name of another value of the axis. A cell with this value should cost as much as the same cell with the other value.
    equal_cost_to: Option<String>,
    /// The text of the value's own base config. None if the value names no base config.
    base: Option<String>,
    /// The config keys that the value sets, each in the form `table.key=value` of the option `--set`.
    sets: Vec<String>,
}

/// One value of each axis, and the config that follows from these values.
#[derive(Debug, Clone, PartialEq)]
pub struct Combination {
    pub name: String,
    pub method: Method,
    /// The text of the base config.
    pub base: String,
    /// The config keys that the study and the values set, each in the form `table.key=value` of the option `--set`.
    pub sets: Vec<String>,
    /// The combination whose cost this combination should equal. None if the cost is free.
    pub equal_to: Option<Box<Combination>>,
}

/// Reads a study file, its base config, and the base configs of its values.
pub fn read(path: &Path) -> Result<File> {
    let text = std::fs::read_to_string(path).map_err(|e| usage!("{}: cannot read the study: {e}", path.display()))?;
    let written: Written = toml::from_str(&text).map_err(|e| usage!("{}", e.to_string().trim().replace('\n', " ")))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let base = written.base.as_deref().map(|base| text_of(folder, "base", base)).transpose()?;
    let axes = written.axes.iter().map(|(name, values)| axis(folder, name, values)).collect::<Result<Vec<Axis>>>()?;
    require!(!axes.is_empty(), "axes: give at least one, such as [axes.seed.s0] with run.seed = 0");
    let has_own = |axis: &Axis| axis.values.iter().all(|value| value.base.is_some());
    require!(
        base.is_some() || axes.iter().any(has_own),
        "base: name one config on which all cells are based, or give every value of one axis a base of its own"
    );
    Ok(File { name: written.name, dir: written.dir, base, set: sets("set", &written.set)?, axes })
}

/// The text of a base config, whose path is relative to the folder of the study file.
fn text_of(folder: &Path, key: &str, base: &Path) -> Result<String> {
    let path = folder.join(base);
    std::fs::read_to_string(&path).map_err(|e| usage!("{key} = {base:?}: {}: {e}", path.display()))
}

fn axis(folder: &Path, name: &str, values: &Value) -> Result<Axis> {
    let values = values.as_table().filter(|values| !values.is_empty());
    let values = values.ok_or_else(|| usage!("axes.{name}: give its values, such as [axes.{name}.VALUE]"))?;
    let value = |(value, keys): (&String, &Value)| -> Result<AxisValue> {
        let at = format!("axes.{name}.{value}");
        let is_name = |c: char| c.is_ascii_alphanumeric() || ['_', '.', '+'].contains(&c);
        require!(
            value.chars().all(is_name) && value.starts_with(|c: char| c.is_ascii_alphanumeric()),
            "{at}: the name of a value is part of a folder name; begin it with a letter or digit, and use only ASCII letters, digits, \
             _, . and +"
        );
        let mut keys = keys.as_table().ok_or_else(|| usage!("{at}: give config keys, such as run.seed = 0"))?.clone();
        let word = |value: Option<Value>, key: &str| match value {
            None => Ok(None),
            Some(Value::String(word)) => Ok(Some(word)),
            Some(other) => Err(usage!("{at}.{key} = {other}: a text is expected")),
        };
        let method = match word(keys.remove("method"), "method")?.as_deref() {
            None => None,
            Some(word) => Some(METHODS.into_iter().find(|method| method.key() == word).ok_or_else(|| {
                let known = METHODS.map(|method| format!("{:?}", method.key()));
                usage!("{at}.method = {word:?}: give one of {}", known.join(", "))
            })?),
        };
        let equal_cost_to = word(keys.remove("equal_cost_to"), "equal_cost_to")?;
        let base = word(keys.remove("base"), "base")?;
        let base = base.map(|base| text_of(folder, &format!("{at}.base"), Path::new(&base))).transpose()?;
        Ok(AxisValue { name: value.clone(), method, equal_cost_to, base, sets: sets(&at, &keys)? })
    };
    Ok(Axis { name: name.into(), values: values.iter().map(value).collect::<Result<_>>()? })
}

/// The keys of config tables, each in the form `table.key=value` of the option `--set`. Errors name `at`, the place in the file.
fn sets(at: &str, tables: &Table) -> Result<Vec<String>> {
    let mut sets = Vec::new();
    for (table, keys) in tables {
        let keys = keys
            .as_table()
            .ok_or_else(|| usage!("{at}.{table}: a config key needs its table before it, such as model.width = 64"))?;
        sets.extend(keys.iter().map(|(key, value)| format!("{table}.{key}={value}")));
    }
    Ok(sets)
}

impl File {
    /// All combinations of one value of each axis. The values of the last axis change fastest.
    pub fn combinations(&self) -> Result<Vec<Combination>> {
        let mut chosen: Vec<Vec<&AxisValue>> = vec![Vec::new()];
        for axis in &self.axes {
            let mut longer = Vec::new();
            for before in &chosen {
                longer.extend(axis.values.iter().map(|value| [&before[..], &[value]].concat()));
            }
            chosen = longer;
        }
        chosen.iter().map(|values| self.combination(values)).collect()
    }

    fn combination(&self, values: &[&AxisValue]) -> Result<Combination> {
        let mut combination = self.plain(values);
        for (position, (axis, value)) in self.axes.iter().zip(values).enumerate() {
            let Some(wanted) = &value.equal_cost_to else { continue };
            let twin = axis.values.iter().find(|other| other.name == *wanted && other.name != value.name);
            let twin = twin.ok_or_else(|| {
                let (axis, value) = (&axis.name, &value.name);
                usage!("axes.{axis}.{value}.equal_cost_to = {wanted:?}: name another value of [axes.{axis}]")
            })?;
            let mut others = values.to_vec();
            others[position] = twin;
            combination.equal_to = Some(Box::new(self.plain(&others)));
        }
        Ok(combination)
    }

    /// The combination of these values, with `equal_to` still empty.
    fn plain(&self, values: &[&AxisValue]) -> Combination {
        let names: Vec<&str> = values.iter().map(|value| value.name.as_str()).collect();
        let method = values.iter().rev().find_map(|value| value.method).unwrap_or(Method::Incubation);
        let sets = values.iter().flat_map(|value| value.sets.clone());
        let base = values.iter().rev().find_map(|value| value.base.as_ref()).or(self.base.as_ref());
        Combination {
            base: base.expect("reading has checked that there is one").clone(),
            name: names.join("-"),
            method,
            sets: self.set.iter().cloned().chain(sets).collect(),
            equal_to: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn study(text: &str) -> Result<File> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("base.toml"), "").unwrap();
        std::fs::write(folder.path().join("study.toml"), format!("name='s'\nbase='base.toml'\ndir='d'\n{text}"))
            .unwrap();
        read(&folder.path().join("study.toml"))
    }

    const METHODS: &str = "[axes.method.incubation]\n[axes.method.e2e]\nmethod='e2e'\nequal_cost_to='incubation'\n";

    #[test]
    fn cells_are_all_combinations_in_the_order_of_the_file() {
        let file =
            study(&format!("[set]\nrun.seed=7\n[axes.depth.d4]\nmodel.depths=[1,3]\n[axes.depth.d2]\n{METHODS}"))
                .unwrap();
        let all = file.combinations().unwrap();
        let names: Vec<&str> = all.iter().map(|cell| cell.name.as_str()).collect();
        assert_eq!(names, ["d4-incubation", "d4-e2e", "d2-incubation", "d2-e2e"]);
        assert_eq!(all[1].sets, ["run.seed=7", "model.depths=[1, 3]"]);
        assert_eq!((all[1].method, all[1].equal_to.as_deref()), (Method::E2e, Some(&all[0])));
    }

    #[test]
    fn a_value_may_have_a_base_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("a.toml", "# a"), ("b.toml", "# b")] {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let of = |text: &str| {
            std::fs::write(folder.path().join("s.toml"), format!("name='s'\ndir='d'\n{text}")).unwrap();
            read(&folder.path().join("s.toml"))
        };
        let seeds = "[axes.seed.s0]\n[axes.seed.s1]\n";
        let file = of(&format!("[axes.net.a]\nbase='a.toml'\n[axes.net.b]\nbase='b.toml'\n{seeds}")).unwrap();
        let bases: Vec<String> = file.combinations().unwrap().into_iter().map(|cell| cell.base).collect();
        assert_eq!(bases, ["# a", "# a", "# b", "# b"]);
        let error = format!("{:#}", of(&format!("[axes.net.a]\nbase='a.toml'\n[axes.net.b]\n{seeds}")).err().unwrap());
        assert!(error.contains("base: name one config on which all cells are based"), "{error}");
        let error = format!("{:#}", of("[axes.net.a]\nbase='c.toml'\n").err().unwrap());
        assert!(error.contains("axes.net.a.base = \"c.toml\""), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, words) in [
            ("[axes]", "axes: give at least one"),
            ("axes.depth.d1 = 3", "axes.depth.d1: give config keys"),
            ("[axes.depth.'../x']", "letters, digits"),
            ("[axes.m.a]\nmethod='both'", "axes.m.a.method = \"both\""),
            ("[axes.m.a]\nwidth=3", "axes.m.a.width: a config key needs its table before it"),
            ("[axes.m.a]\n[extra]", "unknown field `extra`"),
        ] {
            let error = format!("{:#}", study(text).err().expect(text));
            assert!(error.contains(words), "{text}: {error}");
        }
        let error = study("[axes.m.a]\nequal_cost_to='b'").unwrap().combinations().unwrap_err().to_string();
        assert!(error.contains("axes.m.a.equal_cost_to = \"b\": name another value of [axes.m]"), "{error}");
    }
}
