//! The daemon below a service manager: the unit, and a manager that keeps descriptors for the case that both processes die.
//!
//! The manager here is a small one: it really keeps the descriptors that it is sent, and really starts the program with them, as
//! sd_notify(3) and sd_listen_fds(3) say.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;
#[path = "support/skips.rs"]
mod skips;

use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};
use vdpa_control::api::DaemonInfo;
use vdpa_control::client::Client;
use vdpa_core::ops::VdpaOps;
use vdpa_sys::exec;
use vdpa_sys::fuse::{FS_TYPE, fs_type_at, mounted_at, unmount};

use robust::disk::{self, Disk};
use robust::{Vdpad, eventually, vdpactl};
use skips::skip;

const LIMIT: Duration = Duration::from_secs(60);

/// The manager of one service.
struct Manager {
    dir: PathBuf,
    kept: Arc<Mutex<Kept>>,
    service: Option<Child>,
    /// Reads what the service sends.
    reader: Option<thread::JoinHandle<()>>,
    _outer: tempfile::TempDir,
}

#[derive(Default)]
struct Kept {
    /// The store, by name.
    store: Vec<(String, OwnedFd)>,
    /// What was told beside descriptors.
    told: Vec<String>,
    ended: bool,
}

impl Manager {
    fn new() -> Self {
        let outer = tempfile::tempdir().unwrap();
        let dir = fs::canonicalize(outer.path()).unwrap();
        let socket = UnixDatagram::bind(dir.join("notify")).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let kept = Arc::new(Mutex::new(Kept::default()));
        let theirs = Arc::clone(&kept);
        let reader = thread::spawn(move || {
            while !theirs.lock().ended {
                receive(&socket, &theirs);
            }
        });
        Self { dir, kept, service: None, reader: Some(reader), _outer: outer }
    }

    fn told(&self) -> Vec<String> {
        self.kept.lock().told.clone()
    }

    /// Starts the service with everything in the store, from descriptor 3 on.
    fn start(&mut self, more: &[&str]) {
        let mut kept = self.kept.lock();
        kept.told.clear();
        let store = &kept.store;
        let names: Vec<_> = store.iter().map(|(name, _)| name.as_str()).collect();
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut moves = String::new();
        for (place, (_, fd)) in (3..).zip(store) {
            // Above the places that they are moved to.
            let copy = rustix::io::fcntl_dupfd_cloexec(fd, 1000).unwrap();
            moves += &format!("exec {place}<&{0} {0}<&-; ", copy.as_raw_fd());
            fds.push(copy);
        }
        let script = format!("{moves} export LISTEN_PID=$$; exec \"$@\"");
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash"]).arg(robust::programs::program("vdpad"));
        command.args(["--holder", "--front", "fuse", "--dir"]).arg(self.dir.join("dev"));
        command.arg("--socket").arg(self.dir.join("control.sock")).args(more);
        command.env("NOTIFY_SOCKET", self.dir.join("notify")).env("LISTEN_FDS", store.len().to_string());
        command.env("LISTEN_FDNAMES", names.join(":")).env("WATCHDOG_USEC", "600000");
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.service = Some(exec::spawn(&mut command, fds).unwrap());
        drop(kept);
        self.hears("READY=1");
    }

    /// Runs the program with all rights before or after the service (`ExecStartPre=+`, `ExecStopPost=+`).
    fn mount(&self, what: &str, result: &str) -> robust::Output {
        let mut command = Command::new(robust::programs::program("vdpad"));
        command
            .args(["--log", "error", "--front", "fuse", "--mount", what, "--dir"])
            .arg(self.dir.join("dev"));
        command.env("NOTIFY_SOCKET", self.dir.join("notify")).env("SERVICE_RESULT", result);
        robust::run(&mut command)
    }

    /// Connection number of the mount of the device files.
    fn mounted(&self) -> Option<u32> {
        mounted_at(&self.dir.join("dev")).unwrap().map(|mounted| mounted.minor)
    }

    fn hears(&self, text: &str) {
        eventually("the service tells", || self.told().iter().any(|told| told.contains(text)).then_some(()));
    }

