//! A container of podman gets devices by the specification of `vdpactl cdi generate`, and uses them: with verified I/O, while the daemon
//! is upgraded below it.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod support;

#[path = "support/skips.rs"]
mod skips;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use support::daemon::Daemon;
use support::{Outcome, finish, programs, run, vdpactl};

/// In a mount namespace of its own, whose `/run` has the specification and nothing else: that of the machine stays as it is. Podman is
/// told where to keep what it keeps, and to leave network and limits alone.
const SCRIPT: &str = r#"
set -e
state=$1 spec=$2; shift 2
mount -t tmpfs tmpfs /run
install -D -m 644 "$spec" /run/cdi/vdpa-live.json
exec podman --root "$state/root" --runroot "$state/run" --tmpdir "$state/tmp" --cgroup-manager cgroupfs \
    --events-backend none $(! command -v runc >/dev/null || echo --runtime runc) \
    run --rm --network none --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 "$@"
"#;

/// A root with programs of this workspace, and the libraries that they need. Nothing is downloaded.
struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn new(programs: &[PathBuf]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for part in ["bin", "dev", "proc", "sys", "run", "etc", "tmp"] {
            fs::create_dir_all(dir.path().join("box").join(part)).unwrap();
        }
        let made = Self { dir };
        for program in programs {
            let name = Path::new("/bin").join(program.file_name().unwrap());
            made.put(program, &name);
            let libraries = run(Command::new("ldd").arg(program));
            for word in libraries.stdout.split_whitespace().filter(|word| word.starts_with('/')) {
                made.put(Path::new(word), Path::new(word));
            }
        }
        made
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("box")
    }

    fn put(&self, from: &Path, to: &Path) {
        let to = self.root().join(to.strip_prefix("/").unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    }

    /// Begins a container with the devices of CDI, which runs `command`.
    fn begin(&self, spec: &Path, devices: &[&str], command: &[&str]) -> Child {
        let mut podman = Command::new("unshare");
        podman.args(["--mount", "--propagation", "private", "bash", "-c", SCRIPT, "bash"]);
        podman.arg(self.dir.path()).arg(spec);
        podman.args(devices.iter().map(|device| format!("--device=vdpa-live.org/vhost-vdpa={device}")));
        podman.arg("--rootfs").arg(self.root()).args(command);
        podman.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn run(&self, spec: &Path, devices: &[&str], command: &[&str]) -> Outcome {
        finish(self.begin(spec, devices, command))
    }
}

/// Whether podman runs containers on this machine; says so if not.
fn podman_works() -> bool {
    let there = |program| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there("podman") {
        skips::skip("podman is missing: no container is given a device");
        return false;
    }
    if !rustix::process::geteuid().is_root() {
        skips::skip("containers are given devices by root only");
        return false;
    }
    let (container, ls) = (Image::new(&[PathBuf::from("/bin/true")]), ["/bin/true"]);
    let empty = container.dir.path().join("empty.json");
    fs::write(&empty, "{}").unwrap();
    let outcome = container.run(&empty, &[], &ls);
    if outcome.code != Some(0) {
        eprintln!("{}", outcome.stderr);
        skips::skip("podman cannot run a container on this machine");
    }
    outcome.code == Some(0)
}

fn socket(daemon: &Daemon) -> PathBuf {
    daemon.dir().join("control.sock")
}

/// Names in a directory of the container.
fn names(listing: &Outcome) -> BTreeSet<String> {
    assert_eq!(listing.code, Some(0), "{listing:?}");
    listing.stdout.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn a_container_uses_the_devices_that_it_is_given_and_sees_no_others() {
    if !podman_works() {
        return;
    }
    let daemon = Daemon::start_with(&["--holder"]);
    const SIZE: usize = 8 << 20;
    let (disk0, disk1) = (daemon.disk("disk0.img", SIZE), daemon.disk("disk1.img", SIZE));
    // The load knows its own blocks, and blocks of zeros.
    fs::write(&disk1.path, vec![0; SIZE]).unwrap();
    // The limit of locked memory of a container is small, and no specification can set it.
    daemon.add_blk("disk0", &disk0, &[("memlock", "unlimited")]);
    daemon.add_blk("disk1", &disk1, &[("memlock", "unlimited")]);
    daemon.add("a+b", "sim-blk", &[]);

    let spec = daemon.dir().join("vdpa-live.json");
    let made = vdpactl(&socket(&daemon), &format!("cdi generate --output {}", spec.display()));
    assert_eq!((made.code, made.stdout.as_str()), (Some(0), ""), "{made:?}");
    assert!(made.stderr.contains("left out: the name of device \"a+b\""), "{made:?}");
    let printed = vdpactl(&socket(&daemon), "cdi generate");
    assert_eq!(printed.stdout, fs::read_to_string(&spec).unwrap());

    let container = Image::new(&[programs::program("vdpactl"), PathBuf::from("/bin/ls")]);
    let seen = |devices: &[&str]| names(&container.run(&spec, devices, &["/bin/ls", "/dev/vdpa"]));
    assert_eq!(seen(&["disk0"]), BTreeSet::from(["disk0".into()]));
    assert_eq!(seen(&["all"]), BTreeSet::from(["disk0".into(), "disk1".into()]));
    let without = container.run(&spec, &[], &["/bin/ls", "/dev/vdpa"]);
    assert_ne!(without.code, Some(0), "{without:?}");
    let unknown = container.run(&spec, &["a+b"], &["/bin/ls"]);
    assert_ne!(unknown.code, Some(0), "{unknown:?}");

    // Every block is written with its number and a checksum and read again, while the daemon becomes another process.
    let load =
        "/bin/vdpactl bench io --device /dev/vdpa/disk1 --seconds 2 --memory 16M --disk 8M --queue-depth 8";
    let client = container.begin(&spec, &["disk1"], &load.split(' ').collect::<Vec<_>>());
    daemon.wait_for("disk1", "I/O of the container", |info| {
        info.state.queues.iter().any(|queue| queue.requests > 100)
    });
    let upgraded = vdpactl(&socket(&daemon), "-j daemon upgrade");
    assert_eq!(upgraded.code, Some(0), "{upgraded:?}");
    assert!(upgraded.stdout.contains("\"upgrades\":1"), "{upgraded:?}");
    let done = finish(client);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.stdout.contains(" 0 lost, 0 corrupt, 0 duplicate, 0 failed"), "{done:?}");
    assert!(disk1.all().iter().any(|byte| *byte != 0), "nothing was written");
    assert_eq!(disk0.all(), support::daemon::pattern(0, SIZE), "another device was written");
    let queues = daemon.info("disk1").state.queues;
    assert_eq!(queues.iter().map(|queue| queue.errors).sum::<u64>(), 0, "{queues:?}");
}

#[test]
fn what_cannot_be_done_is_said() {
    let setup = support::Setup::new(support::Fixture::simulators());
    let none = vdpactl(&setup.socket, "cdi generate");
    assert_eq!((none.code, none.stdout.as_str()), (Some(1), ""), "{none:?}");
    assert!(none.stderr.contains("there is no device that a container can be given"), "{none:?}");
    let setup = support::Setup::new(support::Fixture::simulators().with_blk());
    let nowhere = vdpactl(&setup.socket, "cdi generate --output /nonexistent/x.json");
    assert_eq!(nowhere.code, Some(1));
    assert!(nowhere.stderr.contains("cannot write /nonexistent/x.json"), "{nowhere:?}");
    assert!(nowhere.stderr.contains("No such file or directory"), "{nowhere:?}");
    let relative = vdpactl(&setup.socket, "cdi generate --container-dir dev");
    assert_eq!(relative.code, Some(2));
    assert!(relative.stderr.contains("an absolute path is right"), "{relative:?}");
    vdpactl(&setup.socket, "cdi generate twice").fails("", "Unknown option \"twice\"\n");
    vdpactl(&setup.socket, "cdi nonsense").fails("", "Command \"nonsense\" not found\n");
}
