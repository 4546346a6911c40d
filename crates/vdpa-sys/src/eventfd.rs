//! Event file descriptors.
#![expect(unsafe_code, reason = "poll(2) itself, which rustix does not call")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::host::Event;

use crate::errno;

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
    fd: Arc<OwnedFd>,
    /// O_NONBLOCK was not set when it was adopted; a client's own flag is not ours to change.
    may_block: bool,
}

impl EventFd {
    /// A new one with counter 0, non-blocking, closed on exec.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn new() -> Result<Self, Errno> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(errno::from_rustix)?;
        Ok(Self { fd: Arc::new(fd), may_block: false })
    }

    /// Adopts a descriptor after a look at what it is, as the kernel's `eventfd_ctx_fdget` does.
    ///
    /// # Errors
    /// [`NotEventFd`]; a device answers it with `EINVAL`.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NotEventFd> {
        let target = crate::process::describe_fd(&fd);
        if target != "anon_inode:[eventfd]" {
            return Err(NotEventFd { target });
        }
        let may_block = rustix::fs::fcntl_getfl(&fd).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK));
        Ok(Self { fd: Arc::new(fd), may_block })
    }

    /// Adds 1 to the counter, which wakes whoever waits. A counter at its maximum stays there: it is signalled
    /// already.
    ///
    /// Does not block, with one exception: the other holder of a *blocking* eventfd can fill the counter between
    /// the look at it and the write, and stalls this thread until it reads.
    pub fn signal(&self) {
        if self.may_block && !self.is_ready_now(libc::POLLOUT) {
            return;
        }
        while let Err(rustix::io::Errno::INTR) = rustix::io::write(&*self.fd, &1_u64.to_ne_bytes()) {}
    }

    /// Reads the counter and sets it to 0; 0 if it was 0. Never blocks, if no other reader empties it meanwhile.
    #[must_use]
    pub fn drain(&self) -> u64 {
        if self.may_block && !self.is_ready_now(libc::POLLIN) {
            return 0;
        }
        let mut count = [0; 8];
        loop {
            match rustix::io::read(&*self.fd, &mut count) {
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
        Arc::ptr_eq(&self.fd, &other.fd)
    }

    /// Looks without waiting. By `poll`, since every signal to a client does it and `ppoll`, which takes its time from
    /// memory, costs a third more.
    fn is_ready_now(&self, events: libc::c_short) -> bool {
        let mut look = libc::pollfd { fd: self.fd.as_raw_fd(), events, revents: 0 };
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
            let mut fds = [PollFd::new(&*self.fd, events)];
            match poll(&mut fds, left.as_ref()) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
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

    #[test]
    fn another_kind_of_descriptor_is_named() {
        let error = EventFd::from_fd(crate::memfd::create(c"not-an-event", 0, None).unwrap()).unwrap_err();
        assert!(error.to_string().contains("not-an-event"), "{error}");
    }
}
