//! One parent behind two opens, of which one is in charge: the device attribute `handover open`.
//!
//! A client that opens a device a second time, to be the successor of the one that has it, gets a device of its own: status,
//! negotiation, owner, mappings and rings are its own, from the beginning. What both share is the [`Parent`] below, and
//! [`Handle`] is a parent that decides who reaches it:
//!
//! ```text
//!    Device (predecessor)   Device (successor)      each with everything the interface remembers
//!           |                      |
//!        Handle                 Handle              what each has asked for: features, mappings, owner
//!           '------- Parent -------'                serves the one in charge
//! ```
//!
//! - In charge is who has [claimed](Parent::claim) last, by DRIVER_OK or RESUME. Nobody else's queue runs.
//! - A claim is refused with `EBUSY` while a queue of the other runs: the predecessor has to stop first, by SUSPEND, a reset
//!   or a close. Until the successor's claim the predecessor can go on as if nothing had been.
//! - After the successor's claim the predecessor's claims fail with `EIO`, for ever: its rings are served by somebody else.
//! - While there are two, mappings that the one at rest removes stay with the parent (pinned) until somebody claims or a
//!   handle goes, unreachable, as nothing runs. A mapping that the successor has made of the same bytes at the same I/O
//!   virtual address takes the place of the predecessor's as the parent knows it already: nothing is pinned again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::errno::Errno;
use crate::faults::{self, Fault};
use crate::features::Features;
use crate::host::{Host, MemoryObject};
use crate::iotlb::{Mapping, Table};
use crate::net::MAC_BYTES;
use crate::parent::{AddressMode, Dma, Parent, Profile, QueueStats, SetMap};
use crate::types::{Asid, QueueIndex, Result};
use crate::vq::{QueueSetup, QueueState};

type MemoryOf<P> = <<P as Parent>::Host as Host>::Memory;
type SpaceOf<P> = <<P as Parent>::Host as Host>::AddressSpace;
type Tables<P> = BTreeMap<Asid, Table<MemoryOf<P>>>;

/// Gives out [`Handle`]s of one parent.
#[derive(Debug)]
pub struct Handover<P: Parent> {
    shared: Arc<Mutex<Shared<P>>>,
}

/// A parent for one of two opens: see the [module](self).
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
    wishes: BTreeMap<u64, Wish<P>>,
    in_charge: Option<u64>,
    /// Queues that run, of the handle in charge.
    running: BTreeSet<QueueIndex>,
    /// What the parent translates with.
    installed: Tables<P>,
    /// Somebody's mappings are not with the parent yet.
    deferred: bool,
    /// What the driver has written into configuration space since the device was reset.
    written: Written,
    /// What it had written before a reset by the program that is replaced. The driver stays, and takes it for granted,
    /// unless the same program lets it run again.
    left: Written,
    next: u64,
}

/// What one handle has asked for.
#[derive(Debug)]
struct Wish<P: Parent> {
    features: Option<Features>,
    tables: Tables<P>,
    owner: Option<SpaceOf<P>>,
    /// Bytes of configuration space that it has written and the parent has not seen.
    written: Written,
    superseded: bool,
}

/// Bytes of configuration space by place: as many as it has at most.
type Written = BTreeMap<u32, u8>;

/// The bytes of a write to configuration space, each with its place.
fn each_byte(offset: u32, data: &[u8]) -> impl Iterator<Item = (u32, u8)> {
    (offset..).zip(data.iter().copied())
}

impl<P: Parent> Handover<P> {
    /// Puts handles in front of `parent`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a parent that does not take whole tables or uses addresses of its owner.
    pub fn new(mut parent: P) -> Result<Self> {
        let whole_tables = matches!(parent.dma(), Dma::SetMap(_));
        if !whole_tables || parent.profile().address_mode == AddressMode::OwnerAddresses {
            return Err(Errno::OPNOTSUPP);
        }
        let shared = Shared {
            parent,
            wishes: BTreeMap::new(),
            in_charge: None,
            running: BTreeSet::new(),
            installed: BTreeMap::new(),
            deferred: false,
            written: Written::new(),
            left: Written::new(),
            next: 0,
        };
        Ok(Self { shared: Arc::new(Mutex::new(shared)) })
    }

