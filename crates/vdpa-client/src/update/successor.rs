//! The predecessor's side of the conversation with a process that takes over.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::link::{Kind, Link, LinkError, Message, Wait};
use super::points::{Point, reach};
use super::{Cancel, Cause, Image, Phase, Report, steps};

/// How long a successor may take to let go of the devices before it is killed. Until it has let go they cannot be taken
/// back, so this is part of the blackout of an update that fails in this rare way.
const GRACE: Duration = Duration::from_secs(2);

/// A process that may take over.
#[derive(Debug)]
pub(super) struct Successor {
    link: Link,
    pid: i32,
    pidfd: Option<OwnedFd>,
    child: Option<Child>,
    /// Whether it may act on the devices: from the switch on.
    acting: bool,
    /// Whether the conversation has come to an end that both know of.
    over: bool,
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
    pub(super) fn start(image: &Image) -> Result<Self, Cause> {
        let (ours, theirs) = UnixStream::pair()
            .map_err(|source| Cause::Io { action: "create a socket for the successor", source })?;
        let child = image.start(theirs.into())?;
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let link = Link::new(ours.into())?;
        Ok(Self { link, pid, pidfd: open_process(pid), child: Some(child), acting: false, over: false })
    }

    /// The process at the other end of `socket`.
    pub(super) fn connect(socket: UnixStream, allowed_uid: Option<u32>) -> Result<Self, Cause> {
        let link = Link::new(socket.into())?;
        let peer = link.peer(allowed_uid)?;
        Ok(Self {
            link,
            pid: peer.pid,
            pidfd: open_process(peer.pid),
            child: None,
            acting: false,
            over: false,
        })
    }

    pub(super) const fn pid(&self) -> i32 {
        self.pid
    }

    fn wait<'a>(&'a self, until: Option<Instant>, cancel: Option<&'a Cancel>) -> Wait<'a> {
        Wait { until, cancel, process: self.pidfd.as_ref().map(AsFd::as_fd) }
    }

    /// Offers everything that is known and waits until the successor is ready.
    pub(super) fn offer(
        &mut self,
        state: &[u8],
        fds: &[BorrowedFd<'_>],
        cancel: Option<&Cancel>,
    ) -> Result<(), Cause> {
        self.link.send(Kind::Offer, state, fds, self.wait(None, cancel))?;
        reach(Point::Offered);
        let answer = self.link.receive(self.wait(None, cancel))?;
        match answer.kind {
            Kind::Ready => Ok(()),
            Kind::Refused => Err(self.refused(&answer)),
            kind => Err(unexpected(kind)),
        }
    }

    /// Sends the rest of the state and waits until the successor has the devices.
    pub(super) fn switch(&mut self, state: &[u8], until: Option<Instant>) -> Result<Report, Cause> {
        self.acting = true;
        self.link.send(Kind::Switch, state, &[], self.wait(until, None))?;
        reach(Point::Sent);
        let answer = self.link.receive(self.wait(until, None))?;
        match answer.kind {
            Kind::Taken => serde_json::from_slice(&answer.payload).map_err(|e| {
                Cause::Link(LinkError::Protocol { what: format!("its report cannot be read: {e}") })
            }),
            Kind::Failed => Err(self.refused(&answer)),
            kind => Err(unexpected(kind)),
        }
    }

    /// The last word. When it is sent the devices are the successor's, whatever becomes of it.
    pub(super) fn commit(&mut self, until: Option<Instant>) -> Result<(), Cause> {
        self.link.send(Kind::Commit, b"", &[], self.wait(until, None))?;
        self.over = true;
        reach(Point::Committed);
        Ok(())
    }

    fn refused(&mut self, answer: &Message) -> Cause {
        self.over = true;
        match serde_json::from_slice::<Failure>(&answer.payload) {
            Ok(Failure { phase, device, reason }) => {
                Cause::Successor { pid: self.pid, phase, device, reason }
            }
            Err(e) => LinkError::Protocol { what: format!("its reason cannot be read: {e}") }.into(),
        }
    }

    /// Makes sure that the successor does nothing to any device any more: it says so, or has ended, or is killed.
    ///
    /// # Errors
    /// When it can neither be heard nor killed: it may go on acting on the devices.
    pub(super) fn call_off(&mut self) -> Result<(), Cause> {
        let until = Instant::now() + GRACE;
        if !self.over {
            let said = self.link.send(Kind::Abort, b"", &[], self.wait(Some(until), None));
            if !self.acting && self.child.is_none() {
                // It has nothing but copies of descriptors, which it drops when it hears this, or ends.
                self.over = true;
                return Ok(());
            }
            let heard = said.and_then(|()| self.hear_the_end(until));
            self.over = match heard {
                Ok(()) => true,
                // A closed socket is what an ending process leaves first; its other descriptors follow.
                Err(LinkError::Gone) => self.has_ended(until),
                Err(_) => false,
            };
        }
        if !self.over {
            self.kill()?;
            self.over = true;
        }
        self.reap(until);
        Ok(())
    }

    fn hear_the_end(&self, until: Instant) -> Result<(), LinkError> {
        loop {
            match self.link.receive(self.wait(Some(until), None))?.kind {
                Kind::Aborted | Kind::Failed | Kind::Refused => return Ok(()),
                // Crossed with the abort.
                _ => {}
            }
        }
    }

    /// Whether the process has ended, waiting for that. Where the kernel cannot tell, a closed socket has to do.
    fn has_ended(&self, until: Instant) -> bool {
        let Some(pidfd) = &self.pidfd else { return true };
        let left = until.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec::try_from(left).ok();
        let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
        let ended = rustix::event::poll(&mut fds, timeout.as_ref());
        ended.is_ok_and(|count| count > 0)
    }

    fn kill(&mut self) -> Result<(), Cause> {
        let silent = Cause::Silent { pid: self.pid };
        let Some(pidfd) = self.pidfd.as_ref().filter(|_| self.pid != steps::own_pid()) else {
            return Err(silent);
        };
        if pidfd_send_signal(pidfd, Signal::KILL).is_err() {
            return Err(silent);
        }
        if self.has_ended(Instant::now() + GRACE) { Ok(()) } else { Err(silent) }
    }

    /// Collects a child that has ended or is about to; one that goes on is killed, since it was started for this.
    fn reap(&mut self, until: Instant) {
        if self.child.is_none() {
            return;
        }
        if !self.has_ended(until) {
            let _ = self.kill();
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }

    /// The child, when the update is done.
    pub(super) fn into_child(mut self) -> Option<Child> {
        self.child.take()
    }
}

/// An update that is given up in prepare, with the program going on.
impl Drop for Successor {
    fn drop(&mut self) {
        if !self.over || self.child.is_some() {
            // Nobody is there to be told; what is done is what can be done.
            let _ = self.call_off();
        }
    }
}

fn open_process(pid: i32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
}

fn unexpected(kind: Kind) -> Cause {
    LinkError::Protocol { what: format!("{kind:?} is out of turn") }.into()
}
