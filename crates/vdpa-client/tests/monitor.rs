//! What a machine monitor does with a session and an update: queues of threads, mappings of a virtual IOMMU, its own transport,
//! its own event loop.

#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

#[path = "support/disk.rs"]
mod disk;
#[path = "support/recording.rs"]
mod recording;

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vdpa_client::device::{Device, Present};
use vdpa_client::dma::{Backing, RegionSpec};
use vdpa_client::eventfd::EventFd;
use vdpa_client::features::{BackendFeatures as B, Bit, Features};
use vdpa_client::memory::Memory;
use vdpa_client::mmap::{Prot, SharedMap};
use vdpa_client::ring::Buffer;
use vdpa_client::state::Sections;
use vdpa_client::types::{Perm, QueueIndex};
use vdpa_client::update::{
    Cancel, Cause, ConnectionError, Devices, Failed, Image, Incoming, Loaded, Phase, Plan, Receiving,
    Strategy, Successor, Via,
};
use vdpa_client::vq::QueueState;
use vdpa_client::vring::GuestRing;
use vdpa_client::{Error, Session, memfd};

use disk::Disk;
use recording::{Q0, RecordingDevice, complete_first, negotiated, offered, session};

const ALL: [Bit; 3] = [B::NEW_OWNER, B::SUSPEND, B::RESUME];
const Q1: QueueIndex = QueueIndex(1);

fn ram(size: u64) -> Arc<Memory> {
    Memory::map("ram", memfd::create(c"ram", size, None).unwrap(), 0, size, false).unwrap()
}

fn reap_first(session: &mut Session<RecordingDevice>) {
    complete_first(session);
    assert_eq!(session.queue_mut(Q0).unwrap().reap().unwrap().unwrap().token, 11);
}

/// A program that brings the state to its successor by its own means: everything at once.
#[test]
fn a_parcel_is_all_that_a_successor_needs() {
    for strategy in [Strategy::Live, Strategy::Resume, Strategy::Reset, Strategy::Reopen] {
        let disk = Disk::new(&ALL);
        let plan = Plan::new().strategy(strategy).descriptor("log", File::open("/dev/zero").unwrap());
        let stopped = plan.save(Devices::one("disk0", session(&disk.path)), Sections::new()).unwrap();
        let parcel = stopped.parcel().unwrap();
        let names: Vec<&str> = parcel.descriptors.iter().map(|(name, _)| name.as_str()).collect();
        let mut expected = vec!["memory/0/ram", "disk0/device", "disk0/queue/0/kick", "disk0/queue/0/call"];
        expected.retain(|name| strategy != Strategy::Reopen || *name != "disk0/device");
        assert_eq!(names, [&expected[..], &["own/log"]].concat());
        stopped.release();
        let loaded = Loaded::<RecordingDevice>::load(&parcel.bytes, parcel.descriptors).unwrap();
        assert!(loaded.is_complete());
        assert_eq!(loaded.devices().collect::<Vec<_>>(), [("disk0", strategy)]);
        let mut restored = loaded.take_over().unwrap();
        assert!(restored.descriptors.contains_key("log"));
        reap_first(restored.devices.get_mut("disk0").unwrap());
        let log = disk.log();
        assert_eq!(log.contains("new_owner"), strategy != Strategy::Reopen, "{log}");
        assert_eq!(
            log.contains("status 15"),
            matches!(strategy, Strategy::Reset | Strategy::Reopen),
            "{log}"
        );
    }
}

/// In two parts: the successor has checked the first one and mapped its memory before the devices stop.
#[test]
fn a_parcel_in_two_parts_and_a_roll_back() {
    let disk = Disk::new(&ALL);
    let devices = Devices::one("disk0", session(&disk.path));
    let described = Plan::new().strategy(Strategy::Resume).describe(&devices).unwrap();
    let load = || {
        let parcel = described.parcel().unwrap();
        Loaded::<RecordingDevice>::load(&parcel.bytes, parcel.descriptors).unwrap()
    };
    let (first, second) = (load(), load());
    let error = first.take_over().unwrap_err();
    assert_eq!(error.source.to_string(), "saved state has no section \"vdpa/switch\"");
    assert!(!disk.log().contains("suspend"), "{}", disk.log());

    let stopped = described.stop(devices, Sections::new()).unwrap();
    let switch = stopped.switch().unwrap();
    RecordingDevice::at(&disk.path).fail_next("resume");
    let error = second.take_over_with(&switch).unwrap_err();
    assert_eq!((error.phase, error.device.as_deref()), (Phase::Resume, Some("disk0")));
    let Failed { mut devices, lost, error } =
        *stopped.roll_back("the other one cannot", Successor::MayHaveActed);
    assert!(lost.is_empty());
    assert_eq!(error.source.to_string(), "refused: the other one cannot");
    reap_first(devices.get_mut("disk0").unwrap());
    let all = "suspend, new_owner, resume fails, suspend, new_owner, resume";
    assert_eq!(disk.log().replace("close, ", ""), all);

    let stopped = Plan::new().strategy(Strategy::Resume).save(devices, Sections::new()).unwrap();
    let failed = stopped.roll_back("changed my mind", Successor::Untouched);
    assert_eq!(failed.devices.len(), 1);
    assert!(disk.log().ends_with("resume, suspend, resume"), "{}", disk.log());
}

