//! Devices after a crash of the daemon that had served them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vdpa_backend::front::fuse::FileAttributes;
use vdpa_backend::front::vhost::{AnyParent, SharedDevice, VhostVdpaFile};
use vdpa_backend::persist::{DeviceLog, Held, Reopened};
use vdpa_backend::worker::{QueueLogs, WorkerPool};
use vdpa_control::api::{AddRequest, Attrs, CtlError};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::device::Device;
use vdpa_core::error::chain;
use vdpa_core::types::QueueIndex;

use super::{Bus, DEVICE_FILE_ATTR, Entry, HANDOVER_ATTR, file_name};
use crate::devices::MgmtDevice;
use crate::survival::{Identity, Survival};

/// How long a restored device waits for the requests that its former daemon had handed to the kernel.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_secs(60);

impl Bus {
    /// Makes the devices of a predecessor again, with their clients. One that cannot be restored is given up: its client gets
    /// errors.
    pub(crate) fn restore(&self, legacy: BTreeMap<u32, (Identity, Vec<Held>)>) {
        for (held, (identity, items)) in legacy {
            let name = identity.request.name.clone();
            match self.restore_device(held, identity, items) {
                Ok(()) => tracing::info!(device = %name, "device restored"),
                Err(error) => {
                    tracing::error!(device = %name, "the device cannot be restored: {}", chain(&*error));
                    // The next daemon must not find it beside a device that has its name by then.
                    if let Some(survival) = &self.survival {
                        survival.release_identity(held);
                    }
                }
            }
        }
    }

    fn restore_device(
        &self,
        held: u32,
        identity: Identity,
        items: Vec<Held>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let survival = self.survival.as_ref().ok_or("there is no holder")?;
        let attributes = identity.attributes();
        let Identity { number, node, request, .. } = identity;
        let AddRequest { name, mgmtdev, attrs } = request;
        let mgmt = self.mgmt.iter().find(|mgmt| mgmt.describe().handle() == mgmtdev);
        let mgmt = mgmt.ok_or_else(|| format!("there is no management device {mgmtdev}"))?;
        let Reopened { mut log, records, front, logs } =
            DeviceLog::reopen(held, survival.store(), items, &survival.spaces, &self.spaces)?;
        let logs = logs.map(QueueLogs::reopen).transpose()?.ok_or("its in-flight logs are not held")?;
        let parent = create_again(&**mgmt, &name, &attrs, &self.pool.with_logs(logs.clone()))?;
        reach(CrashPoint::ParentMade);
        let profile = parent.profile().clone();
        let mut device = Device::restore(parent, &records, log.source())?;
        reach(CrashPoint::StateRestored);
        let running: BTreeSet<QueueIndex> =
            device.stopped_queues().into_iter().map(|(index, _)| index).collect();
        let indices = (0..profile.queues).map(QueueIndex);
        indices.filter(|index| !running.contains(index)).for_each(|index| logs.forget(index));
        device.resume_queues(&[])?;
        reach(CrashPoint::QueuesResumed);
        let device: SharedDevice = Arc::new(Mutex::new(device));
        let file = VhostVdpaFile::new(name.clone(), Arc::clone(&device), self.spaces.clone());
        let file = Arc::new(file.restored(log, &front));
        let opens: Vec<u64> = front.opener.iter().map(|opener| opener.handle).collect();
        let file_name = file_name(number);
        let path = self.files.restore(&file_name, Arc::clone(&file) as _, node, attributes, &opens)?;
        reach(CrashPoint::FileRestored);
        let front = self.files.front();
        let entry = Entry { name, number, mgmtdev, profile, device, file, path, front, held: Some(held) };
        self.devices.lock().push(Arc::new(entry));
        Ok(())
    }

    /// Whether such a device ends with this process. An invalid request is like one that does.
    pub(crate) fn is_lost_in_crash(&self, request: &AddRequest) -> bool {
        let mgmt = self.mgmt.iter().find(|mgmt| mgmt.describe().handle() == request.mgmtdev);
        let handover = request.attrs.get(HANDOVER_ATTR) == Some("open");
        let own_mount = request.attrs.get(DEVICE_FILE_ATTR).is_some();
        mgmt.is_none_or(|mgmt| lost_in_crash(&**mgmt, handover, own_mount, &request.attrs).is_some())
    }

    /// Has held what a new device is.
    pub(super) fn hold(
        &self,
        survival: &Survival,
        held: u32,
        number: u32,
        request: &AddRequest,
    ) -> Result<(), Errno> {
        let name = file_name(number);
        let FileAttributes { mode, uid, gid } =
            self.files.attributes(&name).unwrap_or_else(FileAttributes::private);
        let node = self.files.node(&name).unwrap_or(0);
        let identity = Identity { number, node, mode, uid, gid, request: request.clone() };
        survival.hold_identity(held, &identity)
    }
}

/// Why a device ends with this process; `None` if it goes on in the next one.
pub(super) fn lost_in_crash(
    mgmt: &dyn MgmtDevice,
    handover: bool,
    own_mount: bool,
    attrs: &Attrs,
) -> Option<&'static str> {
    match (handover, own_mount) {
        (true, _) => Some("it can be opened by a successor (handover open)"),
        (_, true) => Some("its file is a mount of its own (device_file)"),
        _ => mgmt.lost_in_crash(attrs),
    }
}

/// Makes a device of the former daemon again. Its disk stays locked until the kernel has no request of that daemon in flight: no
/// request may be repeated before.
fn create_again(
    mgmt: &dyn MgmtDevice,
    name: &str,
    attrs: &Attrs,
    pool: &WorkerPool,
) -> Result<AnyParent, CtlError> {
    let deadline = Instant::now() + IN_FLIGHT_TIMEOUT;
    loop {
        match mgmt.create(name, attrs, pool) {
            Err(error) if error.errno == Errno::BUSY && Instant::now() < deadline => {
                tracing::warn!(device = %name, "requests of the former daemon are still in flight");
            }
            result => return result,
        }
    }
}
