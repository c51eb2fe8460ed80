//! Parallel loops on libtorch's own threads. A second pool of threads would compete with libtorch's threads, which spin between
//! calls.

use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

/// `GOMP_parallel(task, data, threads, flags)` of the OpenMP runtime that libtorch has loaded.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// Finds `GOMP_parallel` in the libraries of this process.
fn parallel() -> Option<Parallel> {
    static FOUND: OnceLock<Option<Parallel>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // SAFETY: a lookup by a terminated name; the symbol has this signature in every libgomp (and in LLVM's libomp).
        unsafe {
            let symbol = libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr());
            (!symbol.is_null()).then(|| std::mem::transmute::<*mut c_void, Parallel>(symbol))
        }
    })
}

/// Divides a loop over `rows` rows, which hold `numbers` numbers in all, into at most one part for each thread. Returns the number
/// of rows of a part, a multiple of `unit`. The last part may be smaller.
pub fn rows_each(rows: usize, numbers: usize, unit: usize) -> usize {
    // Starting a thread for fewer numbers would cost more time than the thread saves.
    const WORTH: usize = 16 * 1024;
    let parts = (numbers / WORTH).clamp(1, tch::get_num_threads().max(1) as usize);
    rows.div_ceil(parts).next_multiple_of(unit)
}

/// Calls `act` on each part. Runs in parallel if there are several parts and this process has loaded an OpenMP runtime.
pub fn each<T: Send>(parts: impl Iterator<Item = T>, act: impl Fn(T) + Sync) {
    let mut parts: Vec<T> = parts.collect();
    match parallel() {
        Some(parallel) if parts.len() > 1 => {
            let threads = parts.len() as c_uint;
            let slots: Vec<Mutex<Option<T>>> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
            let next = AtomicUsize::new(0);
            let work = || {
                while let Some(slot) = slots.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let part = slot.lock().expect("no thread panics").take();
                    act(part.expect("each number is given once"));
                }
            };
            run(parallel, &work, threads);
        }
        _ => parts.drain(..).for_each(act),
    }
}

/// Calls `work` once on each of `threads` threads.
fn run<F: Fn() + Sync>(parallel: Parallel, work: &F, threads: c_uint) {
    extern "C" fn call<F: Fn()>(work: *mut c_void) {
        // SAFETY: `data` below is a shared borrow of an `F` that outlives the parallel region.
        unsafe { (*work.cast::<F>())() }
    }
    let data = std::ptr::from_ref(work).cast_mut().cast();
    // SAFETY: the call returns when every thread has left `call`; `F` is Sync, so all threads may call it at once.
    unsafe { parallel(call::<F>, data, threads, 0) }
}