#[test]
fn what_a_parcel_lacks_is_named() {
    let disk = Disk::new(&ALL);
    let stopped = Plan::new().save(Devices::one("disk0", session(&disk.path)), Sections::new()).unwrap();
    let mut parcel = stopped.parcel().unwrap();
    parcel.descriptors.retain(|(name, _)| name != "disk0/queue/0/call");
    let error = Loaded::<RecordingDevice>::load(&parcel.bytes, parcel.descriptors).unwrap_err();
    assert_eq!(
        error.source.to_string(),
        "saved descriptor disk0/queue/0/call cannot be restored: it was not given"
    );
    let empty: [(String, OwnedFd); 0] = [];
    assert!(
        Loaded::<RecordingDevice>::load(b"else", empty).unwrap_err().source.to_string().contains("4 bytes")
    );
    assert_eq!(stopped.roll_back("bad parcel", Successor::Untouched).devices.len(), 1);
}

#[test]
fn queues_are_taken_by_threads_and_come_back_for_the_switch() {
    let disk = Disk::new(&ALL);
    let mut devices = Devices::one("disk0", session(&disk.path));
    let disk0 = devices.get_mut("disk0").unwrap();
    let queue = disk0.take_queue(Q0).unwrap();
    assert_eq!(
        disk0.take_queue(Q0).unwrap_err().to_string(),
        "queue 0 is taken: give it back with Session::put_queue"
    );
    assert!(disk0.queue(Q0).is_err() && disk0.queue_mut(Q0).is_err());
    // Prepare does not need it.
    let described = Plan::new().describe(&devices).unwrap();
    let failed = described.stop(devices, Sections::new()).unwrap_err();
    assert_eq!(
        failed.error.source.to_string(),
        "queue 0 is taken: give it back with Session::put_queue before the switch"
    );
    let mut devices = failed.devices;
    let queue = thread::spawn(move || {
        assert_eq!(queue.in_flight(), 2);
        queue
    });
    let other_disk = Disk::new(&ALL);
    let mut other = session(&other_disk.path);
    let foreign = other.take_queue(Q0).unwrap();
    let disk0 = devices.get_mut("disk0").unwrap();
    let error = disk0.put_queue(foreign).unwrap_err();
    assert_eq!(error.to_string(), "queue 0 is not the one that was taken from this session");
    disk0.put_queue(queue.join().unwrap()).unwrap();
    reap_first(disk0);
    Plan::new().save(devices, Sections::new()).unwrap().release();
}

