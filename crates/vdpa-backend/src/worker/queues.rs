//! The running queues of a device, and what serving them needs.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use vdpa_core::iotlb::Table;
use vdpa_core::ring::RingError;
use vdpa_core::types::{Asid, Result};
use vdpa_sys::uring::{FixedIoVec, Op, Registrar, Ring, SubmitError};

use super::queue::Queue;
use super::{Invalidation, MemoryView, Shared, Size};
use crate::rate::RateLimit;

/// What a completion belongs to, packed into the ring's token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Wake,
    Kick {
        device: u16,
        queue: u16,
        /// Below 2^28.
        generation: u32,
    },
    Io {
        device: u16,
        slot: u32,
    },
}

impl Token {
    const GENERATION: u32 = (1 << 28) - 1;

    pub(super) const fn pack(self) -> u64 {
        match self {
            Self::Wake => 0,
            Self::Kick { device, queue, generation } => {
                1 << 60
                    | (device as u64) << 44
                    | (queue as u64) << 28
                    | (generation & Self::GENERATION) as u64
            }
            Self::Io { device, slot } => 2 << 60 | (device as u64) << 44 | slot as u64,
        }
    }

    pub(super) const fn unpack(token: u64) -> Option<Self> {
        #[expect(clippy::cast_possible_truncation, reason = "the fields of a packed token")]
        let (low, queue, device) = (token as u32, (token >> 28) as u16, (token >> 44) as u16);
        match token >> 60 {
            0 => Some(Self::Wake),
            1 => Some(Self::Kick { device, queue, generation: low & Self::GENERATION }),
            2 => Some(Self::Io { device, slot: low }),
            _ => None,
        }
    }
}

/// The running queues of a device, with the translations they use and the ring that carries I/O.
///
/// A [`QueueHandler`](super::QueueHandler) takes a queue out of its place while it works on it, so that it may work on several at
/// once and use everything else meanwhile, and puts it back before it returns.
pub struct Queues {
    name: String,
    /// Which of the thread's devices this is.
    device: u16,
    uring: Rc<RefCell<Ring>>,
    /// Of all devices of the thread, so that a late completion is never taken for one of another device.
    generation: Rc<Cell<u32>>,
    /// By address space.
    views: Vec<Arc<MemoryView>>,
    /// The translation of an address space in which nothing is mapped.
    nothing: Arc<MemoryView>,
    slots: Vec<Option<Queue>>,
    shared: Arc<Shared>,
    /// The thread looks at rings of itself before it sleeps.
    polls: Rc<Cell<bool>>,
    log_limit: RateLimit,
}

impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queues").field("name", &self.name).field("slots", &self.slots).finish_non_exhaustive()
    }
}

impl Queues {
    pub(super) fn new(
        name: String,
        device: u16,
        uring: Rc<RefCell<Ring>>,
        generation: Rc<Cell<u32>>,
        polls: Rc<Cell<bool>>,
        size: Size,
        shared: Arc<Shared>,
    ) -> Self {
        let nothing = Arc::new(MemoryView::new(&Table::default(), Vec::new()));
        Self {
            name,
            device,
            uring,
            generation,
            views: vec![Arc::clone(&nothing); size.address_spaces],
            nothing,
            slots: (0..size.queues).map(|_| None).collect(),
            shared,
            polls,
            log_limit: RateLimit::per_second(5),
        }
    }

    /// The device, for the log.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Queues of the device, running or not.
    #[must_use]
    pub fn count(&self) -> u16 {
        to_u16(self.slots.len())
    }

    /// Takes a running queue out of its place.
    #[inline]
    pub fn take(&mut self, index: u16) -> Option<Queue> {
        self.slots.get_mut(usize::from(index)).and_then(Option::take)
    }

