//! The device side of a split ring.

mod logged;
mod recover;

use super::error::Latch;
use super::in_order::{InOrder, Run};
use super::indirect::Window;
use super::inflight::{MaybeLog, NoLog};
use super::layout::{self, Descriptor, FLAGS, INDEX, INDIRECT, NEXT, SUPPRESS};
use super::{Area, Chain, Memory, RingError};
use crate::crash_points::{CrashPoint, reach};
use crate::features::Features;
use crate::vq::QueueState;

pub(super) use self::recover::add_all;
pub use super::layout::{AreaSizes, SIZE_MAX, area_sizes};

/// The device side of a split ring (virtio 1.2 section 2.7).
///
/// Used by one thread at a time; no method blocks. The driver is hostile and runs concurrently, so every index and
/// descriptor is read once, checked, and then used. The work of one call is bounded by the ring size, or by 65536 descriptors for an
/// indirect table.
///
/// ```text
///             pop             push_used              publish
/// available ------> in flight ---------> unpublished -------> used
/// ```
///
/// With `IN_ORDER` the device may still complete requests in any order. They are published in the order of availability,
/// and one used element stands for a run of them.
///
/// After a protocol violation every later [`pop`](Self::pop) and [`enable_kick`](Self::enable_kick) returns the
/// same error; requests in flight can still be completed. A [`Fault`](RingError::Fault) changes
/// nothing, and the call may be repeated; `pop` at the next kick (uapi-spec 6.1).
#[derive(Debug)]
pub struct SplitQueue<A: Area, L: MaybeLog = NoLog> {
    desc: A,
    avail: A,
    used: A,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// Next entry of the available ring.
    next_avail: u16,
    /// The available index as last read, so that a batch costs one read. Equal to `next_avail` once the ring is broken, so
    /// that `pop` needs no separate check while it knows of a request.
    avail_seen: u16,
    /// Next entry of the used ring.
    next_used: u16,
    /// End of the used elements in memory. With `IN_ORDER` it is behind `next_used` while requests wait for an earlier one.
    written: u16,
    /// The used index in memory, which the driver sees.
    published: u16,
    /// The used index at which the notification suppression was last checked. `None` before the first check and after a
    /// failed one: then the driver must be notified (the kernel's `signalled_used_valid`).
    signalled: Option<u16>,
    /// Whether the last publication still needs a decision about its notification.
    undecided: bool,
    undelivered: u16,
    order: Option<InOrder>,
    log: L,
    broken: Latch,
}

