//! `just bench-io`: compares the block device of vdpad, qemu-storage-daemon, and the floors under both, with the same client.
//!
//! In each round, every workload runs on every server for a short time. Each round begins with another server, so that other load
//! on the machine affects all of them alike. Servers are pinned to one CPU and the client to another one, or both to the same one for
//! workloads whose name contains "same". Each measurement uses a new connection.
#![expect(unsafe_code, reason = "virtio-driver takes pointers; the floor is a loop without checks")]

mod chart;
mod client;
mod cpu;
mod fio;
mod floor;
mod plan;
mod report;
mod servers;
#[expect(dead_code, reason = "each floor uses its own part")]
mod trusting;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use clap::Parser;
use vdpa_bench::comparison::{self, Ratio};
use vdpa_core::host::PAGE_SIZE;

use client::{Client, Result, Sample};
use cpu::{CpuPlacement, ServerProcess};
use plan::{Backend, Kind, Target, WORKLOADS, Workload};
use report::{Outcome, Row};
use servers::{All, Floors, Qemu, Vdpad};

/// Compares block devices: IOPS, latency and CPU time per request.
#[derive(Debug, Parser)]
#[command(name = "bench-io")]
struct Options {
    /// Rounds; each server is measured once in each
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Only workloads whose name contains one of these
    #[arg(long, value_name = "TEXT,...", value_delimiter = ',')]
    filter: Vec<String>,
    /// Only these servers
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    servers: Vec<String>,
    /// Size of the file in MiB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    size: u64,
    /// Directory of the file
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// CPU of the servers and CPU of the client [default: the last and the first allowed]
    #[arg(long, value_name = "SERVER,CLIENT", value_delimiter = ',', num_args = 2)]
    cpus: Vec<usize>,
    /// The daemon to measure
    #[arg(long, value_name = "PATH", default_value = "target/release/vdpad")]
    vdpad: PathBuf,
    /// Additional attributes of its devices
    #[arg(long, value_name = "NAME=VALUE")]
    attr: Vec<String>,
    /// QEMU's storage daemon
    #[arg(long, value_name = "PATH", default_value = "qemu-storage-daemon")]
    qemu: PathBuf,
    /// fio
    #[arg(long, value_name = "PATH", default_value = "fio")]
    fio: PathBuf,
    /// Write checksummed blocks and verify every block read; the figures are meaningless then
    #[arg(long)]
    verify: bool,
    /// Use the null device for everything: verification must fail
    #[arg(long, hide = true)]
    wrong_device: bool,
    /// Serve as the floor on this socket
    #[arg(long, hide = true)]
    serve_floor: Option<PathBuf>,
    /// File of the floor; without one it answers requests without carrying them out
    #[arg(long, hide = true, requires = "serve_floor")]
    file: Option<PathBuf>,
    /// Print JSON
    #[arg(short, long)]
    json: bool,
    /// Write JSON here
    #[arg(long, value_name = "FILE.json", overrides_with = "output")]
    output: Option<PathBuf>,
    /// Draw IOPS and server CPU per request
    #[arg(long, value_name = "FILE.svg", overrides_with = "chart")]
    chart: Option<PathBuf>,
    /// Exit with 1 when a goal is missed
    #[arg(long)]
    strict: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(socket) = &options.serve_floor {
        return serve_floor(socket, options.file.as_deref());
    }
    let outcome = match run(&options) {
        Ok(outcome) => outcome,
        Err(error) => {
            eprintln!("bench-io: {error}");
            return ExitCode::FAILURE;
        }
    };
    let file = options.output.as_deref();
    let mut good = comparison::present("bench-io", &outcome, &outcome.text(), options.json, file);
    if let Some(file) = &options.chart {
        good &= chart::draw(file, &outcome.medians).inspect_err(|e| eprintln!("bench-io: {e}")).is_ok();
    }
    let missed = outcome.ratios.iter().any(Ratio::is_missed);
    if good && !(options.strict && missed) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(options: &Options) -> Result<Outcome> {
    let placement = CpuPlacement::new(&options.cpus)?;
    let parent = options.directory.clone().unwrap_or_else(std::env::temp_dir);
    let directory = tempfile::Builder::new().prefix("bench-io-").tempdir_in(parent)?;
    let file = directory.path().join("disk");
    let bytes = options.size << 20;
    create_file(&file, bytes)?;
    // The processes that this thread starts inherit its CPUs.
    cpu::pin(&[placement.server])?;
    let mut left_out = Vec::new();
    let (servers, names) = start(options, directory.path(), &file, &mut left_out)?;
    cpu::pin(&[placement.client])?;
    let mut outcome = Outcome {
        rounds: options.rounds,
        seconds: options.seconds,
        file_bytes: bytes,
        servers: names,
        left_out,
        verified: 0,
        medians: Vec::new(),
        ratios: Vec::new(),
        rows: Vec::new(),
    };
    let workloads: Vec<&Workload> = WORKLOADS
        .iter()
        .filter(|workload| {
            options.filter.is_empty() || options.filter.iter().any(|text| workload.name.contains(&**text))
        })
        .collect();
    let requested =
        |target: &Target| options.servers.is_empty() || options.servers.iter().any(|n| n == target.name());
    let has_fio = !options.verify && is_installed(&options.fio) && requested(&Target::Fio);
    if !has_fio && !options.verify {
        leave_out(
            &mut outcome.left_out,
            format!("fio: {} is not installed, or was not requested", options.fio.display()),
        );
    }
    let run = Run { options, servers: &servers, placement, file: &file, bytes, has_fio };
    let bar = comparison::progress(u64::from(options.rounds) * workloads.len() as u64);
    for round in 0..options.rounds {
        for workload in &workloads {
            bar.set_message(workload.name);
            run.measure_all(workload, round, &mut outcome)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    outcome.summarise();
    Ok(outcome)
}

fn serve_floor(socket: &Path, file: Option<&Path>) -> ExitCode {
    let disk = file.map(|file| File::options().read(true).write(true).open(file)).transpose();
    match disk.map_err(Into::into).and_then(|disk| floor::serve(socket, disk.as_ref())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-io: floor: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the requested servers that are installed.
fn start(
    options: &Options,
    directory: &Path,
    file: &Path,
    left_out: &mut Vec<String>,
) -> Result<(All, Vec<String>)> {
    let requested =
        |target: Target| options.servers.is_empty() || options.servers.iter().any(|n| n == target.name());
    let mut servers: All = Vec::new();
    let mut names = Vec::new();
    if requested(Target::Vdpad) {
        let pair = |text: &String| text.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
        let attrs = options.attr.iter().map(pair).collect::<Option<Vec<_>>>().ok_or("--attr NAME=VALUE")?;
        servers.push((Target::Vdpad, Box::new(Vdpad::start(&options.vdpad, directory, file, &attrs)?)));
        names.push(format!("vdpad {}", env!("CARGO_PKG_VERSION")));
    }
    if requested(Target::Qemu) {
        if is_installed(&options.qemu) {
            names.push(Qemu::version(&options.qemu)?);
            servers.push((Target::Qemu, Box::new(Qemu::start(&options.qemu, directory, file)?)));
        } else {
            leave_out(left_out, format!("qemu: {} is not installed", options.qemu.display()));
        }
    }
    if requested(Target::Floor) {
        servers.push((Target::Floor, Box::new(Floors::start(directory, file)?)));
    }
    Ok((servers, names))
}

struct Run<'a> {
    options: &'a Options,
    servers: &'a All,
    placement: CpuPlacement,
    file: &'a Path,
    bytes: u64,
    has_fio: bool,
}

impl Run<'_> {
    /// Measures a workload on every server. Each round begins with another server.
    fn measure_all(&self, workload: &Workload, round: u32, outcome: &mut Outcome) -> Result<()> {
        let mut target: Vec<Target> = self.servers.iter().map(|(target, _)| *target).collect();
        target.extend(self.has_fio.then_some(Target::Fio));
        let count = target.len().max(1);
        target.rotate_left(round as usize % count);
        for target in target.into_iter().filter(|target| workload.suits(*target)) {
            let failed = |error| format!("{} of {}: {error}", workload.name, target.name());
            let row = match target {
                Target::Fio => self.fio(workload).map_err(failed)?,
                _ => self.serve(target, workload, &mut outcome.verified).map_err(failed)?,
            };
            outcome.rows.push(Row { round, ..row });
        }
        Ok(())
    }

    fn fio(&self, workload: &Workload) -> Result<Row> {
        if workload.kind == Kind::RandomWrite {
            dirty(self.file)?;
        }
        cpu::pin(&[self.placement.server])?;
        let row = fio::run(&self.options.fio, workload, self.file, self.bytes, self.length());
        cpu::pin(&[self.placement.client])?;
        row
    }

    fn length(&self) -> Duration {
        Duration::from_secs_f64(self.options.seconds)
    }

    /// Measures one server, on a thread of its own, so that a server that hangs times out.
    fn serve(&self, target: Target, workload: &Workload, verified: &mut u64) -> Result<Row> {
        let (_, server) = self.servers.iter().find(|(w, _)| *w == target).ok_or("no such server")?;
        let backend = if self.options.wrong_device { Backend::Null } else { workload.backend };
        let (address, process) = (server.address(backend), server.process(backend));
        let length = self.length();
        if matches!(workload.kind, Kind::RandomWrite | Kind::Mixed) && !self.options.verify {
            dirty(self.file)?;
        }
        let verify = self.options.verify && workload.backend == Backend::File;
        // Verification also writes and reads the whole disk, so a part of the file is used.
        let bytes = if verify { self.bytes.min(16 << 20) } else { self.bytes };
        let cpu = if workload.same_cpu { self.placement.server } else { self.placement.client };
        let (send, receive) = sync_channel(1);
        let job = *workload;
        std::thread::Builder::new().name("client".into()).spawn(move || {
            let _ = send.send(measure(&address, &job, process, cpu, bytes, verify, length));
        })?;
        let (sample, server_ns) =
            receive.recv_timeout(length * 3 + Duration::from_secs(60)).map_err(|_| "no answer in time")??;
        *verified += sample.verified;
        Ok(Row::new(workload, target, &sample, server_ns))
    }
}

/// Connects, warms up and measures.
fn measure(
    address: &client::Address,
    workload: &Workload,
    process: ServerProcess,
    cpu: usize,
    bytes: u64,
    verify: bool,
    length: Duration,
) -> Result<(Sample, u64)> {
    cpu::pin(&[cpu])?;
    let mut client = Client::connect(address, workload, bytes, verify)?;
    if verify {
        client.fill()?;
    }
    client.run(length / 8)?;
    let before = process.ns()?;
    let mut sample = client.run(length)?;
    let server_ns = process.ns()?.saturating_sub(before);
    if verify {
        sample.verified += client.read_all()?;
    }
    Ok((sample, server_ns))
}

/// Creates the file and writes all of it, so that it has no holes and is in the page cache. Writes single pages: a file system can keep
/// the data of one larger write in a large folio, and then a write of 4 KiB costs ten times as much.
fn create_file(path: &Path, bytes: u64) -> Result<()> {
    let file = File::create_new(path)?;
    let mut rng = vdpa_bench::block::SplitMix64(1);
    let page: Vec<u8> = (0..PAGE_SIZE / 8).flat_map(|_| rng.next().to_le_bytes()).collect();
    for at in (0..bytes).step_by(page.len()) {
        file.write_all_at(&page, at)?;
    }
    Ok(file.sync_all()?)
}

/// Rewrites the file, so that all of its pages are dirty. The first write to a clean page costs a file system more than the rest of
/// a request, and the number of clean pages is random.
fn dirty(path: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut page = vec![0; usize::try_from(PAGE_SIZE)?];
    for at in (0..file.metadata()?.len()).step_by(page.len()) {
        file.read_exact_at(&mut page, at)?;
        file.write_all_at(&page, at)?;
    }
    Ok(())
}

fn is_installed(program: &Path) -> bool {
    let tried = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

fn leave_out(left_out: &mut Vec<String>, what: String) {
    eprintln!("bench-io: NOT MEASURED: {what}");
    left_out.push(what);
}
