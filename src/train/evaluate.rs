//! Top-1, top-5 and loss on the test images; every rank of a group takes a share.

use super::stop_requested;
use crate::collective::Collective;
use crate::config::Config;
use crate::data::Source;
use crate::data::feed::test_batches::{TestBatch, test_batches};
use crate::model::{Network, Tap};
use crate::require;
use crate::weights::upload;
use anyhow::Result;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// `top1` and `top5` in percent, `loss` (cross entropy), `images`; at most `batch` and 128 of them at a time, which `seen` is shown
/// with its logits (images, classes) in host memory. None if a signal asked one of the ranks to stop: an evaluation can take
/// longer than there is time left.
pub fn evaluate(
    network: &Network,
    source: &Source,
    config: &Config,
    batch: usize,
    group: &dyn Collective,
    seen: &mut dyn FnMut(&TestBatch, &Tensor),
) -> Result<Option<BTreeMap<String, f64>>> {
    let (images, device) = (source.test.len(), network.options().1);
    let (rank, size) = (group.rank(), group.size());
    let share = images * rank / size..images * (rank + 1) / size;
    // top-1, top-5, summed loss, images, and how many ranks were asked to stop
    let mut sums = [0.0; 5];
    tch::no_grad(|| -> Result<()> {
        for batch in test_batches(config, source, share, batch, device) {
            if stop_requested() {
                sums[4] = 1.0;
                break;
            }
            let batch = batch?;
            if batch.labels_b.numel() > 0 {
                let logits_bc =
                    network.forward(&upload(&batch.images_bchw, device), &[Tap::Head]).remove(0).to_device(Device::Cpu);
                add(&mut sums, &logits_bc, &batch.labels_b);
                seen(&batch, &logits_bc);
            }
        }
        Ok(())
    })?;
    group.all_reduce_f64(&mut sums)?;
    let [top1, top5, loss, images, stopping] = sums;
    if stopping > 0.0 {
        return Ok(None);
    }
    // Unreadable images are not counted.
    require!(images > 0.0, "none of the test images can be read; see the warnings above");
    let [top1, top5, loss] = [top1, top5, loss].map(|sum| sum / images);
    Ok(Some(BTreeMap::from([
        ("top1".into(), 100.0 * top1),
        ("top5".into(), 100.0 * top5),
        ("loss".into(), loss),
        ("images".into(), images),
    ])))
}

fn add(sums: &mut [f64; 5], logits_bc: &Tensor, labels_b: &Tensor) {
    let classes = logits_bc.size()[1];
    let (_, best_bk) = logits_bc.topk(classes.min(5), 1, true, true);
    let hits_bk = best_bk.eq_tensor(&labels_b.unsqueeze(1));
    sums[0] += hits_bk.select(1, 0).sum(Kind::Double).double_value(&[]);
    sums[1] += hits_bk.sum(Kind::Double).double_value(&[]);
    let log_probability = logits_bc.log_softmax(-1, Kind::Float).gather(1, &labels_b.unsqueeze(1), false);
    sums[2] -= log_probability.sum(Kind::Double).double_value(&[]);
    sums[3] += labels_b.numel() as f64;
}
