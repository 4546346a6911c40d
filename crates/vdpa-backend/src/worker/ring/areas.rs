//! Where a ring is, and where it begins.

use std::sync::Arc;

use vdpa_core::features::Features;
use vdpa_core::ring::{Memory, RingError, area_sizes};
use vdpa_core::types::Perm;
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::snapshot::GuestArea;

use super::super::MemoryView;
use super::super::dirty::RingWrites;

/// Resolves the ring's areas through `view`.
pub(super) fn areas(
    setup: &QueueSetup<LinuxHost>,
    view: &MemoryView,
    writes: &RingWrites,
) -> Result<[GuestArea; 3], RingError> {
    let packed = setup.features.has(Features::RING_PACKED);
    let sizes = area_sizes(setup.size, setup.features);
    let memory = view.snapshot();
    // The device of a packed ring writes used descriptors into the descriptor area (virtio 1.2 section 2.8).
    let perm = if packed { Perm::RW } else { Perm::RO };
    let desc = memory.area(setup.desc, sizes.desc as u64, perm)?;
    let avail = memory.area(setup.avail, sizes.avail as u64, Perm::RO)?;
    let used = memory.area(setup.used, sizes.used as u64, Perm::RW)?;
    let tracked =
        |area: GuestArea, iova, logged| area.tracked(Arc::clone(writes.memory()), setup.asid, iova, logged);
    // The address in the log is that of the used elements, which a packed ring has among its descriptors.
    let used_at = if packed { setup.log_used.map(|_| setup.used) } else { setup.log_used };
    let desc = if packed { tracked(desc, setup.desc, setup.log_used) } else { desc };
    Ok([desc, avail, tracked(used, setup.used, used_at)])
}

/// Corrects a packed base that says that a whole lap of the ring is in flight: DPDK sets only the available half at the
/// start (1 << 15). The device knows of no request in flight, so the used half is set equal to the available half.
pub(super) fn without_in_flight(state: QueueState, size: u16) -> QueueState {
    match state {
        QueueState::Packed { last_avail_idx, last_avail_wrap, last_used_idx, last_used_wrap }
            if last_avail_idx == last_used_idx
                && last_avail_wrap != last_used_wrap
                && last_avail_idx < size =>
        {
            QueueState::Packed {
                last_avail_idx,
                last_avail_wrap,
                last_used_idx: last_avail_idx,
                last_used_wrap: last_avail_wrap,
            }
        }
        state => state,
    }
}
