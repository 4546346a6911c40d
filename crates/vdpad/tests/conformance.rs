//! The conformance suite on the devices of a real daemon: every difference from the kernel is in an expectation file.
//!
//! This program is the tests, and also the second process of a case (`--child`). Needs /dev/fuse and the right
//! to mount, and fails without.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod support;
#[path = "support/tap.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod tap;

use std::path::Path;
use std::process::{Command, exit};
use std::time::Duration;

use support::daemon::Daemon;
use vdpa_conformance::expect::Expectations;
use vdpa_conformance::report::{Summary, line};
use vdpa_conformance::runner::{self, Config, Verdict};
use vdpa_conformance::{Probe, Resources, Target, Vstats, cases, child};
use vdpa_core::features::BackendFeatures;
use vdpa_sys::uapi::live::{self, Numbers};

/// Longest time for one case. If a request hangs in the kernel, the daemon's guard ends it later.
const CASE_LIMIT: Duration = Duration::from_secs(25);

/// A device, and the files of `crates/vdpa-conformance/expect` that say how it differs.
struct Subject {
    name: &'static str,
    mgmtdev: &'static str,
    attrs: &'static [(&'static str, &'static str)],
    expect: &'static [&'static str],
}

/// A subject whose daemon, and the suite, use [`MOVED`].
const MOVED_SUBJECT: &str = "sim_blk_moved_numbers";
/// Numbers for the live-update requests other than those posted.
const MOVED: &str = "new_owner=0xaf2f,remap=9,new_owner_bit=20,remap_bit=21,dirty=0xa0,dirty_bit=22";

const SIM_BLK: &[&str] = &["fuse", "fuse-sim-blk", "fuse-sim-blk-verified"];

const SUBJECTS: [Subject; 19] = [
    Subject { name: MOVED_SUBJECT, mgmtdev: "sim-blk", attrs: &[], expect: SIM_BLK },
    Subject { name: "sim_net", mgmtdev: "sim-net", attrs: &[], expect: &["fuse", "fuse-sim-net"] },
    Subject {
        name: "net",
        mgmtdev: "net",
        attrs: &[("tap", "tap0")],
        expect: &["fuse", "fuse-net", "fuse-net-one-pair"],
    },
    Subject {
        name: "net_pairs",
        mgmtdev: "net",
        attrs: &[("tap", "tap0"), ("max_vqp", "4"), ("packed", "on"), ("in_order", "on")],
        expect: &["fuse", "fuse-net", "fuse-net-pairs"],
    },
    Subject { name: "sim_blk", mgmtdev: "sim-blk", attrs: &[], expect: SIM_BLK },
    Subject {
        name: "sim_blk_pinned",
        mgmtdev: "sim-blk",
        attrs: &[("use_va", "off")],
        expect: &["fuse", "fuse-sim-blk-pinned"],
    },
    Subject {
        name: "sim_blk_dma_map",
        mgmtdev: "sim-blk",
        attrs: &[("batch_mapping", "off")],
        expect: &["fuse", "fuse-sim-blk-dma-map"],
    },
    Subject {
        name: "sim_blk_small_table",
        mgmtdev: "sim-blk",
        attrs: &[("max_iotlb_entries", "64")],
        expect: &["fuse", "fuse-sim-blk", "fuse-sim-blk-verified", "fuse-iotlb-64"],
    },
    Subject {
        name: "blk_large_table",
        mgmtdev: "blk",
        attrs: &[("pin", "off"), ("max_iotlb_entries", "5000")],
        expect: &["fuse", "fuse-blk", "fuse-blk-unlimited", "fuse-iotlb-5000"],
    },
    Subject {
        name: "sim_blk_tables",
        mgmtdev: "sim-blk",
        attrs: &[("mem_table", "on"), ("vhost_log", "on")],
        expect: &["fuse", "fuse-sim-blk", "fuse-sim-blk-verified", "fuse-tables"],
    },
    Subject {
        name: "sim_blk_dma_map_tables",
        mgmtdev: "sim-blk",
        attrs: &[("batch_mapping", "off"), ("mem_table", "on"), ("vhost_log", "on")],
        expect: &["fuse", "fuse-sim-blk-dma-map", "fuse-tables"],
    },
    Subject {
        name: "sim_blk_other_memory",
        mgmtdev: "sim-blk",
        attrs: &[("verify_remap", "off")],
        expect: &["fuse", "fuse-sim-blk"],
    },
    Subject {
        name: "blk_tables",
        mgmtdev: "blk",
        attrs: &[("pin", "on"), ("memlock", "unlimited"), ("mem_table", "on"), ("vhost_log", "on")],
        expect: &["fuse", "fuse-blk", "fuse-blk-unlimited", "fuse-tables"],
    },
    Subject {
        name: "blk",
        mgmtdev: "blk",
        attrs: &[("pin", "off")],
        expect: &["fuse", "fuse-blk", "fuse-blk-unlimited"],
    },
    Subject {
        name: "blk_pinned",
        mgmtdev: "blk",
        attrs: &[("pin", "on"), ("memlock", "rlimit")],
        expect: &["fuse", "fuse-blk"],
    },
    Subject {
        name: "blk_pinned_unlimited",
        mgmtdev: "blk",
        attrs: &[("pin", "on"), ("memlock", "unlimited")],
        expect: &["fuse", "fuse-blk", "fuse-blk-unlimited"],
    },
    Subject {
        name: "blk_handover",
        mgmtdev: "blk",
        attrs: &[("pin", "on"), ("memlock", "unlimited"), ("handover", "open")],
        expect: &["fuse", "fuse-blk", "fuse-blk-unlimited", "fuse-blk-handover"],
    },
    Subject {
        name: "blk_read_only",
        mgmtdev: "blk",
        attrs: &[("pin", "off"), ("readonly", "on")],
        expect: &["fuse", "fuse-blk", "fuse-blk-unlimited"],
    },
    Subject { name: "broker", mgmtdev: "vhost-vdpa", attrs: &[], expect: &["fuse", "broker", "broker-blk"] },
];

