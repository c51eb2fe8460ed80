//! The shape of the activations of one sample.

/// The shape of the output of a stage, or of a layer of a head, for one sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A map: `channels` planes of `side` rows and columns.
    Map {
        channels: usize,
        side: usize,
    },
    /// A class token, and a token for each patch of a grid of `grid` rows and columns. A token holds `width` numbers.
    Tokens {
        grid: usize,
        width: usize,
    },
    Vector {
        width: usize,
    },
}

impl Shape {
    /// How many numbers the output holds.
    pub fn count(self) -> usize {
        match self {
            Shape::Map { channels, side } => channels * side * side,
            Shape::Tokens { grid, width } => (1 + grid * grid) * width,
            Shape::Vector { width } => width,
        }
    }

    /// How many numbers a cell of the map, a token or the vector holds.
    pub fn width(self) -> usize {
        match self {
            Shape::Map { channels: width, .. } | Shape::Tokens { width, .. } | Shape::Vector { width } => width,
        }
    }
}
