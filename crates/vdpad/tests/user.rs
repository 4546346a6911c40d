//! The daemon without root: as a user with few capabilities, below a holder that is such a one too.
#![expect(unsafe_code, reason = "namespaces for the test itself")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "../../vdpa-sys/tests/userns/harness.rs"]
mod harness;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/tap.rs"]
mod tap;

use std::fs;
use std::ops::Deref;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CapabilitySet, capabilities};
use vdpa_core::ops::VdpaOps as _;

use harness::with_fuse_mode;
use held::{daemon, replace, upgrade};
use robust::disk::{self, Disk};
use robust::{Vdpad, command_at, eventually, open_to_all, programs};

const UID: u32 = 4800;
const GID: u32 = 4801;
const USER: &str = "4800:4801";
const LIMIT: Duration = Duration::from_secs(120);

/// Words of the table: what a daemon keeps for all clients, with files of a mount.
const ANY: [&str; 3] = ["always", "unless `--clients own`", "for files of a mount"];

/// A daemon below a holder, in a directory of the user. Dropping it ends both: the mount is in the namespace of this thread, where nobody
/// else would remove it.
struct Service {
    vdpad: Vdpad,
    _outer: tempfile::TempDir,
}

impl Deref for Service {
    type Target = Vdpad;

    fn deref(&self) -> &Vdpad {
        &self.vdpad
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.vdpad.signal(Signal::TERM);
        self.vdpad.wait();
    }
}

fn start(args: &[&str]) -> Service {
    let outer = directory();
    let dir = fs::canonicalize(outer.path()).unwrap();
    let args = [&["--holder", "--front", "fuse", "--crash-limit", "20", "--user", USER], args].concat();
    let vdpad = Vdpad::start_at(&dir, LIMIT, &args);
    Service { vdpad, _outer: outer }
}

fn directory() -> tempfile::TempDir {
    let outer = tempfile::tempdir().unwrap();
    chown(outer.path(), Some(UID), Some(GID)).unwrap();
    outer
}

/// The capabilities that docs/vdpad.md has for these words in the second column of its table.
fn in_table(kept: &[&str]) -> CapabilitySet {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/vdpad.md")).unwrap();
    let section = text.split("\n## Without root\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let mut set = CapabilitySet::empty();
    for line in section.lines() {
        let Some((name, rest)) = line.strip_prefix("| `CAP_").and_then(|line| line.split_once("` | ")) else {
            continue;
        };
        if kept.iter().any(|word| rest.starts_with(word)) {
            set |= CapabilitySet::from_name(name).unwrap();
        }
    }
    set
}

/// As `in_table`, but for those that this test has not itself: in a container root may lack some.
fn documented(kept: &[&str]) -> CapabilitySet {
    let set = in_table(kept);
    let missing = set - capabilities(None).unwrap().permitted;
    if !missing.is_empty() {
        eprintln!("not to be had here: {missing:?}");
    }
    set - missing
}

/// Every thread of this process is one of the user, with exactly these capabilities, and gets no others.
#[track_caller]
fn has_only(pid: u32, wanted: CapabilitySet) {
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        // A thread may end meanwhile.
        let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        let set = |name| CapabilitySet::from_bits_retain(u64::from_str_radix(&field(name), 16).unwrap());
        assert_eq!(field("Uid:"), format!("{UID} {UID} {UID} {UID}"));
        assert_eq!(field("Gid:"), format!("{GID} {GID} {GID} {GID}"));
        assert_eq!((field("Groups:"), field("NoNewPrivs:")), (String::new(), "1".to_owned()));
        for name in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:", "CapBnd:"] {
            assert_eq!(set(name), wanted, "{name}");
        }
    }
}

/// The holder and the daemon.
#[track_caller]
fn have_only(vdpad: &Vdpad, wanted: CapabilitySet) {
    has_only(vdpad.pid().as_raw_nonzero().get().cast_unsigned(), wanted);
    has_only(daemon(vdpad).pid, wanted);
}

