//! The predecessor's end of the connection to its successor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::checkpoint::{Checkpoint, checkpoint};
use super::connection::{Connection, ConnectionError, Kind, Message, Outgoing, Wait};
use super::waiter::Waiter;
use super::{Cancel, Cause, Image, Phase, Report, steps};

/// How long the kernel may take to end a killed process: it ends only when its current request to a device has returned.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// The process that may take the devices over.
#[derive(Debug)]
pub(super) struct Successor {
    connection: Connection,
    /// Process id of the sender of the answers. Before the first answer: the process that was started, or that made the
    /// connection.
    pid: i32,
    /// Pidfd of `pid`; `None` until the kernel has confirmed that this process sends the answers.
    pidfd: Option<OwnedFd>,
    child: Option<Child>,
    grace: Duration,
    /// Whether the successor may access the devices, which it may from the switch on.
    may_act: bool,
    /// Whether both processes know the outcome, so that no more messages are sent.
    finished: bool,
    /// The report that the successor sent with [`Kind::Done`].
    report: Option<Report>,
}

/// Which process has the devices after an abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AbortOutcome {
    /// The successor has released them, or has ended: they can be taken back.
    Released,
    /// The abort came too late: the successor had received the commit and has the devices.
    Committed,
}

/// Payload of [`Kind::Refused`], [`Kind::Failed`] and [`Kind::Aborted`]: why the successor did not take over.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) phase: Phase,
    pub(super) device: Option<String>,
    pub(super) reason: String,
}

impl Successor {
    /// Starts `image` as a child.
    pub(super) fn start(image: &Image, grace: Duration) -> Result<Self, Cause> {
        let (ours, theirs) = UnixStream::pair()
            .map_err(|source| Cause::Io { action: "create a socket for the successor", source })?;
        let child = image.start(theirs.into())?;
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let connection = Connection::new(ours.into())?;
        let pidfd = open_process(pid);
        Ok(Self {
            connection,
            pid,
            pidfd,
            child: Some(child),
            grace,
            may_act: false,
            finished: false,
            report: None,
        })
    }

    /// The process at the other end of `socket`.
    pub(super) fn connect(
        socket: UnixStream,
        allowed_uid: Option<u32>,
        grace: Duration,
    ) -> Result<Self, Cause> {
        let connection = Connection::new(socket.into())?;
        let pid = connection.peer(allowed_uid)?.pid;
        Ok(Self {
            connection,
            pid,
            pidfd: None,
            child: None,
            grace,
            may_act: false,
            finished: false,
            report: None,
        })
    }

    pub(super) const fn pid(&self) -> i32 {
        self.pid
    }

