//! [`DeviceRing`]: the ring of a queue, with the in-flight log if its device keeps one.

mod areas;

use std::collections::VecDeque;

use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::features::Features;
use vdpa_core::ring::inflight::{Log, LogError, LogMemory, Repeat, log_size};
use vdpa_core::ring::{Chain, Memory, Ring, RingError};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::shared_words::SharedWords;
use vdpa_sys::snapshot::GuestArea;

use super::MemoryView;
use super::dirty::RingWrites;
use crate::suspect::Turn;
use areas::{areas, without_in_flight};

/// A request that this many processes had begun, and died, may be what ends them. It is begun while nothing else is in flight in its
/// queue, and no other such request in this process: if this process dies as well, it is known which one it was.
const SUSPECT: u8 = 2;
/// A request that this many processes had begun is not begun by another one. The last one had nothing else to do.
const ATTEMPTS_MAX: u8 = 3;

/// Words that the in-flight log of one queue needs at most, whichever format and size, up to `queue_size_max` entries, the
/// client chooses. For [`QueueControl::set_logs`](super::QueueControl::set_logs).
#[must_use]
pub const fn log_words(queue_size_max: u16) -> usize {
    // A packed ring needs more than a split one of the same size.
    log_size(queue_size_max, Features::of(&[Features::RING_PACKED])).div_ceil(size_of::<u64>())
}

/// Makes the memory of a log one in which there is no log ([`LogError::Absent`]), for a queue that does not run.
pub(super) fn clear_log(log: &SharedWords) {
    log.store(0, 0);
}

/// What [`DeviceRing::pop`] has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Popped {
    /// No request is available.
    None,
    /// A request, which the device does.
    Request,
    /// A request that three processes had begun and died of, the last one while nothing else was suspected. The device must not
    /// do it, and answers it with an error.
    Poison,
}

/// The device side of a queue's ring: a [`Ring`], with an in-flight log if the device
/// [has logs](super::QueueControl::set_logs).
///
/// After a crash it first returns the requests that the earlier process had taken and not answered, so a handler need not
/// know whether there is a log.
#[derive(Debug)]
pub struct DeviceRing {
    kind: Kind,
    writes: RingWrites,
}

#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "the one without a log, which is accessed without a pointer in between"
)]
enum Kind {
    Plain(Ring<GuestArea>),
    Logged(Box<Logged>),
}

/// A ring with a log.
#[derive(Debug)]
struct Logged {
    ring: Ring<GuestArea, Log<SharedWords>>,
    /// Requests to be repeated that were not popped, in order.
    repeats: VecDeque<Repeat>,
    /// Those that were popped and not completed.
    repeated: Vec<Repeat>,
    /// The queue is being stopped: only what is to be repeated is popped.
    stopping: bool,
    /// The suspect in flight, by name, with its turn. Nothing else is popped.
    alone: Option<(u16, Turn)>,
    /// A request was not popped because of one in flight.
    held_back: bool,
}

macro_rules! either {
    ($ring:expr, $inner:ident => $result:expr) => {
        match $ring {
            Kind::Plain($inner) => $result,
            Kind::Logged(logged) => {
                let $inner = &logged.ring;
                $result
            }
        }
    };
    (mut $ring:expr, $inner:ident => $result:expr) => {
        match $ring {
            Kind::Plain($inner) => $result,
            Kind::Logged(logged) => {
                let $inner = &mut logged.ring;
                $result
            }
        }
    };
}

impl DeviceRing {
    /// Starts a ring at `state`, of which `unanswered` requests were popped before and are never completed, with an empty
    /// log if there is memory for one.
    pub(super) fn new(
        setup: &QueueSetup<LinuxHost>,
        state: QueueState,
        unanswered: u16,
        log: Option<&SharedWords>,
        view: &MemoryView,
        writes: RingWrites,
    ) -> Result<Self, RingError> {
        let [desc, avail, used] = areas(setup, view, &writes)?;
        let state = if unanswered == 0 { without_in_flight(state, setup.size) } else { state };
        let ring = Ring::new(setup.size, setup.features, desc, avail, used, state)?;
        let ring = ring.with_in_flight(unanswered);
        let Some(log) = log else { return Ok(Self { kind: Kind::Plain(ring), writes }) };
        let ring = ring.with_log(log.clone(), setup.features).map_err(|error| match error {
            LogError::Ring(error) => error,
            _ => RingError::AreaSize {
                area: "in-flight log",
                size: log.words() * size_of::<u64>(),
                needed: log_size(setup.size, setup.features),
            },
        })?;
        Ok(Self::logged(ring, Vec::new(), writes))
    }

