//! What makes a step fast, to be switched off: `incubate bench step --without` shows what each part gives.

use crate::usage;

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
    /// Computing a residual branch only for the samples that stochastic depth keeps in it.
    KeptSamples,
}

const PARTS: [(&str, Part); 6] = [
    ("kernels", Part::Kernels),
    ("attention", Part::Attention),
    ("optimiser", Part::Optimiser),
    ("suffix", Part::Suffix),
    ("memory", Part::Memory),
    ("kept-samples", Part::KeptSamples),
];

/// The parts that are switched off: none, except in a benchmark.
#[derive(Debug, Clone, Copy, Default)]
pub struct Off(u8);

impl Off {
    pub fn has(self, part: Part) -> bool {
        self.0 & 1 << part as u8 != 0
    }
}

impl FromIterator<Part> for Off {
    fn from_iter<I: IntoIterator<Item = Part>>(parts: I) -> Off {
        Off(parts.into_iter().fold(0, |bits, part| bits | 1 << part as u8))
    }
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
