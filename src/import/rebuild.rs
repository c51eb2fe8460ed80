//! The part of the pickle machine that makes a storage, a tensor or another object from a name and its arguments.

use super::globals::{Global, Number};
use super::machine::Machine;
use super::pickle::{Id, Storage, Tensor, Value};
use anyhow::{Result, bail, ensure};

/// The largest number of dimensions of a tensor. No weight has more.
const MOST_DIMENSIONS: usize = 8;

impl Machine<'_> {
    /// Replaces the tuple `("storage", class, key, device, count)` by the storage that it names.
    pub(super) fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let parts = self.members(id)?;
        let &[what, kind, key, _, _] = parts.as_slice() else {
            bail!("its pickle names a storage of {} parts", parts.len())
        };
        match (&self.values[what], &self.values[kind], &self.values[key]) {
            (Value::Text(what), Value::Global(Global::Kind(number)), Value::Text(key)) if &**what == "storage" => {
                let storage = Storage { key: key.clone(), number: *number };
                self.push(Value::Storage(storage))
            }
            _ => bail!("its pickle names a storage in a way that torch.save does not"),
        }
    }

    /// Replaces a name and the tuple of its arguments by the value that stands for the object which Python would make from them.
    pub(super) fn reduce(&mut self) -> Result<()> {
        let arguments = self.pop()?;
        let callable = self.pop()?;
        let Value::Global(global) = self.values[callable] else { bail!("its pickle calls a value that is not a name") };
        let made = match global {
            Global::Dictionary => Value::Dict(Vec::new()),
            Global::Kind(_) | Global::Skipped => Value::Other,
            Global::RebuildOfType => {
                // The arguments are a rebuilding name, a class, the arguments of that name, and attributes.
                let parts = self.members(arguments)?;
                match parts.first().map(|&id| &self.values[id]) {
                    Some(&Value::Global(inner)) if parts.len() > 2 => self.rebuilt(inner, parts[2])?,
                    _ => bail!("its pickle holds a tensor of another class without its arguments"),
                }
            }
            _ => self.rebuilt(global, arguments)?,
        };
        self.push(made)
    }

    /// The tensor that a rebuilding name makes from its arguments.
    fn rebuilt(&self, global: Global, arguments: Id) -> Result<Value> {
        let arguments = self.members(arguments)?;
        match global {
            Global::RebuildTensor => Ok(Value::Tensor(self.tensor(&arguments)?)),
            Global::RebuildTensorOfKind => {
                let mut tensor = self.tensor(&arguments)?;
                let kind = arguments.get(6).map(|&id| &self.values[id]);
                tensor.storage.number = match kind {
                    Some(Value::Global(Global::Kind(number))) => *number,
                    _ => Number::Other,
                };
                Ok(Value::Tensor(tensor))
            }
            Global::RebuildParameter => match arguments.first().map(|&id| &self.values[id]) {
                Some(Value::Tensor(tensor)) => Ok(Value::Tensor(tensor.clone())),
                _ => bail!("its pickle holds a parameter without a tensor"),
            },
            _ => bail!("its pickle rebuilds a tensor in a way that torch.save does not"),
        }
    }

    /// The tensor of the arguments `(storage, offset, sizes, strides, …)`.
    fn tensor(&self, arguments: &[Id]) -> Result<Tensor> {
        let &[storage, offset, sizes, strides, ..] = arguments else {
            bail!("its pickle holds a tensor without sizes")
        };
        let (Value::Storage(storage), Value::Integer(offset)) = (&self.values[storage], &self.values[offset]) else {
            bail!("its pickle holds a tensor without a storage");
        };
        let numbers = |id: Id| -> Result<Vec<i64>> {
            let number = |id: Id| match self.values[id] {
                Value::Integer(number) if number >= 0 => Ok(number),
                _ => bail!("its pickle holds a tensor whose sizes are not counts"),
            };
            let members = self.members(id)?;
            ensure!(members.len() <= MOST_DIMENSIONS, "its pickle holds a tensor of {} dimensions", members.len());
            members.into_iter().map(number).collect()
        };
        Ok(Tensor { storage: storage.clone(), offset: *offset, sizes: numbers(sizes)?, strides: numbers(strides)? })
    }

    /// The members of a tuple.
    fn members(&self, id: Id) -> Result<Vec<Id>> {
        match &self.values[id] {
            // A long tuple that the pickle often fetches from its memo would be copied each time. No arguments or shapes are so
            // long.
            Value::Tuple(members) if members.len() <= 64 => Ok(members.clone()),
            _ => bail!("its pickle holds another value in the place of a tuple, or a tuple of more than 64 members"),
        }
    }
}
