//! Reuses the memory of batches. If many threads allocated tens of megabytes for each batch, the allocator would fragment the
//! memory. Without reuse, a loader that held 350 MiB grew to more than a gigabyte.

use super::ahead::held_by_worker;
use crate::usage;
use crate::weights::Staging;
use anyhow::Result;
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Kind, TchError, Tensor};

/// Host tensors that are not in use. All clones of a `BatchMemory` share the tensors.
#[derive(Debug, Clone, Default)]
pub struct BatchMemory(Arc<Mutex<Vec<Tensor>>>);

/// A tensor in use. Dropping `Borrowed` makes the tensor available again, so all views of the tensor must be dropped first.
#[derive(Debug)]
pub struct Borrowed {
    memory: BatchMemory,
    tensor: Tensor,
}

impl BatchMemory {
    /// Takes an unused host tensor of this shape and kind, or allocates a new tensor. The values of the tensor are undefined.
    ///
    /// # Errors
    /// There is no memory for a new tensor.
    pub fn take(&self, shape: [i64; 4], kind: Kind) -> Result<(Tensor, Borrowed), TchError> {
        let found = {
            let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = |tensor: &Tensor| tensor.size() == shape && tensor.kind() == kind;
            memory.iter().position(fits).map(|index| memory.swap_remove(index))
        };
        let tensor = found.map_or_else(|| Tensor::f_empty(shape, (kind, Device::Cpu)), Ok)?;
        Ok((tensor.shallow_clone(), Borrowed { memory: self.clone(), tensor }))
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.memory.0.lock().unwrap_or_else(PoisonError::into_inner).push(self.tensor.shallow_clone());
    }
}

/// Gets a host tensor for images of this kind, fp32 or bytes. For a CPU, the tensor comes from `memory`, and returns there after
/// use. For a GPU, the tensor is in pinned memory, which libtorch does not reuse until the GPU has copied the images.
///
/// # Errors
/// A usage error if the tensor cannot be allocated. Its text says how much memory the `workers` workers of a replica may hold, and
/// names the cure. The text does not quote libtorch's message, because that message would look like the error of a step that needs
/// a smaller micro-batch.
pub fn allocate(
    memory: &BatchMemory,
    (shape, kind): ([i64; 4], Kind),
    staging: &Staging,
    workers: usize,
) -> Result<(Tensor, Option<Borrowed>)> {
    let allocated = match staging.empty_pinned(&shape, kind) {
        Ok(None) => memory.take(shape, kind).map(|(tensor, borrowed)| (tensor, Some(borrowed))).ok(),
        pinned => pinned.ok().flatten().map(|pinned| (pinned, None)),
    };
    allocated.ok_or_else(|| {
        let [images, channels, size, _] = shape.map(|number| number as usize);
        no_memory(workers, batch_bytes([images, channels, size], kind, staging.is_pinned()))
    })
}

fn no_memory(workers: usize, bytes: usize) -> anyhow::Error {
    let megabytes = |bytes: usize| bytes as f64 / 1e6;
    let batches = held_by_worker(workers, bytes);
    let fewer = if workers > 1 { format!("set run.workers = {}, or ", workers / 2) } else { String::new() };
    usage!(
        "a data worker finds no memory for a batch of {:.1} MB; {workers} worker(s) per replica hold up to {batches} each, \
         {:.1} MB in all: {fewer}give the job more memory",
        megabytes(bytes),
        megabytes(workers * batches * bytes)
    )
}

/// The size in bytes of a batch of square images. libtorch rounds pinned memory up to a power of two.
pub fn batch_bytes([images, channels, size]: [usize; 3], kind: Kind, is_pinned: bool) -> usize {
    let bytes = kind.elt_size_in_bytes() * images * channels * size * size;
    if is_pinned { bytes.next_power_of_two() } else { bytes }
}

/// The shape (batch, channel, row, column) of square images.
pub fn shape(batch: usize, channels: usize, size: usize) -> [i64; 4] {
    [batch as i64, channels as i64, size as i64, size as i64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reused_after_it_is_given_back_and_not_before() {
        let memory = BatchMemory::default();
        let take = |shape| memory.take(shape, Kind::Uint8).unwrap();
        let (first, borrowed) = take([2, 1, 3, 3]);
        let (second, other) = take([2, 1, 3, 3]);
        let address = |tensor: &Tensor| tensor.data_ptr() as usize;
        assert!(address(&first) != address(&second), "both are in use");
        let address_of_first = address(&first);
        drop((first, borrowed));
        let (smaller, _borrowed) = take([1, 1, 3, 3]);
        assert_eq!(smaller.size(), [1, 1, 3, 3]);
        let (floats, _of_floats) = memory.take([2, 1, 3, 3], Kind::Float).unwrap();
        assert_eq!(floats.kind(), Kind::Float, "the free memory is too small");
        let (third, _borrowed_again) = take([2, 1, 3, 3]);
        assert!(address(&third) == address_of_first);
        drop((second, other));
    }

    #[test]
    fn a_worker_without_memory_names_the_workers_and_not_the_micro_batch() {
        let shape = [1 << 24, 3, 4096, 4096];
        let allocate = |workers| allocate(&BatchMemory::default(), (shape, Kind::Float), &Staging::of_cpu(), workers);
        let error = allocate(8).err().unwrap();
        let text = error.to_string();
        assert!(
            text.contains("8 worker(s) per replica hold up to 1 each") && text.contains("set run.workers = 4"),
            "{text}"
        );
        assert!(!text.contains("micro_batch") && !text.contains("DefaultCPUAllocator"), "{text}");
        assert_eq!(crate::error::exit_code(&error), 2);
        let text = allocate(1).err().unwrap().to_string();
        assert!(text.ends_with("in all: give the job more memory"), "{text}");
    }
}