    /// Both processes die, this one first, and whatever else is in their control group is killed too.
    fn die(&mut self, first: &str) {
        let daemon = Pid::from_raw(self.daemon().pid.cast_signed()).unwrap();
        if first == "daemon" {
            kill_process(daemon, Signal::KILL).unwrap();
        }
        let mut service = self.service.take().unwrap();
        service.kill().unwrap();
        service.wait().unwrap();
        // The daemon, or the one that was started in its place.
        self.kill_children();
    }

    /// As for a control group: every process of this service that is left.
    fn kill_children(&self) {
        let mine = |path: &Path| {
            let line = fs::read(path.join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&*self.dir.join("control.sock").to_string_lossy())
        };
        let all = fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
        for path in all.filter(|path| mine(path)) {
            if let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) {
                let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
            }
        }
        eventually("they are gone", || {
            let mut all = fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
            (!all.any(|path| mine(&path))).then_some(())
        });
    }

    fn client(&self) -> Client {
        Client::new(self.dir.join("control.sock")).unwrap()
    }

    fn daemon(&self) -> DaemonInfo {
        eventually("the daemon answers", || self.client().daemon().ok())
    }

    fn add(&self, name: &str) -> PathBuf {
        let image = self.dir.join(format!("{name}.img"));
        fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let line = format!("dev add name {name} mgmtdev blk packed on path {}", image.display());
        robust::run(vdpactl(&self.dir).args(line.split(' '))).succeeds();
        self.client().device(name).unwrap().path
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- log of vdpad\n{}---", self.log());
        }
        if let Some(mut service) = self.service.take() {
            let _ = service.kill();
            let _ = service.wait();
        }
        self.kill_children();
        self.kept.lock().store.clear();
        self.kept.lock().ended = true;
        let _ = self.reader.take().map(thread::JoinHandle::join);
        if fs_type_at(&self.dir.join("dev")).is_ok_and(|kind| kind.as_deref() == Some(FS_TYPE)) {
            let _ = unmount(&self.dir.join("dev"));
        }
    }
}

/// Receives one message, or none for a while.
fn receive(socket: &UnixDatagram, kept: &Mutex<Kept>) {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(&mut bytes)];
    let Ok(came) = recvmsg(socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC) else { return };
    let fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    let text = String::from_utf8(bytes[..came.bytes].to_vec()).unwrap();
    let line = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
    let mut kept = kept.lock();
    match (line("FDSTORE="), line("FDSTOREREMOVE="), line("FDNAME=")) {
        (Some(_), _, Some(name)) => kept.store.extend(fds.into_iter().map(|fd| (name.clone(), fd))),
        (_, Some(_), Some(name)) => kept.store.retain(|(other, _)| *other != name),
        _ => kept.told.push(text),
    }
}

/// Both die, in either order, with a client and requests in flight. The manager starts the service with what it has kept, and the
/// client goes on.
#[test]
fn both_processes_die_and_clients_go_on() {
    let mut manager = Manager::new();
    manager.start(&[]);
    let device = manager.add("disk0");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    disk.check(1);
    let before = manager.daemon();
    let count = || manager.kept.lock().store.iter().filter(|(name, _)| name.starts_with("vdpa.")).count();
    let before_dying = before.holder.as_ref().unwrap();
    // io_urings cannot be stored.
    let held = before_dying.held - before_dying.held_kinds["ring"];
    assert!(held > 10);
    // All else that is held, and the holder's own counts.
    eventually("all of it is stored", || (count() as u64 == held + 1).then_some(()));
    for (seed, first) in (2..).zip(["holder", "daemon", "holder"]) {
        manager.die(first);
        assert!(fs::symlink_metadata(manager.dir.join("control.sock")).is_ok(), "the socket has disappeared");
        let waiting = thread::scope(|scope| {
            // Answered by the next daemon; the store keeps the connection.
            let status = scope.spawn(|| disk.session.ops().status());
            manager.start(&[]);
            status.join().unwrap()
        });
        assert!(waiting.is_ok(), "{waiting:?} {}", manager.log());
        disk.check(seed);
        disk.check(seed + 100);
    }
    // What was counted goes on too.
    let after = manager.daemon().holder.unwrap();
    assert!(after.generation >= before.holder.unwrap().generation + 3, "{after:?}");
    // The client leaves, and another one comes: nothing of the old one is left.
    drop(disk);
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    disk.check(9);
}

