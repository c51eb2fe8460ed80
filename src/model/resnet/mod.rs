//! The residual network for small images. Only its forward passes are written here; autograd computes the backward passes.
//!
//! Tensor names end in their shape: b = batch, c = channels or classes, h and w = rows and columns.

mod norm;
mod unit;

use super::autograd::{Autograd, Chain, Function};
use super::stage::Stage;
use super::{Blueprint, Parts, Weight};
use crate::family::resnet::Resnet;
use anyhow::Result;
use tch::Kind;
use unit::Unit;

/// A unit (the stem or a block) with its parameters.
type Owner = (Unit, Vec<Weight>);

/// Builds a ResNet. The first stage begins with the stem, and the parameters of the head belong to the last stage.
pub fn parts(resnet: &Resnet, blueprint: &Blueprint) -> Result<Parts> {
    let &Blueprint { depths, get, checkpointing, .. } = blueprint;
    let mut stages: Vec<Box<dyn Stage>> = Vec::new();
    let mut before = 0;
    for (stage, blocks) in resnet.blocks(depths).iter().enumerate() {
        let get = |name: &str, exact: bool| get(stage, name, exact);
        let mut units = Vec::new();
        if stage == 0 {
            units.push(unit::stem(resnet, &get)?);
        }
        for (number, block) in blocks.iter().enumerate() {
            let get = |name: &str, exact: bool| get(&format!("blocks.{number}.{name}"), exact);
            units.push(unit::block(resnet, block, &get)?);
        }
        stages.push(Box::new(chain(units, before, stage == 0, checkpointing)));
        before += blocks.len();
    }
    let last = depths.len() - 1;
    let parameters = vec![get(last, "fc.weight", false)?, get(last, "fc.bias", false)?];
    let function: Function = Box::new(|x_bchw, values, _| {
        let pooled_bc = x_bchw.mean_dim([2i64, 3].as_slice(), false, x_bchw.kind());
        pooled_bc.linear(&values[0], Some(&values[1])).to_kind(Kind::Float)
    });
    let head = Autograd { parameters, takes_images: false, recomputes: false, branches: 0..0, function };
    Ok(Parts { stages, head: Some(Box::new(head)) })
}

/// Makes one function of the units of a stage. If `recomputes`, makes a function of each unit instead, so that only the inputs of
/// the units are kept. `before` is the number of blocks in the stages before this stage.
fn chain(units: Vec<Owner>, before: usize, is_first: bool, recomputes: bool) -> Chain {
    let parts: Vec<Vec<Owner>> =
        if recomputes { units.into_iter().map(|unit| vec![unit]).collect() } else { vec![units] };
    let mut branch = before;
    let link = |(number, part): (usize, Vec<Owner>)| {
        let (units, parameters): (Vec<Unit>, Vec<Vec<Weight>>) = part.into_iter().unzip();
        let branches = branch..branch + units.iter().filter(|unit| unit.is_block()).count();
        branch = branches.end;
        let function: Function = Box::new(move |x_bchw, values, mode| {
            let (mut rest, mut scales) = (values, mode.scales.iter());
            units.iter().fold(x_bchw.shallow_clone(), |x_bchw, unit| {
                let own;
                (own, rest) = rest.split_at(unit.values());
                let scale_b11 = if unit.is_block() { scales.next().and_then(Option::as_ref) } else { None };
                unit.forward(&x_bchw, own, mode, scale_b11)
            })
        });
        let parameters = parameters.into_iter().flatten().collect();
        Autograd { parameters, takes_images: is_first && number == 0, recomputes, branches, function }
    };
    Chain(parts.into_iter().enumerate().map(link).collect())
}
