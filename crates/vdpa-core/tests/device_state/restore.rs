//! What a device refuses to be restored from, and how its queues are stopped and started.

use vdpa_core::Errno;
use vdpa_core::device::state::{
    ApplyError, MappingState, Record, RestoreError, Ring, TableId, TableRole, VringState,
};
use vdpa_core::device::{Device, ResumeError};
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::host::AddressSpace as _;
use vdpa_core::parent::{Parent, Profile};
use vdpa_core::testing::{RamBlk, RamNet, TestObject, TestObjects, TestProcess};
use vdpa_core::types::{Asid, GroupIndex, IotlbMsg, IovaRange, Perm, QueueIndex, VringAddr, iotlb_type};
use vdpa_core::vq::QueueState;

use super::parent::{Book, Kind};
use super::world::{Op, PAGE, World};

const Q0: QueueIndex = QueueIndex(0);
const PINNED: Kind = Kind { way: 0, mode: 3, flags: [true; 9], entries: 64, room: 64 };
const OWNER_ADDRESSES: Kind = Kind { mode: 0, ..PINNED };

/// A device that runs, with two mappings of one page.
fn running(kind: &Kind) -> (World, Vec<Record>) {
    let mut world = World::new(kind);
    world.step(&Op::Open);
    world.step(&Op::BringUp(false, 0));
    world.map(1);
    world.map(3);
    let records = world.device.snapshot(&mut world.objects).unwrap();
    (world, records)
}

/// The records with another one in the place of the one of its kind.
fn replaced(records: &[Record], record: &Record) -> Vec<Record> {
    let place = |old: &Record| if old.kind() == record.kind() { record.clone() } else { old.clone() };
    records.iter().map(place).collect()
}

/// A ring that every device can have.
const RING: Ring = Ring {
    size: 64,
    addr: VringAddr { flags: 0, desc: 0x1000, used: 0x3000, avail: 0x2000, log: 0 },
    features: Features::NONE,
};

fn refused(world: &World, records: &[Record]) -> RestoreError {
    let error = world.restore(records).err().unwrap();
    assert!(!error.to_string().is_empty());
    let charged = world.device.owner().unwrap().account().pages();
    assert_eq!(charged, world.device.pinned_pages(), "whatever is refused charges nothing");
    error
}

#[test]
fn a_queue_that_cannot_be_is_refused() {
    let (world, good) = running(&PINNED);
    let error = |change: fn(&mut VringState)| {
        let mut records = good.clone();
        for record in &mut records {
            if let Record::Vring(vring) = record
                && vring.index == Q0
            {
                change(vring);
            }
        }
        refused(&world, &records)
    };
    let changes: [fn(&mut VringState); 10] = [
        |vring| vring.index = QueueIndex(77),
        |vring| vring.group = GroupIndex(1),
        |vring| vring.num = 3,
        |vring| vring.num = 512,
        |vring| vring.addr = None,
        |vring| vring.enabled = false,
        |vring| vring.addr = Some(VringAddr { avail: 1, ..VringAddr::default() }),
        |vring| vring.started = Some(Ring { size: 3, ..Ring::default() }),
        |vring| vring.started = Some(Ring { addr: VringAddr { avail: 1, ..VringAddr::default() }, ..RING }),
        |vring| vring.started = Some(Ring { features: Features(1 << 60), ..RING }),
    ];
    for change in changes {
        let error = error(change);
        assert!(matches!(error, RestoreError::Vring { .. }), "{error}");
    }
    let event = RestoreError::Object { what: "event", id: 1000, errno: Errno::NOENT };
    assert_eq!(error(|vring| vring.kick = Some(1000)), event);
}

