//! [`Daemon`]: start, run and stop of the daemon.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};

use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_sys::mm_reaper::MmReaper;

use crate::bus::Bus;
use crate::control::{self, Access, Backend, ControlSocket, MetricsSocket, Server};
use crate::failed::{self, FailedBackend};
use crate::survival::{Legacy, Survival, TakeOverError};
use vdpa_backend::front::fuse::{DeviceFiles, Options, ServeError, cuse};
use vdpa_backend::front::watchdog::{self, Watchdog};
use vdpa_backend::persist::Held;
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, CtlError, UpgradeRequest};

mod accounts;
mod device_spec;
mod machine;
pub mod notify;

pub use accounts::{User, group, user};
pub use device_spec::{DeviceSpecError, parse_device_spec};
pub(crate) use machine::raise_limits;

/// Configuration of the daemon.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which kind of device files to serve.
    pub front: Front,
    /// Directory of the device files; `None` for the default: `/dev` for character devices, `mount_dir` for files.
    pub dir: Option<PathBuf>,
    /// Default directory of device files that are served by a FUSE mount.
    pub mount_dir: PathBuf,
    /// Whether the mount for it comes from the service manager, by [`given_mount::make`](crate::given_mount::make); with a holder only.
    pub mount_given: bool,
    /// Path of the control socket.
    pub socket: PathBuf,
    /// Groups that may use it.
    pub access: Access,
    /// Where the metrics are served over TCP, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// Time for a request on a device file; after it the client gets `EIO`.
    pub request_timeout: Duration,
    /// Whether the kernel is asked to send requests in progress again after a crash, where it can.
    pub resend: bool,
    /// Time without a heartbeat of the daemon after which the watchdog ends its connection to the kernel.
    pub watchdog_timeout: Duration,
    /// Most threads that serve the rings of devices without the attribute `cpus`.
    pub workers: usize,
    /// How long such a thread busy-polls its rings before it sleeps, while that pays; 0 disables it.
    pub poll: Duration,
    /// Devices to create at start, in this order.
    pub devices: Vec<AddRequest>,
    /// The main configuration file, which is read again on demand.
    pub configuration: PathBuf,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    control: Server,
    backend: Arc<dyn Backend>,
    /// `None` for one that has crashed too often.
    bus: Option<Arc<Bus>>,
    files: Arc<DeviceFiles>,
    /// `None` with a holder.
    watchdog: Option<Watchdog>,
    survival: Option<Arc<Survival>>,
}

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The holder does not do what it should.
    #[error("cannot {action}: {errno}")]
    Holder {
        /// What was asked of it.
        action: &'static str,
        /// The reason.
        errno: Errno,
    },
    /// The machine lacks something that no option can replace.
    #[error("{what}")]
    Environment {
        /// What is missing and how to get it.
        what: String,
    },
    /// The device files cannot be served.
    #[error("cannot serve device files")]
    Files(#[from] ServeError),
    /// The service manager has given no mount.
    #[error(
        "the service manager gave no mount of device files: --mount given needs ExecStartPre=+vdpad --mount make in a unit with \
         NotifyAccess=exec and FileDescriptorStoreMax=, and no other vdpad that has mounted at {}", dir.display()
    )]
    NoMount {
        /// Where it was to be.
        dir: PathBuf,
    },
    /// The watchdog process did not start.
    #[error("cannot start the watchdog process")]
    Watchdog(#[source] io::Error),
    /// A device of the configuration was refused.
    #[error("device \"{name}\" was refused: {}{}", reason.message, hint(reason))]
    Device {
        /// Name of the device.
        name: String,
        /// The error of the bus.
        reason: CtlError,
    },
    /// This program does not replace the daemon.
    #[error(transparent)]
    TakeOver(#[from] TakeOverError),
    /// The server of the control API did not start.
    #[error(transparent)]
    Control(#[from] control::StartError),
}

/// What would be right, which the command line of the daemon has no line of its own for.
fn hint(reason: &CtlError) -> String {
    reason.hint.as_ref().map_or_else(String::new, |hint| format!(". {hint}"))
}

/// Why the daemon ended without a signal.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The signal handlers could not be installed.
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
    /// The mount of the device files, or a character device, was ended from outside: by umount(8), through sysfs, or by the
    /// watchdog.
    #[error("the device files in {} have been ended from outside", dir.display())]
    FilesLost {
        /// Their directory.
        dir: PathBuf,
    },
}

impl Daemon {
    /// Starts to serve device files, creates the devices of `config` and opens the control socket.
    ///
    /// When this returns, devices and socket are usable. On an error nothing is left running, but for what a daemon that goes on
    /// for another one has taken over: this process ends, and its successor takes it over again.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(config: &Config, survival: Option<Survival>) -> Result<Self, StartError> {
        let survival = survival.map(Arc::new);
        let place = choose(config, cuse::available)?;
        if matches!(place, Place::Mount(_)) && !config.mount_given {
            vdpa_sys::userns::fuse_available().map_err(|error| StartError::environment(&error))?;
        }
        raise_limits();
        if survival.as_ref().is_none_or(|survival| survival.generation() <= 1) {
            machine::report();
        }
        // A holder looks after the daemon itself, and its mounts must not end with the daemon.
        let mut watchdog = match &survival {
            Some(_) => None,
            None => {
                let exe = std::env::current_exe().map_err(StartError::Watchdog)?;
                Some(watchdog::spawn(&exe, config.watchdog_timeout).map_err(StartError::Watchdog)?)
            }
        };
        let options = Options {
            heartbeat: watchdog.as_mut().and_then(Watchdog::take_heartbeat),
            heartbeat_interval: config.watchdog_timeout / 5,
            ..file_options(config)
        };
        let holder = |action| move |errno| StartError::Holder { action, errno };
        let mut legacy = match &survival {
            Some(survival) => survival.legacy().map_err(holder("take back what is held"))?,
            None => Legacy::default(),
        };
        reach(CrashPoint::ItemsListed);
        let phase = |what| survival.iter().for_each(|survival| survival.phase(what));
        phase("take back");
        let continues = legacy.files.are_served();
        let candidate = survival.as_ref().filter(|survival| survival.is_candidate());
        if let Some(survival) = candidate {
            let unreadable = legacy.unreadable.pop().map(TakeOverError::Device);
            if let Some(error) = unreadable.or((!continues).then_some(TakeOverError::NoFiles)) {
                survival.refuse(&error);
                return Err(error.into());
            }
        }
        let files = match &survival {
            Some(survival) if continues => survival.adopt_files(&mut legacy.files, options)?,
            _ => first_files(&place, survival.as_deref(), &mut legacy, options)?,
        };
        reach(CrashPoint::ConnectionAdopted);
        let rings = std::mem::take(&mut legacy.rings);
        let bus = Bus::new(Arc::clone(&files), config.workers, config.poll, survival.clone(), rings);
        let bus = Arc::new(bus.with_configuration(config.configuration.clone()).with_front(config.front));
        let left = Left(continues.then(|| (Arc::clone(&files), Arc::clone(&bus))));
        if continues {
            let devices = std::mem::take(&mut legacy.devices);
            match candidate {
                Some(survival) => {
                    survival.take_over(&bus, devices).inspect_err(|error| survival.refuse(error))?;
                }
                None => bus.restore(devices),
            }
            phase("devices");
            resume(&files, survival.as_deref())?;
            bus.release_unclaimed();
        }
        phase("files");
        if !legacy.files.configured {
            add_configured(&bus, &config.devices, continues)?;
            if let Some(survival) = &survival {
                survival
                    .hold_configured()
                    .map_err(holder("note that the devices of the configuration exist"))?;
            }
        }
        let backend = Arc::clone(&bus) as Arc<dyn Backend>;
        let control = start_control(config, &backend, survival.as_ref(), legacy.control)?;
        reach(CrashPoint::ControlOpen);
        if survival.is_some() {
            spawn_reaper();
        }
        left.keep();
        Ok(Self { control, backend, bus: Some(bus), files, watchdog, survival })
    }

    /// As [`start`](Self::start), after too many crashes: every request of a client gets an error at once, and the control API
    /// tells why. `None` when there is no client, because no device files are left.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start_failed(config: &Config, survival: Survival) -> Result<Option<Self>, StartError> {
        let survival = Arc::new(survival);
        let holder = |action| move |errno| StartError::Holder { action, errno };
        let mut legacy = survival.legacy().map_err(holder("take back what is held"))?;
        if !legacy.files.are_served() {
            return Ok(None);
        }
        let control = legacy.control.take();
        let files = survival.adopt_files(&mut legacy.files, file_options(config))?;
        failed::put_in_place(&files, legacy);
        resume(&files, Some(&survival))?;
        let since = SystemTime::now();
        let backend: Arc<dyn Backend> = Arc::new(FailedBackend { survival: Arc::clone(&survival), since });
        let control = start_control(config, &backend, Some(&survival), control)?;
        Ok(Some(Self { control, backend, bus: None, files, watchdog: None, survival: Some(survival) }))
    }

    /// Blocks until SIGTERM or SIGINT, or until the device files are ended from outside. Calls `ready` and notifies the holder or
    /// the service manager when signals are handled, and notifies it again when the daemon stops. With a holder, SIGHUP is an
    /// upgrade to the program that lies at this one's path.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn run(&self, ready: impl FnOnce()) -> Result<(), RunError> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RunError::Signals)?;
        runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
            let hangup = self.survival.as_ref().map(|_| signal(SignalKind::hangup())).transpose();
            let hangup = hangup.map_err(RunError::Signals)?;
            // After the handlers are installed: whoever is notified may send a signal at once.
            if let Some(survival) = &self.survival {
                // One that has ended since is no reason to let the clients down, who are served again.
                if let Err(errno) = survival.ready() {
                    tracing::error!(%errno, "the holder has ended: a crash of this daemon would be the end of its devices");
                }
                reach(CrashPoint::ReadySaid);
            }
            ready();
            notify::service_manager("READY=1");
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                never = self.upgrade_by_signal(hangup) => match never {},
                // Without device files the daemon cannot serve anybody; its service manager can start another one.
                () = self.files.ended() => {
                    notify::service_manager("STOPPING=1");
                    return Err(RunError::FilesLost { dir: self.files.dir().into() });
                }
            };
            tracing::info!(signal = name, "stopping");
            notify::service_manager("STOPPING=1");
            Ok(())
        })
    }

    /// Starts an upgrade for each signal. The holder tells the service manager when it has ended.
    async fn upgrade_by_signal(&self, signals: Option<Signal>) -> Infallible {
        let Some(mut signals) = signals else { return std::future::pending().await };
        loop {
            signals.recv().await;
            let (backend, survival) = (Arc::clone(&self.backend), self.survival.clone());
            let upgrade = move || {
                tracing::info!(signal = "SIGHUP", "upgrade");
                if let Err(error) = backend.upgrade(UpgradeRequest::default()) {
                    tracing::error!(hint = error.hint, "no upgrade: {error}");
                    survival.iter().for_each(|survival| survival.goes_on());
                }
            };
            if let Err(error) = std::thread::Builder::new().name("sighup".into()).spawn(upgrade) {
                tracing::error!(%error, "no thread for the upgrade");
            }
        }
    }

    /// Closes the control socket, then revokes the devices from their clients and removes their files.
    pub fn stop(self) {
        if let Some(survival) = &self.survival
            && !survival.stopping()
        {
            // The next daemon is to find everything as after a crash.
            std::process::exit(0);
        }
        self.control.shutdown();
        if let Some(bus) = &self.bus {
            bus.shutdown();
        }
        self.files.shutdown();
        if let Some(watchdog) = self.watchdog
            && let Err(error) = watchdog.wait()
        {
            tracing::warn!("cannot wait for the watchdog process: {error}");
        }
    }
}

