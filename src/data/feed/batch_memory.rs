//! Reuses the memory of batches. If many threads allocated tens of megabytes for each batch, the allocator would fragment: a loader
//! that holds 350 MiB grew to more than a gigabyte.

use crate::weights::Staging;
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// Tensors that are not in use.
#[derive(Debug, Clone, Default)]
pub struct BatchMemory(Arc<Mutex<Vec<Tensor>>>);

/// A tensor in use, which returns to the memory when this is dropped. All its views must be dropped by then.
#[derive(Debug)]
pub struct Borrowed {
    memory: BatchMemory,
    tensor: Tensor,
}

impl BatchMemory {
    /// An fp32 host tensor of undefined values.
    pub fn take(&self, shape: [i64; 4]) -> (Tensor, Borrowed) {
        let found = {
            let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            memory.iter().position(|tensor| tensor.size() == shape).map(|index| memory.swap_remove(index))
        };
        let tensor = found.unwrap_or_else(|| Tensor::empty(shape, (Kind::Float, Device::Cpu)));
        (tensor.shallow_clone(), Borrowed { memory: self.clone(), tensor })
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.memory.0.lock().unwrap_or_else(PoisonError::into_inner).push(self.tensor.shallow_clone());
    }
}

/// An fp32 host tensor for images. For a GPU it is pinned memory, which libtorch keeps until the GPU has copied it.
pub fn allocate(memory: &BatchMemory, shape: [i64; 4], staging: &Staging) -> (Tensor, Option<Borrowed>) {
    match staging.empty_pinned(&shape) {
        Some(pinned) => (pinned, None),
        None => {
            let (tensor, borrowed) = memory.take(shape);
            (tensor, Some(borrowed))
        }
    }
}

/// The bytes of a batch of fp32 images. libtorch rounds pinned memory up to a power of two.
pub fn batch_bytes(images: usize, channels: usize, size: usize, is_pinned: bool) -> usize {
    let bytes = 4 * images * channels * size * size;
    if is_pinned { bytes.next_power_of_two() } else { bytes }
}

/// (batch, channel, row, column) of square images.
pub fn shape(batch: usize, channels: usize, size: usize) -> [i64; 4] {
    [batch as i64, channels as i64, size as i64, size as i64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_once_it_is_given_back_and_not_before() {
        let memory = BatchMemory::default();
        let (first, borrowed) = memory.take([2, 1, 3, 3]);
        let (second, other) = memory.take([2, 1, 3, 3]);
        let place = |tensor: &Tensor| tensor.data_ptr() as usize;
        assert!(place(&first) != place(&second), "both are in use");
        let was_at = place(&first);
        drop((first, borrowed));
        let (smaller, _borrowed) = memory.take([1, 1, 3, 3]);
        assert_eq!(smaller.size(), [1, 1, 3, 3]);
        let (third, _again) = memory.take([2, 1, 3, 3]);
        assert!(place(&third) == was_at);
        drop((second, other));
    }
}
