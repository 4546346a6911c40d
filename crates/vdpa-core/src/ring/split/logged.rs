//! Every store by which a split queue and its in-flight log say the same, but for those of one line.

use super::SplitQueue;
use crate::crash_points::{CrashPoint, reach};
use crate::features::Features;
use crate::ring::inflight::wrong::{self, Wrong};
use crate::ring::inflight::{Log, LogError, LogMemory, MaybeLog};
use crate::ring::{Area, RingError};

impl<A: Area> SplitQueue<A> {
    /// Keeps a log of the requests in flight in `memory`, which is made empty, as an [`inflight`](crate::ring::inflight) one.
    ///
    /// To be called before the first request is taken. Requests of [`with_in_flight`](Self::with_in_flight) are noted as
    /// never to be answered.
    ///
    /// # Errors
    /// [`LogError::Room`].
    pub fn with_log<M: LogMemory>(
        self,
        memory: M,
        features: Features,
    ) -> Result<SplitQueue<A, Log<M>>, LogError> {
        let log = Log::format(memory, self.size, features, self.next_used.into(), self.in_flight())?;
        Ok(self.replace_log(log))
    }
}

impl<A: Area, L: MaybeLog> SplitQueue<A, L> {
    /// Makes the log, if there is one, empty at the present position: for a queue that is stopped. Requests in flight
    /// are forgotten, as by a reset, and a successor does not repeat them.
    ///
    /// A queue that was drained needs no call: its log is empty.
    pub fn restart_log(&mut self) {
        if let Some(log) = self.log.get() {
            log.restart();
        }
    }

    pub(super) fn replace_log<N: MaybeLog>(self, log: N) -> SplitQueue<A, N> {
        SplitQueue {
            desc: self.desc,
            avail: self.avail,
            used: self.used,
            size: self.size,
            event_idx: self.event_idx,
            indirect: self.indirect,
            next_avail: self.next_avail,
            avail_seen: self.avail_seen,
            next_used: self.next_used,
            written: self.written,
            published: self.published,
            signalled: self.signalled,
            undecided: self.undecided,
            undelivered: self.undelivered,
            order: self.order,
            log,
            broken: self.broken,
        }
    }

    /// Writes the used element at `index` and notes it in the log, for `count` requests of which `head` is the last.
    #[inline]
    pub(super) fn write_logged(
        &mut self,
        index: u16,
        head: u16,
        len: u32,
        count: u16,
    ) -> Result<(), RingError> {
        if wrong::is(Wrong::LogBeforeElement)
            && let Some(log) = self.log.get()
        {
            log.push(head, count, false);
            return self.write_used(index, head, len);
        }
        self.write_used(index, head, len)?;
        reach(CrashPoint::UsedWritten);
        // Behind the element: what the log calls pushed is shown to the driver by a successor. Before the used index:
        // what the driver has seen must not be done again.
        if let Some(log) = self.log.get() {
            log.push(head, count, false);
        }
        reach(CrashPoint::PushedLogged);
        Ok(())
    }
}
