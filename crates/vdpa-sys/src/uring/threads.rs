//! [`Threads`]: the requests of a [`Ring`](super::Ring) where the kernel does not allow io_uring: files are read and written by threads
//! with preadv(2) and pwritev(2), and what is polled is in an epoll instance. Slower, and nothing is pinned.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::fs::FallocateFlags;
use vdpa_core::Errno;

use super::{Buffers, Completion, Direction, File, Op, OwnedBuf, SubmitError, Wait, transfer_now};
use crate::errno::from_rustix;
use crate::eventfd::EventFd;

/// Threads at most. Further requests wait for one of them.
const THREADS_MAX: usize = 64;

/// Key of the event that tells of completions, among those of polls.
const DONE: u64 = u64::MAX;

/// A request that a thread carries out.
struct Job {
    token: u64,
    op: Op,
}

/// What the threads share with their owner.
#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    done: Vec<Completion>,
    /// Threads that there are, and those of them that wait for a job.
    threads: usize,
    idle: usize,
    /// No more jobs come.
    ends: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Signalled for each completion.
    event: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something that is polled.
struct Poll {
    token: u64,
    fd: Arc<OwnedFd>,
    once: bool,
}

/// See the module.
pub(super) struct Threads {
    epoll: OwnedFd,
    shared: Arc<Shared>,
    polls: HashMap<u64, Poll>,
    next: u64,
    /// Jobs whose completions were not taken.
    running: usize,
    /// Completions to be taken.
    ready: VecDeque<Completion>,
}

impl Threads {
    /// Without a thread: they are started when they are needed.
    ///
    /// # Errors
    /// `EMFILE`, `ENOMEM`.
    pub(super) fn new() -> Result<Self, Errno> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(from_rustix)?;
        let event = EventFd::new()?;
        let data = epoll::EventData::new_u64(DONE);
        epoll::add(&epoll, event.as_fd(), data, epoll::EventFlags::IN).map_err(from_rustix)?;
        let shared = Arc::new(Shared { queue: Mutex::default(), wake: Condvar::new(), event });
        let (polls, ready) = (HashMap::new(), VecDeque::new());
        Ok(Self { epoll, shared, polls, next: 0, running: 0, ready })
    }

    pub(super) fn in_flight(&self) -> usize {
        self.polls.len() + self.running + self.ready.iter().filter(|done| !done.more).count()
    }

    /// As [`Ring::submit`](super::Ring::submit); the request starts at once.
    pub(super) fn submit(&mut self, op: Op, token: u64) -> Result<(), SubmitError> {
        let started = match op {
            Op::PollMultishot { fd } => {
                self.poll(fd, token, epoll::EventFlags::IN | epoll::EventFlags::ET, false)
            }
            Op::PollOnce { fd, writable } => {
                let events = if writable { epoll::EventFlags::OUT } else { epoll::EventFlags::IN };
                self.poll(fd, token, events, true)
            }
            op => self.start(Job { token, op }),
        };
        started.map_err(|errno| SubmitError::Request { errno })
    }

    fn poll(
        &mut self,
        fd: Arc<OwnedFd>,
        token: u64,
        events: epoll::EventFlags,
        once: bool,
    ) -> Result<(), Errno> {
        let key = self.next;
        self.next += 1;
        epoll::add(&self.epoll, &*fd, epoll::EventData::new_u64(key), events).map_err(from_rustix)?;
        self.polls.insert(key, Poll { token, fd, once });
        Ok(())
    }

    fn start(&mut self, job: Job) -> Result<(), Errno> {
        let mut queue = self.shared.lock();
        if queue.idle <= queue.jobs.len() && queue.threads < THREADS_MAX {
            let shared = Arc::clone(&self.shared);
            match std::thread::Builder::new().name("io".into()).spawn(move || work(&shared)) {
                Ok(_) => queue.threads += 1,
                // The others do it.
                Err(_) if queue.threads > 0 => {}
                Err(error) => return Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN))),
            }
        }
        queue.jobs.push_back(job);
        drop(queue);
        self.running += 1;
        self.shared.wake.notify_one();
        Ok(())
    }

    /// As [`Ring::cancel`](super::Ring::cancel): polls, and what no thread has begun.
    pub(super) fn cancel(&mut self, wanted: impl Fn(u64) -> bool) {
        let cancelled = |token| Completion { token, result: Err(Errno::CANCELED), more: false, buffer: None };
        let polls: Vec<u64> =
            self.polls.iter().filter(|(_, poll)| wanted(poll.token)).map(|(key, _)| *key).collect();
        for key in polls {
            if let Some(poll) = self.end_poll(key) {
                self.ready.push_back(cancelled(poll.token));
            }
        }
        let mut queue = self.shared.lock();
        let (gone, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut queue.jobs).into_iter().partition(|job| wanted(job.token));
        queue.jobs = left.into();
        drop(queue);
        self.running -= gone.len();
        self.ready.extend(gone.into_iter().map(|job| cancelled(job.token)));
    }

    fn end_poll(&mut self, key: u64) -> Option<Poll> {
        let poll = self.polls.remove(&key)?;
        // Nothing to be done about an error: events of unknown keys are ignored.
        let _ = epoll::delete(&self.epoll, &*poll.fd);
        Some(poll)
    }

    /// Whether completions are there.
    pub(super) fn has_completions(&mut self) -> bool {
        self.collect();
        !self.ready.is_empty()
    }

    /// Takes what the threads have done.
    fn collect(&mut self) {
        let done = std::mem::take(&mut self.shared.lock().done);
        self.running -= done.len();
        self.ready.extend(done);
    }

    /// As [`Ring::submit_and_wait`](super::Ring::submit_and_wait). A wait may end early, without a completion.
    pub(super) fn wait(&mut self, want: usize, timeout: Option<Duration>) -> Result<(), Errno> {
        self.collect();
        let blocks = self.ready.len() < want;
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let limit = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let limit = if blocks { limit.as_ref() } else { Some(&none) };
        let mut events = Vec::with_capacity(64);
        match epoll::wait(&self.epoll, spare_capacity(&mut events), limit) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(from_rustix(error)),
        }
        for epoll::Event { flags, data } in events {
            let (key, flags) = (data.u64(), flags.bits());
            if key == DONE {
                let _ = self.shared.event.drain();
                continue;
            }
            let Some(Poll { token, once, .. }) = self.polls.get(&key) else { continue };
            let (token, more) = (*token, !once);
            if !more {
                self.end_poll(key);
            }
            self.ready.push_back(Completion { token, result: Ok(flags), more, buffer: None });
        }
        self.collect();
        Ok(())
    }

    pub(super) fn next_completion(&mut self) -> Option<Completion> {
        self.ready.pop_front()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // A thread owns what its request uses, and ends when that has ended.
        let mut queue = self.shared.lock();
        queue.jobs.clear();
        queue.ends = true;
        drop(queue);
        self.shared.wake.notify_all();
    }
}

