//! The rule that decides the state of a node of a run. Every part of the program that asks whether a node is done uses this rule.

use super::graph::{Graph, Node};
use crate::error::Failure;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// A process counts as gone after this many seconds without a sign of life: a heartbeat, or a renewal of its lease.
const SILENCE: f64 = 60.0;

/// The state of a node.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    Done,
    /// The node's file cannot be read or is damaged, for this reason.
    Damaged(String),
    /// The node's file is undamaged, but is not the artefact that this node would write.
    Stale(Misfit),
    Running,
    /// The node has begun, but its process has given no sign of life for a minute.
    Stalled,
    /// A signal stopped the node's process, which can resume.
    Stopped,
    /// The node's Slurm job is queued, for this reason.
    Queued(String),
    /// The node has not begun.
    Waiting,
    /// The node failed. The text is the error that its process or Slurm has reported, if any.
    Failed(Option<String>),
    /// The node's Slurm job was cancelled, for this reason.
    Cancelled(String),
}

/// The difference between an artefact and the attributes that its node expects.
#[derive(Debug, Clone, PartialEq)]
pub enum Misfit {
    /// The artefact holds another module than expected, a whole model instead of a module, or a module instead of a whole model.
    Module {
        held: Option<usize>,
        expected: Option<usize>,
    },
    Depths {
        held: Vec<usize>,
        expected: Vec<usize>,
    },
    Recipe,
    /// The artefact was trained on data that neither the run's data nor its accepted earlier data match.
    Data,
    /// The artefact derives from another model than the run directory now holds as the artefact of the named row.
    Original(&'static str),
}

/// The facts that decide the state of a node.
#[derive(Debug, Default)]
pub struct Evidence {
    pub found: Found,
    pub heartbeat: Option<Heartbeat>,
    pub queued: Option<Queued>,
}

impl Evidence {
    /// Evidence that consists of a node's file alone.
    pub fn of_file(found: Found) -> Evidence {
        Evidence { found, ..Evidence::default() }
    }
}

/// The result that was found for a node.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Found {
    #[default]
    Nothing,
    /// A file that cannot be read or is damaged, for this reason.
    Unreadable(String),
    /// A result that is not an artefact and whose existence is enough: a file, a complete pack, a job that has succeeded.
    Exists,
    Artefact(Stamp),
}

/// The attributes by which a node recognises its artefact.
#[derive(Debug, Clone, PartialEq)]
pub struct Stamp {
    pub index: Option<usize>,
    pub depths: Vec<usize>,
    pub recipe: String,
    /// Whether the artefact was trained on data that neither the run's data nor its accepted earlier data match.
    pub is_of_other_data: bool,
    /// The hash of the artefact from which this artefact derives; none if it derives from no artefact.
    pub original: Option<String>,
    /// The artefact's own hash.
    pub hash: String,
}

/// The last heartbeat of the process that works or worked on a node.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    pub says: Activity,
    pub error: Option<String>,
    /// Seconds since the last sign of life of the process: the heartbeat, or a later renewal of its lease.
    pub age: f64,
}

/// A process's report about the node that it works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    Running,
    Stopped,
    Failed,
    Done,
}

/// Slurm's report about the job, or the task of a job array, of a node.
#[derive(Debug, Clone)]
pub struct Queued {
    /// `17`, or `17_2` for a task of an array.
    pub id: String,
    pub state: JobState,
    /// The reason why the job waits or how it ended, such as `Priority` or `NonZeroExitCode`.
    pub reason: String,
}

/// The state of a Slurm job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobState {
    /// The job waits for its first start or for a restart.
    Pending,
    /// The job runs, or is in any other state in which it has not ended.
    Active,
    Completed,
    Cancelled,
    /// The job ended in any other way, for which this is Slurm's word, such as `TIMEOUT`.
    Failed(String),
}

impl Found {
    /// The hash of the artefact, if an artefact was found.
    pub fn hash(&self) -> Option<&str> {
        match self {
            Found::Artefact(stamp) => Some(&stamp.hash),
            Found::Nothing | Found::Unreadable(_) | Found::Exists => None,
        }
    }

    /// Whether an imported target model was found, so that a run skips the nodes that would make it.
    pub fn is_imported(&self, node: &Node) -> bool {
        matches!(self, Found::Artefact(stamp) if stamp.is_imported(node))
    }
}

impl Stamp {
    fn is_imported(&self, node: &Node) -> bool {
        self.original.is_none() && node.row.model.is_some_and(|model| model.may_be_imported)
    }
}

impl Queued {
    /// Whether the job is open: queued or running.
    pub fn is_open(&self) -> bool {
        matches!(self.state, JobState::Pending | JobState::Active)
    }
}

/// The states of all nodes of a graph. `evidence` is in the order of the nodes.
pub fn states(graph: &Graph, evidence: &[Evidence]) -> Vec<State> {
    let state = |(node, own): (&Node, &Evidence)| {
        let original = graph.original(node).and_then(|position| evidence[position].found.hash());
        state(node, own, original)
    };
    graph.nodes().iter().zip(evidence).map(state).collect()
}

