// SPDX-License-Identifier: GPL-2.0-only

//! Adding and removing mappings, in the table and in the parent.

use super::{Message, Space, State};
use crate::layer::iotlb::{Entry, Iotlb, Mapping, Memory};
use crate::layer::memory::{memlock_pages, Areas, Origin, PageList, PinnedRun, Record};
use crate::layer::node::Locked;
use crate::layer::parameters::max_iotlb_entries;
use crate::uapi::ACCESS_WO;
use crate::rules::{self, PAGE};
use kernel::error::code::{EFAULT, EINVAL, ENOMEM, ENOSPC, EPERM};
use kernel::prelude::*;
use kernel::sync::Arc;

pub(super) fn table(state: &State, asid: u32) -> Option<&Iotlb> {
    state.tables.iter().find(|space| space.asid == asid).map(|space| &space.table)
}

pub(super) fn table_mut(state: &mut State, asid: u32) -> Option<&mut Iotlb> {
    state.tables.iter_mut().find(|space| space.asid == asid).map(|space| &mut space.table)
}

/// The table that a failing END of the open batch brings back.
fn rollback(state: &mut State) -> Option<&mut Iotlb> {
    state.batch.as_mut().and_then(|batch| batch.without_remaps.as_mut())
}

/// Makes the table of an address space on its first use.
pub(super) fn find_or_add_space(device: &mut Locked<'_>, asid: u32) -> Result {
    let limit = max_iotlb_entries();
    if table(device.state(), asid).is_some() {
        return Ok(());
    }
    if asid >= device.parent().address_spaces() || limit == 0 {
        return Err(EINVAL);
    }
    let table = Iotlb::new(limit)?;
    Ok(device.state().tables.push(Space { asid, table }, GFP_KERNEL)?)
}

/// Removes an address space at close, and gives the parent its default translation back.
pub(super) fn remove_space(device: &mut Locked<'_>, asid: u32) {
    if table(device.state(), asid).is_none() {
        return;
    }
    remove_range(device, asid, 0, u64::MAX);
    device.parent().reset_map(asid);
    device.state().tables.retain(|space| space.asid != asid);
}

/// Gives the parent the table, without what is stale: a stale address means something else in the new owner (R7).
pub(super) fn publish(device: &mut Locked<'_>, asid: u32) -> Result {
    let parent = device.parent();
    let table = table(device.state(), asid).ok_or(EINVAL)?;
    let is_fresh = |entry: &Entry<'_>| entry.origin.as_ref().map_or(true, |origin| !origin.is_stale());
    if table.overlapping(0, u64::MAX).all(|entry| is_fresh(&entry)) {
        return parent.set_map(asid, table);
    }
    parent.set_map(asid, &table.copy_if(is_fresh)?)
}

fn publish_unless_batch(device: &mut Locked<'_>, asid: u32) -> Result {
    if device.parent().takes_tables() && device.state().batch.is_none() {
        publish(device, asid)?;
    }
    Ok(())
}

/// Removes every mapping that overlaps the range, and tells the parent.
pub(super) fn unmap(device: &mut Locked<'_>, asid: u32, first: u64, last: u64) {
    remove_range(device, asid, first, last);
    // As in Linux, an error has nobody to go to.
    let _ = publish_unless_batch(device, asid);
}

fn remove_range(device: &mut Locked<'_>, asid: u32, first: u64, last: u64) {
    if let Some(other) = rollback(device.state()) {
        while other.remove_first(first, last).is_some() {}
    }
    while let Some(mapping) = table_mut(device.state(), asid).and_then(|table| table.remove_first(first, last)) {
        if let Some(other) = rollback(device.state()) {
            while other.remove_first(mapping.first, mapping.last).is_some() {}
        }
        forget(device, asid, mapping);
    }
}

/// The device loses a mapping that has left the table; then its memory is released.
fn forget(device: &mut Locked<'_>, asid: u32, mapping: Mapping) {
    let parent = device.parent();
    if parent.takes_mappings() {
        parent.unmap(asid, mapping.first, mapping.size());
    } else if let Some(domain) = &device.state().domain {
        domain.unmap(mapping.first, mapping.size());
    }
    match &mapping.memory {
        Memory::Pinned(run) => {
            let pages = run.pages();
            device.state().pinned = device.state().pinned.saturating_sub(pages);
            if let Some(owner) = device.vhost().owner() {
                owner.uncharge(pages);
            }
        }
        Memory::Shared(_, origin) => origin.record.break_up(),
    }
}

