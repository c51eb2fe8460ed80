//! The forward passes of UPerNet and the auxiliary FCN: mmsegmentation's `UPerHead` and `FCNHead`.

use super::Segmentation;
use super::norm::{BATCH_NORM_EPS, Cuts, Normed};
use crate::family::parameter::Parameter;
use crate::model::{Network, Weight};
use crate::plan::segmentation::POOLED;
use anyhow::Result;
use std::cell::RefCell;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// The neck and both heads with their parameters.
pub struct Heads<'a> {
    pub(super) task: Segmentation,
    weights: BTreeMap<String, Weight>,
    /// The parameters and buffers. In training the parameters are leaves of autograd's graph. The values of BatchNorm are fp32.
    values: BTreeMap<String, Tensor>,
    /// The additional inputs of a training pass. None in evaluation.
    pub(super) training: Option<Training<'a>>,
    /// The means and variances of the batch that BatchNorm has computed in training. Each has the name of the buffer that holds its
    /// running average.
    statistics: RefCell<Vec<(String, Tensor)>>,
}

/// The inputs of a training pass besides the maps.
pub struct Training<'a> {
    /// The dropout factors (b, c, 1, 1) of the channels before the classifiers of UPerNet and of the FCN.
    pub masks: [Tensor; 2],
    /// The cuts of autograd's graph at norms over all replicas; none if norms are over the micro-batch.
    pub cuts: Option<Cuts<'a>>,
}

impl<'a> Heads<'a> {
    /// The neck and the heads for a training pass or, if `training` is none, for evaluation.
    pub fn new(task: Segmentation, network: &Network, training: Option<Training<'a>>) -> Heads<'a> {
        let stage = network.stages();
        let all = task.architecture.parameters(stage);
        let norm_of = |parameter: &Parameter| parameter.name.strip_suffix("running_var").map(str::to_string);
        let norms: Vec<String> = all.iter().filter_map(norm_of).collect();
        let weight = |parameter: Parameter| {
            let exact = norms.iter().any(|norm| parameter.name.starts_with(norm));
            let weight = network.flat().get(stage, &parameter.name, exact);
            (parameter.name, weight.expect("the network was built with the task's parameters"))
        };
        let weights: BTreeMap<String, Weight> = all.into_iter().map(weight).collect();
        let trains = |name: &str| training.is_some() && !is_buffer(name);
        let value =
            |(name, weight): (&String, &Weight)| (name.clone(), weight.value.detach().set_requires_grad(trains(name)));
        let values = weights.iter().map(value).collect();
        Heads { task, weights, values, training, statistics: RefCell::default() }
    }

    /// Runs the backward pass from the last cut to the taps, if there are cuts. The backward pass of the loss has stopped at the
    /// last cut of each head. Then adds the gradient of each parameter to the parameter's sum in the flat buffer. Collective over
    /// the group.
    pub fn backward(&self) -> Result<()> {
        let cuts = self.training.as_ref().and_then(|training| training.cuts.as_ref());
        cuts.map_or(Ok(()), |cuts| cuts.backward(&self.weights))?;
        for (name, weight) in self.weights.iter().filter(|(name, _)| !is_buffer(name)) {
            let gradient = self.values[name].grad();
            // A norm's parameters have no gradient here if there are cuts, because [`Cuts::backward`] has added it already.
            if gradient.defined() {
                weight.accumulate(|| gradient);
            }
        }
        Ok(())
    }

    /// Adds BatchNorm's statistics, multiplied by the number of samples of this part, to their sums in the flat buffer. At the
    /// end of the step, BatchNorm's buffers move towards the mean of these statistics over the global batch.
    pub fn add_statistics(&self, samples: i64) {
        for (name, value) in self.statistics.borrow().iter() {
            self.weights[name].accumulate(|| value * samples);
        }
    }

    /// UPerNet's logits (b, c, row, column) in fp32, with the rows and columns of the finest map. The finest of the `maps` (b, d,
    /// row, column) comes first.
    pub fn uper(&self, maps: &[Tensor]) -> Result<Tensor> {
        let unit = |name: &str, x: &Tensor| self.unit(&format!("decode_head.{name}"), x);
        let (coarsest, finer) = maps.split_last().expect("there are four maps");
        let mut pyramid = vec![coarsest.shallow_clone()];
        for (i, size) in POOLED.into_iter().enumerate() {
            let pooled = unit(&format!("psp_modules.{i}.1"), &coarsest.adaptive_avg_pool2d([size as i64; 2]))?;
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

    /// The FCN's logits (b, c, row, column) in fp32, with the rows and columns of the map that the FCN reads. None if there is no
    /// FCN.
    pub fn fcn(&self, maps: &[Tensor]) -> Result<Option<Tensor>> {
        let architecture = self.task.architecture;
        if !architecture.has_auxiliary {
            return Ok(None);
        }
        let map = &maps[architecture.auxiliary_level()];
        Ok(Some(self.classify("auxiliary_head", 1, self.unit("auxiliary_head.convs.0", map)?)))
    }

    /// A convolution without bias, followed by BatchNorm and ReLU.
    fn unit(&self, name: &str, x_bchw: &Tensor) -> Result<Tensor> {
        let weight = &self.values[&format!("{name}.conv.weight")];
        let padding = weight.size()[2] / 2;
        let x_bchw = x_bchw.conv2d(weight, None::<&Tensor>, [1, 1], [padding, padding], [1, 1], 1);
        Ok(self.norm(&format!("{name}.bn"), &x_bchw)?.relu())
    }

    pub(super) fn norm(&self, name: &str, x_bchw: &Tensor) -> Result<Tensor> {
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
                // With a momentum of 1 these tensors become the mean and the unbiased variance of this part of the batch.
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

    /// The logits of a head: the output of its classifier. In training, the mask of this number drops channels before the
    /// classifier.
    fn classify(&self, head: &str, number: usize, x_bchw: Tensor) -> Tensor {
        let masks = self.training.as_ref().map(|training| &training.masks);
        let mask = masks.map(|masks| masks[number].to_kind(x_bchw.kind()));
        let x_bchw = mask.map_or(x_bchw.shallow_clone(), |mask| &x_bchw * mask);
        let logits = self.convolution(&format!("{head}.conv_seg"), &x_bchw);
        logits.to_kind(Kind::Float)
    }

    /// A convolution with a bias. It keeps the number of rows and columns.
    pub(super) fn convolution(&self, name: &str, x_bchw: &Tensor) -> Tensor {
        let [weight, bias] = self.weight_and_bias(name);
        let padding = weight.size()[2] / 2;
        x_bchw.conv2d(weight, Some(bias), [1, 1], [padding, padding], [1, 1], 1)
    }

    pub(super) fn weight_and_bias(&self, name: &str) -> [&Tensor; 2] {
        ["weight", "bias"].map(|part| &self.values[&format!("{name}.{part}")])
    }
}

fn is_buffer(name: &str) -> bool {
    name.contains(".running_")
}

/// The map, interpolated to the rows and columns of another map.
fn resized_like(map: &Tensor, other: &Tensor) -> Tensor {
    let to = [other.size()[2], other.size()[3]];
    if map.size()[2..] == to { map.shallow_clone() } else { map.upsample_bilinear2d(to, false, None, None) }
}
