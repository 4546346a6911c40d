//! The successor's side of an update.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::{inherit, memfd};

use super::checkpoint::{Checkpoint, checkpoint};
use super::connection::Kind;
use super::load::{DescriptorSource, LoadedDevice, LoadedState, load};
use super::predecessor::Predecessor;
use super::takeover::TakeOver;
use super::{
    Cause, Devices, PID_VARIABLE, Phase, Report, SOCKET_VARIABLE, STATE_VARIABLE, StateFileError, Strategy,
    UpdateError, Way, reaper, steps,
};
use crate::device::DeviceFile;
use crate::memory::Memory;
use crate::session::Session;
use crate::state::{self, Section, Sections, v2};

/// An update that a predecessor offers. The devices still belong to the predecessor, and their memory is not mapped yet.
///
/// Read [`sections`](Self::sections) and [`late`](Self::late), name the sections that this program
/// [understands](Self::understands), then [`take_over`](Self::take_over). Dropping it refuses a fork or hand-over: the
/// predecessor keeps its devices.
#[derive(Debug)]
pub struct Incoming<D> {
    update: v2::Update,
    all: LoadedState<D>,
    sections: Sections,
    origin: Origin,
    entered: u64,
}

/// Where the rest of the state comes from.
#[derive(Debug)]
enum Origin {
    /// The previous image of this process.
    Image(v2::Switch),
    /// The predecessor, which is another process.
    Process(Predecessor),
}

/// Devices that were taken over.
#[derive(Debug)]
pub struct Restored<D> {
    /// The devices with their requests in flight, under the names that the predecessor gave them.
    pub devices: Devices<D>,
    /// The caller's sections that were not taken before, and the late ones. Call [`Sections::ensure_consumed`] when all
    /// that are known are taken.
    pub sections: Sections,
    /// The caller's descriptors, by name.
    pub descriptors: BTreeMap<String, OwnedFd>,
    /// The times of the update, from the beginning of the switch in the predecessor.
    pub report: Report,
}

impl<D: DeviceFile> Restored<D> {
    /// Calls [`Report::report_to_server`] for every device in [`devices`](Self::devices). One request for each device;
    /// errors are ignored.
    pub fn report_to_server(&self) {
        for (name, session) in &self.devices {
            // The report is for operators only, and a kernel device does not know the request.
            let _ = self.report.report_to_server(name, session);
        }
    }
}

impl<D> Restored<D> {
    /// The device, its sections and its report, for programs that have exactly one device.
    ///
    /// # Errors
    /// `self` unchanged, when there is not exactly one device.
    pub fn into_one(self) -> Result<(Session<D>, Sections, Report), Box<Self>> {
        if self.devices.len() != 1 {
            return Err(Box::new(self));
        }
        let Self { devices, sections, descriptors, report } = self;
        match devices.into_iter().next() {
            Some((_, session)) => Ok((session, sections, report)),
            None => Err(Box::new(Self { devices: Devices::new(), sections, descriptors, report })),
        }
    }
}

/// The update that started this program by exec or fork, if one did.
///
/// `None` for a first start: no variable is set, or the variables name another process. Call it once, early and before
/// other threads exist, since it adopts inherited descriptors by number. A second call after an exec fails: the
/// descriptors are adopted already. After an exec it does not block. After a fork it blocks until the predecessor has sent
/// its offer.
///
/// # Errors
/// [`UpdateError`] with the phase. After an exec the devices are closed, and the next open finds them reset. After a fork
/// the predecessor keeps them.
pub fn incoming<D: DeviceFile>() -> Result<Option<Incoming<D>>, UpdateError> {
    let entered = monotonic_ns();
    let at_load = |source| UpdateError { phase: Phase::Load, device: None, source };
    if let Some(socket) = inherited_socket().map_err(at_load)? {
        checkpoint(Checkpoint::Entered);
        return Incoming::receive(socket).map(Some);
    }
    let Some(value) = std::env::var_os(STATE_VARIABLE) else {
        return Ok(None);
    };
    if std::env::var_os(PID_VARIABLE).is_some_and(|pid| pid.to_str() != Some(&steps::own_pid().to_string())) {
        return Ok(None);
    }
    checkpoint(Checkpoint::Entered);
    reaper::adopt();
    let read = || -> Result<Sections, Cause> {
        let number = value
            .to_str()
            .and_then(|v| v.parse::<i32>().ok())
            .ok_or_else(|| StateFileError::NotANumber { value: value.to_string_lossy().into_owned() })?;
        let file = inherit::take(number).map_err(|source| StateFileError::NotInherited { number, source })?;
        Ok(state::decode(&read_state(number, &file)?)?)
    };
    Incoming::from_image(read().map_err(at_load)?, entered).map(Some)
}

