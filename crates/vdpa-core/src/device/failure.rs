//! A device whose back end is taken away while a client has it.

use crate::device::Device;
use crate::errno::Errno;
use crate::features::Status;
use crate::host::Event as _;
use crate::parent::Parent;
use crate::types::Result;

impl<P: Parent> Device<P> {
    /// Takes away what is behind the device, for ever: from now on each request in its rings is answered with an error.
    /// Everything else works as before, so that a client notices nothing but failing requests, can stop the device and
    /// gets its memory back, also over resets. While it runs, `DEVICE_NEEDS_RESET` is in its status
    /// (virtio 1.2 section 2.1); the driver is told by the config event, and by the error events of the queues.
    ///
    /// Called by whoever manages the device. Blocks until requests in flight are done; what was behind the device is
    /// not in use any more when it returns.
    ///
    /// # Errors
    /// `ETIMEDOUT` when the parent does not wait for requests in flight any longer: all of this holds once they are done.
    /// Otherwise what the parent reports, `EOPNOTSUPP` if it cannot fail requests; nothing has changed then.
    pub fn fail(&mut self) -> Result<()> {
        let outcome = self.parent.fail();
        if matches!(outcome, Ok(()) | Err(Errno::TIMEDOUT)) {
            self.failed = true;
            self.tell_failure();
        }
        outcome
    }

    /// Whether [`fail`](Self::fail) was called.
    pub const fn failed(&self) -> bool {
        self.failed
    }

    /// `VHOST_VDPA_GET_STATUS`. `DEVICE_NEEDS_RESET` is in it while a device runs that has failed, or a ring of which is
    /// broken.
    pub fn status(&self) -> Status {
        if self.status.contains(Status::DRIVER_OK) && (self.failed || self.parent.needs_reset()) {
            Status(self.status.0 | Status::NEEDS_RESET.0)
        } else {
            self.status
        }
    }

    /// Tells the driver of a device that runs and has failed.
    pub(super) fn tell_failure(&self) {
        if !self.failed || !self.status.contains(Status::DRIVER_OK) {
            return;
        }
        if let Some(event) = &self.config_call {
            event.signal();
        }
        self.vrings.iter().filter_map(|vring| vring.err()).for_each(|event| event.signal());
    }
}
