//! The driver side of a ring: split here, packed in a part of its own.

mod adopt;
mod either;
mod packed;

pub use adopt::{AdoptError, DriverState, InFlight};
pub use either::Driver;
pub use packed::{PackedAdoptError, PackedDriver, PackedDriverState, PackedInFlight};

use thiserror::Error;

use super::error::Latch;
use super::layout::{self, DESCRIPTOR, Descriptor, FLAGS, INDEX, NEXT, SUPPRESS, WRITE};
use super::{Area, Buffer, Fault, RingError};
use crate::features::Features;

/// The driver side of a split ring (virtio 1.2 section 2.7).
///
/// One thread uses it; nothing blocks. The device is not trusted: which descriptors are free and which chain a
/// completion means is kept here, never read back from shared memory.
#[derive(Debug)]
pub struct SplitDriver<A: Area> {
    desc: A,
    avail: A,
    used: A,
    size: u16,
    features: Features,
    event_idx: bool,
    /// Successor of each descriptor, in its chain or in the free list.
    next: Vec<u16>,
    /// By head: the chain in flight that starts there.
    chains: Vec<Option<InFlightChain>>,
    free_head: u16,
    free: u16,
    in_flight: u16,
    /// Next entry of the available ring to fill.
    next_avail: u16,
    /// The available index the device sees.
    published: u16,
    /// The available index at which the device's wish to be kicked was last examined; `None` when only a kick is
    /// safe.
    kicked: Option<u16>,
    undecided: bool,
    /// Next entry of the used ring to take.
    last_used: u16,
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
    /// As given to `add`.
    pub token: u64,
    /// Bytes the device says it has written; never more than the writable buffers have.
    pub len: u32,
}

/// Why a request was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AddError {
    /// Too few free descriptors: take completions and try again.
    #[error("request needs {needed} descriptors, {free} are free")]
    Full {
        /// Descriptors of the request.
        needed: usize,
        /// Descriptors free now.
        free: u16,
    },
    /// More descriptors than the ring has: it never fits.
    #[error("request needs {needed} descriptors, the ring has {size}")]
    TooLong {
        /// Descriptors of the request.
        needed: usize,
        /// Entries of the ring.
        size: u16,
    },
    /// No buffer at all.
    #[error("request without buffers: at least one is required")]
    Empty,
    /// More bytes than a used element can count.
    #[error("request of {bytes} bytes: at most 2^32 - 1 are allowed")]
    Length {
        /// Bytes of the request.
        bytes: u64,
    },
    /// The ring cannot be reached; nothing was added.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl<A: Area> SplitDriver<A> {
    /// Sets up an empty ring in the three areas; to be called before the device runs.
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
            kicked: None,
            undecided: false,
            last_used: 0,
            used_seen: 0,
            broken: Latch::default(),
        })
    }

    /// Adds a request: the device reads `readable` and writes `writable`. It sees it after
    /// [`publish`](Self::publish). `token` comes back in the [`Completion`].
    ///
    /// # Errors
    /// [`AddError`]; nothing was added then.
    pub fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u64) -> Result<(), AddError> {
        let (descriptors, writable_len) = measure(readable, writable, self.size, self.free)?;
        let head = self.free_head;
        let mut index = head;
        let all =
            readable.iter().map(|buffer| (buffer, 0)).chain(writable.iter().map(|buffer| (buffer, WRITE)));
        for (position, (buffer, flags)) in (1..).zip(all) {
            let (flags, next) =
                if position < descriptors { (flags | NEXT, self.successor(index)) } else { (flags, 0) };
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

    /// Shows the device everything added, with one store of the available index; returns whether it must be kicked.
    ///
    /// # Errors
    /// A fault; the call may be repeated, and no kick gets lost.
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if self.published != self.next_avail {
            self.avail.store_u16(INDEX, self.next_avail)?;
            self.published = self.next_avail;
            self.undecided = true;
        }
        if !self.undecided {
            return Ok(false);
        }
        // Pairs with the device's barrier between asking for a kick and looking at the available index.
        self.avail.barrier();
        let old = self.kicked.take();
        let kick = if self.event_idx {
            let event = self.used.load_u16(layout::avail_event(self.size))?;
            old.is_none_or(|old| layout::need_event(event, self.published, old))
        } else {
            self.used.load_u16(FLAGS)? & SUPPRESS == 0
        };
        self.kicked = Some(self.published);
        self.undecided = false;
        Ok(kick)
    }

    /// Takes the next completion; `None` when there is none.
    ///
    /// # Errors
    /// After a fault the call may be repeated. All others are violations of the device
    /// ([`RingError::UsedIndex`], [`RingError::DescriptorIndex`], [`RingError::NotInFlight`],
    /// [`RingError::UsedLength`]) and are returned from now on.
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
        if self.event_idx {
            self.avail.store_u16(layout::used_event(self.size), self.last_used)?;
        } else {
            self.avail.store_u16(FLAGS, 0)?;
        }
        // Pairs with the device's barrier between its used index and its look at our wish.
        self.avail.barrier();
        let result = self.refresh();
        self.broken.keep(result)
    }

    /// Tells the device that no notification is needed: advice only, notifications may still come.
    ///
    /// # Errors
    /// A fault.
    pub fn disable_interrupts(&mut self) -> Result<(), RingError> {
        if self.event_idx {
            // An event the used index has just passed: it comes again after 65536 completions.
            self.avail.store_u16(layout::used_event(self.size), self.last_used.wrapping_sub(1))?;
        } else {
            self.avail.store_u16(FLAGS, SUPPRESS)?;
        }
        Ok(())
    }

    /// Requests added and not completed.
    #[must_use]
    pub const fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Descriptors free now.
    #[must_use]
    pub const fn free(&self) -> u16 {
        self.free
    }

    /// Entries of the ring.
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

    /// Reads the device's index; returns whether there are completions.
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

    /// Puts a chain back in front of the free list.
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

/// Checks a request; returns its descriptors and its writable bytes.
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
