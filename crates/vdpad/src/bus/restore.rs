//! Devices after a crash of the daemon that had served them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vdpa_backend::front::vhost::{AnyParent, SharedDevice, SharedParent, VhostVdpaFile};
use vdpa_backend::persist::{DeviceLog, Held, Reopened, SharedFront, SharedRecords};
use vdpa_backend::worker::{QueueLogs, WorkerPool};
use vdpa_control::api::{AddRequest, Attrs, CtlError};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::device::Device;
use vdpa_core::device::state::StateSource;
use vdpa_core::error::chain;
use vdpa_core::handover::Handover;
use vdpa_core::parent::Parent as _;
use vdpa_core::types::QueueIndex;
use vdpa_sys::guest::LinuxHost;

use super::{Bus, Entry};
use crate::devices::{Kept, MgmtDevice};
use crate::survival::{Identity, LegacyParts};

/// How long a restored device waits for the requests that its former daemon had handed to the kernel.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_secs(60);

impl Bus {
    /// Makes the devices of a predecessor again, with their clients. One that cannot be restored is given up: its client gets
    /// errors.
    pub(crate) fn restore(&self, legacy: BTreeMap<u32, (Identity, Vec<Held>)>) {
        for (held, (identity, items)) in legacy {
            let name = &identity.request.name;
            let keys: Vec<u64> = items.iter().map(|item| item.key).chain([identity.key(held)]).collect();
            match self.restore_device(held, &identity, items) {
                Ok(()) => tracing::info!(device = %name, "device restored"),
                Err(error) => {
                    tracing::error!(device = %name, "the device cannot be restored: {}", chain(&*error));
                    // The next daemon must not find it beside a device that has its name by then.
                    if let Some(survival) = &self.survival {
                        survival.give_up_device(&keys, &identity);
                    }
                }
            }
        }
    }

    fn restore_device(
        &self,
        held: u32,
        identity: &Identity,
        mut items: Vec<Held>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let survival = self.survival.as_ref().ok_or("there is no holder")?;
        let Identity { number, mark, request, .. } = identity;
        let AddRequest { name, mgmtdev, attrs } = request;
        let mgmt = self.mgmt.iter().find(|mgmt| mgmt.describe().handle() == *mgmtdev);
        let mgmt = mgmt.ok_or_else(|| format!("there is no management device {mgmtdev}"))?;
        let mut parts = LegacyParts::take(&mut items);
        let Reopened { mut log, records, shared, front, logs } =
            DeviceLog::reopen(held, survival.store(), items, &survival.spaces, &self.spaces)?;
        let logs = logs.map(QueueLogs::reopen).transpose()?.ok_or("its in-flight logs are not held")?;
        let kept = Kept::restored(*mark, parts.contents.take());
        let parent = create_again(&**mgmt, name, attrs, &self.pool.with_logs(logs.clone()), &kept)?;
        reach(CrashPoint::ParentMade);
        let profile = parent.profile().clone();
        let (mut device, shared, mut successor) = match (&shared, &front.shared) {
            (Some(records), Some(front)) => {
                let (device, shared, successor) = restore_shared(parent, records, front, log.source())?;
                (device, Some(shared), successor)
            }
            _ => (Device::restore(parent, &records, log.source())?, None, None),
        };
        reach(CrashPoint::StateRestored);
        let stopped =
            [Some(&device), successor.as_ref()].into_iter().flatten().flat_map(Device::stopped_queues);
        let running: BTreeSet<QueueIndex> = stopped.map(|(index, _)| index).collect();
        let indices = (0..profile.queues).map(QueueIndex);
        indices.filter(|index| !running.contains(index)).for_each(|index| logs.forget(index));
        device.resume_queues(&[])?;
        successor.as_mut().map_or(Ok(()), |successor| successor.resume_queues(&[]))?;
        reach(CrashPoint::QueuesResumed);
        let device: SharedDevice = Arc::new(Mutex::new(device));
        let file = VhostVdpaFile::new(name.clone(), Arc::clone(&device), self.spaces.clone());
        let file = Arc::new(file.with_notes(logs.notes()).restored(log, &front, shared, successor));
        let path = parts.restore_file(&self.files, identity, Arc::clone(&file) as _, &front.handles())?;
        reach(CrashPoint::FileRestored);
        let (name, number, mgmtdev) = (name.clone(), *number, mgmtdev.clone());
        let front = identity.front(&self.files);
        let entry = Entry { name, number, mgmtdev, profile, device, file, path, front, held: Some(held) };
        self.devices.lock().push(Arc::new(entry));
        Ok(())
    }
}

/// The device of a client that takes over, if there is one.
type Successor = Option<Device<AnyParent>>;

/// The devices that `records` describe, around the parent that they share: the one that clients have, and that of a successor.
fn restore_shared(
    parent: AnyParent,
    records: &SharedRecords,
    front: &SharedFront,
    source: &mut dyn StateSource<LinuxHost>,
) -> Result<(Device<AnyParent>, SharedParent, Successor), Box<dyn std::error::Error>> {
    let (handover, handles) = Handover::restore(parent, &records.handover, source)?;
    let mut devices = BTreeMap::new();
    for handle in handles {
        let id = handle.id();
        let records = records.devices.get(&id).ok_or("the journal does not say what an open device is")?;
        let device = Device::restore(Box::new(handle) as AnyParent, records, source)?;
        devices.insert(id, device);
    }
    let missing = "the journal does not say what the device is";
    let device = devices.remove(&front.handle).ok_or(missing)?;
    let successor = front.successor.as_ref().map(|client| devices.remove(&client.handle).ok_or(missing));
    Ok((device, SharedParent { handover, handle: front.handle }, successor.transpose()?))
}

/// Makes a device of the former daemon again. Its disk stays locked until the kernel has no request of that daemon in flight: no
/// request may be repeated before.
fn create_again(
    mgmt: &dyn MgmtDevice,
    name: &str,
    attrs: &Attrs,
    pool: &WorkerPool,
    kept: &Kept,
) -> Result<AnyParent, CtlError> {
    let deadline = Instant::now() + IN_FLIGHT_TIMEOUT;
    loop {
        match mgmt.create(name, attrs, pool, kept) {
            Err(error) if error.errno == Errno::BUSY && Instant::now() < deadline => {
                tracing::warn!(device = %name, "requests of the former daemon are still in flight");
            }
            result => return result,
        }
    }
}
