//! Requests of two processes that fork, exec and change their limits, checked against the invariants of ARCHITECTURE.md.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vdpa_core::device::Device;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::host::{PAGE_SIZE, PinAccount};
use vdpa_core::parent::{AddressMode, CompatReset, PinLimit, PrivateMemory, Profile};
use vdpa_core::types::{Asid, GroupIndex, IotlbMsg, IovaRange, Perm, QueueIndex, VringAddr, iotlb_type};
use vdpa_fuzz::parent::{DmaKind, FuzzParent};
use vdpa_fuzz::process::{BASE, FuzzEvent, Process, Vma};

#[derive(Arbitrary, Debug)]
struct Input {
    config: Config,
    first: [Vma; 4],
    second: [Vma; 4],
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug)]
struct Config {
    dma_kind: DmaKind,
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
    mem_table: true,
    vhost_log: true,
    reset_owner: bool,
    two_groups: bool,
    last_page: Option<u8>,
    own_limit: Option<u8>,
}

/// Which of the two processes makes the request.
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
    /// All requests that start a queue.
    StartQueue(Who, u8),
    Features(u64),
    ValidFeatures,
    Backend(u16),
    Suspend,
    Resume,
    Num(Who, u8, u32),
    ValidNum(Who, u8, u8),
    Addr(Who, u8, [u64; 4], u8),
    ValidAddr(Who, u8),
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
    /// A message about few pages, so that ranges overlap often.
    Pages {
        who: Who,
        asid: bool,
        kind: u8,
        iova: u8,
        pages: u8,
        at: u8,
        perm: u8,
    },
    /// A message with any addresses and sizes.
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

fn profile(config: &Config) -> Profile {
    let address_mode = match config.mode % 4 {
        0 => AddressMode::OwnerAddresses,
        1 => AddressMode::Objects,
        2 => AddressMode::Pinned,
        _ => AddressMode::PinnedPages,
    };
    let mut backend_features = BackendFeatures::of(&[BackendFeatures::ENABLE_AFTER_DRIVER_OK]);
    if config.live {
        backend_features = backend_features.with(BackendFeatures::NEW_OWNER);
        if address_mode == AddressMode::OwnerAddresses {
            backend_features = backend_features.with(BackendFeatures::IOTLB_REMAP);
        }
    }
    let groups = 1 + u32::from(config.two_groups);
    Profile {
        device_id: 2,
        vendor_id: 0,
        features: Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]),
        backend_features,
        queues: 3,
        queue_size_max: 256,
        queue_groups: vec![GroupIndex(0), GroupIndex(groups - 1)],
        descriptor_groups: Vec::new(),
        groups,
        address_spaces: 2,
        iova_range: config.last_page.map_or(IovaRange::ALL, |last| {
            IovaRange::new(0, (u64::from(last) + 1) * PAGE_SIZE - 1).expect("not empty")
        }),
        config_size: 60,
        suspend: config.suspend,
        resume: config.resume,
        vring_size: true,
        reset_map: config.reset_map,
        compat_reset: if config.clean { CompatReset::Clean } else { CompatReset::Keep },
        address_mode,
        pin_limit: config.own_limit.map_or(PinLimit::Rlimit, |limit| PinLimit::Pages(limit.into())),
        private_memory: if config.skip_private { PrivateMemory::Skip } else { PrivateMemory::Copy },
        max_iotlb_entries: usize::from(config.entries % 16) + 1,
        verify_remap: config.verify_remap,
        strict_new_owner: config.strict_new_owner,
        status_unsuspends: config.status_unsuspends,
        report_batch_errors: config.report_batch_errors,
        identity_map: config.identity_map,
        reset_owner: config.reset_owner,
    }
}

struct State {
    device: Device<FuzzParent>,
    processes: [Process; 2],
    next_id: u32,
    accounts: Vec<Arc<PinAccount>>,
    /// The tables when the open batch began, as long as it has had nothing but REMAPs.
    at_begin: Option<Tables>,
}

impl State {
    fn new(input: &Input) -> Self {
        let processes = [Process::new(0, &input.first), Process::new(1, &input.second)];
        let accounts = processes.iter().map(|process| Arc::clone(&process.space.account)).collect();
        let parent = FuzzParent::new(profile(&input.config), input.config.dma_kind);
        Self { device: Device::new(parent), processes, next_id: 2, accounts, at_begin: None }
    }

    fn replace_process(&mut self, who: Who, make: impl FnOnce(u32) -> Process) {
        let process = make(self.next_id);
        self.next_id += 1;
        self.accounts.push(Arc::clone(&process.space.account));
        self.processes[usize::from(who)] = process;
    }

