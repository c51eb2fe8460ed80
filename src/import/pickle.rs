//! Reads the pickles that `torch.save` writes, and executes nothing: a machine with the opcodes of protocol 2 that such
//! files use and a list of the names they may mention. Every other opcode or name is refused by name.
//!
//! Values lie in one arena and refer to each other by index, so that neither depth nor cycles can exhaust the stack. Text
//! is shared, never copied, shapes are short and values are counted, so that memory grows with the bytes that are really
//! there, however often a pickle recalls what it remembers.

use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;
use std::rc::Rc;

/// An index into the arena.
type Id = usize;

/// Many times what the largest checkpoint with its optimiser holds: 20,000.
const MOST_VALUES: usize = 1 << 20;
/// No weight has more.
const MOST_DIMENSIONS: usize = 8;

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
    /// A number, a flag, or an object that is only there to be skipped.
    Other,
}

/// The names that a pickle may mention.
#[derive(Debug, Clone, Copy)]
pub enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    StorageType(Number),
    /// Settings that checkpoints carry along.
    Skipped,
}

/// A kind of number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    F64,
    F32,
    F16,
    Bf16,
    /// No weights: counters and flags.
    Integer,
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
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    /// Reads a whole pickle.
    pub fn read(bytes: &[u8]) -> Result<Pickle> {
        Machine { rest: bytes, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() }.run()
    }

    pub fn root(&self) -> &Value {
        &self.values[self.root]
    }

    /// The value of a dictionary's key.
    pub fn get(&self, dict: &Value, key: &str) -> Option<&Value> {
        self.entries(dict).into_iter().find(|(name, _)| *name == key).map(|(_, value)| value)
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
}

