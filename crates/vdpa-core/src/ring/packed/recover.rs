//! Continuing a packed ring from its in-flight log.

use super::layout::{FLAGS, Place};
use super::{Descriptor, Features, INDIRECT, InOrder, PackedQueue, QueueState, WRITE};
use crate::ring::inflight::{Log, LogError, LogMemory, Pushed, Repeat, Taken};
use crate::ring::split::add_all;
use crate::ring::{Area, Chain, Fault, Memory, RingError};

impl<A: Area, M: LogMemory> PackedQueue<A, Log<M>> {
    /// As [`Ring::recover`](crate::ring::Ring::recover), for a packed ring.
    ///
    /// # Errors
    /// As there.
    pub fn recover(
        size: u16,
        features: Features,
        [desc, driver, device]: [A; 3],
        memory: M,
    ) -> Result<(Self, Vec<Repeat>), LogError> {
        let (mut log, taken, pushed) = Log::open(memory, size, features)?;
        let avail = Place::at(log.avail(), size);
        let used = Place::at(log.used(), size);
        let state = QueueState::Packed {
            last_avail_idx: avail.index,
            last_avail_wrap: avail.wrap,
            last_used_idx: used.index,
            last_used_wrap: used.wrap,
        };
        let mut queue = PackedQueue::new(size, features, desc, driver, device, state)?;
        show_pushed(&queue.desc, size, log.published(), &pushed).map_err(RingError::from)?;
        log.publish();
        queue.undecided = true;
        queue.requests.divide();
        queue.requests.set_taken(taken.iter().flat_map(|taken| taken.parts.iter().copied()));
        taken.iter().for_each(|taken| queue.requests.restore(taken));
        if features.has(Features::IN_ORDER) {
            let mut order = InOrder::new(size);
            if log.lost() > 0 {
                order.stall();
            }
            add_all(&mut order, taken.iter().map(|taken| taken.name));
            queue.order = Some(order);
        }
        Ok((queue.replace_log(log), taken.iter().map(Taken::repeat).collect()))
    }

    /// As [`Ring::retake`](crate::ring::Ring::retake), for a packed ring.
    ///
    /// The descriptors are those of the log, since the ring may have others in their place by now. An indirect table is
    /// in the driver's memory, which may not change before the request is answered.
    ///
    /// # Errors
    /// As there.
    pub fn retake<T: Memory>(
        &mut self,
        repeat: Repeat,
        memory: &T,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        let slot = self.requests.get(repeat.head)?;
        chain.reset(repeat.head);
        let result = self.walk_logged(memory, slot.descriptors, chain);
        self.broken.record(result)?;
        if let Some(order) = &mut self.order {
            order.set_writable(repeat.head, chain.writable().len());
        }
        self.log.set_attempts(repeat.head, repeat.attempts.saturating_add(1))
    }

    /// As [`Ring::put_back`](crate::ring::Ring::put_back), for a packed ring.
    ///
    /// # Errors
    /// As there.
    pub fn put_back(&mut self, repeat: Repeat) -> Result<(), RingError> {
        self.log.set_attempts(repeat.head, repeat.attempts)
    }

    fn walk_logged<T: Memory>(&self, memory: &T, count: u16, chain: &mut Chain) -> Result<(), RingError> {
        let mut bytes = 0;
        for stored in self.logged(chain.head, count) {
            let descriptor = Descriptor { addr: stored.addr, len: stored.len, flags: stored.flags, next: 0 };
            if stored.flags & INDIRECT != 0 {
                return self.walk_indirect(memory, descriptor, count, chain);
            }
            chain.push(Descriptor { flags: stored.flags & WRITE, ..descriptor })?;
            bytes += u64::from(stored.len);
        }
        chain.check(bytes)
    }
}

/// Shows the driver what was pushed behind `published`, unless it was shown.
///
/// That is seen from the first flags, which were stored last. If they were not, nobody but this side may have written
/// behind them, and the flags of all are stored anew. If they were, the driver may have used the places again, and
/// nothing may be stored.
fn show_pushed<A: Area>(desc: &A, size: u16, published: u64, pushed: &[Pushed]) -> Result<(), Fault> {
    let Some((first, later)) = pushed.split_first() else { return Ok(()) };
    let at = Place::at(published, size);
    if at.was_used(desc.load_u16(at.offset() + FLAGS)?) {
        return Ok(());
    }
    let flags = |at: Place, pushed: &Pushed| at.used() | if pushed.wrote { WRITE } else { 0 };
    for (before, pushed) in pushed.iter().zip(later) {
        let at = Place::at(before.end, size);
        desc.store_u16(at.offset() + FLAGS, flags(at, pushed))?;
    }
    desc.store_u16(at.offset() + FLAGS, flags(at, first))
}
