//! `vdpactl demo` from end to end: daemon, FUSE, client, exec and verification.
//!
//! Needs /dev/fuse and the right to mount, and fails without.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test: every failure is a panic")]

use std::process::Command;

use serde_json::Value;

/// Runs the demo with a limit on its time; `timeout` ends the whole family if it hangs.
fn demo(arguments: &[&str]) -> (Option<i32>, Value, String) {
    let output = Command::new("timeout")
        .args(["--kill-after=5", "100", env!("CARGO_BIN_EXE_vdpactl"), "-j", "demo"])
        .args(["--disk", "8M", "--interval", "30"])
        .args(arguments)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code(), json, errors)
}

#[test]
fn nothing_is_lost_by_any_way_with_any_strategy_and_pins_stay() {
    let directory = tempfile::tempdir().unwrap();
    let chart = directory.path().join("chart.svg");
    // As much as the usual limit on locked memory allows to pin.
    let ways = ["exec", "fork", "hand-over"];
    let (code, json, errors) = demo(&[
        "--memory",
        "4M",
        "--updates",
        "2",
        "--way",
        &ways.join(","),
        "--chart",
        chart.to_str().unwrap(),
    ]);
    assert_eq!(code, Some(0), "{json:#}\n{errors}");
    assert_eq!(json["ok"], true);
    assert_eq!(json["memory_bytes"], 4 << 20);
    let strategies = json["strategies"].as_array().unwrap();
    let text = |s: &Value, key: &str| s[key].as_str().unwrap().to_owned();
    let cells: Vec<_> = strategies.iter().map(|s| (text(s, "way"), text(s, "name"))).collect();
    let all = |way: &str| ["live", "resume", "reset", "reopen"].map(|name| (way.to_owned(), name.to_owned()));
    assert_eq!(cells, ways.map(all).concat());
    for strategy in strategies {
        assert_eq!(strategy["updates"], 2, "{strategy}");
        for count in ["lost", "corrupt", "duplicate"] {
            assert_eq!(strategy[count], 0, "{strategy}");
        }
        assert!(strategy["requests"].as_u64().unwrap() > 100, "{strategy}");
        let blackout = &strategy["blackout_us"];
        assert!(
            blackout["min"].as_u64().unwrap() > 0 && blackout["max"].as_u64() >= blackout["median"].as_u64()
        );
        assert_eq!(strategy["pinned_pages_before"], strategy["pinned_pages_after"], "{strategy}");
        let pinned = if errors.contains("pin=off") { 0 } else { 1024 };
        assert_eq!(strategy["pinned_pages_after"], pinned, "{strategy}\n{errors}");
    }
    // After each of 24 updates and at the end.
    assert_eq!(json["blocks_verified"], 25 * 2048);
    assert!(std::fs::read_to_string(&chart).unwrap().contains("</svg>"));
}

#[test]
fn nothing_is_lost_with_packed_rings() {
    let ways = "exec,fork,hand-over";
    let (code, json, errors) = demo(&[
        "--memory",
        "4M",
        "--updates",
        "1",
        "--way",
        ways,
        "--packed",
        "--strategy",
        "live,resume,reset",
    ]);
    assert_eq!((code, &json["ok"]), (Some(0), &Value::Bool(true)), "{json:#}\n{errors}");
    for strategy in json["strategies"].as_array().unwrap() {
        for count in ["lost", "corrupt", "duplicate"] {
            assert_eq!(strategy[count], 0, "{strategy}");
        }
        assert!(strategy["requests"].as_u64().unwrap() > 100, "{strategy}");
    }
}

#[test]
fn a_demo_that_cannot_be_given_fails() {
    let (code, json, errors) = demo(&["--memory", "4M", "--vdpad", "/bin/false"]);
    assert_eq!((code, json), (Some(1), Value::Null), "{errors}");
    assert!(errors.contains("the daemon has ended"), "{errors}");
    let (code, _, errors) = demo(&["--memory", "8K"]);
    assert_eq!(code, Some(1));
    assert!(errors.contains("bytes of memory"), "{errors}");
}
