//! The NVIDIA driver's own library, loaded at run time: how many GPUs there are, which, and with how much memory.
//!
//! Signatures as in CUDA's `cuda.h` (driver API). `libcuda.so.1` is the driver's on every Linux, whatever CUDA version
//! libtorch was built with; the names with a suffix are those that the header maps the plain ones to.

use anyhow::{Context, Result, anyhow, ensure};
use libloading::Library;
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// The driver, or why this process computes on the CPU. Set once, when CUDA is loaded.
pub static CUDA: OnceLock<Result<Driver, String>> = OnceLock::new();

/// The driver, once CUDA is loaded.
///
/// # Errors
/// Why it is not, with the cure.
pub fn cuda() -> Result<&'static Driver> {
    let loaded = CUDA.get().context("CUDA was not asked for")?;
    loaded.as_ref().map_err(|error| anyhow!("{error}"))
}

type Status = c_int;

/// The driver's functions, good for the life of the process.
pub struct Driver {
    version: c_int,
    /// Visible GPUs, in the driver's and libtorch's order.
    gpus: Vec<Gpu>,
    retain_context: unsafe extern "C" fn(*mut *mut c_void, c_int) -> Status,
    set_context: unsafe extern "C" fn(*mut c_void) -> Status,
    get_memory_info: unsafe extern "C" fn(*mut usize, *mut usize) -> Status,
    create_event: unsafe extern "C" fn(*mut *mut c_void, c_uint) -> Status,
    record_event: unsafe extern "C" fn(*mut c_void, *mut c_void) -> Status,
    query_event: unsafe extern "C" fn(*mut c_void) -> Status,
    destroy_event: unsafe extern "C" fn(*mut c_void) -> Status,
    alloc_host: unsafe extern "C" fn(*mut *mut c_void, usize, c_uint) -> Status,
    free_host: unsafe extern "C" fn(*mut c_void) -> Status,
}

/// A point in the work of a GPU's default stream, libtorch's own.
pub struct Event {
    driver: &'static Driver,
    event: *mut c_void,
}

/// Pinned host memory of just the size asked for: libtorch's own is rounded up to a power of two and
/// kept for good, which for a checkpoint's buffers is gigabytes.
pub struct PinnedMemory {
    driver: &'static Driver,
    start: *mut c_void,
}

// SAFETY: the memory belongs to no thread, and nothing is done with it here but to free it.
unsafe impl Send for PinnedMemory {}

/// CU_MEMHOSTALLOC_PORTABLE: pinned for all GPUs.
const PORTABLE: c_uint = 1;
/// CU_EVENT_DISABLE_TIMING and CUDA_ERROR_NOT_READY.
const NO_TIMING: c_uint = 2;
const NOT_READY: Status = 600;

/// What the driver says about one GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpu {
    pub name: String,
    /// Memory in bytes.
    pub memory: u64,
    /// PCI address as in /sys/bus/pci/devices, such as `0000:17:00.0`.
    pub address: String,
}

impl Driver {
    /// Loads and initialises the driver.
    ///
    /// # Errors
    /// The node has no driver, or the driver does not work.
    pub fn open() -> Result<Driver> {
        // SAFETY: the driver's library has no initialiser that could harm; it stays loaded for ever, see below.
        let library = unsafe { Library::new("libcuda.so.1") }.context("this node has no NVIDIA driver")?;
        let library: &'static Library = Box::leak(Box::new(library));
        macro_rules! function {
            ($name:literal, $type:ty) => {{
                // SAFETY: the type is that of cuda.h.
                let found = unsafe { library.get::<$type>(concat!($name, "\0").as_bytes()) };
                *found.with_context(|| format!("the NVIDIA driver has no {}", $name))?
            }};
        }
        let init = function!("cuInit", unsafe extern "C" fn(c_uint) -> Status);
        let get_version = function!("cuDriverGetVersion", unsafe extern "C" fn(*mut c_int) -> Status);
        let get_count = function!("cuDeviceGetCount", unsafe extern "C" fn(*mut c_int) -> Status);
        let get_name = function!("cuDeviceGetName", unsafe extern "C" fn(*mut c_char, c_int, c_int) -> Status);
        let get_memory = function!("cuDeviceTotalMem_v2", unsafe extern "C" fn(*mut usize, c_int) -> Status);
        let get_address = function!("cuDeviceGetPCIBusId", unsafe extern "C" fn(*mut c_char, c_int, c_int) -> Status);
        let (mut version, mut count) = (0, 0);
        // SAFETY: both outputs are one int; cuInit takes the flag 0.
        let status = unsafe { init(0).max(get_version(&mut version)).max(get_count(&mut count)) };
        // CUDA_ERROR_NO_DEVICE is a driver without a GPU, or with none visible.
        ensure!(status == 0 || status == 100, "the NVIDIA driver does not start (cuInit: error {status})");
        let mut gpus = Vec::new();
        for number in 0..count {
            let mut text = [0 as c_char; 256];
            let mut memory = 0;
            // SAFETY: texts are written with their terminator into at most 256 bytes; the memory is one size_t. A GPU's
            // handle is its number.
            let (name, address) = unsafe {
                check(get_name(text.as_mut_ptr(), 256, number), "cuDeviceGetName")?;
                let name = CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned();
                check(get_memory(&mut memory, number), "cuDeviceTotalMem")?;
                check(get_address(text.as_mut_ptr(), 256, number), "cuDeviceGetPCIBusId")?;
                (name, CStr::from_ptr(text.as_ptr()).to_string_lossy().to_lowercase())
            };
            gpus.push(Gpu { name, memory: memory as u64, address });
        }
        Ok(Driver {
            version,
            gpus,
            retain_context: function!(
                "cuDevicePrimaryCtxRetain",
                unsafe extern "C" fn(*mut *mut c_void, c_int) -> Status
            ),
            set_context: function!("cuCtxSetCurrent", unsafe extern "C" fn(*mut c_void) -> Status),
            get_memory_info: function!("cuMemGetInfo_v2", unsafe extern "C" fn(*mut usize, *mut usize) -> Status),
            create_event: function!("cuEventCreate", unsafe extern "C" fn(*mut *mut c_void, c_uint) -> Status),
            record_event: function!("cuEventRecord", unsafe extern "C" fn(*mut c_void, *mut c_void) -> Status),
            query_event: function!("cuEventQuery", unsafe extern "C" fn(*mut c_void) -> Status),
            destroy_event: function!("cuEventDestroy_v2", unsafe extern "C" fn(*mut c_void) -> Status),
            alloc_host: function!("cuMemHostAlloc", unsafe extern "C" fn(*mut *mut c_void, usize, c_uint) -> Status),
            free_host: function!("cuMemFreeHost", unsafe extern "C" fn(*mut c_void) -> Status),
        })
    }

