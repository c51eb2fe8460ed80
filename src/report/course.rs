//! Collects, for each method, the scores of the target network and the cost of training up to each score. The efficiency figures
//! show these points. The points also give the cost at which a method reaches a score.

use super::gather::{Logged, Part, Run};
use crate::run::start::Start;
pub use crate::run::table::{METHODS, Method};
use crate::store::ledger::Total;
use crate::svg::chart::Colour;
use crate::task::{Better, Metric};
use jiff::Timestamp;

/// The two methods whose costs are compared with each other.
pub const RIVALS: [Method; 2] = [Method::Incubation, Method::E2e];

/// The methods in which stages learn from losses of their own.
pub const LOCAL: [Method; 2] = [Method::Dgl, Method::InfoPro];

/// The colour of a method in all figures.
pub fn colour(method: Method) -> Colour {
    match method {
        Method::Incubation => Colour::Incubation,
        Method::E2e => Colour::EndToEnd,
        Method::Dgl => Colour::Of(2),
        Method::InfoPro => Colour::Of(3),
    }
}

/// The parts of a run that belong to the method, in the order of the run.
pub fn parts(method: Method, run: &Run) -> impl Iterator<Item = &Part> {
    run.parts.iter().filter(move |part| part.method() == method)
}

/// The cost of training.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    pub device_hours: f64,
    pub flops: f64,
    /// Training images that passed through a network. An image counts each time that it passes.
    pub images: f64,
    /// Elapsed hours of training. The time in which several modules train at once counts once.
    pub hours: f64,
}

impl From<Total> for Cost {
    fn from(total: Total) -> Cost {
        let images = total.images as f64;
        Cost { device_hours: total.device_hours, flops: total.flops, images, hours: total.seconds / 3600.0 }
    }
}

impl std::ops::Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost {
            device_hours: self.device_hours + other.device_hours,
            flops: self.flops + other.flops,
            images: self.images + other.images,
            hours: self.hours + other.hours,
        }
    }
}

/// The ways to measure a cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    DeviceHours,
    Flops,
    Images,
    Hours,
}

/// All measures, in the order of figures and tables.
pub const MEASURES: [Measure; 4] = [Measure::DeviceHours, Measure::Flops, Measure::Images, Measure::Hours];

impl Measure {
    /// The cost in this measure.
    pub fn of(self, cost: &Cost) -> f64 {
        match self {
            Measure::DeviceHours => cost.device_hours,
            Measure::Flops => cost.flops,
            Measure::Images => cost.images,
            Measure::Hours => cost.hours,
        }
    }

    /// The name of the measure in texts for people.
    pub fn name(self) -> &'static str {
        match self {
            Measure::DeviceHours => "device-hours",
            Measure::Flops => "FLOPs",
            Measure::Images => "training images",
            Measure::Hours => "elapsed time",
        }
    }

    /// Chooses the largest unit in which `most` is at least 2, or else the smallest unit. Returns the unit's name, and its size in
    /// the unit of [`Cost`].
    pub fn unit(self, most: f64) -> (&'static str, f64) {
        let units: &[(&str, f64)] = match self {
            Measure::DeviceHours => {
                &[("device-hours", 1.0), ("device-minutes", 1.0 / 60.0), ("device-seconds", 1.0 / 3600.0)]
            }
            Measure::Flops => {
                &[("EFLOPs (10¹⁸)", 1e18), ("PFLOPs (10¹⁵)", 1e15), ("TFLOPs (10¹²)", 1e12), ("GFLOPs (10⁹)", 1e9)]
            }
            Measure::Images => {
                &[("million training images", 1e6), ("thousand training images", 1e3), ("training images", 1.0)]
            }
            Measure::Hours => &[("hours", 1.0), ("minutes", 1.0 / 60.0), ("seconds", 1.0 / 3600.0)],
        };
        *units.iter().find(|(_, size)| most >= 2.0 * size).unwrap_or(&units[units.len() - 1])
    }
}

/// The score of a network at one moment of its training, and the cost up to then.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub cost: Cost,
    pub score: f64,
}

/// The evaluations of the target network while one method trains it.
#[derive(Debug, Clone)]
pub struct Course {
    pub method: Method,
    /// The evaluations in the order of the training.
    pub points: Vec<Point>,
    /// Whether the method has finished its model. If so, the last point is this model.
    pub is_finished: bool,
}

