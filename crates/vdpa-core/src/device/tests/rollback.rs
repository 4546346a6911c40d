//! The table after a refused REMAP or a failed BATCH_END (uapi-spec 8.5, R2 to R7).

use super::{PAGE, Profile, Table};
use crate::errno::Errno;
use crate::inprocess::{InProcess, Node};
use crate::ops::VdpaOps;
use crate::testing::{RamBlk, TestObject, TestProcess};
use crate::types::{Asid, Perm};

const A0: Asid = Asid(0);
const REFUSED: Result<(), Errno> = Err(Errno::FAULT);

/// User addresses at which the owner has mapped the same four pages of one object.
#[derive(Clone, Copy)]
struct Addresses {
    /// One shared mapping.
    whole: u64,
    /// One shared mapping per page.
    split: u64,
    /// One mapping per page; the last page is private.
    most: u64,
    /// The first page is shared, the others private.
    first: u64,
    /// The first page is private, the others shared.
    rest: u64,
}

impl Addresses {
    fn of(process: &TestProcess) -> Self {
        let object = TestObject::new(4 * PAGE);
        let map = |parts: &[(u64, bool)]| {
            let (mut start, mut offset) = (None, 0);
            for &(pages, shared) in parts {
                let size = pages * PAGE;
                let at = match start {
                    None => process.map_part(&object, offset, size, shared),
                    Some(_) => process.map_next(&object, offset, size, shared),
                };
                start = start.or(Some(at));
                offset += size;
            }
            start.unwrap()
        };
        Self {
            whole: map(&[(4, true)]),
            split: map(&[(1, true); 4]),
            most: map(&[(1, true), (1, true), (1, true), (1, false)]),
            first: map(&[(1, true), (3, false)]),
            rest: map(&[(1, false), (3, true)]),
        }
    }
}

/// An open device that skips private memory, and its owner.
struct Rig {
    node: Node<RamBlk>,
    device: InProcess<RamBlk, TestProcess>,
    at: Addresses,
}

/// First page, pages, address.
type Row = (u64, u64, u64);

impl Rig {
    fn new(change: impl FnOnce(&mut Profile)) -> Self {
        let node = Node::new(RamBlk::new(1).with(|profile| {
            profile.identity_map = false;
            change(profile);
        }));
        let process = TestProcess::new();
        let at = Addresses::of(&process);
        let device = node.open(process).unwrap();
        device.set_owner().unwrap();
        Self { node, device, at }
    }

    /// A device that does not check whether REMAP names the same object.
    fn unverified() -> Self {
        Self::new(|profile| profile.verify_remap = false)
    }

    /// Such a device whose table has at most `entries` entries.
    fn with_table_limit(entries: usize) -> Self {
        Self::new(|profile| {
            profile.verify_remap = false;
            profile.max_iotlb_entries = entries;
        })
    }

    fn update(&self, page: u64, pages: u64, uaddr: u64) -> Result<(), Errno> {
        self.device.dma_map(A0, page * PAGE, pages * PAGE, uaddr, Perm::RW)
    }

    fn remap(&self, page: u64, pages: u64, uaddr: u64) -> Result<(), Errno> {
        self.device.dma_remap(A0, page * PAGE, pages * PAGE, uaddr)
    }

    fn invalidate(&self, page: u64) {
        self.device.dma_unmap(A0, page * PAGE, 1).unwrap();
    }

    fn begin(&self) {
        self.device.batch_begin(A0).unwrap();
    }

    fn refuse_next(&self) {
        self.node.with(|device| device.parent_mut().refuse_mappings(1));
    }

    /// The table with which the parent translates.
    fn rows(&self) -> Vec<Row> {
        assert_eq!(self.node.with(|device| device.check_invariants()), Ok(()));
        let row = |(first, last, uaddr): (u64, u64, u64)| (first / PAGE, (last + 1 - first) / PAGE, uaddr);
        self.node.with(|device| device.parent().mappings(A0)).into_iter().map(row).collect()
    }

    /// Ends the batch while the parent refuses its table; returns the table that the parent has afterwards.
    fn failed_end(&self) -> Vec<Row> {
        self.refuse_next();
        assert_eq!(self.device.batch_end(A0), REFUSED);
        self.rows()
    }
}

/// A REMAP may map fewer or more pages than before, because private pages have no entry.
#[test]
fn a_refused_remap_that_maps_less_or_more_leaves_the_table_as_it_was() {
    let at = Rig::unverified().at;
    let addresses = [at.whole, at.split, at.most, at.first, at.rest];
    for (from, to) in addresses.iter().flat_map(|from| addresses.map(|to| (*from, to))) {
        for batch in [false, true] {
            let rig = Rig::unverified();
            rig.update(0, 4, from).unwrap();
            let before = rig.rows();
            if batch {
                rig.begin();
                rig.remap(0, 4, to).unwrap();
                assert_eq!(rig.failed_end(), before, "{from:#x} {to:#x}");
            } else {
                rig.refuse_next();
                assert_eq!(rig.remap(0, 4, to), REFUSED);
                assert_eq!(rig.rows(), before, "{from:#x} {to:#x}");
            }
            assert_eq!(rig.remap(0, 4, to), Ok(()), "the record of the UPDATE is still whole");
        }
    }
}

