//! The names that other programs give a ViT's parameters.

/// The names of one kind of parameter in each program that reads exports. `{i}` is the number of the block, `{p}` is `weight` or
/// `bias`.
pub struct Row {
    /// timm's name, which is also this program's name of the parameter in the whole network. Unlike this name, the name within a
    /// stage counts only the blocks of the stage.
    pub timm: &'static str,
    /// The name in transformers' `ViTForImageClassification`. `{qkv}` stands for the names of the three tensors into which the rows
    /// of `qkv` are split.
    pub transformers: &'static str,
    /// The name in mmsegmentation's `VisionTransformer`; none if that class has no such parameter.
    pub mmseg: Option<&'static str>,
    /// Whether ViTDet (detectron2, mmdetection) has the parameter, under timm's name.
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

/// Finds the row of the table that fits a timm name. Also returns two parts of the name: the number of the block, which is empty if
/// the name has no block, and the text after the last dot, which is empty if the name has no dot.
pub fn find(name: &str) -> (&'static Row, &str, &str) {
    let block = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')).map_or("", |(block, _)| block);
    let part = name.rsplit_once('.').map_or("", |(_, part)| part);
    let matches = |row: &&Row| row.timm.replace("{i}", block).replace("{p}", part) == name;
    (TABLE.iter().find(matches).expect("the table has every parameter of the model"), block, part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn every_parameter_has_a_row_and_vitdet_takes_147_of_vit_bs() {
        let model = Config::parse("", &[]).unwrap().model;
        let names: Vec<String> =
            model.parameters(model.depths()).iter().map(|p| model.whole_name(p, model.depths())).collect();
        assert_eq!(names.len(), 152);
        let rows: Vec<&Row> = names.iter().map(|name| find(name).0).collect();
        assert_eq!(rows.iter().filter(|row| row.vitdet).count(), 147);
        assert_eq!(rows.iter().filter(|row| row.mmseg.is_some()).count(), 148);
    }
}
