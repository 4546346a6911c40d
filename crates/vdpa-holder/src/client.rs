//! What a daemon calls.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getppid, pidfd_getfd, pidfd_open};
use vdpa_core::Errno;
use vdpa_sys::inherit;
use vdpa_sys::uring::RingRecord;

use crate::progress::Progress;
use crate::protocol::{ARGUMENTS_MAX, End, Item, Kind, Message, RECORD_MAX, Role, RollBack, Status};
use crate::socket::{self, Received};

/// Environment variable with the number of the inherited socket.
pub const SOCKET_ENV: &str = "VDPA_HOLDER_SOCKET";
/// Environment variable with the [version](crate::protocol::VERSION) of the holder's protocol; it is 1 without one.
pub const VERSION_ENV: &str = "VDPA_HOLDER_PROTOCOL";

/// The connection of a daemon process to its holder. Requests take some 10 us and wait for their answer.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    /// The version that the holder speaks.
    version: u32,
    number: u32,
    events: VecDeque<Event>,
    progress: Progress,
    peer: Option<OwnedFd>,
    start: Start,
}

/// What the process was started as.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// What it is to be.
    pub role: Role,
    /// The holder at the start.
    pub status: Status,
    /// How the last daemon ended, after a crash.
    pub crash: Option<End>,
}

/// What a holder says of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The candidate can take over.
    CandidateReady,
    /// The candidate has ended; this process remains the daemon.
    RolledBack {
        /// Why.
        why: RollBack,
        /// How the candidate ended.
        end: End,
    },
    /// This candidate is the daemon.
    Committed,
    /// The holder has ended. Nothing outlives this process any more.
    HolderGone,
}

/// A held item with a copy of its descriptor.
#[derive(Debug)]
pub struct Held {
    /// The name it was given.
    pub key: u64,
    /// What it is.
    pub kind: Kind,
    /// What was kept with it.
    pub record: Vec<u8>,
    /// A descriptor, closed on exec.
    pub fd: OwnedFd,
}

impl Client {
    /// The connection that this process has inherited; `None` when no holder has started it. Called once, before other
    /// code opens files.
    ///
    /// # Errors
    /// `EBADF` for a number that was not inherited; `EPROTO` from a holder of another protocol.
    pub fn from_env() -> Result<Option<Self>, Errno> {
        let Some(number) = std::env::var_os(SOCKET_ENV) else { return Ok(None) };
        let number: RawFd = number.to_str().and_then(|text| text.parse().ok()).ok_or(Errno::INVAL)?;
        let version = std::env::var(VERSION_ENV).ok().and_then(|text| text.parse().ok()).unwrap_or(1);
        let mut client = Self::new(inherit::take(number)?, version)?;
        if version >= 2 {
            client.start.status = client.status()?;
        }
        Ok(Some(client))
    }

    fn new(socket: OwnedFd, version: u32) -> Result<Self, Errno> {
        let Received { message, fds, .. } = socket::receive(&socket, true)?.ok_or(socket::PIPE)?;
        let Message::Start { role, status, crash } = message else { return Err(protocol()) };
        let mut fds = fds.into_iter();
        let progress = Progress::map(fds.next().ok_or_else(protocol)?)?;
        let start = Start { role, status, crash };
        Ok(Self { socket, version, number: 0, events: VecDeque::new(), progress, peer: fds.next(), start })
    }

    /// What this process was started as.
    #[must_use]
    pub const fn start(&self) -> Start {
        self.start
    }

    /// The memory in which this process shows its progress.
    #[must_use]
    pub const fn progress(&self) -> &Progress {
        &self.progress
    }

    /// For a candidate: the socket to the daemon, `SOCK_SEQPACKET`. Once.
    #[must_use]
    pub const fn take_peer(&mut self) -> Option<OwnedFd> {
        self.peer.take()
    }

    /// Has a copy of `fd` held under `key`, with at most [`RECORD_MAX`] bytes beside it.
    ///
    /// # Errors
    /// `EEXIST` for a key in use, `ENOSPC` when too much is held, `EINVAL` for a ring ([`hold_ring`](Self::hold_ring)),
    /// `EMSGSIZE` for a longer record. Nothing is held then.
    pub fn hold(&mut self, key: u64, kind: Kind, fd: impl AsFd, record: &[u8]) -> Result<(), Errno> {
        limit(record.len(), RECORD_MAX)?;
        self.ask(&Message::Hold { key, kind, record: record.to_vec() }, &[fd.as_fd()]).map(drop)
    }

    /// As [`hold`](Self::hold), for an io_uring: the holder takes it from this process.
    ///
    /// # Errors
    /// As `hold`; `EPERM` when the holder may not examine this process.
    pub fn hold_ring(&mut self, key: u64, ring: impl AsFd, record: &RingRecord) -> Result<(), Errno> {
        let number = ring.as_fd().as_raw_fd();
        self.ask(&Message::HoldRing { key, number, record: record.to_bytes().to_vec() }, &[]).map(drop)
    }

    /// Has an item held no more.
    ///
    /// # Errors
    /// `ENOENT` when it is not.
    pub fn release(&mut self, key: u64) -> Result<(), Errno> {
        self.ask(&Message::Drop { key }, &[]).map(drop)
    }

