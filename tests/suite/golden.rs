//! Reads the reference values in tests/golden, which other programs computed (`tools/golden_transforms.py` and others).

/// The largest mean difference per byte between two programs whose arithmetic differs only in the last bits of a few sums.
pub const SAME: f64 = 0.02;

/// A file of reference values. The environment variable INCUBATE_GOLDEN can name a folder with other reference values.
pub fn golden(name: &str) -> Vec<u8> {
    let folder = std::env::var("INCUBATE_GOLDEN").unwrap_or(format!("{}/tests/golden", env!("CARGO_MANIFEST_DIR")));
    std::fs::read(format!("{folder}/{name}")).unwrap()
}

/// The mean absolute difference of bytes.
pub fn difference(ours: &[u8], golden: &[u8]) -> f64 {
    assert_eq!(ours.len(), golden.len());
    ours.iter().zip(golden).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / ours.len() as f64
}
