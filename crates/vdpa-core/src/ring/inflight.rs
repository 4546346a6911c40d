//! A log of the requests that the device side has taken from a ring and not yet answered.
//!
//! The log is in memory that outlives the process, next to the ring itself. When the process dies, at any instruction,
//! its successor calls [`Ring::recover`](super::Ring::recover) with both, and continues where the ring was: every
//! request is answered exactly once in the ring. A request that was taken and not pushed as used is done again; one that
//! was pushed is not, even if the driver had not seen it yet.
//!
//! `docs/inflight-log.md` has the format and the order of stores with the reason for each. In short:
//!
//! | call | stores, in this order |
//! |---|---|
//! | `pop` | (packed: descriptors, id), then the state word `taken` |
//! | `push_used` | used element, then the state word `pushed`, then (packed) the flags of the descriptor |
//! | `publish` | used index or the flags held back, then the published count |
//!
//! The log alone decides what happened. The ring belongs to the client: nothing in it is trusted, and of a packed ring
//! one flag is read, with which a malicious driver can only lose or repeat its own requests.
//!
//! A store of this process that was executed is seen by the successor, because a process that is killed loses none of
//! them. So the only thing that must hold the order is the compiler: all stores have release ordering, which costs no
//! instruction on x86, and there is no fence.

mod error;
mod layout;
mod scan;
#[cfg(test)]
mod tests;
pub(super) mod wrong;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use error::LogError;
pub use layout::log_size;

use self::wrong::Wrong;
pub(super) use layout::{DESCRIPTORS, Stored};
use layout::{PUBLISHED, Shape, Slot, State};
pub(super) use scan::{Pushed, Taken};

use crate::features::Features;
use crate::ring::RingError;

/// A word of the header that a queue neither reads nor writes, for whoever keeps the memory.
pub const FREE_WORD: usize = 5;

/// Memory of a log: 64-bit words in the byte order of the machine, since the log never leaves it.
///
/// One thread of one process uses it at a time. The queue checks every index against [`words`](Self::words) when it is
/// given the memory; the number must not change afterwards.
pub trait LogMemory {
    /// Number of words.
    fn words(&self) -> usize;

    /// Loads a word, with acquire ordering. `word` is less than [`words`](Self::words); otherwise the result is 0.
    fn load(&self, word: usize) -> u64;

    /// Stores a word in one piece, with release ordering. Beyond the end, nothing happens.
    fn store(&self, word: usize, value: u64);
}

impl LogMemory for Arc<[AtomicU64]> {
    fn words(&self) -> usize {
        self.len()
    }

    #[inline]
    fn load(&self, word: usize) -> u64 {
        self.get(word).map_or(0, |word| word.load(Ordering::Acquire))
    }

    #[inline]
    fn store(&self, word: usize, value: u64) {
        if let Some(word) = self.get(word) {
            word.store(value, Ordering::Release);
        }
    }
}

/// Memory of a queue without a log: none.
#[derive(Clone, Copy, Debug)]
pub enum NoMemory {}

impl LogMemory for NoMemory {
    fn words(&self) -> usize {
        match *self {}
    }

    fn load(&self, _: usize) -> u64 {
        match *self {}
    }

    fn store(&self, _: usize, _: u64) {
        match *self {}
    }
}

/// What a queue has for a log: [`NoLog`], a [`Log`], or an `Option<Log>` where that is decided at run time.
pub trait MaybeLog {
    /// Memory of the log.
    type Memory: LogMemory;

    /// The log, if there is one.
    fn get(&mut self) -> Option<&mut Log<Self::Memory>>;
}

/// A queue without a log. Nothing of the log is compiled for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoLog;

impl MaybeLog for NoLog {
    type Memory = NoMemory;

    #[inline]
    fn get(&mut self) -> Option<&mut Log<NoMemory>> {
        None
    }
}

impl<M: LogMemory> MaybeLog for Log<M> {
    type Memory = M;

    #[inline]
    fn get(&mut self) -> Option<&mut Self> {
        Some(self)
    }
}

impl<M: LogMemory> MaybeLog for Option<Log<M>> {
    type Memory = M;

    #[inline]
    fn get(&mut self) -> Option<&mut Log<M>> {
        self.as_mut()
    }
}

/// A request that an earlier process had taken and not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repeat {
    /// Its name, as [`Chain::head`](super::Chain::head) has it; `push_used` answers it.
    pub head: u16,
    /// Processes that have begun it, at least 1. The one that recovers is counted by
    /// [`Ring::retake`](super::Ring::retake). From 63 on it stays.
    pub attempts: u8,
}

/// The log of one queue, as the queue writes it.
///
/// Positions are counted from the start of the log, in requests for a split ring and in descriptors for a packed one.
/// They have 56 bits and do not wrap; their remainder is the position in the ring.
#[derive(Debug)]
pub struct Log<M> {
    memory: M,
    shape: Shape,
    /// Position of the next request to take.
    avail: u64,
    /// Position behind the last request pushed as used.
    used: u64,
    /// Position behind the last request that the driver was shown.
    published: u64,
    /// Requests (split) or descriptors (packed) taken before the log began, which are never answered.
    lost: u16,
    /// Of the last push: where its state word is, what it was, and its count.
    last: (usize, u64, u16),
}

