//! The driver side of a packed ring.

mod adopt;

pub use adopt::{PackedAdoptError, PackedDriverState, PackedInFlight};

use super::{AddError, Completion, zero};
use crate::features::Features;
use crate::ring::error::Latch;
use crate::ring::layout::{DESCRIPTOR, Descriptor, NEXT, WRITE};
use crate::ring::packed::layout::{self, FLAGS, LEN, Place};
use crate::ring::{Area, Buffer, RingError};

/// The driver side of a packed ring (virtio 1.2 section 2.8).
///
/// Used like [`SplitDriver`](super::SplitDriver): one thread uses it, nothing blocks, and the device is not trusted.
/// Which ids are in flight, with how many descriptors, is kept here and never read back from shared memory.
#[derive(Debug)]
pub struct PackedDriver<A: Area> {
    desc: A,
    /// The driver's wish to be notified.
    driver: A,
    /// The device's wish to be kicked.
    device: A,
    size: u16,
    features: Features,
    event_idx: bool,
    /// By buffer id: the request in flight.
    requests: Vec<Option<Request>>,
    /// Buffer ids not in flight, the next one last.
    free_ids: Vec<u16>,
    /// Next descriptor to fill.
    next_avail: Place,
    /// What the device sees ends here; the flags of this descriptor are held back, so that a batch appears at once.
    published: Place,
    /// Those flags, while `published` is not `next_avail`.
    held: u16,
    /// Where the device's wish to be kicked was last examined; `None` when only a kick is safe.
    kicked: Option<Place>,
    undecided: bool,
    /// Next descriptor to take as used.
    last_used: Place,
    in_flight: u16,
    broken: Latch,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    token: u64,
    descriptors: u16,
    writable: u32,
}

impl<A: Area> PackedDriver<A> {
    /// Sets up an empty ring in the descriptor, driver and device areas; to be called before the device runs.
    ///
    /// # Errors
    /// [`RingError::PackedSize`], [`RingError::NotPacked`], [`RingError::Features`] (`IN_ORDER`),
    /// [`RingError::AreaSize`], or a fault.
    pub fn new(size: u16, features: Features, desc: A, driver: A, device: A) -> Result<Self, RingError> {
        let driver = Self::empty(size, features, desc, driver, device)?;
        let sizes = layout::area_sizes(size);
        zero(&driver.desc, sizes.desc)?;
        zero(&driver.driver, sizes.avail)?;
        zero(&driver.device, sizes.used)?;
        Ok(driver)
    }

    fn empty(size: u16, features: Features, desc: A, driver: A, device: A) -> Result<Self, RingError> {
        layout::check(size, features, &desc, &driver, &device)?;
        if features.has(Features::IN_ORDER) {
            return Err(RingError::Features { features, unsupported: "IN_ORDER" });
        }
        Ok(Self {
            desc,
            driver,
            device,
            size,
            features,
            event_idx: features.has(Features::RING_EVENT_IDX),
            requests: vec![None; size.into()],
            free_ids: (0..size).rev().collect(),
            next_avail: Place::START,
            published: Place::START,
            held: 0,
            kicked: None,
            undecided: false,
            last_used: Place::START,
            in_flight: 0,
            broken: Latch::default(),
        })
    }

