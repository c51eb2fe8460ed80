//! A few numbers on their way from a device to the host, which goes on meanwhile.

use crate::driver::{Event, cuda};
use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// A copy of a tensor that is or will be in host memory.
pub struct Later {
    numbers: Tensor,
    /// None: it is there.
    event: Option<Event>,
}

impl Later {
    /// Has the numbers copied after all that the device was given before.
    pub fn of(tensor: &Tensor) -> Result<Later> {
        // libtorch copies into pinned memory, and so beside the host's work.
        let numbers = tensor.to_device_(Device::Cpu, Kind::Float, true, true);
        let event = if tensor.device().is_cuda() { Some(Event::now(cuda()?)?) } else { None };
        Ok(Later { numbers, event })
    }

    /// Whether they have arrived.
    pub fn is_here(&self) -> Result<bool> {
        self.event.as_ref().map_or(Ok(true), Event::has_passed)
    }

    /// The numbers; only once [`Later::is_here`] has said so.
    pub fn numbers(&self) -> Result<Vec<f32>> {
        Ok(Vec::<f32>::try_from(&self.numbers)?)
    }
}
