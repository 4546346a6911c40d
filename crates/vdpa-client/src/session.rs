//! A negotiated device with its memory and its queues.
//!
//! Reading the first sector of a disk, which is a device in this process here and a device file as a rule:
//!
//! ```
//! use vdpa_client::device::Device;
//! use vdpa_core::blk::{RequestHeader, kind};
//! use vdpa_core::features::Features;
//! use vdpa_core::inprocess::Node;
//! use vdpa_core::ring::Buffer;
//! use vdpa_core::testing::RamBlk;
//! use vdpa_core::types::{Perm, QueueIndex};
//! use vdpa_sys::guest::LinuxHost;
//! use vdpa_sys::memfd;
//! use vdpa_sys::process::ThisProcess;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const IOVA: u64 = 0x10_0000;
//! const SIZE: u64 = 0x4000;
//! let queue = QueueIndex(0);
//!
//! let node = Node::new(RamBlk::<LinuxHost>::on_host(64));
//! let device = Device::from_ops(node.open(ThisProcess::default())?);
//! let mut session = device.negotiate(Features::of(&[Features::BLK_FLUSH]))?;
//!
//! // The ring in the first 8 KiB of a memory object, the request after it.
//! session.map_memfd("memory", memfd::create(c"memory", SIZE, None)?, IOVA, SIZE, Perm::RW)?;
//! session.add_queue(queue, 16, "memory", 0)?;
//! let memory = session.region("memory").and_then(|region| region.map()).cloned().ok_or("not ours")?;
//! memory.write(0x2000, &RequestHeader { kind: kind::IN, ioprio: 0, sector: 0 }.encode())?;
//! memory.write(0x2010, &[0xff])?;
//! session.start()?;
//!
//! let at = |offset, len| Buffer { iova: IOVA + offset, len };
//! let driver = session.queue_mut(queue)?;
//! driver.submit(&[at(0x2000, 16)], &[at(0x3000, 512), at(0x2010, 1)], 7)?;
//! driver.notify()?;
//! node.with(|device| device.parent_mut().serve()); // A device file waits for the kick itself.
//!
//! let completion = driver.reap()?.ok_or("not answered")?;
//! assert_eq!((completion.token, completion.len), (7, 513));
//! let mut status = [0xff];
//! memory.read(0x2010, &mut status)?;
//! assert_eq!(status, [0], "VIRTIO_BLK_S_OK");
//! # Ok(())
//! # }
//! ```

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::{VdpaOps, read_all_config};
use vdpa_core::types::{IovaRange, Perm, QueueIndex};
use vdpa_core::vq::QueueState;
use vdpa_sys::eventfd::EventFd;

use crate::device::{Device, DeviceFile, Present, PresentQueue, agree, choose, driver_ok, set_status};
use crate::dma::{Backing, Nameless, Piece, Region, RegionSpec, Regions, in_batch, map_all, problem};
use crate::error::{Error, QueueProblem, RegionProblem};
use crate::memory::Memory;
use crate::queue::{Queue, RingLayout, Slot, queue};
use crate::vring::{GuestQueue, GuestRing, Vring, check_guest_ring};

/// The caller asked for a queue to drive it, but a guest drives it.
const A_GUESTS: QueueProblem = QueueProblem::Kind { owner: "a guest", asked: "this program" };
/// The caller asked for a queue of a guest, but this program drives it.
const OURS: QueueProblem = QueueProblem::Kind { owner: "this program", asked: "a guest" };

/// A device that this process owns, with everything that was set up on it.
///
/// Dropping it closes the device, which resets it and unmaps everything.
#[derive(Debug)]
pub struct Session<D> {
    ops: D,
    setup: Setup,
}