impl Course {
    /// The course of a method in a run. None if the method has not evaluated the target yet. Also none if one of the method's
    /// models was imported, because the cost of this model is unknown.
    pub fn of(run: &Run, method: Method) -> Option<Course> {
        let key = format!("test/{}", run.task().headline().key);
        let (mut spent, mut points, mut is_finished) = (Cost::default(), Vec::new(), false);
        let mut trained = Vec::new();
        for part in parts(method, run).filter(|part| part.has_begun()) {
            if part.is_imported {
                return None;
            }
            if part.is_target() {
                let last = part.progress.as_ref().map_or(u64::MAX, |progress| progress.steps);
                let before_end = evaluations(&part.lines, &key).filter(|(step, _)| !part.is_done() || *step < last);
                points
                    .extend(before_end.map(|(step, score)| Point { cost: spent + cost_at(&part.starts, step), score }));
            }
            spent = spent + part.total.into();
            trained.extend(part.starts.iter().filter_map(interval));
            spent.hours = covered(trained.clone()) / 3600.0;
            if let (true, Some(score)) = (part.is_target(), part.score()) {
                points.push(Point { cost: spent, score });
            }
            is_finished = part.is_target() && part.score().is_some();
        }
        let trains_last = parts(method, run).last().is_some_and(Part::is_done);
        (!points.is_empty()).then_some(Course { method, points, is_finished: is_finished && trains_last })
    }

    /// The point of the finished model, if there is one.
    pub fn result(&self) -> Option<Point> {
        self.points.last().filter(|_| self.is_finished).copied()
    }
}

/// The Unix times at which a start of a phase began and ended. None if the record's time cannot be parsed.
fn interval(start: &Start) -> Option<(f64, f64)> {
    let began = start.began.parse::<Timestamp>().ok()?.as_duration().as_secs_f64();
    Some((began, began + start.seconds))
}

/// The length of the union of intervals.
fn covered(mut intervals: Vec<(f64, f64)>) -> f64 {
    intervals.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut until = f64::NEG_INFINITY;
    let add = |sum: f64, (from, to): (f64, f64)| {
        let new = (to - from.max(until)).max(0.0);
        until = until.max(to);
        sum + new
    };
    intervals.into_iter().fold(0.0, add)
}

/// The values that the log lines have for a key, each with its step.
pub fn evaluations<'a>(lines: &'a [Logged], key: &'a str) -> impl Iterator<Item = (u64, f64)> + 'a {
    lines.iter().filter_map(move |line| Some((line.get("step")?.as_u64()?, line.get(key)?.as_f64()?)))
}

/// The cost of a phase up to a logged step. Steps that a later start repeated count each time. Within a start, all steps are
/// assumed to cost the same.
fn cost_at(starts: &[Start], step: u64) -> Cost {
    let own = starts.iter().rposition(|start| start.from < step).unwrap_or(0);
    starts.iter().take(own + 1).enumerate().fold(Cost::default(), |sum, (index, start)| {
        let steps = start.to.saturating_sub(start.from).max(1) as f64;
        let share = if index < own { 1.0 } else { (step.saturating_sub(start.from) as f64 / steps).min(1.0) };
        sum + Cost {
            device_hours: share * start.device_seconds / 3600.0,
            flops: share * start.flops,
            images: share * start.images as f64,
            hours: share * start.seconds / 3600.0,
        }
    })
}

/// Whether the first score is better than the second.
pub fn is_better(metric: &Metric, one: f64, other: f64) -> bool {
    match metric.better {
        Better::Higher { .. } => one > other,
        Better::Lower => one < other,
    }
}

/// The Pareto front of the points. The points are sorted by cost, and each point that is better than all points before it is kept.
/// Of several points of the same cost, only the best can be kept.
pub fn front(metric: &Metric, measure: Measure, points: &[Point]) -> Vec<Point> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| {
        let by_cost = measure.of(&a.cost).total_cmp(&measure.of(&b.cost));
        by_cost.then_with(|| is_better(metric, b.score, a.score).cmp(&is_better(metric, a.score, b.score)))
    });
    let mut front: Vec<Point> = Vec::new();
    for point in sorted {
        if front.last().is_none_or(|best| is_better(metric, point.score, best.score)) {
            front.push(point);
        }
    }
    front
}

/// The cost at which a front reaches a score, interpolated linearly between the front's points. None if the front does not reach
/// the score. The flag is true if the front's first point is already better than the score. Then the true cost may be lower.
fn cost_of(metric: &Metric, measure: Measure, front: &[Point], score: f64) -> Option<(f64, bool)> {
    let at = front.iter().position(|point| !is_better(metric, score, point.score))?;
    let upper = front[at];
    if at == 0 {
        return Some((measure.of(&upper.cost), is_better(metric, upper.score, score)));
    }
    let lower = front[at - 1];
    let share = (score - lower.score) / (upper.score - lower.score);
    let (from, to) = (measure.of(&lower.cost), measure.of(&upper.cost));
    Some((from + share * (to - from), false))
}

/// The costs of Deep Incubation and of end-to-end training at equal accuracy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AtEqual {
    /// The best score that both methods reach.
    pub score: f64,
    /// The cost of Deep Incubation, and the cost of end-to-end training.
    pub costs: [f64; 2],
    /// The second cost divided by the first. Above 1, Deep Incubation is cheaper.
    pub multiple: f64,
    pub bound: Bound,
}

