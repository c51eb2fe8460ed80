//! Estimates the cost of a phase by formulas: parameters, floating-point operations and memory. `incubate plan` and the reports
//! print the estimates.

use super::{PhasePlan, Plan, detection, segmentation};
use crate::config::{Optimiser, Precision, TaskKind};
use crate::family::{Memory, Model};
use crate::plan::head::Head;

/// The cost of one phase.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Cost {
    /// The number of parameters of the network and of the heads of its task. The heads of local losses do not count.
    pub parameters: u64,
    /// The number of these parameters that the phase trains.
    pub trained_parameters: u64,
    /// The number of samples that pass through the network in training.
    pub images: u64,
    /// The floating-point operations of the phase. A multiply-add counts as two.
    pub flops: f64,
}

/// The cost of a phase.
pub fn cost(plan: &Plan, phase: &PhasePlan) -> Cost {
    let counts = plan.config.model.counts(&phase.depths);
    let sum = |stages: &[usize]| stages.iter().sum::<usize>() as u64;
    let heads = of_heads(plan).parameters;
    let (all, trained) = (sum(&counts) + heads, sum(&counts[phase.trained.clone()]) + heads);
    let images = phase.steps * phase.training.global_batch as u64;
    Cost { parameters: all, trained_parameters: trained, images, flops: images as f64 * sample_flops(plan, phase) }
}

/// The estimated peak memory of one replica in bytes: weights, gradients, moments, and the activations of a micro-batch.
pub fn memory(plan: &Plan, phase: &PhasePlan, on_cpu: bool) -> u64 {
    let cost = cost(plan, phase);
    let micro = plan.config.run.micro_batch.samples().min(phase.training.global_batch) as f64;
    let state = state_bytes(plan, phase, cost.parameters, cost.trained_parameters);
    (state + micro * activation_bytes(plan, phase, on_cpu)) as u64
}

/// The bytes of the parameters and of the optimiser's state. All stages have weights in the number type of the computation. Trained
/// stages also have fp32 gradients and moments. If the number type is bf16, they also have fp32 weights.
fn state_bytes(plan: &Plan, phase: &PhasePlan, all: u64, trained: u64) -> f64 {
    let number = number_bytes(plan);
    // The heads of local losses train too, but [`Cost`] does not count their parameters.
    let heads: usize = heads(phase).flat_map(|head| head.parameters(0)).map(|parameter| parameter.count()).sum();
    let (all, trained) = (all + heads as u64, trained + heads as u64);
    let moments = match phase.training.optimiser {
        Optimiser::AdamW => 2.0,
        Optimiser::Sgd => 1.0,
    };
    let exact = moments + if number < 4.0 { 2.0 } else { 1.0 };
    number * all as f64 + 4.0 * exact * trained as f64
}

/// The bytes of one number in the computation.
fn number_bytes(plan: &Plan) -> f64 {
    match plan.config.run.precision {
        Precision::Bf16 => 2.0,
        Precision::Fp32 | Precision::Tf32 => 4.0,
    }
}

/// The smallest micro-batch of a task. Classification mixes samples in pairs. The heads of segmentation have BatchNorm over the
/// micro-batch. Detection does neither.
pub fn smallest_micro_batch(task: TaskKind) -> usize {
    match task {
        TaskKind::Classification | TaskKind::Segmentation => 2,
        TaskKind::Detection => 1,
    }
}

/// The largest even micro-batch of at most `most` samples whose estimated memory leaves a tenth of `memory` bytes free, or 1 if the
/// task allows it and two samples do not fit; none if not even the smallest micro-batch fits.
pub fn fitting_micro_batch(plan: &Plan, phase: &PhasePlan, memory: u64, most: usize, on_cpu: bool) -> Option<usize> {
    let cost = cost(plan, phase);
    let free = 0.9 * memory as f64 - state_bytes(plan, phase, cost.parameters, cost.trained_parameters);
    let fitting = (free / activation_bytes(plan, phase, on_cpu)).max(0.0) as usize;
    let smallest = smallest_micro_batch(plan.config.task);
    (fitting.min(most) >= smallest).then(|| (fitting.min(most) / 2 * 2).max(smallest))
}

