//! The device side of a packed ring.

pub(super) mod layout;
mod logged;
mod recover;
mod requests;

use self::layout::{FLAGS, Place};
use self::requests::Requests;
use super::error::Latch;
use super::in_order::{InOrder, Run};
use super::indirect::Window;
use super::inflight::{Log, LogError, LogMemory, MaybeLog, NoLog, Stored};
use super::layout::{DESCRIPTOR, Descriptor, INDIRECT, NEXT, WRITE};
use super::{Area, Chain, Memory, RingError};
use crate::features::Features;
use crate::vq::QueueState;

pub use self::layout::area_sizes;

/// The device side of a packed ring (virtio 1.2 section 2.8).
///
/// Used like [`SplitQueue`](super::split::SplitQueue): by one thread at a time, and no method blocks. The driver is hostile
/// and runs concurrently, so each descriptor is read once, checked, and then used. The work of one call is bounded by the
/// descriptors the driver may use, or by 65536 for an indirect table.
///
/// The device side numbers its requests itself, below the size of the ring ([`Chain::head`]). Buffer ids are chosen by the
/// driver, can be any 16 bits, and are only copied back.
///
/// With `IN_ORDER` the device may still complete requests in any order. They are published in the order of availability,
/// and one used descriptor stands for a run of them.
#[derive(Debug)]
pub struct PackedQueue<A: Area, L: MaybeLog = NoLog> {
    desc: A,
    driver: A,
    device: A,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// Next descriptor to pop.
    next_avail: Place,
    /// Next descriptor to write as used.
    next_used: Place,
    /// First descriptor that the driver does not see as used. Its flags are stored last, so that a batch becomes visible at
    /// once.
    published: Place,
    /// The flags to store there, while `published` is not `next_used`.
    held_flags: u16,
    /// The position at which the notification suppression was last checked; `None` if the driver must be notified.
    signalled: Option<Place>,
    /// Whether the last publication still needs a decision about its notification.
    undecided: bool,
    requests: Requests,
    order: Option<InOrder>,
    log: L,
    broken: Latch,
}

/// A chain whose buffers were collected.
struct Walked {
    id: u16,
    /// Of the ring.
    descriptors: u16,
    /// The table, if it has one.
    table: Option<Stored>,
}

impl<A: Area> PackedQueue<A> {
    /// Starts a ring at `state`; the driver area is only read, the descriptor and device areas are read and written.
    ///
    /// Descriptors between the two positions of `state` were popped before the start and are never completed; see
    /// [`undelivered`](Self::undelivered).
    ///
    /// Indirect descriptors are followed even if `RING_INDIRECT_DESC` was not negotiated; see
    /// [`refuse_unnegotiated_indirect`](Self::refuse_unnegotiated_indirect).
    ///
    /// # Errors
    /// [`RingError::PackedSize`], [`RingError::NotPacked`], [`RingError::SplitState`], [`RingError::AreaSize`];
    /// [`RingError::Place`] for a state that no ring of this size can have.
    pub fn new(
        size: u16,
        features: Features,
        desc: A,
        driver: A,
        device: A,
        state: QueueState,
    ) -> Result<Self, RingError> {
        layout::check(size, features, &desc, &driver, &device)?;
        let QueueState::Packed { last_avail_idx, last_avail_wrap, last_used_idx, last_used_wrap } = state
        else {
            return Err(RingError::SplitState);
        };
        let next_avail = Place { index: last_avail_idx, wrap: last_avail_wrap };
        let next_used = Place { index: last_used_idx, wrap: last_used_wrap };
        let possible = next_avail.index < size
            && next_used.index < size
            && next_avail.since(next_used, size) <= u32::from(size);
        if !possible {
            return Err(RingError::Place { avail: last_avail_idx, used: last_used_idx, size });
        }
        let mut order = features.has(Features::IN_ORDER).then(|| InOrder::new(size));
        if let Some(order) = &mut order
            && next_avail != next_used
        {
            order.stall();
        }
        Ok(Self {
            desc,
            driver,
            device,
            size,
            event_idx: features.has(Features::RING_EVENT_IDX),
            indirect: true,
            next_avail,
            next_used,
            published: next_used,
            held_flags: 0,
            signalled: None,
            undecided: false,
            requests: Requests::new(size),
            order,
            log: NoLog,
            broken: Latch::default(),
        })
    }

