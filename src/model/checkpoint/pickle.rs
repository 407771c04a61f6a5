//! The pickle of a state dict, read by a machine that can build tables of tensors and nothing else.
//!
//! A pickle is a program for a stack machine that may call any Python function. This one knows the instructions of
//! protocol 2 that `torch.save` writes, and the few names that tensors are made of; all else is an error that names
//! it. Nothing is called: a "call" of a known name makes one of the values below. Values are small and never own each
//! other, so what a program can take is bounded by its length and by [`MAX_VALUES`].

use std::collections::{BTreeSet, HashMap};

use safetensors::tensor::Dtype;

use super::shown;

/// Most values on the stack, in tables and in the memo together: a tensor takes some 30.
const MAX_VALUES: usize = 1 << 21;
/// Longest module and name of a Python object.
const MAX_LINE_BYTES: usize = 256;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 16;

/// A named tensor: a view of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct View<'a> {
    pub(super) storage: Storage<'a>,
    /// Numbers of the storage before the tensor's first.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// Numbers from one index of a dimension to the next.
    pub(super) strides: Vec<usize>,
}

/// Numbers in a file of their own in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Storage<'a> {
    /// The file's name below `data/`.
    pub(super) key: &'a str,
    pub(super) dtype: Dtype,
    pub(super) n_elements: usize,
}

/// The tensors of a state dict, in its order.
///
/// # Errors
/// What is wrong with the pickle, as the end of a sentence.
pub(super) fn read_tensors(pickle: &[u8]) -> Result<Vec<(&str, View<'_>)>, String> {
    let mut machine = Machine::default();
    let mut program = Program { bytes: pickle, at: 0 };
    loop {
        let at = program.at;
        let step = program.byte().and_then(|instruction| machine.step(instruction, &mut program));
        match step.map_err(|why| format!("at byte {at} of its pickle, {why}"))? {
            Step::Next => {}
            Step::Stop(value) => return machine.named_tensors(value),
        }
    }
}

/// What a name in a pickle stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    StorageOf(Dtype),
}

impl Global {
    fn named(module: &str, name: &str) -> Option<Global> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "DoubleStorage") => Global::StorageOf(Dtype::F64),
            ("torch", "FloatStorage") => Global::StorageOf(Dtype::F32),
            ("torch", "HalfStorage") => Global::StorageOf(Dtype::F16),
            ("torch", "BFloat16Storage") => Global::StorageOf(Dtype::BF16),
            ("torch", "LongStorage") => Global::StorageOf(Dtype::I64),
            ("torch", "IntStorage") => Global::StorageOf(Dtype::I32),
            ("torch", "ShortStorage") => Global::StorageOf(Dtype::I16),
            ("torch", "CharStorage") => Global::StorageOf(Dtype::I8),
            ("torch", "ByteStorage") => Global::StorageOf(Dtype::U8),
            ("torch", "BoolStorage") => Global::StorageOf(Dtype::BOOL),
            _ => return None,
        })
    }
}

/// A value of the machine. Numbers of tuples, dicts, storages and tensors are places in the machine's tables.
#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Int(i64),
    Text(&'a str),
    Global(Global),
    Tuple(usize),
    Dict(usize),
    Storage(Storage<'a>),
    Tensor(usize),
    /// What no tensor is made of: `None`, truth values, fractions, lists.
    Other,
}

enum Step<'a> {
    Next,
    Stop(Value<'a>),
}

type Told<T> = Result<T, String>;

#[derive(Default)]
struct Machine<'a> {
    stack: Vec<Value<'a>>,
    /// Lengths of the stack at its open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    tuples: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    tensors: Vec<View<'a>>,
    /// Values in tuples, dicts and tensors.
    n_kept: usize,
}

