//! The opens of a device: by one client or, when handover is allowed, by one client and its successor.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::faults::{self, Fault};
use vdpa_core::features::Status;
use vdpa_core::handover::Handover;
use vdpa_core::types::Result;
use vdpa_sys::process::{Caller, OwnerSpace};

use super::saved::since_1970;
use super::{AnyParent, VhostVdpaFile, process};
use crate::front::fuse::Opener;
use crate::persist::{DeviceFront, SharedDevice, SharedFront, SuccessorFront};

/// The opens of one file.
#[derive(Debug, Default)]
pub(super) struct Opens {
    /// Makes the successor's device, where handover is allowed.
    shared: Option<SharedParent>,
    /// The open that the device belongs to.
    current: Option<Opener>,
    successor: Option<Successor>,
    /// Handles of opens whose device has passed to another open. Their requests fail with `EIO`.
    superseded: BTreeSet<u64>,
}

/// What the devices of a client and its successor share.
#[derive(Debug)]
pub struct SharedParent {
    /// Makes the handles.
    pub handover: Handover<AnyParent>,
    /// Number of the [`Handle`](vdpa_core::handover::Handle) behind the present device.
    pub handle: u64,
}

/// A client that has opened the device to take it over.
#[derive(Debug)]
struct Successor {
    opener: Opener,
    /// Number of the handle behind its device.
    handle: u64,
    device: Device<AnyParent>,
    since: SystemTime,
    /// Id and name of the process that has opened the device, where it is visible.
    process: Option<(i32, String)>,
}

/// State of a client that has opened the device to take it over, and has not set DRIVER_OK yet. See
/// [`VhostVdpaFile::successor`].
#[derive(Clone, Debug)]
pub struct PendingSuccessor {
    /// Id and name of the successor's process: the owner of its device or, without an owner, the process that has opened the
    /// device. `None` for a process outside of this process's process-id namespace.
    pub process: Option<(i32, String)>,
    /// When the successor opened the device.
    pub since: SystemTime,
    /// The status register of the successor's device, which shows its progress.
    pub status: Status,
    /// Number of entries in the IOTLB tables of the successor's device.
    pub mappings: usize,
}

impl Opens {
    /// The opens of an earlier process, and the device of a successor.
    pub(super) fn restored(
        front: &DeviceFront,
        shared: Option<SharedParent>,
        successor: Option<Device<AnyParent>>,
    ) -> Self {
        let saved = front.shared.as_ref();
        let client = saved.and_then(|saved| saved.successor.clone());
        let successor = successor.zip(client).map(|(device, client)| {
            let SuccessorFront { handle, opener, since_ns, process } = client;
            let since = SystemTime::UNIX_EPOCH + Duration::from_nanos(since_ns);
            Successor { opener, handle, device, since, process }
        });
        let superseded = saved.map(|saved| saved.superseded.iter().copied().collect()).unwrap_or_default();
        Self { shared, current: front.opener, successor, superseded }
    }

    /// What is saved of the opens.
    pub(super) fn save(&self, front: &mut DeviceFront) {
        front.opener = self.current;
        front.shared = self.shared.as_ref().map(|shared| SharedFront {
            handle: shared.handle,
            successor: self.successor.as_ref().map(|successor| SuccessorFront {
                handle: successor.handle,
                opener: successor.opener,
                since_ns: since_1970(successor.since),
                process: successor.process.clone(),
            }),
            superseded: self.superseded.iter().copied().collect(),
        });
    }

    /// The shared device with `present`, the current one; `None` where handover is not allowed.
    pub(super) fn shared<'a>(&'a mut self, present: &'a mut Device<AnyParent>) -> Option<SharedDevice<'a>> {
        let SharedParent { handover, handle } = self.shared.as_ref()?;
        let mut devices = vec![(*handle, present)];
        devices.extend(self.successor.as_mut().map(|successor| (successor.handle, &mut successor.device)));
        Some(SharedDevice { handover, devices })
    }

    pub(super) fn new(shared: Option<SharedParent>) -> Self {
        Self { shared, ..Self::default() }
    }

