//! Batches, and the roll-back of a failing END (uapi-spec 2.6; 8.5, R5 and R6).

use crate::device::state::TableRole;
use crate::device::{Device, IotlbError, MemoryOf};
use crate::faults::{self, Fault};
use crate::iotlb::{Mapping, Table};
use crate::parent::{Dma, Parent};
use crate::types::{Asid, IovaRange};

/// An open batch.
#[derive(Debug)]
pub(super) struct Batch<M> {
    pub(super) asid: Asid,
    /// From the first REMAP on: the table without the REMAPs of this batch, which a failing END restores.
    ///
    /// A REMAP can change which addresses are mapped, since inaccessible parts stay unmapped. So every other request is
    /// applied to both tables, because neither can be derived from the other at END.
    pub(super) without_remaps: Option<Table<M>>,
}

impl<M: Clone> Batch<M> {
    pub(super) const fn new(asid: Asid) -> Self {
        Self { asid, without_remaps: None }
    }

    /// Number of entries of the table that a failing END restores; 0 if it is the present table.
    pub(super) fn entries_after_failure(&self) -> usize {
        self.without_remaps.as_ref().map_or(0, Table::len)
    }

    /// Called after an UPDATE has added `added` to `table`. These entries stay after a failing END; old entries whose addresses
    /// a REMAP had freed for them do not return.
    pub(super) fn updated(&mut self, table: &Table<M>, added: &[IovaRange], limit: usize) {
        let Some(other) = &mut self.without_remaps else { return };
        let lost: Vec<_> =
            added.iter().flat_map(|range| other.remove_touching(range.first(), range.last())).collect();
        added.iter().for_each(|&range| copy_missing(table, other, range, limit));
        lost.iter().for_each(|entry| copy_missing(table, other, entry.range, limit));
    }

    /// Called after an INVALIDATE of the possibly inverted interval `[first, last]` has removed `removed`, which leaves
    /// `table`. A failing END restores none of it. The rest of an old entry that covered more keeps its present address.
    pub(super) fn invalidated(
        &mut self,
        table: &Table<M>,
        (first, last): (u64, u64),
        removed: &[Mapping<M>],
        limit: usize,
    ) {
        let Some(other) = &mut self.without_remaps else { return };
        let mut lost = other.remove_touching(first, last);
        for entry in removed {
            lost.extend(other.remove_touching(entry.range.first(), entry.range.last()));
        }
        lost.iter().for_each(|entry| copy_missing(table, other, entry.range, limit));
    }
}

/// Copies the entries of `from` that overlap `range` into the gaps of `to`, as long as `to` has room.
fn copy_missing<M: Clone>(from: &Table<M>, to: &mut Table<M>, range: IovaRange, limit: usize) {
    for entry in from.overlapping(range) {
        if let Some(record) = from.record(entry.record)
            && to.len() < limit
            && to.overlapping(entry.range).is_empty()
        {
            to.adopt(record, entry.clone());
        }
    }
}

impl<P: Parent> Device<P> {
    /// A REMAP of the open batch is about to change the table of `asid`.
    pub(super) fn before_batched_remap(&mut self, asid: Asid) {
        if self.batch.as_ref().is_some_and(|batch| batch.without_remaps.is_none()) {
            let copy = self.copy_table(asid, TableRole::Rollback);
            if let Some(batch) = &mut self.batch {
                batch.without_remaps = Some(copy);
            }
        }
    }

    pub(super) fn begin_batch(&mut self, asid: Asid) {
        self.batch.get_or_insert_with(|| Batch::new(asid));
    }

    pub(super) fn end_batch(&mut self, asid: Asid) -> Result<(), IotlbError> {
        if self.batch.is_none() && faults::is(Fault::BatchEndNeedsBegin) {
            return Err(IotlbError::NoTable { asid });
        }
        let Some(batch) = self.batch.take() else { return Ok(()) };
        let report = self.parent.profile().report_batch_errors || batch.without_remaps.is_some();
        let Err(errno) = self.set_map(asid) else { return Ok(()) };
        if let Some(mut table) = batch.without_remaps {
            // It takes another's place: whoever follows changes is given all of it.
            table.stop_logging();
            self.tables.insert(asid, table);
        }
        // One attempt to restore the parent's table, whatever the failing call has left.
        let _ = self.set_map(asid);
        if report { Err(IotlbError::Parent { errno }) } else { Ok(()) }
    }

    /// Whether the parent receives mappings only at the end of the open batch.
    pub(super) fn waits_for_end(&mut self) -> bool {
        self.batch.is_some() && matches!(self.parent.dma(), Dma::SetMap(_))
    }

    /// The present table of `asid`, and the one that a failing END restores.
    pub(super) fn tables_of(&mut self, asid: Asid) -> impl Iterator<Item = &mut Table<MemoryOf<P>>> {
        let batch = self.batch.as_mut().filter(|batch| batch.asid == asid);
        self.tables.get_mut(&asid).into_iter().chain(batch.and_then(|batch| batch.without_remaps.as_mut()))
    }
}
