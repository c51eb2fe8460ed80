//! Running out of memory, which libtorch reports as a panic in the middle of a step, as an ordinary error.

use anyhow::Result;
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

thread_local! {
    /// Whether this thread is inside [`caught`].
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// A device's memory did not suffice.
#[derive(Debug, thiserror::Error)]
#[error("out of memory: {0}")]
pub struct OutOfMemory(String);

/// Does `act`; where the device's memory does not suffice, by panic or error, it fails with [`OutOfMemory`]. Other panics
/// go on.
pub fn caught<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    // What a panic leaves half changed is the phase's tensors, which go with it.
    CATCHING.set(true);
    let done = catch_unwind(AssertUnwindSafe(act));
    CATCHING.set(false);
    match done {
        Ok(Err(error)) => Err(match reason(&format!("{error:#}")) {
            Some(what) => OutOfMemory(what).into(),
            None => error,
        }),
        Ok(done) => done,
        Err(panic) => match of_panic(panic.as_ref()) {
            Some(what) => Err(OutOfMemory(what).into()),
            None => resume_unwind(panic),
        },
    }
}

/// Bytes that the kernel says this process's host, or its job there, can still give; all that a `u64` holds where it does
/// not say.
pub fn free_on_host() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    let host = line.trim().trim_end_matches(" kB").parse::<u64>().map_or(u64::MAX, |kib| kib * 1024);
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    free_in_groups(&own, Path::new("/sys/fs/cgroup")).map_or(host, |group| group.min(host))
}

/// The least that the control groups of a process, and those around them, still give (the kernel's cgroup-v1 and
/// cgroup-v2): Slurm ends a job that takes more memory than it asked for. Pages of files do not count, as they go first, but for
/// those in memory alone (`/dev/shm`).
fn free_in_groups(own: &str, root: &Path) -> Option<u64> {
    let of = |line: &str| -> Option<u64> {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let (mount, limit, taken, shared) = match controllers {
            "" => (root.to_path_buf(), "memory.max", "anon ", "shmem "),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes", "total_rss ", "total_shmem ")
            }
            _ => return None,
        };
        let group = mount.join(path.trim_start_matches('/'));
        let free = |group: &Path| -> Option<u64> {
            let limit: u64 = std::fs::read_to_string(group.join(limit)).ok()?.trim().parse().ok()?;
            let stat = std::fs::read_to_string(group.join("memory.stat")).ok()?;
            let number = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.parse::<u64>().ok());
            let taken = number(taken)? + number(shared).unwrap_or(0);
            Some(limit.saturating_sub(taken))
        };
        group.ancestors().take_while(|group| group.starts_with(&mount)).filter_map(free).min()
    };
    own.lines().filter_map(of).min()
}

/// Whether memory that a step frees is kept for the next one. A step frees and takes the same large tensors again and
/// again; given back to the kernel each time, they cost a page fault for every 4 KiB: up to a sixth of a small model's
/// step. Call it before other threads run.
pub fn keep_freed(keep: bool) {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: it sets a number in the allocator.
        let set = |option, value| unsafe { libc::mallopt(option, value) } == 1;
        // Older versions of glibc take no more than 32 MiB. Without `keep` it is glibc's own default.
        let thresholds: &[i32] = if keep { &[1 << 30, 32 << 20] } else { &[128 << 10] };
        // After the second call glibc no longer raises the first by itself.
        if thresholds.iter().any(|&bytes| set(libc::M_MMAP_THRESHOLD, bytes)) {
            set(libc::M_TRIM_THRESHOLD, if keep { i32::MAX } else { 128 << 10 });
        }
    }
}

/// Has the allocator give back what it keeps for later.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only releases memory that nobody uses.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Whether this thread's panic will become an error, so that a panic hook has nothing to say.
pub fn will_be_caught(panic: &(dyn Any + Send)) -> bool {
    CATCHING.get() && of_panic(panic).is_some()
}

/// What libtorch says, if a panic is about memory.
fn of_panic(panic: &(dyn Any + Send)) -> Option<String> {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied())?;
    reason(text)
}

/// libtorch's sentence in an error text that goes on with stack traces.
fn reason(text: &str) -> Option<String> {
    let starts = [
        "CUDA out of memory",
        "CUDA error: out of memory",
        "Cuda failure 2 'out of memory'",
        "DefaultCPUAllocator: can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ];
    let start = starts.iter().find_map(|words| text.find(words))?;
    let end = text[start..].find(['\n', '\\']).map_or(text.len(), |length| start + length);
    Some(text[start..end].to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_tensor_too_large_is_an_error_and_not_a_panic() {
        let huge = caught(|| Ok(Tensor::zeros([1 << 46], (Kind::Float, Device::Cpu))));
        let error = huge.unwrap_err();
        assert!(error.is::<OutOfMemory>() && error.to_string().contains("281474976710656 bytes"), "{error}");
        assert_eq!(caught(|| Ok(1)).unwrap(), 1);
    }

    #[test]
    fn the_memory_of_a_job_is_what_its_control_groups_leave() {
        let root = tempfile::tempdir().unwrap();
        let group = |name: &str, files: [(&str, &str); 2]| {
            let folder = root.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            files.iter().for_each(|(file, text)| std::fs::write(folder.join(file), text).unwrap());
        };
        group("slurm/job_7", [("memory.max", "9000\n"), ("memory.stat", "anon 4000\nfile 3000\n")]);
        group("slurm/job_7/step_0", [("memory.max", "max\n"), ("memory.stat", "anon 1000\nfile 1\n")]);
        assert_eq!(free_in_groups("0::/slurm/job_7/step_0\n", root.path()), Some(5000));
        group("memory/slurm", [("memory.limit_in_bytes", "700\n"), ("memory.stat", "rss 1\ntotal_rss 300\n")]);
        assert_eq!(free_in_groups("4:cpu:/x\n3:memory,hugetlb:/slurm\n0::/\n", root.path()), Some(400));
        assert_eq!(free_in_groups("0::/elsewhere\n", root.path()), None);
    }

    #[test]
    fn what_cuda_says_is_kept_to_its_first_line() {
        let text = "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried to allocate 2.00 GiB. GPU \
                    0 has a total capacity of 139.80 GiB\\nException raised from malloc";
        let caught = caught::<()>(|| panic!("{text}")).unwrap_err().to_string();
        assert!(caught.ends_with("total capacity of 139.80 GiB") && !caught.contains("Exception"), "{caught}");
    }

    #[test]
    #[should_panic(expected = "another reason")]
    fn other_panics_go_on() {
        let _ = caught::<()>(|| panic!("another reason"));
    }
}
