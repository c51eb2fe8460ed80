//! Draws fresh weights and buffers from the counter-based generator, so that they are the same for any number of ranks.

use crate::family::parameter::{Initial, Parameter};
use crate::random::{Random, key_of_text};
use crate::weights::{Weights, floats_mut};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// Draws fresh weights for the given parameters on all cores. The weights of a parameter depend only on the seed and on that
/// parameter.
pub fn fresh<'a>(parameters: impl Iterator<Item = &'a Parameter>, seed: u64) -> Weights {
    let mut parameters: Vec<&Parameter> = parameters.collect();
    // The largest parameters come first. Rayon gives the second halves of its lists to idle threads, and these hold small
    // parameters.
    parameters.sort_by_key(|parameter| std::cmp::Reverse(parameter.count()));
    // Only this thread calls libtorch. Every other thread that called it would get OpenMP threads of its own, and more OpenMP
    // threads than cores would slow down every later step.
    let allocate = |parameter: &&Parameter| Tensor::empty(&parameter.shape[..], (Kind::Float, Device::Cpu));
    let mut tensors: Vec<Tensor> = parameters.iter().map(allocate).collect();
    let to_draw: Vec<_> = parameters.iter().zip(tensors.iter_mut().map(floats_mut)).collect();
    to_draw.into_par_iter().with_max_len(1).for_each(|(parameter, numbers)| draw(parameter, seed, numbers));
    parameters.into_iter().map(|parameter| (parameter.stage, parameter.name.clone())).zip(tensors).collect()
}

/// Draws the numbers of one parameter.
fn draw(parameter: &Parameter, seed: u64, numbers: &mut [f32]) {
    let mut random = Random::new(&[seed, INIT, parameter.stage as u64, key_of_text(&parameter.name)]);
    numbers.fill_with(|| match parameter.start {
        Initial::Normal => (0.02 * random.normal()) as f32,
        Initial::FanIn { fan_in } => {
            let bound = 1.0 / (fan_in as f64).sqrt();
            random.between(-bound, bound) as f32
        }
        Initial::Uniform { bound } => random.between(-bound, bound) as f32,
        Initial::FanOut { fan_out } => ((2.0 / fan_out as f64).sqrt() * random.normal()) as f32,
        Initial::Deviation { deviation } => (deviation * random.normal()) as f32,
        Initial::Zeros => 0.0,
        Initial::Ones => 1.0,
    });
}

/// The number in random keys that keeps fresh weights apart from other random numbers.
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
            let mut alone = Tensor::empty(&parameter.shape[..], (Kind::Float, Device::Cpu));
            draw(parameter, 5, floats_mut(&mut alone));
            assert_eq!(one[&(parameter.stage, parameter.name.clone())], alone, "{}", parameter.name);
        }
    }
}