    /// The newest CUDA that this driver runs, as (major, minor).
    pub fn cuda_version(&self) -> (i32, i32) {
        (self.version / 1000, self.version % 1000 / 10)
    }

    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// Makes a GPU the calling thread's current one, as `cudaSetDevice` does: for NCCL, which asks for it, and for calls of
    /// CUDA that ask for none and else would set up the first GPU. libtorch uses the same (primary) context.
    pub fn make_current(&self, number: usize) -> Result<()> {
        thread_local! {
            static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
        }
        if CURRENT.get() == Some(number) {
            return Ok(());
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: the output is one pointer. The context is never released, so it stays valid as current one.
        unsafe {
            check((self.retain_context)(&mut context, number as c_int), "cuDevicePrimaryCtxRetain")?;
            check((self.set_context)(context), "cuCtxSetCurrent")?;
        }
        CURRENT.set(Some(number));
        Ok(())
    }

    /// Bytes of the calling thread's current GPU that are taken, by this process or another. libtorch keeps what it has
    /// taken once.
    pub fn memory_in_use(&self) -> Result<u64> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the outputs are one size_t each.
        check(unsafe { (self.get_memory_info)(&mut free, &mut total) }, "cuMemGetInfo")?;
        Ok((total - free) as u64)
    }
}

impl PinnedMemory {
    /// Of some bytes, for a thread with a current GPU.
    pub fn new(driver: &'static Driver, bytes: usize) -> Result<PinnedMemory> {
        let mut start = std::ptr::null_mut();
        // SAFETY: the output is one pointer.
        let status = unsafe { (driver.alloc_host)(&mut start, bytes, PORTABLE) };
        ensure!(status == 0, "{bytes} bytes of host memory cannot be pinned (cuMemHostAlloc: error {status})");
        Ok(PinnedMemory { driver, start })
    }

    pub fn start(&self) -> *mut c_void {
        self.start
    }

    /// Gives it back. Not done by dropping: CUDA waits here for the GPU, and after an error that may never be through.
    pub fn free(self) {
        // SAFETY: the memory came from cuMemHostAlloc and is freed once.
        unsafe { (self.driver.free_host)(self.start) };
    }
}

impl Event {
    /// After what the calling thread's current GPU has been given so far.
    pub fn now(driver: &'static Driver) -> Result<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the output is one pointer.
        check(unsafe { (driver.create_event)(&mut event, NO_TIMING) }, "cuEventCreate")?;
        let event = Event { driver, event };
        // SAFETY: the event is alive; the null stream is the default one.
        check(unsafe { (driver.record_event)(event.event, std::ptr::null_mut()) }, "cuEventRecord")?;
        Ok(event)
    }

    /// Whether the GPU has come to it.
    pub fn has_passed(&self) -> Result<bool> {
        // SAFETY: the event is alive.
        match unsafe { (self.driver.query_event)(self.event) } {
            NOT_READY => Ok(false),
            status => check(status, "cuEventQuery").map(|()| true),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is alive, and never used again; one that is still awaited is freed when it has passed.
        unsafe { (self.driver.destroy_event)(self.event) };
    }
}

fn check(status: Status, call: &str) -> Result<()> {
    ensure!(status == 0, "the NVIDIA driver: {call} gives error {status}");
    Ok(())
}
