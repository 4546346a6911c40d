//! `vdpactl bench io`: figures that belong together, and the exit status.

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