/// A service that ends in order leaves nothing in the store: its next start begins anew.
#[test]
fn a_service_that_stops_leaves_nothing_behind() {
    let mut manager = Manager::new();
    manager.start(&[]);
    let device = manager.add("disk0");
    let disk = Disk::start(&device, disk::MEMORY_MIN);
    let mut service = manager.service.take().unwrap();
    kill_process(Pid::from_raw(service.id().cast_signed()).unwrap(), Signal::TERM).unwrap();
    assert_eq!(service.wait().unwrap().code(), Some(0), "{}", manager.log());
    eventually("nothing is stored", || manager.kept.lock().store.is_empty().then_some(()));
    manager.hears("STOPPING=1");
    assert!(disk.session.ops().status().is_err());
    manager.start(&[]);
    assert!(manager.client().devices().unwrap().is_empty());
}

/// The options of a service that has no right to mount.
const GIVEN: [&str; 4] = ["--mount", "given", "--user", "4800:4801"];

/// A service without the right to mount serves a mount that it is given: over the death of both processes, until it stops.
#[test]
fn a_service_serves_a_mount_that_it_is_given() {
    let mut manager = Manager::new();
    manager.mount("make", "").succeeds();
    let first = manager.mounted();
    assert!(first.is_some());
    manager.start(&GIVEN);
    let status = fs::read_to_string(format!("/proc/{}/status", manager.daemon().pid)).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap();
    let allowed = u64::from_str_radix(line.trim(), 16).unwrap();
    assert_eq!(allowed & (1 << 21), 0, "CAP_SYS_ADMIN in {line}");
    let device = manager.add("disk0");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    disk.check(1);
    // Of a service that runs, and of one whose processes are dead.
    manager.mount("make", "").succeeds();
    for (seed, first_to_die) in [(2, "holder"), (3, "daemon")] {
        manager.die(first_to_die);
        // It is started again.
        manager.mount("end", "signal").succeeds();
        manager.mount("make", "").succeeds();
        assert_eq!(manager.mounted(), first, "the mount that clients use stays");
        manager.start(&GIVEN);
        disk.check(seed);
    }
    let mut service = manager.service.take().unwrap();
    kill_process(Pid::from_raw(service.id().cast_signed()).unwrap(), Signal::TERM).unwrap();
    assert_eq!(service.wait().unwrap().code(), Some(0), "{}", manager.log());
    eventually("nothing is stored", || manager.kept.lock().store.is_empty().then_some(()));
    manager.mount("end", "success").succeeds();
    assert_eq!(manager.mounted(), None);
    assert!(disk.session.ops().status().is_err(), "the client of a service that has ended");
    manager.mount("end", "success").succeeds();
    // The next one begins anew.
    manager.mount("make", "").succeeds();
    manager.start(&GIVEN);
    assert!(manager.client().devices().unwrap().is_empty());
    let again = manager.add("disk0");
    Disk::start(&again, disk::MEMORY_MIN).check(4);
}

/// What is stored for a mount that has ended is not taken for that of a new one.
#[test]
fn nothing_of_a_lost_mount_is_served_on_a_new_one() {
    let mut manager = Manager::new();
    manager.mount("make", "").succeeds();
    manager.start(&GIVEN);
    let device = manager.add("disk0");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    disk.check(1);
    manager.die("holder");
    let first = manager.mounted();
    unmount(&manager.dir.join("dev")).unwrap();
    manager.mount("make", "").succeeds();
    let second = manager.mounted();
    assert!(second.is_some(), "after {first:?}");
    manager.start(&GIVEN);
    assert!(manager.client().devices().unwrap().is_empty());
    let again = manager.add("disk0");
    let mut other = Disk::start(&again, disk::MEMORY_MIN);
    other.check(2);
    manager.die("daemon");
    manager.mount("make", "").succeeds();
    assert_eq!(manager.mounted(), second);
    manager.start(&GIVEN);
    other.check(3);
}

