//! [`Requests`]: the requests in flight, by token.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Reads a block.
    Read,
    /// Writes a block.
    Write,
    /// Makes all completed writes durable.
    Flush,
}

/// One request in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Its kind.
    pub kind: Kind,
    /// Number of the block; 0 for a flush.
    pub block: u64,
    /// Sequence number of a write; for a read the one expected.
    pub sequence: u64,
    /// Offset of its data in memory, in bytes.
    pub buffer: u64,
    /// When it was submitted, `CLOCK_MONOTONIC` in ns.
    pub submitted_ns: u64,
    /// Whether it was counted as lost.
    #[serde(default)]
    pub overdue: bool,
}

/// A completion without a request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Anomaly {
    /// The request was completed before.
    #[error("request {token:#x} was completed twice")]
    Duplicate {
        /// Its token.
        token: u64,
    },
    /// No request ever had this token.
    #[error("a request {token:#x} was completed that was never made")]
    Unknown {
        /// The token.
        token: u64,
    },
}

const SLOT_BITS: u32 = 16;

/// A table of requests. A token consists of a slot and a generation, so no token is used twice.
#[derive(Debug)]
pub struct Requests {
    slots: Vec<Option<(u64, Request)>>,
    next_generation: u64,
    in_flight: usize,
}

/// A table as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRequests {
    /// Number of slots.
    pub slots: u16,
    /// Generation of the next request.
    pub next_generation: u64,
    /// Requests in flight by token.
    pub requests: Vec<(u64, Request)>,
}

impl Requests {
    /// An empty table.
    #[must_use]
    pub fn new(slots: u16) -> Self {
        Self { slots: vec![None; usize::from(slots)], next_generation: 1, in_flight: 0 }
    }

    /// Requests in flight.
    #[must_use]
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Requests in flight with their slots.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Request)> {
        self.slots.iter().enumerate().filter_map(|(at, slot)| Some((at, &slot.as_ref()?.1)))
    }

    /// A free slot.
    #[must_use]
    pub fn free_slot(&self) -> Option<usize> {
        self.slots.iter().position(Option::is_none)
    }

    /// Whether a block has a request in flight.
    #[must_use]
    pub fn touches(&self, block: u64) -> bool {
        self.iter().any(|(_, r)| r.kind != Kind::Flush && r.block == block)
    }

    /// Whether a buffer is in use.
    #[must_use]
    pub fn uses(&self, buffer: u64) -> bool {
        self.iter().any(|(_, r)| r.buffer == buffer)
    }

    /// Stores a request in a slot and returns its token; `None` when the slot is not free.
    pub fn insert(&mut self, slot: usize, request: Request) -> Option<u64> {
        let place = self.slots.get_mut(slot).filter(|s| s.is_none())?;
        let token = self.next_generation << SLOT_BITS | u64::try_from(slot).ok()?;
        *place = Some((token, request));
        self.next_generation += 1;
        self.in_flight += 1;
        Some(token)
    }

    /// Slot of a token.
    #[must_use]
    pub const fn slot(token: u64) -> usize {
        (token & ((1 << SLOT_BITS) - 1)) as usize
    }

    /// Removes the request of a completion.
    ///
    /// # Errors
    /// [`Anomaly`].
    pub fn complete(&mut self, token: u64) -> Result<Request, Anomaly> {
        let place = self.slots.get_mut(Self::slot(token)).ok_or(Anomaly::Unknown { token })?;
        if let Some((_, request)) = place.take_if(|(t, _)| *t == token) {
            self.in_flight -= 1;
            return Ok(request);
        }
        if (1..self.next_generation).contains(&(token >> SLOT_BITS)) {
            Err(Anomaly::Duplicate { token })
        } else {
            Err(Anomaly::Unknown { token })
        }
    }

    /// Marks the requests that are older than `deadline_ns`. Returns how many were not marked before.
    pub fn mark_overdue(&mut self, now_ns: u64, deadline_ns: u64) -> u64 {
        let mut count = 0;
        for (_, request) in self.slots.iter_mut().flatten() {
            if !request.overdue && now_ns.saturating_sub(request.submitted_ns) > deadline_ns {
                request.overdue = true;
                count += 1;
            }
        }
        count
    }

    /// The table as plain data.
    #[must_use]
    pub fn save(&self) -> SavedRequests {
        SavedRequests {
            slots: u16::try_from(self.slots.len()).unwrap_or(u16::MAX),
            next_generation: self.next_generation,
            requests: self.slots.iter().flatten().cloned().collect(),
        }
    }

    /// Restores a table; `None` when the data is inconsistent.
    #[must_use]
    pub fn restore(saved: SavedRequests) -> Option<Self> {
        let mut table = Self::new(saved.slots);
        table.next_generation = saved.next_generation;
        for (token, request) in saved.requests {
            let place = table.slots.get_mut(Self::slot(token))?;
            if place.is_some() || !(1..saved.next_generation).contains(&(token >> SLOT_BITS)) {
                return None;
            }
            *place = Some((token, request));
            table.in_flight += 1;
        }
        Some(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(block: u64) -> Request {
        Request {
            kind: Kind::Write,
            block,
            sequence: 1,
            buffer: block * 4096,
            submitted_ns: 100,
            overdue: false,
        }
    }

    #[test]
    fn duplicate_and_unknown_tokens_are_told_apart() {
        let mut table = Requests::new(2);
        let first = table.insert(0, request(5)).unwrap();
        assert!(table.insert(0, request(6)).is_none());
        assert!(table.touches(5) && table.uses(5 * 4096) && !table.touches(6));
        assert_eq!(table.complete(first).unwrap().block, 5);
        assert_eq!(table.complete(first), Err(Anomaly::Duplicate { token: first }));
        let again = table.insert(0, request(7)).unwrap();
        assert_ne!(first, again);
        assert_eq!(table.complete(first), Err(Anomaly::Duplicate { token: first }));
        for token in [0, 1 << 40, again + 1 + (5 << SLOT_BITS), u64::MAX] {
            assert_eq!(table.complete(token), Err(Anomaly::Unknown { token }));
        }
        assert_eq!(table.in_flight(), 1);
    }

    #[test]
    fn a_lost_request_is_counted_once() {
        let mut table = Requests::new(4);
        table.insert(0, request(1)).unwrap();
        assert_eq!(table.mark_overdue(150, 100), 0);
        assert_eq!(table.mark_overdue(201, 100), 1);
        assert_eq!(table.mark_overdue(300, 100), 0);
    }

    #[test]
    fn a_table_is_restored_and_a_forged_one_is_refused() {
        let mut table = Requests::new(4);
        let token = table.insert(2, request(1)).unwrap();
        let saved = table.save();
        let mut restored = Requests::restore(saved.clone()).unwrap();
        assert_eq!(restored.save(), saved);
        assert_eq!(restored.complete(token).unwrap(), request(1));
        let mut twice = saved.clone();
        twice.requests.push((token, request(2)));
        assert!(Requests::restore(twice).is_none());
        let mut outside = saved.clone();
        outside.slots = 1;
        assert!(Requests::restore(outside).is_none());
        let mut future = saved;
        future.next_generation = 1;
        assert!(Requests::restore(future).is_none());
    }
}
