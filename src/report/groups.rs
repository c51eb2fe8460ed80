//! Several runs side by side. Runs of the same network on the same data form a setting. Models of a setting that differ in the seed
//! alone form a group, whose scores and costs are averaged.

use super::course::{AtEqual, Bound, Cost, Course, METHODS, Measure, Method, Point, RIVALS, at_equal, parts};
use super::gather::Run;
use crate::task::Metric;
use std::collections::BTreeSet;

/// The mean of some values, with their spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mean {
    pub mean: f64,
    /// The sample standard deviation; none for a single value.
    pub deviation: Option<f64>,
    /// The number of values.
    pub count: usize,
}

impl Mean {
    /// The mean of the values; none if there are no values.
    pub fn of(values: &[f64]) -> Option<Mean> {
        let count = values.len();
        let mean = values.iter().sum::<f64>() / count as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = (count > 1).then(|| (squares / (count as f64 - 1.0)).sqrt());
        (count > 0).then_some(Mean { mean, deviation, count })
    }
}

/// Finished models of one method, from runs that differ in the seed alone.
#[derive(Debug)]
pub struct Group {
    pub method: Method,
    /// The config values, other than epochs, that distinguish the group from the other groups of its method in the setting, such as
    /// `module.start "meta"`; empty if there are none.
    pub variant: String,
    /// The index of each run in the report, with its seed and its finished model.
    pub results: Vec<(usize, u64, Point)>,
    /// The mean of the scores.
    pub score: Mean,
    /// The mean of the costs.
    pub cost: Cost,
}

/// All runs of one network on the same data.
#[derive(Debug)]
pub struct Setting {
    /// The config values that distinguish the setting from the other settings; empty if there is only one setting.
    pub name: String,
    /// The indices of the runs in the report.
    pub runs: Vec<usize>,
    /// The groups, by method (Deep Incubation first) and then by cost.
    pub groups: Vec<Group>,
    /// The courses of all methods, each with the index of its run.
    pub courses: Vec<(usize, Course)>,
}

/// A group of Deep Incubation and a group of end-to-end training whose costs count as equal ([`is_equal`]).
pub struct Pair<'a> {
    pub ours: &'a Group,
    pub theirs: &'a Group,
    /// The score of Deep Incubation minus the score of end-to-end training. If both groups have models of the same seeds, it is the
    /// mean of the differences between these models.
    pub difference: Mean,
}

/// Two costs count as equal if their ratio differs from 1 by at most this.
pub const EQUAL: f64 = 0.06;

/// Whether two costs count as equal.
pub fn is_equal(one: f64, other: f64) -> bool {
    (one / other - 1.0).abs() <= EQUAL
}

/// Divides the runs into settings, in the order of the runs.
pub fn settings(runs: &[Run]) -> Vec<Setting> {
    let keys: Vec<String> = runs.iter().map(|run| run.plan.config.recipe(&["model", "data"])).collect();
    let mut distinct: Vec<&String> = Vec::new();
    keys.iter().for_each(|key| {
        if !distinct.contains(&key) {
            distinct.push(key);
        }
    });
    let of_key = |key: &String| {
        let own: Vec<usize> = (0..runs.len()).filter(|&run| keys[run] == *key).collect();
        let name = if distinct.len() > 1 { name(&runs[own[0]], key, &distinct) } else { String::new() };
        setting(name, runs, own)
    };
    distinct.iter().map(|key| of_key(key)).collect()
}

/// The config lines in which the setting differs from at least one other setting. `key` holds the lines of the setting, and `all`
/// holds the lines of each setting. The line of the depths becomes the number of blocks.
fn name(run: &Run, key: &str, all: &[&String]) -> String {
    let is_own = |line: &&str| !all.iter().all(|other| other.lines().any(|of| of == *line));
    let own: Vec<&str> = key.lines().filter(is_own).collect();
    let depths = run.plan.config.model.depths();
    let blocks = |line: &str| match line.starts_with("model.depths") {
        true => format!("{} blocks", depths.iter().sum::<usize>()),
        false => line.replace(" = ", " "),
    };
    own.into_iter().map(blocks).collect::<Vec<_>>().join(", ")
}

