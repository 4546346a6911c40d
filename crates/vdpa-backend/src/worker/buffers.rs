//! The registered buffers of a thread's ring, which its devices share.

use std::fmt;

use parking_lot::Mutex;
use vdpa_core::types::Result;
use vdpa_sys::uring::{IoVec, MemorySet, Registrar};

/// Registered buffers of one ring: as many as the kernel allows.
const SLOTS: u16 = 16384;

/// Hands out the slots of registered buffers. Any thread may use it.
pub struct Buffers {
    registrar: Registrar,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    /// Given back.
    free: Vec<u16>,
    /// Never given out, from here on.
    fresh: u16,
    /// Reserved with the ring: nothing is until the first pin, so that idle devices cost nothing.
    reserved: bool,
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffers").field("slots", &self.slots).finish_non_exhaustive()
    }
}

impl Buffers {
    pub(super) fn new(registrar: Registrar) -> Self {
        Self { registrar, slots: Mutex::default() }
    }

    /// Pins a range of `memory`; `None` when there is no slot left. Blocks while pages are pinned, and so does the thread
    /// when it is about to submit.
    ///
    /// # Errors
    /// As [`Registrar::set_buffer`].
    pub fn pin(&self, iovec: IoVec, memory: &MemorySet) -> Result<Option<u16>> {
        let Some(slot) = self.take()? else { return Ok(None) };
        let pinned = self.registrar.set_buffer(slot, iovec, memory);
        if pinned.is_err() {
            self.slots.lock().free.push(slot);
        }
        pinned.map(|()| Some(slot))
    }

    /// Unpins what a slot has. No request that is not submitted yet may use it.
    pub fn release(&self, slot: u16) {
        match self.registrar.clear_buffer(slot) {
            Ok(()) => self.slots.lock().free.push(slot),
            // The slot is not used again: its pages stay pinned, which the log must tell.
            Err(error) => tracing::error!(slot, "a pinned buffer cannot be released: {error}"),
        }
    }

    fn take(&self) -> Result<Option<u16>> {
        let mut slots = self.slots.lock();
        if !slots.reserved {
            self.registrar.reserve_buffers(SLOTS.into())?;
            slots.reserved = true;
        }
        Ok(slots.free.pop().or_else(|| {
            let slot = slots.fresh;
            (slot < SLOTS).then(|| {
                slots.fresh += 1;
                slot
            })
        }))
    }
}
