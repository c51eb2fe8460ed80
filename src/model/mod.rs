//! A network of stages. Some stages train, and all other stages are frozen. The model family (ViT or ResNet) builds the stages and
//! the head.
//!
//! Tensor names end in their shape: b = batch, c = channels or classes, h and w = rows and columns.

mod autograd;
mod flat;
mod init;
pub mod off;
mod rate;
mod resnet;
mod stage;
pub mod threads;
#[cfg(test)]
mod toy;
mod vit;

pub use flat::{EXTRAS, FlatParameters, Loan, Weight};
pub use init::fresh;
pub use rate::matrix_product_rate;
pub use stage::{DropPath, Tap};
pub use vit::prove_attention;

use crate::config::{Config, Precision};
use crate::family::Model;
use crate::family::parameter::Parameter;
use crate::weights::Weights;
use anyhow::{Context, Result};
use off::Off;
use stage::{Backward, Pass, Stage};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// A network that trains the stages in `trained`. Their parameters are in flat buffers. All other stages are frozen.
pub struct Network {
    trained: Range<usize>,
    parts: Parts,
    flat: FlatParameters,
    kind: Kind,
    dropout: f64,
}

/// The parts of a network that the model family builds.
struct Parts {
    stages: Vec<Box<dyn Stage>>,
    /// None in a network without classes.
    head: Option<Box<dyn Stage>>,
}

/// The input from which a model family builds the parts of a network.
struct Blueprint<'a> {
    depths: &'a [usize],
    /// Returns a parameter by its stage and name. The value is in fp32 if the third argument is true, else in the number type of
    /// the computation.
    get: &'a dyn Fn(usize, &str, bool) -> Result<Weight>,
    device: Device,
    /// Whether activation checkpointing is on: a block keeps only its input, and the backward pass recomputes the block.
    checkpointing: bool,
    off: Off,
}

/// The backward passes that belong to one forward pass of training. Each stage that ran has one, from the first trained stage on.
/// The head has one if it ran.
pub struct Tape<'a> {
    /// The places whose outputs the forward pass returned. The backward pass takes one gradient for each place.
    taps: Vec<Tap>,
    /// The number of the first stage that has a backward pass.
    first: usize,
    stages: Vec<Backward<'a>>,
    head: Option<Backward<'a>>,
}

impl Network {
    /// Builds a network from `weights`, which must hold every parameter of a network with these stage depths, and every `auxiliary`
    /// parameter. `config.run` decides the precision and the activation checkpointing. The `auxiliary` parameters belong to the
    /// heads of a task or of local losses. They train in the same flat buffers as the stages.
    pub fn new(
        config: &Config,
        depths: &[usize],
        trained: Range<usize>,
        auxiliary: &[Parameter],
        weights: &Weights,
    ) -> Result<Network> {
        Self::without(Off::default(), config, depths, trained, auxiliary, weights)
    }

    /// Builds a network as [`Network::new`] does, with some optimisations switched off.
    pub fn without(
        off: Off,
        config: &Config,
        depths: &[usize],
        trained: Range<usize>,
        auxiliary: &[Parameter],
        weights: &Weights,
    ) -> Result<Network> {
        let model = &config.model;
        let kind = match config.run.precision {
            Precision::Bf16 => Kind::BFloat16,
            // TF32 numbers are stored as fp32. The device rounds them only within matrix products and convolutions.
            Precision::Fp32 | Precision::Tf32 => Kind::Float,
        };
        let table = model.parameters(depths);
        let of_stages = table.iter().filter(|p| trained.contains(&p.stage));
        let flat = FlatParameters::new(of_stages.chain(auxiliary), weights, kind)?;
        let get = |stage: usize, name: &str, exact: bool| -> Result<Weight> {
            if let Some(weight) = flat.get(stage, name, exact) {
                return Ok(weight);
            }
            let tensor = weights.get(&(stage, name.to_string()));
            let tensor = tensor.with_context(|| format!("stage {stage} has no {name}"))?;
            Ok(Weight { value: tensor.to_kind(if exact { Kind::Float } else { kind }), gradient: None })
        };
        let (device, checkpointing) = (flat.buffer().device(), config.run.activation_checkpointing);
        let blueprint = Blueprint { depths, get: &get, device, checkpointing, off };
        let parts = match model {
            Model::Vit(vit) => vit::parts(vit, &blueprint)?,
            Model::Resnet(resnet) => resnet::parts(resnet, &blueprint)?,
            #[cfg(test)]
            Model::Toy(toy) => toy::parts(toy, &blueprint)?,
        };
        Ok(Network { trained, parts, flat, kind, dropout: model.dropout() })
    }

    /// The flat buffers with the trained parameters.
    pub fn flat(&self) -> &FlatParameters {
        &self.flat
    }

