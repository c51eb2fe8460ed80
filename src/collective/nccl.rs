//! NCCL, loaded at run time: sums over GPUs of one node or many.
//!
//! Signatures and numbers as in `nccl.h` 2.18–2.32. `libnccl.so.2` is the name in every package; where libtorch's CUDA part
//! is loaded it has brought a copy, and that one is used. Everything runs on the device's default stream, libtorch's own:
//! a sum follows the kernels that made the gradients and comes before those that use it, with nothing to synchronise.
//!
//! A sum is only begun here; the host goes on. A peer that dies leaves it unfinished for ever. So whoever waits for what
//! follows it asks NCCL and the other replicas of its rank meanwhile whether it will still come, and gives up with an error.

use anyhow::{Context, Result, anyhow, bail, ensure};
use libloading::os::unix::{Library, RTLD_NOW};
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

/// `ncclUniqueId`: what the members of a communicator find each other by.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId {
    internal: [u8; 128],
}

/// This thread's GPU as a member of a communicator. After an error it is left as it is: the process is about to end, and to
/// free it NCCL would wait for the node's other members, which may not know of the error yet.
pub struct Nccl {
    api: &'static Api,
    communicator: Communicator,
}

type Communicator = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
/// CUDA_ERROR_NOT_READY.
const NOT_READY: c_int = 600;

/// A sum takes as long as the slowest member needs to come to it: it may be writing a checkpoint or waiting for data.
const PATIENCE: Duration = Duration::from_secs(600);
/// After another replica of this rank has ended: what it took part in to the end is over by then.
const GRACE: Duration = Duration::from_secs(5);

/// The functions used, good for the life of the process.
struct Api {
    version: c_int,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    init_rank: unsafe extern "C" fn(*mut Communicator, c_int, UniqueId, c_int) -> Status,
    all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Communicator, *mut c_void) -> Status,
    get_async_error: unsafe extern "C" fn(Communicator, *mut Status) -> Status,
    abort: unsafe extern "C" fn(Communicator) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(Communicator) -> *const c_char,
    /// The driver's: whether a stream has done what it was given.
    query_stream: unsafe extern "C" fn(*mut c_void) -> c_int,
}

static API: OnceLock<Result<Api, String>> = OnceLock::new();

fn api() -> Result<&'static Api> {
    let opened = API.get_or_init(|| {
        Api::open(OsStr::new("libnccl.so.2"), OsStr::new("libcuda.so.1")).map_err(|error| format!("{error:#}"))
    });
    opened.as_ref().map_err(|error| anyhow!("{error}"))
}

/// NCCL's version, such as `2.27.7`.
///
/// # Errors
/// It cannot be loaded, with the cure.
pub fn version() -> Result<String> {
    let v = api()?.version;
    Ok(format!("{}.{}.{}", v / 10_000, v % 10_000 / 100, v % 100))
}

/// Sums over the calling thread's current GPU and no other, which shows whether NCCL works at all.
pub fn sum_alone(values: &mut Tensor) -> Result<()> {
    let mut alone = Nccl::join(UniqueId::new()?, 0, 1)?;
    alone.sum_and_wait(values, &|| false)?;
    alone.leave()
}

impl Api {
    fn open(nccl: &OsStr, driver: &OsStr) -> Result<Api> {
        let nccl = load(nccl).context(
            "NCCL cannot be loaded; install nvidia-nccl-cu13 beside torch, or name the folder of libnccl.so.2 in \
             LD_LIBRARY_PATH",
        )?;
        let driver = load(driver).context("this node has no NVIDIA driver")?;
        macro_rules! function {
            ($library:expr, $name:literal) => {
                // SAFETY: the field that takes it has the type that the header gives the function.
                *unsafe { $library.get(concat!($name, "\0").as_bytes()) }.with_context(|| format!("no {}", $name))?
            };
        }
        let get_version: unsafe extern "C" fn(*mut c_int) -> Status = function!(nccl, "ncclGetVersion");
        let mut version = 0;
        // SAFETY: the output is one int.
        let status = unsafe { get_version(&mut version) };
        ensure!(status == SUCCESS, "ncclGetVersion gives error {status}");
        Ok(Api {
            version,
            get_unique_id: function!(nccl, "ncclGetUniqueId"),
            init_rank: function!(nccl, "ncclCommInitRank"),
            all_reduce: function!(nccl, "ncclAllReduce"),
            get_async_error: function!(nccl, "ncclCommGetAsyncError"),
            abort: function!(nccl, "ncclCommAbort"),
            error_string: function!(nccl, "ncclGetErrorString"),
            last_error: function!(nccl, "ncclGetLastError"),
            query_stream: function!(driver, "cuStreamQuery"),
        })
    }

