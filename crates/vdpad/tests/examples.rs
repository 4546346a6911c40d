//! The examples of vdpa-client, run as their readers run them.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use robust::{Vdpad, eventually};

/// Builds the examples if needed, and returns the path of one.
fn example(name: &str) -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--locked", "--package", "vdpa-client", "--example", name])
        .args(["--features", "vm-memory,vmm-sys-util"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(status.success());
    // target/debug/deps/examples-HASH: a debug build, as the command above makes.
    let target = std::env::current_exe().unwrap();
    let target = target.ancestors().nth(3).unwrap();
    target.join("debug/examples").join(name)
}

fn run(name: &str, args: &[&str]) -> String {
    let output = Command::new(example(name)).args(args).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn driver_replaces_itself() {
    let vdpad = Vdpad::start(Duration::from_secs(120));
    for mgmtdev in ["blk", "sim-blk"] {
        let device = vdpad.add_any(mgmtdev, mgmtdev);
        let text = run("driver", &[device.to_str().unwrap(), "3"]);
        assert!(text.ends_with("3 updates, nothing lost\n"), "{text}");
        assert_eq!(text.matches("exec of 1 device in ").count(), 3, "{text}");
        assert_eq!(vdpad.client().update(mgmtdev).unwrap().updates, 3);
    }
}

#[test]
fn a_monitor_puts_its_memory_behind_a_ring_and_takes_it_away() {
    let vdpad = Vdpad::start(Duration::from_secs(120));
    let device = vdpad.add("sim", "sim-blk", "verify_remap off");
    let text = run("shadow_rings", &[device.to_str().unwrap(), "20"]);
    assert!(
        text.starts_with("20 moves, ") && text.ends_with(" by the shadow ring, nothing lost\n"),
        "{text}"
    );
    assert!(!text.contains(" 0 of "), "{text}");
    // A device that checks memory refuses, and has the ring where it was.
    let device = vdpad.add("verified", "sim-blk", "");
    let output =
        Command::new(example("shadow_rings")).args([device.to_str().unwrap(), "1"]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && error.contains(r#"name: "ring""#) && error.contains("EFAULT"),
        "{error}"
    );
}

#[test]
fn the_guest_of_a_monitor_does_not_notice() {
    let vdpad = Vdpad::start(Duration::from_secs(120));
    for mgmtdev in ["blk", "sim-blk"] {
        let device = vdpad.add_any(mgmtdev, mgmtdev);
        let text = run("guest", &[device.to_str().unwrap(), "3"]);
        assert!(
            text.contains("\n3 updates, the guest wrote ") && text.ends_with(" and lost none\n"),
            "{text}"
        );
        assert_eq!(text.matches("fork of 1 device in ").count(), 3, "{text}");
        let update = vdpad.client().update(mgmtdev).unwrap();
        assert_eq!((update.updates, update.last.unwrap().way.as_str()), (3, "fork"));
    }
}

/// On a disk that both daemons serve, and on one that is copied.
#[test]
fn a_machine_moves_to_another_daemon() {
    let daemons = [0, 1].map(|_| Vdpad::start(Duration::from_secs(240)));
    let [here, there] = &daemons;
    let shared = here.image("shared", 4 << 20);
    let [from, to] = ["copied", "copy"].map(|name| here.image(name, 4 << 20));
    for (name, disks, copy) in [("shared", [&shared, &shared], false), ("copied", [&from, &to], true)] {
        let device = |daemon: &Vdpad, disk: &Path| {
            daemon
                .add(name, "blk", &format!("path {} shared on", disk.display()))
                .to_str()
                .unwrap()
                .to_owned()
        };
        let devices = [device(here, disks[0]), device(there, disks[1])];
        let socket = here.dir().join(format!("{name}.sock"));
        let socket = socket.to_str().unwrap();
        let child = Command::new(example("migrate"))
            .args(["destination", &devices[1], socket])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut destination = Server(child);
        let mut lines = BufReader::new(destination.0.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert_eq!(line, "destination: waits\n");
        let files = disks.map(|disk| disk.to_str().unwrap());
        let copy = if copy { vec!["--copy", files[0], files[1]] } else { vec![] };
        let source = run("migrate", &[&["source", &devices[0], socket][..], &copy].concat());
        assert!(source.contains("downtime"), "{source}");
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut lines, &mut rest).unwrap();
        assert!(destination.0.wait().unwrap().success(), "{rest}");
        assert!(rest.contains("nothing lost"), "{rest}");
    }
}

/// Three threads on three queues, guest memory of `vm-memory`, updates under load.
#[test]
fn a_monitor_over_vm_memory_is_replaced_under_load() {
    let vdpad = Vdpad::start(Duration::from_secs(120));
    let device = vdpad.add_any("blk", "blk");
    let text = run("vmm", &[device.to_str().unwrap(), "5"]);
    assert_eq!(text.matches("fork of 1 device in ").count(), 5, "{text}");
    let lines: Vec<_> = text.lines().filter(|line| line.contains("blocks by 3 queues")).collect();
    assert_eq!(lines.len(), 6, "{text}");
    let mut before = 0;
    for line in lines {
        assert!(line.ends_with("guest memory: 2 regions, 2 mappings"), "{line}");
        let blocks: u64 = line.split(' ').next().unwrap().parse().unwrap();
        assert!(blocks > before, "each program serves all queues: {text}");
        before = blocks;
    }
    assert_eq!(vdpad.client().update("blk").unwrap().updates, 5);
}

/// The example is what its readers are told: short, and without unsafe code.
#[test]
fn the_monitor_is_short_and_safe() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vdpa-client/examples/vmm.rs");
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.lines().count() <= 150, "{} lines", text.lines().count());
    assert!(!text.contains("unsafe") && !text.contains("vdpa_core") && !text.contains("vdpa_sys"));
}

/// A server that is killed at the end of the test if it still runs.
struct Server(Child);

impl Server {
    fn start(args: &[&str]) -> (Self, BufReader<std::process::ChildStdout>) {
        let mut child =
            Command::new(example("upgrade_server")).args(args).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.ends_with("serves\n") {
            line.clear();
            assert!(lines.read_line(&mut line).unwrap() > 0, "the server has ended");
        }
        (Self(child), lines)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ask(client: &mut BufReader<UnixStream>, line: &str) -> String {
    client.get_mut().write_all(line.as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_line(&mut answer).unwrap();
    answer.trim_end().to_owned()
}

#[test]
fn clients_of_the_server_keep_their_connections() {
    let vdpad = Vdpad::start(Duration::from_secs(120));
    let device = vdpad.add_any("disk0", "blk");
    let path = vdpad.dir().join("server.sock");
    let path: &Path = &path;
    let (mut first, _output) = Server::start(&["1", device.to_str().unwrap(), path.to_str().unwrap()]);
    let connect = || {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        BufReader::new(stream)
    };
    let (mut one, mut other) = (connect(), connect());
    assert_eq!(ask(&mut one, "version\n"), "1");
    assert_eq!(ask(&mut other, "write 7 kept over versions\n"), "written");
    // Half a request; the next version answers it.
    one.get_mut().write_all(b"read").unwrap();
    assert_eq!(ask(&mut other, "version\n"), "1");

    let (mut second, _output) = Server::start(&["2", "--take-over", path.to_str().unwrap()]);
    assert!(eventually("the first version ends", || first.0.try_wait().unwrap()).success());
    assert_eq!(ask(&mut one, " 7\n"), "kept over versions");
    assert_eq!(ask(&mut other, "version\n"), "2");
    assert_eq!(ask(&mut connect(), "version\n"), "2", "new clients too");

    let (_third, _output) = Server::start(&["3", "--take-over", path.to_str().unwrap()]);
    assert!(eventually("the second version ends", || second.0.try_wait().unwrap()).success());
    assert_eq!(ask(&mut other, "version\n"), "3");
    let update = vdpad.client().update("disk0").unwrap();
    assert_eq!((update.updates, update.last.unwrap().way.as_str()), (2, "hand-over"));
}
