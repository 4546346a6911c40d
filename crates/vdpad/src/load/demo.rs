//! `vdpactl demo`: what an update costs, and that nothing is lost.

use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use thiserror::Error;
use vdpa_client::update::Strategy;
use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_core::host::PAGE_SIZE;
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::exec::set_close_on_exec;
use vdpa_sys::rlimit;

use super::chart::{self, Mark};
use super::engine::LoadError;
use super::ledger::Ledger;
use super::peer::{PeerError, PrivateDaemon, TenantProcess};
use super::summary::{Notes, Summary};
use super::timeline::Timeline;
use super::verify::{Verdict, verify};
use super::wire::{Command, Event, TenantConfig, Totals, chain};
use crate::ctl::api::{AddRequest, AttrError, Attrs};
use crate::ctl::client::{Client, ClientError};

const DEVICE: &str = "demo0";
/// How long an update or a quiesce may take. Reopening 1 TiB takes two minutes.
const PATIENCE: Duration = Duration::from_secs(300);
const GIB: u64 = 1 << 30;

/// Shows what an update of a running client costs with each strategy, and that nothing is lost.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Guest memory of the tenant, for example 512M or 8G [default: a quarter of free memory, at most 8G]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory: Option<u64>,
    /// Updates with each strategy
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub updates: u32,
    /// Strategies, in this order [default: all that the device can do]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub strategy: Vec<Strategy>,
    /// Requests in flight
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queue_depth: u16,
    /// Size of the disk
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = size)]
    pub disk: u64,
    /// Milliseconds of load before and after each update
    #[arg(long, value_name = "MS", default_value_t = 150)]
    pub interval: u64,
    /// Seed of the load
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Draw completions over time into this file
    #[arg(long, value_name = "FILE.svg")]
    pub chart: Option<PathBuf>,
    /// The daemon to start [default: vdpad beside this program]
    #[arg(long, value_name = "PATH")]
    pub vdpad: Option<PathBuf>,
    /// Directory for the disk file and the sockets, removed at the end [default: the system's for temporary files]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G', 'T']) {
        Some(digits) => (digits, 10 * (1 + "KMGT".find(|c| text.ends_with(c)).unwrap_or(0))),
        None => (text, 0),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    bytes
        .filter(|&n| n > 0 && n.is_multiple_of(PAGE_SIZE))
        .ok_or_else(|| "a multiple of 4096 bytes is right, for example 64M or 8G".to_owned())
}

