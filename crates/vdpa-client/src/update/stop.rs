//! Devices that are stopped for an update, and what becomes of them.

use vdpa_sys::clock::monotonic_ns;

use super::checkpoint::{Checkpoint, checkpoint};
use super::describe::{Described, general};
use super::parcel::Parcel;
use super::stopped::{RollBack, StoppedDevice};
use super::{Devices, Failed, Report, Strategy, UpdateError, Way};
use crate::device::DeviceFile;
use crate::state::{self, Sections, v2};

/// Whether another program may have begun to take stopped devices over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Successor {
    /// None can have made a request to a device: it was not started, or has not got the state.
    Untouched,
    /// One may have, and has ended or has closed its descriptors since. Ownership and mappings are set again.
    MayHaveActed,
}

/// Devices that are stopped as their strategies say, with the whole state. With strategy `live` they run; nobody drives them.
///
/// For a program that brings the state to its successor itself; [`Prepared::switch`](super::Prepared::switch) does it for one
/// that leaves that to this library. One of [`roll_back`](Self::roll_back) and [`release`](Self::release) ends it; dropping it is
/// a release.
#[derive(Debug)]
#[must_use = "dropping it closes the devices"]
pub struct Stopped<D> {
    pub(super) described: Described,
    pub(super) devices: Vec<StoppedDevice<D>>,
    pub(super) switch: v2::Switch,
    pub(super) late: Sections,
}

impl<D: DeviceFile> Stopped<D> {
    pub(super) fn new(
        described: Described,
        devices: Devices<D>,
        late: Sections,
        begun_ns: u64,
        prepare_ns: u64,
    ) -> Result<Self, Box<Failed<D>>> {
        let checked = described.unchanged(&devices);
        if let Err(error) = checked.and_then(|()| described.plan.check_late(&late).map_err(general)) {
            return Err(Box::new(Failed { error, devices, lost: Vec::new() }));
        }
        let mut stopped: Vec<StoppedDevice<D>> = Vec::with_capacity(devices.len());
        let mut waiting = devices.into_iter().zip(&described.chosen);
        while let Some(((name, session), chosen)) = waiting.next() {
            match StoppedDevice::stop(name.clone(), session, chosen.strategy) {
                Ok(device) => stopped.push(device),
                Err(failed) => {
                    let (error, undone) = *failed;
                    let rest = waiting.map(|((name, session), _)| (name, Ok(session)));
                    let others = std::iter::once((name, undone)).chain(rest);
                    let failed = give_back(error, stopped, StoppedDevice::undo, others);
                    return Err(report_roll_back(&described, failed));
                }
            }
        }
        let save_begin = monotonic_ns();
        let mut switch = v2::Switch {
            begun_ns,
            saved_ns: 0,
            prepare_ns,
            save_ns: 0,
            devices: stopped.iter().map(|device| device.saved(&described.memories)).collect(),
        };
        switch.saved_ns = monotonic_ns();
        switch.save_ns = switch.saved_ns.saturating_sub(save_begin);
        checkpoint(Checkpoint::Saved);
        Ok(Self { described, devices: stopped, switch, late })
    }

    /// The whole state, with copies of the descriptors. [`Loaded::load`](super::Loaded::load) takes it.
    ///
    /// # Errors
    /// [`UpdateError`] when there are no descriptors left, or the state is too large.
    pub fn parcel(&self) -> Result<Parcel, UpdateError> {
        let bytes = || {
            let mut sections = self.described.sections()?;
            self.put_switch(&mut sections)?;
            Ok(state::encode(&sections)?)
        };
        let known = &self.described.known;
        bytes().and_then(|bytes| Parcel::new(bytes, known, &self.described.table)).map_err(general)
    }

    /// The state that was not known before the devices were stopped, for a successor that has the first part
    /// ([`Described::parcel`]) already. [`Loaded::take_over_with`](super::Loaded::take_over_with) takes it.
    ///
    /// # Errors
    /// [`UpdateError`] when the state is too large.
    pub fn switch(&self) -> Result<Vec<u8>, UpdateError> {
        let bytes = || {
            let mut sections = Sections::new();
            self.put_switch(&mut sections)?;
            Ok(state::encode(&sections)?)
        };
        bytes().map_err(general)
    }

    pub(super) fn put_switch(&self, sections: &mut Sections) -> Result<(), super::Cause> {
        self.switch.put(sections)?;
        sections.append(self.late.clone());
        Ok(())
    }

    /// Starts the devices again in this program, the last one first, and returns them with `reason`, which the servers of the
    /// devices are told. No other program may have a descriptor of them any more, or two would drive one. Devices that cannot be
    /// started again are in [`Failed::lost`].
    pub fn roll_back(self, reason: &str, successor: Successor) -> Box<Failed<D>> {
        let source = super::Cause::Refused { reason: reason.to_owned() };
        self.give_back(UpdateError { phase: super::Phase::Transfer, device: None, source }, successor)
    }

    /// Leaves the devices to the successor: closes every descriptor of them in this program, which cannot access them from then on.
    pub fn release(self) {
        drop(self);
    }

    pub(super) fn give_back(self, error: UpdateError, successor: Successor) -> Box<Failed<D>> {
        let how: fn(StoppedDevice<D>) -> RollBack<D> = match successor {
            Successor::Untouched => StoppedDevice::undo,
            Successor::MayHaveActed => StoppedDevice::take_back,
        };
        let failed = give_back(error, self.devices, how, std::iter::empty());
        report_roll_back(&self.described, failed)
    }
}

/// Rolls a failed update back: `how` starts each stopped device again, the last one first. `others` were not stopped.
fn give_back<D: DeviceFile>(
    error: UpdateError,
    stopped: Vec<StoppedDevice<D>>,
    how: impl Fn(StoppedDevice<D>) -> RollBack<D>,
    others: impl Iterator<Item = (String, RollBack<D>)>,
) -> Box<Failed<D>> {
    let mut all: Vec<_> =
        stopped.into_iter().rev().map(|device| (device.name.clone(), how(device))).collect();
    all.reverse();
    let mut lost = Vec::new();
    let mut devices = Devices::new();
    for (name, undone) in all.into_iter().chain(others) {
        match undone {
            Ok(session) => devices.push(&name, session),
            Err(e) => lost.push(e),
        }
    }
    Box::new(Failed { error, devices, lost })
}

/// Reports the roll-back and its reason to the servers of the devices.
pub(super) fn report_roll_back<D: DeviceFile>(
    described: &Described,
    failed: Box<Failed<D>>,
) -> Box<Failed<D>> {
    let way = described.known.update.way.parse().unwrap_or(Way::HandOver);
    for (name, session) in &failed.devices {
        let chosen = described.chosen.iter().find(|c| c.name == name);
        let strategy = chosen.map_or(Strategy::Reopen, |c| c.strategy);
        let report = Report::rolled_back(way, strategy, described.begun_unix_ns, &failed.error);
        // The report is for operators only, and a kernel device does not know the request.
        let _ = session.parts().0.report_update(&report);
    }
    failed
}
