//! The watchdog process against a daemon that is stopped and one that is killed.
//!
//! This program plays all parts: `daemon DIR`, `watchdog --source SOURCE --timeout S` (as `vdpad` does), and the tests.
#![expect(unsafe_code, reason = "the ioctl of a client, as clients make it")]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../../vdpad/tests/support/standstill.rs"]
mod standstill;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vdpa_backend::front::fuse::{
    DeviceFile, DeviceFiles, IoctlCall, IoctlReply, Opener, Options, prepare_dir,
};
use vdpa_backend::front::watchdog;
use vdpa_core::Errno;
use vdpa_sys::fuse::{FS_TYPE, fs_type_at, unmount};

const LIMIT: Duration = Duration::from_secs(20);
const TIMEOUT: Duration = Duration::from_secs(1);

struct Plain;

impl DeviceFile for Plain {
    fn open(&self, _: &Opener) -> Result<(), Errno> {
        Ok(())
    }
    fn release(&self, _: u64) {}
    fn ioctl(&self, _: &IoctlCall<'_>) -> Result<IoctlReply, Errno> {
        Ok(IoctlReply::default())
    }
    fn write(&self, _: u64, _: u32, _: &[u8]) -> Result<u32, Errno> {
        Ok(0)
    }
}

fn daemon(dir: &Path) {
    let dir = &prepare_dir(dir).unwrap();
    let mut guard = watchdog::spawn(&std::env::current_exe().unwrap(), TIMEOUT).unwrap();
    let options =
        Options { heartbeat: guard.take_heartbeat(), heartbeat_interval: TIMEOUT / 5, ..Options::default() };
    let fs = DeviceFiles::mount(dir, options).unwrap();
    fs.add("vdpa0", Arc::new(Plain)).unwrap();
    println!("watchdog {}", guard.pid());
    let deadline = Instant::now() + LIMIT;
    while fs.is_serving() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    fs.shutdown();
}

fn ask(file: &File) -> Result<(), i32> {
    // SAFETY: _IO(0xAF, 1): no size, so nothing is copied from or to the argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), 0xAF01, 0) };
    if result < 0 { Err(std::io::Error::last_os_error().raw_os_error().unwrap()) } else { Ok(()) }
}

/// A daemon in a process of its own, and a guard that ends everything after [`LIMIT`].
struct Running {
    child: Child,
    watchdog: Pid,
    dir: PathBuf,
    _outer: tempfile::TempDir,
}

