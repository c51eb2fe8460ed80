//! Polygons, each a list of coordinates x, y, x, y … of its corners, and their parts within a rectangle.

use super::objects::Outline;

/// A rectangle: left, top, right, bottom.
pub type Sides = [f64; 4];

/// Whether the coordinates are those of a polygon: three or more corners, each with x and y.
pub fn is_polygon(numbers: &[f64]) -> bool {
    numbers.len() >= 6 && numbers.len().is_multiple_of(2)
}

/// The part of a polygon within a rectangle, by the algorithm of Sutherland and Hodgman (1974). If the part of a concave polygon
/// is in several pieces, lines along the rectangle's sides join them. These lines have no area, so the result has the right
/// pixels. But some of its corners may lie outside of the pieces, so [`bounds`] computes the extent of the pieces.
pub fn clipped(polygon: &[f64], [left, top, right, bottom]: Sides) -> Vec<f64> {
    let mut corners: Vec<[f64; 2]> = polygon.as_chunks().0.to_vec();
    for (axis, border, sign) in [(0, left, 1.0), (0, right, -1.0), (1, top, 1.0), (1, bottom, -1.0)] {
        let distance_inside = |corner: [f64; 2]| (corner[axis] - border) * sign;
        let mut kept = Vec::with_capacity(corners.len() + 4);
        for (index, &corner) in corners.iter().enumerate() {
            let next = corners[(index + 1) % corners.len()];
            let (here, there) = (distance_inside(corner), distance_inside(next));
            if here >= 0.0 {
                kept.push(corner);
            }
            if here.min(there) < 0.0 && here.max(there) > 0.0 {
                let share = here / (here - there);
                let mut crossing = [0, 1].map(|axis| corner[axis] + share * (next[axis] - corner[axis]));
                crossing[axis] = border;
                kept.push(crossing);
            }
        }
        corners = kept;
    }
    corners.into_flattened()
}

/// The smallest rectangle around the part of a polygon within a rectangle; none if no part is within. Two kinds of points decide
/// its sides: the ends of the edges' parts within the rectangle, and corners of the rectangle that are within the polygon.
pub fn bounds(polygon: &[f64], within: Sides) -> Option<Sides> {
    let corners = polygon.as_chunks::<2>().0;
    let edges = corners.iter().enumerate().map(|(index, &corner)| (corner, corners[(index + 1) % corners.len()]));
    let [left, top, right, bottom] = within;
    let held = [[left, top], [right, top], [left, bottom], [right, bottom]].into_iter();
    let points = edges.filter_map(|(from, to)| edge_within(from, to, within)).flatten();
    around(points.chain(held.filter(|&point| holds(corners, point))))
}

/// The ends of the part of an edge within a rectangle, by the algorithm of Liang and Barsky (1984); none if no part is within.
fn edge_within(from: [f64; 2], to: [f64; 2], [left, top, right, bottom]: Sides) -> Option<[[f64; 2]; 2]> {
    let (mut first, mut last) = (0.0f64, 1.0f64);
    for (axis, low, high) in [(0, left, right), (1, top, bottom)] {
        let length = to[axis] - from[axis];
        if length == 0.0 {
            if from[axis] < low || from[axis] > high {
                return None;
            }
            continue;
        }
        let (one, other) = ((low - from[axis]) / length, (high - from[axis]) / length);
        (first, last) = (first.max(one.min(other)), last.min(one.max(other)));
    }
    let low = [left, top];
    let high = [right, bottom];
    let at = |share: f64| [0, 1].map(|i| (from[i] + share * (to[i] - from[i])).clamp(low[i], high[i]));
    (first <= last).then(|| [at(first), at(last)])
}

/// Whether a point is within a polygon, by the number of edges that a ray to the right crosses.
fn holds(corners: &[[f64; 2]], [x, y]: [f64; 2]) -> bool {
    let crossed = |(index, &[x1, y1]): (usize, &[f64; 2])| {
        let [x2, y2] = corners[(index + 1) % corners.len()];
        (y1 > y) != (y2 > y) && x < x1 + (y - y1) / (y2 - y1) * (x2 - x1)
    };
    corners.iter().enumerate().filter(|&edge| crossed(edge)).count() % 2 == 1
}

/// The smallest rectangle around these points; none without points.
fn around(points: impl Iterator<Item = [f64; 2]>) -> Option<Sides> {
    points.fold(None, |sides: Option<Sides>, [x, y]| {
        let [left, top, right, bottom] = sides.unwrap_or([x, y, x, y]);
        Some([left.min(x), top.min(y), right.max(x), bottom.max(y)])
    })
}

/// The smallest rectangle around several rectangles; none if there are none.
pub fn union(rectangles: impl Iterator<Item = Sides>) -> Option<Sides> {
    around(rectangles.flat_map(|[left, top, right, bottom]| [[left, top], [right, bottom]]))
}

/// The sum of the areas of an outline's polygons, whose edges must not cross; 0 if the outline has no polygons.
pub fn area_of(outline: &Outline) -> f64 {
    let Outline::Polygons(polygons) = outline else { return 0.0 };
    polygons.iter().map(|polygon| area(polygon)).sum()
}

fn area(polygon: &[f64]) -> f64 {
    let corners = polygon.as_chunks::<2>().0;
    let twice = |(index, &[x1, y1]): (usize, &[f64; 2])| {
        let [x2, y2] = corners[(index + 1) % corners.len()];
        x1 * y2 - x2 * y1
    };
    (corners.iter().enumerate().map(twice).sum::<f64>() / 2.0).abs()
}

/// The parts of polygons within a rectangle, and the smallest rectangle around these parts. A part is left out if its extent has no
/// width or no height, or if it has fewer than three corners. None if no part is left.
pub fn part(polygons: &[Vec<f64>], within: Sides) -> Option<(Outline, Sides)> {
    let parts = polygons.iter().filter_map(|polygon| {
        let sides = bounds(polygon, within)?;
        let part = clipped(polygon, within);
        // If a polygon touches the rectangle only at one point or along one side, its part has no width or no height.
        let has_area = sides[2] > sides[0] && sides[3] > sides[1];
        (has_area && is_polygon(&part)).then_some((part, sides))
    });
    let (parts, sides): (Vec<_>, Vec<_>) = parts.unzip();
    Some((Outline::Polygons(parts), union(sides.into_iter())?))
}
