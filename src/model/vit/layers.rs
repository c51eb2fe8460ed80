//! Linear layers, norms and GELU, forward and backward. The backward passes add the gradients of trained parameters to the flat
//! buffer of gradients.

use super::super::Weight;
use super::cpu;
use crate::libtorch;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::{Kind, Tensor};

/// A linear layer.
pub struct Linear {
    pub weight: Weight,
    pub bias: Option<Weight>,
    /// Whether, on a GPU in bf16, the matrix product itself adds the weight gradients to their fp32 sums ([`add_on_gpu`]).
    pub float_sums: bool,
}

impl Linear {
    /// Maps x (m, inputs) to (m, outputs).
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight.value, self.bias.as_ref().map(|bias| &bias.value))
    }

    /// Returns the input, which [`Linear::backward`] needs, if the layer is trained.
    pub fn keep(&self, x: Tensor) -> Option<Tensor> {
        self.weight.gradient.is_some().then_some(x)
    }

    /// Computes the gradient of x from the gradient of the output. Also adds the gradients of weight and bias to the flat buffer of
    /// gradients, if the layer is trained.
    pub fn backward(&self, gradient: &Tensor, x: &Option<Tensor>) -> Tensor {
        self.backward_parameters(gradient, x);
        gradient.mm(&self.weight.value)
    }

    /// Adds the gradients of weight and bias to the flat buffer of gradients, if the layer is trained. Computes no gradient of x.
    pub fn backward_parameters(&self, gradient: &Tensor, x: &Option<Tensor>) {
        if let (Some(sum), Some(x)) = (&self.weight.gradient, x) {
            let mut sum = sum.view([-1, x.size()[1]]);
            let transposed = gradient.tr();
            if gradient.kind() == Kind::Float {
                let _ = sum.addmm_(&transposed, x);
            } else if !(self.float_sums && add_on_gpu(&sum, &transposed, x)) {
                let _ = sum.g_add_(&transposed.mm(x));
            }
        }
        if let Some(bias) = &self.bias {
            bias.accumulate(|| gradient.sum_dim_intlist([0i64].as_slice(), false, Kind::Float));
        }
    }
}

/// Adds the product a · b of bf16 matrices to an fp32 sum in one call. Returns false, and changes nothing, on a CPU or if libtorch
/// refuses this call or has refused an earlier call. Also returns false if the sum has a single row, because libtorch may take a
/// single row for a bias.
fn add_on_gpu(sum: &Tensor, a: &Tensor, b: &Tensor) -> bool {
    static IS_REFUSED: AtomicBool = AtomicBool::new(false);
    if !sum.device().is_cuda() || sum.size()[0] == 1 || IS_REFUSED.load(Ordering::Relaxed) {
        return false;
    }
    let added = libtorch::add_product(sum, a, b);
    if let Err(error) = &added
        && !IS_REFUSED.swap(true, Ordering::Relaxed)
    {
        log::warn!(
            "weight gradients are rounded to bf16 before they are added, because libtorch refuses fp32: {error}"
        );
    }
    added.is_ok()
}

/// LayerNorm over the last dimension, with fp32 statistics. On a CPU the parameters are fp32 too; on a GPU they have the number
/// type of the computation.
pub struct Norm {
    pub weight: Weight,
    pub bias: Weight,
    pub eps: f64,
    /// Whether the CPU kernels are used for the tensors that they support.
    pub kernels: bool,
}

/// The mean and 1 / standard deviation of each row, by the CPU kernels or by libtorch.
pub enum Statistics {
    Cpu(cpu::Statistics),
    Tensors { mean_m1: Tensor, scale_m1: Tensor },
}

impl Norm {
    pub fn forward(&self, x: &Tensor) -> (Tensor, Statistics) {
        if self.kernels && cpu::is_supported(x) {
            let (out, statistics) = cpu::norm(x, &self.weight.value, &self.bias.value, self.eps);
            return (out, Statistics::Cpu(statistics));
        }
        let (weight, bias) = (Some(&self.weight.value), Some(&self.bias.value));
        let (out, mean_m1, scale_m1) = x.native_layer_norm(self.weight.value.size(), weight, bias, self.eps);
        (out, Statistics::Tensors { mean_m1, scale_m1 })
    }

