// SPDX-License-Identifier: GPL-2.0-only

//! The owner of a device, and its change (8.4).

use super::{features, map, status, State};
use crate::layer::memory::{memlock_pages, OwnedMm};
use crate::layer::node::Locked;
use crate::layer::parameters::strict_new_owner;
use crate::rules::{self, backend};
use kernel::error::code::{EINVAL, ENOMEM};
use kernel::prelude::*;

/// The second half of SET_OWNER.
pub(super) fn bind_first(device: &mut Locked<'_>) -> Result {
    let owner = device.vhost().owner().ok_or(EINVAL)?;
    device.parent().bind(&owner).inspect_err(|_| device.vhost().forget_owner())
}

/// NEW_OWNER: the caller becomes the owner. Mappings, pins, queues and eventfds stay; the charge moves. Nothing changes on an
/// error.
pub(super) fn transfer(device: &mut Locked<'_>) -> Result {
    let (parent, vhost) = (device.parent(), device.vhost());
    let bits = features::live_bits(parent);
    let owner = vhost.owner();
    let facts = rules::NewOwner {
        offered: bits & backend::NEW_OWNER != 0,
        owned: owner.is_some(),
        by_owner: vhost.is_owner(),
        strict: strict_new_owner(),
        runs: status::is_running(device),
    };
    facts.check().map_err(|refusal| Error::from_errno(-refusal.errno()))?;
    let (old, new) = (owner.ok_or(EINVAL)?, OwnedMm::current().ok_or(EINVAL)?);
    let pinned = device.state().pinned;
    if !parent.uses_addresses() && rules::exceeds(pinned, new.pinned(), memlock_pages()) {
        return Err(ENOMEM);
    }
    // The last step that can fail, so that nobody has to be bound again (N2).
    parent.bind(&new)?;
    new.charge(pinned);
    old.uncharge(pinned);
    vhost.replace_owner(new);
    if bits & backend::IOTLB_REMAP != 0 {
        make_stale(device);
    }
    Ok(())
}

/// All addresses are those of the old owner: the device does not see them until REMAP gives new ones (R7).
fn make_stale(device: &mut Locked<'_>) {
    let State { tables, batch, .. } = device.state();
    let rollback = batch.as_ref().and_then(|batch| batch.without_remaps.as_ref());
    for table in Iterator::chain(tables.iter().map(|space| &space.table), rollback) {
        for origin in table.overlapping(0, u64::MAX).filter_map(|entry| entry.origin) {
            origin.mark_stale();
        }
    }
    for asid in 0..device.parent().address_spaces() {
        if map::table(device.state(), asid).is_some() && map::publish(device, asid).is_err() {
            pr_warn!("the parent keeps addresses of the old owner in address space {}\n", asid);
        }
    }
}
