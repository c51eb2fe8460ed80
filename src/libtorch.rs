//! Calls functions of libtorch that tch does not bind, through `libtorch.cpp`.

use anyhow::{Context, Result, anyhow};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use tch::{Device, Kind, Tensor};

type Raw = *mut c_void;

/// Returns memory of the given number of bytes, or null if libtorch's own allocator should serve the request.
type Take = extern "C" fn(usize) -> Raw;

/// Frees memory that a [`Take`] has returned. Returns false, and frees nothing, if the memory came from libtorch's own allocator.
type Free = extern "C" fn(Raw) -> bool;

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
    fn incubate_backward(tensor: Raw, gradient: Raw) -> *mut c_char;
    fn incubate_add_product(sum: Raw, a: Raw, b: Raw) -> *mut c_char;
    fn incubate_trace_start(gpus: bool) -> *mut c_char;
    fn incubate_trace_write(path: *const c_char) -> *mut c_char;
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
    fn incubate_fused_sgd(
        weights: Raw,
        gradients: Raw,
        moment: Raw,
        divisor: Raw,
        skip: Raw,
        lr: f64,
        momentum: f64,
        nesterov: bool,
        weight_decay: f64,
    ) -> *mut c_char;
    fn incubate_allow_attention(flash: bool, efficient: bool, cudnn: bool) -> *mut c_char;
    fn incubate_attention(kernel: *mut c_int, out: *mut Raw, qkv: *const Raw) -> *mut c_char;
    fn incubate_attention_backward(
        out: *mut Raw,
        kernel: c_int,
        gradient: Raw,
        qkv: *const Raw,
        kept: *const Raw,
    ) -> *mut c_char;
    fn incubate_empty_pinned(out: *mut Raw, sizes: *const i64, dimensions: usize, alike: Raw) -> *mut c_char;
    fn incubate_empty_cache() -> *mut c_char;
    fn incubate_set_allocator(take: Take, free: Free);
}

/// Makes libtorch take and free the memory of CPU tensors by these functions, which any thread may call.
pub fn set_allocator(take: Take, free: Free) {
    // SAFETY: the call only stores the functions.
    unsafe { incubate_set_allocator(take, free) };
}

fn raw(tensor: &Tensor) -> Raw {
    tensor.as_ptr().cast_mut().cast()
}

/// Panics with the error message of a call, as tch does. A null pointer means that there was no error.
fn check(message: *mut c_char) {
    try_check(message).unwrap_or_else(|error| panic!("{error}"));
}

/// Turns the error message of a call into an error. A null pointer means that there was no error.
fn try_check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: `libtorch.cpp` returns a terminated text made by strdup.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    // SAFETY: the memory comes from strdup and is freed once.
    unsafe { libc::free(message.cast()) };
    Err(anyhow!(text))
}

/// Takes ownership of a tensor that `libtorch.cpp` has made. Returns none for a null pointer.
fn take(raw: Raw) -> Option<Tensor> {
    // SAFETY: `libtorch.cpp` writes only pointers to new at::Tensors, and tch deletes the tensor.
    (!raw.is_null()).then(|| unsafe { Tensor::from_ptr(raw.cast()) })
}

/// Computes the gradients of x and, if `trained`, of weight and bias, from the gradient of LayerNorm's output. `mean` and `scale`
/// (1 / standard deviation) are outputs of `native_layer_norm`.
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
    (dx.expect("the call has written it"), dweight.zip(dbias).map(|(weight, bias)| [weight, bias]))
}

/// Differentiates through the graph of a tensor, given the tensor's own gradient, and adds to the gradients of the graph's leaves.
/// The graph stays, because other tensors may share a part of it.
pub fn backward(tensor: &Tensor, gradient: &Tensor) {
    // SAFETY: both are live tensors; libtorch checks their shapes.
    check(unsafe { incubate_backward(raw(tensor), raw(gradient)) });
}

/// Adds the product a · b of two bf16 matrices to the fp32 matrix `sum`, in place and without rounding the product to bf16 first.
///
/// # Errors
/// The tensors are not on a GPU, or libtorch refuses them. In both cases `sum` has not changed.
pub fn add_product(sum: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    // SAFETY: all are live tensors; libtorch checks shapes, kinds and devices.
    try_check(unsafe { incubate_add_product(raw(sum), raw(a), raw(b)) })
}

/// The settings of one AdamW update.
pub struct AdamW {
    /// The number of updates, including this update, as an fp32 scalar.
    pub step: Tensor,
    /// The fp32 scalar by which the gradients are divided before the update.
    pub divisor: Tensor,
    /// An fp32 scalar. If it is 1, nothing is updated.
    pub skip: Tensor,
    pub lr: f64,
    pub betas: [f64; 2],
    pub weight_decay: f64,
    pub eps: f64,
}

/// Updates fp32 weights and moments in place, with torch's fused AdamW.
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

/// The settings of one SGD update.
pub struct Sgd<'a> {
    /// The fp32 scalar by which the gradients are divided before the update.
    pub divisor: &'a Tensor,
    /// An fp32 scalar. If it is 1, nothing is updated.
    pub skip: &'a Tensor,
    pub lr: f64,
    pub momentum: f64,
    pub nesterov: bool,
    pub weight_decay: f64,
}