    /// Continues a ring from its log. To be published and signalled at once.
    pub(super) fn recover(
        setup: &QueueSetup<LinuxHost>,
        log: &SharedWords,
        view: &MemoryView,
        writes: RingWrites,
    ) -> Result<Self, LogError> {
        let areas = areas(setup, view, &writes)?;
        let (ring, repeats) = Ring::recover(setup.size, setup.features, areas, log.clone())?;
        writes.mark_ring(setup);
        Ok(Self::logged(ring, repeats, writes))
    }

    fn logged(ring: Ring<GuestArea, Log<SharedWords>>, repeats: Vec<Repeat>, writes: RingWrites) -> Self {
        let (repeats, repeated) = (repeats.into(), Vec::new());
        let (stopping, alone, held_back) = (false, None, false);
        let kind = Kind::Logged(Box::new(Logged { ring, repeats, repeated, stopping, alone, held_back }));
        Self { kind, writes }
    }

    /// Begins or ends to record what requests write, of which `in_flight` are being done.
    pub(super) fn set_tracking(&mut self, on: bool, in_flight: u16) {
        self.writes.set_tracking(on, in_flight);
    }

    /// Whether a request is in flight of which is not known what it writes, although that is recorded.
    pub(super) const fn has_unrecorded(&self) -> bool {
        self.writes.has_unrecorded()
    }

    /// Tells the client of a log of vhost what was marked.
    #[inline]
    pub(super) fn signal_log(&self) {
        self.writes.signal_log();
    }

    /// Marks what requests in flight may have written, since none of them is done any more.
    pub(super) fn mark_in_flight(&mut self) {
        self.writes.mark_in_flight();
    }

    /// Whether it has a log.
    pub(super) const fn has_log(&self) -> bool {
        matches!(self.kind, Kind::Logged(_))
    }

    /// Number of requests to be repeated that were not popped, or were returned.
    pub(super) fn repeats(&self) -> usize {
        match &self.kind {
            Kind::Plain(_) => 0,
            Kind::Logged(logged) => logged.repeats.len(),
        }
    }

    /// Whether the request with this head is to be repeated, and was not popped yet.
    #[must_use]
    pub fn is_repeated(&self, head: u16) -> bool {
        match &self.kind {
            Kind::Plain(_) => false,
            Kind::Logged(logged) => logged.repeats.iter().any(|repeat| repeat.head == head),
        }
    }

    /// From here on only requests to be repeated are popped.
    pub(super) fn stop(&mut self) {
        if let Kind::Logged(logged) = &mut self.kind {
            logged.stopping = true;
        }
    }

    /// Makes the log empty at the present position if requests are in flight that are never completed: a successor does not
    /// repeat them.
    pub(super) fn forget_in_flight(&mut self) {
        if let Kind::Logged(logged) = &mut self.kind
            && logged.ring.in_flight() > 0
        {
            logged.ring.restart_log();
        }
    }

    /// Pops the next request into `chain`: first those to be repeated, in the order in which they were taken, then those
    /// that are available.
    ///
    /// # Errors
    /// As [`Ring::pop`]. After a fault the same request is the next one.
    #[inline]
    pub fn pop<M: Memory>(&mut self, memory: &M, chain: &mut Chain) -> Result<Popped, RingError> {
        let popped = match &mut self.kind {
            Kind::Plain(ring) => ring.pop(memory, chain).map(found),
            Kind::Logged(logged) => logged.pop(memory, chain, false),
        }?;
        if popped != Popped::None {
            self.writes.popped(chain);
        }
        Ok(popped)
    }

