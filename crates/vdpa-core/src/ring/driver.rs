//! The driver side of split rings; that of packed rings is in the submodule `packed`.

mod adopt;
mod either;
mod kick;
mod packed;

pub use adopt::{AdoptError, DriverState, InFlight};
pub use either::Driver;
pub use packed::{PackedAdoptError, PackedDriver, PackedDriverState, PackedInFlight};

use thiserror::Error;

use self::kick::Kick;
use super::error::Latch;
use super::layout::{self, DESCRIPTOR, Descriptor, FLAGS, INDEX, NEXT, SUPPRESS, WRITE};
use super::{Area, Buffer, Fault, RingError};
use crate::features::Features;

/// The driver side of a split ring (virtio 1.2 section 2.7).
///
/// Used by one thread at a time; no method blocks. The device is not trusted: the free descriptors and the chains in flight
/// are recorded here and never read back from shared memory.
#[derive(Debug)]
pub struct SplitDriver<A: Area> {
    desc: A,
    avail: A,
    used: A,
    size: u16,
    features: Features,
    event_idx: bool,
    /// By descriptor: the next one of its chain or of the free list.
    next: Vec<u16>,
    /// By descriptor: the chain in flight whose head it is.
    chains: Vec<Option<InFlightChain>>,
    free_head: u16,
    free: u16,
    in_flight: u16,
    /// Next entry of the available ring to fill.
    next_avail: u16,
    /// The available index in memory, which the device sees.
    published: u16,
    kick: Kick<u16>,
    /// Next entry of the used ring to take.
    last_used: u16,
    /// The used index as last read from memory.
    used_seen: u16,
    broken: Latch,
}

#[derive(Clone, Copy, Debug)]
struct InFlightChain {
    token: u64,
    descriptors: u16,
    writable: u32,
}

/// A request the device has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The token that was passed to `add`.
    pub token: u64,
    /// Bytes that the device reports as written; at most the length of the writable buffers.
    pub len: u32,
}

