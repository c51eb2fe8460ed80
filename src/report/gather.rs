//! Reads everything that a report shows of a run from its run directory. The run may still be going. Sentences in [`Run::missing`]
//! describe data that are missing.

use super::downstream::Downstream;
use crate::config::TaskKind;
use crate::data::source::bad_images::BadImages;
use crate::plan::{PhasePlan, Plan};
use crate::run::data::DataRecord;
use crate::run::graph::{Graph, Node};
use crate::run::start::Start;
use crate::run::state::{Evidence, Found, State, states};
use crate::run::table::{ASSEMBLE, Depths, Method};
use crate::store::ledger::Total;
use crate::store::previews::Preview;
use crate::store::progress::Progress;
use crate::store::{ArtefactCache, RunDir, metrics};
use crate::task::{Scores, Task};
use crate::usage;
use anyhow::Result;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// One line of `metrics.jsonl`.
pub type Logged = Map<String, Value>;

/// A run as its run directory shows it.
pub struct Run {
    /// The name of the run, which is unique in the report.
    pub name: String,
    pub dir: RunDir,
    pub plan: Plan,
    pub parts: Vec<Part>,
    /// The finished models of downstream tasks. Their metrics differ from the metrics of `parts`.
    pub downstream: Vec<Downstream>,
    pub data: Option<DataRecord>,
    /// The newest preview of the assembly, until the assembly itself is done.
    pub preview: Option<Preview>,
    /// The number of images that could not be read and were skipped.
    pub unreadable: usize,
    /// The gaps of the report, each as a sentence without its full stop.
    pub missing: Vec<String>,
}

/// A node of a run that writes a model.
pub struct Part {
    pub node: Node,
    /// The name of the model in tables.
    pub label: String,
    /// The plan of the phase that trains the model; none if the model is assembled without training.
    pub phase: Option<PhasePlan>,
    pub state: State,
    /// Whether the model was imported, so that its cost is unknown.
    pub is_imported: bool,
    /// The scores in the model's artefact; none if there is no readable artefact.
    pub scores: Option<Scores>,
    pub total: Total,
    pub starts: Vec<Start>,
    /// The last heartbeat.
    pub progress: Option<Progress>,
    /// The lines of the phase's `metrics.jsonl`.
    pub lines: Vec<Logged>,
}

impl Part {
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    pub fn has_begun(&self) -> bool {
        self.state != State::Waiting
    }

    /// The score in the headline metric, if the model is finished and usable.
    pub fn score(&self) -> Option<f64> {
        self.scores.as_ref().filter(|_| self.is_done())?.0.first()?.value
    }

    /// The method to which the model belongs.
    pub fn method(&self) -> Method {
        self.node.row.model.map_or(Method::Incubation, |model| model.method)
    }

    /// Whether the model is the whole target network.
    pub fn is_target(&self) -> bool {
        self.node.row.model.is_some_and(|model| model.depths == Depths::Deep)
    }
}

impl Run {
    pub fn task(&self) -> Task {
        Task::of(&self.plan.config)
    }

    /// Whether the run has begun the part or is expected to begin it. A part that has not begun is expected if the config asks for
    /// it and one of three conditions holds: it belongs to a baseline, another part of its method has begun, or no part has begun.
    /// A run may train a baseline alone, for example as part of a study. Such a run never begins the parts of Deep Incubation.
    pub fn expects(&self, part: &Part) -> bool {
        let mut begun = self.parts.iter().filter(|other| other.has_begun()).peekable();
        let is_first = begun.peek().is_none();
        let asks = part.node.is_wanted && part.method() != Method::Incubation;
        part.has_begun()
            || part.node.is_wanted && (asks || is_first || begun.any(|other| other.method() == part.method()))
    }

    /// The parts that tables show: all parts that have begun and, if the report has only this run (`is_single`), also the parts
    /// that are still expected.
    pub fn shown(&self, is_single: bool) -> impl Iterator<Item = &Part> {
        self.parts.iter().filter(move |part| part.has_begun() || is_single && self.expects(part))
    }

