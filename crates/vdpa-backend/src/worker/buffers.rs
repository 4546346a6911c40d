//! [`Buffers`]: the registered buffers of a thread's io_uring, which its devices share.

use std::collections::{HashMap, HashSet};
use std::fmt;

use parking_lot::Mutex;
use vdpa_core::Errno;
use vdpa_core::types::Result;
use vdpa_sys::guest::ObjectId;
use vdpa_sys::uring::{IoVec, MemorySet, Registrar};

use super::slots::{Piece, SlotTable, State};

/// Slots of one io_uring: the kernel's limit (`IORING_MAX_REG_BUFFERS`).
pub(super) const SLOTS: u16 = 16384;

/// Allocates the slots of registered buffers. Any thread may call it.
///
/// A ring that outlives this process has a [`SlotTable`]. In a ring that was taken over, memory is found that the earlier
/// process has pinned: it is [claimed](Self::claim) rather than pinned again. What nobody claims is
/// [released](Self::release_unclaimed).
pub(super) struct Buffers {
    registrar: Registrar,
    table: Option<SlotTable>,
    slots: Mutex<Slots>,
    /// Locked while a slot is changed, before `slots`. `true` while another process uses the ring: no slot is changed.
    foreign: Mutex<bool>,
}

/// A registered buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pinned {
    pub(super) slot: u16,
    /// The address that it was registered with, in this process or in an earlier one.
    pub(super) addr: usize,
}

#[derive(Debug, Default)]
struct Slots {
    /// Slots that were released.
    free: Vec<u16>,
    /// The first slot that was never allocated; all after it were not either.
    fresh: u16,
    /// Whether the slots are reserved with the io_uring. That is done at the first pin, so that devices that pin nothing cost
    /// nothing.
    reserved: bool,
    /// What the earlier process has pinned and nobody has claimed, while devices are restored: by object, and where in it the
    /// buffer begins.
    unclaimed: HashMap<ObjectId, Vec<(u64, Pinned)>>,
    /// What was claimed, while devices are restored. A device that is given up meanwhile gives it back.
    claimed: HashMap<u16, (Piece, usize)>,
    /// Slots that were claimed and that the other process has changed since, until their devices are given up.
    stale: HashSet<u16>,
    /// The other process had no slot left when its table was read.
    others_full: bool,
}

impl Slots {
    fn unclaimed(&mut self, slot: u16, piece: Piece, addr: usize) {
        self.unclaimed.entry(piece.object).or_default().push((piece.len, Pinned { slot, addr }));
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffers").field("slots", &self.slots).finish_non_exhaustive()
    }
}

impl Buffers {
    /// Buffers of a new ring, which are told to `table`.
    pub(super) fn new(registrar: Registrar, table: Option<SlotTable>) -> Self {
        Self { registrar, table, slots: Mutex::default(), foreign: Mutex::new(false) }
    }

    /// Buffers of the ring of an earlier process, which still uses it: until [`take_over`](Self::take_over) nothing is changed.
    pub(super) fn of_other(registrar: Registrar, table: SlotTable) -> Self {
        let used = table.used(SLOTS);
        let mut slots = Slots { others_full: used == SLOTS, ..Slots::default() };
        for slot in 0..used {
            match table.state(slot) {
                State::Pinned(piece, addr) => slots.unclaimed(slot, piece, addr),
                State::Empty | State::Changing => slots.others_full = false,
            }
        }
        Self { registrar, table: Some(table), slots: Mutex::new(slots), foreign: Mutex::new(true) }
    }

    /// Another process may use the ring from now on: no slot is being changed when this returns, and none is before
    /// [`go_on`](Self::go_on).
    pub(super) fn hand_over(&self) {
        *self.foreign.lock() = true;
    }

    /// No other process has used the ring since [`hand_over`](Self::hand_over).
    pub(super) fn go_on(&self) {
        *self.foreign.lock() = false;
    }

    /// The earlier process does not use the ring any more. Finds what it has changed since.
    pub(super) fn take_over(&self) {
        let mut foreign = self.foreign.lock();
        let mut slots = self.slots.lock();
        let Some(table) = self.table.as_ref().filter(|_| std::mem::take(&mut *foreign)) else { return };
        (slots.fresh, slots.reserved) = (table.used(SLOTS), table.is_reserved());
        slots.unclaimed.clear();
        let is_as_claimed =
            |slot: &u16, &mut (piece, addr): &mut _| table.state(*slot) == State::Pinned(piece, addr);
        let stale: Vec<u16> = slots
            .claimed
            .extract_if(|slot, claimed| !is_as_claimed(slot, claimed))
            .map(|(slot, _)| slot)
            .collect();
        slots.stale.extend(stale);
        for slot in 0..slots.fresh {
            match table.state(slot) {
                State::Pinned(piece, addr) if !slots.claimed.contains_key(&slot) => {
                    slots.unclaimed(slot, piece, addr);
                }
                State::Pinned(..) => {}
                State::Empty => slots.free.push(slot),
                State::Changing => match self.registrar.clear_buffer(slot) {
                    Ok(()) => {
                        table.set(slot, State::Empty);
                        slots.free.push(slot);
                    }
                    // The earlier process may have ended before it had reserved any.
                    Err(error) => {
                        tracing::warn!(slot, "a buffer of the earlier process is not released: {error}")
                    }
                },
            }
        }
    }