    /// Makes one request. Its result is not checked, only the invariants afterwards.
    fn apply(&mut self, op: &Op) {
        // Without an open file there are no requests.
        if !self.device.is_open() && !op.needs_no_file() {
            return;
        }
        let Self { device, processes, .. } = self;
        let caller = |who: Who| &processes[usize::from(who)];
        let event = |some: bool| some.then_some(FuzzEvent);
        let q = |index: u8| QueueIndex(u16::from(index % 4));
        match *op {
            Op::Open => drop(device.open()),
            Op::Release => device.release(),
            Op::SetOwner(who) => drop(device.set_owner(caller(who))),
            Op::ResetOwner(who) => drop(device.reset_owner(caller(who))),
            Op::NewOwner(who) => self.new_owner(who),
            Op::ForkFromOwner(value) => drop(device.set_fork_from_owner(value)),
            Op::Exec(who, ref vmas) => self.replace_process(who, |id| Process::new(id, vmas)),
            Op::Fork(who) => {
                let parent = caller(who).clone();
                self.replace_process(!who, |id| parent.fork(id));
            }
            Op::Limit(who, pages) => processes[usize::from(who)].limit = pages.into(),
            Op::Hide(who, hidden) => processes[usize::from(who)].hidden = hidden,
            Op::Status(status) => drop(device.set_status(Status(status))),
            Op::DriverOk => drop(device.set_status(Status(0xf))),
            Op::StartQueue(who, index) => {
                let _ = device.set_owner(caller(who));
                let _ = device.set_features(Features(0x3_0000_0000));
                let _ = device.set_vring_num(caller(who), q(index), 64);
                let addr = VringAddr { desc: 0x1000, avail: 0x2000, used: 0x3000, ..VringAddr::default() };
                let _ = device.set_vring_addr(caller(who), q(index), &addr);
                let _ = device.set_vring_enable(caller(who), q(index), true);
                let _ = device.set_status(Status(0xf));
            }
            Op::Features(word) => drop(device.set_features(Features(word))),
            Op::ValidFeatures => drop(device.set_features(Features(0x3_0000_0000))),
            Op::Backend(word) => drop(device.set_backend_features(BackendFeatures(word.into()))),
            Op::Suspend => {
                if device.suspend().is_ok() && device.status().contains(Status::DRIVER_OK) {
                    assert!(!device.parent().running.contains(&true), "a queue runs after SUSPEND");
                }
            }
            Op::Resume => drop(device.resume()),
            Op::Num(who, index, num) => drop(device.set_vring_num(caller(who), q(index), num)),
            Op::ValidNum(who, index, log) => {
                let _ = device.set_vring_num(caller(who), q(index), 1 << (log % 9));
            }
            Op::Addr(who, index, [desc, avail, used, log], flags) => {
                let addr = VringAddr { flags: flags.into(), desc, avail, used, log };
                let _ = device.set_vring_addr(caller(who), q(index), &addr);
            }
            Op::ValidAddr(who, index) => {
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
            Op::Kick(who, index, some) => drop(device.set_vring_kick(caller(who), q(index), event(some))),
            Op::Call(who, index, some) => drop(device.set_vring_call(caller(who), q(index), event(some))),
            Op::Error(who, index, some) => drop(device.set_vring_err(caller(who), q(index), event(some))),
            Op::Size(who, index) => drop(device.vring_size(caller(who), q(index))),
            Op::Group(who, index) => drop(device.vring_group(caller(who), q(index))),
            Op::GroupAsid(who, group, asid) => {
                let (group, asid) = (GroupIndex((group % 5).into()), Asid((asid % 4).into()));
                let _ = device.set_group_asid(caller(who), group, asid);
            }
            Op::Config(offset, len) => drop(device.config(offset, &mut vec![0; len.into()])),
            Op::SetConfig(offset, len) => drop(device.set_config(offset, &vec![0; len.into()])),
            Op::ConfigCall(some) => device.set_config_call(event(some)),
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

    /// Sends one IOTLB message. A refused message, and a refused batch of REMAPs, change no table.
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
            let addresses =
                |tables: &Tables| tables.iter().map(|&(a, f, l, u, _)| (a, f, l, u)).collect::<Vec<_>>();
            assert_eq!(addresses(&after), addresses(&before));
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
        // All pinned pages are charged to the owner.
        let charged: u64 = accounts.iter().map(|account| account.pages()).sum();
        assert_eq!(charged, device.pinned_pages());
        if let Some(owner) = device.owner() {
            assert_eq!(owner.account.pages(), device.pinned_pages());
        }
        // The parent runs the same queues as the device.
        let expected: Vec<_> = device.vring_infos().map(|info| info.running).collect();
        assert_eq!(device.parent().running, expected);
        self.check_translation();
    }

    /// The parent has no entry that the table has not. Inside a batch, and after a refusal, its table may be outdated.
    fn check_translation(&self) {
        let parent = self.device.parent();
        if parent.dma_kind == DmaKind::Platform || self.device.in_batch_for_fuzzing() {
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
                        && (parent.dma_kind == DmaKind::DmaMap || entry.stale == *stale)
                });
                assert!(same, "the parent still reaches {first:#x} of address space {asid}: {entry:?}");
            }
        }
    }
}

type Tables = Vec<(Asid, u64, u64, u64, bool)>;

fuzz_target!(|input: Input| {
    let mut state = State::new(&input);
    state.device.open().expect("the device is closed");
    for op in input.ops.iter().take(300) {
        state.apply(op);
        state.check();
    }
    state.device.parent_mut().refuse_stop = false;
    state.device.release();
    state.check();
    assert_eq!(state.device.mapped().entries, 0);
    assert!(state.accounts.iter().all(|account| account.pages() == 0), "pages are still charged");
});
