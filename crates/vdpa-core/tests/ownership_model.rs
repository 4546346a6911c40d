//! Ownership compared with a naive model: two processes that have one device open become its owner, map memory, exec and
//! close in any order.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its device must fail")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use vdpa_core::Errno;
use vdpa_core::inprocess::{InProcess, Node};
use vdpa_core::ops::VdpaOps;
use vdpa_core::parent::AddressMode;
use vdpa_core::testing::{RamBlk, TestObject, TestProcess};
use vdpa_core::types::{Asid, Perm, QueueIndex};

const PAGE: u64 = 4096;
/// Objects both processes have mapped; number `i` has `i + 1` pages.
const SLOTS: usize = 4;

#[derive(Clone, Copy, Debug)]
enum Op {
    SetOwner,
    NewOwner,
    ResetOwner,
    Map(usize),
    Unmap(usize),
    VringNum,
    Limit(u64),
    Exec,
    /// Both close, and the device is opened again.
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => Just(Op::SetOwner),
        4 => Just(Op::NewOwner),
        1 => Just(Op::ResetOwner),
        5 => (0..SLOTS).prop_map(Op::Map),
        2 => (0..SLOTS).prop_map(Op::Unmap),
        2 => Just(Op::VringNum),
        2 => (0u64..12).prop_map(Op::Limit),
        2 => Just(Op::Exec),
        1 => Just(Op::Reopen),
    ]
}

/// The state of the device and of its two processes. An address space is a number.
#[derive(Debug)]
struct Model {
    spaces: [usize; 2],
    next: usize,
    limits: [u64; 2],
    owner: Option<usize>,
    table: bool,
    mapped: [bool; SLOTS],
    charged: BTreeMap<usize, u64>,
}

impl Model {
    fn pins(&self) -> u64 {
        (0..SLOTS).filter(|&slot| self.mapped[slot]).map(pages).sum()
    }

    fn clear_owner(&mut self) {
        if let Some(owner) = self.owner.take() {
            *self.charged.entry(owner).or_default() -= self.pins();
        }
        (self.table, self.mapped) = (false, [false; SLOTS]);
    }

    fn step(&mut self, who: usize, op: Op) -> Result<(), Errno> {
        let caller = self.spaces[who];
        let is_owner = self.owner == Some(caller);
        let fits = |charge: u64| {
            charge == 0 || self.charged.get(&caller).copied().unwrap_or(0) + charge <= self.limits[who]
        };
        match op {
            Op::SetOwner if self.owner.is_some() => return Err(Errno::BUSY),
            Op::SetOwner => self.owner = Some(caller),
            Op::NewOwner => {
                let old = self.owner.ok_or(Errno::INVAL)?;
                if is_owner {
                    return Err(Errno::BUSY);
                }
                if !fits(self.pins()) {
                    return Err(Errno::NOMEM);
                }
                *self.charged.entry(old).or_default() -= self.pins();
                *self.charged.entry(caller).or_default() += self.pins();
                self.owner = Some(caller);
            }
            Op::ResetOwner | Op::VringNum if !is_owner => return Err(Errno::PERM),
            Op::ResetOwner => self.clear_owner(),
            Op::VringNum => {}
            Op::Map(_) | Op::Unmap(_) if !is_owner => return Err(Errno::FAULT),
            Op::Map(slot) => {
                self.table = true;
                if self.mapped[slot] || !fits(pages(slot)) {
                    return Err(Errno::FAULT);
                }
                self.mapped[slot] = true;
                *self.charged.entry(caller).or_default() += pages(slot);
            }
            Op::Unmap(_) if !self.table => return Err(Errno::FAULT),
            Op::Unmap(slot) => {
                if std::mem::take(&mut self.mapped[slot]) {
                    *self.charged.entry(caller).or_default() -= pages(slot);
                }
            }
            Op::Limit(limit) => self.limits[who] = limit,
            Op::Exec => {
                self.spaces[who] = self.next;
                self.next += 1;
            }
            Op::Reopen => self.clear_owner(),
        }
        Ok(())
    }
}

fn pages(slot: usize) -> u64 {
    slot as u64 + 1
}

fn iova(slot: usize) -> u64 {
    (slot as u64) << 20
}

/// The device under test and its two processes.
struct Real {
    node: Node<RamBlk>,
    processes: [TestProcess; 2],
    handles: Option<[InProcess<RamBlk, TestProcess>; 2]>,
    objects: Vec<TestObject>,
    uaddrs: [Vec<u64>; 2],
}

impl Real {
    fn new() -> Self {
        let blk = RamBlk::new(1).with(|profile| {
            profile.address_mode = AddressMode::PinnedPages;
            profile.reset_owner = true;
        });
        let processes = [TestProcess::new(), TestProcess::new()];
        let objects = (0..SLOTS).map(|slot| TestObject::new(pages(slot) * PAGE)).collect();
        let mut real =
            Self { node: Node::new(blk), processes, handles: None, objects, uaddrs: [vec![], vec![]] };
        (0..2).for_each(|who| real.map_objects(who));
        real.open();
        real
    }

    fn open(&mut self) {
        self.handles = None;
        let first = self.node.open(self.processes[0].clone()).unwrap();
        let second = first.for_caller(self.processes[1].clone());
        self.handles = Some([first, second]);
    }

    fn map_objects(&mut self, who: usize) {
        self.uaddrs[who] = self.objects.iter().map(|object| self.processes[who].map(object)).collect();
    }

    fn step(&mut self, who: usize, op: Op) -> Result<(), Errno> {
        let device = &self.handles.as_ref().unwrap()[who];
        match op {
            Op::SetOwner => device.set_owner(),
            Op::NewOwner => device.new_owner(),
            Op::ResetOwner => device.reset_owner(),
            Op::Map(slot) => {
                device.dma_map(Asid(0), iova(slot), pages(slot) * PAGE, self.uaddrs[who][slot], Perm::RW)
            }
            Op::Unmap(slot) => device.dma_unmap(Asid(0), iova(slot), 1),
            Op::VringNum => device.set_vring_num(QueueIndex(0), 8),
            Op::Limit(limit) => {
                self.processes[who].set_memlock_pages(limit);
                Ok(())
            }
            Op::Exec => {
                self.processes[who].exec();
                self.map_objects(who);
                Ok(())
            }
            Op::Reopen => {
                self.open();
                Ok(())
            }
        }
    }
}

proptest! {
    #[test]
    fn ownership_and_charges_agree_with_the_model(ops in prop::collection::vec((0..2usize, op()), 0..80)) {
        let mut real = Real::new();
        let mut model = Model {
            spaces: [0, 1],
            next: 2,
            limits: [u64::MAX; 2],
            owner: None,
            table: false,
            mapped: [false; SLOTS],
            charged: BTreeMap::new(),
        };
        for (who, op) in ops {
            prop_assert_eq!(real.step(who, op), model.step(who, op), "{} {:?} {:?}", who, op, model);
            prop_assert_eq!(real.node.with(|device| device.pinned_pages()), model.pins());
            for who in 0..2 {
                let charged = model.charged.get(&model.spaces[who]).copied().unwrap_or(0);
                prop_assert_eq!(real.processes[who].pinned_pages(), charged);
            }
            let mapped: Vec<u64> = (0..SLOTS).filter(|&slot| model.mapped[slot]).map(iova).collect();
            let seen = real.node.with(|device| device.parent().mappings(Asid(0)));
            prop_assert_eq!(seen.iter().map(|entry| entry.0).collect::<Vec<_>>(), mapped);
        }
    }
}