/// Why a request was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AddError {
    /// Too few descriptors are free: pop completions and try again.
    #[error("request needs {needed} descriptors, {free} are free")]
    Full {
        /// Descriptors of the request.
        needed: usize,
        /// Number of free descriptors.
        free: u16,
    },
    /// The request needs more descriptors than the ring has, so it can never be added.
    #[error("request needs {needed} descriptors, the ring has {size}")]
    TooLong {
        /// Descriptors of the request.
        needed: usize,
        /// Entries of the ring.
        size: u16,
    },
    /// The request has no buffers.
    #[error("request without buffers: at least one is required")]
    Empty,
    /// The buffers have more bytes than the 32-bit length of a used element can express.
    #[error("request of {bytes} bytes: at most 2^32 - 1 are allowed")]
    Length {
        /// Bytes of the request.
        bytes: u64,
    },
    /// Ring memory cannot be accessed; nothing was added.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl<A: Area> SplitDriver<A> {
    /// Initialises an empty ring in the three areas. Call it before the device uses the ring.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Features`] (packed rings and `IN_ORDER`), [`RingError::AreaSize`], or a
    /// fault.
    pub fn new(size: u16, features: Features, desc: A, avail: A, used: A) -> Result<Self, RingError> {
        let driver = Self::empty(size, features, desc, avail, used)?;
        let sizes = layout::area_sizes(size, driver.event_idx);
        zero(&driver.desc, sizes.desc)?;
        zero(&driver.avail, sizes.avail)?;
        zero(&driver.used, sizes.used)?;
        Ok(driver)
    }

    fn empty(size: u16, features: Features, desc: A, avail: A, used: A) -> Result<Self, RingError> {
        layout::check(size, features, &desc, &avail, &used)?;
        if features.has(Features::IN_ORDER) {
            return Err(RingError::Features { features, unsupported: "IN_ORDER" });
        }
        Ok(Self {
            desc,
            avail,
            used,
            size,
            features,
            event_idx: features.has(Features::RING_EVENT_IDX),
            next: (0..size).map(|index| index.wrapping_add(1)).collect(),
            chains: vec![None; size.into()],
            free_head: 0,
            free: size,
            in_flight: 0,
            next_avail: 0,
            published: 0,
            kick: Kick::default(),
            last_used: 0,
            used_seen: 0,
            broken: Latch::default(),
        })
    }

    /// Adds a request: the device reads `readable` and writes `writable`. [`publish`](Self::publish) makes it available to
    /// the device. The [`Completion`] carries `token`.
    ///
    /// # Errors
    /// [`AddError`]; nothing was added then.
    pub fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u64) -> Result<(), AddError> {
        let (descriptors, writable_len) = measure(readable, writable, self.size, self.free)?;
        let head = self.free_head;
        let mut index = head;
        for (buffer, flags) in with_flags(readable, writable) {
            let next = if flags & NEXT != 0 { self.successor(index) } else { 0 };
            let descriptor = Descriptor { addr: buffer.iova, len: buffer.len, flags, next };
            self.desc.write(usize::from(index) * DESCRIPTOR, &descriptor.encode())?;
            index = self.successor(index);
        }
        self.avail.write(layout::avail_entry(self.size, self.next_avail), &head.to_le_bytes())?;

        if let Some(slot) = self.chains.get_mut(usize::from(head)) {
            *slot = Some(InFlightChain { token, descriptors, writable: writable_len });
        }
        self.free_head = index;
        self.free -= descriptors;
        self.in_flight += 1;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    /// Makes all added requests available, with one store of the available index; returns whether the device must be
    /// kicked.
    ///
    /// # Errors
    /// [`RingError::Fault`]; the call may be repeated, and no kick is lost.
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if self.published != self.next_avail {
            self.avail.store_u16(INDEX, self.next_avail)?;
            self.published = self.next_avail;
            self.kick.set_pending();
        }
        let (published, size) = (self.published, self.size);
        self.kick.decide(published, |old| {
            // Pairs with the device's barrier between its request for a kick and its load of the available index.
            self.avail.barrier();
            if self.event_idx {
                let event = self.used.load_u16(layout::avail_event(size))?;
                Ok(old.is_none_or(|old| layout::need_event(event, published, old)))
            } else {
                Ok(self.used.load_u16(FLAGS)? & SUPPRESS == 0)
            }
        })
    }

    /// Pops the next completion; `None` when there is none.
    ///
    /// # Errors
    /// After a fault the call may be repeated. All other errors are protocol violations of the device
    /// ([`RingError::UsedIndex`], [`RingError::DescriptorIndex`], [`RingError::NotInFlight`],
    /// [`RingError::UsedLength`]) and are returned by every later call.
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
        if self.event_idx {
            self.avail.store_u16(layout::used_event(self.size), self.last_used)?;
        } else {
            self.avail.store_u16(FLAGS, 0)?;
        }
        // Pairs with the device's barrier between its store of the used index and its load of this event or flag.
        self.avail.barrier();
        let result = self.refresh();
        self.broken.record(result)
    }

    /// Tells the device that no notification is needed. This is only a hint: notifications may still come.
    ///
    /// # Errors
    /// [`RingError::Fault`].
    pub fn disable_interrupts(&mut self) -> Result<(), RingError> {
        if self.event_idx {
            // An index that the used index has just passed, and reaches again only after 65536 completions.
            self.avail.store_u16(layout::used_event(self.size), self.last_used.wrapping_sub(1))?;
        } else {
            self.avail.store_u16(FLAGS, SUPPRESS)?;
        }
        Ok(())
    }

    /// Number of requests added and not completed.
    #[must_use]
    pub const fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Number of free descriptors.
    #[must_use]
    pub const fn free(&self) -> u16 {
        self.free
    }

    /// Number of entries of the ring.
    #[must_use]
    pub const fn size(&self) -> u16 {
        self.size
    }

    fn take(&mut self) -> Result<Option<Completion>, RingError> {
        if self.used_seen == self.last_used && !self.refresh()? {
            return Ok(None);
        }
        let mut raw = [0; 8];
        self.used.read(layout::used_entry(self.size, self.last_used), &mut raw)?;
        let [i0, i1, i2, i3, l0, l1, l2, l3] = raw;
        let (id, len) = (u32::from_le_bytes([i0, i1, i2, i3]), u32::from_le_bytes([l0, l1, l2, l3]));
        let outside = RingError::DescriptorIndex { index: id, entries: self.size.into() };
        let head = u16::try_from(id).map_err(|_| outside)?;
        let slot = self.chains.get_mut(usize::from(head)).ok_or(outside)?;
        let chain = slot.ok_or(RingError::NotInFlight { head })?;
        if len > chain.writable {
            return Err(RingError::UsedLength { head, len, writable: chain.writable });
        }
        *slot = None;
        self.release(head, chain.descriptors);
        self.in_flight -= 1;
        self.last_used = self.last_used.wrapping_add(1);
        Ok(Some(Completion { token: chain.token, len }))
    }

    /// Loads the used index; returns whether completions are available.
    fn refresh(&mut self) -> Result<bool, RingError> {
        let index = self.used.load_u16(INDEX)?;
        let room = self.published.wrapping_sub(self.last_used);
        let ahead = index.wrapping_sub(self.last_used);
        if ahead > room {
            return Err(RingError::UsedIndex { index, first: self.last_used, room });
        }
        self.used_seen = index;
        Ok(ahead > 0)
    }

    /// Returns the descriptors of a chain to the head of the free list.
    fn release(&mut self, head: u16, descriptors: u16) {
        let mut last = head;
        for _ in 1..descriptors {
            last = self.successor(last);
        }
        self.link(last, self.free_head);
        self.free_head = head;
        self.free += descriptors;
    }

    fn successor(&self, index: u16) -> u16 {
        self.next.get(usize::from(index)).copied().unwrap_or(self.size)
    }

    fn link(&mut self, index: u16, next: u16) {
        if let Some(slot) = self.next.get_mut(usize::from(index)) {
            *slot = next;
        }
    }
}

