//! RandAugment (timm 1.0: `auto_augment.py`): for each image a few operations are drawn with replacement. Each drawn operation is
//! applied with some probability, and with a random magnitude.

mod affine;
mod canvas;
mod enhance;
mod operation;
mod table;

pub use crate::config::Policy;
use crate::random::Random;
pub use canvas::Canvas;
pub use operation::Operation;
pub use table::{IDENTITY, Table};

/// The number of operations to choose from.
const KINDS: usize = 15;

impl Policy {
    /// Draws the operations for an image, and applies them.
    pub fn apply(&self, canvas: &mut Canvas, random: &mut Random) {
        for _layer in 0..self.layers {
            if let Some(operation) = self.draw(random) {
                canvas.apply(operation);
            }
        }
    }

    /// Draws an operation, or none if the policy's probability decides against it.
    pub fn draw(&self, random: &mut Random) -> Option<Operation> {
        let kind = random.below(KINDS);
        if random.uniform() >= self.probability {
            return None;
        }
        let magnitude = self.magnitude + self.deviation * random.normal();
        let negative = random.uniform() < 0.5;
        Some(operation(kind, magnitude.clamp(0.0, 10.0) / 10.0, negative, self.increasing))
    }
}

/// The operation of number `kind` (0 to 14) with the argument that `level` (0…1) gives it (timm's `LEVEL_TO_ARG`). `negative` is
/// the direction of operations that have two. If `increasing`, a higher level strengthens every operation that depends on the
/// level.
fn operation(kind: usize, level: f64, negative: bool, increasing: bool) -> Operation {
    let signed = |value: f64| if negative { -value } else { value };
    let enhance = || if increasing { (1.0 + signed(0.9 * level)).max(0.1) } else { 0.1 + 1.8 * level };
    let falling = |most: u32| {
        let value = ((level * f64::from(most)) as u32).min(most);
        if increasing { most - value } else { value }
    };
    match kind {
        0 => Operation::AutoContrast,
        1 => Operation::Equalize,
        2 => Operation::Invert,
        3 => Operation::Rotate(signed(30.0 * level)),
        4 => Operation::Posterize(falling(4)),
        5 => Operation::Solarize(falling(256)),
        6 => Operation::SolarizeAdd(((110.0 * level) as u32).min(128)),
        7 => Operation::Color(enhance()),
        8 => Operation::Contrast(enhance()),
        9 => Operation::Brightness(enhance()),
        10 => Operation::Sharpness(enhance()),
        11 => Operation::ShearX(signed(0.3 * level)),
        12 => Operation::ShearY(signed(0.3 * level)),
        13 => Operation::TranslateX(signed(0.45 * level)),
        _ => Operation::TranslateY(signed(0.45 * level)),
    }
}

/// Changes brightness, contrast and saturation in random order, as torchvision's `ColorJitter` does. All three factors are drawn
/// from 1 − `strength` (but at least 0) to 1 + `strength`. As in timm, images are jittered only if the config has no RandAugment.
pub fn jitter(canvas: &mut Canvas, strength: f64, random: &mut Random) {
    let mut order = [0, 1, 2];
    random.shuffle(&mut order);
    for which in order {
        let factor = random.between((1.0 - strength).max(0.0), 1.0 + strength);
        canvas.apply(match which {
            0 => Operation::Brightness(factor),
            1 => Operation::Contrast(factor),
            _ => Operation::Color(factor),
        });
    }
}
