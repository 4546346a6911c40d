//! `VHOST_IOTLB_REMAP`: sets the address of an existing mapping in the new owner (uapi-spec 8.5).

use crate::device::dma::{mappings, pages_to_pin, resolve};
use crate::device::{Device, IotlbError, MemoryOf};
use crate::faults::{self, Fault};
use crate::features::BackendFeatures;
use crate::host::{Fragment, MemoryObject};
use crate::iotlb::{Mapping, RecordId, Table};
use crate::parent::Parent;
use crate::rules::{self, Mapped, Unit};
use crate::types::{Asid, IotlbMsg, IovaRange};

impl<P: Parent> Device<P> {
    /// Marks all entries stale after a change of owner: they need a REMAP (uapi-spec 8.5, R7).
    pub(super) fn mark_stale(&mut self) {
        let asids: Vec<Asid> = self.tables.keys().copied().collect();
        for asid in asids {
            self.tables_of(asid).for_each(|table| table.mark_all(true));
            // A parent whose table a reset has dropped does not get it back here.
            if !self.has_identity_map(asid) {
                // A parent that refuses keeps its old table. Its entries have ended with their address space anyway.
                let _ = self.set_map(asid);
            }
        }
    }

    /// Pages that the mappings of the interface pin.
    pub(super) fn pages_of_mappings(&self) -> u64 {
        let profile = self.parent.profile();
        let entries = self.tables.values().flat_map(Table::iter);
        let pages = entries.map(|entry| pages_to_pin(profile, entry.range.size(), &entry.memory));
        pages.fold(0, u64::saturating_add)
    }

    /// Whether the device offers REMAP.
    pub(super) fn offers_remap(&self) -> bool {
        self.own_features.has(BackendFeatures::IOTLB_REMAP)
    }

    /// Checks and carries out one REMAP. Outside a batch it takes effect completely or not at all; inside a
    /// batch, the parent receives it at END.
    pub(super) fn remap(&mut self, asid: Asid, msg: &IotlbMsg) -> Result<(), IotlbError> {
        let perm = if faults::is(Fault::RemapWithPermission) { 0 } else { msg.perm.0 };
        rules::remap_arguments(perm, msg.size)
            .map_err(|_| IotlbError::RemapArguments { perm: msg.perm.0, size: msg.size })?;
        if !self.offers_remap() {
            return if faults::is(Fault::RemapUnsupported) {
                Ok(())
            } else {
                Err(IotlbError::RemapNotOffered)
            };
        }
        let table = self.tables.get(&asid).ok_or(IotlbError::NoTable { asid })?;
        let no_match = IotlbError::RemapNoMatch { iova: msg.iova, size: msg.size };
        let range = IovaRange::from_size(msg.iova, msg.size).ok_or(no_match)?;
        let unit = find_unit(table, range).ok_or(no_match)?;
        let record = match unit {
            Unit::Record(id) | Unit::Entry(id) => id,
        };
        // Entries that another UPDATE has added in a gap of the record are not part of the REMAP.
        let hit = table.overlapping(range).into_iter();
        let old: Vec<_> = hit.filter(|entry| entry.record == record).cloned().collect();
        let perm = old.first().map_or(msg.perm, |entry| entry.perm);
        let msg = IotlbMsg { perm, ..*msg };

        let owner = self.ownership.owner().ok_or(IotlbError::NotOwner)?;
        let profile = self.parent.profile();
        let fragments = resolve(owner, profile, range, &msg)?;
        if profile.verify_remap && !same_memory(range, &old, &fragments) {
            return Err(IotlbError::RemapOtherObject { range, uaddr: msg.uaddr });
        }
        let stale = faults::is(Fault::RemapStaysStale);
        let new: Vec<_> =
            mappings(range, &msg, record, fragments).map(|entry| Mapping { stale, ..entry }).collect();
        let others = |entry: &Mapping<MemoryOf<P>>| {
            table.overlapping(entry.range).iter().any(|hit| hit.record != record)
        };
        if new.is_empty() || new.iter().any(others) {
            return Err(no_match);
        }
        let before: Vec<_> = table.fragments(record).cloned().collect();
        let limit = profile.max_iotlb_entries;
        if table.len() - old.len() + new.len() > limit {
            return Err(IotlbError::Full { entries: table.len(), limit });
        }
        if self.batch.is_some() {
            self.before_change(asid);
            self.before_batched_remap(asid);
        }
        self.replace(asid, unit, range, new);
        if self.batch.is_some() {
            return Ok(());
        }
        self.set_map(asid).map_err(|errno| {
            self.put_back(asid, record, before);
            // The parent may have lost its table in the failing call, so it gets the previous one once more.
            let _ = self.set_map(asid);
            IotlbError::Parent { errno }
        })
    }

    fn replace(
        &mut self,
        asid: Asid,
        unit: Unit<RecordId>,
        range: IovaRange,
        new: Vec<Mapping<MemoryOf<P>>>,
    ) {
        let Some(table) = self.tables.get_mut(&asid) else { return };
        match unit {
            Unit::Record(id) => drop(table.take_fragments(id)),
            Unit::Entry(_) => drop(table.take_entry(range.first())),
        }
        new.into_iter().for_each(|entry| table.insert(entry));
    }

    /// Restores the entries that a record had before a REMAP, and removes those that the REMAP has added.
    fn put_back(&mut self, asid: Asid, record: RecordId, before: Vec<Mapping<MemoryOf<P>>>) {
        let Some(table) = self.tables.get_mut(&asid) else { return };
        drop(table.take_fragments(record));
        before.into_iter().for_each(|entry| table.insert(entry));
    }
}

/// What a REMAP of `range` replaces.
fn find_unit<M>(table: &Table<M>, range: IovaRange) -> Option<Unit<RecordId>> {
    let hits = table.overlapping(range).into_iter().map(|entry| {
        let record = table.record(entry.record).filter(|record| !record.broken);
        let whole = record.map(|record| (record.range.first(), record.range.last()));
        Mapped { first: entry.range.first(), last: entry.range.last(), record: entry.record, whole }
    });
    rules::remap_unit(range.first(), range.last(), hits)
}

/// Whether every byte that is mapped now is the same byte of the same object at the new address.
fn same_memory<M: MemoryObject>(range: IovaRange, old: &[Mapping<M>], new: &[(u64, Fragment<M>)]) -> bool {
    let old = old.iter().map(|entry| (entry.range.first(), entry.range.last(), &entry.memory));
    let new = new.iter().filter_map(|(offset, fragment)| {
        let at = IovaRange::from_size(range.first() + offset, fragment.size)?;
        Some((at.first(), at.last(), &fragment.memory))
    });
    rules::same_memory(old, new, |a, i, b, j| a.same_object(i, b, j))
}