    /// Keeps a log of the requests in flight in `memory`, which is made empty, as an [`inflight`](super::inflight) one.
    ///
    /// To be called before the first request is taken. [`undelivered`](Self::undelivered) descriptors are noted as never
    /// to be answered.
    ///
    /// # Errors
    /// [`LogError::Room`].
    pub fn with_log<M: LogMemory>(
        mut self,
        memory: M,
        features: Features,
    ) -> Result<PackedQueue<A, Log<M>>, LogError> {
        let used = self.next_used.count(self.size);
        let log = Log::format(memory, self.size, features, used, self.undelivered())?;
        self.requests.divide();
        Ok(self.replace_log(log))
    }
}

impl<A: Area, L: MaybeLog> PackedQueue<A, L> {
    /// Treats an indirect descriptor as a violation unless `features` has `RING_INDIRECT_DESC`.
    #[must_use]
    pub fn refuse_unnegotiated_indirect(mut self, features: Features) -> Self {
        self.indirect = features.has(Features::RING_INDIRECT_DESC);
        self
    }

    /// Counts `count` requests as [in flight](Self::in_flight) that are never completed: those of the
    /// [`undelivered`](Self::undelivered) descriptors. For a device that continues a ring that it has used before.
    #[must_use]
    pub fn with_in_flight(mut self, count: u16) -> Self {
        self.requests.in_flight = count.min(self.undelivered());
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
        self.broken.check()?;
        let result = self.take(memory, chain);
        self.broken.record(result)
    }

    /// Returns the last popped request to the ring, so that the next pop returns it again.
    ///
    /// Only the last popped request can be returned, and only before it is pushed as used.
    ///
    /// # Errors
    /// [`RingError::NotInFlight`] when the request is not in flight.
    pub fn abandon(&mut self, chain: &Chain) -> Result<(), RingError> {
        let slot = self.requests.get(chain.head)?;
        if let Some(log) = self.log.get()
            && !log.put_back(chain.head, slot.descriptors)
        {
            return Err(RingError::NotInFlight { head: chain.head });
        }
        self.requests.release(chain.head)?;
        if let Some(order) = &mut self.order {
            order.remove_last();
        }
        self.next_avail = self.next_avail.back(slot.descriptors, self.size);
        self.requests.in_flight -= 1;
        Ok(())
    }

