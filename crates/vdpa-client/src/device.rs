//! Opening a device and negotiating with it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::{VdpaOps, read_all_config};
use vdpa_core::types::{IovaRange, QueueIndex};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::uapi::report::UpdateReport;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use crate::dma::RegionSpec;
use crate::error::Error;
use crate::session::{Session, Setup};
use crate::vring::GuestRing;

/// A device that is an open file, so that another process image can inherit it.
///
/// Implemented by vhost-vdpa device files, whether the kernel or vdpad serves them.
pub trait DeviceFile: VdpaOps<Event = EventFd> + Sized {
    /// The open file, to be inherited or passed on.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Opens the device at `path`, close-on-exec. Blocks until the server of the file answers.
    ///
    /// # Errors
    /// Errors of `open(2)`; `EBUSY` while another process has the device open.
    fn open(path: &Path) -> Result<Self, Errno>;

    /// Uses a device that is open already. Makes no request.
    ///
    /// # Errors
    /// `EBADF` for a descriptor that cannot be one; a device file takes any, and its requests fail.
    fn from_fd(fd: OwnedFd) -> Result<Self, Errno>;

    /// Sends the times of an update to the server of the device, for its operators. The device does not depend on it.
    ///
    /// # Errors
    /// `ENOTTY` from a server without this request, such as the kernel; this is the default.
    fn report_update(&self, _report: &UpdateReport) -> Result<(), Errno> {
        Err(Errno::NOTTY)
    }

    /// Uses an open file on which `features` were acknowledged before. This default acknowledges them again with one
    /// request; an implementation that needs none makes none.
    ///
    /// # Errors
    /// Errors of [`from_fd`](Self::from_fd) and of `VHOST_SET_BACKEND_FEATURES`.
    fn from_acknowledged(fd: OwnedFd, features: BackendFeatures) -> Result<Self, Errno> {
        let device = Self::from_fd(fd)?;
        device.set_backend_features(features)?;
        Ok(device)
    }
}

impl DeviceFile for VhostVdpaFd {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn open(path: &Path) -> Result<Self, Errno> {
        Self::open(path).map_err(|e| e.errno())
    }

    fn from_fd(fd: OwnedFd) -> Result<Self, Errno> {
        Ok(Self::from_fd(fd))
    }

    fn report_update(&self, report: &UpdateReport) -> Result<(), Errno> {
        Self::report_update(self, report)
    }

    fn from_acknowledged(fd: OwnedFd, features: BackendFeatures) -> Result<Self, Errno> {
        let device = Self::from_fd(fd);
        device.set_acknowledged(features);
        Ok(device)
    }
}

/// The backend features that this library uses. It does not use DESC_ASID, since it maps everything in one address space,
/// nor ENABLE_AFTER_DRIVER_OK, since it enables queues before DRIVER_OK.
pub const BACKEND_FEATURES: BackendFeatures = BackendFeatures::of(&[
    BackendFeatures::IOTLB_MSG_V2,
    BackendFeatures::IOTLB_BATCH,
    BackendFeatures::IOTLB_ASID,
    BackendFeatures::SUSPEND,
    BackendFeatures::RESUME,
    BackendFeatures::IOTLB_PERSIST,
    BackendFeatures::NEW_OWNER,
    BackendFeatures::IOTLB_REMAP,
]);

/// An open device before negotiation.
#[derive(Debug)]
pub struct Device<D> {
    ops: D,
    path: Option<PathBuf>,
}

impl<D: DeviceFile> Device<D> {
    /// Opens a device file.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        match D::open(&path) {
            Ok(ops) => Ok(Self { ops, path: Some(path) }),
            Err(source) => {
                let here = open_here(&path).filter(|_| source == Errno::BUSY);
                Err(Error::Open { path, source, here })
            }
        }
    }

    /// Uses a device file that another program has opened (a sandbox, a management daemon).
    ///
    /// Without a path the strategy `reopen` is not possible; add one with [`at`](Self::at).
    ///
    /// # Errors
    /// [`Error::Request`] for a descriptor that cannot be a device of this kind.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        Ok(Self { ops: D::from_fd(fd).map_err(Error::request("adopting a descriptor"))?, path: None })
    }
}

impl<D: VdpaOps<Event = EventFd>> Device<D> {
    /// Uses a device that is no file, for example one [in this process](vdpa_core::inprocess). It cannot be handed to
    /// another image.
    #[must_use]
    pub const fn from_ops(ops: D) -> Self {
        Self { ops, path: None }
    }

