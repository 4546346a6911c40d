//! What the parent translates an address space with, where that is not what the interface has mapped.
//!
//! ```text
//!            first change in a batch: a copy of the table before it; reset that drops the translation: nothing
//!  the interface's table ---------------------------------------------------------------------> another one
//!                        <---------------------------------------------------------------------
//!                         the parent is given the interface's table
//! ```
//!
//! The parent keeps its translation itself. This is for whoever restores the device elsewhere, where a parent has to be
//! given the same. Nothing is copied outside of batches, and once in a batch at most.

use std::collections::BTreeMap;

use crate::device::state::{TableId, TableRole};
use crate::device::{Device, MemoryOf};
use crate::iotlb::{Mapping, Table};
use crate::parent::{Dma, Parent};
use crate::types::{Asid, IovaRange, Result};

/// See the [module](self). An address space without one has the interface's table, and its parent took that.
#[derive(Debug)]
pub(super) struct ParentTable<M> {
    /// Another table than the interface's.
    pub(super) other: Option<Table<M>>,
    /// The parent refused the table: what it translates with is its own affair.
    pub(super) refused: bool,
}

impl<P: Parent> Device<P> {
    /// The parent was offered the interface's table of `asid`.
    pub(super) fn parent_was_offered(&mut self, asid: Asid, result: Result<()>) {
        if result.is_ok() {
            self.parent_tables.remove(&asid);
        } else {
            self.parent_tables.insert(asid, ParentTable { other: None, refused: true });
        }
    }

    /// The table of `asid` is about to change. A parent that learns of it only at the end of the batch goes on with the
    /// present one.
    pub(super) fn before_change(&mut self, asid: Asid) {
        let has_another = self.parent_tables.get(&asid).is_some_and(|parent| parent.other.is_some());
        if has_another || self.has_identity_map(asid) || !self.waits_for_end() {
            return;
        }
        let copy = self.copy_table(asid, TableRole::Parent);
        let parent = self.parent_tables.entry(asid).or_insert(ParentTable { other: None, refused: false });
        parent.other = Some(copy);
    }

    /// The parent has lost its translation of `asid`, and the interface has not.
    pub(super) fn parent_was_emptied(&mut self, asid: Asid) {
        let translates = !matches!(self.parent.dma(), Dma::Platform);
        if translates && self.tables.contains_key(&asid) {
            self.parent_tables.insert(asid, ParentTable { other: Some(Table::default()), refused: false });
        }
    }

    /// A parent that takes single mappings has some more.
    pub(super) fn parent_has_added(&mut self, asid: Asid, added: &[IovaRange]) {
        let (Some(table), Some(other)) = (self.tables.get(&asid), other(&mut self.parent_tables, asid))
        else {
            return;
        };
        for range in added {
            if let Some(entry) = table.get(range.first()) {
                other.adopt(&table.origin(entry), entry.clone());
            }
        }
    }

    /// A parent that takes single mappings has lost some.
    pub(super) fn parent_has_removed(&mut self, asid: Asid, removed: &[Mapping<MemoryOf<P>>]) {
        let Some(other) = other(&mut self.parent_tables, asid) else { return };
        for entry in removed {
            other.remove_touching(entry.range.first(), entry.range.last());
        }
    }

    /// A copy of the interface's table of `asid`, to be used in another role at once.
    pub(super) fn copy_table(&mut self, asid: Asid, role: TableRole) -> Table<MemoryOf<P>> {
        self.flush_tables();
        let mut copy = self.tables.get(&asid).cloned().unwrap_or_default();
        if let Some(changes) = &mut self.changes {
            copy.log_changes();
            changes.copied(TableId { role: TableRole::Interface, asid }, TableId { role, asid });
        }
        copy
    }
}

fn other<M>(tables: &mut BTreeMap<Asid, ParentTable<M>>, asid: Asid) -> Option<&mut Table<M>> {
    tables.get_mut(&asid)?.other.as_mut()
}
