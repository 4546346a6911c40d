//! `just bench-net`: compares the network card of vdpad on a TAP interface, DPDK's testpmd, passt, and the floor under them, with the
//! same driver.
//!
//! In each round, every workload runs on every server for a short time. Each round begins with another server, so that other load
//! on the machine affects all of them alike. Each measurement has a server and a connection of its own. Servers are pinned to one
//! CPU; the driver, and the sockets that it talks to, to another one. All is in a network namespace that ends with the program.
#![expect(
    unsafe_code,
    reason = "the floor is a loop without checks; options of sockets; a network namespace"
)]

mod chart;
mod client;
#[path = "../bench-io/cpu.rs"]
mod cpu;
mod drive;
mod floor;
mod host;
mod packets;
mod plan;
mod report;
mod servers;
mod tcp;
#[path = "../bench-io/trusting.rs"]
mod trusting;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use clap::Parser;
use vdpa_bench::comparison::{self, Ratio};

use client::{Address, Result};
use cpu::{CpuPlacement, ServerProcess};
use drive::Sample;
use host::Host;
use plan::{Target, WORKLOADS, Workload};
use report::{Outcome, Row};
use servers::{Programs, Server};

/// Compares network cards: packets and bytes per second, latency, and CPU time for each.
#[derive(Debug, Parser)]
#[command(name = "bench-net")]
struct Options {
    /// Rounds; each server is measured once in each
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// One round of 50 ms for each measurement: whether everything works, no figures
    #[arg(long)]
    quick: bool,
    /// Only workloads whose name contains one of these
    #[arg(long, value_name = "TEXT,...", value_delimiter = ',')]
    filter: Vec<String>,
    /// Only these servers
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    servers: Vec<String>,
    /// CPU of the servers and CPU of the driver [default: the last and the first allowed]
    #[arg(long, value_name = "SERVER,DRIVER", value_delimiter = ',', num_args = 2)]
    cpus: Vec<usize>,
    /// The daemon to measure
    #[arg(long, value_name = "PATH", default_value = "target/release/vdpad")]
    vdpad: PathBuf,
    /// Additional attributes of its device
    #[arg(long, value_name = "NAME=VALUE")]
    attr: Vec<String>,
    /// DPDK's testpmd
    #[arg(long, value_name = "PATH", default_value = "dpdk-testpmd")]
    testpmd: PathBuf,
    /// passt, of a version that serves vhost-user
    #[arg(long, value_name = "PATH", default_value = "passt")]
    passt: PathBuf,
    /// Serve as the floor on this socket
    #[arg(long, hide = true)]
    serve_floor: Option<PathBuf>,
    /// Pairs of queues of the floor
    #[arg(long, hide = true, default_value_t = 1)]
    pairs: usize,
    /// Print JSON
    #[arg(short, long)]
    json: bool,
    /// Write JSON here
    #[arg(long, value_name = "FILE.json", overrides_with = "output")]
    output: Option<PathBuf>,
    /// Draw rates, and the server's CPU time for each packet, KiB or round trip
    #[arg(long, value_name = "FILE.svg", overrides_with = "chart")]
    chart: Option<PathBuf>,
    /// Exit with 1 when a goal is missed
    #[arg(long)]
    strict: bool,
}

