//! Two opens of one parent, of which one is active: the device attribute `handover open`.
//!
//! A successor opens a device that another client still has open. It gets a [`Device`](crate::device::Device) of its own, in
//! the state after an open: status, negotiation, owner, mappings and rings are separate. Both devices share one [`Parent`].
//! Each of them uses it through a [`Handle`], which is a parent itself and passes calls on only from the active side:
//!
//! ```text
//!    Device (predecessor)   Device (successor)      each with everything the interface remembers
//!           |                      |
//!        Handle                 Handle              what each has requested: features, mappings, owner
//!           '------- Parent -------'                serves the active handle
//! ```
//!
//! - The active handle is the one that [claimed](Parent::claim) the parent last, by DRIVER_OK or RESUME. Only its queues run.
//! - A claim fails with `EBUSY` while a queue of the other handle runs: the predecessor has to stop its queues first, by
//!   SUSPEND, a reset or a close. Until the successor claims, the predecessor may continue.
//! - After the successor's claim every claim of the predecessor fails with `EIO`, because the successor's rings are served.
//! - While there are two handles, the parent keeps (pinned) the mappings that a handle removes while no queue runs, until
//!   the next claim or until a handle is dropped. They are unreachable, since no queue runs. Where the successor maps the
//!   same bytes at the same I/O virtual address, the parent keeps the memory it has: nothing is pinned twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::dirty::DirtyTracking;
use crate::errno::Errno;
use crate::faults::{self, Fault};
use crate::features::Features;
use crate::host::Host;
use crate::iotlb::Table;
use crate::net::MAC_BYTES;
use crate::parent::{AddressMode, Dma, Parent, Profile, QueueStats, SetMap};
use crate::types::{Asid, QueueIndex, Result};
use crate::vq::{QueueSetup, QueueState};

type MemoryOf<P> = <<P as Parent>::Host as Host>::Memory;
type EventOf<P> = <<P as Parent>::Host as Host>::Event;
type SpaceOf<P> = <<P as Parent>::Host as Host>::AddressSpace;
type Tables<P> = BTreeMap<Asid, Table<MemoryOf<P>>>;

/// Creates the [`Handle`]s of one parent.
#[derive(Debug)]
pub struct Handover<P: Parent> {
    shared: Arc<Mutex<Shared<P>>>,
}

/// The parent of one open device file, in front of the shared parent: see the [module](self). Dropped with its device.
#[derive(Debug)]
pub struct Handle<P: Parent> {
    id: u64,
    profile: Profile,
    /// Made by [`Handover::restore`].
    restored: bool,
    shared: Arc<Mutex<Shared<P>>>,
}

#[derive(Debug)]
struct Shared<P: Parent> {
    parent: P,
    pending: BTreeMap<u64, Pending<P>>,
    active: Option<u64>,
    /// Running queues, all of the active handle.
    running: BTreeSet<QueueIndex>,
    /// The tables that the parent has.
    installed: Tables<P>,
    /// What they were made from: the tables of a handle.
    requested: Tables<P>,
    /// A handle has changed mappings that the parent does not have yet.
    deferred: bool,
    /// Bytes that the driver has written to configuration space since the last reset.
    config: ConfigWrites,
    /// Bytes that the driver had written before the predecessor reset the device. The successor continues the same driver,
    /// which relies on them. Cleared when the predecessor itself starts the device again.
    previous_config: ConfigWrites,
    next_id: u64,
    /// Counts the changes of tables, and of handles.
    changes: u64,
}

/// What one handle has requested; the parent gets it when the handle becomes active.
#[derive(Debug)]
struct Pending<P: Parent> {
    features: Option<Features>,
    tables: Tables<P>,
    owner: Option<SpaceOf<P>>,
    config_call: Option<EventOf<P>>,
    /// Bytes written to configuration space that the parent has not received.
    config: ConfigWrites,
    /// The other handle has claimed the parent since.
    superseded: bool,
}

/// Written bytes of configuration space by offset; at most as many as the space has.
type ConfigWrites = BTreeMap<u32, u8>;

