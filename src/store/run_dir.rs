//! The run directory, which holds the files of one run.
//! ```text
//! config.toml                     the resolved config with a checksum; a different config is refused
//! dataset.json                    the record of the data; other data are refused
//! dataset-segmentation.json       the record of the images with label maps
//! dataset-detection.json          the record of the images with annotated objects
//! meta.h5 module-{i}.h5 assembled.h5 final.h5 e2e.h5 …   artefacts
//! checkpoints/{phase}-{step}.h5   the newest checkpoints of a phase that is not done
//! leases/{phase}.{generation}.json  which process may write a phase
//! progress/{phase}.json           the heartbeat of a phase: how far it is
//! ledger/{phase}.jsonl            the work of each start of a phase
//! index/{split}.index             the files and offsets of the images of a folder or of tars
//! unreadable/{host}-{pid}.txt     names of images that could not be read
//! previews.jsonl                  evaluations of the assembly while the modules still train
//! logs/{phase}/                   metrics.jsonl, TensorBoard events and, after segmentation or detection, classes.json
//! predictions/{phase}/            test images with the predictions of a phase's model
//! export/{format}/                exported models
//! slurm/                          the config, scripts and logs of submitted jobs, and their record jobs.json
//! summary.json                    the scores and costs of the run's models
//! report.html                     the page about the run; report-so-far.html while the run goes on
//! ```

use super::durable;
use crate::config::Config;
use crate::error::Failure;
use crate::{require, usage};
use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};

/// The files of one run.
#[derive(Debug, Clone)]
pub struct RunDir {
    pub path: PathBuf,
}

/// The beginning of the last line of a run directory's config. The CRC-32C of all lines before the last follows in hexadecimal.
const CHECKSUM: &str = "# checksum: ";

/// The end of an error about a different config. If the run's fine-tuning was extended, or if the config has more epochs of
/// fine-tuning than the run, it says which `--extend` to give.
fn advice_to_extend(config: &Config, before: &Config) -> String {
    let (wanted, so_far) = (config.finetune.epochs, before.finetune.epochs);
    match config.finetune.epochs_before < before.finetune.epochs_before {
        true => format!("; the fine-tuning was extended: --extend finetune.epochs={so_far} goes on with it"),
        false if wanted > so_far => {
            format!("; to fine-tune the final model for more epochs, add --extend finetune.epochs={wanted}")
        }
        false => String::new(),
    }
}

impl RunDir {
    /// Creates the folder and writes the config into it. If the folder has a config already, checks that the two agree in all keys
    /// that change the result. Rank zero does this before the other ranks use the folder.
    pub fn open(config: &Config) -> Result<RunDir> {
        let run = RunDir { path: config.run.dir.clone() };
        for folder in ["checkpoints", "leases", "progress", "logs"] {
            fs::create_dir_all(run.path.join(folder)).map_err(|e| {
                usage!("{}: cannot make the run directory: {e}; choose another --run-dir", run.path.display())
            })?;
        }
        let file = run.config_file();
        if file.exists() {
            let before = Self::config_of(&run.path)?;
            let differences = config.differences(&before);
            require!(
                differences.is_empty(),
                "{}: this run was started with another config: {}; restore those keys, or choose another --run-dir{}",
                run.path.display(),
                differences.join(", "),
                advice_to_extend(config, &before)
            );
        } else {
            run.write_config(config).map_err(|e| usage!("{e:#}; the run directory must be writable"))?;
        }
        Ok(run)
    }

    /// Writes or replaces the config, with its checksum in the last line.
    pub fn write_config(&self, config: &Config) -> Result<()> {
        let text = config.to_toml();
        let checksum = crc32c::crc32c(text.as_bytes());
        durable::replace_bytes(&self.config_file(), format!("{text}{CHECKSUM}{checksum:08x}\n").as_bytes())
    }

    /// Reads the config of a run directory.
    pub fn config_of(path: &Path) -> Result<Config> {
        let file = path.join("config.toml");
        let text = fs::read_to_string(&file)
            .map_err(|e| usage!("{}: not a run directory ({e}); give the folder that a run wrote", file.display()))?;
        let damaged = |what: String| Failure::Damaged {
            path: file.clone(),
            what: format!("{what}; if your config has not changed since the first start, delete this file"),
        };
        let whole = text.rsplit_once(CHECKSUM).filter(|(config, checksum)| {
            u32::from_str_radix(checksum.trim_end(), 16) == Ok(crc32c::crc32c(config.as_bytes()))
        });
        // Without the check, the keys that a truncated file has lost would silently have their defaults.
        let (config, _) = whole.ok_or_else(|| damaged("truncated or changed after it was written".into()))?;
        // A key that is not in the text has its default. So a run directory stays readable after a new version has added a key.
        Ok(Config::parse(config, &[]).map_err(|e| damaged(format!("{e:#}")))?)
    }

    fn config_file(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    /// The path of a file of the run directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The path of the JSON file with the scores for each class of a segmentation or detection model.
    pub fn classes(&self, phase: &str) -> PathBuf {
        self.logs(phase).join("classes.json")
    }

    /// The folder of the test images with the predictions of a phase's model.
    pub fn predictions(&self, phase: &str) -> PathBuf {
        self.path.join("predictions").join(phase)
    }

    /// The folder of a phase's curves.
    pub fn logs(&self, phase: &str) -> PathBuf {
        self.path.join("logs").join(phase)
    }
}
