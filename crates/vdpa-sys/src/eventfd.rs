//! Event file descriptors.
#![expect(
    unsafe_code,
    reason = "poll(2) itself, which rustix does not call; descriptors of the crate vmm-sys-util"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::host::Event;

use crate::errno;
use crate::vduse::Interrupt;

mod watchdog;

/// How many times a peer may stall a thread (each time for 5 to 10 ms) before it is no longer signalled.
const STALLS_MAX: u8 = 3;

/// A descriptor that was passed as an eventfd is not one.
#[derive(Debug, Error)]
#[error("the descriptor refers to {target:?}, not to an eventfd")]
pub struct NotEventFd {
    /// The target of its link in `/proc/self/fd`.
    pub target: String,
}

/// An eventfd, created here or shared with a client. Clones share the descriptor.
#[derive(Clone, Debug)]
pub struct EventFd {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    fd: OwnedFd,
    owner: Owner,
}

/// Who else can write the counter, and so whether a write can block because the counter is full.
#[derive(Debug)]
enum Owner {
    /// Created by this process, non-blocking.
    This,
    /// Trusted not to fill the counter. `may_block`: `O_NONBLOCK` was clear when it was adopted.
    Trusted { may_block: bool },
    /// Shared with a peer that is not trusted. `stalls`: how many writes its full counter has blocked.
    Peer { stalls: AtomicU8 },
    /// Not the counter is what is signalled, but a queue of a device of the kernel.
    Interrupt(Interrupt),
}

impl EventFd {
    fn with(fd: OwnedFd, owner: Owner) -> Self {
        Self { shared: Arc::new(Shared { fd, owner }) }
    }

    /// Creates an eventfd with counter 0, non-blocking and close-on-exec.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn new() -> Result<Self, Errno> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(errno::from_rustix)?;
        Ok(Self::with(fd, Owner::This))
    }

    /// Adopts a trusted descriptor: one that this process created itself, before an `exec` for example.
    ///
    /// # Errors
    /// [`NotEventFd`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NotEventFd> {
        check(&fd)?;
        let may_block = rustix::fs::fcntl_getfl(&fd).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK));
        Ok(Self::with(fd, Owner::Trusted { may_block }))
    }

    /// Adopts the descriptor of a peer that is not trusted. Checks that it is an eventfd, as the kernel's
    /// `eventfd_ctx_fdget` does.
    ///
    /// The first [`signal`](Self::signal) of such an eventfd installs a handler for `SIGURG` and starts a thread.
    ///
    /// # Errors
    /// [`NotEventFd`]; a device answers it with `EINVAL`.
    pub fn from_peer(fd: OwnedFd) -> Result<Self, NotEventFd> {
        check(&fd)?;
        Ok(Self::with(fd, Owner::Peer { stalls: AtomicU8::new(0) }))
    }

    /// An event whose signal is an interrupt of a VDUSE device's queue, by a request of its own and without the counter. Without an
    /// effect when nobody has the device open any more.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn interrupt(interrupt: Interrupt) -> Result<Self, Errno> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(errno::from_rustix)?;
        Ok(Self::with(fd, Owner::Interrupt(interrupt)))
    }

    /// Adds 1 to the counter, which wakes the waiting readers. A counter at its maximum is left alone, because it is
    /// signalled already.
    ///
    /// Does not block, with two exceptions. A peer that fills its own counter stalls this thread for 5 to 10 ms, at most
    /// three times; after that it is no longer signalled. If the counter of a *blocking* trusted eventfd is filled between
    /// the check and the write, the thread blocks until somebody reads the counter.
    pub fn signal(&self) {
        let write = || rustix::io::write(&self.shared.fd, &1_u64.to_ne_bytes());
        match &self.shared.owner {
            Owner::Trusted { may_block: true } if !self.has_room() => {}
            Owner::Interrupt(interrupt) => interrupt.raise(),
            Owner::This | Owner::Trusted { .. } => while write() == Err(rustix::io::Errno::INTR) {},
            Owner::Peer { stalls } => {
                let before = stalls.load(Ordering::Relaxed);
                if before > 0 && (before >= STALLS_MAX || !self.has_room()) {
                    return;
                }
                match watchdog::write_or_interrupt(write) {
                    watchdog::Outcome::Done => {}
                    watchdog::Outcome::Interrupted => _ = stalls.fetch_add(1, Ordering::Relaxed),
                    watchdog::Outcome::NoWatchdog => {
                        while self.has_room() && write() == Err(rustix::io::Errno::INTR) {}
                    }
                }
            }
        }
    }

    /// Reads the counter and sets it to 0; returns 0 if it was 0. Blocks only if another reader empties a *blocking* eventfd
    /// between the check and the read.
    #[must_use]
    pub fn drain(&self) -> u64 {
        let may_block = !matches!(
            self.shared.owner,
            Owner::This | Owner::Trusted { may_block: false } | Owner::Interrupt(_)
        );
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

    /// Blocks until the counter is not 0 or `timeout` has passed, without reading the counter; returns whether it is not 0.
    /// `None` waits without a limit.
    #[must_use]
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        self.is_ready(PollFlags::IN, timeout)
    }

    /// Whether both are clones of one value. Two descriptors of one counter are not the same.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Whether a write would not block now.
    fn has_room(&self) -> bool {
        self.is_ready_now(libc::POLLOUT)
    }

    /// Polls without waiting. Calls `poll` itself: `ppoll`, which rustix calls, takes its timeout from memory and costs a
    /// third more.
    fn is_ready_now(&self, events: libc::c_short) -> bool {
        let mut query = libc::pollfd { fd: self.shared.fd.as_raw_fd(), events, revents: 0 };
        loop {
            // SAFETY: the pointer refers to one structure on this stack, as the count says, and the descriptor is open while
            // `self` exists.
            match unsafe { libc::poll(&raw mut query, 1, 0) } {
                -1 if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
                ready => return ready > 0,
            }
        }
    }

    fn is_ready(&self, events: PollFlags, timeout: Option<Duration>) -> bool {
        let deadline = timeout.map(|timeout| std::time::Instant::now().checked_add(timeout));
        loop {
            let remaining = match deadline {
                Some(Some(deadline)) => {
                    Timespec::try_from(deadline.saturating_duration_since(std::time::Instant::now())).ok()
                }
                Some(None) | None => None,
            };
            let mut fds = [PollFd::new(&self.shared.fd, events)];
            match poll(&mut fds, remaining.as_ref()) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// Checks that the descriptor is an eventfd.
fn check(fd: &OwnedFd) -> Result<(), NotEventFd> {
    let target = crate::process::describe_fd(fd);
    if target == "anon_inode:[eventfd]" { Ok(()) } else { Err(NotEventFd { target }) }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.fd.as_raw_fd()
    }
}

impl TryFrom<OwnedFd> for EventFd {
    type Error = NotEventFd;

    /// As [`from_fd`](Self::from_fd).
    fn try_from(fd: OwnedFd) -> Result<Self, NotEventFd> {
        Self::from_fd(fd)
    }
}

impl TryFrom<EventFd> for OwnedFd {
    type Error = io::Error;

    /// The descriptor. While clones of the value exist it is a duplicate, and making one can fail (`EMFILE`).
    fn try_from(event: EventFd) -> io::Result<Self> {
        match Arc::try_unwrap(event.shared) {
            Ok(shared) => Ok(shared.fd),
            Err(shared) => shared.fd.try_clone(),
        }
    }
}

#[cfg(feature = "vmm-sys-util")]
impl From<vmm_sys_util::eventfd::EventFd> for EventFd {
    fn from(event: vmm_sys_util::eventfd::EventFd) -> Self {
        use std::os::fd::{FromRawFd as _, IntoRawFd as _};
        // SAFETY: `into_raw_fd` gives up a descriptor that the value owned alone, so it has this owner only.
        let fd = unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) };
        let may_block = rustix::fs::fcntl_getfl(&fd).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK));
        Self::with(fd, Owner::Trusted { may_block })
    }
}

