//! Continuing a split ring from its in-flight log.

use super::{Features, InOrder, QueueState, SplitQueue};
use crate::ring::inflight::{Log, LogError, LogMemory, Repeat, Taken};
use crate::ring::layout::INDEX;
use crate::ring::{Area, Chain, Memory, RingError};

impl<A: Area, M: LogMemory> SplitQueue<A, Log<M>> {
    /// As [`Ring::recover`](crate::ring::Ring::recover), for a split ring.
    ///
    /// # Errors
    /// As there.
    pub fn recover(
        size: u16,
        features: Features,
        [desc, avail, used]: [A; 3],
        memory: M,
    ) -> Result<(Self, Vec<Repeat>), LogError> {
        let (mut log, taken, _) = Log::open(memory, size, features)?;
        let (next_avail, next_used) = (low(log.avail()), low(log.used()));
        let state = QueueState::Split { avail_index: next_avail };
        let mut queue = SplitQueue::new(size, features, desc, avail, used, state)?;
        // Everything the log calls pushed is in the used ring; whether the driver was shown it is not known and does not
        // matter, as showing it twice changes nothing.
        queue.used.store_u16(INDEX, next_used).map_err(RingError::from)?;
        log.publish();
        (queue.next_used, queue.written, queue.published) = (next_used, next_used, next_used);
        (queue.undecided, queue.undelivered) = (true, log.lost());
        if let Some(order) = &mut queue.order {
            if log.lost() > 0 {
                order.stall();
            }
            add_all(order, taken.iter().map(|taken| taken.name));
        }
        let repeats = taken.iter().map(Taken::repeat).collect();
        Ok((queue.replace_log(log), repeats))
    }

    /// As [`Ring::retake`](crate::ring::Ring::retake), for a split ring.
    ///
    /// The descriptors are still those of the request: the driver may not change them before it is answered. One that
    /// does gets a request done that it has not made, in its own memory.
    ///
    /// # Errors
    /// As there.
    pub fn retake<T: Memory>(
        &mut self,
        repeat: Repeat,
        memory: &T,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        let head = repeat.head;
        if !self.log.is_taken(head) {
            return Err(RingError::NotInFlight { head });
        }
        chain.reset(head);
        let result = self.walk(memory, chain);
        self.keep(result)?;
        if let Some(order) = &mut self.order {
            order.set_writable(head, chain.writable().len());
        }
        self.log.set_attempts(head, repeat.attempts.saturating_add(1))
    }

    /// As [`Ring::put_back`](crate::ring::Ring::put_back), for a split ring.
    ///
    /// # Errors
    /// As there.
    pub fn put_back(&mut self, repeat: Repeat) -> Result<(), RingError> {
        self.log.set_attempts(repeat.head, repeat.attempts)
    }
}

/// Puts the requests in flight in order. How much of them is writable is not known before they are retaken: a length
/// that nobody writes, so that none of them counts as written in full.
pub(in crate::ring) fn add_all(order: &mut InOrder, names: impl Iterator<Item = u16>) {
    for name in names {
        order.add(name, u64::MAX);
    }
}

/// The index in the ring of a position.
#[expect(clippy::cast_possible_truncation, reason = "indices are positions modulo 65536")]
const fn low(position: u64) -> u16 {
    position as u16
}
