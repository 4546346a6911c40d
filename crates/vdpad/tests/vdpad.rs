//! The daemon's program: start, readiness, end, exit status.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod support;

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vdpa_control::client::Client;
use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::QueueIndex;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

fn vdpad(dir: &Path) -> Command {
    vdpad_at(dir, "dev")
}

/// A daemon with its device files in `files`.
fn vdpad_at(dir: &Path, files: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vdpad"));
    command.env_remove("NOTIFY_SOCKET").env_remove("VDPAD_LOG").env_remove("VDPA_LIVE_NUMBERS");
    command.arg("--socket").arg(dir.join("control.sock")).arg("--dir").arg(dir.join(files));
    command
}

/// Starts the daemon and waits for its line `ready`.
fn start(command: &mut Command) -> Child {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    // Returns at the latest when the daemon ends.
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n", "{:?}", support::finish(child));
    child
}

fn end(child: Child, signal: Signal) -> support::Outcome {
    kill_process(Pid::from_child(&child), signal).unwrap();
    support::finish(child)
}

#[test]
fn signals_end_it_in_order() {
    for signal in [Signal::TERM, Signal::INT] {
        let dir = tempfile::tempdir().unwrap();
        let child = start(&mut vdpad(dir.path()));
        let socket = dir.path().join("control.sock");
        let version = Client::new(&socket).unwrap().version().unwrap();
        assert_eq!((version.daemon.as_str(), version.pid), ("vdpad", child.id()));
        let outcome = end(child, signal);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert!(!socket.exists());
    }
}

#[test]
fn the_socket_can_be_named_by_the_former_option_and_by_the_environment() {
    for former in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("named.sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vdpad"));
        command.env_remove("NOTIFY_SOCKET").arg("--dir").arg(dir.path().join("dev"));
        if former {
            // The option wins over the environment.
            command.arg("--control").arg(&socket).env("VDPAD_SOCKET", dir.path().join("other.sock"));
        } else {
            command.env("VDPAD_SOCKET", &socket);
        }
        let child = start(&mut command);
        assert!(Client::new(&socket).unwrap().version().is_ok());
        assert_eq!(end(child, Signal::TERM).code, Some(0));
    }
    let help = support::run(Command::new(env!("CARGO_BIN_EXE_vdpad")).arg("--help"));
    assert!(help.stdout.contains("--socket") && !help.stdout.contains("--control"), "{help:?}");
}

#[test]
fn the_service_manager_is_notified() {
    let dir = tempfile::tempdir().unwrap();
    let notify = dir.path().join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut command = vdpad(dir.path());
    let child = start(command.env("NOTIFY_SOCKET", &notify));
    let mut state = [0; 32];
    let len = manager.recv(&mut state).unwrap();
    assert_eq!(&state[..len], b"READY=1");
    end(child, Signal::TERM);
    let len = manager.recv(&mut state).unwrap();
    assert_eq!(&state[..len], b"STOPPING=1");
}

#[test]
fn a_second_daemon_on_the_same_directory_or_socket_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = start(&mut vdpad(dir.path()));
    for (files, words) in [("dev", "is served by another vdpad"), ("dev2", "is in use by a running vdpad")] {
        let second = support::run(&mut vdpad_at(dir.path(), files));
        assert_eq!(second.code, Some(1), "{second:?}");
        assert!(second.stderr.contains(words), "{second:?}");
    }
    assert!(Client::new(dir.path().join("control.sock")).unwrap().version().is_ok());
    // SIGKILL leaves the socket file; the next daemon replaces it.
    end(first, Signal::KILL);
    assert_eq!(end(start(&mut vdpad(dir.path())), Signal::TERM).code, Some(0));
}

