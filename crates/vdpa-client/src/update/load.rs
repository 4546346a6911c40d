//! Reads saved state in the successor, before it owns a device.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::types::{IovaRange, Perm, QueueIndex, VringAddr};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::inherit;

use super::{Cause, Phase, Strategy, UpdateError, steps};
use crate::device::{DeviceFile, set_backend};
use crate::dma::{Backing, Nameless, RegionSpec};
use crate::error::Error;
use crate::memory::Memory;
use crate::queue::{Queue, RingLayout, SavedDriver, Slot};
use crate::session::Setup;
use crate::state::{mappings, v2};
use crate::vring::{GuestQueue, GuestRing, Vring, check_guest_ring};

/// Where the descriptors of the state come from.
#[derive(Debug)]
pub(super) enum DescriptorSource {
    /// Inherited over the exec: the state has their numbers.
    Inherited,
    /// Received over the socket: the state has their indexes here. `None` once taken.
    Received(Vec<Option<OwnedFd>>),
}

impl DescriptorSource {
    fn take(&mut self, what: &str, number: i32) -> Result<OwnedFd, Cause> {
        match self {
            Self::Inherited => {
                inherit::take(number).map_err(|e| invalid(what, format!("descriptor {number}: {e}")))
            }
            Self::Received(fds) => {
                let at = usize::try_from(number).ok();
                at.and_then(|at| fds.get_mut(at)).and_then(Option::take).ok_or_else(|| {
                    invalid(what, format!("descriptor {number} did not come, or is there twice"))
                })
            }
        }
    }
}

/// A device that this process can take over. It has received only requests for what it offers.
#[derive(Debug)]
pub(super) struct LoadedDevice<D> {
    pub(super) name: String,
    pub(super) strategy: Strategy,
    /// `None` when it will be opened in the switch ([`Strategy::Reopen`]).
    pub(super) ops: Option<D>,
    /// Without the queues that this program drives: their positions come with the switch.
    pub(super) setup: Setup,
    rings: Vec<(v2::Queue, EventFd, EventFd)>,
}

/// All devices and the caller's descriptors.
#[derive(Debug)]
pub(super) struct LoadedState<D> {
    /// Not mapped yet: the caller may bring its own mappings.
    pub(super) memories: Vec<Arc<Memory>>,
    pub(super) devices: Vec<LoadedDevice<D>>,
    pub(super) descriptors: BTreeMap<String, OwnedFd>,
}

/// Checks that the state is consistent and fits the devices. Maps no memory. `files` are the device files that were open
/// before an exec. On failure every descriptor of the state is closed, so that no device stays open without a driver.
pub(super) fn load<D: DeviceFile>(
    state: v2::Prepared,
    mut source: DescriptorSource,
    files: &v2::Files,
) -> Result<LoadedState<D>, UpdateError> {
    let numbers = numbers(&state);
    let loaded = load_all(state, &mut source, files);
    if loaded.is_err() {
        // Descriptors taken before the failure are closed already.
        numbers.into_iter().for_each(|number| drop(source.take("descriptor", number)));
    }
    loaded
}

fn load_all<D: DeviceFile>(
    state: v2::Prepared,
    source: &mut DescriptorSource,
    files: &v2::Files,
) -> Result<LoadedState<D>, UpdateError> {
    let general = |source| UpdateError { phase: Phase::Load, device: None, source };
    check_numbers(&state).map_err(general)?;
    let v2::Prepared { update: _, memory, devices, descriptors, announced } = state;
    let memories = memory.memories.into_iter().map(|memory| take_memory(memory, source));
    let memories = memories.collect::<Result<Vec<_>, _>>().map_err(general)?;
    let mut loaded: Vec<LoadedDevice<D>> = Vec::with_capacity(devices.devices.len());
    let mut names = std::collections::HashSet::new();
    for (at, device) in devices.devices.into_iter().enumerate() {
        let name = device.name.clone();
        let one = || {
            if !names.insert(device.name.clone()) {
                return Err(invalid("device", "its name is there twice"));
            }
            LoadedDevice::new(device, &memories, source, files.files.get(at), &announced)
        };
        loaded.push(one().map_err(|source| UpdateError {
            phase: Phase::Load,
            device: Some(name),
            source,
        })?);
    }
    let mut named = BTreeMap::new();
    for v2::Descriptor { name, fd } in descriptors.descriptors {
        let fd = source.take(&format!("descriptor \"{name}\""), fd).map_err(general)?;
        if named.insert(name.clone(), fd).is_some() {
            return Err(general(invalid("descriptors", format!("\"{name}\" is there twice"))));
        }
    }
    Ok(LoadedState { memories, devices: loaded, descriptors: named })
}

