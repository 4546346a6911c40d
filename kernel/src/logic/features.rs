// SPDX-License-Identifier: GPL-2.0-only

//! Features of the device and of the interface.

use super::{parents, user};
use crate::layer::node::Locked;
use crate::layer::parent::Parent;
use crate::uapi::{backend, status};
use crate::layer::vhost::Vhost;
use crate::rules::{self, backend as live};
use kernel::error::code::{EBUSY, EINVAL, EOPNOTSUPP};
use kernel::prelude::*;

/// How the parent takes mappings.
pub(super) fn path(parent: Parent<'_>) -> rules::Path {
    match (parent.takes_mappings(), parent.takes_tables()) {
        (true, _) => rules::Path::Incremental,
        (false, true) => rules::Path::Snapshot,
        (false, false) => rules::Path::Platform,
    }
}

/// The live-update bits that are offered.
pub(super) fn live_bits(parent: Parent<'_>) -> u64 {
    rules::live_bits(parent.backend_word(), parents::listed(parent), parent.uses_addresses(), path(parent))
}

fn has_persistent_map(parent: Parent<'_>) -> bool {
    let platform = !parent.takes_tables() && !parent.takes_mappings();
    platform || parent.can_reset_map() || parent.backend_word() & live::IOTLB_PERSIST != 0
}

/// Bits with a condition, and whether the parent meets it.
fn conditions(parent: Parent<'_>) -> [(u64, bool); 4] {
    [
        (backend::SUSPEND, parent.can_suspend()),
        (backend::RESUME, parent.can_resume()),
        (backend::DESC_ASID, parent.has_descriptor_groups()),
        (live::IOTLB_PERSIST, has_persistent_map(parent)),
    ]
}

/// GET_BACKEND_FEATURES.
pub(super) fn offered(parent: Parent<'_>) -> u64 {
    let conditional = conditions(parent).iter().filter(|(_, met)| *met).fold(0, |word, (bit, _)| word | bit);
    let own = parent.backend_word() & !(live::NEW_OWNER | live::IOTLB_REMAP);
    backend::BASE | conditional | own | live_bits(parent)
}

/// SET_BACKEND_FEATURES. As in Linux, anybody may do so at any time.
pub(super) fn acknowledge(parent: Parent<'_>, vhost: Vhost<'_>, word: u64) -> Result {
    let known = backend::BASE
        | backend::SUSPEND
        | backend::RESUME
        | backend::ENABLE_AFTER_DRIVER_OK
        | backend::DESC_ASID
        | live::IOTLB_PERSIST
        | live_bits(parent);
    if word & !known != 0 {
        return Err(EOPNOTSUPP);
    }
    for (bit, met) in conditions(parent) {
        if word & bit == 0 {
            continue;
        }
        if bit == backend::DESC_ASID && word & backend::ASID == 0 {
            return Err(EINVAL);
        }
        if !met {
            return Err(EOPNOTSUPP);
        }
    }
    vhost.acknowledge(word);
    Ok(())
}

/// SET_FEATURES.
pub(super) fn set(device: &Locked<'_>, argument: usize) -> Result {
    let (parent, vhost) = (device.parent(), device.vhost());
    if parent.status() & status::FEATURES_OK != 0 {
        return Err(EBUSY);
    }
    parent.set_driver_features(user::read(argument)?).map_err(|_| EINVAL)?;
    // The parent may have masked some.
    let in_force = parent.driver_features();
    super::queues::all(parent).for_each(|queue| vhost.queue(queue).set_features(in_force));
    Ok(())
}
