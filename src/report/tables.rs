//! The tables of a report.

use super::course::{MEASURES, METHODS, Measure, Method, parts};
use super::downstream::Section;
use super::gather::{Part, Run};
use super::groups::{Mean, Setting, mean_multiple};
use super::table::{Cell, Table, grouped, multiple, plus_minus, scientific, signed};
use super::time::{PARTS, TimeParts};
use crate::config::{Config, MicroBatch};
use crate::plan::cost::{cost, memory};
use crate::run::start::Peak;
use crate::store::artefact;
use crate::store::progress::duration;
use crate::task::{Better, Figure, Metric};
use std::collections::BTreeSet;

/// The models that the runs have begun, with their scores and costs. The table of a single run also has the models that the run is
/// still expected to begin.
pub fn models(runs: &[Run]) -> Table {
    let mut table = Table::new("models", &["model"]);
    let is_single = runs.len() == 1;
    if !is_single {
        table.head.insert(0, "run".into());
    }
    let is_partial = runs.iter().any(|run| run.shown(is_single).any(|part| !part.is_done()));
    if is_partial {
        table.head.push("state".into());
    }
    table.head.extend(runs[0].task().columns().map(Metric::title));
    table.head.extend(["training images", "FLOPs", "time", "device-hours"].map(String::from));
    for run in runs {
        for part in run.shown(is_single) {
            let mut row = if is_single { Vec::new() } else { vec![Cell::text(&run.name)] };
            row.push(Cell::text(&part.label));
            if is_partial {
                row.push(Cell::text(part.state.word()));
            }
            row.extend(scores(run, part));
            row.extend(costs(part));
            table.rows.push(row);
        }
    }
    table
}

fn scores(run: &Run, part: &Part) -> Vec<Cell> {
    let headline = run.task().headline();
    let cell = |(index, metric): (usize, &'static Metric)| {
        let value = part.scores.as_ref().and_then(|scores| scores.0[index].value);
        let Some(value) = value else { return Cell::none() };
        let meter = match metric.better {
            Better::Higher { perfect } if metric == headline => Some((value / perfect).clamp(0.0, 1.0)),
            _ => None,
        };
        Cell { meter, ..Cell::number(metric.number(value), value) }
    };
    run.task().columns().enumerate().map(cell).collect()
}

fn costs(part: &Part) -> Vec<Cell> {
    let total = &part.total;
    if part.phase.is_none() {
        return vec![Cell::none(), Cell::none(), Cell::none(), Cell::none()];
    }
    vec![
        Cell::number(grouped(total.images), total.images),
        Cell::number(scientific(total.flops), total.flops),
        Cell::number(duration(total.seconds), total.seconds),
        Cell::number(format!("{:.4}", total.device_hours), total.device_hours),
    ]
}

/// The newest preview of each run that is not assembled yet.
pub fn previews(runs: &[Run]) -> Table {
    let metric = runs[0].task().headline();
    let head = ["run", "model", "step", &metric.title(), "against the meta model", "test images"];
    let mut table = Table::new("preview", &head);
    for run in runs {
        for (preview, model) in run.preview.iter().flat_map(|preview| preview.models.iter().map(move |m| (preview, m)))
        {
            let apart = Mean { mean: preview.against_meta(model), deviation: None, count: 1 };
            table.rows.push(vec![
                Cell::text(&run.name),
                Cell::text(&model.name),
                Cell::text(model.progress()),
                Cell::number(metric.number(model.value), model.value),
                Cell::number(signed(&apart, metric.decimals), apart.mean),
                Cell::number(grouped(preview.images as u64), preview.images),
            ]);
        }
    }
    without_run(table, runs)
}

/// The scores of the models of a downstream task, one row for each model.
pub fn downstream(runs: &[Run], section: &Section) -> Table {
    let mut table = Table::new(section.models, &["run", "model"]);
    let own = |run: &Run| run.downstream.iter().find(|one| one.kind == section.kind).map(|one| one.task);
    let Some(task) = runs.iter().find_map(own) else { return table };
    table.head.extend(task.columns().map(Metric::title));
    for run in runs {
        for one in run.downstream.iter().filter(|one| one.kind == section.kind) {
            let mut row = vec![Cell::text(&run.name), Cell::text(&one.label)];
            row.extend(one.scores.0.iter().map(|score| {
                score.value.map_or(Cell::none(), |value| Cell::number(score.metric.number(value), value))
            }));
            table.rows.push(row);
        }
    }
    table
}

