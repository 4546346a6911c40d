//! [`Buffers`]: the registered buffers of a thread's io_uring, which its devices share.

use std::fmt;

use parking_lot::Mutex;
use vdpa_core::types::Result;
use vdpa_sys::uring::{IoVec, MemorySet, Registrar};

/// Slots of one io_uring: the kernel's limit (`IORING_MAX_REG_BUFFERS`).
const SLOTS: u16 = 16384;

/// Allocates the slots of registered buffers. Any thread may call it.
pub(super) struct Buffers {
    registrar: Registrar,
    slots: Mutex<Slots>,
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

    /// Pins a piece of `memory` and returns its slot; `None` when there is no slot left. Blocks while pages are pinned; the
    /// worker thread blocks meanwhile when it submits operations.
    ///
    /// # Errors
    /// As [`Registrar::set_buffer`].
    pub(super) fn pin(&self, piece: IoVec, memory: &MemorySet) -> Result<Option<u16>> {
        let Some(slot) = self.take()? else { return Ok(None) };
        let pinned = self.registrar.set_buffer(slot, piece, memory);
        if pinned.is_err() {
            self.slots.lock().free.push(slot);
        }
        pinned.map(|()| Some(slot))
    }

    /// Unpins the buffer in a slot. Operations that were submitted keep their pages; no later operation may name the slot.
    pub(super) fn release(&self, slot: u16) {
        match self.registrar.clear_buffer(slot) {
            Ok(()) => self.slots.lock().free.push(slot),
            // The pages stay pinned and the slot is not used again.
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