/// A mount whose connection nobody has, as after a crash for which the service is not started again.
#[test]
fn a_dead_mount_is_replaced() {
    let mut manager = Manager::new();
    manager.mount("make", "").succeeds();
    manager.kept.lock().store.clear();
    let dead = manager.dir.join("dev");
    assert!(fs::metadata(&dead).is_err());
    manager.mount("end", "signal").succeeds();
    assert_eq!(manager.mounted(), None, "a dead one is of no use for a service that restarts");
    manager.mount("make", "").succeeds();
    manager.kept.lock().store.clear();
    manager.mount("make", "").succeeds();
    manager.start(&GIVEN);
    let device = manager.add("disk0");
    Disk::start(&device, disk::MEMORY_MIN).check(1);
}

/// What is missing is named.
#[test]
fn a_mount_is_neither_made_nor_missed_silently() {
    let manager = Manager::new();
    let program = || Command::new(robust::programs::program("vdpad"));
    let dev = manager.dir.join("dev");
    let make =
        robust::run(program().args(["--mount", "make", "--dir"]).arg(&dev).env_remove("NOTIFY_SOCKET"));
    make.fails(
        1,
        "vdpad: no service manager takes the mount: --mount make is for ExecStartPre= of a unit with NotifyAccess=exec and \
         FileDescriptorStoreMax=",
    );
    assert_eq!(manager.mounted(), None);
    // The directory above may be one of the service, which is not to choose what root mounts over.
    let elsewhere = manager.dir.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &dev).unwrap();
    let followed = manager.mount("make", "");
    let reason = format!("cannot mount at {}: it has to be a directory, and no symbolic link", dev.display());
    assert_eq!(followed.code, Some(1), "{followed:?}");
    assert!(followed.stderr.contains(&reason), "{followed:?}");
    assert_eq!(mounted_at(&elsewhere).unwrap(), None);
    fs::remove_file(&dev).unwrap();
    let alone = robust::run(program().args(["--mount", "given", "--dir"]).arg(&dev));
    alone.fails(2, "vdpad: --mount given needs --holder, which gets the mount");
    let socket = manager.dir.join("control.sock");
    let mut given = program();
    given.args(["--holder", "--front", "fuse", "--mount", "given", "--dir"]).arg(&dev);
    let given = robust::run(given.arg("--socket").arg(&socket));
    assert_eq!(given.code, Some(1), "{given:?}");
    assert!(given.stderr.contains("needs ExecStartPre=+vdpad --mount make"), "{given:?}");
}

/// A reload is an upgrade: the manager hears of its begin and its end, done or rolled back.
#[test]
fn the_manager_hears_of_a_reload() {
    let mut manager = Manager::new();
    manager.start(&[]);
    let device = manager.add("disk0");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let before = manager.daemon().pid;
    let holder = Pid::from_raw(manager.service.as_ref().unwrap().id().cast_signed()).unwrap();
    manager.kept.lock().told.clear();
    kill_process(holder, Signal::HUP).unwrap();
    manager.hears("RELOADING=1\nMONOTONIC_USEC=");
    manager.hears("READY=1");
    assert_ne!(manager.daemon().pid, before);
    disk.check(1);
}

/// Without a manager the next start serves the devices of its options, and clients of the old mount hear at once that it is gone.
#[test]
fn without_a_manager_the_next_start_begins_anew() {
    let outer = tempfile::tempdir().unwrap();
    let dir = fs::canonicalize(outer.path()).unwrap();
    let image = dir.join("disk0.img");
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let spec = format!("name=disk0 mgmtdev=blk packed=on path={}", image.display());
    let args = ["--holder", "--front", "fuse", "--dev", &spec];
    let mut first = Vdpad::start_at(&dir, LIMIT, &args);
    let device = first.info("disk0").path;
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    disk.check(1);
    let daemon = first.client().daemon().unwrap().pid;
    first.signal(Signal::KILL);
    first.wait();
    kill_process(Pid::from_raw(daemon.cast_signed()).unwrap(), Signal::KILL).unwrap();
    eventually("the client hears of it", || disk.session.ops().status().err());
    let second = Vdpad::start_at(&dir, LIMIT, &args);
    assert!(disk.session.ops().status().is_err(), "the old client has the new device");
    let mut fresh = Disk::start(&second.info("disk0").path, disk::MEMORY_MIN);
    fresh.one((vdpa_core::blk::kind::IN, 1, 1));
    fresh.check(2);
}

