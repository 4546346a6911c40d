//! Saving the driver of a split ring and adopting it in the next image of the process.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{InFlightChain, SplitDriver};
use crate::features::Features;
use crate::ring::layout::{Descriptor, INDEX, NEXT, WRITE};
use crate::ring::{Area, RingError};

/// The state of a driver as plain data, for the next image of the process.
///
/// [`SplitDriver::adopt`] does not trust it and checks every field but the tokens, whose meaning only the caller knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriverState {
    /// Entries of the ring.
    pub size: u16,
    /// Features in force.
    pub features: Features,
    /// Next entry of the available ring to fill, free running.
    pub avail_index: u16,
    /// Next entry of the used ring to read, free running.
    pub last_used_index: u16,
    /// Number of descriptors not in flight.
    pub free: u16,
    /// Requests in flight, in any order.
    pub in_flight: Vec<InFlight>,
}

/// One request of a [`DriverState`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InFlight {
    /// The token that was passed to [`SplitDriver::add`].
    pub token: u64,
    /// Its descriptors, in chain order.
    pub descriptors: Vec<u16>,
    /// Bytes the device may write.
    pub writable: u32,
}

/// Why a ring cannot be adopted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// Size, features or areas of the ring are invalid, or its memory cannot be accessed.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The number of requests in flight is not the distance between the indices.
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
    /// The descriptors in flight and the free ones do not add up to the size of the ring.
    #[error("{used} descriptors in flight and {free} free ones are not the {size} of the ring")]
    Descriptors {
        /// Descriptors of all requests.
        used: usize,
        /// Free ones of the state.
        free: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A descriptor is outside the ring or belongs to two chains.
    #[error("descriptor {index} is outside the ring of {size} or part of two requests")]
    Descriptor {
        /// The descriptor.
        index: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A request has no descriptors.
    #[error("request {token:#x} has no descriptors")]
    Empty {
        /// Its token.
        token: u64,
    },
    /// The descriptor table in memory has another chain.
    #[error("descriptor {index} of request {token:#x} is not what the table in memory has: {reason}")]
    Table {
        /// Token of the request.
        token: u64,
        /// The descriptor.
        index: u16,
        /// What differs.
        reason: &'static str,
    },
    /// An index in memory is not possible for this state.
    #[error("{ring} index {found} in memory does not belong to this state, which allows {first} to {last}")]
    Index {
        /// The ring of the index: "available" or "used".
        ring: &'static str,
        /// Index in memory.
        found: u16,
        /// First possible value.
        first: u16,
        /// Last possible value.
        last: u16,
    },
}

impl<A: Area> SplitDriver<A> {
    /// The state of the driver as plain data. The ring stays in shared memory, and the device may continue to use it.
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

    /// Continues a ring in shared memory where `state` left it. The device may complete requests meanwhile.
    ///
    /// Writes nothing to memory. The first [`publish`](Self::publish) makes available what had been added but not
    /// published, and returns that a kick is needed unless the device suppresses it, since the last kick may have been lost.
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
        self.kick.set_pending();
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

    /// Compares a request with the descriptor table in memory. Only drivers write it, so the two must agree.
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
}
