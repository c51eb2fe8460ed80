//! The Python names that a pickle may use. Weights need some of the names that `torch.load(weights_only=True)` allows (torch 2.11,
//! `torch/_weights_only_unpickler.py`). The other names here belong to objects that checkpoints hold beside the weights.

/// The meaning of a Python name.
#[derive(Debug, Clone, Copy)]
pub enum Global {
    /// A class of dictionaries.
    Dictionary,
    RebuildTensor,
    /// Like [`Global::RebuildTensor`], but an argument gives the kind of number.
    RebuildTensorOfKind,
    RebuildParameter,
    /// Rebuilds a tensor of a subclass, or a tensor with attributes. Its arguments contain the name of another rebuilding function
    /// and the arguments of that function.
    RebuildOfType,
    /// The class of a storage, or a dtype. Both tell the kind of number.
    Kind(Number),
    /// A class or function. The objects that it makes are ignored.
    Skipped,
}

/// A kind of number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    F64,
    F32,
    F16,
    Bf16,
    /// Integers and flags, such as counters.
    Integer,
    /// Floating-point numbers of 8 bits or fewer.
    Narrow,
    /// Complex, quantised or untyped numbers.
    Other,
}

impl Global {
    /// The meaning of a name. None if the name is not allowed.
    pub fn named(module: &str, name: &str) -> Option<Global> {
        Some(match (module, name) {
            ("collections", "OrderedDict" | "defaultdict" | "Counter") => Global::Dictionary,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v3") => Global::RebuildTensorOfKind,
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state")
            | ("torch.nn.parameter", "Parameter") => Global::RebuildParameter,
            ("torch._tensor", "_rebuild_from_type_v2") => Global::RebuildOfType,
            ("torch", name) => torch(name)?,
            ("torch.storage", "UntypedStorage") => Global::Kind(Number::Other),
            ("torch.serialization", "_get_layout")
            | ("argparse", "Namespace")
            | ("types", "SimpleNamespace")
            | ("collections", "deque")
            | ("_codecs", "encode")
            | ("copyreg" | "copy_reg", "_reconstructor")
            | ("datetime", "datetime" | "date" | "time" | "timedelta" | "timezone")
            | ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar" | "_reconstruct")
            | ("numpy", "dtype" | "ndarray") => Global::Skipped,
            // Python 2 and pickles of protocol 2 call the module `__builtin__`.
            (
                "builtins" | "__builtin__",
                "set" | "frozenset" | "bytearray" | "bytes" | "complex" | "slice" | "range" | "xrange" | "list"
                | "dict" | "tuple" | "int" | "float" | "bool" | "str" | "object",
            ) => Global::Skipped,
            ("pathlib" | "pathlib._local", name) if name.ends_with("Path") => Global::Skipped,
            _ => return None,
        })
    }
}

fn torch(name: &str) -> Option<Global> {
    Some(Global::Kind(match name {
        "FloatStorage" | "float32" => Number::F32,
        "DoubleStorage" | "float64" => Number::F64,
        "HalfStorage" | "float16" => Number::F16,
        "BFloat16Storage" | "bfloat16" => Number::Bf16,
        "LongStorage" | "IntStorage" | "ShortStorage" | "CharStorage" | "ByteStorage" | "BoolStorage" | "bool" => {
            Number::Integer
        }
        name if name.starts_with("int") || name.starts_with("uint") => Number::Integer,
        name if name.starts_with("float8") || name.starts_with("float4") => Number::Narrow,
        "UntypedStorage" => Number::Other,
        name if name.starts_with("complex") || name.starts_with("Complex") => Number::Other,
        name if name.starts_with("Q") && name.ends_with("Storage") => Number::Other,
        name if name.starts_with("qint") || name.starts_with("quint") => Number::Other,
        "Size" | "device" | "Tensor" | "strided" | "preserve_format" | "contiguous_format" => {
            return Some(Global::Skipped);
        }
        _ => return None,
    }))
}