/// The scores of the models of a downstream task for each class, one row for each model and class.
pub fn classes(runs: &[Run], section: &Section) -> Table {
    let mut table = Table::new(section.classes, &["run", "model", "class"]);
    let own = |run: &Run| {
        run.downstream.iter().find(|one| one.kind == section.kind).and_then(|one| one.classes.first().cloned())
    };
    let Some(first) = runs.iter().find_map(own) else { return table };
    table.head.extend(first.figures.named().map(|(name, figure)| match figure {
        Figure::Percent(_) => format!("{name} %"),
        Figure::Count(_) => name.to_string(),
    }));
    let cell = |(_, figure): (&str, Figure)| match figure {
        Figure::Percent(value) => value.map_or(Cell::none(), |value| Cell::number(format!("{value:.2}"), value)),
        Figure::Count(count) => Cell::number(grouped(count), count),
    };
    for run in runs {
        for one in run.downstream.iter().filter(|one| one.kind == section.kind) {
            table.rows.extend(one.classes.iter().map(|class| {
                let names = [&run.name, &one.label, &class.name].map(Cell::text);
                names.into_iter().chain(class.figures.named().map(cell)).collect()
            }));
        }
    }
    table
}

/// The groups of all settings. A group is the models that differ in the seed alone. Each row has the means over the seeds of one
/// group.
pub fn groups(metric: &Metric, runs: &[Run], settings: &[Setting]) -> Table {
    let head =
        ["network", "method", "runs", &metric.title(), "deviation", "FLOPs", "device-hours", "on the front", "epochs"];
    let mut table = Table::new("groups", &head);
    for setting in settings {
        for method in METHODS {
            let points: Vec<_> = setting.of(method).map(|group| group.point()).collect();
            let front = super::course::front(metric, Measure::Flops, &points);
            for group in setting.of(method) {
                let on_front = if front.contains(&group.point()) { "yes" } else { "no" };
                let deviation = group.score.deviation;
                let first = &runs[group.results[0].0];
                table.rows.push(vec![
                    Cell::text(if setting.name.is_empty() { "–" } else { &setting.name }),
                    Cell::text(group.name()),
                    Cell::number(group.score.count.to_string(), group.score.count),
                    Cell::number(metric.number(group.score.mean), group.score.mean),
                    deviation.map_or(Cell::none(), |value| Cell::number(format!("± {}", metric.number(value)), value)),
                    Cell::number(scientific(group.cost.flops), group.cost.flops),
                    Cell::number(format!("{:.4}", group.cost.device_hours), group.cost.device_hours),
                    Cell::text(on_front),
                    Cell::text(epochs(first, method)),
                ]);
            }
        }
    }
    if settings.len() == 1 {
        table.head.remove(0);
        table.rows.iter_mut().for_each(|row| drop(row.remove(0)));
    }
    table
}

/// The epochs of a method's phases, such as `meta 3, module 1, finetune 2`.
fn epochs(run: &Run, method: Method) -> String {
    let mut all: Vec<String> = Vec::new();
    for part in parts(method, run) {
        let Some(phase) = &part.phase else { continue };
        let text = format!("{} {}", phase.row, phase.training.epochs + phase.training.epochs_before);
        if !all.contains(&text) {
            all.push(text);
        }
    }
    all.join(", ")
}

/// The comparison of Deep Incubation with end-to-end training in each setting: the scores at equal cost, and the costs at equal
/// accuracy.
pub fn verdicts(metric: &Metric, settings: &[Setting]) -> Table {
    let head = ["network", "compared at", "Deep Incubation", "end to end", "end to end against it"];
    let mut table = Table::new("comparison", &head);
    for setting in settings {
        let name = if setting.name.is_empty() { "–" } else { &setting.name };
        for pair in setting.pairs() {
            let score = |mean: &Mean| Cell::number(plus_minus(mean, metric.decimals), mean.mean);
            let apart = 100.0 * (pair.theirs.cost.flops / pair.ours.cost.flops - 1.0);
            let flops = scientific(pair.ours.cost.flops);
            let behind = Mean { mean: -pair.difference.mean, ..pair.difference };
            let variant = if pair.ours.variant.is_empty() { String::new() } else { format!("; {}", pair.ours.variant) };
            table.rows.push(vec![
                Cell::text(name),
                Cell::text(format!("equal cost: {flops} FLOPs, end to end {apart:+.1} %").replace('-', "−") + &variant),
                score(&pair.ours.score),
                score(&pair.theirs.score),
                Cell::number(signed(&behind, metric.decimals), behind.mean),
            ]);
        }
        for measure in MEASURES {
            table.rows.extend(costs_at_equal(metric, setting, measure, name));
        }
    }
    if settings.len() == 1 {
        table.head.remove(0);
        table.rows.iter_mut().for_each(|row| drop(row.remove(0)));
    }
    table
}

