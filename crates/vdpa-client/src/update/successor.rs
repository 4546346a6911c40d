//! The predecessor's side of the predecessor with a process that takes over.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::checkpoint::{Checkpoint, checkpoint};
use super::connection::{Connection, ConnectionError, Kind, Message, Wait};
use super::{Cancel, Cause, Image, Phase, Report, steps};

/// How long the kernel may take to end a process that was killed: one in the middle of a request ends when that does.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// A process that may take over.
#[derive(Debug)]
pub(super) struct Successor {
    connection: Connection,
    /// The process that answers; until it has, the one that was started or that the connection was made by.
    pid: i32,
    /// That process, when it is known that it is the one.
    pidfd: Option<OwnedFd>,
    child: Option<Child>,
    grace: Duration,
    /// Whether it may act on the devices: from the switch on.
    may_act: bool,
    /// Whether the predecessor has come to an end that both know of.
    finished: bool,
    /// What it says the update cost, when it has taken over.
    report: Option<Report>,
}

/// Who has the devices when an update was called off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AbortOutcome {
    /// Nobody does anything to them: they can be taken back.
    Released,
    /// Too late: the successor has heard the commit.
    Committed,
}

/// Why taking over failed, as the successor tells it.
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

    fn wait<'a>(&'a self, until: Option<Instant>, cancel: Option<&'a Cancel>) -> Wait<'a> {
        Wait { until, cancel, process: self.pidfd.as_ref().map(AsFd::as_fd), busy_poll: self.may_act }
    }

    /// Offers everything that is known and waits until the successor is ready.
    pub(super) fn offer(
        &mut self,
        state: &[u8],
        fds: &[BorrowedFd<'_>],
        cancel: Option<&Cancel>,
    ) -> Result<(), Cause> {
        self.connection.send(Kind::Offer, state, fds, self.wait(None, cancel))?;
        checkpoint(Checkpoint::Offered);
        let answer = self.connection.receive(self.wait(None, cancel))?;
        match answer.kind {
            Kind::Ready => {
                if let Some(pid) = answer.sender.filter(|&pid| pid != self.pid || self.pidfd.is_none()) {
                    (self.pid, self.pidfd) = (pid, open_process(pid));
                }
                Ok(())
            }
            Kind::Refused => Err(self.refused(&answer)),
            kind => Err(unexpected(kind)),
        }
    }

    /// Says that the rest of the state is about to come.
    pub(super) fn announce_switch(&self) {
        self.connection.announce();
    }

    /// Sends the rest of the state and waits until the successor has the devices.
    pub(super) fn switch(&mut self, state: &[u8], until: Option<Instant>) -> Result<(), Cause> {
        self.may_act = true;
        self.connection.send(Kind::Switch, state, &[], self.wait(until, None))?;
        checkpoint(Checkpoint::Sent);
        let answer = self.connection.receive(self.wait(until, None))?;
        match answer.kind {
            Kind::Taken => Ok(()),
            Kind::Failed => Err(self.refused(&answer)),
            kind => Err(unexpected(kind)),
        }
    }

    /// The last word, and the answer that it was answer. When that has come the devices are the successor's, whatever
    /// becomes of it; one that ends before does not get them.
    pub(super) fn commit(&mut self, until: Option<Instant>) -> Result<(), Cause> {
        self.connection.send(Kind::Commit, b"", &[], self.wait(until, None))?;
        checkpoint(Checkpoint::Committed);
        let answer = self.connection.receive(self.wait(until, None))?;
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
        // It has the devices, whatever it says of it.
        self.report = serde_json::from_slice(&answer.payload).ok();
    }

    /// What the successor says that the update cost, once it has the devices; from one that could say no more there is none.
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

    /// Makes sure that the successor does nothing to any device any more: it says so, or has ended, or is killed. Or hears
    /// that it has them for good.
    ///
    /// # Errors
    /// When it can neither be heard nor killed: it may go on acting on the devices.
    pub(super) fn abort(&mut self) -> Result<AbortOutcome, Cause> {
        let until = Instant::now() + self.grace;
        if !self.finished {
            let sent = self.connection.send(Kind::Abort, b"", &[], self.wait(Some(until), None));
            if !self.may_act && self.child.is_none() {
                // It has nothing but copies of descriptors, which it drops when it hears this, or ends.
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
            // What it had said before it ended is still there.
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
            let message = self.connection.receive(self.wait(Some(until), None))?;
            match message.kind {
                Kind::Aborted | Kind::Failed | Kind::Refused => return Ok(AbortOutcome::Released),
                Kind::Done => {
                    self.record_done(&message);
                    return Ok(AbortOutcome::Committed);
                }
                // Crossed with the abort.
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

    /// Collects a child that has ended or is about to; one that goes on is killed, since it was started for this.
    fn reap(&mut self, until: Instant) {
        let Some(mut child) = self.child.take() else { return };
        // It need not be the process that answered: a script may have started that.
        let started = i32::try_from(child.id()).ok().and_then(open_process);
        if !has_ended(started.as_ref(), until) {
            let _ = child.kill();
        }
        let _ = child.wait();
    }

    /// The child, when the update is done.
    pub(super) fn into_child(mut self) -> Option<Child> {
        self.child.take()
    }
}

/// An update that is given up in prepare, with the program going on.
impl Drop for Successor {
    fn drop(&mut self) {
        if !self.finished || self.child.is_some() {
            // Nobody is there to be told; what is done is what can be done.
            let _ = self.abort();
        }
    }
}

/// Whether a process has ended, waiting for that. Where the kernel cannot tell, a closed socket has to do.
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
