//! The successor's side of an update.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::{inherit, memfd};

use super::checkpoint::{Checkpoint, checkpoint};
use super::connection::Kind;
use super::load::{All, Loaded, Source, load};
use super::predecessor::Predecessor;
use super::taking::Taking;
use super::{
    Cause, Devices, PID_VARIABLE, Phase, Report, SOCKET_VARIABLE, STATE_VARIABLE, StateFileError, Strategy,
    UpdateError, Way, keeper, steps,
};
use crate::device::DeviceFile;
use crate::session::Session;
use crate::state::{self, Section, Sections, v2};

/// What a predecessor offers: all memory is mapped already, and the devices are still its own.
///
/// Look at [`sections`](Self::sections) and [`late`](Self::late), say what is [understood](Self::understands), and
/// [`take_over`](Self::take_over). Dropping it refuses a hand-over, of which nothing has come then.
#[derive(Debug)]
pub struct Incoming<D> {
    update: v2::Update,
    all: All<D>,
    sections: Sections,
    origin: Origin,
    entered: u64,
}

/// Where the rest of the state comes from.
#[derive(Debug)]
enum Origin {
    /// The image that was in this process before.
    Image(v2::Switch),
    /// Another process.
    Process(Predecessor),
}

/// Devices taken over.
#[derive(Debug)]
pub struct Restored<D> {
    /// With the requests that were in flight, under the names that the predecessor gave them.
    pub devices: Devices<D>,
    /// The caller's sections that were not taken before, and the late ones. Call [`Sections::ensure_consumed`] when all
    /// that are known are taken.
    pub sections: Sections,
    /// The caller's descriptors, by name.
    pub descriptors: BTreeMap<String, OwnedFd>,
    /// How long everything took, from the beginning of the switch in the predecessor.
    pub report: Report,
}

impl<D: DeviceFile> Restored<D> {
    /// [`Report::report_to_server`] for every device that is still here.
    pub fn report_to_server(&self) {
        for (name, session) in &self.devices {
            // Nothing depends on it; a kernel device does not know the request.
            let _ = self.report.report_to_server(name, session);
        }
    }
}

impl<D> Restored<D> {
    /// The only device, for programs that have one.
    ///
    /// # Errors
    /// All of it again, when there is not exactly one.
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

/// What is incoming, if this program was started by an update: by exec or by fork.
///
/// `None` for a first start: no variable is set, or it is meant for another process. Call it once, early and before
/// other threads exist: it adopts inherited descriptors by number. A second call after an exec fails, since the
/// descriptors are adopted. After a fork it blocks until the predecessor has offered everything.
///
/// # Errors
/// [`UpdateError`] with the phase. After an exec the devices are closed then, and the next open finds them as new; a
/// predecessor of a fork goes on by itself.
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
    keeper::adopt();
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

/// [`incoming`](incoming()) and [`Incoming::take_over`] in one, for a program that need not look before.
///
/// The first completions may have arrived already: reap before waiting.
///
/// # Errors
/// As both.
pub fn restore<D: DeviceFile>() -> Result<Option<Restored<D>>, UpdateError> {
    incoming()?.map(Incoming::take_over).transpose()
}

/// The socket that a predecessor left to its child. Children of that child find another file under the number, or none.
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

/// The bytes of a state file, if it is one: a memfd that nobody can change any more.
fn read_state(number: i32, file: &OwnedFd) -> Result<Vec<u8>, StateFileError> {
    // Only memory files have seals.
    let seals = fcntl_get_seals(file).map_err(|_| StateFileError::NotMemfd { number })?;
    if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW) {
        return Err(StateFileError::NotSealed { number });
    }
    let limit = usize::try_from(state::MAX_PAYLOAD).unwrap_or(usize::MAX).saturating_add(state::HEADER_LEN);
    memfd::read_all(file, limit).map_err(|e| StateFileError::Unreadable { number, reason: e.to_string() })
}

impl<D: DeviceFile> Incoming<D> {
    /// Waits for the offer of the predecessor at the other end of `socket`, and maps all memory. Blocks until the
    /// predecessor prepares an update by [`Via::HandOver`](super::Via::HandOver), or is gone.
    ///
    /// # Errors
    /// [`UpdateError`]; the predecessor is told and goes on.
    pub fn receive(socket: UnixStream) -> Result<Self, UpdateError> {
        Self::receive_from(socket, None)
    }

    /// [`receive`](Self::receive), also from a process of the user `allowed`, besides root and the user of this process.
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
            Ok((update, load(known, Source::Received(fds), &v2::Files::default())?, sections))
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