    /// The flat buffers with the trained parameters, for a caller that changes them.
    pub fn flat_mut(&mut self) -> &mut FlatParameters {
        &mut self.flat
    }

    /// K, the number of stages.
    pub fn stages(&self) -> usize {
        self.parts.stages.len()
    }

    /// The number type and device of the computation. The weights from which the network was built are on this device.
    pub fn options(&self) -> (Kind, Device) {
        (self.kind, self.flat.buffer().device())
    }

    /// Runs forward in evaluation mode on images (b, channels, rows, columns). Returns the outputs at `taps`.
    pub fn forward(&self, images_bchw: &Tensor, taps: &[Tap]) -> Vec<Tensor> {
        tch::no_grad(|| self.pass(0..self.stages(), images_bchw, &Pass { drop: None, dropout: 0.0 }, taps, false).0)
    }

    /// Runs forward in training mode, without dropout and stochastic depth. As in training, the trained stages add the
    /// micro-batch's BatchNorm statistics to the flat buffer of gradients.
    pub fn gather_statistics(&self, images_bchw: &Tensor) {
        let pass = Pass { drop: Some(&DropPath::none()), dropout: 0.0 };
        let _ = tch::no_grad(|| self.pass(0..self.stages(), images_bchw, &pass, &[], false));
    }

    /// Runs forward in training mode. Returns the outputs at `taps`, and the tape that [`Network::backward`] needs. The tape holds
    /// no activations of stages before the first trained stage.
    pub fn train(&self, images_bchw: &Tensor, drop: &DropPath, taps: &[Tap]) -> (Vec<Tensor>, Tape<'_>) {
        let (outputs, _, tape) = self.train_stages(0..self.stages(), images_bchw, drop, taps);
        (outputs, tape)
    }

    /// Runs only the stages in `stages`, in the same way as [`Network::train`] runs all stages. `input` is the input of the first
    /// stage in `stages`. Returns the outputs at `taps`, the output of the last stage in `stages`, and the tape. Each tap must be
    /// at a stage in `stages`, or at the head if `stages` includes the network's last stage.
    pub fn train_stages(
        &self,
        stages: Range<usize>,
        input: &Tensor,
        drop: &DropPath,
        taps: &[Tap],
    ) -> (Vec<Tensor>, Tensor, Tape<'_>) {
        let pass = Pass { drop: Some(drop), dropout: self.dropout };
        tch::no_grad(|| self.pass(stages, input, &pass, taps, true))
    }

    /// Runs forward. The head runs only if a tap is at the head.
    fn pass(
        &self,
        stages: Range<usize>,
        input: &Tensor,
        pass: &Pass,
        taps: &[Tap],
        keep: bool,
    ) -> (Vec<Tensor>, Tensor, Tape<'_>) {
        let mut outputs: Vec<Tensor> = taps.iter().map(|_| Tensor::new()).collect();
        let mut record = |tap: Tap, output: &Tensor| {
            let reading = taps.iter().zip(&mut outputs).filter(|(reads, _)| **reads == tap);
            reading.for_each(|(_, slot)| *slot = output.shallow_clone());
        };
        let first = stages.start.max(self.trained.start);
        let mut tape = Tape { taps: taps.to_vec(), first, stages: Vec::new(), head: None };
        let mut x = input.to_kind(self.kind);
        for number in stages {
            let (output, backward) = self.parts.stages[number].forward(x, pass, keep && number >= self.trained.start);
            x = output;
            record(Tap::Stage(number), &x);
            tape.stages.extend(backward);
        }
        if taps.contains(&Tap::Head) {
            let head = self.parts.head.as_ref().expect("a task that reads the head has classes");
            let (output, backward) = head.forward(x.shallow_clone(), pass, keep);
            record(Tap::Head, &output);
            tape.head = backward;
        }
        (outputs, x, tape)
    }

    /// Computes the gradients of the trained parameters and adds them to the flat buffer of gradients. `gradients` are the
    /// gradients of the loss with respect to the outputs at the taps, in the order of the taps. Stages after the trained stages
    /// pass activation gradients back, but compute no weight gradients.
    pub fn backward(&self, tape: Tape, gradients: Vec<Tensor>) {
        let Tape { taps, first, stages, head } = tape;
        assert_eq!(taps.len(), gradients.len(), "each tap has a gradient");
        let mut at_taps: Vec<(Tap, Tensor)> = taps.into_iter().zip(gradients).collect();
        let mut take = |tap: Tap| -> Option<Tensor> {
            let taken;
            (taken, at_taps) = std::mem::take(&mut at_taps).into_iter().partition(|(reads, _)| *reads == tap);
            taken.into_iter().map(|(_, gradient): (Tap, Tensor)| gradient).reduce(|sum, gradient| sum + gradient)
        };
        tch::no_grad(|| {
            let mut gradient = match (take(Tap::Head), head) {
                (Some(gradient), Some(head)) => head(gradient),
                _ => None,
            };
            for (offset, backward) in stages.into_iter().enumerate().rev() {
                let from_tap = take(Tap::Stage(first + offset)).map(|at_tap| at_tap.to_kind(self.kind));
                let sum = match (gradient, from_tap) {
                    (Some(a), Some(b)) => Some(a + b),
                    (a, b) => a.or(b),
                };
                gradient = sum.and_then(backward);
            }
        });
    }
}

