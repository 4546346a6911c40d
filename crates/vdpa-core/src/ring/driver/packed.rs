//! The driver side of packed rings.

mod adopt;

pub use adopt::{PackedAdoptError, PackedDriverState, PackedInFlight};

use super::kick::Kick;
use super::{AddError, Completion, with_flags, zero};
use crate::features::Features;
use crate::ring::error::Latch;
use crate::ring::layout::{DESCRIPTOR, Descriptor, WRITE};
use crate::ring::packed::layout::{self, FLAGS, LEN, Place};
use crate::ring::{Area, Buffer, RingError};

/// The driver side of a packed ring (virtio 1.2 section 2.8).
///
/// Used like [`SplitDriver`](super::SplitDriver): by one thread at a time, no method blocks, and the device is not trusted.
/// The buffer ids in flight and their descriptor counts are recorded here and never read back from shared memory.
#[derive(Debug)]
pub struct PackedDriver<A: Area> {
    desc: A,
    /// Driver event suppression structure: whether the device has to notify.
    driver: A,
    /// Device event suppression structure: whether the driver has to kick.
    device: A,
    size: u16,
    features: Features,
    event_idx: bool,
    /// By buffer id: the request in flight.
    requests: Vec<Option<Request>>,
    /// Free buffer ids; the last one is used next.
    free_ids: Vec<u16>,
    /// Next descriptor to fill.
    next_avail: Place,
    /// First descriptor that is not available to the device. Its flags are stored last, so that a batch becomes available at
    /// once.
    published: Place,
    /// The flags to store there, while `published` is not `next_avail`.
    held_flags: u16,
    kick: Kick<Place>,
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
    /// Initialises an empty ring in the descriptor, driver and device areas. Call it before the device uses the ring.
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
            held_flags: 0,
            kick: Kick::default(),
            last_used: Place::START,
            in_flight: 0,
            broken: Latch::default(),
        })
    }

    /// Adds a request: the device reads `readable` and writes `writable`. [`publish`](Self::publish) makes it available to
    /// the device. The [`Completion`] carries `token`.
    ///
    /// # Errors
    /// [`AddError`]; nothing was added then.
    pub fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u64) -> Result<(), AddError> {
        let (descriptors, writable_len) = super::measure(readable, writable, self.size, self.free())?;
        // There are as many ids as descriptors, so whenever a descriptor is free, an id is free too.
        let full = AddError::Full { needed: descriptors.into(), free: 0 };
        let id = *self.free_ids.last().ok_or(full)?;
        let mut at = self.next_avail;
        let mut held_flags = self.held_flags;
        for (buffer, mut flags) in with_flags(readable, writable) {
            if at == self.published {
                held_flags = flags | at.available();
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
        self.held_flags = held_flags;
        self.next_avail = at;
        self.in_flight += 1;
        Ok(())
    }

    /// Makes all added requests available, with one store of the flags of the first descriptor; returns whether the device
    /// must be kicked.
    ///
    /// # Errors
    /// [`RingError::Fault`]; the call may be repeated, and no kick is lost.
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if self.published != self.next_avail {
            self.desc.store_u16(self.published.offset() + FLAGS, self.held_flags)?;
            self.published = self.next_avail;
            self.kick.set_pending();
        }
        self.kick.decide(self.published, |old| {
            // Pairs with the device's barrier between its request for a kick and its load of the next descriptor.
            self.desc.barrier();
            layout::wants_event(&self.device, self.event_idx, self.size, old, self.published)
        })
    }

    /// Pops the next completion; `None` when there is none.
    ///
    /// # Errors
    /// After a fault the call may be repeated. All other errors are protocol violations of the device
    /// ([`RingError::BufferId`], [`RingError::UsedLength`]) and are returned by every later call.
    pub fn pop_used(&mut self) -> Result<Option<Completion>, RingError> {
        self.broken.check()?;
        let result = self.take();
        self.broken.record(result)
    }

    /// Asks the device to notify at the next completion. Returns whether a completion is available already, for which the
    /// device may not notify.
    ///
    /// # Errors
    /// [`RingError::Fault`], or the violation that was found before.
    pub fn enable_interrupts(&mut self) -> Result<bool, RingError> {
        self.broken.check()?;
        layout::ask_event(&self.driver, self.event_idx, self.last_used)?;
        // Pairs with the device's barrier between its store of used flags and its load of this structure.
        self.desc.barrier();
        Ok(self.used()?.is_some())
    }

    /// Tells the device that no notification is needed. This is only a hint: notifications may still come.
    ///
    /// # Errors
    /// [`RingError::Fault`].
    pub fn disable_interrupts(&mut self) -> Result<(), RingError> {
        layout::refuse_events(&self.driver).map_err(RingError::from)
    }

    /// Number of requests added and not completed.
    #[must_use]
    pub const fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Number of free descriptors.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "at most `size` are in flight")]
    pub const fn free(&self) -> u16 {
        self.size.saturating_sub(self.next_avail.since(self.last_used, self.size) as u16)
    }

    /// Number of entries of the ring.
    #[must_use]
    pub const fn size(&self) -> u16 {
        self.size
    }

    /// Loads the flags of the next descriptor; returns them if the device has used it.
    fn used(&self) -> Result<Option<u16>, RingError> {
        // A descriptor that is not available cannot be used: its flags are from the last lap, or the device forged them.
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
        let available = self.published.since(self.last_used, self.size);
        if u32::from(request.descriptors) > available {
            return Err(RingError::BufferId { id });
        }
        let len = match (len <= request.writable, flags & WRITE != 0) {
            (true, _) => len,
            (false, true) => {
                return Err(RingError::UsedLength { head: id, len, writable: request.writable });
            }
            // Without the WRITE flag the length is reserved (virtio 1.2 section 2.8.4). Some devices set the length without
            // the flag.
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
