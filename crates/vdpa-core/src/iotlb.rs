//! Translation tables: the mappings of an address space, and the request that created each.

mod layered;
mod log;
mod lookup;
mod removed;
mod tree;

pub use layered::{Layered, RangeChange};
pub(crate) use log::Change;
use log::Log;
pub use lookup::Lookup;
pub use removed::Removed;
pub use tree::Tree;

#[cfg(any(test, fuzzing))]
use std::collections::BTreeMap;

use crate::types::{IovaRange, Perm};

/// One entry of a translation table.
#[derive(Clone, Debug)]
pub struct Mapping<M> {
    /// I/O virtual addresses.
    pub range: IovaRange,
    /// Its address in the owner's address space when it was mapped or last remapped.
    pub uaddr: u64,
    /// Access that the device has.
    pub perm: Perm,
    /// The memory; its first byte is at `range.first()`.
    pub memory: M,
    /// The owner has changed and not remapped it, so the data path treats it as unmapped (uapi-spec 8.5, R7).
    pub stale: bool,
    /// The UPDATE that created it.
    pub record: RecordId,
}

/// Identifies the UPDATE that created a mapping, within one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct RecordId(u64);

impl RecordId {
    /// The UPDATE with this number.
    pub(crate) const fn from_number(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    pub(crate) const fn number(self) -> u64 {
        self.0
    }
}

/// One UPDATE of a client. Its fragments are entries of the table.
///
/// The unit of REMAP (uapi-spec 8.5, R2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The range of the request.
    pub range: IovaRange,
    /// An INVALIDATE has removed a part, so only single fragments can be remapped.
    pub broken: bool,
    fragments: usize,
}

impl Record {
    /// What a client asked for, without the entries that came of it.
    pub(crate) const fn without_fragments(range: IovaRange, broken: bool) -> Self {
        Self { range, broken, fragments: 0 }
    }
}

/// One address space's translation, ordered by address. Entries never overlap. A copy costs nothing: it shares the entries.
///
/// It defines what is mapped; the data path reads a snapshot made from it.
#[derive(Debug)]
pub struct Table<M> {
    entries: Tree<Mapping<M>>,
    /// By number.
    records: Tree<Record>,
    next_record: u64,
    /// `None` unless somebody asked for changes.
    log: Option<Box<Log>>,
}

impl<M> Default for Table<M> {
    fn default() -> Self {
        Self { entries: Tree::default(), records: Tree::default(), next_record: 0, log: None }
    }
}

/// A copy does not log its changes, as whoever follows those of the original does not know of it.
impl<M> Clone for Table<M> {
    fn clone(&self) -> Self {
        let Self { entries, records, next_record, log: _ } = self;
        Self { entries: entries.clone(), records: records.clone(), next_record: *next_record, log: None }
    }
}

/// Collects mappings that belong to no UPDATE, for parents that keep a table themselves. Of several mappings that begin at
/// one address the last one is kept; apart from that mappings must not overlap.
impl<M: Clone> FromIterator<Mapping<M>> for Table<M> {
    fn from_iter<I: IntoIterator<Item = Mapping<M>>>(mappings: I) -> Self {
        let entries = mappings.into_iter().map(|mapping| (mapping.range.first(), mapping)).collect();
        Self { entries, ..Self::default() }
    }
}

