//! A table as data, which becomes HTML on the page and CSV in a file. Also formats numbers for people.

use super::course::Bound;
use super::groups::Mean;

/// A cell: the text on the page, and the exact value in the CSV.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    pub shown: String,
    pub exact: String,
    /// The filled share of the meter that the page draws beside the text; none if there is no meter.
    pub meter: Option<f64>,
}

/// A table.
#[derive(Debug, Clone)]
pub struct Table {
    /// The name of the table's CSV file, without `.csv`.
    pub slug: &'static str,
    pub head: Vec<String>,
    pub rows: Vec<Vec<Cell>>,
}

impl Cell {
    pub fn text(text: impl Into<String>) -> Cell {
        let text = text.into();
        Cell { exact: text.clone(), shown: text, meter: None }
    }

    /// A cell for a number: the text on the page, and the exact value.
    pub fn number(shown: String, value: impl ToString) -> Cell {
        Cell { shown, exact: value.to_string(), meter: None }
    }

    /// The cell of a missing value.
    pub fn none() -> Cell {
        Cell { shown: "–".into(), exact: String::new(), meter: None }
    }
}

impl Table {
    pub fn new(slug: &'static str, head: &[&str]) -> Table {
        Table { slug, head: head.iter().map(|title| title.to_string()).collect(), rows: Vec::new() }
    }

    /// The table as CSV, with exact values.
    pub fn csv(&self) -> Vec<u8> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        let written = writer.write_record(&self.head).and_then(|()| {
            self.rows.iter().try_for_each(|row| writer.write_record(row.iter().map(|cell| cell.exact.as_str())))
        });
        written.expect("every row has a cell for each column, and memory takes whatever is written");
        writer.into_inner().expect("memory takes whatever is written")
    }

    /// Whether the column has values and all of them are numbers. The page aligns such a column to the right.
    pub fn is_numeric(&self, column: usize) -> bool {
        let mut cells = self.rows.iter().map(|row| &row[column].exact).filter(|text| !text.is_empty()).peekable();
        cells.peek().is_some() && cells.all(|text| text.parse::<f64>().is_ok())
    }
}

/// A count with thin spaces between groups of three digits, if it has more than four digits.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) && digits.len() > 4 {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// A number in scientific notation, such as `3.82 × 10¹²`.
pub fn scientific(value: f64) -> String {
    let text = format!("{value:.2e}");
    let Some((digits, exponent)) = text.split_once('e').filter(|_| value != 0.0) else { return "0".into() };
    let raised = exponent.chars().map(|c| match c {
        '-' => '⁻',
        digit => ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'][digit as usize - '0' as usize],
    });
    format!("{digits} × 10{}", raised.collect::<String>())
}

/// A mean with its deviation.
pub fn plus_minus(mean: &Mean, digits: usize) -> String {
    let deviation = mean.deviation.map_or(String::new(), |deviation| format!(" ± {deviation:.digits$}"));
    format!("{:.digits$}{deviation}", mean.mean)
}

/// A difference with its sign and its deviation.
pub fn signed(mean: &Mean, digits: usize) -> String {
    let deviation = mean.deviation.map_or(String::new(), |deviation| format!(" ± {deviation:.digits$}"));
    format!("{:+.digits$}{deviation}", mean.mean).replace('-', "−")
}

/// A multiple of cost, such as `at least 1.25 ± 0.03`.
pub fn multiple(mean: &Mean, bound: Bound) -> String {
    let word = match bound {
        Bound::Exact => "",
        Bound::AtLeast => "at least ",
        Bound::AtMost => "at most ",
    };
    format!("{word}{}", plus_minus(mean, 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_raised() {
        assert_eq!([1234, 12345, 1234567].map(grouped), ["1234", "12\u{202f}345", "1\u{202f}234\u{202f}567"]);
        assert_eq!([3.824e12, 0.0, 2.5e-7].map(scientific), ["3.82 × 10¹²", "0", "2.50 × 10⁻⁷"]);
    }
}
