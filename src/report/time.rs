//! Where the time of a run went, as far as its ledger, heartbeats and curves tell. The all-reduce is not timed apart from the
//! steps, nor are checkpoints and evaluations apart from each other.

use super::gather::{Part, Run};
use crate::store::progress::duration;
use crate::svg::bars::{self, Bar, Bars};
use crate::svg::chart::Colour;

/// The seconds of a phase over all starts, in parts that add up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spent {
    /// Steps whose results count, less their waiting for data: computing, and summing gradients over replicas.
    pub steps: f64,
    pub data: f64,
    /// Steps that a restart did again.
    pub repeated: f64,
    /// Starting, evaluating, writing checkpoints and the artefact.
    pub rest: f64,
}

/// The names of the parts, in their order.
pub const PARTS: [&str; 4] =
    ["steps that count", "waiting for data", "steps done again", "start-up, evaluation, saving"];

impl Spent {
    /// The time of a part of a run; none if there was no training or no heartbeat tells.
    pub fn of(part: &Part) -> Option<Spent> {
        let progress = part.progress.as_ref().filter(|progress| progress.step > 0)?;
        let batch = part.phase.as_ref()?.training.global_batch;
        let total = part.total.seconds;
        let useful = progress.useful_s.min(total);
        let lost: u64 = part.starts.windows(2).map(|two| two[0].to.saturating_sub(two[1].from)).sum();
        let repeated = (useful / progress.step as f64 * lost as f64).min(total - useful);
        let data = waited_for_data(part, batch).min(useful);
        Some(Spent { steps: useful - data, data, repeated, rest: total - useful - repeated })
    }

    pub fn parts(&self) -> [f64; 4] {
        [self.steps, self.data, self.repeated, self.rest]
    }
}

/// The seconds that the logged steps have waited for data.
fn waited_for_data(part: &Part, batch: usize) -> f64 {
    let mut before = 0;
    let mut waited = 0.0;
    for line in &part.lines {
        let number = |key: &str| line.get(key).and_then(serde_json::Value::as_f64);
        let Some(step) = line.get("step").and_then(serde_json::Value::as_u64) else { continue };
        if let (Some(share), Some(rate)) = (number("data_wait"), number("images_per_s").filter(|rate| *rate > 0.0)) {
            waited += share * (step.saturating_sub(before) as f64) * batch as f64 / rate;
        }
        before = step;
    }
    waited
}

/// The bars of a run's phases; none if none has trained.
pub fn bars(run: &Run) -> Option<Bars> {
    let bar = |part: &Part| {
        let spent = Spent::of(part)?;
        Some(Bar { name: part.label.clone(), parts: spent.parts().to_vec(), label: duration(part.total.seconds) })
    };
    let bars: Vec<Bar> = run.parts.iter().filter_map(bar).collect();
    let looks = [(Colour::Incubation, 1.0), (Colour::Of(5), 1.0), (Colour::Of(1), 1.0), (Colour::Neutral, 0.5)];
    let part =
        |(name, (colour, strength)): (&&str, (Colour, f64))| bars::Part { name: name.to_string(), colour, strength };
    let parts = PARTS.iter().zip(looks).map(part).collect();
    (!bars.is_empty()).then(|| Bars { title: "Time of each phase".into(), parts, bars })
}
