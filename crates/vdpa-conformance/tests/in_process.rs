//! Runs the suite against devices in this process: the core, without kernel module and daemon.
#![expect(clippy::unwrap_used, reason = "a suite that cannot be prepared fails")]

use std::path::Path;
use std::time::Duration;

use vdpa_conformance::expect::Expectations;
use vdpa_conformance::report::line;
use vdpa_conformance::runner::{self, Config, Verdict};
use vdpa_conformance::{LocalDevice, Probe, Resources, Target, cases};

fn check(device: &LocalDevice, expectations: &str) {
    let probe = Probe::of(device).unwrap();
    let cases = cases::all();
    let ids: Vec<_> = cases.iter().map(|case| case.id).collect();
    let expected = Expectations::parse(expectations, &ids).unwrap();
    let config = Config {
        device: Target::InProcess(device),
        resources: Resources { child: Some(Path::new(env!("CARGO_BIN_EXE_vdpa-conform"))), vstats: None },
        limit: Duration::from_secs(60),
        on_hang: |case, _| {
            eprintln!("{case} hangs");
            std::process::abort();
        },
    };
    let findings = runner::run(&config, &probe, &cases, &expected, |finding| println!("{}", line(finding)));
    let unexpected = |verdict: &Verdict| verdict.is_error() || matches!(verdict, Verdict::Skipped { .. });
    let wrong: Vec<_> = findings.iter().filter(|finding| unexpected(&finding.verdict)).map(line).collect();
    assert!(wrong.is_empty(), "not as expected:\n{}", wrong.join("\n"));
}

#[test]
fn owner_addresses_in_whole_tables() {
    check(&LocalDevice::new(), include_str!("../expect/in-process.txt"));
}

#[test]
fn pinned_pages() {
    check(&LocalDevice::pinned(), include_str!("../expect/in-process-pinned.txt"));
}

#[test]
fn owner_addresses_in_single_mappings() {
    check(&LocalDevice::single_mappings(), include_str!("../expect/in-process-dma-map.txt"));
}

#[test]
fn network() {
    check(&LocalDevice::net(), include_str!("../expect/in-process-net.txt"));
}
