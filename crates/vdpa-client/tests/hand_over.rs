//! Hand-overs of sessions to another process, with a device file that records every request. Most tests run predecessor and
//! successor as two threads of one process: the tests check the messages and requests, and the device does not distinguish
//! processes.

#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

#[path = "support/disk.rs"]
mod disk;
#[path = "support/recording.rs"]
mod recording;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vdpa_client::device::Device;
use vdpa_client::memory::Memory;
use vdpa_client::state::{Section, Sections};
use vdpa_client::update::{
    self, Cancel, Cause, Completed, ConnectionError, Devices, Failed, Image, Incoming, Phase, Plan, Restored,
    Strategy, UpdateError, Via, Way,
};
use vdpa_client::vring::GuestRing;
use vdpa_core::features::{BackendFeatures as B, Bit, Features};
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;

use disk::Disk;
use recording::{Q0, RecordingDevice, complete_first, session, started};

const ALL: [Bit; 3] = [B::NEW_OWNER, B::SUSPEND, B::RESUME];

impl Disk {
    fn devices(&self) -> Devices<RecordingDevice> {
        Devices::one("disk0", session(&self.path))
    }
}

type Switched = Result<Completed, Box<Failed<RecordingDevice>>>;

/// Hands the devices over to a thread of this process.
fn hand_over(
    devices: Devices<RecordingDevice>,
    plan: Plan,
    late: Sections,
    successor: impl FnOnce(Incoming<RecordingDevice>) -> Result<Restored<RecordingDevice>, UpdateError> + Send,
) -> (Switched, Result<Restored<RecordingDevice>, UpdateError>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let taken = scope.spawn(|| successor(Incoming::receive(theirs)?));
        let left = match plan.prepare(&devices, Via::HandOver(ours)) {
            Ok(prepared) => prepared.switch(devices, late),
            Err(error) => Err(Box::new(Failed { error, devices, lost: Vec::new() })),
        };
        (left, taken.join().unwrap())
    })
}

/// Removes the successor's GET_VRING_BASE from the requests. It must be the first one: by it the device's server learns of
/// the successor.
#[track_caller]
fn without_first_get_base(log: &str, strategy: Strategy) -> &str {
    match strategy {
        Strategy::Reopen => log,
        _ => log.strip_prefix("get_base, ").unwrap(),
    }
}

fn works(devices: &mut Devices<RecordingDevice>) {
    let session = devices.get_mut("disk0").unwrap();
    complete_first(session);
    assert_eq!(session.queue_mut(Q0).unwrap().in_flight(), 2);
    assert_eq!(session.queue_mut(Q0).unwrap().reap().unwrap().unwrap().token, 11);
}

#[test]
fn every_strategy_and_its_requests() {
    let handshake = "status 0, status 1, status 3, features, status 11";
    let up = "base 1, enable";
    let expected = [
        (Strategy::Live, "new_owner".to_owned()),
        (Strategy::Resume, "suspend, new_owner, resume".to_owned()),
        (Strategy::Reset, format!("suspend, get_base, status 0, new_owner, {handshake}, {up}, status 15")),
        (
            Strategy::Reopen,
            format!(
                "suspend, get_base, close, open, set_owner, {handshake}, begin, update, end, {up}, status 15"
            ),
        ),
    ];
    for (strategy, requests) in expected {
        let disk = Disk::new(&ALL);
        let (left, taken) =
            hand_over(disk.devices(), Plan::new().strategy(strategy), Sections::new(), Incoming::take_over);
        let report = left.unwrap().report;
        let log = disk.log();
        let log = without_first_get_base(&log, strategy);
        // Predecessor and successor each close their descriptor of the file, in any order, and the file records both.
        assert_eq!(log.replace(", close", "").replace("get_base, open", "get_base, close, open"), requests);
        let mut restored = taken.unwrap();
        works(&mut restored.devices);
        let device = restored.report.device("disk0").unwrap();
        assert_eq!((device.strategy, device.mappings, device.queues), (strategy, 1, 1));
        assert_eq!((report.way, restored.report.way), (Way::HandOver, Way::HandOver));
        assert!(report.total > 0 && restored.report.total > 0, "{report:?}");
        assert_eq!(report.device("disk0").unwrap().new_owner, device.new_owner);
    }
}