/// `bench io` with verification, as root or as another user, while the daemon is killed and upgraded.
fn loses_nothing(vdpad: &Vdpad, device: &Path, user: &[&str], wanted: CapabilitySet) {
    have_only(vdpad, wanted);
    let tool = vdpad.dir().join("vdpactl");
    fs::copy(programs::program("vdpactl"), &tool).unwrap();
    open_to_all(&tool);
    let line = "-j bench io --seconds 6 --memory 16M --disk 64M --queue-depth 32 --device";
    let mut command = Command::new(user[0]);
    command.args(&user[1..]).arg(tool).args(line.split(' ')).arg(device);
    let load = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("the client is there", || vdpad.info("disk0").state.owner);
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(300));
        replace(vdpad);
        have_only(vdpad, wanted);
        thread::sleep(Duration::from_millis(300));
        upgrade(vdpad);
        have_only(vdpad, wanted);
    }
    assert!(vdpad.info("disk0").state.pinned_pages > 0);
    let output = load.wait_with_output().unwrap();
    let (text, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{log}");
    for count in ["lost", "duplicate", "corrupt", "errors"] {
        assert!(text.replace(' ', "").contains(&format!("\"{count}\":0")), "{count}: {text}");
    }
    eprintln!("capabilities: {wanted:?}");
}

/// Its client is root's, its disk too.
#[test]
fn a_daemon_without_root_loses_nothing() {
    with_fuse_mode(0o666, || {
        let wanted = documented(&ANY);
        assert!(wanted.contains(CapabilitySet::SYS_PTRACE | CapabilitySet::SYS_ADMIN), "{wanted:?}");
        let vdpad = start(&[]);
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 << 20).unwrap();
        let attrs = format!("path {} passed on memlock unlimited", image.path().display());
        let device = vdpad.add("disk0", "blk", &attrs);
        let found = fs::metadata(&device).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (UID, GID, 0o600));
        loses_nothing(&vdpad, &device, &["env"], wanted);
    });
}

/// It can do nothing that this user cannot, but mount, pin, and open what its clients have mapped.
#[test]
fn clients_of_that_user_need_few_capabilities() {
    with_fuse_mode(0o666, || {
        let wanted = documented(&["always", "for files of a mount"]);
        assert_eq!(
            wanted
                & !(CapabilitySet::SYS_ADMIN | CapabilitySet::IPC_LOCK | CapabilitySet::CHECKPOINT_RESTORE),
            CapabilitySet::empty()
        );
        let vdpad = start(&["--clients", "own"]);
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 << 20).unwrap();
        let refused = vdpad.ctl(&format!("dev add name a mgmtdev blk path {}", image.path().display()));
        assert!(refused.stderr.contains("Permission denied"), "{refused:?}");
        let attrs = format!("path {} passed on memlock unlimited", image.path().display());
        let device = vdpad.add("disk0", "blk", &attrs);
        let root = vdpad.ctl(&format!("bench io --seconds 1 --device {}", device.display()));
        assert!(root.code != Some(0) && root.stderr.contains("VHOST_SET_OWNER failed"), "{root:?}");
        let user = ["setpriv", "--reuid=4800", "--regid=4801", "--clear-groups"];
        loses_nothing(&vdpad, &device, &user, wanted);
    });
}

/// A mount over a file that the daemon makes, and one over a file of somebody else.
#[test]
fn files_of_their_own_are_mounted_and_unmounted() {
    with_fuse_mode(0o666, || {
        let vdpad = start(&[]);
        let own = vdpad.dir().join("own");
        let device = vdpad.add("own", "sim-blk", &format!("device_file {}", own.display()));
        assert_eq!(device, own);
        let mut disk = Disk::start(&device, disk::MEMORY_MIN);
        disk.check(1);
        replace(&vdpad);
        disk.check(2);
        upgrade(&vdpad);
        disk.check(3);
        assert!(disk.session.ops().status().is_ok());
        drop(disk);
        vdpad.is_released("own");
        vdpad.ctl("dev del own").succeeds();
        assert!(!own.exists());
    });
}

/// Of an interface of that user it needs nothing; to make one it has to keep a capability.
#[test]
fn interfaces_need_a_user_or_a_capability() {
    with_fuse_mode(0o666, || {
        if tap::namespace(false).is_none() {
            return;
        }
        tap::ip(&["tuntap", "add", "mine", "mode", "tap", "user", "4800"]);
        tap::ip(&["tuntap", "add", "theirs", "mode", "tap", "user", "4900"]);
        let vdpad = start(&[]);
        let add = |vdpad: &Vdpad, name: &str, attrs: &str| {
            vdpad.ctl(&format!("dev add name {name} mgmtdev net mac 52:54:11:12:34:56 tap {attrs}"))
        };
        add(&vdpad, "mine", "mine").succeeds();
        let refused = add(&vdpad, "other", "theirs");
        assert!(
            refused.stderr.contains("It needs CAP_NET_ADMIN, or an interface of its own user"),
            "{refused:?}"
        );
        replace(&vdpad);
        upgrade(&vdpad);
        drop(vdpad);
        let vdpad = start(&["--capability", "net_admin"]);
        have_only(&vdpad, documented(&[&ANY[..], &["`--capability net_admin`"]].concat()));
        add(&vdpad, "made", "made create on").succeeds();
        replace(&vdpad);
        have_only(&vdpad, documented(&[&ANY[..], &["`--capability net_admin`"]].concat()));
        vdpad.ctl("dev del made").succeeds();
    });
}

