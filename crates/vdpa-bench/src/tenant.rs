//! The tenant: a process that drives a block device and replaces itself on command.

use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use vdpa_client::device::DeviceFile;
use vdpa_client::update::{Report, Strategy};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;
use vdpa_sys::{inherit, rlimit};

use super::engine::{Engine, LoadError};
use super::replace::{self, Arrived, Preparing, SECTION, Saved, Shared, Successor};
use super::wire::{Command, Event, TenantConfig, Totals, chain};

/// Longest line accepted as a command.
const LINE_LIMIT: usize = 4096;
/// How often commands are looked for while completions keep coming.
const COMMAND_INTERVAL_NS: u64 = 1_000_000;
/// How long a wait may last before deadlines and progress are looked at.
const IDLE: Duration = Duration::from_millis(20);

/// Runs a tenant with a configuration in JSON: the whole of its process. With `standby` it waits for its predecessor
/// behind that socket. Exit status 0 when every request was answered once and right, or somebody else goes on.
#[must_use]
pub fn main(config: &str, standby: Option<&Path>) -> ExitCode {
    let config: TenantConfig = match serde_json::from_str(config) {
        Ok(config) => config,
        Err(e) => {
            let _ = writeln!(io::stderr(), "tenant: its argument is no configuration: {e}");
            return ExitCode::from(2);
        }
    };
    let ended = match Tenant::<VhostVdpaFd>::begin(config, standby) {
        Ok(Some(tenant)) => tenant.run(),
        Ok(None) => Ok(End::Elsewhere),
        Err(e) => Err(e),
    };
    match ended {
        Ok(End::Clean | End::Elsewhere) => ExitCode::SUCCESS,
        Ok(End::Unclean) => ExitCode::FAILURE,
        Err(e) => {
            let _ = tell(&Event::Failed { error: chain(&e), totals: Totals::default() });
            ExitCode::FAILURE
        }
    }
}

/// How a process of a tenant ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Every request was answered once and right.
    Clean,
    /// Something was lost, damaged, answered twice or failed.
    Unclean,
    /// Another process goes on.
    Elsewhere,
}

/// What the tenant is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    /// Nothing is issued and nothing in flight.
    Idle,
    /// Requests are issued.
    Running,
    /// Waiting for what is in flight, to quiesce.
    Draining,
    /// Waiting for the flush, to quiesce.
    Flushing,
}

/// An update of which the first completion is still to come.
#[derive(Debug)]
struct Arrival {
    report: Report,
    last_before_ns: u64,
    in_flight: u64,
}

#[derive(Debug)]
pub(super) struct Tenant<D> {
    pub(super) config: TenantConfig,
    pub(super) engine: Engine<D>,
    /// The descriptors of ledger and timeline, for the next image.
    pub(super) shared: [OwnedFd; 2],
    pub(super) mode: Mode,
    pub(super) stopping: bool,
    pub(super) input: Vec<u8>,
    arrival: Option<Arrival>,
    /// Maps all of guest memory again after an update, so that each update finds a process with all of it
    /// mapped, as that of a guest that has run for a while.
    populating: Option<JoinHandle<()>>,
    /// The update that is being prepared while requests are driven.
    pub(super) preparing: Option<Preparing>,
    next_command_ns: u64,
    next_progress_ns: u64,
}

impl<D: DeviceFile> Tenant<D> {
    /// Starts, or goes on in place of a predecessor. `None` when that one goes on, and has been told why.
    fn begin(config: TenantConfig, standby: Option<&Path>) -> Result<Option<Self>, LoadError> {
        match replace::arrive(&config, standby)? {
            Arrived::Successor(arrival) => Self::resume(config, *arrival).map(Some),
            Arrived::Nothing => Self::start(config).map(Some),
            Arrived::NotNeeded => Ok(None),
        }
    }

    fn start(config: TenantConfig) -> Result<Self, LoadError> {
        let take = |number| {
            inherit::take(number)
                .map_err(|source| LoadError::System { action: "adopt shared memory", source })
        };
        let shared = Shared::open([take(config.ledger_fd)?, take(config.timeline_fd)?])?;
        let Shared { fds: shared, ledger, timeline } = shared;
        // Pinned pages count against this limit. Where it cannot be raised the device may refuse the memory.
        let memlock_raised = rlimit::raise_memlock(None).is_ok();
        let engine = Engine::new(&config, ledger, timeline)?;
        let session = engine.session();
        let offered = session.offered_backend_features();
        tell(&Event::Started {
            backend_features: offered.0,
            features: session.features().0,
            best: Strategy::pick(offered),
            memlock_raised,
        })?;
        Ok(Self::new(config, shared, engine))
    }

