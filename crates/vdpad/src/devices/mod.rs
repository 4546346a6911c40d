//! The devices this daemon can make, and the management devices that make them.

pub(crate) mod blk;
mod net_attrs;
mod options;
mod sim;
pub(crate) mod sim_blk;
pub(crate) mod sim_net;

use std::fmt::Debug;

use vdpa_backend::front::vhost::AnyParent;
use vdpa_backend::worker::WorkerPool;
use vdpa_control::api::{Attrs, CtlError, MgmtDev};

pub(crate) use net_attrs::{NetAttr, NetAttrs};

/// Makes devices of one kind: the place of the kernel's `vdpa_mgmt_dev`.
pub(crate) trait MgmtDevice: Debug + Send + Sync {
    /// What `mgmtdev show` tells.
    fn describe(&self) -> MgmtDev;

    /// Which of the attributes that the kernel's netlink family knows can be given to its devices.
    fn net_attrs(&self) -> &'static [NetAttr] {
        &[]
    }

    /// Makes a device called `name`, whose rings are served by a thread of `pool`. May block on files and threads; nothing is left behind on an error.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for an unknown attribute, `EINVAL` for a bad value, else what the device needs and could not
    /// get.
    fn create(&self, name: &str, attrs: &Attrs, pool: &WorkerPool) -> Result<AnyParent, CtlError>;
}

/// All management devices, in the order in which they are shown.
#[must_use]
pub(crate) fn mgmt_devices() -> Vec<Box<dyn MgmtDevice>> {
    vec![Box::new(blk::BlkMgmt), Box::new(sim_blk::SimBlkMgmt), Box::new(sim_net::SimNetMgmt)]
}
