//! What makes a step fast, to be switched off: `incubate bench step --without` shows what each part gives.

use crate::usage;
use std::sync::atomic::{AtomicU8, Ordering};

/// A part that libtorch's own operations can take the place of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The CPU kernels for norm, GELU and softmax.
    Kernels,
    /// Attention as products of matrices instead of libtorch's fused kernel; without the kernels it is off too.
    Attention,
    /// The optimiser's one pass.
    Optimiser,
    /// Freezing the stages after a module: without it they compute weight gradients, as in the official code.
    Suffix,
    /// Keeping freed memory instead of giving it back to the kernel.
    Memory,
}

const PARTS: [(&str, Part); 5] = [
    ("kernels", Part::Kernels),
    ("attention", Part::Attention),
    ("optimiser", Part::Optimiser),
    ("suffix", Part::Suffix),
    ("memory", Part::Memory),
];

static OFF: AtomicU8 = AtomicU8::new(0);

/// For the rest of the process.
pub fn switch_off(part: Part) {
    OFF.fetch_or(1 << part as u8, Ordering::Relaxed);
}

pub fn is_on(part: Part) -> bool {
    OFF.load(Ordering::Relaxed) & 1 << part as u8 == 0
}

impl std::str::FromStr for Part {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Part, anyhow::Error> {
        let found = PARTS.iter().find(|(name, _)| *name == text);
        found
            .map(|(_, part)| *part)
            .ok_or_else(|| usage!("{text:?}: give one of {}", PARTS.map(|(name, _)| name).join(", ")))
    }
}
