//! Linear layers and norms, forward and backward. Gradients of trained parameters go straight into the flat buffer.

use super::cpu;
use super::flat::Weight;
use tch::{Kind, Tensor};

pub struct Linear {
    pub weight: Weight,
    pub bias: Option<Weight>,
}

impl Linear {
    /// (m, inputs) to (m, outputs).
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight.value, self.bias.as_ref().map(|bias| &bias.value))
    }

    /// What [`Linear::backward`] will need of the input: nothing where the layer is frozen.
    pub fn keep(&self, x: Tensor) -> Option<Tensor> {
        self.weight.gradient.is_some().then_some(x)
    }

    /// The gradient of x, from that of the output; adds those of weight and bias.
    pub fn backward(&self, gradient: &Tensor, x: &Option<Tensor>) -> Tensor {
        self.backward_parameters(gradient, x);
        gradient.mm(&self.weight.value)
    }

    /// As [`Linear::backward`], where nothing below needs a gradient.
    pub fn backward_parameters(&self, gradient: &Tensor, x: &Option<Tensor>) {
        if let (Some(sum), Some(x)) = (&self.weight.gradient, x) {
            let mut sum = sum.view([-1, x.size()[1]]);
            let _ = match gradient.kind() {
                Kind::Float => sum.addmm_(&gradient.tr(), x),
                _ => sum.g_add_(&gradient.tr().mm(x)),
            };
        }
        if let Some(bias) = &self.bias {
            bias.accumulate(|| gradient.sum_dim_intlist([0i64].as_slice(), false, Kind::Float));
        }
    }
}

/// LayerNorm over the last dimension, with fp32 parameters and statistics.
pub struct Norm {
    pub weight: Weight,
    pub bias: Weight,
    pub eps: f64,
}

/// Mean and 1 / standard deviation of each row.
pub enum Statistics {
    Cpu(cpu::Statistics),
    Tensors { mean_m1: Tensor, scale_m1: Tensor },
}

impl Norm {
    pub fn forward(&self, x: &Tensor) -> (Tensor, Statistics) {
        if cpu::takes(x) {
            let (out, statistics) = cpu::norm(x, &self.weight.value, &self.bias.value, self.eps);
            return (out, Statistics::Cpu(statistics));
        }
        let exact = x.to_kind(Kind::Float);
        let (weight, bias) = (Some(&self.weight.value), Some(&self.bias.value));
        let (out, mean_m1, scale_m1) = exact.native_layer_norm(self.weight.value.size(), weight, bias, self.eps);
        (out.to_kind(x.kind()), Statistics::Tensors { mean_m1, scale_m1 })
    }

    /// Adds the gradient of x to `residual`, that of what passes beside the norm; adds those of weight and bias.
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
                let dy = gradient.to_kind(Kind::Float);
                let normed = (x.to_kind(Kind::Float) - mean_m1) * scale_m1;
                let rows = [0i64].as_slice();
                self.weight.accumulate(|| (&dy * &normed).sum_dim_intlist(rows, false, Kind::Float));
                self.bias.accumulate(|| dy.sum_dim_intlist(rows, false, Kind::Float));
                let dn = dy * &self.weight.value;
                let mean = |t: &Tensor| t.mean_dim([-1i64].as_slice(), true, Kind::Float);
                let inner = &dn - mean(&dn) - &normed * mean(&(&dn * &normed));
                residual.g_add_(&(inner * scale_m1))
            }
        }
    }
}

/// The exact GELU.
pub fn gelu(x: &Tensor) -> Tensor {
    if cpu::takes(x) { cpu::gelu(x) } else { x.gelu("none") }
}

/// The gradient of x from that of gelu(x).
pub fn gelu_backward(mut gradient: Tensor, x: &Tensor) -> Tensor {
    if cpu::takes(x) && cpu::takes(&gradient) {
        cpu::gelu_backward(&mut gradient, x);
        return gradient;
    }
    x.gelu_backward(&gradient, "none")
}
