//! Draws pictures. This file draws curves and matrices as SVG text that is legible on a light and on a dark background. [`chart`]
//! and [`bars`] draw the pictures of a report as SVG text. [`png()`] turns SVG text into a PNG. A [`Picture`] consists of pixels,
//! such as a photograph with a mask of classes over it and a drawn picture below it.

pub mod bars;
pub mod chart;
mod picture;
mod png;

pub use picture::{Marked, Picture, colour};
pub use png::png;

use plotters::coord::Shift;
use plotters::prelude::*;

/// A line through points, in order of x.
#[derive(Debug)]
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// The name of an axis, and the values at its ends.
#[derive(Debug, Clone, Copy)]
pub struct Axis<'a> {
    pub name: &'a str,
    pub low: f64,
    pub high: f64,
}

impl<'a> Axis<'a> {
    /// The shortest axis that contains these values.
    pub fn around(name: &'a str, values: impl Iterator<Item = f64>) -> Axis<'a> {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        // An axis for a single value gets room on both sides.
        if low < high { Axis { name, low, high } } else { Axis { name, low: low - 0.5, high: low + 0.5 } }
    }

    /// A value as text, with enough digits to distinguish eight labels along the axis.
    fn label(&self, value: f64) -> String {
        let digits = (-((self.high - self.low) / 5.0).log10()).ceil().max(0.0) as usize;
        format!("{value:.digits$}")
    }
}

/// The side of the square that holds the axes. The square is larger than its display size, because points are rounded to whole
/// units.
const SIDE: u32 = 1200;
/// The width of the column of names beside the curves.
const NAMES: u32 = 320;
/// The size of texts.
const TEXT: u32 = 32;
/// The height of a line of names.
const LINE: i32 = 40;
/// A grey with the same contrast to white and to black.
const GREY: RGBColor = RGBColor(117, 117, 117);
const BLUE: RGBColor = RGBColor(50, 120, 200);
/// The smallest share of a row's sum that is drawn as a cell.
const VISIBLE: f64 = 0.002;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Draws curves over two axes, and the names of the curves beside them. A curve of a single point is drawn as a dot.
pub fn curves(title: &str, x: Axis, y: Axis, curves: &[Curve]) -> String {
    drawn(SIDE + NAMES, |area| {
        let (left, right) = area.split_horizontally(SIDE);
        let mut chart = builder(&left, title).build_cartesian_2d(x.low..x.high, y.low..y.high)?;
        chart
            .configure_mesh()
            .x_desc(x.name)
            .y_desc(y.name)
            .x_labels(8)
            .y_labels(8)
            .x_label_formatter(&|value| x.label(*value))
            .y_label_formatter(&|value| y.label(*value))
            .label_style(text())
            .axis_style(GREY)
            .bold_line_style(GREY.mix(0.35))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (index, curve) in curves.iter().enumerate() {
            let color = color(index, curves.len());
            match curve.points.as_slice() {
                [point] => chart.draw_series([Circle::new(*point, 8, color.filled())])?,
                points => chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(3)))?,
            };
        }
        names(&right, curves)
    })
}

/// Writes as many names of curves as fit, each in the colour of its curve.
fn names(area: &Area, curves: &[Curve]) -> Drawn {
    let fit = (SIDE as i32 / LINE - 3) as usize;
    let at = |row: usize| (10, LINE * (row as i32 + 2));
    for (index, curve) in curves.iter().enumerate().take(fit) {
        let color = color(index, curves.len());
        area.draw_text(&curve.name, &text().color(&color), at(index))?;
    }
    if curves.len() > fit {
        area.draw_text(&format!("and {} more", curves.len() - fit), &text(), at(fit))?;
    }
    Ok(())
}