impl<M> Table<M> {
    /// Entries in address order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Mapping<M>> {
        self.entries.iter().map(|(_, entry)| entry)
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The entries by first address. A copy shares them: whoever keeps one of each state finds what has
    /// [changed](Tree::changes_since) at the cost of what has.
    #[must_use]
    pub const fn entries(&self) -> &Tree<Mapping<M>> {
        &self.entries
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entry that contains `iova`.
    #[must_use]
    pub fn get(&self, iova: u64) -> Option<&Mapping<M>> {
        self.entries.floor(iova).map(|(_, entry)| entry).filter(|entry| entry.range.last() >= iova)
    }

    /// Entries that overlap `range`, in address order.
    #[must_use]
    pub fn overlapping(&self, range: IovaRange) -> Vec<&Mapping<M>> {
        let mut found: Vec<_> = self.touching(range.first(), range.last()).collect();
        found.reverse();
        found
    }

    /// The record of an UPDATE; `None` once all its fragments are removed.
    #[must_use]
    pub fn record(&self, id: RecordId) -> Option<&Record> {
        self.records.get(id.0)
    }

    /// Entries that came from `id`, in address order.
    pub fn fragments(&self, id: RecordId) -> impl Iterator<Item = &Mapping<M>> {
        let range = self.record(id).map(|record| record.range);
        range
            .into_iter()
            .flat_map(|range| self.entries.range(range.first()..=range.last()))
            .map(|(_, entry)| entry)
            .filter(move |entry| entry.record == id)
    }

    /// Entries touched by a possibly inverted interval, in descending order.
    fn touching(&self, first: u64, last: u64) -> impl Iterator<Item = &Mapping<M>> {
        self.entries
            .range(0..=last)
            .rev()
            .map(|(_, entry)| entry)
            .take_while(move |entry| entry.range.last() >= first)
    }

    /// Checks order, overlap and the entry counts of the records.
    #[cfg(any(test, fuzzing))]
    pub fn check(&self) -> Result<(), String> {
        let mut end = None;
        let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
        for (first, entry) in self.entries.iter() {
            if first != entry.range.first() || end.is_some_and(|end| end >= first) {
                return Err(format!("{} is out of order or overlaps what ends at {end:x?}", entry.range));
            }
            end = Some(entry.range.last());
            let record = self.record(entry.record);
            if !record.is_some_and(|record| record.range.contains(entry.range)) {
                return Err(format!("{} is not within its record {record:?}", entry.range));
            }
            *counts.entry(entry.record.0).or_default() += 1;
        }
        let stored: BTreeMap<_, _> = self.records.iter().map(|(id, record)| (id, record.fragments)).collect();
        if stored == counts { Ok(()) } else { Err(format!("records count {stored:?}, there are {counts:?}")) }
    }
}

impl<M: Clone> Table<M> {
    /// Opens a record for an UPDATE of `range`; entries are added with [`insert`](Self::insert).
    pub(crate) fn open_record(&mut self, range: IovaRange) -> RecordId {
        let id = RecordId(self.next_record);
        self.next_record += 1;
        self.records.insert(id.0, Record { range, broken: false, fragments: 0 });
        id
    }

    /// Makes an entry the one that begins at `first`; `None` removes it. For tables of mappings that belong to no UPDATE.
    pub(crate) fn replace(&mut self, first: u64, entry: Option<Mapping<M>>) {
        match entry {
            Some(entry) => drop(self.entries.insert(first, entry)),
            None => drop(self.entries.remove(first)),
        }
    }

    /// Removes a record without entries.
    pub(crate) fn close_record(&mut self, id: RecordId) {
        if self.record(id).is_some_and(|record| record.fragments == 0) {
            self.records.remove(id.0);
        }
    }

    /// Adds an entry, which must not overlap another and must name an open record.
    pub(crate) fn insert(&mut self, mapping: Mapping<M>) {
        debug_assert!(self.overlapping(mapping.range).is_empty(), "overlap at {:?}", mapping.range);
        if let Some(record) = self.records.get_mut(mapping.record.0) {
            record.fragments += 1;
        }
        if let Some(log) = &mut self.log {
            log.added(mapping.range.first());
        }
        self.entries.insert(mapping.range.first(), mapping);
    }

    /// Adds an entry of another table of the same address space, which must not overlap one here, with its record.
    pub(crate) fn adopt(&mut self, record: &Record, mapping: Mapping<M>) {
        self.next_record = self.next_record.max(mapping.record.0 + 1);
        if self.record(mapping.record).is_none() {
            self.records.insert(mapping.record.0, Record { fragments: 0, ..*record });
        }
        self.insert(mapping);
    }

