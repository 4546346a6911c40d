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

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::{VdpaOps, read_all_config};
use vdpa_core::types::{IovaRange, QueueIndex};
use vdpa_core::vq::QueueState;
use vdpa_sys::eventfd::EventFd;

use crate::device::{Device, DeviceFile, Present, agree, choose, driver_ok, set_status};
use crate::dma::{Region, RegionSpec, Regions, in_batch, writable_bytes};
use crate::error::{Error, QueueProblem};
use crate::queue::{Slot, queue};
use crate::vring::{GuestQueue, Vring};

mod dirty;
mod mapping;
mod queues;
mod table;

pub use dirty::DirtyPages;

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
        writable_bytes(self.regions.pieces())
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

    /// Adds a region whose mapping the device will get.
    pub(crate) fn add_region(&mut self, spec: RegionSpec) -> Result<(), Error> {
        self.setup.add_region(spec)
    }

    /// The device has these features now.
    pub(crate) const fn set_features(&mut self, features: Features) {
        self.setup.features = features;
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