#[test]
fn a_mapping_that_cannot_be_is_refused() {
    let (world, good) = running(&PINNED);
    let error = |change: fn(&mut MappingState)| {
        let mut records = good.clone();
        for record in &mut records {
            if let Record::Mapping(mapping) = record {
                change(mapping);
            }
        }
        refused(&world, &records)
    };
    let changes: [fn(&mut MappingState); 6] = [
        |m| m.range = IovaRange::from_size(m.range.first(), 100).unwrap(),
        |m| m.range = IovaRange::from_size(m.range.first(), 3 * PAGE).unwrap(),
        |m| m.stale = true,
        |m| m.update = 9,
        |m| m.update = 0,
        |m| m.update_range = IovaRange::from_size(0, 1).unwrap(),
    ];
    for change in changes {
        let error = error(change);
        assert!(matches!(error, RestoreError::Mapping { .. }), "{error}");
    }
    assert!(matches!(error(|m| m.memory.id = 55), RestoreError::Object { what: "memory", id: 55, .. }));
    assert!(matches!(error(|m| m.memory.offset = u64::MAX), RestoreError::Object { what: "memory", .. }));
    assert!(matches!(error(|m| m.table.asid = Asid(1)), RestoreError::Apply(ApplyError::NoTable { .. })));
    let table = TableId { role: TableRole::Interface, asid: Asid(0) };
    let next = refused(&world, &replaced(&good, &Record::Table { table, next_update: u64::MAX }));
    assert!(matches!(next, RestoreError::Table { .. }), "{next}");
    for (role, asid) in [(TableRole::Interface, 9), (TableRole::Rollback, 0), (TableRole::Installed, 0)] {
        let table = TableId { role, asid: Asid(asid) };
        let records = [good.clone(), vec![Record::Table { table, next_update: 0 }]].concat();
        assert!(matches!(refused(&world, &records), RestoreError::Table { .. }), "{table:?}");
    }
    let copy = Record::TableCopied { from: table, to: TableId { asid: Asid(1), ..table } };
    let error = refused(&world, &[good.clone(), vec![copy]].concat());
    assert!(matches!(error, RestoreError::Apply(ApplyError::Copy { .. })), "{error}");
}

#[test]
fn a_word_that_cannot_be_is_refused() {
    let (world, good) = running(&PINNED);
    let error = |record: Record| refused(&world, &replaced(&good, &record));
    assert_eq!(error(Record::Pinned { pages: 3 }), RestoreError::Charge { saved: 3, computed: 2 });
    let status = |status, suspended, paused, ring_max| Record::Status { status, suspended, paused, ring_max };
    let invalid = [
        (status(Status(15), false, true, 256), "status"),
        (status(Status(11), true, true, 256), "status"),
        (status(Status(15), false, false, 512), "status"),
        (Record::BackendFeatures { acked: BackendFeatures(1) }, "backend-features"),
        (Record::Features { in_force: None, base: Features(1) }, "features"),
        (Record::ForkFromOwner { value: 2 }, "fork-from-owner"),
        (Record::Owner { space: None }, "owner"),
        (Record::Group { group: GroupIndex(0), asid: Asid(2) }, "group"),
        (Record::Group { group: GroupIndex(2), asid: Asid(0) }, "group"),
        (Record::Translation { asid: Asid(0), passthrough: true, refused: false }, "translation"),
        (Record::Translation { asid: Asid(2), passthrough: false, refused: false }, "translation"),
    ];
    for (record, kind) in invalid {
        let error = error(record);
        assert!(matches!(error, RestoreError::Invalid { kind: of, .. } if of == kind), "{error}");
    }
    assert!(matches!(error(Record::Batch { asid: Some(Asid(1)) }), RestoreError::Table { .. }));
    let owner = RestoreError::Object { what: "address space", id: 9, errno: Errno::NOENT };
    assert_eq!(error(Record::Owner { space: Some(9) }), owner);
    assert!(matches!(refused(&world, &[]), RestoreError::Missing { kind: "device" }));
    assert!(matches!(refused(&world, &good[..1]), RestoreError::Missing { .. }));
    assert!(matches!(refused(&world, &good[1..]), RestoreError::Apply(ApplyError::NoBeginning { .. })));
}

/// The error for a device that is less than the saved one.
fn less(change: impl FnOnce(&mut Profile)) -> RestoreError {
    let (blk, process) = (RamBlk::new(8).with(|profile| profile.address_spaces = 2), TestProcess::new());
    let mut device = Device::new(blk);
    device.open().unwrap();
    device.set_owner(&process).unwrap();
    let mut objects = TestObjects::new();
    let records = device.snapshot(&mut objects).unwrap();
    let other = RamBlk::new(8).with(|profile| profile.address_spaces = 2).with(change);
    Device::restore(other, &records, &mut objects).err().unwrap()
}