    fn wait(&self, until: Option<Instant>) -> Wait<'_> {
        Wait { until, cancel: None, process: self.pidfd.as_ref().map(AsFd::as_fd), busy_poll: self.may_act }
    }

    /// What to wait with until the successor is ready.
    pub(super) fn waiter(
        &self,
        time_out: Option<Duration>,
        cancel: Option<Cancel>,
    ) -> Result<Waiter, ConnectionError> {
        let process = self.pidfd.as_ref().and_then(|fd| fd.try_clone().ok());
        let waiter = Waiter::new(&self.connection, time_out, cancel, process)?;
        waiter.wait_for_room(&self.connection, true)?;
        Ok(waiter)
    }

    /// Sends as much as is possible of the offer, the state known before the switch. Returns whether the successor has answered
    /// that it is ready. Does not block.
    pub(super) fn step_offer(
        &mut self,
        offer: &mut Outgoing,
        fds: &[BorrowedFd<'_>],
        waiter: &Waiter,
    ) -> Result<bool, Cause> {
        if !offer.is_sent() && self.connection.try_send(offer, fds)? {
            waiter.wait_for_room(&self.connection, false)?;
            checkpoint(Checkpoint::Offered);
        }
        let mut answer = self.connection.receive_soon(false)?;
        if answer.is_none() {
            match waiter.check() {
                // It may have answered before it ended.
                Err(ConnectionError::Closed) => answer = self.connection.receive_soon(false)?,
                other => other?,
            }
        }
        let Some(answer) = answer else { return self.still_there() };
        match answer.kind {
            Kind::Ready => {
                if let Some(pid) = answer.sender.filter(|&pid| pid != self.pid || self.pidfd.is_none()) {
                    (self.pid, self.pidfd) = (pid, open_process(pid));
                }
                Ok(true)
            }
            Kind::Refused => Err(self.refused(&answer)),
            kind => Err(unexpected(kind)),
        }
    }

    /// `false`: there is no answer yet.
    fn still_there(&self) -> Result<bool, Cause> {
        if self.pidfd.is_some() && self.has_ended(Instant::now()) {
            return Err(ConnectionError::Closed.into());
        }
        Ok(false)
    }

    /// Says what is known about why a successor did not become ready.
    pub(super) fn explain(&mut self, cause: Cause, time_out: Option<Duration>) -> Cause {
        match (cause, time_out) {
            (Cause::Connection(ConnectionError::TimedOut), Some(after)) => {
                Cause::NotReady { pid: self.pid, after, child: self.child.is_some() }
            }
            (Cause::Connection(ConnectionError::Closed), _) if self.child.is_some() => {
                let ended = self.has_ended(Instant::now() + self.grace);
                let status = self.child.as_mut().filter(|_| ended).and_then(|child| child.try_wait().ok()?);
                match status {
                    Some(status) => Cause::SuccessorEnded { pid: self.pid, status: status.to_string() },
                    None => ConnectionError::Closed.into(),
                }
            }
            (cause, _) => cause,
        }
    }

    /// Whether the successor, which was ready, still waits for the switch. It may have given up since.
    ///
    /// # Errors
    /// [`Cause::Successor`] with its reason; [`Cause::Connection`] when it has ended.
    pub(super) fn check_waiting(&mut self) -> Result<(), Cause> {
        match self.connection.receive_soon(false)? {
            None => Ok(()),
            Some(message) if matches!(message.kind, Kind::Failed | Kind::Refused | Kind::Aborted) => {
                Err(self.refused(&message))
            }
            Some(message) => Err(unexpected(message.kind)),
        }
    }

    /// Wakes the successor before [`switch`](Self::switch). Does not block.
    pub(super) fn announce_switch(&self) {
        self.connection.announce();
    }

    /// Sends the rest of the state and waits until the successor has taken the devices over, at most until `until`.
    pub(super) fn switch(&mut self, state: &[u8], until: Option<Instant>) -> Result<(), Cause> {
        self.may_act = true;
        if let Err(error) = self.connection.send(Kind::Switch, state, &[], self.wait(until)) {
            // What it has sent before it closed the connection says why.
            self.check_waiting()?;
            return Err(error.into());
        }
        checkpoint(Checkpoint::Sent);
        let answer = self.connection.receive(self.wait(until))?;
        match answer.kind {
            Kind::Taken => Ok(()),
            Kind::Failed => Err(self.refused(&answer)),
            kind => Err(unexpected(kind)),
        }
    }

    /// Sends the commit and waits for its confirmation. From the confirmation on the devices belong to the successor, even
    /// if it fails later. A successor that ends before its confirmation does not get them.
    pub(super) fn commit(&mut self, until: Option<Instant>) -> Result<(), Cause> {
        self.connection.send(Kind::Commit, b"", &[], self.wait(until))?;
        checkpoint(Checkpoint::Committed);
        let answer = self.connection.receive(self.wait(until))?;
        match answer.kind {
            Kind::Done => {
                self.record_done(&answer);
                Ok(())
            }
            Kind::Failed => Err(self.refused(&answer)),
            kind => Err(unexpected(kind)),
        }
    }

    fn record_done(&mut self, answer: &Message) {
        self.finished = true;
        // A report that cannot be read does not change who has the devices.
        self.report = serde_json::from_slice(&answer.payload).ok();
    }

    /// The successor's report; `None` if it ended before it could send one.
    pub(super) const fn take_report(&mut self) -> Option<Report> {
        self.report.take()
    }

    fn refused(&mut self, answer: &Message) -> Cause {
        self.finished = true;
        match serde_json::from_slice::<Failure>(&answer.payload) {
            Ok(Failure { phase, device, reason }) => {
                Cause::Successor { pid: self.pid, phase, device, reason }
            }
            Err(e) => ConnectionError::Protocol { what: format!("its reason cannot be read: {e}") }.into(),
        }
    }

    /// Stops the successor from accessing the devices: it confirms the abort, or has ended, or is killed after the grace
    /// period. If it had received the commit already, it keeps them ([`AbortOutcome::Committed`]).
    ///
    /// # Errors
    /// [`Cause::Unresponsive`]: it neither answers nor can be killed, so it may still access the devices.
    pub(super) fn abort(&mut self) -> Result<AbortOutcome, Cause> {
        let until = Instant::now() + self.grace;
        if !self.finished {
            let sent = self.connection.send(Kind::Abort, b"", &[], self.wait(Some(until)));
            if !self.may_act && self.child.is_none() {
                // Before the switch it has only copies of descriptors, and drops them when it receives the abort or ends.
                self.finished = true;
                return Ok(AbortOutcome::Released);
            }
            let mut answer = sent.and_then(|()| self.receive_abort_answer(until));
            if !matches!(answer, Ok(_) | Err(ConnectionError::Closed))
                || answer.is_err() && !self.has_ended(until)
            {
                self.kill()?;
                answer = Err(ConnectionError::Closed);
            }
            self.finished = true;
            // Messages that it sent before it ended are still in the socket.
            let last = answer.or_else(|_| self.receive_abort_answer(Instant::now()));
            if matches!(last, Ok(AbortOutcome::Committed)) {
                return Ok(AbortOutcome::Committed);
            }
        }
        self.reap(until);
        Ok(AbortOutcome::Released)
    }

    fn receive_abort_answer(&mut self, until: Instant) -> Result<AbortOutcome, ConnectionError> {
        loop {
            let message = self.connection.receive(self.wait(Some(until)))?;
            match message.kind {
                Kind::Aborted | Kind::Failed | Kind::Refused => return Ok(AbortOutcome::Released),
                Kind::Done => {
                    self.record_done(&message);
                    return Ok(AbortOutcome::Committed);
                }
                // Sent before the abort arrived.
                _ => {}
            }
        }
    }

    fn has_ended(&self, until: Instant) -> bool {
        has_ended(self.pidfd.as_ref(), until)
    }

    fn kill(&mut self) -> Result<(), Cause> {
        let unresponsive = Cause::Unresponsive { pid: self.pid };
        let Some(pidfd) = self.pidfd.as_ref().filter(|_| self.pid != steps::own_pid()) else {
            return Err(unresponsive);
        };
        if pidfd_send_signal(pidfd, Signal::KILL).is_err() {
            return Err(unresponsive);
        }
        if self.has_ended(Instant::now() + KILL_TIMEOUT) { Ok(()) } else { Err(unresponsive) }
    }

    /// Waits for the child until `until`, then kills it: it was started for this update only.
    fn reap(&mut self, until: Instant) {
        let Some(mut child) = self.child.take() else { return };
        // The child need not be the process that answered: it may be a script that started it.
        let started = i32::try_from(child.id()).ok().and_then(open_process);
        if !has_ended(started.as_ref(), until) {
            let _ = child.kill();
        }
        let _ = child.wait();
    }

    /// The child, when the update is complete; the caller waits for it.
    pub(super) fn into_child(mut self) -> Option<Child> {
        self.child.take()
    }
}

/// Aborts an update that was prepared and never switched.
impl Drop for Successor {
    fn drop(&mut self) {
        if !self.finished || self.child.is_some() {
            // A destructor cannot report an error.
            let _ = self.abort();
        }
    }
}

/// Waits until `until` for the end of a process; returns whether it has ended. Without a pidfd the closed socket has to do
/// as the proof, so the answer is yes.
fn has_ended(pidfd: Option<&OwnedFd>, until: Instant) -> bool {
    let Some(pidfd) = pidfd else { return true };
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec::try_from(left).ok();
        let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            ended => return ended.is_ok_and(|count| count > 0),
        }
    }
}

fn open_process(pid: i32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
}

fn unexpected(kind: Kind) -> Cause {
    ConnectionError::Protocol { what: format!("{kind:?} is out of turn") }.into()
}
