//! The memory of batches, used again. Taken anew each time, in sizes of tens of megabytes and by many threads, it would leave
//! the allocator in pieces: a loader that holds 350 MiB grew to a gigabyte and more.

use crate::weights::empty_pinned;
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// Tensors that nobody uses now.
#[derive(Debug, Clone, Default)]
pub struct Spare(Arc<Mutex<Vec<Tensor>>>);

/// Gives a tensor back when dropped. By then nobody may hold on to it or to a view of it.
#[derive(Debug)]
pub struct Lent {
    spare: Spare,
    tensor: Tensor,
}

impl Spare {
    /// An fp32 host tensor of any content.
    pub fn take(&self, shape: [i64; 4]) -> (Tensor, Lent) {
        let found = {
            let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            spare.iter().position(|tensor| tensor.size() == shape).map(|index| spare.swap_remove(index))
        };
        let tensor = found.unwrap_or_else(|| Tensor::empty(shape, (Kind::Float, Device::Cpu)));
        (tensor.shallow_clone(), Lent { spare: self.clone(), tensor })
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.spare.0.lock().unwrap_or_else(PoisonError::into_inner).push(self.tensor.shallow_clone());
    }
}

/// An fp32 host tensor for images. libtorch itself looks after pinned memory that a GPU still copies from.
pub fn room(spare: &Spare, shape: [i64; 4], device: Device) -> (Tensor, Option<Lent>) {
    match empty_pinned(&shape, device) {
        Some(pinned) => (pinned, None),
        None => {
            let (tensor, lent) = spare.take(shape);
            (tensor, Some(lent))
        }
    }
}

/// Memory that a batch takes; libtorch rounds what is pinned up to a power of two.
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
        let spare = Spare::default();
        let (first, lent) = spare.take([2, 1, 3, 3]);
        let (second, other) = spare.take([2, 1, 3, 3]);
        let place = |tensor: &Tensor| tensor.data_ptr() as usize;
        assert!(place(&first) != place(&second), "both are in use");
        let was_at = place(&first);
        drop((first, lent));
        let (smaller, _lent) = spare.take([1, 1, 3, 3]);
        assert_eq!(smaller.size(), [1, 1, 3, 3]);
        let (third, _again) = spare.take([2, 1, 3, 3]);
        assert!(place(&third) == was_at);
        drop((second, other));
    }
}