/// A guest that has set its disk to write-through does not notice that the device was reset.
#[test]
fn the_write_cache_is_as_the_driver_has_set_it() {
    const WRITEBACK: u32 = 32;
    let features = Features::of(&[Features::BLK_FLUSH, Features::BLK_CONFIG_WCE]);
    let cases = [
        (Strategy::Live, false, None),
        (Strategy::Resume, false, None),
        (Strategy::Reset, false, Some("status 11, config 32: 0, base 1, enable, status 15")),
        (Strategy::Reopen, false, Some("end, config 32: 0, base 1, enable, status 15")),
        (Strategy::Reset, true, Some("status 11, config 32: 0, base 1, enable, status 15")),
    ];
    for (strategy, fails, requests) in cases {
        let disk = Disk::new(&ALL);
        let session =
            started(Device::<RecordingDevice>::open(&disk.path).unwrap().negotiate(features).unwrap());
        session.ops().set_config(WRITEBACK, &[0]).unwrap();
        let devices = Devices::one("disk0", session);
        let (left, taken) = hand_over(devices, Plan::new().strategy(strategy), Sections::new(), |incoming| {
            if fails {
                RecordingDevice::at(&disk.path).fail_next("new_owner");
            }
            incoming.take_over()
        });
        let devices = if fails { left.unwrap_err().devices } else { taken.unwrap().devices };
        let mut byte = [7];
        devices.get("disk0").unwrap().ops().config(WRITEBACK, &mut byte).unwrap();
        assert_eq!(byte, [0], "{strategy:?}");
        let log = disk.log().replace(", close", "");
        let again = log.split_once("config 32: 0, ").unwrap().1;
        match requests {
            Some(requests) => assert!(again.ends_with(requests), "{strategy:?}: {again}"),
            None => assert!(!again.contains("config"), "{strategy:?}: {again}"),
        }
    }
}

#[test]
fn sections_and_descriptors_arrive() {
    let disk = Disk::new(&ALL);
    let plan = Plan::new()
        .section(Section::new("config", 1, b"early".to_vec()))
        .section(Section::new("hint", 9, b"skip me".to_vec()).optional())
        .late_section("cpu", 2, false)
        .late_section("tlb", 1, true)
        .descriptor("zero", File::open("/dev/zero").unwrap())
        .descriptor("null", File::open("/dev/null").unwrap());
    let late = Sections::from_iter([Section::new("cpu", 2, b"late".to_vec())]);
    let (left, taken) = hand_over(disk.devices(), plan, late, |incoming| {
        let mut incoming = incoming.understands(&[("config", 1..=2), ("cpu", 1..=2)])?;
        assert_eq!(incoming.sections().take("config").unwrap().payload, b"early");
        assert_eq!(incoming.late().len(), 2);
        assert!(incoming.descriptors().remove("null").is_some(), "while the predecessor has the device");
        incoming.take_over()
    });
    left.unwrap();
    let mut restored = taken.unwrap();
    assert_eq!(restored.sections.take("cpu").unwrap().payload, b"late");
    restored.sections.ensure_consumed().unwrap();
    assert_eq!(restored.descriptors.into_keys().collect::<Vec<_>>(), ["zero"]);
}

#[test]
fn a_section_that_is_not_understood_is_found_while_the_device_runs() {
    let refusals: [(Plan, &str); 3] = [
        (Plan::new().section(Section::new("config", 3, vec![])), "section \"config\" has version 3"),
        (
            Plan::new().late_section("cpu", 1, false),
            "has a section \"cpu\" (version 1) that this program does not know",
        ),
        (Plan::new(), "refused: not today"),
    ];
    for (plan, reason) in refusals {
        let disk = Disk::new(&ALL);
        let (left, taken) = hand_over(disk.devices(), plan, Sections::new(), |incoming| {
            let incoming = incoming.understands(&[("config", 1..=2)])?;
            Err(incoming.refuse("not today"))
        });
        let mut failed = left.unwrap_err();
        assert_eq!(failed.error.phase, Phase::Prepare);
        let text = failed.error.source.to_string();
        assert!(text.contains("failed in phase load: ") && text.contains(reason), "{text}");
        assert!(taken.unwrap_err().source.to_string().contains(reason.trim_start_matches("refused: ")));
        works(&mut failed.devices);
        assert!(!disk.log().contains("suspend"), "{}", disk.log());
    }
}

