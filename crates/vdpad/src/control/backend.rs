//! [`Backend`]: what answers the control interface.

use std::fmt::Debug;

use vdpa_control::api::{
    AddRequest, CtlError, DevInfo, MgmtDev, QueueVstats, SetAnswer, SetRequest, UpdateInfo,
};
use vdpa_control::config::DevConfig;

/// Answers the control interface; the bus implements it.
///
/// Called from several threads at once, never from the one that serves the socket, so every method may block.
/// A caller that waits longer than [`Limits::backend`](super::server::Limits::backend) is told so, while the
/// method runs on: whatever it does must be complete or undone when it returns, whether or not anybody listens.
pub trait Backend: Debug + Send + Sync + 'static {
    /// Every management device, in a stable order.
    ///
    /// # Errors
    /// What keeps the backend from answering at all.
    fn mgmtdevs(&self) -> Result<Vec<MgmtDev>, CtlError>;

    /// Every device, in order of creation.
    ///
    /// # Errors
    /// What keeps the backend from answering at all.
    fn devices(&self) -> Result<Vec<DevInfo>, CtlError>;

    /// One device.
    ///
    /// # Errors
    /// `ENODEV` for an unknown name: [`CtlError::no_device`].
    fn device(&self, name: &str) -> Result<DevInfo, CtlError>;

    /// The configuration of one device. Must not write the device's features, unlike a client's `GET_CONFIG`
    /// (uapi-spec 7.3).
    ///
    /// # Errors
    /// `ENODEV`; `EOPNOTSUPP` for a device that is neither network nor block.
    fn config(&self, name: &str) -> Result<DevConfig, CtlError>;

    /// Vendor statistics of one queue.
    ///
    /// # Errors
    /// In this order (uapi-spec 7.3): `ENODEV`; `EOPNOTSUPP` for a device that is not a network device; `ERANGE` for
    /// an index above [`VSTATS_INDEX_MAX`](vdpa_control::api::VSTATS_INDEX_MAX); `EAGAIN` before FEATURES_OK; what the parent says.
    fn vstats(&self, name: &str, queue_index: u32) -> Result<QueueVstats, CtlError>;

    /// Who owns each device, and what is known of its updates, in order of creation.
    ///
    /// # Errors
    /// What keeps the backend from answering at all.
    fn updates(&self) -> Result<Vec<UpdateInfo>, CtlError>;

    /// The same of one device.
    ///
    /// # Errors
    /// `ENODEV`.
    fn update(&self, name: &str) -> Result<UpdateInfo, CtlError>;

    /// Creates a device.
    ///
    /// # Errors
    /// As the kernel's DEV_NEW (uapi-spec 7.3): `ENODEV` for an unknown management device, `EOPNOTSUPP` for an
    /// attribute it does not know, `EINVAL` for a bad value, `EEXIST` for a name in use.
    fn add(&self, request: AddRequest) -> Result<(), CtlError>;

    /// Changes attributes of a device. One of a management device without network devices is left as it is, with a
    /// warning, as in the kernel.
    ///
    /// # Errors
    /// As the kernel's DEV_ATTR_SET (uapi-spec 7.3): `ENODEV`; `EOPNOTSUPP` without an address, for one that no device
    /// can have, and for a device that cannot change its own.
    fn set(&self, name: &str, request: SetRequest) -> Result<SetAnswer, CtlError>;

    /// Removes a device. A device that a client holds open is `EBUSY` unless `force`, which takes it away. When its disk does not
    /// answer within 5 s that is `ETIMEDOUT`: the device is gone, and what is behind it is free when the disk has answered.
    ///
    /// # Errors
    /// `ENODEV`, `EBUSY`.
    fn delete(&self, name: &str, force: bool) -> Result<(), CtlError>;
}
