//! The tensors of a model under the names that a reader expects.

use super::Named;
use crate::family::vit::names::{Row, find};
use tch::Tensor;

/// The tensors that a reader takes, as views of the given tensors. `name_of` gives the reader's name in a row of the table, or none
/// if the reader takes no such tensor.
pub fn renamed(tensors: &[Named], name_of: impl Fn(&Row) -> Option<&'static str>) -> Vec<Named> {
    let mut all = Vec::new();
    for Named { name, tensor } in tensors {
        let (row, block, part) = find(name);
        let Some(pattern) = name_of(row) else { continue };
        let new_name = pattern.replace("{i}", block).replace("{p}", part);
        if new_name.contains("{qkv}") {
            all.extend(split_qkv(&new_name, tensor));
        } else {
            all.push(Named { name: new_name, tensor: tensor.shallow_clone() });
        }
    }
    all
}

/// Splits a tensor whose rows belong to the queries, the keys and the values: a third of the rows each.
fn split_qkv(pattern: &str, tensor: &Tensor) -> Vec<Named> {
    let thirds = ["query", "key", "value"].into_iter().zip(tensor.chunk(3, 0));
    thirds.map(|(third, tensor)| Named { name: pattern.replace("{qkv}", third), tensor }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