/// How device files are served, without a watchdog.
fn file_options(config: &Config) -> Options {
    Options {
        request_timeout: config.request_timeout,
        resend: config.resend,
        unmount: !config.mount_given,
        ..Options::default()
    }
}

/// The files of a daemon that goes on for no other one.
fn first_files(
    place: &Place,
    survival: Option<&Survival>,
    legacy: &mut Legacy,
    options: Options,
) -> Result<Arc<DeviceFiles>, StartError> {
    let files = match (place, survival) {
        (Place::Mount(_), Some(survival)) if legacy.files.are_new() => {
            return Ok(survival.serve_new_mount(legacy, options)?);
        }
        (Place::Mount(dir), _) if !options.unmount => return Err(StartError::NoMount { dir: dir.clone() }),
        (Place::Dev(dir), _) => DeviceFiles::cuse(dir, options)?,
        (Place::Mount(dir), _) => DeviceFiles::mount(dir, options)?,
    };
    if let Some(survival) = survival {
        let held = survival.hold_files(&files);
        held.map_err(|errno| StartError::Holder { action: "have the device files held", errno })?;
    }
    Ok(files)
}

/// Begins to serve files that another daemon has served.
fn resume(files: &DeviceFiles, survival: Option<&Survival>) -> Result<(), ServeError> {
    if let Some(Err(errno)) = survival.map(|survival| survival.keep_requests(files)) {
        tracing::warn!(%errno, "requests do not survive a crash where the kernel does not send them again");
    }
    files.resume()
}

