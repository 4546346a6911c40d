//! vdpad without root, in a user namespace of its own. Run as root, which starts processes of user
//! nobody.
//!
//! This program is all of the processes, selected by its first argument; the tests are at the end.
#![expect(unsafe_code, reason = "a mount namespace for the test itself")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../vdpa-sys/tests/userns/harness.rs"]
mod harness;
#[path = "support/robust.rs"]
mod robust;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, getrlimit, getuid, pidfd_open, setrlimit};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use vdpa_client::Error;
use vdpa_core::types::Perm;
use vdpa_sys::memfd;

use harness::{NOBODY, run_tests, with_fuse_mode};
use robust::disk::{self, Disk};
use robust::{RoleProcess, Vdpad, open_to_all, programs, receive_line, run, send_line};

const LIMIT: Duration = Duration::from_secs(60);
/// Memory that a user with the usual limit of 8 MiB can pin, and memory that it cannot.
const LITTLE: u64 = 4 << 20;
const MUCH: u64 = 16 << 20;
/// The limit that these tests set.
const MEMLOCK: u64 = 8 << 20;

/// Starts copies of this program and of those that it tests as another user, with the given role.
fn run_role(role: &str, uid: u32) {
    assert!(getuid().is_root(), "this test starts processes of another user: run it as root");
    // Other users may have no access to the build directory.
    let dir = tempfile::tempdir().unwrap();
    open_to_all(dir.path());
    let this = std::env::current_exe().unwrap();
    for program in [this.clone(), programs::program("vdpad"), programs::program("vdpactl")] {
        let copy = dir.path().join(program.file_name().unwrap());
        fs::copy(&program, &copy).unwrap();
        open_to_all(&copy);
    }
    let mut command = Command::new(dir.path().join(this.file_name().unwrap()));
    command.arg(role).current_dir("/").uid(uid).gid(uid).env(programs::PROGRAMS, dir.path());
    let output = run(&mut command);
    assert!(output.code == Some(0) && output.stdout.contains("ROLE COMPLETE"), "{role}: {output:#?}");
}

/// As root: runs a role as nobody in a mount namespace in which `/dev/fuse` has this mode.
fn run_role_with_fuse_mode(mode: u32, role: &str) {
    with_fuse_mode(mode, || {
        lower_memlock(MEMLOCK);
        run_role(role, NOBODY);
    });
}

/// Lowers the soft limit on locked memory.
fn lower_memlock(bytes: u64) {
    let limit = getrlimit(Resource::Memlock);
    let current = Some(limit.current.map_or(bytes, |now| now.min(bytes)));
    setrlimit(Resource::Memlock, Rlimit { current, maximum: limit.maximum }).unwrap();
}

/// As nobody: a client in the namespaces of the daemon `pid`.
fn start_client(vdpad: &Vdpad, role: &str, device: &Path, memory: u64) -> RoleProcess {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let pid = vdpad.pid().as_raw_nonzero().to_string();
    RoleProcess::spawn(command.arg(role).arg(pid).arg(device).arg(memory.to_string()))
}

fn enter_namespaces_of(pid: &str) {
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    let daemon = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let both = ThreadNameSpaceType::USER | ThreadNameSpaceType::MOUNT;
    move_into_thread_name_spaces(daemon.as_fd(), both).unwrap();
    assert!(getuid().is_root());
}

/// A client that does verified I/O and runs until it is told to stop.
fn client(pid: &str, device: &str, memory: &str) {
    enter_namespaces_of(pid);
    let mut disk = Disk::start_within_limit(Path::new(device), memory.parse().unwrap());
    disk.check(8);
    send_line("checked");
    receive_line();
    disk.check(9);
    send_line("end");
}

/// A client whose memory is refused.
fn refused_client(pid: &str, device: &str, memory: &str) {
    enter_namespaces_of(pid);
    let memory = memory.parse().unwrap();
    let (mut session, _) = disk::open(Path::new(device));
    let ram = memfd::create(c"refused-ram", memory, None).unwrap();
    let error = session.map_memfd("ram", ram, disk::IOVA, memory, Perm::RW).unwrap_err();
    // A device that pins at the end of a batch refuses that end.
    assert!(matches!(error, Error::Map { .. } | Error::Memlock { .. } | Error::Request { .. }), "{error}");
    send_line("refused");
}