    /// Whether the calling thread's current GPU has done all that its default stream was given.
    fn default_stream_is_through(&self) -> Result<bool> {
        // SAFETY: the null stream always exists.
        match unsafe { (self.query_stream)(std::ptr::null_mut()) } {
            SUCCESS => Ok(true),
            NOT_READY => Ok(false),
            error => bail!("CUDA: error {error} while gradients were summed"),
        }
    }

    /// Turns a status into an error that says what NCCL says.
    fn check(&self, call: &str, status: Status) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: both give texts that stay; the last error is asked of no communicator in particular.
        let [what, last] = unsafe { [(self.error_string)(status), (self.last_error)(std::ptr::null_mut())] }.map(text);
        bail!("NCCL: {call}: {what} ({last}); NCCL_DEBUG=INFO tells more")
    }
}

fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: NCCL's texts end with a zero.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// The copy that is loaded already, or else the one that the system finds. It stays loaded for ever.
fn load(name: &OsStr) -> Result<&'static Library> {
    // SAFETY: these libraries' initialisers only prepare themselves.
    let opened = unsafe {
        Library::open(Some(name), RTLD_NOW | libc::RTLD_NOLOAD).or_else(|_| Library::open(Some(name), RTLD_NOW))
    };
    Ok(Box::leak(Box::new(opened?)))
}

impl UniqueId {
    /// A new one. It listens in this process, which so must be a member.
    pub fn new() -> Result<UniqueId> {
        let (api, mut id) = (api()?, UniqueId::default());
        // SAFETY: the output is one ncclUniqueId.
        api.check("ncclGetUniqueId", unsafe { (api.get_unique_id)(&mut id) })?;
        Ok(id)
    }
}

impl Default for UniqueId {
    fn default() -> UniqueId {
        UniqueId { internal: [0; 128] }
    }
}

impl From<[u8; 128]> for UniqueId {
    fn from(internal: [u8; 128]) -> UniqueId {
        UniqueId { internal }
    }
}

impl From<UniqueId> for [u8; 128] {
    fn from(id: UniqueId) -> [u8; 128] {
        id.internal
    }
}

impl Nccl {
    /// Joins the calling thread's current GPU as member `rank` of `size`. Returns when all have.
    pub fn join(id: UniqueId, rank: usize, size: usize) -> Result<Nccl> {
        Nccl::join_by(api()?, id, rank, size)
    }

    fn join_by(api: &'static Api, id: UniqueId, rank: usize, size: usize) -> Result<Nccl> {
        let mut communicator = std::ptr::null_mut();
        // SAFETY: the output is one pointer, the numbers are of this communicator.
        let status = unsafe { (api.init_rank)(&mut communicator, size as c_int, id, rank as c_int) };
        api.check("ncclCommInitRank", status)?;
        Ok(Nccl { api, communicator })
    }

    /// Begins to sum fp32 numbers on this member's GPU over all members, in place: for what follows on the default stream.
    pub fn all_reduce(&mut self, values: &mut Tensor) -> Result<()> {
        assert!(values.kind() == Kind::Float && values.is_contiguous(), "expected contiguous fp32, got {values:?}");
        let numbers = values.data_ptr();
        // SAFETY: `numel` fp32 numbers lie there. libtorch gives memory of the default stream to nobody but what follows
        // on that stream, where the sum is, so they stay until it is done. The null stream is the device's default one.
        let status = unsafe {
            (self.api.all_reduce)(
                numbers,
                numbers,
                values.numel(),
                FLOAT32,
                SUM,
                self.communicator,
                std::ptr::null_mut(),
            )
        };
        self.api.check("ncclAllReduce", status)
    }