/// The buffers of a request in ring order, each with the flags of its descriptor: NEXT for all but the last, and WRITE.
fn with_flags<'a>(readable: &'a [Buffer], writable: &'a [Buffer]) -> impl Iterator<Item = (&'a Buffer, u16)> {
    let count = readable.len() + writable.len();
    let readable = readable.iter().map(|buffer| (buffer, 0));
    let all = readable.chain(writable.iter().map(|buffer| (buffer, WRITE)));
    (1..)
        .zip(all)
        .map(move |(position, (buffer, flags))| (buffer, if position < count { flags | NEXT } else { flags }))
}

/// Checks a request; returns the number of its descriptors and of its writable bytes.
fn measure(readable: &[Buffer], writable: &[Buffer], size: u16, free: u16) -> Result<(u16, u32), AddError> {
    let needed = readable.len() + writable.len();
    let Some(descriptors) = u16::try_from(needed).ok().filter(|&needed| needed <= size) else {
        return Err(AddError::TooLong { needed, size });
    };
    if descriptors == 0 {
        return Err(AddError::Empty);
    }
    if descriptors > free {
        return Err(AddError::Full { needed, free });
    }
    let bytes = |list: &[Buffer]| list.iter().map(|buffer| u64::from(buffer.len)).sum::<u64>();
    let total = bytes(readable) + bytes(writable);
    if u32::try_from(total).is_err() {
        return Err(AddError::Length { bytes: total });
    }
    Ok((descriptors, u32::try_from(bytes(writable)).unwrap_or(u32::MAX)))
}

fn zero<A: Area>(area: &A, size: usize) -> Result<(), Fault> {
    const ZEROES: [u8; 256] = [0; 256];
    for offset in (0..size).step_by(ZEROES.len()) {
        let count = ZEROES.len().min(size - offset);
        area.write(offset, &ZEROES[..count])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