fn main() -> ExitCode {
    let mut options = Options::parse();
    if options.quick {
        (options.rounds, options.seconds) = (1, 0.05);
    }
    let failed = |error| {
        eprintln!("bench-net: {error}");
        ExitCode::FAILURE
    };
    if let Some(socket) = &options.serve_floor {
        return floor::serve(socket, options.pairs).map_or_else(failed, |()| ExitCode::SUCCESS);
    }
    let outcome = match run(&options) {
        Ok(outcome) => outcome,
        Err(error) => return failed(error),
    };
    let file = options.output.as_deref();
    let mut good = comparison::present("bench-net", &outcome, &outcome.text(), options.json, file);
    if let Some(file) = &options.chart {
        good &= chart::draw(file, &outcome.medians).inspect_err(|e| eprintln!("bench-net: {e}")).is_ok();
    }
    let missed = outcome.ratios.iter().any(Ratio::is_missed);
    if good && !(options.strict && missed) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(options: &Options) -> Result<Outcome> {
    let placement = CpuPlacement::new(&options.cpus)?;
    let mut left_out = Vec::new();
    let (targets, servers) = targets(options, &mut left_out)?;
    let pair = |text: &String| text.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
    let programs = Programs {
        vdpad: options.vdpad.clone(),
        attrs: options.attr.iter().map(pair).collect::<Option<_>>().ok_or("--attr NAME=VALUE")?,
        testpmd: options.testpmd.clone(),
        passt: options.passt.clone(),
    };
    host::enter()?;
    cpu::pin(&[placement.client])?;
    let mut outcome = Outcome {
        rounds: options.rounds,
        seconds: options.seconds,
        servers,
        left_out,
        load: [load(), 0.0],
        medians: Vec::new(),
        ratios: Vec::new(),
        rows: Vec::new(),
    };
    let is_wanted = |workload: &&Workload| {
        options.filter.is_empty() || options.filter.iter().any(|text| workload.name.contains(&**text))
    };
    let workloads: Vec<&Workload> = WORKLOADS.iter().filter(is_wanted).collect();
    if workloads.is_empty() {
        return Err(format!("no workload matches {}", options.filter.join(",")).into());
    }
    let bar = comparison::progress(u64::from(options.rounds) * workloads.len() as u64);
    for round in 0..options.rounds {
        for workload in &workloads {
            bar.set_message(workload.name);
            let mut targets = targets.clone();
            let count = targets.len().max(1);
            targets.rotate_left(round as usize % count);
            for target in targets.into_iter().filter(|target| workload.suits(*target)) {
                let length = Duration::from_secs_f64(options.seconds);
                let (sample, server_ns) = measure(workload, target, &programs, placement, length)
                    .map_err(|error| format!("{} of {}: {error}", workload.name, target.name()))?;
                let row = Row::new(workload, target, &sample, server_ns);
                outcome.rows.push(Row { round, ..row });
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    outcome.load[1] = load();
    outcome.summarise();
    Ok(outcome)
}

/// The requested servers that are installed, and their versions.
fn targets(options: &Options, left_out: &mut Vec<String>) -> Result<(Vec<Target>, Vec<String>)> {
    let (mut targets, mut names) = (Vec::new(), Vec::new());
    for name in &options.servers {
        if !Target::ALL.iter().any(|target| target.name() == name) {
            return Err(
                format!("there is no server {name}: vdpad, testpmd, passt and floor are right").into()
            );
        }
    }
    for target in Target::ALL {
        let name = target.name();
        if !options.servers.is_empty() && !options.servers.iter().any(|wanted| wanted == name) {
            continue;
        }
        let version = match target {
            Target::Vdpad => Ok(format!("vdpad {}", env!("CARGO_PKG_VERSION"))),
            Target::Floor => Ok("floor".to_owned()),
            Target::Testpmd => version(&options.testpmd, &["--no-pci", "-v", "--help"], "RTE Version"),
            Target::Passt => version(&options.passt, &["--help"], "--vhost-user"),
        };
        match version {
            Ok(version) => {
                names.push(version);
                targets.push(target);
            }
            Err(error) => {
                let line = format!("{name}: {error}");
                eprintln!("bench-net: NOT MEASURED: {line}");
                left_out.push(line);
            }
        }
    }
    Ok((targets, names))
}

/// What a program says of itself: the first line with `word`.
fn version(program: &Path, args: &[&str], word: &str) -> Result<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{} is not installed: {error}", program.display()))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find(|line| line.contains(word));
    let line = line.ok_or_else(|| format!("{} cannot be used: {}", program.display(), text.trim()))?;
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    Ok(format!("{name}: {}", line.trim()))
}

/// Measures one server, on a thread of its own, so that a server that hangs times out.
fn measure(
    workload: &Workload,
    target: Target,
    programs: &Programs,
    placement: CpuPlacement,
    length: Duration,
) -> Result<(Sample, u64)> {
    let directory = tempfile::Builder::new().prefix("bench-net-").tempdir()?;
    // The processes that this thread starts inherit its CPUs.
    cpu::pin(&[placement.server])?;
    let server = Server::start(target, programs, directory.path(), workload.pairs);
    cpu::pin(&[placement.client])?;
    let server = server?;
    let _host = Host::start()?;
    let (send, receive) = sync_channel(1);
    let (address, process, job) = (server.address.clone(), ServerProcess(server.process), *workload);
    std::thread::Builder::new().name("driver".into()).spawn(move || {
        let _ = send.send(drive_one(&address, &job, target, process, placement.server, length));
    })?;
    let limit = length * 3 + Duration::from_secs(40);
    receive.recv_timeout(limit).map_err(|_| "no answer in time")?
}

/// Connects, warms up and measures.
fn drive_one(
    address: &Address,
    workload: &Workload,
    target: Target,
    process: ServerProcess,
    server_cpu: usize,
    length: Duration,
) -> Result<(Sample, u64)> {
    let (mut port, mut load) = drive::begin(address, workload, target)?;
    load.run(&mut port, length / 8)?;
    let softirqs = softirq_process(server_cpu);
    let ns = || -> Result<u64> {
        let apart = softirqs.map_or(Ok(0), ServerProcess::ns)?;
        Ok(process.ns()? + apart)
    };
    let before = ns()?;
    let sample = load.run(&mut port, length)?;
    let server_ns = ns()?.saturating_sub(before);
    if sample.count <= 0.0 {
        return Err("nothing has arrived".into());
    }
    Ok((sample, server_ns))
}

/// The thread of the kernel that takes over the softirqs of a CPU when there are many.
fn softirq_process(cpu: usize) -> Option<ServerProcess> {
    let name = format!("ksoftirqd/{cpu}");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut ids = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
    ids.find(|id| fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|comm| comm.trim_end() == name))
        .map(ServerProcess)
}

/// The load of the machine in the last minute.
fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0.0)
}
