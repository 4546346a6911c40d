//! The suite against a device in this process: the core, without kernel and daemon.

use std::path::Path;
use std::time::Duration;

use vdpa_conformance::expect::Expectations;
use vdpa_conformance::report::line;
use vdpa_conformance::runner::{self, Config};
use vdpa_conformance::{LocalDevice, Probe, Target, cases};

#[test]
fn the_core_does_what_the_specification_says() {
    let device = LocalDevice::new();
    let probe = Probe::of(&device).unwrap();
    let cases = cases::all();
    let ids: Vec<_> = cases.iter().map(|case| case.id).collect();
    let expected = Expectations::parse(include_str!("../expect/in-process.txt"), &ids).unwrap();
    let config = Config {
        device: Target::InProcess(&device),
        child: Some(Path::new(env!("CARGO_BIN_EXE_vdpa-conform"))),
        limit: Duration::from_secs(60),
        on_hang: |case, _| {
            eprintln!("{case} hangs");
            std::process::abort();
        },
    };
    let findings = runner::run(&config, &probe, &cases, &expected, |finding| println!("{}", line(finding)));
    let unexpected =
        |verdict: &runner::Verdict| verdict.is_error() || matches!(verdict, runner::Verdict::Skipped { .. });
    let wrong: Vec<_> = findings.iter().filter(|finding| unexpected(&finding.verdict)).map(line).collect();
    assert!(wrong.is_empty(), "not as expected:\n{}", wrong.join("\n"));
}
