//! Saving the driver of a packed ring and adopting it in the next image of the process.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{PackedDriver, Request};
use crate::features::Features;
use crate::ring::layout::{NEXT, WRITE};
use crate::ring::packed::layout::{FLAGS, Place};
use crate::ring::{Area, RingError};

/// The state of a driver as plain data, for the next image of the process.
///
/// [`PackedDriver::adopt`] does not trust it and checks every field but the tokens, whose meaning only the caller knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedDriverState {
    /// Entries of the ring.
    pub size: u16,
    /// Features in force.
    pub features: Features,
    /// Next descriptor to fill, with its wrap counter in bit 15.
    pub next_avail: u16,
    /// First descriptor that was not made available to the device, with its wrap counter in bit 15.
    pub published: u16,
    /// Next descriptor that the device will use, with its wrap counter in bit 15.
    pub last_used: u16,
    /// Requests in flight, in any order.
    pub in_flight: Vec<PackedInFlight>,
}

/// One request of a [`PackedDriverState`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedInFlight {
    /// The token that was passed to [`PackedDriver::add`].
    pub token: u64,
    /// Buffer id.
    pub id: u16,
    /// Number of descriptors.
    pub descriptors: u16,
    /// Bytes the device may write.
    pub writable: u32,
}

/// Why a ring cannot be adopted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PackedAdoptError {
    /// Size, features or areas of the ring are invalid, or its memory cannot be accessed.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The three positions are not in order within one lap of the ring.
    #[error(
        "places {last_used:#x}, {published:#x} and {next_avail:#x} do not follow each other in a ring of {size}"
    )]
    Places {
        /// Next descriptor that the device will use.
        last_used: u16,
        /// First descriptor that was not made available.
        published: u16,
        /// Next descriptor to fill.
        next_avail: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// The number of descriptors in flight is not the distance between the positions.
    #[error("requests in flight have {descriptors} descriptors, but the places say {expected}")]
    Descriptors {
        /// Descriptors of all requests.
        descriptors: u32,
        /// Distance of the positions.
        expected: u32,
    },
    /// A buffer id is outside the ring or belongs to two requests.
    #[error("buffer id {id} is outside the ring of {size} or that of two requests")]
    Id {
        /// The id.
        id: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A request has no descriptors.
    #[error("request {token:#x} has no descriptors")]
    Empty {
        /// Its token.
        token: u64,
    },
    /// The first descriptor that should not be available to the device is available in memory.
    #[error("descriptor {index} is available in memory, but not in this state")]
    Published {
        /// The descriptor.
        index: u16,
    },
}

impl<A: Area> PackedDriver<A> {
    /// The state of the driver as plain data. The ring stays in shared memory, and the device may continue to use it.
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

    /// Continues a ring in shared memory where `state` left it. The device may complete requests meanwhile.
    ///
    /// Writes nothing to memory. The first [`publish`](Self::publish) makes available what had been added but not
    /// published, and returns that a kick is needed unless the device suppresses it, since the last kick may have been lost.
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
        let [avail, published_at, used] = [next_avail, published, last_used].map(Place::decode);
        let inside = [avail, published_at, used].iter().all(|place| place.index < size);
        let ordered = inside
            && avail.since(used, size) <= u32::from(size)
            && published_at.since(used, size) <= avail.since(used, size);
        if !ordered {
            return Err(PackedAdoptError::Places { last_used, published, next_avail, size });
        }
        if published_at != avail {
            // `add` stored these flags without making the descriptor available. If the device has changed NEXT or WRITE
            // since, only the device itself is affected.
            let flags = self.desc.load_u16(published_at.offset() + FLAGS).map_err(RingError::from)?;
            if published_at.is_available(flags) {
                return Err(PackedAdoptError::Published { index: published_at.index });
            }
            self.held_flags = flags & (NEXT | WRITE) | published_at.available();
        }
        self.next_avail = avail;
        self.published = published_at;
        self.last_used = used;
        self.kick.set_pending();
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
