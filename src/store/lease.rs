//! Leases ensure that a phase has one writer, however many jobs are started on the run directory.
//!
//! `leases/{phase}.{generation}.json` names the holder, a process that rewrites the file every second. The holder named by the file
//! with the highest generation (1, 2, …) may write the phase. A process that finds the lease released or its holder dead creates
//! the next generation. Only one process can do so, because exclusive creation is atomic on local disks, NFS and Lustre. A holder
//! that finds a higher generation than its own has lost the phase. It looks for a higher generation every second, and again right
//! before a file is renamed to its final name.
//!
//! A holder counts as dead in three cases: it ran on this machine and is gone; the waiting process is a later start of the holder's
//! Slurm job; or the holder has not renewed the lease for half a minute. The waiting process measures that time itself, because the
//! clocks of nodes may differ. A process that does not wait ([`Lease::take_if_free`]) cannot measure, so it compares clocks and
//! allows five minutes.

use super::durable;
use super::holder::Holder;
use super::process::unix_time;
use super::run_dir::RunDir;
use crate::error::Failure;
use crate::thread;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// The interval at which a holder renews its lease.
const RENEWAL: Duration = Duration::from_secs(1);
/// The interval at which a waiting process looks at the lease.
const POLL: Duration = Duration::from_millis(200);
/// The seconds without a renewal after which a holder counts as dead.
const SILENCE: u64 = 30;
/// The number of looks in [`SILENCE`] seconds. A waiting process counts its looks instead of the seconds. So the time during which
/// the waiting process itself was suspended does not count.
const SILENT_LOOKS: u64 = SILENCE * 1000 / POLL.as_millis() as u64;

/// [`Lease::take_if_free`] takes a holder for dead if its last renewal, by the holder's clock, is more than this many seconds ago.
/// The clocks of nodes differ by less.
const ABANDONED: f64 = 300.0;

/// The right to write a phase. A thread renews it until it is dropped.
pub struct Lease {
    fence: Fence,
    holder: Holder,
    lost: Arc<AtomicBool>,
    /// The thread that renews the lease. It ends when the sender is dropped.
    renewing: Option<(Sender<()>, JoinHandle<()>)>,
    /// Whether this process had to wait for another holder.
    pub has_waited: bool,
}

/// Checks whether a lease still holds. It can be cloned for a thread that writes in the background.
#[derive(Debug, Clone)]
pub struct Fence {
    folder: PathBuf,
    phase: String,
    generation: u64,
}