#[test]
fn exit_status_tells_usage_from_failure() {
    let dir = tempfile::tempdir().unwrap();
    let with = |args: &[&str]| support::run(vdpad(dir.path()).args(args));
    for usage in [
        &["--nosuch"][..],
        &["--request-timeout", "0"],
        &["--dev", "name=d0"],
        &["--log", "vdpad=nosuchlevel"],
        &["word"],
    ] {
        let outcome = with(usage);
        assert_eq!(outcome.code, Some(2), "{usage:?}: {outcome:?}");
    }
    let refused = with(&["--dev", "name=d0 mgmtdev=nosuch"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(
        refused.stderr.contains(
            "device \"d0\" was refused: Fail to find the specified management device. \"vdpactl mgmtdev show\" lists"
        ),
        "{refused:?}"
    );
    assert!(!dir.path().join("control.sock").exists());
}

/// Requests end at the latest with the daemon's time-out, so no client hangs.
/// Character devices must be in `/dev`, whether this machine supports them or not.
#[test]
fn character_devices_elsewhere_than_in_dev_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let outcome = support::run(vdpad(dir.path()).args(["--front", "cuse"]));
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("is not below /dev"), "{outcome:?}");
    assert!(!dir.path().join("dev").exists());
    let outcome = support::run(vdpad(dir.path()).args(["--front", "vhost"]));
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    let right = "\"auto\", \"fuse\", \"cuse\" or \"vduse\" is right";
    assert!(outcome.stderr.contains(right), "{outcome:?}");
}

fn serve_sim(dir: &Path, more: &[&str]) -> (Child, VhostVdpaFd) {
    let mut command = vdpad(dir);
    let child = start(command.args(["--request-timeout", "10"]).args(more));
    let device = VhostVdpaFd::open(dir.join("dev/vhost-vdpa-0")).unwrap();
    (child, device)
}

/// Backend features that the kernel's devices do not have.
const OWN_BITS: u64 = BackendFeatures::of(&[BackendFeatures::DIRTY_LOG, BackendFeatures::DEVICE_STATE]).0;

#[test]
fn live_update_requests_can_have_other_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let text = "new_owner=0xaf2f,remap=9,new_owner_bit=19,remap_bit=20";
    let more = ["--live-numbers", text, "--dev", "name=d0 mgmtdev=sim-blk"];
    let (child, device) = serve_sim(dir.path(), &more);
    assert_eq!(device.backend_features().unwrap().0, OWN_BITS | 0x18_017e, "the bits are elsewhere");
    device.set_owner().unwrap();
    assert_eq!(device.new_owner(), Err(Errno::FAULT), "the posted number is an unknown request");
    let device = device.with_live_numbers(text.parse().unwrap()).unwrap();
    assert_eq!(device.backend_features().unwrap().0, OWN_BITS | 0x77e);
    assert_eq!(device.set_backend_features(BackendFeatures(0x77e)), Ok(()));
    assert_eq!(device.new_owner(), Err(Errno::BUSY), "known, and refused to the owner");
    drop(device);
    assert_eq!(end(child, Signal::TERM).code, Some(0));

    let outcome = support::run(vdpad(dir.path()).args(["--live-numbers", "remap=2"]));
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.stderr.contains("a message type from 7 on is right"), "{outcome:?}");
}

#[test]
fn the_simulators_have_the_parameters_of_the_kernels() {
    for (attrs, backend, size, reset_owner) in [
        ("", 0x77e, Err(Errno::OPNOTSUPP), Err(Errno::FAULT)),
        (" use_va=off reset_owner=on", 0x37e, Err(Errno::OPNOTSUPP), Ok(())),
        (" batch_mapping=off", 0x17e, Ok(256), Err(Errno::FAULT)),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let dev = format!("name=d0 mgmtdev=sim-blk{attrs}");
        let (child, device) = serve_sim(dir.path(), &["--dev", &dev]);
        assert_eq!(device.backend_features().unwrap().0, OWN_BITS | backend, "{attrs}");
        device.set_owner().unwrap();
        assert_eq!(device.vring_size(QueueIndex(0)), size, "{attrs}");
        assert_eq!(device.reset_owner(), reset_owner, "{attrs}");
        assert_eq!(device.set_owner().is_ok(), reset_owner.is_ok(), "{attrs}: the owner has gone or not");
        drop(device);
        assert_eq!(end(child, Signal::TERM).code, Some(0));
    }
}
