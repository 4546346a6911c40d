//! Batches compared with a naive model: UPDATE, INVALIDATE and REMAP in any order, inside and outside of batches, with a
//! parent that refuses some of the tables.
//!
//! The model works on pages: a slot has four pages, each of which belongs to a fragment or to none. A REMAP may map fewer
//! or more pages than before, because private memory is skipped.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its device must fail")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use vdpa_core::Errno;
use vdpa_core::inprocess::{InProcess, Node};
use vdpa_core::ops::VdpaOps;
use vdpa_core::testing::{RamBlk, TestObject, TestProcess};
use vdpa_core::types::{Asid, Perm};

const PAGE: u64 = 4096;
const SLOTS: u64 = 2;
const A0: Asid = Asid(0);

/// First page, number of pages, and index of the user address at which the object is mapped: 0 is one mapping, 1 has a
/// mapping for each half, at 2 the high half is private, and at 3 the low half.
type Fragment = (u64, u64, usize);

#[derive(Clone, Copy, Debug)]
enum Op {
    Begin,
    End,
    /// Maps a part of a slot from one of the addresses.
    Update(u64, Part, usize),
    /// Removes the fragments that contain one page.
    Invalidate(u64, u64),
    /// Remaps a part of a slot to one of the addresses.
    Remap(u64, Part, usize),
    /// The parent refuses the next tables.
    Refuse(u32),
}

#[derive(Clone, Copy, Debug)]
enum Part {
    Whole,
    Low,
    High,
}