    /// As [`pop`](Self::pop), for a request that is needed to do one that was popped from another queue: those two are begun
    /// together.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    pub fn pop_along<M: Memory>(&mut self, memory: &M, chain: &mut Chain) -> Result<Popped, RingError> {
        let popped = match &mut self.kind {
            Kind::Plain(ring) => ring.pop(memory, chain).map(found),
            Kind::Logged(logged) => logged.pop(memory, chain, true),
        }?;
        if popped != Popped::None {
            self.writes.popped(chain);
        }
        Ok(popped)
    }

    /// Whether the request that was popped last is begun alone, because processes may have died of it: no other is popped before it is
    /// completed.
    #[must_use]
    pub fn pops_alone(&self) -> bool {
        matches!(&self.kind, Kind::Logged(logged) if logged.alone.is_some())
    }

    /// Whether a request was not popped because of one that was in flight; asked when nothing is in flight any more.
    pub(super) fn take_held_back(&mut self) -> bool {
        match &mut self.kind {
            Kind::Plain(_) => false,
            Kind::Logged(logged) => std::mem::take(&mut logged.held_back),
        }
    }

    /// Returns the last popped request to the ring; it is the next one to be popped.
    ///
    /// # Errors
    /// As [`Ring::abandon`].
    pub fn abandon(&mut self, chain: &Chain) -> Result<(), RingError> {
        self.writes.ended(chain.head);
        match &mut self.kind {
            Kind::Plain(ring) => ring.abandon(chain),
            Kind::Logged(logged) => logged.abandon(chain),
        }
    }

    /// Completes the request that was popped as `head`, with `len` bytes written.
    ///
    /// # Errors
    /// As [`Ring::push_used`].
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        self.writes.ended(head);
        match &mut self.kind {
            Kind::Plain(ring) => ring.push_used(head, len),
            Kind::Logged(logged) => logged.push_used(head, len),
        }
    }

    /// As [`Ring::publish`].
    ///
    /// # Errors
    /// As there.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, RingError> {
        either!(mut &mut self.kind, ring => ring.publish())
    }

    /// As [`Ring::enable_kick`]; a request to be repeated counts as available.
    ///
    /// # Errors
    /// As there.
    #[inline]
    pub fn enable_kick(&mut self) -> Result<bool, RingError> {
        let available = either!(mut &mut self.kind, ring => ring.enable_kick())?;
        Ok(self.finds(available))
    }

    /// As [`Ring::disable_kick`].
    ///
    /// # Errors
    /// As there.
    #[inline]
    pub fn disable_kick(&mut self) -> Result<(), RingError> {
        either!(mut &mut self.kind, ring => ring.disable_kick())
    }

    /// As [`Ring::has_request`]; a request to be repeated counts as available.
    ///
    /// # Errors
    /// As there.
    #[inline]
    pub fn has_request(&mut self) -> Result<bool, RingError> {
        let available = either!(mut &mut self.kind, ring => ring.has_request())?;
        Ok(self.finds(available))
    }

    /// As [`Ring::waiting`]; requests to be repeated count.
    ///
    /// # Errors
    /// As there.
    #[inline]
    pub fn waiting(&mut self, most: u16) -> Result<u16, RingError> {
        let waiting = either!(mut &mut self.kind, ring => ring.waiting(most))?;
        match &self.kind {
            Kind::Plain(_) => Ok(waiting),
            Kind::Logged(logged) => Ok(logged.waiting(waiting).min(most)),
        }
    }

    /// As [`Ring::state`].
    #[must_use]
    pub fn state(&self) -> QueueState {
        either!(&self.kind, ring => ring.state())
    }

    /// As [`Ring::in_flight`]. Requests to be repeated are in flight.
    #[must_use]
    #[inline]
    pub fn in_flight(&self) -> u16 {
        either!(&self.kind, ring => ring.in_flight())
    }

    /// As [`Ring::unpublished`].
    #[must_use]
    #[inline]
    pub fn unpublished(&self) -> u16 {
        either!(&self.kind, ring => ring.unpublished())
    }

    /// As [`Ring::size`].
    #[must_use]
    pub fn size(&self) -> u16 {
        either!(&self.kind, ring => ring.size())
    }

    /// Whether `pop` finds a request, where the ring says that.
    #[inline]
    fn finds(&mut self, available: bool) -> bool {
        match &mut self.kind {
            Kind::Plain(_) => available,
            Kind::Logged(logged) => logged.finds(available),
        }
    }
}

