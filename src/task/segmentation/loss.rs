//! The loss of a part of a batch: the cross entropy of UPerNet's logits plus the weighted cross entropy of the FCN's logits. Both
//! kinds of logits are interpolated to the size of the crop.

use super::heads::Training;
use super::norm::Cuts;
use super::{Heads, IGNORED, Loss, NormOver, Part, PixelMean, Segmentation};
use crate::model::Network;
use crate::random::Random;
use crate::weights::upload;
use anyhow::Result;
use tch::{Device, Kind, Reduction, Tensor};

/// The most numbers of interpolated logits that exist at a time, if a single sample does not have more: 256 MiB in fp32.
const MOST_LOGITS: i64 = 1 << 26;

pub fn loss(task: Segmentation, network: &Network, outputs: &[Tensor], targets: &Tensor, part: &Part) -> Result<Loss> {
    // A single replica needs no cuts. With `NormOver::Step`, its only micro-batch holds all samples of the step.
    let is_cut = task.norm_over == NormOver::Step && part.group.size() > 1;
    let masks = masks(task, part, network.options().1);
    let heads = Heads::new(task, network, Some(Training { masks, cuts: is_cut.then(|| Cuts::new(part.group)) }));
    let taps: Vec<Tensor> = outputs.iter().map(|tokens| tokens.detach().set_requires_grad(true)).collect();
    let side = task.architecture.crop as i64;
    let (logits, auxiliary) = tch::with_grad(|| {
        let maps: Vec<Tensor> = taps.iter().map(|tokens| task.map(tokens, [side, side])).collect();
        let maps = heads.neck(maps)?;
        anyhow::Ok((heads.uper(&maps)?, heads.fcn(&maps)?))
    })?;
    let b = targets.size()[0];
    let pixels = match task.mean {
        PixelMean::All => Tensor::full([], (b * side * side) as f64, (Kind::Float, targets.device())),
        PixelMean::Labelled => targets.not_equal(i64::from(IGNORED)).sum(Kind::Float).clamp_min(1.0),
    };
    // The part contributes its mean over pixels by its share of the global batch's samples.
    let scale = (b as f64 / part.global_batch) / pixels;
    let (mut sum, gradient) = cross_entropy(&logits, targets, side);
    let mut weighted = tch::with_grad(|| (&logits * gradient * &scale).sum(Kind::Float));
    if let Some(logits) = auxiliary {
        let (of_fcn, gradient) = cross_entropy(&logits, targets, side);
        sum += of_fcn * task.auxiliary_weight;
        let scale = &scale * task.auxiliary_weight;
        weighted = tch::with_grad(|| weighted + (&logits * gradient * scale).sum(Kind::Float));
    }
    weighted.backward();
    heads.backward()?;
    heads.add_statistics(b);
    Ok(Loss { sum: sum * scale, gradients: taps.iter().map(Tensor::grad).collect() })
}

/// The dropout factors (b, c, 1, 1) before the classifiers of UPerNet and of the FCN. A channel's factor is 0 or 1 / keep
/// probability.
pub(super) fn masks(task: Segmentation, part: &Part, device: Device) -> [Tensor; 2] {
    let keep = 1.0 - task.dropout;
    let mut number = 0;
    [task.architecture.width, task.architecture.auxiliary_width].map(|channels| {
        number += 1;
        let mut factors = Vec::with_capacity(part.positions.len() * channels);
        for position in part.positions.clone() {
            let mut random = Random::new(&[part.seed, HEAD_DROPOUT, part.step, position as u64, number]);
            let factor = || if random.uniform() < keep { (1.0 / keep) as f32 } else { 0.0 };
            factors.extend(std::iter::repeat_with(factor).take(channels));
        }
        let mask = Tensor::from_slice(&factors).view([part.positions.len() as i64, channels as i64, 1, 1]);
        upload(&mask, device)
    })
}

/// The number in random keys that belongs to the dropout before the classifiers.
const HEAD_DROPOUT: u64 = 7;

/// The sum of the cross entropy over all pixels with a class, and the gradient of this sum with respect to the logits (b, c, row,
/// column). The logits are first interpolated to the size of the targets (b, side, side). To save memory, some of the samples are
/// interpolated at a time.
pub(super) fn cross_entropy(logits_bchw: &Tensor, targets_bhw: &Tensor, side: i64) -> (Tensor, Tensor) {
    let (b, c, ..) = logits_bchw.size4().expect("logits are (b, c, h, w)");
    let each = (MOST_LOGITS / (c * side * side)).clamp(1, b);
    let mut sum = Tensor::zeros([], (Kind::Float, logits_bchw.device()));
    let slice = |start: i64| {
        let length = each.min(b - start);
        let logits = logits_bchw.narrow(0, start, length).detach().set_requires_grad(true);
        let targets = targets_bhw.narrow(0, start, length).to_kind(Kind::Int64);
        let loss = tch::with_grad(|| {
            let large = logits.upsample_bilinear2d([side, side], false, None, None);
            large.cross_entropy_loss::<Tensor>(&targets, None, Reduction::Sum, IGNORED.into(), 0.0)
        });
        let gradient = Tensor::run_backward(&[&loss], &[&logits], false, false).swap_remove(0);
        sum += loss.detach();
        gradient
    };
    let gradients: Vec<Tensor> = (0..b).step_by(each as usize).map(slice).collect();
    (sum, Tensor::cat(&gradients, 0))
}