#[test]
fn a_device_that_is_less_says_what_it_lacks() {
    let fewer = |change: fn(&mut Profile)| match less(change) {
        RestoreError::Fewer { what, saved, present } => (what, saved, present),
        other => panic!("{other}"),
    };
    assert_eq!(fewer(|profile| profile.queues = 0), ("queues", 1, 0));
    assert_eq!(fewer(|profile| profile.address_spaces = 1), ("address spaces", 2, 1));
    assert_eq!(fewer(|profile| profile.queue_size_max = 8).0, "entries in its largest ring");
    assert_eq!(fewer(|profile| profile.config_size = 8).0, "bytes of configuration space");
    let flush = Features::NONE.with(Features::BLK_FLUSH);
    let features = less(|profile| profile.features = profile.features.without(Features::BLK_FLUSH));
    assert!(matches!(features, RestoreError::Features { missing, .. } if missing == flush), "{features}");
    assert!(matches!(less(|profile| profile.suspend = false), RestoreError::BackendFeatures { .. }));
    assert!(matches!(
        less(|profile| profile.device_id = 1),
        RestoreError::OtherDevice { saved: 2, present: 1 }
    ));
    let low = IovaRange::new(0, 0xffff).unwrap();
    assert!(matches!(less(|profile| profile.iova_range = low), RestoreError::IovaRange { .. }));
}

#[test]
fn two_devices_of_one_owner_are_charged_once_each() {
    let process = TestProcess::new();
    let uaddr = process.map(&TestObject::new(8 * PAGE));
    let parent = || RamBlk::new(8).with(|p| p.address_mode = vdpa_core::parent::AddressMode::PinnedPages);
    let mut objects = TestObjects::new();
    let mut saved = Vec::new();
    for pages in [2, 3] {
        let mut device = Device::new(parent());
        device.open().unwrap();
        device.set_owner(&process).unwrap();
        let size = pages * PAGE;
        let msg = IotlbMsg { iova: 0, size, uaddr, perm: Perm::RW, kind: iotlb_type::UPDATE };
        device.iotlb(&process, Asid(0), &msg).unwrap();
        saved.push(device.snapshot(&mut objects).unwrap());
    }
    // Less than is pinned: what was allowed then stays.
    process.set_memlock_pages(1);
    let mut there = objects.in_successor();
    let client = there.client(&process);
    let restore = |records: &Vec<Record>| Device::restore(parent(), records, &mut there).unwrap();
    let mut devices: Vec<_> = saved.iter().map(restore).collect();
    assert_eq!((client.pinned_pages(), process.pinned_pages()), (5, 5));
    devices[0].release();
    assert_eq!(client.pinned_pages(), 3);
    devices[1].release();
    assert_eq!(client.pinned_pages(), 0);
}

#[test]
fn queues_go_on_where_they_stopped_on_either_side() {
    let (mut world, _) = running(&OWNER_ADDRESSES);
    assert_eq!(world.device.parent().running.len(), 1);
    let stopped = world.device.quiesce().unwrap();
    assert_eq!(stopped, [(Q0, QueueState::Split { avail_index: 1 })]);
    assert_eq!(world.device.quiesce().unwrap(), stopped, "asking twice changes nothing");
    assert!(world.device.is_quiesced() && world.device.parent().running.is_empty());
    world.step(&Op::Status(15));
    assert!(world.device.parent().running.is_empty(), "no queue starts meanwhile");
    let records = world.device.snapshot(&mut world.objects).unwrap();

    let mut successor = world.restore(&records).unwrap();
    assert!(successor.device.is_quiesced() && successor.device.parent().running.is_empty());
    assert_eq!(successor.device.stopped_queues(), stopped);
    let from_log = QueueState::Split { avail_index: 40 };
    successor.device.resume_queues(&[(Q0, from_log)]).unwrap();
    assert_eq!(successor.device.parent().running.get(&0), Some(&from_log));

    world.device.resume_queues(&[]).unwrap();
    assert_eq!(world.device.parent().running.get(&0), Some(&stopped[0].1));
    assert_eq!(world.device.resume_queues(&[]), Ok(()), "nothing is left to be done");
}