/// The bytes of a write to configuration space, each with its offset.
fn each_byte(offset: u32, data: &[u8]) -> impl Iterator<Item = (u32, u8)> {
    (offset..).zip(data.iter().copied())
}

impl<P: Parent> Handover<P> {
    /// Takes `parent`, which is then reached through handles only.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a parent that does not take whole tables ([`Dma::SetMap`]), that uses its owner's addresses
    /// ([`AddressMode::OwnerAddresses`]), or that has a [device behind it](Parent::upstream), which has one set of queues.
    pub fn new(mut parent: P) -> Result<Self> {
        let whole_tables = matches!(parent.dma(), Dma::SetMap(_));
        let owners = parent.profile().address_mode == AddressMode::OwnerAddresses;
        if !whole_tables || owners || parent.upstream().is_some() {
            return Err(Errno::OPNOTSUPP);
        }
        let shared = Shared {
            parent,
            pending: BTreeMap::new(),
            active: None,
            running: BTreeSet::new(),
            installed: BTreeMap::new(),
            requested: BTreeMap::new(),
            deferred: false,
            config: ConfigWrites::new(),
            previous_config: ConfigWrites::new(),
            next_id: 0,
            changes: 0,
        };
        Ok(Self { shared: Arc::new(Mutex::new(shared)) })
    }

    /// Creates a handle. While it is the only one, it behaves like the parent. May block on a call of another handle.
    #[must_use]
    pub fn handle(&self) -> Handle<P> {
        let mut shared = lock(&self.shared);
        let id = shared.next_id;
        shared.next_id = id.wrapping_add(1);
        shared.changes += 1;
        let pending = Pending {
            features: None,
            tables: BTreeMap::new(),
            owner: None,
            config_call: None,
            config: ConfigWrites::new(),
            superseded: false,
        };
        shared.pending.insert(id, pending);
        let profile = shared.parent.profile().clone();
        Handle { id, profile, restored: false, shared: Arc::clone(&self.shared) }
    }
}