    /// Everything that is held, by key, with a copy of each descriptor.
    ///
    /// # Errors
    /// `EMFILE`; `EPERM` for a ring when this process may not examine the holder (`CAP_SYS_PTRACE`).
    pub fn list(&mut self) -> Result<Vec<Held>, Errno> {
        let mut all = Vec::new();
        let mut after = None;
        loop {
            let Received { message, fds, .. } = self.ask(&Message::List { after }, &[])?;
            let Message::Items { more, items } = message else { return Err(protocol()) };
            let mut fds = fds.into_iter();
            for Item { key, kind, number, record } in items {
                let fd = match kind {
                    Kind::Ring => from_holder(number)?,
                    _ => fds.next().ok_or_else(protocol)?,
                };
                after = Some(key);
                all.push(Held { key, kind, record, fd });
            }
            if !more {
                return Ok(all);
            }
        }
    }

    /// Says that this process serves, or for a candidate that it can take over.
    ///
    /// # Errors
    /// `EPIPE` without a holder.
    pub fn ready(&mut self) -> Result<(), Errno> {
        self.ask(&Message::Ready, &[]).map(drop)
    }

    /// Says that the next exit of this process ends the service.
    ///
    /// # Errors
    /// `EPIPE` without a holder.
    pub fn stopping(&mut self) -> Result<(), Errno> {
        self.ask(&Message::Stopping, &[]).map(drop)
    }

    /// Starts a candidate from an open program with its arguments, the name first. Returns the socket to it.
    /// [`Event::CandidateReady`] or [`Event::RolledBack`] follows.
    ///
    /// # Errors
    /// `EBUSY` when there is a candidate; those of starting a process.
    pub fn prepare_upgrade(&mut self, program: BorrowedFd<'_>, args: &[&[u8]]) -> Result<OwnedFd, Errno> {
        let args = join(args)?;
        let answer = self.ask(&Message::Prepare { args }, &[program])?;
        answer.fds.into_iter().next().ok_or_else(protocol)
    }

    /// Makes the candidate the daemon. When this returns without an error this process is the daemon no more, and ends.
    ///
    /// # Errors
    /// `ECANCELED` when there is no candidate that is ready: this process goes on.
    pub fn commit_upgrade(&mut self) -> Result<(), Errno> {
        self.ask(&Message::Commit, &[]).map(drop)
    }

    /// Ends the candidate; [`Event::RolledBack`] follows when it has ended.
    ///
    /// # Errors
    /// `ENOENT` when there is none.
    pub fn abort_upgrade(&mut self) -> Result<(), Errno> {
        self.ask(&Message::Abort, &[]).map(drop)
    }

    /// Has the holder replace its own program; it keeps its process id and everything it holds.
    ///
    /// # Errors
    /// Those of execve(2), and the holder goes on with its old program; `EBUSY` during an upgrade.
    pub fn replace_holder(&mut self, program: BorrowedFd<'_>, args: &[&[u8]]) -> Result<(), Errno> {
        let args = join(args)?;
        self.ask(&Message::Replace { args }, &[program]).map(drop)
    }

    /// What the holder says of itself.
    ///
    /// # Errors
    /// `EPIPE` without a holder.
    pub fn status(&mut self) -> Result<Status, Errno> {
        let request = if self.version >= 2 { Message::AskFullStatus } else { Message::AskStatus };
        match self.ask(&request, &[])?.message {
            Message::Status(status) | Message::FullStatus(status) => Ok(status),
            _ => Err(protocol()),
        }
    }

    /// The next event; with `wait` blocks until there is one. Readiness of the socket ([`AsFd`]) tells that there may be.
    ///
    /// # Errors
    /// `EAGAIN` without `wait` and without an event.
    pub fn next_event(&mut self, wait: bool) -> Result<Event, Errno> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        match socket::receive(&self.socket, wait)? {
            None => Ok(Event::HolderGone),
            Some(received) => event(&received.message).ok_or_else(protocol),
        }
    }

    fn ask(&mut self, request: &Message, fds: &[BorrowedFd<'_>]) -> Result<Received, Errno> {
        self.number = self.number.wrapping_add(1).max(1);
        socket::send(&self.socket, self.number, request, fds)?;
        loop {
            let received = socket::receive(&self.socket, true)?.ok_or(socket::PIPE)?;
            match received.message {
                Message::Answer { errno } if received.number == self.number && errno != 0 => {
                    return Err(Errno::from_raw(errno));
                }
                _ if received.number == self.number => return Ok(received),
                ref message => self.events.extend(event(message)),
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

const fn event(message: &Message) -> Option<Event> {
    match *message {
        Message::CandidateReady => Some(Event::CandidateReady),
        Message::RolledBack { why, end } => Some(Event::RolledBack { why, end }),
        Message::Committed => Some(Event::Committed),
        _ => None,
    }
}

/// A copy of the holder's descriptor `number`. The holder is the parent of every daemon; one that has ended has been
/// replaced as the parent by a process without that descriptor, or one this process may not examine.
fn from_holder(number: RawFd) -> Result<OwnedFd, Errno> {
    let parent = getppid().ok_or(socket::PIPE)?;
    let pidfd = pidfd_open(parent, PidfdFlags::empty()).map_err(socket::errno)?;
    if getppid() != Some(parent) {
        return Err(socket::PIPE);
    }
    pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty()).map_err(socket::errno)
}

fn join(args: &[&[u8]]) -> Result<Vec<u8>, Errno> {
    let joined: Vec<u8> = args.iter().flat_map(|arg| arg.iter().copied().chain([0])).collect();
    limit(joined.len(), ARGUMENTS_MAX)?;
    if joined.iter().filter(|&&byte| byte == 0).count() == args.len() {
        Ok(joined)
    } else {
        Err(Errno::INVAL)
    }
}

const fn limit(len: usize, max: usize) -> Result<(), Errno> {
    if len <= max { Ok(()) } else { Err(Errno::MSGSIZE) }
}

const fn protocol() -> Errno {
    Errno::from_raw(71)
}
