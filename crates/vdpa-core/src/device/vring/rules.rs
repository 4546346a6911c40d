//! What the interface demands of a ring, and what it has before it was set up.

use crate::errno::Errno;
use crate::features::Features;
use crate::types::{Result, VringAddr};
use crate::vq::QueueState;

/// Checks ring addresses as far as they can be without knowing what is mapped.
///
/// # Errors
/// `EOPNOTSUPP` for flags other than bit 0; `EINVAL` for alignment.
pub(in crate::device) const fn check_addr(addr: &VringAddr) -> Result<()> {
    if addr.flags & !1 != 0 {
        return Err(Errno::OPNOTSUPP);
    }
    let aligned = addr.avail.is_multiple_of(2) && addr.used.is_multiple_of(4) && addr.log.is_multiple_of(4);
    if aligned { Ok(()) } else { Err(Errno::INVAL) }
}

/// The position of a queue that was never set up: all zero, also for a packed ring, as in the kernel.
pub(super) const fn default_base(features: Features) -> QueueState {
    if features.has(Features::RING_PACKED) {
        QueueState::Packed {
            last_avail_idx: 0,
            last_avail_wrap: false,
            last_used_idx: 0,
            last_used_wrap: false,
        }
    } else {
        QueueState::Split { avail_index: 0 }
    }
}
