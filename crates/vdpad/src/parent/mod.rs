//! The devices this daemon can make, and the management devices that make them.

pub(crate) mod blk;
mod options;
mod sim;
pub(crate) mod sim_blk;

use std::fmt::Debug;

use crate::ctl::api::{Attrs, CtlError, MgmtDev};
use crate::front::vhost::AnyParent;

/// Makes devices of one kind: the place of the kernel's `vdpa_mgmt_dev`.
pub trait MgmtDevice: Debug + Send + Sync {
    /// What `mgmtdev show` tells.
    fn describe(&self) -> MgmtDev;

    /// Makes a device called `name`. May block on files and threads; nothing is left behind on an error.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for an unknown attribute, `EINVAL` for a bad value, else what the device needs and could not
    /// get.
    fn create(&self, name: &str, attrs: &Attrs) -> Result<AnyParent, CtlError>;
}

/// All management devices, in the order in which they are shown.
#[must_use]
pub fn mgmt_devices() -> Vec<Box<dyn MgmtDevice>> {
    vec![Box::new(blk::BlkMgmt), Box::new(sim_blk::SimBlkMgmt)]
}
