//! The conformance suite finds faults: a daemon with a planted fault fails a case that it passes otherwise.
//!
//! The list below proves that each of these cases can fail. Needs /dev/fuse and the right to mount. This
//! program is also the second process of the suite (`--child`).
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio, exit};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vdpa_conformance::expect::Expectations;
use vdpa_conformance::runner::{self, Config, Finding, Verdict};
use vdpa_conformance::{Case, Probe, Resources, Target, cases, child};
use vdpa_core::faults::Fault;

/// The device on which a fault has an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    /// `sim-blk`: owner addresses, REMAP, a reset that drops the translation.
    Sim,
    /// `blk`: memory objects, pinned pages.
    Blk,
    /// `blk` with `handover open`.
    Two,
}

use On::{Blk, Sim, Two};

/// Each fault, the device on which it has an effect, and a case that fails because of it.
const TABLE: &[(Fault, On, &str)] = &[
    (Fault::SetOwnerTwice, Blk, "owner.set-twice"),
    (Fault::OwnerUnchecked, Blk, "owner.child-vring-and-iotlb"),
    (Fault::OwnerSurvivesClose, Blk, "owner.gone-is-still-owner"),
    (Fault::NewOwnerErrno, Blk, "live.new-owner-without-owner"),
    (Fault::NewOwnerByOwner, Blk, "live.new-owner-by-owner"),
    (Fault::NewOwnerIgnored, Blk, "live.new-owner"),
    (Fault::NewOwnerUnmaps, Blk, "live.keeps-running"),
    (Fault::NewOwnerResumes, Blk, "live.new-owner-keeps-state"),
    (Fault::ChargeNotMoved, Blk, "live.new-owner-memlock"),
    (Fault::ChargeUnlimited, Blk, "live.new-owner-memlock"),
    (Fault::ChargeKept, Blk, "iotlb.pin-limit"),
    (Fault::StaleReadable, Sim, "live.stale"),
    (Fault::RemapStaysStale, Sim, "live.stale"),
    (Fault::RemapWithPermission, Sim, "live.remap"),
    (Fault::RemapNoRollback, Sim, "live.remap-refused"),
    (Fault::RemapUnsupported, Blk, "live.remap-unsupported"),
    (Fault::UpdateReplaces, Blk, "iotlb.update-again"),
    (Fault::UpdateEmptyErrno, Blk, "iotlb.update-size-0"),
    (Fault::UpdateIgnoresPermission, Blk, "data.read-only-memory"),
    (Fault::TableLimit, Sim, "iotlb.limit"),
    (Fault::InvalidateWithin, Blk, "iotlb.invalidate-whole-entry"),
    (Fault::InvalidateUnheard, Blk, "data.invalidate-stops-access"),
    (Fault::BatchEndNeedsBegin, Blk, "batch.end-without-begin"),
    (Fault::ResetUnmaps, Blk, "data.reset-persist"),
    (Fault::ResetKeepsTranslation, Sim, "data.reset-clean-map"),
    (Fault::ResetDisowns, Blk, "status.reset"),
    (Fault::ResetKeepsSuspended, Blk, "state.reset-clears-suspended"),
    (Fault::StatusClears, Blk, "status.no-bit-removed"),
    (Fault::FeaturesAnyTime, Blk, "features.fixed-after-features-ok"),
    (Fault::BackendAnyBit, Blk, "backend.refused"),
    (Fault::SuspendRunsOn, Blk, "data.suspend"),
    (Fault::ResumeStaysStopped, Blk, "data.suspend"),
    (Fault::StartEarly, Blk, "data.reset-stops"),
    (Fault::EnableWhileSuspended, Blk, "data.suspend-enable"),
    (Fault::DisableRunsOn, Blk, "data.disabled-queue"),
    (Fault::VringNumAny, Blk, "vring.num"),
    (Fault::VringAddrAnyTime, Blk, "state.set-vring-addr"),
    (Fault::BaseBehind, Blk, "data.base-continues"),
    (Fault::GroupAsidAnyTime, Blk, "state.set-group-asid"),
    (Fault::AsidUnasked, Blk, "iotlb.asid"),
    (Fault::VersionUnchecked, Blk, "iotlb.first-word"),
    (Fault::IndexBeforeOwner, Blk, "owner.needed"),
    (Fault::UnknownRequestErrno, Blk, "order.unknown"),
    (Fault::UnbindRefused, Blk, "vring.fds"),
    (Fault::ConfigBeyondEnd, Blk, "config.range"),
    (Fault::DirtyOverlap, Blk, "dirty.start-ranges"),
    (Fault::DirtyDataUnmarked, Blk, "dirty.read"),
    (Fault::DirtyRingUnmarked, Blk, "dirty.read"),
    (Fault::DirtyKeepIgnored, Blk, "dirty.read"),
    (Fault::DirtyUnmapForgets, Blk, "dirty.unmap"),
    (Fault::DirtyFlagsIgnored, Blk, "dirty.sizes-and-flags"),
    (Fault::ClaimAnyTime, Two, "handover.takes-over"),
    (Fault::PredecessorGoesOn, Two, "handover.takes-over"),
    (Fault::GivingUpCounts, Two, "handover.gives-up"),
    (Fault::CloseEndsBoth, Two, "handover.first-closes"),
];

