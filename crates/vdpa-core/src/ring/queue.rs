//! The device side of a ring in the format that was negotiated.

use super::inflight::{Log, LogError, LogMemory, MaybeLog, NoLog, Repeat};
use super::layout::AreaSizes;
use super::packed::PackedQueue;
use super::split::SplitQueue;
use super::{Area, Chain, Memory, RingError, packed, split};
use crate::features::Features;
use crate::vq::QueueState;

/// Bytes of the descriptor, driver and device areas of a ring of `size` entries under `features`.
#[must_use]
pub const fn area_sizes(size: u16, features: Features) -> AreaSizes {
    if features.has(Features::RING_PACKED) {
        packed::area_sizes(size)
    } else {
        split::area_sizes(size, features.has(Features::RING_EVENT_IDX))
    }
}

/// The device side of a ring of either format; see [`SplitQueue`] for what holds for both.
///
/// A device that completes what it popped with [`push_used`](Self::push_used) and the [`head`](Chain::head) of the
/// chain need not know the format.
#[derive(Debug)]
pub enum Ring<A: Area, L: MaybeLog = NoLog> {
    /// Without `RING_PACKED`.
    Split(SplitQueue<A, L>),
    /// With `RING_PACKED`.
    Packed(PackedQueue<A, L>),
}

macro_rules! either {
    ($ring:expr, $queue:ident => $result:expr) => {
        match $ring {
            Ring::Split($queue) => $result,
            Ring::Packed($queue) => $result,
        }
    };
}

impl<A: Area> Ring<A> {
    /// Starts a ring at `state`, in the format that `features` asks for. The areas are the descriptor, driver
    /// (available ring) and device (used ring) areas, of at least [`area_sizes`].
    ///
    /// # Errors
    /// As [`SplitQueue::new`] and [`PackedQueue::new`].
    pub fn new(
        size: u16,
        features: Features,
        desc: A,
        driver: A,
        device: A,
        state: QueueState,
    ) -> Result<Self, RingError> {
        if features.has(Features::RING_PACKED) {
            PackedQueue::new(size, features, desc, driver, device, state).map(Self::Packed)
        } else {
            SplitQueue::new(size, features, desc, driver, device, state).map(Self::Split)
        }
    }

    /// Keeps a log of the requests in flight in `memory`, of at least [`log_size`](super::inflight::log_size) bytes, which is
    /// made empty. `features` are those of the ring.
    ///
    /// To be called before the first request is taken.
    ///
    /// # Errors
    /// [`LogError::Room`].
    pub fn with_log<M: LogMemory>(self, memory: M, features: Features) -> Result<Ring<A, Log<M>>, LogError> {
        match self {
            Self::Split(queue) => queue.with_log(memory, features).map(Ring::Split),
            Self::Packed(queue) => queue.with_log(memory, features).map(Ring::Packed),
        }
    }
}

impl<A: Area, M: LogMemory> Ring<A, Log<M>> {
    /// Continues a ring from the log of a process that has died, at whatever instruction. The areas are those of
    /// [`new`](Ring::new), `memory` that of [`with_log`](Ring::with_log).
    ///
    /// Returns the ring and the requests to be repeated, in the order in which they were taken. Each is
    /// [retaken](Self::retake) before it is done, and answered with [`push_used`](Self::push_used) like any other; the
    /// caller need not wait with new requests until then. Call [`publish`](Self::publish) at once and signal the driver
    /// as it says: a notification may have been lost.
    ///
    /// May be repeated after an error and after a crash at any instruction of it.
    ///
    /// # Errors
    /// [`LogError`]. With [`LogError::Absent`] nothing was taken: start the queue where it was set to start.
    /// [`LogError::Ring`] with a fault: the ring's memory is out of reach at the moment.
    pub fn recover(
        size: u16,
        features: Features,
        [desc, driver, device]: [A; 3],
        memory: M,
    ) -> Result<(Self, Vec<Repeat>), LogError> {
        if features.has(Features::RING_PACKED) {
            let (queue, repeats) = PackedQueue::recover(size, features, [desc, driver, device], memory)?;
            Ok((Self::Packed(queue), repeats))
        } else {
            let (queue, repeats) = SplitQueue::recover(size, features, [desc, driver, device], memory)?;
            Ok((Self::Split(queue), repeats))
        }
    }

    /// Reads a request to be repeated into `chain` and counts this process among those that have begun it, once however
    /// often it is called.
    ///
    /// # Errors
    /// [`RingError::NotInFlight`] for one that was answered. A fault: call again later. All others are violations of
    /// the driver, which has changed the request after it made it available, and stop the ring.
    pub fn retake<T: Memory>(
        &mut self,
        repeat: Repeat,
        memory: &T,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        either!(self, queue => queue.retake(repeat, memory, chain))
    }

    /// Takes a [`retake`](Self::retake) back: this process has not begun the request. It stays in flight and can be
    /// retaken.
    ///
    /// # Errors
    /// [`RingError::NotInFlight`] for one that was answered.
    pub fn put_back(&mut self, repeat: Repeat) -> Result<(), RingError> {
        either!(self, queue => queue.put_back(repeat))
    }
}

