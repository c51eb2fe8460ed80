//! Draws the figures of a report.

use super::course::{MEASURES, METHODS, Measure, Method, Point, colour, evaluations, front};
use super::gather::{Part, Run};
use super::groups::{Group, Setting};
use super::time;
use crate::run::table::{Depths, Row, TABLE};
use crate::svg::chart::{Axis, Chart, Colour, Mark, Series, Style};
use crate::task::Metric;

/// A picture as SVG, with the stem of the names of its files.
pub struct Figure {
    pub slug: String,
    pub svg: String,
}

/// The approximate limit of the points in one picture. It lets a browser open a picture of a thousand modules.
const POINTS: usize = 20_000;
/// The number of points that a curve keeps even if the picture then has more than [`POINTS`].
const FEWEST: usize = 20;
/// If a setting has more runs, its efficiency figures leave out the evaluations during training, which would hide the results. If
/// the report has more runs, it has no pictures of the runs' times.
const FEW_RUNS: usize = 6;
/// With more runs, the learning curves would hide each other, so they are not drawn.
pub const MOST_CURVES: usize = 12;

/// The efficiency figures of a setting: the score against each measure of the cost. `number` is the number of the setting, counted
/// from 0.
pub fn efficiency(runs: &[Run], setting: &Setting, number: usize) -> Vec<Figure> {
    let metric = runs[0].task().headline();
    let figure = |measure: Measure| {
        let chart = efficiency_chart(runs, setting, metric, measure);
        let slug = match number {
            0 => format!("accuracy-by-{}", measure.name().replace(' ', "-")),
            number => format!("accuracy-by-{}-{}", measure.name().replace(' ', "-"), number + 1),
        };
        chart.is_worth_drawing().then(|| Figure { slug, svg: chart.svg() })
    };
    MEASURES.into_iter().filter_map(figure).collect()
}

fn efficiency_chart(runs: &[Run], setting: &Setting, metric: &Metric, measure: Measure) -> Chart {
    let metas = meta_points(runs, setting);
    let all = setting.courses.iter().flat_map(|(_, course)| course.points.clone()).chain(metas.iter().copied());
    let results = setting.groups.iter().map(Group::point);
    let most = all.clone().chain(results).map(|point| measure.of(&point.cost)).fold(0.0, f64::max);
    let (unit, size) = measure.unit(most);
    let mark = |point: &Point| Mark::at(measure.of(&point.cost) / size, point.score);
    let mut series = Vec::new();
    for method in METHODS {
        let colour = colour(method);
        let of_method = || setting.courses.iter().filter(move |(_, course)| course.method == method);
        let groups: Vec<&Group> = setting.of(method).collect();
        let is_alone = groups.len() < 2 && of_method().count() < 2;
        if setting.runs.len() <= FEW_RUNS {
            for (_, course) in of_method() {
                let marks = course.points.iter().map(mark).collect();
                let (name, style) =
                    if is_alone { (Some(method.name().into()), Style::Discs) } else { (None, Style::Trace) };
                series.push(Series { name, colour, style, marks });
            }
        }
        if !is_alone || setting.runs.len() > FEW_RUNS {
            series.extend(results_of(method, &groups, metric, measure, size));
        }
    }
    if !metas.is_empty() {
        let marks = metas.iter().map(mark).collect();
        series.push(Series { name: Some("meta model".into()), colour: Colour::Neutral, style: Style::Squares, marks });
    }
    let values = || series.iter().flat_map(|series| &series.marks);
    let ends = values().flat_map(|mark| [mark.y - mark.error.unwrap_or(0.0), mark.y + mark.error.unwrap_or(0.0)]);
    let title = format!("Test {} against {}", metric.title(), measure.name());
    let title = if setting.name.is_empty() { title } else { format!("{title}, {}", setting.name) };
    Chart { title, x: Axis::from_zero(unit, values().map(|mark| mark.x)), y: Axis::around("", ends), series }
}

/// The finished models of a method, with one disc for the mean of each group. A line joins the groups on the method's Pareto front.
fn results_of(method: Method, groups: &[&Group], metric: &Metric, measure: Measure, size: f64) -> Vec<Series> {
    let points: Vec<Point> = groups.iter().map(|group| group.point()).collect();
    let front = front(metric, measure, &points);
    let mark = |point: &Point| {
        let error = groups.iter().find(|group| group.point() == *point).and_then(|group| group.score.deviation);
        Mark { x: measure.of(&point.cost) / size, y: point.score, error }
    };
    let others: Vec<Mark> = points.iter().filter(|point| !front.contains(point)).map(mark).collect();
    let colour = colour(method);
    let fronts = Series {
        name: Some(method.name().into()),
        colour,
        style: Style::Discs,
        marks: front.iter().map(mark).collect(),
    };
    let others = Series { name: None, colour, style: Style::Dots, marks: others };
    [fronts, others].into_iter().filter(|series| !series.marks.is_empty()).collect()
}

