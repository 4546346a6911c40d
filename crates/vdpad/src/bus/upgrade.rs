//! The devices while the daemon is replaced by another program.

use std::time::Duration;

use parking_lot::{RwLockReadGuard, RwLockWriteGuard};
use vdpa_control::api::CtlError;
use vdpa_core::Errno;

use super::{BUSY_TIMEOUT, Bus};

/// How long requests on device files may be in progress when an upgrade is to take place.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// As [`REQUEST_TIMEOUT`], for requests on rings, of which none begins meanwhile.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_secs(1);

impl Bus {
    /// Keeps an upgrade from beginning while a device is added, changed or deleted.
    pub(super) fn begin_change(&self) -> Result<RwLockReadGuard<'_, ()>, CtlError> {
        self.changing.try_read().ok_or_else(|| {
            CtlError::new(Errno::BUSY, "an upgrade is in progress").with_hint("Try again when it has ended.")
        })
    }

    /// Keeps devices from being added, changed or deleted. Each one goes on in another daemon.
    pub(super) fn begin_upgrade(&self) -> Result<RwLockWriteGuard<'_, ()>, CtlError> {
        let upgrading = self.changing.try_write_for(BUSY_TIMEOUT);
        let upgrading = upgrading.ok_or_else(|| {
            CtlError::new(Errno::BUSY, "a device is being added or deleted, or an upgrade is in progress")
        })?;
        let devices = self.devices.lock();
        match devices.iter().find(|entry| entry.held.is_none()) {
            Some(lost) => {
                Err(CtlError::new(Errno::BUSY, format!("device {} would end with this daemon", lost.name))
                    .with_hint("Delete it first; docs/vdpad.md says which devices go on."))
            }
            None => Ok(upgrading),
        }
    }

    /// Stops serving files and rings, so that another process can go on.
    pub(super) fn stop_serving(&self) -> Result<(), CtlError> {
        self.files.pause(REQUEST_TIMEOUT).map_err(|errno| {
            CtlError::new(errno, "a request of a client on a device file has not ended")
                .with_hint("The daemon goes on. Its disk may hang; see the daemon's log.")
        })?;
        // Before threads are parked, which answer some of the kernel's messages.
        self.pause_vduse();
        self.pool.park(IN_FLIGHT_TIMEOUT).map_err(|errno| {
            self.files.unpause();
            self.unpause_vduse();
            CtlError::new(errno, "requests of a disk have not ended")
                .with_hint("The daemon goes on. A disk may hang; see the daemon's log.")
        })
    }

    /// Goes on after [`stop_serving`](Self::stop_serving).
    pub(super) fn serve_again(&self) {
        if let Err(errno) = self.pool.unpark() {
            tracing::error!(%errno, "the devices of a thread are not served any more");
        }
        self.files.unpause();
        self.unpause_vduse();
    }
}
