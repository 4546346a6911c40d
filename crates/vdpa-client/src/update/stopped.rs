//! Bringing a device to rest for its strategy, and back.

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Status};
use vdpa_sys::clock::monotonic_ns;

use super::checkpoint::{Checkpoint, checkpoint};
use super::{Cause, DeviceReport, Phase, Strategy, UpdateError, steps};
use crate::device::DeviceFile;
use crate::error::Error;
use crate::queue::SavedDriver;
use crate::session::{Session, Setup};
use crate::state::v2;

/// A device as its strategy wants it for the switch. With [`Strategy::Live`] it runs, and only nobody drives it.
#[derive(Debug)]
pub(super) struct AtRest<D> {
    pub(super) name: String,
    pub(super) strategy: Strategy,
    /// `None` when it is closed.
    pub(super) ops: Option<D>,
    pub(super) setup: Setup,
    /// In the order of [`Setup::vrings`]; empty when nobody needs them.
    bases: Vec<u32>,
    pub(super) suspend_ns: u64,
    /// Whether SUSPEND was answered.
    suspended: bool,
}

/// The device as it was, working; or why it is not.
pub(super) type Undone<D> = Result<Session<D>, UpdateError>;

impl<D: DeviceFile> AtRest<D> {
    /// Brings a device to rest. On failure it is undone.
    pub(super) fn bring(
        name: String,
        session: Session<D>,
        strategy: Strategy,
    ) -> Result<Self, Box<(UpdateError, Undone<D>)>> {
        let (ops, setup) = session.into_parts();
        let mut device =
            Self { name, strategy, ops: None, setup, bases: Vec::new(), suspend_ns: 0, suspended: false };
        let begin = monotonic_ns();
        let stopped = device.stop(&ops);
        if stopped.is_ok() && strategy == Strategy::Reopen {
            drop(ops);
        } else {
            device.ops = Some(ops);
        }
        device.suspend_ns = monotonic_ns().saturating_sub(begin);
        match stopped {
            Ok(()) => {
                checkpoint(Checkpoint::AtRest);
                Ok(device)
            }
            Err(e) => {
                let error = device.error(Phase::Suspend, e);
                Err(Box::new((error, device.undo_stop())))
            }
        }
    }

    fn stop(&mut self, ops: &D) -> Result<(), Error> {
        let suspends = match self.strategy {
            Strategy::Live => false,
            Strategy::Resume | Strategy::Reset => true,
            Strategy::Reopen => self.setup.backend.has(BackendFeatures::SUSPEND),
        };
        if suspends {
            steps::suspend(ops)?;
            self.suspended = true;
            checkpoint(Checkpoint::Suspended);
        }
        if matches!(self.strategy, Strategy::Reset | Strategy::Reopen) {
            self.bases = steps::bases(ops, &self.setup)?;
            self.setup.writeback = steps::writeback(ops, &self.setup)?;
        }
        if self.strategy == Strategy::Reset {
            steps::reset(ops)?;
        }
        Ok(())
    }

    /// After a stop that failed in the middle.
    fn undo_stop(self) -> Undone<D> {
        let known = self.setup.backend.has(BackendFeatures::RESUME);
        let undone = match &self.ops {
            // It has answered with its bases: whether the reset took place is not known, so all is set up again.
            Some(ops) if self.strategy == Strategy::Reset && !self.bases.is_empty() => {
                steps::undo_reset(ops, &self.setup, &self.bases)
            }
            // RESUME of a device that is not suspended changes nothing.
            Some(ops) if known && self.strategy != Strategy::Live => steps::resume(ops),
            // It stands still, does not say where, and cannot be told to go on: there is nothing to give back.
            Some(_) if self.suspended => {
                Err(Error::Request { request: "VHOST_VDPA_RESUME", source: Errno::OPNOTSUPP })
            }
            _ => Ok(()),
        };
        steps::kick_all(&self.setup);
        self.finish(undone.map_err(|e| (Phase::Resume, e.into())))
    }