/// Python's pickle machine, without the part that calls anything.
struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack at each open mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    fn run(mut self) -> Result<Pickle> {
        loop {
            match self.byte()? {
                0x80 => {
                    let protocol = self.byte()?;
                    ensure!(protocol == 2, "pickle protocol {protocol}, but torch.save writes 2");
                }
                b'.' => return Ok(Pickle { root: self.pop()?, values: self.values }),
                b'(' => self.marks.push(self.stack.len()),
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b']' => self.push(Value::List(Vec::new()))?,
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Other)?;
                }
                b'K' => self.integer(1)?,
                b'M' => self.integer(2)?,
                b'J' => self.integer(4)?,
                0x8a => {
                    let count = self.byte()?.into();
                    self.integer(count)?;
                }
                b'X' => self.text()?,
                b'c' => self.global()?,
                b'q' => {
                    let key = self.byte()?.into();
                    self.remember(key)?;
                }
                b'r' => {
                    let key = self.length()?;
                    self.remember(key)?;
                }
                b'h' => {
                    let key = self.byte()?.into();
                    self.recall(key)?;
                }
                b'j' => {
                    let key = self.length()?;
                    self.recall(key)?;
                }
                b't' => {
                    let members = self.since_mark()?;
                    self.push(Value::Tuple(members))?;
                }
                count @ 0x85..=0x87 => {
                    let members = self.last(usize::from(count - 0x84))?;
                    self.push(Value::Tuple(members))?;
                }
                b'a' => {
                    let members = self.last(1)?;
                    self.append(members)?;
                }
                b'e' => {
                    let members = self.since_mark()?;
                    self.append(members)?;
                }
                b's' => {
                    let members = self.last(2)?;
                    self.set_items(members)?;
                }
                b'u' => {
                    let members = self.since_mark()?;
                    self.set_items(members)?;
                }
                b'Q' => self.persistent()?,
                // NEWOBJ makes what REDUCE makes: both take a name and its arguments.
                b'R' | 0x81 => self.reduce()?,
                // BUILD sets attributes of an object: none that weights need.
                b'b' => {
                    self.pop()?;
                }
                opcode => {
                    bail!("its pickle holds the opcode {opcode:#04x} ({:?}), which no weights need", opcode as char)
                }
            }
        }
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).context("its pickle breaks off")?;
        self.rest = rest;
        Ok(taken)
    }

    fn length(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into()?))
    }

    fn push(&mut self, value: Value) -> Result<()> {
        ensure!(
            self.values.len() < MOST_VALUES,
            "its pickle holds more than {MOST_VALUES} values, which no weights need"
        );
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        Ok(self.last(1)?[0])
    }

    /// The topmost values, but never from below an open mark.
    fn last(&mut self, count: usize) -> Result<Vec<Id>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let start = self.stack.len().checked_sub(count).filter(|&start| start >= floor);
        Ok(self.stack.split_off(start.context("its pickle takes more values than it made")?))
    }

    fn since_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().context("its pickle closes a mark that is not open")?;
        Ok(self.stack.split_off(mark))
    }

    /// Little-endian, in two's complement; a one- or two-byte number is never negative.
    fn integer(&mut self, count: usize) -> Result<()> {
        ensure!(count <= 8, "its pickle holds an integer of {count} bytes");
        let bytes = self.take(count)?;
        let negative = (count > 2 || count == 0) && bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..count].copy_from_slice(bytes);
        self.push(Value::Integer(i64::from_le_bytes(wide)))
    }

    fn text(&mut self) -> Result<()> {
        let length = self.length()? as usize;
        let text = std::str::from_utf8(self.take(length)?).context("its pickle holds text that is not UTF-8")?;
        let value = Value::Text(text.into());
        self.push(value)
    }

    fn line(&mut self) -> Result<String> {
        let end = self.rest.iter().position(|&byte| byte == b'\n').context("its pickle breaks off in a name")?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }

    fn global(&mut self) -> Result<()> {
        let (module, name) = (self.line()?, self.line()?);
        let global = match (module.as_str(), name.as_str()) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "FloatStorage") => Global::StorageType(Number::F32),
            ("torch", "DoubleStorage") => Global::StorageType(Number::F64),
            ("torch", "HalfStorage") => Global::StorageType(Number::F16),
            ("torch", "BFloat16Storage") => Global::StorageType(Number::Bf16),
            (
                "torch",
                "LongStorage" | "IntStorage" | "ShortStorage" | "CharStorage" | "ByteStorage" | "BoolStorage",
            ) => Global::StorageType(Number::Integer),
            ("argparse", "Namespace") | ("torch", "Size" | "device") => Global::Skipped,
            _ => bail!(
                "its pickle names {module:?}.{name:?}, which no weights need; nothing of it was executed, and nothing of it \
                 is imported"
            ),
        };
        self.push(Value::Global(global))
    }

    fn remember(&mut self, key: u32) -> Result<()> {
        let id = *self.stack.last().context("its pickle remembers nothing")?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<()> {
        let id =
            *self.memo.get(&key).with_context(|| format!("its pickle recalls {key}, which it never remembered"))?;
        self.stack.push(id);
        Ok(())
    }

    fn append(&mut self, members: Vec<Id>) -> Result<()> {
        let list = self.target()?;
        let Value::List(list) = list else { bail!("its pickle appends to something that is no list") };
        list.extend(members);
        Ok(())
    }

    fn set_items(&mut self, members: Vec<Id>) -> Result<()> {
        ensure!(members.len().is_multiple_of(2), "its pickle sets a key without a value");
        match self.target()? {
            Value::Dict(pairs) => pairs.extend(members.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            Value::Other => {}
            _ => bail!("its pickle sets items of something that is no dictionary"),
        }
        Ok(())
    }

    /// The value that lies on top and is filled.
    fn target(&mut self) -> Result<&mut Value> {
        let id = *self.stack.last().context("its pickle fills nothing")?;
        Ok(&mut self.values[id])
    }

    /// `("storage", type, key, location, count)`.
    fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let parts = self.members(id)?;
        let &[what, kind, key, _, _] = parts.as_slice() else {
            bail!("its pickle names a storage of {} parts", parts.len())
        };
        match (&self.values[what], &self.values[kind], &self.values[key]) {
            (Value::Text(what), Value::Global(Global::StorageType(number)), Value::Text(key))
                if &**what == "storage" =>
            {
                let storage = Storage { key: key.clone(), number: *number };
                self.push(Value::Storage(storage))
            }
            _ => bail!("its pickle names a storage in a way that torch.save does not"),
        }
    }

    fn reduce(&mut self) -> Result<()> {
        let arguments = self.pop()?;
        let callable = self.pop()?;
        let arguments = self.members(arguments)?;
        let Value::Global(global) = self.values[callable] else { bail!("its pickle calls something that is no name") };
        let made = match global {
            Global::OrderedDict => Value::Dict(Vec::new()),
            Global::RebuildTensor => Value::Tensor(self.tensor(&arguments)?),
            Global::RebuildParameter => {
                let tensor = arguments.first().map(|&id| &self.values[id]);
                tensor
                    .filter(|value| matches!(value, Value::Tensor(_)))
                    .context("its pickle holds a parameter of nothing")?
                    .clone()
            }
            Global::StorageType(_) | Global::Skipped => Value::Other,
        };
        self.push(made)
    }

    /// `_rebuild_tensor_v2(storage, offset, sizes, strides, requires_grad, hooks)`.
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
                _ => bail!("its pickle holds a tensor whose sizes are no counts"),
            };
            let members = self.members(id)?;
            ensure!(members.len() <= MOST_DIMENSIONS, "its pickle holds a tensor of {} dimensions", members.len());
            members.into_iter().map(number).collect()
        };
        Ok(Tensor { storage: storage.clone(), offset: *offset, sizes: numbers(sizes)?, strides: numbers(strides)? })
    }

    fn members(&self, id: Id) -> Result<Vec<Id>> {
        match &self.values[id] {
            // A recalled tuple could make every call as long as the file: no argument list or shape is.
            Value::Tuple(members) if members.len() <= 64 => Ok(members.clone()),
            _ => bail!("its pickle has something else where a tuple belongs"),
        }
    }
}
