//! The first sentences of a report, for a reader who knows nothing of the run: what was trained, on which data, for how long, how
//! good it is, and whether Deep Incubation paid off.

use super::course::{Bound, LOCAL, METHODS, Measure, Method, Point, RIVALS, is_better, parts};
use super::figures::capital;
use super::gather::Run;
use super::groups::{Group, Mean, Pair, Setting, is_equal, mean_multiple};
use super::table::{grouped, multiple, signed};
use crate::config::Format;
use crate::run::state::State;
use crate::run::table::META;
use crate::store::progress::duration;
use crate::task::Metric;

/// The sentences, in order.
pub fn lead(runs: &[Run], settings: &[Setting]) -> Vec<String> {
    let [run] = runs else { return of_several(runs, settings) };
    let mut sentences = vec![subject(run)];
    sentences.extend(outcome(run, &settings[0]));
    sentences.extend(unfinished(run));
    sentences.push(verdict(run, &settings[0]));
    sentences.extend(thin_network(run, &settings[0]));
    sentences
}

/// The network in a few words.
fn network(run: &Run) -> String {
    let model = &run.plan.config.model;
    let parameters: usize = model.counts(model.depths()).iter().sum();
    let size = match parameters {
        1_000_000.. => format!("{:.1} million", parameters as f64 / 1e6),
        _ => grouped(parameters as u64),
    };
    format!("{} of {} blocks ({size} parameters)", model.title(), model.depths().iter().sum::<usize>())
}

/// The data in a few words.
fn data(run: &Run) -> String {
    let config = &run.plan.config;
    let images = match &run.data {
        Some(data) => format!("{} images", grouped(data.present.train.images as u64)),
        None => "images".into(),
    };
    let folder = config.data.path.file_name().map(|name| name.to_string_lossy().into_owned());
    let source = match (config.data.format, folder) {
        (Format::Shapes, _) => "of drawn shapes".into(),
        (_, Some(folder)) => format!("of {folder}"),
        (_, None) => String::new(),
    };
    format!("{images} {source} in {} classes", config.model.classes())
}

fn subject(run: &Run) -> String {
    let first = METHODS.into_iter().find(|method| parts(*method, run).any(|part| run.expects(part)));
    let way = match first {
        Some(Method::Incubation) => {
            let stages = run.plan.config.model.stages();
            format!(
                "by Deep Incubation: its {stages} parts, the modules, learn on their own inside a small model, and are then joined and \
                 fine-tuned"
            )
        }
        Some(Method::Dgl) => "by DGL: each part of it learns from a classifier of its own".into(),
        Some(Method::InfoPro) => {
            "by InfoPro: each part of it learns to reconstruct the image and to tell the classes apart".into()
        }
        _ => "end to end, as one network".into(),
    };
    format!("A {} is trained on {} {way}.", network(run), data(run))
}

/// The sentence on the time that the training took and the score that the network reaches; none if no method has finished.
fn outcome(run: &Run, setting: &Setting) -> Option<String> {
    let metric = run.task().headline();
    let result = setting.courses.iter().find_map(|(_, course)| course.result())?;
    let images =
        run.data.as_ref().map(|data| format!(" on {} test images", grouped(data.present.evaluation.images as u64)));
    Some(format!(
        "The training took {} of one device's time (a GPU, or the cores of a rank), and the network reaches {}{}.",
        duration(3600.0 * result.cost.device_hours),
        metric.text(result.score),
        images.unwrap_or_default()
    ))
}

/// The sentence on the part of the run that trains now or is next; none if all expected parts are done.
fn unfinished(run: &Run) -> Option<String> {
    let open: Vec<_> = run.parts.iter().filter(|part| !part.is_done() && run.expects(part)).collect();
    let at = open.iter().find(|part| part.has_begun()).or(open.first())?;
    let steps = at.progress.as_ref().filter(|progress| progress.steps > 0);
    let steps = steps.map_or(String::new(), |progress| format!(" at step {} of {}", progress.step, progress.steps));
    Some(match &at.state {
        State::Running => format!("The run is still going: {} is{steps}.", at.node.name),
        State::Waiting => format!("The run is not finished: {} has not begun.", at.node.name),
        state => format!("The run is not finished: {} is {}{steps}.", at.node.name, state.word()),
    })
}

