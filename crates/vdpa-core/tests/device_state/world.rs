//! A device, its clients, and every request they can make.

use std::fmt::Debug;

use proptest::prelude::*;
use vdpa_core::device::state::{Image, Record, RestoreError, StateSink};
use vdpa_core::device::{Device, MemRegion};
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::host::AddressSpace as _;
use vdpa_core::testing::{TestEvent, TestObject, TestObjects, TestProcess};
use vdpa_core::types::{Asid, GroupIndex, IotlbMsg, Perm, QueueIndex, VringAddr, iotlb_type};

use super::parent::{Book, CONFIG, Kind};

pub(crate) const PAGE: u64 = 4096;
const BASE: u64 = 0x10_0000;

/// Who makes a request: one of two processes.
type Who = bool;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Open,
    Release,
    /// A client goes, and another one comes.
    Reopen(Who),
    SetOwner(Who),
    NewOwner(Who),
    RefusedOwner(Who),
    ResetOwner(Who),
    ForkFromOwner(u8),
    Exec(Who, u8),
    Fork(Who),
    Limit(Who, u8),
    Status(u8),
    BringUp(Who, u8),
    Features(u8),
    Backend(u16),
    Suspend,
    Resume,
    Num(Who, u8, u8),
    Addr(Who, u8, u8, u8),
    Base(Who, u8, u32),
    GetBase(Who, u8),
    Enable(Who, u8, bool),
    Kick(Who, u8, u8),
    Call(Who, u8, u8),
    Error(Who, u8, u8),
    Busyloop(Who, u8, u32),
    Group(Who, u8, u8),
    Config(u8, u8),
    SetConfig(u8, u8),
    ConfigCall(u8),
    Fail,
    /// The log of vhost at a page of the client; none for numbers that are no page.
    LogBase(Who, u8),
    LogEvent(Who, u8),
    LogAll(bool),
    /// The first so many of these regions: page, pages, page in the client.
    MemTable(Who, u8, [(u8, u8, u8); 3]),
    Message(Message),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Message {
    who: Who,
    asid: bool,
    kind: u8,
    page: u8,
    pages: u8,
    at: u8,
    perm: u8,
}

fn message() -> impl Strategy<Value = Op> {
    // As the numbers of the interface: 2 UPDATE, 3 INVALIDATE, 5 BATCH_BEGIN, 6 BATCH_END, 7 REMAP.
    let kind =
        prop_oneof![5 => Just(2u8), 3 => Just(3), 2 => Just(5), 2 => Just(6), 4 => Just(7), 1 => 0..9u8];
    let rest = (prop::bool::weighted(0.1), prop::bool::weighted(0.2), 0..12u8, 0..6u8, 0..18u8, 0..4u8);
    (kind, rest).prop_map(|(kind, (who, asid, page, pages, at, perm))| {
        Op::Message(Message { who, asid, kind, page, pages, at, perm })
    })
}