/// INVALIDATE removes no entry, because the page is unmapped at that moment. The entry before the REMAP contains it.
#[test]
fn a_failed_end_does_not_restore_a_page_invalidated_while_unmapped() {
    let rig = Rig::unverified();
    rig.update(0, 2, rig.at.split).unwrap();
    rig.begin();
    rig.remap(0, 2, rig.at.first).unwrap();
    rig.invalidate(1);
    assert_eq!(rig.failed_end(), [(0, 1, rig.at.split)]);
    assert_eq!(rig.remap(0, 2, rig.at.split), REFUSED, "a part of the UPDATE was removed");
    assert_eq!(rig.remap(0, 1, rig.at.first), Ok(()));
}

/// INVALIDATE names one page of an entry of two pages.
#[test]
fn a_failed_end_restores_nothing_of_an_invalidated_entry() {
    let rig = Rig::unverified();
    rig.update(0, 2, rig.at.split).unwrap();
    rig.begin();
    rig.remap(0, 2, rig.at.whole).unwrap();
    rig.invalidate(0);
    assert_eq!(rig.failed_end(), []);
}

/// After the REMAP only one page of the UPDATE is mapped. It is invalidated; END restores the other page.
#[test]
fn a_failed_end_restores_the_rest_of_a_removed_record() {
    let rig = Rig::unverified();
    rig.update(0, 2, rig.at.split).unwrap();
    rig.begin();
    rig.remap(0, 2, rig.at.first).unwrap();
    rig.invalidate(0);
    assert_eq!(rig.failed_end(), [(1, 1, rig.at.split + PAGE)]);
}

#[test]
fn an_update_in_a_gap_left_by_a_remap_survives_a_failed_end() {
    let at = Rig::unverified().at;
    for (from, kept) in [(at.split, at.split), (at.whole, at.first)] {
        let rig = Rig::unverified();
        rig.update(0, 2, from).unwrap();
        rig.begin();
        rig.remap(0, 2, rig.at.first).unwrap();
        rig.update(1, 1, rig.at.whole).unwrap();
        assert_eq!(rig.failed_end(), [(0, 1, kept), (1, 1, rig.at.whole)], "{from:#x}");
        assert_eq!(rig.remap(1, 1, rig.at.split), Ok(()));
    }
}

#[test]
fn entries_restored_by_a_failed_end_are_stale_after_a_change_of_owner() {
    let rig = Rig::unverified();
    rig.update(0, 2, rig.at.whole).unwrap();
    rig.begin();
    rig.remap(0, 2, rig.at.split).unwrap();
    let successor = rig.device.for_caller(TestProcess::new());
    successor.new_owner().unwrap();
    rig.refuse_next();
    assert_eq!(successor.batch_end(A0), REFUSED);
    assert_eq!(rig.rows(), [], "the address is the old owner's");
    assert_eq!(rig.node.with(|device| device.mapped().stale), 1);
}

#[test]
fn a_failed_end_keeps_the_table_within_its_limit() {
    let rig = Rig::with_table_limit(4);
    rig.update(0, 2, rig.at.split).unwrap();
    rig.update(2, 2, rig.at.split).unwrap();
    rig.begin();
    rig.remap(0, 2, rig.at.whole).unwrap();
    assert_eq!(rig.update(4, 1, rig.at.whole), REFUSED, "3 entries now, 4 when END fails");
    assert_eq!(rig.failed_end().len(), 4);

    // Several entries may be needed to restore a part of one old entry.
    let rig = Rig::with_table_limit(6);
    rig.update(0, 4, rig.at.whole).unwrap();
    rig.update(4, 4, rig.at.split).unwrap();
    rig.update(8, 1, rig.at.whole).unwrap();
    rig.begin();
    rig.remap(4, 4, rig.at.first).unwrap();
    rig.remap(0, 4, rig.at.split).unwrap();
    rig.invalidate(0);
    assert_eq!(rig.failed_end().len(), 6, "one of three pages has no room");
}

/// A batch of any length needs no memory for mappings that are no longer in the table.
#[test]
fn a_batch_keeps_no_state_of_removed_mappings() {
    let rig = Rig::unverified();
    rig.begin();
    for _ in 0..3 {
        rig.update(0, 2, rig.at.whole).unwrap();
        rig.remap(0, 2, rig.at.first).unwrap();
        rig.invalidate(0);
        let kept = rig.node.with(|device| {
            let batch = device.batch.as_ref();
            batch.and_then(|batch| batch.without_remaps.as_ref()).map(Table::len)
        });
        assert_eq!(kept, Some(0));
    }
}

/// Entries that another UPDATE mapped in a gap of the record do not belong to it, even at lower addresses.
#[test]
fn a_remap_keeps_mappings_of_another_update_in_a_gap_of_its_record() {
    let at = Rig::new(|_| ()).at;
    for (from, gap, entry) in [
        (at.first, 1, (0, 1, at.first)),
        (at.first, 3, (0, 1, at.first)),
        (at.rest, 0, (1, 3, at.rest + PAGE)),
    ] {
        let rig = Rig::new(|_| ());
        rig.update(0, 4, from).unwrap();
        rig.update(gap, 1, at.whole).unwrap();
        assert_eq!(rig.remap(0, 4, from), Ok(()), "{from:#x}");
        let mut rows = [entry, (gap, 1, at.whole)];
        rows.sort_unstable();
        assert_eq!(rig.rows(), rows);
    }
}

#[test]
fn a_remap_keeps_the_table_within_its_limit() {
    let rig = Rig::with_table_limit(4);
    rig.update(0, 4, rig.at.first).unwrap();
    rig.update(3, 1, rig.at.whole).unwrap();
    rig.update(4, 1, rig.at.whole).unwrap();
    let before = rig.rows();
    assert_eq!(rig.remap(0, 4, rig.at.most), REFUSED, "the record would have 3 of 5 entries");
    assert_eq!(rig.rows(), before);
}
