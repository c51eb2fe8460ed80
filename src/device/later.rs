//! Copies a few numbers from a device to the host. The host does not wait for the copy.

use crate::driver::{Event, cuda};
use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// A tensor whose copy to host memory is in progress or done.
pub struct Later {
    numbers: Tensor,
    /// The event that the device passes after the copy; none for a tensor on the CPU, whose copy is done at once.
    event: Option<Event>,
}

impl Later {
    /// Starts to copy a tensor. The copy comes after all work that the device was given before.
    pub fn start(tensor: &Tensor) -> Result<Later> {
        // libtorch copies into pinned memory, so the host does not wait.
        let numbers = tensor.to_device_(Device::Cpu, Kind::Float, true, true);
        let event = if tensor.device().is_cuda() { Some(Event::now(cuda()?)?) } else { None };
        Ok(Later { numbers, event })
    }

    /// Whether the copy is done.
    pub fn is_done(&self) -> Result<bool> {
        self.event.as_ref().map_or(Ok(true), Event::has_passed)
    }

    /// The numbers. Must be called only after [`Later::is_done`] has returned true.
    pub fn numbers(&self) -> Result<Vec<f32>> {
        Ok(Vec::<f32>::try_from(&self.numbers)?)
    }
}
