//! The requests of a packed ring, which the device side numbers itself.

use crate::ring::RingError;
use crate::ring::inflight::Taken;

/// Requests in flight by number.
#[derive(Debug)]
pub(super) struct Requests {
    slots: Vec<Slot>,
    /// Free numbers; the last one is used next.
    free: Vec<u16>,
    /// With a log, by name: the next one of the same request, or `u16::MAX`.
    next: Vec<u16>,
    /// With a log: names of requests pushed, to be free when the driver was shown them. The log needs their slots until then.
    pushed: Vec<u16>,
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
            next: Vec::new(),
            pushed: Vec::new(),
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

    /// Lets a request have several names, as a log needs it.
    pub(super) fn divide(&mut self) {
        self.next = vec![u16::MAX; self.slots.len()];
        self.pushed.reserve(self.slots.len());
    }

    /// Gives the request behind `name` one name more; there is one for each of its descriptors.
    pub(super) fn extend(&mut self, name: u16) -> Option<u16> {
        let more = self.free.pop()?;
        *self.next.get_mut(usize::from(name))? = more;
        Some(more)
    }

    /// All names of a request, the one it is known by first.
    pub(super) fn parts(&self, name: u16) -> impl Iterator<Item = u16> {
        std::iter::successors(Some(name), |&name| self.more(name)).take(self.slots.len())
    }

    fn more(&self, name: u16) -> Option<u16> {
        self.next.get(usize::from(name)).copied().filter(|&next| next != u16::MAX)
    }

    /// Puts a request of a log in its place.
    pub(super) fn restore(&mut self, taken: &Taken) {
        let slot = Slot { id: taken.id, descriptors: taken.count, pushed: false };
        if let Some(place) = self.slots.get_mut(usize::from(taken.name)) {
            *place = slot;
        }
        for pair in taken.parts.windows(2) {
            if let &[name, next] = pair
                && let Some(place) = self.next.get_mut(usize::from(name))
            {
                *place = next;
            }
        }
        self.in_flight += 1;
    }

    /// Makes all names free but these.
    pub(super) fn set_taken(&mut self, names: impl Iterator<Item = u16>) {
        let mut taken = vec![false; self.slots.len()];
        for name in names {
            taken.get_mut(usize::from(name)).into_iter().for_each(|taken| *taken = true);
        }
        self.free = (0u16..).zip(taken).filter(|&(_, taken)| !taken).map(|(name, _)| name).collect();
        self.free.reverse();
    }

    /// Ends a request whose names are to be free with the next [`free_pushed`](Self::free_pushed).
    #[inline]
    pub(super) fn retire(&mut self, name: u16) -> Result<(), RingError> {
        match self.slots.get_mut(usize::from(name)) {
            Some(slot) if slot.descriptors > 0 => {
                *slot = Slot::default();
                self.pushed.push(name);
                Ok(())
            }
            _ => Err(RingError::NotInFlight { head: name }),
        }
    }

    /// Makes the names of the requests pushed free.
    #[inline]
    pub(super) fn free_pushed(&mut self) {
        while let Some(name) = self.pushed.pop() {
            self.free_more(name);
            self.free.push(name);
        }
    }

    #[inline]
    fn free_more(&mut self, name: u16) {
        let mut at = name;
        while let Some(more) = self.more(at) {
            self.free.push(more);
            self.next.get_mut(usize::from(at)).into_iter().for_each(|next| *next = u16::MAX);
            at = more;
        }
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
        if !self.next.is_empty() {
            self.free_more(name);
        }
        match self.slots.get_mut(usize::from(name)) {
            Some(slot) if slot.descriptors > 0 => {
                self.free.push(name);
                Ok(std::mem::take(slot))
            }
            _ => Err(RingError::NotInFlight { head: name }),
        }
    }
}
