//! Memory of the host and of the GPU. If memory is exhausted, libtorch's binding panics, and this module turns the panic into an
//! ordinary error. This module also measures free and used memory, and decides whether allocators keep freed memory.

use super::pool;
use crate::driver::cuda;
use anyhow::Result;
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use tch::Device;

thread_local! {
    /// Whether this thread is inside [`catch`].
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// The memory of a device or of the host was exhausted.
#[derive(Debug, thiserror::Error)]
#[error("out of memory: {0}")]
pub struct OutOfMemory(String);

/// Calls `act`. Fails with [`OutOfMemory`] if `act` panics or fails because memory is exhausted. Any other panic or error passes
/// through.
pub fn catch<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    // A panic may leave the tensors of the phase half changed. The caller then drops the phase with these tensors.
    CATCHING.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(act));
    CATCHING.set(false);
    match outcome {
        Ok(Err(error)) => Err(match memory_message(&format!("{error:#}")) {
            Some(message) => OutOfMemory(message).into(),
            None => error,
        }),
        Ok(done) => done,
        Err(panic) => match memory_message_of_panic(panic.as_ref()) {
            Some(message) => Err(OutOfMemory(message).into()),
            None => resume_unwind(panic),
        },
    }
}

/// The bytes of memory that this process can still take: the available memory of the host, or the free memory in the process's
/// control groups if that is less. `u64::MAX` if the kernel tells neither.
pub fn free_on_host() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    let host = line.trim().trim_end_matches(" kB").parse::<u64>().map_or(u64::MAX, |kib| kib * 1024);
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    free_in_groups(&groups, Path::new("/sys/fs/cgroup")).map_or(host, |free| free.min(host))
}

/// The smallest number of free bytes in the control groups of a process and their ancestors. None if no group has a limit.
/// `proc_cgroup` is the text of `/proc/PID/cgroup` (cgroup v1 or v2). Slurm ends a job whose group takes more memory than the job
/// asked for. Cached pages of files count as free, because the kernel drops these pages first. Files that are only in memory
/// (`/dev/shm`) count as used.
fn free_in_groups(proc_cgroup: &str, root: &Path) -> Option<u64> {
    let free_for_line = |line: &str| -> Option<u64> {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let (mount, limit_file, taken_field, shared_field) = match controllers {
            "" => (root.to_path_buf(), "memory.max", "anon ", "shmem "),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes", "total_rss ", "total_shmem ")
            }
            _ => return None,
        };
        let group = mount.join(path.trim_start_matches('/'));
        let free = |group: &Path| -> Option<u64> {
            let limit: u64 = std::fs::read_to_string(group.join(limit_file)).ok()?.trim().parse().ok()?;
            let stat = std::fs::read_to_string(group.join("memory.stat")).ok()?;
            let number = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.parse::<u64>().ok());
            let taken = number(taken_field)? + number(shared_field).unwrap_or(0);
            Some(limit.saturating_sub(taken))
        };
        group.ancestors().take_while(|group| group.starts_with(&mount)).filter_map(free).min()
    };
    proc_cgroup.lines().filter_map(free_for_line).min()
}

/// Begins a new measurement of [`peak_on_host`].
pub fn begin_peak() {
    // If the kernel refuses, the peak counts from the last reset, or from the start of the process.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The largest resident memory of this process since [`begin_peak`], in bytes. 0 if the kernel does not tell.
pub fn peak_on_host() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().map_or(0, |kib| kib * 1024)
}

/// The memory that all processes use now on the calling thread's GPU, in bytes. 0 if `device` is the CPU, or if the driver fails.
/// libtorch keeps the memory that it has taken since its cache was emptied. So if no other process uses the GPU, this is the most
/// memory that was used since then.
pub fn peak_on_gpu(device: Device) -> u64 {
    if device == Device::Cpu {
        return 0;
    }
    cuda().and_then(|driver| driver.memory_in_use()).unwrap_or(0)
}

/// Sets whether freed memory is kept for later tensors. `pool.rs` keeps the memory of large tensors, and glibc's allocator keeps
/// all other memory. If freed memory went back to the kernel, every 4 KiB of it would cost a page fault when it is taken again.
/// Must be called before other threads run.
pub fn keep_freed(keep: bool) {
    pool::serve_tensors(keep);
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: the call sets a number in the allocator.
        let set = |option, value| unsafe { libc::mallopt(option, value) } == 1;
        // Older versions of glibc refuse more than 32 MiB. Both defaults of glibc are 128 KiB.
        let thresholds: &[i32] = if keep { &[1 << 30, 32 << 20] } else { &[128 << 10] };
        if thresholds.iter().any(|&bytes| set(libc::M_MMAP_THRESHOLD, bytes)) {
            set(libc::M_TRIM_THRESHOLD, if keep { i32::MAX } else { 128 << 10 });
        }
    }
}

/// Gives the memory that the allocators keep, but nothing uses, back to the kernel.
pub fn give_back() {
    pool::give_back();
    #[cfg(target_env = "gnu")]
    // SAFETY: the call only releases memory that is not in use.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Whether [`catch`] will turn this panic of the calling thread into an error. Then the panic hook should print nothing.
pub fn will_be_caught(panic: &(dyn Any + Send)) -> bool {
    CATCHING.get() && memory_message_of_panic(panic).is_some()
}

/// libtorch's message in a panic, if it is about exhausted memory.
fn memory_message_of_panic(panic: &(dyn Any + Send)) -> Option<String> {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied())?;
    memory_message(text)
}

/// The message about exhausted memory in an error text, without the stack trace that follows the message.
fn memory_message(text: &str) -> Option<String> {
    let starts = [
        "CUDA out of memory",
        "CUDA error: out of memory",
        "Cuda failure 2 'out of memory'",
        "DefaultCPUAllocator: can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ];
    let start = starts.iter().find_map(|start| text.find(start))?;
    let end = text[start..].find(['\n', '\\']).map_or(text.len(), |length| start + length);
    Some(text[start..end].to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_tensor_too_large_is_an_error_and_not_a_panic() {
        let huge = catch(|| Ok(Tensor::zeros([1 << 46], (Kind::Float, Device::Cpu))));
        let error = huge.unwrap_err();
        assert!(error.is::<OutOfMemory>() && error.to_string().contains("281474976710656 bytes"), "{error}");
        assert_eq!(catch(|| Ok(1)).unwrap(), 1);
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
    fn only_the_first_line_of_cudas_message_is_kept() {
        let text = "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried to allocate 2.00 GiB. GPU \
                    0 has a total capacity of 139.80 GiB\\nException raised from malloc";
        let caught = catch::<()>(|| panic!("{text}")).unwrap_err().to_string();
        assert!(caught.ends_with("total capacity of 139.80 GiB") && !caught.contains("Exception"), "{caught}");
    }

    #[test]
    #[should_panic(expected = "another reason")]
    fn other_panics_go_on() {
        let _ = catch::<()>(|| panic!("another reason"));
    }
}