/// Each request of the successor fails once. The predecessor continues with its device and reports which phase failed.
#[test]
fn what_fails_in_the_successor_is_rolled_back() {
    let handshake = "status 0, status 1, status 3, features, status 11";
    let cases = [
        (Strategy::Live, "new_owner", Phase::NewOwner, "new_owner fails, new_owner".to_owned()),
        (
            Strategy::Resume,
            "new_owner",
            Phase::NewOwner,
            "suspend, new_owner fails, suspend, new_owner, resume".to_owned(),
        ),
        (
            Strategy::Resume,
            "resume",
            Phase::Resume,
            "suspend, new_owner, resume fails, suspend, new_owner, resume".to_owned(),
        ),
        (
            Strategy::Reset,
            "new_owner",
            Phase::NewOwner,
            format!(
                "suspend, get_base, status 0, new_owner fails, new_owner, {handshake}, base 1, enable, status 15"
            ),
        ),
    ];
    for (strategy, request, phase, requests) in cases {
        let disk = Disk::new(&ALL);
        let (left, taken) =
            hand_over(disk.devices(), Plan::new().strategy(strategy), Sections::new(), |incoming| {
                RecordingDevice::at(&disk.path).fail_next(request);
                incoming.take_over()
            });
        let mut failed = left.unwrap_err();
        assert_eq!(failed.error.phase, phase, "{:?}", failed.error);
        assert_eq!(failed.error.device.as_deref(), Some("disk0"));
        assert_eq!(taken.unwrap_err().phase, phase);
        assert!(failed.lost.is_empty());
        works(&mut failed.devices);
        assert_eq!(without_first_get_base(&disk.log().replace(", close", ""), strategy), requests);
    }
}

/// The device whose SUSPEND fails and the device that was suspended already both get a report that the update was rolled
/// back, with the reason.
#[test]
fn what_fails_before_the_successor_is_asked_is_reported_too() {
    let disks = [Disk::new(&ALL), Disk::new(&ALL)];
    let mut devices = Devices::new();
    for (name, disk) in ["disk0", "disk1"].into_iter().zip(&disks) {
        let mut session = recording::negotiated(&disk.path);
        session.start().unwrap();
        session.ops().record("--- update").unwrap();
        devices.push(name, session);
    }
    RecordingDevice::at(&disks[1].path).fail_next("suspend");
    let plan = Plan::new().strategy(Strategy::Resume);
    let (left, taken) = hand_over(devices, plan, Sections::new(), Incoming::take_over);
    let failed = left.unwrap_err();
    assert_eq!((failed.error.phase, failed.error.device.as_deref()), (Phase::Suspend, Some("disk1")));
    assert_eq!(failed.devices.len(), 2);
    assert!(taken.is_err());
    let why = "1 update failed in phase suspend of device disk1: VHOST_VDPA_SUSPEND failed: ";
    for disk in &disks {
        let reports = std::fs::read_to_string(disk.path.with_extension("reports")).unwrap();
        assert!(reports.starts_with(why) && reports.lines().count() == 1, "{reports:?}");
    }
    // The log also has the close of the successor's descriptor.
    assert_eq!(disks[0].log().replace(", close", ""), "suspend, resume");
}

/// If the successor does not answer in time, the update is aborted: the successor drops its devices and gets the reason.
#[test]
fn a_successor_that_is_late_is_called_off() {
    for strategy in [Strategy::Live, Strategy::Resume, Strategy::Reset] {
        let disk = Disk::new(&ALL);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let devices = disk.devices();
        thread::scope(|scope| {
            let taken = scope.spawn(|| Incoming::<RecordingDevice>::receive(theirs)?.take_over());
            let plan = Plan::new().strategy(strategy).deadline(Duration::from_millis(20));
            let prepared = plan.prepare(&devices, Via::HandOver(ours)).unwrap();
            std::fs::write(disk.path.with_extension("stall"), "new_owner").unwrap();
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(100));
                std::fs::remove_file(disk.path.with_extension("stall")).unwrap();
            });
            let mut failed = prepared.switch(devices, Sections::new()).unwrap_err();
            assert!(
                matches!(failed.error.source, Cause::Connection(ConnectionError::TimedOut)),
                "{:?}",
                failed.error
            );
            assert!(failed.lost.is_empty());
            works(&mut failed.devices);
            let error = taken.join().unwrap().unwrap_err();
            assert!(matches!(error.source, Cause::Aborted), "{error:?}");
        });
        let log = disk.log();
        // One by the successor, then one by the predecessor, which takes the device back.
        assert_eq!(log.matches("new_owner").count(), 2, "{log}");
    }
}