    /// Adds a request: the device reads `readable` and writes `writable`. It sees it after
    /// [`publish`](Self::publish). `token` comes back in the [`Completion`].
    ///
    /// # Errors
    /// [`AddError`]; nothing was added then.
    pub fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u64) -> Result<(), AddError> {
        let (descriptors, writable_len) = super::measure(readable, writable, self.size, self.free())?;
        // There are as many ids as descriptors, so an id is free if a descriptor is.
        let full = AddError::Full { needed: descriptors.into(), free: 0 };
        let id = *self.free_ids.last().ok_or(full)?;
        let mut at = self.next_avail;
        let mut held = self.held;
        let all =
            readable.iter().map(|buffer| (buffer, 0)).chain(writable.iter().map(|buffer| (buffer, WRITE)));
        for (position, (buffer, flags)) in (1..).zip(all) {
            let next = if position < descriptors { NEXT } else { 0 };
            let mut flags = flags | next;
            if at == self.published {
                held = flags | at.available();
                flags |= at.idle();
            } else {
                flags |= at.available();
            }
            let descriptor = Descriptor { addr: buffer.iova, len: buffer.len, flags, next: id };
            self.desc.write(at.offset(), &layout::encode(descriptor))?;
            at = at.forward(1, self.size);
        }
        self.free_ids.pop();
        if let Some(slot) = self.requests.get_mut(usize::from(id)) {
            *slot = Some(Request { token, descriptors, writable: writable_len });
        }
        self.held = held;
        self.next_avail = at;
        self.in_flight += 1;
        Ok(())
    }

    /// Shows the device everything added, with one store of the flags of the first descriptor; returns whether it
    /// must be kicked.
    ///
    /// # Errors
    /// A fault; the call may be repeated, and no kick gets lost.
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if self.published != self.next_avail {
            self.desc.store_u16(self.published.offset() + FLAGS, self.held)?;
            self.published = self.next_avail;
            self.undecided = true;
        }
        if !self.undecided {
            return Ok(false);
        }
        // Pairs with the device's barrier between asking for a kick and looking at the next descriptor.
        self.desc.barrier();
        let old = self.kicked.take();
        let kick = layout::wants_event(&self.device, self.event_idx, self.size, old, self.published)?;
        self.kicked = Some(self.published);
        self.undecided = false;
        Ok(kick)
    }

    /// Takes the next completion; `None` when there is none.
    ///
    /// # Errors
    /// After a fault the call may be repeated. All others are violations of the device
    /// ([`RingError::BufferId`], [`RingError::UsedLength`]) and are returned from now on.
    pub fn pop_used(&mut self) -> Result<Option<Completion>, RingError> {
        self.broken.check()?;
        let result = self.take();
        self.broken.keep(result)
    }

    /// Asks the device to notify at the next completion; returns whether one is there already, for which no
    /// notification may come.
    ///
    /// # Errors
    /// A fault, or the violation met before.
    pub fn enable_interrupts(&mut self) -> Result<bool, RingError> {
        self.broken.check()?;
        layout::ask_event(&self.driver, self.event_idx, self.last_used)?;
        // Pairs with the device's barrier between its used flags and its look at our wish.
        self.desc.barrier();
        Ok(self.used()?.is_some())
    }

    /// Tells the device that no notification is needed: advice only, notifications may still come.
    ///
    /// # Errors
    /// A fault.
    pub fn disable_interrupts(&mut self) -> Result<(), RingError> {
        layout::refuse_events(&self.driver).map_err(RingError::from)
    }

    /// Requests added and not completed.
    #[must_use]
    pub const fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Descriptors free now.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "at most `size` are in flight")]
    pub const fn free(&self) -> u16 {
        self.size.saturating_sub(self.next_avail.since(self.last_used, self.size) as u16)
    }

    /// Entries of the ring.
    #[must_use]
    pub const fn size(&self) -> u16 {
        self.size
    }

    /// Looks at the next used descriptor; returns its flags if there is one.
    fn used(&self) -> Result<Option<u16>, RingError> {
        // What was not shown to the device cannot be used: flags there are old, or a lie.
        if self.last_used == self.published {
            return Ok(None);
        }
        let flags = self.desc.load_u16(self.last_used.offset() + FLAGS)?;
        Ok(self.last_used.is_used(flags).then_some(flags))
    }

    fn take(&mut self) -> Result<Option<Completion>, RingError> {
        let Some(flags) = self.used()? else { return Ok(None) };
        let mut raw = [0; FLAGS - LEN];
        self.desc.read(self.last_used.offset() + LEN, &mut raw)?;
        let [l0, l1, l2, l3, i0, i1] = raw;
        let (len, id) = (u32::from_le_bytes([l0, l1, l2, l3]), u16::from_le_bytes([i0, i1]));
        let slot = self.requests.get_mut(usize::from(id)).ok_or(RingError::BufferId { id })?;
        let request = slot.ok_or(RingError::BufferId { id })?;
        let shown = self.published.since(self.last_used, self.size);
        if u32::from(request.descriptors) > shown {
            return Err(RingError::BufferId { id });
        }
        let len = match (len <= request.writable, flags & WRITE != 0) {
            (true, _) => len,
            (false, true) => {
                return Err(RingError::UsedLength { head: id, len, writable: request.writable });
            }
            // Without the flag the length is reserved (virtio 1.2 section 2.8.4); devices set the one and not the
            // other.
            (false, false) => 0,
        };
        *slot = None;
        self.free_ids.push(id);
        self.in_flight -= 1;
        self.last_used = self.last_used.forward(request.descriptors, self.size);
        Ok(Some(Completion { token: request.token, len }))
    }
}

const _: () = assert!(FLAGS + 2 == DESCRIPTOR);

#[cfg(test)]
mod tests;
