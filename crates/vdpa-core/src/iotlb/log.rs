//! What has changed in a table, for whoever keeps a copy of it elsewhere.

use super::{Mapping, Record, RecordId, Table};
use crate::types::IovaRange;

/// Changes kept before the log gives up: far more than one request makes of a table of the usual size.
const MOST: usize = 1 << 16;

/// The changes of a table since they were last taken, in order.
///
/// An entry that was added is named by its first address and looked up when the changes are taken: what has happened to
/// it in the meantime follows in the log, so nothing is lost and nothing has to be copied for each change.
#[derive(Debug, Default)]
pub(super) struct Log {
    changes: Vec<Entry>,
    /// There were more changes than are kept.
    overflowed: bool,
    /// The number of the next UPDATE, as it was reported last.
    next_record: u64,
}

#[derive(Clone, Copy, Debug)]
enum Entry {
    Added(u64),
    Removed(IovaRange),
    AllStale,
    Broken(RecordId, IovaRange),
}

/// One change of a table.
#[derive(Debug)]
pub(crate) enum Change<M> {
    /// The next UPDATE gets this number.
    NextRecord(u64),
    /// The table has this entry, which came from this UPDATE, in place of one that began at the same address.
    Added(Mapping<M>, Record),
    /// No entry begins in this range.
    Removed(IovaRange),
    /// All entries are stale.
    AllStale,
    /// A part of this UPDATE, which covered this range, was removed.
    Broken(RecordId, IovaRange),
}

impl Log {
    fn push(&mut self, entry: Entry) {
        if self.changes.len() < MOST {
            self.changes.push(entry);
        } else {
            self.overflowed = true;
        }
    }

    pub(super) fn added(&mut self, first: u64) {
        self.push(Entry::Added(first));
    }

    /// No entry begins in `[first, last]` any more.
    pub(super) fn removed(&mut self, first: u64, last: u64) {
        if let Some(range) = IovaRange::new(first, last) {
            self.push(Entry::Removed(range));
        }
    }

    pub(super) fn all_stale(&mut self) {
        self.push(Entry::AllStale);
    }

    pub(super) fn broken(&mut self, id: RecordId, range: IovaRange) {
        self.push(Entry::Broken(id, range));
    }
}

impl<M: Clone> Table<M> {
    /// Begins to log changes, from the present state on.
    pub(crate) fn log_changes(&mut self) {
        self.log = Some(Box::new(Log { next_record: self.next_record, ..Log::default() }));
    }

    /// Takes the changes since the last call; `None` when they are not known, because nobody asked for them or there
    /// were too many. Costs as much as there are changes.
    pub(crate) fn take_changes(&mut self) -> Option<Vec<Change<M>>> {
        let next = self.next_record;
        let log = self.log.as_mut().filter(|log| !log.overflowed)?;
        let numbered = std::mem::replace(&mut log.next_record, next) != next;
        let entries = std::mem::take(&mut log.changes);
        let mut changes = Vec::with_capacity(entries.len() + usize::from(numbered));
        changes.extend(numbered.then_some(Change::NextRecord(next)));
        changes.extend(entries.into_iter().filter_map(|entry| self.resolve(entry)));
        Some(changes)
    }

    fn resolve(&self, entry: Entry) -> Option<Change<M>> {
        Some(match entry {
            Entry::Added(first) => {
                let mapping = self.entries.get(first)?;
                Change::Added(mapping.clone(), self.origin(mapping))
            }
            Entry::Removed(range) => Change::Removed(range),
            Entry::AllStale => Change::AllStale,
            // Of an UPDATE that is gone nothing is left that could be broken.
            Entry::Broken(id, range) => self.record(id).map(|_| Change::Broken(id, range))?,
        })
    }
}

impl<M> Table<M> {
    /// What the client asked for when it made an entry of this table.
    pub(crate) fn origin(&self, mapping: &Mapping<M>) -> Record {
        let record = self.record(mapping.record);
        record.map_or_else(|| Record::without_fragments(mapping.range, false), |record| *record)
    }

    /// The number of the next UPDATE.
    pub(crate) const fn next_record(&self) -> u64 {
        self.next_record
    }

    /// Numbers the next UPDATE, if none has this number or a higher one.
    pub(crate) fn number_from(&mut self, next_record: u64) {
        self.next_record = self.next_record.max(next_record);
    }

    /// Forgets what was logged, and logs nothing from now on.
    pub(crate) fn stop_logging(&mut self) {
        self.log = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Perm;

    fn mapping(first: u64, record: RecordId) -> Mapping<()> {
        let range = IovaRange::new(first, first + 0xfff).unwrap();
        Mapping { range, uaddr: 0, perm: Perm::RW, memory: (), stale: false, record }
    }

    fn update(table: &mut Table<()>, first: u64, entries: u64) {
        let id = table.open_record(IovaRange::from_size(first, entries * 0x1000).unwrap());
        (0..entries).for_each(|i| table.insert(mapping(first + i * 0x1000, id)));
    }

    #[test]
    fn nothing_is_logged_unless_somebody_asks() {
        let mut table = Table::default();
        update(&mut table, 0, 1);
        assert!(table.log.is_none() && table.take_changes().is_none());
        table.log_changes();
        update(&mut table, 0x1000, 1);
        assert!(table.clone().take_changes().is_none(), "a copy has no log");
        assert_eq!(table.take_changes().unwrap().len(), 2, "an entry and the next number");
        assert!(table.take_changes().unwrap().is_empty());
    }

    #[test]
    fn a_change_of_everything_is_one_change() {
        let mut table = Table::default();
        update(&mut table, 0, 100);
        table.log_changes();
        table.mark_all(true);
        assert!(matches!(table.take_changes().unwrap()[..], [Change::AllStale]));
        table.remove_touching(0x1000, 0x4fff);
        assert!(matches!(table.take_changes().unwrap()[..], [Change::Removed(_), Change::Broken(..)]));
    }

    #[test]
    fn too_many_changes_are_not_known() {
        let mut table: Table<()> = Table::default();
        table.log_changes();
        for _ in 0..=MOST {
            table.mark_all(true);
        }
        assert!(table.take_changes().is_none());
        table.log_changes();
        assert!(table.take_changes().is_some_and(|changes| changes.is_empty()));
    }
}
