//! The daemon's binary: start, readiness, end, exit status.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod support;

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vdpad::ctl::client::Client;

fn vdpad(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vdpad"));
    command.env_remove("NOTIFY_SOCKET").env_remove("VDPAD_LOG");
    command.arg("--control").arg(dir.join("control.sock")).arg("--dir").arg(dir.join("dev"));
    command
}

/// Starts the daemon and waits for its line `ready`.
fn start(command: &mut Command) -> Child {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    // Ends when the daemon does, at the latest.
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
fn the_service_manager_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let notify = dir.path().join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut command = vdpad(dir.path());
    let child = start(command.env("NOTIFY_SOCKET", &notify));
    let mut news = [0; 32];
    let len = manager.recv(&mut news).unwrap();
    assert_eq!(&news[..len], b"READY=1");
    end(child, Signal::TERM);
    let len = manager.recv(&mut news).unwrap();
    assert_eq!(&news[..len], b"STOPPING=1");
}

#[test]
fn a_second_daemon_in_the_same_place_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = start(&mut vdpad(dir.path()));
    let second = support::run(&mut vdpad(dir.path()));
    assert_eq!(second.code, Some(1), "{second:?}");
    assert!(second.stderr.contains("is served by another vdpad"), "{second:?}");
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
        refused.stderr.contains("device \"d0\" was refused: Fail to find the specified management device"),
        "{refused:?}"
    );
    assert!(!dir.path().join("control.sock").exists());
}
