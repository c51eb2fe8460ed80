//! A minimal family for tests: an embedding of the centred images, residual layers, a linear head, and one buffer, which holds the
//! running mean of each pixel. libtorch's autograd computes the backward pass.

use super::parameter::{Initial, Parameter, Role};
use super::shape::Shape;
use super::{Family, Memory, Model};
use anyhow::Result;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Toy {
    #[serde(default)]
    family: Name,
    image_size: usize,
    channels: usize,
    pub classes: usize,
    pub width: usize,
    depths: Vec<usize>,
}

/// The name of the family. It is stored with the other keys, because it decides which keys there are.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    #[default]
    Toy,
}

pub const DEFAULTS: &str = "[run]\nexport = [\"pth\"]\n[model]\nfamily = \"toy\"\nimage_size = 4\nchannels = 3\nclasses = 5\nwidth = 8\ndepths = [2, 2]";

impl Family for Toy {
    fn image_size(&self) -> usize {
        self.image_size
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn border(&self, _stage: usize) -> Shape {
        Shape::Vector { width: self.width }
    }

    fn depths(&self) -> &[usize] {
        &self.depths
    }

    fn meta_depths(&self) -> Vec<usize> {
        vec![1; self.depths.len()]
    }

    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn parameters(&self, depths: &[usize]) -> Vec<Parameter> {
        let (width, classes) = (self.width as i64, self.classes as i64);
        let pixels = (self.channels * self.image_size.pow(2)) as i64;
        let row = |stage: usize, name: &str, shape: &[i64], start: Initial, role: Role| Parameter {
            stage,
            name: name.into(),
            shape: shape.to_vec(),
            start,
            role,
        };
        let fan_in = |numbers: i64| Initial::FanIn { fan_in: numbers as usize };
        let mut all = vec![
            row(0, "embed.weight", &[width, pixels], fan_in(pixels), Role::Decayed),
            row(0, "embed.mean", &[pixels], Initial::Zeros, Role::Buffer { momentum: 0.1 }),
        ];
        for (stage, &depth) in depths.iter().enumerate() {
            for layer in 0..depth {
                all.push(row(stage, &format!("{layer}.weight"), &[width, width], fan_in(width), Role::Decayed));
                all.push(row(stage, &format!("{layer}.bias"), &[width], Initial::Zeros, Role::Plain));
            }
        }
        all.push(row(depths.len() - 1, "head.weight", &[classes, width], fan_in(width), Role::Decayed));
        all
    }

    fn whole_name(&self, parameter: &Parameter, _: &[usize]) -> String {
        format!("{}.{}", parameter.stage, parameter.name)
    }

    fn stage_flops(&self, depths: &[usize], stage: usize) -> f64 {
        (2 * depths[stage] * self.width.pow(2)) as f64
    }

    fn activations(&self, training: &Memory) -> f64 {
        (training.depths.iter().sum::<usize>() * self.width) as f64
    }

    fn drop_rates(&self, _: &[usize], _: f64) -> Vec<f64> {
        Vec::new()
    }

    fn is_like(&self, other: &Model) -> bool {
        matches!(other, Model::Toy(other) if other == self)
    }
}
