//! Estimates the running statistics of BatchNorm anew. A module has trained among the thin stages of the meta model. So its running
//! statistics describe its hybrid, not the assembled target.

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

/// Returns the weights of a network with new statistics in its buffers. They are the means over batches of at most `images`
/// training images in all. Each batch goes through the network as in training, but without random transforms of the images. The
/// batches are the same in every run of a config. Returns none if a signal asked this process to stop.
pub fn estimated_anew(
    (config, source, device): (&Config, &Source, Device),
    depths: &[usize],
    weights: &Weights,
    images: usize,
) -> Result<Option<Weights>> {
    let mut network = Network::new(config, depths, 0..depths.len(), &[], &on_device(weights, device))?;
    let source = Source { test: sample(&source.train, images, config.run.seed), ..source.clone() };
    let (images, micro_batch) = (source.test.len(), config.run.micro_batch.samples().max(2));
    let feed = Feed::of_replica(config, &source, 1);
    let mut seen = 0;
    let handover = Handover::new(Staging::new(device, Default::default()), true);
    for batch in test_batches(config, feed, 0..images, micro_batch, handover)? {
        if stop_requested() {
            return Ok(None);
        }
        let [images] = &batch?.images[..] else { unreachable!("images without label maps have one scale") };
        // A batch of one image is skipped. If its map had a single pixel, the unbiased variance would not be defined.
        if images.count() > 1 {
            network.gather_statistics(&images.on(device));
            seen += images.count();
        }
    }
    network.flat_mut().set_buffers(seen as f64);
    let flat = network.flat();
    Ok(Some(flat.layout().named(&flat.buffer().to_device(Device::Cpu))))
}
