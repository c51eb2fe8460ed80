//! What a pickle of `torch.save` holds. [`super::machine`] makes it, and executes nothing.
//!
//! Values lie in one arena and refer to each other by index, so that neither depth nor cycles can exhaust the stack. Text
//! is shared, never copied, shapes are short and values are counted, so that memory grows with the bytes that are really
//! there, however often a pickle recalls what it remembers.

use super::globals::{Global, Number};
use std::rc::Rc;

/// An index into the arena.
pub type Id = usize;

/// What a pickle is made of, as far as weights are concerned.
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
    /// A number, a flag, or an object that is passed over.
    Other,
}

/// A file of numbers beside the pickle.
#[derive(Debug, Clone)]
pub struct Storage {
    pub key: Rc<str>,
    pub number: Number,
}

/// Where a tensor's numbers lie in its storage; all counts are of numbers.
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

    /// The value of a dictionary's key; of a key that is set twice, the later value.
    pub fn get(&self, dict: &Value, key: &str) -> Option<&Value> {
        self.entries(dict).into_iter().rfind(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// A dictionary's entries whose keys are text.
    pub fn entries<'a>(&'a self, dict: &Value) -> Vec<(&'a str, &'a Value)> {
        let Value::Dict(pairs) = dict else { return Vec::new() };
        let entry = |&(key, value): &(Id, Id)| match &self.values[key] {
            Value::Text(name) => Some((&**name, &self.values[value])),
            _ => None,
        };
        pairs.iter().filter_map(entry).collect()
    }

    /// A list's members.
    pub fn members(&self, list: &Value) -> Vec<&Value> {
        let Value::List(members) = list else { return Vec::new() };
        members.iter().map(|&id| &self.values[id]).collect()
    }

    /// Whether the value is a dictionary in which a tensor has a name.
    pub fn holds_tensors(&self, dict: &Value) -> bool {
        self.entries(dict).iter().any(|(_, value)| matches!(value, Value::Tensor(_)))
    }
}
