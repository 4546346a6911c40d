//! A driver of a packed ring that goes on in the next image of its process.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{PackedDriver, Request};
use crate::features::Features;
use crate::ring::layout::{NEXT, WRITE};
use crate::ring::packed::layout::{FLAGS, Place};
use crate::ring::{Area, RingError};

/// A driver as plain data, for the next image of the process.
///
/// Untrusted when it comes back: [`PackedDriver::adopt`] checks every field. Only the tokens are the caller's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedDriverState {
    /// Entries of the ring.
    pub size: u16,
    /// Features in force.
    pub features: Features,
    /// Next descriptor to fill, with its wrap counter in bit 15.
    pub next_avail: u16,
    /// First descriptor the device was not shown, with its wrap counter in bit 15.
    pub published: u16,
    /// Next descriptor to take as used, with its wrap counter in bit 15.
    pub last_used: u16,
    /// Requests in flight, in any order.
    pub in_flight: Vec<PackedInFlight>,
}

/// One request of a [`PackedDriverState`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedInFlight {
    /// As given to [`PackedDriver::add`].
    pub token: u64,
    /// Buffer id.
    pub id: u16,
    /// Descriptors of the ring.
    pub descriptors: u16,
    /// Bytes the device may write.
    pub writable: u32,
}

/// Why a ring is not continued.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PackedAdoptError {
    /// The ring itself is impossible or out of reach.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The three places are not in order within one lap.
    #[error(
        "places {last_used:#x}, {published:#x} and {next_avail:#x} do not follow each other in a ring of {size}"
    )]
    Places {
        /// Next descriptor to take as used.
        last_used: u16,
        /// First descriptor the device was not shown.
        published: u16,
        /// Next descriptor to fill.
        next_avail: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// Descriptors in flight do not fill the distance between the places.
    #[error("requests in flight have {descriptors} descriptors, but the places say {expected}")]
    Descriptors {
        /// Descriptors of all requests.
        descriptors: u32,
        /// Distance of the places.
        expected: u32,
    },
    /// An id is outside the ring or taken twice.
    #[error("buffer id {id} is outside the ring of {size} or that of two requests")]
    Id {
        /// The id.
        id: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A request without descriptors.
    #[error("request {token:#x} has no descriptors")]
    Empty {
        /// Its token.
        token: u64,
    },
    /// The device was shown the descriptor at which it is said to see nothing.
    #[error("descriptor {index} is available in memory, but not in this state")]
    Published {
        /// The descriptor.
        index: u16,
    },
}

impl<A: Area> PackedDriver<A> {
    /// The driver as plain data. The ring itself stays in shared memory, and the device may go on.
    #[must_use]
    pub fn state(&self) -> PackedDriverState {
        let in_flight = (0u16..).zip(&self.requests).filter_map(|(id, request)| {
            let Request { token, descriptors, writable } = (*request)?;
            Some(PackedInFlight { token, id, descriptors, writable })
        });
        PackedDriverState {
            size: self.size,
            features: self.features,
            next_avail: self.next_avail.encode(),
            published: self.published.encode(),
            last_used: self.last_used.encode(),
            in_flight: in_flight.collect(),
        }
    }

    /// Continues a ring that is live in shared memory where `state` left it; completions may arrive meanwhile.
    ///
    /// Nothing is written to memory. The first [`publish`](Self::publish) asks for a kick, since the last one may
    /// have been lost, and makes visible what had been added but not published.
    ///
    /// # Errors
    /// [`PackedAdoptError`] when `state` contradicts itself, the areas or the ring in memory.
    pub fn adopt(state: &PackedDriverState, desc: A, driver: A, device: A) -> Result<Self, PackedAdoptError> {
        let mut driver = Self::empty(state.size, state.features, desc, driver, device)?;
        driver.adopt_places(state)?;
        driver.adopt_requests(state)?;
        Ok(driver)
    }

    fn adopt_places(&mut self, state: &PackedDriverState) -> Result<(), PackedAdoptError> {
        let &PackedDriverState { next_avail, published, last_used, size, .. } = state;
        let [avail, shown, used] = [next_avail, published, last_used].map(Place::decode);
        let inside = [avail, shown, used].iter().all(|place| place.index < size);
        let ordered = inside
            && avail.since(used, size) <= u32::from(size)
            && shown.since(used, size) <= avail.since(used, size);
        if !ordered {
            return Err(PackedAdoptError::Places { last_used, published, next_avail, size });
        }
        if shown != avail {
            // Stored when it was added, all but available; what the device makes of the rest is its own affair.
            let flags = self.desc.load_u16(shown.offset() + FLAGS).map_err(RingError::from)?;
            if shown.is_available(flags) {
                return Err(PackedAdoptError::Published { index: shown.index });
            }
            self.held = flags & (NEXT | WRITE) | shown.available();
        }
        self.next_avail = avail;
        self.published = shown;
        self.last_used = used;
        self.undecided = true;
        Ok(())
    }

    fn adopt_requests(&mut self, state: &PackedDriverState) -> Result<(), PackedAdoptError> {
        let descriptors = state.in_flight.iter().map(|request| u32::from(request.descriptors)).sum();
        let expected = self.next_avail.since(self.last_used, self.size);
        if descriptors != expected {
            return Err(PackedAdoptError::Descriptors { descriptors, expected });
        }
        for &PackedInFlight { token, id, descriptors, writable } in &state.in_flight {
            if descriptors == 0 {
                return Err(PackedAdoptError::Empty { token });
            }
            match self.requests.get_mut(usize::from(id)) {
                Some(slot @ None) => *slot = Some(Request { token, descriptors, writable }),
                _ => return Err(PackedAdoptError::Id { id, size: self.size }),
            }
            self.in_flight += 1;
        }
        let requests = &self.requests;
        self.free_ids.retain(|&id| requests.get(usize::from(id)).is_some_and(Option::is_none));
        Ok(())
    }
}