    /// Whether all expected parts are done.
    pub fn is_over(&self) -> bool {
        self.parts.iter().filter(|part| self.expects(part)).all(Part::is_done)
    }
}

/// The run directories that a path stands for. A run directory stands for itself. A folder of run directories, such as the folder
/// of a study, stands for all of these run directories.
///
/// # Errors
/// A usage error if there is no run directory.
pub fn run_dirs(path: &Path) -> Result<Vec<PathBuf>> {
    let is_run = |path: &Path| path.join("config.toml").exists();
    let entries = std::fs::read_dir(path).map_err(|e| usage!("{}: {e}; give a run directory", path.display()))?;
    if is_run(path) {
        return Ok(vec![path.into()]);
    }
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| is_run(path)).collect();
    found.sort();
    if found.is_empty() {
        return Err(usage!(
            "{}: neither a run directory nor a folder of run directories; give the folder that a run wrote",
            path.display()
        ));
    }
    Ok(found)
}

/// Reads all runs. If two runs have the same name, all runs get the names of their folders instead. If these names repeat too, all
/// runs get their paths. `artefacts` caches the headers of artefacts.
///
/// # Errors
/// A path has no readable config of a run.
pub fn runs(paths: &[PathBuf], artefacts: &mut ArtefactCache) -> Result<Vec<Run>> {
    let mut runs = paths.iter().map(|path| run(path, artefacts)).collect::<Result<Vec<Run>>>()?;
    let distinct = |names: Vec<String>| names.iter().collect::<BTreeSet<_>>().len() == names.len();
    let of_folder = |run: &Run| run.dir.path.file_name().map(|name| name.to_string_lossy().into_owned());
    let by_path = |run: &Run| run.dir.path.display().to_string();
    if !distinct(runs.iter().map(|run| run.name.clone()).collect()) {
        let folders: Option<Vec<String>> = runs.iter().map(of_folder).collect();
        let names = folders.filter(|names| distinct(names.clone()));
        let names = names.unwrap_or_else(|| runs.iter().map(by_path).collect());
        runs.iter_mut().zip(names).for_each(|(run, name)| run.name = name);
    }
    Ok(runs)
}

fn run(path: &Path, artefacts: &mut ArtefactCache) -> Result<Run> {
    let config = RunDir::config_of(path)?;
    let dir = RunDir { path: path.into() };
    let mut missing = Vec::new();
    let data = dir.data(TaskKind::Classification).unwrap_or_else(|error| {
        missing.push(format!("{error:#}"));
        None
    });
    let train_images = data.as_ref().map_or(0, |data| data.present.train.images);
    if data.is_none() {
        missing.push("the number of images is not recorded: dataset.json is missing".into());
    }
    let plan = Plan { config, train_images };
    let graph = plan.graph();
    let parts = parts(&plan, &graph, &dir, artefacts, &mut missing);
    let downstream = downstream(&plan, &graph, &dir, artefacts);
    let unreadable = BadImages::of_run(0, path).count();
    let is_assembled = parts.iter().any(|part| part.node.row.name == ASSEMBLE.name && part.is_done());
    let preview = dir.newest_preview().filter(|_| !is_assembled);
    Ok(Run { name: plan.config.run.name.clone(), dir, plan, parts, downstream, data, preview, unreadable, missing })
}

/// The nodes that write a model of the run's own task, if the run needs the node or has begun it. Models of other tasks are left
/// out, because a page compares models by one metric.
fn parts(
    plan: &Plan,
    graph: &Graph,
    dir: &RunDir,
    artefacts: &mut ArtefactCache,
    missing: &mut Vec<String>,
) -> Vec<Part> {
    let mut evidence = Vec::new();
    for node in graph.nodes() {
        let found = match node.expected {
            Some(_) => artefacts.find(dir, node).unwrap_or_else(|error| Found::Unreadable(format!("{error:#}"))),
            None => Found::Nothing,
        };
        let heartbeat = Progress::read(&dir.path, &node.name).map(|progress| progress.heartbeat(dir));
        evidence.push(Evidence { found, heartbeat, queued: None });
    }
    let is_imported = graph.nodes().iter().zip(&evidence).any(|(node, evidence)| evidence.found.is_imported(node));
    let states = states(graph, &evidence);
    let mut parts = Vec::new();
    for ((node, evidence), state) in graph.nodes().iter().zip(&evidence).zip(states) {
        let is_there = evidence.found != Found::Nothing || evidence.heartbeat.is_some();
        let label = node.label().filter(|_| node.row.task() == plan.config.task);
        if let (Some(label), true) = (label, is_there || node.is_needed(is_imported)) {
            let is_imported = evidence.found.is_imported(node);
            let part = part(plan, dir, (node, label), (state, is_imported), artefacts);
            missing.extend(lacks(&part, plan.config.run.log_steps));
            parts.push(part.0);
        }
    }
    parts
}