/// The operations of one forward pass on one sample through the network with these stage depths.
pub fn forward_flops(model: &Model, depths: &[usize]) -> f64 {
    (0..depths.len()).map(|stage| model.stage_flops(depths, stage)).sum()
}

/// The operations of training on one sample. Frozen stages before the trained stages only run forward. Trained stages also compute
/// the gradients of activations and of weights, each of which takes as many operations as the forward pass. Frozen stages after the
/// trained stages also compute the gradients of activations, but not of weights. The heads of local losses count as trained.
pub fn training_flops(model: &Model, phase: &PhasePlan) -> f64 {
    let of_stage = |stage| {
        let passes = match stage {
            s if s < phase.trained.start => 1.0,
            s if s < phase.trained.end => 3.0,
            _ => 2.0,
        };
        passes * model.stage_flops(&phase.depths, stage)
    };
    (0..phase.depths.len()).map(of_stage).sum::<f64>() + heads(phase).map(|head| 3.0 * head.flops()).sum::<f64>()
}

/// The heads of a phase's local losses.
fn heads(phase: &PhasePlan) -> impl Iterator<Item = &Head> {
    phase.borders.iter().flat_map(|border| &border.losses).map(|loss| &loss.head)
}

/// The operations of training on one sample, including the heads of the config's task.
pub fn sample_flops(plan: &Plan, phase: &PhasePlan) -> f64 {
    training_flops(&plan.config.model, phase) + 3.0 * of_heads(plan).flops
}

/// The cost of the heads of the config's task; 0 for classification, whose head belongs to the network.
struct OfHeads {
    parameters: u64,
    /// The operations of a forward pass on one sample.
    flops: f64,
    /// The numbers that training on one sample keeps in memory.
    activations: f64,
}

fn of_heads(plan: &Plan) -> OfHeads {
    let segmentation = segmentation::Architecture::of(&plan.config).map(|a| (a.count(), a.flops(), a.activations()));
    let detection = detection::Architecture::of(&plan.config).map(|a| (a.count(), a.flops(), a.activations()));
    let (parameters, flops, activations) = segmentation.or(detection).unwrap_or_default();
    OfHeads { parameters: parameters as u64, flops, activations }
}