    /// Writes the used descriptor of a request: `len` bytes were written into its writable buffers.
    ///
    /// Requests may complete in any order, each once. The driver sees the completion after [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`RingError::NotInFlight`] when no such request is in flight, a bug of the device. After a fault the call
    /// may be repeated.
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        let slot = self.requests.get(head)?;
        if let Some(order) = &mut self.order {
            order.complete(head, len);
            self.requests.mark_pushed(head);
        } else {
            self.write_used(head, slot.id, len, slot.descriptors)?;
            self.release(head)?;
            self.requests.written += 1;
        }
        self.requests.in_flight -= 1;
        self.requests.unpublished += 1;
        Ok(())
    }

    /// Publishes all pushed requests with one store of the flags of the first used descriptor; returns whether the driver must
    /// be notified.
    ///
    /// The first call after the start returns `true` unless the driver disabled events, because a notification from
    /// before the start may have been lost.
    ///
    /// # Errors
    /// [`RingError::Fault`]; the call may be repeated, and no notification is lost.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if self.order.is_some() {
            self.write_runs()?;
        }
        if self.published != self.next_used {
            self.show()?;
            self.published = self.next_used;
            self.requests.unpublished -= std::mem::take(&mut self.requests.written);
            self.undecided = true;
        }
        if !self.undecided {
            return Ok(false);
        }
        // Pairs with the driver's barrier between its request for a notification and its load of the next descriptor
        // (virtio 1.2 section 2.8.21.3): one of the two sees the other.
        self.desc.barrier();
        let old = self.signalled.take();
        let notify = layout::wants_event(&self.driver, self.event_idx, self.size, old, self.published)?;
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
        layout::ask_event(&self.device, self.event_idx, self.next_avail)?;
        // Pairs with the driver's barrier between its flags and its load of the kick suppression.
        self.desc.barrier();
        let result = self.available();
        Ok(self.broken.record(result)?.is_some())
    }

    /// Whether a request is available. For a device that busy-polls the ring with kicks disabled.
    ///
    /// # Errors
    /// [`RingError::Fault`], or the violation that was found before.
    #[inline]
    pub fn has_request(&mut self) -> Result<bool, RingError> {
        self.broken.check()?;
        let result = self.available();
        Ok(self.broken.record(result)?.is_some())
    }

    /// Number of requests that can be popped now, at most `most`. Reads each of their descriptors. If the driver changes
    /// them afterwards, only this number becomes wrong.
    ///
    /// # Errors
    /// [`RingError::Fault`], or the violation that was found before.
    pub fn waiting(&self, most: u16) -> Result<u16, RingError> {
        self.broken.check()?;
        let mut at = self.next_avail;
        let mut count = 0;
        for _ in 0..self.room() {
            if count == most {
                break;
            }
            let flags = self.desc.load_u16(at.offset() + FLAGS)?;
            if !at.is_available(flags) {
                break;
            }
            count += u16::from(flags & NEXT == 0);
            at = at.forward(1, self.size);
        }
        Ok(count)
    }

    /// Tells the driver that no kick is needed. This is only a hint: kicks may still come.
    ///
    /// # Errors
    /// [`RingError::Fault`].
    #[inline]
    pub fn disable_kick(&mut self) -> Result<(), RingError> {
        layout::refuse_events(&self.device).map_err(RingError::from)
    }

    /// The position of the queue. Once it is drained (no request in flight, all published) both positions are the same,
    /// unless the queue started with [`undelivered`](Self::undelivered) descriptors.
    #[must_use]
    pub const fn state(&self) -> QueueState {
        QueueState::Packed {
            last_avail_idx: self.next_avail.index,
            last_avail_wrap: self.next_avail.wrap,
            last_used_idx: self.next_used.index,
            last_used_wrap: self.next_used.wrap,
        }
    }

    /// Number of requests popped and not pushed as used, 0 to `size`.
    #[must_use]
    #[inline]
    pub const fn in_flight(&self) -> u16 {
        self.requests.in_flight
    }

    /// Number of requests pushed as used and not published; with `IN_ORDER` this includes those that wait for an earlier
    /// request.
    #[must_use]
    #[inline]
    pub const fn unpublished(&self) -> u16 {
        self.requests.unpublished
    }

    /// Number of descriptors popped before the start and never completed: 0 if the queue was drained when its state was
    /// saved. They are lost for the driver, which the device should report to its user.
    #[must_use]
    pub fn undelivered(&self) -> u16 {
        let lost =
            self.next_avail.since(self.next_used, self.size).saturating_sub(self.requests.descriptors());
        u16::try_from(lost).unwrap_or(self.size)
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

    /// Loads the flags of the next descriptor; returns them if it is available.
    #[inline]
    fn available(&self) -> Result<Option<u16>, RingError> {
        let flags = self.desc.load_u16(self.next_avail.offset() + FLAGS)?;
        if !self.next_avail.is_available(flags) {
            return Ok(None);
        }
        if self.room() == 0 {
            return Err(RingError::Room { head: self.next_avail.index, room: 0 });
        }
        Ok(Some(flags))
    }

    /// Number of descriptors that the driver may have made available and that are not popped. It may use those that it sees as
    /// used.
    #[inline]
    const fn room(&self) -> u32 {
        (self.size as u32).saturating_sub(self.next_avail.since(self.published, self.size))
    }

    #[inline]
    fn take<M: Memory>(&mut self, memory: &M, chain: &mut Chain) -> Result<bool, RingError> {
        let Some(flags) = self.available()? else { return Ok(false) };
        chain.reset(self.next_avail.index);
        let Walked { id, descriptors, table } = self.walk(memory, flags, chain)?;
        let head = chain.head;
        // There are as many request numbers as descriptors, so one is always free here.
        let name = self.requests.take(id, descriptors).ok_or(RingError::Room { head, room: 0 })?;
        self.log_taken(name, id, descriptors, table, chain);
        if let Some(order) = &mut self.order {
            order.add(name, chain.writable().len());
        }
        chain.head = name;
        self.next_avail = self.next_avail.forward(descriptors, self.size);
        Ok(true)
    }

    /// Collects the buffers of the chain at `next_avail`, whose first flags were read.
    #[inline]
    fn walk<M: Memory>(&self, memory: &M, flags: u16, chain: &mut Chain) -> Result<Walked, RingError> {
        let mut at = self.next_avail;
        let mut first = Some(flags);
        let room = self.room();
        let mut bytes = 0;
        for descriptors in 1..=self.size {
            if u32::from(descriptors) > room {
                break;
            }
            let mut raw = [0; DESCRIPTOR];
            self.desc.read(at.offset(), &mut raw)?;
            let mut descriptor = layout::parse(raw);
            // The flags of the first descriptor were checked already. They are not read again, since they may have changed.
            descriptor.flags = first.take().unwrap_or(descriptor.flags);
            if descriptor.flags & INDIRECT != 0 {
                self.walk_indirect(memory, descriptor, descriptors, chain)?;
                let table = Stored { addr: descriptor.addr, len: descriptor.len, flags: INDIRECT };
                return Ok(Walked { id: descriptor.next, descriptors, table: Some(table) });
            }
            chain.push(descriptor)?;
            bytes += u64::from(descriptor.len);
            if descriptor.flags & NEXT == 0 {
                chain.check(bytes)?;
                return Ok(Walked { id: descriptor.next, descriptors, table: None });
            }
            at = at.forward(1, self.size);
        }
        Err(RingError::Room { head: chain.head, room })
    }

    /// Collects the buffers of an indirect table: all of its descriptors, in order (virtio 1.2 section 2.8.7).
    fn walk_indirect<M: Memory>(
        &self,
        memory: &M,
        table: Descriptor,
        descriptors: u16,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        let head = chain.head;
        if !self.indirect {
            return Err(RingError::Indirect { head, reason: "indirect descriptors were not negotiated" });
        }
        if descriptors > 1 || table.flags & NEXT != 0 {
            return Err(RingError::Indirect {
                head,
                reason: "an indirect descriptor must be alone in its chain",
            });
        }
        let mut window = Window::new(table.addr, table.len)?;
        if table.len / 16 > window.entries() {
            return Err(RingError::IndirectSize { len: table.len });
        }
        let mut bytes = 0;
        for index in 0..window.entries() {
            let descriptor = layout::parse(window.descriptor(memory, index)?);
            if descriptor.flags & INDIRECT != 0 {
                return Err(RingError::Indirect { head, reason: "an indirect table refers to another one" });
            }
            // In indirect tables all flags but WRITE are reserved (virtio 1.2 section 2.8.7).
            chain.push(Descriptor { flags: descriptor.flags & WRITE, ..descriptor })?;
            bytes += u64::from(descriptor.len);
        }
        chain.check(bytes)
    }

    /// Writes the completed requests that no uncompleted request precedes.
    fn write_runs(&mut self) -> Result<(), RingError> {
        while let Some(Run { count, name, written }) = self.order.as_ref().and_then(InOrder::run) {
            let id = self.requests.slot(name).id;
            let names = self.order.iter().flat_map(|order| order.names(count));
            let descriptors = names.map(|name| self.requests.slot(name).descriptors).sum();
            self.write_used(name, id, written, descriptors)?;
            for _ in 0..count {
                let Some(name) = self.order.as_ref().and_then(|order| order.names(1).next()) else { break };
                self.release(name)?;
                self.order.iter_mut().for_each(|order| order.drop_first(1));
            }
            self.requests.written += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
