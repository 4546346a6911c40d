//! The program of `just bench-net` with short runs: every workload works on vdpad and on the floor.
#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

#[path = "support/example.rs"]
mod example;
#[path = "../../vdpad/tests/support/programs.rs"]
mod programs;

use std::process::{Command, Output};

fn bench_net(args: &[&str]) -> Output {
    let mut bench = Command::new("timeout");
    bench
        .args(["--kill-after=5", "100"])
        .arg(example::example("bench-net"))
        .arg("--vdpad")
        .arg(programs::program("vdpad"));
    bench.arg("--quick").args(args).output().unwrap()
}

#[test]
fn every_workload_has_figures_ratios_and_a_chart() {
    let directory = tempfile::tempdir().unwrap();
    let (json, svg) = (directory.path().join("out.json"), directory.path().join("out.svg"));
    let (output_at, chart_at) = (json.to_str().unwrap(), svg.to_str().unwrap());
    let output = bench_net(&["--servers=vdpad,floor", "--output", output_at, "--chart", chart_at]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let outcome: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let rows = outcome["rows"].as_array().unwrap();
    let of = |server: &str| rows.iter().filter(|row| row["server"] == server).count();
    assert_eq!((of("vdpad"), of("floor")), (11, 11), "{outcome}");
    for row in rows {
        for name in ["rate", "server_ns", "client_ns"] {
            assert!(row[name].as_f64().unwrap() > 0.0, "{name}: {row}");
        }
        let is_round_trip = row["workload"] == "ping-pong";
        assert_eq!(row["p50_us"].as_f64().unwrap() > 0.0, is_round_trip, "{row}");
    }
    let ratios = outcome["ratios"].as_array().unwrap();
    let of_floor = ratios.iter().filter(|ratio| ratio["against"] == "floor" && ratio["goal"] == 1.25);
    assert_eq!(of_floor.filter(|ratio| ratio["met"].is_boolean()).count(), 6, "{outcome}");
    // What there are no figures for is said.
    assert!(text.contains("send-64: rate / better peer") && text.contains("not measured"), "{text}");
    assert!(std::fs::read_to_string(svg).unwrap().contains("</svg>"));
}

#[test]
fn what_is_not_there_is_named() {
    let output = bench_net(&["--servers=passt", "--passt=/nowhere/passt"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("NOT MEASURED: passt: /nowhere/passt is not installed"), "{text}");
    let output = bench_net(&["--servers=vdpa"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("there is no server vdpa: vdpad, testpmd, passt and floor are right"), "{text}");
    let output = bench_net(&["--filter=randread"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("no workload matches randread"), "{text}");
}