/// What a daemon that goes on for another one leaves alone when it cannot: the one after it may.
struct Left<T>(Option<T>);

impl<T> Left<T> {
    /// It is not left: this daemon goes on.
    fn keep(mut self) {
        drop(self.0.take());
    }
}

impl<T> Drop for Left<T> {
    fn drop(&mut self) {
        std::mem::forget(self.0.take());
    }
}

impl StartError {
    fn environment(error: &dyn std::error::Error) -> Self {
        Self::Environment { what: error.to_string() }
    }
}

/// Starts what shares the address space of this process: its crash is noticed before gigabytes of page tables are freed.
fn spawn_reaper() {
    match MmReaper::spawn() {
        Ok(reaper) => std::mem::forget(reaper),
        Err(errno) => tracing::warn!(%errno, "a crash of this daemon will be noticed late"),
    }
}

/// Creates the devices of the configuration. A former daemon, which this one `continues`, may have crashed before it had added all.
fn add_configured(bus: &Bus, devices: &[AddRequest], continues: bool) -> Result<(), StartError> {
    for device in devices.iter().filter(|device| !(continues && bus.has(&device.name))) {
        bus.add(device.clone(), Vec::new())
            .map_err(|reason| StartError::Device { name: device.name.clone(), reason })?;
    }
    Ok(())
}