/// A guest with a virtual IOMMU maps and unmaps while an update is prepared.
#[test]
fn mappings_without_a_name_do_not_make_a_prepared_update_stale() {
    let disk = Disk::new(&[B::NEW_OWNER, B::SUSPEND, B::RESUME, B::IOTLB_REMAP]);
    let memory = ram(1 << 20);
    let mut session = negotiated(&disk.path);
    session.map_memory("ram", &memory, 0, 0, 1 << 20, Perm::RW).unwrap();
    session.map_at(&memory, 0x3000, 0x1_0000_0000, 0x1000, Perm::RW).unwrap();
    let error = session.map_at(&memory, 0, 0x1_0000_0000, 0x1000, Perm::RW).unwrap_err().to_string();
    assert!(error.contains("overlaps region \"without a name at"), "{error}");
    assert!(session.map_at(&memory, 0, 0x1000, 0x1000, Perm::RW).is_err(), "a region is there");
    assert!(session.map_at(&memory, 1 << 20, 0x2_0000_0000, 0x1000, Perm::RW).is_err(), "outside the memory");
    let error = session.unmap_at(0x1_0000_0000, 0x2000).unwrap_err().to_string();
    assert!(error.contains("is not mapped at"), "{error}");
    session.start().unwrap();
    session.ops().record("--- update").unwrap();
    let mut devices = Devices::one("disk0", session);
    let described = Plan::new().describe(&devices).unwrap();
    let disk0 = devices.get_mut("disk0").unwrap();
    disk0.unmap_at(0x1_0000_0000, 0x1000).unwrap();
    for page in 0..100 {
        disk0.map_at(&memory, 0x1000 * page, 0x1_0000_0000 + 0x1000 * page, 0x1000, Perm::RO).unwrap();
    }
    let parcel = described.parcel().unwrap();
    let loaded = Loaded::<RecordingDevice>::load(&parcel.bytes, parcel.descriptors).unwrap();
    let stopped = described.stop(devices, Sections::new()).unwrap();
    let switch = stopped.switch().unwrap();
    stopped.release();
    let mut restored = loaded.take_over_with(&switch).unwrap();
    assert_eq!(restored.report.device("disk0").unwrap().mappings, 101);
    let disk0 = restored.devices.get_mut("disk0").unwrap();
    assert_eq!(disk0.mappings(), 100);
    assert_eq!(disk.log().matches("remap").count(), 101);
    disk0.unmap_at(0x1_0000_0000, 0x1000).unwrap();

    // Memory that the successor would not have.
    let described = Plan::new().describe(&restored.devices).unwrap();
    restored.devices.get_mut("disk0").unwrap().map_at(&ram(4096), 0, 1 << 40, 4096, Perm::RW).unwrap();
    let failed = described.stop(restored.devices, Sections::new()).unwrap_err();
    assert!(failed.error.source.to_string().contains("maps memory that it did not use then"), "{failed:?}");
}

/// A monitor moves guest memory in its own address space. Only a device that uses addresses is told.
#[test]
fn a_region_is_mapped_elsewhere_in_this_process() {
    for (bits, log) in [(&[B::NEW_OWNER, B::IOTLB_REMAP][..], "remap"), (&[B::NEW_OWNER], "")] {
        let disk = Disk::new(bits);
        let memory = ram(1 << 16);
        let mut session = negotiated(&disk.path);
        session.map_memory("ram", &memory, 0, 0x10_0000, 1 << 16, Perm::RW).unwrap();
        session.ops().record("--- update").unwrap();
        let again = || memory.object().unwrap().0.try_clone_to_owned().unwrap();
        let moved = Memory::map("moved", again(), 0, 1 << 16, false).unwrap();
        session.remap("ram", &moved).unwrap();
        assert_eq!(session.region("ram").unwrap().uaddr(), moved.uaddr());
        assert_eq!(disk.log(), log);
        for other in [ram(1 << 16), Memory::map("part", again(), 0, 1 << 15, false).unwrap()] {
            let error = session.remap("ram", &other).unwrap_err().to_string();
            assert!(error.starts_with("region \"ram\" cannot be remapped to that memory"), "{error}");
        }
        assert!(session.remap("rom", &moved).is_err());
        assert_eq!(disk.log(), log, "nothing else was sent");
    }
}