#[test]
fn a_prepare_can_be_cancelled_and_dropped() {
    let disk = Disk::new(&ALL);
    let devices = disk.devices();
    let (ours, silent) = UnixStream::pair().unwrap();
    let cancel = Cancel::new().unwrap();
    let begin = Instant::now();
    let error = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(20));
            cancel.cancel();
        });
        Plan::new().cancel(&cancel).prepare(&devices, Via::HandOver(ours)).unwrap_err()
    });
    drop(silent);
    assert!(matches!(error.source, Cause::Connection(ConnectionError::Cancelled)), "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(20));

    let (ours, theirs) = UnixStream::pair().unwrap();
    let error = thread::scope(|scope| {
        let taken = scope.spawn(|| Incoming::<RecordingDevice>::receive(theirs)?.take_over());
        drop(Plan::new().prepare(&devices, Via::HandOver(ours)).unwrap());
        taken.join().unwrap().unwrap_err()
    });
    assert!(matches!(error.source, Cause::Aborted), "{error:?}");
    assert!(!disk.log().contains("new_owner"), "{}", disk.log());
}

/// A virtual machine monitor with two devices that share one memory. Of the rings of each device, the guest drives one and
/// the program itself the other.
#[test]
fn a_guests_rings_and_shared_memory_are_carried_over() {
    let disks = [Disk::new(&ALL), Disk::new(&[B::SUSPEND])];
    let memory =
        Memory::map("ram", memfd::create(c"ram", 1 << 20, None).unwrap(), 0, 1 << 20, false).unwrap();
    let mut devices = Devices::new();
    let events: Vec<EventFd> = (0..4).map(|_| EventFd::new().unwrap()).collect();
    let copy = |event: &EventFd| {
        use std::os::fd::AsFd as _;
        EventFd::from_fd(event.as_fd().try_clone_to_owned().unwrap()).unwrap()
    };
    let ring = GuestRing { size: 128, desc: 0x1000, driver: 0x2000, device: 0x3000 };
    for ((name, disk), events) in ["disk0", "disk1"].into_iter().zip(&disks).zip(events.chunks(2)) {
        let mut session = recording::negotiated(&disk.path);
        session.map_memory("low", &memory, 0, 0, 0x8_0000, Perm::RW).unwrap();
        session.map_memory("high", &memory, 0x8_0000, 0x1_0000_0000, 0x8_0000, Perm::RW).unwrap();
        let (kick, call) = (copy(&events[0]), copy(&events[1]));
        session.add_guest_queue(Q0, ring, kick, call).unwrap();
        session.add_queue(QueueIndex(1), 8, "high", 0x1000).unwrap();
        let error = session.queue_mut(Q0).unwrap_err().to_string();
        assert_eq!(error, "queue 0 is a ring of a guest, not of this program");
        session.start().unwrap();
        session.ops().record("--- update").unwrap();
        devices.push(name, session);
    }
    let (left, taken) = hand_over(devices, Plan::new(), Sections::new(), Incoming::take_over);
    left.unwrap();
    let Restored { devices, report, .. } = taken.unwrap();
    let strategies: Vec<Strategy> = report.devices.iter().map(|d| d.strategy).collect();
    assert_eq!(strategies, [Strategy::Live, Strategy::Reopen], "the best that each can do");
    for ((_, session), events) in devices.iter().zip(events.chunks(2)) {
        let queue = session.guest_queue(Q0).unwrap();
        assert_eq!(queue.ring(), ring);
        events[1].signal();
        assert_eq!(queue.call().drain(), 1, "it is the caller's own");
        assert_eq!(session.queue(QueueIndex(1)).unwrap().region(), "high");
        let error = session.queue(Q0).unwrap_err().to_string();
        assert_eq!(error, "queue 0 is a ring of a guest, not of this program");
        let error = session.guest_queue(QueueIndex(1)).unwrap_err().to_string();
        assert_eq!(error, "queue 1 is a ring of this program, not of a guest");
        let error = session.queue(QueueIndex(2)).unwrap_err().to_string();
        assert_eq!(error, "queue 2 is not set up");
        let regions: Vec<_> = session.regions().iter().map(|r| (r.name(), r.offset())).collect();
        assert_eq!(regions, [("low", 0), ("high", 0x8_0000)]);
    }
    let uaddr = |name| devices.get(name).unwrap().region("low").unwrap().uaddr();
    assert_eq!(uaddr("disk0"), uaddr("disk1"), "mapped once");
    assert_ne!(uaddr("disk0"), memory.uaddr(), "and not where the predecessor has it");
}

