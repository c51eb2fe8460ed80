//! NCCL, loaded at run time, sums over the GPUs of one node or of several nodes.
//!
//! The signatures and constants come from `nccl.h` 2.18–2.32. The library is called `libnccl.so.2` in NVIDIA's packages. If
//! libtorch's CUDA part has loaded a copy of the library, this copy is used. Every sum runs on the GPU's default stream, on which
//! libtorch computes too. So a sum follows the kernels that compute the gradients and precedes the kernels that use the sum,
//! without any further synchronisation.
//!
//! The host begins a sum and continues. If another member dies, the sum may never end. Therefore a thread that waits for a sum
//! keeps checking whether NCCL reports an error, whether another replica of its rank has ended, and how long it has waited.

use anyhow::{Context, Result, anyhow, bail, ensure};
use libloading::os::unix::{Library, RTLD_NOW};
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

/// The `ncclUniqueId` of a communicator, with which its members find each other.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId {
    internal: [u8; 128],
}

/// This thread's GPU as a member of a communicator. After an error the communicator is not freed, because the process is about to
/// end. Freeing would wait for the other members on the node, which may not know of the error yet.
pub struct Nccl {
    api: &'static Api,
    communicator: Communicator,
    patience: Duration,
}

type Communicator = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
/// The driver's CUDA_ERROR_NOT_READY.
const NOT_READY: c_int = 600;

/// The longest time that a thread waits for a sum. The slowest member may begin the sum late, because it writes a checkpoint or
/// waits for data.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long a thread still waits for a sum after it has noticed that another replica of its rank has ended. If that replica has
/// finished the sum, the sum ends on this thread's GPU within this time too.
const GRACE: Duration = Duration::from_secs(5);

/// The functions of NCCL and of the driver. Both libraries stay loaded for the life of the process.
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
    /// The driver's `cuStreamQuery`, which says whether a stream has no work left.
    query_stream: unsafe extern "C" fn(*mut c_void) -> c_int,
}

static API: OnceLock<Result<Api, String>> = OnceLock::new();

fn api() -> Result<&'static Api> {
    let opened = API.get_or_init(|| {
        Api::open(OsStr::new("libnccl.so.2"), OsStr::new("libcuda.so.1")).map_err(|error| format!("{error:#}"))
    });
    opened.as_ref().map_err(|error| anyhow!("{error}"))
}

/// The version of NCCL, such as `2.27.7`.
///
/// # Errors
/// NCCL or the driver cannot be loaded. If NCCL is missing, the error names the cure.
pub fn version() -> Result<String> {
    let v = api()?.version;
    Ok(format!("{}.{}.{}", v / 10_000, v % 10_000 / 100, v % 100))
}

/// Sums over a communicator that holds only the calling thread's current GPU. This shows whether NCCL works at all.
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
                // SAFETY: each function goes into a variable or field of the type that the header gives it.
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

    /// Whether the default stream of the calling thread's current GPU has no work left.
    fn default_stream_is_done(&self) -> Result<bool> {
        // SAFETY: the null stream always exists.
        match unsafe { (self.query_stream)(std::ptr::null_mut()) } {
            SUCCESS => Ok(true),
            NOT_READY => Ok(false),
            error => bail!("CUDA gives error {error} while gradients are summed"),
        }
    }

    /// Fails with NCCL's own text unless `status` is a success. `call` says in the error which call or event it is about.
    fn check(&self, call: &str, status: Status) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: both calls return texts that stay valid. The null communicator asks for the last error of any communicator.
        let [what, last] = unsafe { [(self.error_string)(status), (self.last_error)(std::ptr::null_mut())] }.map(text);
        let flags = std::fs::read_to_string("/sys/class/net/lo/flags").unwrap_or_default();
        bail!("NCCL: {call}: {what} ({last}); set NCCL_DEBUG=INFO to see more{}", cure_of_loopback(&flags))
    }
}

/// The cure if the network interface `lo` is down. Even the GPUs of one node find each other through this interface. The cure is
/// empty if the interface is up or its state is unknown. `flags` is the kernel's text of the interface's flags.
fn cure_of_loopback(flags: &str) -> &'static str {
    match u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16) {
        Ok(flags) if flags & libc::IFF_UP as u32 == 0 => "; the network interface lo is down: ip link set lo up",
        _ => "",
    }
}

fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: NCCL's texts are NUL-terminated.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Opens a library: the copy that is loaded already, or else the copy that the dynamic linker finds. The library stays loaded.
fn load(name: &OsStr) -> Result<&'static Library> {
    // SAFETY: the initialisers of these libraries only prepare the libraries for use.
    let opened = unsafe {
        Library::open(Some(name), RTLD_NOW | libc::RTLD_NOLOAD).or_else(|_| Library::open(Some(name), RTLD_NOW))
    };
    Ok(Box::leak(Box::new(opened?)))
}

impl UniqueId {
    /// Makes the id of a new communicator. In this process, NCCL then listens for the other members, so this process must be a
    /// member.
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
    /// Joins a communicator of `size` members as member `rank`, with the calling thread's current GPU. Returns when all members
    /// have joined.
    pub fn join(id: UniqueId, rank: usize, size: usize) -> Result<Nccl> {
        Nccl::join_by(api()?, id, rank, size)
    }

    fn join_by(api: &'static Api, id: UniqueId, rank: usize, size: usize) -> Result<Nccl> {
        let mut communicator = std::ptr::null_mut();
        // SAFETY: the output is one pointer, and the numbers belong to this communicator.
        let status = unsafe { (api.init_rank)(&mut communicator, size as c_int, id, rank as c_int) };
        api.check("ncclCommInitRank", status)?;
        Ok(Nccl { api, communicator, patience: PATIENCE })
    }

