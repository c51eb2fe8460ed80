//! Fresh weights and buffers, from the counter-based generator: the same for any number of ranks.

use crate::family::parameter::{Parameter, Start};
use crate::random::{Random, key_of_text};
use crate::weights::Weights;
use tch::Tensor;

/// Fresh weights of the given parameters. A stage's weights depend on the seed, the stage and the names alone.
pub fn fresh<'a>(parameters: impl Iterator<Item = &'a Parameter>, seed: u64) -> Weights {
    parameters.map(|p| ((p.stage, p.name.clone()), fresh_one(p, seed))).collect()
}

fn fresh_one(parameter: &Parameter, seed: u64) -> Tensor {
    let mut random = Random::new(&[seed, INIT, parameter.stage as u64, key_of_text(&parameter.name)]);
    let mut draw = || match parameter.start {
        Start::Normal => 0.02 * random.normal(),
        Start::FanIn { fan_in } => {
            let bound = 1.0 / (fan_in as f64).sqrt();
            random.between(-bound, bound)
        }
        Start::Zeros => 0.0,
        Start::Ones => 1.0,
    };
    let numbers: Vec<f32> = (0..parameter.count()).map(|_| draw() as f32).collect();
    Tensor::from_slice(&numbers).view(&parameter.shape[..])
}

const INIT: u64 = 4;
