//! Estimates running statistics anew. A module has trained behind the thin stages of the meta model, and its running statistics are
//! those of that network, not of the assembled target.

use super::Job;
use crate::data::feed::Feed;
use crate::data::feed::test_batches::test_batches;
use crate::data::source::Source;
use crate::data::source::samples::sample;
use crate::error::Failure;
use crate::model::Network;
use crate::run::graph::Node;
use crate::stop::stop_requested;
use crate::weights::{Staging, Weights, on_device, upload};
use anyhow::Result;
use tch::Device;

/// At most so many training images, whose mean statistics a buffer takes.
const IMAGES: usize = 20 * 1024;

/// The weights of the target, with the mean statistics of batches of training images in its buffers. The images have no random
/// transform. Each batch goes through the network as in training. The batches are the same in every run of a config.
pub fn estimated_anew(job: &Job, node: &Node, weights: Weights) -> Result<Weights> {
    let config = &job.plan.config;
    let (device, depths) = (job.devices.device(0), config.model.depths());
    let mut network = Network::new(config, depths, 0..depths.len(), &[], &on_device(&weights, device))?;
    let source = Source { test: sample(&job.source.train, IMAGES, config.run.seed), ..job.source.clone() };
    let (images, micro_batch) = (source.test.len(), config.run.micro_batch.samples());
    let feed = Feed::of_replica(config, &source, 1);
    let mut seen = 0;
    for batch in test_batches(config, feed, 0..images, micro_batch, Staging::new(device, Default::default()))? {
        if stop_requested() {
            return Err(Failure::Stopped { phase: node.name.clone(), step: 0 }.into());
        }
        let images_bchw = batch?.images_bchw;
        // The variance of a single image would not be defined.
        if images_bchw.size()[0] > 1 {
            network.gather_statistics(&upload(&images_bchw, device));
            seen += images_bchw.size()[0];
        }
    }
    network.flat_mut().set_buffers(seen as f64);
    let flat = network.flat();
    Ok(flat.layout().named(&flat.buffer().to_device(Device::Cpu)))
}