impl<A: Area> SplitQueue<A> {
    /// Starts a ring at `state`.
    ///
    /// `avail` and `desc` are only read, `used` is read and written. The used index starts at the available index
    /// of `state`, because a queue is drained before it stops; as in the kernel's simulator (uapi-spec 6.1) the
    /// index in memory is overwritten by the first publication. Where the two differ, see
    /// [`undelivered`](Self::undelivered).
    ///
    /// Indirect descriptors are followed even if `RING_INDIRECT_DESC` was not negotiated, as in `vringh`; see
    /// [`refuse_unnegotiated_indirect`](Self::refuse_unnegotiated_indirect).
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Features`], [`RingError::PackedState`], [`RingError::AreaSize`]; a fault
    /// when the used ring cannot be read.
    pub fn new(
        size: u16,
        features: Features,
        desc: A,
        avail: A,
        used: A,
        state: QueueState,
    ) -> Result<Self, RingError> {
        layout::check(size, features, &desc, &avail, &used)?;
        let QueueState::Split { avail_index } = state else {
            return Err(RingError::PackedState);
        };
        let undelivered = avail_index.wrapping_sub(used.load_u16(INDEX)?);
        Ok(Self {
            desc,
            avail,
            used,
            size,
            event_idx: features.has(Features::RING_EVENT_IDX),
            indirect: true,
            next_avail: avail_index,
            avail_seen: avail_index,
            next_used: avail_index,
            written: avail_index,
            published: avail_index,
            signalled: None,
            undecided: false,
            undelivered,
            order: features.has(Features::IN_ORDER).then(|| InOrder::new(size)),
            log: NoLog,
            broken: Latch::default(),
        })
    }
}

impl<A: Area, L: MaybeLog> SplitQueue<A, L> {
    /// Treats an indirect descriptor as a violation unless `features` has `RING_INDIRECT_DESC`.
    #[must_use]
    pub fn refuse_unnegotiated_indirect(mut self, features: Features) -> Self {
        self.indirect = features.has(Features::RING_INDIRECT_DESC);
        self
    }

    /// Counts `count` requests as popped before the start, whether or not they are completed later: the used index starts
    /// `count` entries behind.
    ///
    /// For a device that continues a ring that it has used before. `count` is limited to the size of the ring.
    #[must_use]
    pub fn with_in_flight(mut self, count: u16) -> Self {
        self.next_used = self.next_avail.wrapping_sub(count.min(self.size));
        (self.written, self.published) = (self.next_used, self.next_used);
        if let Some(order) = &mut self.order
            && self.next_used != self.next_avail
        {
            order.stall();
        }
        self
    }

    /// Pops the next available request into `chain`; `false` when there is none.
    ///
    /// When it returns `false` or an error, `chain` is unspecified.
    ///
    /// # Errors
    /// A [`RingError::Fault`] leaves the request in the ring: call again at the next kick. All other errors are protocol
    /// violations of the driver and are returned by every later call.
    #[inline]
    pub fn pop<M: Memory>(&mut self, memory: &M, chain: &mut Chain) -> Result<bool, RingError> {
        if !self.has_request()? {
            return Ok(false);
        }
        let result = self.take(memory, chain);
        self.keep(result).map(|()| true)
    }

    /// Returns the last popped request to the ring, so that the next pop returns it again: the kernel's `vringh_abandon`.
    ///
    /// For a device that cannot access a buffer of the request. Only the last popped request can be returned, and only
    /// before it is pushed as used.
    ///
    /// # Errors
    /// [`RingError::NotInFlight`] when no request is in flight.
    pub fn abandon(&mut self, chain: &Chain) -> Result<(), RingError> {
        if self.in_flight() == 0 {
            return Err(RingError::NotInFlight { head: chain.head });
        }
        if let Some(log) = self.log.get()
            && !log.put_back(chain.head, 1)
        {
            return Err(RingError::NotInFlight { head: chain.head });
        }
        if let Some(order) = &mut self.order {
            order.remove_last();
        }
        self.next_avail = self.next_avail.wrapping_sub(1);
        if self.broken.violation().is_some() {
            self.avail_seen = self.next_avail;
        }
        Ok(())
    }

    /// Writes the used element of a request: `len` bytes were written into its writable buffers.
    ///
    /// Requests may complete in any order, each once. The driver sees the completion after [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`RingError::NotInFlight`] when no request is in flight, [`RingError::DescriptorIndex`] for a head outside
    /// the ring: bugs of the device. After a fault the call may be repeated.
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        if head >= self.size {
            return Err(self.outside(head));
        }
        if self.in_flight() == 0 {
            return Err(RingError::NotInFlight { head });
        }
        if let Some(log) = self.log.get()
            && !log.is_taken(head)
        {
            return Err(RingError::NotInFlight { head });
        }
        if let Some(order) = &mut self.order {
            if !order.complete(head, len) {
                return Err(RingError::NotInFlight { head });
            }
        } else {
            self.write_logged(self.next_used, head, len, 1)?;
        }
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Publishes all pushed requests with one store of the used index; returns whether the driver must be notified.
    ///
    /// The first call after the start returns `true` (unless the driver set `NO_INTERRUPT`), because a notification
    /// from before the start may have been lost.
    ///
    /// # Errors
    /// [`RingError::Fault`]; the call may be repeated, and no notification is lost.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if self.order.is_some() {
            self.write_runs()?;
        }
        let written = if self.order.is_some() { self.written } else { self.next_used };
        if self.published != written {
            self.used.store_u16(INDEX, written)?;
            self.published = written;
            self.undecided = true;
            reach(CrashPoint::UsedPublished);
            if let Some(log) = self.log.get() {
                log.publish();
            }
            reach(CrashPoint::PublishedLogged);
        }
        if !self.undecided {
            return Ok(false);
        }
        // Pairs with the driver's barrier between its request for a notification and its load of the used index
        // (virtio 1.2 section 2.7.8.2): one of the two sees the other.
        self.used.barrier();
        let old = self.signalled.take();
        let notify = if self.event_idx {
            let event = self.avail.load_u16(layout::used_event(self.size))?;
            old.is_none_or(|old| layout::need_event(event, self.published, old))
        } else {
            self.avail.load_u16(FLAGS)? & SUPPRESS == 0
        };
        self.signalled = Some(self.published);
        self.undecided = false;
        Ok(notify)
    }

    /// Asks the driver to kick when it makes the next request available. Returns whether a request is available already, for
    /// which no kick may come.
    ///
    /// Call it before sleeping; when it returns `true`, process the ring again instead.
    ///
    /// # Errors
    /// [`RingError::Fault`], or the violation that was found before.
    #[inline]
    pub fn enable_kick(&mut self) -> Result<bool, RingError> {
        self.broken.check()?;
        if self.event_idx {
            self.used.store_u16(layout::avail_event(self.size), self.next_avail)?;
        } else {
            self.used.store_u16(FLAGS, 0)?;
        }
        // Pairs with the driver's barrier between its available index and its load of the kick suppression.
        self.used.barrier();
        let result = self.refresh();
        self.keep(result)
    }

    /// Whether a request is available. For a device that busy-polls the ring with kicks disabled.
    ///
    /// # Errors
    /// [`RingError::Fault`], or the violation that was found before.
    #[inline]
    pub fn has_request(&mut self) -> Result<bool, RingError> {
        if self.avail_seen != self.next_avail {
            return Ok(true);
        }
        self.look_again()
    }

    /// Number of requests that can be popped now, 0 to `size`.
    ///
    /// # Errors
    /// [`RingError::Fault`], or the violation that was found before.
    #[inline]
    pub fn waiting(&mut self) -> Result<u16, RingError> {
        self.broken.check()?;
        let result = self.refresh();
        self.keep(result)?;
        Ok(self.avail_seen.wrapping_sub(self.next_avail))
    }

    /// Tells the driver that no kick is needed. This is only a hint: kicks may still come.
    ///
    /// With event indices nothing is stored: the driver has passed the last avail_event, and passes it again only after 65536
    /// requests.
    ///
    /// # Errors
    /// [`RingError::Fault`].
    #[inline]
    pub fn disable_kick(&mut self) -> Result<(), RingError> {
        if !self.event_idx {
            self.used.store_u16(FLAGS, SUPPRESS)?;
        }
        Ok(())
    }

    /// The position of the queue. A start from this position requires that the queue is drained: no request in flight, all
    /// published.
    #[must_use]
    pub const fn state(&self) -> QueueState {
        QueueState::Split { avail_index: self.next_avail }
    }

    /// Number of requests popped and not pushed as used, 0 to `size`.
    #[must_use]
    #[inline]
    pub const fn in_flight(&self) -> u16 {
        self.next_avail.wrapping_sub(self.next_used)
    }

    /// Number of requests pushed as used and not published; with `IN_ORDER` this includes those that wait for an earlier
    /// request.
    #[must_use]
    #[inline]
    pub const fn unpublished(&self) -> u16 {
        self.next_used.wrapping_sub(self.published)
    }

    /// How far the used index in memory was behind the start position: 0 if the queue was drained before. Otherwise so many
    /// requests were lost before the start, which the device should report to its user.
    #[must_use]
    pub const fn undelivered(&self) -> u16 {
        self.undelivered
    }

    /// Number of entries of the ring.
    #[must_use]
    pub const fn size(&self) -> u16 {
        self.size
    }

    /// The protocol violation that stopped the ring; `None` while there is none.
    #[must_use]
    pub const fn broken(&self) -> Option<RingError> {
        self.broken.violation()
    }

    /// The slow path of [`has_request`](Self::has_request), which reads memory. Not inlined, to keep the fast path small.
    #[inline(never)]
    fn look_again(&mut self) -> Result<bool, RingError> {
        self.broken.check()?;
        let result = self.refresh();
        self.keep(result)
    }

    /// Records a violation.
    #[inline]
    fn keep<T>(&mut self, result: Result<T, RingError>) -> Result<T, RingError> {
        let result = self.broken.record(result);
        if result.is_err() && self.broken.violation().is_some() {
            self.avail_seen = self.next_avail;
        }
        result
    }

    /// Loads the available index; returns whether requests are available.
    #[inline]
    fn refresh(&mut self) -> Result<bool, RingError> {
        let index = self.avail.load_u16(INDEX)?;
        // The driver may add up to `size` requests beyond the published used index, and can take none back.
        let room = self.published.wrapping_add(self.size).wrapping_sub(self.next_avail);
        let ahead = index.wrapping_sub(self.next_avail);
        if ahead > room {
            return Err(RingError::AvailIndex { index, first: self.next_avail, room });
        }
        self.avail_seen = index;
        Ok(ahead > 0)
    }

    #[inline]
    fn take<M: Memory>(&mut self, memory: &M, chain: &mut Chain) -> Result<(), RingError> {
        let head = self.avail.load_u16(layout::avail_entry(self.size, self.next_avail))?;
        chain.reset(head);
        self.walk(memory, chain)?;
        if let Some(order) = &mut self.order
            && !order.add(head, chain.writable().len())
        {
            return Err(RingError::Again { head });
        }
        reach(CrashPoint::ChainWalked);
        // Before the request can have any effect, and behind all that may still fail.
        if let Some(log) = self.log.get()
            && !log.take(head, 1)
        {
            return Err(RingError::Again { head });
        }
        reach(CrashPoint::TakenLogged);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    /// Writes the used element at `index` (free running).
    #[inline]
    fn write_used(&self, index: u16, head: u16, len: u32) -> Result<(), RingError> {
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        element[4..].copy_from_slice(&len.to_le_bytes());
        Ok(self.used.write(layout::used_entry(self.size, index), &element)?)
    }

    /// Writes the completed requests that no uncompleted request precedes, with one element per run
    /// (virtio 1.2 section 2.7.9).
    fn write_runs(&mut self) -> Result<(), RingError> {
        while let Some(Run { count, name, written }) = self.order.as_ref().and_then(InOrder::run) {
            self.write_logged(self.written, name, written, count)?;
            self.written = self.written.wrapping_add(count);
            if let Some(order) = &mut self.order {
                order.drop_first(count);
            }
        }
        Ok(())
    }

    #[inline]
    fn walk<M: Memory>(&self, memory: &M, chain: &mut Chain) -> Result<(), RingError> {
        let mut index = chain.head;
        if index >= self.size {
            return Err(self.outside(index));
        }
        let mut bytes = 0;
        for _ in 0..self.size {
            let descriptor = Descriptor::read(&self.desc, index)?;
            if descriptor.flags & INDIRECT != 0 {
                return self.walk_indirect(memory, descriptor, bytes, chain);
            }
            chain.push(descriptor)?;
            bytes += u64::from(descriptor.len);
            if descriptor.flags & NEXT == 0 {
                return chain.check(bytes);
            }
            index = descriptor.next;
            if index >= self.size {
                return Err(self.outside(index));
            }
        }
        Err(RingError::Loop { head: chain.head, entries: self.size.into() })
    }

    /// Collects the buffers of the indirect table that ends a chain (virtio 1.2 section 2.7.5.3); the chain has `bytes` bytes
    /// before it.
    fn walk_indirect<M: Memory>(
        &self,
        memory: &M,
        table: Descriptor,
        mut bytes: u64,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        let head = chain.head;
        if !self.indirect {
            return Err(RingError::Indirect { head, reason: "indirect descriptors were not negotiated" });
        }
        if table.flags & NEXT != 0 {
            return Err(RingError::Indirect { head, reason: "an indirect descriptor must end its chain" });
        }
        let mut window = Window::new(table.addr, table.len)?;
        let mut index = 0;
        for _ in 0..window.entries() {
            let descriptor = Descriptor::parse(window.descriptor(memory, index.into())?);
            if descriptor.flags & INDIRECT != 0 {
                return Err(RingError::Indirect { head, reason: "an indirect table refers to another one" });
            }
            chain.push(descriptor)?;
            bytes += u64::from(descriptor.len);
            if descriptor.flags & NEXT == 0 {
                return chain.check(bytes);
            }
            index = descriptor.next;
            window.check(index)?;
        }
        Err(RingError::Loop { head, entries: window.entries() })
    }

    #[cold]
    fn outside(&self, index: u16) -> RingError {
        RingError::DescriptorIndex { index: index.into(), entries: self.size.into() }
    }
}

#[cfg(test)]
mod tests;
