//! `previews.jsonl`: the previews of a run, as one JSON object on each line. A preview evaluates the modules and their assembly
//! while the modules still train. Lines are only ever added.

use super::run_dir::RunDir;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io::Write;

/// The values of the headline metric for the meta model, the modules and the assembled network, at one moment of the modules'
/// training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Preview {
    /// The Unix time of the preview.
    pub time: f64,
    /// How many test images were evaluated.
    pub images: usize,
    /// The key of the metric, which is the same for all models.
    pub metric: String,
    /// The meta model, then the hybrid of each module that has weights, then the assembled network.
    pub models: Vec<Previewed>,
}

/// One evaluated model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Previewed {
    pub name: String,
    /// How many optimiser steps the weights have taken in their phase, and how many steps the phase has. None for the assembled
    /// network, whose stages come from several phases.
    pub steps: Option<(u64, u64)>,
    pub value: f64,
}

impl Preview {
    /// The number of steps that the weights of a model had taken; none for the assembled network, or if the preview does not show
    /// the model.
    pub fn steps_of(&self, name: &str) -> Option<u64> {
        let model = self.models.iter().find(|model| model.name == name)?;
        model.steps.map(|(step, _)| step)
    }

    /// The value of a model minus the value of the meta model.
    pub fn against_meta(&self, model: &Previewed) -> f64 {
        model.value - self.models[0].value
    }
}

impl Previewed {
    /// The model's steps so far and all steps of its phase, such as `12/40`; a dash for the assembled network.
    pub fn progress(&self) -> String {
        self.steps.map_or("–".into(), |(step, steps)| format!("{step}/{steps}"))
    }
}

impl RunDir {
    /// Adds a preview to the file.
    pub fn add_preview(&self, preview: &Preview) -> Result<()> {
        let path = self.file(FILE);
        let mut line = serde_json::to_vec(preview)?;
        line.push(b'\n');
        let file = OpenOptions::new().append(true).create(true).open(&path);
        file.and_then(|mut file| file.write_all(&line))
            .with_context(|| format!("{}: cannot be written", path.display()))
    }

    /// The newest preview whose line is complete, if there is one.
    pub fn newest_preview(&self) -> Option<Preview> {
        let text = std::fs::read_to_string(self.file(FILE)).ok()?;
        text.lines().rev().find_map(|line| serde_json::from_str(line).ok())
    }
}

const FILE: &str = "previews.jsonl";
