//! Evaluates a network on the test images. Every member of a group evaluates its share of the images.

use crate::collective::Collective;
use crate::config::Config;
use crate::data::feed::Feed;
use crate::data::feed::images::Handover;
use crate::data::feed::test_batches::{TestBatch, test_batches};
use crate::model::Network;
use crate::require;
use crate::stop::stop_requested;
use crate::task::{ClassFigures, Task};
use crate::weights::Staging;
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use tch::Tensor;

/// The key of the number of evaluated images, which is returned with the task's metrics.
pub const IMAGES: &str = "images";

/// The results of an evaluation, which are serialised as one map.
#[derive(Debug, Serialize)]
pub struct Evaluation {
    /// The task's metrics and [`IMAGES`].
    #[serde(flatten)]
    pub metrics: BTreeMap<String, f64>,
    /// The figures of each class, if the task has such figures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassFigures>,
}

/// Evaluates a network. Batches have at most `batch` and at most 128 images. Calls `see` with each batch that has readable
/// images, in host memory, and with the task's outputs for this batch. Returns none if a signal asked one of the ranks to stop
/// before its last batch, because an evaluation can take longer than the time that is left. Collective over the group.
pub fn evaluate(
    network: &Network,
    feed: Feed,
    config: &Config,
    batch: usize,
    group: &dyn Collective,
    see: &mut dyn FnMut(&TestBatch, &[Tensor]),
) -> Result<Option<Evaluation>> {
    let task = Task::of(config);
    let (images, device) = (feed.source.test.len(), network.options().1);
    let (rank, size) = (group.rank(), group.size());
    let names = feed.source.test.classes().to_vec();
    let share = images * rank / size..images * (rank + 1) / size;
    let mut sums = task.sums();
    let (mut images, mut ranks_that_stop) = (0.0, 0.0);
    tch::no_grad(|| -> Result<()> {
        let handover = Handover::new(Staging::new(device, group.pinning()), true);
        for batch in test_batches(config, feed, share, batch, handover)? {
            if stop_requested() {
                ranks_that_stop = 1.0;
                break;
            }
            let batch = batch?;
            let readable = batch.images[0].count();
            if readable > 0 {
                let uploaded: Vec<Tensor> = batch.images.iter().map(|images| images.on(device)).collect();
                let outputs = task.infer(network, &uploaded, &batch.labels)?;
                task.add(&mut sums, &outputs, &batch.labels);
                images += readable as f64;
                see(&batch, &outputs);
            }
        }
        Ok(())
    })?;
    let mut counts = [images, ranks_that_stop];
    group.all_reduce_f64(&mut counts)?;
    let [images, ranks_that_stop] = counts;
    if ranks_that_stop > 0.0 {
        return Ok(None);
    }
    // Here `images` is the number of readable images in all shares.
    require!(images > 0.0, "none of the test images can be read; see the warnings above");
    let sums = if task.joins_sums() { joined(sums, group)? } else { added(sums, group)? };
    let (mut metrics, classes) = task.figures(&sums, images, config, &names);
    metrics.insert(IMAGES.into(), images);
    Ok(Some(Evaluation { metrics, classes }))
}

/// The sums over all members of the group.
fn added(mut sums: Vec<f64>, group: &dyn Collective) -> Result<Vec<f64>> {
    group.all_reduce_f64(&mut sums)?;
    Ok(sums)
}

/// The numbers of all members of the group, in the order of the members.
fn joined(own: Vec<f64>, group: &dyn Collective) -> Result<Vec<f64>> {
    let mut lengths = vec![0.0; group.size()];
    lengths[group.rank()] = own.len() as f64;
    group.all_reduce_f64(&mut lengths)?;
    let start: f64 = lengths[..group.rank()].iter().sum();
    let mut all = vec![0.0; lengths.iter().sum::<f64>() as usize];
    all[start as usize..][..own.len()].copy_from_slice(&own);
    added(all, group)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Solo;
    use crate::collective::replicas::on_replicas;

    #[test]
    fn lists_of_any_lengths_are_joined_in_the_order_of_the_members() {
        let own = |rank: usize| (0..[2, 0, 3][rank]).map(|number| (10 * rank + number) as f64).collect::<Vec<_>>();
        on_replicas(&Solo, 3, false, &|replica| {
            assert_eq!(joined(own(replica.local), replica)?, [0.0, 1.0, 20.0, 21.0, 22.0]);
            Ok(())
        })
        .unwrap();
        assert_eq!(joined(own(2), &Solo).unwrap(), own(2));
    }
}
