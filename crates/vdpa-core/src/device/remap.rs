//! `VHOST_IOTLB_REMAP`: sets the address of an existing mapping in the new owner (uapi-spec 8.5).

use crate::device::dma::{mappings, resolve};
use crate::device::{Device, IotlbError, MemoryOf};
use crate::faults::{self, Fault};
use crate::host::{Fragment, MemoryObject};
use crate::iotlb::{Mapping, RecordId, Table};
use crate::parent::Parent;
use crate::types::{Asid, IotlbMsg, IovaRange};

/// The mapping that a REMAP refers to.
#[derive(Clone, Copy)]
enum Unit {
    /// All entries of one UPDATE.
    Record(RecordId),
    /// A single entry.
    Entry(RecordId, IovaRange),
}

impl<P: Parent> Device<P> {
    /// Checks and carries out one REMAP. Outside a batch it takes effect completely or not at all; inside a
    /// batch, the parent receives it at END.
    pub(super) fn remap(&mut self, asid: Asid, msg: &IotlbMsg) -> Result<(), IotlbError> {
        if msg.perm.0 != 0 && !faults::is(Fault::RemapWithPermission) || msg.size == 0 {
            return Err(IotlbError::RemapArguments { perm: msg.perm.0, size: msg.size });
        }
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
            Unit::Record(id) | Unit::Entry(id, _) => id,
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
        self.replace(asid, unit, new);
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

    fn replace(&mut self, asid: Asid, unit: Unit, new: Vec<Mapping<MemoryOf<P>>>) {
        let Some(table) = self.tables.get_mut(&asid) else { return };
        match unit {
            Unit::Record(id) => drop(table.take_fragments(id)),
            Unit::Entry(_, range) => drop(table.take_entry(range.first())),
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

/// Finds the record with exactly this range, even if another UPDATE has filled its gaps, or the entry with exactly this range
/// (uapi-spec 8.5, R2).
fn find_unit<M>(table: &Table<M>, range: IovaRange) -> Option<Unit> {
    let hits = table.overlapping(range);
    let is_whole = |id| table.record(id).is_some_and(|record| record.range == range && !record.broken);
    if let Some(entry) = hits.iter().find(|entry| is_whole(entry.record)) {
        return Some(Unit::Record(entry.record));
    }
    let first = hits.first()?;
    (first.range == range).then_some(Unit::Entry(first.record, range))
}

/// Whether every byte that is mapped now is the same byte of the same object at the new address.
fn same_memory<M: MemoryObject>(range: IovaRange, old: &[Mapping<M>], new: &[(u64, Fragment<M>)]) -> bool {
    let span =
        |(offset, fragment): &(u64, Fragment<M>)| IovaRange::from_size(range.first() + offset, fragment.size);
    old.iter().all(|entry| {
        let mut at = entry.range.first();
        for piece in new {
            let Some(covered) = span(piece) else { continue };
            if covered.first() > at || covered.last() < at {
                continue;
            }
            if !entry.memory.same_object(at - entry.range.first(), &piece.1.memory, at - covered.first()) {
                return false;
            }
            if covered.last() >= entry.range.last() {
                return true;
            }
            at = covered.last() + 1;
        }
        false
    })
}
