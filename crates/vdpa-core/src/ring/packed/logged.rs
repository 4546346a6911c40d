//! Every store by which a packed queue and its in-flight log say the same.

use super::layout::{FLAGS, LEN};
use super::{DESCRIPTOR, INDIRECT, PackedQueue, WRITE};
use crate::crash_points::{CrashPoint, reach};
use crate::ring::inflight::wrong::{self, Wrong};
use crate::ring::inflight::{DESCRIPTORS, Log, LogMemory, MaybeLog, Stored};
use crate::ring::{Area, Buffer, Chain, RingError};

impl<A: Area, L: MaybeLog> PackedQueue<A, L> {
    /// Makes the log, if there is one, empty at the present position, and forgets the requests in flight; see
    /// [`Ring::restart_log`](crate::ring::Ring::restart_log).
    pub fn restart_log(&mut self) {
        if let Some(log) = self.log.get() {
            log.restart();
        }
    }

    /// Notes a request in the log, before it can have any effect.
    ///
    /// With its descriptors, since the ring does not keep them: the used descriptor of another request may be written
    /// over them, and the driver may then use the place again, while this one is still in flight.
    #[inline]
    pub(super) fn log_taken(
        &mut self,
        name: u16,
        id: u16,
        descriptors: u16,
        table: Option<Stored>,
        chain: &Chain,
    ) {
        reach(CrashPoint::ChainWalked);
        let Some(log) = self.log.get() else { return };
        if wrong::is(Wrong::TakenBeforeDescriptors) {
            log.take(name, descriptors);
        }
        let stored = |flags| move |buffer: &Buffer| Stored { addr: buffer.iova, len: buffer.len, flags };
        let mut all = table
            .into_iter()
            .chain(chain.readable.iter().map(stored(0)).filter(|_| table.is_none()))
            .chain(chain.writable.iter().map(stored(WRITE)).filter(|_| table.is_none()));
        let mut part = name;
        let mut left = usize::from(descriptors);
        loop {
            let mut list = [Stored { addr: 0, len: 0, flags: 0 }; DESCRIPTORS];
            let count = left.min(DESCRIPTORS);
            for (place, stored) in list.iter_mut().zip(all.by_ref().take(count)) {
                *place = stored;
            }
            left -= count;
            let next = if left > 0 { self.requests.extend(part) } else { None };
            log.store_part(part, id, descriptors, next, list.get(..count).unwrap_or(&list));
            let Some(next) = next else { break };
            part = next;
        }
        reach(CrashPoint::DescriptorsLogged);
        if !wrong::is(Wrong::TakenBeforeDescriptors) {
            log.take(name, descriptors);
        }
        reach(CrashPoint::TakenLogged);
    }

    /// Writes one used descriptor that stands for `descriptors` of the ring; `name` is the last of its requests.
    #[inline]
    pub(super) fn write_used(
        &mut self,
        name: u16,
        id: u16,
        len: u32,
        descriptors: u16,
    ) -> Result<(), RingError> {
        let at = self.next_used;
        let flags = at.used() | if len > 0 { WRITE } else { 0 };
        let mut raw = [0; DESCRIPTOR - LEN];
        raw[..4].copy_from_slice(&len.to_le_bytes());
        raw[4..6].copy_from_slice(&id.to_le_bytes());
        raw[6..].copy_from_slice(&flags.to_le_bytes());
        let first = at == self.published;
        if first {
            self.held_flags = flags;
        }
        if let Some(log) = self.log.get() {
            if wrong::is(Wrong::FlagsBeforeLog) && !first {
                self.desc.write(at.offset() + LEN, &raw)?;
                log.push(name, descriptors, len > 0);
            } else if wrong::is(Wrong::LogBeforeElement) {
                log.push(name, descriptors, len > 0);
                self.desc.write(at.offset() + LEN, &raw[..FLAGS - LEN])?;
            } else {
                // What the log calls pushed is shown to the driver by a successor, so length and id come first.
                self.desc.write(at.offset() + LEN, &raw[..FLAGS - LEN])?;
                reach(CrashPoint::UsedWritten);
                log.push(name, descriptors, len > 0);
                reach(CrashPoint::PushedLogged);
            }
            // A descriptor with its flags is seen by the driver as soon as it has seen the one before: so not before the
            // log says that the request is not to be done again.
            if !first && let Err(fault) = self.desc.store_u16(at.offset() + FLAGS, flags) {
                log.unpush();
                return Err(fault.into());
            }
        } else {
            let bytes = if first { &raw[..FLAGS - LEN] } else { &raw[..] };
            self.desc.write(at.offset() + LEN, bytes)?;
        }
        self.next_used = at.forward(descriptors, self.size);
        Ok(())
    }

    /// Shows the driver everything written.
    #[inline]
    pub(super) fn show(&mut self) -> Result<(), RingError> {
        if wrong::is(Wrong::PublishedBeforeFlags)
            && let Some(log) = self.log.get()
        {
            log.publish();
        }
        self.desc.store_u16(self.published.offset() + FLAGS, self.held_flags)?;
        reach(CrashPoint::UsedPublished);
        if let Some(log) = self.log.get() {
            // Behind the flags: a successor stores them if the count says that they may be missing.
            log.publish();
            self.requests.free_pushed();
        }
        reach(CrashPoint::PublishedLogged);
        Ok(())
    }

    /// Ends a request that was written as used.
    #[inline]
    pub(super) fn release(&mut self, name: u16) -> Result<(), RingError> {
        if self.log.get().is_some() && !wrong::is(Wrong::NameFreedAtPush) {
            self.requests.retire(name)
        } else {
            self.requests.release(name).map(drop)
        }
    }

    pub(super) fn replace_log<N: MaybeLog>(self, log: N) -> PackedQueue<A, N> {
        PackedQueue {
            desc: self.desc,
            driver: self.driver,
            device: self.device,
            size: self.size,
            event_idx: self.event_idx,
            indirect: self.indirect,
            next_avail: self.next_avail,
            next_used: self.next_used,
            published: self.published,
            held_flags: self.held_flags,
            signalled: self.signalled,
            undecided: self.undecided,
            requests: self.requests,
            order: self.order,
            log,
            broken: self.broken,
        }
    }
}

impl<A: Area, M: LogMemory> PackedQueue<A, Log<M>> {
    /// The descriptors of a request in flight, as the log has them.
    pub(super) fn logged(&self, name: u16, count: u16) -> Vec<Stored> {
        let parts: Vec<u16> = self.requests.parts(name).collect();
        let mut list = self.log.descriptors(&parts, count);
        // The log is not trusted: only flags that this side writes.
        list.iter_mut().for_each(|stored| stored.flags &= WRITE | INDIRECT);
        list
    }
}