fn expectations(files: &[&str]) -> Expectations {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vdpa-conformance/expect");
    let ids: Vec<_> = cases::all().iter().map(|case| case.id).collect();
    files.iter().fold(Expectations::default(), |expected, name| {
        let text = std::fs::read_to_string(directory.join(format!("{name}.txt"))).unwrap();
        expected.and(Expectations::parse(&text, &ids).unwrap())
    })
}

/// Runs every case on the device. A difference or a skipped case without a reason is an error.
fn conforms(subject: &Subject) {
    let moved = subject.name == MOVED_SUBJECT;
    assert_eq!(live::configured(), if moved { MOVED.parse().unwrap() } else { Numbers::POSTED });
    let several = subject.attrs.iter().any(|(name, _)| *name == "max_vqp");
    if subject.mgmtdev == "net" && tap::namespace(several).is_none() {
        return;
    }
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", 1 << 20);
    // What is behind a device that is another one's.
    let behind = (subject.mgmtdev == "vhost-vdpa").then(Daemon::start);
    let device = match (&behind, subject.mgmtdev) {
        (Some(behind), _) => {
            let path = behind.add_blk("behind", &disk, &[("pin", "off")]);
            daemon.add(subject.name, "vhost-vdpa", &[("path", path.to_str().unwrap())])
        }
        (None, "blk") => daemon.add_blk(subject.name, &disk, subject.attrs),
        (None, mgmtdev) => daemon.add(subject.name, mgmtdev, subject.attrs),
    };
    let probe = Probe::of(device.as_path()).unwrap();
    // With other numbers on one side only, the device would seem to offer neither feature.
    assert!(probe.backend.has(BackendFeatures::NEW_OWNER) || subject.name.starts_with("sim_blk_dma_map"));
    let program = std::env::current_exe().unwrap();
    let socket = daemon.dir().join("control.sock");
    let vdpactl = support::programs::program("vdpactl");
    let words =
        [vdpactl.to_str().unwrap(), "--socket", socket.to_str().unwrap(), "-j", "dev", "vstats", "show"];
    let vstats = Vstats::new(words.into_iter().chain([subject.name]).map(str::to_owned));
    let config = Config {
        device: Target::File(&device),
        resources: Resources { child: Some(&program), vstats: Some(&vstats) },
        limit: CASE_LIMIT,
        on_hang: |case, limit| {
            eprintln!("case {case} did not return within {limit:?}");
            exit(4)
        },
    };
    let expected = expectations(subject.expect);
    let findings = runner::run(&config, &probe, &cases::all(), &expected, |_| ());
    let unexplained: Vec<_> = findings
        .iter()
        .filter(|finding| finding.verdict.is_error() || matches!(finding.verdict, Verdict::Skipped { .. }))
        .map(line)
        .collect();
    println!("{}: {}", subject.name, Summary::of(&findings));
    assert!(unexplained.is_empty(), "{}", unexplained.join("\n"));
    daemon.assert_alive();
    behind.iter().for_each(Daemon::assert_alive);
}

fn main() {
    live::configure_from_env().unwrap();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    if words == ["--child"] {
        child::serve().expect("the suite is there");
    } else {
        run_tests(&words);
    }
}

/// The part of libtest's command line that cargo and nextest use. One test per process: a fork copies everything.
fn run_tests(words: &[&str]) {
    let ignored = words.contains(&"--ignored");
    let filter = words.iter().find(|word| !word.starts_with('-') && **word != "terse");
    for subject in &SUBJECTS {
        let name = subject.name;
        if ignored || !filter.is_none_or(|filter| name.contains(filter)) {
            continue;
        }
        if words.contains(&"--list") {
            println!("{name}: test");
        } else if filter.is_some_and(|filter| *filter == name) {
            if name == MOVED_SUBJECT && std::env::var_os(live::ENV).is_none() {
                let mut again = Command::new(std::env::current_exe().unwrap());
                assert!(again.args([name, "--exact"]).env(live::ENV, MOVED).status().unwrap().success());
                continue;
            }
            conforms(subject);
            println!("test {name} ... ok");
        } else if filter.is_none() || !words.contains(&"--exact") {
            let status =
                Command::new(std::env::current_exe().unwrap()).arg(name).arg("--exact").status().unwrap();
            assert!(status.success(), "{name} failed");
        }
    }
}