impl<'a> Machine<'a> {
    /// Runs one instruction, named by its byte in Python's `pickle` module.
    fn step(&mut self, instruction: u8, program: &mut Program<'a>) -> Told<Step<'a>> {
        match instruction {
            b'.' => return Ok(Step::Stop(self.pop()?)),
            // PROTO
            0x80 => match program.byte()? {
                ..=2 => {}
                protocol => return Err(format!("it is of protocol {protocol}; torch writes protocol 2")),
            },
            b'(' => self.marks.push(self.stack.len()),
            // NONE, NEWTRUE, NEWFALSE, EMPTY_LIST
            b'N' | 0x88 | 0x89 | b']' => self.push(Value::Other)?,
            // BININT, BININT1, BININT2, LONG1
            b'J' => self.push(Value::Int(i32::from_le_bytes(program.array()?).into()))?,
            b'K' => self.push(Value::Int(program.byte()?.into()))?,
            b'M' => self.push(Value::Int(u16::from_le_bytes(program.array()?).into()))?,
            0x8A => self.push(Value::Int(program.long()?))?,
            // BINFLOAT
            b'G' => {
                program.array::<8>()?;
                self.push(Value::Other)?;
            }
            // BINUNICODE, and SHORT_BINSTRING and BINSTRING of Python 2
            b'X' | b'T' => {
                let length = u32::from_le_bytes(program.array()?);
                let text = program.text(length as usize)?;
                self.push(Value::Text(text))?;
            }
            b'U' => {
                let length = program.byte()?;
                let text = program.text(length.into())?;
                self.push(Value::Text(text))?;
            }
            b'c' => {
                let (module, name) = (program.line()?, program.line()?);
                let global = Global::named(module, name).ok_or_else(|| {
                    let name = shown(&format!("{module}.{name}"));
                    format!("it asks for {name}; only what state dicts are made of may stand there")
                })?;
                self.push(Value::Global(global))?;
            }
            // BINPUT, LONG_BINPUT, BINGET, LONG_BINGET
            b'q' => self.remember(program.byte()?.into())?,
            b'r' => self.remember(u32::from_le_bytes(program.array()?))?,
            b'h' => self.recall(program.byte()?.into())?,
            b'j' => self.recall(u32::from_le_bytes(program.array()?))?,
            // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
            b')' => self.push_tuple(Vec::new())?,
            0x85..=0x87 => {
                let items = self.pop_last(usize::from(instruction - 0x84))?;
                self.push_tuple(items)?;
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items)?;
            }
            b'}' => self.push_dict()?,
            // SETITEM, SETITEMS
            b's' => {
                let items = self.pop_last(2)?;
                self.set_items(items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(items)?;
            }
            // APPEND, APPENDS: to a list, of which nothing is kept.
            b'a' => drop(self.pop_last(1)?),
            b'e' => drop(self.pop_to_mark()?),
            b'R' => self.call()?,
            // BUILD: attributes of an object, such as a state dict's versions.
            b'b' => drop(self.pop()?),
            // BINPERSID
            b'Q' => self.push_storage()?,
            other => return Err(format!("instruction {other:#04x} is not one that torch writes")),
        }
        Ok(Step::Next)
    }

    fn push(&mut self, value: Value<'a>) -> Told<()> {
        self.stack.push(value);
        self.check_size()
    }

    fn check_size(&self) -> Told<()> {
        let n_values = self.stack.len() + self.marks.len() + self.memo.len() + self.n_kept;
        if n_values > MAX_VALUES {
            return Err(format!("it makes more than {MAX_VALUES} values"));
        }
        Ok(())
    }

    fn pop(&mut self) -> Told<Value<'a>> {
        self.pop_last(1)?.pop().ok_or_else(|| "the stack is empty".to_owned())
    }