impl Running {
    fn start() -> Self {
        let outer = tempfile::tempdir().unwrap();
        let dir = std::fs::canonicalize(outer.path()).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg("daemon")
            .arg(&dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (pid, guarded) = (Pid::from_child(&child), dir.clone());
        thread::spawn(move || {
            thread::sleep(LIMIT);
            eprintln!("the test takes longer than {LIMIT:?}: ending its daemon and mount");
            let _ = kill_process(pid, Signal::KILL);
            let _ = unmount(&guarded);
            std::process::abort();
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let watchdog = line.trim().strip_prefix("watchdog ").expect("the daemon serves").parse().unwrap();
        Self { child, watchdog: Pid::from_raw(watchdog).unwrap(), dir, _outer: outer }
    }

    fn is_mounted(&self) -> bool {
        fs_type_at(&self.dir).unwrap().as_deref() == Some(FS_TYPE)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = unmount(&self.dir);
    }
}

fn a_stopped_daemon_does_not_hold_its_clients() {
    let mut running = Running::start();
    let file = File::open(running.dir.join("vdpa0")).unwrap();
    // Longer than the time-out: heartbeats keep the mount.
    let quiet = Instant::now() + TIMEOUT * 2;
    while Instant::now() < quiet {
        ask(&file).unwrap();
        thread::sleep(TIMEOUT / 4);
    }
    standstill::stop(Pid::from_child(&running.child));
    let begin = Instant::now();
    assert_eq!(ask(&file), Err(libc::ECONNABORTED));
    assert!(begin.elapsed() < TIMEOUT * 5, "{:?}", begin.elapsed());
    assert!(!running.is_mounted());
    running.signal(Signal::CONT);
    assert!(running.child.wait().unwrap().success(), "the daemon notices and ends in order");
}

/// Without requests there are no heartbeats either, where the kernel tells the watchdog what waits.
fn nor_does_one_that_is_stopped_while_it_rests() {
    let running = Running::start();
    let file = File::open(running.dir.join("vdpa0")).unwrap();
    thread::sleep(TIMEOUT * 3);
    assert!(running.is_mounted());
    ask(&file).expect("a daemon that rests is left alone");
    thread::sleep(TIMEOUT);
    standstill::stop(Pid::from_child(&running.child));
    thread::sleep(TIMEOUT * 2);
    let begin = Instant::now();
    assert_eq!(ask(&file), Err(libc::ECONNABORTED));
    assert!(begin.elapsed() < TIMEOUT * 5, "{:?}", begin.elapsed());
}

fn a_killed_daemon_leaves_no_mount() {
    let mut running = Running::start();
    running.signal(Signal::KILL);
    running.child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while running.is_mounted() {
        assert!(Instant::now() < deadline, "the mount is still there");
        thread::sleep(Duration::from_millis(5));
    }
}

fn an_orderly_end_takes_the_watchdog_along() {
    let mut running = Running::start();
    unmount(&running.dir).unwrap();
    assert!(running.child.wait().unwrap().success());
    let deadline = Instant::now() + Duration::from_secs(5);
    let stat = PathBuf::from(format!("/proc/{}/cmdline", running.watchdog.as_raw_nonzero()));
    while std::fs::read_to_string(&stat).is_ok_and(|line| line.contains("watchdog")) {
        assert!(Instant::now() < deadline, "the watchdog is still there");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A daemon that starts where another serves gives up, and its watchdog must not take the other's mount along.
fn a_daemon_that_could_not_mount_harms_nobody() {
    let running = Running::start();
    let mut guard = watchdog::spawn(&std::env::current_exe().unwrap(), TIMEOUT).unwrap();
    let heartbeat = guard.take_heartbeat();
    DeviceFiles::mount(&running.dir, Options { heartbeat, ..Options::default() }).unwrap_err();
    assert!(guard.wait().unwrap().success());
    ask(&File::open(running.dir.join("vdpa0")).unwrap()).unwrap();
}

const TESTS: [(&str, fn()); 5] = [
    ("a_daemon_that_could_not_mount_harms_nobody", a_daemon_that_could_not_mount_harms_nobody),
    ("a_stopped_daemon_does_not_hold_its_clients", a_stopped_daemon_does_not_hold_its_clients),
    ("nor_does_one_that_is_stopped_while_it_rests", nor_does_one_that_is_stopped_while_it_rests),
    ("a_killed_daemon_leaves_no_mount", a_killed_daemon_leaves_no_mount),
    ("an_orderly_end_takes_the_watchdog_along", an_orderly_end_takes_the_watchdog_along),
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["daemon", dir] => daemon(Path::new(dir)),
        ["watchdog", "--source", source, "--timeout", seconds] => {
            let timeout = Duration::from_secs_f64(seconds.parse().unwrap());
            watchdog::run(std::io::stdin(), source, timeout).unwrap();
        }
        _ => run_tests(&words),
    }
}

/// As much of libtest's command line as cargo and nextest use. One test per process, because of its guard.
fn run_tests(words: &[&str]) {
    let ignored = words.contains(&"--ignored");
    let filter = words.iter().find(|word| !word.starts_with('-') && **word != "terse");
    for (name, _) in TESTS {
        let wanted = !ignored && filter.is_none_or(|filter| name.contains(filter));
        if !wanted {
            continue;
        }
        if words.contains(&"--list") {
            println!("{name}: test");
        } else if filter.is_some_and(|filter| *filter == name) {
            TESTS.iter().filter(|test| test.0 == name).for_each(|test| (test.1)());
            println!("test {name} ... ok");
        } else {
            let status = Command::new(std::env::current_exe().unwrap()).arg(name).status().unwrap();
            assert!(status.success(), "{name} failed");
        }
    }
}