    fn is_successor(&self, handle: u64) -> bool {
        self.successor.as_ref().is_some_and(|successor| successor.opener.handle == handle)
    }

    /// Releases the successor's device, if there is one. Its requests fail with `EIO` from now on.
    fn drop_successor(&mut self) {
        if let Some(mut successor) = self.successor.take() {
            successor.device.release();
            self.superseded.insert(successor.opener.handle);
        }
    }
}

impl VhostVdpaFile {
    /// Revokes the device: when a client has it open, [`Parent::fail`](vdpa_core::parent::Parent::fail) makes requests in
    /// its rings complete with an error, and the device is released when the client closes it. A device that is not open,
    /// or whose parent cannot do that, is [released](Self::release_now) at once. A successor's requests fail. Called to
    /// delete a device; blocks for a request in progress, at most `timeout`, and as `Parent::fail` does.
    ///
    /// # Errors
    /// `EBUSY` when a request did not end in time; nothing has changed then. `ETIMEDOUT` when the device was revoked and
    /// requests in its rings are still in flight: what the parent holds is released when they are complete.
    pub fn revoke(&self, timeout: Duration) -> Result<()> {
        let mut opens = self.opens.try_lock_for(timeout).ok_or(Errno::BUSY)?;
        let Some(device) = self.device.lock().clone() else { return Ok(()) };
        let mut device = device.try_lock_for(timeout).ok_or(Errno::BUSY)?;
        opens.drop_successor();
        drop(opens);
        if device.is_open() {
            let failed = device.fail();
            if matches!(failed, Ok(()) | Err(Errno::TIMEDOUT)) {
                self.deleted.store(true, Ordering::Release);
                return failed;
            }
        }
        drop(device);
        self.release_now(timeout)
    }

    /// Releases the device, open or not: every further request fails with `ENODEV`. Blocks for a request in progress, at most
    /// `timeout`, and while the queues stop.
    ///
    /// # Errors
    /// `EBUSY` when a request did not end in time; nothing has changed then.
    pub fn release_now(&self, timeout: Duration) -> Result<()> {
        let mut opens = self.opens.try_lock_for(timeout).ok_or(Errno::BUSY)?;
        let Some(device) = self.device.lock().clone() else { return Ok(()) };
        let mut device = device.try_lock_for(timeout).ok_or(Errno::BUSY)?;
        *self.device.lock() = None;
        opens.drop_successor();
        device.release();
        device.dirty_forget();
        self.forget_owner();
        Ok(())
    }

    /// The client that has opened the device to take it over, if there is one. Blocks for a request of that client in
    /// progress, at most `timeout`.
    ///
    /// # Errors
    /// `EBUSY` when that request did not end in time.
    pub fn successor(&self, timeout: Duration) -> Result<Option<PendingSuccessor>> {
        let opens = self.opens.try_lock_for(timeout).ok_or(Errno::BUSY)?;
        Ok(opens.successor.as_ref().map(|Successor { device, since, process, .. }| {
            let owner = device.owner().map(OwnerSpace::pid);
            let owner =
                owner.map(|pid| (pid, Caller::new(pid).map(|caller| caller.comm()).unwrap_or_default()));
            PendingSuccessor {
                process: owner.or_else(|| process.clone()),
                since: *since,
                status: device.status(),
                mappings: device.mapped().entries,
            }
        }))
    }

    fn forget_owner(&self) {
        *self.owned_since.lock() = None;
        *self.last_refused.lock() = None;
    }

    /// Calls the current device; `ENODEV` when it was revoked.
    fn current<T>(&self, call: impl FnOnce(&mut Device<AnyParent>) -> Result<T>) -> Result<T> {
        let device = self.device.lock().clone().ok_or(Errno::NODEV)?;
        let mut device = device.lock();
        // It may have been revoked while this waited for the lock.
        if self.device.lock().is_none() {
            return Err(Errno::NODEV);
        }
        call(&mut device)
    }