/// Everything about a session except the open device: the part that an update carries over.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) path: Option<PathBuf>,
    pub(crate) device_id: u32,
    pub(crate) iova_range: IovaRange,
    pub(crate) offered: BackendFeatures,
    pub(crate) backend: BackendFeatures,
    pub(crate) features: Features,
    pub(crate) regions: Regions,
    pub(crate) queues: Vec<Slot>,
    pub(crate) guest_queues: Vec<GuestQueue>,
    pub(crate) running: bool,
    /// Whether the caller has suspended the device.
    pub(crate) suspended: bool,
    /// Cache mode that the driver of a block device has set (field `writeback`), while the device is reset or closed and has
    /// forgotten it.
    pub(crate) writeback: Option<u8>,
    /// Counts changes of what a prepared update has described. Mappings without names and the state of queues are collected in
    /// the switch, so they do not count.
    pub(crate) generation: u64,
}

impl Setup {
    /// A negotiated device without memory and queues.
    pub(crate) fn new(
        path: Option<PathBuf>,
        device_id: u32,
        iova_range: IovaRange,
        offered: BackendFeatures,
        backend: BackendFeatures,
        features: Features,
    ) -> Self {
        Self {
            path,
            device_id,
            iova_range,
            offered,
            backend,
            features,
            regions: Regions::default(),
            queues: Vec::new(),
            guest_queues: Vec::new(),
            running: false,
            suspended: false,
            writeback: None,
            generation: 0,
        }
    }

    pub(crate) const fn batch(&self) -> bool {
        self.backend.has(BackendFeatures::IOTLB_BATCH)
    }

    /// All virtqueues: first those driven here, then those of a guest. Vring bases are in this order.
    pub(crate) fn vrings(&self) -> impl Iterator<Item = &Vring> {
        self.queues.iter().map(|q| &q.vring).chain(self.guest_queues.iter().map(|q| &q.0))
    }

    pub(crate) fn vrings_mut(&mut self) -> impl Iterator<Item = &mut Vring> {
        self.queues.iter_mut().map(|q| &mut q.vring).chain(self.guest_queues.iter_mut().map(|q| &mut q.0))
    }

    /// Bytes that a device which pins memory pins for this session: each writable mapping.
    pub(crate) fn pinned(&self) -> u64 {
        let writable = self.regions.pieces().filter(|piece| piece.perm.write());
        writable.map(|piece| piece.size).fold(0, u64::saturating_add)
    }

    /// Number of requests in flight in the queues that are here.
    pub(crate) fn in_flight(&self) -> usize {
        self.queues.iter().filter_map(|slot| slot.queue.as_ref()).map(|q| usize::from(q.in_flight())).sum()
    }

    /// Adds a region whose mapping the device has or will get.
    pub(crate) fn add_region(&mut self, spec: RegionSpec) -> Result<(), Error> {
        let region = Region::new(spec, self.iova_range)?;
        self.regions.push(region)
    }
}

impl<D: DeviceFile> AsFd for Session<D> {
    /// The device file, for what this type has no method for.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ops.fd()
    }
}

impl<D: DeviceFile> AsRawFd for Session<D> {
    fn as_raw_fd(&self) -> RawFd {
        self.ops.fd().as_raw_fd()
    }
}

impl<D: DeviceFile> Session<D> {
    /// A session with a device that somebody else has set up: [`Device::assume`](crate::Device::assume) of its descriptor.
    ///
    /// # Errors
    /// As [`Device::assume`](crate::Device::assume).
    pub fn assume(fd: OwnedFd, present: Present) -> Result<Self, Error> {
        Device::from_fd(fd)?.assume(present)
    }
}

impl<D: VdpaOps<Event = EventFd>> Session<D> {
    pub(crate) const fn new(ops: D, setup: Setup) -> Self {
        Self { ops, setup }
    }

    pub(crate) fn into_parts(self) -> (D, Setup) {
        (self.ops, self.setup)
    }

    pub(crate) const fn parts(&self) -> (&D, &Setup) {
        (&self.ops, &self.setup)
    }

    /// The device, for requests that this type has no method for.
    ///
    /// An update does not carry over what such requests change.
    #[must_use]
    pub const fn ops(&self) -> &D {
        &self.ops
    }

