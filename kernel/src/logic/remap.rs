// SPDX-License-Identifier: GPL-2.0-only

//! VHOST_IOTLB_REMAP: the address of an existing mapping in the new owner (8.5).

use super::{features, map, Message};
use crate::layer::iotlb::{Entry, Iotlb, Mapping, Memory};
use crate::layer::memory::{Origin, Record};
use crate::layer::node::Locked;
use crate::layer::parameters::verify_remap;
use crate::rules::{self, backend, Mapped, Unit};
use kernel::error::code::{EINVAL, ENOENT, ENOSPC, EOPNOTSUPP};
use kernel::prelude::*;
use kernel::sync::{Arc, ArcBorrow};

/// Which mappings a REMAP replaces.
struct Target {
    record: Arc<Record>,
    /// The whole UPDATE; otherwise the one mapping with exactly the range.
    whole: bool,
    perm: u32,
    /// How many there are.
    count: usize,
}

impl Target {
    fn covers(&self, entry: &Entry<'_>, first: u64, last: u64) -> bool {
        let of_record = entry.origin.as_ref().is_some_and(|origin| core::ptr::eq(&*origin.record, &*self.record));
        of_record && (self.whole || (entry.first, entry.last) == (first, last))
    }
}

/// Handles a REMAP. Outside a batch it takes effect completely or not at all; inside one, the parent gets it at END.
pub(super) fn remap(device: &mut Locked<'_>, asid: u32, message: &Message) -> Result {
    rules::remap_arguments(message.perm, message.size).map_err(|refusal| Error::from_errno(-refusal.errno()))?;
    if features::live_bits(device.parent()) & backend::IOTLB_REMAP == 0 {
        return Err(EOPNOTSUPP);
    }
    let first = message.iova;
    let last = rules::last_byte(first, message.size).ok_or(ENOENT)?;
    let table = map::table(device.state(), asid).ok_or(EINVAL)?;
    let target = find(table, first, last).ok_or(ENOENT)?;
    let new = map::find_shared(message, target.perm, &target.record, table.limit())?;
    check(table, &target, &new, first, last)?;

    let in_batch = device.state().batch.is_some();
    if in_batch {
        keep_for_rollback(device, asid)?;
    }
    let table = map::table_mut(device.state(), asid).ok_or(EINVAL)?;
    let undo = replace(table, &target, new, first, last)?;
    if in_batch {
        return Ok(());
    }
    map::publish(device, asid).inspect_err(|_| {
        if let Some(table) = map::table_mut(device.state(), asid) {
            undo.apply(table);
        }
        // The failing call may have emptied the parent's table.
        let _ = map::publish(device, asid);
    })
}

fn find(table: &Iotlb, first: u64, last: u64) -> Option<Target> {
    let mapped = |entry: Entry<'_>| {
        let origin = entry.origin?;
        let record: Arc<Record> = origin.record.clone();
        Some((entry.first, entry.last, record))
    };
    // The rule wants something that can be copied: the position among the hits.
    let mut hits = KVec::new();
    for hit in table.overlapping(first, last).filter_map(mapped) {
        hits.push(hit, GFP_KERNEL).ok()?;
    }
    let facts = hits.iter().enumerate().map(|(index, (first, last, record))| Mapped {
        first: *first,
        last: *last,
        record: index,
        whole: record.whole(),
    });
    let (index, whole) = match rules::remap_unit(first, last, facts)? {
        Unit::Record(index) => (index, true),
        Unit::Entry(index) => (index, false),
    };
    let record = hits.get(index)?.2.clone();
    let mut target = Target { record, whole, perm: 0, count: 0 };
    for entry in table.overlapping(first, last) {
        if target.covers(&entry, first, last) {
            target.perm = entry.perm;
            target.count = target.count.wrapping_add(1);
        }
    }
    Some(target)
}

/// Whether the new mappings can take the place of the old ones.
fn check(table: &Iotlb, target: &Target, new: &[Mapping], first: u64, last: u64) -> Result {
    // All of it would be left out, or lie where another UPDATE has filled a gap.
    let taken = |mapping: &Mapping| {
        table.overlapping(mapping.first, mapping.last).any(|entry| !target.covers(&entry, first, last))
    };
    if new.is_empty() || new.iter().any(taken) {
        return Err(EINVAL);
    }
    let entries = (table.len() as usize).saturating_sub(target.count).saturating_add(new.len());
    if entries > table.limit() as usize {
        return Err(ENOSPC);
    }
    if verify_remap() {
        let old = table.overlapping(first, last).filter(|entry| target.covers(entry, first, last));
        let old = old.filter_map(|entry| Some((entry.first, entry.last, entry.origin?)));
        let new = new.iter().filter_map(|mapping| match &mapping.memory {
            Memory::Shared(_, origin) => Some((mapping.first, mapping.last, origin.as_arc_borrow())),
            Memory::Pinned(_) => None,
        });
        let same = |a: &ArcBorrow<'_, Origin>, i, b: &ArcBorrow<'_, Origin>, j| a.same_byte(i, b, j);
        if !rules::same_memory(old, new, same) {
            return Err(EINVAL);
        }
    }
    Ok(())
}

fn keep_for_rollback(device: &mut Locked<'_>, asid: u32) -> Result {
    let state = device.state();
    if state.batch.as_ref().is_some_and(|batch| batch.without_remaps.is_some()) {
        return Ok(());
    }
    let copy = map::table(state, asid).ok_or(EINVAL)?.copy_if(|_| true)?;
    if let Some(batch) = &mut state.batch {
        batch.without_remaps = Some(copy);
    }
    Ok(())
}

/// How to undo a replacement.
enum Undo {
    /// The areas of the new owner were split as those of the old: these go back in their places.
    Swap(KVec<Mapping>),
    /// The table before.
    Table(Iotlb),
}

impl Undo {
    fn apply(self, table: &mut Iotlb) {
        match self {
            Self::Swap(old) => old.into_iter().for_each(|mapping| drop(table.swap(mapping))),
            Self::Table(before) => *table = before,
        }
    }
}

/// Puts the new mappings in the place of the old ones. Changes nothing on an error.
fn replace(table: &mut Iotlb, target: &Target, new: KVec<Mapping>, first: u64, last: u64) -> Result<Undo> {
    let fits = |mapping: &Mapping| {
        table.overlapping(mapping.first, mapping.last).next().is_some_and(|entry| {
            (entry.first, entry.last) == (mapping.first, mapping.last) && target.covers(&entry, first, last)
        })
    };
    if new.len() == target.count && new.iter().all(fits) {
        let mut old = KVec::with_capacity(new.len(), GFP_KERNEL)?;
        for mapping in new {
            // Cannot fail: it fits, and there is room.
            if let Some(previous) = table.swap(mapping) {
                old.push(previous, GFP_KERNEL)?;
            }
        }
        return Ok(Undo::Swap(old));
    }
    let mut next = table.copy_if(|entry| !target.covers(entry, first, last))?;
    for mapping in new {
        next.insert(mapping)?;
    }
    Ok(Undo::Table(core::mem::replace(table, next)))
}