impl<A: Area, L: MaybeLog> Ring<A, L> {
    /// Makes the log, if there is one, empty at the present position, and forgets the requests in flight: for a queue
    /// that is stopped. One that was drained needs no call.
    pub fn restart_log(&mut self) {
        either!(self, queue => queue.restart_log());
    }

    /// Treats an indirect descriptor as a violation unless `features` has `RING_INDIRECT_DESC`.
    #[must_use]
    pub fn refuse_unnegotiated_indirect(self, features: Features) -> Self {
        match self {
            Self::Split(queue) => Self::Split(queue.refuse_unnegotiated_indirect(features)),
            Self::Packed(queue) => Self::Packed(queue.refuse_unnegotiated_indirect(features)),
        }
    }

    /// Starts with `count` requests taken already that belong to an earlier run of the ring: see
    /// [`SplitQueue::with_in_flight`] and [`PackedQueue::with_in_flight`].
    #[must_use]
    pub fn with_in_flight(self, count: u16) -> Self {
        match self {
            Self::Split(queue) => Self::Split(queue.with_in_flight(count)),
            Self::Packed(queue) => Self::Packed(queue.with_in_flight(count)),
        }
    }

    /// Pops the next available request into `chain`; `false` when there is none.
    ///
    /// # Errors
    /// As [`SplitQueue::pop`].
    #[inline]
    pub fn pop<M: Memory>(&mut self, memory: &M, chain: &mut Chain) -> Result<bool, RingError> {
        either!(self, queue => queue.pop(memory, chain))
    }

    /// Returns the last popped request to the ring.
    ///
    /// # Errors
    /// As [`SplitQueue::abandon`].
    pub fn abandon(&mut self, chain: &Chain) -> Result<(), RingError> {
        either!(self, queue => queue.abandon(chain))
    }

    /// Completes the request that was popped as `head`, with `len` bytes written; the driver sees it after
    /// [`publish`](Self::publish).
    ///
    /// # Errors
    /// As [`SplitQueue::push_used`].
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        either!(self, queue => queue.push_used(head, len))
    }

    /// Publishes all pushed requests with one store; returns whether the driver must be notified.
    ///
    /// # Errors
    /// As [`SplitQueue::publish`].
    #[inline]
    pub fn publish(&mut self) -> Result<bool, RingError> {
        either!(self, queue => queue.publish())
    }

    /// Asks the driver to kick at the next request; returns whether a request is available already, for which no kick may come.
    ///
    /// # Errors
    /// As [`SplitQueue::enable_kick`].
    #[inline]
    pub fn enable_kick(&mut self) -> Result<bool, RingError> {
        either!(self, queue => queue.enable_kick())
    }

    /// Whether a request is available. For a device that busy-polls the ring with kicks disabled.
    ///
    /// # Errors
    /// As [`SplitQueue::has_request`].
    #[inline]
    pub fn has_request(&mut self) -> Result<bool, RingError> {
        either!(self, queue => queue.has_request())
    }

    /// Number of requests that can be popped now, counted up to `most`.
    ///
    /// # Errors
    /// As [`SplitQueue::waiting`].
    #[inline]
    pub fn waiting(&mut self, most: u16) -> Result<u16, RingError> {
        match self {
            Self::Split(queue) => queue.waiting().map(|waiting| waiting.min(most)),
            Self::Packed(queue) => queue.waiting(most),
        }
    }

    /// Tells the driver that no kick is needed. This is only a hint.
    ///
    /// # Errors
    /// As [`SplitQueue::disable_kick`].
    #[inline]
    pub fn disable_kick(&mut self) -> Result<(), RingError> {
        either!(self, queue => queue.disable_kick())
    }

    /// Where the queue is, to be started again from there once it is drained.
    #[must_use]
    pub const fn state(&self) -> QueueState {
        either!(self, queue => queue.state())
    }

    /// Number of requests popped and not pushed as used.
    #[must_use]
    #[inline]
    pub const fn in_flight(&self) -> u16 {
        either!(self, queue => queue.in_flight())
    }

    /// Number of requests pushed as used and not published.
    #[must_use]
    #[inline]
    pub const fn unpublished(&self) -> u16 {
        either!(self, queue => queue.unpublished())
    }

    /// Whatever got lost before the start, 0 for a queue that was drained: see [`SplitQueue::undelivered`] (requests)
    /// and [`PackedQueue::undelivered`] (descriptors).
    #[must_use]
    pub fn undelivered(&self) -> u16 {
        either!(self, queue => queue.undelivered())
    }

    /// Number of entries of the ring.
    #[must_use]
    pub const fn size(&self) -> u16 {
        either!(self, queue => queue.size())
    }

    /// The protocol violation that stopped the ring; `None` while there is none.
    #[must_use]
    pub const fn broken(&self) -> Option<RingError> {
        either!(self, queue => queue.broken())
    }
}
