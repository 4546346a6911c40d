//! [`Slab`]: the requests of a ring that are in flight, with what they own.

use super::op::Resources;

/// Set in the `user_data` of polls, which has the [epoch](Slab::epoch) of the ring too: those of an earlier process complete late.
pub(super) const POLL: u64 = 1 << 62;
/// Bits of a slot's generation in the `user_data` of a poll.
const POLL_GENERATION: u32 = (1 << 14) - 1;

/// A request in flight.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) token: u64,
    pub(super) resources: Resources,
    pub(super) poll: bool,
}

/// Requests in flight by key: index in the lower half, generation in the upper one, so that a key is never
/// valid twice.
#[derive(Debug, Default)]
pub(super) struct Slab {
    slots: Vec<(u32, Option<Slot>)>,
    free: Vec<u32>,
    pub(super) used: usize,
    /// How many of them are polls.
    pub(super) polls: usize,
    /// Number of the process among those that have used the ring.
    pub(super) epoch: u16,
}

impl Slab {
    pub(super) fn insert(&mut self, slot: Slot) -> u64 {
        self.used += 1;
        let poll = slot.poll;
        self.polls += usize::from(poll);
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            // The kernel's limit of requests in flight is far below 2^32 (32768 entries, 65536 completions
            // and a backlog that stops submission).
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        let mut generation = 0;
        if let Some((slot_generation, place)) = self.slots.get_mut(index as usize) {
            generation = *slot_generation;
            *place = Some(slot);
        }
        self.key(index, generation, poll)
    }

    fn key(&self, index: u32, generation: u32, poll: bool) -> u64 {
        if poll {
            let generation = generation & POLL_GENERATION;
            POLL | u64::from(self.epoch) << 46 | u64::from(generation) << 32 | u64::from(index)
        } else {
            u64::from(generation) << 32 | u64::from(index)
        }
    }

    fn at(&mut self, key: u64) -> Option<(u32, &mut (u32, Option<Slot>))> {
        let index = u32::try_from(key & u64::from(u32::MAX)).ok()?;
        let (generation, slot) = self.slots.get(index as usize)?;
        let poll = slot.as_ref()?.poll;
        if self.key(index, *generation, poll) != key {
            return None;
        }
        self.slots.get_mut(index as usize).map(|place| (index, place))
    }

    pub(super) fn token(&mut self, key: u64) -> Option<u64> {
        self.at(key).and_then(|(_, place)| place.1.as_ref()).map(|slot| slot.token)
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<Slot> {
        let (index, place) = self.at(key)?;
        let slot = place.1.take()?;
        // The highest bits belong to BARE, INTERNAL and POLL.
        place.0 = (place.0 + 1) & (u32::MAX >> 2);
        self.free.push(index);
        self.used -= 1;
        self.polls -= usize::from(slot.poll);
        Some(slot)
    }

    pub(super) fn keys_of(&self, wanted: impl Fn(u64) -> bool) -> Vec<u64> {
        let indexed = (0u32..).zip(&self.slots);
        let key = |(index, (generation, slot)): (u32, &(u32, Option<Slot>))| {
            let slot = slot.as_ref().filter(|slot| wanted(slot.token))?;
            Some(self.key(index, *generation, slot.poll))
        };
        indexed.filter_map(key).collect()
    }
}