/// Draws a matrix. The opacity of each cell shows the cell's share of the sum of its row.
pub fn matrix(title: &str, x: &str, y: &str, rows: &[&[u64]]) -> String {
    let columns = rows.first().map_or(0, |row| row.len());
    drawn(SIDE, |area| {
        let mut chart = builder(area, title).build_cartesian_2d(0..columns.max(1), rows.len().max(1)..0)?;
        chart.configure_mesh().disable_mesh().x_desc(x).y_desc(y).label_style(text()).axis_style(GREY).draw()?;
        let cells = rows.iter().enumerate().flat_map(|(r, row)| {
            let sum = row.iter().sum::<u64>().max(1) as f64;
            let shares = row.iter().map(move |&count| (1000.0 * count as f64 / sum).round() / 1000.0).enumerate();
            let visible = shares.filter(|&(_, share)| share >= VISIBLE);
            visible.map(move |(c, share)| Rectangle::new([(c, r), (c + 1, r + 1)], BLUE.mix(share).filled()))
        });
        chart.draw_series(cells)?;
        chart.plotting_area().draw(&Rectangle::new([(0, 0), (columns, rows.len())], GREY))
    })
}

/// The SVG text of the picture that `draw` draws.
fn drawn(width: u32, draw: impl FnOnce(&Area) -> Drawn) -> String {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (width, SIDE)).into_drawing_area();
    draw(&area).and_then(|()| area.present()).expect("a String takes whatever is written");
    drop(area);
    svg
}

fn builder<'a, 'b>(area: &'a Area<'b>, title: &str) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut builder = ChartBuilder::on(area);
    builder.caption(title, text()).margin(20).margin_right(50).x_label_area_size(100).y_label_area_size(130);
    builder
}

fn text() -> TextStyle<'static> {
    ("sans-serif", TEXT).with_color(GREY).into_text_style(&(SIDE, SIDE))
}

/// The colour of a curve. The hues are far apart. Blue is lightened and yellow darkened so that both are visible on either
/// background.
fn color(index: usize, of: usize) -> HSLColor {
    let hue = 0.85 * index as f64 / of as f64;
    let blueness = (2.0 * std::f64::consts::PI * (hue - 0.72)).cos();
    HSLColor(hue, 0.65, 0.5 + 0.1 * blueness)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_an_axis_have_as_many_digits_as_tell_them_apart() {
        let label = |low, high, value| Axis { name: "", low, high }.label(value);
        assert_eq!(label(0.0, 1.0, 0.2), "0.2");
        assert_eq!(label(36.0, 1404.0, 200.0), "200");
        assert_eq!(label(0.58, 2.153, 2.0), "2.0");
        assert_eq!(label(0.91, 0.97, 0.92), "0.92");
        let lonely = Axis::around("", [936.0].into_iter());
        assert_eq!((lonely.low, lonely.high), (935.5, 936.5));
    }

    #[test]
    fn curves_are_drawn_with_their_names_and_lonely_points_as_dots() {
        let curve = |name: String, points: &[(f64, f64)]| Curve { name, points: points.to_vec() };
        let axis = |name| Axis { name, low: 0.0, high: 1.0 };
        let of = |all: &[Curve]| curves("a < b", axis("x"), axis("y"), all);
        let few = [curve("R&D".into(), &[(0.0, 0.0), (1.0, 1.0)]), curve("dot".into(), &[(0.5, 0.5)])];
        let svg = of(&few);
        assert!(svg.contains("a &lt; b") && svg.contains("R&amp;D") && !svg.contains("more"), "{svg}");
        assert_eq!((svg.matches("<circle").count(), svg.matches("stroke-width=\"3\"").count()), (1, 1), "{svg}");
        assert_eq!(svg, of(&few));
        let many: Vec<Curve> = (0..40).map(|i| curve(format!("module {i}"), &[(0.0, 0.0), (1.0, 1.0)])).collect();
        assert!(of(&many).contains("and 13 more"));
    }

    #[test]
    fn a_matrix_shows_the_shares_of_its_rows() {
        let svg = matrix("", "", "", &[&[3, 1, 0], &[0, 2000, 1], &[0, 0, 0]]);
        let cells = svg.split("<rect").filter(|shape| shape.contains("#3278C8"));
        let shares: Vec<&str> = cells.filter_map(|cell| cell.split_once("opacity=\"")?.1.split('"').next()).collect();
        assert_eq!(shares, ["0.75", "0.25", "1"], "a share below {VISIBLE} is left out");
    }
}