/// Whether Deep Incubation paid off.
fn verdict(run: &Run, setting: &Setting) -> String {
    let single = |method| setting.of(method).next().map(|group: &Group| group.point());
    let open = "Whether Deep Incubation paid off is open";
    let expects = |method: Method| parts(method, run).any(|part| run.expects(part));
    match (single(Method::Incubation), single(Method::E2e)) {
        (Some(ours), Some(theirs)) => compared(run, setting, ours, theirs),
        _ if !expects(Method::E2e) => {
            format!("{open}: there is no end-to-end run to compare with (run.e2e = true trains one).")
        }
        _ if !expects(Method::Incubation) && LOCAL.into_iter().any(expects) => {
            format!("{open}: this run trains baselines alone.")
        }
        _ if !expects(Method::Incubation) => format!("{open}: this run trains end to end alone."),
        _ => format!("{open} until both methods are done."),
    }
}

/// The comparison of a finished model by Deep Incubation with a finished model by end-to-end training.
fn compared(run: &Run, setting: &Setting, ours: Point, theirs: Point) -> String {
    let metric = run.task().headline();
    let is_tie = is_within_noise(run, ours.score, theirs.score);
    let is_ahead = is_better(metric, ours.score, theirs.score);
    let (cost, other) = (ours.cost.flops, theirs.cost.flops);
    let times = cost / other;
    let is_dearer = cost > other && !is_equal(cost, other);
    let is_cheaper = cost < other && !is_equal(cost, other);
    let at = setting.at_equal(metric, Measure::Flops).first().copied();
    let equal = at.map(|at| at.multiple).filter(|multiple| !is_equal(*multiple, 1.0));
    let word = match (is_tie, is_ahead, is_dearer, is_cheaper) {
        (true, _, false, false) => "made no difference",
        (true, _, true, _) | (false, false, _, false) => "did not pay off",
        (true, _, _, true) | (false, true, false, _) => "paid off",
        _ => match equal {
            Some(multiple) if multiple > 1.0 => "paid off",
            Some(_) => "did not pay off",
            None => "made no clear difference",
        },
    };
    let compare =
        if is_equal(cost, other) { "the same computation".into() } else { format!("{times:.2} times the computation") };
    let tie = if is_tie { ", which is within the noise of the test images" } else { "" };
    let hours = ours.cost.device_hours / theirs.cost.device_hours;
    let mut text = format!(
        "Here Deep Incubation {word}: trained end to end the same network reaches {}{tie}, and Deep Incubation took {compare} of \
         that ({hours:.2} times the device-hours)",
        metric.text(theirs.score)
    );
    if let Some((mean, bound)) = at.and_then(|at| mean_multiple(&[at])).filter(|_| !is_tie) {
        let level = at.map_or(String::new(), |at| metric.text(at.score));
        text +=
            &format!("; to reach {level} end-to-end training needed {} times its computation", multiple(&mean, bound));
    }
    text + "."
}

/// Whether two scores on the run's test images differ by no more than twice the standard error of their difference.
fn is_within_noise(run: &Run, one: f64, other: f64) -> bool {
    let images = run.data.as_ref().map_or(0, |data| data.present.evaluation.images);
    let error = |score| run.task().headline_error(score, images).unwrap_or(0.0);
    (one - other).abs() <= 2.0 * error(one).hypot(error(other))
}

/// The mean score and the mean cost, in FLOPs, of the meta models of the runs. None if any run has no finished meta model of its
/// own.
fn meta_models(runs: &[&Run]) -> Option<(f64, f64)> {
    let of_run = |run: &&Run| {
        let meta = run.parts.iter().find(|part| part.node.row.name == META.name && !part.is_imported)?;
        Some((meta.score()?, meta.total.flops))
    };
    let each: Vec<(f64, f64)> = runs.iter().map(of_run).collect::<Option<_>>()?;
    let (scores, flops): (Vec<f64>, Vec<f64>) = each.into_iter().unzip();
    Some((Mean::of(&scores)?.mean, Mean::of(&flops)?.mean))
}

/// How good the thin meta model is on its own. If it is as good as the target, no way to train the target pays off.
fn thin_network(run: &Run, setting: &Setting) -> Option<String> {
    let ours = setting.of(Method::Incubation).next()?.point();
    let (score, flops) = meta_models(&[run])?;
    let metric = run.task().headline();
    let is_enough = is_within_noise(run, score, ours.score) || is_better(metric, score, ours.score);
    let enough = if is_enough { ": on these data the thin network is as good as the deep one" } else { "" };
    Some(format!(
        "The meta model alone, a thin network that took {:.2} of the computation of Deep Incubation, reaches {}{enough}.",
        flops / ours.cost.flops,
        metric.text(score)
    ))
}

