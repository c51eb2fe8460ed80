//! The operations that RandAugment chooses from.

/// One operation with its argument.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operation {
    AutoContrast,
    Equalize,
    Invert,
    /// Bits of each byte that are kept.
    Posterize(u32),
    /// Values from this on are inverted.
    Solarize(u32),
    /// Added to values below 128.
    SolarizeAdd(u32),
    /// Blends with the gray image: 0 is gray, 1 leaves it.
    Color(f64),
    /// Blends with the mean gray.
    Contrast(f64),
    /// Blends with black.
    Brightness(f64),
    /// Blends with the smoothed image.
    Sharpness(f64),
    /// Degrees, counter-clockwise.
    Rotate(f64),
    /// Pixels to the right per pixel down of what an output pixel shows.
    ShearX(f64),
    ShearY(f64),
    /// As a share of the side.
    TranslateX(f64),
    TranslateY(f64),
}