    /// Begins to sum fp32 numbers on this member's GPU over all members, in place. Work that is given to the default stream
    /// afterwards sees the sum.
    pub fn all_reduce(&mut self, values: &mut Tensor) -> Result<()> {
        assert!(values.kind() == Kind::Float && values.is_contiguous(), "expected contiguous fp32, got {values:?}");
        let numbers = values.data_ptr();
        // SAFETY: the tensor holds `numel` fp32 numbers. libtorch reuses memory of the default stream only for later work on that
        // stream. The sum is on that stream too, so the numbers stay until the sum is done. The null stream is the default stream.
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

    /// Waits until `is_done` returns true. `is_done` says whether the GPU has finished a sum and the work that follows the sum.
    /// `replica_has_ended` says whether another replica of this rank has ended.
    pub fn wait_until(&self, is_done: &dyn Fn() -> Result<bool>, replica_has_ended: &dyn Fn() -> bool) -> Result<()> {
        let began = Instant::now();
        let mut end_seen = None;
        while !is_done()? {
            let mut state = SUCCESS;
            // SAFETY: the communicator is alive, and the output is one status.
            let asked = unsafe { (self.api.get_async_error)(self.communicator, &mut state) };
            self.api.check("ncclCommGetAsyncError", asked)?;
            if state != IN_PROGRESS {
                self.api.check("a peer failed while gradients were summed", state)?;
            }
            if replica_has_ended() && end_seen.get_or_insert_with(Instant::now).elapsed() > GRACE {
                return Err(crate::error::Failure::OnOtherRank { code: 1 }.into());
            }
            let waited = began.elapsed();
            ensure!(
                waited < self.patience,
                "a peer did not begin the sum of gradients within {} s, so it is dead or stuck; start the same command \
                 again to resume",
                self.patience.as_secs()
            );
            // Most sums are done before a sleeping thread would wake. So the thread does not sleep in the first 5 ms.
            if waited > Duration::from_millis(5) {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        Ok(())
    }

    /// Sums as [`Nccl::all_reduce`] does, and waits until the sum is done.
    fn sum_and_wait(&mut self, values: &mut Tensor, replica_has_ended: &dyn Fn() -> bool) -> Result<()> {
        self.all_reduce(values)?;
        let api = self.api;
        self.wait_until(&|| api.default_stream_is_done(), replica_has_ended)
    }

    /// Frees the communicator. All members must call this method together, after their last sum.
    pub fn leave(self) -> Result<()> {
        // SAFETY: the communicator is alive and not used again.
        self.api.check("ncclCommAbort", unsafe { (self.api.abort)(self.communicator) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Driver;
    use std::path::Path;
    use std::process::Command;
    use std::thread;
    use tch::Device;

    /// The functions of the fake NCCL and of the fake driver, which tests/fake/build.sh builds. Each test builds libraries of its
    /// own.
    fn fake() -> (&'static Api, &'static Driver) {
        let folder = tempfile::tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/build.sh");
        assert!(Command::new(script).arg(folder.path()).status().unwrap().success());
        let [nccl, driver] = ["libnccl.so.2", "libcuda.so.1"].map(|name| folder.path().join(name));
        let api = Api::open(nccl.as_os_str(), driver.as_os_str()).unwrap();
        // `Driver::open` loads `libcuda.so.1` by name and gets the fake, because the fake is loaded already.
        (Box::leak(Box::new(api)), Box::leak(Box::new(Driver::open().unwrap())))
    }

    /// Runs `first` and `second` as the two members of a communicator, each in a thread with a GPU. Before that, the members make a
    /// first sum, which connects them.
    fn on_two(first: impl FnOnce(Nccl) + Send, second: impl FnOnce(Nccl) + Send) {
        let (api, driver) = fake();
        let mut id = UniqueId::default();
        // SAFETY: the fake writes 128 bytes.
        assert_eq!(unsafe { (api.get_unique_id)(&mut id) }, SUCCESS);
        // The id travels between ranks as bytes.
        let id = UniqueId::from(<[u8; 128]>::from(id));
        let join = move |rank: usize| {
            driver.make_current(rank).unwrap();
            let mut nccl = Nccl::join_by(api, id, rank, 2).unwrap();
            nccl.sum_and_wait(&mut ones(3), &|| false).unwrap();
            nccl
        };
        thread::scope(|scope| {
            scope.spawn(move || second(join(1)));
            first(join(0));
        });
    }

    fn ones(numbers: i64) -> Tensor {
        Tensor::ones([numbers], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn members_sum_in_place_over_and_over() {
        let member = |rank: usize| {
            move |mut nccl: Nccl| {
                assert_eq!(nccl.api.version, 22_707);
                for round in 0..50 {
                    let mut values = ones(7) * (rank + round) as f64;
                    nccl.sum_and_wait(&mut values, &|| false).unwrap();
                    assert_eq!(values, ones(7) * (1 + 2 * round) as f64);
                }
            }
        };
        on_two(member(0), member(1));
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error_and_not_a_hang() {
        on_two(
            |mut nccl| {
                let error = nccl.sum_and_wait(&mut ones(3), &|| false).unwrap_err().to_string();
                assert!(error.contains("a peer failed while gradients were summed: remote process exited"), "{error}");
                assert!(error.contains("a fake's last words"), "{error}");
            },
            |nccl| nccl.leave().unwrap(),
        );
    }

    #[test]
    fn a_peer_that_never_begins_a_sum_is_an_error_after_the_longest_wait() {
        let (done, waits) = std::sync::mpsc::channel::<()>();
        on_two(
            |mut nccl| {
                nccl.patience = Duration::from_millis(50);
                let error = nccl.sum_and_wait(&mut ones(3), &|| false).unwrap_err().to_string();
                assert!(error.contains("a peer did not begin the sum of gradients"), "{error}");
                drop(done);
            },
            move |_nccl| assert!(waits.recv().is_err()),
        );
    }

    #[test]
    fn a_library_that_cannot_be_loaded_is_named_with_the_cure() {
        let error = format!("{:#}", Api::open(OsStr::new("libnone.so.2"), OsStr::new("libnone.so.1")).err().unwrap());
        assert!(error.contains("nvidia-nccl-cu13") && error.contains("libnone.so.2"), "{error}");
    }

    #[test]
    fn an_interface_that_is_down_is_named_with_its_cure() {
        assert_eq!(["0x9\n", "", "no number"].map(cure_of_loopback), [""; 3]);
        assert!(cure_of_loopback("0x8\n").contains("ip link set lo up"));
    }
}
