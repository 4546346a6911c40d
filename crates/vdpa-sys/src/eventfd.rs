//! Event file descriptors.
#![expect(unsafe_code, reason = "poll(2) itself, which rustix does not call")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::host::Event;

use crate::errno;

mod stuck;

/// So many times a peer may stall a thread, each time for 5 to 10 ms, before it is not signalled any more.
const STALLS_MAX: u8 = 3;

/// A descriptor that was given as an eventfd is none.
#[derive(Debug, Error)]
#[error("the descriptor refers to {target:?}, not to an eventfd")]
pub struct NotEventFd {
    /// What `/proc/self/fd` shows for it.
    pub target: String,
}

/// An eventfd, ours or one shared with a client. Clones share the descriptor.
#[derive(Clone, Debug)]
pub struct EventFd {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    fd: OwnedFd,
    owner: Owner,
}

/// Whose it is, and so whether the counter can be full.
#[derive(Debug)]
enum Owner {
    /// Ours.
    This,
    /// Somebody's who wishes us well. `O_NONBLOCK` was set or not when it was adopted.
    Friend { may_block: bool },
    /// Somebody's who need not, and how often they have stalled a thread.
    Peer { stalls: AtomicU8 },
}

impl EventFd {
    fn with(fd: OwnedFd, owner: Owner) -> Self {
        Self { shared: Arc::new(Shared { fd, owner }) }
    }