    /// The last `n` values, which must lie above the last mark.
    fn pop_last(&mut self, n: usize) -> Told<Vec<Value<'a>>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(n) {
            Some(from) if from >= floor => Ok(self.stack.split_off(from)),
            _ => Err(format!("{n} values are taken from a stack that has fewer")),
        }
    }

    fn pop_to_mark(&mut self) -> Told<Vec<Value<'a>>> {
        let mark = self.marks.pop().ok_or("there is no mark to go back to")?;
        Ok(self.stack.split_off(mark))
    }

    fn remember(&mut self, key: u32) -> Told<()> {
        let value = *self.stack.last().ok_or("there is nothing to remember")?;
        self.memo.insert(key, value);
        self.check_size()
    }

    fn recall(&mut self, key: u32) -> Told<()> {
        let value = *self.memo.get(&key).ok_or_else(|| format!("nothing was remembered as {key}"))?;
        self.push(value)
    }

    fn push_tuple(&mut self, items: Vec<Value<'a>>) -> Told<()> {
        self.n_kept += items.len() + 1;
        self.tuples.push(items);
        self.push(Value::Tuple(self.tuples.len() - 1))
    }

    fn push_dict(&mut self) -> Told<()> {
        self.n_kept += 1;
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() - 1))
    }

    /// Adds keys and values, in turn, to the dict on top of the stack.
    fn set_items(&mut self, items: Vec<Value<'a>>) -> Told<()> {
        let Some(Value::Dict(dict)) = self.stack.last() else {
            return Err("items are set of what is no dict".to_owned());
        };
        let (pairs, []) = items.as_chunks::<2>() else { return Err("a key has no value".to_owned()) };
        self.n_kept += items.len();
        self.dicts[*dict].extend(pairs.iter().map(|[key, value]| (*key, *value)));
        self.check_size()
    }

    /// `REDUCE`: what the function below the arguments would make of them.
    fn call(&mut self) -> Told<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Tuple(arguments) = arguments else { return Err("its arguments are no tuple".to_owned()) };
        match (function, self.tuples[arguments].as_slice()) {
            (Value::Global(Global::OrderedDict), []) => self.push_dict(),
            (
                Value::Global(Global::RebuildTensor),
                &[
                    Value::Storage(storage),
                    Value::Int(offset),
                    Value::Tuple(shape),
                    Value::Tuple(strides),
                    ..,
                ],
            ) => {
                let offset = usize::try_from(offset).map_err(|_| format!("a tensor begins at {offset}"))?;
                let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
                if shape.len() != strides.len() {
                    return Err(format!("the tensor of the shape {shape:?} has the strides {strides:?}"));
                }
                self.n_kept += 1 + 2 * shape.len();
                self.tensors.push(View { storage, offset, shape, strides });
                self.push(Value::Tensor(self.tensors.len() - 1))
            }
            (Value::Global(Global::RebuildParameter), &[tensor @ Value::Tensor(_), ..]) => self.push(tensor),
            (Value::Global(function), _) => Err(format!("{function:?} has arguments that it cannot have")),
            _ => Err("a value is called that is no function".to_owned()),
        }
    }

    fn sizes(&self, tuple: usize) -> Told<Vec<usize>> {
        let items = &self.tuples[tuple];
        if items.len() > MAX_DIMENSIONS {
            return Err(format!("a tensor has {} dimensions; {MAX_DIMENSIONS} are read", items.len()));
        }
        let size = |item: &Value<'a>| match *item {
            Value::Int(size) => usize::try_from(size).ok(),
            _ => None,
        };
        let sizes: Option<Vec<usize>> = items.iter().map(size).collect();
        sizes.ok_or_else(|| "a tensor's shape or strides are no sizes".to_owned())
    }

    /// `BINPERSID`: the storage that a tuple `("storage", type, key, device, numbers)` describes.
    fn push_storage(&mut self) -> Told<()> {
        let Value::Tuple(parts) = self.pop()? else {
            return Err("a storage is described by no tuple".to_owned());
        };
        let &[
            Value::Text("storage"),
            Value::Global(Global::StorageOf(dtype)),
            Value::Text(key),
            Value::Text(_),
            Value::Int(n_elements),
        ] = self.tuples[parts].as_slice()
        else {
            return Err("a storage is described otherwise than torch does".to_owned());
        };
        let n_elements =
            usize::try_from(n_elements).map_err(|_| format!("a storage has {n_elements} numbers"))?;
        self.push(Value::Storage(Storage { key, dtype, n_elements }))
    }

    /// The tensors of the program's result: a dict of them, or one that has it as its `state_dict`.
    fn named_tensors(&self, end: Value<'a>) -> Told<Vec<(&'a str, View<'a>)>> {
        let Value::Dict(mut table) = end else { return Err("it holds no table of tensors".to_owned()) };
        let nested = self.dicts[table].iter().find_map(|item| match *item {
            (Value::Text("state_dict"), Value::Dict(nested)) => Some(nested),
            _ => None,
        });
        table = nested.unwrap_or(table);
        let mut names = BTreeSet::new();
        let mut named = Vec::new();
        for &(key, value) in &self.dicts[table] {
            let (Value::Text(name), Value::Tensor(tensor)) = (key, value) else { continue };
            if !names.insert(name) {
                return Err(format!("it holds tensor {} twice", shown(name)));
            }
            named.push((name, self.tensors[tensor].clone()));
        }
        match named.is_empty() {
            true => Err("it holds no tensors".to_owned()),
            false => Ok(named),
        }
    }
}

/// The bytes of a pickle, and the next one to read.
struct Program<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Program<'a> {
    fn take(&mut self, n: usize) -> Told<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest
            .get(..n)
            .ok_or_else(|| format!("it is cut short: {n} bytes are needed, {} left", rest.len()))?;
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Told<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| "it is cut short".to_owned())
    }

    fn byte(&mut self) -> Told<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn text(&mut self, length: usize) -> Told<&'a str> {
        std::str::from_utf8(self.take(length)?).map_err(|_| "a text is no UTF-8".to_owned())
    }

    /// Text up to the end of its line.
    fn line(&mut self) -> Told<&'a str> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let length = rest.iter().take(MAX_LINE_BYTES).position(|&byte| byte == b'\n');
        let line = self.text(length.ok_or("a name does not end")?)?;
        self.at += 1;
        Ok(line)
    }

    /// A two's complement number of as many bytes as its first byte says.
    fn long(&mut self) -> Told<i64> {
        let length = self.byte()?;
        let bytes = self.take(length.into())?;
        let sign = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xFF } else { 0 };
        let mut number = [sign; 8];
        let fits = bytes.len() <= number.len();
        number[..bytes.len().min(8)].copy_from_slice(&bytes[..bytes.len().min(8)]);
        if fits { Ok(i64::from_le_bytes(number)) } else { Err(format!("a number has {length} bytes")) }
    }
}

#[cfg(test)]
mod tests;
