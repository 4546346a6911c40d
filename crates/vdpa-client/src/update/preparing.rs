//! Waiting for a successor to become ready.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::mm_reaper::MmReaper;

use super::checkpoint::{Checkpoint, checkpoint};
use super::connection::{Kind, Outgoing};
use super::describe::general;
use super::prepared::Target;
use super::successor::Successor;
use super::waiter::Waiter;
use super::{Cause, Described, Image, Prepared, UpdateError, Via, Way, save};
use crate::state::{self, Sections};

/// An update whose successor is not ready yet, for a program with an event loop: when [the descriptor](Self::as_fd) is readable,
/// [`step`](Self::step) goes on. The devices may be driven meanwhile.
///
/// Dropping it aborts the update.
#[derive(Debug)]
pub struct Preparing {
    /// `None` after the last step.
    described: Option<Described>,
    stage: Stage,
    waiter: Waiter,
    begin: u64,
}

#[derive(Debug)]
enum Stage {
    /// The last step was made.
    Over,
    /// An exec that nobody is asked about.
    Exec(Image),
    /// A process is asked; afterwards it gets the devices, or the image is executed.
    Asked { successor: Box<Successor>, offer: Outgoing, then: Then },
}

#[derive(Debug)]
enum Then {
    Exec(Image),
    Process(Way),
}

impl Preparing {
    pub(super) fn new(mut described: Described, via: Via) -> Result<Self, UpdateError> {
        let begin = monotonic_ns();
        let way = via.way();
        way.name().clone_into(&mut described.known.update.way);
        let plan = &described.plan;
        let (grace, time_out, cancel) = (plan.grace, plan.prepare_timeout, plan.cancel.clone());
        let connect = || -> Result<_, Cause> {
            let bytes = state::encode(&described.sections()?)?;
            if let Via::Exec(image) | Via::Fork(image) = &via {
                image.check()?;
            }
            checkpoint(Checkpoint::Checked);
            let (successor, then) = match via {
                Via::Exec(image) if !plan.dry_run => {
                    // Ready at once.
                    let event = vdpa_sys::eventfd::EventFd::new();
                    let event =
                        event.map_err(|source| Cause::System { action: "make an eventfd", source })?;
                    event.signal();
                    return Ok((Stage::Exec(image), Waiter::new(event, None, None, None)?));
                }
                Via::Exec(image) => (Successor::start(&image, grace)?, Then::Exec(image)),
                Via::Fork(image) => (Successor::start(&image, grace)?, Then::Process(way)),
                Via::HandOver(socket) => {
                    (Successor::connect(socket, plan.allowed_uid, grace)?, Then::Process(way))
                }
            };
            checkpoint(Checkpoint::Connected);
            let waiter = successor.waiter(time_out, cancel)?;
            let offer = Outgoing::new(Kind::Offer, &bytes, described.table.fds().len());
            Ok((Stage::Asked { successor: Box::new(successor), offer, then }, waiter))
        };
        let (stage, waiter) = connect().map_err(general)?;
        Ok(Self { described: Some(described), stage, waiter, begin })
    }

    /// Goes on as far as is possible without waiting; returns the prepared update once the successor is ready. Not to be called
    /// after that.
    ///
    /// # Errors
    /// As [`Described::prepare`]; the update is over.
    pub fn step(&mut self) -> Result<Option<Prepared>, UpdateError> {
        let ready = match (&mut self.stage, &self.described) {
            (Stage::Asked { successor, offer, .. }, Some(described)) => {
                let asked = successor.step_offer(offer, &described.table.fds(), &self.waiter);
                let time_out = described.plan.prepare_timeout;
                asked.map_err(|cause| general(successor.explain(cause, time_out)))
            }
            _ => Ok(true),
        };
        match ready {
            Ok(false) => return Ok(None),
            Ok(true) => {}
            Err(error) => {
                self.stage = Stage::Over;
                return Err(error);
            }
        }
        let over = || general(Cause::Refused { reason: "its last step was made before".to_owned() });
        let described = self.described.take().ok_or_else(over)?;
        let stage = std::mem::replace(&mut self.stage, Stage::Over);
        finish(described, stage, self.begin).map(Some).map_err(general)
    }

    /// Blocks until a step is worth while.
    ///
    /// # Errors
    /// [`UpdateError`] when the kernel refuses to wait.
    pub fn wait(&self) -> Result<(), UpdateError> {
        self.waiter.wait().map_err(|e| general(e.into()))
    }

    /// Process id of the successor; `None` for an exec that nobody is asked about.
    #[must_use]
    pub fn successor(&self) -> Option<i32> {
        match &self.stage {
            Stage::Asked { successor, .. } => Some(successor.pid()),
            Stage::Over | Stage::Exec(_) => None,
        }
    }
}

impl AsFd for Preparing {
    /// Readable when a step is worth while: the successor has answered or ended, the time is over, or it was cancelled.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waiter.as_fd()
    }
}

impl AsRawFd for Preparing {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

fn finish(mut described: Described, stage: Stage, begin: u64) -> Result<Prepared, Cause> {
    let to = match stage {
        Stage::Exec(image) | Stage::Asked { then: Then::Exec(image), .. } => {
            image.prefetch();
            let sections = exec_sections(&described)?;
            // An exec keeps the originals.
            described.table = save::Table::default();
            Target::Exec(image, MmReaper::spawn().ok(), sections)
        }
        Stage::Asked { successor, then: Then::Process(way), .. } => Target::Process(way, *successor),
        Stage::Over => return Err(Cause::Refused { reason: "its last step was made before".to_owned() }),
    };
    checkpoint(Checkpoint::Ready);
    let prepare_ns = monotonic_ns().saturating_sub(begin).saturating_add(described.took_ns);
    Ok(Prepared { described, to, prepare_ns })
}

/// The sections for an exec: descriptors are their numbers in this process.
fn exec_sections(described: &Described) -> Result<Sections, Cause> {
    let mut known = described.known.clone();
    save::by_number(&mut known, &described.table);
    let mut sections = described.plan.sections.clone();
    known.put(&mut sections)?;
    described.files.put(&mut sections)?;
    Ok(sections)
}