/// The queues of a guest are at positions of their own, and not all are enabled: as after a migration, or with several pairs.
#[test]
fn a_guests_queue_begins_where_it_was_and_need_not_be_enabled() {
    let disk = Disk::new(&ALL);
    let mut session = negotiated(&disk.path);
    session.map_memory("ram", &ram(1 << 20), 0, 0, 1 << 20, Perm::RW).unwrap();
    let event = || EventFd::new().unwrap();
    let ring = |at| GuestRing { size: 64, desc: at, driver: at + 0x1000, device: at + 0x2000 };
    let base = QueueState::Split { avail_index: 777 };
    session.add_guest_queue_at(Q0, ring(0), event(), event(), base, true).unwrap();
    let base = QueueState::Split { avail_index: 3 };
    session.add_guest_queue_at(Q1, ring(0x4000), event(), event(), base, false).unwrap();
    let error = session.add_guest_queue(QueueIndex(99), ring(0x8000), event(), event()).unwrap_err();
    assert_eq!(error.to_string(), "queue 99 does not exist: the device has 2 queues, from 0 to 1");
    session.start().unwrap();
    let text = std::fs::read_to_string(&disk.path).unwrap();
    assert!(text.ends_with("base 777\nenable\nbase 3\nstatus 15\n"), "{text}");
    session.ops().record("--- update").unwrap();

    let devices = Devices::one("disk0", session);
    let stopped = Plan::new().strategy(Strategy::Reset).save(devices, Sections::new()).unwrap();
    let parcel = stopped.parcel().unwrap();
    stopped.release();
    let loaded = Loaded::<RecordingDevice>::load(&parcel.bytes, parcel.descriptors).unwrap();
    let mut restored = loaded.take_over().unwrap();
    let disk0 = restored.devices.get_mut("disk0").unwrap();
    assert!(disk0.guest_queue(Q0).unwrap().enabled() && !disk0.guest_queue(Q1).unwrap().enabled());
    assert_eq!(disk.log().matches("enable").count(), 1, "{}", disk.log());
    disk0.set_queue_enabled(Q1, true).unwrap();
    assert!(disk0.guest_queue(Q1).unwrap().enabled());
    assert_eq!(disk0.vring_base(Q0).unwrap(), QueueState::Split { avail_index: 1 });
    assert!(disk0.vring_base(QueueIndex(7)).is_err());
}

#[test]
fn a_suspended_device_stays_suspended() {
    let disk = Disk::new(&ALL);
    let mut devices = Devices::one("disk0", session(&disk.path));
    devices.get_mut("disk0").unwrap().suspend().unwrap();
    let error = Plan::new().strategy(Strategy::Resume).describe(&devices).unwrap_err();
    assert!(
        error.source.to_string().starts_with("the device is suspended, and strategy resume would"),
        "{error:?}"
    );
    let stopped = Plan::new().save(devices, Sections::new()).unwrap();
    let parcel = stopped.parcel().unwrap();
    stopped.release();
    let loaded = Loaded::<RecordingDevice>::load(&parcel.bytes, parcel.descriptors).unwrap();
    let mut restored = loaded.take_over().unwrap();
    restored.devices.get_mut("disk0").unwrap().resume().unwrap();
    assert_eq!(disk.log().replace("close, ", ""), "suspend, new_owner, resume");
}

/// A device that was set up by other means is driven and updated like any other.
#[test]
fn a_device_that_somebody_else_set_up_is_assumed() {
    let disk = Disk::new(&ALL);
    let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    // "Somebody else".
    let mut theirs = negotiated(&disk.path);
    let memory = ram(1 << 20);
    theirs.map_memory("ram", &memory, 0, 0, 1 << 20, Perm::RW).unwrap();
    let ring = GuestRing { size: 64, desc: 0, driver: 0x1000, device: 0x2000 };
    let (kick, call) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    theirs.add_guest_queue(Q0, ring, kick.clone(), call.clone()).unwrap();
    theirs.start().unwrap();
    theirs.ops().record("--- update").unwrap();
    let fd = theirs.as_fd().try_clone_to_owned().unwrap();

    let spec = || RegionSpec {
        name: "ram".to_owned(),
        backing: Backing::Memory(Arc::clone(&memory), 0),
        iova: 0,
        size: 1 << 20,
        perm: Perm::RW,
        populate: false,
    };
    let present = Present::new(Features(u64::MAX), offered(&ALL));
    let copy = fd.try_clone().unwrap();
    let error = Session::<RecordingDevice>::assume(copy, present).unwrap_err().to_string();
    assert!(error.starts_with("the device does not offer 0x"), "{error}");
    let present = Present::new(features, offered(&ALL)).region(spec());
    let present = present.guest_queue(Q0, ring, kick.clone(), call.clone(), true);
    let session = Session::<RecordingDevice>::assume(fd, present).unwrap();
    assert_eq!(disk.log().replace("close", ""), "", "nothing changes");
    let stopped = Plan::new().save(Devices::one("disk0", session), Sections::new()).unwrap();
    let parcel = stopped.parcel().unwrap();
    stopped.release();
    let loaded = Loaded::<RecordingDevice>::load(&parcel.bytes, parcel.descriptors).unwrap();
    let restored = loaded.take_over().unwrap();
    assert_eq!(restored.devices.get("disk0").unwrap().guest_queue(Q0).unwrap().ring(), ring);
    assert!(disk.log().ends_with("new_owner"), "{}", disk.log());
}

