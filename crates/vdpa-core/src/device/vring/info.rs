//! What clients and the management side can ask of queues.

use crate::device::Device;
use crate::errno::Errno;
use crate::features::Status;
use crate::host::Caller;
use crate::parent::Parent;
use crate::types::{GroupIndex, QueueIndex, Result};

/// Information about a queue for the management side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringInfo {
    /// Ring size in entries; 0 before the driver has set it.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub enabled: bool,
    /// Whether the device processes it.
    pub running: bool,
}

impl<P: Parent> Device<P> {
    /// `VHOST_VDPA_GET_VRING_GROUP`.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EIO` when the parent names a group it does not have.
    pub fn vring_group(&mut self, caller: &dyn Caller<P::Host>, index: QueueIndex) -> Result<GroupIndex> {
        self.vring(caller, index)?;
        let profile = self.profile();
        let group = profile.group_of(index);
        if group.0 < profile.groups { Ok(group) } else { Err(Errno::IO) }
    }

    /// `VHOST_VDPA_GET_VRING_DESC_GROUP`: the group of the queue's descriptor area.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EOPNOTSUPP` without descriptor groups; `EIO` when the parent names a group it does not have.
    pub fn vring_desc_group(
        &mut self,
        caller: &dyn Caller<P::Host>,
        index: QueueIndex,
    ) -> Result<GroupIndex> {
        self.vring(caller, index)?;
        let profile = self.profile();
        let group = profile.descriptor_groups.get(usize::from(index.0)).ok_or(Errno::OPNOTSUPP)?;
        if group.0 < profile.groups { Ok(*group) } else { Err(Errno::IO) }
    }

    /// `VHOST_VDPA_GET_VRING_SIZE`: the size set once DRIVER_OK, the maximum before.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EOPNOTSUPP`.
    pub fn vring_size(&mut self, caller: &dyn Caller<P::Host>, index: QueueIndex) -> Result<u32> {
        let num = self.vring(caller, index)?.num;
        if !self.profile().vring_size {
            return Err(Errno::OPNOTSUPP);
        }
        if let Some(upstream) = self.parent.upstream() {
            return upstream.vring_size(index);
        }
        let driver_ok = self.status.contains(Status::DRIVER_OK);
        Ok(u32::from(if driver_ok { num } else { self.profile().queue_size_max }))
    }

    /// Information about all queues, by index.
    pub fn vring_infos(&self) -> impl Iterator<Item = VringInfo> {
        let info = |v: &super::Vring<_>| VringInfo { size: v.num, enabled: v.ready, running: v.running };
        self.vrings.iter().map(info)
    }
}