fn mem_table() -> impl Strategy<Value = Op> {
    // Regions one behind the other, and some that overlap.
    let region = |first: u8| (first..first + 3, 1..4u8, 0..18u8);
    let regions = [region(0), region(3), region(6)];
    (prop::bool::weighted(0.1), 0..4u8, regions)
        .prop_map(|(who, count, table)| Op::MemTable(who, count, table))
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    let who = || prop::bool::weighted(0.2);
    let control = prop_oneof![
        6 => Just(Op::Open),
        1 => who().prop_map(Op::Reopen),
        4 => who().prop_map(Op::SetOwner),
        3 => any::<bool>().prop_map(Op::NewOwner),
        1 => any::<bool>().prop_map(Op::RefusedOwner),
        1 => who().prop_map(Op::ResetOwner),
        1 => (0..3u8).prop_map(Op::ForkFromOwner),
        1 => (who(), 0..3u8).prop_map(|(who, shift)| Op::Exec(who, shift)),
        1 => who().prop_map(Op::Fork),
        1 => (who(), 0..20u8).prop_map(|(who, pages)| Op::Limit(who, pages)),
        2 => prop_oneof![Just(0u8), Just(3), Just(11), Just(15), any::<u8>()].prop_map(Op::Status),
        6 => (who(), 0..3u8).prop_map(|(who, index)| Op::BringUp(who, index)),
        2 => (0..4u8).prop_map(Op::Features),
        1 => any::<u16>().prop_map(Op::Backend),
        2 => Just(Op::Suspend),
        2 => Just(Op::Resume),
        1 => (0..20u8, 0..6u8).prop_map(|(at, len)| Op::Config(at, len)),
        1 => (0..20u8, 0..6u8).prop_map(|(at, len)| Op::SetConfig(at, len)),
        1 => (0..3u8).prop_map(Op::ConfigCall),
        6 => mem_table(),
        2 => (who(), 0..20u8).prop_map(|(who, at)| Op::LogBase(who, at)),
        1 => (who(), 0..3u8).prop_map(|(who, event)| Op::LogEvent(who, event)),
        2 => any::<bool>().prop_map(Op::LogAll),
    ];
    let vring = prop_oneof![
        (who(), 0..4u8, 0..10u8).prop_map(|(who, index, log)| Op::Num(who, index, log)),
        (who(), 0..4u8, 0..8u8, 0..3u8).prop_map(|(who, index, at, flags)| Op::Addr(who, index, at, flags)),
        (who(), 0..4u8, any::<u32>()).prop_map(|(who, index, base)| Op::Base(
            who,
            index,
            base >> (base % 32)
        )),
        (who(), 0..4u8).prop_map(|(who, index)| Op::GetBase(who, index)),
        (who(), 0..4u8, any::<bool>()).prop_map(|(who, index, on)| Op::Enable(who, index, on)),
        (who(), 0..4u8, 0..3u8).prop_map(|(who, index, event)| Op::Kick(who, index, event)),
        (who(), 0..4u8, 0..3u8).prop_map(|(who, index, event)| Op::Call(who, index, event)),
        (who(), 0..4u8, 0..3u8).prop_map(|(who, index, event)| Op::Error(who, index, event)),
        (who(), 0..4u8, any::<u32>()).prop_map(|(who, index, us)| Op::Busyloop(who, index, us)),
        (who(), 0..4u8, 0..3u8).prop_map(|(who, group, asid)| Op::Group(who, group, asid)),
    ];
    prop_oneof![60 => control, 40 => vring, 120 => message(), 1 => Just(Op::Release), 1 => Just(Op::Fail)]
}

pub(crate) struct World {
    pub(crate) kind: Kind,
    pub(crate) device: Device<Book>,
    pub(crate) objects: TestObjects,
    /// What the changes so far say.
    pub(crate) image: Image,
    processes: [TestProcess; 2],
    memory: [TestObject; 3],
    events: [TestEvent; 2],
}

impl World {
    pub(crate) fn new(kind: &Kind) -> Self {
        let memory = std::array::from_fn(|_| TestObject::new(4096 * PAGE));
        let mut world = Self {
            kind: *kind,
            device: Device::new(Book::new(kind)),
            objects: TestObjects::new(),
            image: Image::default(),
            processes: [TestProcess::new(), TestProcess::new()],
            memory,
            events: [TestEvent::default(), TestEvent::default()],
        };
        world.map_memory(false, 0);
        world.map_memory(true, 1);
        world.follow_changes();
        world
    }

    /// The same world in another process, with the device that `records` describe.
    pub(crate) fn restore(&self, records: &[Record]) -> Result<Self, RestoreError> {
        self.restore_around(Book::new(&self.kind), records)
    }

    pub(crate) fn restore_around(&self, parent: Book, records: &[Record]) -> Result<Self, RestoreError> {
        let mut objects = self.objects.in_successor();
        let device = Device::restore(parent, records, &mut objects)?;
        let processes = self.processes.each_ref().map(|process| objects.client(process));
        Ok(Self {
            kind: self.kind,
            device,
            objects,
            image: Image::default(),
            processes,
            memory: self.memory.clone(),
            events: self.events.clone(),
        })
    }

    /// Three runs of memory, one private; `shift` pages further on.
    fn map_memory(&self, who: Who, shift: u64) {
        let process = &self.processes[usize::from(who)];
        let at = BASE + shift * PAGE;
        process.map_at(at, &self.memory[0], 0, 8 * PAGE, true);
        process.map_at(at + 8 * PAGE, &self.memory[1], 0, 4 * PAGE, false);
        process.map_at(at + 12 * PAGE, &self.memory[2], 2 * PAGE, 4000 * PAGE, true);
    }

    /// Takes the changes, and checks that all of them so far say what a snapshot says.
    pub(crate) fn follow_changes(&mut self) {
        let changes = self.device.take_changes(&mut self.objects).unwrap();
        changes.iter().for_each(|change| self.image.apply(change).unwrap());
        assert_eq!(self.image.records(), self.device.snapshot(&mut self.objects).unwrap(), "{changes:?}");
    }