#[test]
fn inside_a_batch_the_parent_goes_on_with_the_table_from_before() {
    let [live, suspend, clean, skip, _, status, report, identity, groups] = OWNER_ADDRESSES.flags;
    let flags = [live, suspend, clean, skip, false, status, report, identity, groups];
    for change in [iotlb_type::REMAP, iotlb_type::INVALIDATE, iotlb_type::UPDATE] {
        let (mut world, _) = running(&Kind { flags, ..OWNER_ADDRESSES });
        world.follow_changes();
        let before = world.everything();
        world.send(iotlb_type::BATCH_BEGIN, 0, 0);
        world.send(change, if change == iotlb_type::UPDATE { 5 } else { 3 }, 40);
        world.follow_changes();
        let records = world.image.records();
        let mut successor = world.restore(&records).unwrap();
        let uaddrs = |world: &World| -> Vec<u64> {
            world.device.parent().tables[&Asid(0)].values().map(|entry| entry.uaddr).collect()
        };
        assert_eq!(uaddrs(&successor).len(), 2, "{change}: both mappings from before the batch");
        assert_eq!(uaddrs(&successor), uaddrs(&world));
        successor.device.resume_queues(&[]).unwrap();
        assert_eq!(successor.everything(), world.everything());
        assert_ne!(world.everything(), before);
        for world in [&mut world, &mut successor] {
            world.send(iotlb_type::BATCH_END, 0, 0);
        }
        assert_eq!(successor.everything(), world.everything(), "{change}: after the end of the batch");
        assert!(uaddrs(&successor).contains(&(0x10_0000 + 40 * PAGE)) || change == iotlb_type::INVALIDATE);
    }
}

#[test]
fn what_does_not_start_can_be_tried_again() {
    let (world, records) = running(&OWNER_ADDRESSES);
    let mut successor = world.restore(&records).unwrap();
    let device = &mut successor.device;
    let state = QueueState::Split { avail_index: 0 };
    let error = device.resume_queues(&[(QueueIndex(1), state)]);
    assert_eq!(error, Err(ResumeError::NotRunning { index: QueueIndex(1) }));
    let packed = QueueState::initial(Features::NONE.with(Features::RING_PACKED));
    assert_eq!(
        device.resume_queues(&[(Q0, packed)]),
        Err(ResumeError::Position { index: Q0, state: packed })
    );
    device.parent_mut().refuse_start = true;
    let error = device.resume_queues(&[]);
    assert_eq!(error, Err(ResumeError::Start { index: Q0, errno: Errno::FAULT }));
    assert!(device.is_quiesced());
    device.parent_mut().refuse_start = false;
    device.resume_queues(&[]).unwrap();
    assert_eq!(device.parent().running.len(), 1);
    device.parent_mut().refuse_stop = true;
    assert_eq!(device.quiesce(), Err(Errno::IO));
    assert!(!device.is_quiesced() && device.vring_infos().any(|info| info.running));
}

#[test]
fn a_parent_that_refuses_is_named() {
    let (world, records) = running(&OWNER_ADDRESSES);
    let refused = |book: Book, records: &[Record]| world.restore_around(book, records).err().unwrap();
    let mut book = Book::new(&OWNER_ADDRESSES);
    book.refuse_owner = true;
    assert_eq!(refused(book, &records), RestoreError::Parent { what: "owner", errno: Errno::NOMEM });
    let small = Book::new(&Kind { room: 1, ..OWNER_ADDRESSES });
    assert_eq!(refused(small, &records), RestoreError::Parent { what: "mappings", errno: Errno::NOSPC });
    let own = replaced(&records, &Record::Parent { bytes: vec![1] });
    let error = RestoreError::Parent { what: "own state", errno: Errno::INVAL };
    assert_eq!(refused(Book::new(&OWNER_ADDRESSES), &own), error);
}

#[test]
fn a_network_device_keeps_its_address() {
    let mut device = Device::new(RamNet::new());
    device.open().unwrap();
    device.set_config(0, &[2, 1, 1, 1, 1, 1]).unwrap();
    let mut objects = TestObjects::new();
    let records = device.snapshot(&mut objects).unwrap();
    let restored = Device::restore(RamNet::new(), &records, &mut objects).unwrap();
    let mut mac = [0; 6];
    device.peek_config(0, &mut mac).unwrap();
    restored.peek_config(0, &mut mac).unwrap();
    assert_eq!(mac, [2, 1, 1, 1, 1, 1]);
    assert_eq!(restored.status(), Status::RESET);
    assert_eq!(restored.parent().save_state(), device.parent().save_state());
}

const PACKED: Op = Op::Features(2);
const ADDR: Op = Op::Addr(false, 1, 0, 0);
const ENABLE: Op = Op::Enable(false, 1, true);
const RUN: Op = Op::Status(15);

