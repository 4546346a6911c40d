//! Saved state in the successor, whatever has brought it.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vdpa_sys::clock::monotonic_ns;

use super::checkpoint::{Checkpoint, checkpoint};
use super::load::{DescriptorSource, LoadedState, load};
use super::takeover::TakeOver;
use super::{Cause, Devices, Phase, Report, Strategy, UpdateError, Way, parcel, steps};
use crate::device::DeviceFile;
use crate::memory::Memory;
use crate::session::Session;
use crate::state::{self, Section, Sections, v2};

/// State that this program can take over. It has made no request that changes a device, and mapped no memory.
///
/// A program that brings the state itself makes it with [`load`](Self::load); [`Incoming`](super::Incoming) has one that came by
/// exec, fork or hand-over. Read [`sections`](Self::sections) and [`late`](Self::late), bring the mappings of
/// [`memories`](Self::memories) if this program maps memory itself, then [`take_over`](Self::take_over). Dropping it closes its
/// descriptors.
#[derive(Debug)]
pub struct Loaded<D> {
    update: v2::Update,
    all: LoadedState<D>,
    sections: Sections,
    /// The rest of the state, if it is there.
    switch: Option<v2::Switch>,
    entered: u64,
}

/// Devices that were taken over.
#[derive(Debug)]
#[non_exhaustive]
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

impl<D: DeviceFile> Loaded<D> {
    /// Reads the state of [`Stopped::parcel`](super::Stopped::parcel) or [`Described::parcel`](super::Described::parcel), with its
    /// descriptors by name; others are closed. Checks that the state is consistent and fits the devices, by requests that change
    /// nothing. On failure all descriptors are closed.
    ///
    /// # Errors
    /// [`UpdateError`] in phase [`Phase::Load`].
    pub fn load(
        bytes: &[u8],
        descriptors: impl IntoIterator<Item = (String, OwnedFd)>,
    ) -> Result<Self, UpdateError> {
        let entered = monotonic_ns();
        let read = || -> Result<_, Cause> {
            let mut sections = state::decode(bytes)?;
            let known = v2::Prepared::take(&mut sections)?;
            let switch = match sections.get(v2::SWITCH) {
                Some(_) => Some(v2::Switch::take(&mut sections)?),
                None => None,
            };
            sections.end_of_own()?;
            let fds = parcel::by_index(&known, descriptors)?;
            Ok((known, switch, sections, fds))
        };
        let (known, switch, sections, fds) = read().map_err(at_load)?;
        Self::new(known, switch, sections, DescriptorSource::Received(fds), &v2::Files::default(), entered)
    }

    pub(super) fn new(
        known: v2::Prepared,
        switch: Option<v2::Switch>,
        sections: Sections,
        source: DescriptorSource,
        files: &v2::Files,
        entered: u64,
    ) -> Result<Self, UpdateError> {
        let update = known.update.clone();
        let all = load(known, source, files)?;
        checkpoint(Checkpoint::Loaded);
        Ok(Self { update, all, sections, switch, entered })
    }

    /// Takes the devices over: becomes their owner, sets each up as its strategy says, and starts it. The predecessor must not
    /// drive them any more.
    ///
    /// # Errors
    /// [`UpdateError`]: all descriptors of the devices are closed, so the predecessor can take them back
    /// ([`Stopped::roll_back`](super::Stopped::roll_back)). [`StateError::Missing`](state::StateError::Missing) when the state has
    /// only its first part; see [`take_over_with`](Self::take_over_with).
    pub fn take_over(mut self) -> Result<Restored<D>, UpdateError> {
        let switch = self.switch.take();
        let switch = switch.ok_or_else(|| at_load(state::StateError::Missing { name: v2::SWITCH }.into()))?;
        self.map_memory()?;
        let received = self.entered;
        let mut taken = self.begin(switch, received)?;
        taken.become_owner()?;
        taken.finish()
    }

    /// As [`take_over`](Self::take_over), with the second part of the state, from [`Stopped::switch`](super::Stopped::switch).
    ///
    /// # Errors
    /// As [`take_over`](Self::take_over).
    pub fn take_over_with(mut self, switch: &[u8]) -> Result<Restored<D>, UpdateError> {
        let received = monotonic_ns();
        self.map_memory()?;
        let switch = self.read_switch(switch)?;
        let mut taken = self.begin(switch, received)?;
        taken.become_owner()?;
        taken.finish()
    }

    /// Maps the memory that the caller has not brought.
    pub(super) fn map_memory(&self) -> Result<(), UpdateError> {
        let memories = &self.all.memories;
        memories.iter().try_for_each(|memory| memory.map_here(false)).map_err(|e| at_load(e.into()))
    }

    /// Reads the second part of the state, and adds the caller's sections in it to those that are there.
    pub(super) fn read_switch(&mut self, bytes: &[u8]) -> Result<v2::Switch, UpdateError> {
        let mut late = state::decode(bytes).map_err(|e| at_load(e.into()))?;
        let switch = v2::Switch::take(&mut late).map_err(|e| at_load(e.into()))?;
        self.sections.append(late);
        Ok(switch)
    }

