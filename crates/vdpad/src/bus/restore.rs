//! Devices after a crash of the daemon that had served them, and during an upgrade.
//!
//! | | after a crash | in an upgrade |
//! |---|---|---|
//! | the former daemon | is dead | serves, until the decision |
//! | [`Bus::restore`] | makes the devices, which serve at once | |
//! | [`Bus::prepare`] | | makes the devices, which do not serve yet |
//! | [`Bus::take_over`] | | has them serve. One that was changed since is made again, as after a crash |

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vdpa_backend::front::vhost::{AnyParent, SharedDevice, SharedParent, VhostVdpaFile};
use vdpa_backend::persist::{DeviceFront, DeviceLog, Held, Reopened, SharedFront, SharedRecords};
use vdpa_backend::worker::{QueueLogs, WorkerPool};
use vdpa_control::api::{AddRequest, Attrs, CtlError};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::device::Device;
use vdpa_core::device::state::{RestoreError, StateSource};
use vdpa_core::error::chain;
use vdpa_core::handover::Handover;
use vdpa_core::types::QueueIndex;
use vdpa_sys::dirty::DirtyMemory;
use vdpa_sys::guest::LinuxHost;

use super::add::{DEVICE_FILE_ATTR, HANDOVER_ATTR};
use super::{Bus, Entry};
use crate::devices::{Controls, Kept, MgmtDevice};
use crate::survival::{Identity, LegacyParts};

/// How long a restored device waits for the requests that its former daemon had handed to the kernel.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a device is read again that cannot be made while it is served.
const READ_AGAIN: usize = 3;

/// What is held of devices, by their numbers at the holder.
pub(crate) type HeldDevices = BTreeMap<u32, (Identity, Vec<Held>)>;

pub(super) type Error = Box<dyn std::error::Error + Send + Sync>;

/// A device that was made again, and has no file yet.
#[derive(Debug)]
pub(crate) struct Restored {
    held: u32,
    identity: Identity,
    device: Device<AnyParent>,
    /// What a second client opens it by.
    shared: Option<SharedParent>,
    successor: Successor,
    /// What is held beside the device.
    parts: LegacyParts,
    log: DeviceLog,
    front: DeviceFront,
    logs: QueueLogs,
    /// Memory of dirty pages that is not held yet.
    new_dirty: Option<Arc<DirtyMemory>>,
    /// The open file of the locks on its disk, if it is not held yet.
    new_lock: Option<Arc<OwnedFd>>,
    controls: Option<Arc<dyn Controls>>,
    /// Queues that run.
    running: BTreeSet<QueueIndex>,
}

/// The devices of a daemon that is to be replaced.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    devices: Vec<Restored>,
    /// Numbers of the others: they use what cannot be used before the daemon stops.
    later: BTreeSet<u32>,
}

