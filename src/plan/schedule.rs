//! Computes the learning rate of each optimiser step.

use crate::config::{Schedule, Training};
use std::f64::consts::PI;

/// The learning rate of `step`, counted from 0. The peak is `base_lr` × global batch / 512.
///
/// - `deit` follows DeiT's and Deep Incubation's code and changes once per epoch. After each epoch, that code steps timm's
///   scheduler f with the number of this epoch. So epoch 0 trains at the initial rate, and epoch e at f(e − 1).
/// - `cosine` changes at every step: a linear warm-up, then a cosine over the remaining steps.
/// - `poly` changes at every step: a linear warm-up, then a linear decay, as mmsegmentation's LinearLR and PolyLR of power 1.
/// - `isda` changes once per epoch, as in InfoPro's code: a cosine, mixed with `warmup_lr` in the warm-up.
/// - `steps` stays at `warmup_lr` in the warm-up, then at the peak, and drops to a tenth after each of the epochs `lr_drops`.
pub fn learning_rate(training: &Training, step: u64, steps_per_epoch: u64) -> f64 {
    let peak = training.base_lr * training.global_batch as f64 / 512.0;
    match training.schedule {
        Schedule::Deit => deit(training, peak, step / steps_per_epoch),
        Schedule::Cosine | Schedule::Poly => {
            let warmup = training.warmup_epochs as u64 * steps_per_epoch;
            let total = training.epochs as u64 * steps_per_epoch;
            if step < warmup {
                training.warmup_lr + (peak - training.warmup_lr) * (step + 1) as f64 / warmup as f64
            } else {
                let progress = (step - warmup) as f64 / (total - warmup) as f64;
                match training.schedule {
                    Schedule::Poly => peak + (training.min_lr - peak) * progress,
                    _ => cosine(peak, training.min_lr, progress),
                }
            }
        }
        Schedule::Isda => isda(training, peak, step / steps_per_epoch + 1),
        Schedule::Steps => {
            let epoch = (step / steps_per_epoch) as usize;
            let drops = training.lr_drops.iter().filter(|&&last| epoch >= last).count();
            if epoch < training.warmup_epochs { training.warmup_lr } else { peak / 10f64.powi(drops as i32) }
        }
    }
}

/// The learning rate of an epoch, counted from 1: a cosine over all epochs, which ends at `min_lr` in the last epoch. During the
/// warm-up, the rate is a weighted mean of the cosine and `warmup_lr`. The share of `warmup_lr` falls from 1 to 0. The rule is
/// `adjust_learning_rate` of InfoPro's `train.py`.
fn isda(training: &Training, peak: f64, epoch: u64) -> f64 {
    let (epoch, warmup) = (epoch as f64, training.warmup_epochs as f64);
    let rate = cosine(peak, training.min_lr, epoch / training.epochs as f64);
    let share = if warmup > 0.0 { ((epoch - 1.0) / warmup).min(1.0) } else { 1.0 };
    if share < 1.0 { rate * share + training.warmup_lr * (1.0 - share) } else { rate }
}

/// The learning rate of `epoch`, counted from 0. The schedule is one epoch late, as [`learning_rate`] explains.
fn deit(training: &Training, peak: f64, epoch: u64) -> f64 {
    let warmup = training.warmup_epochs as f64;
    let Some(t) = epoch.checked_sub(1).map(|t| t as f64) else {
        return if warmup > 0.0 { training.warmup_lr } else { peak };
    };
    if t < warmup {
        training.warmup_lr + t * (peak - training.warmup_lr) / warmup
    } else {
        // The cosine begins at epoch 0, not at the end of the warm-up.
        cosine(peak, training.min_lr, t / training.epochs as f64)
    }
}

fn cosine(peak: f64, floor: f64, progress: f64) -> f64 {
    floor + 0.5 * (peak - floor) * (1.0 + (PI * progress).cos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn paper() -> Training {
        Config::parse("", &[]).unwrap().meta
    }

    #[test]
    fn deit_schedule_is_one_epoch_late_and_unshifted() {
        let meta = paper();
        let peak = 5e-4 * 2048.0 / 512.0;
        let lr = |epoch: u64| learning_rate(&meta, epoch * 625 + 624, 625);
        assert_eq!(lr(0), 1e-6);
        assert_eq!(lr(1), 1e-6);
        assert!((lr(2) - (1e-6 + (peak - 1e-6) / 20.0)).abs() < 1e-15);
        // Epoch 21 has the rate f(20), the first rate after the warm-up. It is already 20 epochs into the cosine.
        let expected = 1e-5 + 0.5 * (peak - 1e-5) * (1.0 + (PI * 20.0 / 300.0).cos());
        assert!((lr(21) - expected).abs() < 1e-15);
    }

    #[test]
    fn steps_drop_to_a_tenth_after_each_of_their_epochs() {
        let text = "[train]\nschedule = \"steps\"\nlr_drops = [80, 120]\nbase_lr = 0.4\nglobal_batch = 128\nepochs = 160\n\
                    warmup_epochs = 1\nwarmup_lr = 0.01\n[module]\nepochs = 160\n[finetune]\nepochs = 160";
        let meta = Config::parse(text, &[]).unwrap().meta;
        for (epoch, expected) in [(0, 0.01), (1, 0.1), (79, 0.1), (80, 0.01), (119, 0.01), (120, 0.001), (159, 0.001)] {
            let lr = learning_rate(&meta, 390 * epoch + 389, 390);
            assert!((lr / expected - 1.0).abs() < 1e-12, "epoch {epoch}: {lr}");
        }
    }

    #[test]
    fn the_schedule_of_isda_has_the_published_rates() {
        let text = "[train]\nschedule = \"isda\"\nbase_lr = 0.4\nglobal_batch = 1024\nepochs = 160\nwarmup_epochs = 10\n\
                    warmup_lr = 0.01\nmin_lr = 0";
        let meta = Config::parse(text, &[]).unwrap().meta;
        for (epoch, expected) in [(1, 0.01), (2, 0.08897), (10, 0.71408), (11, 0.79071), (80, 0.4), (160, 0.0)] {
            let lr = learning_rate(&meta, 48 * epoch - 1, 48);
            assert!((lr - expected).abs() < 1e-5, "epoch {epoch}: {lr}");
        }
    }

    #[test]
    fn cosine_schedule_rises_to_the_peak_and_falls_to_the_floor() {
        let meta = Training { schedule: Schedule::Cosine, ..paper() };
        let peak = 5e-4 * 2048.0 / 512.0;
        let lr = |step: u64| learning_rate(&meta, step, 10);
        assert!(lr(0) < peak / 100.0);
        assert!((lr(199) - peak).abs() < 1e-12 && (lr(200) - peak).abs() < 1e-12);
        assert!(lr(2999) < 2e-5 && lr(2999) > 1e-5);
        assert!((201..3000).all(|step| lr(step) < lr(step - 1)));
    }

    #[test]
    fn poly_schedule_rises_to_the_peak_and_falls_along_a_line() {
        let training = Training { schedule: Schedule::Poly, ..Config::parse("", &[]).unwrap().segment };
        let lr = |step: u64| learning_rate(&training, step, 100);
        assert!((lr(49) - 3e-5).abs() < 1e-12 && (lr(99) - 6e-5).abs() < 1e-12 && (lr(100) - 6e-5).abs() < 1e-12);
        // The last step of 6400 is one step before the end of the line.
        assert!((lr(100 + 3150) - 3e-5).abs() < 1e-12 && (lr(6399) - 6e-5 / 6300.0).abs() < 1e-12);
    }
}
