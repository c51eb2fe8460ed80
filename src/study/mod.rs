//! Studies. A study is a grid of configs. Each config is a cell, which one method trains in a run directory of its own.
//!
//! A study file is TOML:
//! ```text
//! name = "depth"                         # the name of the study
//! base = "../fashion-mnist.toml"         # the path of the base config of the cells, relative to the study file
//! dir = "runs/studies/depth"             # the folder of the run directories, relative to the working directory like run.dir
//! [set]                                  # config keys of every cell, which override the base config
//! [axes.AXIS.VALUE]                      # config keys of the cells with this value of this axis
//! ```
//! The cells are all combinations of one value of each axis. A cell is named after its values. A value may also have these keys:
//! - `base` is the base config of the cells with this value.
//! - `method` is the training method: "incubation" (the default), "e2e", "dgl" or "infopro".
//! - `equal_cost_to` names another value of the same axis, whose cells train by Deep Incubation. The cells with this value must
//!   train by a baseline: one of the other methods. Each of them has a twin: the cell with the named value and the same values of
//!   the other axes. The cell trains for the whole number of epochs whose cost is nearest to the cost of the twin.

mod file;
pub mod shares;
pub mod table;

use crate::config::{Config, TaskKind};
use crate::data;
use crate::plan::cost::cost;
use crate::plan::{PhasePlan, Plan};
use crate::run::state::{Evidence, Found, State, states};
pub use crate::run::table::Method;
use crate::run::table::{METHODS, REPORT, TABLE};
use crate::store::{ArtefactCache, RunDir};
use crate::{require, usage};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A study, ready to be trained.
#[derive(Debug)]
pub struct Study {
    pub name: String,
    /// The folder of the run directories.
    pub dir: PathBuf,
    pub cells: Vec<Cell>,
}

/// One training of the study.
#[derive(Debug)]
pub struct Cell {
    /// The names of the cell's values, joined by `-`. The run directory has the same name.
    pub name: String,
    pub method: Method,
    /// The config and the number of training images.
    pub plan: Plan,
    /// The plans of the cell's downstream tasks, such as segmentation and detection.
    pub downstream: Vec<Plan>,
    /// The number of floating-point operations in all phases that the cell trains, including the phases of its downstream tasks.
    pub flops: f64,
    /// The name of the cell whose cost this cell should equal, and the relative difference: the cost of this cell divided by the
    /// cost of that cell, minus 1. These costs leave out the downstream tasks.
    pub equal_to: Option<(String, f64)>,
}

impl Study {
    /// Reads a study file and derives the config of every cell.
    ///
    /// # Errors
    /// A usage error that names the file, and the axis, value or key.
    pub fn load(path: &Path) -> Result<Study> {
        let within = || format!("in study {}", path.display());
        let file = file::read(path).with_context(within)?;
        let mut images = BTreeMap::new();
        let mut cells = Vec::new();
        for combination in file.combinations().with_context(within)? {
            cells.push(cell(&file, &combination, &mut images).with_context(within)?);
        }
        Ok(Study { name: file.name, dir: file.dir, cells })
    }

    /// Whether a cell is finished: the last model of its method has the state [`State::Done`], and the report of the run exists.
    ///
    /// # Errors
    /// A file of the run directory cannot be read or is damaged.
    pub fn is_done(&self, cell: &Cell) -> Result<bool> {
        let run = RunDir { path: cell.plan.config.run.dir.clone() };
        if !run.file(REPORT.writes).exists() {
            return Ok(false);
        }
        let graph = cell.plan.graph();
        let mut artefacts = ArtefactCache::default();
        let mut evidence = Vec::new();
        for node in graph.nodes() {
            let found = if node.expected.is_some() { artefacts.find(&run, node)? } else { Found::Nothing };
            evidence.push(Evidence::of_file(found));
        }
        let states = states(&graph, &evidence);
        let last = cell.method.last_row().name;
        Ok(graph.nodes().iter().zip(states).any(|(node, state)| node.row.name == last && state == State::Done))
    }
}

impl Cell {
    /// The names of the phases that the cell trains, with their epochs.
    pub fn epochs(&self) -> Vec<(&'static str, usize)> {
        let phases = self.plan.config.phases();
        let own = phases.into_iter().filter(|(name, _)| method_of(name) == self.method);
        let own = own.map(|(name, training)| (name, training.epochs));
        let downstream = self.downstream.iter().flat_map(|plan| of_method(plan, self.method));
        own.chain(downstream.map(|phase| (phase.row, phase.training.epochs))).collect()
    }
}