impl Logged {
    #[inline]
    fn pop<M: Memory>(&mut self, memory: &M, chain: &mut Chain, along: bool) -> Result<Popped, RingError> {
        if !self.repeats.is_empty() || self.alone.is_some() {
            return self.pop_repeat(memory, chain, along);
        }
        if self.stopping { Ok(Popped::None) } else { self.ring.pop(memory, chain).map(found) }
    }

    #[cold]
    fn pop_repeat<M: Memory>(
        &mut self,
        memory: &M,
        chain: &mut Chain,
        along: bool,
    ) -> Result<Popped, RingError> {
        if self.must_wait() {
            self.held_back = true;
            return Ok(Popped::None);
        }
        let Some(&repeat) = self.repeats.front() else { return Ok(Popped::None) };
        // As for a new request: a driver that has broken the protocol gets nothing done any more.
        if let Some(violation) = self.ring.broken() {
            return Err(violation);
        }
        let suspect = is_suspect(repeat) && !along;
        if suspect && self.ring.unpublished() > 0 {
            // With IN_ORDER they would count as in flight. The device publishes them now, as it finds nothing.
            return Ok(Popped::None);
        }
        let turn = match suspect {
            // Tried again soon: other queues give it back within a second.
            true => Some(Turn::take()).filter(Option::is_some),
            false => Some(None),
        };
        let Some(turn) = turn else { return Ok(Popped::None) };
        if let Err(error) = self.ring.retake(repeat, memory, chain) {
            turn.into_iter().for_each(Turn::give_back);
            return Err(error);
        }
        self.alone = turn.map(|turn| (repeat.head, turn));
        reach(CrashPoint::RepeatTaken);
        self.repeats.pop_front();
        self.repeated.push(repeat);
        Ok(if repeat.attempts >= ATTEMPTS_MAX { Popped::Poison } else { Popped::Request })
    }

    /// Whether the next request must not be begun before one that is in flight in this queue has ended.
    fn must_wait(&self) -> bool {
        let begun = usize::from(self.ring.in_flight()) > self.repeats.len();
        self.alone.is_some() || begun && self.repeats.front().is_some_and(|&repeat| is_suspect(repeat))
    }

    #[inline]
    fn finds(&mut self, available: bool) -> bool {
        if self.repeats.is_empty() && self.alone.is_none() {
            return available && !self.stopping;
        }
        let waits = self.must_wait();
        self.held_back |= waits;
        !waits
    }

    /// The request `head` is in flight no more.
    fn ended(&mut self, head: u16) {
        if let Some((_, turn)) = self.alone.take_if(|(alone, _)| *alone == head) {
            turn.give_back();
        }
    }

    fn abandon(&mut self, chain: &Chain) -> Result<(), RingError> {
        let Some(place) = self.repeated.iter().position(|repeat| repeat.head == chain.head) else {
            return self.ring.abandon(chain);
        };
        let repeat = self.repeated.swap_remove(place);
        self.ended(chain.head);
        self.ring.put_back(repeat)?;
        self.repeats.push_front(repeat);
        Ok(())
    }

    #[inline]
    fn push_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        self.ring.push_used(head, len)?;
        if !self.repeated.is_empty() {
            self.repeated.retain(|repeat| repeat.head != head);
            self.ended(head);
        }
        Ok(())
    }

    fn waiting(&self, available: u16) -> u16 {
        let repeats = u16::try_from(self.repeats.len()).unwrap_or(u16::MAX);
        if self.stopping { repeats } else { available.saturating_add(repeats) }
    }
}

/// Whether it is to be begun alone.
const fn is_suspect(repeat: Repeat) -> bool {
    repeat.attempts >= SUSPECT && repeat.attempts < ATTEMPTS_MAX
}

#[inline]
const fn found(found: bool) -> Popped {
    if found { Popped::Request } else { Popped::None }
}
