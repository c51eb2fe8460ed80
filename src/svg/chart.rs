//! A chart of a report: lines and marks over two linear axes, with a title and a key above. The chart has the colours of a light
//! page. [`Colour`] lists these colours, so that the style sheet of a page can replace them on a dark page.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// The width of a picture, in units of its own.
pub const WIDTH: u32 = 1000;
/// The height of a chart without its title and key.
const HEIGHT: u32 = 660;
/// The size of texts. It is legible on a phone, which shows a picture at a third of its size.
pub(super) const TEXT: i32 = 31;
/// The size of a title.
const TITLE: i32 = 34;
/// The height of a line of the key.
const LINE: i32 = 44;
/// The distance of the title and the key from the edges.
const EDGE: i32 = 8;

/// The colours of a chart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    /// Deep Incubation.
    Incubation,
    /// End-to-end training.
    EndToEnd,
    /// Anything that belongs to no method, such as the meta model.
    Neutral,
    /// A colour of the palette, by its index. For example, each module or each run has its own index.
    Of(usize),
    /// A colour from outside the chart, such as the colour of a class in a mask.
    Own([u8; 3]),
    Ink,
    Faint,
    Grid,
}

impl Colour {
    pub(super) fn rgb(self) -> RGBColor {
        let (r, g, b) = match self {
            Colour::Incubation => (0x1b, 0x6c, 0xb3),
            Colour::EndToEnd => (0xc9, 0x62, 0x15),
            Colour::Neutral => (0x7c, 0x84, 0x8d),
            Colour::Own([r, g, b]) => (r, g, b),
            Colour::Of(index) => SEVERAL[index % SEVERAL.len()],
            Colour::Ink => (0x24, 0x29, 0x2f),
            Colour::Faint => (0x5c, 0x65, 0x6e),
            Colour::Grid => (0xdf, 0xe3, 0xe7),
        };
        RGBColor(r, g, b)
    }

    /// The colour as the SVG text of a picture names it, such as `#1B6CB3`.
    pub fn hex(self) -> String {
        let RGBColor(r, g, b) = self.rgb();
        format!("#{r:02X}{g:02X}{b:02X}")
    }
}

/// The palette: Okabe and Ito's colours, which people with any colour vision can tell apart. Black and yellow are left out. The
/// light colours are made darker.
const SEVERAL: [(u8, u8, u8); 6] = [
    (0x00, 0x72, 0xb2),
    (0xd5, 0x5e, 0x00),
    (0x00, 0x8f, 0x68),
    (0xb8, 0x5c, 0x92),
    (0x8a, 0x6d, 0x00),
    (0x3e, 0x9b, 0xd0),
];

/// An axis from `low` to `high`.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    pub name: String,
    pub low: f64,
    pub high: f64,
}

/// A point of a chart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mark {
    pub x: f64,
    pub y: f64,
    /// The length of the error bar above and below the point. None if the point has no error bar.
    pub error: Option<f64>,
}

impl Mark {
    /// A point without an error bar.
    pub fn at(x: f64, y: f64) -> Mark {
        Mark { x, y, error: None }
    }
}

/// How the points of a series are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// A line through the points.
    Line,
    /// A thin, pale line through the points.
    Trace,
    /// A disc for each point, and a line through the points.
    Discs,
    /// A disc for each point, without a line.
    Dots,
    /// A small square for each point, without a line.
    Squares,
}

/// Points that belong together.
#[derive(Debug, Clone)]
pub struct Series {
    /// The name of the series in the key. A series without a name is not in the key.
    pub name: Option<String>,
    pub colour: Colour,
    pub style: Style,
    pub marks: Vec<Mark>,
}

/// A chart.
#[derive(Debug, Clone)]
pub struct Chart {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
}

impl Axis {
    /// An axis from zero to a little more than the largest value, for costs.
    pub fn from_zero(name: impl Into<String>, values: impl Iterator<Item = f64>) -> Axis {
        let high = values.fold(0.0, f64::max);
        Axis { name: name.into(), low: 0.0, high: if high > 0.0 { 1.04 * high } else { 1.0 } }
    }

    /// An axis over the range of the values, with a little room on both sides.
    pub fn around(name: impl Into<String>, values: impl Iterator<Item = f64>) -> Axis {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        let room = if low < high { 0.05 * (high - low) } else { 0.5 };
        Axis { name: name.into(), low: low - room, high: high + room }
    }

    /// A value as text, with enough decimals to distinguish the labels along the axis, but with at most six decimals.
    fn label(&self, value: f64) -> String {
        let digits = (-((self.high - self.low) / 5.0).log10()).ceil().clamp(0.0, 6.0) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
    }
}

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(super) type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

impl Chart {
    /// Whether there is something to see: at least two points at different places.
    pub fn is_worth_drawing(&self) -> bool {
        let mut all = self.series.iter().flat_map(|series| &series.marks);
        let first = all.next();
        first.is_some_and(|first| all.any(|mark| (mark.x, mark.y) != (first.x, first.y)))
    }

    /// The picture as SVG text.
    pub fn svg(&self) -> String {
        let key = key(&self.series);
        let above = EDGE + LINE * (1 + key.last().map_or(0, |entry| entry.line + 1));
        drawn(HEIGHT + above as u32, |area| {
            title(area, &self.title)?;
            key.iter().try_for_each(|entry| entry.draw(area))?;
            self.plot(&area.margin(above + 10, 0, 0, 0))
        })
    }