/// Serves the control API, on the socket of an earlier daemon if there is one.
fn start_control(
    config: &Config,
    backend: &Arc<dyn Backend>,
    survival: Option<&Arc<Survival>>,
    held: Option<Held>,
) -> Result<Server, control::StartError> {
    let socket = match survival {
        Some(survival) => survival.control_socket(&config.socket, config.access, held)?,
        None => ControlSocket::bind(&config.socket, config.access)?,
    };
    let metrics = metrics_socket(config, survival.is_some_and(|survival| survival.generation() > 1))?;
    let limits = control::Limits::default();
    let server = Server::start_public(socket, Arc::clone(backend), limits, metrics)?;
    if let Some(survival) = survival {
        survival.set_pauser(server.pauser());
    }
    Ok(server)
}

/// The socket for metrics over TCP, if there is to be one. A daemon that `goes_on` for another one does without it if it must: clients
/// are more important.
fn metrics_socket(config: &Config, goes_on: bool) -> Result<Option<MetricsSocket>, control::StartError> {
    let socket = match config.metrics.map(MetricsSocket::bind).transpose() {
        Err(error) if goes_on => {
            tracing::error!(%error, "no metrics over TCP");
            None
        }
        bound => bound.map_err(control::StartError::Metrics)?,
    };
    if let Some(address) = socket.as_ref().and_then(|socket| socket.address().ok()) {
        tracing::info!(%address, "metrics are served over TCP");
    }
    Ok(socket)
}

