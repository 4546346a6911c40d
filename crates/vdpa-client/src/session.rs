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

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::{VdpaOps, read_all_config};
use vdpa_core::types::{IovaRange, Perm, QueueIndex};
use vdpa_core::vq::QueueState;
use vdpa_sys::eventfd::EventFd;

use crate::device::{agree, choose, driver_ok, set_status};
use crate::dma::{Backing, Region, RegionSpec, Regions, in_batch, map_all, problem};
use crate::error::{Error, QueueProblem, RegionProblem};
use crate::memory::Memory;
use crate::queue::{Queue, RingLayout, queue};
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
    pub(crate) queues: Vec<Queue>,
    pub(crate) guest_queues: Vec<GuestQueue>,
    pub(crate) running: bool,
    /// Cache mode that the driver of a block device has set (field `writeback`), while the device is reset or closed and has
    /// forgotten it.
    pub(crate) writeback: Option<u8>,
    /// Counts changes of the fields above. A prepared update compares it to detect them.
    pub(crate) generation: u64,
}

impl Setup {
    pub(crate) const fn batch(&self) -> bool {
        self.backend.has(BackendFeatures::IOTLB_BATCH)
    }

    /// All virtqueues: first those driven here, then those of a guest. Vring bases are in this order.
    pub(crate) fn vrings(&self) -> impl Iterator<Item = &Vring> {
        self.queues.iter().map(|q| &q.vring).chain(self.guest_queues.iter().map(|q| &q.0))
    }

    /// Adds a region whose mapping the device has or will get.
    pub(crate) fn add_region(&mut self, spec: RegionSpec) -> Result<(), Error> {
        let region = Region::new(spec, self.iova_range)?;
        self.regions.push(region)
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
    /// [`Error::Region`], [`Error::Request`]; [`Error::Map`] when the device refuses (`EFAULT` covers everything,
    /// also pages that `RLIMIT_MEMLOCK` does not allow to pin).
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
        let added = specs.into_iter().try_for_each(|spec| self.setup.add_region(spec)).and_then(|()| {
            let new = self.setup.regions.list().get(before..).unwrap_or_default();
            map_all(&self.ops, new, self.setup.batch())
        });
        if added.is_err() {
            self.setup.regions.truncate(before);
        }
        added
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
        self.setup.queues.push(new);
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
        let packed = self.setup.features.has(Features::RING_PACKED);
        self.check_new_queue(index, ring.size, !packed)?;
        let addr = check_guest_ring(index, ring, |iova| self.setup.regions.covers(iova))?;
        let vring = Vring { index, size: ring.size, addr, kick, call };
        vring.set_up(&self.ops, QueueState::initial(self.setup.features))?;
        self.setup.generation += 1;
        self.setup.guest_queues.push(GuestQueue(vring));
        Ok(())
    }

    fn check_new_queue(&self, index: QueueIndex, size: u16, power_of_two: bool) -> Result<(), Error> {
        if self.setup.running {
            return Err(queue(index, QueueProblem::Running));
        }
        if self.setup.vrings().any(|vring| vring.index == index) {
            return Err(queue(index, QueueProblem::Exists));
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

    /// A queue that this program drives.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up, or a guest's.
    pub fn queue(&self, index: QueueIndex) -> Result<&Queue, Error> {
        self.setup.queues.iter().find(|q| q.index() == index).ok_or_else(|| self.no_queue(index, A_GUESTS))
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
    /// [`Error::Queue`] when it is not set up, or a guest's.
    pub fn queue_mut(&mut self, index: QueueIndex) -> Result<&mut Queue, Error> {
        let at = self.setup.queues.iter().position(|q| q.index() == index);
        // Build the error only on failure: a driver calls this for each request.
        let Some(at) = at else { return Err(self.no_queue(index, A_GUESTS)) };
        self.setup.queues.get_mut(at).ok_or_else(|| queue(index, QueueProblem::Unknown))
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
