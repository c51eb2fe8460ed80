//! `incubate bench`: commands that measure the claims about performance. `bench store` compares with dd. Scripts in `tools/`
//! compare the results of `bench step` and `bench data` with PyTorch and timm.

pub mod data;
pub mod index;
pub mod input;
pub mod step;
pub mod store;

/// The middle value, or the upper one of two middle values; 0 if there are no values.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}