/// Adds a mapping to the table and gives it to the parent. On an error it is in neither.
fn add(device: &mut Locked<'_>, asid: u32, mapping: Mapping) -> Result {
    let parent = device.parent();
    let (first, last, size, perm) = (mapping.first, mapping.last, mapping.size(), mapping.perm);
    let pages = match &mapping.memory {
        Memory::Pinned(run) => run.pages(),
        Memory::Shared(..) => 0,
    };
    if let (Some(domain), Memory::Pinned(run)) = (&device.state().domain, &mapping.memory) {
        domain.map(first, run, perm)?;
    }
    let inserted = table_mut(device.state(), asid).ok_or(EINVAL).and_then(|table| table.insert(mapping));
    if let Err(error) = inserted {
        if let Some(domain) = &device.state().domain {
            domain.unmap(first, size);
        }
        return Err(error);
    }
    let told = if parent.takes_mappings() {
        let entry = table(device.state(), asid).and_then(|table| table.overlapping(first, last).next()).ok_or(EINVAL)?;
        parent.map(asid, first, size, entry.addr, perm, entry.origin.as_deref())
    } else {
        publish_unless_batch(device, asid)
    };
    if let Err(error) = told {
        // Never charged, and not in the parent.
        drop(table_mut(device.state(), asid).and_then(|table| table.remove_first(first, last)));
        return Err(error);
    }
    if pages > 0 {
        device.state().pinned = device.state().pinned.saturating_add(pages);
        if let Some(owner) = device.vhost().owner() {
            owner.charge(pages);
        }
    }
    also_in_rollback(device.state(), asid, first, last);
    Ok(())
}

/// What an UPDATE adds in a batch stays after a failing END, if the other table has room.
fn also_in_rollback(state: &mut State, asid: u32, first: u64, last: u64) {
    let copy = table(state, asid).and_then(|table| table.overlapping(first, last).next()).and_then(|entry| entry.to_mapping());
    if let (Some(copy), Some(other)) = (copy, rollback(state)) {
        let _ = other.insert(copy);
    }
}

/// The mappings of an UPDATE by address: one for each area of the caller with a file that is shared; others are left out, as in
/// Linux.
pub(super) fn find_shared(message: &Message, perm: u32, record: &Arc<Record>, limit: u32) -> Result<KVec<Mapping>> {
    let areas = Areas::lock().ok_or(EPERM)?;
    let mut found = KVec::new();
    let (mut iova, mut address, mut left) = (message.iova, message.uaddr, message.size);
    while left > 0 {
        let at = areas.at_or_above(address).ok_or(EINVAL)?;
        let piece = rules::piece(address, left, at.area);
        if piece.size == 0 {
            return Err(EINVAL);
        }
        if let Some(file) = at.file {
            if found.len() >= limit as usize {
                return Err(ENOSPC);
            }
            let memory = Memory::Shared(address, Origin::new(file, piece.offset, record.clone())?);
            let last = iova.wrapping_add(piece.size).wrapping_sub(1);
            found.push(Mapping { first: iova, last, perm, memory }, GFP_KERNEL)?;
        }
        iova = iova.wrapping_add(piece.size);
        address = address.wrapping_add(piece.size);
        left = left.saturating_sub(piece.size);
    }
    Ok(found)
}

/// UPDATE where the parent uses addresses of the owner.
pub(super) fn by_address(device: &mut Locked<'_>, asid: u32, message: &Message, last: u64) -> Result {
    let record = Record::new(message.iova, last)?;
    let limit = table(device.state(), asid).map_or(0, Iotlb::limit);
    let found = find_shared(message, u32::from(message.perm), &record, limit)?;
    for mapping in found {
        if let Err(error) = add(device, asid, mapping) {
            unmap(device, asid, message.iova, last);
            return Err(error);
        }
    }
    Ok(())
}

/// UPDATE where the device uses physical addresses: pins the pages and charges them to the owner.
pub(super) fn pinned(device: &mut Locked<'_>, asid: u32, message: &Message, last: u64) -> Result {
    let pages = rules::pages_to_pin(message.iova, message.size).ok_or(EINVAL)?;
    let owner = device.vhost().owner().ok_or(EPERM)?;
    if rules::exceeds(pages, owner.pinned(), memlock_pages()) {
        return Err(ENOMEM);
    }
    let result = pin_and_add(device, asid, message, pages);
    if result.is_err() {
        unmap(device, asid, message.iova, last);
    }
    result
}

/// Runs are dropped, and so unpinned, where they do not become mappings.
fn pin_and_add(device: &mut Locked<'_>, asid: u32, message: &Message, pages: u64) -> Result {
    let perm = u32::from(message.perm);
    let write = perm & ACCESS_WO != 0;
    let mut list = PageList::new()?;
    let mut iova = message.iova & !(PAGE - 1);
    let mut address = message.uaddr & !(PAGE - 1);
    let mut left = pages;
    let mut open: Option<PinnedRun> = None;
    let mut close = |device: &mut Locked<'_>, run: PinnedRun| {
        let (first, bytes) = (iova, run.bytes());
        iova = iova.wrapping_add(bytes);
        let last = iova.wrapping_sub(1);
        add(device, asid, Mapping { first, last, perm, memory: Memory::Pinned(run) })
    };
    while left > 0 {
        let count = left.min(PageList::LEN as u64) as usize;
        Areas::lock().ok_or(EPERM)?.pin(address, write, &mut list, count)?;
        for index in 0..count {
            let page = list.take(index, write).ok_or(EFAULT)?;
            let Some(run) = &mut open else {
                open = Some(page);
                continue;
            };
            if let Some(next) = run.join(page) {
                if let Some(full) = open.replace(next) {
                    close(device, full)?;
                }
            }
        }
        address = address.wrapping_add((count as u64).wrapping_mul(PAGE));
        left = left.saturating_sub(count as u64);
    }
    open.map_or(Ok(()), |run| close(device, run))
}