    /// Lets the device go on in this process, which nobody else has taken it from.
    pub(super) fn undo(mut self) -> Undone<D> {
        let undone = match (self.strategy, &self.ops) {
            (Strategy::Live, _) => Ok(()),
            (Strategy::Resume, Some(ops)) => steps::resume(ops)
                .map(|()| steps::kick_all(&self.setup))
                .map_err(|e| (Phase::Resume, e.into())),
            (Strategy::Reset, Some(ops)) => {
                steps::undo_reset(ops, &self.setup, &self.bases).map_err(|e| (Phase::Resume, e.into()))
            }
            (Strategy::Reopen | Strategy::Resume | Strategy::Reset, _) => self.reopen(),
        };
        self.finish(undone)
    }

    /// Lets the device go on in this process after a successor may have done anything of its part, and has let go.
    pub(super) fn take_back(mut self) -> Undone<D> {
        let undone = match (self.strategy, &self.ops) {
            (Strategy::Reopen, _) | (_, None) => self.reopen(),
            (strategy, Some(ops)) => {
                let back = match strategy {
                    Strategy::Live => steps::claim(ops).map(|()| steps::kick_all(&self.setup)),
                    Strategy::Resume => steps::suspend(ops)
                        .and_then(|()| steps::claim(ops))
                        .and_then(|()| steps::remap(ops, &self.setup, false))
                        .and_then(|()| steps::resume(ops))
                        .map(|()| steps::kick_all(&self.setup)),
                    Strategy::Reset | Strategy::Reopen => Self::reset_again(ops, &self.setup, &self.bases),
                };
                back.map_err(|e| (Phase::Resume, Cause::from(e)))
            }
        };
        self.finish(undone)
    }

    /// The successor may have let the device run, which has moved on then.
    fn reset_again(ops: &D, setup: &Setup, bases: &[u32]) -> Result<(), Error> {
        steps::claim(ops)?;
        let status = ops.status().map_err(Error::request("VHOST_VDPA_GET_STATUS"))?;
        let moved = if status.contains(Status::DRIVER_OK) {
            steps::suspend(ops)?;
            Some(steps::bases(ops, setup)?)
        } else {
            None
        };
        steps::undo_reset(ops, setup, moved.as_deref().unwrap_or(bases))
    }

    fn reopen(&mut self) -> Result<(), (Phase, Cause)> {
        let path = self.setup.path.clone().unwrap_or_default();
        let mut report = DeviceReport::new(&self.name, self.strategy);
        let ops = steps::reopen(&path, &self.setup, &self.bases, &mut report)?;
        steps::run_again(&ops, &self.setup).map_err(|e| (Phase::Resume, e.into()))?;
        self.ops = Some(ops);
        Ok(())
    }

    fn finish(self, undone: Result<(), (Phase, Cause)>) -> Undone<D> {
        let Self { name, ops, setup, .. } = self;
        match (undone, ops) {
            (Ok(()), Some(ops)) => Ok(Session::new(ops, setup)),
            (Ok(()), None) => {
                Err(UpdateError { phase: Phase::Resume, device: Some(name), source: Cause::NoPath })
            }
            (Err((phase, source)), _) => Err(UpdateError { phase, device: Some(name), source }),
        }
    }

    fn error(&self, phase: Phase, source: impl Into<Cause>) -> UpdateError {
        UpdateError { phase, device: Some(self.name.clone()), source: source.into() }
    }

    /// What the successor is told of it.
    pub(super) fn saved(&self) -> v2::AtRest {
        let mut rest = v2::AtRest {
            suspend_ns: self.suspend_ns,
            bases: self.bases.clone(),
            writeback: self.setup.writeback,
            ..v2::AtRest::default()
        };
        for queue in &self.setup.queues {
            match queue.saved() {
                SavedDriver::Split(driver) => rest.drivers.push(driver),
                SavedDriver::Packed(driver) => rest.packed_drivers.push(driver),
            }
        }
        rest
    }
}
