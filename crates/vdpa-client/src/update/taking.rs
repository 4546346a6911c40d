//! Waiting for the predecessor to switch and to commit.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use vdpa_sys::clock::monotonic_ns;

use super::checkpoint::{Checkpoint, checkpoint};
use super::connection::Kind;
use super::loaded::Taken;
use super::predecessor::Predecessor;
use super::waiter::Waiter;
use super::{Cause, Loaded, Phase, Restored, UpdateError, Way};
use crate::device::DeviceFile;

/// A take-over that waits for its predecessor, for a program with an event loop: when [the descriptor](Self::as_fd) is readable,
/// [`step`](Self::step) goes on. The step in which the devices are taken over makes requests, so it takes as long as
/// [`Incoming::take_over`](super::Incoming::take_over) after the switch.
///
/// Dropping it refuses the update: the predecessor keeps its devices.
#[derive(Debug)]
pub struct TakingOver<D> {
    predecessor: Predecessor,
    stage: Stage<D>,
    waiter: Waiter,
    dry_run: bool,
}

#[derive(Debug)]
enum Stage<D> {
    /// The last step was made.
    Over,
    Switch(Box<Loaded<D>>),
    Commit {
        taken: Box<Taken<D>>,
        report: Vec<u8>,
        since: u64,
    },
}

fn at(phase: Phase) -> impl Fn(Cause) -> UpdateError {
    move |source| UpdateError { phase, device: None, source }
}

impl<D: DeviceFile> TakingOver<D> {
    /// Maps the memory and reports that this process is ready.
    pub(super) fn new(
        loaded: Loaded<D>,
        mut predecessor: Predecessor,
        waiter: Waiter,
    ) -> Result<Self, UpdateError> {
        if let Err(error) = loaded.map_memory() {
            predecessor.reject(Kind::Refused, &error);
            return Err(error);
        }
        // A dry run takes no device over.
        let dry_run = loaded.way() == Way::Exec;
        if !dry_run {
            loaded.announce_to_servers();
        }
        let stage = Stage::Switch(Box::new(loaded));
        let mut taking = Self { predecessor, stage, waiter, dry_run };
        match taking.predecessor.send(Kind::Ready, b"") {
            Ok(()) => checkpoint(Checkpoint::ReadySent),
            Err(cause) => return Err(taking.fail(at(Phase::Prepare)(cause))),
        }
        Ok(taking)
    }

    /// Goes on as far as is possible without waiting for the predecessor; returns the devices once they are this program's. Not
    /// to be called after that.
    ///
    /// # Errors
    /// As [`Incoming::take_over`](super::Incoming::take_over); the update is over.
    pub fn step(&mut self) -> Result<Option<Restored<D>>, UpdateError> {
        self.try_step().map_err(|error| self.fail(error))
    }

    fn try_step(&mut self) -> Result<Option<Restored<D>>, UpdateError> {
        if let Stage::Switch(_) = &self.stage {
            let message = self.predecessor.receive(Kind::Switch, &self.waiter).map_err(at(Phase::Prepare))?;
            let Some(message) = message else { return Ok(None) };
            let received = monotonic_ns();
            checkpoint(Checkpoint::SwitchReceived);
            if let Stage::Switch(mut loaded) = std::mem::replace(&mut self.stage, Stage::Over) {
                let switch = loaded.read_switch(&message.payload)?;
                let mut taken = loaded.begin(switch, received)?;
                taken.become_owner()?;
                taken.start_all_but_reopened()?;
                let since = monotonic_ns();
                self.predecessor.taken().map_err(at(Phase::Commit))?;
                // While the commit is on its way, so that it costs no time. The predecessor works without the report: an encoding
                // error is no reason to fail.
                let report = serde_json::to_vec(&taken.report).unwrap_or_default();
                self.stage = Stage::Commit { taken: Box::new(taken), report, since };
            }
        }
        if let Stage::Commit { report, .. } = &self.stage {
            if !self.predecessor.commit(report, &self.waiter).map_err(at(Phase::Commit))? {
                return Ok(None);
            }
            checkpoint(Checkpoint::CommitReceived);
        }
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Commit { mut taken, since, .. } => {
                taken.report.commit = monotonic_ns().saturating_sub(since);
                taken.finish().map(Some)
            }
            Stage::Over | Stage::Switch(_) => {
                let reason = "its last step was made before".to_owned();
                Err(at(Phase::Prepare)(Cause::Refused { reason }))
            }
        }
    }

    /// Blocks until a step is worth while.
    ///
    /// # Errors
    /// [`UpdateError`] when the kernel refuses to wait.
    pub fn wait(&self) -> Result<(), UpdateError> {
        self.waiter.wait().map_err(|e| at(Phase::Prepare)(e.into()))
    }
}

impl<D> TakingOver<D> {
    /// Closes everything of the devices and tells the predecessor, which may take them back then.
    fn fail(&mut self, mut error: UpdateError) -> UpdateError {
        self.stage = Stage::Over;
        if matches!(error.source, Cause::Aborted) && self.dry_run {
            error.source = Cause::DryRun;
        }
        let aborted = matches!(error.source, Cause::Aborted | Cause::DryRun);
        self.predecessor.reject(if aborted { Kind::Aborted } else { Kind::Failed }, &error);
        error
    }
}

/// The predecessor gets the devices back: it hears of it when this process has closed them.
impl<D> Drop for TakingOver<D> {
    fn drop(&mut self) {
        if !matches!(self.stage, Stage::Over) {
            let reason = "the successor has given up".to_owned();
            self.fail(at(Phase::Prepare)(Cause::Refused { reason }));
        }
    }
}

impl<D> AsFd for TakingOver<D> {
    /// Readable when a step is worth while: the predecessor has sent something or has ended, the time is over, or it was
    /// cancelled.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waiter.as_fd()
    }
}

impl<D> AsRawFd for TakingOver<D> {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
