//! The daemon of the previous release is upgraded to this one below clients with verified load, and downgraded again.
//!
//! `testbed/version-change` builds that daemon and names it in `VDPA_PREVIOUS_VDPAD`; without it there is no test here.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/loads.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod loads;
#[path = "support/net.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod net;
#[path = "support/robust.rs"]
mod robust;
#[path = "support/tap.rs"]
mod tap;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use vdpa_control::api::{DaemonInfo, UpgradeRequest};
use vdpa_control::client::ClientError;
use vdpa_core::Errno;

use loads::{Faults, KINDS, Load};
use robust::{Vdpad, eventually, programs};

const PREVIOUS: &str = "VDPA_PREVIOUS_VDPAD";
/// Changes there and back.
const ROUNDS: u32 = 5;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let Some(previous) = std::env::var_os(PREVIOUS).map(PathBuf::from) else { return };
    if words.iter().any(|word| word == "--list") {
        println!("heavy::there_and_back: test");
        return;
    }
    there_and_back(&previous, &programs::program("vdpad"));
}

fn daemon(vdpad: &Vdpad) -> DaemonInfo {
    eventually("the daemon answers", || vdpad.client().daemon().ok())
}

fn program(vdpad: &Vdpad) -> PathBuf {
    std::fs::read_link(format!("/proc/{}/exe", daemon(vdpad).pid)).unwrap()
}

/// Upgrades to `binary`, or learns why that is not possible.
fn change(vdpad: &Vdpad, binary: &Path) -> Result<(), String> {
    let generation = daemon(vdpad).holder.unwrap().generation;
    let request = UpgradeRequest { binary: Some(binary.into()), dry_run: false };
    // The program of the previous release does not wait for the end of the daemon before it.
    let answer = eventually("the daemon before has ended", || match vdpad.client().upgrade(&request) {
        Err(ClientError::Refused(error)) if error.errno == Errno::BUSY => None,
        answer => Some(answer),
    });
    match answer {
        Ok(()) => {}
        Err(ClientError::Refused(error)) => {
            assert_eq!(error.errno, Errno::CANCELED, "{error}");
            return Err(error.to_string());
        }
        Err(error) => panic!("{error}"),
    }
    eventually("the next daemon serves", || {
        vdpad.client().daemon().ok()?.holder.filter(|now| now.generation > generation)
    });
    Ok(())
}

fn there_and_back(previous: &Path, present: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(dir.path()).unwrap();
    let mut command = Command::new(previous);
    command.env_remove("NOTIFY_SOCKET").env_remove("VDPAD_LOG").arg("--dir").arg(dir.join("dev"));
    command.arg("--socket").arg(dir.join("control.sock"));
    command.args(["--holder", "--front", "fuse", "--crash-limit", "60000"]);
    let vdpad = Vdpad::start_command(&dir, Duration::from_secs(110), command);
    // The disk of the previous release's sim-blk ends with its daemon, which refuses to be replaced then. It has no net.
    let kinds: Vec<_> = KINDS.into_iter().filter(|kind| !matches!(kind.mgmtdev, "sim-blk" | "net")).collect();
    let mut all: Vec<Box<dyn Load>> =
        kinds.iter().map(|kind| (kind.start)(&vdpad.add_any(kind.name, kind.mgmtdev))).collect();
    let mut total = Faults::default();
    let mut refused = 0;
    for round in 0..ROUNDS {
        for (binary, back) in [(present, false), (previous, true)] {
            all.iter_mut().for_each(|load| load.begin());
            let changed = change(&vdpad, binary);
            let lossy: u64 = all
                .iter_mut()
                .zip(&kinds)
                .map(|(load, kind)| {
                    let mut faults = load.end();
                    let lost = if kind.lossy { std::mem::take(&mut faults.lost) } else { 0 };
                    total += faults;
                    lost
                })
                .sum();
            assert!(lossy <= 1, "{lossy} packets were lost");
            match changed {
                Ok(()) => assert_eq!(program(&vdpad), binary),
                // A later format: the daemon goes on, and says why.
                Err(why) => {
                    assert!(back, "the upgrade: {why}\n{}", vdpad.log());
                    assert!(!why.is_empty() && program(&vdpad) == present, "{why}");
                    println!("round {round}: no downgrade: {why}");
                    refused += 1;
                }
            }
            assert_eq!(vdpad.client().devices().unwrap().len(), kinds.len());
        }
    }
    for load in &mut all {
        total += load.burst();
    }
    assert_eq!(total, Faults { requests: total.requests, ..Faults::default() });
    println!("{ROUNDS} times there and back, {refused} downgrades refused: {total:?}");
}