/// Whether the run has begun to train with a method in which each stage learns from its own loss.
fn has_local(run: &Run) -> bool {
    LOCAL.into_iter().any(|method| parts(method, run).any(|part| part.has_begun()))
}

/// The sentences for several runs.
fn of_several(runs: &[Run], settings: &[Setting]) -> Vec<String> {
    let over = runs.iter().filter(|run| run.is_over()).count();
    let kinds = if settings.len() == 1 { "a".to_string() } else { format!("{} settings of a", settings.len()) };
    let mut sentences = vec![format!(
        "{} runs train {kinds} {} on {}, each by Deep Incubation (module by module, then joined and fine-tuned){} end to end; {}.",
        runs.len(),
        if settings.len() == 1 { network(&runs[0]) } else { runs[0].plan.config.model.title().into() },
        data(&runs[0]),
        if runs.iter().any(has_local) { ", with losses for each stage (DGL, InfoPro) or" } else { " or" },
        if over == runs.len() { "all are finished".into() } else { format!("{over} of them are finished") }
    )];
    sentences.extend(settings.iter().map(|setting| of_setting(runs, setting)));
    sentences
}

/// The comparison of Deep Incubation with end-to-end training in a setting.
fn of_setting(runs: &[Run], setting: &Setting) -> String {
    let metric = runs[0].task().headline();
    let start = if setting.name.is_empty() { String::new() } else { format!("With {}: ", setting.name) };
    let mut parts = Vec::new();
    if let Some(pair) = best_of_largest(metric, setting.pairs()) {
        let unit = if metric.unit == "%" { "points" } else { metric.unit };
        let difference = signed(&pair.difference, metric.decimals);
        parts.push(format!(
            "at equal cost {} reaches {}, {difference} {unit} compared with end to end",
            pair.ours.name(),
            metric.text(pair.ours.score.mean)
        ));
        let own: Vec<&Run> = pair.ours.results.iter().map(|(run, ..)| &runs[*run]).collect();
        if let Some((score, flops)) = meta_models(&own) {
            let share = flops / pair.ours.cost.flops;
            parts.push(format!("the meta model alone reaches {} with {share:.2} of that cost", metric.text(score)));
        }
    }
    if let Some((mean, bound)) = mean_multiple(&setting.at_equal(metric, Measure::Flops)) {
        parts.push(format!(
            "for equal accuracy end-to-end training needs {} times the computation",
            multiple(&mean, bound)
        ));
    }
    if parts.is_empty() {
        let lacks = RIVALS.into_iter().find(|method| setting.of(*method).count() == 0);
        parts.push(match lacks {
            Some(method) => format!("there is no finished model trained {} to compare with", by(method)),
            None => "the two methods cannot be compared at equal cost or equal accuracy".into(),
        });
    }
    let text = parts.join("; ");
    if start.is_empty() { format!("{}.", capital(&text)) } else { format!("{start}{text}.") }
}

/// The best of the pairs whose cost equals the largest cost. The pairs are in order of cost.
fn best_of_largest<'a>(metric: &Metric, pairs: Vec<Pair<'a>>) -> Option<Pair<'a>> {
    let largest = pairs.last()?.ours.cost.flops;
    pairs
        .into_iter()
        .filter(|pair| is_equal(pair.ours.cost.flops, largest))
        .reduce(|best, pair| if is_better(metric, pair.ours.score.mean, best.ours.score.mean) { pair } else { best })
}

fn by(method: Method) -> &'static str {
    match method {
        Method::Incubation => "by Deep Incubation",
        Method::E2e => "end to end",
        Method::Dgl => "by DGL",
        Method::InfoPro => "by InfoPro",
    }
}

/// A note on how the multiples of cost were computed; none if there are no multiples.
pub fn note_on_multiples(metric: &Metric, settings: &[Setting]) -> Option<String> {
    let with: Vec<&Setting> = settings.iter().filter(|s| !s.at_equal(metric, Measure::Flops).is_empty()).collect();
    let first = with.first()?;
    let source = if first.seeds().into_iter().any(|seed| first.is_compared_on_the_way(seed)) {
        "along the evaluations during the training, in whose middle the learning rate has not fallen yet"
    } else {
        "on straight lines between the finished models of the Pareto front, for each seed"
    };
    let bounded = with.iter().any(|s| s.at_equal(metric, Measure::Flops).iter().any(|at| at.bound != Bound::Exact));
    let bound = if bounded {
        " “At least” and “at most”: the cheapest model of one method is already that good."
    } else {
        ""
    };
    Some(format!("Costs at equal accuracy are taken at the best score that both methods reach, {source}.{bound}"))
}