fn take_memory(memory: v2::Memory, source: &mut DescriptorSource) -> Result<Arc<Memory>, Cause> {
    let v2::Memory { name, fd, offset, size } = memory;
    let fd = source.take(&format!("memory \"{name}\""), fd)?;
    Ok(Memory::unmapped(&name, fd, offset, size)?)
}

/// Numbers of all descriptors in the state, ascending.
fn numbers(state: &v2::Prepared) -> Vec<i32> {
    let devices = &state.devices.devices;
    let events = devices.iter().flat_map(|d| d.queues.iter().flat_map(|q| [q.kick_fd, q.call_fd]));
    let guests = devices.iter().flat_map(|d| d.guest_queues.iter().flat_map(|q| [q.kick_fd, q.call_fd]));
    let memories = state.memory.memories.iter().map(|m| m.fd);
    let own = state.descriptors.descriptors.iter().map(|d| d.fd);
    let files = devices.iter().filter_map(|d| d.fd);
    let mut numbers: Vec<i32> = memories.chain(events).chain(guests).chain(own).chain(files).collect();
    numbers.sort_unstable();
    numbers
}

/// Checks that no descriptor occurs twice: each is moved to one place.
pub(super) fn check_numbers(state: &v2::Prepared) -> Result<(), Cause> {
    let numbers = numbers(state);
    match steps::first_duplicate(&numbers) {
        Some(number) => Err(invalid("descriptors", format!("number {number} is there twice"))),
        None => Ok(()),
    }
}

impl<D: DeviceFile> LoadedDevice<D> {
    fn new(
        device: v2::Device,
        memories: &[Arc<Memory>],
        source: &mut DescriptorSource,
        file: Option<&v2::DeviceFile>,
        announced: &mappings::Announcement,
    ) -> Result<Self, Cause> {
        let strategy: Strategy = device
            .strategy
            .parse()
            .map_err(|e: super::UnknownStrategy| invalid("strategy", e.to_string()))?;
        let mut setup = setup(&device);
        let ops = match (strategy, device.fd) {
            (Strategy::Reopen, _) if setup.path.is_none() => return Err(Cause::NoPath),
            (Strategy::Reopen, _) => None,
            (_, Some(fd)) => Some(open(source.take("device", fd)?, &device, &mut setup, file)?),
            (_, None) => return Err(invalid("device", "there is no descriptor of it")),
        };
        for mapping in device.mappings {
            add_region(&mut setup, mapping, memories)?;
        }
        let mut indexes = std::collections::HashSet::new();
        let mut rings = Vec::with_capacity(device.queues.len());
        for queue in device.queues {
            once(&mut indexes, queue.index)?;
            let (kick, call) = events(source, queue.index, queue.kick_fd, queue.call_fd)?;
            rings.push((queue, kick, call));
        }
        for queue in device.guest_queues {
            once(&mut indexes, queue.index)?;
            let (kick, call) = events(source, queue.index, queue.kick_fd, queue.call_fd)?;
            let v2::GuestQueue { index, size, desc, driver, device, .. } = queue;
            let index = QueueIndex(index);
            let ring = GuestRing { size, desc, driver, device };
            // With mappings that only the switch brings, the ring may be in one of them: `adopt` checks it again.
            let regions = &setup.regions;
            let covered = |area| announced.mappings || regions.cover(area);
            let addr = check_guest_ring(index, ring, setup.features, covered)?;
            setup.guest_queues.push(GuestQueue(Vring { index, size, addr, kick, call, enabled: true }));
        }
        Ok(Self { name: device.name, strategy, ops, setup, rings })
    }