/// Whether a measured multiple is exact, or only a bound of the true multiple.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    Exact,
    AtLeast,
    AtMost,
}

/// Compares the costs of Deep Incubation (`ours`) and end-to-end training (`theirs`) at the best score that both reach. None if
/// either method has no point, or if a cost is 0.
pub fn at_equal(metric: &Metric, measure: Measure, ours: &[Point], theirs: &[Point]) -> Option<AtEqual> {
    let (ours, theirs) = (front(metric, measure, ours), front(metric, measure, theirs));
    let (a, b) = (ours.last()?.score, theirs.last()?.score);
    let score = if is_better(metric, a, b) { b } else { a };
    let (own, is_ours_late) = cost_of(metric, measure, &ours, score)?;
    let (other, is_theirs_late) = cost_of(metric, measure, &theirs, score)?;
    let bound = match (is_ours_late, is_theirs_late) {
        (true, true) => return None,
        (true, false) => Bound::AtLeast,
        (false, true) => Bound::AtMost,
        (false, false) => Bound::Exact,
    };
    (own > 0.0 && other > 0.0).then_some(AtEqual { score, costs: [own, other], multiple: other / own, bound })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::task::Task;

    fn metric() -> &'static Metric {
        Task::of(&Config::parse("", &[]).unwrap()).headline()
    }

    fn points(all: &[(f64, f64)]) -> Vec<Point> {
        let point = |&(flops, score): &(f64, f64)| Point { cost: Cost { flops, ..Cost::default() }, score };
        all.iter().map(point).collect()
    }

    #[test]
    fn costs_are_compared_at_the_best_score_that_both_methods_reach() {
        let at = |ours: &[(f64, f64)], theirs: &[(f64, f64)]| {
            at_equal(metric(), Measure::Flops, &points(ours), &points(theirs))
        };
        // End to end reaches 80 at a cost of 4; incubation passes 80 halfway between 1 and 2.
        let found = at(&[(1.0, 75.0), (2.0, 85.0)], &[(1.0, 60.0), (2.0, 70.0), (4.0, 80.0)]).unwrap();
        assert_eq!((found.score, found.bound), (80.0, Bound::Exact));
        assert!((found.multiple - 4.0 / 1.5).abs() < 1e-12);
        let late = at(&[(3.0, 85.0)], &[(1.0, 60.0), (4.0, 80.0)]).unwrap();
        assert_eq!((late.multiple, late.bound), (4.0 / 3.0, Bound::AtLeast), "it may have been as good before");
        let late = at(&[(1.0, 60.0), (4.0, 80.0)], &[(2.0, 85.0)]).unwrap();
        assert_eq!((late.multiple, late.bound), (0.5, Bound::AtMost));
        assert_eq!(at(&[(1.0, 80.0)], &[]), None);
    }

    #[test]
    fn parts_that_train_at_the_same_time_share_the_elapsed_time() {
        assert_eq!(covered(vec![(20.0, 30.0), (0.0, 10.0), (2.0, 5.0), (8.0, 12.0), (30.0, 31.0)]), 12.0 + 11.0);
        assert_eq!(covered(Vec::new()), 0.0);
    }

    #[test]
    fn a_front_leaves_out_what_costs_more_and_is_no_better() {
        let of = |all: &[(f64, f64)]| front(metric(), Measure::Flops, &points(all));
        let found = of(&[(3.0, 70.0), (1.0, 60.0), (2.0, 72.0), (4.0, 71.0)]);
        assert_eq!(found, points(&[(1.0, 60.0), (2.0, 72.0)]));
        let found = of(&[(1.0, 50.0), (1.0, 60.0), (2.0, 72.0), (2.0, 65.0)]);
        assert_eq!(found, points(&[(1.0, 60.0), (2.0, 72.0)]), "the better one of equal cost");
    }

    #[test]
    fn the_cost_of_a_step_includes_the_steps_that_were_lost_before_it() {
        let text = |from, to, device_seconds| {
            format!(
                r#"{{"began":"{from}","end":null,"ranks":1,"replicas":1,"precision":"fp32","from":{from},"to":{to},
                "images":{},"flops":{},"seconds":1.0,"device_seconds":{device_seconds},"host":"h","job":null}}"#,
                2 * (to - from),
                10.0 * f64::from(to - from)
            )
        };
        let starts = [text(0, 10, 36.0), text(5, 20, 72.0)].map(|text| serde_json::from_str::<Start>(&text).unwrap());
        let at = |step| cost_at(&starts, step);
        assert_eq!((at(5).flops, at(5).images), (50.0, 10.0));
        assert_eq!((at(10).flops, at(10).images), (150.0, 30.0), "steps 5 to 10 were done twice");
        assert_eq!(at(20).flops, 250.0);
        assert!((at(20).device_hours - 108.0 / 3600.0).abs() < 1e-12);
    }
}
