//! Which cores a thread may run on: near its GPU, data and commands take the shorter way.

use std::collections::BTreeSet;
use std::path::Path;

/// The cores that lie near the PCI device at this address and that this process may use; none where that is unknown.
pub fn near(address: &str, allowed: &BTreeSet<usize>) -> BTreeSet<usize> {
    let file = Path::new("/sys/bus/pci/devices").join(address).join("local_cpulist");
    let list = std::fs::read_to_string(file).unwrap_or_default();
    parse(&list).intersection(allowed).copied().collect()
}

/// The kernel's list of cores, such as `0-3,8`.
fn parse(list: &str) -> BTreeSet<usize> {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<usize>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

/// The cores that the calling thread may run on.
pub fn allowed() -> BTreeSet<usize> {
    // SAFETY: a cpu_set_t is plain bits, filled by the call; 0 is the calling thread.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        set
    };
    // SAFETY: the numbers are below the set's size.
    (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) }).collect()
}

/// Keeps the calling thread, and those that it starts, on these cores; leaves it alone for none.
pub fn pin(cores: &BTreeSet<usize>) {
    if cores.is_empty() {
        return;
    }
    // SAFETY: a cpu_set_t is plain bits and the numbers, from another such set, are below its size; 0 is the calling
    // thread. A refusal changes nothing but speed.
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
        let one = BTreeSet::from([*before.first().unwrap()]);
        let pinned = std::thread::spawn({
            let one = one.clone();
            move || {
                pin(&BTreeSet::new());
                let unchanged = allowed();
                pin(&one);
                (unchanged, allowed())
            }
        });
        assert_eq!(pinned.join().unwrap(), (before.clone(), one));
        assert_eq!(allowed(), before);
    }

    #[test]
    fn lists_of_cores_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse("0-3,8,10-11\n"), BTreeSet::from([0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse("\n"), BTreeSet::new());
        assert_eq!(near("no such device", &BTreeSet::from([0])), BTreeSet::new());
    }
}
