//! libtorch's functions that tch does not bind, through `libtorch.cpp`.

use std::ffi::{CStr, c_char, c_void};
use tch::{Device, Tensor};

type Raw = *mut c_void;

unsafe extern "C" {
    fn incubate_layer_norm_backward(
        out: *mut Raw,
        gradient: Raw,
        x: Raw,
        mean: Raw,
        scale: Raw,
        weight: Raw,
        bias: Raw,
        trained: bool,
    ) -> *mut c_char;
    fn incubate_fused_adamw(
        weights: Raw,
        gradients: Raw,
        exp_avg: Raw,
        exp_avg_sq: Raw,
        step: Raw,
        divisor: Raw,
        skip: Raw,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> *mut c_char;
    fn incubate_gradients(out: *mut Raw, output: Raw, inputs: *const Raw, gradient: Raw) -> *mut c_char;
    fn incubate_empty_pinned(out: *mut Raw, sizes: *const i64, dimensions: usize) -> *mut c_char;
    fn incubate_empty_cache() -> *mut c_char;
}

fn raw(tensor: &Tensor) -> Raw {
    tensor.as_ptr().cast_mut().cast()
}

/// Panics with libtorch's error message, as tch does.
fn check(told: *mut c_char) {
    if !told.is_null() {
        // SAFETY: the C++ side gives a terminated text made by strdup.
        let text = unsafe { CStr::from_ptr(told) }.to_string_lossy().into_owned();
        // SAFETY: strdup's memory is freed by the caller, once.
        unsafe { libc::free(told.cast()) };
        panic!("{text}");
    }
}

fn take(raw: Raw) -> Option<Tensor> {
    // SAFETY: the C++ side writes only pointers to new at::Tensors, and tch deletes the tensor.
    (!raw.is_null()).then(|| unsafe { Tensor::from_ptr(raw.cast()) })
}

/// The gradients of x and, if `trained`, of weight and bias, from the gradient of the norm's output. `mean` and `scale` are
/// the outputs of `native_layer_norm`.
pub fn layer_norm_backward(
    gradient: &Tensor,
    x: &Tensor,
    [mean, scale]: [&Tensor; 2],
    [weight, bias]: [&Tensor; 2],
    trained: bool,
) -> (Tensor, Option<[Tensor; 2]>) {
    let mut out = [std::ptr::null_mut(); 3];
    let [gradient, x, mean, scale, weight, bias] = [gradient, x, mean, scale, weight, bias].map(raw);
    // SAFETY: all are live tensors, and `out` has room for three pointers.
    check(unsafe { incubate_layer_norm_backward(out.as_mut_ptr(), gradient, x, mean, scale, weight, bias, trained) });
    let [dx, dweight, dbias] = out.map(take);
    (dx.expect("it was written"), dweight.zip(dbias).map(|(weight, bias)| [weight, bias]))
}

/// The numbers of one AdamW update.
pub struct AdamW {
    /// The number of updates, including this one, as an fp32 scalar.
    pub step: Tensor,
    /// The gradients are divided by this fp32 scalar first.
    pub divisor: Tensor,
    /// An fp32 scalar; if it is 1, nothing is updated.
    pub skip: Tensor,
    pub lr: f64,
    pub betas: [f64; 2],
    pub weight_decay: f64,
    pub eps: f64,
}

/// One pass of torch's fused AdamW over fp32 weights, gradients and moments, in place.
pub fn fused_adamw(update: &AdamW, weights: &Tensor, gradients: &Tensor, [exp_avg, exp_avg_sq]: [&Tensor; 2]) {
    let AdamW { step, divisor, skip, lr, betas: [beta1, beta2], weight_decay, eps } = update;
    let [weights, gradients, exp_avg, exp_avg_sq] = [weights, gradients, exp_avg, exp_avg_sq].map(raw);
    let [step, divisor, skip] = [step, divisor, skip].map(raw);
    // SAFETY: all are live tensors; libtorch checks shapes, kinds and devices.
    check(unsafe {
        incubate_fused_adamw(
            weights,
            gradients,
            exp_avg,
            exp_avg_sq,
            step,
            divisor,
            skip,
            *lr,
            *beta1,
            *beta2,
            *weight_decay,
            *eps,
        )
    });
}

/// The gradients of three inputs of autograd's graph, from the gradient of an output.
pub fn gradients(output: &Tensor, inputs: &[Tensor; 3], gradient: &Tensor) -> [Tensor; 3] {
    let mut out = [std::ptr::null_mut(); 3];
    let inputs: Vec<Raw> = inputs.iter().map(raw).collect();
    // SAFETY: all are live tensors, and there are three inputs and room for three outputs.
    check(unsafe { incubate_gradients(out.as_mut_ptr(), raw(output), inputs.as_ptr(), raw(gradient)) });
    out.map(|one| take(one).expect("it was written"))
}

/// An uninitialised fp32 tensor in pinned host memory. The calling thread must have a current GPU. libtorch reuses the memory
/// once the tensor is dropped and all copies from it are done.
pub fn empty_pinned(sizes: &[i64]) -> Tensor {
    let mut out = std::ptr::null_mut();
    // SAFETY: the output is one pointer, and the length is the number of sizes.
    check(unsafe { incubate_empty_pinned(&mut out, sizes.as_ptr(), sizes.len()) });
    take(out).expect("it was written")
}

/// Returns the GPU memory that libtorch caches to the driver, from which NCCL takes its memory. Does nothing on the CPU.
pub fn empty_cache(device: Device) {
    if device.is_cuda() {
        // SAFETY: only memory that no tensor uses is freed.
        check(unsafe { incubate_empty_cache() });
    }
}
