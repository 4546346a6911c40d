//! What a refused REMAP or a failed END leaves behind (uapi-spec 8.5, R2 to R7).

use super::{PAGE, Profile, Table};
use crate::errno::Errno;
use crate::inprocess::{InProcess, Node};
use crate::ops::VdpaOps;
use crate::testing::{RamBlk, TestObject, TestProcess};
use crate::types::{Asid, Perm};

const A0: Asid = Asid(0);
const REFUSED: Result<(), Errno> = Err(Errno::FAULT);

/// Where an owner has four pages of one object. The same in every test.
#[derive(Clone, Copy)]
struct Addresses {
    /// In one mapping.
    whole: u64,
    /// Every page a mapping.
    split: u64,
    /// The same, but the last page is private.
    most: u64,
    /// The first page is shared, the others private.
    first: u64,
    /// The first page is private, the others shared.
    rest: u64,
}

impl Addresses {
    fn of(process: &TestProcess) -> Self {
        let object = TestObject::new(4 * PAGE);
        let map = |pieces: &[(u64, bool)]| {
            let (mut start, mut offset) = (None, 0);
            for &(pages, shared) in pieces {
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
struct Bench {
    node: Node<RamBlk>,
    device: InProcess<RamBlk, TestProcess>,
    at: Addresses,
}

/// First page, pages, address.
type Row = (u64, u64, u64);

impl Bench {
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

    /// A device that believes what it is told.
    fn unverified() -> Self {
        Self::new(|profile| profile.verify_remap = false)
    }

    /// Such a device with a small table.
    fn tight(entries: usize) -> Self {
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

    /// What the parent translates with now.
    fn rows(&self) -> Vec<Row> {
        assert_eq!(self.node.with(|device| device.check_invariants()), Ok(()));
        let row = |(first, last, uaddr): (u64, u64, u64)| (first / PAGE, (last + 1 - first) / PAGE, uaddr);
        self.node.with(|device| device.parent().mappings(A0)).into_iter().map(row).collect()
    }

    /// An END that the parent refuses: what it is given then.
    fn failed_end(&self) -> Vec<Row> {
        self.refuse_next();
        assert_eq!(self.device.batch_end(A0), REFUSED);
        self.rows()
    }
}

/// A REMAP may map less than before, or more: what is private has no entry.
#[test]
fn a_refused_remap_that_maps_less_or_more_leaves_the_table_as_it_was() {
    let at = Bench::unverified().at;
    let addresses = [at.whole, at.split, at.most, at.first, at.rest];
    for (from, to) in addresses.iter().flat_map(|from| addresses.map(|to| (*from, to))) {
        for batch in [false, true] {
            let bench = Bench::unverified();
            bench.update(0, 4, from).unwrap();
            let before = bench.rows();
            if batch {
                bench.begin();
                bench.remap(0, 4, to).unwrap();
                assert_eq!(bench.failed_end(), before, "{from:#x} {to:#x}");
            } else {
                bench.refuse_next();
                assert_eq!(bench.remap(0, 4, to), REFUSED);
                assert_eq!(bench.rows(), before, "{from:#x} {to:#x}");
            }
            assert_eq!(bench.remap(0, 4, to), Ok(()), "the UPDATE is still one");
        }
    }
}

/// The page is not mapped at that moment, so that nothing is removed; but the old entry has it.
#[test]
fn a_failed_end_does_not_bring_back_what_was_invalidated_while_out_of_the_table() {
    let bench = Bench::unverified();
    bench.update(0, 2, bench.at.split).unwrap();
    bench.begin();
    bench.remap(0, 2, bench.at.first).unwrap();
    bench.invalidate(1);
    assert_eq!(bench.failed_end(), [(0, 1, bench.at.split)]);
    assert_eq!(bench.remap(0, 2, bench.at.split), REFUSED, "a part of the UPDATE is gone");
    assert_eq!(bench.remap(0, 1, bench.at.first), Ok(()));
}

/// One page is named; the entry that goes has two.
#[test]
fn a_failed_end_brings_back_nothing_of_an_entry_that_was_invalidated() {
    let bench = Bench::unverified();
    bench.update(0, 2, bench.at.split).unwrap();
    bench.begin();
    bench.remap(0, 2, bench.at.whole).unwrap();
    bench.invalidate(0);
    assert_eq!(bench.failed_end(), []);
}

/// All that the REMAP has left of an UPDATE is invalidated; the rest of it comes back.
#[test]
fn a_failed_end_brings_back_the_rest_of_a_record_that_was_gone() {
    let bench = Bench::unverified();
    bench.update(0, 2, bench.at.split).unwrap();
    bench.begin();
    bench.remap(0, 2, bench.at.first).unwrap();
    bench.invalidate(0);
    assert_eq!(bench.failed_end(), [(1, 1, bench.at.split + PAGE)]);
}

#[test]
fn an_update_where_a_remap_has_made_room_stays_after_a_failed_end() {
    let at = Bench::unverified().at;
    for (from, kept) in [(at.split, at.split), (at.whole, at.first)] {
        let bench = Bench::unverified();
        bench.update(0, 2, from).unwrap();
        bench.begin();
        bench.remap(0, 2, bench.at.first).unwrap();
        bench.update(1, 1, bench.at.whole).unwrap();
        assert_eq!(bench.failed_end(), [(0, 1, kept), (1, 1, bench.at.whole)], "{from:#x}");
        assert_eq!(bench.remap(1, 1, bench.at.split), Ok(()));
    }
}

#[test]
fn entries_that_a_failed_end_brings_back_wait_for_the_owner_of_now() {
    let bench = Bench::unverified();
    bench.update(0, 2, bench.at.whole).unwrap();
    bench.begin();
    bench.remap(0, 2, bench.at.split).unwrap();
    let successor = bench.device.for_caller(TestProcess::new());
    successor.new_owner().unwrap();
    bench.refuse_next();
    assert_eq!(successor.batch_end(A0), REFUSED);
    assert_eq!(bench.rows(), [], "the address is the old owner's");
    assert_eq!(bench.node.with(|device| device.mapped().stale), 1);
}

#[test]
fn a_failed_end_fills_no_table_beyond_its_limit() {
    let bench = Bench::tight(4);
    bench.update(0, 2, bench.at.split).unwrap();
    bench.update(2, 2, bench.at.split).unwrap();
    bench.begin();
    bench.remap(0, 2, bench.at.whole).unwrap();
    assert_eq!(bench.update(4, 1, bench.at.whole), REFUSED, "3 entries now, 4 when END fails");
    assert_eq!(bench.failed_end().len(), 4);

    // What is left of an old entry may be more entries than that was.
    let bench = Bench::tight(6);
    bench.update(0, 4, bench.at.whole).unwrap();
    bench.update(4, 4, bench.at.split).unwrap();
    bench.update(8, 1, bench.at.whole).unwrap();
    bench.begin();
    bench.remap(4, 4, bench.at.first).unwrap();
    bench.remap(0, 4, bench.at.split).unwrap();
    bench.invalidate(0);
    assert_eq!(bench.failed_end().len(), 6, "one of three pages has no room");
}

/// Nothing of what is no longer mapped is held until END, however long the batch is.
#[test]
fn a_batch_remembers_nothing_that_is_gone() {
    let bench = Bench::unverified();
    bench.begin();
    for _ in 0..3 {
        bench.update(0, 2, bench.at.whole).unwrap();
        bench.remap(0, 2, bench.at.first).unwrap();
        bench.invalidate(0);
        let remembered = bench.node.with(|device| {
            let batch = device.batch.as_ref();
            batch.and_then(|batch| batch.without_remaps.as_ref()).map(Table::len)
        });
        assert_eq!(remembered, Some(0));
    }
}

/// What another UPDATE has put where a record has nothing is not the record's, even when it comes first.
#[test]
fn a_remap_leaves_alone_what_was_mapped_into_a_gap_of_its_record() {
    let at = Bench::new(|_| ()).at;
    for (from, gap, entry) in [
        (at.first, 1, (0, 1, at.first)),
        (at.first, 3, (0, 1, at.first)),
        (at.rest, 0, (1, 3, at.rest + PAGE)),
    ] {
        let bench = Bench::new(|_| ());
        bench.update(0, 4, from).unwrap();
        bench.update(gap, 1, at.whole).unwrap();
        assert_eq!(bench.remap(0, 4, from), Ok(()), "{from:#x}");
        let mut rows = [entry, (gap, 1, at.whole)];
        rows.sort_unstable();
        assert_eq!(bench.rows(), rows);
    }
}

#[test]
fn a_remap_fills_no_table_beyond_its_limit() {
    let bench = Bench::tight(4);
    bench.update(0, 4, bench.at.first).unwrap();
    bench.update(3, 1, bench.at.whole).unwrap();
    bench.update(4, 1, bench.at.whole).unwrap();
    let before = bench.rows();
    assert_eq!(bench.remap(0, 4, bench.at.most), REFUSED, "it would have 3 of 5");
    assert_eq!(bench.rows(), before);
}