/// The cell of a combination of values. `images` caches the number of training images for each set of data keys.
fn cell(file: &file::File, combination: &file::Combination, images: &mut BTreeMap<String, usize>) -> Result<Cell> {
    let method = combination.method;
    let (name, dir) = (&combination.name, file.dir.join(&combination.name));
    let mut own = vec![
        format!("run.name={}", toml::Value::from(name.as_str())),
        format!("run.dir={}", toml::Value::from(dir.display().to_string())),
    ];
    own.extend(baselines(Some(method)));
    let mut of_task = |config: &Config, task: TaskKind| -> Result<Plan> {
        let config = config.of_task(task);
        let key = config.recipe(&["data", "segmentation", "detection"]) + &config.images_path().display().to_string();
        let key = format!("{task:?} {key}");
        let known = match images.get(&key) {
            Some(&known) => known,
            None => data::train_images(&config)?,
        };
        images.insert(key, known);
        Plan::new(config, known)
    };
    let mut plan_of = |base: &str, sets: &[String]| -> Result<Plan> {
        let config = Config::parse(base, sets).with_context(|| format!("cell {name}"))?;
        of_task(&config, TaskKind::Classification)
    };
    let mut sets = [combination.sets.clone(), own].concat();
    let mut plan = plan_of(&combination.base, &sets)?;
    let mut equal_to = None;
    if let Some(twin) = &combination.equal_to {
        require!(
            method != Method::Incubation && twin.method == Method::Incubation,
            "cell {name}: equal_cost_to stands with the method of a baseline, such as \"e2e\", and names a value with method = \
             \"incubation\""
        );
        let wanted = flops(&plan_of(&twin.base, &[twin.sets.clone(), baselines(None)].concat())?, twin.method);
        let phases = plan.config.phases();
        let (table, training) =
            phases.into_iter().find(|(name, _)| *name == method.key()).expect("the cell has the baseline");
        let epochs = (wanted / (flops(&plan, method) / training.epochs as f64)).round().max(1.0);
        sets.push(format!("{table}.epochs={epochs}"));
        plan = plan_of(&combination.base, &sets)
            .with_context(|| format!("{epochs} epochs of {table} cost as much as {}", twin.name))?;
        equal_to = Some((twin.name.clone(), flops(&plan, method) / wanted - 1.0));
    }
    let tasks = plan.config.downstream();
    let downstream = tasks.map(|task| of_task(&plan.config, task)).collect::<Result<Vec<Plan>>>()?;
    let flops = std::iter::once(&plan).chain(&downstream).map(|plan| flops(plan, method)).sum();
    Ok(Cell { name: name.clone(), method, flops, plan, downstream, equal_to })
}

/// The config keys with which a run trains the baseline `only` and no other baseline. If `only` is none or Deep Incubation, the run
/// trains no baseline.
fn baselines(only: Option<Method>) -> Vec<String> {
    let all = METHODS.into_iter().filter(|method| *method != Method::Incubation);
    all.map(|method| format!("run.{}={}", method.key(), only == Some(method))).collect()
}

/// The method to which a phase belongs.
fn method_of(phase: &str) -> Method {
    let row = TABLE.iter().find(|row| row.name == phase);
    row.and_then(|row| row.model).map_or(Method::Incubation, |model| model.method)
}

/// The plan's phases that a method trains.
fn of_method(plan: &Plan, method: Method) -> Vec<PhasePlan> {
    plan.wanted_phases().into_iter().filter(|phase| method_of(phase.row) == method).collect()
}

/// The number of floating-point operations of the plan's phases that a method trains.
fn flops(plan: &Plan, method: Method) -> f64 {
    of_method(plan, method).iter().map(|phase| cost(plan, phase).flops).sum()
}

/// The cells with these names; all cells if there are no names.
///
/// # Errors
/// A usage error for an unknown name.
pub fn only<'a>(study: &'a Study, names: &[String]) -> Result<Vec<&'a Cell>> {
    let find = |name: &String| {
        let found = study.cells.iter().find(|cell| cell.name == *name);
        found.ok_or_else(|| usage!("--only {name}: no such cell; `incubate study STUDY --dry-run` lists them"))
    };
    if names.is_empty() { Ok(study.cells.iter().collect()) } else { names.iter().map(find).collect() }
}