/// fp32 in host memory: the number type and the device of parameters that are read from files.
pub const FP32_ON_HOST: (Kind, Device) = (Kind::Float, Device::Cpu);

#[cfg(test)]
mod tests {
    use super::off::Optimisation;
    use super::*;
    use crate::weights::Staging;

    #[test]
    fn gradients_at_taps_add_up_and_reach_only_the_stages_before_them() {
        let text = "[model]\nimage_size = 8\npatch_size = 4\nwidth = 8\nheads = 2\ndepths = [1, 2]\nclasses = 3";
        let config = Config::parse(text, &[]).unwrap();
        let weights = fresh(config.model.parameters(&[1, 2]).iter(), 3);
        let images_bchw = (Tensor::arange(2 * 3 * 64, FP32_ON_HOST) * 0.37).sin().view([2, 3, 8, 8]);
        let gradients = |taps: &[Tap]| {
            let network = Network::new(&config, &[1, 2], 0..2, &[], &weights).unwrap();
            let (outputs, tape) = network.train(&images_bchw, &DropPath::none(), taps);
            network.backward(tape, outputs.iter().map(|output| output.cos()).collect());
            network.flat().layout().named(network.flat().gradients())
        };
        let (stage, head) = (gradients(&[Tap::Stage(0)]), gradients(&[Tap::Head]));
        let both = gradients(&[Tap::Head, Tap::Stage(0)]);
        for (key, sum) in &both {
            let difference = (sum - &stage[key] - &head[key]).abs().max().double_value(&[]);
            assert!(difference < 1e-5 * sum.abs().max().double_value(&[]).max(1.0), "{key:?}: {difference}");
            let is_reached = stage[key].abs().max().double_value(&[]) > 0.0;
            assert_eq!(is_reached, key.0 == 0, "{key:?}");
            assert!(head[key].abs().max().double_value(&[]) > 0.0, "{key:?}");
        }
    }

    #[test]
    fn a_branch_of_the_samples_that_keep_it_alone_gives_what_it_gives_among_all() {
        let b = 8;
        let text = "[model]\nimage_size = 8\npatch_size = 4\nwidth = 16\nheads = 2\ndepths = [2, 2]\nclasses = 3";
        let images_bchw = (Tensor::arange(b * 3 * 64, FP32_ON_HOST) * 0.37).sin().view([b, 3, 8, 8]);
        // The first five branches keep half of the samples, one sample, none, all but one, and all.
        let masks = [0b1010_0101u8, 0b0001_0000, 0, 0b1111_0111, 0b1111_1111, 0b0110_0110, 0b1000_0001, 0b0011_1100];
        let scales = masks.map(|mask| [0, 1, 2, 3, 4, 5, 6, 7].map(|k| if mask >> k & 1 == 1 { 1.25f32 } else { 0.0 }));
        let scale_rb = Tensor::from_slice(scales.as_flattened()).view([8, b]);
        let drop = DropPath::new(&scale_rb, &Staging::of_cpu());
        let computed = (0..8).map(|i| drop.branch(i).unwrap().worth_taking().map(Tensor::numel));
        assert_eq!(computed.collect::<Vec<_>>()[2..6], [Some(0), None, None, Some(4)]);
        for sets in [&[][..], &["run.activation_checkpointing=true".to_string()], &["model.dropout=0.2".to_string()]] {
            let config = Config::parse(text, sets).unwrap();
            let weights = fresh(config.model.parameters(&[2, 2]).iter(), 3);
            let pass = |off: Off| {
                tch::manual_seed(7);
                let network = Network::without(off, &config, &[2, 2], 0..2, &[], &weights).unwrap();
                let (outputs, tape) = network.train(&images_bchw, &drop, &[Tap::Stage(1), Tap::Head]);
                network.backward(tape, outputs.iter().map(|output| output.cos()).collect());
                [outputs[0].copy(), outputs[1].copy(), network.flat().gradients().copy()]
            };
            let (ours, expected) = (pass(Off::default()), pass(Off::from_iter([Optimisation::KeptSamples])));
            for (ours, expected) in ours.iter().zip(&expected) {
                let difference = (ours - expected).abs().max().double_value(&[]);
                assert!(difference < 1e-5 * expected.abs().max().double_value(&[]), "{sets:?}: {difference:e}");
            }
        }
    }
}
