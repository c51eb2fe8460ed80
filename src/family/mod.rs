//! Families of networks. All that is particular to a kind of network stands in its folder, as data and arithmetic: the
//! config's keys and their limits, the table of parameters and buffers, how stages are cut, operations and memory, and
//! the names that other programs use. Its computation stands in the folder of the same name below `model/`.
//!
//! A new family is a folder here, one there, and a variant of [`Model`].

pub mod parameter;
#[cfg(test)]
pub mod toy;
pub mod vit;

use anyhow::Result;
use parameter::Parameter;
use serde::{Deserialize, Deserializer, Serialize};
use std::ops::{Deref, Range};
use toml::{Table, Value};
#[cfg(test)]
use toy::Toy;
use vit::Vit;

/// The config's `[model]`: the sizes of one network. It dereferences to its family's answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Model {
    Vit(Vit),
    #[cfg(test)]
    Toy(Toy),
}

impl Deref for Model {
    type Target = dyn Family;

    fn deref(&self) -> &(dyn Family + 'static) {
        match self {
            Model::Vit(vit) => vit,
            #[cfg(test)]
            Model::Toy(toy) => toy,
        }
    }
}

impl Model {
    /// The same network for another number of classes.
    pub fn with_classes(&self, classes: usize) -> Model {
        let mut model = self.clone();
        match &mut model {
            Model::Vit(vit) => vit.classes = classes,
            #[cfg(test)]
            Model::Toy(toy) => toy.classes = classes,
        }
        model
    }
}

/// What every family tells about a network of given sizes. `depths` are the blocks of each stage of the network in
/// question: the target's, the meta model's or a hybrid's.
pub trait Family {
    /// Pixels of an image, whose height and width are equal.
    fn image_size(&self) -> usize;
    /// Colour channels of an image.
    fn channels(&self) -> usize;
    fn classes(&self) -> usize;
    /// Blocks of each stage of the target.
    fn depths(&self) -> &[usize];
    /// Blocks of each stage of the meta model.
    fn meta_depths(&self) -> Vec<usize>;
    /// K, the number of stages.
    fn stages(&self) -> usize {
        self.depths().len()
    }

    /// Refuses sizes that make no network, naming the key, its value and the cure.
    fn validate(&self) -> Result<()>;

    /// Every parameter and buffer, in the order in which the family's common implementation lists them.
    fn parameters(&self, depths: &[usize]) -> Vec<Parameter>;
    /// How many numbers the parameters of each stage hold. A plan may have a thousand stages, so a family may count them
    /// without listing them.
    fn counts(&self, depths: &[usize]) -> Vec<usize> {
        let mut counts = vec![0; depths.len()];
        let parameters = self.parameters(depths);
        let trainable = parameters.iter().filter(|parameter| parameter.is_trainable());
        trainable.for_each(|parameter| counts[parameter.stage] += parameter.count());
        counts
    }
    /// The name of a stage's parameter in the whole network, where blocks are counted through all stages.
    fn whole_name(&self, parameter: &Parameter, depths: &[usize]) -> String;

    /// Floating-point operations of one stage's forward pass on one sample; a multiply-add counts as two.
    fn stage_flops(&self, depths: &[usize], stage: usize) -> f64;
    /// Numbers that one sample's training keeps in memory at its peak, beside the parameters.
    fn activations(&self, training: &Memory) -> f64;
    /// The drop rate of each residual branch, in the order of the network, if that of the last is `rate` (stochastic
    /// depth, arXiv 1603.09382). Empty where nothing is dropped.
    fn drop_rates(&self, depths: &[usize], rate: f64) -> Vec<f64>;
    /// Probability of dropout, whose masks libtorch's own generator draws; 0 where there is none.
    fn dropout(&self) -> f64 {
        0.0
    }

    /// Whether an imported tensor of this shape can stand for the parameter, as it is or after [`Family::resampled`].
    fn takes(&self, parameter: &Parameter, shape: &[i64]) -> bool {
        parameter.shape == shape
    }
    /// The imported tensor in the parameter's own shape.
    fn resampled(&self, _parameter: &Parameter, tensor: tch::Tensor) -> tch::Tensor {
        tensor
    }
    /// The name of a bias beside this weight that other programs may store though this model has none. It must be zero.
    fn absent_bias(&self, _weight: &str) -> Option<String> {
        None
    }
    /// The key to set if an imported file lacks the parameter of this name, as an addition to the error's text.
    fn cure_for_missing(&self, _name: &str) -> &'static str {
        ""
    }
    /// Whether the weights of `other` can be imported: it differs in the image size and the depths at most, and the
    /// depths are compared elsewhere.
    fn is_like(&self, other: &Model) -> bool;
}

/// What the memory of training depends on.
#[derive(Debug, Clone)]
pub struct Memory<'a> {
    pub depths: &'a [usize],
    /// The stages that train.
    pub trained: Range<usize>,
    /// Whether a block keeps only its input and is computed again in the backward pass.
    pub checkpointing: bool,
    pub on_cpu: bool,
}

/// The families that a config can name, with the TOML text of their `[model]` table's defaults. ViT's is part of
/// `configs/default.toml`.
const DEFAULTS: &[(&str, &str)] = &[
    #[cfg(test)]
    ("toy", toy::DEFAULTS),
];

const VIT: &str = "vit";

/// Every family by its name in the config.
pub fn names() -> Vec<&'static str> {
    DEFAULTS.iter().map(|(name, _)| *name).chain([VIT]).collect()
}

/// The defaults of the `[model]` table of the family of this name; none for ViT, whose defaults stand in
/// `configs/default.toml`, and for a family that does not exist.
pub fn defaults(name: &str) -> Option<Table> {
    let (_, text) = DEFAULTS.iter().find(|(known, _)| *known == name)?;
    Some(text.parse().expect("the embedded defaults are TOML"))
}

impl<'de> Deserialize<'de> for Model {
    /// From a flat table whose `family` says what the other keys mean; ViT without one.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Model, D::Error> {
        use serde::de::Error;
        let mut table = Table::deserialize(deserializer)?;
        let family = match table.remove("family") {
            None => VIT.to_string(),
            Some(Value::String(family)) => family,
            Some(other) => return Err(D::Error::custom(format!("family = {other} is not the name of a family"))),
        };
        let keys = Value::Table(table);
        let model = match family.as_str() {
            VIT => Vit::deserialize(keys).map(Model::Vit),
            #[cfg(test)]
            "toy" => Toy::deserialize(keys).map(Model::Toy),
            _ => {
                return Err(D::Error::custom(format!("unknown family {family:?}; give one of {}", names().join(", "))));
            }
        };
        model.map_err(|error| D::Error::custom(error.message()))
    }
}
