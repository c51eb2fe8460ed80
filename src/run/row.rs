//! The types of the run's table: a row, and the values in a row.

use crate::config::{Config, ObjectiveKind, Slurm, TaskKind, Training};
use serde::{Deserialize, Serialize};

/// A row of the table: everything that the program knows about one kind of node.
#[derive(Debug)]
pub struct Row {
    /// The name of the row in file names, logs, the status and the names of Slurm jobs. The command of a phase has the same name.
    /// Its config table has it too, unless the phase uses the table of another row.
    pub name: &'static str,
    pub kind: Kind,
    /// The rows whose files this row reads. If a run includes such a row, the row must be done before this row.
    pub needs: &'static [&'static str],
    /// The name of the file in the run directory that shows by its existence that a node of the row is done. If the file is an
    /// artefact, it must also be undamaged and fit the node. `{index}` stands for a module's number. Empty if no file shows that a
    /// node is done.
    pub writes: &'static str,
    /// The model in that file, if the file is an artefact.
    pub model: Option<ModelSpec>,
    /// Whether the row makes the assembled model or a model that the assembly needs. A run whose target was imported skips such
    /// rows.
    pub until_assembled: bool,
    pub job: SlurmJob,
    /// The time limit of the row's Slurm job in the config; if empty, `slurm.time` applies.
    pub time: fn(&Slurm) -> &str,
    /// Whether a run of this config includes the row.
    pub is_wanted: fn(&Config) -> bool,
}

/// The kind of work that a row does.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Writes the data into a pack: HDF5 shards that are fast to read.
    Pack,
    /// Trains: the row is a phase.
    Train(Phase),
    /// Assembles the modules into the target, without training.
    Assemble,
    /// Writes the final model in the formats of other programs.
    Export,
    /// Writes the page about the run.
    Report,
    /// Runs each of the user's own scripts.
    Script,
}

/// How a row trains.
#[derive(Debug, Clone, Copy)]
pub struct Phase {
    pub start: Origin,
    pub trains: Trains,
    pub task: TaskKind,
    pub objective: ObjectiveKind,
    /// The config table with the settings of the phase.
    pub training: fn(&Config) -> &Training,
}

/// The origin of a phase's weights at step 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Newly initialised weights.
    Fresh,
    /// The artefact of the named row. In a module phase, the config key `module.start` decides how the trained stage starts.
    From(&'static str),
}

/// The stages that train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trains {
    Everything,
    /// One stage alone, as a module. The row has a node for each stage.
    Module,
}

/// A way to train the target: Deep Incubation, or a baseline with which it is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    Incubation,
    E2e,
    Dgl,
    InfoPro,
}

/// All methods, in the order of tables and legends.
pub const METHODS: [Method; 4] = [Method::Incubation, Method::E2e, Method::Dgl, Method::InfoPro];

impl Method {
    /// The word for the method in study files and JSON. The row that trains a baseline has the same name.
    pub fn key(self) -> &'static str {
        match self {
            Method::Incubation => "incubation",
            Method::E2e => "e2e",
            Method::Dgl => "dgl",
            Method::InfoPro => "infopro",
        }
    }

    /// The name of the method in texts for people.
    pub fn name(self) -> &'static str {
        match self {
            Method::Incubation => "Deep Incubation",
            Method::E2e => "end to end",
            Method::Dgl => "DGL",
            Method::InfoPro => "InfoPro",
        }
    }
}

/// The model that a row writes.
#[derive(Debug, Clone, Copy)]
pub struct ModelSpec {
    pub depths: Depths,
    /// The config tables that change the result. The artefact's recipe is a hash of the seed and of these tables.
    pub recipe: &'static [&'static str],
    /// The name of the row from whose artefact the model derives. The model's own artefact records the hash of that artefact.
    pub derives_from: Option<&'static str>,
    /// Whether the model may be an imported target, which derives from nothing in the run directory.
    pub may_be_imported: bool,
    /// The name of the model in the summary; `{index}` stands for a module's number.
    pub label: &'static str,
    /// The method to which the model and its cost belong.
    pub method: Method,
}

/// Chooses the deep stages. A deep stage has as many blocks as in the target. All other stages are thin, as in the meta model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depths {
    /// Every stage is thin.
    Thin,
    /// The module's stage is deep, all others are thin: the hybrid.
    DeepAtModule,
    /// Every stage is deep: the target.
    Deep,
}

/// The Slurm job that executes a row if `slurm.mode` is "array". If `slurm.mode` is "allocation", a single job `run` executes all
/// rows except those with `Alone` or `Script`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlurmJob {
    /// A job of its own, with one process and no GPU.
    Alone,
    /// A job of its own, with all ranks.
    Own,
    /// A job array with a task for each module. Each task has all ranks. If Slurm limits the size of arrays, several arrays share
    /// the modules.
    Array,
    /// The last job of the program, `finalize`, which executes all rows with `Last`.
    Last,
    /// A job for each of the user's own scripts, after the last job.
    Script,
}

impl Row {
    /// The file name under which an extended phase keeps its artefact of this many epochs, such as `final-100-epochs.h5`.
    pub fn kept(&self, epochs: usize) -> String {
        format!("{}-{epochs}-epochs.h5", self.writes.trim_end_matches(".h5"))
    }

    /// How the row trains, if it trains.
    pub fn phase(&self) -> Option<&Phase> {
        match &self.kind {
            Kind::Train(phase) => Some(phase),
            _ => None,
        }
    }

    /// The task for which the row trains; classification for rows that do not train.
    pub fn task(&self) -> TaskKind {
        self.phase().map_or(TaskKind::Classification, |phase| phase.task)
    }

    /// Whether the row has a node for each module.
    pub fn is_for_each_module(&self) -> bool {
        self.phase().is_some_and(|phase| phase.trains == Trains::Module)
    }

    /// Whether the row's nodes write heartbeats. The assembly writes a heartbeat only if it fails.
    pub fn has_heartbeat(&self) -> bool {
        matches!(self.kind, Kind::Pack | Kind::Train(_) | Kind::Assemble)
    }
}
