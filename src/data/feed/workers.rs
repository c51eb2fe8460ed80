//! Decides the number of worker threads, which changes the speed and the memory, but no result.

use crate::config::Config;
use crate::data::source::Source;
use crate::launcher::cores_of_this_rank;

/// The images of a config, and the number of threads that read them for one replica.
#[derive(Clone, Copy)]
pub struct Feed<'a> {
    pub source: &'a Source,
    pub workers: usize,
}

impl<'a> Feed<'a> {
    /// The feed of each of this rank's `replicas`, which share its cores.
    pub fn of_replica(config: &Config, source: &'a Source, replicas: usize) -> Feed<'a> {
        Feed { source, workers: workers(config, cores_of_this_rank(), replicas) }
    }
}

/// The number of workers of each of the `replicas` replicas that share `cores` cores. It is `run.workers` or, if that is 0, an
/// equal part of the cores that the replicas leave free.
pub fn workers(config: &Config, cores: usize, replicas: usize) -> usize {
    match config.run.workers {
        // A replica needs a core for itself, and at least one worker.
        0 => (cores.saturating_sub(replicas) / replicas.max(1)).max(1),
        workers => workers,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_core_that_the_replicas_leave_works_on_data_unless_the_config_says_otherwise() {
        let config = |workers: usize| Config::parse("", &[format!("run.workers={workers}")]).unwrap();
        let automatic = |(cores, replicas)| workers(&config(0), cores, replicas);
        assert_eq!([(1, 1), (2, 1), (64, 8), (70, 8), (4, 8)].map(automatic), [1, 1, 7, 7, 1]);
        assert_eq!(workers(&config(5), 64, 8), 5);
    }
}
