//! Skips unreadable images, up to a limit for the whole run. A warning names each skipped image. Each process of a run writes the
//! names of its unreadable images to a file in the run directory, and reads the files of the other processes.

use crate::error::exit_code;
use crate::usage;
use anyhow::{Error, Result};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The unreadable images that the processes of a run have found, and how many they may skip.
#[derive(Debug)]
pub struct BadImages {
    /// How many images may be skipped.
    limit: usize,
    /// The folder in which each process keeps a file of names. If none, only the images of this process count.
    notes: Option<PathBuf>,
    /// The names of the unreadable images that this process has found, or read in the files of all processes.
    names: Mutex<BTreeSet<String>>,
}

impl BadImages {
    /// Skips up to `limit` images, and counts the images of this process alone.
    pub fn new(limit: usize) -> BadImages {
        BadImages { limit, notes: None, names: Mutex::default() }
    }

    /// Skips up to `limit` images, and counts the images of all processes of a run, including the processes before a restart.
    pub fn of_run(limit: usize, run: &Path) -> BadImages {
        BadImages { notes: Some(run.join(NOTES)), ..Self::new(limit) }
    }

    /// Skips an image because of `fault`. Warns only if no process of the run has skipped the image before.
    ///
    /// # Errors
    /// The limit is reached and the image is new. Or the operating system failed to read the image, which may be intact.
    pub fn skip(&self, name: String, fault: Error) -> Result<()> {
        if is_of_the_system(&fault) {
            return Err(fault.context(name));
        }
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.contains(&name) {
            return Ok(());
        }
        self.add_notes(&mut names);
        if names.contains(&name) {
            return Ok(());
        }
        if names.len() >= self.limit {
            let allowed = match self.limit {
                0 => "restore or remove the image, or set data.bad_images to how many may be skipped".into(),
                limit => format!(
                    "data.bad_images = {limit} are skipped already; restore the images or raise data.bad_images"
                ),
            };
            // If a pack is damaged, the exit code of its error stays 3.
            return Err(match exit_code(&fault) {
                3 => fault.context(format!("{name} is unreadable; {allowed}")),
                _ => usage!("{name}: {fault:#}; {allowed}"),
            });
        }
        log::warn!("{name}: {fault:#}; skipped, {} of at most {}", names.len() + 1, self.limit);
        self.note(&name);
        names.insert(name);
        Ok(())
    }

    /// How many images the whole run has skipped. Without a run directory, how many images this process has skipped.
    pub fn count(&self) -> usize {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        self.add_notes(&mut names);
        names.len()
    }

    /// Reads the files of all processes, and adds their names to `names`.
    fn add_notes(&self, names: &mut BTreeSet<String>) {
        let Some(folder) = &self.notes else { return };
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            names.extend(text.lines().filter_map(|line| serde_json::from_str::<String>(line).ok()));
        }
    }

    /// Appends a name to this process's file.
    fn note(&self, name: &str) {
        // An evaluation may start before the run, and must not make the run directory. Only a run writes `config.toml`, so this
        // file shows that the run has begun.
        let Some(folder) = self.notes.as_ref().filter(|folder| folder.with_file_name("config.toml").exists()) else {
            return;
        };
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let file = folder.join(format!("{}-{}.txt", host.trim(), std::process::id()));
        let line = format!("{}\n", serde_json::Value::from(name));
        let written = fs::create_dir_all(folder)
            .and_then(|()| File::options().append(true).create(true).open(&file)?.write_all(line.as_bytes()));
        written.unwrap_or_else(|error| {
            log::warn!("{}: {error}; the count of unreadable images may be too low", file.display())
        });
    }
}

/// The folder in the run directory that holds the files of names.
const NOTES: &str = "unreadable";

/// Whether the fault is a failure of the operating system, such as too many open files, and not a fault of the image's bytes.
fn is_of_the_system(fault: &Error) -> bool {
    let of_io = |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref::<std::io::Error>()?.raw_os_error();
    fault.chain().any(|cause| of_io(cause).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Failure;
    use anyhow::anyhow;

    #[test]
    fn as_many_as_the_limit_are_skipped_and_the_same_one_counts_once() {
        let bad = BadImages::new(2);
        for name in ["a", "b", "a"] {
            bad.skip(name.into(), anyhow!("torn")).unwrap();
        }
        let error = bad.skip("c".into(), anyhow!("torn")).unwrap_err().to_string();
        assert!(error.starts_with("c: torn") && error.contains("data.bad_images = 2"), "{error}");
        assert_eq!(bad.count(), 2);
    }

    #[test]
    fn all_processes_of_a_run_and_its_restarts_count_together() {
        let run = tempfile::tempdir().unwrap();
        fs::write(run.path().join("config.toml"), "").unwrap();
        let one = BadImages::of_run(3, run.path());
        let other = BadImages::of_run(3, run.path());
        one.skip("a\nb".into(), anyhow!("torn")).unwrap();
        one.skip("b".into(), anyhow!("torn")).unwrap();
        other.skip("b".into(), anyhow!("torn")).unwrap();
        other.skip("c".into(), anyhow!("torn")).unwrap();
        assert_eq!([one.count(), other.count(), BadImages::of_run(3, run.path()).count()], [3; 3]);
        assert!(BadImages::of_run(3, run.path()).skip("d".into(), anyhow!("torn")).is_err());
        let nowhere = tempfile::tempdir().unwrap();
        BadImages::of_run(3, nowhere.path()).skip("a".into(), anyhow!("torn")).unwrap();
        assert!(fs::read_dir(nowhere.path()).unwrap().next().is_none(), "no run, no notes");
    }

    #[test]
    fn an_image_that_the_system_fails_to_read_is_no_bad_image_but_one_of_a_damaged_pack_is() {
        let bad = BadImages::new(1);
        for code in [libc::EMFILE, libc::ESTALE, libc::EIO] {
            let fault = Error::new(std::io::Error::from_raw_os_error(code)).context("reading");
            let error = bad.skip("a.jpg".into(), fault).unwrap_err();
            assert!(format!("{error:#}").starts_with("a.jpg: reading: "), "{error:#}");
            assert_eq!((exit_code(&error), bad.count()), (1, 0));
        }
        let damaged = || Error::new(Failure::Damaged { path: "train-00000.h5".into(), what: "changed".into() });
        bad.skip("sample 1".into(), damaged()).unwrap();
        let error = bad.skip("sample 2".into(), damaged()).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("sample 2") && text.contains("changed") && text.contains("data.bad_images = 1"),
            "{text}"
        );
        assert_eq!(exit_code(&error), 3);
    }
}
