//! The operations that RandAugment chooses from.

/// An operation and its argument.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operation {
    AutoContrast,
    Equalize,
    Invert,
    /// Keeps this many high bits of each byte, and sets the others to 0.
    Posterize(u32),
    /// Inverts the bytes that are at least this value.
    Solarize(u32),
    /// Adds this value to the bytes below 128, and clips the sums to 255.
    SolarizeAdd(u32),
    /// Blends the image with its gray copy: the factor 0 gives the copy, the factor 1 the image itself.
    Color(f64),
    /// Blends the image with its mean gray value: the factor 0 gives gray, the factor 1 the image itself.
    Contrast(f64),
    /// Blends the image with black: the factor 0 gives black, the factor 1 the image itself.
    Brightness(f64),
    /// Blends the image with a smoothed copy: the factor 0 gives the copy, the factor 1 the image itself.
    Sharpness(f64),
    /// Rotates the image counter-clockwise by this many degrees.
    Rotate(f64),
    /// Shifts each row to the left, by this many pixels more than the row above it.
    ShearX(f64),
    /// Shifts each column up, by this many pixels more than the column to the left of it.
    ShearY(f64),
    /// Shifts the image to the left by this share of its side.
    TranslateX(f64),
    /// Shifts the image up by this share of its side.
    TranslateY(f64),
}
