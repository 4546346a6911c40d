//! Progress of a daemon, in memory that its holder reads.
//!
//! Each thread that serves somebody has a counter, which is odd while the thread works and even while it sleeps.
//! The holder looks at the counters a few times in the time a hang may last; a counter that is odd and has not changed for that
//! long belongs to a thread that hangs. The daemon makes no system call and needs no clock for it, and an idle daemon is
//! never woken.

use std::os::fd::{AsFd, OwnedFd};

use vdpa_core::Errno;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};

/// Threads of a daemon that can have a counter.
pub const THREADS_MAX: usize = 1024;
/// Bytes from one counter to the next: a cache line, so that threads do not disturb each other.
const STRIDE: usize = 64;
const SIZE: usize = THREADS_MAX * STRIDE;

/// The memory, as the daemon has it.
#[derive(Clone, Debug)]
pub struct Progress(SharedMap);

/// The counter of one thread.
#[derive(Debug)]
pub struct Counter {
    map: SharedMap,
    offset: usize,
    count: u64,
}

impl Progress {
    pub(crate) fn create() -> Result<(OwnedFd, Watched), Errno> {
        let fd = memfd::create(c"vdpa-progress", SIZE as u64, None)?;
        let map = SharedMap::map(&fd, 0, SIZE, Prot::RW, false)?;
        Ok((fd, Watched { map, seen: Vec::new(), total: 0 }))
    }

    /// Maps what came with the start message.
    ///
    /// # Errors
    /// Of mmap(2).
    pub fn map(fd: impl AsFd) -> Result<Self, Errno> {
        SharedMap::map(fd, 0, SIZE, Prot::RW, false).map(Self)
    }

    /// Counter `index`, below [`THREADS_MAX`]; each is to be had by one thread at a time.
    ///
    /// # Errors
    /// `EINVAL` for a larger index.
    pub fn counter(&self, index: usize) -> Result<Counter, Errno> {
        let offset = index.checked_mul(STRIDE).filter(|_| index < THREADS_MAX).ok_or(Errno::INVAL)?;
        let count = self.0.load_u64(offset).map_err(|_| Errno::INVAL)?;
        // A thread that ended in the middle of its work hangs no more.
        let mut counter = Counter { map: self.0.clone(), offset, count };
        counter.idle();
        Ok(counter)
    }
}

impl Counter {
    /// The thread begins to work, or has got on with it. To be called before a request is read, and often enough in work
    /// that takes long.
    #[inline]
    pub fn busy(&mut self) {
        self.set((self.count | 1).wrapping_add(if self.count & 1 == 1 { 2 } else { 0 }));
    }

    /// The thread goes to sleep.
    #[inline]
    pub fn idle(&mut self) {
        self.set(self.count.wrapping_add(self.count & 1));
    }

    fn set(&mut self, count: u64) {
        self.count = count;
        // The offset lies in the mapping: `Progress::counter` checked it.
        let _ = self.map.store_u64(self.offset, count);
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.idle();
    }
}

/// The memory, as the holder has it.
#[derive(Debug)]
pub(crate) struct Watched {
    map: SharedMap,
    /// Lanes that were busy, their counters, and since when those have not changed.
    seen: Vec<(usize, u64, u64)>,
    /// The sum of all counters when it was looked at last.
    total: u64,
}

impl Watched {
    pub(crate) fn from_fd(fd: impl AsFd) -> Result<Self, Errno> {
        Ok(Self { map: SharedMap::map(fd, 0, SIZE, Prot::RW, false)?, seen: Vec::new(), total: 0 })
    }

    /// Whether any counter has changed since this was called last.
    pub(crate) fn total_changed(&mut self) -> bool {
        let count = |counter: usize| self.map.load_u64(counter * STRIDE).unwrap_or(0);
        let total = (0..THREADS_MAX).map(count).fold(0, u64::wrapping_add);
        std::mem::replace(&mut self.total, total) != total
    }

    /// For how long the counter that has been busy longest without a change has been so, in ns. Allocates only while
    /// counters are busy.
    pub(crate) fn stalled_ns(&mut self, now_ns: u64) -> u64 {
        let map = &self.map;
        let count = |counter: usize| map.load_u64(counter * STRIDE).unwrap_or(0);
        self.seen.retain(|&(counter, seen, _)| count(counter) == seen);
        for counter in 0..THREADS_MAX {
            let now = count(counter);
            if now & 1 == 1 && !self.seen.iter().any(|&(other, ..)| other == counter) {
                self.seen.push((counter, now, now_ns));
            }
        }
        self.seen.iter().map(|&(.., since)| now_ns.saturating_sub(since)).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_busy_lanes_that_do_not_change_stall() {
        let (fd, mut watched) = Progress::create().unwrap();
        let progress = Progress::map(fd).unwrap();
        let (mut a, mut b) = (progress.counter(0).unwrap(), progress.counter(THREADS_MAX - 1).unwrap());
        assert!(progress.counter(THREADS_MAX).is_err());
        assert_eq!(watched.stalled_ns(1), 0);
        a.busy();
        b.busy();
        assert_eq!((watched.stalled_ns(10), watched.stalled_ns(30)), (0, 20));
        b.busy();
        assert_eq!(watched.stalled_ns(40), 30);
        a.idle();
        assert_eq!((watched.stalled_ns(50), watched.stalled_ns(60)), (10, 20));
        b.idle();
        assert_eq!(watched.stalled_ns(1000), 0);
        b.busy();
        drop(b);
        assert_eq!((watched.stalled_ns(1001), watched.stalled_ns(2000)), (0, 0));
    }
}
