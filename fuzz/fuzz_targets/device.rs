//! Any requests by processes that fork, exec and lose their limits, against the invariants of ARCHITECTURE.md.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vdpa_core::device::Device;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::host::{PAGE_SIZE, PinAccount};
use vdpa_core::parent::{AddressMode, CompatReset, PinLimit, PrivateMemory, Profile};
use vdpa_core::types::{Asid, GroupIndex, IotlbMsg, IovaRange, Perm, QueueIndex, VringAddr, iotlb_type};
use vdpa_fuzz::parent::{FuzzParent, Way};
use vdpa_fuzz::process::{BASE, Bell, Process, Vma};

#[derive(Arbitrary, Debug)]
struct Input {
    kind: Kind,
    first: [Vma; 4],
    second: [Vma; 4],
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug)]
struct Kind {
    way: Way,
    mode: u8,
    live: bool,
    suspend: bool,
    resume: bool,
    reset_map: bool,
    clean: bool,
    skip_private: bool,
    entries: u8,
    verify_remap: bool,
    strict_new_owner: bool,
    status_unsuspends: bool,
    report_batch_errors: bool,
    identity_map: bool,
    reset_owner: bool,
    two_groups: bool,
    last_page: Option<u8>,
    own_limit: Option<u8>,
}

/// Who acts: one of two processes.
type Who = bool;

#[derive(Arbitrary, Debug)]
enum Op {
    Open,
    Release,
    SetOwner(Who),
    ResetOwner(Who),
    NewOwner(Who),
    ForkFromOwner(u8),
    /// The process gets a new address space, with other mappings.
    Exec(Who, [Vma; 4]),
    /// The other process becomes a child of this one.
    Fork(Who),
    Limit(Who, u8),
    Hide(Who, bool),
    Status(u8),
    /// All status bits a running driver has set.
    DriverOk,
    /// Everything it takes to run a queue.
    BringUp(Who, u8),
    Features(u64),
    GoodFeatures,
    Backend(u16),
    Suspend,
    Resume,
    Num(Who, u8, u32),
    GoodNum(Who, u8, u8),
    Addr(Who, u8, [u64; 4], u8),
    GoodAddr(Who, u8),
    Base(Who, u8, u32),
    GetBase(Who, u8),
    Enable(Who, u8, bool),
    Kick(Who, u8, bool),
    Call(Who, u8, bool),
    Error(Who, u8, bool),
    Size(Who, u8),
    Group(Who, u8),
    GroupAsid(Who, u8, u8),
    Config(u32, u8),
    SetConfig(u32, u8),
    ConfigCall(bool),
    /// A message about few pages, so that ranges meet.
    Pages {
        who: Who,
        asid: bool,
        kind: u8,
        iova: u8,
        pages: u8,
        at: u8,
        perm: u8,
    },
    /// A message about bytes anywhere.
    Bytes {
        who: Who,
        asid: u32,
        kind: u8,
        iova: u64,
        size: u64,
        uaddr: u64,
        perm: u8,
    },
    /// The parent refuses this many translations.
    RefuseMaps(u8),
    RefuseOwner(bool),
    RefuseStart(bool),
    RefuseStop(bool),
}

impl Op {
    fn needs_no_file(&self) -> bool {
        let processes = matches!(self, Self::Exec(..) | Self::Fork(_) | Self::Limit(..) | Self::Hide(..));
        let parent = matches!(
            self,
            Self::RefuseMaps(_) | Self::RefuseOwner(_) | Self::RefuseStart(_) | Self::RefuseStop(_)
        );
        processes || parent || matches!(self, Self::Open | Self::Release)
    }
}

