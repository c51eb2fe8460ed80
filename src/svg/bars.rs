//! Draws a chart of stacked horizontal bars, with a title and a key above the bars. For example, each bar stands for a phase, and
//! its parts are the times of computing, evaluation and checkpoints.

use super::chart::{Area, Colour, Drawn, TEXT, WIDTH, drawn, length, text, title};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// A category of the chart, such as the time of evaluations. Each bar has one part for each category.
#[derive(Debug, Clone)]
pub struct Part {
    pub name: String,
    pub colour: Colour,
    /// The opacity of the colour, from 0 to 1.
    pub strength: f64,
}

/// One bar.
#[derive(Debug, Clone)]
pub struct Bar {
    pub name: String,
    /// The length of each part, in the order of [`Bars::parts`].
    pub parts: Vec<f64>,
    /// The text after the bar.
    pub label: String,
}

/// A picture of bars.
#[derive(Debug, Clone)]
pub struct Bars {
    pub title: String,
    pub parts: Vec<Part>,
    pub bars: Vec<Bar>,
}

/// The height of the space for the title, in units of the picture.
const HEAD: i32 = 68;
/// The distance from one bar to the next.
const ROW: i32 = 56;
/// The thickness of a bar.
const THICK: i32 = 32;

impl Bars {
    /// The picture as SVG text.
    pub fn svg(&self) -> String {
        let key = self.key();
        let top = HEAD + 42 * key.last().map_or(0, |(_, line)| line + 1) + 16;
        let height = top + ROW * self.bars.len() as i32;
        drawn(height as u32, |area| {
            title(area, &self.title)?;
            for (part, (x, line)) in self.parts.iter().zip(&key) {
                let y = HEAD + 42 * line;
                area.draw(&Rectangle::new([(*x, y), (x + 28, y + 28)], fill(part)))?;
                write(area, &part.name, (x + 40, y + 14), HPos::Left, Colour::Ink)?;
            }
            self.rows(area, top)
        })
    }

    fn rows(&self, area: &Area, top: i32) -> Drawn {
        let longest = |texts: fn(&Bar) -> &str| self.bars.iter().map(|bar| length(texts(bar))).max().unwrap_or(0);
        let (left, right) = (longest(|bar| &bar.name) + 24, WIDTH as i32 - longest(|bar| &bar.label) - 24);
        let most = self.bars.iter().map(|bar| bar.parts.iter().sum::<f64>()).fold(f64::MIN_POSITIVE, f64::max);
        for (row, bar) in self.bars.iter().enumerate() {
            let y = top + ROW * row as i32;
            write(area, &bar.name, (left - 16, y + THICK / 2), HPos::Right, Colour::Faint)?;
            let mut sum = 0.0;
            let at = |sum: f64| left + (f64::from(right - left) * sum / most).round() as i32;
            for (part, length) in self.parts.iter().zip(&bar.parts) {
                let from = at(sum);
                sum += length;
                if at(sum) > from {
                    area.draw(&Rectangle::new([(from, y), (at(sum), y + THICK)], fill(part)))?;
                }
            }
            write(area, &bar.label, (at(sum) + 12, y + THICK / 2), HPos::Left, Colour::Faint)?;
        }
        Ok(())
    }

    /// The position of each part in the key: its x and its line.
    fn key(&self) -> Vec<(i32, i32)> {
        let (mut x, mut line) = (8, 0);
        let place = |part: &Part| {
            let width = 40 + length(&part.name) + 34;
            if x > 8 && x + width > WIDTH as i32 {
                (x, line) = (8, line + 1);
            }
            x += width;
            (x - width, line)
        };
        self.parts.iter().map(place).collect()
    }
}

fn fill(part: &Part) -> ShapeStyle {
    part.colour.rgb().mix(part.strength).filled()
}

fn write(area: &Area, words: &str, at: (i32, i32), side: HPos, colour: Colour) -> Drawn {
    let style = text(TEXT, colour).pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(words.to_string(), at, style))
}
