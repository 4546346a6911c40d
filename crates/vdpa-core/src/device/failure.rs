//! Failing a device whose back end is removed while a client has it open.

use crate::device::Device;
use crate::errno::Errno;
use crate::features::Status;
use crate::host::Event as _;
use crate::parent::Parent;
use crate::types::Result;

impl<P: Parent> Device<P> {
    /// Removes the back end for good: from now on each request in the rings completes with an error.
    ///
    /// Everything else works as before, also after resets: the client sees failing requests only, can stop the device, and
    /// gets its memory back. While the device runs, its status has `DEVICE_NEEDS_RESET` (virtio 1.2 section 2.1). The config
    /// event and the error events of the queues are signalled.
    ///
    /// Called by the management side. Blocks until requests in flight are completed; when it returns, the back end is no longer
    /// in use.
    ///
    /// # Errors
    /// `ETIMEDOUT` when requests in flight take too long: the device has failed, and the back end is released once they
    /// complete. Any other error of the parent (`EOPNOTSUPP` if it cannot fail requests) changes nothing.
    pub fn fail(&mut self) -> Result<()> {
        let outcome = self.parent.fail();
        if matches!(outcome, Ok(()) | Err(Errno::TIMEDOUT)) {
            self.failed = true;
            self.signal_failure();
        }
        outcome
    }

    /// Whether [`fail`](Self::fail) was called.
    pub const fn failed(&self) -> bool {
        self.failed
    }

    /// `VHOST_VDPA_GET_STATUS`. Has `DEVICE_NEEDS_RESET` while the device runs after it has failed or one of its rings broke.
    pub fn status(&self) -> Status {
        if self.status.contains(Status::DRIVER_OK) && (self.failed || self.parent.needs_reset()) {
            Status(self.status.0 | Status::NEEDS_RESET.0)
        } else {
            self.status
        }
    }

    /// Signals the failure to the driver, if the device runs.
    pub(super) fn signal_failure(&self) {
        if !self.failed || !self.status.contains(Status::DRIVER_OK) {
            return;
        }
        if let Some(event) = &self.config_call {
            event.signal();
        }
        self.vrings.iter().filter_map(|vring| vring.err()).for_each(|event| event.signal());
    }
}
