//! Imports weights into a run. The sources are checkpoints of the official code (`model_stages`), .pth files of DeiT and timm, and
//! .safetensors. An artefact of incubate can also be imported, to continue at another image size or with a new head. Nothing in an
//! imported file is executed, and memory is allocated only after sizes have been checked.

mod globals;
mod machine;
mod pickle;
mod rebuild;
mod safetensors;
mod stored;
mod torch_file;

use crate::config::Config;
use crate::family::Model;
use crate::family::parameter::Parameter;
use crate::model::fresh;
use crate::run::graph::Node;
use crate::run::table::{ASSEMBLE, FINETUNE, META};
use crate::store::{Artefact, Header, RunDir, artefact};
use crate::weights::{Weights, floats};
use crate::{require, usage};
use anyhow::{Context, Result, anyhow};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use stored::{Listing, Stored};
use tch::Tensor;

/// The part that the imported weights play in the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The meta model, in which the modules train.
    Meta,
    /// The assembled target, to be fine-tuned.
    Assembled,
    /// The finished target, to be evaluated and exported.
    Final,
}

impl FromStr for Role {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Role> {
        match text {
            "meta" => Ok(Role::Meta),
            "assembled" => Ok(Role::Assembled),
            "final" => Ok(Role::Final),
            _ => Err(anyhow!("give meta, assembled or final")),
        }
    }
}

/// The options of an import.
#[derive(Debug, Clone, Copy, Default)]
pub struct Choice {
    /// If none, the depth of the file's model decides. A model as deep as the config's meta model becomes the meta model. Any other
    /// model becomes the final model, or the assembled model if it gets a new head. The import fails if the config's meta model and
    /// target are equally deep.
    pub role: Option<Role>,
    /// Whether to take the moving averages of the weights instead of the weights.
    pub ema: bool,
    /// Whether to draw a fresh head, because the config has other classes than the file.
    pub new_head: bool,
}

/// Writes the weights in `file` into the run directory as the artefact of their role. Returns the path of the artefact. Position
/// embeddings of another image size are resampled.
///
/// # Errors
/// A usage error if the file is refused, if a part of it does not fit the config, if a weight is not finite, or if the run
/// directory already has the artefact of this role. [`crate::error::Failure::Damaged`] if `file` is a damaged artefact.
pub fn import(config: &Config, file: &Path, choice: Choice) -> Result<PathBuf> {
    require!(
        !(choice.new_head && choice.role == Some(Role::Final)),
        "a final model with a new head has not been trained; leave --new-head out, or import it --as assembled"
    );
    let refused = |error: anyhow::Error| usage!("{}: {error:#}", file.display());
    let mut source = File::open(file).map_err(|e| refused(e.into()))?;
    let Imported { role, depths, weights, class_names } = if is_artefact(&mut source).map_err(refused)? {
        let artefact = artefact::read(file)?;
        from_artefact(config, artefact, choice).map_err(refused)?
    } else {
        from_other_program(config, &source, choice).map_err(refused)?
    };

    let is_finite = |tensor: &Tensor| floats(tensor).iter().all(|weight| weight.is_finite());
    if let Some(((stage, name), _)) = weights.iter().find(|(_, tensor)| !is_finite(tensor)) {
        return Err(usage!(
            "{}: {name} (of stage {stage}) holds numbers that are not finite; give another file",
            file.display()
        ));
    }
    let row = match role {
        Role::Meta => &META,
        Role::Assembled => &ASSEMBLE,
        Role::Final => &FINETUNE,
    };
    let node = Node::new(config, row, None);
    let run = RunDir::open(config)?;
    let path = run.file(&node.file);
    require!(!path.exists(), "{}: there already; delete it, or choose another --run-dir", path.display());
    let header = Header {
        phase: node.name,
        index: None,
        depths,
        step: 0,
        recipe: node.expected.expect("the row writes an artefact").recipe,
        meta: None,
        model: config.model.clone(),
        auxiliary: Vec::new(),
        metrics: BTreeMap::new(),
        class_names,
        data: None,
    };
    artefact::write(&path, &header, &weights, None)?;
    Ok(path)
}

/// The model of a file, with its role in the run.
struct Imported {
    role: Role,
    depths: Vec<usize>,
    weights: Weights,
    /// Empty if the file names no classes, or if the head is new.
    class_names: Vec<String>,
}

/// Whether the file begins like an artefact of incubate (see `seal.rs`).
fn is_artefact(file: &mut File) -> Result<bool> {
    let mut first = Vec::new();
    file.take(SEALED.len() as u64).read_to_end(&mut first)?;
    file.rewind()?;
    Ok(first == SEALED)
}

