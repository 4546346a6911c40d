//! [`Mappings`]: what the device behind has mapped.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::host::MemoryObject;
use vdpa_core::iotlb::{Mapping, Table, Tree};
use vdpa_core::ops::VdpaOps;
use vdpa_core::parent::SetMap;
use vdpa_core::types::{Asid, IovaRange, Result};
use vdpa_sys::guest::{GuestMemory, LinuxHost, MemoryRecord};

use crate::keeper::{Keeper, KeptMapping};

/// The mappings of each address space. A change of one costs as much as has changed.
#[derive(Debug)]
pub(super) struct Mappings {
    keeper: Option<Arc<Keeper>>,
    spaces: Vec<Space>,
}

#[derive(Debug, Default)]
struct Space {
    /// What it is to have.
    entries: Tree<Mapping<GuestMemory>>,
    /// It has that. False where an earlier daemon has mapped, until that was compared.
    known: bool,
}

/// A change: what to remove, and what to add.
#[derive(Debug, Default)]
struct Change {
    remove: Vec<KeptMapping>,
    add: Vec<(KeptMapping, GuestMemory)>,
}

impl Mappings {
    /// For this many address spaces; `empty` says that nothing is mapped.
    pub(super) fn new(spaces: u32, empty: bool) -> Self {
        let space = || Space { entries: Tree::default(), known: empty };
        Self { keeper: None, spaces: (0..spaces).map(|_| space()).collect() }
    }

    /// Whom to tell of changes; `None`: they are remembered for [`reconcile`](Self::reconcile).
    pub(super) fn use_keeper(&mut self, keeper: Option<Arc<Keeper>>) {
        self.keeper = keeper;
    }

    /// Makes the mappings of each address space what they are to be, wherever an earlier daemon has left others.
    ///
    /// # Errors
    /// What the keeper answers.
    pub(super) fn reconcile(&mut self, keeper: &Keeper) -> Result<()> {
        for (space, asid) in self.spaces.iter_mut().zip((0..).map(Asid)).filter(|(space, _)| !space.known) {
            let change = Change::between(&keeper.mappings(asid)?, &space.entries)?;
            if !change.is_empty() {
                let (removed, added) = (change.remove.len(), change.add.len());
                tracing::info!(%asid, removed, added, "mappings that the earlier daemon was about to change");
            }
            change.apply(keeper, asid)?;
            space.known = true;
        }
        Ok(())
    }
}

impl SetMap<LinuxHost> for Mappings {
    fn set_map(&mut self, asid: Asid, table: &Table<GuestMemory>) -> Result<()> {
        let space =
            usize::try_from(asid.0).ok().and_then(|index| self.spaces.get_mut(index)).ok_or(Errno::INVAL)?;
        if let Some(keeper) = &self.keeper {
            let change = if space.known {
                Change::since(&space.entries, table.entries())?
            } else {
                Change::between(&keeper.mappings(asid)?, table.entries())?
            };
            // After an error only the keeper knows.
            space.known = false;
            change.apply(keeper, asid)?;
            space.known = true;
        }
        space.entries = table.entries().clone();
        Ok(())
    }
}

impl Change {
    /// From what a keeper has to what is wanted.
    fn between(there: &[KeptMapping], wanted: &Tree<Mapping<GuestMemory>>) -> Result<Self> {
        let mut left: BTreeMap<u64, KeptMapping> =
            there.iter().map(|mapping| (mapping.range.first(), *mapping)).collect();
        let mut change = Self::default();
        for (first, entry) in wanted.iter() {
            let kept = kept(entry)?;
            if left.get(&first) == Some(&kept) {
                left.remove(&first);
            } else {
                change.add.push((kept, entry.memory.clone()));
            }
        }
        change.remove.extend(left.into_values());
        Ok(change)
    }

    /// From one table to a later one.
    fn since(before: &Tree<Mapping<GuestMemory>>, now: &Tree<Mapping<GuestMemory>>) -> Result<Self> {
        let mut changes = Vec::new();
        now.changes_since(before, is_same, |_, before, after| changes.push((before, after)));
        let mut change = Self::default();
        for (before, after) in changes {
            change.remove.extend(before.map(kept).transpose()?);
            if let Some(after) = after {
                change.add.push((kept(after)?, after.memory.clone()));
            }
        }
        Ok(change)
    }

