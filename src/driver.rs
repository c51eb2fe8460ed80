//! Loads the library of the NVIDIA driver at run time. The program lists GPUs, chooses a GPU for a thread, reads the memory use,
//! makes events and pins host memory with this library.
//!
//! The signatures are the signatures in CUDA's `cuda.h` (driver API), which maps some names to names with a suffix such as `_v2`.
//! Every Linux driver has `libcuda.so.1`, whatever CUDA version libtorch was built with.

use anyhow::{Context, Result, anyhow, ensure};
use libloading::Library;
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// The driver, or the reason why this process cannot use GPUs. `device::load` sets this value once, unless the config asks for the
/// CPU.
pub static CUDA: OnceLock<Result<Driver, String>> = OnceLock::new();

/// Returns the driver, if CUDA is loaded.
///
/// # Errors
/// CUDA is not loaded. The error says why.
pub fn cuda() -> Result<&'static Driver> {
    let loaded = CUDA.get().context("CUDA was not asked for")?;
    loaded.as_ref().map_err(|error| anyhow!("{error}"))
}

type Status = c_int;

/// The driver's functions and its GPUs. The functions stay loaded until the process ends.
pub struct Driver {
    /// The newest CUDA version that the driver supports: 1000 × major + 10 × minor.
    version: c_int,
    /// The visible GPUs. The driver and libtorch number them in this order.
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

/// A point in the work of a GPU's default stream. libtorch uses this stream.
pub struct Event {
    driver: &'static Driver,
    event: *mut c_void,
}

/// Pinned host memory of exactly the requested size. libtorch would round the size up to a power of two and never free the memory.
/// For the buffers of a checkpoint, this would cost gigabytes.
pub struct PinnedMemory {
    driver: &'static Driver,
    start: *mut c_void,
}

// SAFETY: any thread may use and free the memory.
unsafe impl Send for PinnedMemory {}

/// CU_MEMHOSTALLOC_PORTABLE: the memory is pinned for all GPUs.
const PORTABLE: c_uint = 1;
/// CU_EVENT_DISABLE_TIMING: the event does not record a time.
const NO_TIMING: c_uint = 2;
/// CUDA_ERROR_NOT_READY: the GPU has not reached the event yet.
const NOT_READY: Status = 600;

/// A GPU as the driver describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpu {
    pub name: String,
    /// The size of the memory in bytes.
    pub memory: u64,
    /// The PCI address as in /sys/bus/pci/devices, such as `0000:17:00.0`.
    pub address: String,
}

impl Driver {
    /// Loads and initialises the driver.
    ///
    /// # Errors
    /// The node has no driver, or the driver does not work.
    pub fn open() -> Result<Driver> {
        // SAFETY: the initialisers of the driver's library are safe to run. The library is leaked below, so it stays loaded.
        let library = unsafe { Library::new("libcuda.so.1") }.context("this node has no NVIDIA driver")?;
        let library: &'static Library = Box::leak(Box::new(library));
        macro_rules! function {
            ($name:literal, $type:ty) => {{
                // SAFETY: the type is the function's type in cuda.h.
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
        // SAFETY: each output is one int. The flag of cuInit must be 0.
        let status = unsafe { init(0).max(get_version(&mut version)).max(get_count(&mut count)) };
        // Status 100 is CUDA_ERROR_NO_DEVICE: the driver sees no GPU.
        ensure!(status == 0 || status == 100, "the NVIDIA driver does not start (cuInit: error {status})");
        let mut gpus = Vec::new();
        for number in 0..count {
            let mut text = [0 as c_char; 256];
            let mut memory = 0;
            // SAFETY: the driver writes at most 256 bytes of text with a terminator, and one size_t for the memory. The handle of a
            // GPU is its number.
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

    /// The newest CUDA version that this driver supports, as (major, minor).
    pub fn cuda_version(&self) -> (i32, i32) {
        (self.version / 1000, self.version % 1000 / 10)
    }

    /// The visible GPUs. The driver and libtorch number them in this order.
    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// Makes a GPU the current GPU of the calling thread, as `cudaSetDevice` does. NCCL requires a current GPU. Without a current
    /// GPU, other CUDA calls would set up the first GPU. The context is the GPU's primary context, which libtorch uses too.
    pub fn make_current(&self, number: usize) -> Result<()> {
        thread_local! {
            static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
        }
        if CURRENT.get() == Some(number) {
            return Ok(());
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: the output is one pointer. The context is never released, so it stays valid while it is current.
        unsafe {
            check((self.retain_context)(&mut context, number as c_int), "cuDevicePrimaryCtxRetain")?;
            check((self.set_context)(context), "cuCtxSetCurrent")?;
        }
        CURRENT.set(Some(number));
        Ok(())
    }

    /// The number of bytes that all processes use on the calling thread's current GPU. It includes the freed memory that libtorch
    /// caches.
    pub fn memory_in_use(&self) -> Result<u64> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the outputs are one size_t each.
        check(unsafe { (self.get_memory_info)(&mut free, &mut total) }, "cuMemGetInfo")?;
        Ok((total - free) as u64)
    }
}

impl PinnedMemory {
    /// Allocates pinned memory of `bytes` bytes. The calling thread must have a current GPU.
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

    /// Frees the memory. Dropping a `PinnedMemory` does not free the memory, because freeing waits for the GPU and may wait for
    /// ever after an error.
    pub fn free(self) {
        // SAFETY: the memory came from cuMemHostAlloc and is freed once.
        unsafe { (self.driver.free_host)(self.start) };
    }
}

impl Event {
    /// Makes an event and records it in the default stream of the calling thread's current GPU, after all work that the stream has
    /// been given so far.
    pub fn now(driver: &'static Driver) -> Result<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the output is one pointer.
        check(unsafe { (driver.create_event)(&mut event, NO_TIMING) }, "cuEventCreate")?;
        let event = Event { driver, event };
        // SAFETY: the event is alive, and the null stream is the default stream.
        check(unsafe { (driver.record_event)(event.event, std::ptr::null_mut()) }, "cuEventRecord")?;
        Ok(event)
    }

    /// Whether the GPU has reached the event.
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
        // SAFETY: the event is alive and is never used again. CUDA frees a pending event once it has passed.
        unsafe { (self.driver.destroy_event)(self.event) };
    }
}

fn check(status: Status, call: &str) -> Result<()> {
    ensure!(status == 0, "the NVIDIA driver: {call} gives error {status}");
    Ok(())
}