/// As nobody: everything an ordinary user does with vdpad.
fn serve() {
    assert_eq!(getuid().as_raw(), NOBODY);
    let vdpad = Vdpad::start(LIMIT);
    assert!(!vdpad.is_mounted(), "the mount is in the daemon's own namespace");
    for (name, attrs, memory) in [("free", "pin off", MUCH), ("pinned", "pin on", LITTLE)] {
        let device = vdpad.add_blk(name, 8 << 20, attrs);
        let mut client = start_client(&vdpad, "client", &device, memory);
        client.receive("checked");
        let shown = vdpad.ctl(&format!("-s dev show {name}"));
        shown.succeeds();
        let pages = if name == "pinned" { LITTLE / 4096 } else { 0 };
        assert!(
            shown.stdout.contains(&format!("  pinned {pages} of 2048 pages\n  mappings 1\n")),
            "{shown:?}"
        );
        assert!(shown.stdout.contains(&format!("owner pid {} ", client.pid().as_raw_nonzero())), "{shown:?}");
        let held = vdpad.resources();
        // By the client's descriptor: /proc/PID/map_files is closed to ordinary users. The ring lies in it.
        assert_eq!(held.memfds, 1, "the memory is mapped and not copied: {held:?}");
        assert_eq!(held.registered, pages * 4096, "{held:?}");
        client.send("go on");
        client.receive("end");
        assert!(client.end().success());
        vdpad.is_released(name);
    }
    // Memory that the client may not lock is not pinned for it.
    let device = vdpad.info("pinned").path;
    let mut client = start_client(&vdpad, "refused-client", &device, MUCH);
    client.receive("refused");
    assert!(client.end().success());
    let log = vdpad.log();
    assert!(log.contains("pinning 4096 more pages exceeds RLIMIT_MEMLOCK: 0 pinned of 2048"), "{log}");
    vdpad.is_released("pinned");
}

/// As nobody: a daemon whose own limit is too small. Its capabilities end with its namespace, CAP_IPC_LOCK too.
fn serve_with_little() {
    let before = getrlimit(Resource::Memlock);
    lower_memlock(1 << 20);
    let vdpad = Vdpad::start(LIMIT);
    setrlimit(Resource::Memlock, before).unwrap();
    let device = vdpad.add_blk("pinned", 8 << 20, "pin on");
    let mut client = start_client(&vdpad, "refused-client", &device, LITTLE);
    client.receive("refused");
    assert!(client.end().success());
    let log = vdpad.log();
    let refusal = "guest memory cannot be pinned: Cannot allocate memory (ENOMEM); without CAP_IPC_LOCK this daemon \
                   may lock 1048576 bytes in all (RLIMIT_MEMLOCK): raise that, or add the device with pin off";
    assert!(log.contains(refusal), "{log}");
    vdpad.is_released("pinned");
    // Without pinning it works, with the same limit.
    let device = vdpad.add_blk("free", 8 << 20, "pin off");
    let mut client = start_client(&vdpad, "client", &device, LITTLE);
    client.receive("checked");
    client.send("go on");
    client.receive("end");
}

/// As nobody: a directory that this user cannot write to.
fn be_refused() {
    let mut command = robust::command_at(Path::new("/nosuch"));
    run(command.args(["--log", "error"])).fails(
        1,
        "vdpad: cannot serve device files: cannot use /nosuch/dev as mount directory: Permission denied (os error 13)",
    );
}

/// As nobody, without `/dev/fuse`: it has a specific exit status.
fn be_without_fuse() {
    let dir = tempfile::tempdir().unwrap();
    run(&mut robust::command_at(dir.path())).fails(
        3,
        "vdpad: cannot run without root: cannot open /dev/fuse: Permission denied (EACCES); it must be readable and \
         writable for this user (distributions ship it with mode 0666)",
    );
}

fn an_ordinary_user_serves_in_a_namespace() {
    run_role("serve", 0);
}

fn a_daemon_that_cannot_pin_says_so() {
    run_role("serve-with-little", 0);
}

fn a_directory_of_others_is_refused() {
    run_role("refused", 0);
}

fn a_closed_dev_fuse_is_named() {
    run_role("without-fuse", 0);
}

/// Named by the module of tests that run alone.
const TESTS: [(&str, fn()); 4] = [
    ("heavy::a_closed_dev_fuse_is_named", a_closed_dev_fuse_is_named),
    ("heavy::an_ordinary_user_serves_in_a_namespace", an_ordinary_user_serves_in_a_namespace),
    ("heavy::a_daemon_that_cannot_pin_says_so", a_daemon_that_cannot_pin_says_so),
    ("heavy::a_directory_of_others_is_refused", a_directory_of_others_is_refused),
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["serve"] => run_role_with_fuse_mode(0o666, "user-serve"),
        ["serve-with-little"] => run_role_with_fuse_mode(0o666, "user-serve-with-little"),
        ["refused"] => run_role_with_fuse_mode(0o666, "user-refused"),
        ["without-fuse"] => run_role_with_fuse_mode(0o600, "user-without-fuse"),
        ["user-serve"] => serve(),
        ["user-serve-with-little"] => serve_with_little(),
        ["user-refused"] => be_refused(),
        ["user-without-fuse"] => be_without_fuse(),
        ["client", pid, device, memory] => client(pid, device, memory),
        ["refused-client", pid, device, memory] => refused_client(pid, device, memory),
        _ => return run_tests(&words, &TESTS),
    }
    println!("ROLE COMPLETE");
}
