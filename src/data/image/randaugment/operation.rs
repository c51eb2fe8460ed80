//! The operations that RandAugment chooses from.

/// An operation and its argument.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operation {
    AutoContrast,
    Equalize,
    Invert,
    /// Keeps this number of high bits of each byte.
    Posterize(u32),
    /// Inverts bytes from this value on.
    Solarize(u32),
    /// Adds this value to bytes below 128.
    SolarizeAdd(u32),
    /// Blends with the gray image: 0 is gray, 1 the image itself.
    Color(f64),
    /// Blends with the mean gray: 0 is gray, 1 the image itself.
    Contrast(f64),
    /// Blends with black: 0 is black, 1 the image itself.
    Brightness(f64),
    /// Blends with the smoothed image: 0 is smooth, 1 the image itself.
    Sharpness(f64),
    /// Rotates counter-clockwise by degrees.
    Rotate(f64),
    /// Shifts each row to the left by this many pixels for each row from the top.
    ShearX(f64),
    /// Shifts each column up by this many pixels for each column from the left.
    ShearY(f64),
    /// Shifts the image to the left by this share of its side.
    TranslateX(f64),
    /// Shifts the image up by this share of its side.
    TranslateY(f64),
}
