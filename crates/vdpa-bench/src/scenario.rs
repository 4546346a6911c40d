//! [`Scenario`]: a client on a fixture, which is updated and whose data is verified.

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
use super::fixture::{self, Fixture, FixtureError, errno, system};
use super::journal::Journal;
use super::process::ClientProcess;
use super::timeline::Timeline;
use super::verify::verify;
use super::wire::{ClientConfig, Command, Event, Pages, Totals};

/// Time for the next event of the client. An update that reopens a device with 1 TiB takes two minutes.
const EVENT_TIMEOUT: Duration = Duration::from_secs(300);

/// File name of the client program.
const CLIENT_PROGRAM: &str = "vdpa-tenant";

/// Options of the load during updates.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadOptions {
    /// Requests in flight
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queue_depth: u16,
    /// Milliseconds of load before and after each update
    #[arg(long, value_name = "MS", default_value_t = 150)]
    pub interval: u64,
}

/// The load that the client generates.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests in flight.
    pub queue_depth: u16,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Pages of guest memory.
    pub pages: Pages,
}

/// A client, its fixture, and the results so far. Fields are dropped in this order.
#[derive(Debug)]
pub struct Scenario {
    client: ClientProcess,
    fixture: Fixture,
    journal: Journal,
    timeline: Timeline,
    offered: BackendFeatures,
    /// Updates that happened.
    pub marks: Vec<Mark>,
    /// Blocks compared with the backing file.
    pub blocks_verified: u64,
    /// Everything that went wrong.
    pub problems: Vec<String>,
    /// The client's counters when it was quiesced last.
    pub totals: Totals,
}

/// An update that happened.
#[derive(Clone, Debug)]
pub struct Updated {
    /// The report of the client library.
    pub report: Report,
    /// Time from the last completion before the update to the first one after it, in us.
    pub blackout_us: u64,
}