    /// What an image that was in this process before left in `sections`; `entered` is when this image began to look, on
    /// `CLOCK_MONOTONIC` in ns.
    fn from_image(mut sections: Sections, entered: u64) -> Result<Self, UpdateError> {
        let general = |source: Cause| UpdateError { phase: Phase::Load, device: None, source };
        checkpoint(Checkpoint::Received);
        let files = v2::Files::take(&mut sections).map_err(|e| general(e.into()))?;
        let (known, switch) = v2::take(&mut sections).map_err(|e| general(e.into()))?;
        check_process(&known.update).map_err(general)?;
        let update = known.update.clone();
        let all = load(known, Source::Inherited, &files)?;
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
    /// The process that has the devices; this one after an exec.
    #[must_use]
    pub const fn predecessor(&self) -> i32 {
        self.update.predecessor
    }

    /// The caller's sections that are known already; after an exec also the late ones.
    pub const fn sections(&mut self) -> &mut Sections {
        &mut self.sections
    }

    /// Sections that are announced to come with the switch, without their contents.
    #[must_use]
    pub fn late(&self) -> Vec<Section> {
        let section = |late: &v2::Late| {
            let section = Section::new(&late.name, late.version, Vec::new());
            if late.optional { section.optional() } else { section }
        };
        self.update.late.iter().map(section).collect()
    }

    /// The caller's descriptors, by name: what is taken here can be made use of before the devices are taken over, and is
    /// not among [`Restored::descriptors`] then.
    pub const fn descriptors(&mut self) -> &mut BTreeMap<String, OwnedFd> {
        &mut self.all.descriptors
    }

    /// Names and strategies of the devices.
    pub fn devices(&self) -> impl Iterator<Item = (&str, Strategy)> {
        self.all.devices.iter().map(|d| (d.name.as_str(), d.strategy))
    }

    /// Says which sections this program understands, in which versions. Any other that is not optional is a reason to
    /// refuse the update, now, while the predecessor has the devices.
    ///
    /// # Errors
    /// [`UpdateError`] with the name of the section; the predecessor is told and goes on.
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
            return Err(self.no(error.into()));
        }
        Ok(self)
    }

    /// Refuses, with a reason that the predecessor is told.
    #[must_use = "this is what the predecessor is told"]
    pub fn refuse(self, reason: &str) -> UpdateError {
        self.no(Cause::Refused { reason: reason.to_owned() })
    }

    fn no(self, source: Cause) -> UpdateError {
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
    /// Takes the devices over. In a hand-over, says that everything is ready and blocks until the predecessor has brought
    /// the devices to rest, which it may do much later.
    ///
    /// # Errors
    /// [`UpdateError`]. In a hand-over the predecessor goes on with the devices, and [`Cause::Aborted`] says that it wants
    /// to. After an exec the devices are closed.
    pub fn take_over(self) -> Result<Restored<D>, UpdateError> {
        let Self { update, all, mut sections, origin, entered } = self;
        let All { devices, descriptors } = all;
        let mut report = Report::new(Way::Exec);
        report.predecessor = update.predecessor;
        report.successor = steps::own_pid();
        report.begun_unix_ns = update.begun_unix_ns;
        let devices = match origin {
            Origin::Image(switch) => {
                report.transfer = entered.saturating_sub(switch.saved_ns);
                let begun_ns = switch.begun_ns;
                let mut taking = Taking::adopt(devices, switch, entered, &mut report)?;
                taking.own(&mut report)?;
                let devices = taking.run(&mut report)?;
                report.total = monotonic_ns().saturating_sub(begun_ns);
                keeper::collect();
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
                        // Nothing is held any more.
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
    devices: Vec<Loaded<D>>,
    sections: &mut Sections,
    report: &mut Report,
) -> Result<Devices<D>, UpdateError> {
    let at = |phase| move |source| UpdateError { phase, device: None, source };
    // A rehearsal takes nothing over.
    if report.way != Way::Exec {
        devices.iter().for_each(Loaded::introduce);
    }
    predecessor.send(Kind::Ready, b"").map_err(at(Phase::Prepare))?;
    checkpoint(Checkpoint::ReadySent);
    let message = predecessor.receive(Kind::Switch).map_err(at(Phase::Prepare))?;
    let heard = monotonic_ns();
    checkpoint(Checkpoint::SwitchReceived);
    let mut late = state::decode(&message.payload).map_err(|e| at(Phase::Load)(e.into()))?;
    let switch = v2::Switch::take(&mut late).map_err(|e| at(Phase::Load)(e.into()))?;
    sections.append(late);
    report.transfer = heard.saturating_sub(switch.saved_ns);
    let begun_ns = switch.begun_ns;
    let mut taking = Taking::adopt(devices, switch, heard, report)?;
    taking.own(report)?;
    taking.run_all_but_reopened(report)?;
    let said = monotonic_ns();
    // The predecessor can do without it.
    let told = || serde_json::to_vec(report).unwrap_or_default();
    predecessor.commit(told).map_err(at(Phase::Commit))?;
    report.commit = monotonic_ns().saturating_sub(said);
    checkpoint(Checkpoint::CommitReceived);
    let devices = taking.run(report)?;
    report.total = monotonic_ns().saturating_sub(begun_ns);
    Ok(devices)
}

#[cfg(test)]
#[path = "incoming_tests.rs"]
mod tests;