/// [`incoming`](incoming()) and [`Incoming::take_over`] in one call, for a program that makes no checks of its own between
/// them.
///
/// The first completions may have arrived already: reap before waiting.
///
/// # Errors
/// Errors of [`incoming`](incoming()) and of [`Incoming::take_over`].
pub fn restore<D: DeviceFile>() -> Result<Option<Restored<D>>, UpdateError> {
    incoming()?.map(Incoming::take_over).transpose()
}

/// The socket that the predecessor passed to its child. The inode protects children of that child, which inherit the
/// variable: under the number they find another file, or none.
fn inherited_socket() -> Result<Option<UnixStream>, Cause> {
    let Some(value) = std::env::var_os(SOCKET_VARIABLE) else { return Ok(None) };
    let not_a_number = || StateFileError::NotANumber { value: value.to_string_lossy().into_owned() };
    let (number, inode) = value.to_str().and_then(|v| v.split_once(':')).ok_or_else(not_a_number)?;
    let (Ok(number), Ok(inode)) = (number.parse::<i32>(), inode.parse::<u64>()) else {
        return Err(not_a_number().into());
    };
    let Ok(fd) = inherit::take(number) else { return Ok(None) };
    Ok(fstat(&fd).is_ok_and(|stat| stat.st_ino == inode).then(|| fd.into()))
}

/// The bytes of a state file. Only a sealed memfd is accepted: nobody can change it any more.
fn read_state(number: i32, file: &OwnedFd) -> Result<Vec<u8>, StateFileError> {
    // Only memfds have seals.
    let seals = fcntl_get_seals(file).map_err(|_| StateFileError::NotMemfd { number })?;
    if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW) {
        return Err(StateFileError::NotSealed { number });
    }
    let limit = usize::try_from(state::MAX_PAYLOAD).unwrap_or(usize::MAX).saturating_add(state::HEADER_LEN);
    memfd::read_all(file, limit).map_err(|e| StateFileError::Unreadable { number, reason: e.to_string() })
}

impl<D: DeviceFile> Incoming<D> {
    /// Waits for the offer of the predecessor at the other end of `socket`, and maps all memory. Blocks, without a limit,
    /// until the predecessor prepares an update by [`Via::HandOver`](super::Via::HandOver) or closes the connection.
    ///
    /// # Errors
    /// [`UpdateError`]; the predecessor receives the reason and keeps its devices.
    pub fn receive(socket: UnixStream) -> Result<Self, UpdateError> {
        Self::receive_from(socket, None)
    }

    /// As [`receive`](Self::receive), but also accepts a predecessor that runs as the user `allowed`, besides root and the
    /// user of this process.
    ///
    /// # Errors
    /// As [`receive`](Self::receive); [`ConnectionError::ForbiddenUser`](super::ConnectionError::ForbiddenUser).
    pub fn receive_from(socket: UnixStream, allowed: Option<u32>) -> Result<Self, UpdateError> {
        let at = |phase| move |source| UpdateError { phase, device: None, source };
        let mut predecessor = Predecessor::new(socket, allowed).map_err(at(Phase::Prepare))?;
        let offer = predecessor.receive(Kind::Offer).map_err(at(Phase::Prepare))?;
        let entered = monotonic_ns();
        checkpoint(Checkpoint::Received);
        let fds = offer.fds.into_iter().map(Some).collect();
        let loaded = (|| {
            let mut sections = state::decode(&offer.payload).map_err(|e| at(Phase::Load)(e.into()))?;
            let known = v2::Prepared::take(&mut sections).map_err(|e| at(Phase::Load)(e.into()))?;
            sections.end_of_own().map_err(|e| at(Phase::Load)(e.into()))?;
            let update = known.update.clone();
            Ok((update, load(known, DescriptorSource::Received(fds), &v2::Files::default())?, sections))
        })();
        match loaded {
            Ok((update, all, sections)) => {
                checkpoint(Checkpoint::Loaded);
                let origin = Origin::Process(predecessor);
                Ok(Self { update, all, sections, origin, entered })
            }
            Err(error) => {
                predecessor.reject(Kind::Refused, &error);
                Err(error)
            }
        }
    }