/// The state of a node. `original` is the hash of the artefact from which the node's artefact must derive. If it is none, for
/// example because the run directory lacks that artefact, the derivation is not checked.
pub fn state(node: &Node, evidence: &Evidence, original: Option<&str>) -> State {
    match &evidence.found {
        Found::Nothing => unfinished(evidence),
        Found::Unreadable(why) => State::Damaged(why.clone()),
        Found::Exists => State::Done,
        Found::Artefact(stamp) => misfit(node, stamp, original).map_or(State::Done, State::Stale),
    }
}

/// The first difference between an artefact and the attributes that its node expects; none if it fits.
fn misfit(node: &Node, stamp: &Stamp, original: Option<&str>) -> Option<Misfit> {
    let expected = node.expected.as_ref()?;
    let model = node.row.model?;
    if stamp.index != node.index {
        return Some(Misfit::Module { held: stamp.index, expected: node.index });
    }
    if stamp.depths != expected.depths {
        return Some(Misfit::Depths { held: stamp.depths.clone(), expected: expected.depths.clone() });
    }
    if stamp.recipe != expected.recipe {
        return Some(Misfit::Recipe);
    }
    if stamp.is_of_other_data {
        return Some(Misfit::Data);
    }
    let is_of_another = original.is_some() && stamp.original.as_deref() != original && !stamp.is_imported(node);
    model.derives_from.filter(|_| is_of_another).map(Misfit::Original)
}

/// The state of a node without a file.
fn unfinished(evidence: &Evidence) -> State {
    let heartbeat = evidence.heartbeat.as_ref();
    // A pending job is queued, whatever its earlier starts reported. If a process was killed before it could report its end,
    // Slurm's report about the job counts.
    let has_reported_end = heartbeat.is_some_and(|heartbeat| heartbeat.says != Activity::Running);
    if let Some(queued) = &evidence.queued {
        let reason = queued.reason.clone();
        match &queued.state {
            JobState::Pending => return State::Queued(reason),
            JobState::Cancelled if !has_reported_end => return State::Cancelled(reason),
            JobState::Failed(word) if !has_reported_end => return State::Failed(Some(format!("{word} ({reason})"))),
            JobState::Active | JobState::Completed | JobState::Cancelled | JobState::Failed(_) => {}
        }
    }
    match heartbeat {
        None => State::Waiting,
        Some(Heartbeat { says: Activity::Stopped, .. }) => State::Stopped,
        Some(Heartbeat { says: Activity::Failed, error, .. }) => State::Failed(error.clone()),
        Some(Heartbeat { age, .. }) if *age <= SILENCE => State::Running,
        Some(_) => State::Stalled,
    }
}

impl State {
    /// The word for the state in `incubate status`.
    pub fn word(&self) -> &'static str {
        match self {
            State::Done => "done",
            State::Damaged(_) => "damaged",
            State::Stale(_) => "stale",
            State::Running => "running",
            State::Stalled => "stalled",
            State::Stopped => "stopped",
            State::Queued(_) => "queued",
            State::Waiting => "waiting",
            State::Failed(_) => "failed",
            State::Cancelled(_) => "cancelled",
        }
    }

    /// The reason for the state, and the cure if there is one.
    pub fn why(&self, node: &Node) -> Option<String> {
        match self {
            State::Done | State::Running | State::Waiting => None,
            State::Damaged(why) | State::Queued(why) | State::Cancelled(why) => Some(why.clone()),
            State::Stale(misfit) => Some(format!("{misfit}; {}", cure(node, misfit))),
            State::Stalled => Some("no heartbeat; if its process is gone, start the phase again".into()),
            State::Stopped => Some("start the phase again to resume".into()),
            State::Failed(why) => why.clone(),
        }
    }

    /// Returns the state, unless it says that the node's file must not be used.
    ///
    /// # Errors
    /// [`Failure::Damaged`] if the file is damaged or stale, with the reason and the cure.
    pub fn or_refusal(self, node: &Node, path: PathBuf) -> Result<State, Failure> {
        match self {
            State::Damaged(_) | State::Stale(_) => {
                Err(Failure::Damaged { path, what: self.why(node).unwrap_or_default() })
            }
            state => Ok(state),
        }
    }
}

/// The cure for an artefact that does not fit its node.
fn cure(node: &Node, misfit: &Misfit) -> String {
    let retry = match node.index {
        Some(index) => format!("train module {index} again"),
        None => format!("start `incubate {}` again", node.command()),
    };
    let alternative = match misfit {
        Misfit::Module { .. } => String::new(),
        Misfit::Data => ", or use it knowingly: --accept-data".into(),
        Misfit::Depths { .. } | Misfit::Recipe => ", or choose another --run-dir".into(),
        Misfit::Original(row) => format!(", or restore the {row} model that it was trained in"),
    };
    format!("delete {} and {retry}{alternative}", node.file)
}

