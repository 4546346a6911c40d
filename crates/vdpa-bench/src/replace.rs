//! How a tenant is replaced by another image of itself, or by another process.

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

use super::engine::{LoadError, SavedEngine};
use super::ledger::Ledger;
use super::tenant::{Mode, Tenant, tell};
use super::timeline::Timeline;
use super::wire::{Event, TenantConfig, chain};

/// Names under which the successor finds things.
const DEVICE: &str = "disk";
const LEDGER: &str = "ledger";
const TIMELINE: &str = "timeline";
/// Name and version of the tenant's section of saved state.
pub(super) const SECTION: (&str, u32) = ("load/tenant", 1);
/// Every image of a tenant is the one that runs, so that an installation in between does not matter.
const IMAGE: &str = "/proc/self/exe";
/// How long a standby may take to start and connect.
const STANDBY_LIMIT: Duration = Duration::from_secs(20);

/// The tenant's section of saved state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Saved {
    pub(super) engine: SavedEngine,
    pub(super) mode: Mode,
    pub(super) stopping: bool,
    /// Bytes of commands read but not yet obeyed.
    pub(super) input: Vec<u8>,
}

/// What tenant and orchestrator share.
#[derive(Debug)]
pub(super) struct Shared {
    /// For the successor: ledger and timeline.
    pub(super) fds: [OwnedFd; 2],
    pub(super) ledger: Ledger,
    pub(super) timeline: Timeline,
}

impl Shared {
    pub(super) fn open(fds: [OwnedFd; 2]) -> Result<Self, LoadError> {
        let [ledger, timeline] = &fds;
        let ledger = Ledger::open(ledger)?;
        let timeline = Timeline::open(timeline)
            .map_err(|source| LoadError::System { action: "map the timeline", source })?;
        Ok(Self { fds, ledger, timeline })
    }
}

/// What a process finds when it starts.
pub(super) enum Arrived<D> {
    /// The device is its own now.
    Successor(Box<Successor<D>>),
    /// Nothing: it is the first one.
    Nothing,
    /// It was to be a successor; the predecessor goes on and knows why.
    NotNeeded,
}

/// What a predecessor left.
#[derive(Debug)]
pub(super) struct Successor<D> {
    pub(super) restored: Restored<D>,
    pub(super) shared: Shared,
}

