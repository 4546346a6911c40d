//! A tenant on a stage: what updates it and checks that nothing is lost.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use vdpa_client::update::{Report, Strategy, Way};
use vdpa_core::features::BackendFeatures;
use vdpa_core::host::PAGE_SIZE;
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::exec::set_close_on_exec;

use super::chart::Mark;
use super::engine::LoadError;
use super::ledger::Ledger;
use super::peer::TenantProcess;
use super::stage::{self, Stage, StageError, errno, system};
use super::timeline::Timeline;
use super::verify::verify;
use super::wire::{Command, Event, Pages, TenantConfig, Totals};

/// How long an update or a quiesce may take. Reopening 1 TiB takes two minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// The tenant's program.
const TENANT: &str = "vdpa-tenant";

/// What the tenant does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests in flight.
    pub queue_depth: u16,
    /// Seed of all choices.
    pub seed: u64,
    /// Pages of guest memory.
    pub pages: Pages,
}

/// Everything that runs. The order of the fields is the order in which it ends.
#[derive(Debug)]
pub struct Play {
    tenant: TenantProcess,
    stage: Stage,
    ledger: Ledger,
    timeline: Timeline,
    offered: BackendFeatures,
    /// Updates that happened.
    pub marks: Vec<Mark>,
    /// Blocks compared with the backing file.
    pub blocks_verified: u64,
    /// What was not right.
    pub problems: Vec<String>,
    /// The tenant's counters, as of the last time it was quiet.
    pub totals: Totals,
}

/// An update that happened.
#[derive(Clone, Debug)]
pub struct Updated {
    /// The library's view.
    pub report: Report,
    /// Last completion before to first one after, in us.
    pub blackout_us: u64,
}