#[cfg(feature = "vmm-sys-util")]
impl TryFrom<&EventFd> for vmm_sys_util::eventfd::EventFd {
    type Error = io::Error;

    /// The same counter, by a duplicate of the descriptor, for `register_irqfd` and others that want that type.
    fn try_from(event: &EventFd) -> io::Result<Self> {
        use std::os::fd::{FromRawFd as _, IntoRawFd as _};
        let fd = event.shared.fd.try_clone()?;
        // SAFETY: the duplicate was made here, and `into_raw_fd` gives it up to the new value.
        Ok(unsafe { Self::from_raw_fd(fd.into_raw_fd()) })
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

    /// The peer changes `O_NONBLOCK`, so that the write to its full counter blocks.
    #[test]
    fn a_peer_that_fills_its_counter_is_no_longer_signalled() {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let event = EventFd::from_peer(fd).unwrap();
        event.signal();
        assert_eq!(event.drain(), 1);
        rustix::fs::fcntl_setfl(&event, OFlags::empty()).unwrap();
        for stalls in 1..=STALLS_MAX {
            rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            let Owner::Peer { stalls: seen } = &event.shared.owner else { panic!("a peer") };
            // As if the counter had been filled between the check and the write.
            seen.store(0, Ordering::Relaxed);
            event.signal();
            assert_eq!(seen.swap(stalls, Ordering::Relaxed), 1, "the write was blocked and interrupted");
            event.signal();
            assert_eq!((event.drain(), event.drain()), (u64::MAX - 1, 0));
            event.signal();
            assert_eq!(event.drain(), u64::from(stalls < STALLS_MAX), "after {stalls}");
        }
    }

    /// The watchdog thread has gone to sleep in between and is woken.
    #[test]
    fn a_blocked_write_is_interrupted_after_a_pause() {
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
    fn it_becomes_a_descriptor_and_one_again() {
        let event = EventFd::new().unwrap();
        event.signal();
        let clone = event.clone();
        let duplicate = OwnedFd::try_from(event).unwrap();
        assert_ne!(duplicate.as_raw_fd(), clone.as_raw_fd());
        let number = clone.as_raw_fd();
        assert_eq!(OwnedFd::try_from(clone).unwrap().as_raw_fd(), number, "the last one gives its own");
        assert_eq!(EventFd::try_from(duplicate).unwrap().drain(), 1);
    }

    #[cfg(feature = "vmm-sys-util")]
    #[test]
    fn it_is_exchanged_with_vmm_sys_util() {
        let theirs = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        theirs.write(3).unwrap();
        let ours = EventFd::from(theirs.try_clone().unwrap());
        assert_eq!(ours.drain(), 3);
        ours.signal();
        assert_eq!(vmm_sys_util::eventfd::EventFd::try_from(&ours).unwrap().read().unwrap(), 1);
    }

    #[test]
    fn another_kind_of_descriptor_is_named() {
        let error = EventFd::from_fd(crate::memfd::create(c"not-an-event", 0, None).unwrap()).unwrap_err();
        assert!(error.to_string().contains("not-an-event"), "{error}");
    }
}