    /// Removes every entry that the interval `[first, last]` touches, also its parts outside, and returns them in address order.
    ///
    /// The interval may be inverted, as the kernel's interval tree allows it to be: then only an entry that
    /// reaches from `last` or below to `first` or above is touched (uapi-spec 2.5).
    pub(crate) fn remove_touching(&mut self, first: u64, last: u64) -> Vec<Mapping<M>> {
        let keys: Vec<u64> = self.touching(first, last).map(|entry| entry.range.first()).collect();
        let removed: Vec<_> = keys.iter().rev().filter_map(|&key| self.entries.remove(key)).collect();
        if let (Some(log), Some(last), Some(first)) = (&mut self.log, keys.first(), keys.last()) {
            log.removed(*first, *last);
        }
        for entry in &removed {
            self.forget_fragment(entry.record);
        }
        removed
    }

    /// Removes all entries of a record and returns them. The record stays, for new entries.
    pub(crate) fn take_fragments(&mut self, id: RecordId) -> Vec<Mapping<M>> {
        let keys: Vec<u64> = self.fragments(id).map(|entry| entry.range.first()).collect();
        if let Some(record) = self.records.get_mut(id.0) {
            record.fragments -= keys.len();
        }
        if let Some(log) = &mut self.log {
            keys.iter().for_each(|&key| log.removed(key, key));
        }
        keys.iter().filter_map(|&key| self.entries.remove(key)).collect()
    }

    /// Removes the one entry that begins at `first`; its record stays.
    pub(crate) fn take_entry(&mut self, first: u64) -> Option<Mapping<M>> {
        let entry = self.entries.remove(first)?;
        if let Some(record) = self.records.get_mut(entry.record.0) {
            record.fragments -= 1;
        }
        if let Some(log) = &mut self.log {
            log.removed(first, first);
        }
        Some(entry)
    }

    /// Marks every entry stale or fresh.
    pub(crate) fn mark_all(&mut self, stale: bool) {
        self.entries.for_each_mut(|entry| entry.stale = stale);
        match &mut self.log {
            Some(log) if stale => log.all_stale(),
            Some(log) => self.entries.iter().for_each(|(first, _)| log.added(first)),
            None => {}
        }
    }