/// Updates fp32 weights and their moment in place, with torch's fused SGD.
pub fn fused_sgd(update: &Sgd, weights: &Tensor, gradients: &Tensor, moment: &Tensor) {
    let Sgd { divisor, skip, lr, momentum, nesterov, weight_decay } = update;
    let [weights, gradients, moment, divisor, skip] = [weights, gradients, moment, divisor, skip].map(raw);
    // SAFETY: all are live tensors; libtorch checks shapes, kinds and devices.
    check(unsafe {
        incubate_fused_sgd(weights, gradients, moment, divisor, skip, *lr, *momentum, *nesterov, *weight_decay)
    });
}

/// libtorch's kernels of fused attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// FlashAttention 2 (Dao, arXiv 2307.08691), for 16-bit numbers on a GPU.
    Flash,
    /// The kernel of xFormers, which also takes fp32, on a GPU.
    Efficient,
    /// The kernel of cuDNN, which builds a plan for each shape and thread.
    Cudnn,
    /// libtorch's own kernel for the CPU.
    FlashForCpu,
}

/// The kernels in the order of their numbers in `libtorch.cpp`. The first kernel has the number 1.
const KERNELS: [Kernel; 4] = [Kernel::Flash, Kernel::Efficient, Kernel::Cudnn, Kernel::FlashForCpu];

/// Allows only these kernels for attention on GPUs from now on. For each call of [`attention`], libtorch chooses one of the
/// kernels.
pub fn allow_attention(kernels: &[Kernel]) {
    let has = |kernel| kernels.contains(&kernel);
    // SAFETY: the call only sets switches of libtorch.
    check(unsafe { incubate_allow_attention(has(Kernel::Flash), has(Kernel::Efficient), has(Kernel::Cudnn)) });
}

/// The result of attention by a fused kernel, with the tensors that the backward pass needs.
pub struct Attention {
    pub kernel: Kernel,
    qkv: [Tensor; 3],
    /// The output, and then the five other tensors that the kernel's backward pass takes.
    kept: [Tensor; 6],
}

/// Computes softmax(q · kᵀ / √e) · v with a fused kernel, for tensors (b, heads, n, e): batch, heads, tokens, head size. Returns
/// none if no kernel takes the tensors.
pub fn attention(qkv: [Tensor; 3]) -> Result<Option<Attention>> {
    let (mut number, mut out) = (0, [std::ptr::null_mut(); 6]);
    let inputs = qkv.each_ref().map(raw);
    // SAFETY: the inputs are three live tensors, and `out` has room for six pointers.
    try_check(unsafe { incubate_attention(&mut number, out.as_mut_ptr(), inputs.as_ptr()) })?;
    let kernel = usize::try_from(number - 1).ok().map(|index| KERNELS[index]);
    Ok(kernel.map(|kernel| Attention { kernel, qkv, kept: out.map(|raw| take(raw).expect("the call has written it")) }))
}

impl Attention {
    /// The output (b, heads, n, e).
    pub fn output(&self) -> &Tensor {
        &self.kept[0]
    }

    /// Computes the gradients of q, k and v, as one tensor (b, n, 3, heads, e), from the gradient of the output.
    pub fn backward(&self, gradient: &Tensor) -> Result<Tensor> {
        let number = KERNELS.iter().position(|&kernel| kernel == self.kernel).expect("all are listed") as c_int + 1;
        let mut out = std::ptr::null_mut();
        let (qkv, kept) = (self.qkv.each_ref().map(raw), self.kept.each_ref().map(raw));
        // SAFETY: all are live tensors, three in `qkv` and six in `kept`, and the output is one pointer.
        try_check(unsafe {
            incubate_attention_backward(&mut out, number, raw(gradient), qkv.as_ptr(), kept.as_ptr())
        })?;
        Ok(take(out).expect("the call has written it"))
    }
}

/// Makes an uninitialised tensor in pinned host memory. The calling thread must have a current GPU. After the tensor is
/// dropped and all copies from it are done, libtorch reuses the memory.
///
/// # Errors
/// No memory can be pinned.
pub fn empty_pinned(sizes: &[i64], kind: Kind) -> Result<Tensor> {
    let (mut out, alike) = (std::ptr::null_mut(), Tensor::empty([0i64], (kind, Device::Cpu)));
    // SAFETY: the output is one pointer, the length is the number of sizes, and `alike` is a live tensor.
    try_check(unsafe { incubate_empty_pinned(&mut out, sizes.as_ptr(), sizes.len(), raw(&alike)) })?;
    take(out).context("libtorch has written no tensor")
}

/// A recording of libtorch's functions on the thread that started the recording. If the device is a GPU, the recording also has the
/// kernels of all GPUs.
pub struct Trace(Device);

impl Trace {
    /// Begins to record.
    pub fn start(device: Device) -> Result<Trace> {
        // SAFETY: the call only starts libtorch's profiler.
        try_check(unsafe { incubate_trace_start(device.is_cuda()) }).map(|()| Trace(device))
    }

    /// Waits until the GPU has done its work, ends the recording, and writes it to a file in Chrome's trace format. Must be called
    /// on the thread that started the recording.
    pub fn write(self, path: &Path) -> Result<()> {
        if let Device::Cuda(number) = self.0 {
            tch::Cuda::synchronize(number as i64);
        }
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the text is alive, and the profiler was started on this thread.
        try_check(unsafe { incubate_trace_write(path.as_ptr()) })
    }
}

/// Gives the GPU memory in libtorch's cache back to the driver, so that NCCL can take it. Does nothing on the CPU.
pub fn empty_cache(device: Device) {
    if device.is_cuda() {
        // SAFETY: the call only frees memory that no tensor uses.
        check(unsafe { incubate_empty_cache() });
    }
}