    pub(super) fn new(config: TenantConfig, shared: [OwnedFd; 2], engine: Engine<D>) -> Self {
        Self {
            config,
            engine,
            shared,
            mode: Mode::Idle,
            stopping: false,
            input: Vec::new(),
            arrival: None,
            populating: None,
            preparing: None,
            next_command_ns: 0,
            next_progress_ns: 0,
        }
    }

    fn resume(config: TenantConfig, successor: Successor<D>) -> Result<Self, LoadError> {
        let Successor { restored, shared: Shared { fds, ledger, timeline } } = successor;
        let unreadable = |what: String| LoadError::Config { what };
        let (session, mut sections, report) =
            restored.into_one().map_err(|_| unreadable("more than one device was handed over".to_owned()))?;
        let section = sections
            .take(SECTION.0)
            .ok_or_else(|| unreadable("the saved state is not one of a tenant".to_owned()))?;
        let saved: Saved = section.parse(SECTION.1).map_err(|e| unreadable(e.to_string()))?;
        sections.ensure_consumed().map_err(|e| unreadable(e.to_string()))?;
        let engine = Engine::restore(&config, session, (ledger, timeline), saved.engine)?;
        let in_flight = engine.in_flight() as u64;
        let arrival = Arrival { report, last_before_ns: engine.last_completion_ns(), in_flight };
        let mut tenant = Self::new(config, fds, engine);
        tenant.mode = saved.mode;
        tenant.stopping = saved.stopping;
        tenant.input = saved.input;
        tenant.arrival = Some(arrival);
        // Nothing is told before the first completion.
        tenant.next_progress_ns = monotonic_ns() + tenant.config.progress_ms.max(1) * 1_000_000;
        Ok(tenant)
    }

    fn run(mut self) -> Result<End, LoadError> {
        loop {
            let reaped = match self.step() {
                Ok(reaped) => reaped,
                Err(e) => {
                    let totals = self.engine.totals().clone();
                    tell(&Event::Failed { error: chain(&e), totals })?;
                    return Ok(End::Unclean);
                }
            };
            if self.stopping && self.mode == Mode::Idle {
                let totals = self.engine.totals().clone();
                tell(&Event::Finished(totals.clone()))?;
                return Ok(if totals.clean() { End::Clean } else { End::Unclean });
            }
            let now = monotonic_ns();
            if now >= self.next_progress_ns {
                self.next_progress_ns = now + self.config.progress_ms.max(1) * 1_000_000;
                self.engine.check_deadline(Duration::from_millis(self.config.deadline_ms));
                tell(&Event::Progress(self.engine.totals().clone()))?;
            }
            if reaped == 0 || now >= self.next_command_ns {
                self.next_command_ns = now + COMMAND_INTERVAL_NS;
                if self.wait(reaped == 0)? {
                    self.read_input()?;
                }
            }
            while let Some(command) = self.next_command()? {
                self.obey(command)?;
            }
            if let Some(preparing) = self.preparing.take_if(|preparing| preparing.is_finished()) {
                match self.switch(preparing)? {
                    Some(tenant) => self = tenant,
                    None => return Ok(End::Elsewhere),
                }
            }
        }
    }

    /// Takes completions and issues requests; returns how many completions there were.
    fn step(&mut self) -> Result<u64, LoadError> {
        let reaped = self.engine.reap()?;
        if reaped > 0 {
            self.announce()?;
        }
        match self.mode {
            Mode::Idle => {}
            Mode::Running => self.engine.issue()?,
            Mode::Draining => {
                if self.engine.in_flight() == 0 {
                    self.mode = Mode::Flushing;
                    if !self.engine.flush()? {
                        self.quiesced()?;
                    }
                } else if self.engine.totals().lost > 0 {
                    // What is lost will not come.
                    self.quiesced()?;
                }
            }
            Mode::Flushing => {
                if self.engine.in_flight() == 0 || self.engine.totals().lost > 0 {
                    self.quiesced()?;
                }
            }
        }
        Ok(reaped)
    }

