//! Devices on descriptors that the caller has opened, and who may use the control socket.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

use vdpa_control::api::{AddRequest, Attrs};
use vdpa_control::client::ClientError;
use vdpa_core::Errno;

use held::{replace, upgrade};
use robust::disk::{self, Disk};
use robust::{Vdpad, programs};

/// Nothing lies there: the daemon cannot have opened it.
const NOWHERE: &str = "/nonexistent/disk";

fn request(name: &str, extra: &[(&str, &str)]) -> AddRequest {
    let mut attrs = Attrs::new();
    for (attr, value) in [&[("path", NOWHERE), ("packed", "on")], extra].concat() {
        attrs.insert(attr, value).unwrap();
    }
    AddRequest { name: name.into(), mgmtdev: "blk".into(), attrs }
}

/// A file of 64 MiB without a name.
fn unlinked(dir: &Path) -> File {
    let path = dir.join("unlinked");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(64 << 20).unwrap();
    fs::remove_file(path).unwrap();
    file
}

#[track_caller]
fn refused(result: Result<(), ClientError>, errno: Errno, words: &str) {
    match result.unwrap_err() {
        ClientError::Refused(error) => {
            assert_eq!(error.errno, errno, "{error:?}");
            assert!(error.message.contains(words) && error.hint.is_some(), "{error:?}");
        }
        other => panic!("{other:?}"),
    }
}