impl AsFd for Threads {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threads").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

/// What each thread does.
fn work(shared: &Shared) {
    let mut queue = shared.lock();
    loop {
        if let Some(Job { token, op }) = queue.jobs.pop_front() {
            drop(queue);
            let (result, buffer) = carry_out(op);
            queue = shared.lock();
            queue.done.push(Completion { token, result, more: false, buffer });
            shared.event.signal();
        } else if queue.ends {
            return;
        } else {
            queue.idle += 1;
            queue = shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}

/// Carries out a request. Blocks.
fn carry_out(op: Op) -> (Result<u32, Errno>, Option<OwnedBuf>) {
    let count = |moved: usize| u32::try_from(moved).map_err(|_| Errno::INVAL);
    match op {
        Op::Read { file, buffers, offset } => transfer(&file, buffers, offset, Direction::Read),
        Op::Write { file, buffers, offset } => transfer(&file, buffers, offset, Direction::Write),
        Op::Fsync { file, data_only } => {
            let sync = if data_only { rustix::fs::fdatasync::<&OwnedFd> } else { rustix::fs::fsync };
            let done = open_file(&file).and_then(|file| sync(file).map_err(from_rustix));
            (done.and_then(|()| count(0)), None)
        }
        Op::Fallocate { file, mode, offset, len } => {
            let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
            let done = open_file(&file)
                .and_then(|file| rustix::fs::fallocate(file, mode, offset, len).map_err(from_rustix));
            (done.and_then(|()| count(0)), None)
        }
        // No files and no buffers are registered; polls are no jobs.
        Op::ReadFixed { .. } | Op::WriteFixed { .. } | Op::PollMultishot { .. } | Op::PollOnce { .. } => {
            (Err(Errno::INVAL), None)
        }
    }
}

fn open_file(file: &File) -> Result<&OwnedFd, Errno> {
    match file {
        File::Fd(fd) | File::Blocking(fd) => Ok(fd),
        File::Registered(_) => Err(Errno::BADF),
    }
}

fn transfer(
    file: &File,
    buffers: Buffers,
    offset: u64,
    direction: Direction,
) -> (Result<u32, Errno>, Option<OwnedBuf>) {
    let count = |moved: usize| u32::try_from(moved).map_err(|_| Errno::INVAL);
    let fd = match open_file(file) {
        Ok(fd) => fd,
        Err(errno) => return (Err(errno), None),
    };
    match buffers {
        Buffers::Guest(guest) => {
            let moved = transfer_now(fd, direction, Wait::Allowed, &guest.iovecs, &guest.memory, offset);
            (moved.and_then(count), None)
        }
        Buffers::Owned(mut buffer) => {
            let moved = loop {
                let moved = match direction {
                    Direction::Read => rustix::io::pread(fd, buffer.bytes_mut(), offset),
                    Direction::Write => rustix::io::pwrite(fd, &buffer, offset),
                };
                if moved != Err(rustix::io::Errno::INTR) {
                    break moved;
                }
            };
            (moved.map_err(from_rustix).and_then(count), Some(buffer))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const SOON: Option<Duration> = Some(Duration::from_secs(10));

    fn next(threads: &mut Threads) -> Completion {
        loop {
            match threads.next_completion() {
                Some(done) => return done,
                None => threads.wait(1, SOON).unwrap(),
            }
        }
    }

    #[test]
    fn files_are_read_written_and_flushed() {
        let mut threads = Threads::new().unwrap();
        let backing = tempfile::tempfile().unwrap();
        let file = || File::Fd(Arc::new(backing.try_clone().unwrap().into()));
        let buffers = Buffers::Owned(OwnedBuf::Vec(b"contents".to_vec()));
        threads.submit(Op::Write { file: file(), buffers, offset: 4096 }, 1).unwrap();
        let done = next(&mut threads);
        assert_eq!((done.token, done.result, done.more), (1, Ok(8), false));
        let mut found = [0; 8];
        backing.read_exact_at(&mut found, 4096).unwrap();
        assert_eq!(&found, b"contents");
        threads.submit(Op::Fsync { file: file(), data_only: true }, 2).unwrap();
        assert_eq!(next(&mut threads).result, Ok(0));
        let punch = Op::Fallocate { file: file(), mode: 0x3, offset: 4096, len: 4 };
        threads.submit(punch, 3).unwrap();
        assert_eq!(next(&mut threads).result, Ok(0));
        // Behind the end a read is short.
        let buffers = Buffers::Owned(OwnedBuf::Aligned(super::super::AlignedBuf::new(4096, 4096).unwrap()));
        threads.submit(Op::Read { file: file(), buffers, offset: 4096 }, 4).unwrap();
        let done = next(&mut threads);
        assert_eq!((done.token, done.result), (4, Ok(8)));
        assert_eq!(&done.buffer.unwrap()[..8], b"\0\0\0\0ents");
        threads.submit(Op::Fsync { file: File::Registered(0), data_only: false }, 5).unwrap();
        assert_eq!(next(&mut threads).result, Err(Errno::BADF));
        assert_eq!(threads.in_flight(), 0);
    }

    /// As io_uring does it: one completion for each signal of an eventfd that nobody reads.
    #[test]
    fn polls_complete_as_often_as_they_are_to() {
        let mut threads = Threads::new().unwrap();
        let event = EventFd::new().unwrap();
        event.signal();
        let fd = || Arc::new(event.as_fd().try_clone_to_owned().unwrap());
        threads.submit(Op::PollMultishot { fd: fd() }, 7).unwrap();
        for _ in 0..3 {
            let done = next(&mut threads);
            assert_eq!((done.token, done.result, done.more), (7, Ok(1), true));
            threads.wait(0, None).unwrap();
            assert!(threads.next_completion().is_none());
            event.signal();
        }
        assert!(next(&mut threads).more);
        let once = fd();
        threads.submit(Op::PollOnce { fd: Arc::clone(&once), writable: false }, 8).unwrap();
        let done = next(&mut threads);
        assert_eq!((done.token, done.more, Arc::strong_count(&once)), (8, false, 1));
        assert_eq!(threads.in_flight(), 1);
        threads.cancel(|token| token == 7);
        let done = next(&mut threads);
        assert_eq!((done.token, done.result, done.more), (7, Err(Errno::CANCELED), false));
        assert_eq!(threads.in_flight(), 0);
        threads.wait(1, Some(Duration::from_millis(10))).unwrap();
        assert!(threads.next_completion().is_none());
    }

    #[test]
    fn many_requests_at_a_time() {
        let mut threads = Threads::new().unwrap();
        let backing = tempfile::tempfile().unwrap();
        let fd: Arc<OwnedFd> = Arc::new(backing.try_clone().unwrap().into());
        for token in 0..500_u64 {
            let buffers = Buffers::Owned(OwnedBuf::Vec(token.to_le_bytes().to_vec()));
            threads
                .submit(Op::Write { file: File::Fd(Arc::clone(&fd)), buffers, offset: token * 8 }, token)
                .unwrap();
        }
        let mut seen: Vec<u64> = (0..500).map(|_| next(&mut threads).token).collect();
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..500));
        assert_eq!((threads.in_flight(), Arc::strong_count(&fd)), (0, 1));
        let mut bytes = vec![0; 4000];
        backing.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.chunks(8).zip(0_u64..).all(|(found, token)| found == token.to_le_bytes()));
    }
}
