//! The program of `just bench-io` with short runs: every workload is verified on every server that is installed.
#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

#[path = "support/example.rs"]
mod example;
#[path = "../../vdpad/tests/support/programs.rs"]
mod programs;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

fn program() -> PathBuf {
    example::example("bench-io")
}

fn bench_io(args: &[&str]) -> Output {
    let mut bench = Command::new("timeout");
    bench.args(["--kill-after=5", "100"]).arg(program()).arg("--vdpad").arg(programs::program("vdpad"));
    bench.args(["--size", "4", "--seconds", "0.02", "--rounds", "1"]).args(args).output().unwrap()
}

/// Command lines of the processes that have `directory` in their arguments.
fn processes_using(directory: &Path) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(directory.to_str().unwrap())).collect()
}

/// Waits until `reached` returns `true`; `false` if that takes longer than 20 s.
fn eventually(reached: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !reached() {
        if Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(10));
    }
    true
}

#[test]
fn a_run_that_is_killed_leaves_no_server() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Command::new(program())
        .arg("--vdpad")
        .arg(programs::program("vdpad"))
        .args(["--size", "4", "--rounds", "1000", "--directory"])
        .arg(directory.path())
        .args(["--servers=vdpad,qemu", "--filter=null-4k-qd32"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let directory = directory.path();
    // The daemon, and QEMU's where it is installed.
    let qemu = Command::new("qemu-storage-daemon").arg("--version").stdout(Stdio::null()).status().is_ok();
    let serves = |name: &str| processes_using(directory).iter().any(|line| line.contains(name));
    let serve = eventually(|| {
        mounts().contains(directory.to_str().unwrap()) && (!qemu || serves("qemu-storage-daemon --blockdev"))
    });
    let before = processes_using(directory);
    bench.kill().unwrap();
    bench.wait().unwrap();
    assert!(serve && before.iter().any(|line| line.contains("--socket")), "{before:?}");
    assert!(eventually(|| processes_using(directory).is_empty()), "left: {:?}", processes_using(directory));
    assert!(eventually(|| !mounts().contains(directory.to_str().unwrap())), "a mount is left");
}

#[test]
fn every_workload_is_verified_on_every_server() {
    let output = bench_io(&["--verify", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let outcome: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = outcome["rows"].as_array().unwrap();
    let of = |server: &str| rows.iter().filter(|row| row["server"] == server).count();
    assert_eq!((of("vdpad"), of("floor")), (15, 12), "{outcome}");
    let left_out = outcome["left_out"].as_array().unwrap();
    // Without QEMU on the machine, the run says so and has no figures for it.
    let missing = left_out.iter().any(|line| line.as_str().unwrap().starts_with("qemu"));
    assert_eq!(of("qemu"), if missing { 0 } else { 15 });
    assert!(rows.iter().all(|row| row["iops"].as_f64().unwrap() > 0.0), "{outcome}");
    // At least all blocks of the eleven workloads of 4 KiB, once.
    assert!(outcome["verified"].as_u64().unwrap() > 11 * 1024, "{outcome}");
}

#[test]
fn a_run_gives_figures_ratios_and_a_chart() {
    let directory = tempfile::tempdir().unwrap();
    let (json, svg) = (directory.path().join("out.json"), directory.path().join("out.svg"));
    let output = bench_io(&[
        "--servers=vdpad,floor",
        "--filter=randread-4k-qd32,null-4k-qd32",
        "--output",
        json.to_str().unwrap(),
        "--chart",
        svg.to_str().unwrap(),
    ]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("null-4k-qd32: server CPU per request / floor"), "{text}");
    assert!(text.contains("NOT MEASURED: fio"), "{text}");
    let outcome: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let row = &outcome["rows"][0];
    for name in ["iops", "p50_us", "p99_us", "p999_us", "server_ns", "client_ns"] {
        assert!(row[name].as_f64().unwrap() > 0.0, "{name}: {row}");
    }
    assert!(row["p50_us"].as_f64() <= row["p999_us"].as_f64());
    let ratios = outcome["ratios"].as_array().unwrap();
    let goal = ratios.iter().find(|ratio| ratio["goal"] == 1.3).unwrap();
    assert!(goal["ratio"].as_f64().unwrap() > 0.0 && goal["met"].is_boolean(), "{goal}");
    assert!(std::fs::read_to_string(svg).unwrap().contains("</svg>"));
}

#[test]
fn wrong_data_is_an_error() {
    // Reads of the null device leave the memory as it is, so no block has a valid stamp.
    let output = bench_io(&["--verify", "--servers=vdpad", "--filter=randread-4k-qd32", "--wrong-device"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("holds no stamp"), "{text}");
}

#[test]
fn a_run_with_verification_reports_verified_blocks_in_place_of_goals() {
    let output = bench_io(&["--verify", "--servers=vdpad", "--filter=randread-4k-qd32-2q"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let count = text.lines().find_map(|line| line.strip_suffix(" blocks read, all as they were written"));
    assert!(count.is_some_and(|count| count.parse::<u64>().unwrap() >= 1024), "{text}");
    assert!(!text.contains("goals"), "{text}");
}