    fn plot(&self, area: &Area) -> Drawn {
        let mut chart = ChartBuilder::on(area)
            .margin_right(26)
            .x_label_area_size(88)
            .y_label_area_size(110)
            .build_cartesian_2d(self.x.low..self.x.high, self.y.low..self.y.high)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_desc(&self.x.name)
            .x_labels(7)
            .y_labels(7)
            .x_label_formatter(&|value| self.x.label(*value))
            .y_label_formatter(&|value| self.y.label(*value) + "\u{a0}")
            .label_style(text(TEXT, Colour::Faint))
            .axis_style(Colour::Grid.rgb().stroke_width(2))
            .bold_line_style(Colour::Grid.rgb().stroke_width(2))
            .light_line_style(TRANSPARENT)
            .set_all_tick_mark_size(0)
            .draw()?;
        for series in &self.series {
            let colour = series.colour.rgb();
            let points: Vec<(f64, f64)> = series.marks.iter().map(|mark| (mark.x, mark.y)).collect();
            let stroke = match series.style {
                Style::Line | Style::Discs => Some(colour.stroke_width(4)),
                Style::Trace => Some(colour.mix(0.45).stroke_width(3)),
                Style::Dots | Style::Squares => None,
            };
            if let Some(stroke) = stroke.filter(|_| points.len() > 1) {
                chart.draw_series(std::iter::once(PathElement::new(points.clone(), stroke)))?;
            }
            let bars = series.marks.iter().filter_map(|mark| Some((mark, mark.error.filter(|error| *error > 0.0)?)));
            let bars = bars.map(|(mark, error)| {
                let ends = [mark.y - error, mark.y + error].map(|y| y.clamp(self.y.low, self.y.high));
                PathElement::new(ends.map(|y| (mark.x, y)).to_vec(), colour.stroke_width(4))
            });
            chart.draw_series(bars)?;
            match series.style {
                Style::Discs | Style::Dots => {
                    chart.draw_series(points.iter().map(|point| Circle::new(*point, 9, colour.filled())))?;
                }
                Style::Squares => {
                    let at = |point: &(f64, f64)| EmptyElement::at(*point) + square((0, 0), colour);
                    chart.draw_series(points.iter().map(at))?;
                }
                Style::Line | Style::Trace => {}
            }
        }
        Ok(())
    }
}

fn square(middle: (i32, i32), colour: RGBColor) -> Rectangle<(i32, i32)> {
    let (x, y) = middle;
    Rectangle::new([(x - 9, y - 9), (x + 9, y + 9)], colour.filled())
}

/// The name of a series, and its place in the key.
struct Entry<'a> {
    series: &'a Series,
    name: &'a str,
    x: i32,
    line: i32,
}

/// The largest number of series that the key names.
const MOST_NAMED: usize = 9;

/// Places the names of up to [`MOST_NAMED`] series in lines.
fn key(series: &[Series]) -> Vec<Entry<'_>> {
    let (mut end, mut line) = (EDGE, 0);
    let mut entries = Vec::new();
    for series in series {
        let Some(name) = series.name.as_deref().filter(|_| entries.len() < MOST_NAMED) else { continue };
        let width = 62 + length(name);
        if end > EDGE && end + width > WIDTH as i32 {
            (end, line) = (EDGE, line + 1);
        }
        entries.push(Entry { series, name, x: end, line });
        end += width + 26;
    }
    entries
}

/// The approximate length of a text, in units of the picture.
pub(super) fn length(text: &str) -> i32 {
    (0.54 * f64::from(TEXT) * text.chars().count() as f64) as i32
}

impl Entry<'_> {
    fn draw(&self, area: &Area) -> Drawn {
        let colour = self.series.colour.rgb();
        let y = EDGE + LINE + LINE * self.line + LINE / 2 + 4;
        let line = |stroke| PathElement::new(vec![(self.x, y), (self.x + 44, y)], stroke);
        let middle = (self.x + 22, y);
        match self.series.style {
            Style::Line => area.draw(&line(colour.stroke_width(5)))?,
            Style::Trace => area.draw(&line(colour.mix(0.45).stroke_width(4)))?,
            Style::Discs => {
                area.draw(&line(colour.stroke_width(4)))?;
                area.draw(&Circle::new(middle, 9, colour.filled()))?;
            }
            Style::Dots => area.draw(&Circle::new(middle, 9, colour.filled()))?,
            Style::Squares => area.draw(&square(middle, colour))?,
        }
        let style = text(TEXT, Colour::Ink).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(self.name.to_string(), (self.x + 56, y), style))
    }
}

/// Writes the title into the first line of a picture.
pub(super) fn title(area: &Area, title: &str) -> Drawn {
    let style = ("sans-serif", TITLE, FontStyle::Bold).with_color(Colour::Ink.rgb()).into_text_style(&(WIDTH, HEIGHT));
    area.draw(&Text::new(title.to_string(), (EDGE, EDGE), style))
}

pub(super) fn text(size: i32, colour: Colour) -> TextStyle<'static> {
    ("sans-serif", size).with_color(colour.rgb()).into_text_style(&(WIDTH, HEIGHT))
}

/// The SVG text of the picture that `draw` draws.
pub(super) fn drawn(height: u32, draw: impl FnOnce(&Area) -> Drawn) -> String {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    draw(&area).and_then(|()| area.present()).expect("a String takes whatever is written");
    drop(area);
    svg
}