    /// A new one with counter 0, non-blocking, closed on exec.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn new() -> Result<Self, Errno> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(errno::from_rustix)?;
        Ok(Self::with(fd, Owner::This))
    }

    /// Adopts the descriptor of somebody who wishes us well: one's own, from before an `exec`.
    ///
    /// # Errors
    /// [`NotEventFd`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NotEventFd> {
        check(&fd)?;
        let may_block = rustix::fs::fcntl_getfl(&fd).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK));
        Ok(Self::with(fd, Owner::Friend { may_block }))
    }

    /// Adopts the descriptor of a peer that is not trusted, after a look at what it is, as the kernel's
    /// `eventfd_ctx_fdget` does.
    ///
    /// The first [`signal`](Self::signal) of such a one gives the process a handler for `SIGURG` and a thread.
    ///
    /// # Errors
    /// [`NotEventFd`]; a device answers it with `EINVAL`.
    pub fn from_peer(fd: OwnedFd) -> Result<Self, NotEventFd> {
        check(&fd)?;
        Ok(Self::with(fd, Owner::Peer { stalls: AtomicU8::new(0) }))
    }

    /// Adds 1 to the counter, which wakes whoever waits. A counter at its maximum stays there: it is signalled
    /// already.
    ///
    /// Does not block. A peer that fills its own counter stalls this thread for 5 to 10 ms, three times at most, and is
    /// not signalled any more after that. A friend that does so between the look at a *blocking* eventfd and the write
    /// stalls it until somebody reads.
    pub fn signal(&self) {
        let write = || rustix::io::write(&self.shared.fd, &1_u64.to_ne_bytes());
        match &self.shared.owner {
            Owner::Friend { may_block: true } if !self.has_room() => {}
            Owner::This | Owner::Friend { .. } => while write() == Err(rustix::io::Errno::INTR) {},
            Owner::Peer { stalls } => {
                let before = stalls.load(Ordering::Relaxed);
                if before > 0 && (before >= STALLS_MAX || !self.has_room()) {
                    return;
                }
                match stuck::free_when_stuck(write) {
                    stuck::Outcome::Done => {}
                    stuck::Outcome::Freed => _ = stalls.fetch_add(1, Ordering::Relaxed),
                    stuck::Outcome::Unwatched => {
                        while self.has_room() && write() == Err(rustix::io::Errno::INTR) {}
                    }
                }
            }
        }
    }

    /// Reads the counter and sets it to 0; 0 if it was 0. Never blocks, if no other reader empties it meanwhile.
    #[must_use]
    pub fn drain(&self) -> u64 {
        let may_block = !matches!(self.shared.owner, Owner::This | Owner::Friend { may_block: false });
        if may_block && !self.is_ready_now(libc::POLLIN) {
            return 0;
        }
        let mut count = [0; 8];
        loop {
            match rustix::io::read(&self.shared.fd, &mut count) {
                Ok(8) => return u64::from_ne_bytes(count),
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => return 0,
            }
        }
    }

    /// Waits until the counter is not 0, without reading it; returns whether it is. `None` waits for ever.
    #[must_use]
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        self.is_ready(PollFlags::IN, timeout)
    }

    /// Whether both are the same descriptor (not merely the same counter).
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Whether a write would not wait now.
    fn has_room(&self) -> bool {
        self.is_ready_now(libc::POLLOUT)
    }

    /// Looks without waiting. By `poll`, since `ppoll`, which takes its time from memory, costs a third more.
    fn is_ready_now(&self, events: libc::c_short) -> bool {
        let mut look = libc::pollfd { fd: self.shared.fd.as_raw_fd(), events, revents: 0 };
        loop {
            // SAFETY: one structure, on this stack, and the count says so; the descriptor is open as long as self.
            match unsafe { libc::poll(&raw mut look, 1, 0) } {
                -1 if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
                ready => return ready > 0,
            }
        }
    }

    fn is_ready(&self, events: PollFlags, timeout: Option<Duration>) -> bool {
        let deadline = timeout.map(|timeout| std::time::Instant::now().checked_add(timeout));
        loop {
            let left = match deadline {
                Some(Some(deadline)) => {
                    Timespec::try_from(deadline.saturating_duration_since(std::time::Instant::now())).ok()
                }
                Some(None) | None => None,
            };
            let mut fds = [PollFd::new(&self.shared.fd, events)];
            match poll(&mut fds, left.as_ref()) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// Whether the descriptor is an eventfd's.
fn check(fd: &OwnedFd) -> Result<(), NotEventFd> {
    let target = crate::process::describe_fd(fd);
    if target == "anon_inode:[eventfd]" { Ok(()) } else { Err(NotEventFd { target }) }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }
}

impl Event for EventFd {
    fn signal(&self) {
        Self::signal(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_waits_without_reading() {
        let event = EventFd::new().unwrap();
        assert!(!event.wait(Some(Duration::ZERO)));
        event.signal();
        event.clone().signal();
        assert!(event.wait(None) && event.wait(Some(Duration::ZERO)));
        assert_eq!((event.drain(), event.drain()), (2, 0));
    }

    #[test]
    fn a_full_blocking_counter_does_not_stall() {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let event = EventFd::from_fd(fd).unwrap();
        event.signal();
        assert_eq!((event.drain(), event.drain()), (u64::MAX - 1, 0));
    }

    /// A peer's counter may be full whatever its flags say.
    #[test]
    fn a_peer_that_fills_its_counter_is_signalled_no_more() {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let event = EventFd::from_peer(fd).unwrap();
        event.signal();
        assert_eq!(event.drain(), 1);
        rustix::fs::fcntl_setfl(&event, OFlags::empty()).unwrap();
        for stalls in 1..=STALLS_MAX {
            rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            let Owner::Peer { stalls: seen } = &event.shared.owner else { panic!("a peer") };
            // As if the counter had been filled between the look and the write.
            seen.store(0, Ordering::Relaxed);
            event.signal();
            assert_eq!(seen.swap(stalls, Ordering::Relaxed), 1, "it was stuck, and freed");
            event.signal();
            assert_eq!((event.drain(), event.drain()), (u64::MAX - 1, 0));
            event.signal();
            assert_eq!(event.drain(), u64::from(stalls < STALLS_MAX), "after {stalls}");
        }
    }

    /// Also when the thread that looks has gone to sleep in between.
    #[test]
    fn a_stuck_thread_is_freed_after_a_pause() {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let event = EventFd::from_peer(fd).unwrap();
        event.signal();
        std::thread::sleep(Duration::from_millis(300));
        rustix::io::write(&event, &(u64::MAX - 2).to_ne_bytes()).unwrap();
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let event = event.clone();
                std::thread::spawn(move || event.signal())
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(event.drain(), u64::MAX - 1);
    }

    #[test]
    fn another_kind_of_descriptor_is_named() {
        let error = EventFd::from_fd(crate::memfd::create(c"not-an-event", 0, None).unwrap()).unwrap_err();
        assert!(error.to_string().contains("not-an-event"), "{error}");
    }
}