    /// Sets the path at which this device can be opened again, which the strategy `reopen` needs.
    #[must_use]
    pub fn at(self, path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()), ..self }
    }

    /// What the device offers, before anything is negotiated. Changes nothing; the owner may be another process.
    ///
    /// # Errors
    /// [`Error::Request`]; [`Error::NoDevice`] for a file that is no vhost-vdpa device.
    pub fn offered(&self) -> Result<Offered, Error> {
        let ops = &self.ops;
        Ok(Offered {
            device_id: device_id(ops)?,
            features: ops.features().map_err(Error::request("VHOST_GET_FEATURES"))?,
            backend_features: ops.backend_features().map_err(Error::request("VHOST_GET_BACKEND_FEATURES"))?,
            iova_range: ops.iova_range().map_err(Error::request("VHOST_VDPA_GET_IOVA_RANGE"))?,
            queues: ops.vqs_count().map_err(Error::request("VHOST_VDPA_GET_VQS_COUNT"))?,
            queue_size_max: ops.vring_num().map_err(Error::request("VHOST_VDPA_GET_VRING_NUM"))?,
        })
    }

    /// The whole configuration space, before anything is negotiated.
    ///
    /// # Errors
    /// [`Error::Request`].
    pub fn config(&self) -> Result<Vec<u8>, Error> {
        read_all_config(&self.ops).map_err(Error::request("VHOST_VDPA_GET_CONFIG"))
    }

    /// As [`negotiate`](Self::negotiate), but only if the device offers all of `required`, before it is reset.
    ///
    /// # Errors
    /// [`Error::FeaturesMissing`] with those it does not offer; as [`negotiate`](Self::negotiate).
    pub fn negotiate_required(self, required: Features, wanted: Features) -> Result<Session<D>, Error> {
        let device_id = device_id(&self.ops)?;
        let offered = self.ops.features().map_err(Error::request("VHOST_GET_FEATURES"))?;
        let missing = Features(required.0 & !offered.0);
        if missing != Features::NONE {
            return Err(Error::FeaturesMissing { missing, offered, device_id });
        }
        self.negotiate(required | wanted)
    }

    /// Makes a session of a device that somebody else has set up: this program by other means (the crate `vhost`), or another one.
    /// Adds what `present` describes; makes only requests that change nothing. The session can be updated and driven from then on
    /// as any other.
    ///
    /// The caller says what cannot be asked: the features that were negotiated, the mappings, the rings and their events.
    ///
    /// # Errors
    /// [`Error::FeaturesRefused`] when the status is not that of a negotiated device; [`Error::FeaturesMissing`];
    /// [`Error::Region`] and [`Error::Queue`] for what contradicts itself; [`Error::Request`].
    pub fn assume(self, present: Present) -> Result<Session<D>, Error> {
        let offered = self.offered()?;
        let Self { ops, path } = self;
        let Present { features, backend_features, regions, guest_queues } = present;
        let missing = Features(features.0 & !offered.features.0);
        if missing != Features::NONE {
            let Offered { features: offered, device_id, .. } = offered;
            return Err(Error::FeaturesMissing { missing, offered, device_id });
        }
        let status = ops.status().map_err(Error::request("VHOST_VDPA_GET_STATUS"))?;
        if !status.contains(Status::FEATURES_OK) {
            return Err(Error::FeaturesRefused { features, status });
        }
        set_backend(&ops, backend_features)?;
        let Offered { device_id, iova_range, backend_features: all, .. } = offered;
        let mut setup = Setup::new(path, device_id, iova_range, all, backend_features, features);
        setup.running = status.contains(Status::DRIVER_OK);
        regions.into_iter().try_for_each(|spec| setup.add_region(spec))?;
        let mut session = Session::new(ops, setup);
        guest_queues.into_iter().try_for_each(|queue| session.add_present_queue(queue))?;
        Ok(session)
    }

    /// Becomes the owner and negotiates (virtio 1.2 section 3.1.1, steps 1 to 6).
    ///
    /// The device is reset. Of `wanted` those features are taken that the device offers, and always VERSION_1
    /// and, where offered, ACCESS_PLATFORM; see [`Session::features`] for the outcome. Event indices and
    /// packed rings are not asked for unless `wanted` has them. Blocks while the device resets.
    ///
    /// # Errors
    /// [`Error::Owned`] when the device has an owner; [`Error::NoDevice`]; [`Error::Request`]; [`Error::Legacy`];
    /// [`Error::FeaturesRefused`].
    pub fn negotiate(self, wanted: Features) -> Result<Session<D>, Error> {
        let Self { ops, path } = self;
        let device_id = device_id(&ops)?;
        ops.set_owner().map_err(|source| match source {
            Errno::BUSY => Error::Owned,
            source => Error::Request { request: "VHOST_SET_OWNER", source },
        })?;
        let offered = ops.backend_features().map_err(Error::request("VHOST_GET_BACKEND_FEATURES"))?;
        let features = ops.features().map_err(Error::request("VHOST_GET_FEATURES"))?;
        if !features.has(Features::VERSION_1) {
            return Err(Error::Legacy { offered: features });
        }
        let chosen = choose(features, wanted);
        let iova_range = ops.iova_range().map_err(Error::request("VHOST_VDPA_GET_IOVA_RANGE"))?;
        let setup = Setup::new(path, device_id, iova_range, offered, offered & BACKEND_FEATURES, chosen);
        set_backend(&ops, setup.backend)?;
        agree(&ops, chosen)?;
        Ok(Session::new(ops, setup))
    }
}