/// The row of the costs of both methods at equal accuracy, averaged over the seeds; none if the methods cannot be compared.
fn costs_at_equal(metric: &Metric, setting: &Setting, measure: Measure, name: &str) -> Option<Vec<Cell>> {
    let all = setting.at_equal(metric, measure);
    let (times, bound) = mean_multiple(&all)?;
    let score = Mean::of(&all.iter().map(|at| at.score).collect::<Vec<_>>())?;
    let [ours, theirs] = [0, 1].map(|method| Mean::of(&all.iter().map(|at| at.costs[method]).collect::<Vec<_>>()));
    let (ours, theirs) = (ours?, theirs?);
    let (unit, size) = measure.unit(ours.mean.max(theirs.mean));
    let unit = unit.split(" (").next().unwrap_or(unit);
    let cost = |mean: Mean| Cell::number(format!("{:.3} {unit}", mean.mean / size), mean.mean);
    let score = plus_minus(&score, metric.decimals);
    Some(vec![
        Cell::text(name),
        Cell::text(format!("equal accuracy, {} {score}: {}", metric.title(), measure.name())),
        cost(ours),
        cost(theirs),
        Cell::number(format!("{} times", multiple(&times, bound)), times.mean),
    ])
}

/// The time of each phase of each run, in seconds.
pub fn times(runs: &[Run]) -> Table {
    let mut table = Table::new("time", &["run", "phase", "seconds"]);
    table.head.extend(PARTS.map(String::from));
    table.head.extend(["starts".to_string(), "last checkpoint, s".into()]);
    for run in runs {
        for part in run.parts.iter().filter(|part| part.total.starts > 0) {
            let total = part.total.seconds;
            let mut row =
                vec![Cell::text(&run.name), Cell::text(&part.label), Cell::number(format!("{total:.1}"), total)];
            match TimeParts::of(part) {
                Some(spent) => row.extend(spent.parts().map(|value| Cell::number(format!("{value:.1}"), value))),
                None => row.extend(PARTS.map(|_| Cell::none())),
            }
            row.push(Cell::number(part.total.starts.to_string(), part.total.starts));
            let saved = part.progress.as_ref().and_then(|progress| progress.save_s);
            row.push(saved.map_or(Cell::none(), |seconds| Cell::number(format!("{seconds:.2}"), seconds)));
            table.rows.push(row);
        }
    }
    if table.rows.iter().all(|row| row.last().is_some_and(|cell| cell.exact.is_empty())) {
        table.head.pop();
        table.rows.iter_mut().for_each(|row| drop(row.pop()));
    }
    without_run(table, runs)
}

/// The estimated memory of each phase, and the measured peaks of memory on the host and the GPU.
pub fn memories(runs: &[Run]) -> Table {
    let mut table = Table::new(
        "memory",
        &["run", "phase", "parameters", "of them trained", "micro-batch", "estimate, MiB per device"],
    );
    table.head.extend(["host's peak, MiB", "GPU's peak, MiB"].map(String::from));
    for run in runs {
        for part in run.shown(runs.len() == 1) {
            let Some(phase) = &part.phase else { continue };
            let mut plan = run.plan.clone();
            if let Some(micro_batch) = part.progress.as_ref().and_then(|progress| progress.micro_batch) {
                plan.config.run.micro_batch = MicroBatch::Samples(micro_batch);
            }
            let (cost, micro_batch) = (cost(&plan, phase), plan.config.run.micro_batch.samples());
            let mebibytes = |bytes: u64| match bytes as f64 / f64::from(1 << 20) {
                0.0 => Cell::none(),
                size => Cell::number(format!("{size:.0}"), size),
            };
            let peak = |of: fn(&Peak) -> u64| part.starts.iter().map(|start| of(&start.peak)).max().unwrap_or(0);
            table.rows.push(vec![
                Cell::text(&run.name),
                Cell::text(&part.label),
                Cell::number(grouped(cost.parameters), cost.parameters),
                Cell::number(grouped(cost.trained_parameters), cost.trained_parameters),
                Cell::number(micro_batch.to_string(), micro_batch),
                mebibytes(memory(&plan, phase, plan.is_for_cpu(false))),
                mebibytes(peak(|peak| peak.host)),
                mebibytes(peak(|peak| peak.gpu)),
            ]);
        }
    }
    without_run(table, runs)
}

