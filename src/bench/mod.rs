//! `incubate bench`: performance claims as commands that anybody can run again. Each compares with a peer in the same run.

pub mod data;
pub mod index;
pub mod input;
pub mod step;
pub mod store;

/// The middle value; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}
