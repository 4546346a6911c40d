//! The successor's part of the conversation with its predecessor.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::link::{Kind, Link, LinkError, Message, Wait};
use super::points::{Point, reach};
use super::successor::Failure;
use super::{Cause, Phase, UpdateError};
use crate::error::chain;

/// The successor's end of the socket.
#[derive(Debug)]
pub(super) struct Conversation {
    link: Link,
    /// The predecessor, once it has said something.
    process: Option<OwnedFd>,
    over: bool,
}

impl Conversation {
    pub(super) fn new(socket: UnixStream, allowed: Option<u32>) -> Result<Self, Cause> {
        let link = Link::new(socket.into())?;
        link.peer(allowed)?;
        Ok(Self { link, process: None, over: false })
    }

    pub(super) fn say(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Cause> {
        Ok(self.link.send(kind, payload, &[], Wait::default())?)
    }

    /// Waits for one kind of message, as long as it takes: only the predecessor decides.
    pub(super) fn hear(&mut self, kind: Kind) -> Result<Message, Cause> {
        let message = self.link.receive(Wait { soon: kind == Kind::Commit, ..Wait::default() })?;
        if self.process.is_none() {
            let pid = message.sender.and_then(Pid::from_raw);
            self.process = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        }
        match message.kind {
            heard if heard == kind => Ok(message),
            Kind::Abort => Err(Cause::Aborted),
            heard => Err(LinkError::Protocol { what: format!("{heard:?} is out of turn") }.into()),
        }
    }

    /// Says that the devices are taken over, and waits for the predecessor's last word. One that has ended cannot say it,
    /// and cannot want the devices back: then they are this process's. The predecessor keeps hold of them until it has heard
    /// that its word has arrived, or that this process has ended before. The `report` for it is made while the word is under way.
    pub(super) fn agree(&mut self, report: impl FnOnce() -> Vec<u8>) -> Result<(), Cause> {
        match self.say(Kind::Taken, b"") {
            Ok(()) => reach(Point::TakenSent),
            // It may have called the update off before it ended: that is still to be read.
            Err(Cause::Link(LinkError::Gone)) => {}
            Err(e) => return Err(e),
        }
        let report = report();
        match self.hear(Kind::Commit) {
            Ok(_) => match self.say(Kind::Done, &report) {
                Ok(()) | Err(Cause::Link(LinkError::Gone)) => {}
                Err(e) => return Err(e),
            },
            Err(Cause::Link(LinkError::Gone)) if self.predecessor_has_ended() => {}
            Err(e) => return Err(e),
        }
        self.over = true;
        Ok(())
    }

    /// Whether the process has ended, waiting for a moment: its socket closes before it is gone.
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

    /// Says why not. Nobody is there to be told when that fails.
    pub(super) fn say_no(&mut self, kind: Kind, error: &UpdateError) {
        if self.over {
            return;
        }
        self.over = true;
        let failure =
            Failure { phase: error.phase, device: error.device.clone(), reason: chain(&error.source) };
        let payload = serde_json::to_vec(&failure).unwrap_or_default();
        let _ = self.link.send(kind, &payload, &[], Wait::default());
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        let source = Cause::Refused { reason: "the successor has given up".to_owned() };
        self.say_no(Kind::Refused, &UpdateError { phase: Phase::Load, device: None, source });
    }
}