/// The bytes of the activations of one sample. With local losses, the activations of only one stage and of its heads exist at a
/// time.
fn activation_bytes(plan: &Plan, phase: &PhasePlan, on_cpu: bool) -> f64 {
    let activations = |depths: &[usize], trained| {
        let checkpointing = plan.config.run.activation_checkpointing;
        plan.config.model.activations(&Memory { depths, trained, checkpointing, on_cpu })
    };
    let whole = || activations(&phase.depths, phase.trained.clone());
    let of_stage = |stage: usize| {
        let own = phase.borders.iter().filter(|border| border.stage == stage).flat_map(|border| &border.losses);
        activations(&phase.depths[..=stage], stage..stage + 1) + own.map(|loss| loss.head.activations()).sum::<f64>()
    };
    let largest = || (0..phase.depths.len()).map(of_stage).fold(0.0, f64::max);
    number_bytes(plan) * (of_heads(plan).activations + if phase.borders.is_empty() { whole() } else { largest() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, MicroBatch};
    use crate::run::table::{DGL, E2E, MODULE};

    fn plan(model: &str) -> Plan {
        Plan::new(Config::parse(model, &[]).unwrap(), 1_281_167).unwrap()
    }

    #[test]
    fn vit_b_and_vit_l_have_the_published_parameter_counts() {
        let count = |text: &str| {
            let plan = plan(text);
            cost(&plan, &plan.phase(&E2E, None)).parameters
        };
        assert_eq!(count(""), 86_567_656);
        assert_eq!(count("[model]\nwidth = 1024\nheads = 16\ndepths = [6, 6, 6, 6]"), 304_326_632);
    }

    #[test]
    fn vit_b_forward_is_17_6_gflop_per_image_by_multiply_adds() {
        let plan = plan("");
        let flops = forward_flops(&plan.config.model, plan.config.model.depths());
        // timm counts 17.58 G multiply-adds for vit_base_patch16_224 including attention.
        assert!((flops / 2.0 / 17.58e9 - 1.0).abs() < 0.01, "{flops}");
    }

    #[test]
    fn the_micro_batch_that_fits_fills_the_memory_by_its_own_estimate() {
        let space = 40 << 30;
        let fit = |run: &str| {
            let mut plan = plan(&format!("[run]\n{run}"));
            let phase = plan.phase(&E2E, None);
            let fitting = |memory, most| fitting_micro_batch(&plan, &phase, memory, most, true);
            assert_eq!(fitting(space, 33), Some(32), "at most what is asked for");
            assert_eq!(fitting(1 << 30, 2048), None);
            let fitting = fitting(space, 2048).unwrap();
            plan.config.run.micro_batch = MicroBatch::Samples(fitting);
            let used = memory(&plan, &phase, true) as f64 / space as f64;
            assert!((0.87..=0.9).contains(&used), "{run}: {fitting} fills {used}");
            fitting
        };
        let [fp32, bf16] = [fit(""), fit("precision = \"bf16\"")];
        assert!((fp32 as f64 * 1.9..fp32 as f64 * 2.2).contains(&(bf16 as f64)), "{fp32}, {bf16}");
        assert!(fit("precision = \"fp32\"\nactivation_checkpointing = true") > 4 * fp32);
    }

    #[test]
    fn an_open_device_is_decided_by_the_nodes_or_this_machine() {
        let is_for_cpu = |text: &str| [false, true].map(|has_gpu| plan(text).is_for_cpu(has_gpu));
        assert_eq!(is_for_cpu("[run]\ndevice = \"cpu\""), [true, true]);
        assert_eq!(is_for_cpu("[run]\ndevice = \"cuda\""), [false, false]);
        assert_eq!(is_for_cpu("[run]\ndevice = \"auto\""), [true, false]);
        assert_eq!(is_for_cpu("[slurm]\ngpus_per_node = 1"), [false, false]);
    }

    #[test]
    fn a_cpu_keeps_more_activations_than_a_gpu() {
        let plan = plan("");
        let phase = plan.phase(&E2E, None);
        assert!(memory(&plan, &phase, true) > memory(&plan, &phase, false));
    }

    #[test]
    fn local_losses_cost_more_computation_and_memory_for_one_stage() {
        for text in ["", "[model]\nfamily = \"resnet\"\ndepths = [12, 14, 14, 14]\n[run]\nmicro_batch = 128"] {
            let plan = plan(text);
            let [whole, local] = [&E2E, &DGL].map(|row| plan.phase(row, None));
            let more = training_flops(&plan.config.model, &local) / training_flops(&plan.config.model, &whole) - 1.0;
            assert!((1e-5..0.02).contains(&more), "{more}");
            let [whole, local] = [&whole, &local].map(|phase| activation_bytes(&plan, phase, true));
            assert!((0.2..0.5).contains(&(local / whole)), "{}", local / whole);
            let [whole, local] = [&E2E, &DGL].map(|row| cost(&plan, &plan.phase(row, None)).parameters);
            assert_eq!(whole, local, "heads are not part of the network");
        }
    }

    #[test]
    fn a_module_costs_less_than_end_to_end_and_later_stages_cost_less_than_earlier_ones() {
        let plan = plan("");
        let of = |phase: &PhasePlan| training_flops(&plan.config.model, phase);
        let modules: Vec<f64> = (0..4).map(|i| of(&plan.phase(&MODULE, Some(i)))).collect();
        assert!(modules.windows(2).all(|w| w[1] < w[0]));
        assert!(modules[0] < 0.5 * of(&plan.phase(&E2E, None)));
    }
}