    const fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }

    /// Tells the device: several mappings as a batch. After an error some of it is done.
    fn apply(&self, keeper: &Keeper, asid: Asid) -> Result<()> {
        match self.remove.len() + self.add.len() {
            0 => return Ok(()),
            1 => return self.apply_each(keeper, asid),
            _ => {}
        }
        keeper.batch_begin(asid)?;
        let applied = self.apply_each(keeper, asid);
        applied.and(keeper.batch_end(asid))
    }

    fn apply_each(&self, keeper: &Keeper, asid: Asid) -> Result<()> {
        let removed: Vec<IovaRange> = self.remove.iter().map(|mapping| mapping.range).collect();
        keeper.unmap_all(asid, &removed)?;
        let added: Result<Vec<_>> = self
            .add
            .iter()
            .map(|(mapping, memory)| Ok((*mapping, memory.file().ok_or(Errno::FAULT)?.as_fd())))
            .collect();
        keeper.map_all(asid, &added?)
    }
}

/// A mapping as a keeper has it.
fn kept(entry: &Mapping<GuestMemory>) -> Result<KeptMapping> {
    match entry.memory.record() {
        MemoryRecord::Object { object, .. } => {
            Ok(KeptMapping { range: entry.range, perm: entry.perm, object: object.into() })
        }
        // The profile says that there is none.
        MemoryRecord::Private { .. } => Err(Errno::FAULT),
    }
}

fn is_same(before: &Mapping<GuestMemory>, after: &Mapping<GuestMemory>) -> bool {
    (before.range, before.perm) == (after.range, after.perm) && before.memory.same_object(0, &after.memory, 0)
}

#[cfg(test)]
mod tests {
    use vdpa_core::iotlb::RecordId;
    use vdpa_core::types::Perm;
    use vdpa_sys::guest::{ObjectFile, ObjectId};
    use vdpa_sys::memfd;

    use super::*;

    fn mapping(file: &Arc<ObjectFile>, iova: u64, offset: u64) -> Mapping<GuestMemory> {
        let object = ObjectId { dev_major: 0, dev_minor: 1, inode: 7, created_ns: 0, offset };
        let memory = GuestMemory::from_object(Arc::clone(file), object, 4096, true).unwrap();
        let range = IovaRange::from_size(iova, 4096).unwrap();
        Mapping { range, uaddr: 0, perm: Perm::RW, memory, stale: false, record: RecordId::default() }
    }

    fn table(file: &Arc<ObjectFile>, entries: &[(u64, u64)]) -> Table<GuestMemory> {
        entries.iter().map(|&(iova, offset)| mapping(file, iova, offset)).collect()
    }

    fn rows(change: &Change) -> (Vec<u64>, Vec<(u64, u64)>) {
        let add = change.add.iter().map(|(kept, _)| (kept.range.first(), kept.object.offset));
        (change.remove.iter().map(|kept| kept.range.first()).collect(), add.collect())
    }

    /// A daemon has died between a change of the device and the record of it, or the other way round.
    #[test]
    fn what_an_earlier_daemon_has_left_is_compared_by_its_objects() {
        let file = Arc::new(ObjectFile::new(memfd::create(c"ram", 1 << 20, None).unwrap()));
        let there: Vec<KeptMapping> = [(0x1000, 0), (0x2000, 4096), (0x3000, 8192)]
            .map(|(iova, at)| kept(&mapping(&file, iova, at)).unwrap())
            .into();
        let change = |entries| rows(&Change::between(&there, table(&file, entries).entries()).unwrap());
        assert_eq!(change(&[(0x1000, 0), (0x2000, 4096), (0x3000, 8192)]), (vec![], vec![]));
        assert_eq!(change(&[(0x1000, 0), (0x3000, 8192)]), (vec![0x2000], vec![]), "added, and not recorded");
        assert_eq!(
            change(&[(0x1000, 0), (0x2000, 12288), (0x3000, 8192), (0x4000, 4096)]),
            (vec![0x2000], vec![(0x2000, 12288), (0x4000, 4096)]),
            "other memory at the same address, and one that was removed and not recorded"
        );
        assert_eq!(change(&[]), (vec![0x1000, 0x2000, 0x3000], vec![]));
    }

    #[test]
    fn a_change_names_what_has_changed() {
        let file = Arc::new(ObjectFile::new(memfd::create(c"ram", 1 << 20, None).unwrap()));
        let before = table(&file, &[(0x1000, 0), (0x2000, 4096)]);
        let now = table(&file, &[(0x1000, 0), (0x2000, 8192), (0x5000, 0)]);
        let change = Change::since(before.entries(), now.entries()).unwrap();
        assert_eq!(rows(&change), (vec![0x2000], vec![(0x2000, 8192), (0x5000, 0)]));
        assert!(Change::since(now.entries(), now.entries()).unwrap().is_empty());
    }
}