    /// One more handle. As long as it is the only one it does what the parent does.
    #[must_use]
    pub fn handle(&self) -> Handle<P> {
        let mut shared = lock(&self.shared);
        let id = shared.next;
        shared.next = id.wrapping_add(1);
        let wish = Wish {
            features: None,
            tables: BTreeMap::new(),
            owner: None,
            written: Written::new(),
            superseded: false,
        };
        shared.wishes.insert(id, wish);
        let profile = shared.parent.profile().clone();
        Handle { id, profile, restored: false, shared: Arc::clone(&self.shared) }
    }
}

/// A panic in a parent is the device's failure, and no reason for the next one.
fn lock<P: Parent>(shared: &Mutex<Shared<P>>) -> MutexGuard<'_, Shared<P>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<P: Parent> Shared<P> {
    fn is_alone(&self) -> bool {
        self.wishes.len() < 2
    }

    /// Whether the state of the parent is what `id` has made of it.
    fn is_of(&self, id: u64) -> bool {
        self.in_charge.map_or_else(|| self.is_alone(), |other| other == id)
    }

    /// Whether what `id` asks for goes to the parent at once.
    fn passes(&self, id: u64) -> bool {
        match self.in_charge {
            None => self.is_alone() && !self.deferred,
            Some(other) if other != id => false,
            Some(_) => self.is_alone() && !self.deferred || !self.running.is_empty(),
        }
    }

    /// Gives the parent a table, with the memory that it has already where that is the same.
    fn install(&mut self, asid: Asid, table: &Table<MemoryOf<P>>) -> Result<()> {
        let Dma::SetMap(map) = self.parent.dma() else { return Err(Errno::OPNOTSUPP) };
        let before = self.installed.get(&asid);
        let known = |entry: &Mapping<MemoryOf<P>>| {
            let old = before?.get(entry.range.first()).filter(|old| is_same(old, entry))?;
            Some(old.memory.clone())
        };
        let table: Table<MemoryOf<P>> = table
            .iter()
            .map(|entry| {
                known(entry).map_or_else(|| entry.clone(), |memory| Mapping { memory, ..entry.clone() })
            })
            .collect();
        map.set_map(asid, &table)?;
        self.installed.insert(asid, table);
        Ok(())
    }

    /// Gives the parent all tables of `id`, and nothing else.
    fn install_all(&mut self, id: u64) -> Result<()> {
        let tables = self.wishes.get(&id).map(|wish| wish.tables.clone()).unwrap_or_default();
        let asids: BTreeSet<Asid> = self.installed.keys().chain(tables.keys()).copied().collect();
        for asid in asids {
            self.install(asid, tables.get(&asid).unwrap_or(&Table::default()))?;
        }
        self.deferred = false;
        Ok(())
    }

    /// Puts what `id` has asked for in the place of whatever is there. On an error the parent has what it had.
    fn take_over(&mut self, id: u64) -> Result<()> {
        let Some(wish) = self.wishes.get_mut(&id) else { return Err(Errno::IO) };
        let (features, owner) = (wish.features, wish.owner.clone());
        let own = wish.written.clone();
        self.parent.reset();
        let before = self.installed.clone();
        let taken = self
            .parent
            .bind_owner(owner.as_ref())
            .and_then(|()| features.map_or(Ok(()), |word| self.parent.negotiate(word).map(drop)))
            .and_then(|()| self.install_all(id));
        match taken {
            Ok(()) => {
                let before = std::mem::take(&mut self.written);
                self.written = std::mem::take(&mut self.left).into_iter().chain(before).chain(own).collect();
            }
            Err(_) => self.put_back(before),
        }
        for (&offset, &byte) in &self.written {
            self.parent.write_config(offset, &[byte]);
        }
        taken
    }

    /// The program in charge has reset the device, for its driver or because it is being replaced.
    fn reset(&mut self) {
        self.parent.reset();
        let written = std::mem::take(&mut self.written);
        if self.is_alone() {
            self.left.clear();
        } else if !written.is_empty() {
            self.left = written;
        }
    }

    fn put_back(&mut self, tables: Tables<P>) {
        let asids: BTreeSet<Asid> = self.installed.keys().chain(tables.keys()).copied().collect();
        for asid in asids {
            // The parent refused another table: with this one it has nothing to lose.
            let _ = self.install(asid, tables.get(&asid).unwrap_or(&Table::default()));
        }
        self.deferred = true;
        if let Some(wish) = self.in_charge.and_then(|id| self.wishes.get(&id)) {
            let _ = self.parent.bind_owner(wish.owner.as_ref());
            let _ = wish.features.map(|word| self.parent.negotiate(word));
        }
    }

    fn claim(&mut self, id: u64) -> Result<()> {
        if self.wishes.get(&id).is_none_or(|wish| wish.superseded) {
            return Err(Errno::IO);
        }
        if self.in_charge == Some(id) {
            self.left.clear();
            return if self.deferred { self.install_all(id) } else { Ok(()) };
        }
        if !self.running.is_empty() && !faults::is(Fault::ClaimAnyTime) {
            return Err(Errno::BUSY);
        }
        if self.deferred || !self.is_alone() {
            self.take_over(id)?;
        }
        self.in_charge = Some(id);
        self.wishes
            .iter_mut()
            .filter(|(other, _)| **other != id)
            .for_each(|(_, wish)| wish.superseded = true);
        Ok(())
    }

    /// A handle has gone.
    fn forget(&mut self, id: u64) {
        self.wishes.remove(&id);
        if faults::is(Fault::GivingUpCounts) {
            self.wishes.values_mut().for_each(|wish| wish.superseded = true);
        }
        if self.in_charge == Some(id) {
            // What it had mapped is kept for the other one, which may want the same.
            self.in_charge = None;
            self.running.clear();
            self.deferred = true;
            return;
        }
        if let (true, Some(last)) = (self.is_alone() && self.deferred, self.wishes.keys().next().copied()) {
            // On an error the next claim tries again, and reports it.
            let _ = self.install_all(last);
        }
    }
}