/// Whether another open file could be locked as a disk that is written is.
fn is_free(file: &File) -> bool {
    let again = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file))).unwrap();
    rustix::fs::flock(&again, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// No path leads to it, so a daemon that goes on has it from the holder, with the locks.
#[test]
fn a_passed_disk_outlives_daemons() {
    let vdpad = held::start(&[]);
    let file = unlinked(vdpad.dir());
    // An open file of its own, as another process has.
    let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let passed = File::options().read(true).write(true).open(own).unwrap();
    vdpad.client().add_passing(&request("disk0", &[("passed", "on")]), vec![passed.into()]).unwrap();
    let mut disk = Disk::start(&vdpad.info("disk0").path, disk::MEMORY_MIN);
    disk.check(1);
    for seed in [2, 4] {
        replace(&vdpad);
        disk.check(seed);
        assert!(!is_free(&file));
        upgrade(&vdpad);
        disk.check(seed + 1);
        assert!(!is_free(&file), "a neighbour could get between");
    }
    let mut written = vec![0; 64 << 20];
    file.read_exact_at(&mut written, 0).unwrap();
    assert!(written.iter().any(|byte| *byte != 0), "requests reach that file");
    assert!(vdpad.info("disk0").passed);
    let show = vdpad.ctl("-s dev show disk0");
    assert!(show.stdout.contains("\n  passed true\n"), "{show:?}");
    drop(disk);
    vdpad.is_released("disk0");
    vdpad.ctl("dev del disk0").succeeds();
    robust::eventually("the file is free", || is_free(&file).then_some(()));
}

#[test]
fn no_file_can_have_a_descriptor() {
    let vdpad = Vdpad::start_with(robust::SOON * 6, &[]);
    let image = vdpad.dir().join("a.img");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let add = format!("dev add name a mgmtdev blk path {} passed on", image.display());
    let persistent = vdpad.ctl(&format!("{add} persistent"));
    assert_eq!(persistent.code, Some(1));
    assert!(
        persistent.stderr.contains("a: descriptors were passed, and no file can have them"),
        "{persistent:?}"
    );
    vdpad.ctl(&add).succeeds();
    Disk::start(&vdpad.info("a").path, disk::MEMORY_MIN).check(1);
    let save = vdpad.ctl("config save");
    assert_eq!(save.code, Some(1));
    assert!(save.stderr.contains("a: descriptors were passed"), "{save:?}");
    let file = vdpad.dir().join("written.toml");
    fs::write(&file, "[[device]]\nname = \"a\"\nmgmtdev = \"blk\"\npath = \"a.img\"\npassed = true\n")
        .unwrap();
    let check = vdpad.ctl(&format!("config check {}", file.display()));
    assert!(check.stderr.contains("written.toml:5: no file can have a descriptor"), "{check:?}");
}

#[test]
fn a_descriptor_that_is_no_disk_is_refused() {
    let vdpad = Vdpad::start_with(robust::SOON * 6, &[]);
    let (client, on) = (vdpad.client(), [("passed", "on")]);
    let file = || -> OwnedFd { unlinked(vdpad.dir()).into() };
    let image = vdpad.dir().join("b.img");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let open = |options: &mut fs::OpenOptions| -> OwnedFd { options.open(&image).unwrap().into() };
    let add = |extra: &[(&str, &str)], passed| client.add_passing(&request("x", extra), passed);
    refused(add(&on, vec![]), Errno::INVAL, "no descriptor came");
    refused(add(&on, vec![file(), file()]), Errno::INVAL, "2 descriptors came");
    refused(add(&[], vec![file()]), Errno::INVAL, "none are asked for");
    let reader = || open(File::options().read(true));
    refused(add(&on, vec![reader()]), Errno::INVAL, "reading and writing");
    refused(add(&on, vec![open(File::options().read(true).append(true))]), Errno::INVAL, "");
    refused(
        add(&on, vec![open(File::options().read(true).write(true).custom_flags(libc::O_APPEND))]),
        Errno::INVAL,
        "O_APPEND",
    );
    let (pipe, _other) = std::io::pipe().unwrap();
    refused(
        add(&[on[0], ("readonly", "on")], vec![pipe.into()]),
        Errno::INVAL,
        "neither a file nor a block device",
    );
    add(&[on[0], ("readonly", "on")], vec![reader()]).unwrap();
    // A neighbour finds its lock, as that of any disk, and with it nothing is left of a device that was refused.
    let neighbour = || {
        let options = [on[0], ("readonly", "off")];
        client.add_passing(&request("y", &options), vec![open(File::options().read(true).write(true))])
    };
    refused(neighbour(), Errno::BUSY, "in use by another device of this daemon");
    client.delete("x", false).unwrap();
    neighbour().unwrap();
}

fn as_user(vdpad: &Vdpad, ids: &[&str], command: &str) -> Output {
    let socket = vdpad.dir().join("control.sock");
    let mut setpriv = Command::new("setpriv");
    setpriv.args(ids).arg(programs::program("vdpactl")).arg("--socket").arg(socket).args(command.split(' '));
    setpriv.output().unwrap()
}

const ADMIN: [&str; 3] = ["--reuid=4800", "--regid=4801", "--groups=4711"];
const READER: [&str; 3] = ["--reuid=4810", "--regid=4712", "--clear-groups"];
const OTHER: [&str; 3] = ["--reuid=4820", "--regid=4821", "--clear-groups"];

/// By primary and by supplementary groups, with the real users of processes.
#[test]
fn groups_have_roles_on_the_control_socket() {
    let vdpad = Vdpad::start_with(robust::SOON * 6, &["--socket-group", "4711", "--socket-readers", "4712"]);
    fs::set_permissions(vdpad.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    let says = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let add = as_user(&vdpad, &ADMIN, "dev add name a mgmtdev blk null 1M");
    assert!(add.status.success(), "{add:?}");
    for (who, command) in [(&ADMIN, "dev show"), (&READER, "dev show"), (&READER, "config diff")] {
        let output = as_user(&vdpad, who, command);
        assert!(!says(&output).contains("permi") && !says(&output).contains("Permi"), "{output:?}");
    }
    let shown = as_user(&vdpad, &READER, "dev show");
    assert!(String::from_utf8_lossy(&shown.stdout).starts_with("a: type block"), "{shown:?}");
    for command in ["dev del a", "dev add name b mgmtdev blk null 1M", "dev state save a -", "config reload"]
    {
        let output = as_user(&vdpad, &READER, command);
        assert!(!output.status.success() && says(&output).contains("may only ask"), "{command}: {output:?}");
    }
    let other = as_user(&vdpad, &OTHER, "dev show");
    assert!(says(&other).contains("no permission to use"), "{other:?}");
    // Nor by the mode of the file.
    fs::set_permissions(vdpad.dir().join("control.sock"), fs::Permissions::from_mode(0o666)).unwrap();
    let other = as_user(&vdpad, &OTHER, "dev show");
    assert!(says(&other).contains("--socket-readers may use"), "{other:?}");
    assert!(as_user(&vdpad, &ADMIN, "dev del a").status.success());
    let log = vdpad.log();
    let line = |words: &[&str]| log.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(
        line(&[
            "control request",
            "uid=4800",
            "pid=",
            "method=POST",
            "path=/v1/devs",
            "status=201",
            "made=\"/v1/devs/a\""
        ]),
        "{log}"
    );
    assert!(
        line(&["control request", "uid=4800", "method=DELETE", "path=/v1/devs/a", "status=204"]),
        "{log}"
    );
    assert!(line(&["control request refused", "uid=4810", "method=DELETE"]), "{log}");
    assert!(line(&["control request refused", "uid=4820", "method=GET"]), "{log}");
}

/// One group has the socket file itself; its mode stays over a crash, with the socket.
#[test]
fn one_group_has_the_socket_file() {
    use std::os::unix::fs::MetadataExt as _;
    let vdpad = held::start(&["--socket-readers", "4712"]);
    fs::set_permissions(vdpad.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    for _ in 0..2 {
        let found = fs::metadata(vdpad.dir().join("control.sock")).unwrap();
        assert_eq!((found.mode() & 0o7777, found.gid()), (0o660, 4712));
        assert!(as_user(&vdpad, &READER, "dev show").status.success());
        assert!(!as_user(&vdpad, &READER, "config reload").status.success());
        assert!(!as_user(&vdpad, &ADMIN, "dev show").status.success());
        replace(&vdpad);
    }
}

/// Without `CAP_CHOWN`, as below systemd, the daemon gives its socket only to a group that it is in.
#[test]
fn the_socket_is_given_to_a_group_of_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let start = |groups: &str| {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--bounding-set=-chown", groups]).arg(programs::program("vdpad"));
        setpriv.args(["--front", "fuse", "--socket-group", "4711", "--dir"]).arg(dir.path().join("dev"));
        setpriv.arg("--socket").arg(dir.path().join("control.sock"));
        setpriv
    };
    let output = start("--clear-groups").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("to group 4711; make the user of vdpad its member"), "{said}");
    let mut daemon = start("--groups=4711").stderr(std::process::Stdio::null()).spawn().unwrap();
    let group = robust::eventually("it has a socket", || {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(dir.path().join("control.sock")).ok().map(|found| found.gid())
    });
    rustix::process::kill_process(rustix::process::Pid::from_child(&daemon), rustix::process::Signal::TERM)
        .unwrap();
    daemon.wait().unwrap();
    assert_eq!(group, 4711);
}