/// The keys of the first run's config whose values differ between the runs, each with its values. The keys `run.name` and `run.dir`
/// are left out.
pub fn differences(runs: &[Run]) -> Table {
    let values: Vec<Vec<(String, String)>> = runs.iter().map(|run| run.plan.config.values()).collect();
    let is_few = runs.len() <= 5;
    let mut table = Table::new("configs", &["key"]);
    if is_few {
        table.head.extend(runs.iter().map(|run| run.name.clone()));
    } else {
        table.head.push("values".into());
    }
    for (key, first) in &values[0] {
        let of_key = |all: &Vec<(String, String)>| {
            all.iter().find(|(own, _)| own == key).map_or("–".into(), |(_, value)| value.clone())
        };
        let all: Vec<String> = values.iter().map(of_key).collect();
        if all.iter().all(|value| value == first) || ["run.name", "run.dir"].contains(&key.as_str()) {
            continue;
        }
        let mut row = vec![Cell::text(key)];
        if is_few {
            row.extend(all.into_iter().map(Cell::text));
        } else {
            let distinct: BTreeSet<String> = all.into_iter().collect();
            row.push(Cell::text(distinct.into_iter().collect::<Vec<_>>().join(" · ")));
        }
        table.rows.push(row);
    }
    table
}

/// The config keys of a run whose values differ from the defaults, except those of `[slurm]`.
pub fn settings_of(run: &Run) -> Table {
    let mut table = Table::new("config", &["key", "value", "default"]);
    let defaults = Config::parse("", &[]).expect("the defaults are a config").values();
    for (key, value) in run.plan.config.values() {
        let default = defaults.iter().find(|(own, _)| *own == key).map(|(_, value)| value.as_str());
        if default != Some(value.as_str()) && !key.starts_with("slurm.") {
            table.rows.push(vec![Cell::text(key), Cell::text(value), Cell::text(default.unwrap_or("–"))]);
        }
    }
    table
}

/// The software and hardware of the runs. Starts that agree in everything but the phase share a row.
pub fn machines(runs: &[Run]) -> Table {
    let mut table =
        Table::new("machines", &["run", "written by", "host", "ranks", "replicas", "precision", "Slurm job", "phases"]);
    for run in runs {
        let mut rows: Vec<(Vec<Cell>, Vec<String>)> = Vec::new();
        for part in &run.parts {
            let software = Some(()).filter(|()| part.scores.is_some());
            let software = software.and_then(|()| artefact::software(&run.dir.file(&part.node.file)).ok());
            for start in &part.starts {
                let row = vec![
                    Cell::text(&run.name),
                    software.as_deref().map_or(Cell::none(), Cell::text),
                    Cell::text(&start.host),
                    Cell::number(start.ranks.to_string(), start.ranks),
                    Cell::number(start.replicas.to_string(), start.replicas),
                    Cell::text(format!("{:?}", start.precision).to_lowercase()),
                    start.job.as_deref().map_or(Cell::none(), Cell::text),
                ];
                match rows.iter_mut().find(|(known, _)| *known == row) {
                    Some((_, phases)) if phases.contains(&part.label) => {}
                    Some((_, phases)) => phases.push(part.label.clone()),
                    None => rows.push((row, vec![part.label.clone()])),
                }
            }
        }
        let whole = rows.into_iter().map(|(mut row, phases)| {
            row.push(Cell::text(phases.join(", ")));
            row
        });
        table.rows.extend(whole);
    }
    without_run(table, runs)
}

/// The table without its first column if there is only one run.
fn without_run(mut table: Table, runs: &[Run]) -> Table {
    if runs.len() == 1 {
        table.head.remove(0);
        table.rows.iter_mut().for_each(|row| drop(row.remove(0)));
    }
    table
}