/// What a device offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Offered {
    /// Virtio device id (virtio 1.2 section 5): 1 network, 2 block.
    pub device_id: u32,
    /// Device features.
    pub features: Features,
    /// Backend features.
    pub backend_features: BackendFeatures,
    /// I/O virtual addresses that it can use.
    pub iova_range: IovaRange,
    /// Number of virtqueues.
    pub queues: u32,
    /// Entries of the largest ring.
    pub queue_size_max: u16,
}

/// What somebody else has set up on a device: for [`Device::assume`].
#[derive(Debug, Default)]
pub struct Present {
    features: Features,
    backend_features: BackendFeatures,
    regions: Vec<RegionSpec>,
    guest_queues: Vec<PresentQueue>,
}

/// A ring that is set up on the device.
#[derive(Debug)]
pub(crate) struct PresentQueue {
    pub(crate) index: QueueIndex,
    pub(crate) ring: GuestRing,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) enabled: bool,
}

impl Present {
    /// Nothing but the negotiated device features and the acknowledged backend features.
    #[must_use]
    pub fn new(features: Features, backend_features: BackendFeatures) -> Self {
        Self { features, backend_features, ..Self::default() }
    }

    /// A mapping that the device has.
    #[must_use]
    pub fn region(mut self, spec: RegionSpec) -> Self {
        self.regions.push(spec);
        self
    }

    /// A ring that the device has, with the events that it has for it.
    #[must_use]
    pub fn guest_queue(
        mut self,
        index: QueueIndex,
        ring: GuestRing,
        kick: EventFd,
        call: EventFd,
        enabled: bool,
    ) -> Self {
        self.guest_queues.push(PresentQueue { index, ring, kick, call, enabled });
        self
    }
}

impl<D: DeviceFile> AsFd for Device<D> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ops.fd()
    }
}

/// A descriptor of this process for the file at `path`. Asks no server of a file.
fn open_here(path: &Path) -> Option<i32> {
    let path = std::fs::canonicalize(path).ok()?;
    std::fs::read_dir("/proc/self/fd").ok()?.find_map(|entry| {
        let entry = entry.ok()?;
        let it_is = std::fs::read_link(entry.path()).is_ok_and(|target| target == path);
        entry.file_name().to_str().filter(|_| it_is)?.parse().ok()
    })
}

/// The virtio device id, which only a vhost-vdpa device has.
fn device_id<D: VdpaOps>(ops: &D) -> Result<u32, Error> {
    ops.device_id().map_err(|source| match source {
        Errno::NOTTY | Errno::INVAL => Error::NoDevice { source },
        source => Error::Request { request: "VHOST_VDPA_GET_DEVICE_ID", source },
    })
}

/// The features to negotiate: those both offered and wanted, plus VERSION_1 and ACCESS_PLATFORM where offered.
pub(crate) fn choose(offered: Features, wanted: Features) -> Features {
    offered & (wanted | Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]))
}

/// Acknowledges backend features. Legal in any state. Each new image has to do it, since the version of the IOTLB messages
/// depends on it.
pub(crate) fn set_backend<D: VdpaOps>(ops: &D, features: BackendFeatures) -> Result<(), Error> {
    ops.set_backend_features(features).map_err(Error::request("VHOST_SET_BACKEND_FEATURES"))
}

/// Resets the device and takes it to FEATURES_OK with exactly `features`.
pub(crate) fn agree<D: VdpaOps>(ops: &D, features: Features) -> Result<(), Error> {
    set_status(ops, Status::RESET)?;
    set_status(ops, Status::ACKNOWLEDGE)?;
    set_status(ops, Status::ACKNOWLEDGE | Status::DRIVER)?;
    ops.set_features(features).map_err(Error::request("VHOST_SET_FEATURES"))?;
    set_status(ops, Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK)?;
    let status = ops.status().map_err(Error::request("VHOST_VDPA_GET_STATUS"))?;
    if !status.contains(Status::FEATURES_OK) {
        return Err(Error::FeaturesRefused { features, status });
    }
    Ok(())
}

/// Sets DRIVER_OK on a device at FEATURES_OK, and reads the status back to check that the device accepted it.
pub(crate) fn driver_ok<D: VdpaOps>(ops: &D) -> Result<(), Error> {
    let running = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
    set_status(ops, running)?;
    let status = ops.status().map_err(Error::request("VHOST_VDPA_GET_STATUS"))?;
    if !status.contains(Status::DRIVER_OK) || status.contains(Status::NEEDS_RESET) {
        return Err(Error::Request { request: "VHOST_VDPA_SET_STATUS (driver_ok)", source: Errno::IO });
    }
    Ok(())
}

pub(crate) fn set_status<D: VdpaOps>(ops: &D, status: Status) -> Result<(), Error> {
    ops.set_status(status).map_err(Error::request("VHOST_VDPA_SET_STATUS"))
}