impl Part {
    const fn pages(self) -> (u64, u64) {
        match self {
            Self::Whole => (0, 4),
            Self::Low => (0, 2),
            Self::High => (2, 2),
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    let part = || prop_oneof![2 => Just(Part::Whole), 1 => Just(Part::Low), 1 => Just(Part::High)];
    prop_oneof![
        2 => Just(Op::Begin),
        2 => Just(Op::End),
        4 => (0..SLOTS, part(), 0..4usize).prop_map(|(slot, part, at)| Op::Update(slot, part, at)),
        3 => (0..SLOTS, 0..4u64).prop_map(|(slot, page)| Op::Invalidate(slot, page)),
        5 => (0..SLOTS, part(), 0..4usize).prop_map(|(slot, part, at)| Op::Remap(slot, part, at)),
        2 => (1..3u32).prop_map(Op::Refuse),
    ]
}

/// One UPDATE: its slot and pages, the fragments that are left, and whether an INVALIDATE removed a part.
#[derive(Clone, Debug)]
struct Record {
    slot: u64,
    pages: (u64, u64),
    fragments: Vec<Fragment>,
    broken: bool,
}

type Records = BTreeMap<u32, Record>;

#[derive(Debug, Default)]
struct Model {
    table: bool,
    records: Records,
    next: u32,
    /// `Some` in a batch. From the first REMAP of the batch on: the records as they would be without its REMAPs.
    batch: Option<Option<Records>>,
    refuse: u32,
    /// The table that the parent accepted last.
    parent: Vec<(u64, Fragment)>,
}

fn split((first, pages): (u64, u64), at: usize) -> Vec<Fragment> {
    match (at, first, pages) {
        (1, 0, 4) => vec![(0, 2, 1), (2, 2, 1)],
        (2, 0, _) => vec![(0, 2, 2)],
        (3, _, 4) | (3, 2, _) => vec![(2, 2, 3)],
        (2 | 3, ..) => vec![],
        _ => vec![(first, pages, at)],
    }
}

fn pages(fragment: &Fragment) -> std::ops::Range<u64> {
    fragment.0..fragment.0 + fragment.1
}

fn rows(records: &Records) -> Vec<(u64, Fragment)> {
    let row = |record: &Record| record.fragments.iter().map(|f| (record.slot, *f)).collect::<Vec<_>>();
    let mut rows: Vec<_> = records.values().flat_map(row).collect();
    rows.sort_unstable();
    rows
}

fn in_slot(records: &Records, slot: u64) -> Vec<Fragment> {
    rows(records).into_iter().filter(|row| row.0 == slot).map(|row| row.1).collect()
}

fn overlaps(fragments: &[Fragment], taken: &[u64]) -> bool {
    fragments.iter().flat_map(pages).any(|page| taken.contains(&page))
}

/// Removes the fragments that contain one of the pages, and returns all pages of these fragments.
fn take(records: &mut Records, slot: u64, taken: &[u64]) -> Vec<u64> {
    let mut removed = Vec::new();
    for record in records.values_mut().filter(|record| record.slot == slot) {
        let (out, left) = record.fragments.iter().partition(|fragment| overlaps(&[**fragment], taken));
        record.fragments = left;
        record.broken |= !Vec::is_empty(&out);
        removed.extend(out.iter().flat_map(pages));
    }
    records.retain(|_, record| !record.fragments.is_empty());
    removed
}

/// Copies the fragments of `from` that contain one of the pages and do not overlap a fragment of `to`.
fn copy(from: &Records, to: &mut Records, slot: u64, wanted: &[u64]) {
    for (id, record) in from.iter().filter(|(_, record)| record.slot == slot) {
        for fragment in record.fragments.iter().filter(|fragment| overlaps(&[**fragment], wanted)) {
            if !overlaps(&in_slot(to, slot), &pages(fragment).collect::<Vec<_>>()) {
                let copy = to.entry(*id).or_insert(Record { fragments: Vec::new(), ..record.clone() });
                copy.fragments.push(*fragment);
                copy.fragments.sort_unstable();
            }
        }
    }
}

impl Model {
    fn set_map(&mut self) -> Result<(), Errno> {
        if self.refuse > 0 {
            self.refuse -= 1;
            return Err(Errno::FAULT);
        }
        self.parent = rows(&self.records);
        Ok(())
    }

    fn step(&mut self, op: Op) -> Result<(), Errno> {
        match op {
            Op::Refuse(count) => self.refuse = count,
            Op::Begin => {
                self.table = true;
                self.batch.get_or_insert_default();
            }
            Op::Update(slot, part, at) => return self.update(slot, part, at),
            _ if !self.table => return Err(Errno::FAULT),
            Op::Invalidate(slot, page) => {
                let mut removed = take(&mut self.records, slot, &[page]);
                removed.push(page);
                self.update_rollback(slot, &removed, &[]);
                if self.batch.is_none() {
                    let _ = self.set_map();
                }
            }
            Op::Remap(slot, part, at) => return self.remap(slot, part, at),
            Op::End => return self.end(),
        }
        Ok(())
    }

    /// Updates the records that a failed END restores: they lose the fragments with these pages, and get the present
    /// fragments in their place.
    fn update_rollback(&mut self, slot: u64, taken: &[u64], added: &[u64]) {
        if let Some(Some(other)) = &mut self.batch {
            let lost = take(other, slot, taken);
            copy(&self.records, other, slot, &[&lost, added].concat());
        }
    }

    fn update(&mut self, slot: u64, part: Part, at: usize) -> Result<(), Errno> {
        self.table = true;
        let (first, count) = part.pages();
        let wanted: Vec<_> = (first..first + count).collect();
        if overlaps(&in_slot(&self.records, slot), &wanted) {
            return Err(Errno::FAULT);
        }
        let (id, fragments) = (self.next, split(part.pages(), at));
        self.next += 1;
        if fragments.is_empty() {
            return Ok(());
        }
        let added: Vec<_> = fragments.iter().flat_map(pages).collect();
        self.records.insert(id, Record { slot, pages: part.pages(), fragments, broken: false });
        self.update_rollback(slot, &added, &added);
        if self.batch.is_none() && self.set_map().is_err() {
            self.records.remove(&id);
            let _ = self.set_map();
            return Err(Errno::FAULT);
        }
        Ok(())
    }

    fn remap(&mut self, slot: u64, part: Part, at: usize) -> Result<(), Errno> {
        let (first, count) = part.pages();
        let wanted: Vec<_> = (first..first + count).collect();
        let hits =
            in_slot(&self.records, slot).into_iter().filter(|fragment| overlaps(&[*fragment], &wanted));
        let hits: Vec<_> = hits.collect();
        let of = |hit: Fragment| {
            self.records
                .iter()
                .find(move |(_, record)| record.slot == slot && record.fragments.contains(&hit))
        };
        let is_whole = |record: &Record| record.pages == part.pages() && !record.broken;
        // Two records may have the same range, each in the gaps of the other. REMAP means the one with the lower entry.
        let by_range = hits.iter().copied().filter_map(of).find(|(_, record)| is_whole(record));
        let hit = hits.first().copied().filter(|hit| (hit.0, hit.1) == part.pages());
        let found = by_range.or_else(|| of(hit?));
        let (id, mut record) = found.map(|(id, record)| (*id, record.clone())).ok_or(Errno::FAULT)?;
        let whole = is_whole(&record);
        record.fragments.retain(|fragment| !whole && hit != Some(*fragment));
        let new = split(part.pages(), at);
        let others: Records =
            self.records.iter().filter(|(other, _)| **other != id).map(|(id, r)| (*id, r.clone())).collect();
        let in_others = overlaps(&in_slot(&others, slot), &new.iter().flat_map(pages).collect::<Vec<_>>());
        if new.is_empty() || in_others {
            return Err(Errno::FAULT);
        }
        record.fragments.extend(new);
        record.fragments.sort_unstable();
        let before = self.records.clone();
        self.records.insert(id, record);
        match &mut self.batch {
            Some(other) => {
                other.get_or_insert(before);
                Ok(())
            }
            None => self.set_map().inspect_err(|_| {
                self.records = before;
                let _ = self.set_map();
            }),
        }
    }

    fn end(&mut self) -> Result<(), Errno> {
        let Some(other) = self.batch.take() else { return Ok(()) };
        if self.set_map().is_ok() {
            return Ok(());
        }
        let remapped = other.is_some();
        if let Some(other) = other {
            self.records = other;
        }
        let _ = self.set_map();
        if remapped { Err(Errno::FAULT) } else { Ok(()) }
    }
}

struct Real {
    node: Node<RamBlk>,
    device: InProcess<RamBlk, TestProcess>,
    uaddrs: [u64; 4],
}

impl Real {
    fn new() -> Self {
        let node = Node::new(RamBlk::new(1).with(|profile| {
            profile.identity_map = false;
            profile.verify_remap = false;
        }));
        let (process, object) = (TestProcess::new(), TestObject::new(4 * PAGE));
        let whole = process.map(&object);
        let halves = process.map_part(&object, 0, 2 * PAGE, true);
        let _ = process.map_next(&object, 2 * PAGE, 2 * PAGE, true);
        let partly = process.map_part(&object, 0, 2 * PAGE, true);
        let _ = process.map_next(&object, 2 * PAGE, 2 * PAGE, false);
        let rest = process.map_part(&object, 0, 2 * PAGE, false);
        let _ = process.map_next(&object, 2 * PAGE, 2 * PAGE, true);
        let device = node.open(process).unwrap();
        device.set_owner().unwrap();
        Self { node, device, uaddrs: [whole, halves, partly, rest] }
    }

    fn step(&self, op: Op) -> Result<(), Errno> {
        let iova = |slot: u64, page: u64| (slot << 20) + page * PAGE;
        match op {
            Op::Begin => self.device.batch_begin(A0),
            Op::End => self.device.batch_end(A0),
            Op::Update(slot, part, at) => {
                let (first, pages) = part.pages();
                let uaddr = self.uaddrs[at] + first * PAGE;
                self.device.dma_map(A0, iova(slot, first), pages * PAGE, uaddr, Perm::RW)
            }
            Op::Invalidate(slot, page) => self.device.dma_unmap(A0, iova(slot, page), 1),
            Op::Remap(slot, part, at) => {
                let (first, pages) = part.pages();
                self.device.dma_remap(A0, iova(slot, first), pages * PAGE, self.uaddrs[at] + first * PAGE)
            }
            Op::Refuse(count) => {
                self.node.with(|device| device.parent_mut().refuse_mappings(count));
                Ok(())
            }
        }
    }

    fn rows(&self) -> Vec<(u64, Fragment)> {
        let row = |(first, last, uaddr): (u64, u64, u64)| {
            let at = self.uaddrs.partition_point(|&start| start <= uaddr) - 1;
            (first >> 20, ((first & 0xf_ffff) / PAGE, (last + 1 - first) / PAGE, at))
        };
        self.node.with(|device| device.parent().mappings(A0)).into_iter().map(row).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]
    #[test]
    fn batches_agree_with_the_model(ops in prop::collection::vec(op(), 0..60)) {
        let real = Real::new();
        let mut model = Model::default();
        for op in ops {
            prop_assert_eq!(real.step(op), model.step(op), "{:?} {:?}", op, model);
            prop_assert_eq!(real.rows(), model.parent.clone(), "{:?} {:?}", op, model);
            prop_assert_eq!(real.node.with(|device| device.mapped().entries), rows(&model.records).len());
        }
    }
}
