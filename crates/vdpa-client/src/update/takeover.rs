//! The steps by which a successor takes its devices over.

use std::sync::Arc;

use vdpa_sys::clock::monotonic_ns;

use super::checkpoint::{Checkpoint, checkpoint};
use super::load::LoadedDevice;
use super::{Cause, DeviceReport, Devices, Phase, Report, Strategy, UpdateError, steps};
use crate::device::DeviceFile;
use crate::memory::Memory;
use crate::session::Session;
use crate::state::v2;

/// Devices that are being taken over.
#[derive(Debug)]
pub(super) struct TakeOver<D> {
    devices: Vec<(LoadedDevice<D>, Vec<u32>)>,
    running: usize,
}

impl<D: DeviceFile> TakeOver<D> {
    /// Restores the driver side of all rings. `since` is when this process began to load the state, in ns of
    /// `CLOCK_MONOTONIC`.
    pub(super) fn adopt(
        devices: Vec<LoadedDevice<D>>,
        memories: &[Arc<Memory>],
        switch: v2::Switch,
        since: u64,
        report: &mut Report,
    ) -> Result<Self, UpdateError> {
        report.prepare = switch.prepare_ns;
        report.save = switch.save_ns;
        if devices.len() != switch.devices.len() {
            let reason = format!("{} were offered, {} are at rest", devices.len(), switch.devices.len());
            let source = Cause::Invalid { what: "devices".to_owned(), reason };
            return Err(UpdateError { phase: Phase::Load, device: None, source });
        }
        let mut adopted = Vec::with_capacity(devices.len());
        for (mut device, rest) in devices.into_iter().zip(switch.devices) {
            let mut times = DeviceReport::new(&device.name, device.strategy);
            times.suspend = rest.suspend_ns;
            let bases = device.adopt(rest, memories).map_err(|source| UpdateError {
                phase: Phase::Load,
                device: Some(device.name.clone()),
                source,
            })?;
            times.mappings = device.setup.regions.pieces().count() as u64;
            times.queues = device.setup.vrings().count() as u64;
            report.devices.push(times);
            adopted.push((device, bases));
        }
        checkpoint(Checkpoint::Adopted);
        report.load = monotonic_ns().saturating_sub(since);
        Ok(Self { devices: adopted, running: 0 })
    }

    /// Becomes the owner of all devices and sets each up as its strategy says. Starts none.
    pub(super) fn become_owner(&mut self, report: &mut Report) -> Result<(), UpdateError> {
        for ((device, bases), times) in self.devices.iter_mut().zip(&mut report.devices) {
            let name = device.name.clone();
            become_owner_of(device, bases, times).map_err(|(phase, source)| UpdateError {
                phase,
                device: Some(name),
                source,
            })?;
        }
        Ok(())
    }

    /// Starts all devices that the predecessor could take back: all but those with strategy `reopen`.
    pub(super) fn start_all_but_reopened(&mut self, report: &mut Report) -> Result<(), UpdateError> {
        for ((device, _), times) in self.devices.iter().zip(&mut report.devices) {
            if device.strategy != Strategy::Reopen {
                start_one(device, times)?;
            }
        }
        self.running = 1;
        Ok(())
    }

    /// Starts the devices that do not run yet and returns all as sessions.
    pub(super) fn start_rest(self, report: &mut Report) -> Result<Devices<D>, UpdateError> {
        let mut sessions = Devices::new();
        for ((device, _), times) in self.devices.into_iter().zip(&mut report.devices) {
            if self.running == 0 || device.strategy == Strategy::Reopen {
                start_one(&device, times)?;
            }
            let LoadedDevice { name, ops, setup, .. } = device;
            let closed =
                || UpdateError { phase: Phase::Resume, device: Some(name.clone()), source: Cause::NoPath };
            sessions.push(&name, Session::new(ops.ok_or_else(closed)?, setup));
        }
        Ok(sessions)
    }
}

fn become_owner_of<D: DeviceFile>(
    device: &mut LoadedDevice<D>,
    bases: &[u32],
    times: &mut DeviceReport,
) -> Result<(), (Phase, Cause)> {
    let setup = &device.setup;
    let Some(ops) = &device.ops else {
        let path = setup.path.clone().unwrap_or_default();
        device.ops = Some(steps::reopen(&path, setup, bases, times)?);
        checkpoint(Checkpoint::Owned);
        return Ok(());
    };
    steps::timed(&mut times.new_owner, || steps::new_owner(ops)).map_err(|e| (Phase::NewOwner, e.into()))?;
    checkpoint(Checkpoint::Owned);
    let was_reset = device.strategy == Strategy::Reset;
    if was_reset {
        steps::timed(&mut times.vrings, || steps::set_up_again(ops, setup, bases))
            .map_err(|e| (Phase::Vrings, e.into()))?;
        checkpoint(Checkpoint::Vrings);
    }
    steps::timed(&mut times.remap, || steps::remap(ops, setup, was_reset))
        .map_err(|e| (Phase::Remap, e.into()))?;
    checkpoint(Checkpoint::Remapped);
    Ok(())
}

fn start_one<D: DeviceFile>(device: &LoadedDevice<D>, times: &mut DeviceReport) -> Result<(), UpdateError> {
    let LoadedDevice { name, strategy, ops, setup, .. } = device;
    let run = || -> Result<(), crate::error::Error> {
        match (strategy, ops) {
            (Strategy::Reset | Strategy::Reopen, Some(ops)) => steps::run_again(ops, setup),
            (Strategy::Resume, Some(ops)) => steps::resume(ops).map(|()| steps::kick_all(setup)),
            (Strategy::Live, _) | (_, None) => Ok(()),
        }
    };
    let done = steps::timed(&mut times.resume, run).map_err(|e| UpdateError {
        phase: Phase::Resume,
        device: Some(name.clone()),
        source: e.into(),
    });
    checkpoint(Checkpoint::Running);
    done
}
