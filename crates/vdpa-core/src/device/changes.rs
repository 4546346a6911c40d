//! What has changed in a device since its changes were last taken.

use std::collections::{BTreeMap, BTreeSet};

use crate::device::state::{Record, TableId, TableRole, VringState};
use crate::device::{Device, MemoryOf};
use crate::iotlb::{self, Change, Mapping, Table};
use crate::parent::Parent;
use crate::types::QueueIndex;

/// Changes kept before everything is said anew. One request makes few; so many come together only when nobody takes them.
const MOST: usize = 1 << 16;

/// Exists once changes were asked for.
#[derive(Debug)]
pub(super) struct Changes<M> {
    /// Changes of tables, in order.
    pub(super) pending: Vec<Pending<M>>,
    /// The tables that whoever takes the changes knows of.
    known: BTreeSet<TableId>,
    /// Queues that may have changed.
    pub(super) vrings: BTreeSet<QueueIndex>,
    /// What was said last of each queue that has changed before.
    pub(super) said_of_vrings: BTreeMap<QueueIndex, VringState>,
    /// What was said last of everything but queues and tables.
    pub(super) said: Vec<Record>,
    /// Changes were lost: everything has to be said anew.
    pub(super) lost: bool,
}

/// A change of a table. A mapping is given to the [`StateSink`](crate::device::state::StateSink) when changes are taken.
#[derive(Debug)]
pub(super) enum Pending<M> {
    Record(Record),
    Mapping(TableId, Mapping<M>, iotlb::Record),
}

impl<M: Clone> Changes<M> {
    /// Changes from now on, of a device that has been described by `said`.
    pub(super) fn new<'a>(
        said: Vec<Record>,
        tables: impl Iterator<Item = (TableId, &'a mut Table<M>)>,
    ) -> Self
    where
        M: 'a,
    {
        let known = tables.map(|(id, table)| {
            table.log_changes();
            id
        });
        Self {
            known: known.collect(),
            pending: Vec::new(),
            vrings: BTreeSet::new(),
            said_of_vrings: BTreeMap::new(),
            said,
            lost: false,
        }
    }

    /// A copy of `from` is now `to`. Both have been flushed, and `to` logs from here on.
    pub(super) fn copied(&mut self, from: TableId, to: TableId) {
        self.push(Pending::Record(Record::TableCopied { from, to }));
        self.known.insert(to);
    }

    fn push(&mut self, pending: Pending<M>) {
        self.lost |= self.pending.len() >= MOST;
        if self.lost {
            self.pending.clear();
        } else {
            self.pending.push(pending);
        }
    }

    /// Moves what `tables`, which are all, have logged to the changes.
    fn flush<'a>(&mut self, tables: impl Iterator<Item = (TableId, &'a mut Table<M>)>)
    where
        M: 'a,
    {
        let mut present = BTreeSet::new();
        for (id, table) in tables {
            present.insert(id);
            let known = self.known.contains(&id);
            match table.take_changes().filter(|_| known) {
                Some(changes) => {
                    for change in changes {
                        let pending = pending(id, change);
                        self.push(pending);
                    }
                }
                None => {
                    if known {
                        self.push(Pending::Record(Record::TableRemoved { table: id }));
                    }
                    self.describe(id, table);
                }
            }
        }
        let gone: Vec<TableId> = self.known.difference(&present).copied().collect();
        for table in gone {
            self.push(Pending::Record(Record::TableRemoved { table }));
        }
        self.known = present;
    }

    /// A table that is new, or of which not every change is known.
    fn describe(&mut self, id: TableId, table: &mut Table<M>) {
        table.log_changes();
        self.push(Pending::Record(Record::Table { table: id, next_update: table.next_record() }));
        for mapping in table.iter() {
            self.push(Pending::Mapping(id, mapping.clone(), table.origin(mapping)));
        }
    }
}

fn pending<M>(table: TableId, change: Change<M>) -> Pending<M> {
    Pending::Record(match change {
        Change::Added(mapping, update) => return Pending::Mapping(table, mapping, update),
        Change::NextRecord(next_update) => Record::Table { table, next_update },
        Change::Removed(firsts) => Record::Unmapped { table, firsts },
        Change::AllStale => Record::Stale { table },
        Change::Broken(id, range) => Record::Broken { table, update: id.number(), range },
    })
}

impl<P: Parent> Device<P> {
    /// Notes changes of tables so far, before something else happens whose order matters. Costs as much as has changed.
    pub(super) fn flush_tables(&mut self) {
        if let Some(mut changes) = self.changes.take() {
            changes.flush(self.tables_mut());
            self.changes = Some(changes);
        }
    }

    /// Every table there is.
    pub(super) fn tables_mut(&mut self) -> impl Iterator<Item = (TableId, &mut Table<MemoryOf<P>>)> {
        let interface = self.tables.iter_mut().map(|(&asid, table)| (TableRole::Interface, asid, table));
        let rollback = self
            .batch
            .as_mut()
            .and_then(|batch| Some((TableRole::Rollback, batch.asid, batch.without_remaps.as_mut()?)));
        let parent = self
            .parent_tables
            .iter_mut()
            .filter_map(|(&asid, parent)| Some((TableRole::Parent, asid, parent.other.as_mut()?)));
        let all = interface.chain(rollback).chain(parent);
        all.map(|(role, asid, table)| (TableId { role, asid }, table))
    }

    /// As [`tables_mut`](Self::tables_mut), to look at.
    pub(super) fn tables_by_role(&self) -> impl Iterator<Item = (TableId, &Table<MemoryOf<P>>)> {
        let interface = self.tables.iter().map(|(&asid, table)| (TableRole::Interface, asid, table));
        let rollback = self
            .batch
            .as_ref()
            .and_then(|batch| Some((TableRole::Rollback, batch.asid, batch.without_remaps.as_ref()?)));
        let parent = self
            .parent_tables
            .iter()
            .filter_map(|(&asid, parent)| Some((TableRole::Parent, asid, parent.other.as_ref()?)));
        let all = interface.chain(rollback).chain(parent);
        all.map(|(role, asid, table)| (TableId { role, asid }, table))
    }

    /// A queue may have changed.
    pub(super) fn touch(&mut self, index: QueueIndex) {
        if let Some(changes) = &mut self.changes {
            changes.vrings.insert(index);
        }
    }

    /// Every queue may have changed.
    pub(super) fn touch_all(&mut self) {
        if let Some(changes) = &mut self.changes {
            changes.vrings.extend((0..self.parent.profile().queues).map(QueueIndex));
        }
    }
}