fn setting(name: String, runs: &[Run], own: Vec<usize>) -> Setting {
    let courses = own.iter().flat_map(|&run| METHODS.map(|method| Some((run, Course::of(&runs[run], method)?))));
    let courses: Vec<(usize, Course)> = courses.flatten().collect();
    let mut groups: Vec<(String, Group)> = Vec::new();
    for (run, course) in &courses {
        let Some(point) = course.result() else { continue };
        let seed = runs[*run].plan.config.run.seed;
        let key = recipe(&runs[*run], course.method);
        match groups.iter_mut().find(|(known, group)| *known == key && group.method == course.method) {
            Some((_, group)) => group.results.push((*run, seed, point)),
            None => {
                let score = Mean { mean: point.score, deviation: None, count: 1 };
                let results = vec![(*run, seed, point)];
                let (method, variant, cost) = (course.method, String::new(), point.cost);
                groups.push((key, Group { method, variant, results, score, cost }));
            }
        }
    }
    let variants: Vec<String> = groups.iter().map(|(key, group)| variant(key, group.method, &groups)).collect();
    let named = groups.into_iter().zip(variants).map(|((_, group), variant)| Group { variant, ..group.averaged() });
    let mut groups: Vec<Group> = named.collect();
    groups.sort_by(|a, b| (a.method as u8).cmp(&(b.method as u8)).then(a.cost.flops.total_cmp(&b.cost.flops)));
    Setting { name, runs: own, groups, courses }
}

/// The lines of a group's `key`, other than those of epochs, that some other group of the method lacks.
fn variant(key: &str, method: Method, all: &[(String, Group)]) -> String {
    let lacks = |other: &str, line: &str| !other.lines().any(|known| known == line);
    let is_own = |line: &&str| {
        let is_lacked = all.iter().any(|(other, group)| group.method == method && lacks(other, line));
        is_lacked && !line.contains("epochs")
    };
    key.lines().filter(is_own).map(|line| line.replace(" = ", " ")).collect::<Vec<_>>().join(", ")
}

/// The config lines that decide the result of a method. The seed is left out.
fn recipe(run: &Run, method: Method) -> String {
    let model = parts(method, run).last().and_then(|part| part.node.row.model);
    model.map_or(String::new(), |model| run.plan.config.recipe(model.recipe))
}

impl Group {
    fn averaged(self) -> Group {
        let points = self.results.iter().map(|(_, _, point)| point);
        let scores: Vec<f64> = points.clone().map(|point| point.score).collect();
        let sum = points.fold(Cost::default(), |sum, point| sum + point.cost);
        let count = scores.len() as f64;
        let cost = Cost {
            device_hours: sum.device_hours / count,
            flops: sum.flops / count,
            images: sum.images / count,
            hours: sum.hours / count,
        };
        let score = Mean::of(&scores).unwrap_or(self.score);
        Group { score, cost, ..self }
    }

    /// The method, with the variant if there is one.
    pub fn name(&self) -> String {
        match self.variant.as_str() {
            "" => self.method.name().into(),
            variant => format!("{} ({variant})", self.method.name()),
        }
    }

    /// The mean of the group's models as one point.
    pub fn point(&self) -> Point {
        Point { cost: self.cost, score: self.score.mean }
    }
}

impl Setting {
    /// The groups of a method.
    pub fn of(&self, method: Method) -> impl Iterator<Item = &Group> {
        self.groups.iter().filter(move |group| group.method == method)
    }