/// As a service manager starts it, which has dropped root already (`User=`, `AmbientCapabilities=`).
#[test]
fn a_process_of_that_user_gives_up_what_is_too_much() {
    with_fuse_mode(0o666, || {
        let outer = directory();
        let dir = fs::canonicalize(outer.path()).unwrap();
        let wanted = documented(&ANY);
        let names: String =
            wanted.iter_names().map(|(name, _)| format!(",+{}", name.to_ascii_lowercase())).collect();
        let program = dir.join("vdpad");
        fs::copy(programs::program("vdpad"), &program).unwrap();
        open_to_all(&program);
        let mut command = Command::new("setpriv");
        command.args(["--reuid=4800", "--regid=4801", "--clear-groups"]);
        command.arg(format!("--bounding-set=-all{names}")).arg(format!("--inh-caps=-all{names}"));
        command.arg(format!("--ambient-caps=-all{names}")).arg(&program);
        command.args(command_at(&dir).get_args()).args(["--holder", "--front", "fuse", "--user", USER]);
        let vdpad = Service { vdpad: Vdpad::start_command(&dir, LIMIT, command), _outer: outer };
        have_only(&vdpad, wanted);
        let device = vdpad.add("disk0", "sim-blk", "");
        let mut disk = Disk::start(&device, disk::MEMORY_MIN);
        replace(&vdpad);
        disk.check(1);
    });
}

#[test]
fn what_cannot_be_is_said() {
    let dir = directory();
    let start = |first: &[&str], user: &str| {
        let mut command = Command::new(first[0]);
        command.args(&first[1..]).arg(programs::program("vdpad"));
        command.args(command_at(dir.path()).get_args()).args(["--front", "fuse", "--user", user]);
        robust::run(&mut command)
    };
    let root = start(&["env"], "root");
    assert_eq!(root.code, Some(3), "{root:?}");
    assert!(root.stderr.contains("--user is for a user other than root"), "{root:?}");
    let unknown = start(&["env"], "no-such-user-here");
    assert_eq!(unknown.code, Some(2), "{unknown:?}");
    assert!(unknown.stderr.contains("useradd --system no-such-user-here"), "{unknown:?}");
    let other = start(&["setpriv", "--reuid=4900", "--clear-groups"], USER);
    assert_eq!(other.code, Some(3), "{other:?}");
    assert!(other.stderr.contains("this is user 4900 and cannot become user 4800"), "{other:?}");
    // What the kernel does not let it have is named.
    with_fuse_mode(0o666, || {
        let mut command = Command::new("setpriv");
        command.arg("--bounding-set=-sys_ptrace").arg(programs::program("vdpad"));
        command.args(command_at(dir.path()).get_args()).args(["--front", "fuse", "--user", USER]);
        let vdpad = Vdpad::start_command(dir.path(), LIMIT, command);
        eventually("it is in the log", || {
            vdpad.log().contains("without CAP_SYS_PTRACE there are no clients of other users").then_some(())
        });
        kill_process(Pid::from_raw(vdpad.pid().as_raw_nonzero().get()).unwrap(), Signal::TERM).unwrap();
    });
}

/// The service gets what the daemon keeps, no more and no less.
#[test]
fn the_units_give_what_is_documented() {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist");
    let given = |file: &str, setting: &str| {
        let text = fs::read_to_string(dist.join(file)).unwrap();
        let value = text.lines().rev().find_map(|line| line.strip_prefix(setting)).unwrap().to_owned();
        let names = value.split(' ').map(|name| name.strip_prefix("CAP_").unwrap());
        names.fold(CapabilitySet::empty(), |set, name| set | CapabilitySet::from_name(name).unwrap())
    };
    for setting in ["AmbientCapabilities=", "CapabilityBoundingSet="] {
        let unit = given("vdpad.service", setting);
        assert_eq!(unit, in_table(&["always", "unless `--clients own`"]), "{setting}");
        // One of a drop-in that is not empty is added.
        let mounts = unit | given("vdpad.service.d/own-mounts.conf", setting);
        assert_eq!(mounts, in_table(&ANY), "{setting}");
    }
}
