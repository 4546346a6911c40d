//! Updates of the client: its replacement by another image or by another process.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use vdpa_client::device::DeviceFile;
use vdpa_client::state::{Section, Sections};
use vdpa_client::update::{
    self, Described, Devices, Image, Incoming, Plan, Prepared, Restored, SOCKET_VARIABLE, Strategy, Via, Way,
};

use super::client::{LoadClient, Mode, send_event};
use super::engine::{LoadError, SavedEngine};
use super::journal::Journal;
use super::timeline::Timeline;
use super::wire::{ClientConfig, Event, chain};

/// Names of the device and the descriptors in the saved state.
const DEVICE: &str = "disk";
const JOURNAL: &str = "journal";
const TIMELINE: &str = "timeline";
/// Name and version of the client's section of saved state.
pub(super) const SECTION: (&str, u32) = ("load/client", 1);
/// The image of an update is the running program, so that installing another version meanwhile has no effect.
const IMAGE: &str = "/proc/self/exe";
/// Time for a standby process to start and connect.
const STANDBY_TIMEOUT: Duration = Duration::from_secs(20);

/// The client's section of saved state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Saved {
    pub(super) engine: SavedEngine,
    pub(super) mode: Mode,
    pub(super) stopping: bool,
    /// Bytes of commands that were read and are not processed yet.
    pub(super) input: Vec<u8>,
}

/// The shared memory of client and orchestrator.
#[derive(Debug)]
pub(super) struct Shared {
    /// Descriptors of journal and timeline, for the successor.
    pub(super) fds: [OwnedFd; 2],
    pub(super) journal: Journal,
    pub(super) timeline: Timeline,
}

impl Shared {
    pub(super) fn open(fds: [OwnedFd; 2]) -> Result<Self, LoadError> {
        let [journal, timeline] = &fds;
        let journal = Journal::open(journal)?;
        let timeline = Timeline::open(timeline)
            .map_err(|source| LoadError::System { action: "map the timeline", source })?;
        Ok(Self { fds, journal, timeline })
    }
}

/// What a process is when it starts.
pub(super) enum Startup<D> {
    /// A successor, which drives the device now.
    Successor(Box<Successor<D>>),
    /// The first process.
    First,
    /// A successor whose update failed. The predecessor continues and knows the reason.
    Aborted,
}

/// The state that a successor has received.
#[derive(Debug)]
pub(super) struct Successor<D> {
    pub(super) restored: Restored<D>,
    pub(super) shared: Shared,
}

/// Receives the state of a predecessor, if there is one. Waits for it on the socket `standby`, if that is given.
pub(super) fn startup<D: DeviceFile>(
    config: &ClientConfig,
    standby: Option<&Path>,
) -> Result<Startup<D>, LoadError> {
    let other_process = standby.is_some() || std::env::var_os(SOCKET_VARIABLE).is_some();
    match take_over(standby) {
        Ok(Some(successor)) => Ok(Startup::Successor(Box::new(successor))),
        Ok(None) => Ok(Startup::First),
        // The predecessor reports the failure to the orchestrator.
        Err(e) if other_process => {
            eprintln!("client of {}: does not take over: {e}", config.device.display());
            Ok(Startup::Aborted)
        }
        Err(what) => Err(LoadError::Config { what: format!("cannot take over: {what}") }),
    }
}

fn take_over<D: DeviceFile>(standby: Option<&Path>) -> Result<Option<Successor<D>>, String> {
    let incoming = match standby {
        Some(path) => {
            let socket = UnixStream::connect(path).map_err(|e| format!("{}: {e}", path.display()))?;
            Some(Incoming::receive(socket).map_err(|e| chain(&e))?)
        }
        None => update::incoming().map_err(|e| chain(&e))?,
    };
    let Some(incoming) = incoming else { return Ok(None) };
    let mut incoming = incoming.understands(&[(SECTION.0, SECTION.1..=SECTION.1)]).map_err(|e| chain(&e))?;
    // Done before the take-over, while the predecessor still drives the device.
    let mut take =
        |name| incoming.descriptors().remove(name).ok_or_else(|| format!("the descriptor {name} is missing"));
    let shared = Shared::open([take(JOURNAL)?, take(TIMELINE)?]).map_err(|e| chain(&e))?;
    let restored = incoming.take_over().map_err(|e| chain(&e))?;
    Ok(Some(Successor { restored, shared }))
}

/// An update that a thread is preparing while requests are driven.
#[derive(Debug)]
pub(super) struct Preparing {
    strategy: Strategy,
    way: Way,
    thread: JoinHandle<Result<Ready, String>>,
}

#[derive(Debug)]
struct Ready {
    prepared: Prepared,
    standby: Option<Standby>,
}

impl Preparing {
    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

impl<D: DeviceFile> LoadClient<D> {
    /// Begins to prepare an update on another thread. Requests are driven meanwhile.
    pub(super) fn begin_update(&mut self, strategy: Strategy, way: Way) -> Result<(), LoadError> {
        let [journal, timeline] = &self.shared;
        let plan = Plan::new()
            .strategy(strategy)
            .no_deadline()
            .late_section(SECTION.0, SECTION.1, false)
            .descriptor(JOURNAL, journal)
            .descriptor(TIMELINE, timeline);
        match plan.describe([(DEVICE, self.engine.session())]) {
            Ok(described) => {
                let config = self.config.clone();
                let thread = std::thread::spawn(move || prepare(described, way, &config));
                self.preparing = Some(Preparing { strategy, way, thread });
                Ok(())
            }
            Err(e) => send_event(&Event::UpdateFailed { strategy, way, error: chain(&e) }),
        }
    }