impl Play {
    /// Starts daemon and tenant; the tenant waits for [`go`](Self::go).
    ///
    /// # Errors
    /// [`StageError`]; nothing is left behind.
    pub fn set(options: &stage::Options, load: Load) -> Result<Self, StageError> {
        let stage = Stage::set(options)?;
        let beside = std::env::current_exe().map_err(system("find this program"))?.with_file_name(TENANT);
        let tenant = options.tenant.clone().unwrap_or(beside);
        let blocks = stage.disk_bytes / PAGE_SIZE;
        let (ledger, ledger_fd) = Ledger::create(blocks, PAGE_SIZE, load.seed).map_err(LoadError::from)?;
        let (timeline, timeline_fd) =
            Timeline::create(monotonic_ns()).map_err(errno("create the timeline"))?;
        let config = TenantConfig {
            device: stage.device.clone(),
            memory: stage.memory,
            pages: load.pages,
            queue_depth: load.queue_depth,
            block_size: 4096,
            read_percent: 50,
            deadline_ms: 10_000,
            seed: load.seed,
            ledger_fd: ledger_fd.as_raw_fd(),
            timeline_fd: timeline_fd.as_raw_fd(),
            progress_ms: 100,
            directory: stage.directory().to_owned(),
        };
        let mut tenant = start_tenant(&tenant, &config, [&ledger_fd, &timeline_fd])?;
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
            marks: Vec::new(),
            blocks_verified: 0,
            problems: Vec::new(),
            totals: Totals::default(),
        })
    }

    /// Guest memory, in bytes.
    #[must_use]
    pub const fn memory(&self) -> u64 {
        self.stage.memory
    }

    /// Completions per millisecond, and when they begin (`CLOCK_MONOTONIC` in ns).
    #[must_use]
    pub const fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Pages of 4096 bytes that the device has pinned.
    ///
    /// # Errors
    /// [`StageError::Client`].
    pub fn pinned(&self) -> Result<u64, StageError> {
        self.stage.pinned_pages()
    }

    /// Those asked for, or all that the device can do. What it cannot do is said.
    pub fn strategies(&mut self, asked: &[Strategy]) -> Vec<Strategy> {
        let all = if asked.is_empty() { &Strategy::ALL[..] } else { asked };
        let (possible, not): (Vec<Strategy>, Vec<Strategy>) =
            all.iter().partition(|s| s.check(self.offered).is_ok());
        for strategy in not {
            let reason = strategy.check(self.offered).err().map_or_else(String::new, |e| e.to_string());
            if asked.is_empty() {
                eprintln!("vdpactl: left out: {reason}");
            } else {
                self.problems.push(reason);
            }
        }
        possible
    }

    /// Lets the tenant issue requests.
    ///
    /// # Errors
    /// [`StageError::Peer`].
    pub fn go(&mut self) -> Result<(), StageError> {
        Ok(self.tenant.tell(Command::Go)?)
    }

    /// Has the tenant replaced. `None` when it went on as it was, which is among the problems then.
    ///
    /// # Errors
    /// [`StageError`] when there is no tenant any more.
    pub fn update(&mut self, way: Way, strategy: Strategy) -> Result<Option<Updated>, StageError> {
        self.tenant.tell(Command::Update { strategy, way })?;
        match self.tenant.answer(PATIENCE)? {
            Event::Update { report, blackout_us, at_ns, .. } => {
                let at_ns = at_ns.saturating_sub(self.timeline.origin_ns());
                let from_ns = at_ns.saturating_sub(blackout_us.saturating_mul(1000));
                self.marks.push(Mark { strategy, from_ns, to_ns: at_ns });
                Ok(Some(Updated { report, blackout_us }))
            }
            Event::UpdateFailed { error, .. } => {
                self.problems.push(format!("{way}, {strategy}: {error}"));
                Ok(None)
            }
            other => Err(unexpected("update", &other)),
        }
    }

    /// Listens to progress for a while.
    ///
    /// # Errors
    /// [`StageError`] when the tenant has failed.
    pub fn let_run(&mut self, ms: u64) -> Result<(), StageError> {
        let end = Instant::now() + Duration::from_millis(ms);
        while Instant::now() < end {
            if let Event::Failed { error, .. } = self.tenant.event(PATIENCE)? {
                return Err(unexpected("progress", &error));
            }
        }
        Ok(())
    }

    /// Has the tenant come to rest and compares the disk with what was written; returns how many blocks are wrong.
    ///
    /// # Errors
    /// [`StageError`].
    pub fn quiesce(&mut self) -> Result<u64, StageError> {
        self.tenant.tell(Command::Quiesce)?;
        match self.tenant.answer(PATIENCE)? {
            Event::Quiesced(totals) => self.totals = totals,
            other => return Err(unexpected("quiesced", &other)),
        }
        self.verify()
    }

    /// Ends the tenant and compares the disk a last time.
    ///
    /// # Errors
    /// [`StageError`].
    pub fn finish(&mut self) -> Result<(), StageError> {
        self.tenant.tell(Command::Stop)?;
        loop {
            match self.tenant.answer(PATIENCE)? {
                Event::Quiesced(_) => {}
                Event::Finished(totals) => break self.totals = totals,
                other => return Err(unexpected("finished", &other)),
            }
        }
        self.verify()?;
        if let Some(corruption) = &self.totals.first_corruption {
            self.problems.push(corruption.clone());
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<u64, StageError> {
        let verdict = verify(&self.stage.disk, &self.ledger)?;
        self.blocks_verified += verdict.blocks;
        if let Some(first) = &verdict.first {
            self.problems.push(format!("{} blocks of the backing file are wrong: {first}", verdict.wrong));
        }
        Ok(verdict.wrong)
    }
}

/// Starts the tenant with two descriptors that it inherits.
fn start_tenant(
    program: &Path,
    config: &TenantConfig,
    shared: [&OwnedFd; 2],
) -> Result<TenantProcess, StageError> {
    let inherit = |close| shared.iter().try_for_each(|fd| set_close_on_exec(fd, close));
    inherit(false).map_err(errno("pass shared memory to the tenant"))?;
    let tenant = TenantProcess::start(program, config);
    inherit(true).map_err(errno("keep shared memory to this process"))?;
    Ok(tenant?)
}

fn unexpected(expected: &'static str, got: &impl std::fmt::Debug) -> StageError {
    StageError::Unexpected { expected, got: format!("{got:?}") }
}
