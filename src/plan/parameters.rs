//! The one table of parameters: stage, timm's name, shape. The model, the store, the exports and `plan` all read it.

use crate::config::Model;

/// One parameter tensor of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// The stage that owns it: stage 0 has the embeddings, the last the final norm and head (paper, section 3).
    pub stage: usize,
    /// The official `model_stages[stage]` name: timm's, with blocks numbered from 0 within the stage.
    pub name: String,
    pub shape: Vec<i64>,
    pub kind: Kind,
}

/// What a parameter is, which decides its initialisation and weight decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Linear weight: truncated normal 0.02, decayed.
    Weight,
    /// The patch projection's weight (decayed) and bias: the convolution's default, uniform in ±1/√`fan_in`.
    Patch { fan_in: usize },
    /// `cls_token`, `pos_embed`: truncated normal 0.02, not decayed.
    Embedding,
    /// Biases: zero, not decayed.
    Bias,
    /// LayerNorm weight: one, not decayed.
    Scale,
}

impl Parameter {
    pub fn count(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// Weight decay holds for matrices and kernels only: not for 1-d parameters, `cls_token` and `pos_embed`.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1 && self.kind != Kind::Embedding
    }

    /// timm's name in the whole network: the block number counts through all stages.
    pub fn timm_name(&self, depths: &[usize]) -> String {
        match self.name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
            Some((block, rest)) => {
                let before: usize = depths[..self.stage].iter().sum();
                format!("blocks.{}.{rest}", before + block.parse::<usize>().expect("a block's name holds its number"))
            }
            None => self.name.clone(),
        }
    }
}

/// The parameters of the network with these stage depths, in timm's order of `state_dict`.
pub fn parameters(model: &Model, depths: &[usize]) -> Vec<Parameter> {
    let (width, hidden) = (model.width as i64, model.hidden() as i64);
    let last = depths.len() - 1;
    let mut all = Vec::new();
    let mut add = |stage: usize, name: String, shape: &[i64], kind: Kind| {
        all.push(Parameter { stage, name, shape: shape.to_vec(), kind });
    };
    let (channels, patch, classes) = (model.channels as i64, model.patch_size as i64, model.classes as i64);
    add(0, "cls_token".into(), &[1, 1, width], Kind::Embedding);
    add(0, "pos_embed".into(), &[1, model.tokens() as i64, width], Kind::Embedding);
    let proj = Kind::Patch { fan_in: (channels * patch * patch) as usize };
    add(0, "patch_embed.proj.weight".into(), &[width, channels, patch, patch], proj);
    add(0, "patch_embed.proj.bias".into(), &[width], proj);
    for (stage, &depth) in depths.iter().enumerate() {
        for block in 0..depth {
            let mut pair = |name: &str, weight: &[i64], kind: Kind, bias: bool| {
                add(stage, format!("blocks.{block}.{name}.weight"), weight, kind);
                if bias {
                    add(stage, format!("blocks.{block}.{name}.bias"), &weight[..1], Kind::Bias);
                }
            };
            pair("norm1", &[width], Kind::Scale, true);
            pair("attn.qkv", &[3 * width, width], Kind::Weight, model.qkv_bias);
            pair("attn.proj", &[width, width], Kind::Weight, true);
            pair("norm2", &[width], Kind::Scale, true);
            pair("mlp.fc1", &[hidden, width], Kind::Weight, true);
            pair("mlp.fc2", &[width, hidden], Kind::Weight, true);
        }
    }
    add(last, "norm.weight".into(), &[width], Kind::Scale);
    add(last, "norm.bias".into(), &[width], Kind::Bias);
    add(last, "head.weight".into(), &[classes, width], Kind::Weight);
    add(last, "head.bias".into(), &[classes], Kind::Bias);
    all
}

/// Parameters in the order of flat buffers, each with its first number's place: those with weight decay come first, each
/// part as it was.
pub fn flat_order(parameters: Vec<Parameter>) -> Vec<(usize, Parameter)> {
    let (decayed, plain): (Vec<_>, Vec<_>) = parameters.into_iter().partition(Parameter::decays);
    let mut end = 0;
    let place = |parameter: Parameter| {
        let start = end;
        end += parameter.count();
        (start, parameter)
    };
    decayed.into_iter().chain(plain).map(place).collect()
}

/// How many numbers each stage's parameters hold, without listing them all: a plan may have a thousand stages.
pub fn counts(model: &Model, depths: &[usize]) -> Vec<usize> {
    let (mut block, mut first, mut last) = (0, 0, 0);
    for parameter in parameters(model, &[1]) {
        *match parameter.name.split('.').next() {
            Some("blocks") => &mut block,
            Some("norm" | "head") => &mut last,
            _ => &mut first,
        } += parameter.count();
    }
    let mut counts: Vec<usize> = depths.iter().map(|depth| depth * block).collect();
    counts[0] += first;
    counts[depths.len() - 1] += last;
    counts
}