#[test]
fn peers_of_another_protocol_and_other_sockets_are_refused() {
    let disk = Disk::new(&ALL);
    let devices = disk.devices();
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let error = Plan::new().prepare(&devices, Via::HandOver(ours)).unwrap_err();
    assert!(matches!(error.source, Cause::Connection(ConnectionError::Closed)), "{error:?}");
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = UnixStream::from(std::os::fd::OwnedFd::from(udp));
    let error = Plan::new().prepare(&devices, Via::HandOver(socket)).unwrap_err();
    assert_eq!(error.source.to_string(), "the descriptor is not a Unix stream socket");
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut theirs, b"HTTP/1.1 400 Bad Request\r\n").unwrap();
    let error = Plan::new().prepare(&devices, Via::HandOver(ours)).unwrap_err();
    assert!(error.source.to_string().contains("does not speak this protocol"), "{error:?}");
}

/// The program that [`a_child_takes_over`] and similar tests start. They select this test by libtest's arguments.
#[test]
fn child() {
    let Ok(part) = std::env::var("PART") else {
        assert!(
            update::incoming::<RecordingDevice>().unwrap().is_none(),
            "nobody has left anything to this process"
        );
        return;
    };
    let incoming = update::incoming::<RecordingDevice>();
    let taken = match part.as_str() {
        "take" => incoming.unwrap().unwrap().take_over(),
        "refuse" => Err(incoming.unwrap().unwrap().refuse("not this one")),
        "die" => std::process::exit(7),
        "die ready" => {
            let _incoming = incoming.unwrap().unwrap();
            std::process::exit(7)
        }
        other => panic!("{other}"),
    };
    if let Ok(mut restored) = taken {
        assert_eq!(restored.report.way, Way::Fork);
        works(&mut restored.devices);
        restored.devices.get("disk0").unwrap().ops().record("--- served").unwrap();
    }
}

fn image(part: &str) -> Image {
    Image::new(std::env::current_exe().unwrap())
        .args(["x", "child", "--exact", "--nocapture"])
        .env("PART", part)
}

#[test]
fn a_child_takes_over() {
    let disk = Disk::new(&ALL);
    let devices = disk.devices();
    // Prepares on another thread, as a program does that drives its devices meanwhile.
    let described = Plan::new().describe(&devices).unwrap();
    let prepared = thread::spawn(|| described.prepare(Via::Fork(image("take"))));
    let prepared = prepared.join().unwrap().unwrap();
    assert_ne!(prepared.successor(), i32::try_from(std::process::id()).unwrap());
    assert_eq!(disk.log(), "get_base", "only the request by which the server learns of the successor");
    let mut departed = prepared.switch(devices, Sections::new()).unwrap();
    assert!(departed.child.as_mut().unwrap().wait().unwrap().success());
    assert_eq!(departed.report.way, Way::Fork);
    let log = disk.log().replace(", close", "");
    assert_eq!(without_first_get_base(&log, Strategy::Live), "new_owner, --- served");
}

#[test]
fn a_child_that_fails_leaves_everything_here() {
    for (part, reason) in [
        ("refuse", "failed in phase load: refused: not this one"),
        ("die", "has ended before it was ready: exit status: 7"),
        ("die ready", "the successor has given up"),
    ] {
        let disk = Disk::new(&ALL);
        let mut devices = disk.devices();
        let error = Plan::new().prepare(&devices, Via::Fork(image(part))).unwrap_err();
        let text = error.source.to_string();
        // A process that calls exit runs no destructors, so the successor may send nothing before its socket is closed.
        let gone = part == "die ready" && text.ends_with("has ended before it was ready: exit status: 7");
        assert!(text.contains(reason) || gone, "{part}: {text}");
        works(&mut devices);
        // The log may have the close of the child's descriptor.
        assert_eq!(disk.log().replace("close", ""), "", "{part}");
    }
    let disk = Disk::new(&ALL);
    let devices = disk.devices();
    let error = Plan::new().prepare(&devices, Via::Fork(Image::new("/bin/nothing"))).unwrap_err();
    assert!(error.source.to_string().contains("/bin/nothing cannot be run"), "{error:?}");
}

