//! The table of a run. Meta, hybrid and target are not three models but one network with a list of stage depths, so each
//! phase is a row of values, and no training code asks which phase it is in.
//!
//! A new phase needs only a new row: a run then trains it, a Slurm job executes it, and the status and the summary show it. The
//! phase may use the config table of another row. A config table of its own must be a field of [`Config`] and be documented in
//! `configs/default.toml`, and a command of its own must be documented in `cli/args.rs`.

use crate::config::{Config, Slurm, TaskKind, Training};

/// A row of the table: everything that the program knows about one kind of node.
#[derive(Debug)]
pub struct Row {
    /// The name in file names, logs, the status and the names of Slurm jobs. It also names a phase's command and, unless the
    /// phase uses the config table of another row, its config table.
    pub name: &'static str,
    pub kind: Kind,
    /// The rows that must be done before this row, because it reads the files that they write.
    pub needs: &'static [&'static str],
    /// The file in the run directory that shows by its existence that the node is done. If the file is an artefact, it must also be
    /// whole and the node's own. `{index}` stands for a module's number. Empty if no file shows this.
    pub writes: &'static str,
    /// The model in that file, if the file is an artefact.
    pub model: Option<ModelSpec>,
    /// Whether the row makes the assembled model or comes before it. A run into which a target was imported needs no such row.
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
    /// Packs the data.
    Pack,
    Train(Phase),
    /// Assembles the modules into the target, without training.
    Assemble,
    Export,
    Report,
    /// Runs each of the user's own scripts.
    Script,
}

/// How a row trains.
#[derive(Debug, Clone, Copy)]
pub struct Phase {
    pub start: Start,
    pub trains: Trains,
    pub task: TaskKind,
    /// The table of the config with its settings.
    pub training: fn(&Config) -> &Training,
}

/// The origin of the weights at step 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Fresh,
    /// The artefact of the named row. In a module phase, `module.start` says how the stage that trains starts.
    From(&'static str),
}

/// The stages that train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trains {
    Everything,
    /// One stage alone. The row has a node for each module.
    Module,
}

/// The model that a row writes.
#[derive(Debug, Clone, Copy)]
pub struct ModelSpec {
    pub depths: Depths,
    /// The config tables that change the result. The artefact's recipe is a hash of them.
    pub recipe: &'static [&'static str],
    /// The row from whose artefact the model derives. The model's artefact records the hash of that artefact.
    pub derives_from: Option<&'static str>,
    /// Whether the model may be an imported target, which derives from nothing in the run directory.
    pub may_be_imported: bool,
    /// Its name in the summary; `{index}` stands for a module's number.
    pub label: &'static str,
    /// Whether the model is the baseline with which incubation is compared, so that its cost is not part of incubation's.
    pub is_baseline: bool,
}

/// Blocks of each stage of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depths {
    /// Every stage at the meta depth.
    Thin,
    /// One stage at its target depth, the others thin: the hybrid.
    DeepAtModule,
    /// Every stage at its target depth.
    Deep,
}

/// The Slurm job that executes a row if `slurm.mode` is "array". If it is "allocation", the job `run` executes all rows except
/// those of `Alone` and `Script`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlurmJob {
    /// A job of its own, with one process and no GPU.
    Alone,
    /// A job of its own, with all ranks.
    Own,
    /// A job array with a task for each module; each task has all ranks.
    Array,
    /// The last job, which executes all rows of this kind.
    Last,
    /// A job for each of the user's own scripts, after the last job.
    Script,
}

pub static PACK: Row = Row {
    name: "pack",
    kind: Kind::Pack,
    needs: &[],
    writes: "",
    model: None,
    until_assembled: false,
    job: SlurmJob::Alone,
    time: |slurm| &slurm.time,
    is_wanted: |config| !config.data.pack_from.as_os_str().is_empty(),
};

pub static META: Row = Row {
    name: "meta",
    kind: Kind::Train(Phase {
        start: Start::Fresh,
        trains: Trains::Everything,
        task: TaskKind::Classification,
        training: |config| &config.meta,
    }),
    needs: &["pack"],
    writes: "meta.h5",
    model: Some(ModelSpec {
        depths: Depths::Thin,
        recipe: &["model", "data", "meta"],
        derives_from: None,
        may_be_imported: false,
        label: "meta model",
        is_baseline: false,
    }),
    until_assembled: true,
    job: SlurmJob::Own,
    time: |slurm| &slurm.time_meta,
    is_wanted: |_| true,
};

pub static MODULE: Row = Row {
    name: "module",
    kind: Kind::Train(Phase {
        start: Start::From("meta"),
        trains: Trains::Module,
        task: TaskKind::Classification,
        training: |config| &config.module.training,
    }),
    needs: &["pack", "meta"],
    writes: "module-{index}.h5",
    model: Some(ModelSpec {
        depths: Depths::DeepAtModule,
        recipe: &["model", "data", "meta", "module"],
        derives_from: Some("meta"),
        may_be_imported: false,
        label: "hybrid {index}",
        is_baseline: false,
    }),
    until_assembled: true,
    job: SlurmJob::Array,
    time: |slurm| &slurm.time,
    is_wanted: |_| true,
};

