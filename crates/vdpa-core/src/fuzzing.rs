//! Access of fuzz targets to internals. Compiled with `cfg(fuzzing)` only.

use crate::iotlb::{Mapping, RecordId, Table};
use crate::types::{IovaRange, Perm};

/// A translation table with the operations of requests on it.
#[derive(Debug, Default)]
pub struct RecordTable {
    /// The table.
    pub table: Table<()>,
}

impl RecordTable {
    /// Adds one record with fragments within `range`, in order and without overlap.
    pub fn update(&mut self, range: IovaRange, pieces: &[IovaRange]) {
        let record = self.table.open_record(range);
        pieces.iter().for_each(|&piece| self.table.insert(mapping(piece, record)));
        self.table.close_record(record);
    }

    /// Removes the entries that a possibly inverted interval touches; returns their number.
    pub fn remove(&mut self, first: u64, last: u64) -> usize {
        self.table.remove_touching(first, last).len()
    }

    /// Removes the entry at `iova`, or all entries of its record, and inserts the same ranges again, each split `cut` bytes
    /// from its start if that is inside. Returns the ranges removed and inserted.
    pub fn refill(&mut self, iova: u64, whole: bool, cut: u64) -> Option<(Vec<IovaRange>, Vec<IovaRange>)> {
        let entry = self.table.get(iova)?;
        let (record, first) = (entry.record, entry.range.first());
        let taken: Vec<_> = if whole {
            self.table.take_fragments(record)
        } else {
            self.table.take_entry(first).into_iter().collect()
        };
        let taken: Vec<_> = taken.iter().map(|entry| entry.range).collect();
        let put: Vec<_> = taken.iter().flat_map(|&range| halves(range, cut)).collect();
        put.iter().for_each(|&range| self.table.insert(mapping(range, record)));
        Some((taken, put))
    }
}

impl<M: Clone> Table<M> {
    /// Marks every entry stale or fresh.
    pub fn mark_all_for_fuzzing(&mut self, stale: bool) {
        self.mark_all(stale);
    }
}

fn mapping(range: IovaRange, record: RecordId) -> Mapping<()> {
    Mapping { range, uaddr: 0, perm: Perm::RW, memory: (), stale: false, record }
}

fn halves(range: IovaRange, cut: u64) -> Vec<IovaRange> {
    let at = range.first().checked_add(cut).filter(|at| cut > 0 && *at <= range.last());
    let Some(at) = at else { return vec![range] };
    [IovaRange::new(range.first(), at - 1), IovaRange::new(at, range.last())].into_iter().flatten().collect()
}