    /// Sends a request of each device so that its server knows this process before the switch.
    pub(super) fn announce_to_servers(&self) {
        self.all.devices.iter().for_each(super::load::LoadedDevice::announce_to_server);
    }

    /// Restores the driver side of all rings. `received` is when the whole state was there, on `CLOCK_MONOTONIC` in ns.
    pub(super) fn begin(self, switch: v2::Switch, received: u64) -> Result<Taken<D>, UpdateError> {
        let Self { update, all, sections, .. } = self;
        let LoadedState { memories, devices, descriptors } = all;
        let mut report = Report::new(update.way.parse().unwrap_or(Way::HandOver));
        report.predecessor = update.predecessor;
        report.successor = steps::own_pid();
        report.begun_unix_ns = update.begun_unix_ns;
        report.transfer = received.saturating_sub(switch.saved_ns);
        let begun_ns = switch.begun_ns;
        let takeover = TakeOver::adopt(devices, &memories, switch, received, &mut report)?;
        Ok(Taken { takeover, sections, descriptors, report, begun_ns })
    }
}

pub(super) fn at_load(source: Cause) -> UpdateError {
    UpdateError { phase: Phase::Load, device: None, source }
}

impl<D> Loaded<D> {
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

    /// The way of the update, as the predecessor has said.
    #[must_use]
    pub fn way(&self) -> Way {
        self.update.way.parse().unwrap_or(Way::HandOver)
    }

    /// Whether the state is complete.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.switch.is_some()
    }

    /// The first section that this program does not understand, as an error; `known` as for
    /// [`Incoming::understands`](super::Incoming::understands).
    ///
    /// # Errors
    /// [`StateError`](state::StateError) with the name of the section.
    pub fn check_sections(&self, known: &[(&str, RangeInclusive<u32>)]) -> Result<(), state::StateError> {
        for section in self.sections.iter().cloned().chain(self.late()) {
            let supported = known.iter().find(|(name, _)| *name == section.name);
            return Err(match supported {
                Some((_, versions)) if versions.contains(&section.version) => continue,
                _ if section.optional => continue,
                Some((_, versions)) => state::StateError::SectionVersion {
                    name: section.name,
                    found: section.version,
                    supported: *versions.end(),
                },
                None => state::StateError::Unknown { name: section.name, version: section.version },
            });
        }
        Ok(())
    }

    /// The guest memory of a device, mapped here once by the crate `vm-memory`: each region at the guest address that is its I/O
    /// virtual address. Brings the mappings, so call it once, before the devices are taken over. For a device whose regions are
    /// whole memories, as those of [`Session::map_guest_memory`]; with more than one device that share memory, call it for one.
    ///
    /// # Errors
    /// [`UpdateError`] for an unknown device, for a region that is a part of its memory, and of mapping it.
    #[cfg(feature = "vm-memory")]
    pub fn guest_memory(&self, device: &str) -> Result<vm_memory::GuestMemoryMmap, UpdateError> {
        let failed = |what: &str, reason: String| {
            let (what, device) = (what.to_owned(), Some(device.to_owned()));
            UpdateError { phase: Phase::Load, device, source: Cause::Invalid { what, reason } }
        };
        let loaded = self.all.devices.iter().find(|loaded| loaded.name == device);
        let loaded = loaded.ok_or_else(|| failed("device", "there is none of that name".to_owned()))?;
        let mut regions = Vec::new();
        for region in loaded.setup.regions.list() {
            let what = format!("region \"{}\"", region.name());
            let memory = region.memory();
            if region.offset() != 0 || region.range().size() != memory.size() {
                return Err(failed(&what, "it is a part of its memory only".to_owned()));
            }
            let mapped = crate::guest::map(memory, region.range().first()).map_err(|e| failed(&what, e))?;
            regions.push(mapped);
        }
        vm_memory::GuestMemoryMmap::from_regions(regions).map_err(|e| failed("guest memory", e.to_string()))
    }
}

/// Devices whose rings are adopted.
#[derive(Debug)]
pub(super) struct Taken<D> {
    takeover: TakeOver<D>,
    sections: Sections,
    descriptors: BTreeMap<String, OwnedFd>,
    pub(super) report: Report,
    begun_ns: u64,
}

impl<D: DeviceFile> Taken<D> {
    pub(super) fn become_owner(&mut self) -> Result<(), UpdateError> {
        self.takeover.become_owner(&mut self.report)
    }

    /// Starts all devices that the predecessor could take back.
    pub(super) fn start_all_but_reopened(&mut self) -> Result<(), UpdateError> {
        self.takeover.start_all_but_reopened(&mut self.report)
    }

    /// Starts what does not run yet.
    pub(super) fn finish(self) -> Result<Restored<D>, UpdateError> {
        let Self { takeover, sections, descriptors, mut report, begun_ns } = self;
        let devices = takeover.start_rest(&mut report)?;
        report.total = monotonic_ns().saturating_sub(begun_ns);
        Ok(Restored { devices, sections, descriptors, report })
    }
}