fn profile(kind: &Kind) -> Profile {
    let address_mode = match kind.mode % 4 {
        0 => AddressMode::OwnerAddresses,
        1 => AddressMode::Objects,
        2 => AddressMode::Pinned,
        _ => AddressMode::PinnedPages,
    };
    let mut backend_features = BackendFeatures::of(&[BackendFeatures::ENABLE_AFTER_DRIVER_OK]);
    if kind.live {
        backend_features = backend_features.with(BackendFeatures::NEW_OWNER);
        if address_mode == AddressMode::OwnerAddresses {
            backend_features = backend_features.with(BackendFeatures::IOTLB_REMAP);
        }
    }
    let groups = 1 + u32::from(kind.two_groups);
    Profile {
        device_id: 2,
        vendor_id: 0,
        features: Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]),
        backend_features,
        queues: 3,
        queue_size_max: 256,
        queue_groups: vec![GroupIndex(0), GroupIndex(groups - 1)],
        groups,
        address_spaces: 2,
        iova_range: kind.last_page.map_or(IovaRange::ALL, |last| {
            IovaRange::new(0, (u64::from(last) + 1) * PAGE_SIZE - 1).expect("not empty")
        }),
        config_size: 60,
        suspend: kind.suspend,
        resume: kind.resume,
        vring_size: true,
        reset_map: kind.reset_map,
        compat_reset: if kind.clean { CompatReset::Clean } else { CompatReset::Keep },
        address_mode,
        pin_limit: kind.own_limit.map_or(PinLimit::Rlimit, |limit| PinLimit::Pages(limit.into())),
        private_memory: if kind.skip_private { PrivateMemory::Skip } else { PrivateMemory::Copy },
        max_iotlb_entries: usize::from(kind.entries % 16) + 1,
        verify_remap: kind.verify_remap,
        strict_new_owner: kind.strict_new_owner,
        status_unsuspends: kind.status_unsuspends,
        report_batch_errors: kind.report_batch_errors,
        identity_map: kind.identity_map,
        reset_owner: kind.reset_owner,
    }
}

struct World {
    device: Device<FuzzParent>,
    processes: [Process; 2],
    next_id: u32,
    accounts: Vec<Arc<PinAccount>>,
    /// The tables when the open batch began, as long as it has had nothing but REMAPs.
    at_begin: Option<Tables>,
}

impl World {
    fn new(input: &Input) -> Self {
        let processes = [Process::new(0, &input.first), Process::new(1, &input.second)];
        let accounts = processes.iter().map(|process| Arc::clone(&process.space.account)).collect();
        let parent = FuzzParent::new(profile(&input.kind), input.kind.way);
        Self { device: Device::new(parent), processes, next_id: 2, accounts, at_begin: None }
    }

    fn become_new(&mut self, who: Who, make: impl FnOnce(u32) -> Process) {
        let process = make(self.next_id);
        self.next_id += 1;
        self.accounts.push(Arc::clone(&process.space.account));
        self.processes[usize::from(who)] = process;
    }