    /// The device and the parent, as text.
    pub(crate) fn everything(&mut self) -> String {
        let Self { device, objects, processes, .. } = self;
        let records = device.snapshot(objects).unwrap();
        let parent = device.parent();
        let mut tables = Vec::new();
        for (asid, table) in &parent.tables {
            for entry in table.values() {
                let memory = objects.memory(&entry.memory).unwrap();
                tables.push((asid, entry.range, entry.uaddr, entry.perm, entry.stale, memory));
            }
        }
        let owner = parent.owner.as_ref().map(|owner| objects.address_space(owner).unwrap());
        let charged = processes.each_ref().map(TestProcess::pinned_pages);
        let account = device.owner().map(|owner| owner.account().pages());
        let infos: Vec<_> = device.vring_infos().collect();
        let log = parent.log.is_there();
        let book = (&parent.running, &parent.rings, parent.config, parent.failed, parent.features, log);
        let parent = format!("{tables:#?}\n{owner:?} {charged:?} {account:?} {infos:?} {book:?}");
        format!("{records:#?}\n{parent}\n{}", self.queries())
    }

    /// What the device answers to requests that ask something.
    fn queries(&mut self) -> String {
        let Self { device, processes, .. } = self;
        let mut answers = format!(
            "{:?} {:?} {:?} {:?} {:?} {:?}",
            device.status(),
            device.negotiated_features(),
            device.acked_backend_features(),
            device.backend_features(),
            device.mapped(),
            device.fork_from_owner(),
        );
        for process in &*processes {
            answers += &format!(" {:?}", device.check_owner(process));
            for index in (0..4).map(QueueIndex) {
                answers += &format!(
                    " {:?} {:?} {:?}",
                    device.vring_size(process, index),
                    device.busyloop_timeout(process, index),
                    device.vring_group(process, index)
                );
            }
        }
        let mut config = [0; CONFIG as usize];
        device.peek_config(0, &mut config).unwrap();
        answers + &format!(" {config:?}")
    }

    /// Makes one request; the answer as text.
    pub(crate) fn step(&mut self, op: &Op) -> String {
        let free = matches!(op, Op::Open | Op::Release | Op::Exec(..) | Op::Fork(_) | Op::Limit(..));
        // A device that is closed has no file through which a request could come.
        if !self.device.is_open() && !free {
            return String::new();
        }
        match *op {
            Op::Exec(who, shift) => {
                self.processes[usize::from(who)].exec();
                self.map_memory(who, shift.into());
                String::new()
            }
            Op::Fork(who) => {
                self.processes[usize::from(!who)] = self.processes[usize::from(who)].fork();
                String::new()
            }
            Op::Limit(who, pages) => {
                self.processes[usize::from(who)].set_memlock_pages(pages.into());
                String::new()
            }
            Op::Message(message) => self.message(message),
            _ => self.request(op),
        }
    }

