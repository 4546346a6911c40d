//! [`Queues`]: the running queues of a device, with what a handler needs to serve them.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use vdpa_core::iotlb::Table;
use vdpa_core::ring::RingError;
use vdpa_core::ring::inflight::LogError;
use vdpa_core::types::{Asid, Result};
use vdpa_sys::dirty::DirtyMemory;
use vdpa_sys::uring::{FixedIoVec, Op, Registrar, Ring, SubmitError};

use super::queue::Queue;
use super::{Invalidation, MemoryView, Shared, Size};
use crate::rate::RateLimit;

/// What a completion belongs to, packed into the 64-bit user data of io_uring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The poll of the eventfd that announces messages to the thread.
    Wake,
    /// The poll of a queue's kick eventfd.
    Kick {
        device: u16,
        queue: u16,
        /// Below 2^28.
        generation: u32,
    },
    /// An operation that a handler submitted.
    Io {
        device: u16,
        /// As the handler chose it.
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

/// The running queues of a device, with their translations and the io_uring of the thread.
///
/// The worker thread passes it to each method of [`QueueHandler`](super::QueueHandler). A handler [takes](Self::take) a queue
/// out of its slot while it serves it, so that it can use several queues and the other methods at the same time, and
/// [puts](Self::put) it back before it returns. A queue that is not put back is lost: its stop returns as for one that does
/// not run. No method blocks.
pub struct Queues {
    name: String,
    /// Number of the device on its thread.
    device: u16,
    thread: Thread,
    /// The translation of each address space, by asid.
    views: Vec<Arc<MemoryView>>,
    /// The translation of an address space in which nothing is mapped.
    unmapped: Arc<MemoryView>,
    slots: Vec<Option<Queue>>,
    shared: Arc<Shared>,
    /// What requests write is recorded.
    tracking: bool,
    log_limit: RateLimit,
}

/// What all devices of a thread share. A clone is the same.
#[derive(Clone)]
pub(super) struct Thread {
    pub(super) uring: Rc<RefCell<Ring>>,
    /// The last generation given out: a late completion of a removed device is never taken for one of a device that has got its
    /// number.
    pub(super) generation: Rc<Cell<u32>>,
    /// The thread will busy-poll before it sleeps.
    pub(super) busy_poll: Rc<Cell<bool>>,
    /// Another process uses the ring, or may do so: nothing is submitted, and no kick is polled.
    pub(super) parked: Rc<Cell<bool>>,
}

impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queues").field("name", &self.name).field("slots", &self.slots).finish_non_exhaustive()
    }
}

impl Queues {
    pub(super) fn new(name: String, device: u16, thread: Thread, size: Size, shared: Arc<Shared>) -> Self {
        let unmapped = Arc::new(MemoryView::new(&Table::default()));
        Self {
            name,
            device,
            thread,
            views: vec![Arc::clone(&unmapped); size.address_spaces],
            unmapped,
            slots: (0..size.queues).map(|_| None).collect(),
            tracking: shared.dirty.is_of_requests(),
            shared,
            log_limit: RateLimit::per_second(5),
        }
    }

    /// Name of the device, for the log.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Number of queues of the device, running or not.
    #[must_use]
    pub fn count(&self) -> u16 {
        to_u16(self.slots.len())
    }

    /// Takes a running queue out of its slot, to serve it; `None` when it does not run or was taken.
    #[inline]
    pub fn take(&mut self, index: u16) -> Option<Queue> {
        self.slots.get_mut(usize::from(index)).and_then(Option::take)
    }

