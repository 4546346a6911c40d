//! `vdpactl demo`: what an update costs, and that nothing is lost.

use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use vdpa_client::update::Strategy;
use vdpa_core::features::BackendFeatures;
use vdpa_core::host::PAGE_SIZE;
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::exec::set_close_on_exec;

use super::chart::{self, Mark};
use super::engine::LoadError;
use super::ledger::Ledger;
use super::peer::TenantProcess;
use super::stage::{self, Stage, StageError, errno, system};
use super::summary::{Notes, Summary};
use super::timeline::Timeline;
use super::verify::{Verdict, verify};
use super::wire::{Command, Event, TenantConfig, Totals, chain};

/// How long an update or a quiesce may take. Reopening 1 TiB takes two minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// Shows what an update of a running client costs with each strategy, and that nothing is lost.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Updates with each strategy
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub updates: u32,
    /// Strategies, in this order [default: all that the device can do]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub strategy: Vec<Strategy>,
    /// Requests in flight
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queue_depth: u16,
    /// Milliseconds of load before and after each update
    #[arg(long, value_name = "MS", default_value_t = 150)]
    pub interval: u64,
    /// Seed of the load
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Draw completions over time into this file
    #[arg(long, value_name = "FILE.svg")]
    pub chart: Option<PathBuf>,
    /// What it runs on
    #[command(flatten)]
    pub stage: stage::Options,
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
    stage: Stage,
    ledger: Ledger,
    timeline: Timeline,
    offered: BackendFeatures,
    bar: ProgressBar,
    marks: Vec<Mark>,
    blocks_verified: u64,
    problems: Vec<String>,
    totals: Totals,
}

impl Demo {
    fn set_up(options: &Options) -> Result<Self, StageError> {
        let stage = Stage::set(&options.stage)?;
        let own = std::env::current_exe().map_err(system("find this program"))?;
        let blocks = stage.disk_bytes / PAGE_SIZE;
        let (ledger, ledger_fd) = Ledger::create(blocks, PAGE_SIZE, options.seed).map_err(LoadError::from)?;
        let (timeline, timeline_fd) =
            Timeline::create(monotonic_ns()).map_err(errno("create the timeline"))?;
        let config = TenantConfig {
            device: stage.device.clone(),
            memory: stage.memory,
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
            stage,
            ledger,
            timeline,
            offered,
            bar: ProgressBar::hidden(),
            marks: Vec::new(),
            blocks_verified: 0,
            problems: Vec::new(),
            totals: Totals::default(),
        })
    }

    fn run(mut self, options: &Options) -> Result<Summary, StageError> {
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
            memory_bytes: self.stage.memory,
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

    fn strategy(&mut self, strategy: Strategy, options: &Options) -> Result<Notes, StageError> {
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
                    let from_ns = at_ns.saturating_sub(blackout_us.saturating_mul(1000));
                    self.marks.push(Mark { strategy, from_ns, to_ns: at_ns });
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

    fn pinned(&self) -> Result<u64, StageError> {
        self.stage.pinned_pages()
    }

    /// Listens to progress for a while.
    fn let_run(&mut self, ms: u64) -> Result<(), StageError> {
        let end = Instant::now() + Duration::from_millis(ms);
        while Instant::now() < end {
            if let Event::Failed { error, .. } = self.tenant.event(PATIENCE)? {
                return Err(unexpected("progress", &error));
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<Verdict, StageError> {
        let verdict = verify(&self.stage.disk, &self.ledger)?;
        self.blocks_verified += verdict.blocks;
        if let Some(first) = &verdict.first {
            self.problems.push(format!("{} blocks of the backing file are wrong: {first}", verdict.wrong));
        }
        Ok(verdict)
    }
}

/// Starts the tenant with two descriptors that it inherits.
fn start_tenant(
    own: &Path,
    config: &TenantConfig,
    shared: [&OwnedFd; 2],
) -> Result<TenantProcess, StageError> {
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

fn unexpected(expected: &'static str, got: &impl std::fmt::Debug) -> StageError {
    StageError::Unexpected { expected, got: format!("{got:?}") }
}
