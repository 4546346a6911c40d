//! The driver side of a split ring.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use thiserror::Error;

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
    broken: Option<RingError>,
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
    /// As given to [`SplitDriver::add`].
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

/// A driver as plain data, for the next image of the process.
///
/// Untrusted when it comes back: [`SplitDriver::adopt`] checks every field. Only the tokens are the caller's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriverState {
    /// Entries of the ring.
    pub size: u16,
    /// Features in force.
    pub features: Features,
    /// Next entry of the available ring to fill, free running.
    pub avail_index: u16,
    /// Next entry of the used ring to take, free running.
    pub last_used_index: u16,
    /// Descriptors not in flight.
    pub free: u16,
    /// Requests in flight, in any order.
    pub in_flight: Vec<InFlight>,
}

/// One request of a [`DriverState`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InFlight {
    /// As given to [`SplitDriver::add`].
    pub token: u64,
    /// Its descriptors, in order.
    pub descriptors: Vec<u16>,
    /// Bytes the device may write.
    pub writable: u32,
}

/// Why a ring is not continued.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// The ring itself is impossible or out of reach.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// Requests in flight do not agree with the indices.
    #[error(
        "{in_flight} requests in flight, but the indices {last_used_index} to {avail_index} say {expected}"
    )]
    Count {
        /// Requests in the state.
        in_flight: usize,
        /// Available index of the state.
        avail_index: u16,
        /// Used index of the state.
        last_used_index: u16,
        /// Their distance.
        expected: u16,
    },
    /// Descriptors in flight and free ones do not add up to the ring.
    #[error("{used} descriptors in flight and {free} free ones are not the {size} of the ring")]
    Descriptors {
        /// Descriptors of all requests.
        used: usize,
        /// Free ones of the state.
        free: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A descriptor is in no or in two chains.
    #[error("descriptor {index} is outside the ring of {size} or part of two requests")]
    Descriptor {
        /// The descriptor.
        index: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A request without descriptors.
    #[error("request {token:#x} has no descriptors")]
    Empty {
        /// Its token.
        token: u64,
    },
    /// The table in memory shows another chain.
    #[error("descriptor {index} of request {token:#x} is not what the table in memory has: {reason}")]
    Table {
        /// Token of the request.
        token: u64,
        /// The descriptor.
        index: u16,
        /// What differs.
        reason: &'static str,
    },
    /// The index in memory is not one this state can have published.
    #[error("{ring} index {found} in memory does not belong to this state, which allows {first} to {last}")]
    Index {
        /// Which: "available" or "used".
        ring: &'static str,
        /// Index in memory.
        found: u16,
        /// First possible.
        first: u16,
        /// Last possible.
        last: u16,
    },
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
            broken: None,
        })
    }

    /// Adds a request: the device reads `readable` and writes `writable`. It sees it after
    /// [`publish`](Self::publish). `token` comes back in the [`Completion`].
    ///
    /// # Errors
    /// [`AddError`]; nothing was added then.
    pub fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u64) -> Result<(), AddError> {
        let needed = readable.len() + writable.len();
        let Some(descriptors) = u16::try_from(needed).ok().filter(|&needed| needed <= self.size) else {
            return Err(AddError::TooLong { needed, size: self.size });
        };
        if descriptors == 0 {
            return Err(AddError::Empty);
        }
        if descriptors > self.free {
            return Err(AddError::Full { needed, free: self.free });
        }
        let bytes = |list: &[Buffer]| list.iter().map(|buffer| u64::from(buffer.len)).sum::<u64>();
        let total = bytes(readable) + bytes(writable);
        if u32::try_from(total).is_err() {
            return Err(AddError::Length { bytes: total });
        }
        let writable_len = u32::try_from(bytes(writable)).unwrap_or(u32::MAX);

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
        fence(Ordering::SeqCst);
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
        self.check_broken()?;
        let result = self.take();
        self.latch(result)
    }

    /// Asks the device to notify at the next completion; returns whether one is there already, for which no
    /// notification may come.
    ///
    /// # Errors
    /// A fault, or the violation met before.
    pub fn enable_interrupts(&mut self) -> Result<bool, RingError> {
        self.check_broken()?;
        if self.event_idx {
            self.avail.store_u16(layout::used_event(self.size), self.last_used)?;
        } else {
            self.avail.store_u16(FLAGS, 0)?;
        }
        // Pairs with the device's barrier between its used index and its look at our wish.
        fence(Ordering::SeqCst);
        let result = self.refresh();
        self.latch(result)
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

    /// The driver as plain data. The ring itself stays in shared memory, and the device may go on.
    #[must_use]
    pub fn state(&self) -> DriverState {
        let in_flight = (0u16..).zip(&self.chains).filter_map(|(head, chain)| {
            let chain = (*chain)?;
            let successor = |&index: &u16| Some(self.successor(index));
            let descriptors =
                std::iter::successors(Some(head), successor).take(chain.descriptors.into()).collect();
            Some(InFlight { token: chain.token, descriptors, writable: chain.writable })
        });
        DriverState {
            size: self.size,
            features: self.features,
            avail_index: self.next_avail,
            last_used_index: self.last_used,
            free: self.free,
            in_flight: in_flight.collect(),
        }
    }

    /// Continues a ring that is live in shared memory where `state` left it; completions may arrive meanwhile.
    ///
    /// Nothing is written to memory. The first [`publish`](Self::publish) asks for a kick, since the last one may
    /// have been lost, and makes visible what had been added but not published.
    ///
    /// # Errors
    /// [`AdoptError`] when `state` contradicts itself, the areas or the ring in memory.
    pub fn adopt(state: DriverState, desc: A, avail: A, used: A) -> Result<Self, AdoptError> {
        let mut driver = Self::empty(state.size, state.features, desc, avail, used)?;
        driver.adopt_indices(&state)?;
        driver.adopt_chains(&state)?;
        Ok(driver)
    }

    fn adopt_indices(&mut self, state: &DriverState) -> Result<(), AdoptError> {
        let &DriverState { avail_index, last_used_index, .. } = state;
        let expected = avail_index.wrapping_sub(last_used_index);
        let in_flight = state.in_flight.len();
        if expected > self.size || in_flight != usize::from(expected) {
            return Err(AdoptError::Count { in_flight, avail_index, last_used_index, expected });
        }
        let published = self.avail.load_u16(INDEX).map_err(RingError::from)?;
        let used = self.used.load_u16(INDEX).map_err(RingError::from)?;
        for (ring, found, last) in [("available", published, avail_index), ("used", used, published)] {
            if found.wrapping_sub(last_used_index) > last.wrapping_sub(last_used_index) {
                return Err(AdoptError::Index { ring, found, first: last_used_index, last });
            }
        }
        self.in_flight = expected;
        self.next_avail = avail_index;
        self.published = published;
        self.undecided = true;
        self.last_used = last_used_index;
        self.used_seen = last_used_index;
        Ok(())
    }

    fn adopt_chains(&mut self, state: &DriverState) -> Result<(), AdoptError> {
        let used: usize = state.in_flight.iter().map(|request| request.descriptors.len()).sum();
        if used + usize::from(state.free) != usize::from(self.size) {
            return Err(AdoptError::Descriptors { used, free: state.free, size: self.size });
        }
        let mut taken = vec![false; self.size.into()];
        for request in &state.in_flight {
            let Some(&head) = request.descriptors.first() else {
                return Err(AdoptError::Empty { token: request.token });
            };
            for &index in &request.descriptors {
                match taken.get_mut(usize::from(index)) {
                    Some(taken) if !*taken => *taken = true,
                    _ => return Err(AdoptError::Descriptor { index, size: self.size }),
                }
            }
            self.compare_table(request)?;
            for (&index, &next) in request.descriptors.iter().zip(request.descriptors.iter().skip(1)) {
                self.link(index, next);
            }
            let descriptors = u16::try_from(request.descriptors.len()).unwrap_or(self.size);
            if let Some(slot) = self.chains.get_mut(usize::from(head)) {
                *slot = Some(InFlightChain { token: request.token, descriptors, writable: request.writable });
            }
        }
        let free = (0..self.size).zip(taken).filter_map(|(index, taken)| (!taken).then_some(index));
        self.free_head = self.size;
        for index in free.rev() {
            self.link(index, self.free_head);
            self.free_head = index;
        }
        self.free = state.free;
        Ok(())
    }

    /// Compares a request with the descriptor table, which only the driver writes.
    fn compare_table(&self, request: &InFlight) -> Result<(), AdoptError> {
        let differs = |index, reason| AdoptError::Table { token: request.token, index, reason };
        let mut writable = 0;
        let mut rest = request.descriptors.as_slice();
        while let Some((&index, others)) = rest.split_first() {
            let descriptor = Descriptor::read(&self.desc, index).map_err(RingError::from)?;
            if descriptor.flags & WRITE != 0 {
                writable += u64::from(descriptor.len);
            }
            match (others.first(), descriptor.flags & NEXT != 0) {
                (Some(&next), true) if next == descriptor.next => {}
                (None, false) => {}
                (None, true) => return Err(differs(index, "its chain goes on")),
                (Some(_), false) => return Err(differs(index, "its chain ends")),
                (Some(_), true) => return Err(differs(index, "its chain goes on elsewhere")),
            }
            if others.is_empty() && writable != u64::from(request.writable) {
                return Err(differs(index, "the chain has another number of writable bytes"));
            }
            rest = others;
        }
        Ok(())
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

    fn check_broken(&self) -> Result<(), RingError> {
        self.broken.map_or(Ok(()), Err)
    }

    fn latch<T>(&mut self, result: Result<T, RingError>) -> Result<T, RingError> {
        if let Err(error) = &result
            && !error.is_fault()
        {
            self.broken = Some(*error);
        }
        result
    }
}

fn zero<A: Area>(area: &A, size: usize) -> Result<(), Fault> {
    const ZEROES: [u8; 256] = [0; 256];
    for offset in (0..size).step_by(ZEROES.len()) {
        let count = ZEROES.len().min(size - offset);
        area.write(offset, &ZEROES[..count])?;
    }
    Ok(())
}
