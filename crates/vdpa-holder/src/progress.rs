//! Progress of a daemon, in memory that its holder reads.
//!
//! Each thread that serves somebody has a counter, which is odd while the thread works and even while it sleeps.
//! The holder looks at the counters a few times in the time a hang may last; a counter that is odd and has not changed for that
//! long belongs to a thread that hangs. The daemon makes no system call and needs no clock for it, and an idle daemon is
//! never woken.
//!
//! A thread of the daemon calls [`watch`] when it begins, and [`idle`] and [`busy`] around each sleep. A sleep is whatever ends
//! without the help of this process: for a client, the kernel or a disk. Otherwise a disk that does not answer would end the
//! daemon, and all its other devices with it.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::thread::gettid;
use vdpa_core::Errno;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};

/// Threads of a daemon that can have a counter.
pub const THREADS_MAX: usize = 1024;
/// Bytes from one counter to the next: a cache line, so that threads do not disturb each other.
const STRIDE: usize = 64;
/// Behind a counter is the id of its thread; 0 where it is not known.
const THREAD: usize = 8;
const SIZE: usize = THREADS_MAX * STRIDE;

/// The memory, as the daemon has it.
#[derive(Clone, Debug)]
pub struct Progress {
    map: SharedMap,
    used: Arc<Mutex<Vec<bool>>>,
}

/// The counter of one thread.
#[derive(Debug)]
pub struct Counter {
    progress: Progress,
    index: usize,
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
        let map = SharedMap::map(fd, 0, SIZE, Prot::RW, false)?;
        Ok(Self { map, used: Arc::default() })
    }

    /// A counter for the calling thread, that no other thread has; `None` when [`THREADS_MAX`] threads have one.
    #[must_use]
    pub fn counter(&self) -> Option<Counter> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let free = used.iter().position(|used| !used);
        let index = free.unwrap_or(used.len());
        match used.get_mut(index) {
            Some(used) => *used = true,
            None if index < THREADS_MAX => used.push(true),
            None => return None,
        }
        let count = self.map.load_u64(index * STRIDE).unwrap_or(0);
        let thread = u64::try_from(gettid().as_raw_nonzero().get()).unwrap_or(0);
        self.map.store_u64(index * STRIDE + THREAD, thread).ok()?;
        let progress = self.clone();
        // A former thread may have ended in the middle of its work.
        let mut counter = Counter { progress, index, count };
        counter.idle();
        Some(counter)
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
        // It lies in the mapping: `Progress::counter` gives out no other.
        let _ = self.progress.map.store_u64(self.index * STRIDE, count);
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.idle();
        let mut used = self.progress.used.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(used) = used.get_mut(self.index) {
            *used = false;
        }
    }
}

/// The memory of this process: it has one holder at most.
static PROGRESS: OnceLock<Progress> = OnceLock::new();

thread_local! {
    static COUNTER: RefCell<Option<Counter>> = const { RefCell::new(None) };
}

/// Has the progress of this process's threads shown in `progress`, for threads that [`watch`] from now on. Once; a second call
/// does nothing.
pub fn install(progress: Progress) {
    let _ = PROGRESS.set(progress);
}

/// The calling thread is watched until this is dropped.
#[derive(Debug)]
pub struct Watch(PhantomData<*const ()>);

/// Has the holder watch the calling thread, which is busy from now on. Does nothing without a holder.
#[must_use]
pub fn watch() -> Watch {
    let counter = PROGRESS.get().and_then(Progress::counter);
    COUNTER.with_borrow_mut(|own| *own = counter);
    busy();
    Watch(PhantomData)
}

/// The calling thread works, or has got on: one store. Nothing for a thread that is not watched.
#[inline]
pub fn busy() {
    COUNTER.with_borrow_mut(|counter| counter.as_mut().map(Counter::busy));
}

/// The calling thread goes to sleep, for as long as it takes.
#[inline]
pub fn idle() {
    COUNTER.with_borrow_mut(|counter| counter.as_mut().map(Counter::idle));
}

