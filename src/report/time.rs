//! The time that each phase of a run spent on computing, waiting and so on, as far as the ledger and the heartbeats record it.

use super::gather::{Part, Run};
use crate::run::start;
use crate::store::progress::duration;
use crate::svg::bars::{self, Bar, Bars};
use crate::svg::chart::Colour;

/// The seconds of a phase over all its starts, in parts that add up to the total.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimeParts {
    /// Computing in steps whose results count.
    pub computing: f64,
    /// Summing gradients over replicas in these steps. A GPU sums while the host goes on. So on GPUs, only the host's part of the
    /// summing counts here, and the rest counts as computing.
    pub all_reduce: f64,
    /// Waiting for data in these steps.
    pub data: f64,
    /// The time of steps that were lost and that a restart had to repeat, estimated from the number of these steps.
    pub repeated: f64,
    pub evaluation: f64,
    /// Waiting for checkpoints.
    pub checkpoints: f64,
    /// The rest: starting, and writing the artefact.
    pub rest: f64,
}

/// The names of the parts, in their order.
pub const PARTS: [&str; 7] = [
    "computing",
    "all-reduce",
    "waiting for data",
    "steps done again",
    "evaluation",
    "waiting for checkpoints",
    "start-up, writing the model",
];

impl TimeParts {
    /// Splits the time of a phase of a run (`part`) into parts. None if the phase has made no step or has no heartbeat.
    pub fn of(part: &Part) -> Option<TimeParts> {
        let progress = part.progress.as_ref().filter(|progress| progress.step > 0)?;
        let total = part.total.seconds;
        let useful = progress.useful_s.min(total);
        let lost: u64 = part.starts.windows(2).map(|two| two[0].to.saturating_sub(two[1].from)).sum();
        let repeated = (useful / progress.step as f64 * lost as f64).min(total - useful);
        let sum = |of: fn(&start::Spent) -> f64| part.starts.iter().map(|start| of(&start.spent)).sum::<f64>();
        // The records of the starts include the waiting in repeated steps.
        let in_useful = |seconds: f64, most: f64| (seconds * useful / (useful + repeated).max(1e-9)).min(most);
        let data = in_useful(sum(|spent| spent.data), useful);
        let all_reduce = in_useful(sum(|spent| spent.all_reduce), useful - data);
        let outside = total - useful - repeated;
        let evaluation = sum(|spent| spent.evaluation).min(outside);
        let checkpoints = sum(|spent| spent.checkpoints).min(outside - evaluation);
        let computing = useful - data - all_reduce;
        Some(TimeParts {
            computing,
            all_reduce,
            data,
            repeated,
            evaluation,
            checkpoints,
            rest: outside - evaluation - checkpoints,
        })
    }

    /// The values in the order of [`PARTS`].
    pub fn parts(&self) -> [f64; 7] {
        let TimeParts { computing, all_reduce, data, repeated, evaluation, checkpoints, rest } = *self;
        [computing, all_reduce, data, repeated, evaluation, checkpoints, rest]
    }
}

/// A bar for each phase of a run; none if no phase has trained.
pub fn bars(run: &Run) -> Option<Bars> {
    let bar = |part: &Part| {
        let spent = TimeParts::of(part)?;
        Some(Bar { name: part.label.clone(), parts: spent.parts().to_vec(), label: duration(part.total.seconds) })
    };
    let bars: Vec<Bar> = run.parts.iter().filter_map(bar).collect();
    let looks = [
        (Colour::Incubation, 1.0),
        (Colour::Of(2), 1.0),
        (Colour::Of(5), 1.0),
        (Colour::Of(1), 1.0),
        (Colour::Of(4), 1.0),
        (Colour::Of(3), 1.0),
        (Colour::Neutral, 0.5),
    ];
    let part =
        |(name, (colour, strength)): (&&str, (Colour, f64))| bars::Part { name: name.to_string(), colour, strength };
    let parts = PARTS.iter().zip(looks).map(part).collect();
    (!bars.is_empty()).then(|| Bars { title: "Time of each phase".into(), parts, bars })
}
