//! Pins threads to CPU cores. A thread that drives a GPU runs on the cores nearest to the GPU, because data and commands then take
//! the shortest way.

use std::collections::BTreeSet;
use std::path::Path;

/// The cores in `allowed` that are near the PCI device at this address. Empty if the kernel does not say which cores are near.
pub fn near(pci_address: &str, allowed: &BTreeSet<usize>) -> BTreeSet<usize> {
    let file = Path::new("/sys/bus/pci/devices").join(pci_address).join("local_cpulist");
    let list = std::fs::read_to_string(file).unwrap_or_default();
    parse(&list).intersection(allowed).copied().collect()
}

/// Parses the kernel's list of cores, such as `0-3,8`.
fn parse(list: &str) -> BTreeSet<usize> {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<usize>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

/// The cores that the calling thread may run on.
pub fn allowed() -> BTreeSet<usize> {
    // SAFETY: all zeros are a valid cpu_set_t, and the call writes no more than its size; 0 is the calling thread.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        set
    };
    // SAFETY: every core's number is below the size of the set.
    (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) }).collect()
}

/// Pins the calling thread, and the threads that it starts later, to these cores. Does nothing if `cores` is empty.
pub fn pin(cores: &BTreeSet<usize>) {
    if cores.is_empty() {
        return;
    }
    // SAFETY: all zeros are a valid cpu_set_t. The cores' numbers come from another set, so they are below its size. 0 is the
    // calling thread. If the kernel refuses, the thread is only slower.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        cores.iter().for_each(|&core| libc::CPU_SET(core, &mut set));
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_stays_on_the_cores_it_is_pinned_to_and_others_do_not() {
        let before = allowed();
        let one_core = BTreeSet::from([*before.first().unwrap()]);
        let pinned = std::thread::spawn({
            let one_core = one_core.clone();
            move || {
                pin(&BTreeSet::new());
                let unchanged = allowed();
                pin(&one_core);
                (unchanged, allowed())
            }
        });
        assert_eq!(pinned.join().unwrap(), (before.clone(), one_core));
        assert_eq!(allowed(), before);
    }

    #[test]
    fn lists_of_cores_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse("0-3,8,10-11\n"), BTreeSet::from([0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse("\n"), BTreeSet::new());
        assert_eq!(near("no such device", &BTreeSet::from([0])), BTreeSet::new());
    }
}