impl Lease {
    /// Takes a phase. Waits as long as a living process holds it.
    ///
    /// # Errors
    /// [`Failure::Stopped`] if `stop` becomes true during the wait.
    pub fn take(run: &RunDir, phase: &str, stop: impl Fn() -> bool) -> Result<Lease> {
        let folder = run.file("leases");
        let holder = Holder::this_process();
        // The newest lease at the last look, and the number of looks since the lease last changed.
        let mut watched: Option<(u64, Option<Holder>)> = None;
        let mut unchanged_looks = 0;
        loop {
            let newest = newest(&folder, phase)?;
            let free =
                newest.as_ref().is_none_or(|(_, other)| other.as_ref().is_some_and(|other| holder.may_follow(other)));
            unchanged_looks = if newest == watched { unchanged_looks + 1 } else { 0 };
            let silent = newest.is_some() && unchanged_looks >= SILENT_LOOKS;
            if free || silent {
                let generation = newest.as_ref().map_or(0, |(generation, _)| *generation) + 1;
                let fence = Fence { folder: folder.clone(), phase: phase.into(), generation };
                if fence.create(&holder)? {
                    if silent {
                        log::warn!("{phase}: taken over from a holder that was silent for {SILENCE} s");
                    }
                    return Lease::renew(fence, holder, watched.is_some());
                }
            }
            if let (None, Some((_, other))) = (&watched, &newest) {
                let who = other.as_ref().map_or("another process".into(), Holder::name);
                log::warn!("{phase}: {who} is writing it; waiting until it is done, or silent for {SILENCE} s");
            }
            watched = newest.or(watched);
            if stop() {
                return Err(Failure::Stopped { phase: phase.into(), step: 0 }.into());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Takes a phase if no living process holds it. Returns none at once if a process does.
    pub fn take_if_free(run: &RunDir, phase: &str) -> Result<Option<Lease>> {
        let folder = run.file("leases");
        let holder = Holder::this_process();
        let newest = newest(&folder, phase)?;
        let is_free = newest.as_ref().is_none_or(|(_, other)| {
            other.as_ref().is_some_and(|other| holder.may_follow(other) || unix_time() - other.renewed > ABANDONED)
        });
        let generation = newest.map_or(0, |(generation, _)| generation) + 1;
        let fence = Fence { folder, phase: phase.into(), generation };
        match is_free && fence.create(&holder)? {
            true => Lease::renew(fence, holder, false).map(Some),
            false => Ok(None),
        }
    }

    /// Removes the files of earlier generations and starts the thread that renews the lease.
    fn renew(fence: Fence, holder: Holder, has_waited: bool) -> Result<Lease> {
        for (generation, path) in generations(&fence.folder, &fence.phase).unwrap_or_default() {
            if generation < fence.generation {
                let _ = fs::remove_file(path);
            }
        }
        let lost = Arc::new(AtomicBool::new(false));
        let (stop, stopped) = channel::<()>();
        let (own, mut renewed, flag) = (fence.clone(), holder.clone(), lost.clone());
        let thread = thread::start("lease", move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(RENEWAL) {
                // If the leases cannot be listed now, the thread tries again in a second. Only `Fence::check` needs an answer at
                // once.
                match own.follower() {
                    Ok(None) => {}
                    Ok(Some(_)) => {
                        flag.store(true, Ordering::Relaxed);
                        return;
                    }
                    Err(error) => {
                        log::warn!("{}: the lease cannot be renewed: {error:#}", own.phase);
                        continue;
                    }
                }
                renewed.renewed = unix_time();
                if let Err(error) = own.write(&renewed) {
                    log::warn!("{}: the lease cannot be renewed: {error:#}", own.phase);
                }
            }
        })?;
        Ok(Lease { fence, holder, lost, renewing: Some((stop, thread)), has_waited })
    }

    /// Whether the renewing thread has found that another process has taken the phase. Reads no file.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// The check that a writer must make right before it renames a file to its final name.
    pub fn fence(&self) -> &Fence {
        &self.fence
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.renewing.take() {
            drop(stop);
            let _ = thread.join();
        }
        if self.fence.check().is_ok() {
            let released = Holder { released: true, renewed: unix_time(), ..self.holder.clone() };
            let _ = self.fence.write(&released);
        }
    }
}

impl Fence {
    /// Fails if a higher generation holds the phase, or if the leases cannot be read.
    pub fn check(&self) -> Result<()> {
        match self.follower().with_context(|| format!("{}: this process stops without writing", self.phase))? {
            None => Ok(()),
            Some(who) => bail!("{}: {who} has taken it over; this process stops without writing", self.phase),
        }
    }

    /// The name of the process that holds the phase in a higher generation; none if there is no higher generation.
    fn follower(&self) -> Result<Option<String>> {
        let newest = newest(&self.folder, &self.phase)?;
        let higher = newest.filter(|(generation, _)| *generation > self.generation);
        Ok(higher.map(|(_, holder)| holder.as_ref().map_or("another process".into(), Holder::name)))
    }

    fn path(&self) -> PathBuf {
        self.folder.join(format!("{}.{:06}.json", self.phase, self.generation))
    }

    /// Creates the file of this generation. Returns false if another process was first.
    fn create(&self, holder: &Holder) -> Result<bool> {
        match File::options().write(true).create_new(true).open(self.path()) {
            Ok(mut file) => {
                file.write_all(&serde_json::to_vec(holder)?)
                    .with_context(|| format!("cannot write {}", self.path().display()))?;
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error).with_context(|| format!("cannot write {}", self.path().display())),
        }
    }

    /// Replaces the file of this generation. The file is not synced, because after a power cut no process holds a lease.
    fn write(&self, holder: &Holder) -> Result<()> {
        let beside = self.path().with_extension(format!("{}.partial", durable::unique()));
        let written = fs::write(&beside, serde_json::to_vec(holder)?).and_then(|()| fs::rename(&beside, self.path()));
        if written.is_err() {
            let _ = fs::remove_file(&beside);
        }
        Ok(written?)
    }
}

/// The process that the newest lease of a phase names, unless that process has released the phase.
pub fn holder(run: &RunDir, phase: &str) -> Option<Holder> {
    newest(&run.file("leases"), phase).ok()??.1.filter(|holder| !holder.released)
}

fn generations(folder: &Path, phase: &str) -> Result<Vec<(u64, PathBuf)>> {
    let generation = |path: &Path| -> Option<u64> {
        path.file_name()?.to_str()?.strip_prefix(phase)?.strip_prefix('.')?.strip_suffix(".json")?.parse().ok()
    };
    let mut found = Vec::new();
    let listing = || format!("cannot list the leases in {}", folder.display());
    for entry in fs::read_dir(folder).with_context(listing)? {
        let path = entry.with_context(listing)?.path();
        found.extend(generation(&path).map(|generation| (generation, path)));
    }
    Ok(found)
}

/// The highest generation and its holder. The holder is none if the file cannot be read, as while it is being created.
fn newest(folder: &Path, phase: &str) -> Result<Option<(u64, Option<Holder>)>> {
    let Some((generation, path)) = generations(folder, phase)?.into_iter().max() else { return Ok(None) };
    Ok(Some((generation, fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_dir() -> (tempfile::TempDir, RunDir) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("leases")).unwrap();
        let run = RunDir { path: folder.path().into() };
        (folder, run)
    }

    #[test]
    fn only_one_process_at_a_time_holds_a_phase() {
        let (_folder, run) = run_dir();
        let inside = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let lease = Lease::take(&run, "meta", || false).unwrap();
                    assert!(!inside.swap(true, Ordering::SeqCst), "two hold it");
                    std::thread::yield_now();
                    inside.store(false, Ordering::SeqCst);
                    drop(lease);
                });
            }
        });
        assert_eq!(
            fs::read_dir(run.file("leases")).unwrap().count(),
            1,
            "the files of earlier generations are removed"
        );
    }

    #[test]
    fn a_restarted_job_takes_its_phase_from_its_own_ghost_which_then_may_not_write() {
        let (_folder, run) = run_dir();
        let ghost = Lease::take(&run, "meta", || false).unwrap();
        let mut before = ghost.holder.clone();
        (before.job, before.machine) = (Some("17_2".into()), "another".into());
        let mut after = Holder { restarts: 1, machine: "here".into(), ..before.clone() };
        assert!(after.may_follow(&before));
        after.job = Some("18".into());
        assert!(!after.may_follow(&before), "another job waits");
        assert!(ghost.fence().check().is_ok());
        let fence = Fence { generation: 2, ..ghost.fence().clone() };
        assert!(fence.create(&after).unwrap() && !fence.create(&after).unwrap());
        let refused = ghost.fence().check().unwrap_err().to_string();
        assert!(refused.contains("job 18, process") && refused.contains("without writing"), "{refused}");
        drop(ghost);
        assert_eq!(newest(&run.file("leases"), "meta").unwrap().unwrap().0, 2, "the end of the ghost releases nothing");
    }

    #[test]
    fn a_lease_that_another_process_holds_is_not_waited_for_until_it_is_released_or_abandoned() {
        let (_folder, run) = run_dir();
        let first = Lease::take_if_free(&run, "preview").unwrap().expect("nobody holds it");
        assert!(Lease::take_if_free(&run, "preview").unwrap().is_none());
        let away = Holder { machine: "another".into(), renewed: unix_time() - 2.0 * ABANDONED, ..first.holder.clone() };
        drop(first);
        let second = Lease::take_if_free(&run, "preview").unwrap().expect("it was released");
        let fence = Fence { generation: 3, ..second.fence().clone() };
        fence.create(&away).unwrap();
        assert!(
            Lease::take_if_free(&run, "preview").unwrap().is_some(),
            "its holder has not renewed it for ten minutes"
        );
    }

    #[test]
    fn a_writer_that_cannot_read_the_leases_writes_nothing() {
        let (_folder, run) = run_dir();
        let lease = Lease::take(&run, "meta", || false).unwrap();
        fs::rename(run.file("leases"), run.file("away")).unwrap();
        let error = format!("{:#}", lease.fence().check().unwrap_err());
        assert!(error.contains("without writing") && error.contains("cannot list the leases"), "{error}");
        fs::rename(run.file("away"), run.file("leases")).unwrap();
        assert!(lease.fence().check().is_ok() && !lease.is_lost());
    }

    #[test]
    fn the_checkpoints_of_a_phase_that_another_process_holds_are_not_pruned() {
        let (_folder, run) = run_dir();
        fs::create_dir(run.file("checkpoints")).unwrap();
        let lease = Lease::take(&run, "meta", || false).unwrap();
        let half_written = run.file("checkpoints/.meta-0000000005.h5.partial-x");
        for path in [&half_written, &run.checkpoint("meta", 5), &run.checkpoint("meta", 10)] {
            fs::write(path, "").unwrap();
        }
        let other = Holder { pid: lease.holder.pid + 1, ..lease.holder.clone() };
        let fence = Fence { generation: 2, ..lease.fence().clone() };
        assert!(fence.create(&other).unwrap());
        run.prune_checkpoints("meta", 9, 1, Some(lease.fence()));
        assert!(half_written.exists() && run.checkpoints("meta").unwrap().len() == 2, "the ghost removes nothing");
        run.prune_checkpoints("meta", 9, 1, Some(&fence));
        assert!(!half_written.exists() && run.checkpoints("meta").unwrap().len() == 1);
    }

    #[test]
    fn waiting_ends_with_a_signal() {
        let (_folder, run) = run_dir();
        let _held = Lease::take(&run, "meta", || false).unwrap();
        let error = Lease::take(&run, "meta", || true).err().unwrap();
        assert!(Failure::is_stop(&error), "{error:#}");
    }
}