impl fmt::Display for Misfit {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let module = |index: &Option<usize>| index.map_or("no single module".into(), |index| format!("module {index}"));
        match self {
            Misfit::Module { held, expected } => write!(out, "holds {}, not {}", module(held), module(expected)),
            Misfit::Depths { held, expected } => write!(out, "has depths {held:?}, expected {expected:?}"),
            Misfit::Recipe => write!(out, "was written by another recipe"),
            Misfit::Data => write!(out, "was trained on other data than this run's"),
            Misfit::Original(row) => write!(out, "was trained in another {row} model than this run's"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::run::graph::Expected;
    use crate::run::table::{ASSEMBLE, MODULE, TABLE};

    fn module() -> Node {
        Node::new(&Config::parse("", &[]).unwrap(), &MODULE, Some(1))
    }

    fn heartbeat(says: Activity, age: f64) -> Option<Heartbeat> {
        Some(Heartbeat { says, error: Some("a full disk".into()), age })
    }

    fn queued(state: JobState) -> Option<Queued> {
        Some(Queued { id: "7".into(), state, reason: "Dependency".into() })
    }

    #[test]
    fn heartbeats_and_the_queue_decide_the_state_of_a_node_without_a_file() {
        let word =
            |heartbeat, queued| state(&module(), &Evidence { found: Found::Nothing, heartbeat, queued }, None).word();
        assert_eq!(word(None, None), "waiting");
        assert_eq!(word(heartbeat(Activity::Running, 59.0), None), "running");
        assert_eq!(word(heartbeat(Activity::Running, 61.0), None), "stalled");
        assert_eq!(word(heartbeat(Activity::Stopped, 1.0), None), "stopped");
        assert_eq!(word(heartbeat(Activity::Failed, 1.0), queued(JobState::Failed("FAILED".into()))), "failed");
        assert_eq!(word(heartbeat(Activity::Running, 1.0), queued(JobState::Active)), "running");
        assert_eq!(word(heartbeat(Activity::Failed, 1.0), queued(JobState::Pending)), "queued", "it is tried again");
        assert_eq!(word(None, queued(JobState::Cancelled)), "cancelled");
        assert_eq!(
            word(heartbeat(Activity::Stopped, 1.0), queued(JobState::Cancelled)),
            "stopped",
            "it could say so itself"
        );
        let lost = Evidence { queued: queued(JobState::Failed("NODE_FAIL".into())), ..Evidence::default() };
        let lost = Evidence { heartbeat: heartbeat(Activity::Running, 1.0), ..lost };
        assert_eq!(state(&module(), &lost, None).why(&module()).unwrap(), "NODE_FAIL (Dependency)");
    }

    #[test]
    fn a_file_is_done_only_if_it_is_the_nodes_own() {
        let node = module();
        let Expected { depths, recipe } = node.expected.clone().unwrap();
        let own = Stamp {
            index: Some(1),
            depths,
            recipe,
            is_of_other_data: false,
            original: Some("m".into()),
            hash: "h".into(),
        };
        let state = |stamp: Stamp, original| state(&node, &Evidence::of_file(Found::Artefact(stamp)), original);
        assert_eq!(state(own.clone(), Some("m")), State::Done);
        assert_eq!(state(own.clone(), None), State::Done, "without a meta model there is nothing to compare with");
        for (stamp, why) in [
            (Stamp { index: Some(2), ..own.clone() }, "holds module 2, not module 1"),
            (Stamp { depths: vec![1; 4], ..own.clone() }, "has depths [1, 1, 1, 1]"),
            (Stamp { recipe: "another".into(), ..own.clone() }, "another recipe"),
            (Stamp { is_of_other_data: true, ..own.clone() }, "other data than this run's"),
            (Stamp { original: Some("n".into()), ..own.clone() }, "another meta model"),
            (Stamp { original: None, ..own.clone() }, "another meta model"),
        ] {
            let stale = state(stamp, Some("m"));
            let text = stale.why(&node).unwrap();
            assert!(stale.word() == "stale" && text.contains(why), "{text}");
            assert!(text.contains("delete module-1.h5 and train module 1 again"), "{text}");
            assert!(stale.or_refusal(&node, "module-1.h5".into()).is_err());
        }
    }

    #[test]
    fn an_imported_model_derives_from_nothing_and_a_run_needs_nothing_before_it() {
        let config = Config::parse("", &[]).unwrap();
        let node = Node::new(&config, &ASSEMBLE, None);
        let Expected { depths, recipe } = node.expected.clone().unwrap();
        let found = Found::Artefact(Stamp {
            index: None,
            depths,
            recipe,
            is_of_other_data: false,
            original: None,
            hash: "h".into(),
        });
        assert!(found.is_imported(&node) && !Found::Exists.is_imported(&node));
        assert_eq!(state(&node, &Evidence::of_file(found), Some("m")), State::Done);
        let rows = |is_imported| -> Vec<&str> {
            Graph::new(&config, &TABLE).rows(is_imported).iter().map(|row| row.name).collect()
        };
        assert_eq!(rows(false), ["meta", "module", "assemble", "finetune", "export", "report"]);
        assert_eq!(rows(true), ["finetune", "export", "report"]);
    }
}
