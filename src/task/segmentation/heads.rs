//! UPerNet and the auxiliary FCN: their parameters and their forward passes. mmsegmentation's `UPerHead` and `FCNHead`, with its
//! names.

use super::Segmentation;
use super::norm::{BATCH_NORM_EPS, Cuts, Normed};
use crate::family::parameter::{Parameter, Role, Start};
use crate::model::{Network, Weight};
use anyhow::Result;
use std::cell::RefCell;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// The sizes to which the pyramid pooling module averages the coarsest map.
const POOLED: [i64; 4] = [1, 2, 3, 6];
const BATCH_NORM_MOMENTUM: f64 = 0.1;

/// A convolution without bias, BatchNorm and ReLU.
struct Unit {
    name: String,
    input: usize,
    output: usize,
    kernel: usize,
}

/// The units of both heads.
fn units(task: Segmentation) -> Vec<Unit> {
    let Segmentation { tokens, width, auxiliary_width, .. } = task;
    let unit = |name: String, input, output, kernel| Unit { name, input, output, kernel };
    let mut all = Vec::new();
    for i in 0..POOLED.len() {
        all.push(unit(format!("decode_head.psp_modules.{i}.1"), tokens.width, width, 1));
    }
    all.push(unit("decode_head.bottleneck".into(), tokens.width + POOLED.len() * width, width, 3));
    for i in 0..task.tapped.len() - 1 {
        all.push(unit(format!("decode_head.lateral_convs.{i}"), tokens.width, width, 1));
    }
    for i in 0..task.tapped.len() - 1 {
        all.push(unit(format!("decode_head.fpn_convs.{i}"), width, width, 3));
    }
    all.push(unit("decode_head.fpn_bottleneck".into(), task.tapped.len() * width, width, 3));
    if task.auxiliary_weight > 0.0 {
        all.push(unit("auxiliary_head.convs.0".into(), tokens.width, auxiliary_width, 3));
    }
    all
}

/// Each head's name, with the channels that its classifier reads.
fn heads(task: Segmentation) -> Vec<(&'static str, usize)> {
    let auxiliary = (task.auxiliary_weight > 0.0).then_some(("auxiliary_head", task.auxiliary_width));
    std::iter::once(("decode_head", task.width)).chain(auxiliary).collect()
}

/// The parameters and buffers of both heads, started as mmsegmentation starts them.
pub fn parameters(task: Segmentation, stage: usize) -> Vec<Parameter> {
    let mut all = Vec::new();
    let mut add = |name: String, shape: &[usize], start: Start, role: Role| {
        let shape = shape.iter().map(|&n| n as i64).collect();
        all.push(Parameter { stage, name, shape, start, role });
    };
    for Unit { name, input, output, kernel } in units(task) {
        let fan_out = Start::FanOut { fan_out: output * kernel * kernel };
        let buffer = Role::Buffer { momentum: BATCH_NORM_MOMENTUM };
        add(format!("{name}.conv.weight"), &[output, input, kernel, kernel], fan_out, Role::Decayed);
        add(format!("{name}.bn.weight"), &[output], Start::Ones, Role::Plain);
        add(format!("{name}.bn.bias"), &[output], Start::Zeros, Role::Plain);
        add(format!("{name}.bn.running_mean"), &[output], Start::Zeros, buffer);
        add(format!("{name}.bn.running_var"), &[output], Start::Ones, buffer);
    }
    for (head, width) in heads(task) {
        let start = Start::Deviation { deviation: 0.01 };
        add(format!("{head}.conv_seg.weight"), &[task.classes, width, 1, 1], start, Role::Decayed);
        add(format!("{head}.conv_seg.bias"), &[task.classes], Start::Zeros, Role::Plain);
    }
    all
}

/// Both heads with their parameters.
pub struct Heads<'a> {
    task: Segmentation,
    weights: BTreeMap<String, Weight>,
    /// The parameters as leaves of the graph in training, else as they are. BatchNorm's are fp32.
    values: BTreeMap<String, Tensor>,
    /// None in evaluation.
    training: Option<Training<'a>>,
    /// The means and variances that BatchNorm has computed in training, by the names of the buffers.
    statistics: RefCell<Vec<(String, Tensor)>>,
}

