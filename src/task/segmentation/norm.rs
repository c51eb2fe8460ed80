//! Computes BatchNorm in training over the samples of all replicas, like SyncBatchNorm. The gradient of such a norm needs sums over
//! all replicas. So autograd's graph of the heads is cut at each norm. The backward pass runs through the pieces of the graph one
//! by one, from the loss to the taps: the outputs of the stages that the heads read.

use crate::collective::Collective;
use crate::libtorch;
use crate::model::Weight;
use anyhow::Result;
use std::cell::RefCell;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

pub const BATCH_NORM_EPS: f64 = 1e-5;

/// The dimensions of a tensor (b, c, h, w) except the channels.
const OTHERS: [i64; 3] = [0, 2, 3];

/// The places at which the graph of the heads is cut, in the order of the forward pass.
pub struct Cuts<'a> {
    group: &'a dyn Collective,
    all: RefCell<Vec<Cut>>,
}

/// A place at which the graph is cut.
struct Cut {
    /// The tensor (b, c, h, w) before the cut, in which the earlier piece of the graph ends.
    input: Tensor,
    /// The tensor after the cut, a leaf with which the next piece of the graph begins.
    output: Tensor,
    /// The norm that computes `output` from `input`; none if the two are equal.
    norm: Option<Norm>,
}

/// The values that the backward pass of a norm needs. Mean, inverse and gamma have the shape (1, c, 1, 1). All tensors are fp32.
struct Norm {
    /// The norm's name, such as `decode_head.bottleneck.bn`.
    name: String,
    mean: Tensor,
    /// 1 / √(variance + ε).
    inverse: Tensor,
    gamma: Tensor,
    /// How many values a channel has on all replicas together: a scalar.
    count: Tensor,
}

/// A normalised tensor, with the mean and the unbiased variance (c) of its input over all replicas.
pub struct Normed {
    pub output: Tensor,
    pub mean: Tensor,
    pub variance: Tensor,
}