    /// Carries out one operation; whatever it answers is right as long as the invariants hold.
    fn apply(&mut self, op: &Op) {
        // A device that is closed has no file through which a request could come.
        if !self.device.is_open() && !op.needs_no_file() {
            return;
        }
        let Self { device, processes, .. } = self;
        let caller = |who: Who| &processes[usize::from(who)];
        let bell = |some: bool| some.then_some(Bell);
        let q = |index: u8| QueueIndex(u16::from(index % 4));
        match *op {
            Op::Open => drop(device.open()),
            Op::Release => device.release(),
            Op::SetOwner(who) => drop(device.set_owner(caller(who))),
            Op::ResetOwner(who) => drop(device.reset_owner(caller(who))),
            Op::NewOwner(who) => self.new_owner(who),
            Op::ForkFromOwner(value) => drop(device.set_fork_from_owner(value)),
            Op::Exec(who, ref vmas) => self.become_new(who, |id| Process::new(id, vmas)),
            Op::Fork(who) => {
                let parent = caller(who).clone();
                self.become_new(!who, |id| parent.fork(id));
            }
            Op::Limit(who, pages) => processes[usize::from(who)].limit = pages.into(),
            Op::Hide(who, hidden) => processes[usize::from(who)].hidden = hidden,
            Op::Status(status) => drop(device.set_status(Status(status))),
            Op::DriverOk => drop(device.set_status(Status(0xf))),
            Op::BringUp(who, index) => {
                let _ = device.set_owner(caller(who));
                let _ = device.set_features(Features(0x3_0000_0000));
                let _ = device.set_vring_num(caller(who), q(index), 64);
                let addr = VringAddr { desc: 0x1000, avail: 0x2000, used: 0x3000, ..VringAddr::default() };
                let _ = device.set_vring_addr(caller(who), q(index), &addr);
                let _ = device.set_vring_enable(caller(who), q(index), true);
                let _ = device.set_status(Status(0xf));
            }
            Op::Features(word) => drop(device.set_features(Features(word))),
            Op::GoodFeatures => drop(device.set_features(Features(0x3_0000_0000))),
            Op::Backend(word) => drop(device.set_backend_features(BackendFeatures(word.into()))),
            Op::Suspend => {
                if device.suspend().is_ok() && device.status().contains(Status::DRIVER_OK) {
                    assert!(!device.parent().running.contains(&true), "a queue runs after SUSPEND");
                }
            }
            Op::Resume => drop(device.resume()),
            Op::Num(who, index, num) => drop(device.set_vring_num(caller(who), q(index), num)),
            Op::GoodNum(who, index, log) => {
                let _ = device.set_vring_num(caller(who), q(index), 1 << (log % 9));
            }
            Op::Addr(who, index, [desc, avail, used, log], flags) => {
                let addr = VringAddr { flags: flags.into(), desc, avail, used, log };
                let _ = device.set_vring_addr(caller(who), q(index), &addr);
            }
            Op::GoodAddr(who, index) => {
                let addr = VringAddr { desc: 0x1000, avail: 0x2000, used: 0x3000, ..VringAddr::default() };
                let _ = device.set_vring_addr(caller(who), q(index), &addr);
            }
            Op::Base(who, index, base) => {
                let set = device.set_vring_base(caller(who), q(index), base);
                // Where a status write starts a suspended device, the base of a running queue can be set.
                let running = device.vring_infos().nth(q(index).0.into()).is_some_and(|info| info.running);
                if set.is_ok() && !running {
                    assert_eq!(device.vring_base(caller(who), q(index)), Ok(base), "the base just set");
                }
            }
            Op::GetBase(who, index) => drop(device.vring_base(caller(who), q(index))),
            Op::Enable(who, index, enable) => drop(device.set_vring_enable(caller(who), q(index), enable)),
            Op::Kick(who, index, some) => drop(device.set_vring_kick(caller(who), q(index), bell(some))),
            Op::Call(who, index, some) => drop(device.set_vring_call(caller(who), q(index), bell(some))),
            Op::Error(who, index, some) => drop(device.set_vring_err(caller(who), q(index), bell(some))),
            Op::Size(who, index) => drop(device.vring_size(caller(who), q(index))),
            Op::Group(who, index) => drop(device.vring_group(caller(who), q(index))),
            Op::GroupAsid(who, group, asid) => {
                let (group, asid) = (GroupIndex((group % 5).into()), Asid((asid % 4).into()));
                let _ = device.set_group_asid(caller(who), group, asid);
            }
            Op::Config(offset, len) => drop(device.config(offset, &mut vec![0; len.into()])),
            Op::SetConfig(offset, len) => drop(device.set_config(offset, &vec![0; len.into()])),
            Op::ConfigCall(some) => device.set_config_call(bell(some)),
            Op::Pages { who, asid, kind, iova, pages, at, perm } => {
                let msg = IotlbMsg {
                    iova: u64::from(iova % 32) * PAGE_SIZE,
                    size: u64::from(pages % 16) * PAGE_SIZE,
                    uaddr: BASE + u64::from(at) * PAGE_SIZE,
                    perm: Perm(perm & 3),
                    kind: kind % 8,
                };
                self.message(who, Asid(asid.into()), &msg);
            }
            Op::Bytes { who, asid, kind, iova, size, uaddr, perm } => {
                let msg = IotlbMsg { iova, size, uaddr, perm: Perm(perm), kind };
                self.message(who, Asid(asid), &msg);
            }
            Op::RefuseMaps(times) => device.parent_mut().refuse = times % 3,
            Op::RefuseOwner(refuse) => device.parent_mut().refuse_owner = refuse,
            Op::RefuseStart(refuse) => device.parent_mut().refuse_start = refuse,
            Op::RefuseStop(refuse) => device.parent_mut().refuse_stop = refuse,
        }
    }

