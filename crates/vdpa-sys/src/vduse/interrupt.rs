//! [`Interrupt`]: what wakes the driver of a queue of a VDUSE device.

use std::sync::{Arc, Weak};
use std::time::Duration;

use vdpa_core::Errno;

use super::VduseDevice;

/// How often an interrupt is tried that the kernel refuses, with a pause after the first tries.
const TRIES: u32 = 200;
/// The tries without one.
const AT_ONCE: u32 = 20;
/// The pause.
const PAUSE: Duration = Duration::from_micros(500);

/// The interrupt of one queue. It does not keep the device open.
#[derive(Clone, Debug)]
pub struct Interrupt {
    device: Weak<VduseDevice>,
    queue: u32,
}

impl Interrupt {
    /// That of queue `queue`.
    #[must_use]
    pub fn new(device: &Arc<VduseDevice>, queue: u32) -> Self {
        Self { device: Arc::downgrade(device), queue }
    }

    /// Tells the driver that the queue has news, if the device is open and runs.
    ///
    /// The kernel notes that the driver has set DRIVER_OK when it has read the answer to that, a moment after the device has
    /// given it and has begun to serve; until then it refuses interrupts (`EINVAL`). So one that is refused is tried again, for up to
    /// 0.1 s. Of a device that is reset or suspended no queue runs, and nothing is signalled.
    pub(crate) fn raise(&self) {
        for tried in 0..TRIES {
            let Some(device) = self.device.upgrade() else { return };
            if device.interrupt(self.queue) != Err(Errno::INVAL) {
                return;
            }
            drop(device);
            if tried < AT_ONCE {
                std::thread::yield_now();
            } else {
                std::thread::sleep(PAUSE);
            }
        }
    }
}
