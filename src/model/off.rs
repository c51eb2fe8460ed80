//! The optimisations of a training step. `incubate bench step --without` switches them off to show how much time each optimisation
//! saves.

use crate::usage;

/// An optimisation of a training step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Optimisation {
    /// The CPU kernels for LayerNorm, GELU and softmax.
    Kernels,
    /// Attention on a CPU with matrix products instead of libtorch's fused kernel. It is also off if the CPU kernels are off.
    Attention,
    /// The optimiser's own single pass on the CPU, instead of libtorch's operations.
    Optimiser,
    /// Skipping the weight gradients of the frozen stages after the trained module. Deep Incubation's official code computes these
    /// gradients.
    Suffix,
    /// Keeping the memory that a step frees for the next tensors, instead of returning the memory to the operating system.
    Memory,
    /// Computing a residual branch only for the samples that keep the branch in stochastic depth.
    KeptSamples,
    /// On a GPU in bf16, adding weight gradients to their fp32 sums within the matrix product, instead of rounding each product
    /// to bf16 and adding it to the sum afterwards.
    FloatSums,
    /// Sending images to a GPU as bytes, instead of as normalised fp32 numbers. The GPU then normalises the images.
    ByteImages,
}

/// The names of the optimisations on the command line.
const OPTIMISATIONS: [(&str, Optimisation); 8] = [
    ("kernels", Optimisation::Kernels),
    ("attention", Optimisation::Attention),
    ("optimiser", Optimisation::Optimiser),
    ("suffix", Optimisation::Suffix),
    ("memory", Optimisation::Memory),
    ("kept-samples", Optimisation::KeptSamples),
    ("fp32-sums", Optimisation::FloatSums),
    ("byte-images", Optimisation::ByteImages),
];

/// The optimisations that are switched off: none, except in a benchmark.
#[derive(Debug, Clone, Copy, Default)]
pub struct Off(u8);

impl Off {
    /// Whether the optimisation `part` is switched off.
    pub fn contains(self, part: Optimisation) -> bool {
        self.0 & 1 << part as u8 != 0
    }
}

impl FromIterator<Optimisation> for Off {
    fn from_iter<I: IntoIterator<Item = Optimisation>>(parts: I) -> Off {
        Off(parts.into_iter().fold(0, |bits, part| bits | 1 << part as u8))
    }
}

impl std::str::FromStr for Optimisation {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Optimisation, anyhow::Error> {
        let found = OPTIMISATIONS.iter().find(|(name, _)| *name == text);
        found
            .map(|(_, part)| *part)
            .ok_or_else(|| usage!("{text:?}: give one of {}", OPTIMISATIONS.map(|(name, _)| name).join(", ")))
    }
}