    /// One IOTLB message: one that is refused leaves every table as it was, and so does a refused batch of REMAPs.
    fn message(&mut self, who: Who, asid: Asid, msg: &IotlbMsg) {
        let before = self.tables();
        let pinned = self.device.pinned_pages();
        let was_open = self.device.in_batch_for_fuzzing();
        let result = self.device.iotlb(&self.processes[usize::from(who)], asid, msg);
        let is_open = self.device.in_batch_for_fuzzing();
        match (was_open, is_open) {
            (false, true) => self.at_begin = Some(before),
            (true, false) => {
                if let Some(at_begin) = self.at_begin.take()
                    && result.is_err()
                {
                    assert_eq!(self.tables(), at_begin, "a refused batch of REMAPs changed a table");
                }
            }
            _ => {
                if result.is_err() {
                    assert_eq!(self.tables(), before, "a refused message changed a table: {result:?}");
                }
                if result.is_ok() && matches!(msg.kind, iotlb_type::UPDATE | iotlb_type::INVALIDATE) {
                    self.at_begin = None;
                }
            }
        }
        if result.is_err() {
            assert_eq!(self.device.pinned_pages(), pinned, "a refused message changed the charge");
        }
    }

    /// A change of owner touches no mapping and no pin; one that fails changes nothing.
    fn new_owner(&mut self, who: Who) {
        let before = self.tables();
        let pinned = self.device.pinned_pages();
        let owner = self.device.owner().map(|owner| owner.id);
        let result = self.device.new_owner(&self.processes[usize::from(who)]);
        let after = self.tables();
        assert_eq!(self.device.pinned_pages(), pinned);
        if result.is_err() {
            assert_eq!(after, before);
            assert_eq!(self.device.owner().map(|owner| owner.id), owner);
        } else {
            self.at_begin = None;
            let places =
                |tables: &Tables| tables.iter().map(|&(a, f, l, u, _)| (a, f, l, u)).collect::<Vec<_>>();
            assert_eq!(places(&after), places(&before));
        }
    }

    fn tables(&self) -> Tables {
        let tables = self.device.tables_for_fuzzing();
        let rows = tables.iter().flat_map(|(&asid, table)| table.iter().map(move |entry| (asid, entry)));
        rows.map(|(a, e)| (a, e.range.first(), e.range.last(), e.uaddr, e.stale)).collect()
    }

    fn check(&self) {
        let Self { device, accounts, .. } = self;
        assert_eq!(device.check_invariants(), Ok(()));
        // What is charged is charged to the owner and to nobody else.
        let charged: u64 = accounts.iter().map(|account| account.pages()).sum();
        assert_eq!(charged, device.pinned_pages());
        if let Some(owner) = device.owner() {
            assert_eq!(owner.account.pages(), device.pinned_pages());
        }
        // The parent runs what the device thinks it runs.
        let believed: Vec<_> = device.vring_infos().map(|info| info.running).collect();
        assert_eq!(device.parent().running, believed);
        self.check_translation();
    }

    /// The parent never reaches more than the table says. Inside a batch, and after a refusal, it may lag behind.
    fn check_translation(&self) {
        let parent = self.device.parent();
        if parent.way == Way::Platform || self.device.in_batch_for_fuzzing() {
            return;
        }
        let tables = self.device.tables_for_fuzzing();
        for (asid, entries) in parent.tables.iter().filter(|(asid, _)| !parent.refused.contains(asid)) {
            for (first, (last, memory, stale)) in entries {
                let entry = tables.get(asid).and_then(|table| table.get(*first));
                let same = entry.is_some_and(|entry| {
                    entry.range.first() == *first
                        && entry.range.last() == *last
                        && entry.memory == *memory
                        && (parent.way == Way::DmaMap || entry.stale == *stale)
                });
                assert!(same, "the parent still reaches {first:#x} of address space {asid}: {entry:?}");
            }
        }
    }
}

type Tables = Vec<(Asid, u64, u64, u64, bool)>;

fuzz_target!(|input: Input| {
    let mut world = World::new(&input);
    world.device.open().expect("nobody has it open");
    for op in input.ops.iter().take(300) {
        world.apply(op);
        world.check();
    }
    world.device.parent_mut().refuse_stop = false;
    world.device.release();
    world.check();
    assert_eq!(world.device.mapped().entries, 0);
    assert!(world.accounts.iter().all(|account| account.pages() == 0), "a charge is left behind");
});