#[test]
fn what_a_device_offers_is_known_before_it_is_touched() {
    let disk = Disk::new(&ALL);
    let device = Device::<RecordingDevice>::open(&disk.path).unwrap();
    let offers = device.offered().unwrap();
    assert_eq!((offers.device_id, offers.queues, offers.queue_size_max), (2, 2, 256));
    assert_eq!(offers.backend_features, offered(&ALL));
    let required = Features::of(&[Features::BLK_FLUSH, Features::RING_PACKED]);
    let error = device.negotiate_required(required, Features::NONE).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the device does not offer 0x400000000 (RING_PACKED); it offers 0x300000a00 (FLUSH CONFIG_WCE VERSION_1 ACCESS_PLATFORM)"
    );
    let text = std::fs::read_to_string(&disk.path).unwrap();
    assert_eq!(text, "open\nclose\n");
    let device = Device::<RecordingDevice>::open(&disk.path).unwrap();
    let session = device.negotiate_required(Features::of(&[Features::BLK_FLUSH]), Features::NONE).unwrap();
    assert!(session.features().has(Features::BLK_FLUSH));
}

/// Waits at most 20 s until a step is worth while.
fn readable(fd: impl std::os::fd::AsFd) -> bool {
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).unwrap() == 1
}

/// Both sides in one thread, each in steps: neither may block.
#[test]
fn a_hand_over_in_steps_of_one_event_loop() {
    let disk = Disk::new(&ALL);
    let devices = Devices::one("disk0", session(&disk.path));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut receiving = Receiving::new(theirs).unwrap();
    assert!(receiving.step::<RecordingDevice>().unwrap().is_none());
    let described = Plan::new().describe(&devices).unwrap();
    let mut preparing = described.begin(Via::HandOver(ours)).unwrap();
    assert!(preparing.step().unwrap().is_none());
    assert!(readable(&receiving));
    let incoming: Incoming<RecordingDevice> = receiving.step().unwrap().unwrap();
    assert!(preparing.step().unwrap().is_none(), "it has not said that it is ready");
    let mut taking = incoming.begin_take_over().unwrap();
    assert!(taking.step().unwrap().is_none());
    assert!(readable(&preparing));
    let prepared = preparing.step().unwrap().unwrap();
    assert!(preparing.step().is_err(), "its last step was made");
    let (left, taken) = thread::scope(|scope| {
        let left = scope.spawn(|| prepared.switch(devices, Sections::new()));
        let taken = loop {
            assert!(readable(&taking));
            if let Some(restored) = taking.step().unwrap() {
                break restored;
            }
        };
        (left.join().unwrap(), taken)
    });
    left.unwrap();
    let mut devices = taken.devices;
    reap_first(devices.get_mut("disk0").unwrap());
}

#[test]
fn every_wait_ends_by_time_and_by_cancel() {
    let soon = Duration::from_millis(10);
    let disk = Disk::new(&ALL);
    let devices = Devices::one("disk0", session(&disk.path));
    let over = |cause: &Cause| matches!(cause, Cause::Connection(ConnectionError::TimedOut));
    let cancelled = |cause: &Cause| matches!(cause, Cause::Connection(ConnectionError::Cancelled));

    let (_silent, theirs) = UnixStream::pair().unwrap();
    let receiving = Receiving::from_user(theirs, None, Some(soon), None).unwrap();
    let error = receiving.receive::<RecordingDevice>().unwrap_err();
    assert!(over(&error.source), "{error:?}");
    let (_silent, theirs) = UnixStream::pair().unwrap();
    let cancel = Cancel::new().unwrap();
    let receiving = Receiving::from_user(theirs, None, None, Some(&cancel)).unwrap();
    cancel.cancel();
    let error = receiving.receive::<RecordingDevice>().unwrap_err();
    assert!(cancelled(&error.source), "{error:?}");

    let (ours, silent) = UnixStream::pair().unwrap();
    let error = Plan::new().prepare_timeout(soon).prepare(&devices, Via::HandOver(ours)).unwrap_err();
    drop(silent);
    let pid = std::process::id();
    assert_eq!(
        error.source.to_string(),
        format!("the successor (process {pid}) was not ready within 10ms (Plan::prepare_timeout)")
    );

    // The successor has said that it is ready, and nobody switches.
    for cancels in [false, true] {
        let cancel = Cancel::new().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            let successor = scope.spawn(|| {
                let incoming = Incoming::<RecordingDevice>::receive(theirs).unwrap();
                let incoming = if cancels { incoming.cancel(&cancel) } else { incoming.time_out(soon) };
                incoming.take_over().unwrap_err()
            });
            let prepared = Plan::new().prepare(&devices, Via::HandOver(ours)).unwrap();
            if cancels {
                cancel.cancel();
            }
            let error = successor.join().unwrap();
            assert!(if cancels { cancelled(&error.source) } else { over(&error.source) }, "{error:?}");
            drop(prepared);
        });
    }
}

