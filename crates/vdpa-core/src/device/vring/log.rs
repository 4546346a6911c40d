//! What the address of a ring says of vhost's log.

use super::Vring;
use crate::device::Device;
use crate::device::vhost_log::VRING_F_LOG;
use crate::errno::Errno;
use crate::features::Features;
use crate::host::{Caller, Host};
use crate::parent::Parent;
use crate::ring::area_sizes;
use crate::types::{QueueIndex, Result, VringAddr};

/// Where writes to the used ring at `addr` are logged, on a device that `logs`.
pub(super) fn of(addr: &VringAddr, logs: bool) -> Option<u64> {
    (addr.flags & VRING_F_LOG != 0 && logs).then_some(addr.log)
}

impl<H: Host> Vring<H> {
    /// Whether `addr` is where the ring is, and says something else of its log, or nothing.
    fn differs_in_log(&self, addr: &VringAddr) -> bool {
        self.addr.is_some_and(|now| VringAddr { flags: addr.flags, log: addr.log, ..now } == *addr)
    }

    /// Takes what an address says of the log, also for the ring that runs.
    fn set_log(&mut self, addr: &VringAddr) {
        let started = self.started.as_mut().map(|ring| &mut ring.addr);
        for place in self.addr.iter_mut().chain(started) {
            (place.flags, place.log) = (addr.flags, addr.log);
        }
    }
}

impl<P: Parent> Device<P> {
    /// Checks what `addr` says of the log; whether it says nothing else than what is so, and was done for a queue that runs.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EINVAL` for a used ring that the log has no bits for.
    pub(super) fn set_ring_log(
        &mut self,
        caller: &dyn Caller<P::Host>,
        index: QueueIndex,
        addr: &VringAddr,
    ) -> Result<bool> {
        if !self.parent.profile().vhost_log {
            return Ok(false);
        }
        let vring = self.vring(caller, index)?;
        let (num, changes) = (vring.num, vring.differs_in_log(addr));
        let sizes = area_sizes(num, self.base_features);
        // The device writes used descriptors of a packed ring where the driver has put the available ones.
        let packed = self.base_features.has(Features::RING_PACKED);
        let bytes = if packed { sizes.desc } else { sizes.used };
        if !self.can_log_ring(addr, bytes as u64) {
            return Err(Errno::INVAL);
        }
        if self.live() && changes {
            self.change(index, |vring| vring.set_log(addr))?;
            return Ok(true);
        }
        Ok(false)
    }
}