/// Requests after which queue 1 runs at a position that its ring cannot have, or could not have after a restart.
const MISFITS: [&[Op]; 4] = [
    // A packed position, and then features with which the ring is split.
    &[PACKED, Op::Base(false, 1, 0), Op::BringUp(false, 1), Op::Num(false, 0, 0)],
    // A split position, and then features with which the ring is packed.
    &[Op::Num(false, 1, 6), Op::Base(false, 1, 7), PACKED, ADDR, ENABLE, RUN],
    // A position, and then a ring that is smaller.
    &[PACKED, Op::Num(false, 1, 6), Op::Base(false, 1, 0x5_8001), Op::Num(false, 1, 0), ADDR, ENABLE, RUN],
    // A small ring, and then a position.
    &[PACKED, Op::Num(false, 1, 0), Op::Base(false, 1, 0x5_8001), ADDR, ENABLE, RUN],
];

/// A device after `steps` of its owner.
fn after(steps: &[Op]) -> World {
    let mut world = World::new(&OWNER_ADDRESSES);
    world.step(&Op::Open);
    world.step(&Op::SetOwner(false));
    for op in steps {
        world.step(op);
        world.follow_changes();
    }
    world
}

#[test]
fn a_position_that_does_not_fit_its_ring_survives_an_update() {
    for steps in MISFITS {
        let mut world = after(steps);
        let crashed = world.device.snapshot(&mut world.objects).unwrap();
        let stopped = world.device.quiesce().unwrap();
        assert_eq!(stopped.len(), 1, "{steps:?}");
        let updated = world.device.snapshot(&mut world.objects).unwrap();
        world.device.resume_queues(&stopped).unwrap();
        for (records, positions) in [(&updated, &[][..]), (&updated, &stopped), (&crashed, &stopped)] {
            let mut successor = world.restore(records).unwrap();
            successor.device.resume_queues(positions).unwrap();
            assert_eq!(successor.everything(), world.everything(), "{steps:?}");
        }
    }
}

#[test]
fn a_queue_that_never_starts_again_does_not_stop_the_device() {
    for steps in MISFITS {
        let mut world = after(steps);
        let stopped = world.device.quiesce().unwrap();
        world.device.parent_mut().refuse_start = true;
        world.device.resume_queues(&stopped).unwrap();
        assert!(!world.device.is_quiesced() && world.device.parent().running.is_empty(), "{steps:?}");
        assert!(world.device.vring_infos().all(|info| !info.running));
    }
}

/// Size and addresses that are set while a queue runs, which the simulators' clients can do after a SUSPEND, are for its next
/// start by the client. A restore, GET_VRING_BASE or a new event is none.
#[test]
fn a_queue_goes_on_with_what_it_was_started_with() {
    let settings = [Op::Num(false, 1, 6), ADDR, ENABLE, RUN, Op::Suspend, RUN];
    let mut world = after(&settings);
    let ring = |world: &World| world.device.parent().rings.get(&1).copied();
    let before = ring(&world).unwrap();
    assert_eq!(before.0, 64);
    let get = Op::GetBase(false, 1);
    for op in [Op::Num(false, 1, 7), get, Op::Addr(false, 1, 3, 0), get, Op::Call(false, 1, 1)] {
        world.step(&op);
        world.follow_changes();
        assert_eq!(ring(&world), Some(before), "{op:?}");
    }
    let crashed = world.device.snapshot(&mut world.objects).unwrap();
    let mut successor = world.restore(&crashed).unwrap();
    successor.device.resume_queues(&[]).unwrap();
    assert_eq!(ring(&successor), Some(before));
    for world in [&mut world, &mut successor] {
        world.step(&Op::Enable(false, 1, false));
        world.step(&ENABLE);
        world.step(&RUN);
        let after = ring(world).unwrap();
        assert!(after.0 == 128 && after.1 != before.1, "{after:?}");
    }
}

#[test]
fn a_position_that_no_queue_can_have_is_refused() {
    let mut world = after(&[PACKED, Op::Num(false, 1, 6), ADDR, ENABLE, RUN]);
    world.device.quiesce().unwrap();
    let index = QueueIndex(1);
    let packed = |avail, used| QueueState::Packed {
        last_avail_idx: avail,
        last_avail_wrap: true,
        last_used_idx: used,
        last_used_wrap: true,
    };
    for state in [packed(0x8000, 0), packed(0, 0x8000), QueueState::Split { avail_index: 0 }] {
        let refused = world.device.resume_queues(&[(index, state)]);
        assert_eq!(refused, Err(ResumeError::Position { index, state }));
        assert!(world.device.is_quiesced());
    }
    world.device.resume_queues(&[(index, packed(63, 63))]).unwrap();
    assert_eq!(world.device.parent().running.get(&1), Some(&packed(63, 63)));
}
