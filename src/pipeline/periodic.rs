//! Previews the network that the modules make together, every few epochs of the modules. Ranks that train no module at the moment
//! make the previews.

use super::Job;
use super::preview::preview_of;
use crate::device::memory;
use crate::run::table::MODULE;
use crate::stop::stop_requested;
use crate::store::lease::Lease;
use crate::store::previews::{Preview, Previewed};
use crate::task::Task;
use anyhow::Result;
use std::time::{Duration, Instant};

/// The number of test images of a preview.
const IMAGES: usize = 1000;
/// The interval at which a waiting rank looks for new checkpoints.
const LOOK: Duration = Duration::from_secs(1);
/// The name of the lease that keeps other ranks from making the same preview.
const LEASE: &str = "preview";

/// The previews that a run's key `run.preview_epochs` asks for. If a preview fails, the rank only warns and makes no more previews,
/// because the training does not need them.
pub struct PeriodicPreviews<'a> {
    job: &'a Job<'a>,
    /// The number of epochs between two previews; 0 if this rank makes no previews.
    epochs: u64,
    looked: Instant,
}

impl<'a> PeriodicPreviews<'a> {
    /// The previews of a rank. Only the first rank of a group, for which `is_first` is true, makes previews.
    pub fn new(job: &'a Job<'a>, is_first: bool) -> PeriodicPreviews<'a> {
        let epochs = if is_first { job.plan.config.run.preview_epochs } else { 0 };
        PeriodicPreviews { job, epochs, looked: Instant::now() }
    }

    /// Makes a preview if one is due. Looks for this at most once a second.
    pub fn look(&mut self) {
        if self.looked.elapsed() >= LOOK {
            self.preview_if_due();
            self.looked = Instant::now();
        }
    }

    /// Makes a preview if one is due.
    pub fn preview_if_due(&mut self) {
        if self.epochs == 0 || stop_requested() {
            return;
        }
        match self.preview() {
            Ok(Some(preview)) => log::info!("{}", self.line(&preview)),
            Ok(None) => {}
            Err(_) if stop_requested() => {}
            Err(error) => {
                log::warn!("there are no more previews of the assembly from this rank: {error:#}");
                self.epochs = 0;
            }
        }
    }

    /// The preview, if one is due and no other rank is making it.
    fn preview(&self) -> Result<Option<Preview>> {
        if !self.is_due()? {
            return Ok(None);
        }
        let Some(_lease) = Lease::take_if_free(&self.job.run, LEASE)? else { return Ok(None) };
        // Another rank may have made the preview just before this rank took the lease.
        if !self.is_due()? {
            return Ok(None);
        }
        let Job { plan, source, devices, .. } = self.job;
        memory::catch(|| preview_of(plan, source.clone(), IMAGES, devices.device(0))).map(Some)
    }

    /// Whether a module has trained [`PeriodicPreviews::epochs`] epochs since the newest preview, or has ended since then. After
    /// all modules have ended, no preview is due, because the assembly follows.
    fn is_due(&self) -> Result<bool> {
        let Job { plan, graph, run, .. } = self.job;
        let newest = run.newest_preview();
        let (mut is_due, mut are_all_done) = (false, true);
        for node in graph.nodes_of(&MODULE) {
            let phase = plan.phase_of(node).expect("the row trains modules");
            let is_done = run.file(&node.file).exists();
            let steps = match is_done {
                true => phase.steps,
                false => run.checkpoints(&node.name)?.first().map_or(0, |(step, _)| *step),
            };
            let previewed = newest.as_ref().and_then(|preview| preview.steps_of(&node.name)).unwrap_or(0);
            // If the module has taken fewer steps than the preview says, it is being trained anew.
            let since = if previewed <= steps { steps - previewed } else { steps };
            is_due |= since >= self.epochs * phase.steps_per_epoch || is_done && since > 0;
            are_all_done &= is_done;
        }
        Ok(is_due && !are_all_done)
    }

    /// The preview as a line for the log.
    fn line(&self, preview: &Preview) -> String {
        let headline = Task::of(&self.job.plan.config).headline();
        let of = |model: &Previewed| match model.steps {
            Some(_) => format!("{} {} (step {})", model.name, headline.number(model.value), model.progress()),
            None => format!("{} {}", model.name, headline.number(model.value)),
        };
        let models: Vec<String> = preview.models.iter().map(of).collect();
        format!("preview: {} on {} test images: {}", headline.title(), preview.images, models.join(", "))
    }
}
