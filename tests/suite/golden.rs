//! What `tools/golden_transforms.py` and its like wrote with other programs.

/// The mean absolute difference where both do the same arithmetic, but for the last bit of a few sums.
pub const SAME: f64 = 0.02;

/// A file of reference values.
pub fn golden(name: &str) -> Vec<u8> {
    let folder = std::env::var("INCUBATE_GOLDEN").unwrap_or(format!("{}/tests/golden", env!("CARGO_MANIFEST_DIR")));
    std::fs::read(format!("{folder}/{name}")).unwrap()
}

/// Mean absolute difference of bytes.
pub fn difference(ours: &[u8], golden: &[u8]) -> f64 {
    assert_eq!(ours.len(), golden.len());
    ours.iter().zip(golden).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / ours.len() as f64
}