    fn quiesced(&mut self) -> Result<(), LoadError> {
        self.mode = Mode::Idle;
        tell(&Event::Quiesced(self.engine.totals().clone()))
    }

    /// The first completion after an update has come.
    fn announce(&mut self) -> Result<(), LoadError> {
        let Some(Arrival { report, last_before_ns, in_flight }) = self.arrival.take() else { return Ok(()) };
        let at_ns = self.engine.batch_ns();
        let blackout_us = at_ns.saturating_sub(last_before_ns) / 1000;
        let ram = self.engine.ram().clone();
        // Memory that cannot be mapped shows up at the access that needs it.
        self.populating = Some(std::thread::spawn(move || {
            let _ = ram.populate();
        }));
        tell(&Event::Update {
            strategy: report.devices.first().map_or(Strategy::Live, |d| d.strategy),
            way: report.way,
            report,
            blackout_us,
            at_ns,
            in_flight,
        })
    }

    /// Waits for a completion or a command, or only looks for a command; returns whether there is one.
    fn wait(&mut self, may_wait: bool) -> Result<bool, LoadError> {
        let timeout = if may_wait && !self.engine.arm()? { IDLE } else { Duration::ZERO };
        let timeout = Timespec::try_from(timeout).ok();
        let stdin = io::stdin();
        let mut fds =
            [PollFd::new(&stdin, PollFlags::IN), PollFd::new(self.engine.queue()?.call(), PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(system("wait for commands")(e)),
        }
        let [commands, _] = fds;
        Ok(!commands.revents().is_empty())
    }

    /// Reads what there is. The end of standard input means that the orchestrator is gone: stop.
    fn read_input(&mut self) -> Result<(), LoadError> {
        let mut bytes = [0; LINE_LIMIT];
        // Unbuffered: what is read here is carried over, what a buffer of the library held would not be.
        match rustix::io::read(io::stdin().as_fd(), &mut bytes) {
            Ok(0) if self.stopping => Ok(()),
            Ok(0) => {
                self.input.extend_from_slice(b"{\"command\":\"stop\"}\n");
                Ok(())
            }
            Ok(len) => {
                self.input.extend_from_slice(bytes.get(..len).unwrap_or_default());
                Ok(())
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => Ok(()),
            Err(e) => Err(system("read commands")(e)),
        }
    }

    fn next_command(&mut self) -> Result<Option<Command>, LoadError> {
        // One command at a time: the next one waits until this one is done.
        let populating = self.populating.as_ref().is_some_and(|thread| !thread.is_finished());
        if populating
            || self.preparing.is_some()
            || matches!(self.mode, Mode::Draining | Mode::Flushing)
            || self.arrival.is_some()
        {
            return Ok(None);
        }
        let Some(end) = self.input.iter().position(|&b| b == b'\n') else {
            if self.input.len() > LINE_LIMIT {
                return Err(LoadError::Config { what: "a command is longer than 4096 bytes".to_owned() });
            }
            return Ok(None);
        };
        let line: Vec<u8> = self.input.drain(..=end).collect();
        serde_json::from_slice(&line).map(Some).map_err(|e| LoadError::Config {
            what: format!("\"{}\" is no command: {e}", String::from_utf8_lossy(&line).trim_end()),
        })
    }

    fn obey(&mut self, command: Command) -> Result<(), LoadError> {
        match command {
            Command::Go => self.mode = Mode::Running,
            Command::Quiesce => self.mode = Mode::Draining,
            Command::Stop => {
                self.stopping = true;
                self.mode = Mode::Draining;
            }
            Command::Update { strategy, way } => self.begin_update(strategy, way)?,
        }
        Ok(())
    }
}

pub(super) fn tell(event: &Event) -> Result<(), LoadError> {
    let mut line = serde_json::to_vec(event).map_err(|e| LoadError::Config { what: e.to_string() })?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).map_err(|e| LoadError::System {
        action: "tell what happened",
        source: vdpa_core::Errno::from_raw(e.raw_os_error().unwrap_or(0)),
    })
}

fn system(action: &'static str) -> impl Fn(rustix::io::Errno) -> LoadError {
    move |e| LoadError::System { action, source: vdpa_core::Errno::from_raw(e.raw_os_error()) }
}