/// Locks the shared state. A panic in the parent fails its device only, so a poisoned lock is used as it is.
fn lock<P: Parent>(shared: &Mutex<Shared<P>>) -> MutexGuard<'_, Shared<P>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<P: Parent> Shared<P> {
    fn has_one_handle(&self) -> bool {
        self.pending.len() < 2
    }

    /// Whether the state of the parent is what `id` has made of it.
    fn is_of(&self, id: u64) -> bool {
        self.active.map_or_else(|| self.has_one_handle(), |other| other == id)
    }

    /// Whether a new table of `id` is installed in the parent at once.
    fn installs_at_once(&self, id: u64) -> bool {
        match self.active {
            None => self.has_one_handle() && !self.deferred,
            Some(other) if other != id => false,
            Some(_) => self.has_one_handle() && !self.deferred || !self.running.is_empty(),
        }
    }

    /// Makes the tables of `id` the only ones of the parent.
    fn install_all(&mut self, id: u64) -> Result<()> {
        let tables = self.pending.get(&id).map(|pending| pending.tables.clone()).unwrap_or_default();
        let asids: BTreeSet<Asid> = self.installed.keys().chain(tables.keys()).copied().collect();
        for asid in asids {
            self.install(asid, tables.get(&asid).unwrap_or(&Table::default()))?;
        }
        self.deferred = false;
        Ok(())
    }

    /// Resets the parent and applies the requested state of `id`. On an error the previous state is restored.
    fn take_over(&mut self, id: u64) -> Result<()> {
        let Some(pending) = self.pending.get_mut(&id) else { return Err(Errno::IO) };
        let (features, owner) = (pending.features, pending.owner.clone());
        let (own, config_call) = (pending.config.clone(), pending.config_call.clone());
        self.parent.reset();
        let before = self.installed.clone();
        let taken = self
            .parent
            .bind_owner(owner.as_ref())
            .and_then(|()| features.map_or(Ok(()), |word| self.parent.negotiate(word).map(drop)))
            .and_then(|()| self.install_all(id));
        match taken {
            Ok(()) => {
                let before = std::mem::take(&mut self.config);
                self.config =
                    std::mem::take(&mut self.previous_config).into_iter().chain(before).chain(own).collect();
                self.parent.set_config_call(config_call.as_ref());
            }
            Err(_) => self.restore(before),
        }
        for (&offset, &byte) in &self.config {
            self.parent.write_config(offset, &[byte]);
        }
        taken
    }

    /// Handles a reset by the active handle: of its driver, or because its process is being replaced.
    fn reset(&mut self) {
        self.parent.reset();
        let written = std::mem::take(&mut self.config);
        if self.has_one_handle() {
            self.previous_config.clear();
        } else if !written.is_empty() {
            self.previous_config = written;
        }
    }

    fn restore(&mut self, tables: Tables<P>) {
        let asids: BTreeSet<Asid> = self.installed.keys().chain(tables.keys()).copied().collect();
        for asid in asids {
            // The parent had this table before. If it refuses it now, no further fallback exists.
            let _ = self.install(asid, tables.get(&asid).unwrap_or(&Table::default()));
        }
        self.deferred = true;
        if let Some(pending) = self.active.and_then(|id| self.pending.get(&id)) {
            let _ = self.parent.bind_owner(pending.owner.as_ref());
            let _ = pending.features.map(|word| self.parent.negotiate(word));
        }
    }

    fn claim(&mut self, id: u64) -> Result<()> {
        if self.pending.get(&id).is_none_or(|pending| pending.superseded) {
            return Err(Errno::IO);
        }
        if self.active == Some(id) {
            self.previous_config.clear();
            return if self.deferred { self.install_all(id) } else { Ok(()) };
        }
        if !self.running.is_empty() && !faults::is(Fault::ClaimAnyTime) {
            return Err(Errno::BUSY);
        }
        if self.deferred || !self.has_one_handle() {
            self.take_over(id)?;
        }
        self.active = Some(id);
        self.pending
            .iter_mut()
            .filter(|(other, _)| **other != id)
            .for_each(|(_, pending)| pending.superseded = true);
        Ok(())
    }

    /// Removes a handle that was dropped.
    fn remove(&mut self, id: u64) {
        self.pending.remove(&id);
        self.changes += 1;
        if faults::is(Fault::GivingUpCounts) {
            self.pending.values_mut().for_each(|pending| pending.superseded = true);
        }
        if self.active == Some(id) {
            // Its mappings are kept, because the other handle may have mapped the same memory.
            self.active = None;
            self.running.clear();
            self.deferred = true;
            return;
        }
        if let (true, Some(last)) =
            (self.has_one_handle() && self.deferred, self.pending.keys().next().copied())
        {
            // After an error the next claim tries again and reports it.
            let _ = self.install_all(last);
        }
    }
}

impl<P: Parent> Handle<P> {
    /// Its number among the handles of its [`Handover`]; the same after [`Handover::restore`].
    pub const fn id(&self) -> u64 {
        self.id
    }

    fn shared(&self) -> MutexGuard<'_, Shared<P>> {
        lock(&self.shared)
    }
}

impl<P: Parent> Drop for Handle<P> {
    fn drop(&mut self) {
        self.shared().remove(self.id);
    }
}

