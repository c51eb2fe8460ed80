//! `ledger/{phase}.jsonl`: the work of each start of a phase, as one JSON object on each line. Lines are only ever added.
//!
//! A start adds its own line when it finishes the phase or is stopped by a signal. If it failed or was killed, the next start adds
//! the line from the last heartbeat, which may lack the last steps. If a later start repeats steps, they count again.

use super::progress::Progress;
use super::run_dir::RunDir;
use crate::plan::cost::sample_flops;
use crate::plan::{PhasePlan, Plan};
use crate::run::start::Start;
use crate::run::state::Activity;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

/// The sums over all starts of a phase. The starts may have had different numbers of replicas.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Total {
    /// Training images that passed through the network. An image counts each time that it passes.
    pub images: u64,
    pub flops: f64,
    pub seconds: f64,
    pub device_hours: f64,
    pub starts: usize,
}

/// One record for all starts of a phase by a version of incubate that kept no ledger, made from the last heartbeat.
fn of_earlier_version(plan: &Plan, phase: &PhasePlan, progress: &Progress) -> Start {
    let mut start = Start {
        began: "before there was a ledger".into(),
        end: None,
        ranks: progress.replicas,
        replicas: progress.replicas,
        precision: plan.config.run.precision,
        from: 0,
        to: 0,
        images: 0,
        flops: 0.0,
        seconds: 0.0,
        device_seconds: 0.0,
        host: progress.host.clone(),
        job: progress.job.clone(),
        spent: Default::default(),
        peak: Default::default(),
    };
    let flops_per_image = sample_flops(plan, phase);
    start.count(progress.step, phase.training.global_batch, flops_per_image, progress.seconds);
    start
}

impl RunDir {
    /// The starts of a phase in order. The newest comes from the heartbeat if it has no line yet. Incomplete lines are skipped.
    pub fn starts(&self, plan: &Plan, phase: &PhasePlan) -> Vec<Start> {
        let mut starts = self.entered(&phase.name);
        // If the total number of steps in a heartbeat is 0, the training has not begun, for example because the phase failed
        // before.
        if let Some(progress) = Progress::read(&self.path, &phase.name).filter(|progress| progress.steps > 0) {
            let newest = progress.start.clone();
            let newest = newest.unwrap_or_else(|| of_earlier_version(plan, phase, &progress));
            if starts.iter().all(|start| start.began != newest.began) {
                let end = Some(progress.state).filter(|state| *state != Activity::Running);
                starts.push(Start { end, ..newest });
            }
        }
        starts
    }

    /// The sums over all starts of a phase.
    pub fn total(&self, plan: &Plan, phase: &PhasePlan) -> Total {
        self.starts(plan, phase).iter().fold(Total::default(), |sum, start| Total {
            starts: sum.starts + 1,
            images: sum.images + start.images,
            flops: sum.flops + start.flops,
            seconds: sum.seconds + start.seconds,
            device_hours: sum.device_hours + start.device_seconds / 3600.0,
        })
    }

    /// Adds the line of a start, unless the ledger has it already. Only the writer of the phase may call this function.
    pub fn enter(&self, phase: &str, start: &Start) -> Result<()> {
        if self.entered(phase).iter().any(|entered| entered.began == start.began) {
            return Ok(());
        }
        let path = self.ledger(phase);
        let mut line = serde_json::to_vec(start)?;
        line.push(b'\n');
        if fs::read(&path).is_ok_and(|bytes| bytes.last().is_some_and(|&byte| byte != b'\n')) {
            // The last line is incomplete, for example because the disk was full.
            line.insert(0, b'\n');
        }
        fs::create_dir_all(self.file(FOLDER))
            .and_then(|()| OpenOptions::new().append(true).create(true).open(&path))
            .and_then(|mut file| file.write_all(&line).and_then(|()| file.sync_all()))
            .with_context(|| format!("{}: a start cannot be recorded", path.display()))
    }

    /// The starts in the ledger. Incomplete lines are skipped.
    fn entered(&self, phase: &str) -> Vec<Start> {
        let bytes = fs::read(self.ledger(phase)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    fn ledger(&self, phase: &str) -> PathBuf {
        self.file(FOLDER).join(format!("{phase}.jsonl"))
    }
}

const FOLDER: &str = "ledger";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::run::table::META;
    use crate::store::process::unix_time;

    #[test]
    fn starts_add_up_whatever_their_worlds_and_however_they_ended() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir { path: folder.path().into() };
        fs::create_dir(run.file("progress")).unwrap();
        let plan = Plan::new(Config::parse("", &[]).unwrap(), 10_000).unwrap();
        let phase = plan.phase(&META, None);
        assert_eq!(run.total(&plan, &phase), Total::default());
        // A version without a ledger has left this heartbeat.
        let heartbeat = Progress { step: 7, steps: 90, seconds: 10.0, replicas: 2, ..Progress::begun("meta") };
        heartbeat.write(&run.path).unwrap();
        let old = run.starts(&plan, &phase);
        assert_eq!((old.len(), old[0].to, old[0].device_seconds), (1, 7, 20.0));
        run.enter("meta", &old[0]).unwrap();
        run.enter("meta", &old[0]).unwrap();
        // The next start was killed, and then a full disk left an incomplete line. After that, one start was stopped, and the last
        // start runs.
        let start = |began: &str, from, to, replicas| {
            let mut start = Start { began: began.into(), from, replicas, ..old[0].clone() };
            start.count(to, 2048, 2.0, 5.0);
            start
        };
        run.enter("meta", &start("killed", 5, 9, 4)).unwrap();
        fs::write(run.ledger("meta"), [&fs::read(run.ledger("meta")).unwrap()[..], b"{\"began\": \"to"].concat())
            .unwrap();
        run.enter("meta", &start("stopped", 9, 10, 1)).unwrap();
        let running = Some(start("running", 10, 12, 1));
        Progress { start: running, updated: unix_time(), ..heartbeat }.write(&run.path).unwrap();
        let began: Vec<String> = run.starts(&plan, &phase).into_iter().map(|start| start.began).collect();
        assert_eq!(began[1..], ["killed", "stopped", "running"]);
        let total = run.total(&plan, &phase);
        assert_eq!((total.starts, total.images, total.seconds), (4, 2048 * (7 + 4 + 1 + 2), 25.0));
        assert!((total.device_hours * 3600.0 - (20.0 + 20.0 + 5.0 + 5.0)).abs() < 1e-9);
    }
}
