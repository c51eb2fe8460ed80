//! Top-1, top-5 and loss on the test images; every rank of a group takes a share.

use crate::collective::Collective;
use crate::config::Config;
use crate::data::Source;
use crate::data::augment::Transform;
use crate::data::loader::test_batch;
use crate::model::Network;
use anyhow::Result;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// `top1` and `top5` in percent, `loss` (cross entropy), `images`.
pub fn evaluate(
    network: &Network,
    source: &Source,
    config: &Config,
    group: &dyn Collective,
) -> Result<BTreeMap<String, f64>> {
    let images = &source.test;
    let transform = Transform::evaluation(config);
    let (rank, size) = (group.rank(), group.size());
    let share = images.len() * rank / size..images.len() * (rank + 1) / size;
    // top-1, top-5, summed loss
    let mut sums = [0.0; 3];
    tch::no_grad(|| {
        // Twice the training's micro-batch fits, as no activations are kept.
        for start in share.clone().step_by(2 * config.run.micro_batch) {
            let range = start..(start + 2 * config.run.micro_batch).min(share.end);
            let (images_bchw, labels_b) = test_batch(images, &transform, range);
            add(&mut sums, &network.forward(&images_bchw, None), &labels_b);
        }
    });
    group.all_reduce_f64(&mut sums)?;
    let [top1, top5, loss] = sums.map(|sum| sum / images.len() as f64);
    Ok(BTreeMap::from([
        ("top1".into(), 100.0 * top1),
        ("top5".into(), 100.0 * top5),
        ("loss".into(), loss),
        ("images".into(), images.len() as f64),
    ]))
}

fn add(sums: &mut [f64; 3], logits_bc: &Tensor, labels_b: &Tensor) {
    let classes = logits_bc.size()[1];
    let (_, best_bk) = logits_bc.topk(classes.min(5), 1, true, true);
    let hits_bk = best_bk.eq_tensor(&labels_b.unsqueeze(1));
    sums[0] += hits_bk.select(1, 0).sum(Kind::Double).double_value(&[]);
    sums[1] += hits_bk.sum(Kind::Double).double_value(&[]);
    let log_probability = logits_bc.log_softmax(-1, Kind::Float).gather(1, &labels_b.unsqueeze(1), false);
    sums[2] -= log_probability.sum(Kind::Double).double_value(&[]);
}