    /// Virtio device id (virtio 1.2 section 5): 1 network, 2 block.
    #[must_use]
    pub const fn device_id(&self) -> u32 {
        self.setup.device_id
    }

    /// Path at which the device can be opened again, if known.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.setup.path.as_deref()
    }

    /// I/O virtual addresses that the device can use.
    #[must_use]
    pub const fn iova_range(&self) -> IovaRange {
        self.setup.iova_range
    }

    /// Negotiated device features.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.setup.features
    }

    /// Backend features the device offers.
    #[must_use]
    pub const fn offered_backend_features(&self) -> BackendFeatures {
        self.setup.offered
    }

    /// Backend features in use.
    #[must_use]
    pub const fn backend_features(&self) -> BackendFeatures {
        self.setup.backend
    }

    /// Maps a memory object for the device, and into this process.
    ///
    /// # Errors
    /// [`Error::Region`], [`Error::Request`]; [`Error::Map`] when the device refuses; [`Error::Memlock`] when that is because of
    /// `RLIMIT_MEMLOCK`.
    pub fn map_memfd(
        &mut self,
        name: &str,
        fd: OwnedFd,
        iova: u64,
        size: u64,
        perm: Perm,
    ) -> Result<(), Error> {
        let backing = Backing::Object(fd);
        self.map(vec![RegionSpec { name: name.to_owned(), backing, iova, size, perm, populate: false }])
    }

    /// Maps a part of memory that other regions or devices share: `size` bytes from byte `offset` of it on.
    ///
    /// # Errors
    /// As [`map_memfd`](Self::map_memfd).
    pub fn map_memory(
        &mut self,
        name: &str,
        memory: &Arc<Memory>,
        offset: u64,
        iova: u64,
        size: u64,
        perm: Perm,
    ) -> Result<(), Error> {
        let backing = Backing::Memory(Arc::clone(memory), offset);
        self.map(vec![RegionSpec { name: name.to_owned(), backing, iova, size, perm, populate: false }])
    }

    /// Maps several regions, in one batch if the device can. All or nothing.
    ///
    /// # Errors
    /// As [`map_memfd`](Self::map_memfd).
    pub fn map(&mut self, specs: Vec<RegionSpec>) -> Result<(), Error> {
        let before = self.setup.regions.list().len();
        self.setup.generation += 1;
        let added = specs
            .into_iter()
            .try_for_each(|spec| self.setup.add_region(spec))
            .and_then(|()| map_all(&self.ops, self.setup.regions.pieces_from(before), self.setup.batch()));
        added.map_err(|error| {
            let error = error.explain(self.setup.pinned());
            self.setup.regions.truncate(before);
            error
        })
    }

    /// Unmaps a region. The caller makes sure that it holds no ring and that no request in flight uses it. Blocks until the
    /// device does not access it any more.
    ///
    /// # Errors
    /// [`Error::Region`] for an unknown name; [`Error::Request`].
    pub fn unmap(&mut self, name: &str) -> Result<(), Error> {
        let region = self.setup.regions.get(name).ok_or_else(|| problem(name, RegionProblem::Unknown))?;
        self.ops
            .dma_unmap(vdpa_core::types::Asid(0), region.range().first(), region.range().size())
            .map_err(Error::request("VHOST_IOTLB_INVALIDATE"))?;
        self.setup.generation += 1;
        self.setup.regions.remove(name);
        Ok(())
    }

    /// Maps `size` bytes from byte `offset` of `memory` at `iova`, without a name. For mappings that a guest's virtual IOMMU
    /// makes, many in a second: one request, and a prepared update stays valid if it knows the memory. It does when the memory
    /// was in use when it was described.
    ///
    /// # Errors
    /// As [`map_memfd`](Self::map_memfd); errors name the memory.
    pub fn map_at(
        &mut self,
        memory: &Arc<Memory>,
        offset: u64,
        iova: u64,
        size: u64,
        perm: Perm,
    ) -> Result<(), Error> {
        let mapping = Nameless { memory: Arc::clone(memory), offset, size, perm };
        self.setup.regions.push_nameless(iova, mapping, self.setup.iova_range)?;
        let uaddr = memory.uaddr().saturating_add(offset);
        let mapped = map_all(
            &self.ops,
            std::iter::once(Piece { name: memory.name(), iova, size, uaddr, perm }),
            false,
        );
        mapped.map_err(|error| {
            let error = error.explain(self.setup.pinned());
            self.setup.regions.remove_nameless(iova);
            error
        })
    }

    /// Unmaps what [`map_at`](Self::map_at) has mapped at exactly this range. As [`unmap`](Self::unmap) otherwise.
    ///
    /// # Errors
    /// [`Error::Region`] when there is no such mapping; [`Error::Request`].
    pub fn unmap_at(&mut self, iova: u64, size: u64) -> Result<(), Error> {
        let there = self.setup.regions.nameless().get(&iova);
        let Some(mapping) = there.filter(|mapping| mapping.size == size) else {
            let range = IovaRange::from_size(iova, size).unwrap_or(IovaRange::ALL);
            return Err(problem("", RegionProblem::NotMapped { range }));
        };
        self.ops
            .dma_unmap(vdpa_core::types::Asid(0), iova, mapping.size)
            .map_err(Error::request("VHOST_IOTLB_INVALIDATE"))?;
        self.setup.regions.remove_nameless(iova);
        Ok(())
    }

    /// Number of mappings without a name.
    #[must_use]
    pub fn mappings(&self) -> usize {
        self.setup.regions.nameless().len()
    }

    /// Maps guest memory of the crate `vm-memory`: each region at the I/O virtual address that is its guest address, under the
    /// name `guest@ADDRESS`. It stays mapped in this process where it is.
    ///
    /// # Errors
    /// As [`map_memfd`](Self::map_memfd); [`RegionProblem::NoFile`] for a region without a file.
    #[cfg(feature = "vm-memory")]
    pub fn map_guest_memory<B: vm_memory::bitmap::Bitmap + Send + Sync + 'static>(
        &mut self,
        memory: &vm_memory::GuestMemoryMmap<B>,
        perm: Perm,
    ) -> Result<(), Error> {
        use vm_memory::{Address as _, GuestMemoryBackend as _, GuestMemoryRegion as _};
        let spec = |region: &vm_memory::GuestRegionMmap<B>| {
            let (iova, size) = (region.start_addr().raw_value(), region.len());
            let name = format!("guest@{iova:#x}");
            let backing = Backing::Memory(Memory::from_guest_region(&name, region)?, 0);
            Ok(RegionSpec { name, backing, iova, size, perm, populate: false })
        };
        let specs: Result<Vec<_>, Error> = memory.iter().map(spec).collect();
        self.map(specs?)
    }

    /// A region by its name.
    #[must_use]
    pub fn region(&self, name: &str) -> Option<&Region> {
        self.setup.regions.get(name)
    }

    /// All regions, in the order in which they were mapped.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        self.setup.regions.list()
    }

    /// Sets up a ring of `size` entries, split or packed as negotiated, in a region, from byte `offset` on.
    ///
    /// # Errors
    /// [`Error::Queue`], [`Error::Region`], [`Error::Request`].
    pub fn add_queue(
        &mut self,
        index: QueueIndex,
        size: u16,
        region: &str,
        offset: u64,
    ) -> Result<(), Error> {
        self.check_new_queue(index, size, true)?;
        let layout = RingLayout::at(offset, size);
        let memory = self.region(region).ok_or_else(|| problem(region, RegionProblem::Unknown))?;
        let new = Queue::new(index, memory, layout, self.setup.features)?;
        new.vring.set_up(&self.ops, QueueState::initial(self.setup.features))?;
        self.setup.generation += 1;
        self.setup.queues.push(Slot::new(new));
        Ok(())
    }

    /// Sets up a ring that belongs to a guest, split or packed as negotiated. A guest has placed it in memory that is
    /// mapped already; the caller gives the events, which the session keeps.
    ///
    /// # Errors
    /// [`Error::Queue`], [`Error::Request`].
    pub fn add_guest_queue(
        &mut self,
        index: QueueIndex,
        ring: GuestRing,
        kick: EventFd,
        call: EventFd,
    ) -> Result<(), Error> {
        let base = QueueState::initial(self.setup.features);
        self.add_guest_queue_at(index, ring, kick, call, base, true)
    }

    /// As [`add_guest_queue`](Self::add_guest_queue), for a ring that a guest has driven before (a restored snapshot, the
    /// destination of a migration): the device begins at `base`. With `enabled` false the device does not serve it until
    /// [`set_queue_enabled`](Self::set_queue_enabled), as those of a network device beyond the pairs in use.
    ///
    /// # Errors
    /// As [`add_guest_queue`](Self::add_guest_queue).
    pub fn add_guest_queue_at(
        &mut self,
        index: QueueIndex,
        ring: GuestRing,
        kick: EventFd,
        call: EventFd,
        base: QueueState,
        enabled: bool,
    ) -> Result<(), Error> {
        let packed = self.setup.features.has(Features::RING_PACKED);
        self.check_new_queue(index, ring.size, !packed)?;
        let vring = self.guest_vring(index, ring, kick, call, enabled)?;
        vring.set_up(&self.ops, base)?;
        self.setup.generation += 1;
        self.setup.guest_queues.push(GuestQueue(vring));
        Ok(())
    }

    fn guest_vring(
        &self,
        index: QueueIndex,
        ring: GuestRing,
        kick: EventFd,
        call: EventFd,
        enabled: bool,
    ) -> Result<Vring, Error> {
        let regions = &self.setup.regions;
        let addr = check_guest_ring(index, ring, self.setup.features, |area| regions.cover(area))?;
        Ok(Vring { index, size: ring.size, addr, kick, call, enabled })
    }

    /// Adds a ring that the device has already.
    pub(crate) fn add_present_queue(&mut self, present: PresentQueue) -> Result<(), Error> {
        let PresentQueue { index, ring, kick, call, enabled } = present;
        if self.setup.vrings().any(|vring| vring.index == index) {
            return Err(queue(index, QueueProblem::Exists));
        }
        let vring = self.guest_vring(index, ring, kick, call, enabled)?;
        self.setup.guest_queues.push(GuestQueue(vring));
        Ok(())
    }

    /// Makes the device serve a queue or not (`VHOST_VDPA_SET_VRING_ENABLE`). An update keeps it.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up; [`Error::Request`].
    pub fn set_queue_enabled(&mut self, index: QueueIndex, enabled: bool) -> Result<(), Error> {
        let vring = self.setup.vrings_mut().find(|vring| vring.index == index);
        let vring = vring.ok_or_else(|| queue(index, QueueProblem::Unknown))?;
        self.ops.set_vring_enable(index, enabled).map_err(Error::request("VHOST_VDPA_SET_VRING_ENABLE"))?;
        vring.enabled = enabled;
        Ok(())
    }

    fn check_new_queue(&self, index: QueueIndex, size: u16, power_of_two: bool) -> Result<(), Error> {
        if self.setup.running {
            return Err(queue(index, QueueProblem::Running));
        }
        if self.setup.vrings().any(|vring| vring.index == index) {
            return Err(queue(index, QueueProblem::Exists));
        }
        let count = self.ops.vqs_count().map_err(Error::request("VHOST_VDPA_GET_VQS_COUNT"))?;
        if u32::from(index.0) >= count {
            return Err(queue(index, QueueProblem::Index { count }));
        }
        let max = self.ops.vring_num().map_err(Error::request("VHOST_VDPA_GET_VRING_NUM"))?;
        let shape = if power_of_two { size >= 2 && size.is_power_of_two() } else { size >= 1 };
        let problem = QueueProblem::Size { size, power_of_two, max };
        if shape && size <= max { Ok(()) } else { Err(queue(index, problem)) }
    }

    /// Resets the device, as a guest does. All queues are removed; the memory stays mapped. Requests in flight are lost. Call
    /// [`renegotiate`](Self::renegotiate) next. Blocks while the device resets.
    ///
    /// # Errors
    /// [`Error::Request`].
    pub fn reset(&mut self) -> Result<(), Error> {
        set_status(&self.ops, Status::RESET)?;
        self.setup.generation += 1;
        self.setup.running = false;
        self.setup.suspended = false;
        self.setup.queues.clear();
        self.setup.guest_queues.clear();
        if self.setup.backend.has(BackendFeatures::IOTLB_PERSIST) {
            return Ok(());
        }
        // A device without IOTLB_PERSIST forgets its translation in a reset. The end of a batch restores it (uapi-spec 4.5).
        in_batch(&self.ops, self.setup.batch(), || Ok(()))
    }

    /// Negotiates features again, after a [`reset`](Self::reset); of `wanted` those that the device offers.
    ///
    /// # Errors
    /// [`Error::Request`], [`Error::FeaturesRefused`].
    pub fn renegotiate(&mut self, wanted: Features) -> Result<(), Error> {
        let offered = self.ops.features().map_err(Error::request("VHOST_GET_FEATURES"))?;
        let chosen = choose(offered, wanted);
        agree(&self.ops, chosen)?;
        self.setup.generation += 1;
        self.setup.features = chosen;
        Ok(())
    }

    /// Starts the device (DRIVER_OK).
    ///
    /// # Errors
    /// [`Error::Request`]; with `EIO` when the device did not keep DRIVER_OK or has set NEEDS_RESET.
    pub fn start(&mut self) -> Result<(), Error> {
        driver_ok(&self.ops)?;
        self.setup.generation += 1;
        self.setup.running = true;
        Ok(())
    }

    /// Stops the device (`VHOST_VDPA_SUSPEND`): when it returns, no request is in flight in the device, and the vring bases stay.
    /// Blocks until requests in flight have ended.
    ///
    /// An update of a suspended device is possible with strategy `live`, which leaves it suspended.
    ///
    /// # Errors
    /// [`Error::Request`] with `EOPNOTSUPP` when the device does not offer SUSPEND.
    pub fn suspend(&mut self) -> Result<(), Error> {
        self.ops.suspend().map_err(Error::request("VHOST_VDPA_SUSPEND"))?;
        self.setup.suspended = true;
        Ok(())
    }

    /// Starts a suspended device again (`VHOST_VDPA_RESUME`), where it has stopped.
    ///
    /// # Errors
    /// [`Error::Request`] with `EOPNOTSUPP` when the device does not offer RESUME.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.ops.resume().map_err(Error::request("VHOST_VDPA_RESUME"))?;
        self.setup.suspended = false;
        for vring in self.setup.vrings() {
            // A device need not remember kicks that came while it was suspended.
            vring.kick.signal();
        }
        Ok(())
    }

    /// Where the device goes on in a ring (`VHOST_GET_VRING_BASE`); exact while the device is suspended.
    ///
    /// # Errors
    /// [`Error::Queue`] when the queue is not set up; [`Error::Request`], with `EIO` for a position that no ring has.
    pub fn vring_base(&self, index: QueueIndex) -> Result<QueueState, Error> {
        if !self.setup.vrings().any(|vring| vring.index == index) {
            return Err(queue(index, QueueProblem::Unknown));
        }
        let request = Error::request("VHOST_GET_VRING_BASE");
        let base = self.ops.vring_base(index).map_err(&request)?;
        QueueState::decode(base, self.setup.features).ok_or_else(|| request(Errno::IO))
    }

    /// Writes to the configuration space. An update keeps the field `writeback` of a block device, the only one that a driver
    /// may write.
    ///
    /// # Errors
    /// [`Error::Request`] with `EINVAL` outside of the configuration space.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Error> {
        self.ops.set_config(offset, data).map_err(Error::request("VHOST_VDPA_SET_CONFIG"))
    }

    /// Has the device signal `event` when its configuration changes or it needs a reset; `None` ends that. Call it again after an
    /// update.
    ///
    /// # Errors
    /// [`Error::Request`].
    pub fn set_config_event(&mut self, event: Option<&EventFd>) -> Result<(), Error> {
        self.ops.set_config_call(event).map_err(Error::request("VHOST_VDPA_SET_CONFIG_CALL"))
    }

    /// A queue that this program drives.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up, taken, or a guest's.
    pub fn queue(&self, index: QueueIndex) -> Result<&Queue, Error> {
        let slot = self.setup.queues.iter().find(|slot| slot.vring.index == index);
        let slot = slot.ok_or_else(|| self.no_queue(index, A_GUESTS))?;
        slot.queue.as_ref().ok_or_else(|| queue(index, QueueProblem::Taken))
    }

    /// Takes a queue out of the session, so that a thread of its own can drive it. Give it back with
    /// [`put_queue`](Self::put_queue) before an update is switched; prepare needs it not.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up, taken already, or a guest's.
    pub fn take_queue(&mut self, index: QueueIndex) -> Result<Queue, Error> {
        let at = self.setup.queues.iter().position(|slot| slot.vring.index == index);
        let at = at.ok_or_else(|| self.no_queue(index, A_GUESTS))?;
        let slot = self.setup.queues.get_mut(at);
        slot.and_then(|slot| slot.queue.take()).ok_or_else(|| queue(index, QueueProblem::Taken))
    }

    /// Takes a queue back that [`take_queue`](Self::take_queue) has given.
    ///
    /// # Errors
    /// [`Error::Queue`] for a queue of another session, or of this one before a [`reset`](Self::reset); it is dropped.
    pub fn put_queue(&mut self, taken: Queue) -> Result<(), Error> {
        let index = taken.index();
        let slot = self.setup.queues.iter_mut().find(|slot| slot.vring.index == index);
        if slot.is_some_and(|slot| slot.put(taken)) {
            Ok(())
        } else {
            Err(queue(index, QueueProblem::Foreign))
        }
    }

    /// A queue of a guest.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up, or driven by this program.
    pub fn guest_queue(&self, index: QueueIndex) -> Result<&GuestQueue, Error> {
        self.setup.guest_queues.iter().find(|q| q.index() == index).ok_or_else(|| self.no_queue(index, OURS))
    }

    /// Why there is no queue of the requested kind: `other`, if the queue is of the other kind.
    fn no_queue(&self, index: QueueIndex, other: QueueProblem) -> Error {
        let there = self.setup.vrings().any(|vring| vring.index == index);
        queue(index, if there { other } else { QueueProblem::Unknown })
    }

    /// A queue that this program drives, mutable: to submit and reap requests.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up, taken, or a guest's.
    pub fn queue_mut(&mut self, index: QueueIndex) -> Result<&mut Queue, Error> {
        let at = self.setup.queues.iter().position(|slot| slot.vring.index == index);
        // Build the error only on failure: a driver calls this for each request.
        let Some(at) = at else { return Err(self.no_queue(index, A_GUESTS)) };
        let slot = self.setup.queues.get_mut(at);
        slot.and_then(|slot| slot.queue.as_mut()).ok_or_else(|| queue(index, QueueProblem::Taken))
    }

    /// The whole configuration space.
    ///
    /// # Errors
    /// [`Error::Request`].
    pub fn config(&self) -> Result<Vec<u8>, Error> {
        read_all_config(&self.ops).map_err(Error::request("VHOST_VDPA_GET_CONFIG"))
    }

    /// The status register.
    ///
    /// # Errors
    /// [`Error::Request`].
    pub fn status(&self) -> Result<Status, Error> {
        self.ops.status().map_err(Error::request("VHOST_VDPA_GET_STATUS"))
    }
}
