//! The requests of a packed ring, which the device side numbers itself.

use crate::ring::RingError;

/// Requests in flight by number.
#[derive(Debug)]
pub(super) struct Requests {
    slots: Vec<Slot>,
    /// Free numbers; the last one is used next.
    free: Vec<u16>,
    pub(super) in_flight: u16,
    /// Requests pushed and not published.
    pub(super) unpublished: u16,
    /// Those of them for which a used descriptor was written.
    pub(super) written: u16,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slot {
    pub(super) id: u16,
    /// Descriptors of the ring; 0 for a free slot.
    pub(super) descriptors: u16,
    /// Pushed, and waiting for earlier requests (`IN_ORDER`).
    pushed: bool,
}

impl Requests {
    pub(super) fn new(size: u16) -> Self {
        Self {
            slots: vec![Slot::default(); size.into()],
            free: (0..size).rev().collect(),
            in_flight: 0,
            unpublished: 0,
            written: 0,
        }
    }

    #[inline]
    pub(super) fn take(&mut self, id: u16, descriptors: u16) -> Option<u16> {
        let name = self.free.pop()?;
        *self.slots.get_mut(usize::from(name))? = Slot { id, descriptors, pushed: false };
        self.in_flight += 1;
        Some(name)
    }

    /// A request in flight.
    #[inline]
    pub(super) fn get(&self, name: u16) -> Result<Slot, RingError> {
        let slot = self.slot(name);
        if slot.descriptors == 0 || slot.pushed {
            Err(RingError::NotInFlight { head: name })
        } else {
            Ok(slot)
        }
    }

    #[inline]
    pub(super) fn slot(&self, name: u16) -> Slot {
        self.slots.get(usize::from(name)).copied().unwrap_or_default()
    }

    pub(super) fn mark_pushed(&mut self, name: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(name)) {
            slot.pushed = true;
        }
    }

    /// Descriptors of all requests.
    pub(super) fn descriptors(&self) -> u32 {
        self.slots.iter().map(|slot| u32::from(slot.descriptors)).sum()
    }

    /// Frees a number.
    #[inline]
    pub(super) fn release(&mut self, name: u16) -> Result<Slot, RingError> {
        match self.slots.get_mut(usize::from(name)) {
            Some(slot) if slot.descriptors > 0 => {
                self.free.push(name);
                Ok(std::mem::take(slot))
            }
            _ => Err(RingError::NotInFlight { head: name }),
        }
    }
}
