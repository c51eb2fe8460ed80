//! Meta, hybrid and target are not three models but one network with a list of stage depths, so the phases are a table.
//! A new phase is a row; no training code asks which phase it is in.

use crate::config::{Config, Training};

/// Blocks of each stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depths {
    /// Every stage at the meta depth.
    Thin,
    /// One stage at its target depth, the others thin: the hybrid.
    DeepAtModule,
    /// Every stage at its target depth.
    Deep,
}

/// Where the weights of the stages come from at step 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Fresh,
    /// The meta model's, but fresh for the stage that trains.
    Meta,
    /// The assembled target's.
    Assembled,
}

/// Which stages train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trains {
    Everything,
    Module,
}

/// One row of the table.
#[derive(Debug)]
pub struct Phase {
    pub name: &'static str,
    pub depths: Depths,
    pub start: Start,
    pub trains: Trains,
    /// The finished artefact; a module's is `module-{index}.h5`.
    pub writes: &'static str,
    pub training: fn(&Config) -> &Training,
    /// The config tables that change what the phase computes.
    pub recipe: &'static [&'static str],
}

pub const META: Phase = Phase {
    name: "meta",
    depths: Depths::Thin,
    start: Start::Fresh,
    trains: Trains::Everything,
    writes: "meta.h5",
    training: |config| &config.meta,
    recipe: &["model", "data", "meta"],
};

pub const MODULE: Phase = Phase {
    name: "module",
    depths: Depths::DeepAtModule,
    start: Start::Meta,
    trains: Trains::Module,
    writes: "module-{index}.h5",
    training: |config| &config.module,
    recipe: &["model", "data", "meta", "module"],
};

pub const FINETUNE: Phase = Phase {
    name: "finetune",
    depths: Depths::Deep,
    start: Start::Assembled,
    trains: Trains::Everything,
    writes: "final.h5",
    training: |config| &config.finetune,
    recipe: &["model", "data", "meta", "module", "finetune"],
};

pub const E2E: Phase = Phase {
    name: "e2e",
    depths: Depths::Deep,
    start: Start::Fresh,
    trains: Trains::Everything,
    writes: "e2e.h5",
    training: |config| &config.e2e,
    recipe: &["model", "data", "e2e"],
};

/// Every phase that trains, in the order of a run.
pub const PHASES: [&Phase; 4] = [&META, &MODULE, &FINETUNE, &E2E];

/// Those that nobody needs where the assembled or the finished model was imported.
pub const BEFORE_ASSEMBLED: [&str; 2] = [META.name, MODULE.name];

/// The assembled target: no training, so no row above.
pub const ASSEMBLED: &str = "assembled.h5";
