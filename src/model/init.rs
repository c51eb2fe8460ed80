//! Fresh weights and buffers, from the counter-based generator: the same for any number of ranks.

use crate::family::parameter::{Parameter, Start};
use crate::random::{Random, key_of_text};
use crate::weights::Weights;
use rayon::prelude::*;
use tch::Tensor;

/// Fresh weights of the given parameters, drawn on all cores. A stage's weights depend on the seed, the stage and the
/// names alone.
pub fn fresh<'a>(parameters: impl Iterator<Item = &'a Parameter>, seed: u64) -> Weights {
    let mut parameters: Vec<&Parameter> = parameters.collect();
    // The largest are drawn first, so that no core is left alone with one at the end.
    parameters.sort_by_key(|parameter| std::cmp::Reverse(parameter.count()));
    let drawn = parameters.into_par_iter().with_max_len(1);
    drawn.map(|p| ((p.stage, p.name.clone()), fresh_one(p, seed))).collect::<Vec<_>>().into_iter().collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn weights_depend_neither_on_the_threads_nor_on_which_parameters_are_drawn_with_them() {
        let config = Config::parse("[model]\nimage_size = 32\nwidth = 64\nheads = 2\ndepths = [2, 2]", &[]).unwrap();
        let table = config.model.parameters(&[2, 2]);
        let on_threads = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| fresh(table.iter(), 5))
        };
        let (one, three) = (on_threads(1), on_threads(3));
        assert_eq!(one, three);
        for parameter in &table {
            assert_eq!(one[&(parameter.stage, parameter.name.clone())], fresh_one(parameter, 5), "{}", parameter.name);
        }
    }
}
