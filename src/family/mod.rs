//! Families of networks. A family is a kind of network, such as ViT. The folder of a family holds everything that is particular to
//! the family, as data and arithmetic. These are the keys of the config and their limits, the table of parameters and buffers, the
//! division into stages, formulas for operations and memory, and the names that other programs use. The folder of the same name
//! below `model/` has the computation.
//!
//! A new family needs a folder here, a folder below `model/`, a variant of [`Model`] with an arm in each `match`, and a row of
//! `DEFAULTS`.

pub mod parameter;
pub mod resnet;
pub mod shape;
#[cfg(test)]
pub mod toy;
pub mod vit;

use anyhow::Result;
use parameter::{Grown, Parameter};
use resnet::Resnet;
use serde::{Deserialize, Deserializer, Serialize};
use shape::Shape;
use std::ops::{Deref, Range};
use toml::{Table, Value};
#[cfg(test)]
use toy::Toy;
use vit::Vit;

/// The config's `[model]`: the sizes of one network. It dereferences to the [`Family`] of the network.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Model {
    Vit(Vit),
    Resnet(Resnet),
    #[cfg(test)]
    Toy(Toy),
}

impl Deref for Model {
    type Target = dyn Family;

    fn deref(&self) -> &(dyn Family + 'static) {
        match self {
            Model::Vit(vit) => vit,
            Model::Resnet(resnet) => resnet,
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
            Model::Resnet(resnet) => resnet.classes = classes,
            #[cfg(test)]
            Model::Toy(toy) => toy.classes = classes,
        }
        model
    }

    /// The same network without a head, for images of another size. Heads of other tasks read the outputs of its stages. If
    /// `window` is not 0, most blocks attend within windows of `window` × `window` tokens.
    pub fn without_head(&self, image_size: usize, window: usize) -> Model {
        let mut model = self.with_classes(0);
        match &mut model {
            Model::Vit(vit) => (vit.image_size, vit.window) = (image_size, window),
            _ => unreachable!("the config of a task downstream was validated"),
        }
        model
    }
}

/// The properties of a network, which each family computes from the network's sizes. The argument `depths` is the number of blocks
/// of each stage in one network: the target, the meta model or a hybrid. The page of the crate explains these words.
pub trait Family {
    /// The name of this kind of network in prose.
    fn title(&self) -> &'static str {
        "network"
    }
    /// The height of an image in pixels, which is also its width.
    fn image_size(&self) -> usize;
    /// The number of colour channels of an image.
    fn channels(&self) -> usize;
    fn classes(&self) -> usize;
    /// The form of the tokens that follow the class token in a stage's output; none if the outputs of the stages are not tokens.
    fn tokens_given(&self) -> Option<Tokens> {
        None
    }
    /// The shape of a stage's output, which is the same in the target, the meta model and every hybrid.
    fn border(&self, stage: usize) -> Shape;
    /// The number of blocks of each stage of the target.
    fn depths(&self) -> &[usize];
    /// The number of blocks of each stage of the meta model.
    fn meta_depths(&self) -> Vec<usize>;
    /// K, the number of stages.
    fn stages(&self) -> usize {
        self.depths().len()
    }

    /// Refuses sizes that do not make a network. The error names the key, its value and the cure.
    fn validate(&self) -> Result<()>;

    /// All parameters and buffers, in the order of the family's usual implementation, such as timm's.
    fn parameters(&self, depths: &[usize]) -> Vec<Parameter>;
    /// Whether the network has buffers, such as BatchNorm's running mean.
    fn has_buffers(&self) -> bool {
        !self.parameters(&self.meta_depths()).iter().all(Parameter::is_trainable)
    }
    /// How many numbers the parameters of each stage hold, without the buffers. A network may have thousands of stages, so a family
    /// may replace this method by one that does not list all parameters.
    fn counts(&self, depths: &[usize]) -> Vec<usize> {
        let mut counts = vec![0; depths.len()];
        let parameters = self.parameters(depths);
        let trainable = parameters.iter().filter(|parameter| parameter.is_trainable());
        trainable.for_each(|parameter| counts[parameter.stage] += parameter.count());
        counts
    }
    /// Whether [`Family::layer`] is implemented.
    fn has_layers(&self) -> bool {
        false
    }
    /// The layer of a parameter: 0 for the embeddings, the number of its block from 1, or the number of blocks + 1 for everything
    /// after the last block. Learning rates may decay from layer to layer (`layer_decay`).
    fn layer(&self, _parameter: &Parameter, _depths: &[usize]) -> usize {
        0
    }
    /// The name of a parameter in the whole network. In this name, the number of a block does not start again at each stage.
    fn whole_name(&self, parameter: &Parameter, depths: &[usize]) -> String;

    /// The number of floating-point operations of one stage's forward pass on one sample. A multiply-add counts as two operations.
    fn stage_flops(&self, depths: &[usize], stage: usize) -> f64;
    /// The largest number of activations that training on one sample keeps in memory at a time.
    fn activations(&self, training: &Memory) -> f64;
    /// The drop rate of each residual branch in stochastic depth (arXiv 1603.09382), from the first branch of the network to the
    /// last. `rate` is the rate of the last branch. Empty if nothing is dropped.
    fn drop_rates(&self, depths: &[usize], rate: f64) -> Vec<f64>;
    /// The probability of dropout, whose masks libtorch's generator draws; 0 if there is no dropout.
    fn dropout(&self) -> f64 {
        0.0
    }

    /// Whether a stage of the target can start with the meta model's weights, by [`Family::grown`].
    fn can_grow(&self) -> bool {
        false
    }
    /// How a parameter of a stage with `depth` blocks starts, so that the stage computes the same function as the meta model's
    /// stage, which has `meta_depth` blocks.
    fn grown(&self, _parameter: &Parameter, _depth: usize, _meta_depth: usize) -> Grown {
        Grown::Fresh
    }

    /// The number of blocks of a network, or of a stage, whose tensors have these names in another program's file.
    fn blocks_in(&self, names: &mut dyn Iterator<Item = &str>) -> usize {
        count(names.filter_map(|name| numbered(name, "blocks.")))
    }
    /// Whether an import can ignore a tensor of this name in another program's file.
    fn is_needless(&self, _name: &str) -> bool {
        false
    }
    /// The cure in the error about an imported file with other numbers of blocks: the config keys to set.
    fn cure_for_depths(&self) -> &'static str {
        "set model.depths (or model.meta_depth)"
    }
    /// Whether an imported tensor of this shape fits the parameter, as it is or after [`Family::resampled`].
    fn takes(&self, parameter: &Parameter, shape: &[i64]) -> bool {
        parameter.shape == shape
    }
    /// The imported tensor, resampled if its shape is not the parameter's.
    fn resampled(&self, _parameter: &Parameter, tensor: tch::Tensor) -> tch::Tensor {
        tensor
    }
    /// The name of a bias that this model lacks, but that other programs may store beside this weight. A stored bias must be zero.
    fn absent_bias(&self, _weight: &str) -> Option<String> {
        None
    }
    /// The cure for a parameter that an imported file lacks, as the end of an error text; empty if there is no cure.
    fn cure_for_missing(&self, _name: &str) -> &'static str {
        ""
    }
    /// Whether the weights of `other` can be imported. `other` may differ in the image size, in the depths, which the import
    /// compares by itself, and in some keys that change no parameter.
    fn is_like(&self, other: &Model) -> bool;
}

