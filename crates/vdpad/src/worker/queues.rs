//! The running queues of a worker, and what serving them needs.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vdpa_core::iotlb::Table;
use vdpa_core::ring::RingError;
use vdpa_core::types::{Asid, Result};
use vdpa_sys::uring::{Op, Registrar, Ring, SubmitError};

use super::queue::Queue;
use super::{Counters, Size, View};
use crate::rate::RateLimit;

/// What a completion belongs to, packed into the ring's token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Wake,
    Kick { queue: u16, generation: u32 },
    Io { slot: u32 },
}

impl Token {
    pub(super) const fn pack(self) -> u64 {
        match self {
            Self::Wake => 0,
            Self::Kick { queue, generation } => 1 << 60 | (queue as u64) << 32 | generation as u64,
            Self::Io { slot } => 2 << 60 | slot as u64,
        }
    }

    pub(super) const fn unpack(token: u64) -> Option<Self> {
        #[expect(clippy::cast_possible_truncation, reason = "the fields of a packed token")]
        let (low, middle) = (token as u32, (token >> 32) as u16);
        match token >> 60 {
            0 => Some(Self::Wake),
            1 => Some(Self::Kick { queue: middle, generation: low }),
            2 => Some(Self::Io { slot: low }),
            _ => None,
        }
    }
}

/// The running queues of a device, with the translations they use and the ring that carries I/O.
///
/// A [`Logic`](super::Logic) takes a queue out of its place while it works on it, so that it may work on several at
/// once and use everything else meanwhile, and puts it back before it returns.
pub(crate) struct Queues {
    name: String,
    pub(super) uring: Ring,
    /// By address space.
    views: Vec<Arc<View>>,
    /// The translation of an address space in which nothing is mapped.
    nothing: Arc<View>,
    slots: Vec<Option<Queue>>,
    counters: Arc<[Counters]>,
    complaints: RateLimit,
}

impl Queues {
    pub(super) fn new(name: String, uring: Ring, size: Size, counters: Arc<[Counters]>) -> Self {
        let nothing = Arc::new(View::new(&Table::default(), Vec::new()));
        Self {
            name,
            uring,
            views: vec![Arc::clone(&nothing); size.address_spaces],
            nothing,
            slots: (0..size.queues).map(|_| None).collect(),
            counters,
            complaints: RateLimit::per_second(5),
        }
    }

    /// The device, for the log.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Queues of the device, running or not.
    pub(crate) fn count(&self) -> usize {
        self.slots.len()
    }

    /// Takes a running queue out of its place.
    pub(crate) fn take(&mut self, index: u16) -> Option<Queue> {
        self.slots.get_mut(usize::from(index)).and_then(Option::take)
    }

    /// Puts a queue in its place.
    pub(crate) fn put(&mut self, index: u16, queue: Queue) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            *slot = Some(queue);
        }
    }

    /// A running queue that is in its place.
    pub(crate) fn get_mut(&mut self, index: u16) -> Option<&mut Queue> {
        self.slots.get_mut(usize::from(index)).and_then(Option::as_mut)
    }

    /// Takes a queue that has stopped out of its place for good.
    pub(super) fn take_stopped(&mut self, index: u16) -> Option<Queue> {
        let stopped = |queue: &mut Queue| queue.stopping.is_some() && queue.in_flight == 0;
        self.slots.get_mut(usize::from(index)).and_then(|slot| slot.take_if(stopped))
    }

    /// Every running queue that is in its place.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Queue> {
        self.slots.iter_mut().flatten()
    }

    /// Whether a queue can be served without waiting for anything.
    pub(crate) fn has_work(&self) -> bool {
        self.slots.iter().flatten().any(Queue::has_work)
    }

    /// Whether requests of some queue are in flight.
    pub(super) fn in_flight(&self) -> bool {
        self.slots.iter().flatten().any(|queue| queue.in_flight > 0)
    }

    /// The translation a queue uses.
    pub(crate) fn view(&self, queue: &Queue) -> Arc<View> {
        // A queue in an address space the device does not have was refused when it started.
        Arc::clone(self.views.get(queue.setup.asid.0 as usize).unwrap_or(&self.nothing))
    }

    /// Whether the device has this address space.
    pub(super) fn has_view(&self, asid: Asid) -> bool {
        (asid.0 as usize) < self.views.len()
    }

    /// Replaces the translation of one address space; one the device does not have is ignored.
    pub(super) fn set_view(&mut self, asid: Asid, view: Arc<View>) {
        if let Some(place) = self.views.get_mut(asid.0 as usize) {
            *place = view;
        }
    }

    /// Registers files and buffers with the ring that carries the operations.
    pub(crate) fn registrar(&self) -> Registrar {
        self.uring.registrar()
    }

    /// Hands an operation to the kernel; [`Logic::complete`](super::Logic::complete) is called with `slot`.
    pub(crate) fn submit(&mut self, op: Op, slot: u32) -> Result<(), SubmitError> {
        self.uring.submit(op, Token::Io { slot }.pack())
    }

    pub(super) fn poll(&mut self, fd: Arc<OwnedFd>, token: Token) -> Result<()> {
        self.uring.submit(Op::PollMultishot { fd }, token.pack()).map_err(|error| error.errno())
    }

    /// Counts a request that was answered.
    pub(crate) fn count_request(&self, index: u16, bytes: u64, failed: bool) {
        if let Some(counters) = self.counters.get(usize::from(index)) {
            counters.count(bytes, failed);
        }
    }

    /// [Publishes](Self::publish) what is left, on every queue.
    pub(super) fn publish_all(&mut self) {
        for index in (0..self.slots.len()).map(to_u16) {
            let Some(mut queue) = self.take(index) else { continue };
            if let Err(error) = self.publish(&mut queue) {
                self.rest(index, &mut queue, error);
            }
            self.put(index, queue);
        }
    }

    /// Shows the driver what was answered and signals it if it wants that.
    pub(crate) fn publish(&self, queue: &mut Queue) -> Result<(), RingError> {
        let Some(ring) = queue.resolved() else { return Ok(()) };
        if ring.publish()?
            && let Some(call) = &queue.setup.call
        {
            call.signal();
        }
        Ok(())
    }

    /// A queue that cannot go on rests until the next kick; one whose driver broke the protocol is retired.
    pub(crate) fn rest(&self, index: u16, queue: &mut Queue, error: RingError) -> bool {
        if !error.is_fault() {
            queue.retired = true;
        }
        self.complain(index, &error);
        false
    }

    /// Tells the log of a driver that errs, not too often.
    pub(crate) fn complain(&self, queue: u16, error: &dyn std::fmt::Display) {
        if let Some(suppressed) = self.complaints.pass() {
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
            Token::Kick { queue: u16::MAX, generation: u32::MAX },
            Token::Kick { queue: 0, generation: 1 },
            Token::Io { slot: u32::MAX },
        ] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(u64::MAX), None);
    }
}
