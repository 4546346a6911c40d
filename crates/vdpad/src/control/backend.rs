//! [`Backend`]: the operations of the control API.

use std::fmt::Debug;
use std::os::fd::OwnedFd;

use vdpa_control::api::{
    AddRequest, CtlError, DaemonInfo, DevInfo, MgmtDev, QueueVstats, Reloaded, Running, SetAnswer,
    SetRequest, UpdateInfo, UpgradeRequest,
};
use vdpa_control::config::DevConfig;
use vdpa_core::Errno;

/// The operations of the control API. The bus implements them.
///
/// Called from several threads at once, but never from the thread that serves the socket, so every method may block.
/// After [`Limits::backend`](super::server::Limits::backend) the caller gets `ETIMEDOUT` while the method runs on, so a method
/// must complete or undo what it does even if nobody gets its result.
pub trait Backend: Debug + Send + Sync + 'static {
    /// The daemon itself.
    ///
    /// # Errors
    /// When its holder does not answer.
    fn daemon(&self) -> Result<DaemonInfo, CtlError>;

    /// Replaces this daemon by another program, soon after this returns.
    ///
    /// # Errors
    /// `EOPNOTSUPP` without a holder; `EBUSY` during another upgrade, or when devices would be lost; those of starting the program;
    /// `ECANCELED` when it has refused.
    fn upgrade(&self, request: UpgradeRequest) -> Result<(), CtlError>;

    /// Every management device, in a stable order.
    ///
    /// # Errors
    /// None at present: no device is asked.
    fn mgmtdevs(&self) -> Result<Vec<MgmtDev>, CtlError>;

    /// Every device, in order of creation.
    ///
    /// # Errors
    /// `EBUSY` when a device does not answer in time.
    fn devices(&self) -> Result<Vec<DevInfo>, CtlError>;

    /// One device.
    ///
    /// # Errors
    /// `ENODEV` for an unknown name: [`CtlError::no_device`].
    fn device(&self, name: &str) -> Result<DevInfo, CtlError>;

    /// The configuration of one device. Must not change the device's features, as a client's `GET_CONFIG` does (uapi-spec 7.3).
    ///
    /// # Errors
    /// `ENODEV`; `EOPNOTSUPP` for a device that is neither network nor block.
    fn config(&self, name: &str) -> Result<DevConfig, CtlError>;

    /// Vendor statistics of one queue.
    ///
    /// # Errors
    /// Checked in this order (uapi-spec 7.3): `ENODEV`; `EOPNOTSUPP` for a device that is not a network device; `ERANGE` for an
    /// index above [`VSTATS_INDEX_MAX`](vdpa_control::api::VSTATS_INDEX_MAX); `EAGAIN` before FEATURES_OK; the errno of the parent.
    fn vstats(&self, name: &str, queue_index: u32) -> Result<QueueVstats, CtlError>;

    /// The owner of each device and the updates of its clients, in order of creation.
    ///
    /// # Errors
    /// `EBUSY` when a device does not answer in time.
    fn updates(&self) -> Result<Vec<UpdateInfo>, CtlError>;

    /// The owner of one device and the updates of its clients.
    ///
    /// # Errors
    /// `ENODEV`.
    fn update(&self, name: &str) -> Result<UpdateInfo, CtlError>;

    /// The devices that run, as they would be asked for, and the place of the configuration.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where there is no configuration.
    fn running(&self) -> Result<Running, CtlError> {
        Err(CtlError::new(Errno::OPNOTSUPP, "there is no configuration"))
    }

    /// Reads the configuration files, and adds the devices that are missing.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where there is no configuration; `EINVAL` for files that are not right; as [`add`](Self::add).
    fn reload(&self) -> Result<Reloaded, CtlError> {
        Err(CtlError::new(Errno::OPNOTSUPP, "there is no configuration"))
    }

    /// Creates a device. `passed` are the descriptors that came with the request: the attribute `passed` has them used.
    ///
    /// # Errors
    /// As the kernel's DEV_NEW (uapi-spec 7.3): `ENODEV` for an unknown management device, `EOPNOTSUPP` for an
    /// attribute it does not know, `EINVAL` for an invalid value, `EEXIST` for a name in use.
    fn add(&self, request: AddRequest, passed: Vec<OwnedFd>) -> Result<(), CtlError>;

    /// Changes attributes of a device: the size of a disk; or those of a network device. If for the latter its management device has no network devices, nothing changes and the answer has a
    /// warning, as in the kernel.
    ///
    /// # Errors
    /// As the kernel's DEV_ATTR_SET (uapi-spec 7.3): `ENODEV`; `EOPNOTSUPP` without an address, for an invalid address, and for a
    /// device whose address cannot be changed. For a size: `EOPNOTSUPP` for what is no disk on a file; `EINVAL` for a size that it cannot
    /// have, and for a smaller one without `force`; `EBUSY`; those of ftruncate(2).
    fn set(&self, name: &str, request: SetRequest) -> Result<SetAnswer, CtlError>;

    /// The state of a device that moves to another host: its client has suspended it, or has not started it. Changes nothing.
    ///
    /// # Errors
    /// `ENODEV`; `EBUSY` while a queue runs, or a request of the client is in progress; `EIO` for a device whose back end was taken
    /// away; `EOPNOTSUPP` for a device that cannot move.
    fn save_state(&self, name: &str) -> Result<Vec<u8>, CtlError>;

    /// Makes a device that a client has open and has reset what another one was when its state was saved. The client goes on with
    /// events and DRIVER_OK.
    ///
    /// # Errors
    /// `ENODEV`; `EBUSY` unless it is open and reset; `EINVAL` for a state that is none or that the device cannot take, which is
    /// reset then; `E2BIG`; `EOPNOTSUPP`.
    fn load_state(&self, name: &str, state: &[u8]) -> Result<(), CtlError>;

    /// Deletes a device. With `force`, a device that a client holds open is revoked from it.
    ///
    /// # Errors
    /// `ENODEV`; `EBUSY` for a device that is open, without `force`; `ETIMEDOUT` when its disk does not answer within 5 s: the
    /// device is deleted then, and its backing file is released when the disk has answered.
    fn delete(&self, name: &str, force: bool) -> Result<(), CtlError>;
}