/// Takes over what is there to be taken over, waiting for it behind `standby`.
pub(super) fn arrive<D: DeviceFile>(
    config: &TenantConfig,
    standby: Option<&Path>,
) -> Result<Arrived<D>, LoadError> {
    let other_process = standby.is_some() || std::env::var_os(SOCKET_VARIABLE).is_some();
    match take_over(standby) {
        Ok(Some(successor)) => Ok(Arrived::Successor(Box::new(successor))),
        Ok(None) => Ok(Arrived::Nothing),
        // The orchestrator listens to the predecessor.
        Err(e) if other_process => {
            eprintln!("tenant of {}: does not take over: {e}", config.device.display());
            Ok(Arrived::NotNeeded)
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
    // What can be made ready is, as long as the predecessor drives the device.
    let mut take = |name| incoming.descriptors().remove(name).ok_or_else(|| format!("{name} did not come"));
    let shared = Shared::open([take(LEDGER)?, take(TIMELINE)?]).map_err(|e| chain(&e))?;
    let restored = incoming.take_over().map_err(|e| chain(&e))?;
    Ok(Some(Successor { restored, shared }))
}

/// An update that is being prepared beside the load.
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

impl<D: DeviceFile> Tenant<D> {
    /// Begins to prepare an update. Requests are driven on.
    pub(super) fn begin_update(&mut self, strategy: Strategy, way: Way) -> Result<(), LoadError> {
        let [ledger, timeline] = &self.shared;
        let plan = Plan::new()
            .strategy(strategy)
            .no_deadline()
            .late_section(SECTION.0, SECTION.1, false)
            .descriptor(LEDGER, ledger)
            .descriptor(TIMELINE, timeline);
        match plan.describe([(DEVICE, self.engine.session())]) {
            Ok(described) => {
                let config = self.config.clone();
                let thread = std::thread::spawn(move || prepare(described, way, &config));
                self.preparing = Some(Preparing { strategy, way, thread });
                Ok(())
            }
            Err(e) => tell(&Event::UpdateFailed { strategy, way, error: chain(&e) }),
        }
    }

    /// Ends an update that was prepared. `None` when another process goes on from here; the tenant when it failed.
    pub(super) fn switch(mut self, preparing: Preparing) -> Result<Option<Self>, LoadError> {
        let Preparing { strategy, way, thread } = preparing;
        let prepared =
            thread.join().unwrap_or_else(|_| Err("the thread that prepares has panicked".to_owned()));
        let Ready { prepared, standby } = match prepared {
            Ok(ready) => ready,
            Err(error) => {
                tell(&Event::UpdateFailed { strategy, way, error })?;
                return Ok(Some(self));
            }
        };
        // What has arrived belongs to the time before.
        self.engine.reap()?;
        let Self { config, engine, shared, mode, stopping, input, .. } = self;
        // Given back when this process ends, and not in the switch.
        let ram = engine.ram().clone();
        let (session, engine, ledger, timeline) = engine.into_parts();
        let saved = Saved { engine, mode, stopping, input };
        let section = Section::json(SECTION.0, SECTION.1, &saved)
            .map_err(|e| LoadError::Config { what: e.to_string() })?;
        let late = Sections::from_iter([section]);
        let mut failed = match prepared.switch(Devices::one(DEVICE, session), late) {
            Ok(departed) => {
                let _ = departed.run_when_idle();
                drop(ram);
                // The successor is a child of this process, which ends: nobody has to wait for it here.
                standby.into_iter().for_each(Standby::release);
                return Ok(None);
            }
            Err(failed) => failed,
        };
        tell(&Event::UpdateFailed { strategy, way, error: chain(&failed.error) })?;
        let session = failed.devices.take(DEVICE).ok_or_else(|| LoadError::Config {
            what: format!(
                "the failed update could not be undone: {}",
                failed.lost.first().map_or_else(String::new, |e| chain(e))
            ),
        })?;
        let engine = super::engine::Engine::restore(&config, session, (ledger, timeline), saved.engine)?;
        let mut tenant = Self::new(config, shared, engine);
        tenant.mode = mode;
        tenant.stopping = stopping;
        tenant.input = saved.input;
        Ok(Some(tenant))
    }
}

fn prepare(described: Described, way: Way, config: &TenantConfig) -> Result<Ready, String> {
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

/// A process that waits to take over. Dropping it ends it.
#[derive(Debug)]
struct Standby(Option<Child>);

impl Standby {
    /// Starts one that has this process's standard input and output, and waits until it has connected.
    fn start(config: &TenantConfig, arguments: &[String]) -> Result<(Self, UnixStream), String> {
        let path = config.directory.join(format!("standby-{}.sock", std::process::id()));
        let failed = |e: std::io::Error| format!("{}: {e}", path.display());
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let mut command = Command::new(IMAGE);
        command.args(arguments.iter().skip(1)).arg(&path);
        let child = command.spawn().map_err(|e| format!("the standby cannot be started: {e}"))?;
        let mut standby = Self(Some(child));
        let socket = standby.accept(&listener).and_then(|()| Ok(listener.accept().map_err(failed)?.0));
        // Nobody else is to connect; one that is left over is in a directory that is removed.
        let _ = std::fs::remove_file(&path);
        Ok((standby, socket?))
    }

    /// Waits for its connection.
    fn accept(&mut self, listener: &UnixListener) -> Result<(), String> {
        let begin = Instant::now();
        let moment = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        while begin.elapsed() < STANDBY_LIMIT {
            let mut fds = [PollFd::new(listener, PollFlags::IN)];
            if poll(&mut fds, Some(&moment)).is_ok_and(|ready| ready > 0) {
                return Ok(());
            }
            if let Some(Ok(Some(status))) = self.0.as_mut().map(Child::try_wait) {
                return Err(format!("the standby has ended ({status})"));
            }
        }
        Err(format!("the standby has not connected within {} s", STANDBY_LIMIT.as_secs()))
    }

    /// Lets it go on by itself.
    fn release(mut self) {
        drop(self.0.take());
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // It may have ended; either way nothing of it is left.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