    /// Makes this process known to the server of the device, so that the server has its identity before the switch. Sends
    /// GET_VRING_BASE, which only the owner may do, and ignores the refusal. Servers without such a cache refuse it too.
    pub(super) fn announce_to_server(&self) {
        let queues = self.rings.iter().map(|(queue, ..)| QueueIndex(queue.index));
        let index = queues.chain(self.setup.vrings().map(|vring| vring.index)).next();
        if let (Some(ops), Some(index)) = (&self.ops, index) {
            let _ = ops.vring_base(index);
        }
    }

    /// Restores the driver side of the rings at the positions of the predecessor, and what only the switch has. Returns the
    /// vring bases; empty for a device that keeps its own.
    pub(super) fn adopt(
        &mut self,
        state: v2::DeviceState,
        memories: &[Arc<Memory>],
    ) -> Result<Vec<u32>, Cause> {
        let v2::DeviceState { suspend_ns: _, bases, drivers, packed_drivers, writeback, .. } = state;
        self.setup.writeback = writeback;
        for mappings::Mapping { iova, size, offset, memory, perm } in state.mappings {
            let at = usize::try_from(memory).ok().and_then(|at| memories.get(at));
            let memory = at.ok_or_else(|| invalid("mapping", format!("there is no memory {memory}")))?;
            let mapping = Nameless { memory: Arc::clone(memory), offset, size, perm: Perm(perm) };
            self.setup.regions.push_nameless(iova, mapping, self.setup.iova_range)?;
        }
        for GuestQueue(vring) in &self.setup.guest_queues {
            let VringAddr { desc, avail, used, .. } = vring.addr;
            let ring = GuestRing { size: vring.size, desc, driver: avail, device: used };
            let regions = &self.setup.regions;
            check_guest_ring(vring.index, ring, self.setup.features, |area| regions.cover(area))?;
        }
        let drivers: Vec<_> = drivers
            .into_iter()
            .map(SavedDriver::Split)
            .chain(packed_drivers.into_iter().map(SavedDriver::Packed))
            .collect();
        if drivers.len() != self.rings.len() {
            return Err(invalid(
                "queues",
                format!("there are {} of them and {} driver sides", self.rings.len(), drivers.len()),
            ));
        }
        let vrings = self.rings.len() + self.setup.guest_queues.len();
        let told = matches!(self.strategy, Strategy::Reset | Strategy::Reopen);
        if told && bases.len() != vrings {
            return Err(invalid("queues", format!("there are {vrings} of them and {} bases", bases.len())));
        }
        for ((queue, kick, call), driver) in self.rings.drain(..).zip(drivers) {
            let adopted = adopt_queue(&self.setup, queue, (kick, call), driver)?;
            self.setup.queues.push(Slot::new(adopted));
        }
        for vring in self.setup.vrings_mut() {
            vring.enabled = !state.disabled.contains(&vring.index.0);
        }
        Ok(bases)
    }
}

fn once(indexes: &mut std::collections::HashSet<u16>, index: u16) -> Result<(), Cause> {
    if indexes.insert(index) { Ok(()) } else { Err(invalid(&format!("queue {index}"), "it is there twice")) }
}

fn events(
    source: &mut DescriptorSource,
    index: u16,
    kick: i32,
    call: i32,
) -> Result<(EventFd, EventFd), Cause> {
    let mut event = |name: &str, number| -> Result<EventFd, Cause> {
        let what = format!("{name} of queue {index}");
        EventFd::from_fd(source.take(&what, number)?).map_err(|e| invalid(&what, e.to_string()))
    };
    Ok((event("kick", kick)?, event("call", call)?))
}