/// Why a demo could not be given.
#[derive(Debug, Error)]
pub enum DemoError {
    /// Something about files or processes of this machine.
    #[error("cannot {action}")]
    System {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The daemon or the tenant.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The daemon's answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A path that cannot be an attribute.
    #[error(transparent)]
    Attr(#[from] AttrError),
    /// Ledger, timeline or disk.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The tenant answered something else than was asked.
    #[error("the tenant answered {got} when {expected} was due")]
    Unexpected {
        /// What was due.
        expected: &'static str,
        /// What came.
        got: String,
    },
}

fn system<E: Into<io::Error>>(action: &'static str) -> impl Fn(E) -> DemoError {
    move |source| DemoError::System { action, source: source.into() }
}

fn errno(action: &'static str) -> impl Fn(Errno) -> DemoError {
    move |source| DemoError::System { action, source: io::Error::from_raw_os_error(source.raw()) }
}

/// Gives the demo and prints what it found out, as JSON if `json`. Exit status 1 if anything was lost or failed.
#[must_use]
pub fn main(options: &Options, json: bool) -> ExitCode {
    let summary = match Demo::set_up(options).and_then(|demo| demo.run(options)) {
        Ok(summary) => summary,
        Err(e) => {
            eprintln!("vdpactl: demo: {}", chain(&e));
            return ExitCode::FAILURE;
        }
    };
    let text =
        if json { serde_json::to_string(&summary).unwrap_or_default() + "\n" } else { summary.table() };
    let written = io::stdout().write_all(text.as_bytes());
    if summary.ok && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Everything that runs. The order of the fields is the order in which it ends.
struct Demo {
    tenant: TenantProcess,
    client: Client,
    _daemon: PrivateDaemon,
    ledger: Ledger,
    timeline: Timeline,
    disk: PathBuf,
    memory: u64,
    offered: BackendFeatures,
    bar: ProgressBar,
    marks: Vec<Mark>,
    blocks_verified: u64,
    problems: Vec<String>,
    totals: Totals,
    _directory: tempfile::TempDir,
}

impl Demo {
    fn set_up(options: &Options) -> Result<Self, DemoError> {
        let memory = match options.memory {
            Some(memory) => memory,
            None => default_memory()?,
        };
        let parent = options.directory.clone().unwrap_or_else(std::env::temp_dir);
        let directory = tempfile::Builder::new()
            .prefix("vdpa-demo-")
            .tempdir_in(parent)
            .map_err(system("create a directory for the demo"))?;
        let disk = directory.path().join("disk.img");
        let file = std::fs::File::create_new(&disk).map_err(system("create the disk file"))?;
        file.set_len(options.disk).map_err(system("size the disk file"))?;

        let own = std::env::current_exe().map_err(system("find this program"))?;
        let vdpad = options.vdpad.clone().unwrap_or_else(|| own.with_file_name("vdpad"));
        let daemon = PrivateDaemon::start(&vdpad, directory.path())?;
        let client = Client::new(daemon.socket()).map_err(system("talk to the daemon"))?;
        client.add(&device(&disk, memory)?)?;
        let path = client.device(DEVICE)?.path;

        let blocks = options.disk / PAGE_SIZE;
        let (ledger, ledger_fd) = Ledger::create(blocks, PAGE_SIZE, options.seed).map_err(LoadError::from)?;
        let (timeline, timeline_fd) =
            Timeline::create(monotonic_ns()).map_err(errno("create the timeline"))?;
        let config = TenantConfig {
            device: path,
            memory,
            queue_depth: options.queue_depth,
            block_size: 4096,
            read_percent: 50,
            deadline_ms: 10_000,
            seed: options.seed,
            ledger_fd: ledger_fd.as_raw_fd(),
            timeline_fd: timeline_fd.as_raw_fd(),
            progress_ms: 100,
        };
        let mut tenant = start_tenant(&own, &config, [&ledger_fd, &timeline_fd])?;
        let offered = match tenant.answer(PATIENCE)? {
            Event::Started { backend_features, .. } => BackendFeatures(backend_features),
            other => return Err(unexpected("started", &other)),
        };
        Ok(Self {
            tenant,
            client,
            _daemon: daemon,
            ledger,
            timeline,
            disk,
            memory,
            offered,
            bar: ProgressBar::hidden(),
            marks: Vec::new(),
            blocks_verified: 0,
            problems: Vec::new(),
            totals: Totals::default(),
            _directory: directory,
        })
    }

    fn run(mut self, options: &Options) -> Result<Summary, DemoError> {
        let strategies = self.strategies(&options.strategy);
        self.bar = bar(strategies.len() as u64 * u64::from(options.updates));
        let mut notes = Vec::new();
        self.tenant.tell(Command::Go)?;
        for strategy in strategies {
            notes.push(self.strategy(strategy, options)?);
        }
        self.tenant.tell(Command::Stop)?;
        loop {
            match self.tenant.answer(PATIENCE)? {
                Event::Quiesced(_) => {}
                Event::Finished(totals) => break self.totals = totals,
                other => return Err(unexpected("finished", &other)),
            }
        }
        self.verify()?;
        self.bar.finish_and_clear();
        if let Some(file) = &options.chart {
            let counts = self.timeline.counts(monotonic_ns());
            if let Err(e) = chart::draw(file, &counts, &self.marks) {
                self.problems.push(format!("cannot draw {}: {e}", file.display()));
            }
        }
        if let Some(corruption) = &self.totals.first_corruption {
            self.problems.push(corruption.clone());
        }
        let whole = notes.iter().all(|n| n.updates.len() as u64 == u64::from(options.updates));
        Ok(Summary {
            memory_bytes: self.memory,
            page_size: PAGE_SIZE,
            strategies: notes.iter().map(Into::into).collect(),
            blocks_verified: self.blocks_verified,
            ok: self.totals.clean() && self.problems.is_empty() && whole && !notes.is_empty(),
            problems: self.problems,
        })
    }

    /// Those asked for, or all that the device can do. What it cannot do is said.
    fn strategies(&mut self, asked: &[Strategy]) -> Vec<Strategy> {
        let all = if asked.is_empty() { &Strategy::ALL[..] } else { asked };
        let (possible, not): (Vec<Strategy>, Vec<Strategy>) =
            all.iter().partition(|s| s.check(self.offered).is_ok());
        for strategy in not {
            let reason = strategy.check(self.offered).err().map_or_else(String::new, |e| e.to_string());
            if asked.is_empty() {
                eprintln!("vdpactl: demo: left out: {reason}");
            } else {
                self.problems.push(reason);
            }
        }
        possible
    }

    fn strategy(&mut self, strategy: Strategy, options: &Options) -> Result<Notes, DemoError> {
        self.bar.set_message(strategy.name());
        let mut notes = Notes {
            strategy,
            updates: Vec::new(),
            pinned_pages: (self.pinned()?, 0),
            totals: (self.totals.clone(), Totals::default()),
            wrong_blocks: 0,
        };
        for _ in 0..options.updates {
            self.let_run(options.interval)?;
            self.tenant.tell(Command::Update { strategy })?;
            match self.tenant.answer(PATIENCE)? {
                Event::Update { report, blackout_us, at_ns, .. } => {
                    notes.updates.push((blackout_us, report));
                    let at_ns = at_ns.saturating_sub(self.timeline.origin_ns());
                    self.marks.push(Mark { strategy, at_ns });
                }
                Event::UpdateFailed { error, .. } => self.problems.push(error),
                other => return Err(unexpected("update", &other)),
            }
            self.let_run(options.interval)?;
            self.tenant.tell(Command::Quiesce)?;
            match self.tenant.answer(PATIENCE)? {
                Event::Quiesced(totals) => self.totals = totals,
                other => return Err(unexpected("quiesced", &other)),
            }
            notes.wrong_blocks += self.verify()?.wrong;
            self.tenant.tell(Command::Go)?;
            self.bar.inc(1);
        }
        notes.pinned_pages.1 = self.pinned()?;
        notes.totals.1 = self.totals.clone();
        Ok(notes)
    }

    fn pinned(&self) -> Result<u64, DemoError> {
        Ok(self.client.device(DEVICE)?.state.pinned_pages)
    }

    /// Listens to progress for a while.
    fn let_run(&mut self, ms: u64) -> Result<(), DemoError> {
        let end = Instant::now() + Duration::from_millis(ms);
        while Instant::now() < end {
            if let Event::Failed { error, .. } = self.tenant.event(PATIENCE)? {
                return Err(unexpected("progress", &error));
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<Verdict, DemoError> {
        let verdict = verify(&self.disk, &self.ledger)?;
        self.blocks_verified += verdict.blocks;
        if let Some(first) = &verdict.first {
            self.problems.push(format!("{} blocks of the backing file are wrong: {first}", verdict.wrong));
        }
        Ok(verdict)
    }
}

/// What to create. Where the tenant's limit on locked memory cannot be raised, the device sets one; where the daemon
/// may not pin at all, pages are not pinned.
fn device(disk: &Path, memory: u64) -> Result<AddRequest, DemoError> {
    let mut attrs = Attrs::default();
    let path = disk
        .to_str()
        .ok_or_else(|| system("use a directory whose name is not UTF-8")(io::ErrorKind::InvalidInput))?;
    attrs.insert("path", path)?;
    // Inherited by the tenant, which is charged for its guest memory and nothing else.
    if rlimit::raise_memlock(Some(memory)).is_err() {
        if rlimit::memlock_exempt() {
            attrs.insert("memlock", "unlimited")?;
        } else {
            eprintln!("vdpactl: demo: RLIMIT_MEMLOCK cannot be raised: memory is not pinned (pin=off)");
            attrs.insert("pin", "off")?;
        }
    }
    Ok(AddRequest { name: DEVICE.to_owned(), mgmtdev: "blk".to_owned(), attrs })
}

/// Starts the tenant with two descriptors that it inherits.
fn start_tenant(
    own: &Path,
    config: &TenantConfig,
    shared: [&OwnedFd; 2],
) -> Result<TenantProcess, DemoError> {
    let inherit = |close| shared.iter().try_for_each(|fd| set_close_on_exec(fd, close));
    inherit(false).map_err(errno("pass shared memory to the tenant"))?;
    let tenant = TenantProcess::start(own, config);
    inherit(true).map_err(errno("keep shared memory to this process"))?;
    Ok(tenant?)
}

fn bar(updates: u64) -> ProgressBar {
    let bar = ProgressBar::new(updates);
    if let Ok(style) = ProgressStyle::with_template("{msg:8} [{wide_bar}] {pos}/{len} updates {elapsed}") {
        bar.set_style(style);
    }
    bar
}

fn unexpected(expected: &'static str, got: &impl std::fmt::Debug) -> DemoError {
    DemoError::Unexpected { expected, got: format!("{got:?}") }
}

/// A quarter of the memory that is free, at most 8 GiB.
fn default_memory() -> Result<u64, DemoError> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(system("read /proc/meminfo"))?;
    Ok(quarter_of_free(&text).unwrap_or(GIB / 2))
}

fn quarter_of_free(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some((kib.checked_mul(1024)? / 4).min(8 * GIB) & !(PAGE_SIZE - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("8192"), Ok(8192));
        assert_eq!(size("1T"), Ok(1 << 40));
        for wrong in ["", "0", "G", "1.5G", "100", "99999999999T", "-1M"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_quarter_of_what_is_free() {
        assert_eq!(quarter_of_free("MemTotal: 1 kB\nMemAvailable:    4001 kB\n"), Some(1_024_000));
        assert_eq!(quarter_of_free("MemAvailable: 999999999999 kB"), Some(8 * GIB));
        assert_eq!(quarter_of_free("MemFree: 5 kB"), None);
    }
}
