//! The one table of names: what each reader calls a parameter.

use super::Named;
use tch::Tensor;

/// One kind of parameter. `{i}` is the block, `{p}` is `weight` or `bias`.
pub struct Row {
    /// timm's name, which is ours.
    pub timm: &'static str,
    /// transformers' `ViTForImageClassification`; at `{qkv}` a tensor of stacked rows becomes three.
    pub transformers: &'static str,
    /// mmsegmentation's `VisionTransformer`, where it takes the parameter.
    pub mmseg: Option<&'static str>,
    /// Whether ViTDet (detectron2, mmdetection) takes it, under timm's name.
    pub vitdet: bool,
}

const fn row(timm: &'static str, transformers: &'static str, mmseg: Option<&'static str>, vitdet: bool) -> Row {
    Row { timm, transformers, mmseg, vitdet }
}

#[rustfmt::skip]
const TABLE: [Row; 11] = [
    row("cls_token", "vit.embeddings.cls_token", Some("cls_token"), false),
    row("pos_embed", "vit.embeddings.position_embeddings", Some("pos_embed"), true),
    row("patch_embed.proj.{p}", "vit.embeddings.patch_embeddings.projection.{p}", Some("patch_embed.projection.{p}"), true),
    row("blocks.{i}.norm1.{p}", "vit.encoder.layer.{i}.layernorm_before.{p}", Some("layers.{i}.ln1.{p}"), true),
    row("blocks.{i}.attn.qkv.{p}", "vit.encoder.layer.{i}.attention.attention.{qkv}.{p}", Some("layers.{i}.attn.attn.in_proj_{p}"), true),
    row("blocks.{i}.attn.proj.{p}", "vit.encoder.layer.{i}.attention.output.dense.{p}", Some("layers.{i}.attn.attn.out_proj.{p}"), true),
    row("blocks.{i}.norm2.{p}", "vit.encoder.layer.{i}.layernorm_after.{p}", Some("layers.{i}.ln2.{p}"), true),
    row("blocks.{i}.mlp.fc1.{p}", "vit.encoder.layer.{i}.intermediate.dense.{p}", Some("layers.{i}.ffn.layers.0.0.{p}"), true),
    row("blocks.{i}.mlp.fc2.{p}", "vit.encoder.layer.{i}.output.dense.{p}", Some("layers.{i}.ffn.layers.1.{p}"), true),
    row("norm.{p}", "vit.layernorm.{p}", None, false),
    row("head.{p}", "classifier.{p}", None, false),
];

/// The tensors that a reader takes, under its names; no number is copied.
pub fn renamed(tensors: &[Named], column: impl Fn(&Row) -> Option<&'static str>) -> Vec<Named> {
    let mut all = Vec::new();
    for Named { name, tensor } in tensors {
        let (row, block, part) = find(name);
        let Some(pattern) = column(row) else { continue };
        let theirs = pattern.replace("{i}", block).replace("{p}", part);
        if theirs.contains("{qkv}") {
            all.extend(split(&theirs, tensor));
        } else {
            all.push(Named { name: theirs, tensor: tensor.shallow_clone() });
        }
    }
    all
}

/// Queries, keys and values are a third of the rows each.
fn split(pattern: &str, tensor: &Tensor) -> Vec<Named> {
    let thirds = ["query", "key", "value"].into_iter().zip(tensor.chunk(3, 0));
    thirds.map(|(third, tensor)| Named { name: pattern.replace("{qkv}", third), tensor }).collect()
}

/// The row of a timm name, its block, and `weight` or `bias`.
fn find(name: &str) -> (&'static Row, &str, &str) {
    let block = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')).map_or("", |(block, _)| block);
    let part = name.rsplit_once('.').map_or("", |(_, part)| part);
    let matches = |row: &&Row| row.timm.replace("{i}", block).replace("{p}", part) == name;
    (TABLE.iter().find(matches).expect("the table has every parameter of the model"), block, part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::plan::parameters::parameters;

    #[test]
    fn every_parameter_has_a_row_and_vitdet_takes_147_of_vit_bs() {
        let model = Config::parse("", &[]).unwrap().model;
        let names: Vec<String> = parameters(&model, &model.depths).iter().map(|p| p.timm_name(&model.depths)).collect();
        assert_eq!(names.len(), 152);
        let rows: Vec<&Row> = names.iter().map(|name| find(name).0).collect();
        assert_eq!(rows.iter().filter(|row| row.vitdet).count(), 147);
        assert_eq!(rows.iter().filter(|row| row.mmseg.is_some()).count(), 148);
    }

    #[test]
    fn transformers_takes_queries_keys_and_values_apart() {
        let stacked = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.]);
        let ours = [Named { name: "blocks.11.attn.qkv.bias".into(), tensor: stacked }];
        let theirs = renamed(&ours, |row| Some(row.transformers));
        let found: Vec<(&str, Vec<f32>)> =
            theirs.iter().map(|n| (n.name.as_str(), Vec::try_from(&n.tensor).unwrap())).collect();
        assert_eq!(found[1], ("vit.encoder.layer.11.attention.attention.key.bias", vec![3., 4.]));
        assert_eq!(found.len(), 3);
    }
}
