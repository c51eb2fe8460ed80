//! Two plain pictures: curves in the unit square, and a matrix of shares.

use std::fmt::Write;

/// A line through points between 0 and 1.
#[derive(Debug)]
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// Side of the square, and the margin around it.
const SIDE: f64 = 600.0;
const MARGIN: f64 = 60.0;
/// A share of a row that is worth a cell.
const VISIBLE: f64 = 0.002;

/// Curves over axes from 0 to 1.
pub fn curves(title: &str, x: &str, y: &str, curves: &[Curve]) -> String {
    let mut body = String::new();
    for tenth in 0..=10 {
        let at = SIDE * f64::from(tenth) / 10.0;
        let _ = write!(
            body,
            "<path d=\"M0 {at}H{SIDE}M{at} 0V{SIDE}\" stroke=\"#ddd\"/><text x=\"{at}\" y=\"{}\">{:.1}</text>\
             <text x=\"-20\" y=\"{}\">{:.1}</text>",
            SIDE + 18.0,
            f64::from(tenth) / 10.0,
            SIDE - at + 4.0,
            f64::from(tenth) / 10.0
        );
    }
    for (index, curve) in curves.iter().enumerate() {
        let hue = 300 * index / curves.len().max(1);
        let points: String =
            curve.points.iter().map(|(x, y)| format!("{:.2},{:.2} ", SIDE * x, SIDE * (1.0 - y))).collect();
        let _ = write!(
            body,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"hsl({hue} 70% 45%)\" stroke-width=\"2\"/>\
             <text x=\"{}\" y=\"{}\" fill=\"hsl({hue} 70% 45%)\" text-anchor=\"start\">{}</text>",
            SIDE + 10.0,
            14 + 18 * index,
            escaped(&curve.name)
        );
    }
    page(title, x, y, 100.0, &body)
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
         font-size=\"12\" text-anchor=\"middle\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\
         <g transform=\"translate({MARGIN} {MARGIN})\"><text x=\"{0}\" y=\"-20\" font-size=\"16\">{1}</text>\
         <text x=\"{0}\" y=\"{2}\">{3}</text><text transform=\"rotate(-90)\" x=\"-{0}\" y=\"-42\">{4}</text>{body}</g></svg>\n",
        SIDE / 2.0,
        escaped(title),
        SIDE + 42.0,
        escaped(x),
        escaped(y)
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