/// The models of downstream tasks whose artefacts could be read. The caller must call [`parts`] first, which reads all artefacts
/// into `artefacts`.
fn downstream(plan: &Plan, graph: &Graph, dir: &RunDir, artefacts: &ArtefactCache) -> Vec<Downstream> {
    let of_node = |node: &Node| {
        let (label, header) = (node.label()?, artefacts.header(dir, node)?);
        let task = Task::of(&plan.config.of_task(node.row.task()));
        Some(Downstream::read(dir, node, (label, task, task.scores(&header.metrics))))
    };
    let is_downstream = |node: &&Node| TaskKind::DOWNSTREAM.contains(&node.row.task());
    graph.nodes().iter().filter(is_downstream).filter_map(of_node).collect()
}

/// A part, and the number of incomplete lines in its `metrics.jsonl`. If the file cannot be read, an error takes the place of the
/// number.
type Read = (Part, Result<usize>);

fn part(
    plan: &Plan,
    dir: &RunDir,
    (node, label): (&Node, String),
    (state, is_imported): (State, bool),
    artefacts: &ArtefactCache,
) -> Read {
    let phase = plan.phase_of(node);
    let (lines, torn) = match metrics::read_and_count(&dir.logs(&node.name)) {
        Ok((lines, torn)) => (lines, Ok(torn)),
        Err(error) => (Vec::new(), Err(error)),
    };
    let part = Part {
        label,
        state,
        is_imported,
        scores: artefacts.header(dir, node).map(|header| Task::of(&plan.config).scores(&header.metrics)),
        total: phase.as_ref().map_or(Total::default(), |phase| dir.total(plan, phase)),
        starts: phase.as_ref().map_or(Vec::new(), |phase| dir.starts(plan, phase)),
        progress: Progress::read(&dir.path, &node.name),
        lines,
        phase,
        node: node.clone(),
    };
    (part, torn)
}

/// The gaps in the files of a part, each as a sentence without its full stop.
fn lacks((part, torn): &Read, log_steps: u64) -> Vec<String> {
    let name = &part.node.name;
    let mut lacks = Vec::new();
    if let State::Damaged(_) | State::Stale(_) = part.state {
        let why = part.state.why(&part.node).unwrap_or_default();
        lacks.push(format!("{} is {}, and no figure counts it: {why}", part.node.file, part.state.word()));
    }
    match torn {
        Ok(0) => {}
        Ok(torn) => lacks.push(format!("{torn} torn line(s) of the curves of {name} are left out")),
        Err(error) => lacks.push(format!("the curves of {name} cannot be read: {error:#}")),
    }
    if part.phase.is_none() || part.is_imported {
        return lacks;
    }
    let first = part.lines.iter().find_map(|line| line.get("step")?.as_u64());
    match first {
        None if part.is_done() && torn.as_ref().is_ok_and(|torn| *torn == 0) => {
            lacks.push(format!("the curves of {name} are missing: there is no metrics.jsonl"));
        }
        Some(first) if first > 2 * log_steps => lacks.push(format!("the curves of {name} begin at step {first}")),
        _ => {}
    }
    if part.is_done() && part.starts.is_empty() {
        lacks.push(format!("the cost of {name} is missing: it has neither a ledger nor a heartbeat"));
    }
    lacks
}
