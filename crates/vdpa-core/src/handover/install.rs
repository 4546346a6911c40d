//! The tables of a parent behind handles.

use super::{MemoryOf, Shared};
use crate::errno::Errno;
use crate::host::MemoryObject;
use crate::iotlb::{Mapping, Table};
use crate::parent::{Dma, Parent};
use crate::types::{Asid, Result};

impl<P: Parent> Shared<P> {
    /// Installs a table in the parent. Entries that the parent has already keep their memory, so that it is not pinned again.
    /// Costs as much as has changed since the last call, where the table was made from the one of that call.
    pub(super) fn install(&mut self, asid: Asid, table: &Table<MemoryOf<P>>) -> Result<()> {
        let Dma::SetMap(map) = self.parent.dma() else { return Err(Errno::OPNOTSUPP) };
        let none = Table::default();
        let before = self.installed.get(&asid).unwrap_or(&none);
        let requested = self.requested.get(&asid).unwrap_or(before);
        let mut next = before.clone();
        let unchanged = |old: &Mapping<_>, new: &Mapping<_>| is_same(old, new) && old.uaddr == new.uaddr;
        table.entries().changes_since(requested.entries(), unchanged, |first, _, new| {
            let known = before.get(first).filter(|old| new.is_some_and(|new| is_same(old, new)));
            let entry = new.map(|new| match known {
                Some(known) => Mapping { memory: known.memory.clone(), ..new.clone() },
                None => new.clone(),
            });
            next.replace(first, entry);
        });
        map.set_map(asid, &next)?;
        self.changes += 1;
        self.installed.insert(asid, next);
        self.requested.insert(asid, table.clone());
        Ok(())
    }
}

/// Whether two entries give the device the same access to the same bytes.
fn is_same<M: MemoryObject>(old: &Mapping<M>, new: &Mapping<M>) -> bool {
    let last = new.range.size().saturating_sub(1);
    old.range == new.range
        && old.perm == new.perm
        && !old.stale
        && old.memory.is_shared()
        && old.memory.pin_pages() == new.memory.pin_pages()
        && new.memory.same_object(0, &old.memory, 0)
        && new.memory.same_object(last, &old.memory, last)
}
