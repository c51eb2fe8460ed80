//! What the rooms exchange: tensors by stage and name, and their numbers as slices.

use crate::driver::cuda;
use crate::libtorch;
use anyhow::Result;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use tch::{Device, Kind, Tensor};

/// Parameters by (stage, `model_stages[stage]` name).
pub type Weights = BTreeMap<(usize, String), Tensor>;

/// The same weights on a device; no copy where they are there already.
pub fn on_device(weights: &Weights, device: Device) -> Weights {
    weights.iter().map(|(key, tensor)| (key.clone(), tensor.to_device(device))).collect()
}

/// The right to pin memory, shared by its clones: held by threads that pin, or by one that keeps the others from it.
#[derive(Debug, Clone, Default)]
pub struct Pinning(Arc<RwLock<()>>);

impl Pinning {
    /// While the guard lives, nobody who shares this begins to pin memory. Pinning can wait for a GPU, and other GPUs' work
    /// can then wait for the thread that pins.
    pub fn forbid(&self) -> RwLockWriteGuard<'_, ()> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Host memory from which a device takes its inputs. For a GPU it is pinned, so that the GPU copies it beside its work.
#[derive(Debug, Clone)]
pub struct Staging {
    device: Device,
    pinning: Pinning,
}

impl Staging {
    pub fn new(device: Device, pinning: Pinning) -> Staging {
        Staging { device, pinning }
    }

    /// For inputs that stay on the CPU.
    pub fn of_cpu() -> Staging {
        Staging::new(Device::Cpu, Pinning::default())
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn is_pinned(&self) -> bool {
        self.device.is_cuda()
    }

    /// An fp32 tensor of any content in pinned memory; none if the device is no GPU.
    ///
    /// # Errors
    /// No memory can be pinned.
    pub fn empty_pinned(&self, sizes: &[i64]) -> Result<Option<Tensor>> {
        let Device::Cuda(number) = self.device else { return Ok(None) };
        // libtorch asks here which of the GPU's copies are done, in this thread.
        cuda()?.make_current(number)?;
        let _held = self.pinning.0.read().unwrap_or_else(PoisonError::into_inner);
        libtorch::empty_pinned(sizes).map(Some)
    }

    /// An fp32 host tensor as the device takes it best: a pinned copy for a GPU, else the tensor itself.
    pub fn staged(&self, tensor: Tensor) -> Tensor {
        match self.empty_pinned(&tensor.size()).unwrap_or_else(|error| panic!("{error:#}")) {
            Some(mut copy) => {
                copy.copy_(&tensor);
                copy
            }
            None => tensor,
        }
    }
}

/// A host tensor on a device; from pinned memory without waiting for it.
pub fn upload(tensor: &Tensor, device: Device) -> Tensor {
    tensor.to_device_(device, tensor.kind(), true, false)
}

/// The numbers of a contiguous fp32 CPU tensor.
pub fn floats(tensor: &Tensor) -> &[f32] {
    check(tensor);
    // SAFETY: `check` has seen that `numel` fp32 values lie in a row in host memory, and the tensor, borrowed for as
    // long as the slice, keeps them alive.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

/// As [`floats`], as the little-endian bytes that every file format here keeps.
pub fn bytes(tensor: &Tensor) -> &[u8] {
    const { assert!(cfg!(target_endian = "little"), "the byte order of memory is the files'") };
    let numbers = floats(tensor);
    // SAFETY: any initialised memory may be read as bytes; the length is that of the slice.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast::<u8>(), size_of_val(numbers)) }
}

/// As [`floats`], to write through. Views share memory: the caller lets no other slice of the same storage live.
pub fn floats_mut(tensor: &mut Tensor) -> &mut [f32] {
    check(tensor);
    // SAFETY: as in `floats`; the exclusive borrow of the tensor is the caller's promise about its views.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) }
}

fn check(tensor: &Tensor) {
    assert!(
        tensor.kind() == Kind::Float && tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "expected a contiguous fp32 tensor in host memory, got {tensor:?}"
    );
}