/// A daemon with one device of each kind.
struct Daemon {
    process: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start(fault: Option<Fault>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [disk, other] = ["disk", "other"].map(|name| dir.path().join(name));
        for path in [&disk, &other] {
            std::fs::File::create(path).unwrap().set_len(8 << 20).unwrap();
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_vdpad"));
        command.env_remove("NOTIFY_SOCKET").env_remove("VDPA_PLANTED_FAULT");
        if let Some(fault) = fault {
            command.env("VDPA_PLANTED_FAULT", fault.name());
        }
        let mut process = command
            .arg("--socket")
            .arg(dir.path().join("control.sock"))
            .arg("--dir")
            .arg(dir.path().join("dev"))
            .args(["--log", "off", "--request-timeout", "10", "--dev", "name=sim mgmtdev=sim-blk", "--dev"])
            .arg(format!("name=blk mgmtdev=blk path={}", disk.display()))
            .arg("--dev")
            .arg(format!("name=two mgmtdev=blk handover=open path={}", other.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the daemon did not start");
        Self { process, dir }
    }

    fn device(&self, on: On) -> PathBuf {
        self.dir.path().join("dev").join(match on {
            Sim => "vhost-vdpa-0",
            Blk => "vhost-vdpa-1",
            Two => "vhost-vdpa-2",
        })
    }

    fn run(&self, on: On, selected: &[Case]) -> Vec<Finding> {
        let device = self.device(on);
        let probe = Probe::of(Target::File(&device)).unwrap();
        let program = std::env::current_exe().unwrap();
        let config = Config {
            device: Target::File(&device),
            resources: Resources { child: Some(&program), vstats: None },
            limit: Duration::from_secs(30),
            on_hang: |case, _| {
                eprintln!("case {case} did not return");
                exit(1)
            },
        };
        runner::run(&config, &probe, selected, &Expectations::default(), |_| ())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The watchdog removes the mount if the daemon does not end by itself.
        let _ = kill_process(Pid::from_child(&self.process), Signal::TERM);
        let _ = self.process.wait();
    }
}

fn find(id: &str) -> Case {
    cases::all().into_iter().find(|case| case.id == id).unwrap_or_else(|| panic!("there is no case {id}"))
}

fn every_fault_is_in_the_table_once() {
    for fault in Fault::ALL.iter().filter(|fault| !Fault::DEADLY.contains(fault)) {
        let rows = TABLE.iter().filter(|row| row.0 == *fault).count();
        assert_eq!(rows, 1, "{}", fault.name());
    }
    assert!(TABLE.len() >= 20);
}

fn every_fault_fails_a_case_that_passes_without_it() {
    let sound = Daemon::start(None);
    for on in [Sim, Blk, Two] {
        let mut ids: Vec<_> = TABLE.iter().filter(|row| row.1 == on).map(|row| row.2).collect();
        ids.sort_unstable();
        ids.dedup();
        let selected: Vec<_> = ids.into_iter().map(find).collect();
        for finding in sound.run(on, &selected) {
            assert_eq!(finding.verdict, Verdict::Passed, "{on:?}, no fault: {}", finding.case.id);
        }
    }
    drop(sound);
    let mut unnoticed = Vec::new();
    for &(fault, on, id) in TABLE {
        let findings = Daemon::start(Some(fault)).run(on, &[find(id)]);
        let verdict = findings.first().map(|finding| &finding.verdict);
        if let Some(Verdict::Failed { what }) = verdict {
            println!("{:<26} {on:?}  {id:<32} {what}", fault.name());
        } else {
            println!("{:<26} {on:?}  {id:<32} NOT NOTICED: {verdict:?}", fault.name());
            unnoticed.push((fault, id));
        }
    }
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:?}");
}

fn a_fault_nobody_knows_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vdpad"));
    command.env("VDPA_PLANTED_FAULT", "no-such-fault").arg("--dir").arg(Path::join(dir.path(), "dev"));
    assert_eq!(command.output().unwrap().status.code(), Some(2));
}

const TESTS: [(&str, fn()); 3] = [
    ("a_fault_nobody_knows_is_refused", a_fault_nobody_knows_is_refused),
    ("every_fault_is_in_the_table_once", every_fault_is_in_the_table_once),
    (
        "heavy::every_fault_fails_a_case_that_passes_without_it",
        every_fault_fails_a_case_that_passes_without_it,
    ),
];

/// The part of libtest's command line that cargo and nextest use.
fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.iter().any(|word| word == "--child") {
        return child::serve().unwrap();
    }
    let listing = words.iter().any(|word| word == "--list");
    let ignored = words.iter().any(|word| word == "--ignored");
    let filter = words.iter().find(|word| !word.starts_with('-') && *word != "terse");
    for (name, test) in TESTS {
        if ignored || filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        if listing {
            println!("{name}: test");
        } else {
            test();
            println!("test {name} ... ok");
        }
    }
}
