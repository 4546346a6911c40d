//! The client: a process that drives a block device and updates itself on command.

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
use super::replace::{self, Preparing, SECTION, Saved, Shared, Startup, Successor};
use super::wire::{ClientConfig, Command, Event, Totals, chain};

/// Bytes of the longest command.
const LINE_LIMIT: usize = 4096;
/// Interval at which commands are polled while there are completions.
const COMMAND_INTERVAL_NS: u64 = 1_000_000;
/// Longest wait for a completion or a command, so that deadlines and progress are checked.
const WAIT_MAX: Duration = Duration::from_millis(20);

/// Runs a client, configured by JSON, to the end of the process. With `standby` it connects to that socket and waits for its
/// predecessor. Exit status 0 when every request was completed once and correctly, or when another process continues.
#[must_use]
pub fn main(config: &str, standby: Option<&Path>) -> ExitCode {
    let config: ClientConfig = match serde_json::from_str(config) {
        Ok(config) => config,
        Err(e) => {
            let _ = writeln!(io::stderr(), "client: the argument is not a configuration: {e}");
            return ExitCode::from(2);
        }
    };
    let ended = match LoadClient::<VhostVdpaFd>::begin(config, standby) {
        Ok(Some(client)) => client.run(),
        Ok(None) => Ok(End::Replaced),
        Err(e) => Err(e),
    };
    match ended {
        Ok(End::Clean | End::Replaced) => ExitCode::SUCCESS,
        Ok(End::Unclean) => ExitCode::FAILURE,
        Err(e) => {
            let _ = send_event(&Event::Failed { error: chain(&e), totals: Totals::default() });
            ExitCode::FAILURE
        }
    }
}

/// How a process of the client ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Every request was completed once and correctly.
    Clean,
    /// A request was lost, corrupt, completed twice, or failed.
    Unclean,
    /// Another process continues.
    Replaced,
}

/// State of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    /// No requests are issued, and none are in flight.
    Idle,
    /// Requests are issued.
    Running,
    /// Quiescing: waits for the requests in flight.
    Draining,
    /// Quiescing: waits for the flush.
    Flushing,
}

/// An update that is reported when its first completion arrives.
#[derive(Debug)]
struct PendingReport {
    report: Report,
    last_before_ns: u64,
    in_flight: u64,
}

#[derive(Debug)]
pub(super) struct LoadClient<D> {
    pub(super) config: ClientConfig,
    pub(super) engine: Engine<D>,
    /// Descriptors of journal and timeline, for the next image.
    pub(super) shared: [OwnedFd; 2],
    pub(super) mode: Mode,
    pub(super) stopping: bool,
    pub(super) input: Vec<u8>,
    pending_report: Option<PendingReport>,
    /// Populates the page tables of guest memory after an update, so that each update starts with all of it mapped, like
    /// that of a guest that has run for a while.
    populating: Option<JoinHandle<()>>,
    /// The update that is being prepared while requests are driven.
    pub(super) preparing: Option<Preparing>,
    next_command_ns: u64,
    next_progress_ns: u64,
}

impl<D: DeviceFile> LoadClient<D> {
    /// Starts a new client, or continues as a successor. `None` when the update failed and the predecessor continues.
    fn begin(config: ClientConfig, standby: Option<&Path>) -> Result<Option<Self>, LoadError> {
        match replace::startup(&config, standby)? {
            Startup::Successor(pending_report) => Self::resume(config, *pending_report).map(Some),
            Startup::First => Self::start(config).map(Some),
            Startup::Aborted => Ok(None),
        }
    }

    fn start(config: ClientConfig) -> Result<Self, LoadError> {
        let take = |number| {
            inherit::take(number)
                .map_err(|source| LoadError::System { action: "adopt shared memory", source })
        };
        let shared = Shared::open([take(config.journal_fd)?, take(config.timeline_fd)?])?;
        let Shared { fds: shared, journal, timeline } = shared;
        // Pinned pages count against RLIMIT_MEMLOCK. Where it cannot be raised, the device may refuse the memory.
        let memlock_raised = rlimit::raise_memlock(None).is_ok();
        let engine = Engine::new(&config, journal, timeline)?;
        let session = engine.session();
        let offered = session.offered_backend_features();
        send_event(&Event::Started {
            backend_features: offered.0,
            features: session.features().0,
            best: Strategy::pick(offered),
            memlock_raised,
        })?;
        Ok(Self::new(config, shared, engine))
    }

    pub(super) fn new(config: ClientConfig, shared: [OwnedFd; 2], engine: Engine<D>) -> Self {
        Self {
            config,
            engine,
            shared,
            mode: Mode::Idle,
            stopping: false,
            input: Vec::new(),
            pending_report: None,
            populating: None,
            preparing: None,
            next_command_ns: 0,
            next_progress_ns: 0,
        }
    }

