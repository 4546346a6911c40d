//! What is served after too many crashes: every request gets an error at once, and no state of a device is touched, since that may
//! be what ends the daemon.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::SystemTime;

use vdpa_backend::front::fuse::{DeviceFile, DeviceFiles, IoctlCall, IoctlReply, Opener, POLLIN, POLLOUT};
use vdpa_backend::persist::{Held, Kind};
use vdpa_control::api::{
    AddRequest, CtlError, DaemonInfo, DevInfo, MgmtDev, QueueVstats, SetAnswer, SetRequest, UpdateInfo,
    UpgradeRequest,
};
use vdpa_control::config::DevConfig;
use vdpa_core::Errno;
use vdpa_sys::eventfd::EventFd;

use crate::control::Backend;
use crate::survival::{Legacy, LegacyParts, Survival};

/// `POLLERR` of `poll(2)`.
const POLLERR: u32 = 0x8;

/// A device that is given up: all its requests fail.
#[derive(Debug)]
struct FailedFile;

impl DeviceFile for FailedFile {
    fn open(&self, _: &Opener) -> Result<(), Errno> {
        Err(Errno::IO)
    }

    fn release(&self, _: u64) {}

    fn ioctl(&self, _: &IoctlCall<'_>) -> Result<IoctlReply, Errno> {
        Err(Errno::IO)
    }

    fn write(&self, _: u64, _: u32, _: &[u8]) -> Result<u32, Errno> {
        Err(Errno::IO)
    }

    fn poll(&self) -> u32 {
        POLLERR | POLLIN | POLLOUT
    }
}

/// Puts a device that fails in the place of each that was held, and wakes their clients.
pub(crate) fn put_in_place(files: &DeviceFiles, legacy: Legacy) {
    for (identity, mut items) in legacy.devices.into_values() {
        let name = &identity.request.name;
        let mut parts = LegacyParts::take(&mut items);
        match parts.restore_file(files, &identity, Arc::new(FailedFile), &[]) {
            Ok(_) => tracing::error!(device = %name, "the device is given up: every request gets EIO"),
            Err(error) => tracing::error!(device = %name, %error, "the device is gone"),
        }
        wake(items);
    }
}

/// Signals the client's eventfds, whichever they are: those for errors and for a change of the configuration have it ask what is
/// wrong. One for interrupts may be signalled without need, and nobody waits for one for kicks any more.
fn wake(items: Vec<Held>) {
    for event in items.into_iter().filter(|item| item.kind == Kind::Event) {
        // What is held was checked to be one.
        if let Ok(event) = EventFd::from_peer(event.fd) {
            event.signal();
        }
    }
}

/// Answers for the daemon itself, and with an error for everything else.
#[derive(Debug)]
pub(crate) struct FailedBackend {
    pub(crate) survival: Arc<Survival>,
    pub(crate) since: SystemTime,
}

/// The error of every request.
fn failed<T>() -> Result<T, CtlError> {
    Err(CtlError::new(Errno::IO, "the daemon has crashed too often: its devices are given up").with_hint(
        "\"vdpactl daemon show\" and the log tell of the last crash. Restart the service to begin anew.",
    ))
}

impl Backend for FailedBackend {
    fn daemon(&self) -> Result<DaemonInfo, CtlError> {
        self.survival.daemon_info(self.since)
    }

    fn upgrade(&self, _: UpgradeRequest) -> Result<(), CtlError> {
        failed()
    }

    fn mgmtdevs(&self) -> Result<Vec<MgmtDev>, CtlError> {
        failed()
    }

    fn devices(&self) -> Result<Vec<DevInfo>, CtlError> {
        failed()
    }

    fn device(&self, _: &str) -> Result<DevInfo, CtlError> {
        failed()
    }

    fn config(&self, _: &str) -> Result<DevConfig, CtlError> {
        failed()
    }

    fn vstats(&self, _: &str, _: u32) -> Result<QueueVstats, CtlError> {
        failed()
    }

    fn updates(&self) -> Result<Vec<UpdateInfo>, CtlError> {
        failed()
    }

    fn update(&self, _: &str) -> Result<UpdateInfo, CtlError> {
        failed()
    }

    fn add(&self, _: AddRequest, _: Vec<OwnedFd>) -> Result<(), CtlError> {
        failed()
    }

    fn set(&self, _: &str, _: SetRequest) -> Result<SetAnswer, CtlError> {
        failed()
    }

    fn save_state(&self, _: &str) -> Result<Vec<u8>, CtlError> {
        failed()
    }

    fn load_state(&self, _: &str, _: &[u8]) -> Result<(), CtlError> {
        failed()
    }

    fn delete(&self, _: &str, _: bool) -> Result<(), CtlError> {
        failed()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    /// A client may have filled the counter of an eventfd that blocks: it must not keep everybody from an answer.
    #[test]
    fn a_full_eventfd_does_not_keep_the_others_from_being_signalled() {
        let full = eventfd(0, EventfdFlags::empty()).unwrap();
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let other = EventFd::new().unwrap();
        let fds = [full, std::os::fd::AsFd::as_fd(&other).try_clone_to_owned().unwrap()];
        let item = |fd| Held { key: 0, kind: Kind::Event, record: Vec::new(), fd };
        wake(fds.map(item).into());
        assert!(other.wait(Some(std::time::Duration::ZERO)));
    }
}