/// A dry run finds errors that would otherwise occur only after the exec, and changes nothing.
#[test]
fn a_dry_run_asks_the_new_image_before_the_exec() {
    let disk = Disk::new(&ALL);
    let mut devices = disk.devices();
    let error = Plan::new().dry_run().prepare(&devices, Via::Exec(image("refuse"))).unwrap_err();
    assert!(error.source.to_string().contains("refused: not this one"), "{error:?}");
    let prepared = Plan::new().dry_run().prepare(&devices, Via::Exec(image("take"))).unwrap();
    drop(prepared);
    works(&mut devices);
    assert_eq!(disk.log().replace("close", "").replace(", ", ""), "");
    let prepared = Plan::new().prepare(&devices, Via::Exec(Image::new(Path::new("/bin/true")))).unwrap();
    assert_eq!(prepared.strategy("disk0"), Some(Strategy::Live));
}

/// A third process may have created the socket pair. The process that is killed is nevertheless the one that answers.
#[test]
fn the_process_that_answers_is_the_one_that_is_killed() {
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::process::ExitStatusExt;

    let disk = Disk::new(&ALL);
    let devices = disk.devices();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    let inode = rustix::fs::fstat(&theirs).unwrap().st_ino;
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["child", "--exact", "--nocapture"]).env("PART", "take");
    command.env(update::SOCKET_VARIABLE, format!("{}:{inode}", theirs.as_raw_fd()));
    let mut child = vdpa_sys::exec::spawn(&mut command, vec![theirs]).unwrap();
    drop(command);
    RecordingDevice::at(&disk.path).fail_next("new_owner stops");
    let plan = Plan::new().deadline(Duration::from_millis(500)).grace(Duration::from_millis(50));
    let prepared = plan.prepare(&devices, Via::HandOver(ours)).unwrap();
    assert_eq!(prepared.successor().unsigned_abs(), child.id());
    let mut failed = prepared.switch(devices, Sections::new()).unwrap_err();
    assert!(
        matches!(failed.error.source, Cause::Connection(ConnectionError::TimedOut)),
        "{:?}",
        failed.error
    );
    assert!(failed.lost.is_empty(), "{:?}", failed.lost);
    works(&mut failed.devices);
    assert_eq!(child.wait().unwrap().signal(), Some(9));
}

/// An update makes one request for each mapping, and besides those the same number of requests for each device, whatever its
/// size.
#[test]
fn requests_are_linear_in_devices_and_mappings() {
    let remap = [B::NEW_OWNER, B::SUSPEND, B::RESUME, B::IOTLB_REMAP];
    let asked = |strategy: Strategy, count: usize, mappings: u64| -> u64 {
        let disks: Vec<Disk> = (0..count).map(|_| Disk::new(&remap)).collect();
        let size = mappings * 4096;
        let memory = Memory::map("ram", memfd::create(c"ram", size, None).unwrap(), 0, size, false).unwrap();
        let device = |(number, disk): (usize, &Disk)| {
            let mut session = recording::negotiated(&disk.path);
            for at in 0..mappings {
                let name = format!("part{at}");
                session.map_memory(&name, &memory, at * 4096, at * 8192, 4096, Perm::RW).unwrap();
            }
            session.start().unwrap();
            session.ops().record("--- update").unwrap();
            (format!("disk{number}"), session)
        };
        let devices: Devices<RecordingDevice> = disks.iter().enumerate().map(device).collect();
        let plan = Plan::new().strategy(strategy);
        let (left, taken) = hand_over(devices, plan, Sections::new(), Incoming::take_over);
        left.unwrap();
        assert_eq!(taken.unwrap().devices.len(), count);
        let requests = |disk: &Disk| {
            let log = disk.log();
            let requests: Vec<_> = log.split(", ").filter(|line| *line != "close").collect();
            let per_mapping = if strategy == Strategy::Reopen { "update" } else { "remap" };
            assert_eq!(requests.iter().filter(|line| **line == per_mapping).count() as u64, mappings);
            requests.len() as u64
        };
        disks.iter().map(requests).sum()
    };
    for strategy in [Strategy::Resume, Strategy::Reset, Strategy::Reopen] {
        let fixed = asked(strategy, 1, 1) - 1;
        for (count, mappings) in [(1, 16), (1, 1024), (4, 16), (16, 16), (64, 1), (64, 16)] {
            let wanted = count as u64 * (fixed + mappings);
            assert_eq!(asked(strategy, count, mappings), wanted, "{strategy}, {count} devices, {mappings}");
        }
    }
}