impl<P: Parent> Parent for Handle<P> {
    type Host = P::Host;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.shared().parent.read_config(offset, out);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let mut shared = self.shared();
        if shared.active.is_none_or(|id| id == self.id) {
            shared.parent.write_config(offset, data);
            shared.config.extend(each_byte(offset, data));
        } else if let Some(pending) = shared.pending.get_mut(&self.id) {
            pending.config.extend(each_byte(offset, data));
        }
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        let mut shared = self.shared();
        let answer = shared.parent.negotiate(features)?;
        let other = shared.active.filter(|id| *id != self.id);
        if let Some(word) = other.and_then(|id| shared.pending.get(&id)?.features) {
            // Only the answer was needed: the parent keeps the features of the active handle.
            let _ = shared.parent.negotiate(word);
        }
        if let Some(pending) = shared.pending.get_mut(&self.id) {
            pending.features = Some(features);
        }
        Ok(answer)
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: &QueueSetup<Self::Host>,
        state: QueueState,
    ) -> Result<()> {
        let mut shared = self.shared();
        if shared.active != Some(self.id) {
            return Err(Errno::IO);
        }
        if shared.deferred && shared.running.is_empty() {
            shared.install_all(self.id)?;
        }
        shared.parent.start_queue(index, setup, state)?;
        shared.running.insert(index);
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        let mut shared = self.shared();
        if shared.active != Some(self.id) {
            return Ok(None);
        }
        let state = shared.parent.stop_queue(index)?;
        shared.running.remove(&index);
        Ok(state)
    }

    fn dma(&mut self) -> Dma<'_, Self::Host> {
        Dma::SetMap(self)
    }

    fn reset(&mut self) {
        let mut shared = self.shared();
        if shared.active.is_none_or(|id| id == self.id) {
            shared.reset();
        } else if let Some(pending) = shared.pending.get_mut(&self.id) {
            pending.config.clear();
        }
    }

    fn claim(&mut self) -> Result<()> {
        self.shared().claim(self.id)
    }

    fn fail(&mut self) -> Result<()> {
        self.shared().parent.fail()
    }

    fn needs_reset(&self) -> bool {
        let shared = self.shared();
        shared.is_of(self.id) && shared.parent.needs_reset()
    }

    fn set_config_call(&mut self, event: Option<&EventOf<P>>) {
        let mut shared = self.shared();
        if shared.is_of(self.id) {
            shared.parent.set_config_call(event);
        }
        if let Some(pending) = shared.pending.get_mut(&self.id) {
            pending.config_call = event.cloned();
        }
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        self.shared().parent.queue_stats(index)
    }

    fn vendor_stats(&self, index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        self.shared().parent.vendor_stats(index)
    }

    fn set_mac(&mut self, mac: [u8; MAC_BYTES]) -> Result<()> {
        self.shared().parent.set_mac(mac)
    }

    fn set_link(&mut self, up: bool) -> Result<()> {
        self.shared().parent.set_link(up)
    }

    fn save_state(&self) -> Vec<u8> {
        let shared = self.shared();
        if shared.is_of(self.id) { shared.parent.save_state() } else { Vec::new() }
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<()> {
        let mut shared = self.shared();
        if shared.is_of(self.id) {
            shared.parent.restore_state(state)
        } else if state.is_empty() {
            Ok(())
        } else {
            Err(Errno::INVAL)
        }
    }

    fn moved(&mut self) {
        let mut shared = self.shared();
        if shared.is_of(self.id) {
            shared.parent.moved();
        }
    }

    fn is_restored(&self) -> bool {
        self.restored
    }

    fn bind_owner(&mut self, owner: Option<&SpaceOf<P>>) -> Result<()> {
        let mut shared = self.shared();
        if shared.has_one_handle() || shared.active == Some(self.id) {
            shared.parent.bind_owner(owner)?;
        }
        if let Some(pending) = shared.pending.get_mut(&self.id) {
            pending.owner = owner.cloned();
        }
        if owner.is_none() && shared.has_one_handle() && shared.deferred {
            // The last open was closed without a claim: the tables that were kept for it are removed.
            let _ = shared.install_all(self.id);
        }
        Ok(())
    }
}

impl<P: Parent> SetMap<P::Host> for Handle<P> {
    fn set_map(&mut self, asid: Asid, table: &Table<MemoryOf<P>>) -> Result<()> {
        let mut shared = self.shared();
        let at_once = shared.installs_at_once(self.id);
        if at_once {
            shared.install(asid, table)?;
        }
        let shared = &mut *shared;
        if let Some(pending) = shared.pending.get_mut(&self.id) {
            shared.deferred |= !at_once && !pending.superseded;
            pending.tables.insert(asid, table.clone());
            shared.changes += 1;
        }
        Ok(())
    }

    fn dirty_tracking(&self) -> Option<Arc<dyn DirtyTracking>> {
        match self.shared().parent.dma() {
            Dma::SetMap(map) => map.dirty_tracking(),
            _ => None,
        }
    }
}

mod install;
mod state;
#[cfg(test)]
mod tests;