    /// Calls the device of the open `handle`: the current or the successor's. A successor that has set DRIVER_OK in the call
    /// gets the device.
    pub(super) fn with_open<T>(
        &self,
        handle: u64,
        call: impl FnOnce(&mut Device<AnyParent>) -> Result<T>,
    ) -> Result<T> {
        let mut opens = self.opens.lock();
        if opens.superseded.contains(&handle) {
            return Err(Errno::IO);
        }
        if !opens.is_successor(handle) {
            drop(opens);
            return self.current(call);
        }
        let Some(successor) = opens.successor.as_mut() else { return Err(Errno::IO) };
        let since = *self.owned_since.lock();
        let result = call(&mut successor.device);
        if successor.device.status().contains(Status::DRIVER_OK) {
            self.promote_successor(&mut opens)?;
        } else {
            *self.owned_since.lock() = since;
        }
        result
    }

    /// Makes the successor's device the current one, because its driver has set DRIVER_OK, and releases the predecessor's.
    fn promote_successor(&self, opens: &mut Opens) -> Result<()> {
        let Some(mut successor) = opens.successor.take() else { return Ok(()) };
        self.current(|device| {
            std::mem::swap(device, &mut successor.device);
            *self.owned_since.lock() = Some(SystemTime::now());
            *self.last_refused.lock() = None;
            self.change_history(super::UpdateHistory::owner_changed);
            let (from, to) = (successor.device.owner(), device.owner());
            let (from, to) = (from.map(OwnerSpace::pid), to.map(OwnerSpace::pid));
            tracing::info!(device = %self.name, from, to, "taken over by a second open");
            Ok(())
        })?;
        successor.device.release();
        if let Some(shared) = &mut opens.shared {
            shared.handle = successor.handle;
        }
        let before =
            opens.current.replace(successor.opener).filter(|_| !faults::is(Fault::PredecessorGoesOn));
        opens.superseded.extend(before.map(|opener| opener.handle));
        Ok(())
    }

    /// Opens the device. When handover is allowed, a second open by the same user becomes the successor; otherwise it is
    /// `EBUSY`.
    pub(super) fn open_as(&self, opener: &Opener) -> Result<()> {
        let mut opens = self.opens.lock();
        let outcome = self.current(|device| device.open().map(|()| device.dirty_forget()));
        match (outcome, &opens.shared, opens.current) {
            (Ok(()), ..) => opens.current = Some(*opener),
            (Err(Errno::BUSY), Some(shared), Some(current))
                if opens.successor.is_none()
                    && current.uid == opener.uid
                    && !self.deleted.load(Ordering::Acquire) =>
            {
                let parent = shared.handover.handle();
                let handle = parent.id();
                let parent: AnyParent = Box::new(parent);
                let mut device = Device::new(parent);
                device.open()?;
                let process = process(opener.tid).and_then(|caller| Ok((caller.pid()?, caller.comm()))).ok();
                let pid = process.as_ref().map(|(pid, _)| *pid);
                tracing::info!(device = %self.name, pid, "opened a second time, by a successor");
                let since = SystemTime::now();
                opens.successor = Some(Successor { opener: *opener, handle, device, since, process });
            }
            (Err(error), ..) => return Err(error),
        }
        Ok(())
    }

    /// Handles the close of an open's last descriptor.
    pub(super) fn close(&self, handle: u64) {
        let mut opens = self.opens.lock();
        if opens.superseded.remove(&handle) {
            return;
        }
        if opens.is_successor(handle) {
            if let Some(mut successor) = opens.successor.take() {
                successor.device.release();
            }
            return;
        }
        opens.current = None;
        if faults::is(Fault::CloseEndsBoth) {
            opens.drop_successor();
        }
        // A device that was revoked may have been released.
        let released = self.current(|device| {
            device.release();
            self.forget_owner();
            if let Some(mut successor) = opens.successor.take() {
                std::mem::swap(device, &mut successor.device);
                opens.current = Some(successor.opener);
                if let Some(shared) = &mut opens.shared {
                    shared.handle = successor.handle;
                }
                *self.owned_since.lock() = device.owner().map(|_| SystemTime::now());
            } else {
                // A successor goes on with what was tracked.
                device.dirty_forget();
            }
            Ok(())
        });
        if released.is_err() || self.deleted.load(Ordering::Acquire) {
            *self.device.lock() = None;
        }
    }
}
