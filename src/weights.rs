//! Named tensors, access to the numbers of tensors, and copies of tensors to a device.

use crate::driver::cuda;
use crate::libtorch;
use anyhow::Result;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tch::{Device, Kind, Tensor};

/// Parameters and buffers by (stage, name within the stage). The model family and the task give the names.
pub type Weights = BTreeMap<(usize, String), Tensor>;

/// Copies weights to a device. A weight that is already there is shared, not copied.
pub fn on_device(weights: &Weights, device: Device) -> Weights {
    weights.iter().map(|(key, tensor)| (key.clone(), tensor.to_device(device))).collect()
}

/// A lock for pinning host memory. All clones share the lock. Several threads may pin at the same time, unless a thread forbids
/// pinning.
#[derive(Debug, Clone, Default)]
pub struct Pinning(Arc<RwLock<()>>);

impl Pinning {
    /// Keeps all threads that share this lock from pinning memory until the guard is dropped. This prevents a deadlock: a GPU has
    /// begun an all-reduce and waits for a second GPU. A thread that pins memory waits for the first GPU. The call that starts the
    /// all-reduce on the second GPU waits for this thread.
    pub fn forbid(&self) -> RwLockWriteGuard<'_, ()> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no thread forbids pinning. The calling thread may pin memory until the guard is dropped.
    pub fn allow(&self) -> RwLockReadGuard<'_, ()> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Allocates the host memory from which a device takes its inputs. For a GPU the memory is pinned, so that the GPU can copy inputs
/// while it computes.
#[derive(Debug, Clone)]
pub struct Staging {
    device: Device,
    pinning: Pinning,
}

impl Staging {
    pub fn new(device: Device, pinning: Pinning) -> Staging {
        Staging { device, pinning }
    }

    /// Staging for inputs that stay on the CPU.
    pub fn of_cpu() -> Staging {
        Staging::new(Device::Cpu, Pinning::default())
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn is_pinned(&self) -> bool {
        self.device.is_cuda()
    }

    /// Allocates an uninitialised tensor in pinned memory. Returns none if the device is not a GPU.
    ///
    /// # Errors
    /// No memory can be pinned.
    pub fn empty_pinned(&self, sizes: &[i64], kind: Kind) -> Result<Option<Tensor>> {
        let Device::Cuda(number) = self.device else { return Ok(None) };
        // libtorch may reuse pinned memory whose copies are done. It asks the thread's current GPU about these copies.
        cuda()?.make_current(number)?;
        let _guard = self.pinning.allow();
        libtorch::empty_pinned(sizes, kind).map(Some)
    }

    /// Prepares a host tensor for the device. Returns a pinned copy for a GPU, and the tensor itself for the CPU. Panics if no
    /// memory can be pinned.
    pub fn staged(&self, tensor: Tensor) -> Tensor {
        match self.empty_pinned(&tensor.size(), tensor.kind()).unwrap_or_else(|error| panic!("{error:#}")) {
            Some(mut copy) => {
                copy.copy_(&tensor);
                copy
            }
            None => tensor,
        }
    }
}

/// Copies a host tensor to a device. If the tensor is in pinned memory, the host does not wait for the copy.
pub fn upload(tensor: &Tensor, device: Device) -> Tensor {
    tensor.to_device_(device, tensor.kind(), true, false)
}

/// The numbers of a contiguous fp32 tensor in host memory.
pub fn floats(tensor: &Tensor) -> &[f32] {
    check(tensor, Kind::Float);
    // SAFETY: `check` makes sure that `numel` fp32 values are contiguous in host memory. The slice borrows the tensor, so the
    // values live as long as the slice.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

/// The numbers of [`floats`] as little-endian bytes. The files that this program writes hold fp32 numbers in this form.
pub fn bytes(tensor: &Tensor) -> &[u8] {
    const { assert!(cfg!(target_endian = "little"), "memory and files have the same byte order") };
    let numbers = floats(tensor);
    // SAFETY: any initialised memory may be read as bytes; the length is the slice's size in bytes.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast::<u8>(), size_of_val(numbers)) }
}

/// The same numbers as [`floats`], for a caller that changes them. Views share memory, so the caller must not use another slice of
/// the same storage at the same time.
pub fn floats_mut(tensor: &mut Tensor) -> &mut [f32] {
    check(tensor, Kind::Float);
    // SAFETY: as in `floats`. The caller promises that it uses no view of the same storage meanwhile.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) }
}

/// The bytes of a contiguous uint8 tensor in host memory, for a caller that changes them. The rule of [`floats_mut`] applies.
pub fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    check(tensor, Kind::Uint8);
    // SAFETY: `check` makes sure that `numel` bytes are contiguous in host memory; the rest is as in `floats_mut`.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) }
}

fn check(tensor: &Tensor, kind: Kind) {
    assert!(
        tensor.kind() == kind && tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "expected a contiguous {kind:?} tensor in host memory, got {tensor:?}"
    );
}
