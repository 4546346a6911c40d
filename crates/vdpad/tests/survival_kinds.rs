//! Every kind of device and device file, with a daemon that is killed or upgraded below its clients (`--holder`).
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/blk.rs"]
mod blk;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/hanging.rs"]
mod hanging;
#[path = "support/held.rs"]
mod held;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/net.rs"]
mod net;
#[path = "support/robust.rs"]
mod robust;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use vdpa_client::device::Device;
use vdpa_control::api::HolderInfo;
use vdpa_core::Errno;
use vdpa_core::blk::kind;
use vdpa_core::features::Status;
use vdpa_core::ops::{VdpaOps as _, read_all_config};
use vdpa_core::types::{Asid, QueueIndex};
use vdpa_sys::fuse::{FS_TYPE, fs_type_at};
use vdpa_sys::memfd;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use blk::{Blk, FEATURES, IOVA, MEMORY, OK};
use hanging::HangingFile;
use held::{holder, is_busy, kill, replace, start, upgrade};
use net::{Net, packet};
use robust::disk::{self, DATA, Disk, pattern};
use robust::{Vdpad, eventually};

/// A way in which a daemon ends.
type End = (&'static str, fn(&Vdpad));

const ENDS: [End; 2] = [("crash", replace), ("upgrade", upgrade)];

/// What is done with a device.
enum Client {
    /// Writes and reads that are verified.
    Disk(Disk),
    /// Reads of what was written before.
    Reader(Disk),
    /// Reads and writes of nothing.
    Null(Disk),
    /// Packets that come back.
    Net(Box<Net>),
}

/// A device with its client, and what both must see again.
struct Served {
    name: String,
    path: PathBuf,
    client: Client,
    shown: String,
    config: Vec<u8>,
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

impl Client {
    fn start(mgmtdev: &str, attrs: &str, path: &Path) -> Self {
        match mgmtdev {
            "sim-net" => {
                let device = VhostVdpaFd::open(path).unwrap();
                let backend = device.backend_features().unwrap() & net::all_backend_features();
                let features = device.features().unwrap() & net::FEATURES;
                drop(device);
                Self::Net(Box::new(Net::with(path, features, Asid(0), backend)))
            }
            _ => {
                let disk = Disk::start(path, disk::MEMORY_MIN);
                match attrs {
                    _ if attrs.contains("null ") => Self::Null(disk),
                    _ if attrs.contains("readonly on") => Self::Reader(disk),
                    _ => Self::Disk(disk),
                }
            }
        }
    }

    /// Makes requests, and waits for their answers.
    fn works(&mut self, seed: u64) {
        match self {
            Self::Disk(disk) => disk.check(seed),
            Self::Reader(disk) => disk.one((kind::IN, 1, 1)),
            Self::Null(disk) => {
                disk.one((kind::OUT, 1, seed));
                disk.read_block(1);
            }
            Self::Net(net) => net.loops(&packet(MAC, 60)),
        }
    }

    /// Makes requests, and does not wait.
    fn begins(&mut self, seed: u64) {
        match self {
            Self::Disk(disk) | Self::Null(disk) => {
                (0..8).for_each(|slot| disk.submit(slot, (kind::OUT, 10 + slot, seed)));
                disk.kick();
            }
            Self::Reader(disk) => {
                (0..8).for_each(|slot| disk.submit(slot, (kind::IN, 1, 1)));
                disk.kick();
            }
            Self::Net(net) => {
                net.offer(2048);
                net.send(&packet(MAC, 100));
            }
        }
    }

    /// Their answers.
    fn ends(&mut self, seed: u64) {
        match self {
            Self::Disk(disk) => {
                assert_eq!(disk.settle().len(), 8);
                (0..8).for_each(|slot| disk.submit(slot, (kind::IN, 10 + slot, seed)));
                disk.kick();
                assert_eq!(disk.settle().len(), 8);
            }
            Self::Reader(disk) | Self::Null(disk) => assert_eq!(disk.settle().len(), 8),
            Self::Net(net) => {
                assert_eq!(net.receive(), packet(MAC, 100));
                net.queue(net::TX).completion();
            }
        }
    }

    fn status(&self) -> Status {
        match self {
            Self::Disk(disk) | Self::Reader(disk) | Self::Null(disk) => disk.session.ops().status().unwrap(),
            Self::Net(net) => net.device.status().unwrap(),
        }
    }

    fn config(&self) -> Vec<u8> {
        match self {
            Self::Disk(disk) | Self::Reader(disk) | Self::Null(disk) => {
                read_all_config(disk.session.ops()).unwrap()
            }
            Self::Net(net) => read_all_config(&net.device).unwrap(),
        }
    }
}

impl Served {
    fn add(vdpad: &Vdpad, number: usize, mgmtdev: &str, attrs: &str) -> Self {
        let name = format!("d{number}");
        let own = if attrs.contains("device_file") {
            format!("{}", vdpad.dir().join(&name).display())
        } else {
            String::new()
        };
        let mut all = attrs.replace("device_file", &format!("device_file {own}"));
        if mgmtdev == "blk" && !attrs.contains("null ") {
            let image = vdpad.image(&name, 64 << 20);
            File::options()
                .write(true)
                .open(&image)
                .unwrap()
                .write_all_at(&pattern(1, 1), DATA.into())
                .unwrap();
            all += &format!(" path {}", image.display());
        }
        // All devices have one owner, whose limit is only large enough for the first ones.
        if number > 1 && !attrs.contains("memlock") {
            all += " memlock unlimited";
        }
        let path = vdpad.add(&name, mgmtdev, &all);
        assert!(own.is_empty() || path == Path::new(&own), "{path:?}");
        let client = Client::start(mgmtdev, attrs, &path);
        let (shown, config) = (shown(vdpad, &name), client.config());
        Self { name: format!("{mgmtdev} {attrs}"), path, client, shown, config }
    }
}

/// What an administrator sees of a device that must not change by the end of a daemon.
fn shown(vdpad: &Vdpad, name: &str) -> String {
    let info = vdpad.info(name);
    let queues: Vec<_> =
        info.state.queues.iter().map(|queue| (queue.size, queue.enabled, queue.running)).collect();
    let owner = info.state.owner.as_ref().map(|owner| (owner.pid, owner.since));
    let state =
        (info.state.status, info.state.negotiated_features, info.state.pinned_pages, info.state.mappings);
    let constants = (info.mgmtdev, info.max_vqs, info.max_vq_size, info.path, info.front);
    let config = vdpad.ctl(&format!("dev config show {name}"));
    config.succeeds();
    format!("{constants:?} {state:?} {queues:?} {owner:?} {}", config.stdout)
}

/// Attributes of `blk`: each alone, and the ones that change how a disk is served or restored with each other.
fn blk_attributes() -> Vec<String> {
    let alone = [
        "",
        "queues 1",
        "memlock unlimited",
        "queues 64",
        "queue_size 256",
        "serial 12345678901234567890",
        "in_order on",
        "compat_reset clean",
        "reset_owner on",
        "strict_new_owner on",
        "cpus 0",
        "worker own",
        "worker own cpus 0",
    ];
    let mut all: Vec<String> = alone.map(String::from).into();
    for source in ["", "readonly on", "null 67108864", "null 67108864 readonly on"] {
        for pin in ["pin on", "pin off"] {
            for shared in ["", "handover open"] {
                for place in ["", "device_file"] {
                    all.push([source, pin, shared, place, "packed on"].join(" "));
                }
            }
        }
        if !source.contains("null ") {
            all.push(format!("{source} direct on"));
        }
    }
    // A driver must not write to a disk that it was told to be read-only.
    all.retain(|attrs| !(attrs.contains("null ") && attrs.contains("readonly")));
    all
}

/// Attributes of both simulators.
fn sim_attributes() -> Vec<String> {
    let alone = [
        "max_iotlb_entries 16",
        "compat_reset keep",
        "verify_remap off",
        "reset_owner on",
        "queue_size 512",
        "memlock unlimited",
        "cpus 0",
        "worker own",
        "use_va off batch_mapping on handover open",
    ];
    let mut all: Vec<String> = alone.map(String::from).into();
    for use_va in ["on", "off"] {
        for batch in ["on", "off"] {
            for place in ["", "device_file"] {
                all.push(format!("use_va {use_va} batch_mapping {batch} {place}"));
            }
        }
    }
    all
}

/// Adds every kind and attribute, all with clients at work, and ends the daemon below them.
#[test]
fn every_kind_of_device_goes_on() {
    let vdpad = start(&[]);
    let mut devices = Vec::new();
    let mut add =
        |mgmtdev: &str, attrs: &str| devices.push(Served::add(&vdpad, devices.len(), mgmtdev, attrs));
    blk_attributes().iter().for_each(|attrs| add("blk", attrs));
    sim_attributes().iter().for_each(|attrs| add("sim-blk", attrs));
    for attrs in sim_attributes() {
        add("sim-net", &format!("{attrs} mac 02:00:00:00:00:07"));
    }
    add("sim-net", "mac 02:00:00:00:00:07 mtu 9000 device_features 0x308830028");
    println!("{} devices", devices.len());
    let mut seed = 2;
    for round in 0..2 {
        for (what, end) in ENDS {
            seed += 1;
            devices.iter_mut().for_each(|device| device.client.works(seed));
            devices.iter_mut().for_each(|device| device.client.begins(seed));
            end(&vdpad);
            for (number, Served { name, path, client, shown: before, config }) in
                devices.iter_mut().enumerate()
            {
                println!("{what} {round}: d{number} {name}");
                assert_eq!(client.status(), Status(15));
                client.ends(seed);
                assert_eq!(shown(&vdpad, &format!("d{number}")), *before);
                assert_eq!(client.config(), *config);
                // A second client is refused, or is the first one's successor.
                assert!(name.contains("handover") || is_busy(path));
                client.works(seed + 100);
            }
        }
    }
    let status = holder(&vdpad);
    assert_eq!((status.crashes, status.upgrades), (2, 2));
    // Clients leave, and everything is released.
    for (number, Served { client, .. }) in devices.into_iter().enumerate() {
        drop(client);
        vdpad.is_released(&format!("d{number}"));
        vdpad.ctl(&format!("dev del d{number}")).succeeds();
    }
    // A worker thread stays, and with it its ring and the table of what is pinned there.
    let HolderInfo { held, held_kinds, .. } = holder(&vdpad);
    let threads = held_kinds.get("ring").copied().unwrap_or(0);
    let fresh = start(&[]).client().daemon().unwrap().holder.unwrap();
    assert_eq!(held - 2 * threads, fresh.held, "all is released");
}

/// A loop device, which does not keep a process that has read from it until the read has ended.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path) -> Self {
        let out = Command::new("losetup").args(["-r", "-f", "--show"]).arg(file).output().unwrap();
        assert!(out.status.success(), "loop devices are needed: {}", String::from_utf8_lossy(&out.stderr));
        Self(String::from_utf8(out.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A read of the dead daemon may write client memory any time, which the client uses for something else once it has an answer.
/// The lock of a disk that is only read is shared, and does not tell.
#[test]
fn a_late_read_overwrites_nothing() {
    let vdpad = start(&[]);
    let slow = HangingFile::new(&vdpad.dir().join("slow.img"), 64 << 20);
    slow.recover();
    let slow_disk = Loop::new(&slow.path);
    let attrs = format!("path {} format raw readonly on direct on", slow_disk.0.display());
    let path = vdpad.add("disk0", "blk", &attrs);
    // Another device has the same lock, and no part in this.
    vdpad.add("disk1", "blk", &attrs);
    let mut disk = Blk::start(&path);
    let (header, status) = disk.frame(7, kind::IN, 16);
    let data = vdpa_core::ring::Buffer { iova: IOVA + blk::DATA, len: DATA };
    disk.put(blk::DATA, &[0xa5; DATA as usize]);
    slow.hang();
    disk.session.queue_mut(QueueIndex(0)).unwrap().submit(&[header], &[data, status], 7).unwrap();
    disk.notify(0);
    eventually("the disk has the read", || (slow.waiting() == 1).then_some(()));
    kill(&vdpad);
    let end = Instant::now() + Duration::from_secs(1);
    while Instant::now() < end {
        // A loop device would not begin another read before this one has ended.
        assert!(!vdpad.log().contains("device restored"), "the next daemon does not wait");
        assert_eq!(slow.waiting(), 1, "only the read of the dead daemon is at the disk");
        assert!(disk.finish(0, Duration::ZERO).is_none(), "completed while that read was in flight");
        thread::sleep(Duration::from_millis(5));
    }
    slow.recover();
    let done = disk.finish(0, Duration::from_secs(10)).unwrap();
    assert_eq!((done.token, done.status, done.len), (7, OK, DATA + 1));
    assert_eq!(disk.get(blk::DATA, DATA as usize), vec![0; DATA as usize]);
    assert_eq!(holder(&vdpad).crashes, 1);
}

/// The mark that a reader waits for is that of its own former process.
#[test]
fn readers_of_one_file_do_not_wait_for_each_other() {
    let vdpad = start(&[]);
    let image = vdpad.image("shared", 64 << 20);
    File::options().write(true).open(&image).unwrap().write_all_at(&pattern(1, 1), DATA.into()).unwrap();
    let names = ["disk0", "disk1", "disk2"];
    let attrs = format!("path {} readonly on", image.display());
    let mut disks = names.map(|name| Disk::start(&vdpad.add(name, "blk", &attrs), disk::MEMORY_MIN));
    for _ in 0..2 {
        for (what, end) in ENDS {
            let begin = Instant::now();
            end(&vdpad);
            disks.iter_mut().for_each(|disk| disk.one((kind::IN, 1, 1)));
            println!("{what}: {:?}", begin.elapsed());
        }
    }
    // Whoever writes has to have the file alone.
    let refused = vdpad.ctl(&format!("dev add name disk3 mgmtdev blk path {}", image.display()));
    assert!(refused.code == Some(1) && refused.stderr.contains("is in use"), "{refused:?}");
}

/// What an update by a second open does, one step after the other.
struct Update {
    path: PathBuf,
    memory: OwnedFd,
    old: Blk,
    opened: Option<Device<VhostVdpaFd>>,
    new: Option<Blk>,
}

type Step = (&'static str, fn(&mut Update));

/// The steps of an update in the order of QEMU, from the second open to the close of the first one.
const STEPS: [Step; 8] = [
    ("open", |update| update.opened = Some(Device::open(&update.path).unwrap())),
    ("negotiate", |update| update.new = Some(Blk::over(update.opened.take().unwrap(), FEATURES))),
    ("map", |update| {
        let memory = update.memory.try_clone().unwrap();
        update.successor().map(memory);
    }),
    ("suspend", |update| update.old.session.ops().suspend().unwrap()),
    ("position", |update| assert!(update.old.session.ops().vring_base(QueueIndex(0)).unwrap() > 0)),
    ("reset", |update| {
        update.old.session.ops().set_status(Status(0)).unwrap();
        update.old.session.ops().dma_unmap(Asid(0), IOVA, MEMORY).unwrap();
    }),
    ("start", |update| update.successor().run(1)),
    ("superseded", |update| assert_eq!(update.old.session.ops().status(), Err(Errno::IO))),
];

impl Update {
    fn new(vdpad: &Vdpad, name: &str) -> Self {
        let path = vdpad.add_blk(name, 1 << 20, "handover open memlock unlimited");
        let memory = memfd::create(c"blk", MEMORY, None).unwrap();
        let mut old = Blk::negotiated(&path, FEATURES);
        old.map(memory.try_clone().unwrap());
        old.run(1);
        assert_eq!(old.write(0, 8, &[0x11; 4096]), OK);
        Self { path, memory, old, opened: None, new: None }
    }

    fn successor(&mut self) -> &mut Blk {
        self.new.as_mut().unwrap()
    }
}

/// The daemon ends after every step of an update by a second open, which goes on.
#[test]
fn an_update_by_a_second_open_goes_on() {
    let vdpad = start(&["--crash-limit", "1000"]);
    for (what, end) in ENDS {
        for at in 0..STEPS.len() {
            let name = format!("{what}{at}");
            let mut update = Update::new(&vdpad, &name);
            for (number, (step, run)) in STEPS.iter().enumerate() {
                run(&mut update);
                if number == at {
                    end(&vdpad);
                    let successor = vdpad.info(&name).state.successor;
                    println!("{what} after {step}: {successor:?}");
                    assert_eq!(successor.is_some(), number < 6, "{what} after {step}");
                    assert!(successor.is_none_or(|shown| shown.pid == Some(std::process::id())));
                    assert!(number < 3 || vdpad.info(&name).state.open);
                    if number < 3 {
                        assert_eq!(
                            update.old.read(0, 8, 4096),
                            Ok(vec![0x11; 4096]),
                            "the first one works on"
                        );
                    }
                }
            }
            let Update { old, mut new, .. } = update;
            let new = new.as_mut().unwrap();
            assert_eq!(new.read(0, 8, 4096), Ok(vec![0x11; 4096]));
            // The one that has lost the device is told so by every daemon, and its close is nobody's loss.
            end(&vdpad);
            assert_eq!(old.session.ops().status(), Err(Errno::IO));
            drop(old);
            assert_eq!(new.write(0, 16, &[0x22; 512]), OK);
            end(&vdpad);
            assert_eq!(new.read(0, 16, 512), Ok(vec![0x22; 512]));
            let state = vdpad.info(&name).state;
            assert_eq!((state.pinned_pages, state.mappings), (MEMORY / 4096, 1));
            vdpad.ctl(&format!("dev del {name} --force")).succeeds();
        }
    }
}

/// The successor gives up after the daemon has ended: its predecessor goes on.
#[test]
fn an_update_by_a_second_open_is_rolled_back() {
    let vdpad = start(&["--crash-limit", "1000"]);
    for (what, end) in ENDS {
        for steps in [1, 3, 5] {
            let name = format!("{what}{steps}");
            let mut update = Update::new(&vdpad, &name);
            STEPS.iter().take(steps).for_each(|(_, run)| run(&mut update));
            end(&vdpad);
            let Update { mut old, opened, new, path, .. } = update;
            drop((opened, new));
            eventually("the successor is gone", || vdpad.info(&name).state.successor.is_none().then_some(()));
            if steps > 3 {
                old.session.ops().resume().unwrap();
            }
            assert_eq!(old.read(0, 8, 4096), Ok(vec![0x11; 4096]), "{what} after {steps} steps");
            end(&vdpad);
            assert_eq!(old.write(0, 16, &[0x22; 512]), OK);
            // The next successor takes what the first one leaves.
            let next = Device::<VhostVdpaFd>::open(&path).unwrap();
            drop(old);
            end(&vdpad);
            eventually("it has the device", || vdpad.info(&name).state.successor.is_none().then_some(()));
            let mut next = Blk::over(next, FEATURES);
            next.map(memfd::create(c"blk", MEMORY, None).unwrap());
            next.run(1);
            assert_eq!(next.read(0, 16, 512), Ok(vec![0x22; 512]));
            vdpad.ctl(&format!("dev del {name} --force")).succeeds();
        }
    }
}

/// `device_file`: the mount stays, and ends with its device.
#[test]
fn a_file_at_a_path_of_its_own_stays_there() {
    let vdpad = start(&[]);
    let is_mounted = |path: &Path| fs_type_at(path).unwrap().as_deref() == Some(FS_TYPE);
    let there = vdpad.dir().join("there");
    fs::write(&there, "what was there").unwrap();
    let created = vdpad.dir().join("created");
    let line = |path: &Path| format!("device_file {}", path.display());
    assert_eq!(vdpad.add_blk("disk0", 64 << 20, &line(&there)), there);
    assert_eq!(vdpad.add("ram0", "sim-blk", &line(&created)), created);
    let mut disks = [&there, &created].map(|path| Disk::start(path, disk::MEMORY_MIN));
    for (_, end) in ENDS {
        end(&vdpad);
        disks.iter_mut().for_each(|disk| disk.check(3));
        assert!(is_mounted(&there) && is_mounted(&created));
        assert_eq!(vdpad.info("ram0").front, "fuse");
    }
    drop(disks);
    vdpad.is_released("ram0");
    vdpad.ctl("dev del ram0").succeeds();
    assert!(!created.exists());
    vdpad.is_released("disk0");
    vdpad.ctl("dev del disk0").succeeds();
    assert_eq!(fs::read_to_string(&there).unwrap(), "what was there");
    // The places can be used again, also by what the next daemon has to give up.
    assert_eq!(vdpad.add_blk("disk1", 1 << 20, &line(&created)), created);
    fs::remove_file(vdpad.dir().join("disk1.img")).unwrap();
    replace(&vdpad);
    assert!(vdpad.client().devices().unwrap().is_empty());
    assert!(!created.exists(), "its mount is not left behind");
}

#[test]
fn the_end_of_the_service_unmounts_files_of_their_own() {
    for crash in [false, true] {
        let mut vdpad = start(&[]);
        let created = vdpad.dir().join("created");
        vdpad.add("ram0", "sim-blk", &format!("device_file {}", created.display()));
        if crash {
            replace(&vdpad);
        }
        vdpad.signal(rustix::process::Signal::TERM);
        assert_eq!(vdpad.wait().code(), Some(0), "{}", vdpad.log());
        assert!(!created.exists() && !vdpad.is_mounted());
    }
}

/// Also while the next daemon starts, at whatever it is: one without a handler for the signal would die of it and leave its mounts.
#[test]
fn the_end_of_the_service_while_a_daemon_starts_unmounts_files_of_their_own() {
    for after in (0..60).step_by(4).map(Duration::from_millis) {
        let mut vdpad = start(&[]);
        let created = vdpad.dir().join("created");
        vdpad.add("ram0", "sim-blk", &format!("device_file {}", created.display()));
        kill(&vdpad);
        thread::sleep(after);
        vdpad.signal(rustix::process::Signal::TERM);
        assert_eq!(vdpad.wait().code(), Some(0), "{after:?}: {}", vdpad.log());
        assert!(!created.exists() && !vdpad.is_mounted(), "{after:?}: {}", vdpad.log());
    }
}

/// Mode, owner and times of device files are those that an administrator has set.
#[test]
fn attributes_of_files_stay() {
    let vdpad = start(&[]);
    let own = vdpad.dir().join("own");
    let first = vdpad.add("net0", "sim-net", "");
    let second = vdpad.add("net1", "sim-net", &format!("device_file {}", own.display()));
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    let stamp = |time: SystemTime| {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        rustix::fs::Timespec {
            tv_sec: since.as_secs().try_into().unwrap(),
            tv_nsec: since.subsec_nanos().into(),
        }
    };
    let times = rustix::fs::Timestamps {
        last_access: stamp(time),
        last_modification: stamp(time + Duration::from_secs(1)),
    };
    let set = |path: &Path, mode: u32, id: u32| {
        std::os::unix::fs::chown(path, Some(id), Some(id + 1)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty()).unwrap();
    };
    set(&first, 0o640, 1000);
    set(&second, 0o604, 2000);
    set(&vdpad.mount(), 0o711, 3000);
    let attributes = |path: &Path| {
        let meta = fs::symlink_metadata(path).unwrap();
        let times = (meta.atime(), meta.atime_nsec(), meta.mtime(), meta.mtime_nsec(), meta.ctime_nsec());
        (meta.mode() & 0o7777, meta.uid(), meta.gid(), times, meta.ino())
    };
    let mount = vdpad.mount();
    let all = || [&first, &second, &mount].map(|path| attributes(path));
    let before = all();
    assert_eq!((before[0].0, before[0].1, before[0].2), (0o640, 1000, 1001));
    assert_eq!((before[1].0, before[2].0), (0o604, 0o711));
    assert_eq!(before[0].3.0, 1_000_000_000);
    for (what, end) in ENDS {
        end(&vdpad);
        assert_eq!(all(), before, "{what}");
    }
    // A change in the second daemon is kept by the third one.
    fs::set_permissions(&first, fs::Permissions::from_mode(0o400)).unwrap();
    replace(&vdpad);
    assert_eq!(attributes(&first).0, 0o400);
    assert_eq!(attributes(&second), before[1]);
}

/// Before the first `Ready` of a service, the devices of `--dev` may not all be there; the next daemon adds the rest and no more.
#[test]
fn devices_of_the_configuration_are_added_once() {
    let vdpad = start(&["--dev", "name=ram0 mgmtdev=sim-blk", "--dev", "name=net0 mgmtdev=sim-net"]);
    vdpad.ctl("dev del net0").succeeds();
    let ram = vdpad.info("ram0").path;
    let mut disk = Disk::start(&ram, disk::MEMORY_MIN);
    disk.check(1);
    for (_, end) in ENDS {
        end(&vdpad);
        let names: Vec<_> = vdpad.client().devices().unwrap().into_iter().map(|info| info.name).collect();
        assert_eq!(names, ["ram0"], "what was deleted is not added again");
        disk.one((kind::IN, 1, 1));
    }
}