/// A successor that gives up between two steps: the predecessor, which is about to switch, keeps its devices and kills nobody.
#[test]
fn a_take_over_that_is_dropped_leaves_everything_there() {
    let disk = Disk::new(&ALL);
    let devices = Devices::one("disk0", session(&disk.path));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut receiving = Receiving::new(theirs).unwrap();
    let mut preparing = Plan::new().describe(&devices).unwrap().begin(Via::HandOver(ours)).unwrap();
    preparing.step().unwrap();
    let incoming: Incoming<RecordingDevice> = receiving.step().unwrap().unwrap();
    let taking = incoming.begin_take_over().unwrap();
    let prepared = preparing.step().unwrap().unwrap();
    drop(taking);
    let mut failed = prepared.switch(devices, Sections::new()).unwrap_err();
    let text = failed.error.source.to_string();
    assert!(text.ends_with("failed in phase prepare: refused: the successor has given up"), "{text}");
    assert!(failed.lost.is_empty());
    reap_first(failed.devices.get_mut("disk0").unwrap());
}

/// A program that was started and does not know of updates: once it hung the prepare for as long as it ran.
#[test]
fn a_child_that_never_asks_is_given_up() {
    let disk = Disk::new(&ALL);
    let devices = Devices::one("disk0", session(&disk.path));
    let plan = || Plan::new().prepare_timeout(Duration::from_millis(100)).grace(Duration::from_millis(10));
    let sleeps = Image::new("/bin/sleep").args(["sleep", "60"]);
    let begin = std::time::Instant::now();
    let error = plan().prepare(&devices, Via::Fork(sleeps)).unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(20), "the child is killed");
    let text = error.source.to_string();
    assert!(text.ends_with("(Plan::prepare_timeout); does its main call update::incoming()?"), "{text}");
    let error =
        Plan::new().prepare(&devices, Via::Fork(Image::new("/bin/false").args(["false"]))).unwrap_err();
    let text = error.source.to_string();
    assert!(text.ends_with("has ended before it was ready: exit status: 1"), "{text}");
}

/// Memory that the caller has mapped is as good for a ring as memory that the library has mapped.
#[test]
fn a_ring_lies_in_memory_of_the_caller() {
    let disk = Disk::new(&ALL);
    let fd = memfd::create(c"own", 1 << 16, None).unwrap();
    let map = SharedMap::map(&fd, 0, 1 << 16, Prot::RW, false).unwrap();
    let memory = Memory::from_mapping("own", fd, 0, map.clone()).unwrap();
    let mut session = negotiated(&disk.path);
    session.map_memory("own", &memory, 0, 0, 1 << 15, Perm::RW).unwrap();
    session.map_memory("rom", &memory, 1 << 15, 1 << 15, 1 << 15, Perm::RO).unwrap();
    let error = session.add_queue(Q0, 16, "rom", 0).unwrap_err().to_string();
    assert_eq!(error, "queue 0 needs a region that the device may read and write; this one is ro");
    let error = session.add_queue(Q0, 256, "own", (1 << 15) - 16).unwrap_err().to_string();
    assert!(error.contains("was given offset 0x7ff0 of a region of 32768 bytes"), "{error}");
    session.add_queue(Q0, 16, "own", 0x1000).unwrap();
    let queue = session.queue_mut(Q0).unwrap();
    queue.submit(&[Buffer { iova: 0x123, len: 16 }], &[], 1).unwrap();
    assert_eq!(map.load_u64(0x1000), Ok(0x123), "the descriptor is in the caller's mapping");
}

#[test]
fn errors_say_what_would_be_right() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let device = Device::<vdpa_client::vhost_vdpa::VhostVdpaFd>::from_fd(reader.into()).unwrap();
    let error = device.negotiate(Features::NONE).unwrap_err();
    assert!(matches!(error, Error::NoDevice { .. }));
    assert!(error.to_string().starts_with("this is no vhost-vdpa device: "), "{error}");
    assert!(Error::Owned.to_string().contains("calls update::incoming() or Session::assume()"));
}
