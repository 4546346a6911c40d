//! `just bench-io`: our block device, qemu-storage-daemon's, and the floors under both, in turn, by the same client.
//!
//! Each workload runs on each server for a moment, round after round, each round beginning with another one, so that
//! whatever else the machine does meets all of them. Servers are pinned to one CPU, the client to another one, or both
//! to one where the workload's name says "same". A connection is made anew for each turn.
#![expect(unsafe_code, reason = "virtio-driver takes pointers; the floor is a loop without any safety")]

mod chart;
mod client;
mod cpu;
mod fio;
mod floor;
mod plan;
mod report;
mod servers;

use std::fs::{self, File};
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use vdpa_core::host::PAGE_SIZE;

use client::{Client, Result, Sample};
use cpu::Runner;
use plan::{Backend, Kind, WORKLOADS, Who, Workload};
use report::{Outcome, Row};
use servers::{All, Floors, Qemu, Vdpad};

/// Compares block devices: IOPS, latency and CPU time per request.
#[derive(Debug, Parser)]
#[command(name = "bench-io")]
struct Options {
    /// Rounds; each server has its turn once in each
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of each turn
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Only workloads whose name contains one of these
    #[arg(long, value_name = "TEXT,...", value_delimiter = ',')]
    filter: Vec<String>,
    /// Only these servers
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    servers: Vec<String>,
    /// MiB of the file
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    size: u64,
    /// Where the file is made
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// CPU of the servers and CPU of the client [default: the last and the first allowed]
    #[arg(long, value_name = "SERVER,CLIENT", value_delimiter = ',', num_args = 2)]
    cpus: Vec<usize>,
    /// The daemon to measure
    #[arg(long, value_name = "PATH", default_value = "target/release/vdpad")]
    vdpad: PathBuf,
    /// Further attributes of its devices
    #[arg(long, value_name = "NAME=VALUE")]
    attr: Vec<String>,
    /// QEMU's storage daemon
    #[arg(long, value_name = "PATH", default_value = "qemu-storage-daemon")]
    qemu: PathBuf,
    /// fio
    #[arg(long, value_name = "PATH", default_value = "fio")]
    fio: PathBuf,
    /// Write checksummed blocks, check every block read, and measure nothing of worth
    #[arg(long)]
    verify: bool,
    /// Use the null device for everything: verification must fail
    #[arg(long, hide = true)]
    wrong_device: bool,
    /// Be the floor, on this socket
    #[arg(long, hide = true)]
    serve_floor: Option<PathBuf>,
    /// The file of the floor; without one it reads and writes nothing
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
    let json = serde_json::to_string_pretty(&outcome).unwrap_or_default() + "\n";
    let text = if options.json { &json } else { &outcome.text() };
    let mut good = std::io::stdout().write_all(text.as_bytes()).is_ok();
    if let Some(file) = &options.output {
        good &=
            fs::write(file, &json).inspect_err(|e| eprintln!("bench-io: {}: {e}", file.display())).is_ok();
    }
    if let Some(file) = &options.chart {
        good &= chart::draw(file, &outcome.medians).inspect_err(|e| eprintln!("bench-io: {e}")).is_ok();
    }
    let missed = outcome.ratios.iter().any(report::Ratio::is_missed);
    if good && !(options.strict && missed) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The CPUs of the two sides.
struct Places {
    server: usize,
    client: usize,
}

fn places(options: &Options) -> Result<Places> {
    let allowed = cpu::allowed()?;
    match (&options.cpus[..], &allowed[..]) {
        ([server, client], _) => Ok(Places { server: *server, client: *client }),
        (_, [first, .., last]) => Ok(Places { server: *last, client: *first }),
        (_, [only]) => Ok(Places { server: *only, client: *only }),
        (_, []) => Err("no CPU is allowed".into()),
    }
}

fn run(options: &Options) -> Result<Outcome> {
    let places = places(options)?;
    let parent = options.directory.clone().unwrap_or_else(std::env::temp_dir);
    let directory = tempfile::Builder::new().prefix("bench-io-").tempdir_in(parent)?;
    let file = directory.path().join("disk");
    let bytes = options.size << 20;
    make(&file, bytes)?;
    // What this thread starts runs where it does.
    cpu::pin(&[places.server])?;
    let mut left_out = Vec::new();
    let (servers, names) = start(options, directory.path(), &file, &mut left_out)?;
    cpu::pin(&[places.client])?;
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
    let asked = |who: &Who| options.servers.is_empty() || options.servers.iter().any(|n| n == who.name());
    let has_fio = !options.verify && is_there(&options.fio) && asked(&Who::Fio);
    if !has_fio && !options.verify {
        leave_out(
            &mut outcome.left_out,
            format!("fio: {} is not there, or was not asked for", options.fio.display()),
        );
    }
    let run = Run { options, servers: &servers, places, file: &file, bytes, has_fio };
    let bar = progress(u64::from(options.rounds) * workloads.len() as u64);
    for round in 0..options.rounds {
        for workload in &workloads {
            bar.set_message(workload.name);
            run.turn(workload, round, &mut outcome)?;
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

/// Starts the servers that are here and asked for.
fn start(
    options: &Options,
    directory: &Path,
    file: &Path,
    left_out: &mut Vec<String>,
) -> Result<(All, Vec<String>)> {
    let asked = |who: Who| options.servers.is_empty() || options.servers.iter().any(|n| n == who.name());
    let mut servers: All = Vec::new();
    let mut names = Vec::new();
    if asked(Who::Vdpad) {
        let pair = |text: &String| text.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
        let attrs = options.attr.iter().map(pair).collect::<Option<Vec<_>>>().ok_or("--attr NAME=VALUE")?;
        servers.push((Who::Vdpad, Box::new(Vdpad::start(&options.vdpad, directory, file, &attrs)?)));
        names.push(format!("vdpad {}", env!("CARGO_PKG_VERSION")));
    }
    if asked(Who::Qemu) {
        if is_there(&options.qemu) {
            names.push(Qemu::version(&options.qemu)?);
            servers.push((Who::Qemu, Box::new(Qemu::start(&options.qemu, directory, file)?)));
        } else {
            leave_out(left_out, format!("qemu: {} is not there", options.qemu.display()));
        }
    }
    if asked(Who::Floor) {
        servers.push((Who::Floor, Box::new(Floors::start(directory, file)?)));
    }
    Ok((servers, names))
}

struct Run<'a> {
    options: &'a Options,
    servers: &'a All,
    places: Places,
    file: &'a Path,
    bytes: u64,
    has_fio: bool,
}

impl Run<'_> {
    /// Every server, one after the other, beginning with another one in each round.
    fn turn(&self, workload: &Workload, round: u32, outcome: &mut Outcome) -> Result<()> {
        let mut who: Vec<Who> = self.servers.iter().map(|(who, _)| *who).collect();
        who.extend(self.has_fio.then_some(Who::Fio));
        let count = who.len().max(1);
        who.rotate_left(round as usize % count);
        for who in who.into_iter().filter(|who| workload.suits(*who)) {
            let failed = |error| format!("{} of {}: {error}", workload.name, who.name());
            let row = match who {
                Who::Fio => self.fio(workload).map_err(failed)?,
                _ => self.serve(who, workload, &mut outcome.verified).map_err(failed)?,
            };
            outcome.rows.push(Row { round, ..row });
        }
        Ok(())
    }

    fn fio(&self, workload: &Workload) -> Result<Row> {
        if workload.kind == Kind::RandomWrite {
            dirty(self.file)?;
        }
        cpu::pin(&[self.places.server])?;
        let row = fio::run(&self.options.fio, workload, self.file, self.bytes, self.length());
        cpu::pin(&[self.places.client])?;
        row
    }

    fn length(&self) -> Duration {
        Duration::from_secs_f64(self.options.seconds)
    }

    /// One server, from a thread of its own, which can be given up.
    fn serve(&self, who: Who, workload: &Workload, verified: &mut u64) -> Result<Row> {
        let (_, server) = self.servers.iter().find(|(w, _)| *w == who).ok_or("no such server")?;
        let backend = if self.options.wrong_device { Backend::Null } else { workload.backend };
        let (address, runner) = (server.address(backend), server.runner(backend));
        let length = self.length();
        if matches!(workload.kind, Kind::RandomWrite | Kind::Mixed) && !self.options.verify {
            dirty(self.file)?;
        }
        let verify = self.options.verify && workload.backend == Backend::File;
        // What is checked is also written and read as a whole.
        let bytes = if verify { self.bytes.min(16 << 20) } else { self.bytes };
        let cpu = if workload.same_cpu { self.places.server } else { self.places.client };
        let (send, receive) = sync_channel(1);
        let job = *workload;
        std::thread::Builder::new().name("client".into()).spawn(move || {
            let _ = send.send(measure(&address, &job, runner, cpu, bytes, verify, length));
        })?;
        let (sample, server_ns) = receive
            .recv_timeout(length * 3 + Duration::from_secs(60))
            .map_err(|_| "no answer, given up")??;
        *verified += sample.verified;
        Ok(Row::new(workload, who, &sample, server_ns))
    }
}

/// Connects, warms up and measures.
fn measure(
    address: &client::Address,
    workload: &Workload,
    runner: Runner,
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
    let before = runner.ns()?;
    let mut sample = client.run(length)?;
    let server_ns = runner.ns()?.saturating_sub(before);
    if verify {
        sample.verified += client.read_all()?;
    }
    Ok((sample, server_ns))
}

/// The file, written as a whole, so that nothing of it is a hole and all of it is in memory. In pieces of a page: a file
/// system may keep what is written at once in one large folio, and then a write of 4 KiB costs it ten times as much.
fn make(path: &Path, bytes: u64) -> Result<()> {
    let file = File::create_new(path)?;
    let mut chance = vdpa_bench::block::Pattern(1);
    let page: Vec<u8> = (0..PAGE_SIZE / 8).flat_map(|_| chance.next().to_le_bytes()).collect();
    for at in (0..bytes).step_by(page.len()) {
        file.write_all_at(&page, at)?;
    }
    Ok(file.sync_all()?)
}

/// Writes the file anew: the first write to a clean page costs a file system more than all the rest of a request, and how
/// many pages are clean is a matter of chance.
fn dirty(path: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut page = vec![0; usize::try_from(PAGE_SIZE)?];
    for at in (0..file.metadata()?.len()).step_by(page.len()) {
        file.read_exact_at(&mut page, at)?;
        file.write_all_at(&page, at)?;
    }
    Ok(())
}

fn is_there(program: &Path) -> bool {
    let tried = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

fn leave_out(left_out: &mut Vec<String>, what: String) {
    eprintln!("bench-io: NOT MEASURED: {what}");
    left_out.push(what);
}

/// A bar on terminals, and nothing elsewhere.
fn progress(turns: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(turns);
    if let Ok(style) = ProgressStyle::with_template("{msg:24} [{wide_bar}] {pos}/{len} {elapsed} left {eta}")
    {
        bar.set_style(style);
    }
    bar
}