impl<M: LogMemory> Log<M> {
    /// Makes an empty log for a queue that has taken everything before `used` + `lost` and answered everything before
    /// `used`. Until the last store the memory is no log: a crash leaves [`LogError::Absent`].
    pub(super) fn format(
        memory: M,
        size: u16,
        features: Features,
        used: u64,
        lost: u16,
    ) -> Result<Self, LogError> {
        let shape = Shape::new(size, features);
        shape.check_room(&memory)?;
        layout::format(&memory, shape, used, lost);
        Ok(Self {
            memory,
            shape,
            avail: used + u64::from(lost),
            used,
            published: used,
            lost,
            last: (0, 0, 0),
        })
    }

    /// Makes the log empty at the present position, with all requests in flight counted as lost.
    pub(super) fn restart(&mut self) {
        let lost = u16::try_from(self.avail - self.used).unwrap_or(self.shape.size);
        layout::format(&self.memory, self.shape, self.used, lost);
        (self.published, self.lost) = (self.used, lost);
    }

    /// Notes that the request `name` was taken, which ends `count` positions further on; `false`, and nothing is noted,
    /// when it is in flight already.
    #[inline]
    pub(super) fn take(&mut self, name: u16, count: u16) -> bool {
        if !self.shape.in_order && !self.shape.packed && self.is_busy(name) {
            return false;
        }
        self.set(name, State::Taken, 1, self.avail);
        self.avail += u64::from(count);
        true
    }

    /// Notes that the request taken last was put back; `false` when `name` was not taken last.
    pub(super) fn put_back(&mut self, name: u16, count: u16) -> bool {
        let slot = self.slot(name);
        let start = self.avail.wrapping_sub(count.into());
        if slot.state != State::Taken || slot.position != start {
            return false;
        }
        self.set(name, State::Free, 0, 0);
        self.avail = start;
        true
    }

    /// Notes that the request `name`, and with `IN_ORDER` every one before it, is in the ring as used. That ends `count`
    /// positions further on.
    #[inline]
    pub(super) fn push(&mut self, name: u16, count: u16, wrote: bool) {
        self.last = (self.shape.slot(name), self.memory.load(self.shape.slot(name)), count);
        self.used += u64::from(count);
        self.set(name, if wrote { State::PushedWritten } else { State::Pushed }, 0, self.used);
    }

    /// Takes the last [`push`](Self::push) back: its used element could not be completed.
    pub(super) fn unpush(&mut self) {
        let (slot, word, count) = self.last;
        self.used -= u64::from(count);
        self.memory.store(slot, word);
    }

    /// Notes that the driver was shown everything pushed.
    #[inline]
    pub(super) fn publish(&mut self) {
        if self.published != self.used && !wrong::is(Wrong::NoPublished) {
            self.published = self.used;
            self.memory.store(PUBLISHED, self.used);
        }
    }

    /// Notes that `attempts` processes have begun the request `name`.
    ///
    /// # Errors
    /// [`RingError::NotInFlight`].
    pub(super) fn set_attempts(&mut self, name: u16, attempts: u8) -> Result<(), RingError> {
        let slot = self.slot(name);
        if !self.is_taken(name) {
            return Err(RingError::NotInFlight { head: name });
        }
        self.set(name, State::Taken, attempts, slot.position);
        Ok(())
    }

    /// Whether `name` was taken and not pushed.
    #[inline]
    pub(super) fn is_taken(&self, name: u16) -> bool {
        let slot = self.slot(name);
        slot.state == State::Taken && (!self.shape.in_order || slot.position >= self.used)
    }

    /// Whether the driver cannot have `name` for a new request.
    #[inline]
    fn is_busy(&self, name: u16) -> bool {
        let slot = self.slot(name);
        match slot.state {
            State::Free => false,
            State::Taken => true,
            State::Pushed | State::PushedWritten => slot.position > self.published,
        }
    }

    /// Writes a part of a packed request: up to [`DESCRIPTORS`] of its descriptors and the name of the next part.
    /// Before [`take`](Self::take), which makes them count.
    #[inline]
    pub(super) fn store_part(&self, name: u16, id: u16, count: u16, next: Option<u16>, part: &[Stored]) {
        layout::store_part(&self.memory, self.shape, name, (id, count, next), part);
    }

    /// The descriptors of a packed request, in order.
    pub(super) fn descriptors(&self, parts: &[u16], count: u16) -> Vec<Stored> {
        let all = parts.iter().flat_map(|&name| layout::load_part(&self.memory, self.shape, name));
        all.take(count.into()).collect()
    }

    pub(super) const fn used(&self) -> u64 {
        self.used
    }

    pub(super) const fn avail(&self) -> u64 {
        self.avail
    }

    pub(super) const fn lost(&self) -> u16 {
        self.lost
    }

    pub(super) const fn published(&self) -> u64 {
        self.published
    }

    #[inline]
    fn slot(&self, name: u16) -> Slot {
        Slot::unpack(self.memory.load(self.shape.slot(name)))
    }

    #[inline]
    fn set(&self, name: u16, state: State, attempts: u8, position: u64) {
        self.memory.store(self.shape.slot(name), Slot { state, attempts, position }.pack());
    }
}
