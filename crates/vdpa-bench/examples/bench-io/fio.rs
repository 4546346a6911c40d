//! fio on the file itself: what the kernel provides to a program without a device and a client.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::client::Result;
use crate::plan::{Kind, Workload};
use crate::report::Row;

/// Runs one job on the CPUs of this thread.
pub(crate) fn run(
    program: &Path,
    workload: &Workload,
    file: &Path,
    bytes: u64,
    length: Duration,
) -> Result<Row> {
    let rw = match workload.kind {
        Kind::RandomRead => "randread",
        Kind::RandomWrite => "randwrite",
        Kind::SequentialRead => "read",
        Kind::Mixed => return Err("fio has no such workload here".into()),
    };
    let output = Command::new(program)
        .args(["--name=floor", "--ioengine=io_uring", "--fixedbufs=1", "--registerfiles=1", "--time_based=1"])
        .args([
            "--invalidate=0",
            "--direct=0",
            "--norandommap=1",
            "--lat_percentiles=1",
            "--output-format=json",
        ])
        .args(["--percentile_list=50:99:99.9", "--fallocate=none", "--end_fsync=0"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--rw={rw}"))
        .arg(format!("--bs={}", workload.block))
        .arg(format!("--iodepth={}", workload.depth))
        .arg(format!("--size={bytes}"))
        .arg(format!("--runtime={}ms", length.as_millis()))
        .output()?;
    if !output.status.success() {
        return Err(format!("fio failed: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let answer: Value = serde_json::from_slice(&output.stdout)?;
    let job = &answer["jobs"][0];
    let side = &job[if workload.kind == Kind::RandomWrite { "write" } else { "read" }];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let iops = number(&side["iops"]);
    let latency = |name: &str| number(&side["lat_ns"]["percentile"][name]) / 1e3;
    // fio reports CPU time in percent of its run time.
    let busy = (number(&job["usr_cpu"]) + number(&job["sys_cpu"])) / 100.0;
    let cpu = if iops > 0.0 { busy / iops * 1e9 } else { 0.0 };
    Ok(Row::fio(workload.name, iops, [latency("50.000000"), latency("99.000000"), latency("99.900000")], cpu))
}