    /// Puts a queue that was [taken](Self::take) back into its slot.
    #[inline]
    pub fn put(&mut self, index: u16, queue: Queue) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            *slot = Some(queue);
        }
    }

    /// A running queue that is in its slot.
    #[inline]
    pub fn get_mut(&mut self, index: u16) -> Option<&mut Queue> {
        self.slots.get_mut(usize::from(index)).and_then(Option::as_mut)
    }

    /// Takes each queue that [has work](Queue::has_work) out of its slot, and has `serve` serve it up to a budget; it says whether the
    /// queue may have more. What a handler does in [`serve`](super::QueueHandler::serve), unless it needs several queues at once. After an
    /// error of a ring the driver sees what was answered before, and [`ring_failed`](Self::ring_failed) decides.
    #[inline]
    pub fn serve_each(&mut self, serve: impl FnMut(&mut Self, u16, &mut Queue) -> Result<bool, RingError>) {
        self.serve_from(0, serve);
    }

    /// As [`serve_each`](Self::serve_each), beginning with the queue `first`: for a handler that may end a pass early, so that the queues
    /// take turns.
    #[inline]
    pub fn serve_from(
        &mut self,
        first: u16,
        mut serve: impl FnMut(&mut Self, u16, &mut Queue) -> Result<bool, RingError>,
    ) {
        let count = self.count();
        for index in (first.min(count)..count).chain(0..first.min(count)) {
            let Some(mut queue) = self.take(index) else { continue };
            if queue.has_work() {
                let more = match serve(self, index, &mut queue) {
                    Ok(more) => more,
                    Err(error) => {
                        // An error of a ring that cannot be accessed any more is the one below.
                        let _ = self.publish(&mut queue);
                        self.ring_failed(index, &mut queue, error)
                    }
                };
                queue.set_pending(more);
            }
            self.put(index, queue);
        }
    }

    /// Takes a queue out of its slot whose stop can be answered: none of its requests is in flight, and none is to be
    /// repeated that can be; `now` does not wait for the latter.
    pub(super) fn take_stopped(&mut self, index: u16, now: bool) -> Option<Queue> {
        let stopped = |queue: &mut Queue| {
            queue.stopping.is_some() && queue.in_flight == 0 && (now || !queue.has_work())
        };
        self.slots.get_mut(usize::from(index)).and_then(|slot| slot.take_if(stopped))
    }

    /// All running queues that are in their slots, in ascending order of their indexes.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Queue> {
        self.slots.iter_mut().flatten()
    }

    /// Whether a queue [has work](Queue::has_work).
    pub fn has_work(&self) -> bool {
        self.slots.iter().flatten().any(Queue::has_work)
    }

    /// The marks of what requests write, and whether that is recorded.
    pub(super) fn dirty(&self) -> (Arc<DirtyMemory>, bool) {
        (Arc::clone(&self.shared.dirty), self.tracking)
    }

    /// Begins or ends to record what requests write.
    pub(super) fn set_tracking(&mut self, on: bool) {
        self.tracking = on;
        self.iter_mut().for_each(|queue| queue.set_tracking(on));
    }

    /// Another process may have begun or ended the tracking.
    pub(super) fn refresh_tracking(&mut self) {
        if let Err(error) = self.shared.dirty.refresh() {
            tracing::error!(device = %self.name, "dirty pages are not tracked any more: {error}");
        }
        self.set_tracking(self.shared.dirty.is_of_requests());
    }

    /// Whether a request is being done of which is not known what it writes, although that is recorded.
    pub(super) fn has_unrecorded(&self) -> bool {
        self.slots.iter().flatten().any(Queue::has_unrecorded)
    }

    /// Whether requests of any queue are in flight.
    pub(super) fn in_flight(&self) -> bool {
        self.slots.iter().flatten().any(|queue| queue.in_flight > 0)
    }

    /// The present translation of the queue's address space. A request that is in flight when `serve` returns holds it, or
    /// [`MemoryView::memory`], until it completes.
    #[inline]
    pub fn view(&self, queue: &Queue) -> Arc<MemoryView> {
        // A start refuses a queue in an address space that the device does not have.
        Arc::clone(self.views.get(queue.setup.asid.0 as usize).unwrap_or(&self.unmapped))
    }

    /// Whether the device has this address space.
    pub(super) fn has_view(&self, asid: Asid) -> bool {
        (asid.0 as usize) < self.views.len()
    }

    /// Replaces the translation of one address space; one the device does not have is ignored. Queues whose rings are in
    /// removed memory pop no requests until their rings were [released](Self::release_removed_rings).
    pub(super) fn set_view(&mut self, invalidation: &Invalidation) {
        if let Some(place) = self.views.get_mut(invalidation.asid.0 as usize) {
            *place = Arc::clone(&invalidation.view);
        }
        let concerned = self.iter_mut().filter(|queue| queue.setup.asid == invalidation.asid);
        concerned.for_each(|queue| queue.ring_removed |= queue.uses(&invalidation.removed));
    }

    /// Releases the rings in removed memory whose queues have nothing in flight; whether all are released.
    pub(super) fn release_removed_rings(&mut self, asid: Asid) -> bool {
        let ring_removed = self.iter_mut().filter(|queue| queue.setup.asid == asid && queue.ring_removed);
        let mut all_released = true;
        for queue in ring_removed {
            if queue.in_flight == 0 {
                queue.release_ring();
            } else {
                all_released = false;
            }
        }
        all_released
    }

    /// Continues the rings from their logs for which that is to be done and that were not tried in vain since the last event.
    pub(super) fn recover_rings(&mut self) {
        if self.thread.parked.get() {
            return;
        }
        for index in (0..self.slots.len()).map(to_u16) {
            let wanted = |queue: &mut Queue| queue.recovering && queue.pending;
            let slot = self.slots.get_mut(usize::from(index));
            let Some(mut queue) = slot.and_then(|slot| slot.take_if(wanted)) else { continue };
            let view = self.view(&queue);
            match queue.recover(&view) {
                Ok(()) => {}
                Err(LogError::Ring(error)) if error.is_fault() => self.log_error(index, &error),
                Err(error) => {
                    tracing::error!(device = %self.name, queue = index, "cannot continue the queue: {error}");
                    self.count_request(index, 0, true);
                    self.shared.set_needs_reset();
                }
            }
            self.put(index, queue);
        }
    }

    /// The address space of a running queue that is in its slot.
    #[must_use]
    pub fn asid(&self, index: u16) -> Option<Asid> {
        self.slots.get(usize::from(index)).and_then(Option::as_ref).map(|queue| queue.setup.asid)
    }

    /// Registers files and buffers with the thread's io_uring, for operations that name them by slot.
    pub fn registrar(&self) -> Registrar {
        self.thread.uring.borrow().registrar()
    }

    /// Queues an operation for the thread's io_uring, which gets it after `serve` has returned.
    /// [`QueueHandler::complete`](super::QueueHandler::complete) is called with `slot` when it has completed; the handler
    /// chooses `slot`, and uses each for one operation at a time.
    ///
    /// # Errors
    /// [`SubmitError`], which has the errno and gives the operation's buffers back. `complete` is not called then.
    #[inline]
    pub fn submit(&mut self, op: Op, slot: u32) -> Result<(), SubmitError> {
        self.thread.uring.borrow_mut().submit(op, Token::Io { device: self.device, slot }.pack())
    }

    /// As [`submit`](Self::submit), for a read of the registered file `file`, from byte `offset` on, into registered memory
    /// (`IORING_OP_READ_FIXED`).
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
        self.thread.uring.borrow_mut().read_fixed(file, to, offset, token)
    }

    /// A number for a run of a queue.
    pub(super) fn next_generation(&self) -> u32 {
        let next = self.thread.generation.get().wrapping_add(1) & Token::GENERATION;
        self.thread.generation.set(next);
        next
    }

    /// Arms a multishot poll of a queue's kick eventfd. Does nothing while the thread is parked, after which
    /// [`LocalDevice`](super::device::LocalDevice) arms all polls.
    pub(super) fn poll(&mut self, fd: Arc<OwnedFd>, queue: u16, generation: u32) -> Result<()> {
        if self.thread.parked.get() {
            return Ok(());
        }
        let token = Token::Kick { device: self.device, queue, generation };
        self.thread
            .uring
            .borrow_mut()
            .submit(Op::PollMultishot { fd }, token.pack())
            .map_err(|error| error.errno())
    }

    /// Cancels the poll of the kick of a queue that is out of its slot.
    pub(super) fn cancel_poll(&mut self, index: u16, queue: &Queue) {
        let token = Token::Kick { device: self.device, queue: index, generation: queue.generation };
        if queue.setup.kick.is_some()
            && !self.thread.parked.get()
            && let Err(error) = self.thread.uring.borrow_mut().cancel(|found| found == token.pack())
        {
            // The poll stays armed; its generation tells its completions apart.
            tracing::debug!(device = %self.name, "kick poll not cancelled: {error}");
        }
    }

    /// Asks the kernel to cancel all operations of the device that are in flight.
    pub(super) fn cancel_requests(&mut self) {
        let own =
            |token| matches!(Token::unpack(token), Some(Token::Io { device, .. }) if device == self.device);
        if let Err(error) = self.thread.uring.borrow_mut().cancel(own) {
            tracing::debug!(device = %self.name, "requests not cancelled: {error}");
        }
    }

    /// Enables the driver's kick for a ring that was found empty; `true` when a request has arrived meanwhile, which is to be
    /// served without a kick. While the thread busy-polls, the kick stays disabled and the ring is checked instead. Does not
    /// block.
    ///
    /// # Errors
    /// [`RingError`], for [`ring_failed`](Self::ring_failed).
    pub fn wait_for_kick(&self, queue: &mut Queue, view: &Arc<MemoryView>) -> Result<bool, RingError> {
        queue.busy_polled = self.thread.busy_poll.get();
        let busy_polled = queue.busy_polled;
        let ring = queue.ring(view)?;
        if busy_polled { ring.has_request() } else { ring.enable_kick() }
    }

    /// Whether a queue has its kick disabled because the thread busy-polls its ring.
    pub(super) fn is_busy_polled(&self) -> bool {
        self.slots.iter().flatten().any(|queue| queue.busy_polled)
    }

    /// Checks the rings that are busy-polled; whether one has requests.
    pub(super) fn check_polled_rings(&mut self) -> bool {
        self.for_each_polled(Queue::check_polled_ring)
    }

    /// Enables the kicks of the rings that are busy-polled; whether one has got requests meanwhile.
    pub(super) fn enable_kicks(&mut self) -> bool {
        self.for_each_polled(Queue::enable_kick)
    }

    /// Calls `check` for each queue that is busy-polled and marks those that have requests; whether one has.
    fn for_each_polled(&mut self, check: impl Fn(&mut Queue) -> Result<bool, RingError>) -> bool {
        let mut found = false;
        for index in (0..self.slots.len()).map(to_u16) {
            let Some(queue) = self.slots.get_mut(usize::from(index)).and_then(Option::as_mut) else {
                continue;
            };
            if !queue.busy_polled {
                continue;
            }
            match check(queue) {
                Ok(false) => {}
                Ok(true) => {
                    queue.pending = true;
                    found = true;
                }
                Err(error) => {
                    queue.busy_polled = false;
                    if let Some(mut queue) = self.take(index) {
                        self.ring_failed(index, &mut queue, error);
                        self.put(index, queue);
                    }
                }
            }
        }
        found
    }

    /// Counts a completed request of queue `index` in its statistics: bytes of data in both directions, and whether it was
    /// completed with an error.
    #[inline]
    pub fn count_request(&self, index: u16, bytes: u64, failed: bool) {
        self.shared.counters.count(index, bytes, failed);
    }

    /// Counts a request that was refused because it is [poison](super::Popped::Poison), beside
    /// [`count_request`](Self::count_request).
    pub fn count_poison(&self, index: u16) {
        self.shared.counters.add(index, super::POISON, 1);
    }

    /// Adds to one of the counters of a queue that the device defines itself; `counter` is below
    /// [`OWN_COUNTERS`](super::OWN_COUNTERS). They survive as the others do.
    pub fn count_own(&self, index: u16, counter: usize, more: u64) {
        if counter < super::OWN_COUNTERS {
            self.shared.counters.add(index, super::OWN + counter, more);
        }
    }

    /// [Publishes](Self::publish) used descriptors on every queue.
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

    /// Publishes the used descriptors that were pushed, and signals the call eventfd unless the driver suppresses that.
    ///
    /// # Errors
    /// [`RingError`], for [`ring_failed`](Self::ring_failed).
    #[inline]
    pub fn publish(&self, queue: &mut Queue) -> Result<(), RingError> {
        queue.publish()
    }

    /// Handles an error of a ring, and returns `false`, for "no more requests". After a fault, which is memory that is not
    /// mapped, the queue is served again at the next kick. After any other error the driver has broken the protocol: the
    /// queue is not served until it is started again, and `DEVICE_NEEDS_RESET` is set (virtio 1.2 section 2.1.2).
    pub fn ring_failed(&self, index: u16, queue: &mut Queue, error: RingError) -> bool {
        if !error.is_fault() && !std::mem::replace(&mut queue.broken, true) {
            self.shared.set_needs_reset();
        }
        self.log_error(index, &error);
        false
    }

    /// Logs an error that the driver has caused, at most 5 per second and device.
    pub fn log_error(&self, queue: u16, error: &dyn fmt::Display) {
        if let Some(suppressed) = self.log_limit.allow() {
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