const SEALED: &[u8] = b"incubate artefact,";

/// Takes the model of an artefact of incubate. It may differ from the config's model in the image size, and with a new head also in
/// the number of classes.
fn from_artefact(config: &Config, artefact: Artefact, choice: Choice) -> Result<Imported> {
    let model = &config.model;
    let (header, mut weights) = (artefact.header, artefact.weights);
    anyhow::ensure!(!choice.ema, "an artefact of incubate holds one set of weights; leave --ema out");
    anyhow::ensure!(header.index.is_none(), "it holds a single module; give a whole model, such as final.h5");
    let (comparable, may_differ) = if choice.new_head {
        (header.model.with_classes(model.classes()), "image_size and classes")
    } else {
        (header.model, "image_size")
    };
    anyhow::ensure!(
        model.is_like(&comparable),
        "its model differs from the config's [model] in more than {may_differ}"
    );
    let role = choice.role.map_or_else(|| guess_role(model, header.depths.iter().sum(), choice.new_head), Ok)?;
    let depths = depths_of(model, role);
    anyhow::ensure!(header.depths == depths, "{}", wrong_depths(model, &header.depths, &depths));
    for parameter in model.parameters(&depths) {
        if let Some(tensor) = weights.get_mut(&(parameter.stage, parameter.name.clone())) {
            *tensor = model.resampled(&parameter, tensor.shallow_clone());
        }
    }
    let mut class_names = header.class_names;
    if choice.new_head {
        weights.extend(new_head(config, &depths));
        class_names.clear();
    }
    Ok(Imported { role, depths, weights, class_names })
}

/// Takes the model from the file of another program.
fn from_other_program(config: &Config, source: &File, choice: Choice) -> Result<Imported> {
    let model = &config.model;
    let mut listing = list(source, choice.ema)?;
    anyhow::ensure!(
        listing.blocks(model) > 0,
        "no tensor in it has a timm name, such as `{}`; the first names found are {}",
        name_in_a_block(model),
        first_few(&listing.names())
    );
    let role = choice.role.map_or_else(|| guess_role(model, listing.blocks(model), choice.new_head), Ok)?;
    let depths = depths_of(model, role);
    check_depths(model, &listing, &depths)?;
    let head = if choice.new_head { new_head(config, &depths) } else { Weights::new() };
    for (stage, name) in head.keys() {
        listing.take(*stage, name, name);
    }
    let mut weights = read(model, &depths, listing, source, &head)?;
    weights.extend(head);
    Ok(Imported { role, depths, weights, class_names: Vec::new() })
}

/// Fresh weights for the head.
fn new_head(config: &Config, depths: &[usize]) -> Weights {
    let parameters = config.model.parameters(depths);
    fresh(parameters.iter().filter(|parameter| parameter.is_of_head()), config.run.seed)
}

fn depths_of(model: &Model, role: Role) -> Vec<usize> {
    match role {
        Role::Meta => model.meta_depths(),
        Role::Assembled | Role::Final => model.depths().to_vec(),
    }
}

/// Lists the tensors of another program's file. The first bytes show the format: a zip (.pth), a length with a JSON header
/// (.safetensors), or a bare pickle. torch wrote bare pickles before version 1.6. They are refused.
fn list(mut file: &File, ema: bool) -> Result<Listing> {
    let mut first_bytes = [0; 9];
    file.read_exact(&mut first_bytes).context("it breaks off; copy it again")?;
    file.rewind()?;
    match &first_bytes {
        [b'P', b'K', 3, 4, ..] => torch_file::list(file, ema),
        [.., b'{'] if ema => Err(anyhow!("a .safetensors holds one set of weights; leave --ema out")),
        [.., b'{'] => safetensors::list(file),
        [0x80, 2, 0x8a, 10, b'l', 0xfc, ..] => {
            Err(anyhow!("it was written by torch before 1.6; load it with a newer torch and save it again"))
        }
        [0x80, ..] => Err(anyhow!(
            "it is a pickle that torch.save did not write; load it in Python and save its tensors with torch.save"
        )),
        _ => Err(anyhow!("it is neither a .pth of torch nor a .safetensors")),
    }
}

