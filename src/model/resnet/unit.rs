//! The stem and the basic blocks of a ResNet. Each of them is a function of its input and of the values of its parameters.

use super::super::Weight;
use super::super::autograd::Mode;
use super::Owner;
use super::norm::Norm;
use crate::family::resnet::{self, Resnet, Shortcut};
use anyhow::Result;
use tch::Tensor;

/// The stem, or a block.
pub enum Unit {
    Stem(Convolution),
    Block { first: Convolution, second: Convolution, shortcut: ShortcutPath },
}

/// A convolution without bias and the norm after it. Together they have three parameters: the kernels, and the scale and the shift
/// of the norm.
pub struct Convolution {
    stride: i64,
    padding: i64,
    norm: Norm,
}

/// The number of parameters of a [`Convolution`].
const VALUES: usize = 3;

/// The shortcut around a block.
pub enum ShortcutPath {
    Identity,
    /// Every second pixel in each direction, with this number of channels of zeros before and after the channels of the input.
    Padded(i64),
    /// A 1×1 convolution with a norm.
    Projected(Convolution),
}

/// Returns a parameter by its name. The value is in fp32 if the second argument is true, else in the number type of the
/// computation.
type Get<'a> = &'a dyn Fn(&str, bool) -> Result<Weight>;

/// Builds the convolution and the norm with these names, and adds their parameters to `parameters`.
fn convolution(
    resnet: &Resnet,
    [kernels, norm]: [&str; 2],
    stride: usize,
    get: Get,
    parameters: &mut Vec<Weight>,
) -> Result<Convolution> {
    let of_norm = |part: &str| get(&format!("{norm}.{part}"), true);
    parameters.extend([get(&format!("{kernels}.weight"), false)?, of_norm("weight")?, of_norm("bias")?]);
    let side = parameters[parameters.len() - VALUES].value.size()[2];
    let norm = Norm::new(of_norm("running_mean")?, of_norm("running_var")?, resnet.frozen_norm);
    Ok(Convolution { stride: stride as i64, padding: side / 2, norm })
}

/// The stem and its parameters.
pub fn stem(resnet: &Resnet, get: Get) -> Result<Owner> {
    let mut parameters = Vec::new();
    let convolution = convolution(resnet, ["conv1", "bn1"], 1, get, &mut parameters)?;
    Ok((Unit::Stem(convolution), parameters))
}

/// A block and its parameters.
pub fn block(resnet: &Resnet, block: &resnet::Block, get: Get) -> Result<Owner> {
    let mut parameters = Vec::new();
    let mut build = |names, stride| convolution(resnet, names, stride, get, &mut parameters);
    let first = build(["conv1", "bn1"], block.stride())?;
    let second = build(["conv2", "bn2"], 1)?;
    let shortcut = match resnet.shortcut {
        _ if !block.changes_shape() => ShortcutPath::Identity,
        Shortcut::A => ShortcutPath::Padded((block.output - block.input) as i64 / 2),
        Shortcut::B => ShortcutPath::Projected(build(["downsample.0", "downsample.1"], block.stride())?),
    };
    Ok((Unit::Block { first, second, shortcut }, parameters))
}

impl Convolution {
    fn forward(&self, x_bchw: &Tensor, values: &[Tensor], mode: &Mode) -> Tensor {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        let convolved_bchw = x_bchw.conv2d(&values[0], None::<&Tensor>, stride, padding, [1, 1], 1);
        self.norm.forward(&convolved_bchw, [&values[1], &values[2]], mode)
    }
}

impl Unit {
    pub fn is_block(&self) -> bool {
        matches!(self, Unit::Block { .. })
    }

    /// The number of parameters of the unit.
    pub fn values(&self) -> usize {
        match self {
            Unit::Stem(_) => VALUES,
            Unit::Block { shortcut: ShortcutPath::Projected(_), .. } => 3 * VALUES,
            Unit::Block { .. } => 2 * VALUES,
        }
    }

    /// Computes the output (b, c, h, w) from images or the output of another unit. `scale_b11` scales the residual branch of a
    /// block.
    pub fn forward(&self, x_bchw: &Tensor, values: &[Tensor], mode: &Mode, scale_b11: Option<&Tensor>) -> Tensor {
        match self {
            Unit::Stem(convolution) => {
                let x_bchw = if x_bchw.device().is_cuda() { side_by_side(x_bchw) } else { x_bchw.shallow_clone() };
                convolution.forward(&x_bchw, values, mode).relu_()
            }
            Unit::Block { first, second, shortcut } => {
                let hidden_bchw = first.forward(x_bchw, values, mode).relu_();
                let mut branch_bchw = second.forward(&hidden_bchw, &values[VALUES..], mode);
                if let Some(scale_b11) = scale_b11 {
                    branch_bchw *= scale_b11.unsqueeze(-1).to_kind(x_bchw.kind());
                }
                let around_bchw = match shortcut {
                    ShortcutPath::Identity => x_bchw.shallow_clone(),
                    ShortcutPath::Padded(zeros) => {
                        let every_second = x_bchw.slice(2, None, None, 2).slice(3, None, None, 2);
                        every_second.constant_pad_nd([0, 0, 0, 0, *zeros, *zeros])
                    }
                    ShortcutPath::Projected(convolution) => convolution.forward(x_bchw, &values[2 * VALUES..], mode),
                };
                branch_bchw.g_add_(&around_bchw).relu_()
            }
        }
    }
}

/// The same tensor (b, c, h, w) in libtorch's memory format `channels_last`: the channels of a pixel are side by side. On a GPU,
/// convolutions and norms are faster in this format, and their outputs keep it.
fn side_by_side(x_bchw: &Tensor) -> Tensor {
    x_bchw.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}
