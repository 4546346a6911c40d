//! Everything that one side of an update waits for, as one descriptor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use vdpa_core::Errno;

use super::{Cancel, ConnectionError};

/// An epoll instance with the connection, the time-out, the cancellation and the process at the other end. Readable when one of
/// them has something to say; then a step finds out what.
#[derive(Debug)]
pub(super) struct Waiter {
    epoll: OwnedFd,
    /// In the epoll instance; kept open for it.
    _timer: Option<OwnedFd>,
    until: Option<Instant>,
    cancel: Option<Cancel>,
    /// Pidfd of the process at the other end.
    process: Option<OwnedFd>,
}

fn system(action: &'static str) -> impl Fn(rustix::io::Errno) -> ConnectionError {
    move |e| ConnectionError::System { action, source: Errno::from_raw(e.raw_os_error()) }
}

impl Waiter {
    pub(super) fn new(
        connection: impl AsFd,
        time_out: Option<Duration>,
        cancel: Option<Cancel>,
        process: Option<OwnedFd>,
    ) -> Result<Self, ConnectionError> {
        let failed = system("make a descriptor to wait with");
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(&failed)?;
        let add = |fd: BorrowedFd<'_>, flags| {
            epoll::add(&set, fd, epoll::EventData::new_u64(0), flags).map_err(&failed)
        };
        add(connection.as_fd(), epoll::EventFlags::IN)?;
        if let Some(cancel) = &cancel {
            add(cancel.as_fd(), epoll::EventFlags::IN)?;
        }
        if let Some(process) = &process {
            add(process.as_fd(), epoll::EventFlags::IN)?;
        }
        let timer = time_out.map(timer).transpose().map_err(&failed)?;
        if let Some(timer) = &timer {
            add(timer.as_fd(), epoll::EventFlags::IN)?;
        }
        let until = time_out.and_then(|time_out| Instant::now().checked_add(time_out));
        Ok(Self { epoll: set, _timer: timer, until, cancel, process })
    }

    /// Whether it also waits until the connection takes more bytes.
    pub(super) fn wait_for_room(&self, connection: impl AsFd, wait: bool) -> Result<(), ConnectionError> {
        let flags = if wait { epoll::EventFlags::IN | epoll::EventFlags::OUT } else { epoll::EventFlags::IN };
        epoll::modify(&self.epoll, connection, epoll::EventData::new_u64(0), flags)
            .map_err(system("wait for room in a socket"))
    }

    /// Why there is nothing to wait for any more.
    ///
    /// # Errors
    /// [`ConnectionError::Cancelled`], [`ConnectionError::TimedOut`]; [`ConnectionError::Closed`] when the process has ended.
    pub(super) fn check(&self) -> Result<(), ConnectionError> {
        if self.cancel.as_ref().is_some_and(Cancel::is_cancelled) {
            return Err(ConnectionError::Cancelled);
        }
        if self.until.is_some_and(|until| Instant::now() >= until) {
            return Err(ConnectionError::TimedOut);
        }
        if self.process.as_ref().is_some_and(has_ended) {
            return Err(ConnectionError::Closed);
        }
        Ok(())
    }

    /// Blocks until a step is worth while.
    pub(super) fn wait(&self) -> Result<(), ConnectionError> {
        match poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(system("wait for the other side")(e)),
        }
    }
}

impl AsFd for Waiter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn timer(after: Duration) -> Result<OwnedFd, rustix::io::Errno> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    // A time of 0 would disarm it, and it must not be earlier than the clock that is compared.
    let after = after.saturating_add(Duration::from_micros(1));
    let it_value = Timespec::try_from(after).map_err(|_| rustix::io::Errno::INVAL)?;
    let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })?;
    Ok(timer)
}

fn has_ended(process: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)).is_ok_and(|count| count > 0)
}