impl Drop for Watch {
    fn drop(&mut self) {
        COUNTER.with_borrow_mut(|counter| *counter = None);
    }
}

/// The memory, as the holder has it.
#[derive(Debug)]
pub(crate) struct Watched {
    map: SharedMap,
    /// Counters that were odd, their values, and since when those have not changed.
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

    /// Begins to look anew: what was seen is no measure any more.
    pub(crate) fn forget(&mut self) {
        self.seen.clear();
    }

    /// The thread that has been busy for `limit_ns` without a change of its counter, and does not wait for something outside its
    /// process, `waits` says; 0 for one whose id is not known. Allocates only while counters are busy.
    pub(crate) fn stalled(&mut self, now_ns: u64, limit_ns: u64, waits: impl Fn(u64) -> bool) -> Option<u64> {
        let map = &self.map;
        let count = |counter: usize| map.load_u64(counter * STRIDE).unwrap_or(0);
        self.seen.retain(|&(counter, seen, _)| count(counter) == seen);
        for counter in 0..THREADS_MAX {
            let now = count(counter);
            if now & 1 == 1 && !self.seen.iter().any(|&(other, ..)| other == counter) {
                self.seen.push((counter, now, now_ns));
            }
        }
        let late = self.seen.iter().filter(|&&(.., since)| now_ns.saturating_sub(since) >= limit_ns);
        late.map(|&(counter, ..)| map.load_u64(counter * STRIDE + THREAD).unwrap_or(0))
            .find(|&thread| !waits(thread))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Watched {
        /// For how long the thread that has been busy longest without a change has been so, up to a second.
        fn stalled_ns(&mut self, now_ns: u64) -> u64 {
            (0..=1000)
                .rev()
                .find(|&limit| limit == 0 || self.stalled(now_ns, limit, |_| false).is_some())
                .unwrap_or(0)
        }
    }

    #[test]
    fn only_busy_threads_without_a_change_stall() {
        let (fd, mut watched) = Progress::create().unwrap();
        let progress = Progress::map(fd).unwrap();
        let (mut a, mut b) = (progress.counter().unwrap(), progress.counter().unwrap());
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

    #[test]
    fn a_thread_that_waits_for_others_does_not_hang() {
        let (fd, mut watched) = Progress::create().unwrap();
        let mut counter = Progress::map(fd).unwrap().counter().unwrap();
        counter.busy();
        let own = u64::try_from(gettid().as_raw_nonzero().get()).unwrap();
        assert_eq!(watched.stalled(0, 10, |_| false), None);
        assert_eq!(watched.stalled(9, 10, |_| false), None);
        assert_eq!(watched.stalled(10, 10, |thread| thread == own), None);
        assert_eq!(watched.stalled(10, 10, |thread| thread != own), Some(own));
    }

    #[test]
    fn counters_are_given_out_once_and_again_after_their_thread() {
        let (fd, _) = Progress::create().unwrap();
        let progress = Progress::map(fd).unwrap();
        let mut all: Vec<_> = (0..THREADS_MAX).map(|_| progress.counter().unwrap()).collect();
        assert!(progress.counter().is_none());
        let freed = all.swap_remove(17).index;
        assert_eq!(progress.counter().unwrap().index, freed);
    }

    #[test]
    fn a_thread_is_watched_between_watch_and_its_drop() {
        let (fd, mut watched) = Progress::create().unwrap();
        idle();
        install(Progress::map(fd).unwrap());
        busy();
        assert_eq!((watched.stalled_ns(10), watched.stalled_ns(20)), (0, 0), "not watched yet");
        let watch = watch();
        assert_eq!((watched.stalled_ns(30), watched.stalled_ns(40)), (0, 10));
        idle();
        assert_eq!((watched.stalled_ns(50), watched.stalled_ns(60)), (0, 0));
        busy();
        assert_eq!((watched.stalled_ns(70), watched.stalled_ns(80)), (0, 10));
        drop(watch);
        assert_eq!((watched.stalled_ns(90), watched.stalled_ns(100)), (0, 0));
    }
}
