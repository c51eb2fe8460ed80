//! Estimates running statistics anew. A module has trained behind the thin stages of the meta model, and its running statistics are
//! those of that network, not of the assembled target.

use crate::config::Config;
use crate::data::feed::Feed;
use crate::data::feed::images::Handover;
use crate::data::feed::test_batches::test_batches;
use crate::data::source::Source;
use crate::data::source::samples::sample;
use crate::model::Network;
use crate::stop::stop_requested;
use crate::weights::{Staging, Weights, on_device};
use anyhow::Result;
use tch::Device;

/// Returns the weights of a network with new statistics in its buffers: the means over batches of training images, of which there are at
/// most `images`. Each batch goes through the network as in training, but the images have no random transform. The batches are the same
/// in every run of a config. Returns none if a signal asked this process to stop.
pub fn estimated_anew(
    (config, source, device): (&Config, &Source, Device),
    depths: &[usize],
    weights: &Weights,
    images: usize,
) -> Result<Option<Weights>> {
    let mut network = Network::new(config, depths, 0..depths.len(), &[], &on_device(weights, device))?;
    let source = Source { test: sample(&source.train, images, config.run.seed), ..source.clone() };
    let (images, micro_batch) = (source.test.len(), config.run.micro_batch.samples());
    let feed = Feed::of_replica(config, &source, 1);
    let mut seen = 0;
    let handover = Handover::new(Staging::new(device, Default::default()), true);
    for batch in test_batches(config, feed, 0..images, micro_batch, handover)? {
        if stop_requested() {
            return Ok(None);
        }
        let [images] = &batch?.images[..] else { unreachable!("images without label maps have one scale") };
        // The variance of a single image would not be defined.
        if images.count() > 1 {
            network.gather_statistics(&images.on(device));
            seen += images.count();
        }
    }
    network.flat_mut().set_buffers(seen as f64);
    let flat = network.flat();
    Ok(Some(flat.layout().named(&flat.buffer().to_device(Device::Cpu))))
}
