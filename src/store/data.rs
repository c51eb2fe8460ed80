//! `dataset.json` records the images of a run for classification; `dataset-segmentation.json` and `dataset-detection.json` record
//! its images for the other tasks. Data that differ from the record are refused until the user accepts them.

use super::artefact;
use super::durable;
use super::run_dir::RunDir;
use crate::config::TaskKind;
use crate::error::Failure;
use crate::run::data::{DataRecord, DataSet, Earlier};
use crate::usage;
use anyhow::{Context, Result};
use std::io::ErrorKind;

/// The name of the file that records a task's data.
fn file(task: TaskKind) -> &'static str {
    match task {
        TaskKind::Classification => "dataset.json",
        TaskKind::Segmentation => "dataset-segmentation.json",
        TaskKind::Detection => "dataset-detection.json",
    }
}

impl RunDir {
    /// The record of a task's data; none before the run has begun, or if it was started by a version that kept no record.
    ///
    /// # Errors
    /// [`Failure::Damaged`] if the file does not hold such a record.
    pub fn data(&self, task: TaskKind) -> Result<Option<DataRecord>> {
        let path = self.file(file(task));
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            read => read.with_context(|| format!("{}: cannot be read just now; try again", path.display()))?,
        };
        let record = serde_json::from_slice(&bytes).map_err(|error| Failure::Damaged {
            path,
            what: format!("not a record of a run's data: {error}; delete it to go on with the present data"),
        })?;
        Ok(Some(record))
    }

    /// Compares the data with the record. If there is no record yet, records the data.
    ///
    /// # Errors
    /// A usage error that says how the data differ from the record.
    pub fn check_data(&self, task: TaskKind, now: DataSet) -> Result<DataRecord> {
        let Some(record) = self.data(task)? else { return self.record_data(task, now) };
        match record.present.differences(&now) {
            None => Ok(record),
            Some(differences) => Err(usage!(
                "{}: the data are not those that this run was started with: {differences}; restore the data, or choose \
                 another --run-dir, or go on with them knowingly: --accept-data",
                self.path.display()
            )),
        }
    }

    /// Records the data of a task that begins, in place of an earlier record.
    pub fn record_data(&self, task: TaskKind, now: DataSet) -> Result<DataRecord> {
        self.store(task, DataRecord { present: now, earlier: Vec::new() })
    }

    /// Records that the user accepts `now` as the data of the run. Also records that the user accepts the existing artefacts among
    /// `files`, even if they were trained on other data.
    pub fn accept_data<'a>(
        &self,
        task: TaskKind,
        now: DataSet,
        files: impl Iterator<Item = &'a str>,
    ) -> Result<DataRecord> {
        let before = self.data(task)?;
        let mut record = before.clone().unwrap_or_else(|| DataRecord { present: now.clone(), earlier: Vec::new() });
        if let Some(differences) = record.present.differences(&now) {
            log::warn!("{}: going on with other data: {differences}", self.path.display());
            record.earlier.push(Earlier { fingerprint: record.present.fingerprint(), accepted: differences });
            record.present = now;
        }
        for file in files.filter(|file| self.file(file).exists()) {
            let (header, _) = artefact::read_header(&self.file(file))?;
            if let Some(data) = header.data.filter(|data| !record.knows(&data.fingerprint)) {
                let accepted = format!("{file} was trained on {} images of another listing", data.train_images);
                log::warn!("{}: {accepted}", self.path.display());
                record.earlier.push(Earlier { fingerprint: data.fingerprint, accepted });
            }
        }
        if before.as_ref() == Some(&record) { Ok(record) } else { self.store(task, record) }
    }

    fn store(&self, task: TaskKind, record: DataRecord) -> Result<DataRecord> {
        durable::replace_bytes(&self.file(file(task)), &serde_json::to_vec_pretty(&record)?)?;
        Ok(record)
    }
}
