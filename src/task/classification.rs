//! Classification: one class for each image. The network gives logits (b, c). Training targets are distributions over the classes
//! (b, c), because Mixup, CutMix and label smoothing blend classes. The labels of an evaluation are class numbers (b).
//!
//! Tensor names end in their shape: b = batch, c = classes, k = the classes with the highest logits, 1 = a dimension of size 1.

use super::{Better, Loss, Metric};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

const TOP1: Metric = Metric {
    key: "top1",
    name: "top-1",
    unit: "%",
    decimals: 2,
    better: Better::Higher { perfect: 100.0 },
    has_column: true,
};

const TOP5: Metric = Metric { key: "top5", name: "top-5", ..TOP1 };

/// The mean cross entropy with the labels. Mixup, CutMix and label smoothing act on training targets only, so they do not change
/// this metric.
const LOSS: Metric =
    Metric { key: "loss", name: "loss", unit: "", decimals: 4, better: Better::Lower, has_column: false };

pub const METRICS: [Metric; 3] = [TOP1, TOP5, LOSS];

/// The sum over samples and classes of −target · log softmax(logits), in fp32, and its gradient with respect to the logits. Divided
/// by the number of samples, this sum is timm's `SoftTargetCrossEntropy`.
pub fn loss(outputs: &[Tensor], targets_bc: &Tensor) -> Loss {
    let log_probability_bc = outputs[0].log_softmax(-1, Kind::Float);
    let sum = -(targets_bc * &log_probability_bc).sum(Kind::Float);
    let weight_b1 = targets_bc.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
    Loss { sum, gradients: vec![log_probability_bc.exp() * weight_b1 - targets_bc] }
}

/// The same sum as in [`loss`], without its gradient, for use with autograd.
pub fn cross_entropy(logits_bc: &Tensor, targets_bc: &Tensor) -> Tensor {
    -(targets_bc * logits_bc.log_softmax(-1, Kind::Float)).sum(Kind::Float)
}

pub fn random_targets(samples: usize, classes: usize) -> Tensor {
    Tensor::randn([samples as i64, classes as i64], (Kind::Float, Device::Cpu)).softmax(-1, Kind::Float)
}

/// Adds a batch to the sums, which are in the order of [`METRICS`]. The first sum counts the images whose label has the highest
/// logit. The second sum counts the images whose label has one of the five highest logits. The third sum adds up the losses.
pub fn add(sums: &mut [f64], outputs: &[Tensor], labels_b: &Tensor) {
    let [logits_bc] = outputs else { unreachable!("classification reads the logits alone") };
    let classes = logits_bc.size()[1];
    let (_, best_bk) = logits_bc.topk(classes.min(5), 1, true, true);
    let hits_bk = best_bk.eq_tensor(&labels_b.unsqueeze(1));
    sums[0] += hits_bk.select(1, 0).sum(Kind::Double).double_value(&[]);
    sums[1] += hits_bk.sum(Kind::Double).double_value(&[]);
    let log_probability = logits_bc.log_softmax(-1, Kind::Float).gather(1, &labels_b.unsqueeze(1), false);
    sums[2] -= log_probability.sum(Kind::Double).double_value(&[]);
}

/// The standard error of an accuracy of `value` percent on `images` images, in percentage points (binomial distribution).
pub fn headline_error(value: f64, images: usize) -> Option<f64> {
    let share = (value / 100.0).clamp(0.0, 1.0);
    (images > 0).then(|| 100.0 * (share * (1.0 - share) / images as f64).sqrt())
}

pub fn values(sums: &[f64], images: f64) -> BTreeMap<String, f64> {
    let factors = [100.0, 100.0, 1.0];
    let means = sums.iter().map(|sum| sum / images).zip(factors);
    METRICS.iter().zip(means).map(|(metric, (mean, factor))| (metric.key.to_string(), factor * mean)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Task;
    use super::*;

    const TASK: Task = Task::Classification { classes: 7 };

    /// Two samples of seven classes; the logits of both fall from class 0 to class 6.
    fn logits() -> Tensor {
        Tensor::from_slice(&[3.0f32, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0]).repeat([2, 1])
    }

    #[test]
    fn an_evaluation_counts_the_best_guess_and_the_best_five_and_is_the_same_in_one_batch_or_two() {
        let labels = Tensor::from_slice(&[0i64, 4]);
        let mut at_once = TASK.sums();
        TASK.add(&mut at_once, &[logits()], &labels);
        let mut one_by_one = TASK.sums();
        for i in 0..2 {
            TASK.add(&mut one_by_one, &[logits().narrow(0, i, 1)], &labels.narrow(0, i, 1));
        }
        assert_eq!(at_once, one_by_one);
        let values = values(&at_once, 2.0);
        assert_eq!((values["top1"], values["top5"]), (50.0, 100.0));
        let normaliser = (-3..=3).map(|logit| f64::from(logit).exp()).sum::<f64>().ln();
        let expected = ((normaliser - 3.0) + (normaliser + 1.0)) / 2.0;
        assert!((values["loss"] - expected).abs() < 1e-6, "{} and {expected}", values["loss"]);
        let mut beyond_five = TASK.sums();
        TASK.add(&mut beyond_five, &[logits()], &Tensor::from_slice(&[5i64, 6]));
        assert_eq!(super::values(&beyond_five, 2.0)["top5"], 0.0);
    }

    #[test]
    fn the_gradient_is_that_of_autograd() {
        let logits = logits().set_requires_grad(true);
        let targets = TASK.random_targets(2) * 0.5;
        let Loss { sum, gradients } = tch::no_grad(|| loss(&[logits.shallow_clone()], &targets));
        let expected = -(&targets * logits.log_softmax(-1, Kind::Float)).sum(Kind::Float);
        expected.backward();
        assert_eq!(sum.double_value(&[]), expected.double_value(&[]));
        assert!((&gradients[0] - logits.grad()).abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn people_and_programs_get_the_same_values() {
        let values = BTreeMap::from([("top1".into(), 85.999), ("loss".into(), 0.25), ("images".into(), 9.0)]);
        assert_eq!(TASK.text(&values), "top-1 86.00 %, loss 0.2500");
        assert_eq!(serde_json::to_string(&TASK.scores(&values)).unwrap(), r#"{"top1":85.999,"top5":null}"#);
        assert_eq!(serde_json::to_string(&TASK.headline_score(Some(&values))).unwrap(), r#"{"top1":85.999}"#);
        let cells: Vec<String> = TASK.scores(&values).0.iter().map(|score| score.cell("-")).collect();
        assert_eq!(cells, ["86.00", "-"]);
        assert_eq!(METRICS.each_ref().map(Metric::title), ["top-1 %", "top-5 %", "loss"]);
    }
}
