//! [`QueueLogs`]: the memory of a device's in-flight logs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::ring::inflight::{FREE_WORD, LogMemory as _};
use vdpa_core::types::{QueueIndex, Result};
use vdpa_sys::dirty::DirtyMemory;
use vdpa_sys::shared_words::SharedWords;

use super::ring::clear_log;
use super::{COUNTERS, log_words};
use crate::persist::{DeviceNotes, NOTES, OWN_NOTES};

/// Entries of the largest ring (virtio 1.2 section 2.7).
const LARGEST_RING: u16 = 32768;

/// Words behind the notes: the number of the ring of the thread that serves the device, plus 1, a reserved one, and those of a front end.
const PLACE: usize = 8;

/// The first of them that is a front end's.
const FRONT: usize = 2;

/// Memory for the in-flight logs of one device, which a successor of this process continues from. Behind the logs are the
/// counters of each queue, the device's notes, and which thread serves the device.
#[derive(Clone, Debug)]
pub struct QueueLogs {
    memory: SharedWords,
    pub(super) recover: bool,
    dirty: Option<Arc<DirtyMemory>>,
}

impl QueueLogs {
    /// Words for each queue: enough for the largest ring there is. What is not used takes no memory.
    fn stride() -> usize {
        log_words(LARGEST_RING)
    }

    /// Memory for `queues` logs, which are empty.
    ///
    /// # Errors
    /// `EINVAL` without queues; of memfd_create(2) and mmap(2).
    pub fn create(queues: u16) -> Result<(OwnedFd, Self)> {
        if queues == 0 {
            return Err(Errno::INVAL);
        }
        let words = (Self::stride() + COUNTERS) * usize::from(queues) + NOTES + PLACE;
        let (fd, memory) = SharedWords::create(c"vdpa-in-flight", words)?;
        Ok((fd, Self { memory, recover: false, dirty: None }))
    }

    /// The same logs of a device that marks the pages it writes in `dirty`, which outlives this process as well.
    #[must_use]
    pub fn with_dirty(self, dirty: Arc<DirtyMemory>) -> Self {
        Self { dirty: Some(dirty), ..self }
    }

    pub(super) fn dirty(&self) -> Option<Arc<DirtyMemory>> {
        self.dirty.clone()
    }

    /// For how many queues there is something behind the logs; `None` for the memory of a program that had nothing there.
    fn queues(&self) -> Option<usize> {
        let words = self.memory.words().checked_sub(NOTES + PLACE)?;
        words.is_multiple_of(Self::stride() + COUNTERS).then_some(words / (Self::stride() + COUNTERS))
    }

    /// The counters of `queues` queues. Those of a program that had none end with this process.
    pub(super) fn counters(&self, queues: u16) -> Option<SharedWords> {
        let all = self.queues().filter(|&all| all >= usize::from(queues))?;
        self.memory.slice(all * Self::stride(), usize::from(queues) * COUNTERS)
    }

    /// The notes of the device; `None` for the memory of a program that had none.
    #[must_use]
    pub fn notes(&self) -> Option<DeviceNotes> {
        let at = self.queues()? * (Self::stride() + COUNTERS);
        self.memory.slice(at, NOTES).and_then(DeviceNotes::new)
    }

    /// The words of the notes, which tell the request in progress.
    pub(super) fn request(&self) -> Option<SharedWords> {
        let at = self.queues()? * (Self::stride() + COUNTERS);
        self.memory.slice(at, NOTES)
    }

    /// The words that the device counts in itself; `None` for the memory of a program that had none.
    pub(super) fn own_counters(&self) -> Option<SharedWords> {
        let at = self.queues()? * (Self::stride() + COUNTERS) + OWN_NOTES.start;
        self.memory.slice(at, OWN_NOTES.len())
    }

    /// The logs of a process that has died.
    ///
    /// # Errors
    /// As [`SharedWords::map`].
    pub fn reopen(fd: impl AsFd) -> Result<Self> {
        Ok(Self { memory: SharedWords::map(fd)?, recover: true, dirty: None })
    }

    /// The queue was to stand still when the process died: it starts at the position that it is given, and not from its log. Unless
    /// the process has died in a request that had started it: that one is not the request `last`, which the journal knows of, and is
    /// made again.
    pub fn forget(&self, index: QueueIndex, last: Option<u64>) {
        let Some(log) = self.log(index.0) else { return };
        let request = self.request().map_or(0, |words| DeviceNotes::request(&words));
        let started = request != 0 && log.load(FREE_WORD) == request && last != Some(request);
        if !started {
            clear_log(&log);
        }
    }

    fn log(&self, index: u16) -> Option<SharedWords> {
        self.memory.slice(usize::from(index) * Self::stride(), Self::stride())
    }

    /// One for each of `queues` queues.
    pub(super) fn split(&self, queues: u16) -> Result<Vec<SharedWords>> {
        (0..queues).map(|index| self.log(index).ok_or(Errno::INVAL)).collect()
    }

    /// The words in which a front end keeps what the next process needs: see
    /// [`KeptState`](crate::front::vduse::KeptState). `None` for the memory of a program that had none.
    #[must_use]
    pub fn front(&self) -> Option<SharedWords> {
        let at = self.queues()? * (Self::stride() + COUNTERS) + NOTES + FRONT;
        self.memory.slice(at, PLACE - FRONT)
    }

    /// The words that name the thread; `None` in logs of an early version, which had none.
    fn place(&self) -> Option<SharedWords> {
        let at = self.queues()? * (Self::stride() + COUNTERS) + NOTES;
        self.memory.slice(at, PLACE)
    }

    /// What the logs behind `fd` say of the thread that serves their device: a number that devices of one thread have in common;
    /// `None` if its ring is not kept.
    #[must_use]
    pub fn ring_of(fd: BorrowedFd<'_>) -> Option<u32> {
        Self::reopen(fd).ok()?.ring()
    }

    /// The number of the kept ring of the thread that served the device, if it was kept.
    pub(super) fn ring(&self) -> Option<u32> {
        u32::try_from(self.place()?.load(0).checked_sub(1)?).ok()
    }

    /// The device is served by the thread whose ring has this number; `None` for one whose ring is not kept.
    pub(super) fn set_ring(&self, number: Option<u32>) {
        if let Some(place) = self.place() {
            place.store(0, number.map_or(0, |number| u64::from(number) + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_of_a_device_is_found_again() {
        let (fd, logs) = QueueLogs::create(3).unwrap();
        let reopened = QueueLogs::reopen(&fd).unwrap();
        assert_eq!(reopened.ring(), None);
        logs.set_ring(Some(7));
        assert_eq!(reopened.ring(), Some(7));
        assert_eq!(reopened.split(3).unwrap().len(), 3);
        logs.split(3).unwrap().last().unwrap().store(QueueLogs::stride() - 1, u64::MAX);
        assert_eq!(reopened.ring(), Some(7), "a log does not reach the words behind");
        logs.set_ring(None);
        assert_eq!(reopened.ring(), None);
        // Without the words behind the logs, as they were at first.
        let (fd, _) = SharedWords::create(c"logs", QueueLogs::stride() * 2).unwrap();
        let early = QueueLogs::reopen(&fd).unwrap();
        early.set_ring(Some(1));
        assert_eq!((early.ring(), early.split(2).unwrap().len()), (None, 2));
    }
}