    /// Returns `residual` plus the gradient of x. `residual` is the gradient that reaches x along the residual connection. Also
    /// adds the gradients of weight and bias to the flat buffer of gradients, if the norm is trained.
    pub fn backward(&self, mut residual: Tensor, gradient: &Tensor, x: &Tensor, statistics: &Statistics) -> Tensor {
        match statistics {
            Statistics::Cpu(statistics) => {
                let mut sums = self.weight.gradient.as_ref().zip(self.bias.gradient.as_ref());
                let mut sums = sums.as_mut().map(|(weight, bias)| [weight.shallow_clone(), bias.shallow_clone()]);
                let sums = sums.as_mut().map(|[weight, bias]| [weight, bias]);
                cpu::norm_backward(&mut residual, gradient, x, statistics, &self.weight.value, sums);
                residual
            }
            Statistics::Tensors { mean_m1, scale_m1 } => {
                let trained = self.weight.gradient.is_some();
                let own = [&self.weight.value, &self.bias.value];
                let (inner, sums) = libtorch::layer_norm_backward(gradient, x, [mean_m1, scale_m1], own, trained);
                if let Some([weight, bias]) = sums {
                    self.weight.accumulate(|| weight);
                    self.bias.accumulate(|| bias);
                }
                residual.g_add_(&inner)
            }
        }
    }
}

/// The exact GELU. The CPU kernel computes it if `kernels` is true and the kernel supports the tensor.
pub fn gelu(x: &Tensor, kernels: bool) -> Tensor {
    if kernels && cpu::is_supported(x) { cpu::gelu(x) } else { x.gelu("none") }
}

/// Computes the gradient of x from the gradient of gelu(x).
pub fn gelu_backward(mut gradient: Tensor, x: &Tensor, kernels: bool) -> Tensor {
    if kernels && cpu::is_supported(x) && cpu::is_supported(&gradient) {
        cpu::gelu_backward(&mut gradient, x);
        return gradient;
    }
    x.gelu_backward(&gradient, "none")
}

#[cfg(test)]
mod tests {
    use super::super::cpu::tests::{assert_close, wave};
    use super::*;

    /// A trained norm with weights of this kind, and the sums of its gradients.
    fn norm(kind: Kind) -> (Norm, [Tensor; 2]) {
        let sums = [0, 1].map(|_| Tensor::zeros([24], (Kind::Float, tch::Device::Cpu)));
        let weight = |largest: f64, sum: &Tensor| Weight {
            value: wave(&[24], largest, kind),
            gradient: Some(sum.shallow_clone()),
        };
        (Norm { weight: weight(1.5, &sums[0]), bias: weight(0.5, &sums[1]), eps: 1e-6, kernels: true }, sums)
    }

    #[test]
    fn a_cpu_has_no_bf16_product_with_an_fp32_sum_and_a_linear_layer_adds_its_gradients_without_it() {
        let (x, dy) = (wave(&[40, 24], 3.0, Kind::BFloat16), wave(&[40, 16], 1.0, Kind::BFloat16));
        let sum = wave(&[16, 24], 5.0, Kind::Float);
        let refused = libtorch::add_product(&sum, &dy.tr(), &x).unwrap_err().to_string();
        assert!(refused.contains("aten::addmm.dtype_out") && refused.contains("CPU"), "{refused}");
        assert_eq!(sum, wave(&[16, 24], 5.0, Kind::Float));
        let expected = &sum + dy.to_kind(Kind::Double).tr().mm(&x.to_kind(Kind::Double));
        let value = wave(&[16, 24], 1.0, Kind::BFloat16);
        let weight = Weight { value, gradient: Some(sum.shallow_clone()) };
        Linear { weight, bias: None, float_sums: true }.backward_parameters(&dy, &Some(x));
        assert_close(&sum, &expected, Kind::BFloat16);
    }

    #[test]
    fn a_norm_on_tensors_that_the_cpu_kernels_do_not_take_has_their_output_and_gradients() {
        let of = |kind: Kind| {
            let (x, dy, residual) =
                (wave(&[40, 24], 3.0, kind), wave(&[40, 24], 1.0, kind), wave(&[40, 24], 0.7, kind));
            let (norm, [dweight, dbias]) = norm(kind);
            let (out, statistics) = norm.forward(&x);
            assert_eq!(matches!(statistics, Statistics::Cpu(_)), kind == Kind::Float);
            [out, norm.backward(residual, &dy, &x, &statistics), dweight, dbias]
        };
        for (ours, expected) in of(Kind::Float).iter().zip(&of(Kind::Double)) {
            assert_close(ours, expected, Kind::Float);
        }
    }
}