    fn resume(config: ClientConfig, successor: Successor<D>) -> Result<Self, LoadError> {
        let Successor { restored, shared: Shared { fds, journal, timeline } } = successor;
        let unreadable = |what: String| LoadError::Config { what };
        let (session, mut sections, report) =
            restored.into_one().map_err(|_| unreadable("more than one device was handed over".to_owned()))?;
        let section = sections
            .take(SECTION.0)
            .ok_or_else(|| unreadable("the saved state has no section of a client".to_owned()))?;
        let saved: Saved = section.parse(SECTION.1).map_err(|e| unreadable(e.to_string()))?;
        sections.ensure_consumed().map_err(|e| unreadable(e.to_string()))?;
        let engine = Engine::restore(&config, session, (journal, timeline), saved.engine)?;
        let in_flight = engine.in_flight() as u64;
        let pending_report = PendingReport { report, last_before_ns: engine.last_completion_ns(), in_flight };
        let mut client = Self::new(config, fds, engine);
        client.mode = saved.mode;
        client.stopping = saved.stopping;
        client.input = saved.input;
        client.pending_report = Some(pending_report);
        // No progress is sent before the first completion.
        client.next_progress_ns = monotonic_ns() + client.config.progress_ms.max(1) * 1_000_000;
        Ok(client)
    }

    fn run(mut self) -> Result<End, LoadError> {
        loop {
            let reaped = match self.step() {
                Ok(reaped) => reaped,
                Err(e) => {
                    let totals = self.engine.totals().clone();
                    send_event(&Event::Failed { error: chain(&e), totals })?;
                    return Ok(End::Unclean);
                }
            };
            if self.stopping && self.mode == Mode::Idle {
                let totals = self.engine.totals().clone();
                send_event(&Event::Finished(totals.clone()))?;
                return Ok(if totals.clean() { End::Clean } else { End::Unclean });
            }
            let now = monotonic_ns();
            if now >= self.next_progress_ns {
                self.next_progress_ns = now + self.config.progress_ms.max(1) * 1_000_000;
                self.engine.check_deadline(Duration::from_millis(self.config.deadline_ms));
                send_event(&Event::Progress(self.engine.totals().clone()))?;
            }
            if reaped == 0 || now >= self.next_command_ns {
                self.next_command_ns = now + COMMAND_INTERVAL_NS;
                if self.wait(reaped == 0)? {
                    self.read_input()?;
                }
            }
            while let Some(command) = self.next_command()? {
                self.execute(command)?;
            }
            if let Some(preparing) = self.preparing.take_if(|preparing| preparing.is_finished()) {
                match self.switch(preparing)? {
                    Some(client) => self = client,
                    None => return Ok(End::Replaced),
                }
            }
        }
    }

    /// Takes completions and issues requests. Returns the number of completions.
    fn step(&mut self) -> Result<u64, LoadError> {
        let reaped = self.engine.reap()?;
        if reaped > 0 {
            self.report_update()?;
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
                    // Lost requests will not complete.
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
        send_event(&Event::Quiesced(self.engine.totals().clone()))
    }

    /// Reports an update whose first completion has arrived.
    fn report_update(&mut self) -> Result<(), LoadError> {
        let Some(PendingReport { report, last_before_ns, in_flight }) = self.pending_report.take() else {
            return Ok(());
        };
        let at_ns = self.engine.batch_ns();
        let blackout_us = at_ns.saturating_sub(last_before_ns) / 1000;
        let ram = self.engine.ram().clone();
        // An error is ignored: the access that needs the page reports it.
        self.populating = Some(std::thread::spawn(move || {
            let _ = ram.populate();
        }));
        send_event(&Event::Update {
            strategy: report.devices.first().map_or(Strategy::Live, |d| d.strategy),
            way: report.way,
            report,
            blackout_us,
            at_ns,
            in_flight,
        })
    }

    /// Waits for a completion or a command, or only polls for a command if `may_wait` is unset. Returns whether there is a command.
    fn wait(&mut self, may_wait: bool) -> Result<bool, LoadError> {
        let timeout = if may_wait && !self.engine.arm()? { WAIT_MAX } else { Duration::ZERO };
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

    /// Reads the available input. Its end means that the orchestrator has ended, and is taken as the command to stop.
    fn read_input(&mut self) -> Result<(), LoadError> {
        let mut bytes = [0; LINE_LIMIT];
        // Read without the buffer of `Stdin`, whose contents would be lost in an update; `input` is handed over.
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
        // One command at a time: the next one waits until the previous one is done.
        let populating = self.populating.as_ref().is_some_and(|thread| !thread.is_finished());
        if populating
            || self.preparing.is_some()
            || matches!(self.mode, Mode::Draining | Mode::Flushing)
            || self.pending_report.is_some()
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
            what: format!("\"{}\" is not a command: {e}", String::from_utf8_lossy(&line).trim_end()),
        })
    }

    fn execute(&mut self, command: Command) -> Result<(), LoadError> {
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

pub(super) fn send_event(event: &Event) -> Result<(), LoadError> {
    let mut line = serde_json::to_vec(event).map_err(|e| LoadError::Config { what: e.to_string() })?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).map_err(|e| LoadError::System {
        action: "send an event",
        source: vdpa_core::Errno::from_raw(e.raw_os_error().unwrap_or(0)),
    })
}

fn system(action: &'static str) -> impl Fn(rustix::io::Errno) -> LoadError {
    move |e| LoadError::System { action, source: vdpa_core::Errno::from_raw(e.raw_os_error()) }
}
