//! Boxes, given by their corners in pixels, and the deltas that turn one box into another: detectron2's `pairwise_iou` and
//! `Box2BoxTransform`, in fp32 as in detectron2.

/// Left, top, right, bottom.
pub type Corners = [f32; 4];

/// The factors by which [`encode`] multiplies the deltas (x, y, width, height) from an anchor to an object.
pub const OF_ANCHORS: [f32; 4] = [1.0; 4];
/// The factors by which [`encode`] multiplies the deltas from a region to an object.
pub const OF_REGIONS: [f32; 4] = [10.0, 10.0, 5.0, 5.0];

/// The upper limit of a decoded delta of the width or height, which is a logarithm: ln(1000 / 16).
const MOST_GROWTH: f32 = 4.135_166_6;

pub fn area(a: &Corners) -> f32 {
    (a[2] - a[0]) * (a[3] - a[1])
}

/// Intersection over union; 0 if the boxes share no area.
pub fn iou(a: &Corners, b: &Corners) -> f32 {
    let width = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0);
    let height = (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    let shared = width * height;
    if shared > 0.0 { shared / (area(a) + area(b) - shared) } else { 0.0 }
}

/// The part of a box within an image of this height and width.
pub fn clipped(a: &Corners, [height, width]: [f32; 2]) -> Corners {
    [a[0].clamp(0.0, width), a[1].clamp(0.0, height), a[2].clamp(0.0, width), a[3].clamp(0.0, height)]
}

pub fn is_empty(a: &Corners) -> bool {
    a[2] - a[0] <= 0.0 || a[3] - a[1] <= 0.0
}

/// Width, height, and the two coordinates of the centre.
fn sides_and_centre(a: &Corners) -> [f32; 4] {
    let (width, height) = (a[2] - a[0], a[3] - a[1]);
    [width, height, a[0] + 0.5 * width, a[1] + 0.5 * height]
}

/// The deltas that turn `from` into `to`, multiplied by `factors`.
pub fn encode(from: &Corners, to: &Corners, factors: [f32; 4]) -> [f32; 4] {
    let ([width, height, x, y], [to_width, to_height, to_x, to_y]) = (sides_and_centre(from), sides_and_centre(to));
    let [of_x, of_y, of_width, of_height] = factors;
    [
        of_x * (to_x - x) / width,
        of_y * (to_y - y) / height,
        of_width * (to_width / width).ln(),
        of_height * (to_height / height).ln(),
    ]
}

/// The box into which deltas turn `from`. The deltas are divided by `factors` first.
pub fn decode(from: &Corners, deltas: &[f32], factors: [f32; 4]) -> Corners {
    let [width, height, x, y] = sides_and_centre(from);
    let delta = |i: usize| deltas[i] / factors[i];
    let (x, y) = (delta(0) * width + x, delta(1) * height + y);
    // This comparison keeps a delta that is NaN, which `min` would replace by the limit.
    let growth = |i: usize| if delta(i) > MOST_GROWTH { MOST_GROWTH } else { delta(i) }.exp();
    let (width, height) = (growth(2) * width, growth(3) * height);
    [x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height]
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, corners, golden};
    use super::*;
    use tch::Tensor;

    #[test]
    fn deltas_are_detectron2s_and_lead_back_to_the_box() {
        let golden = golden();
        let (from, to) = (corners(&golden["coder.from"]), corners(&golden["coder.to"]));
        for (name, factors) in [("anchors", OF_ANCHORS), ("regions", OF_REGIONS)] {
            let deltas: Vec<[f32; 4]> = from.iter().zip(&to).map(|(from, to)| encode(from, to, factors)).collect();
            assert_close("deltas", deltas.as_flattened(), &golden[&format!("coder.{name}.deltas")], 1e-5);
            let back: Vec<Corners> = from.iter().zip(&deltas).map(|(from, d)| decode(from, d, factors)).collect();
            assert_close("back", back.as_flattened(), &Tensor::from_slice(to.as_flattened()), 1e-4);
            // Some of these deltas exceed the limit `MOST_GROWTH`.
            let deltas = corners(&golden[&format!("coder.{name}.large")]);
            let decoded: Vec<Corners> = from.iter().zip(&deltas).map(|(from, d)| decode(from, d, factors)).collect();
            assert_close("decoded", decoded.as_flattened(), &golden[&format!("coder.{name}.decoded")], 1e-5);
        }
        assert!(decode(&from[0], &[0.0, 0.0, f32::NAN, 0.0], OF_ANCHORS)[0].is_nan());
    }
}