    /// Carries out an update that is prepared. Returns `None` when another process has taken over, and the client when the update
    /// failed.
    pub(super) fn switch(mut self, preparing: Preparing) -> Result<Option<Self>, LoadError> {
        let Preparing { strategy, way, thread } = preparing;
        let prepared =
            thread.join().unwrap_or_else(|_| Err("the thread that prepares has panicked".to_owned()));
        let Ready { prepared, standby } = match prepared {
            Ok(ready) => ready,
            Err(error) => {
                send_event(&Event::UpdateFailed { strategy, way, error })?;
                return Ok(Some(self));
            }
        };
        // Completions that have arrived belong to the time before the update.
        self.engine.reap()?;
        let Self { config, engine, shared, mode, stopping, input, .. } = self;
        // Keeps the mapping until this process ends, so that unmapping it does not take time in the switch.
        let ram = engine.ram().clone();
        let (session, engine, journal, timeline) = engine.into_parts();
        let saved = Saved { engine, mode, stopping, input };
        let section = Section::json(SECTION.0, SECTION.1, &saved)
            .map_err(|e| LoadError::Config { what: e.to_string() })?;
        let late = Sections::from_iter([section]);
        let mut failed = match prepared.switch(Devices::one(DEVICE, session), late) {
            Ok(departed) => {
                let _ = departed.run_when_idle();
                drop(ram);
                // The successor is a child of this process. It need not be waited for, because this process exits.
                standby.into_iter().for_each(Standby::release);
                return Ok(None);
            }
            Err(failed) => failed,
        };
        send_event(&Event::UpdateFailed { strategy, way, error: chain(&failed.error) })?;
        let session = failed.devices.take(DEVICE).ok_or_else(|| LoadError::Config {
            what: format!(
                "the failed update could not be undone: {}",
                failed.lost.first().map_or_else(String::new, |e| chain(e))
            ),
        })?;
        let engine = super::engine::Engine::restore(&config, session, (journal, timeline), saved.engine)?;
        let mut client = Self::new(config, shared, engine);
        client.mode = mode;
        client.stopping = stopping;
        client.input = saved.input;
        Ok(Some(client))
    }
}

fn prepare(described: Described, way: Way, config: &ClientConfig) -> Result<Ready, String> {
    let arguments = || {
        let config = serde_json::to_string(config).map_err(|e| e.to_string())?;
        Ok::<_, String>(["vdpa-tenant".to_owned(), config])
    };
    let image = || Ok::<_, String>(Image::new(IMAGE).args(arguments()?));
    let (via, standby) = match way {
        Way::Exec => (Via::Exec(image()?), None),
        Way::Fork => (Via::Fork(image()?), None),
        Way::HandOver => {
            let (standby, socket) = Standby::start(config, &arguments()?)?;
            (Via::HandOver(socket), Some(standby))
        }
    };
    let prepared = described.prepare(via).map_err(|e| chain(&e))?;
    Ok(Ready { prepared, standby })
}

/// A process that waits to take over. Dropping this kills it.
#[derive(Debug)]
struct Standby(Option<Child>);

impl Standby {
    /// Starts a process with the standard input and output of this one, and waits until it has connected.
    fn start(config: &ClientConfig, arguments: &[String]) -> Result<(Self, UnixStream), String> {
        let path = config.directory.join(format!("standby-{}.sock", std::process::id()));
        let failed = |e: std::io::Error| format!("{}: {e}", path.display());
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let mut command = Command::new(IMAGE);
        command.args(arguments.iter().skip(1)).arg(&path);
        let child = command.spawn().map_err(|e| format!("the standby cannot be started: {e}"))?;
        let mut standby = Self(Some(child));
        let socket = standby.accept(&listener).and_then(|()| Ok(listener.accept().map_err(failed)?.0));
        // No other process is to connect. If this fails, the file is removed with its directory.
        let _ = std::fs::remove_file(&path);
        Ok((standby, socket?))
    }

    /// Waits until it connects.
    fn accept(&mut self, listener: &UnixListener) -> Result<(), String> {
        let begin = Instant::now();
        let interval = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        while begin.elapsed() < STANDBY_TIMEOUT {
            let mut fds = [PollFd::new(listener, PollFlags::IN)];
            if poll(&mut fds, Some(&interval)).is_ok_and(|ready| ready > 0) {
                return Ok(());
            }
            if let Some(Ok(Some(status))) = self.0.as_mut().map(Child::try_wait) {
                return Err(format!("the standby has ended ({status})"));
            }
        }
        Err(format!("the standby has not connected within {} s", STANDBY_TIMEOUT.as_secs()))
    }

    /// Leaves it running.
    fn release(mut self) {
        drop(self.0.take());
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // Errors are ignored: it may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
