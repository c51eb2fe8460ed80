//! Measures the speed of a large matrix product, which is about the peak speed of a device.

use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// The floating-point operations per second of a square matrix product in this process, at best.
pub fn matrix_product_rate(options: (Kind, Device)) -> f64 {
    // This size fills the device, but takes little time.
    let n: i64 = if options.1.is_cuda() { 8192 } else { 1024 };
    // The numbers are random, as weights are. With equal numbers a GPU needs less power and so would be faster.
    let a = Tensor::randn([n, n], options);
    let once = || {
        let start = Instant::now();
        // Reading a number waits for the device.
        a.matmul(&a).get(0).get(0).double_value(&[]);
        start.elapsed().as_secs_f64()
    };
    once();
    let best = (0..8).map(|_| once()).fold(f64::INFINITY, f64::min);
    2.0 * (n as f64).powi(3) / best
}