/// `WatchdogSec=`: as long as it is not stopped, the holder says that it works.
#[test]
fn the_holder_feeds_the_watchdog_of_the_manager() {
    let mut manager = Manager::new();
    manager.start(&[]);
    let heard = |manager: &Manager| manager.told().iter().filter(|told| told.contains("WATCHDOG=1")).count();
    let first = eventually("it is fed", || Some(heard(&manager)).filter(|times| *times >= 2));
    eventually("it is fed again", || (heard(&manager) > first + 2).then_some(()));
}

/// The unit is one that systemd understands.
#[test]
fn the_unit_is_valid() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist/vdpad.service");
    let text = fs::read_to_string(&unit).unwrap();
    for needed in [
        "Type=notify",
        "NotifyAccess=exec",
        "--mount make",
        "--mount given",
        "--mount end",
        "FileDescriptorStoreMax=",
        "OOMPolicy=continue",
        "ExecReload=",
    ] {
        assert!(text.contains(needed), "{needed}");
    }
    let Ok(version) = Command::new("systemd-analyze").arg("--version").output() else {
        return skip("no systemd-analyze: the unit was not verified");
    };
    assert!(version.status.success());
    // It checks that the programs exist, where they are installed. Here they are where they were built.
    let dir = tempfile::tempdir().unwrap();
    let mut text = text;
    for name in ["vdpad", "vdpactl"] {
        let program = robust::programs::program(name);
        text = text.replace(&format!("/usr/bin/{name} "), &format!("{} ", program.display()));
    }
    let copy = dir.path().join("vdpad.service");
    fs::write(&copy, text).unwrap();
    let output = Command::new("systemd-analyze").arg("verify").arg("--man=no").arg(&copy).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let about: Vec<_> = said.lines().filter(|line| line.contains("vdpad.service")).collect();
    assert!(output.status.success() && about.is_empty(), "{said}");
}

/// What systemd thinks of what the service may do, at most: a number that is greater after a change needs a reason.
#[test]
fn the_unit_has_few_rights() {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist");
    let Ok(_) = Command::new("systemd-analyze").arg("--version").output() else {
        return skip("no systemd-analyze: the rights of the unit were not measured");
    };
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("vdpad.service");
    fs::copy(dist.join("vdpad.service"), &copy).unwrap();
    let exposure = || {
        let mut command = Command::new("systemd-analyze");
        let output = command.args(["security", "--offline=true", "--no-pager"]).arg(&copy).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line =
            text.lines().rev().find(|line| line.contains("Overall exposure level")).unwrap_or_default();
        let number = line.rsplit(": ").next().and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        number.unwrap_or_else(|| panic!("no level in {text}{}", String::from_utf8_lossy(&output.stderr)))
    };
    let files = exposure();
    let drop_in = dir.path().join("vdpad.service.d");
    fs::create_dir(&drop_in).unwrap();
    let with = |name: &str| {
        fs::copy(dist.join("vdpad.service.d").join(name), drop_in.join(name)).unwrap();
        let exposure = exposure();
        fs::remove_file(drop_in.join(name)).unwrap();
        exposure
    };
    let (devices, mounts) = (with("character-devices.conf"), with("own-mounts.conf"));
    eprintln!(
        "exposure: {files} with a mount, {devices} with character devices, {mounts} with mounts of its own"
    );
    assert!(files <= 2.2, "{files}");
    assert!(devices <= 1.7, "{devices}");
    assert!(mounts <= 4.1, "{mounts}");
}
