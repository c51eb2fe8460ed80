//! The network of the test family: its forward passes, which autograd differentiates.

use super::autograd::{Autograd, Function};
use super::stage::{Backward, Pass, Stage};
use super::{Blueprint, Parts, Weight};
use crate::family::toy::Toy;
use anyhow::Result;
use tch::{Kind, Tensor};

/// The first stage. It subtracts the running means from the pixels. In training, it adds the pixels to the sums from which the
/// running means are updated.
struct Centred {
    mean: Weight,
    layers: Autograd,
}

impl Stage for Centred {
    fn forward<'a>(&'a self, images_bchw: Tensor, pass: &Pass, keep: bool) -> (Tensor, Option<Backward<'a>>) {
        let x_bp = images_bchw.flatten(1, -1);
        if pass.drop.is_some() {
            self.mean.accumulate(|| x_bp.sum_dim_intlist([0i64].as_slice(), false, Kind::Float));
        }
        self.layers.forward(x_bp - &self.mean.value, pass, keep)
    }
}

/// Builds the network.
pub fn parts(_: &Toy, blueprint: &Blueprint) -> Result<Parts> {
    let &Blueprint { depths, get, .. } = blueprint;
    let mut stages: Vec<Box<dyn Stage>> = Vec::new();
    for (stage, &depth) in depths.iter().enumerate() {
        let mut names: Vec<String> =
            (0..depth).flat_map(|layer| [format!("{layer}.weight"), format!("{layer}.bias")]).collect();
        if stage == 0 {
            names.insert(0, "embed.weight".into());
        }
        let parameters = names.iter().map(|name| get(stage, name, false)).collect::<Result<_>>()?;
        let function: Function = Box::new(move |x, values, _| {
            let embedded = usize::from(stage == 0);
            let x = if embedded == 1 { x.linear(&values[0], None::<&Tensor>) } else { x.shallow_clone() };
            values[embedded..].chunks(2).fold(x, |x, pair| &x + x.linear(&pair[0], Some(&pair[1])).tanh())
        });
        let layers = Autograd { parameters, takes_images: stage == 0, recomputes: false, branches: 0..0, function };
        stages.push(match stage {
            0 => Box::new(Centred { mean: get(0, "embed.mean", true)?, layers }),
            _ => Box::new(layers),
        });
    }
    let parameters = vec![get(depths.len() - 1, "head.weight", false)?];
    let function: Function = Box::new(|x, values, _| x.linear(&values[0], None::<&Tensor>).to_kind(Kind::Float));
    let head = Autograd { parameters, takes_images: false, recomputes: false, branches: 0..0, function };
    Ok(Parts { stages, head: Some(Box::new(head)) })
}
