//! Reads pickles as Python's pickle machine does, but calls nothing. The machine here knows the opcodes of protocols 2 to 5 that
//! pickles of weights need, and the names in [`super::globals`]. It refuses every other opcode or name.

use super::globals::Global;
use super::pickle::{Id, Pickle, Value};
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;

/// The largest number of values in a pickle. A checkpoint of a large model with its optimiser holds about 20,000.
const MOST_VALUES: usize = 1 << 20;
const LATEST_PROTOCOL: u8 = 5;

/// The cure for a pickle that is refused.
const CURE: &str = "nothing of it was executed. If you trust who wrote the file, save its weights alone: python -c \"import \
                    torch; c = torch.load('THIS_FILE', map_location='cpu', weights_only=False); c = next((c[k] for k in \
                    ('model', 'state_dict') if k in c), c) if isinstance(c, dict) else c; torch.save(c.state_dict() if \
                    hasattr(c, 'state_dict') else c, 'weights.pth')\"";

/// Reads a pickle from its first byte to its STOP opcode.
pub fn read(bytes: &[u8]) -> Result<Pickle> {
    Machine { rest: bytes, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() }.run()
}

pub(super) struct Machine<'a> {
    rest: &'a [u8],
    pub(super) values: Vec<Value>,
    stack: Vec<Id>,
    /// The height of the stack at each open mark, from the oldest mark to the newest.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    fn run(mut self) -> Result<Pickle> {
        loop {
            let opcode = self.byte()?;
            if opcode == b'.' {
                return Ok(Pickle { root: self.pop()?, values: self.values });
            }
            let is_known = self.constant(opcode)?
                || self.container(opcode)?
                || self.memo_and_stack(opcode)?
                || self.object(opcode)?;
            ensure!(
                is_known,
                "{} the opcode {opcode:#04x} ({:?}), which no weights need; {CURE}",
                self.error_subject(),
                opcode as char
            );
        }
    }

    /// Executes an opcode that pushes None, a truth value, a number, a text or bytes. Returns false for any other opcode.
    fn constant(&mut self, opcode: u8) -> Result<bool> {
        match opcode {
            b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
            b'G' => self.ignored(8)?,
            b'K' => self.integer(1)?,
            b'M' => self.integer(2)?,
            b'J' => self.integer(4)?,
            0x8a => {
                let count = self.length(1)?;
                self.integer(count)?;
            }
            0x8b => {
                let count = self.length(4)?;
                self.integer(count)?;
            }
            // Texts of Python 3 and Python 2.
            0x8c | b'U' => self.text(1)?,
            b'X' | b'T' => self.text(4)?,
            0x8d => self.text(8)?,
            // Bytes.
            b'C' => self.bytes(1)?,
            b'B' => self.bytes(4)?,
            0x8e | 0x96 => self.bytes(8)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Executes an opcode that opens a mark, or that makes or fills a tuple, list, set or dictionary. Returns false for any other
    /// opcode.
    fn container(&mut self, opcode: u8) -> Result<bool> {
        match opcode {
            b'(' => self.marks.push(self.stack.len()),
            b'}' => self.push(Value::Dict(Vec::new()))?,
            b']' => self.push(Value::List(Vec::new()))?,
            b')' => self.push(Value::Tuple(Vec::new()))?,
            b't' => {
                let members = self.pop_to_mark()?;
                self.push(Value::Tuple(members))?;
            }
            0x85..=0x87 => {
                let members = self.pop_many(usize::from(opcode - 0x84))?;
                self.push(Value::Tuple(members))?;
            }
            b'l' => {
                let members = self.pop_to_mark()?;
                self.push(Value::List(members))?;
            }
            b'd' => {
                let members = self.pop_to_mark()?;
                self.push(Value::Dict(Vec::new()))?;
                self.set_items(members)?;
            }
            b'a' => {
                let members = self.pop_many(1)?;
                self.append(members)?;
            }
            b'e' => {
                let members = self.pop_to_mark()?;
                self.append(members)?;
            }
            b's' => {
                let members = self.pop_many(2)?;
                self.set_items(members)?;
            }
            b'u' => {
                let members = self.pop_to_mark()?;
                self.set_items(members)?;
            }
            // These opcodes make or fill a set. The members of the set are dropped, because weights need no sets.
            0x8f => self.push(Value::Other)?,
            0x90 => drop(self.pop_to_mark()?),
            0x91 => {
                self.pop_to_mark()?;
                self.push(Value::Other)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Executes an opcode that stores a value in the memo or fetches a value from it, or that duplicates or drops values of the
    /// stack. Returns false for any other opcode.
    fn memo_and_stack(&mut self, opcode: u8) -> Result<bool> {
        match opcode {
            b'q' | b'r' => {
                let key = self.length(if opcode == b'q' { 1 } else { 4 })?;
                self.store_in_memo(key as u32)?;
            }
            0x94 => self.store_in_memo(self.memo.len() as u32)?,
            b'h' | b'j' => {
                let key = self.length(if opcode == b'h' { 1 } else { 4 })? as u32;
                let stored = self.memo.get(&key);
                let &id = stored
                    .with_context(|| format!("its pickle fetches {key} from its memo, where it stored nothing"))?;
                self.stack.push(id);
            }
            b'0' if self.marks.last() == Some(&self.stack.len()) => drop(self.marks.pop()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let id = self.pop()?;
                self.stack.extend([id, id]);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Executes an opcode that gives the protocol or a frame, that pushes a name or a storage, or that makes or changes an object.
    /// Returns false for any other opcode.
    fn object(&mut self, opcode: u8) -> Result<bool> {
        match opcode {
            0x80 => {
                let protocol = self.byte()?;
                ensure!(
                    (2..=LATEST_PROTOCOL).contains(&protocol),
                    "its pickle has protocol {protocol}; 2 to {LATEST_PROTOCOL} are read"
                );
            }
            // FRAME gives the length of a frame, which is not needed.
            0x95 => drop(self.take(8)?),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)?;
            }
            0x93 => {
                let names = self.pop_many(2)?;
                let (Value::Text(module), Value::Text(name)) = (&self.values[names[0]], &self.values[names[1]]) else {
                    bail!("its pickle gives a name that is not a text")
                };
                let (module, name) = (module.clone(), name.clone());
                self.global(&module, &name)?;
            }
            b'Q' => self.persistent()?,
            // REDUCE and NEWOBJ both take a name and its arguments.
            b'R' | 0x81 => self.reduce()?,
            // NEWOBJ_EX also takes named arguments, which lie on top of the stack.
            0x92 => {
                self.pop()?;
                self.reduce()?;
            }
            // BUILD sets attributes of an object. Weights need none.
            b'b' => drop(self.pop()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).context("its pickle breaks off")?;
        self.rest = rest;
        Ok(taken)
    }

    /// Reads a length or a key of the memo: an unsigned little-endian number of `byte_count` bytes.
    fn length(&mut self, byte_count: usize) -> Result<usize> {
        let mut padded = [0; 8];
        padded[..byte_count].copy_from_slice(self.take(byte_count)?);
        usize::try_from(u64::from_le_bytes(padded)).context("its pickle breaks off")
    }

    pub(super) fn push(&mut self, value: Value) -> Result<()> {
        ensure!(
            self.values.len() < MOST_VALUES,
            "its pickle holds more than {MOST_VALUES} values, which no weights need"
        );
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    pub(super) fn pop(&mut self) -> Result<Id> {
        Ok(self.pop_many(1)?[0])
    }

    /// Pops the topmost `count` values. Fails if one of these values lies below an open mark.
    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let start = self.stack.len().checked_sub(count).filter(|&start| start >= floor);
        Ok(self.stack.split_off(start.context("its pickle takes more values than it made")?))
    }

    /// Closes the newest mark and pops all values above it.
    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().context("its pickle closes a mark that is not open")?;
        Ok(self.stack.split_off(mark))
    }

    /// Pushes an integer that is stored little-endian in two's complement. An integer of 1 or 2 bytes is read as unsigned. The
    /// value of an integer of more than 8 bytes is ignored.
    fn integer(&mut self, byte_count: usize) -> Result<()> {
        if byte_count > 8 {
            return self.ignored(byte_count);
        }
        let bytes = self.take(byte_count)?;
        let is_negative = byte_count > 2 && bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut extended = [if is_negative { 0xff } else { 0 }; 8];
        extended[..byte_count].copy_from_slice(bytes);
        self.push(Value::Integer(i64::from_le_bytes(extended)))
    }

    /// Pushes a value of `byte_count` bytes whose content is ignored.
    fn ignored(&mut self, byte_count: usize) -> Result<()> {
        self.take(byte_count)?;
        self.push(Value::Other)
    }

    fn bytes(&mut self, length_bytes: usize) -> Result<()> {
        let length = self.length(length_bytes)?;
        self.ignored(length)
    }

    fn text(&mut self, length_bytes: usize) -> Result<()> {
        let length = self.length(length_bytes)?;
        let value = Value::Text(String::from_utf8_lossy(self.take(length)?).into());
        self.push(value)
    }

    fn line(&mut self) -> Result<String> {
        let end = self.rest.iter().position(|&byte| byte == b'\n').context("its pickle breaks off in a name")?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }

    fn global(&mut self, module: &str, name: &str) -> Result<()> {
        let Some(global) = Global::named(module, name) else {
            bail!("{} {module:?}.{name:?}, which no weights need; {CURE}", self.error_subject())
        };
        self.push(Value::Global(global))
    }

    /// The beginning of an error. It names the entry of the outermost dictionary that is being read, if the entry is known.
    fn error_subject(&self) -> String {
        let (first, second) = (self.marks.first().copied(), self.marks.get(1).copied());
        let below_marks = &self.stack[..first.unwrap_or(self.stack.len())];
        // A dictionary is filled in one of two ways. With several entries at once, keys and values lie in turn above the first
        // mark, and the dictionary lies below the mark. With a single entry, the key lies directly above the dictionary, without a
        // mark between them. Then all open marks lie above the key and belong to the entry's value.
        let entries = match first {
            Some(first) if below_marks.len() <= 1 => &self.stack[first..second.unwrap_or(self.stack.len())],
            _ => below_marks.get(1..).unwrap_or_default(),
        };
        let key = entries.iter().step_by(2).rev().find_map(|&id| match &self.values[id] {
            Value::Text(key) => Some(key.chars().take(64).collect::<String>()),
            _ => None,
        });
        key.map_or("its pickle holds".into(), |key| format!("its entry {key:?} holds"))
    }

    fn store_in_memo(&mut self, key: u32) -> Result<()> {
        let id = *self.stack.last().context("its pickle stores a value in its memo before it has made one")?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn append(&mut self, members: Vec<Id>) -> Result<()> {
        match self.target()? {
            Value::List(list) => list.extend(members),
            Value::Other => {}
            _ => bail!("its pickle appends to a value that is not a list"),
        }
        Ok(())
    }

    fn set_items(&mut self, members: Vec<Id>) -> Result<()> {
        ensure!(members.len().is_multiple_of(2), "its pickle sets a key without a value");
        match self.target()? {
            Value::Dict(pairs) => pairs.extend(members.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            Value::Other => {}
            _ => bail!("its pickle sets items of a value that is not a dictionary"),
        }
        Ok(())
    }

    /// The list or dictionary to fill, which is the topmost value.
    fn target(&mut self) -> Result<&mut Value> {
        let id = *self.stack.last().context("its pickle fills a list or dictionary before it has made one")?;
        Ok(&mut self.values[id])
    }
}
