//! `vdpactl bench`: figures that belong together, and the exit status.
#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

use std::process::Command;

#[test]
fn a_run_on_a_private_daemon_is_verified_and_measured() {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_vdpactl"));
    bench.args([
        "bench",
        "io",
        "-j",
        "--seconds",
        "1",
        "--memory",
        "4M",
        "--disk",
        "1M",
        "--queue-depth",
        "8",
    ]);
    let output = bench.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let outcome: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |name: &str| outcome[name].as_f64().unwrap();
    assert!(outcome["ok"].as_bool().unwrap(), "{outcome}");
    assert!(
        number("requests") >= number("iops") && number("reads") > 0.0 && number("writes") > 0.0,
        "{outcome}"
    );
    let latency = |name: &str| outcome["latency_us"][name].as_f64().unwrap();
    assert!(latency("p50") > 0.0 && latency("p50") <= latency("p99"), "{outcome}");
    assert!(latency("p999") <= latency("max"), "{outcome}");
    // Requests in flight times one second, over the rate, is the mean latency; the median is near it.
    let mean = 8.0 / number("iops") * 1e6;
    assert!(latency("p50") < 4.0 * mean, "median {} us, mean {mean} us", latency("p50"));
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_vdpactl"));
    let output = bench.args(["bench", "io", "--device", "/nonexistent/vhost-vdpa-0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("/nonexistent/vhost-vdpa-0"), "{text}");
}

/// `vdpactl bench update` with memory that is so small that pinning it again costs next to nothing.
fn bench_update(more: &[&str]) -> (Option<i32>, String, String) {
    let mut bench = Command::new("timeout");
    bench.args(["--kill-after=5", "100", env!("CARGO_BIN_EXE_vdpactl"), "bench", "update"]);
    bench.args(["--sizes", "2M,4M", "--strategy", "live,reopen", "--disk", "1M", "--rounds", "5"]);
    bench.args(["--interval", "10"]);
    let output = bench.args(more).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn every_way_and_size_is_measured_and_a_missed_goal_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let chart = directory.path().join("chart.svg");
    let (code, text, errors) = bench_update(&["-j", "--chart", chart.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{text}\n{errors}");
    let outcome: serde_json::Value = serde_json::from_str(&text).unwrap();
    let cells = outcome["cells"].as_array().unwrap();
    let mut names = Vec::new();
    for cell in cells {
        let spread = |of: &str, rank: &str| cell[of][rank].as_u64().unwrap();
        assert_eq!(cell["updates"], 5, "{cell}");
        assert!(spread("total_ns", "min") > 0, "{cell}");
        assert!(spread("total_ns", "median") <= spread("total_ns", "p99"), "{cell}");
        // The tenant waits for a completion besides; its clock is read in us.
        assert!(spread("gap_ns", "max") + 1000 > spread("total_ns", "min"), "{cell}");
        assert!(cell["phases_ns"]["new_owner"].as_u64().unwrap() > 0, "{cell}");
        names.push(format!("{} {} {}", cell["memory_bytes"], cell["way"], cell["strategy"]));
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 2 * 3 * 2, "{names:?}");
    assert_eq!(outcome["ratios"].as_array().unwrap().len(), 6 + 6, "{outcome}");
    assert_eq!(outcome["ok"], true);
    // After each round and at the end, for two sizes.
    assert_eq!(outcome["blocks_verified"], 2 * 6 * 256);
    let goals = outcome["goals"].as_array().unwrap();
    let reopen = goals.iter().find(|g| g["name"].as_str().unwrap().starts_with("reopen / live by exec"));
    assert_eq!(reopen.unwrap()["met"], false, "no pages, no cost: {outcome}");
    assert!(std::fs::read_to_string(&chart).unwrap().contains("</svg>"));
}

#[test]
fn a_missed_goal_fails_where_that_is_asked_for() {
    let few = ["--way", "exec", "--strict"];
    let (code, text, errors) = bench_update(&few);
    assert_eq!(code, Some(1), "{text}\n{errors}");
    let line = text.lines().find(|line| line.starts_with("reopen / live by exec, 4M >= 500")).unwrap();
    assert!(line.ends_with("MISSED"), "{text}");
    let (code, _, errors) = bench_update(&["--rounds", "3"]);
    assert_eq!(code, Some(2), "too few to say anything: {errors}");
}
