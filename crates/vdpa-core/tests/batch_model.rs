//! Batches against a naive model: UPDATE, INVALIDATE and REMAP in any order, in and out of batches, with a parent that
//! refuses now and then.
//!
//! The model knows pages only: a slot is four pages, each of which belongs to a fragment or to none.
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

/// First page, pages, and at which of the addresses of the object. Of address 1 the halves are two mappings.
type Fragment = (u64, u64, usize);

#[derive(Clone, Copy, Debug)]
enum Op {
    Begin,
    End,
    /// Maps a slot from one of the addresses.
    Update(u64, usize),
    /// Removes what overlaps one page.
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
    let part = prop_oneof![2 => Just(Part::Whole), 1 => Just(Part::Low), 1 => Just(Part::High)];
    prop_oneof![
        2 => Just(Op::Begin),
        2 => Just(Op::End),
        4 => (0..SLOTS, 0..2usize).prop_map(|(slot, at)| Op::Update(slot, at)),
        3 => (0..SLOTS, 0..4u64).prop_map(|(slot, page)| Op::Invalidate(slot, page)),
        5 => (0..SLOTS, part, 0..2usize).prop_map(|(slot, part, at)| Op::Remap(slot, part, at)),
        2 => (1..3u32).prop_map(Op::Refuse),
    ]
}

/// One UPDATE: its slot, what is left of it, and whether an INVALIDATE has taken a part.
#[derive(Clone, Debug)]
struct Record {
    slot: u64,
    fragments: Vec<Fragment>,
    broken: bool,
}

#[derive(Debug, Default)]
struct Model {
    table: bool,
    records: BTreeMap<u32, Record>,
    next: u32,
    /// In a batch: the fragments of each record before its first REMAP.
    batch: Option<BTreeMap<u32, Vec<Fragment>>>,
    refuse: u32,
    /// What the parent was given last.
    parent: Vec<(u64, Fragment)>,
}

fn split(first: u64, pages: u64, at: usize) -> Vec<Fragment> {
    if at == 1 && pages == 4 { vec![(0, 2, 1), (2, 2, 1)] } else { vec![(first, pages, at)] }
}

fn has(fragment: &Fragment, page: u64) -> bool {
    (fragment.0..fragment.0 + fragment.1).contains(&page)
}

impl Model {
    fn rows(&self) -> Vec<(u64, Fragment)> {
        let mut rows: Vec<_> = self
            .records
            .values()
            .flat_map(|record| record.fragments.iter().map(|fragment| (record.slot, *fragment)))
            .collect();
        rows.sort_unstable();
        rows
    }

    fn tell(&mut self) -> Result<(), Errno> {
        if self.refuse > 0 {
            self.refuse -= 1;
            return Err(Errno::FAULT);
        }
        self.parent = self.rows();
        Ok(())
    }

    fn in_slot(&self, slot: u64) -> impl Iterator<Item = (&u32, &Record)> {
        self.records.iter().filter(move |(_, record)| record.slot == slot)
    }

    fn step(&mut self, op: Op) -> Result<(), Errno> {
        match op {
            Op::Refuse(count) => self.refuse = count,
            Op::Begin => {
                self.table = true;
                self.batch.get_or_insert_default();
            }
            Op::Update(slot, at) => return self.update(slot, at),
            _ if !self.table => return Err(Errno::FAULT),
            Op::Invalidate(slot, page) => {
                for record in self.records.values_mut().filter(|record| record.slot == slot) {
                    let before = record.fragments.len();
                    record.fragments.retain(|fragment| !has(fragment, page));
                    record.broken |= record.fragments.len() < before;
                }
                self.records.retain(|_, record| !record.fragments.is_empty());
                if self.batch.is_none() {
                    let _ = self.tell();
                }
            }
            Op::Remap(slot, part, at) => return self.remap(slot, part, at),
            Op::End => return self.end(),
        }
        Ok(())
    }

    fn update(&mut self, slot: u64, at: usize) -> Result<(), Errno> {
        self.table = true;
        if self.in_slot(slot).next().is_some() {
            return Err(Errno::FAULT);
        }
        let id = self.next;
        self.next += 1;
        self.records.insert(id, Record { slot, fragments: split(0, 4, at), broken: false });
        if self.batch.is_none() && self.tell().is_err() {
            self.records.remove(&id);
            let _ = self.tell();
            return Err(Errno::FAULT);
        }
        Ok(())
    }

    fn remap(&mut self, slot: u64, part: Part, at: usize) -> Result<(), Errno> {
        let (first, pages) = part.pages();
        let found = self.in_slot(slot).next().map(|(id, record)| (*id, record.clone()));
        let (id, mut record) = found.ok_or(Errno::FAULT)?;
        let before = record.fragments.clone();
        let exact = record.fragments.iter().position(|f| (f.0, f.1) == (first, pages));
        if pages == 4 && !record.broken {
            record.fragments.clear();
        } else {
            record.fragments.remove(exact.ok_or(Errno::FAULT)?);
        }
        record.fragments.extend(split(first, pages, at));
        record.fragments.sort_unstable();
        self.records.insert(id, record);
        match &mut self.batch {
            Some(saved) => {
                saved.entry(id).or_insert(before);
                Ok(())
            }
            None => self.tell().inspect_err(|_| {
                if let Some(record) = self.records.get_mut(&id) {
                    record.fragments = before;
                }
                let _ = self.tell();
            }),
        }
    }

    fn end(&mut self) -> Result<(), Errno> {
        let Some(saved) = self.batch.take() else { return Ok(()) };
        let remapped = !saved.is_empty();
        if self.tell().is_ok() {
            return Ok(());
        }
        for (id, before) in saved {
            let Some(record) = self.records.get_mut(&id) else { continue };
            let left = std::mem::take(&mut record.fragments);
            let mapped = |page| left.iter().any(|fragment| has(fragment, page));
            let back: Vec<_> = before.into_iter().filter(|old| (old.0..old.0 + old.1).all(mapped)).collect();
            let free =
                |new: &&Fragment| (new.0..new.0 + new.1).all(|page| !back.iter().any(|old| has(old, page)));
            record.fragments = left.iter().filter(free).copied().collect();
            record.fragments.extend(back);
            record.fragments.sort_unstable();
        }
        let _ = self.tell();
        if remapped { Err(Errno::FAULT) } else { Ok(()) }
    }
}

struct Real {
    node: Node<RamBlk>,
    device: InProcess<RamBlk, TestProcess>,
    uaddrs: [u64; 2],
}

impl Real {
    fn new() -> Self {
        let node = Node::new(RamBlk::new(1).with(|profile| profile.identity_map = false));
        let (process, object) = (TestProcess::new(), TestObject::new(4 * PAGE));
        let whole = process.map(&object);
        let halves = process.map_part(&object, 0, 2 * PAGE, true);
        let _ = process.map_next(&object, 2 * PAGE, 2 * PAGE, true);
        let device = node.open(process).unwrap();
        device.set_owner().unwrap();
        Self { node, device, uaddrs: [whole, halves] }
    }

    fn step(&self, op: Op) -> Result<(), Errno> {
        let iova = |slot: u64, page: u64| (slot << 20) + page * PAGE;
        match op {
            Op::Begin => self.device.batch_begin(A0),
            Op::End => self.device.batch_end(A0),
            Op::Update(slot, at) => {
                self.device.dma_map(A0, iova(slot, 0), 4 * PAGE, self.uaddrs[at], Perm::RW)
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
            let at = usize::from(uaddr >= self.uaddrs[1]);
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
            prop_assert_eq!(real.node.with(|device| device.mapped().entries), model.rows().len());
        }
    }
}