/// The number between the prefix of a name and the next dot; none if the name has no such number.
fn numbered(name: &str, prefix: &str) -> Option<usize> {
    name.strip_prefix(prefix)?.split_once('.')?.0.parse().ok()
}

/// The largest number + 1, which is the count of items that are numbered from 0; 0 if there are no numbers.
fn count(numbers: impl Iterator<Item = usize>) -> usize {
    numbers.max().map_or(0, |last| last.saturating_add(1))
}

/// The form of a network's tokens. Each token stands for a patch of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tokens {
    /// The height of a patch in pixels, which is also its width.
    pub patch: usize,
    /// How many numbers a token holds.
    pub width: usize,
}

/// The values on which the memory of training depends, besides the sizes of the network.
#[derive(Debug, Clone)]
pub struct Memory<'a> {
    /// The number of blocks of each stage.
    pub depths: &'a [usize],
    /// The stages that train.
    pub trained: Range<usize>,
    /// Whether a block keeps only its input and is recomputed in the backward pass.
    pub checkpointing: bool,
    pub on_cpu: bool,
}

/// The families that a config can name, except ViT, each with its defaults as TOML. This TOML has the defaults of the `[model]`
/// table, and of other keys whose default differs from `configs/default.toml`. That file has the defaults of ViT.
const DEFAULTS: &[(&str, &str)] = &[
    ("resnet", resnet::DEFAULTS),
    #[cfg(test)]
    ("toy", toy::DEFAULTS),
];

const VIT: &str = "vit";

/// The names of all families in the config.
pub fn names() -> Vec<&'static str> {
    DEFAULTS.iter().map(|(name, _)| *name).chain([VIT]).collect()
}

/// The defaults of a family; none for ViT, whose defaults are in `configs/default.toml`, and for an unknown name.
pub fn defaults(name: &str) -> Option<Table> {
    let (_, text) = DEFAULTS.iter().find(|(known, _)| *known == name)?;
    Some(text.parse().expect("the embedded defaults are TOML"))
}

impl<'de> Deserialize<'de> for Model {
    /// Reads a flat table. Its key `family` decides which other keys it may have. Without the key `family`, the family is ViT.
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
            "resnet" => Resnet::deserialize(keys).map(Model::Resnet),
            #[cfg(test)]
            "toy" => Toy::deserialize(keys).map(Model::Toy),
            _ => {
                return Err(D::Error::custom(format!("unknown family {family:?}; give one of {}", names().join(", "))));
            }
        };
        model.map_err(|error| D::Error::custom(error.message()))
    }
}