impl Scenario {
    /// Starts daemon and client. The client issues no requests before [`start_load`](Self::start_load).
    ///
    /// # Errors
    /// [`FixtureError`]; nothing is left behind.
    pub fn start(options: &fixture::Options, load: Load) -> Result<Self, FixtureError> {
        let fixture = Fixture::start(options)?;
        let beside =
            std::env::current_exe().map_err(system("find this program"))?.with_file_name(CLIENT_PROGRAM);
        let client = options.tenant.clone().unwrap_or(beside);
        let blocks = fixture.disk_bytes / PAGE_SIZE;
        let (journal, journal_fd) = Journal::create(blocks, PAGE_SIZE, load.seed).map_err(LoadError::from)?;
        let (timeline, timeline_fd) =
            Timeline::create(monotonic_ns()).map_err(errno("create the timeline"))?;
        let config = ClientConfig {
            device: fixture.device.clone(),
            memory: fixture.memory,
            pages: load.pages,
            queue_depth: load.queue_depth,
            block_size: 4096,
            read_percent: 50,
            deadline_ms: 10_000,
            seed: load.seed,
            journal_fd: journal_fd.as_raw_fd(),
            timeline_fd: timeline_fd.as_raw_fd(),
            progress_ms: 100,
            directory: fixture.directory().to_owned(),
        };
        let mut client = start_client(&client, &config, [&journal_fd, &timeline_fd])?;
        let offered = match client.response(EVENT_TIMEOUT)? {
            Event::Started { backend_features, .. } => BackendFeatures(backend_features),
            other => return Err(unexpected("started", &other)),
        };
        Ok(Self {
            client,
            fixture,
            journal,
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
        self.fixture.memory
    }

    /// Completions per millisecond.
    #[must_use]
    pub const fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Pages of 4096 bytes that the device has pinned.
    ///
    /// # Errors
    /// [`FixtureError::Client`].
    pub fn pinned(&self) -> Result<u64, FixtureError> {
        self.fixture.pinned_pages()
    }

    /// The strategies of `requested`, or all if that is empty, that the device supports. One that it does not support is a problem
    /// if it was requested, else a line on standard error.
    pub fn strategies(&mut self, requested: &[Strategy]) -> Vec<Strategy> {
        let all = if requested.is_empty() { &Strategy::ALL[..] } else { requested };
        let (supported, unsupported): (Vec<Strategy>, Vec<Strategy>) =
            all.iter().partition(|s| s.check(self.offered).is_ok());
        for strategy in unsupported {
            let reason = strategy.check(self.offered).err().map_or_else(String::new, |e| e.to_string());
            if requested.is_empty() {
                eprintln!("vdpactl: left out: {reason}");
            } else {
                self.problems.push(reason);
            }
        }
        supported
    }

    /// Makes the client issue requests.
    ///
    /// # Errors
    /// [`FixtureError::Process`].
    pub fn start_load(&mut self) -> Result<(), FixtureError> {
        Ok(self.client.send(Command::Go)?)
    }

    /// Updates the client. `None` when the update failed and the old program continues; the reason is added to the problems.
    ///
    /// # Errors
    /// [`FixtureError`] when no client is left.
    pub fn update(&mut self, way: Way, strategy: Strategy) -> Result<Option<Updated>, FixtureError> {
        self.client.send(Command::Update { strategy, way })?;
        match self.client.response(EVENT_TIMEOUT)? {
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

    /// Lets the load run for `ms` milliseconds, and receives the client's progress events meanwhile.
    ///
    /// # Errors
    /// [`FixtureError`] when the client has failed.
    pub fn run_for(&mut self, ms: u64) -> Result<(), FixtureError> {
        let end = Instant::now() + Duration::from_millis(ms);
        while Instant::now() < end {
            if let Event::Failed { error, .. } = self.client.event(EVENT_TIMEOUT)? {
                return Err(unexpected("progress", &error));
            }
        }
        Ok(())
    }

    /// Quiesces the client and verifies the disk. Returns the number of wrong blocks.
    ///
    /// # Errors
    /// [`FixtureError`].
    pub fn quiesce(&mut self) -> Result<u64, FixtureError> {
        self.client.send(Command::Quiesce)?;
        match self.client.response(EVENT_TIMEOUT)? {
            Event::Quiesced(totals) => self.totals = totals,
            other => return Err(unexpected("quiesced", &other)),
        }
        self.verify()
    }

    /// Stops the client and verifies the disk.
    ///
    /// # Errors
    /// [`FixtureError`].
    pub fn finish(&mut self) -> Result<(), FixtureError> {
        self.client.send(Command::Stop)?;
        loop {
            match self.client.response(EVENT_TIMEOUT)? {
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

    fn verify(&mut self) -> Result<u64, FixtureError> {
        // Without a backing file only what the client reads is verified; it compares that itself.
        let Some(disk) = &self.fixture.disk else { return Ok(0) };
        let result = verify(disk, &self.journal)?;
        self.blocks_verified += result.blocks;
        if let Some(first) = &result.first {
            self.problems.push(format!("{} blocks of the backing file are wrong: {first}", result.wrong));
        }
        Ok(result.wrong)
    }
}

/// Starts the client, which inherits the two descriptors.
fn start_client(
    program: &Path,
    config: &ClientConfig,
    shared: [&OwnedFd; 2],
) -> Result<ClientProcess, FixtureError> {
    let inherit = |close| shared.iter().try_for_each(|fd| set_close_on_exec(fd, close));
    inherit(false).map_err(errno("pass shared memory to the client"))?;
    let client = ClientProcess::start(program, config);
    inherit(true).map_err(errno("keep shared memory to this process"))?;
    Ok(client?)
}

fn unexpected(expected: &'static str, got: &impl std::fmt::Debug) -> FixtureError {
    FixtureError::Unexpected { expected, got: format!("{got:?}") }
}
