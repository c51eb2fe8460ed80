//! The table of a run. The meta model, a hybrid and the target are not three kinds of models but one network with a list of stage
//! depths. So each phase is a row of values, and no training code asks which phase it is in.
//!
//! A new phase needs only a new row: a run then trains it, a Slurm job executes it, and the status and the summary show it. The
//! phase may use the config table of another row. If it has a table of its own, the table must be a field of
//! [`crate::config::Config`] and be documented in `configs/default.toml`. If it has a command of its own, the command must be a
//! variant in `cli/args.rs`.

use crate::config::{ObjectiveKind, TaskKind};

pub use super::row::*;

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
        start: Origin::Fresh,
        trains: Trains::Everything,
        task: TaskKind::Classification,
        objective: ObjectiveKind::EndToEnd,
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
        method: Method::Incubation,
    }),
    until_assembled: true,
    job: SlurmJob::Own,
    time: |slurm| &slurm.time_meta,
    is_wanted: |_| true,
};

pub static MODULE: Row = Row {
    name: "module",
    kind: Kind::Train(Phase {
        start: Origin::From("meta"),
        trains: Trains::Module,
        task: TaskKind::Classification,
        objective: ObjectiveKind::EndToEnd,
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
        method: Method::Incubation,
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
        method: Method::Incubation,
    }),
    until_assembled: true,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |_| true,
};

pub static FINETUNE: Row = Row {
    name: "finetune",
    kind: Kind::Train(Phase {
        start: Origin::From("assemble"),
        trains: Trains::Everything,
        task: TaskKind::Classification,
        objective: ObjectiveKind::EndToEnd,
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
        method: Method::Incubation,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |_| true,
};

pub static E2E: Row = Row {
    name: "e2e",
    kind: Kind::Train(Phase {
        start: Origin::Fresh,
        trains: Trains::Everything,
        task: TaskKind::Classification,
        objective: ObjectiveKind::EndToEnd,
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
        method: Method::E2e,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| config.run.e2e,
};

pub static DGL: Row = Row {
    name: "dgl",
    kind: Kind::Train(Phase {
        start: Origin::Fresh,
        trains: Trains::Everything,
        task: TaskKind::Classification,
        objective: ObjectiveKind::Dgl,
        training: |config| &config.dgl.training,
    }),
    needs: &["pack"],
    writes: "dgl.h5",
    model: Some(ModelSpec {
        depths: Depths::Deep,
        recipe: &["model", "data", "dgl"],
        derives_from: None,
        may_be_imported: false,
        label: "DGL",
        method: Method::Dgl,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| config.run.dgl,
};

pub static INFOPRO: Row = Row {
    name: "infopro",
    kind: Kind::Train(Phase {
        start: Origin::Fresh,
        trains: Trains::Everything,
        task: TaskKind::Classification,
        objective: ObjectiveKind::InfoPro,
        training: |config| &config.infopro.training,
    }),
    needs: &["pack"],
    writes: "infopro.h5",
    model: Some(ModelSpec {
        depths: Depths::Deep,
        recipe: &["model", "data", "infopro"],
        derives_from: None,
        may_be_imported: false,
        label: "InfoPro",
        method: Method::InfoPro,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| config.run.infopro,
};

pub static SEGMENT: Row = Row {
    name: "segment",
    kind: Kind::Train(Phase {
        start: Origin::From("finetune"),
        trains: Trains::Everything,
        task: TaskKind::Segmentation,
        objective: ObjectiveKind::EndToEnd,
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
        method: Method::Incubation,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| config.segmentation.has_images(),
};

pub static SEGMENT_E2E: Row = Row {
    name: "segment-e2e",
    kind: Kind::Train(Phase {
        start: Origin::From("e2e"),
        trains: Trains::Everything,
        task: TaskKind::Segmentation,
        objective: ObjectiveKind::EndToEnd,
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
        method: Method::E2e,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| config.segmentation.has_images() && config.run.e2e,
};

pub static DETECT: Row = Row {
    name: "detect",
    kind: Kind::Train(Phase {
        start: Origin::From("finetune"),
        trains: Trains::Everything,
        task: TaskKind::Detection,
        objective: ObjectiveKind::EndToEnd,
        training: |config| &config.detect,
    }),
    needs: &["pack", "finetune"],
    writes: "detect.h5",
    model: Some(ModelSpec {
        depths: Depths::Deep,
        recipe: &["model", "data", "meta", "module", "finetune", "detect", "detection"],
        derives_from: Some("finetune"),
        may_be_imported: false,
        label: "detection",
        method: Method::Incubation,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| config.detection.has_images(),
};

pub static DETECT_E2E: Row = Row {
    name: "detect-e2e",
    kind: Kind::Train(Phase {
        start: Origin::From("e2e"),
        trains: Trains::Everything,
        task: TaskKind::Detection,
        objective: ObjectiveKind::EndToEnd,
        training: |config| &config.detect,
    }),
    needs: &["pack", "e2e"],
    writes: "detect-e2e.h5",
    model: Some(ModelSpec {
        depths: Depths::Deep,
        recipe: &["model", "data", "e2e", "detect", "detection"],
        derives_from: Some("e2e"),
        may_be_imported: false,
        label: "detection end to end",
        method: Method::E2e,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |config| config.detection.has_images() && config.run.e2e,
};

pub static EXPORT: Row = Row {
    name: "export",
    kind: Kind::Export,
    needs: &["finetune"],
    // No single file shows that the export is done, because its folders depend on the formats and the model. The report comes after
    // the export, so the file of the report shows it.
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
    needs: &["pack", "finetune", "e2e", "dgl", "infopro", "segment", "segment-e2e", "detect", "detect-e2e", "export"],
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
pub static TABLE: [&Row; 15] = [
    &PACK,
    &META,
    &MODULE,
    &ASSEMBLE,
    &FINETUNE,
    &E2E,
    &DGL,
    &INFOPRO,
    &SEGMENT,
    &SEGMENT_E2E,
    &DETECT,
    &DETECT_E2E,
    &EXPORT,
    &REPORT,
    &DOWNSTREAM,
];

impl Method {
    /// The last row in which this method trains the target.
    pub fn last_row(self) -> &'static Row {
        let of_baseline = TABLE.into_iter().find(|row| row.name == self.key());
        of_baseline.unwrap_or(&FINETUNE)
    }
}