/// Kind and directory of the device files.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// Files of a FUSE mount over this directory.
    Mount(PathBuf),
    /// Character devices, in this directory.
    Dev(PathBuf),
}

/// Chooses between character devices and files, and logs the reason.
fn choose<E: std::error::Error>(
    config: &Config,
    available: impl Fn() -> Result<(), E>,
) -> Result<Place, StartError> {
    let dev = || config.dir.clone().unwrap_or_else(|| PathBuf::from("/dev"));
    let why = match config.front {
        Front::Cuse if cuse::prefix_of(&dev()).is_none() => {
            return Err(ServeError::NotDev { dir: dev() }.into());
        }
        Front::Cuse => {
            return available().map(|()| Place::Dev(dev())).map_err(|error| StartError::environment(&error));
        }
        Front::Fuse => "requested by --front".into(),
        Front::Vduse => "for devices that the kernel does not get".into(),
        Front::Auto if cuse::prefix_of(&dev()).is_none() => "the directory is not below /dev".into(),
        Front::Auto => match available() {
            Ok(()) => {
                tracing::info!("front end: cuse, character devices");
                return Ok(Place::Dev(dev()));
            }
            Err(error) => error.to_string(),
        },
    };
    let dir = config.dir.clone().unwrap_or_else(|| config.mount_dir.clone());
    if cuse::prefix_of(&dir).is_some_and(|prefix| prefix.is_empty()) {
        // A mount over /dev would hide everything else in it.
        return Err(StartError::Environment {
            what: format!("device files directly in /dev need CUSE: {why}"),
        });
    }
    tracing::info!(why, "front end: fuse, files");
    Ok(Place::Mount(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(front: Front, dir: Option<&str>, cuse: bool) -> Result<Place, String> {
        let config = Config {
            front,
            dir: dir.map(PathBuf::from),
            mount_dir: "/run/vdpad/dev".into(),
            mount_given: false,
            metrics: None,
            configuration: "/etc/vdpad/vdpad.toml".into(),
            socket: PathBuf::new(),
            access: Access::default(),
            request_timeout: Duration::from_secs(1),
            resend: true,
            watchdog_timeout: Duration::from_secs(1),
            workers: 1,
            poll: Duration::ZERO,
            devices: Vec::new(),
        };
        let available = || if cuse { Ok(()) } else { Err(io::Error::from(io::ErrorKind::NotFound)) };
        choose(&config, available).map_err(|error| error.to_string())
    }

    #[test]
    fn character_devices_are_chosen_where_they_can_be_made() {
        let dev = |dir: &str| Ok(Place::Dev(dir.into()));
        let mount = |dir: &str| Ok(Place::Mount(dir.into()));
        assert_eq!(chosen(Front::Auto, None, true), dev("/dev"));
        assert_eq!(chosen(Front::Auto, None, false), mount("/run/vdpad/dev"));
        assert_eq!(chosen(Front::Auto, Some("/dev/vhost-vdpa"), true), dev("/dev/vhost-vdpa"));
        assert_eq!(chosen(Front::Auto, Some("/dev/vhost-vdpa"), false), mount("/dev/vhost-vdpa"));
        assert_eq!(chosen(Front::Auto, Some("/tmp/x"), true), mount("/tmp/x"));
        assert_eq!(chosen(Front::Fuse, None, true), mount("/run/vdpad/dev"));
        assert_eq!(chosen(Front::Cuse, None, true), dev("/dev"));
    }

    #[test]
    fn impossible_choices_are_refused_and_dev_is_never_mounted_over() {
        assert!(chosen(Front::Cuse, None, false).unwrap_err().contains("not found"));
        for cuse in [false, true] {
            assert!(chosen(Front::Cuse, Some("/tmp/x"), cuse).is_err());
        }
        for front in [Front::Auto, Front::Fuse] {
            assert!(chosen(front, Some("/dev"), false).unwrap_err().contains("CUSE"));
            assert!(chosen(front, Some("/dev/"), false).unwrap_err().contains("CUSE"));
        }
    }
}
