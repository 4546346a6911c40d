//! The successor's end of the connection to its predecessor.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::checkpoint::{Checkpoint, checkpoint};
use super::connection::{Connection, ConnectionError, Kind, Message, Wait};
use super::successor::Failure;
use super::waiter::Waiter;
use super::{Cancel, Cause, Phase, UpdateError};
use crate::error::chain;

/// The predecessor, seen from the successor.
#[derive(Debug)]
pub(super) struct Predecessor {
    connection: Connection,
    /// Pidfd of the predecessor, from its first message on.
    process: Option<OwnedFd>,
    /// Whether both processes know the outcome, so that no more messages are sent.
    finished: bool,
}

impl Predecessor {
    pub(super) fn new(socket: UnixStream, allowed: Option<u32>) -> Result<Self, Cause> {
        let connection = Connection::new(socket.into())?;
        connection.peer(allowed)?;
        Ok(Self { connection, process: None, finished: false })
    }

    pub(super) fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Cause> {
        Ok(self.connection.send(kind, payload, &[], Wait::default())?)
    }

    /// What to wait with for the next message.
    pub(super) fn waiter(
        &self,
        time_out: Option<Duration>,
        cancel: Option<Cancel>,
    ) -> Result<Waiter, ConnectionError> {
        Waiter::new(&self.connection, time_out, cancel, None)
    }

    /// A message of `kind` if it is there, or comes soon; only the predecessor decides when the update continues.
    ///
    /// # Errors
    /// [`Cause::Aborted`] for [`Kind::Abort`]; [`Cause::Connection`] for any other kind or a closed connection, and when
    /// `waiter` says that the wait is over.
    pub(super) fn receive(&mut self, kind: Kind, waiter: &Waiter) -> Result<Option<Message>, Cause> {
        let Some(message) = self.connection.receive_soon(kind == Kind::Commit)? else {
            waiter.check()?;
            return Ok(None);
        };
        if self.process.is_none() {
            let pid = message.sender.and_then(Pid::from_raw);
            self.process = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        }
        match message.kind {
            other if other == kind => Ok(Some(message)),
            Kind::Abort => Err(Cause::Aborted),
            other => Err(ConnectionError::Protocol { what: format!("{other:?} is out of turn") }.into()),
        }
    }

    /// Reports that the devices are taken over.
    pub(super) fn taken(&mut self) -> Result<(), Cause> {
        match self.send(Kind::Taken, b"") {
            Ok(()) => checkpoint(Checkpoint::TakenSent),
            // The predecessor may have aborted before it ended; its message is still in the socket.
            Err(Cause::Connection(ConnectionError::Closed)) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Confirms the commit with `report`; returns whether it has come. A predecessor that has ended cannot commit and cannot want
    /// the devices back, so they belong to this process then. The predecessor keeps its descriptors until it has received the
    /// confirmation, or until this process has ended.
    pub(super) fn commit(&mut self, report: &[u8], waiter: &Waiter) -> Result<bool, Cause> {
        match self.receive(Kind::Commit, waiter) {
            Ok(None) => return Ok(false),
            Ok(Some(_)) => match self.send(Kind::Done, report) {
                Ok(()) | Err(Cause::Connection(ConnectionError::Closed)) => {}
                Err(e) => return Err(e),
            },
            Err(Cause::Connection(ConnectionError::Closed)) if self.predecessor_has_ended() => {}
            Err(e) => return Err(e),
        }
        self.finished = true;
        Ok(true)
    }

    /// Whether the predecessor has ended. Waits up to 5 s, since the kernel closes the sockets of a process before it
    /// reports its end.
    fn predecessor_has_ended(&self) -> bool {
        let Some(process) = &self.process else { return true };
        let limit = Timespec { tv_sec: 5, tv_nsec: 0 };
        let begin = Instant::now();
        loop {
            let mut fds = [PollFd::new(process, PollFlags::IN)];
            match poll(&mut fds, Some(&limit)) {
                Ok(count) => return count > 0,
                Err(_) if begin.elapsed().as_secs() < 5 => {}
                Err(_) => return false,
            }
        }
    }

    /// Sends the reason of a failure as a message of `kind`, and ends the exchange. An error of sending is ignored, since it
    /// means that the peer has closed the connection.
    pub(super) fn reject(&mut self, kind: Kind, error: &UpdateError) {
        if self.finished {
            return;
        }
        self.finished = true;
        let failure =
            Failure { phase: error.phase, device: error.device.clone(), reason: chain(&error.source) };
        let payload = serde_json::to_vec(&failure).unwrap_or_default();
        let _ = self.connection.send(kind, &payload, &[], Wait::default());
    }
}

impl Drop for Predecessor {
    fn drop(&mut self) {
        let source = Cause::Refused { reason: "the successor has given up".to_owned() };
        self.reject(Kind::Refused, &UpdateError { phase: Phase::Load, device: None, source });
    }
}
