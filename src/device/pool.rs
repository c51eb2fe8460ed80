//! A pool that keeps the memory of large CPU tensors, so that later tensors can use this memory again.
//!
//! Each training step allocates and frees large tensors of the same sizes. If their memory went back to the kernel each time, every
//! page of it would cost a page fault. glibc's allocator can keep freed memory, but it loses much of it in gaps: an aligned block
//! needs a gap that is longer than the block. In this pool, blocks are whole pages, and neighbouring free blocks become one block.
//! So the memory of one stage can serve the next stage, whose tensors have other sizes.
//!
//! If no free block is long enough for a new block, the pool takes new memory from the kernel. Before that, it gives the kernel as
//! much free memory back as the new block needs, or all free memory if there is less. So the pool never holds more than the largest
//! amount that was in use at one time, unless the kernel refuses to take memory back.

use crate::libtorch::set_allocator;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::{null_mut, with_exposed_provenance_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The smallest allocation that the pool serves, in bytes. libtorch's own allocator serves smaller allocations.
const SMALLEST: usize = 128 << 10;

static POOL: Mutex<Pool> = Mutex::new(Pool::new());

/// Whether new tensors take their memory from the pool.
static SERVES: AtomicBool = AtomicBool::new(false);

/// Sets whether libtorch takes the memory of new large CPU tensors from the pool.
pub fn serve_tensors(serves: bool) {
    SERVES.store(serves, Ordering::Relaxed);
    if serves {
        set_allocator(take, free);
    }
}

/// Returns all free memory of the pool to the kernel.
pub fn give_back() {
    let mut pool = pool();
    let all = pool.remove_free(usize::MAX);
    return_to_kernel(&mut pool, all);
}

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns page-aligned memory of at least `bytes` bytes. Returns null if the pool serves no tensors now, if `bytes` is less than
/// `SMALLEST`, or if the kernel gives no memory.
extern "C" fn take(bytes: usize) -> *mut c_void {
    if !SERVES.load(Ordering::Relaxed) {
        return null_mut();
    }
    // SAFETY: the call only reads a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let Some(length) = bytes.checked_next_multiple_of(page).filter(|_| bytes >= SMALLEST) else { return null_mut() };
    let mut pool = pool();
    if let Some(address) = pool.take(length) {
        return with_exposed_provenance_mut(address);
    }
    let free = pool.remove_free(length);
    return_to_kernel(&mut pool, free);
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the kernel chooses unused addresses.
    let block = unsafe { libc::mmap(null_mut(), length, access, kind, -1, 0) };
    if block == libc::MAP_FAILED {
        return null_mut();
    }
    pool.add_used(block.expose_provenance(), length);
    block
}

/// Frees a block of the pool. Returns false if the pool has no block in use at this address.
extern "C" fn free(block: *mut c_void) -> bool {
    pool().free(block.addr())
}

fn return_to_kernel(pool: &mut Pool, blocks: Vec<Range<usize>>) {
    for block in blocks {
        // SAFETY: the pages came from mmap, and the pool has removed them from its lists.
        let done = unsafe { libc::munmap(with_exposed_provenance_mut(block.start), block.len()) };
        if done != 0 {
            // The block may be a part of a mapping. The kernel refuses to split a mapping if the process already has too many
            // mappings.
            pool.add_free(block);
        }
    }
}

/// All blocks of the pool. The maps and the set know a block by the address of its first byte.
struct Pool {
    /// The length of each block in use, by its address.
    used: BTreeMap<usize, usize>,
    /// The length of each free block, by its address. No free block directly follows another free block.
    free: BTreeMap<usize, usize>,
    /// The length and address of each free block, the shortest block first.
    free_by_length: BTreeSet<(usize, usize)>,
}

impl Pool {
    const fn new() -> Pool {
        Pool { used: BTreeMap::new(), free: BTreeMap::new(), free_by_length: BTreeSet::new() }
    }

    fn add_used(&mut self, address: usize, length: usize) {
        self.used.insert(address, length);
    }

    /// Adds a free block. Joins it with the free blocks that directly precede and follow it.
    fn add_free(&mut self, block: Range<usize>) {
        let Range { mut start, mut end } = block;
        if let Some((&before, &length)) = self.free.range(..start).next_back()
            && before + length == start
        {
            self.remove(before, length);
            start = before;
        }
        if let Some(&length) = self.free.get(&end) {
            self.remove(end, length);
            end += length;
        }
        self.free.insert(start, end - start);
        self.free_by_length.insert((end - start, start));
    }

    fn remove(&mut self, address: usize, length: usize) {
        self.free.remove(&address);
        self.free_by_length.remove(&(length, address));
    }

    /// Takes `length` bytes from the start of the shortest free block that is long enough. Returns the address, or none if no free
    /// block is long enough.
    fn take(&mut self, length: usize) -> Option<usize> {
        let &(found, address) = self.free_by_length.range((length, 0)..).next()?;
        self.remove(address, found);
        if found > length {
            self.add_free(address + length..address + found);
        }
        self.add_used(address, length);
        Some(address)
    }

    /// Frees the block at an address. Returns false if no block in use starts there.
    fn free(&mut self, address: usize) -> bool {
        let Some(length) = self.used.remove(&address) else { return false };
        self.add_free(address..address + length);
        true
    }

    /// Removes `bytes` bytes of free memory, from the longest blocks first, or all free memory if there is less. Returns the
    /// removed ranges of addresses.
    fn remove_free(&mut self, mut bytes: usize) -> Vec<Range<usize>> {
        let mut removed = Vec::new();
        while bytes > 0
            && let Some(&(length, address)) = self.free_by_length.last()
        {
            self.remove(address, length);
            let part = length.min(bytes);
            if part < length {
                self.add_free(address..address + length - part);
            }
            removed.push(address + length - part..address + length);
            bytes -= part;
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn the_memory_of_large_tensors_serves_smaller_ones_and_the_larger_one_again() {
        let mut pool = Pool::new();
        pool.add_used(1000, 80);
        assert!(pool.free(1000) && !pool.free(1000));
        assert_eq!([40, 30, 20, 10].map(|length| pool.take(length)), [Some(1000), Some(1040), None, Some(1070)]);
        assert!(pool.free(1040) && pool.free(1000) && pool.free(1070));
        assert_eq!(pool.take(80), Some(1000));
    }

    #[test]
    fn blocks_never_overlap_and_the_pool_holds_no_more_than_was_in_use_at_one_time() {
        let (mut pool, mut random, mut new_address) = (Pool::new(), Random::new(&[1]), 0);
        let (mut live, mut most_live): (Vec<Range<usize>>, usize) = (Vec::new(), 0);
        for _ in 0..4000 {
            if random.below(2) == 0 && !live.is_empty() {
                let block = live.swap_remove(random.below(live.len()));
                assert!(pool.free(block.start));
            } else {
                let length = 1 + random.below(50);
                let address = pool.take(length).unwrap_or_else(|| {
                    pool.remove_free(length);
                    new_address += 100;
                    pool.add_used(new_address, length);
                    new_address
                });
                let block = address..address + length;
                assert!(live.iter().all(|other| other.end <= block.start || block.end <= other.start));
                live.push(block);
            }
            most_live = most_live.max(live.iter().map(Range::len).sum());
            let held = pool.used.values().chain(pool.free.values()).sum::<usize>();
            assert!(held <= most_live, "{held} {most_live}");
        }
        live.iter().for_each(|block| assert!(pool.free(block.start)));
        let all = pool.remove_free(usize::MAX).iter().map(Range::len).sum::<usize>();
        assert!(all > 0 && pool.free.is_empty() && pool.free_by_length.is_empty());
    }

    #[test]
    fn a_tensor_takes_the_memory_of_the_tensor_before_it() {
        serve_tensors(true);
        let ones = || Tensor::ones([1 << 22], (Kind::Float, Device::Cpu));
        let first = ones();
        let address = first.data_ptr().addr();
        assert!(pool().used.contains_key(&address));
        drop(first);
        // Other tests run at the same time and may take the block first, but hardly in all 50 attempts.
        assert!((0..50).any(|_| ones().data_ptr().addr() == address));
        assert_eq!((ones() + ones()).sum(Kind::Float).double_value(&[]), f64::from(1 << 23));
        assert_eq!(Tensor::ones([3], (Kind::Float, Device::Cpu)).sum(Kind::Float).double_value(&[]), 3.0);
    }
}
