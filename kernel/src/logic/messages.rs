// SPDX-License-Identifier: GPL-2.0-only

//! IOTLB messages.

use super::{map, remap, Batch};
use crate::layer::node::Locked;
use crate::uapi::iotlb;
use crate::rules;
use kernel::error::code::{EEXIST, EINVAL, EPERM};
use kernel::prelude::*;

/// A message as the client has sent it.
pub(crate) struct Message {
    pub(crate) iova: u64,
    pub(crate) size: u64,
    pub(crate) uaddr: u64,
    pub(crate) perm: u8,
    pub(crate) kind: u8,
}

/// Handles a message. The client gets EFAULT for every error.
pub(crate) fn message(device: &mut Locked<'_>, asid: u32, message: &Message) -> Result {
    if !device.vhost().is_owner() {
        return Err(EPERM);
    }
    // The table stays even if the message fails.
    if matches!(message.kind, iotlb::UPDATE | iotlb::BATCH_BEGIN) {
        map::find_or_add_space(device, asid)?;
    }
    let state = device.state();
    let other_batch = state.batch.as_ref().is_some_and(|batch| batch.asid != asid);
    if other_batch || map::table(state, asid).is_none() {
        return Err(EINVAL);
    }
    match message.kind {
        iotlb::UPDATE => update(device, asid, message),
        iotlb::INVALIDATE => {
            map::unmap(device, asid, message.iova, rules::invalidate_last(message.iova, message.size));
            Ok(())
        }
        iotlb::BATCH_BEGIN => {
            device.state().batch.get_or_insert_with(|| Batch { asid, without_remaps: None });
            Ok(())
        }
        iotlb::BATCH_END => end(device, asid),
        iotlb::REMAP => remap::remap(device, asid, message),
        _ => Err(EINVAL),
    }
}

fn update(device: &mut Locked<'_>, asid: u32, message: &Message) -> Result {
    let state = device.state();
    let last = rules::update_last(message.iova, message.size, state.range).ok_or(EINVAL)?;
    let table = map::table(state, asid).ok_or(EINVAL)?;
    if table.overlapping(message.iova, last).next().is_some() {
        return Err(EEXIST);
    }
    if device.parent().uses_addresses() {
        map::by_address(device, asid, message, last)
    } else {
        map::pinned(device, asid, message, last)
    }
}

/// BATCH_END: the parent gets the table. An error is reported only if there was a REMAP in the batch, which it undoes (R5, R6).
fn end(device: &mut Locked<'_>, asid: u32) -> Result {
    let Some(batch) = device.state().batch.take() else { return Ok(()) };
    if !device.parent().takes_tables() {
        return Ok(());
    }
    let Err(error) = map::publish(device, asid) else { return Ok(()) };
    let Some(before) = batch.without_remaps else { return Ok(()) };
    if let Some(table) = map::table_mut(device.state(), asid) {
        *table = before;
    }
    // The failing call may have emptied the parent's table.
    let _ = map::publish(device, asid);
    Err(error)
}