pub static ASSEMBLE: Row = Row {
    name: "assemble",
    kind: Kind::Assemble,
    needs: &["pack", "meta", "module"],
    writes: "assembled.h5",
    model: Some(ModelSpec {
        depths: Depths::Deep,
        recipe: &["model", "data", "meta", "module"],
        derives_from: Some("meta"),
        may_be_imported: true,
        label: "assembled",
        is_baseline: false,
    }),
    until_assembled: true,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |_| true,
};

pub static FINETUNE: Row = Row {
    name: "finetune",
    kind: Kind::Train(Phase {
        start: Start::From("assemble"),
        trains: Trains::Everything,
        task: TaskKind::Classification,
        training: |config| &config.finetune,
    }),
    needs: &["pack", "assemble"],
    writes: "final.h5",
    model: Some(ModelSpec {
        depths: Depths::Deep,
        recipe: &["model", "data", "meta", "module", "finetune"],
        derives_from: Some("meta"),
        may_be_imported: true,
        label: "fine-tuned",
        is_baseline: false,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |_| true,
};

pub static E2E: Row = Row {
    name: "e2e",
    kind: Kind::Train(Phase {
        start: Start::Fresh,
        trains: Trains::Everything,
        task: TaskKind::Classification,
        training: |config| &config.e2e,
    }),
    needs: &["pack"],
    writes: "e2e.h5",
    model: Some(ModelSpec {
        depths: Depths::Deep,
        recipe: &["model", "data", "e2e"],
        derives_from: None,
        may_be_imported: false,
        label: "end to end",
        is_baseline: true,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| config.run.e2e,
};

pub static SEGMENT: Row = Row {
    name: "segment",
    kind: Kind::Train(Phase {
        start: Start::From("finetune"),
        trains: Trains::Everything,
        task: TaskKind::Segmentation,
        training: |config| &config.segment,
    }),
    needs: &["pack", "finetune"],
    writes: "segment.h5",
    model: Some(ModelSpec {
        depths: Depths::Deep,
        recipe: &["model", "data", "meta", "module", "finetune", "segment", "segmentation"],
        derives_from: Some("finetune"),
        may_be_imported: false,
        label: "segmentation",
        is_baseline: false,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| config.segmentation.has_images(),
};

pub static SEGMENT_E2E: Row = Row {
    name: "segment-e2e",
    kind: Kind::Train(Phase {
        start: Start::From("e2e"),
        trains: Trains::Everything,
        task: TaskKind::Segmentation,
        training: |config| &config.segment,
    }),
    needs: &["pack", "e2e"],
    writes: "segment-e2e.h5",
    model: Some(ModelSpec {
        depths: Depths::Deep,
        recipe: &["model", "data", "e2e", "segment", "segmentation"],
        derives_from: Some("e2e"),
        may_be_imported: false,
        label: "segmentation end to end",
        is_baseline: true,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| config.segmentation.has_images() && config.run.e2e,
};

pub static EXPORT: Row = Row {
    name: "export",
    kind: Kind::Export,
    needs: &["finetune"],
    // The folders that it writes depend on the formats and the model. So the file of the report, which comes after the export, shows
    // that the export is done.
    writes: REPORT.writes,
    model: None,
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| !config.run.export.is_empty(),
};

pub static REPORT: Row = Row {
    name: "report",
    kind: Kind::Report,
    needs: &["pack", "finetune", "e2e", "segment", "segment-e2e", "export"],
    writes: "report.html",
    model: None,
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |_| true,
};

pub static DOWNSTREAM: Row = Row {
    name: "downstream",
    kind: Kind::Script,
    needs: &["report"],
    writes: "",
    model: None,
    until_assembled: false,
    job: SlurmJob::Script,
    time: |slurm| &slurm.time,
    is_wanted: |_| true,
};

/// Every row, in the order of a run.
pub static TABLE: [&Row; 11] =
    [&PACK, &META, &MODULE, &ASSEMBLE, &FINETUNE, &E2E, &SEGMENT, &SEGMENT_E2E, &EXPORT, &REPORT, &DOWNSTREAM];

impl Row {
    /// The name under which the artefact of this many epochs is kept when the phase is extended, such as `final-100-epochs.h5`.
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

    /// The task of the row's model.
    pub fn task(&self) -> TaskKind {
        self.phase().map_or(TaskKind::Classification, |phase| phase.task)
    }

    /// Whether the row has a node for each module.
    pub fn is_for_each_module(&self) -> bool {
        self.phase().is_some_and(|phase| phase.trains == Trains::Module)
    }

    /// Whether the row's nodes write heartbeats and so may have a line in the status.
    pub fn has_heartbeat(&self) -> bool {
        matches!(self.kind, Kind::Pack | Kind::Train(_) | Kind::Assemble)
    }
}
