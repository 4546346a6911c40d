//! Stops a device as its strategy says, and starts it again when the update fails.

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Status};
use vdpa_sys::clock::monotonic_ns;

use super::checkpoint::{Checkpoint, checkpoint};
use super::save::Memories;
use super::{Cause, DeviceReport, Phase, Strategy, UpdateError, steps};
use crate::device::DeviceFile;
use crate::dma::Nameless;
use crate::error::Error;
use crate::queue::SavedDriver;
use crate::session::{Session, Setup};
use crate::state::{mappings, v2};

/// A device that is stopped as its strategy says. With [`Strategy::Live`] it still runs; only its driver is stopped.
#[derive(Debug)]
pub(super) struct StoppedDevice<D> {
    pub(super) name: String,
    pub(super) strategy: Strategy,
    /// `None` when the device is closed ([`Strategy::Reopen`]).
    pub(super) ops: Option<D>,
    pub(super) setup: Setup,
    /// Vring bases in the order of [`Setup::vrings`]; empty with the strategies `live` and `resume`, which keep the vrings.
    bases: Vec<u32>,
    pub(super) suspend_ns: u64,
    /// Whether SUSPEND succeeded.
    suspended: bool,
}

/// Result of a roll-back: the working session, or why the device is lost.
pub(super) type RollBack<D> = Result<Session<D>, UpdateError>;

impl<D: DeviceFile> StoppedDevice<D> {
    /// Stops a device. On failure rolls the device back and returns the error with the result of that.
    ///
    /// Blocks as long as SUSPEND, reset and close take.
    pub(super) fn stop(
        name: String,
        session: Session<D>,
        strategy: Strategy,
    ) -> Result<Self, Box<(UpdateError, RollBack<D>)>> {
        let (ops, setup) = session.into_parts();
        let mut device =
            Self { name, strategy, ops: None, setup, bases: Vec::new(), suspend_ns: 0, suspended: false };
        let begin = monotonic_ns();
        let stopped = device.stop_steps(&ops);
        if stopped.is_ok() && strategy == Strategy::Reopen {
            drop(ops);
        } else {
            device.ops = Some(ops);
        }
        device.suspend_ns = monotonic_ns().saturating_sub(begin);
        match stopped {
            Ok(()) => {
                checkpoint(Checkpoint::Stopped);
                Ok(device)
            }
            Err(e) => {
                let error = device.error(Phase::Suspend, e);
                Err(Box::new((error, device.undo_stop())))
            }
        }
    }

    fn stop_steps(&mut self, ops: &D) -> Result<(), Error> {
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

    /// Rolls back a stop that failed part-way.
    fn undo_stop(self) -> RollBack<D> {
        let known = self.setup.backend.has(BackendFeatures::RESUME);
        let undone = match &self.ops {
            // The bases are known, so the reset may have happened: set everything up again.
            Some(ops) if self.strategy == Strategy::Reset && !self.bases.is_empty() => {
                steps::undo_reset(ops, &self.setup, &self.bases)
            }
            // RESUME of a device that is not suspended changes nothing.
            Some(ops) if known && self.strategy != Strategy::Live => steps::resume(ops),
            // Suspended without known bases and without RESUME: the device cannot be started again.
            Some(_) if self.suspended => {
                Err(Error::Request { request: "VHOST_VDPA_RESUME", source: Errno::OPNOTSUPP })
            }
            _ => Ok(()),
        };
        steps::kick_all(&self.setup);
        self.finish(undone.map_err(|e| (Phase::Resume, e.into())))
    }

    /// Starts the device again in this process. Only while no other process can have accessed it.
    pub(super) fn undo(mut self) -> RollBack<D> {
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

    /// Starts the device again in this process after a successor has released it. The successor may have done any of its
    /// steps, so ownership and mappings are set again.
    pub(super) fn take_back(mut self) -> RollBack<D> {
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

    /// Resets the device and sets it up again. If the successor had started it, the ring positions have moved: they are read
    /// again from the suspended device.
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

    fn finish(self, undone: Result<(), (Phase, Cause)>) -> RollBack<D> {
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

    /// The part of the state that depends on the device being stopped.
    pub(super) fn saved(&self, memories: &Memories) -> v2::DeviceState {
        let mut state = v2::DeviceState {
            suspend_ns: self.suspend_ns,
            bases: self.bases.clone(),
            writeback: self.setup.writeback,
            ..v2::DeviceState::default()
        };
        for queue in self.setup.queues.iter().filter_map(|slot| slot.queue.as_ref()) {
            match queue.saved() {
                SavedDriver::Split(driver) => state.drivers.push(driver),
                SavedDriver::Packed(driver) => state.packed_drivers.push(driver),
            }
        }
        let mapping = |(&iova, mapping): (&u64, &Nameless)| {
            let &Nameless { ref memory, offset, size, perm } = mapping;
            // The switch has checked that each memory is known.
            let memory = memories.index(memory).unwrap_or(u32::MAX);
            mappings::Mapping { iova, size, offset, memory, perm: perm.0 }
        };
        state.mappings = self.setup.regions.nameless().iter().map(mapping).collect();
        state.disabled = self.setup.vrings().filter(|v| !v.enabled).map(|v| v.index.0).collect();
        state
    }
}