impl Bus {
    /// Makes the devices of a predecessor again, with their clients. One that cannot be restored is given up: its client gets
    /// errors. Devices of different threads do not wait for each other's disks.
    pub(crate) fn restore(&self, devices: HeldDevices) {
        let (vduse, devices): (HeldDevices, HeldDevices) =
            devices.into_iter().partition(|(_, (identity, _))| identity.vduse().is_some());
        let mut threads: BTreeMap<Option<u32>, HeldDevices> = BTreeMap::new();
        for (held, device) in devices {
            let thread = device.1.iter().find_map(DeviceLog::logs_of).and_then(QueueLogs::ring_of);
            threads.entry(thread).or_default().insert(held, device);
        }
        let restored = Mutex::new(BTreeMap::new());
        let restore = |devices: HeldDevices| {
            for (held, (identity, items)) in devices {
                let keys: Vec<u64> = items.iter().map(|item| item.key).chain([identity.key(held)]).collect();
                let result = self.restore_device(held, identity.clone(), items);
                restored.lock().insert(held, (identity, keys, result));
            }
        };
        std::thread::scope(|scope| {
            let last = threads.pop_last();
            for (_, devices) in threads {
                scope.spawn(|| restore(devices));
            }
            last.into_iter().for_each(|(_, devices)| restore(devices));
        });
        for (identity, keys, result) in restored.into_inner().into_values() {
            let name = &identity.request.name;
            match result.and_then(|restored| self.add_restored(restored)) {
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
        self.restore_vduse(vduse);
    }

    /// Makes the devices of a daemon that still serves them, which this process is to replace. Nothing of them is changed.
    ///
    /// # Errors
    /// Why this program cannot serve a device, whose name the text begins with.
    pub(crate) fn prepare(&self, devices: HeldDevices) -> Result<Prepared, String> {
        let mut prepared = Prepared::default();
        for (held, (identity, items)) in devices {
            // Only one process can have its file open.
            if identity.vduse().is_some() {
                prepared.later.insert(held);
                continue;
            }
            let name = identity.request.name.clone();
            let mut result = self.restore_device(held, identity, items);
            // It may have changed while it was read.
            for _ in 0..READ_AGAIN {
                if result.as_ref().map_or_else(is_for_later, |_| true) {
                    break;
                }
                let survival = self.survival.as_ref().ok_or("there is no holder")?;
                let again = survival.devices().map_err(|errno| errno.to_string())?.remove(&held);
                let Some((identity, items)) = again else { break };
                result = self.restore_device(held, identity, items);
            }
            match result {
                Ok(device) => prepared.devices.push(device),
                Err(error) if is_for_later(&error) => drop(prepared.later.insert(held)),
                Err(error) => return Err(format!("{name}: {}", chain(&*error))),
            }
        }
        Ok(prepared)
    }

    /// Serves the devices of a daemon that has stopped to serve them. `held` tells what is held now, for those that have changed
    /// since they were prepared.
    ///
    /// # Errors
    /// The devices cannot be served: their threads do not run. This process is to end; its successor restores them.
    pub(crate) fn take_over(
        &self,
        prepared: Prepared,
        held: impl FnOnce() -> Result<HeldDevices, Errno>,
    ) -> Result<(), Errno> {
        let Prepared { devices, mut later } = prepared;
        let (devices, changed): (Vec<_>, Vec<_>) =
            devices.into_iter().partition(|device| device.log.is_current());
        for Restored { held, device, .. } in changed {
            later.insert(held);
            device.discard();
        }
        self.pool.take_over()?;
        for mut device in devices {
            device.forget_stopped();
            device.log.release_unnamed();
            let name = device.identity.request.name.clone();
            if let Err(error) = self.add_restored(device) {
                tracing::error!(device = %name, "the device has no file: {}", chain(&*error));
            }
        }
        if !later.is_empty() {
            tracing::info!(devices = later.len(), "restoring devices that have changed during the upgrade");
            let mut held = held()?;
            held.retain(|device, _| later.contains(device));
            self.restore(held);
        }
        Ok(())
    }

    /// Every device is restored: releases what the former daemon has left and none of them uses, in the background.
    pub(crate) fn release_unclaimed(self: &Arc<Self>) {
        let this = Arc::clone(self);
        let release = move || this.pool.release_unclaimed();
        if let Err(error) = std::thread::Builder::new().name("unpin".into()).spawn(release) {
            tracing::warn!(%error, "memory that nobody uses stays pinned");
        }
    }

    /// Makes one device. Its queues run when this returns, unless its threads are parked.
    fn restore_device(&self, held: u32, identity: Identity, mut items: Vec<Held>) -> Result<Restored, Error> {
        let survival = self.survival.as_ref().ok_or("there is no holder")?;
        let AddRequest { name, mgmtdev, attrs } = &identity.request;
        let mgmt = self.mgmt.iter().find(|mgmt| mgmt.describe().handle() == *mgmtdev);
        let mgmt = mgmt.ok_or_else(|| format!("there is no management device {mgmtdev}"))?;
        let mut parts = LegacyParts::take(&mut items);
        let Reopened { mut log, records, shared, front, logs, dirty } =
            DeviceLog::reopen(held, survival.store(), items, &survival.spaces, &self.spaces)?;
        let logs = logs.map(QueueLogs::reopen).transpose()?.ok_or("its in-flight logs are not held")?;
        // A program without dirty tracking has left none; that is held once the device is served.
        let new = dirty.is_none();
        let dirty = Arc::new(dirty.map_or_else(DirtyMemory::create, DirtyMemory::reopen)?);
        let logs = logs.with_dirty(Arc::clone(&dirty));
        let new_dirty = new.then_some(dirty);
        if shared.is_some() && self.pool.is_parked() {
            return Err(CtlError::new(Errno::AGAIN, "several clients share it: it is not prepared").into());
        }
        // Before its files are opened.
        let kept = kept_again(&identity, &mut parts, self.pool.settle(&logs));
        let held_lock = kept.lock().is_some();
        let parent = create_again(&**mgmt, name, attrs, &self.pool.with_logs(logs.clone()), &kept)?;
        reach(CrashPoint::ParentMade);
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
        let running = stopped.map(|(index, _)| index).collect();
        device.resume_queues(&[])?;
        successor.as_mut().map_or(Ok(()), |successor| successor.resume_queues(&[]))?;
        reach(CrashPoint::QueuesResumed);
        let restored = Restored {
            held,
            identity,
            device,
            shared,
            successor,
            parts,
            log,
            front,
            logs,
            new_dirty,
            new_lock: kept.lock().filter(|_| !held_lock),
            controls: kept.controls(),
            running,
        };
        if !self.pool.is_parked() {
            restored.forget_stopped();
        }
        Ok(restored)
    }

    /// Gives a device its file, and enters it.
    fn add_restored(&self, restored: Restored) -> Result<(), Error> {
        let Restored {
            held,
            identity,
            device,
            shared,
            successor,
            mut parts,
            log,
            front,
            logs,
            new_dirty,
            new_lock,
            controls,
            ..
        } = restored;
        new_dirty.map_or(Ok(()), |dirty| log.hold_dirty(&*dirty))?;
        if let (Some(survival), Some(lock)) = (&self.survival, new_lock) {
            survival.hold_lock(held, &lock)?;
        }
        let asked = asked_for(&identity, shared.is_some());
        let profile = device.profile().clone();
        let device: SharedDevice = Arc::new(Mutex::new(device));
        let name = identity.request.name.clone();
        let file = VhostVdpaFile::new(name.clone(), Arc::clone(&device), self.spaces.clone());
        let file = Arc::new(file.with_notes(logs.notes()).restored(log, &front, shared, successor));
        let path = parts.restore_file(&self.files, &identity, Arc::clone(&file) as _, &front.handles())?;
        reach(CrashPoint::FileRestored);
        let front = identity.front(&self.files);
        let Identity { number, request: AddRequest { mgmtdev, .. }, .. } = identity;
        let (held, request, vduse) = (Some(held), asked, None);
        let entry = Entry {
            name,
            number,
            mgmtdev,
            profile,
            device,
            file,
            path,
            front,
            held,
            controls,
            request,
            vduse,
        };
        let mut devices = self.devices.lock();
        devices.push(Arc::new(entry));
        devices.sort_by_key(|entry| entry.held);
        Ok(())
    }
}

/// The request that has made a device, with the attributes that every device takes.
fn asked_for(identity: &Identity, handover: bool) -> AddRequest {
    let mut request = identity.request.clone();
    let path = identity.own_path().and_then(Path::to_str).map(|path| (DEVICE_FILE_ATTR, path));
    for (name, value) in path.into_iter().chain(handover.then_some((HANDOVER_ATTR, "open"))) {
        // It is not there: it was taken out.
        let _ = request.attrs.insert(name, value);
    }
    request
}

/// The device of a client that takes over, if there is one.
type Successor = Option<Device<AnyParent>>;

/// The devices that `records` describe, around the parent that they share: the one that clients have, and that of a successor.
fn restore_shared(
    parent: AnyParent,
    records: &SharedRecords,
    front: &SharedFront,
    source: &mut dyn StateSource<LinuxHost>,
) -> Result<(Device<AnyParent>, SharedParent, Successor), Error> {
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

impl Restored {
    /// Queues that do not run when a device is restored have no log to be continued from, unless they were started in a request that
    /// the journal does not know of.
    fn forget_stopped(&self) {
        let indices = (0..self.device.profile().queues).map(QueueIndex);
        let stopped = indices.filter(|index| !self.running.contains(index));
        stopped
            .for_each(|index| self.logs.forget(index, self.front.last.as_ref().map(|(unique, _)| *unique)));
    }
}

/// Whether a device uses something that the daemon which serves it has not given away, or has just been given.
fn is_for_later(error: &Error) -> bool {
    let control = error.downcast_ref::<CtlError>().map(|error| error.errno);
    let restore = error.downcast_ref::<RestoreError>().and_then(|error| match error {
        RestoreError::Parent { errno, .. } => Some(*errno),
        // What is held was listed before the journal was read.
        RestoreError::Object { .. } => Some(Errno::AGAIN),
        _ => None,
    });
    control.or(restore) == Some(Errno::AGAIN)
}

/// What a device has kept over the end of the former daemon. `settled`: none of that one's requests is in flight.
pub(super) fn kept_again(identity: &Identity, parts: &mut LegacyParts, settled: bool) -> Kept {
    // One item is either, by the kind of the device.
    let (lock, keeper) = match identity.request.mgmtdev.as_str() {
        "blk" => (parts.keeper.take(), None),
        _ => (None, parts.keeper.take()),
    };
    Kept::restored(identity.mark, parts.contents.take())
        .with_taps(std::mem::take(&mut parts.taps))
        .with_keeper(keeper)
        .with_lock(lock)
        .with_disk(identity.disk)
        .with_settled(settled)
}

/// Makes a device of the former daemon again. Its disk stays locked until the kernel has no request of that daemon in flight: no
/// request may be repeated before.
pub(super) fn create_again(
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