    /// Puts a queue in its place.
    #[inline]
    pub fn put(&mut self, index: u16, queue: Queue) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            *slot = Some(queue);
        }
    }

    /// A running queue that is in its place.
    #[inline]
    pub fn get_mut(&mut self, index: u16) -> Option<&mut Queue> {
        self.slots.get_mut(usize::from(index)).and_then(Option::as_mut)
    }

    /// Takes a queue that has stopped out of its place for good.
    pub(super) fn take_stopped(&mut self, index: u16) -> Option<Queue> {
        let stopped = |queue: &mut Queue| queue.stopping.is_some() && queue.in_flight == 0;
        self.slots.get_mut(usize::from(index)).and_then(|slot| slot.take_if(stopped))
    }

    /// Every running queue that is in its place.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Queue> {
        self.slots.iter_mut().flatten()
    }

    /// Whether a queue can be served without waiting for anything.
    pub fn has_work(&self) -> bool {
        self.slots.iter().flatten().any(Queue::has_work)
    }

    /// Whether requests of some queue are in flight.
    pub(super) fn in_flight(&self) -> bool {
        self.slots.iter().flatten().any(|queue| queue.in_flight > 0)
    }

    /// The translation a queue uses.
    #[inline]
    pub fn view(&self, queue: &Queue) -> Arc<MemoryView> {
        // A queue in an address space the device does not have was refused when it started.
        Arc::clone(self.views.get(queue.setup.asid.0 as usize).unwrap_or(&self.nothing))
    }

    /// Whether the device has this address space.
    pub(super) fn has_view(&self, asid: Asid) -> bool {
        (asid.0 as usize) < self.views.len()
    }

    /// Replaces the translation of one address space; one the device does not have is ignored. Queues whose rings are in
    /// removed memory take no requests from now on, until they have [left](Self::leave_rings) it.
    pub(super) fn set_view(&mut self, invalidation: &Invalidation) {
        if let Some(place) = self.views.get_mut(invalidation.asid.0 as usize) {
            *place = Arc::clone(&invalidation.view);
        }
        let concerned = self.iter_mut().filter(|queue| queue.setup.asid == invalidation.asid);
        concerned.for_each(|queue| queue.leaving |= queue.uses(&invalidation.removed));
    }

    /// Queues that are to leave their rings, and have nothing in flight any more, do so; whether all have.
    pub(super) fn leave_rings(&mut self, asid: Asid) -> bool {
        let leaving = self.iter_mut().filter(|queue| queue.setup.asid == asid && queue.leaving);
        let mut left = true;
        for queue in leaving {
            if queue.in_flight == 0 {
                queue.unresolve();
            } else {
                left = false;
            }
        }
        left
    }

    /// The address space of a running queue.
    #[must_use]
    pub fn asid(&self, index: u16) -> Option<Asid> {
        self.slots.get(usize::from(index)).and_then(Option::as_ref).map(|queue| queue.setup.asid)
    }

    /// Registers files and buffers with the ring that carries the operations.
    pub fn registrar(&self) -> Registrar {
        self.uring.borrow().registrar()
    }

    /// Hands an operation to the kernel; [`QueueHandler::complete`](super::QueueHandler::complete) is called with `slot`.
    #[inline]
    pub fn submit(&mut self, op: Op, slot: u32) -> Result<(), SubmitError> {
        self.uring.borrow_mut().submit(op, Token::Io { device: self.device, slot }.pack())
    }

    /// As [`submit`](Self::submit), for a read of a registered file, from byte `offset` on, into registered memory.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    #[inline]
    pub fn read_fixed(
        &mut self,
        file: u32,
        to: FixedIoVec,
        offset: u64,
        slot: u32,
    ) -> Result<(), SubmitError> {
        let token = Token::Io { device: self.device, slot }.pack();
        self.uring.borrow_mut().read_fixed(file, to, offset, token)
    }

    /// A name for a run of a queue.
    pub(super) fn next_generation(&self) -> u32 {
        let next = self.generation.get().wrapping_add(1) & Token::GENERATION;
        self.generation.set(next);
        next
    }

    /// Watches the kick of a queue.
    pub(super) fn poll(&mut self, fd: Arc<OwnedFd>, queue: u16, generation: u32) -> Result<()> {
        let token = Token::Kick { device: self.device, queue, generation };
        self.uring.borrow_mut().submit(Op::PollMultishot { fd }, token.pack()).map_err(|error| error.errno())
    }

    /// Ends the watch of a queue that is out of its place.
    pub(super) fn cancel_poll(&mut self, index: u16, queue: &Queue) {
        let token = Token::Kick { device: self.device, queue: index, generation: queue.generation };
        if queue.setup.kick.is_some()
            && let Err(error) = self.uring.borrow_mut().cancel(|found| found == token.pack())
        {
            // The poll stays behind; its generation tells its completions apart.
            tracing::debug!(device = %self.name, "kick poll not cancelled: {error}");
        }
    }

    /// Asks for the end of all operations in flight.
    pub(super) fn cancel_requests(&mut self) {
        let own =
            |token| matches!(Token::unpack(token), Some(Token::Io { device, .. }) if device == self.device);
        if let Err(error) = self.uring.borrow_mut().cancel(own) {
            tracing::debug!(device = %self.name, "requests not cancelled: {error}");
        }
    }

    /// There is no request any more in a ring that was resolved: asks for a kick at the next one, unless the thread looks
    /// at the ring of itself. Whether one has come meanwhile.
    pub fn wait_for_kick(&self, queue: &mut Queue, view: &Arc<MemoryView>) -> Result<bool, RingError> {
        queue.polled = self.polls.get();
        let polled = queue.polled;
        let ring = queue.ring(view)?;
        if polled { ring.has_request() } else { ring.enable_kick() }
    }

    /// Whether a queue waits for requests without a kick.
    pub(super) fn is_polled(&self) -> bool {
        self.slots.iter().flatten().any(|queue| queue.polled)
    }

    /// Looks at the rings that wait without a kick, or asks for kicks again with `end`; whether there is something to do.
    pub(super) fn look(&mut self, end: bool) -> bool {
        let mut found = false;
        for index in (0..self.slots.len()).map(to_u16) {
            let Some(queue) = self.slots.get_mut(usize::from(index)).and_then(Option::as_mut) else {
                continue;
            };
            if !queue.polled {
                continue;
            }
            match if end { queue.end_polling() } else { queue.look() } {
                Ok(false) => {}
                Ok(true) => {
                    queue.pending = true;
                    found = true;
                }
                Err(error) => {
                    queue.polled = false;
                    if let Some(mut queue) = self.take(index) {
                        self.ring_failed(index, &mut queue, error);
                        self.put(index, queue);
                    }
                }
            }
        }
        found
    }

    /// Counts a request that was answered.
    #[inline]
    pub fn count_request(&self, index: u16, bytes: u64, failed: bool) {
        if let Some(counters) = self.shared.counters.get(usize::from(index)) {
            counters.count(bytes, failed);
        }
    }

    /// [Publishes](Self::publish) what is left, on every queue.
    pub(super) fn publish_all(&mut self) {
        for index in (0..self.slots.len()).map(to_u16) {
            let slot = self.slots.get_mut(usize::from(index)).and_then(Option::as_mut);
            let Some(Err(error)) = slot.map(Queue::publish) else { continue };
            if let Some(mut queue) = self.take(index) {
                self.ring_failed(index, &mut queue, error);
                self.put(index, queue);
            }
        }
    }

    /// Shows the driver what was answered and signals it if it wants that.
    #[inline]
    pub fn publish(&self, queue: &mut Queue) -> Result<(), RingError> {
        queue.publish()
    }

    /// A queue that cannot go on rests until the next kick; one whose driver broke the protocol is retired, and the
    /// driver told to reset the device.
    pub fn ring_failed(&self, index: u16, queue: &mut Queue, error: RingError) -> bool {
        if !error.is_fault() && !std::mem::replace(&mut queue.retired, true) {
            self.shared.break_down();
        }
        self.log_error(index, &error);
        false
    }

    /// Tells the log of a driver that errs, not too often.
    pub fn log_error(&self, queue: u16, error: &dyn fmt::Display) {
        if let Some(suppressed) = self.log_limit.pass() {
            tracing::warn!(device = %self.name, queue, suppressed, "{error}");
        }
    }
}

/// Queue indexes come from a `u16` count.
pub(super) fn to_u16(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_packing() {
        for token in [
            Token::Wake,
            Token::Kick { device: u16::MAX, queue: u16::MAX, generation: Token::GENERATION },
            Token::Kick { device: 1, queue: 0, generation: 1 },
            Token::Kick { device: 0, queue: 1, generation: 0 },
            Token::Io { device: u16::MAX, slot: u32::MAX },
            Token::Io { device: 1, slot: 0 },
        ] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(u64::MAX), None);
    }
}