    /// Waits until `is_here` says that something behind a sum has happened. `left` says that another replica of this rank
    /// has ended.
    pub fn settle(&self, is_here: &dyn Fn() -> Result<bool>, left: &dyn Fn() -> bool) -> Result<()> {
        let began = Instant::now();
        let mut left_at = None;
        while !is_here()? {
            let mut state = SUCCESS;
            // SAFETY: the communicator is alive, the output is one status.
            let asked = unsafe { (self.api.get_async_error)(self.communicator, &mut state) };
            self.api.check("ncclCommGetAsyncError", asked)?;
            if state != IN_PROGRESS {
                self.api.check("a peer failed while gradients were summed", state)?;
            }
            if left() && left_at.get_or_insert_with(Instant::now).elapsed() > GRACE {
                return Err(crate::error::Failure::Elsewhere { code: 1 }.into());
            }
            let waited = began.elapsed();
            ensure!(
                waited < PATIENCE,
                "a peer did not come to the sum of gradients within {} s: it is dead or stuck; start the same command \
                 again to resume",
                PATIENCE.as_secs()
            );
            // Most sums take less than it takes to fall asleep.
            if waited > Duration::from_millis(5) {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        Ok(())
    }

    /// A sum that is over on return.
    fn sum_and_wait(&mut self, values: &mut Tensor, left: &dyn Fn() -> bool) -> Result<()> {
        self.all_reduce(values)?;
        let api = self.api;
        self.settle(&|| api.default_stream_is_through(), left)
    }

    /// Frees the communicator, once all sums are over. All members leave at the same time.
    pub fn leave(self) -> Result<()> {
        // SAFETY: the communicator is alive, and never used again.
        self.api.check("ncclCommAbort", unsafe { (self.api.abort)(self.communicator) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::Command;
    use std::thread;
    use tch::Device;

    /// The functions of tests/fake/cuda.c, in a copy of their own.
    fn fake() -> &'static Api {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("libfake.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/cuda.c");
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status().unwrap();
        assert!(built.success());
        Box::leak(Box::new(Api::open(library.as_os_str(), library.as_os_str()).unwrap()))
    }

    fn ones(numbers: i64) -> Tensor {
        Tensor::ones([numbers], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn members_sum_in_place_over_and_over() {
        let api = fake();
        assert_eq!(api.version, 22_707);
        let mut id = UniqueId::default();
        // SAFETY: the fake writes 128 bytes.
        assert_eq!(unsafe { (api.get_unique_id)(&mut id) }, SUCCESS);
        // As it travels between ranks.
        let id = UniqueId::from(<[u8; 128]>::from(id));
        thread::scope(|scope| {
            for rank in 0..3 {
                scope.spawn(move || {
                    let mut nccl = Nccl::join_by(api, id, rank, 3).unwrap();
                    for round in 0..50 {
                        let mut values = ones(7) * (rank + round) as f64;
                        nccl.sum_and_wait(&mut values, &|| false).unwrap();
                        assert_eq!(values, ones(7) * (3 + 3 * round) as f64);
                    }
                });
            }
        });
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error_and_not_a_hang() {
        let api = fake();
        let id = UniqueId::from([42; 128]);
        thread::scope(|scope| {
            scope.spawn(|| Nccl::join_by(api, id, 1, 2).unwrap().leave().unwrap());
            let mut nccl = Nccl::join_by(api, id, 0, 2).unwrap();
            let error = nccl.sum_and_wait(&mut ones(3), &|| false).unwrap_err().to_string();
            assert!(error.contains("a peer failed while gradients were summed: remote process exited"), "{error}");
            assert!(error.contains("a fake's last words"), "{error}");
        });
    }

    #[test]
    fn when_another_replica_of_the_rank_has_failed_its_error_is_the_one_to_tell() {
        let api = fake();
        let id = UniqueId::from([42; 128]);
        thread::scope(|scope| {
            scope.spawn(|| Nccl::join_by(api, id, 1, 2).map(|_| ()).unwrap());
            let mut nccl = Nccl::join_by(api, id, 0, 2).unwrap();
            let error = nccl.sum_and_wait(&mut ones(3), &|| true).unwrap_err();
            assert!(matches!(error.downcast_ref(), Some(crate::error::Failure::Elsewhere { .. })), "{error}");
        });
    }

    #[test]
    fn what_cannot_be_loaded_is_named_with_the_cure() {
        let error = format!("{:#}", Api::open(OsStr::new("libnone.so.2"), OsStr::new("libnone.so.1")).err().unwrap());
        assert!(error.contains("nvidia-nccl-cu13") && error.contains("libnone.so.2"), "{error}");
    }
}
