//! Two plain pictures: curves, and a matrix of shares.

use std::fmt::Write;

/// A line through points, in order of x.
#[derive(Debug)]
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// What is written beside an axis, and the values at its ends.
#[derive(Debug, Clone, Copy)]
pub struct Axis<'a> {
    pub name: &'a str,
    pub low: f64,
    pub high: f64,
}

impl<'a> Axis<'a> {
    /// An axis that just holds these values.
    pub fn around(name: &'a str, values: impl Iterator<Item = f64>) -> Axis<'a> {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        // A single value gets room around it.
        if low < high { Axis { name, low, high } } else { Axis { name, low: low - 0.5, high: low + 0.5 } }
    }

    /// The share of its length at which a value lies.
    fn at(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    /// At most eleven round values between its ends, as texts too.
    fn ticks(&self) -> Vec<(f64, String)> {
        let least = (self.high - self.low) / 10.0;
        let power = 10f64.powf(least.log10().floor());
        // The share of a step that a sum of roundings may miss.
        let slack = 1e-6;
        let factors = [1.0, 2.0, 5.0, 10.0];
        let step = power * factors.into_iter().find(|f| f * power >= least * (1.0 - slack)).unwrap_or(10.0);
        let digits = (-(step * (1.0 + slack)).log10().floor()).max(0.0) as usize;
        let (first, last) = ((self.low / step - slack).ceil() as i64, (self.high / step + slack).floor() as i64);
        (first..=last).map(|n| n as f64 * step).map(|value| (value, format!("{value:.digits$}"))).collect()
    }
}

/// Side of the square, and the margin around it.
const SIDE: f64 = 600.0;
const MARGIN: f64 = 60.0;
/// A share of a row that is worth a cell.
const VISIBLE: f64 = 0.002;
/// How many names of curves fit beside the picture.
const NAMES: usize = 33;

/// Curves over two axes. Where one is a single point, that is marked.
pub fn curves(title: &str, x: Axis, y: Axis, curves: &[Curve]) -> String {
    let mut body = String::new();
    for (value, text) in x.ticks() {
        let at = SIDE * x.at(value);
        let _ = write!(
            body,
            "<path d=\"M{at:.1} 0V{SIDE}\" stroke=\"#ddd\"/><text x=\"{at:.1}\" y=\"{}\">{text}</text>",
            SIDE + 20.0
        );
    }
    for (value, text) in y.ticks() {
        let at = SIDE * (1.0 - y.at(value));
        let _ = write!(
            body,
            "<path d=\"M0 {at:.1}H{SIDE}\" stroke=\"#ddd\"/><text x=\"-20\" y=\"{:.1}\">{text}</text>",
            at + 4.0
        );
    }
    for (index, curve) in curves.iter().enumerate() {
        let hue = 300 * index / curves.len();
        let place = |&(a, b): &(f64, f64)| (SIDE * x.at(a), SIDE * (1.0 - y.at(b)));
        let name = escaped(&curve.name);
        if let [point] = curve.points.as_slice() {
            let (cx, cy) = place(point);
            let _ = write!(
                body,
                "<circle cx=\"{cx:.2}\" cy=\"{cy:.2}\" r=\"5\" fill=\"hsl({hue} 70% 45%)\"><title>{name}</title></circle>"
            );
        }
        let points: String = curve.points.iter().map(place).map(|(a, b)| format!("{a:.2},{b:.2} ")).collect();
        let _ = write!(
            body,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"hsl({hue} 70% 45%)\" stroke-width=\"2\"><title>{name}\
             </title></polyline>"
        );
        if index < NAMES {
            let _ = write!(
                body,
                "<text x=\"{}\" y=\"{}\" fill=\"hsl({hue} 70% 45%)\" text-anchor=\"start\">{name}</text>",
                SIDE + 10.0,
                15 + 18 * index
            );
        }
    }
    page(title, x.name, y.name, 100.0, &body)
}

/// The shares of each row's sum, darker for larger.
pub fn matrix(title: &str, x: &str, y: &str, rows: &[&[u64]]) -> String {
    let mut body = format!("<rect width=\"{SIDE}\" height=\"{SIDE}\" fill=\"#fff\" stroke=\"#888\"/>");
    let height = SIDE / rows.len().max(1) as f64;
    for (r, row) in rows.iter().enumerate() {
        let (sum, width) = (row.iter().sum::<u64>() as f64, SIDE / row.len() as f64);
        for (c, &count) in row.iter().enumerate() {
            let share = count as f64 / sum.max(1.0);
            if share >= VISIBLE {
                let _ = write!(
                    body,
                    "<rect x=\"{:.2}\" y=\"{:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" fill-opacity=\"{share:.3}\"/>",
                    width * c as f64,
                    height * r as f64
                );
            }
        }
    }
    page(title, x, y, 0.0, &body)
}

fn page(title: &str, x: &str, y: &str, legend: f64, body: &str) -> String {
    let (width, height) = (SIDE + 2.0 * MARGIN + legend, SIDE + 2.0 * MARGIN);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"15\" text-anchor=\"middle\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\
         <g transform=\"translate({MARGIN} {MARGIN})\"><text x=\"{0}\" y=\"-20\" font-size=\"20\">{1}</text>\
         <text x=\"{0}\" y=\"{2}\">{3}</text><text transform=\"rotate(-90)\" x=\"-{0}\" y=\"-42\">{4}</text>{body}</g></svg>\n",
        SIDE / 2.0,
        escaped(title),
        SIDE + 42.0,
        escaped(x),
        escaped(y)
    )
}

/// Text as it stands in SVG and HTML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_is_marked_at_round_values_inside_it() {
        let texts = |low, high| -> Vec<String> {
            Axis { name: "", low, high }.ticks().into_iter().map(|(_, text)| text).collect()
        };
        let tenths: Vec<String> = (0..=10).map(|n| format!("{:.1}", f64::from(n) / 10.0)).collect();
        assert_eq!(texts(0.0, 1.0), tenths);
        assert_eq!(texts(36.0, 1404.0), ["200", "400", "600", "800", "1000", "1200", "1400"]);
        assert_eq!(texts(0.58, 2.153), ["0.6", "0.8", "1.0", "1.2", "1.4", "1.6", "1.8", "2.0"]);
        let lonely = Axis::around("", [936.0].into_iter());
        assert_eq!((lonely.at(936.0), lonely.ticks().len()), (0.5, 11));
    }
}