impl<'a> Cuts<'a> {
    pub fn new(group: &'a dyn Collective) -> Cuts<'a> {
        Cuts { group, all: RefCell::default() }
    }

    /// Cuts the graph at tensors that several layers read. Returns the leaves after the cuts.
    pub fn cut(&self, inputs: &[Tensor]) -> Vec<Tensor> {
        let cut = |input: &Tensor| {
            let output = input.detach().set_requires_grad(true);
            let (before, behind) = (input.shallow_clone(), output.shallow_clone());
            self.all.borrow_mut().push(Cut { input: before, output: behind, norm: None });
            output
        };
        inputs.iter().map(cut).collect()
    }

    /// Normalises x (b, c, h, w) over the samples of all replicas, and cuts the graph there. Collective over the group.
    pub fn norm(&self, name: &str, x_bchw: &Tensor, [gamma, beta]: [&Tensor; 2]) -> Result<Normed> {
        tch::no_grad(|| {
            let x = x_bchw.detach().to_kind(Kind::Float);
            let c = x.size()[1];
            let [mean, squares, count] = self.moments(&x)?;
            let variance = &squares / &count;
            let unbiased = squares / (&count - 1.0).clamp_min(1.0);
            let of_channels = |numbers: &Tensor| numbers.to_kind(Kind::Float).view([1, c, 1, 1]);
            let inverse = of_channels(&(variance + BATCH_NORM_EPS).rsqrt());
            let (of_all, gamma, beta) = (of_channels(&mean), of_channels(gamma), of_channels(beta));
            let output = (x - &of_all) * (&gamma * &inverse) + beta;
            let output = output.to_kind(x_bchw.kind()).set_requires_grad(true);
            let norm = Norm { name: name.to_string(), mean: of_all, inverse, gamma, count: count.to_kind(Kind::Float) };
            let (input, behind) = (x_bchw.shallow_clone(), output.shallow_clone());
            self.all.borrow_mut().push(Cut { input, output: behind, norm: Some(norm) });
            let [mean, variance] = [mean, unbiased].map(|numbers| numbers.to_kind(Kind::Float));
            Ok(Normed { output, mean, variance })
        })
    }

    /// The means (c), the sums (c) of the squared differences from the means, and the number of values of a channel. All of them
    /// cover the samples of all replicas. Every replica combines the same numbers in the same order, so the results have the same
    /// bits on all replicas.
    fn moments(&self, x_bchw: &Tensor) -> Result<[Tensor; 3]> {
        let c = x_bchw.size()[1];
        let mean = x_bchw.mean_dim(OTHERS.as_slice(), true, Kind::Float);
        let squares = (x_bchw - &mean).square().sum_dim_intlist(OTHERS.as_slice(), true, Kind::Float);
        let count = Tensor::full([1], (x_bchw.numel() as i64 / c) as f64, (Kind::Float, x_bchw.device()));
        let (rank, size) = (self.group.rank() as i64, self.group.size() as i64);
        let mut of_replicas = Tensor::zeros([size, 2 * c + 1], (Kind::Float, x_bchw.device()));
        of_replicas.get(rank).copy_(&Tensor::cat(&[mean.view(-1), squares.view(-1), count], 0));
        self.group.all_reduce(&mut of_replicas)?;
        let of_replicas = of_replicas.to_kind(Kind::Double);
        let [means, squares] = [0, c].map(|start| of_replicas.narrow(1, start, c));
        let counts = of_replicas.narrow(1, 2 * c, 1);
        let count = counts.sum(Kind::Double);
        let sum = |rows: Tensor| rows.sum_dim_intlist([0i64].as_slice(), false, Kind::Double);
        let mean = sum(&means * &counts) / &count;
        let squares = sum(squares + counts * (means - &mean).square());
        Ok([mean, squares, count])
    }

    /// Runs the backward pass through the pieces of the graph, after the loss's own backward pass has reached the last cut. Adds
    /// the gradients of the norms' parameters to their sums in `weights`. Collective over the group.
    pub fn backward(&self, weights: &BTreeMap<String, Weight>) -> Result<()> {
        tch::no_grad(|| {
            let cuts = self.all.take();
            for Cut { input, output, norm } in cuts.into_iter().rev() {
                let gradient = output.grad();
                let gradient = match norm {
                    Some(norm) => self.through(norm, &input, gradient, weights)?,
                    None => gradient,
                };
                libtorch::backward(&input, &gradient);
            }
            Ok(())
        })
    }

    /// The gradient of a norm's input, given the gradient of its output. It takes into account that the mean and the variance
    /// depend on the inputs of all replicas. Adds the gradients of the norm's parameters to their sums in `weights`.
    fn through(
        &self,
        norm: Norm,
        input: &Tensor,
        gradient: Tensor,
        weights: &BTreeMap<String, Weight>,
    ) -> Result<Tensor> {
        let gradient = gradient.to_kind(Kind::Float);
        let hat = (input.to_kind(Kind::Float) - &norm.mean) * &norm.inverse;
        let sum = |values: &Tensor| values.sum_dim_intlist(OTHERS.as_slice(), false, Kind::Float);
        let own = Tensor::stack(&[sum(&gradient), sum(&(&gradient * &hat))], 0);
        weights[&format!("{}.bias", norm.name)].accumulate(|| own.get(0));
        weights[&format!("{}.weight", norm.name)].accumulate(|| own.get(1));
        let mut sums = own.copy();
        self.group.all_reduce(&mut sums)?;
        let means = sums / &norm.count;
        let [of_gradient, of_product] = [0, 1].map(|row| means.get(row).view_as(&norm.mean));
        let gradient = (gradient - of_gradient - hat * of_product) * (norm.gamma * norm.inverse);
        Ok(gradient.to_kind(input.kind()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Solo;
    use crate::collective::replicas::on_replicas;
    use tch::Device;

    #[test]
    fn norms_of_replicas_with_other_numbers_of_samples_are_the_norm_of_all_samples() {
        let options = (Kind::Float, Device::Cpu);
        let wave = |shape: &[i64], phase: f64| {
            let count: i64 = shape.iter().product();
            (Tensor::arange(count, options) * 0.37 + phase).sin().view(shape)
        };
        let (samples, gamma, beta) = ([2, 1, 3], wave(&[4], 1.0) + 1.0, wave(&[4], 2.0));
        // A mean far from zero would spoil a variance that is computed from a sum of squares.
        let (x_bchw, factor_bchw) = (wave(&[6, 4, 3, 2], 0.0) + 100.0, wave(&[6, 4, 3, 2], 3.0));
        let leaf = |tensor: &Tensor| tensor.copy().set_requires_grad(true);
        let leaves = [&x_bchw, &gamma, &beta].map(leaf);
        let (mean, variance) = (Tensor::zeros([4], options), Tensor::ones([4], options));
        let [x, g, b] = &leaves;
        let whole = x.batch_norm(Some(g), Some(b), Some(&mean), Some(&variance), true, 1.0, BATCH_NORM_EPS, true);
        (&whole * &factor_bchw).sum(Kind::Float).backward();
        let close = |what: &str, ours: &Tensor, theirs: &Tensor| {
            let difference = (ours - theirs).abs().max().double_value(&[]);
            assert!(difference < 2e-4 * theirs.abs().max().double_value(&[]), "{what}: {difference}");
        };
        let expected =
            [&whole, &leaves[0].grad(), &mean, &variance].map(|tensor| std::sync::Mutex::new(tensor.detach()));
        let of_parameters = std::sync::Mutex::new([Tensor::zeros([4], options), Tensor::zeros([4], options)]);
        let inputs = std::sync::Mutex::new([&x_bchw, &factor_bchw, &gamma, &beta].map(Tensor::copy));
        on_replicas(&Solo, 3, false, &|replica| {
            let [x_bchw, factor_bchw, gamma, beta] = inputs.lock().unwrap().each_ref().map(Tensor::copy);
            let (start, count) = (samples[..replica.local].iter().sum(), samples[replica.local]);
            let x = leaf(&x_bchw.narrow(0, start, count));
            let cuts = Cuts::new(replica);
            // The factor before the norm tests that the backward pass also runs through the graph before the cut.
            let normed = cuts.norm("bn", &(&x * 2.0), [&gamma, &beta])?;
            (&normed.output * factor_bchw.narrow(0, start, count)).sum(Kind::Float).backward();
            let weight = || Weight { value: gamma.copy(), gradient: Some(gamma.zeros_like()) };
            let weights = BTreeMap::from([("bn.weight".to_string(), weight()), ("bn.bias".to_string(), weight())]);
            cuts.backward(&weights)?;
            let [whole, gradient, mean, variance] = expected.each_ref().map(|tensor| tensor.lock().unwrap().copy());
            close("output", &normed.output, &whole.narrow(0, start, count));
            close("mean", &normed.mean, &(mean * 2.0));
            close("variance", &normed.variance, &(variance * 4.0));
            close("gradient", &x.grad(), &gradient.narrow(0, start, count));
            for (sum, name) in of_parameters.lock().unwrap().iter_mut().zip(["bn.weight", "bn.bias"]) {
                let _ = sum.g_add_(weights[name].gradient.as_ref().unwrap());
            }
            Ok(())
        })
        .unwrap();
        for (sum, leaf) in of_parameters.into_inner().unwrap().iter().zip(&leaves[1..]) {
            close("parameter", sum, &leaf.grad());
        }
    }
}