/// The input of a pass of training beside the maps.
pub struct Training<'a> {
    /// The factors (b, c, 1, 1) of the channels before the two classifiers.
    pub masks: [Tensor; 2],
    /// The cuts at norms over all replicas; none if norms are over the micro-batch.
    pub cuts: Option<Cuts<'a>>,
}

impl<'a> Heads<'a> {
    /// The heads for a pass of training, or for evaluation.
    pub fn new(task: Segmentation, network: &Network, training: Option<Training<'a>>) -> Heads<'a> {
        let stage = network.stages();
        let weight = |parameter: Parameter| {
            let exact = parameter.name.contains(".bn.");
            let weight = network.flat().get(stage, &parameter.name, exact);
            (parameter.name, weight.expect("the network was built with the task's parameters"))
        };
        let weights: BTreeMap<String, Weight> = parameters(task, stage).into_iter().map(weight).collect();
        let trains = |name: &str| training.is_some() && !is_buffer(name);
        let value =
            |(name, weight): (&String, &Weight)| (name.clone(), weight.value.detach().set_requires_grad(trains(name)));
        let values = weights.iter().map(value).collect();
        Heads { task, weights, values, training, statistics: RefCell::default() }
    }

    /// Differentiates what the loss has not reached because of cuts, and adds the gradients of all parameters to their sums.
    /// Collective over the group.
    pub fn backward(&self) -> Result<()> {
        let cuts = self.training.as_ref().and_then(|training| training.cuts.as_ref());
        cuts.map_or(Ok(()), |cuts| cuts.backward(&self.weights))?;
        for (name, weight) in self.weights.iter().filter(|(name, _)| !is_buffer(name)) {
            let gradient = self.values[name].grad();
            // The cuts have added the gradients of the norms' parameters.
            if gradient.defined() {
                weight.accumulate(|| gradient);
            }
        }
        Ok(())
    }

    /// Adds BatchNorm's statistics of a part of `samples` to the sums from which its buffers are moved.
    pub fn add_statistics(&self, samples: i64) {
        for (name, value) in self.statistics.borrow().iter() {
            self.weights[name].accumulate(|| value * samples);
        }
    }

    /// UPerNet's logits (b, c, row, column) in fp32, of the size of the finest of the maps (b, d, row, column).
    pub fn uper(&self, maps: &[Tensor]) -> Result<Tensor> {
        let unit = |name: &str, x: &Tensor| self.unit(&format!("decode_head.{name}"), x);
        let (coarsest, finer) = maps.split_last().expect("there are four maps");
        let mut pyramid = vec![coarsest.shallow_clone()];
        for (i, size) in POOLED.into_iter().enumerate() {
            let pooled = unit(&format!("psp_modules.{i}.1"), &coarsest.adaptive_avg_pool2d([size, size]))?;
            pyramid.push(resized_like(&pooled, coarsest));
        }
        let lateral = |(i, map): (usize, &Tensor)| unit(&format!("lateral_convs.{i}"), map);
        let mut laterals: Vec<Tensor> = finer.iter().enumerate().map(lateral).collect::<Result<_>>()?;
        laterals.push(unit("bottleneck", &Tensor::cat(&pyramid, 1))?);
        for i in (1..laterals.len()).rev() {
            laterals[i - 1] = &laterals[i - 1] + resized_like(&laterals[i], &laterals[i - 1]);
        }
        let last = laterals.len() - 1;
        let output = |(i, map): (usize, &Tensor)| match i {
            i if i < last => unit(&format!("fpn_convs.{i}"), map),
            _ => Ok(map.shallow_clone()),
        };
        let outputs: Vec<Tensor> = laterals.iter().enumerate().map(output).collect::<Result<_>>()?;
        let outputs: Vec<Tensor> = outputs.iter().map(|map| resized_like(map, &outputs[0])).collect();
        Ok(self.classify("decode_head", 0, unit("fpn_bottleneck", &Tensor::cat(&outputs, 1))?))
    }

    /// The FCN's logits (b, c, row, column) in fp32, of the coarsest map; none without an FCN.
    pub fn fcn(&self, maps: &[Tensor]) -> Result<Option<Tensor>> {
        let Some(coarsest) = maps.last().filter(|_| self.task.auxiliary_weight > 0.0) else { return Ok(None) };
        Ok(Some(self.classify("auxiliary_head", 1, self.unit("auxiliary_head.convs.0", coarsest)?)))
    }

    fn unit(&self, name: &str, x_bchw: &Tensor) -> Result<Tensor> {
        let weight = &self.values[&format!("{name}.conv.weight")];
        let padding = weight.size()[2] / 2;
        let x_bchw = x_bchw.conv2d(weight, None::<&Tensor>, [1, 1], [padding, padding], [1, 1], 1);
        Ok(self.norm(&format!("{name}.bn"), &x_bchw)?.relu())
    }

    fn norm(&self, name: &str, x_bchw: &Tensor) -> Result<Tensor> {
        let value = |part: &str| &self.values[&format!("{name}.{part}")];
        let [gamma, beta, mean, variance] = ["weight", "bias", "running_mean", "running_var"].map(value);
        let (output, mean, variance) = match &self.training {
            None => {
                let (mean, variance) = (Some(mean), Some(variance));
                return Ok(x_bchw.batch_norm(
                    Some(gamma),
                    Some(beta),
                    mean,
                    variance,
                    false,
                    0.0,
                    BATCH_NORM_EPS,
                    true,
                ));
            }
            Some(Training { cuts: Some(cuts), .. }) => {
                let Normed { output, mean, variance } = cuts.norm(name, x_bchw, [gamma, beta])?;
                (output, mean, variance)
            }
            Some(Training { cuts: None, .. }) => {
                // With a momentum of 1 these become the mean and the unbiased variance of this part of the batch.
                let (mean, variance) = (mean.zeros_like(), variance.zeros_like());
                let (of_mean, of_variance) = (Some(&mean), Some(&variance));
                let output =
                    x_bchw.batch_norm(Some(gamma), Some(beta), of_mean, of_variance, true, 1.0, BATCH_NORM_EPS, true);
                (output, mean, variance)
            }
        };
        let mut statistics = self.statistics.borrow_mut();
        statistics.push((format!("{name}.running_mean"), mean));
        statistics.push((format!("{name}.running_var"), variance));
        Ok(output)
    }

    fn classify(&self, head: &str, number: usize, x_bchw: Tensor) -> Tensor {
        let masks = self.training.as_ref().map(|training| &training.masks);
        let mask = masks.map(|masks| masks[number].to_kind(x_bchw.kind()));
        let x_bchw = mask.map_or(x_bchw.shallow_clone(), |mask| &x_bchw * mask);
        let value = |part: &str| &self.values[&format!("{head}.conv_seg.{part}")];
        let logits = x_bchw.conv2d(value("weight"), Some(value("bias")), [1, 1], [0, 0], [1, 1], 1);
        logits.to_kind(Kind::Float)
    }
}

fn is_buffer(name: &str) -> bool {
    name.contains(".running_")
}

/// The map interpolated to the rows and columns of another.
fn resized_like(map: &Tensor, other: &Tensor) -> Tensor {
    let to = [other.size()[2], other.size()[3]];
    if map.size()[2..] == to { map.shallow_clone() } else { map.upsample_bilinear2d(to, false, None, None) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::task;
    use super::*;

    #[test]
    fn the_heads_have_the_parameters_of_mmsegmentations() {
        let count = |sets: &[&str], head: &str| -> usize {
            let all = parameters(task(sets), 4);
            all.iter().filter(|p| p.is_trainable() && p.name.starts_with(head)).map(Parameter::count).sum()
        };
        // UPerHead and FCNHead of mmsegmentation 1.2.2 for ViT-B and ViT-L.
        let large = ["model.width=1024", "model.heads=16"];
        assert_eq!([count(&[], "decode_head"), count(&[], "auxiliary_head")], [32_332_950, 1_808_534]);
        assert_eq!([count(&large, "decode_head"), count(&large, "auxiliary_head")], [34_430_102, 2_398_358]);
        assert_eq!(count(&["segmentation.width=768"], "decode_head"), 67_963_542);
        assert_eq!(count(&["segmentation.auxiliary_weight=0.0"], "auxiliary_head"), 0);
    }
}