/// The role of a model with this many blocks, if the user does not give a role.
fn guess_role(model: &Model, blocks: usize, new_head: bool) -> Result<Role> {
    let (meta_blocks, target_blocks): (usize, usize) = (model.meta_depths().iter().sum(), model.depths().iter().sum());
    if blocks == meta_blocks && blocks == target_blocks {
        return Err(anyhow!("the config's meta model and target are equally deep; say which it is with --as"));
    }
    Ok(match blocks == meta_blocks {
        true => Role::Meta,
        false if new_head => Role::Assembled,
        false => Role::Final,
    })
}

fn check_depths(model: &Model, listing: &Listing, depths: &[usize]) -> Result<()> {
    let listed = listing.depths(model);
    let fits = match listing {
        Listing::Flat(_) => listed[0] == depths.iter().sum::<usize>(),
        Listing::Stages(_) => listed == depths,
    };
    anyhow::ensure!(fits, "{}", wrong_depths(model, &listed, depths));
    Ok(())
}

fn wrong_depths(model: &Model, found: &[usize], expected: &[usize]) -> String {
    let cure = model.cure_for_depths();
    format!("it holds stages of {found:?} blocks, but {expected:?} are expected; {cure}")
}

/// The name of the first parameter of a block in other programs.
fn name_in_a_block(model: &Model) -> String {
    let parameters = model.parameters(model.depths());
    let of_block = parameters.iter().find(|parameter| parameter.name.starts_with("blocks."));
    of_block.map_or(String::new(), |parameter| model.whole_name(parameter, model.depths()))
}

/// Reads every parameter of the model except the parameters of a new head. Fails if the listing holds another tensor, unless the
/// family can ignore the tensor, or it is a bias that is zero and that the model lacks.
fn read(model: &Model, depths: &[usize], mut listing: Listing, file: &File, new_head: &Weights) -> Result<Weights> {
    let mut weights = Weights::new();
    let parameters = model.parameters(depths);
    for parameter in parameters.into_iter().filter(|p| !new_head.contains_key(&(p.stage, p.name.clone()))) {
        let flat_name = model.whole_name(&parameter, depths);
        let mut take = |stage: &str, flat: &str| listing.take(parameter.stage, stage, flat);
        let Some(stored) = take(&parameter.name, &flat_name) else {
            anyhow::bail!(
                "{}; the first of the other names are {}",
                missing(model, &parameter, &flat_name),
                first_few(&listing.names())
            );
        };
        anyhow::ensure!(
            model.takes(&parameter, &stored.sizes),
            "{flat_name} has shape {:?}, but {:?} is expected; {}",
            stored.sizes,
            parameter.shape,
            cure_for_shape(&parameter)
        );
        if let (Some(name), Some(flat)) = (model.absent_bias(&parameter.name), model.absent_bias(&flat_name)) {
            let bias = take(&name, &flat);
            bias.map_or(Ok(()), |bias| check_zero(&bias, file))
                .with_context(|| format!("the bias beside {flat_name}"))?;
        }
        let tensor = model.resampled(&parameter, stored.read(file).with_context(|| flat_name.clone())?);
        weights.insert((parameter.stage, parameter.name), tensor);
    }
    let unused: Vec<String> = listing.names().into_iter().filter(|name| !model.is_needless(name)).collect();
    anyhow::ensure!(unused.is_empty(), "it also holds {}, which this model does not have", first_few(&unused));
    Ok(weights)
}

/// The cure for a tensor whose shape differs from the parameter's.
fn cure_for_shape(parameter: &Parameter) -> &'static str {
    if parameter.is_of_head() {
        "set model.classes to this file's, or initialise a new head with --new-head"
    } else {
        "set [model] to the sizes of this file"
    }
}

/// The first five names, each of at most 100 characters.
fn first_few(names: &[String]) -> String {
    let first = names.iter().take(5).map(|name| name.chars().take(100).collect::<String>());
    if names.is_empty() { "none".into() } else { first.collect::<Vec<_>>().join(", ") }
}

/// The error text about a parameter that the file lacks.
fn missing(model: &Model, parameter: &Parameter, flat_name: &str) -> String {
    let cure = match parameter.is_of_head() {
        true => "; initialise a new head with --new-head",
        false => model.cure_for_missing(flat_name),
    };
    format!("{flat_name} (stage {}) is missing{cure}", parameter.stage)
}

/// Fails unless this bias is zero. The model has no such bias, but exports write it for readers that expect it.
fn check_zero(bias: &Stored, file: &File) -> Result<()> {
    anyhow::ensure!(
        floats(&bias.read(file)?).iter().all(|&number| number == 0.0),
        "it is not zero, but model.qkv_bias = false; set it to true"
    );
    Ok(())
}

#[cfg(test)]
mod tests;