/// The set-up that was negotiated, without memory and queues.
fn setup(device: &v2::Device) -> Setup {
    let backend = BackendFeatures(device.backend_features);
    let path = device.path.as_ref().map(PathBuf::from);
    let features = Features(device.features);
    let mut setup = Setup::new(path, device.device_id, IovaRange::ALL, backend, backend, features);
    setup.running = device.running;
    setup
}

/// Makes a device of `fd` and checks that it still offers what was negotiated. For a file that was open before the exec, it
/// does not request this again, since a request to a device file in user space costs two context switches between processes.
fn open<D: DeviceFile>(
    fd: OwnedFd,
    device: &v2::Device,
    setup: &mut Setup,
    file: Option<&v2::DeviceFile>,
) -> Result<D, Cause> {
    if let Some((file, range)) = file.filter(|file| file.is(&fd)).and_then(|f| Some((f, f.iova_range()?))) {
        setup.offered = BackendFeatures(file.backend_features);
        if !setup.offered.contains(setup.backend) {
            return Err(Cause::BackendFeatures { saved: setup.backend, present: setup.offered });
        }
        setup.iova_range = range;
        return D::from_acknowledged(fd, setup.backend)
            .map_err(|e| Error::request("VHOST_SET_BACKEND_FEATURES")(e).into());
    }
    let ops = D::from_fd(fd).map_err(|e| invalid("device", format!("its descriptor: {e}")))?;
    let device_id = ops.device_id().map_err(Error::request("VHOST_VDPA_GET_DEVICE_ID"))?;
    if device_id != device.device_id {
        return Err(invalid(
            "device",
            format!(
                "it was of virtio type {}, the descriptor leads to one of type {device_id}",
                device.device_id
            ),
        ));
    }
    let (saved, present) = (setup.features, ops.features().map_err(Error::request("VHOST_GET_FEATURES"))?);
    if !present.contains(saved) {
        return Err(Cause::Features { saved, present });
    }
    let present = ops.backend_features().map_err(Error::request("VHOST_GET_BACKEND_FEATURES"))?;
    if !present.contains(setup.backend) {
        return Err(Cause::BackendFeatures { saved: setup.backend, present });
    }
    setup.offered = present;
    setup.iova_range = ops.iova_range().map_err(Error::request("VHOST_VDPA_GET_IOVA_RANGE"))?;
    set_backend(&ops, setup.backend)?;
    Ok(ops)
}

fn add_region(setup: &mut Setup, mapping: v2::Mapping, memories: &[Arc<Memory>]) -> Result<(), Cause> {
    let v2::Mapping { name, memory, offset, iova, size, perm, asid } = mapping;
    let what = || format!("region \"{name}\"");
    if asid != 0 {
        return Err(invalid(&what(), format!("it is in address space {asid}; only 0 is known")));
    }
    let at = usize::try_from(memory).ok().and_then(|at| memories.get(at));
    let memory = at.ok_or_else(|| invalid(&what(), format!("there is no memory {memory}")))?;
    let backing = Backing::Memory(Arc::clone(memory), offset);
    setup.add_region(RegionSpec { name, backing, iova, size, perm: Perm(perm), populate: false })?;
    Ok(())
}

fn adopt_queue(
    setup: &Setup,
    queue: v2::Queue,
    events: (EventFd, EventFd),
    driver: SavedDriver,
) -> Result<Queue, Cause> {
    let v2::Queue { index, size, desc, avail, used, region, .. } = queue;
    let layout = RingLayout { size, desc, avail, used };
    let place = setup.regions.get(&region).ok_or_else(|| {
        invalid(&format!("queue {index}"), format!("its region \"{region}\" does not exist"))
    })?;
    Ok(Queue::adopt(QueueIndex(index), place, layout, setup.features, events, driver)?)
}

pub(super) fn invalid(what: &str, reason: impl Into<String>) -> Cause {
    Cause::Invalid { what: what.to_owned(), reason: reason.into() }
}
