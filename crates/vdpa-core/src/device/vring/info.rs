//! What the management side sees of queues.

use crate::device::Device;
use crate::parent::Parent;

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
    /// Information about all queues, by index.
    pub fn vring_infos(&self) -> impl Iterator<Item = VringInfo> {
        let info = |v: &super::Vring<_>| VringInfo { size: v.num, enabled: v.ready, running: v.running };
        self.vrings.iter().map(info)
    }
}
