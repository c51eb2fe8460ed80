//! The values of a pickle that `torch.save` wrote. [`super::machine`] reads them and executes nothing.
//!
//! Values lie in one arena and refer to each other by index, so neither depth nor cycles can exhaust the stack. Texts are shared
//! instead of copied. The length of shapes and the number of values are limited. So the memory depends on the length of the pickle,
//! but not on how often the pickle fetches values from its memo.

use super::globals::{Global, Number};
use std::rc::Rc;

/// An index into the arena.
pub type Id = usize;

/// A value of a pickle. Only values that weights need are kept.
#[derive(Debug, Clone)]
pub enum Value {
    Integer(i64),
    Text(Rc<str>),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage),
    Tensor(Tensor),
    /// Python's None, a truth value, any other number, or an object that is ignored.
    Other,
}

/// A file of numbers in the zip that also holds the pickle.
#[derive(Debug, Clone)]
pub struct Storage {
    pub key: Rc<str>,
    pub number: Number,
}

/// The position of a tensor in its storage. The offset and the strides count numbers, not bytes.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub storage: Storage,
    pub offset: i64,
    pub sizes: Vec<i64>,
    pub strides: Vec<i64>,
}

/// A pickle's values.
#[derive(Debug)]
pub struct Pickle {
    pub(super) values: Vec<Value>,
    pub(super) root: Id,
}

impl Pickle {
    pub fn root(&self) -> &Value {
        &self.values[self.root]
    }

    /// The value of a key in a dictionary, or the last value if the key is set several times. None if `dict` is not a dictionary or
    /// lacks the key.
    pub fn get(&self, dict: &Value, key: &str) -> Option<&Value> {
        self.entries(dict).into_iter().rfind(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// The entries of a dictionary, except the entries whose key is no text. Empty if `dict` is not a dictionary.
    pub fn entries<'a>(&'a self, dict: &Value) -> Vec<(&'a str, &'a Value)> {
        let Value::Dict(pairs) = dict else { return Vec::new() };
        let entry = |&(key, value): &(Id, Id)| match &self.values[key] {
            Value::Text(name) => Some((&**name, &self.values[value])),
            _ => None,
        };
        pairs.iter().filter_map(entry).collect()
    }

    /// The members of a list. Empty if `list` is not a list.
    pub fn members(&self, list: &Value) -> Vec<&Value> {
        let Value::List(members) = list else { return Vec::new() };
        members.iter().map(|&id| &self.values[id]).collect()
    }

    /// Whether the value is a dictionary in which a text names a tensor.
    pub fn holds_tensors(&self, dict: &Value) -> bool {
        self.entries(dict).iter().any(|(_, value)| matches!(value, Value::Tensor(_)))
    }
}
