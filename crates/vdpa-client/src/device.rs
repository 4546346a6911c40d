//! Opening a device and negotiating with it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::uapi::report::UpdateReport;
use vdpa_sys::vhost_vdpa::{OpenError, VhostVdpaFd};

use crate::dma::Regions;
use crate::error::Error;
use crate::session::{Session, Setup};

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
        Self::open(path).map_err(|e| match e {
            OpenError::NotFound { .. } => Errno::NOENT,
            OpenError::Busy { .. } => Errno::BUSY,
            OpenError::Denied { .. } => Errno::ACCESS,
            OpenError::Gone { errno, .. } | OpenError::Other { errno, .. } => errno,
        })
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
        let ops = D::open(&path).map_err(|source| Error::Open { path: path.clone(), source })?;
        Ok(Self { ops, path: Some(path) })
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

    /// Becomes the owner and negotiates (virtio 1.2 section 3.1.1, steps 1 to 6).
    ///
    /// The device is reset. Of `wanted` those features are taken that the device offers, and always VERSION_1
    /// and, where offered, ACCESS_PLATFORM; see [`Session::features`] for the outcome. Event indices and
    /// packed rings are not asked for unless `wanted` has them. Blocks while the device resets.
    ///
    /// # Errors
    /// [`Error::Request`] with `EBUSY` from `VHOST_SET_OWNER` when the device has an owner;
    /// [`Error::Legacy`]; [`Error::FeaturesRefused`].
    pub fn negotiate(self, wanted: Features) -> Result<Session<D>, Error> {
        let Self { ops, path } = self;
        ops.set_owner().map_err(Error::request("VHOST_SET_OWNER"))?;
        let offered = ops.backend_features().map_err(Error::request("VHOST_GET_BACKEND_FEATURES"))?;
        let features = ops.features().map_err(Error::request("VHOST_GET_FEATURES"))?;
        if !features.has(Features::VERSION_1) {
            return Err(Error::Legacy { offered: features });
        }
        let chosen = choose(features, wanted);
        let setup = Setup {
            path,
            device_id: ops.device_id().map_err(Error::request("VHOST_VDPA_GET_DEVICE_ID"))?,
            iova_range: ops.iova_range().map_err(Error::request("VHOST_VDPA_GET_IOVA_RANGE"))?,
            offered,
            backend: offered & BACKEND_FEATURES,
            features: chosen,
            regions: Regions::default(),
            queues: Vec::new(),
            guest_queues: Vec::new(),
            writeback: None,
            running: false,
            generation: 0,
        };
        set_backend(&ops, setup.backend)?;
        agree(&ops, chosen)?;
        Ok(Session::new(ops, setup))
    }
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
