//! The shape of the activations of one sample.

/// The numbers that a stage, or a layer of a head, gives for one sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Channels of so many rows and columns.
    Map {
        channels: usize,
        side: usize,
    },
    /// A class token, and a token for each patch of a grid of so many rows and columns.
    Tokens {
        grid: usize,
        width: usize,
    },
    Vector {
        width: usize,
    },
}

impl Shape {
    /// How many numbers it holds.
    pub fn count(self) -> usize {
        match self {
            Shape::Map { channels, side } => channels * side * side,
            Shape::Tokens { grid, width } => (1 + grid * grid) * width,
            Shape::Vector { width } => width,
        }
    }

    /// The numbers of a pixel, of a token or of the vector.
    pub fn width(self) -> usize {
        match self {
            Shape::Map { channels: width, .. } | Shape::Tokens { width, .. } | Shape::Vector { width } => width,
        }
    }
}