    /// The update that the previous image of this process left in `sections`. `entered` is the time at which this image
    /// entered [`incoming`], on `CLOCK_MONOTONIC` in ns.
    fn from_image(mut sections: Sections, entered: u64) -> Result<Self, UpdateError> {
        let general = |source: Cause| UpdateError { phase: Phase::Load, device: None, source };
        checkpoint(Checkpoint::Received);
        let files = v2::Files::take(&mut sections).map_err(|e| general(e.into()))?;
        let (known, switch) = v2::take(&mut sections).map_err(|e| general(e.into()))?;
        check_process(&known.update).map_err(general)?;
        let update = known.update.clone();
        let all = load(known, DescriptorSource::Inherited, &files)?;
        checkpoint(Checkpoint::Loaded);
        Ok(Self { update, all, sections, origin: Origin::Image(switch), entered })
    }
}

fn check_process(update: &v2::Update) -> Result<(), Cause> {
    let pid = steps::own_pid();
    if update.predecessor == pid {
        return Ok(());
    }
    let reason = format!("process {} saved it for itself; this is process {pid}", update.predecessor);
    Err(Cause::Invalid { what: "state".to_owned(), reason })
}

impl<D> Incoming<D> {
    /// Process id of the predecessor; the same process after an exec.
    #[must_use]
    pub const fn predecessor(&self) -> i32 {
        self.update.predecessor
    }

    /// The caller's sections that have arrived: those known before the switch, and after an exec also the late ones.
    pub const fn sections(&mut self) -> &mut Sections {
        &mut self.sections
    }

    /// The sections announced by [`Plan::late_section`](super::Plan::late_section), with empty payloads.
    #[must_use]
    pub fn late(&self) -> Vec<Section> {
        let section = |late: &v2::Late| {
            let section = Section::new(&late.name, late.version, Vec::new());
            if late.optional { section.optional() } else { section }
        };
        self.update.late.iter().map(section).collect()
    }

    /// The caller's descriptors, by name. One that is removed here can be used before the devices are taken over, and is
    /// missing from [`Restored::descriptors`].
    pub const fn descriptors(&mut self) -> &mut BTreeMap<String, OwnedFd> {
        &mut self.all.descriptors
    }

    /// The memory of all devices. It is not mapped yet: a program that maps memory itself [brings](Memory::bring) its mappings
    /// before [`take_over`](Self::take_over), which maps the rest.
    pub fn memories(&self) -> impl Iterator<Item = &Arc<Memory>> {
        self.all.memories.iter()
    }

    /// Names and strategies of the devices.
    pub fn devices(&self) -> impl Iterator<Item = (&str, Strategy)> {
        self.all.devices.iter().map(|d| (d.name.as_str(), d.strategy))
    }

    /// Checks that this program understands every section that is not optional. `known` has the names and the versions that
    /// it can read. Otherwise refuses the update now, while the predecessor has the devices.
    ///
    /// # Errors
    /// [`UpdateError`] with the name of the section; the predecessor receives it and keeps its devices.
    pub fn understands(self, known: &[(&str, RangeInclusive<u32>)]) -> Result<Self, UpdateError> {
        let present: Vec<Section> = self.sections.iter().cloned().chain(self.late()).collect();
        for section in present {
            let supported = known.iter().find(|(name, _)| *name == section.name);
            let error = match supported {
                Some((_, versions)) if versions.contains(&section.version) => continue,
                _ if section.optional => continue,
                Some((_, versions)) => state::StateError::SectionVersion {
                    name: section.name,
                    found: section.version,
                    supported: *versions.end(),
                },
                None => state::StateError::Unknown { name: section.name, version: section.version },
            };
            return Err(self.refuse_with(error.into()));
        }
        Ok(self)
    }

    /// Refuses the update. The predecessor receives `reason`, and keeps its devices.
    #[must_use = "this is what the predecessor receives"]
    pub fn refuse(self, reason: &str) -> UpdateError {
        self.refuse_with(Cause::Refused { reason: reason.to_owned() })
    }

    fn refuse_with(self, source: Cause) -> UpdateError {
        let error = UpdateError { phase: Phase::Load, device: None, source };
        let Self { all, origin, .. } = self;
        drop(all);
        if let Origin::Process(mut predecessor) = origin {
            predecessor.reject(Kind::Refused, &error);
        }
        error
    }
}