/// Whether two entries give the device the same access to the same bytes.
fn is_same<M: MemoryObject>(old: &Mapping<M>, new: &Mapping<M>) -> bool {
    let last = new.range.size().saturating_sub(1);
    old.range == new.range
        && old.perm == new.perm
        && !old.stale
        && old.memory.is_shared()
        && old.memory.pin_pages() == new.memory.pin_pages()
        && new.memory.same_object(0, &old.memory, 0)
        && new.memory.same_object(last, &old.memory, last)
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
        self.shared().forget(self.id);
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
        if shared.in_charge.is_none_or(|id| id == self.id) {
            shared.parent.write_config(offset, data);
            shared.written.extend(each_byte(offset, data));
        } else if let Some(wish) = shared.wishes.get_mut(&self.id) {
            wish.written.extend(each_byte(offset, data));
        }
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        let mut shared = self.shared();
        let answer = shared.parent.negotiate(features)?;
        let other = shared.in_charge.filter(|id| *id != self.id);
        if let Some(word) = other.and_then(|id| shared.wishes.get(&id)?.features) {
            // It was a question only.
            let _ = shared.parent.negotiate(word);
        }
        if let Some(wish) = shared.wishes.get_mut(&self.id) {
            wish.features = Some(features);
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
        if shared.in_charge != Some(self.id) {
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
        if shared.in_charge != Some(self.id) {
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
        if shared.in_charge.is_none_or(|id| id == self.id) {
            shared.reset();
        } else if let Some(wish) = shared.wishes.get_mut(&self.id) {
            wish.written.clear();
        }
    }

    fn claim(&mut self) -> Result<()> {
        self.shared().claim(self.id)
    }

    fn fail(&mut self) -> Result<()> {
        self.shared().parent.fail()
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

    fn is_restored(&self) -> bool {
        self.restored
    }

    fn bind_owner(&mut self, owner: Option<&SpaceOf<P>>) -> Result<()> {
        let mut shared = self.shared();
        if shared.is_alone() || shared.in_charge == Some(self.id) {
            shared.parent.bind_owner(owner)?;
        }
        if let Some(wish) = shared.wishes.get_mut(&self.id) {
            wish.owner = owner.cloned();
        }
        if owner.is_none() && shared.is_alone() && shared.deferred {
            // Closed without having run: nothing is kept for anybody.
            let _ = shared.install_all(self.id);
        }
        Ok(())
    }
}

impl<P: Parent> SetMap<P::Host> for Handle<P> {
    fn set_map(&mut self, asid: Asid, table: &Table<MemoryOf<P>>) -> Result<()> {
        let mut shared = self.shared();
        let passes = shared.passes(self.id);
        if passes {
            shared.install(asid, table)?;
        }
        let shared = &mut *shared;
        if let Some(wish) = shared.wishes.get_mut(&self.id) {
            shared.deferred |= !passes && !wish.superseded;
            wish.tables.insert(asid, table.clone());
        }
        Ok(())
    }
}

mod state;
#[cfg(test)]
mod tests;