    /// The buffer in which an earlier process has pinned all of `piece`, from its first byte on, if nobody else has claimed it.
    pub(super) fn claim(&self, piece: Piece) -> Option<Pinned> {
        let mut slots = self.slots.lock();
        let list = slots.unclaimed.get_mut(&piece.object)?;
        // Of a mapping that was cut since, a longer part is pinned.
        let fits = list.iter().enumerate().filter(|(_, (len, _))| *len >= piece.len);
        let (place, _) = fits.min_by_key(|(_, (len, _))| *len)?;
        let (len, pinned) = list.swap_remove(place);
        slots.claimed.insert(pinned.slot, (Piece { len, ..piece }, pinned.addr));
        Some(pinned)
    }

    /// Releases what an earlier process has pinned and nobody has claimed: every device is restored. Returns how many buffers
    /// that were. Blocks while the kernel unpins their pages.
    pub(super) fn release_unclaimed(&self) -> usize {
        let unclaimed: Vec<_> = {
            let mut slots = self.slots.lock();
            (slots.claimed, slots.stale) = Default::default();
            std::mem::take(&mut slots.unclaimed).into_values().flatten().collect()
        };
        unclaimed.iter().for_each(|(_, pinned)| self.release(pinned.slot));
        unclaimed.len()
    }

    /// Pins `at`, which lies in `memory` and is `piece` of an object, and returns its slot; `None` when there is no slot left, or the ring
    /// is made of threads.
    /// Blocks while pages are pinned; the worker thread blocks meanwhile when it submits operations.
    ///
    /// # Errors
    /// As [`Registrar::set_buffer`]; `EAGAIN` while another process uses the ring and has slots left.
    pub(super) fn pin(&self, at: IoVec, piece: Piece, memory: &MemorySet) -> Result<Option<Pinned>> {
        let foreign = self.foreign.lock();
        if *foreign {
            // Without a slot left the other process has not pinned it either.
            return if self.slots.lock().others_full { Ok(None) } else { Err(Errno::AGAIN) };
        }
        if !self.registrar.is_available() {
            return Ok(None);
        }
        let Some(slot) = self.take()? else { return Ok(None) };
        tracing::debug!(slot, offset = piece.object.offset, len = piece.len, "memory is pinned");
        let set = |state| self.table.iter().for_each(|table| table.set(slot, state));
        set(State::Changing);
        let pinned = self.registrar.set_buffer(slot, at, memory);
        set(if pinned.is_ok() { State::Pinned(piece, at.addr) } else { State::Empty });
        if pinned.is_err() {
            self.slots.lock().free.push(slot);
        }
        pinned.map(|()| Some(Pinned { slot, addr: at.addr }))
    }

    /// Unpins the buffer in a slot. Operations that were submitted keep their pages; no later operation may name the slot.
    pub(super) fn release(&self, slot: u16) {
        {
            let mut slots = self.slots.lock();
            if slots.stale.remove(&slot) {
                return;
            }
            if let Some((piece, addr)) = slots.claimed.remove(&slot) {
                // The device is restored once more, or what it has claimed is released with the rest.
                slots.unclaimed(slot, piece, addr);
                return;
            }
        }
        let foreign = self.foreign.lock();
        if *foreign {
            // Whoever uses the ring finds that nobody claims it.
            return;
        }
        let set = |state| self.table.iter().for_each(|table| table.set(slot, state));
        set(State::Changing);
        match self.registrar.clear_buffer(slot) {
            Ok(()) => {
                set(State::Empty);
                self.slots.lock().free.push(slot);
            }
            // The pages stay pinned and the slot is not used again.
            Err(error) => tracing::error!(slot, "a pinned buffer cannot be released: {error}"),
        }
    }

    fn take(&self) -> Result<Option<u16>> {
        let mut slots = self.slots.lock();
        if !slots.reserved {
            match self.registrar.reserve_buffers(SLOTS.into()) {
                // By an earlier process, which has ended before it could say so.
                Err(Errno::BUSY) if self.table.is_some() => {}
                result => result?,
            }
            slots.reserved = true;
            self.table.iter().for_each(SlotTable::set_reserved);
        }
        Ok(slots.free.pop().or_else(|| {
            let slot = slots.fresh;
            (slot < SLOTS).then(|| {
                slots.fresh += 1;
                self.table.iter().for_each(|table| table.set_used(slots.fresh));
                slot
            })
        }))
    }
}
