//! Who has the device open: one client, or, with `handover open`, one and its successor.

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

use super::{AnyParent, VhostVdpaFile, process};
use crate::front::fuse::Opener;

/// The opens of one file.
#[derive(Debug, Default)]
pub(super) struct Opens {
    /// Makes the second device, where there may be one.
    handover: Option<Handover<AnyParent>>,
    present: Option<Opener>,
    successor: Option<Successor>,
    /// Opens whose device somebody else has by now.
    superseded: BTreeSet<u64>,
}

/// A client that has opened the device to take it over.
#[derive(Debug)]
struct Successor {
    opener: Opener,
    device: Device<AnyParent>,
    since: SystemTime,
    /// The process that has opened it and its name, where it is visible.
    process: Option<(i32, String)>,
}

/// What is to be seen of a client that has opened the device to take it over.
#[derive(Clone, Debug)]
pub struct PendingSuccessor {
    /// Process id and name: the owner's, and before there is one that of the process that opened the device. `None` for a
    /// process outside of the daemon's process-id namespace.
    pub process: Option<(i32, String)>,
    /// When it opened the device.
    pub since: SystemTime,
    /// How far it has come: its own status register.
    pub status: Status,
    /// Entries in its own IOTLB tables.
    pub mappings: usize,
}

impl Opens {
    pub(super) fn new(handover: Option<Handover<AnyParent>>) -> Self {
        Self { handover, ..Self::default() }
    }

    fn is_successor(&self, handle: u64) -> bool {
        self.successor.as_ref().is_some_and(|successor| successor.opener.handle == handle)
    }

    /// Lets go of the successor, whose requests fail from now on.
    fn turn_away(&mut self) {
        if let Some(mut successor) = self.successor.take() {
            successor.device.release();
            self.superseded.insert(successor.opener.handle);
        }
    }
}

impl VhostVdpaFile {
    /// Takes what is behind the device away from whoever has it open, whose requests fail from now on; the device goes
    /// when the file is closed. Where requests cannot fail, the device is [released](Self::release_now) at once. Waits
    /// for a request in progress, at most `patience`.
    ///
    /// # Errors
    /// `EBUSY` when a request did not end in time; nothing has changed then. `ETIMEDOUT` when the device was taken away
    /// and requests in its rings wait for what is behind it: it lets go of that when they are done.
    pub fn revoke(&self, patience: Duration) -> Result<()> {
        let mut opens = self.opens.try_lock_for(patience).ok_or(Errno::BUSY)?;
        let Some(device) = self.device.lock().clone() else { return Ok(()) };
        let mut device = device.try_lock_for(patience).ok_or(Errno::BUSY)?;
        opens.turn_away();
        drop(opens);
        if device.is_open() {
            let failed = device.fail();
            if matches!(failed, Ok(()) | Err(Errno::TIMEDOUT)) {
                self.deleted.store(true, Ordering::Release);
                return failed;
            }
        }
        drop(device);
        self.release_now(patience)
    }

    /// Releases the device, open or not; every further request is `ENODEV`. Waits for a request in progress, at most
    /// `patience`.
    ///
    /// # Errors
    /// `EBUSY` when a request did not end in time; nothing has changed then.
    pub fn release_now(&self, patience: Duration) -> Result<()> {
        let mut opens = self.opens.try_lock_for(patience).ok_or(Errno::BUSY)?;
        let Some(device) = self.device.lock().clone() else { return Ok(()) };
        let mut device = device.try_lock_for(patience).ok_or(Errno::BUSY)?;
        *self.device.lock() = None;
        opens.turn_away();
        device.release();
        self.forget_owner();
        Ok(())
    }

    /// The client that waits to take the device over, if there is one. Waits for a request of it in progress, at most
    /// `patience`.
    ///
    /// # Errors
    /// `EBUSY` when that request did not end in time.
    pub fn successor(&self, patience: Duration) -> Result<Option<PendingSuccessor>> {
        let opens = self.opens.try_lock_for(patience).ok_or(Errno::BUSY)?;
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
        *self.stranger.lock() = None;
    }

    /// Calls the device, unless it was taken away.
    fn present<T>(&self, call: impl FnOnce(&mut Device<AnyParent>) -> Result<T>) -> Result<T> {
        let device = self.device.lock().clone().ok_or(Errno::NODEV)?;
        let mut device = device.lock();
        // It may have been taken away while this waited for it.
        if self.device.lock().is_none() {
            return Err(Errno::NODEV);
        }
        call(&mut device)
    }

    /// Calls the device that was opened as `handle`.
    pub(super) fn with<T>(
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
            return self.present(call);
        }
        let Some(successor) = opens.successor.as_mut() else { return Err(Errno::IO) };
        let since = *self.owned_since.lock();
        let result = call(&mut successor.device);
        if successor.device.status().contains(Status::DRIVER_OK) {
            self.replace(&mut opens)?;
        } else {
            *self.owned_since.lock() = since;
        }
        result
    }

    /// The successor drives: it is the device from now on, and what the predecessor has left is undone.
    fn replace(&self, opens: &mut Opens) -> Result<()> {
        let Some(mut successor) = opens.successor.take() else { return Ok(()) };
        self.present(|device| {
            std::mem::swap(device, &mut successor.device);
            *self.owned_since.lock() = Some(SystemTime::now());
            *self.stranger.lock() = None;
            self.updates.lock().owner_changed();
            let (from, to) = (successor.device.owner(), device.owner());
            let (from, to) = (from.map(OwnerSpace::pid), to.map(OwnerSpace::pid));
            tracing::info!(device = %self.name, from, to, "taken over by a second open");
            Ok(())
        })?;
        successor.device.release();
        let before =
            opens.present.replace(successor.opener).filter(|_| !faults::is(Fault::PredecessorGoesOn));
        opens.superseded.extend(before.map(|opener| opener.handle));
        Ok(())
    }

    /// Opens the device; with `handover open` also for the successor of a client of the same user.
    pub(super) fn open_as(&self, opener: &Opener) -> Result<()> {
        let mut opens = self.opens.lock();
        let outcome = self.present(Device::open);
        match (outcome, &opens.handover, opens.present) {
            (Ok(()), ..) => opens.present = Some(*opener),
            (Err(Errno::BUSY), Some(handover), Some(present))
                if opens.successor.is_none()
                    && present.uid == opener.uid
                    && !self.deleted.load(Ordering::Acquire) =>
            {
                let parent: AnyParent = Box::new(handover.handle());
                let mut device = Device::new(parent);
                device.open()?;
                let process = process(opener.tid).and_then(|caller| Ok((caller.pid()?, caller.comm()))).ok();
                let pid = process.as_ref().map(|(pid, _)| *pid);
                tracing::info!(device = %self.name, pid, "opened a second time, by a successor");
                let since = SystemTime::now();
                opens.successor = Some(Successor { opener: *opener, device, since, process });
            }
            (Err(error), ..) => return Err(error),
        }
        Ok(())
    }

    /// The last descriptor of an open is closed.
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
        opens.present = None;
        if faults::is(Fault::CloseEndsBoth) {
            opens.turn_away();
        }
        // A device that was taken away may have been released.
        let released = self.present(|device| {
            device.release();
            self.forget_owner();
            if let Some(mut successor) = opens.successor.take() {
                std::mem::swap(device, &mut successor.device);
                opens.present = Some(successor.opener);
                *self.owned_since.lock() = device.owner().map(|_| SystemTime::now());
            }
            Ok(())
        });
        if released.is_err() || self.deleted.load(Ordering::Acquire) {
            *self.device.lock() = None;
        }
    }
}