    fn forget_fragment(&mut self, id: RecordId) {
        let Some(record) = self.records.get_mut(id.0) else { return };
        let newly = !std::mem::replace(&mut record.broken, true);
        record.fragments -= 1;
        if newly && let Some(log) = &mut self.log {
            log.broken(id, record.range);
        }
        if record.fragments == 0 {
            self.records.remove(id.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(first: u64, last: u64, record: RecordId) -> Mapping<()> {
        let range = IovaRange::new(first, last).unwrap();
        Mapping { range, uaddr: 0, perm: Perm::RW, memory: (), stale: false, record }
    }

    fn table(ranges: &[(u64, u64)]) -> Table<()> {
        let mut table = Table::default();
        for &(first, last) in ranges {
            let id = table.open_record(IovaRange::new(first, last).unwrap());
            table.insert(entry(first, last, id));
        }
        table
    }

    #[test]
    fn removal_takes_whole_entries_and_honours_inverted_intervals() {
        let mut t = table(&[(0, 0xfff), (0x1000, 0x2fff), (0x4000, 0x4fff)]);
        assert!(t.remove_touching(0x1000, 0xfff).is_empty(), "nothing spans the boundary at 0x1000");
        assert_eq!(t.remove_touching(0x2000, 0x1fff).len(), 1, "one entry spans the boundary at 0x2000");
        assert_eq!(t.len(), 2);
        assert_eq!(t.remove_touching(0, u64::MAX).len(), 2);
        assert!(t.is_empty() && t.records.is_empty());
    }

    /// What a map and an unmap copy: the nodes on the way to the entry and to the record, and their neighbours when nodes are
    /// split or joined.
    #[test]
    fn a_change_copies_as_few_nodes_of_many_entries_as_of_few() {
        let mut t: Table<()> = Table::default();
        for count in [1_000, 200_000] {
            while (t.len() as u64) < count {
                let first = 0x2000 * t.len() as u64;
                let id = t.open_record(IovaRange::new(first, first + 0xfff).unwrap());
                t.insert(entry(first, first + 0xfff, id));
            }
            for at in [0, count / 3, count - 1] {
                let first = 0x2000 * at + 0x1000;
                let before = t.clone();
                let id = t.open_record(IovaRange::new(first, first + 0xfff).unwrap());
                t.insert(entry(first, first + 0xfff, id));
                let mapped = t.clone();
                t.remove_touching(first, first);
                for (now, before) in [(&mapped, &before), (&t, &mapped)] {
                    for (levels, nodes) in
                        [now.entries.own_nodes(&before.entries), now.records.own_nodes(&before.records)]
                    {
                        assert!(levels <= 5 && nodes <= 2 * levels, "{nodes} nodes of {levels} levels");
                    }
                    let mut changes = 0;
                    let mut compared = 0;
                    let same = |_: &Mapping<()>, _: &Mapping<()>| {
                        compared += 1;
                        true
                    };
                    now.entries.changes_since(&before.entries, same, |_, _, _| changes += 1);
                    assert!(changes == 1 && compared <= 100, "{changes} changes, {compared} compared");
                }
            }
        }
    }

    #[test]
    fn a_partly_removed_record_is_broken() {
        let mut t = Table::default();
        let id = t.open_record(IovaRange::new(0, 0x1fff).unwrap());
        t.insert(entry(0, 0xfff, id));
        t.insert(entry(0x1000, 0x1fff, id));
        assert!(!t.record(id).unwrap().broken);
        t.remove_touching(0x1800, 0x1800);
        assert!(t.record(id).unwrap().broken);
        assert_eq!(t.fragments(id).count(), 1);
        t.remove_touching(0, 0);
        assert!(t.record(id).is_none());
    }

    #[test]
    fn the_last_byte_of_the_space_can_be_mapped() {
        let t = table(&[(u64::MAX, u64::MAX)]);
        assert!(t.get(u64::MAX).is_some() && t.get(u64::MAX - 1).is_none());
        assert_eq!(t.overlapping(IovaRange::ALL).len(), 1);
    }

    proptest! {
        /// Compares with a plain list of ranges, over a small space so that edges meet.
        #[test]
        fn agrees_with_a_naive_model(ops in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..64), 0..60)) {
            let mut t = Table::default();
            let mut model: Vec<(u64, u64)> = Vec::new();
            for (add, a, b) in ops {
                let hits = |&(first, last): &(u64, u64)| first <= b && last >= a;
                if add {
                    let Some(range) = IovaRange::new(a, b) else { continue };
                    prop_assert_eq!(t.overlapping(range).is_empty(), !model.iter().any(hits));
                    if t.overlapping(range).is_empty() {
                        let id = t.open_record(range);
                        t.insert(entry(a, b, id));
                        model.push((a, b));
                    }
                } else {
                    let removed = t.remove_touching(a, b).len();
                    let before = model.len();
                    model.retain(|r| !hits(r));
                    prop_assert_eq!(removed, before - model.len());
                }
                model.sort_unstable();
                let now: Vec<_> = t.iter().map(|e| (e.range.first(), e.range.last())).collect();
                prop_assert_eq!(&now, &model);
                for iova in 0..64 {
                    let expected = model.iter().any(|&(first, last)| first <= iova && iova <= last);
                    prop_assert_eq!(t.get(iova).is_some(), expected);
                }
            }
        }
    }
}