    /// The groups of Deep Incubation that have a group of end-to-end training of equal cost, in order of cost. Cost means
    /// floating-point operations here. Each is paired with the end-to-end group that is nearest in cost.
    pub fn pairs(&self) -> Vec<Pair<'_>> {
        let nearest = |ours: &Group| {
            let distance = |group: &&Group| (group.cost.flops / ours.cost.flops).ln().abs();
            let theirs = self.of(Method::E2e).min_by(|a, b| distance(a).total_cmp(&distance(b)))?;
            is_equal(theirs.cost.flops, ours.cost.flops).then_some(theirs)
        };
        let pair = |ours| {
            let theirs = nearest(ours)?;
            Some(Pair { ours, theirs, difference: difference(ours, theirs) })
        };
        self.of(Method::Incubation).filter_map(pair).collect()
    }

    /// The costs of Deep Incubation and end-to-end training at equal accuracy, for each seed for which they can be compared.
    pub fn at_equal(&self, metric: &Metric, measure: Measure) -> Vec<AtEqual> {
        let of_seed = |seed| {
            let points = RIVALS.map(|method| match self.is_compared_on_the_way(seed) {
                true => self.on_the_way(seed, method),
                false => self.results(seed, method).map(|(_, point)| point).collect(),
            });
            at_equal(metric, measure, &points[0], &points[1])
        };
        self.seeds().into_iter().filter_map(of_seed).collect()
    }

    /// The seeds of the finished models.
    pub fn seeds(&self) -> BTreeSet<u64> {
        self.groups.iter().flat_map(|group| group.results.iter().map(|(_, seed, _)| *seed)).collect()
    }

    /// Whether Deep Incubation and end-to-end training are compared by their evaluations during training. This is so if either
    /// method has fewer than two finished models of the seed. Otherwise the finished models are compared.
    pub fn is_compared_on_the_way(&self, seed: u64) -> bool {
        RIVALS.iter().any(|&method| self.results(seed, method).count() < 2)
    }

    /// The finished models of a method and a seed, each with the index of its run.
    fn results(&self, seed: u64, method: Method) -> impl Iterator<Item = (usize, Point)> {
        let results = self.of(method).flat_map(|group| &group.results);
        results.filter(move |(_, of, _)| *of == seed).map(|(run, _, point)| (*run, *point))
    }

    /// All evaluations of the runs of a seed in which the method has finished.
    fn on_the_way(&self, seed: u64, method: Method) -> Vec<Point> {
        let runs: Vec<usize> = self.results(seed, method).map(|(run, _)| run).collect();
        let courses = self.courses.iter().filter(|(run, course)| course.method == method && runs.contains(run));
        courses.flat_map(|(_, course)| course.points.clone()).collect()
    }
}

/// The mean of the multiples. Its bound is that of the first multiple that is not exact, or exact if all multiples are. None if
/// there are no multiples.
pub fn mean_multiple(all: &[AtEqual]) -> Option<(Mean, Bound)> {
    let mean = Mean::of(&all.iter().map(|at| at.multiple).collect::<Vec<_>>())?;
    let bound = all.iter().map(|at| at.bound).find(|bound| *bound != Bound::Exact);
    Some((mean, bound.unwrap_or(Bound::Exact)))
}

/// The difference between the scores of two groups. It is the mean of the differences over the seeds that both groups have. If they
/// share no seed, it is the difference between the two mean scores.
fn difference(ours: &Group, theirs: &Group) -> Mean {
    let of_seed = |(_, seed, point): &(usize, u64, Point)| {
        let other = theirs.results.iter().find(|(_, of, _)| of == seed)?;
        Some(point.score - other.2.score)
    };
    let differences: Vec<f64> = ours.results.iter().filter_map(of_seed).collect();
    let of_means = Mean { mean: ours.score.mean - theirs.score.mean, deviation: None, count: 1 };
    Mean::of(&differences).unwrap_or(of_means)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deviation_is_that_of_a_sample() {
        assert_eq!(Mean::of(&[]), None);
        assert_eq!(Mean::of(&[3.0]), Some(Mean { mean: 3.0, deviation: None, count: 1 }));
        assert_eq!(Mean::of(&[1.0, 2.0, 3.0]), Some(Mean { mean: 2.0, deviation: Some(1.0), count: 3 }));
    }

    #[test]
    fn differences_are_taken_between_models_of_the_same_seed() {
        let group = |scores: &[(u64, f64)]| {
            let point = |score| Point { cost: Cost::default(), score };
            let results = scores.iter().map(|&(seed, score)| (0, seed, point(score))).collect();
            let score = Mean { mean: 0.0, deviation: None, count: 1 };
            let (method, variant) = (Method::Incubation, String::new());
            Group { method, variant, results, score, cost: Cost::default() }.averaged()
        };
        let found = difference(&group(&[(0, 80.0), (1, 90.0)]), &group(&[(1, 89.0), (0, 77.0)]));
        assert_eq!((found.mean, found.count), (2.0, 2));
        assert_eq!(difference(&group(&[(0, 80.0)]), &group(&[(1, 79.0)])).mean, 1.0);
    }
}
