//! `incubate bench`: makes every claim about performance a command that anybody can run. Most results are compared with another
//! program.

pub mod data;
pub mod index;
pub mod input;
pub mod step;
pub mod store;

/// The middle value; 0 if there are no values.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}