/// The meta models of a setting. They are smaller than the target, so they are drawn for orientation and belong to no method's
/// front.
fn meta_points(runs: &[Run], setting: &Setting) -> Vec<Point> {
    let is_meta = |part: &&Part| part.node.row.model.is_some_and(|model| model.depths == Depths::Thin);
    let parts = setting.runs.iter().flat_map(|&run| runs[run].parts.iter().filter(is_meta));
    parts.filter_map(|part| Some(Point { cost: part.total.into(), score: part.score()? })).collect()
}

/// The learning curves. Each phase has one picture of the training loss and one picture of the score on the test images, unless no
/// curve in the picture has two points. Empty if there are more than [`MOST_CURVES`] runs.
pub fn curves(runs: &[Run]) -> Vec<Figure> {
    if runs.len() > MOST_CURVES {
        return Vec::new();
    }
    let headline = runs[0].task().headline();
    let test = (format!("test/{}", headline.key), format!("test {}", headline.title()));
    let kinds = [("loss".to_string(), "training loss".to_string()), test];
    let mut figures = Vec::new();
    for row in TABLE.iter().filter(|row| row.phase().is_some()) {
        for (key, title) in &kinds {
            let chart = curve_chart(runs, row, key, title);
            if chart.series.iter().any(|series| series.marks.len() > 1) {
                let slug = format!("{}-{}", row.name, title.replace([' ', '/'], "-").replace("-%", ""));
                figures.push(Figure { slug, svg: chart.svg() });
            }
        }
    }
    figures
}

fn curve_chart(runs: &[Run], row: &Row, key: &str, title: &str) -> Chart {
    let of_row = |part: &&Part| part.node.row.name == row.name;
    let parts = runs
        .iter()
        .enumerate()
        .flat_map(|(number, run)| run.parts.iter().filter(of_row).map(move |part| (number, part)));
    let parts: Vec<(usize, &Part)> = parts.filter(|(_, part)| !part.lines.is_empty()).collect();
    let most = (POINTS / parts.len().max(1)).max(FEWEST);
    let mut named = vec![false; runs.len()];
    let mut series = Vec::new();
    for (number, part) in &parts {
        let is_alone = parts.len() == 1;
        let by_run = runs.len() > 1;
        let name = match by_run {
            true => (!std::mem::replace(&mut named[*number], true)).then(|| runs[*number].name.clone()),
            false => (!is_alone).then(|| part.label.clone()),
        };
        let colour = match (by_run, part.node.index) {
            (true, _) => Colour::Of(*number),
            (false, Some(index)) => Colour::Of(index),
            (false, None) => colour(part.method()),
        };
        let marks = marks(part, key, most);
        let style = if marks.len() < 12 { Style::Discs } else { Style::Line };
        series.push(Series { name, colour, style, marks });
    }
    let values = || series.iter().flat_map(|series| &series.marks);
    let label = parts.first().map_or(row.name.to_string(), |(_, part)| match part.node.index {
        Some(_) => "modules".into(),
        None => part.label.clone(),
    });
    let x = if parts.iter().all(|(_, part)| epoch(part) > 0) { "epochs" } else { "steps" };
    Chart {
        title: format!("{}: {title}", capital(&label)),
        x: Axis::from_zero(x, values().map(|mark| mark.x)),
        y: Axis::around("", values().map(|mark| mark.y)),
        series,
    }
}

/// The text with its first letter as a capital.
pub fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

/// The number of steps in an epoch; 0 if it is unknown.
fn epoch(part: &Part) -> u64 {
    part.phase.as_ref().map_or(0, |phase| phase.steps_per_epoch)
}

/// The logged values of a key against epochs (or against steps, if the number of steps in an epoch is unknown). At most `most`
/// values are kept, evenly spaced and including the last.
fn marks(part: &Part, key: &str, most: usize) -> Vec<Mark> {
    let per_epoch = epoch(part).max(1) as f64;
    let all: Vec<Mark> =
        evaluations(&part.lines, key).map(|(step, value)| Mark::at(step as f64 / per_epoch, value)).collect();
    let every = all.len().div_ceil(most).max(1);
    let mut marks: Vec<Mark> = all.iter().rev().step_by(every).copied().collect();
    marks.reverse();
    marks
}

/// For each run, a picture of the time that each of its phases spent on computing, waiting and so on. Empty if there are more than
/// `FEW_RUNS` runs.
pub fn times(runs: &[Run]) -> Vec<Figure> {
    if runs.len() > FEW_RUNS {
        return Vec::new();
    }
    let figure = |(number, run): (usize, &Run)| {
        let mut bars = time::bars(run)?;
        if runs.len() > 1 {
            bars.title = format!("{}, {}", bars.title, run.name);
        }
        let slug = if number == 0 { "time".to_string() } else { format!("time-{}", number + 1) };
        Some(Figure { slug, svg: bars.svg() })
    };
    runs.iter().enumerate().filter_map(figure).collect()
}