    fn request(&mut self, op: &Op) -> String {
        let Self { device, processes, events, .. } = self;
        let by = |who: Who| &processes[usize::from(who)];
        let event = |number: u8| events.get(usize::from(number)).cloned();
        let q = |index: u8| QueueIndex(index.into());
        match *op {
            Op::Open => text(device.open()),
            Op::Release => {
                device.release();
                String::new()
            }
            Op::Reopen(who) => {
                device.release();
                text((device.open(), device.set_owner(by(who))))
            }
            Op::SetOwner(who) => text(device.set_owner(by(who))),
            Op::NewOwner(who) => text(device.new_owner(by(who))),
            Op::RefusedOwner(who) => {
                device.parent_mut().refuse_owner = true;
                let answer = text((device.set_owner(by(who)), device.new_owner(by(who))));
                device.parent_mut().refuse_owner = false;
                answer
            }
            Op::ResetOwner(who) => text(device.reset_owner(by(who))),
            Op::ForkFromOwner(value) => text(device.set_fork_from_owner(value)),
            Op::Status(status) => text(device.set_status(Status(status))),
            Op::BringUp(who, index) => bring_up(device, by(who), q(index)),
            Op::Features(packed) => {
                text(device.set_features(Features(0x3_0000_0000 | u64::from(packed) << 33)))
            }
            Op::Backend(word) => text(device.set_backend_features(BackendFeatures(word.into()))),
            Op::Suspend => text(device.suspend()),
            Op::Resume => text(device.resume()),
            Op::Num(who, index, log) => text(device.set_vring_num(by(who), q(index), 1 << log)),
            Op::Addr(who, index, at, flags) => {
                let desc = u64::from(at) * PAGE;
                let addr = VringAddr { flags: flags.into(), desc, avail: desc + 2, used: desc + 4, log: 8 };
                text(device.set_vring_addr(by(who), q(index), &addr))
            }
            Op::Base(who, index, base) => text(device.set_vring_base(by(who), q(index), base)),
            Op::GetBase(who, index) => text(device.vring_base(by(who), q(index))),
            Op::Enable(who, index, on) => text(device.set_vring_enable(by(who), q(index), on)),
            Op::Kick(who, index, number) => text(device.set_vring_kick(by(who), q(index), event(number))),
            Op::Call(who, index, number) => text(device.set_vring_call(by(who), q(index), event(number))),
            Op::Error(who, index, number) => text(device.set_vring_err(by(who), q(index), event(number))),
            Op::Busyloop(who, index, us) => text(device.set_busyloop_timeout(by(who), q(index), us)),
            Op::Group(who, group, asid) => {
                text(device.set_group_asid(by(who), GroupIndex(group.into()), Asid(asid.into())))
            }
            Op::Config(at, len) => {
                let mut out = vec![0; len.into()];
                text((device.config(at.into(), &mut out), out))
            }
            Op::SetConfig(at, len) => text(device.set_config(at.into(), &vec![at; len.into()])),
            Op::ConfigCall(number) => {
                device.set_config_call(event(number));
                String::new()
            }
            Op::Fail => text(device.fail()),
            Op::LogBase(who, at) => {
                let uaddr = if at < 18 { BASE + u64::from(at) * PAGE } else { 0 };
                text(device.set_log_base(by(who), uaddr))
            }
            Op::LogEvent(who, number) => text(device.set_log_event(by(who), event(number))),
            Op::LogAll(all) => {
                let features = device.negotiated_features().unwrap_or(Features(0x3_0000_0000));
                text(device.set_features(if all { features.with(Features::LOG_ALL) } else { features }))
            }
            Op::MemTable(who, count, table) => {
                let region = |&(page, pages, at): &(u8, u8, u8)| MemRegion {
                    iova: u64::from(page) * PAGE,
                    size: u64::from(pages) * PAGE,
                    uaddr: BASE + u64::from(at) * PAGE,
                };
                let regions: Vec<_> = table.iter().take(count.into()).map(region).collect();
                text(device.set_mem_table(by(who), &regions))
            }
            Op::Exec(..) | Op::Fork(_) | Op::Limit(..) | Op::Message(_) => String::new(),
        }
    }

    fn message(&mut self, message: Message) -> String {
        let Message { who, asid, kind, page, pages, at, perm } = message;
        let msg = IotlbMsg {
            iova: u64::from(page) * PAGE,
            size: u64::from(pages) * PAGE,
            uaddr: BASE + u64::from(at) * PAGE,
            perm: if kind == iotlb_type::REMAP { Perm::NONE } else { Perm(perm) },
            kind,
        };
        text(self.device.iotlb(&self.processes[usize::from(who)], Asid(asid.into()), &msg))
    }

    /// Maps one page of shared memory.
    pub(crate) fn map(&mut self, page: u64) {
        self.send(iotlb_type::UPDATE, page, 16 + page);
    }

    /// Sends a message about one page, at the page `at` of the client's memory.
    pub(crate) fn send(&mut self, kind: u8, page: u64, at: u64) {
        let perm = if kind == iotlb_type::UPDATE { Perm::RW } else { Perm::NONE };
        let msg = IotlbMsg { iova: page * PAGE, size: PAGE, uaddr: BASE + at * PAGE, perm, kind };
        self.device.iotlb(&self.processes[0], Asid(0), &msg).unwrap();
    }

    /// Removes all mappings of address space 0, by whoever is the owner.
    pub(crate) fn unmap_all(&mut self) {
        let msg = IotlbMsg { size: u64::MAX, kind: iotlb_type::INVALIDATE, ..IotlbMsg::default() };
        let Self { device, processes, .. } = self;
        assert!(processes.iter().any(|process| device.iotlb(process, Asid(0), &msg).is_ok()));
    }
}

fn bring_up(device: &mut Device<Book>, who: &TestProcess, index: QueueIndex) -> String {
    let addr = VringAddr { desc: 0x1000, avail: 0x2000, used: 0x3000, ..VringAddr::default() };
    text((
        device.set_owner(who),
        device.set_features(Features(0x3_0000_0000)),
        device.set_vring_num(who, index, 64),
        device.set_vring_addr(who, index, &addr),
        device.set_vring_enable(who, index, true),
        device.set_status(Status(15)),
    ))
}

fn text(answer: impl Debug) -> String {
    format!("{answer:?}")
}