impl<D: DeviceFile> Incoming<D> {
    /// Takes the devices over. After an exec this is short. In a fork or hand-over it reports that this process is ready and
    /// then blocks, without a limit, until the predecessor switches.
    ///
    /// # Errors
    /// [`UpdateError`]. In a fork or hand-over the predecessor keeps the devices; [`Cause::Aborted`] if it ended the update.
    /// After an exec the devices are closed.
    pub fn take_over(self) -> Result<Restored<D>, UpdateError> {
        let Self { update, all, mut sections, origin, entered } = self;
        let LoadedState { memories, devices, descriptors } = all;
        let mut report = Report::new(Way::Exec);
        report.predecessor = update.predecessor;
        report.successor = steps::own_pid();
        report.begun_unix_ns = update.begun_unix_ns;
        if let Err(source) = memories.iter().try_for_each(|memory| memory.map_here(false)) {
            let error = UpdateError { phase: Phase::Load, device: None, source: source.into() };
            if let Origin::Process(mut predecessor) = origin {
                predecessor.reject(Kind::Refused, &error);
            }
            return Err(error);
        }
        let devices = match origin {
            Origin::Image(switch) => {
                report.transfer = entered.saturating_sub(switch.saved_ns);
                let begun_ns = switch.begun_ns;
                let mut takeover = TakeOver::adopt(devices, switch, entered, &mut report)?;
                takeover.become_owner(&mut report)?;
                let devices = takeover.start_rest(&mut report)?;
                report.total = monotonic_ns().saturating_sub(begun_ns);
                reaper::collect();
                devices
            }
            Origin::Process(mut predecessor) => {
                let way = update.way.parse().unwrap_or(Way::HandOver);
                report.way = way;
                let taken = take_from_process(&mut predecessor, devices, &mut sections, &mut report);
                match taken {
                    Ok(devices) => devices,
                    Err(mut error) => {
                        if matches!(error.source, Cause::Aborted) && way == Way::Exec {
                            error.source = Cause::DryRun;
                        }
                        // All descriptors of the devices are closed here, so the predecessor may take them back.
                        let aborted = matches!(error.source, Cause::Aborted | Cause::DryRun);
                        predecessor.reject(if aborted { Kind::Aborted } else { Kind::Failed }, &error);
                        return Err(error);
                    }
                }
            }
        };
        Ok(Restored { devices, sections, descriptors, report })
    }
}

fn take_from_process<D: DeviceFile>(
    predecessor: &mut Predecessor,
    devices: Vec<LoadedDevice<D>>,
    sections: &mut Sections,
    report: &mut Report,
) -> Result<Devices<D>, UpdateError> {
    let at = |phase| move |source| UpdateError { phase, device: None, source };
    // A dry run takes no device over.
    if report.way != Way::Exec {
        devices.iter().for_each(LoadedDevice::announce_to_server);
    }
    predecessor.send(Kind::Ready, b"").map_err(at(Phase::Prepare))?;
    checkpoint(Checkpoint::ReadySent);
    let message = predecessor.receive(Kind::Switch).map_err(at(Phase::Prepare))?;
    let received = monotonic_ns();
    checkpoint(Checkpoint::SwitchReceived);
    let mut late = state::decode(&message.payload).map_err(|e| at(Phase::Load)(e.into()))?;
    let switch = v2::Switch::take(&mut late).map_err(|e| at(Phase::Load)(e.into()))?;
    sections.append(late);
    report.transfer = received.saturating_sub(switch.saved_ns);
    let begun_ns = switch.begun_ns;
    let mut takeover = TakeOver::adopt(devices, switch, received, report)?;
    takeover.become_owner(report)?;
    takeover.start_all_but_reopened(report)?;
    let taken = monotonic_ns();
    // The predecessor works without the report: an encoding error is no reason to fail.
    let encoded = || serde_json::to_vec(report).unwrap_or_default();
    predecessor.commit(encoded).map_err(at(Phase::Commit))?;
    report.commit = monotonic_ns().saturating_sub(taken);
    checkpoint(Checkpoint::CommitReceived);
    let devices = takeover.start_rest(report)?;
    report.total = monotonic_ns().saturating_sub(begun_ns);
    Ok(devices)
}

#[cfg(test)]
#[path = "incoming_tests.rs"]
mod tests;
