//! [`Daemon`]: start, run and stop of the daemon.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use vdpa_core::Errno;
use vdpa_sys::mm_reaper::MmReaper;
use vdpa_sys::rlimit;

use crate::bus::Bus;
use crate::control::{self, Backend as _, Server};
use crate::survival::{Legacy, Survival, TakeOverError};
use vdpa_backend::front::fuse::{DeviceFiles, Options, ServeError, cuse};
use vdpa_backend::front::watchdog::{self, Watchdog};
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, AttrError, Attrs, CtlError};

pub mod notify;

/// Configuration of the daemon.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which kind of device files to serve.
    pub front: Front,
    /// Directory of the device files; `None` for the default: `/dev` for character devices, `mount_dir` for files.
    pub dir: Option<PathBuf>,
    /// Default directory of device files that are served by a FUSE mount.
    pub mount_dir: PathBuf,
    /// Path of the control socket.
    pub socket: PathBuf,
    /// Time for a request on a device file; after it the client gets `EIO`.
    pub request_timeout: Duration,
    /// Time without a heartbeat of the daemon after which the watchdog ends its connection to the kernel.
    pub watchdog_timeout: Duration,
    /// Most threads that serve the rings of devices without the attribute `cpus`.
    pub workers: usize,
    /// How long such a thread busy-polls its rings before it sleeps, while that pays; 0 disables it.
    pub poll: Duration,
    /// Devices to create at start, in this order.
    pub devices: Vec<AddRequest>,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    control: Server,
    bus: Arc<Bus>,
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
    /// The watchdog process did not start.
    #[error("cannot start the watchdog process")]
    Watchdog(#[source] io::Error),
    /// A device of the configuration was refused.
    #[error("device \"{name}\" was refused")]
    Device {
        /// Name of the device.
        name: String,
        /// The error of the bus.
        #[source]
        source: CtlError,
    },
    /// This program does not replace the daemon.
    #[error(transparent)]
    TakeOver(#[from] TakeOverError),
    /// The server of the control API did not start.
    #[error(transparent)]
    Control(#[from] control::StartError),
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
    /// When this returns, devices and socket are usable. On an error nothing is left running.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(config: &Config, survival: Option<Survival>) -> Result<Self, StartError> {
        let survival = survival.map(Arc::new);
        let place = choose(config, cuse::available)?;
        if let Place::Mount(_) = place {
            vdpa_sys::userns::fuse_available().map_err(|error| StartError::environment(&error))?;
        }
        // The daemon charges pinned guest memory to its owner, so its own limit must not be reached first. Where it cannot be
        // raised, devices report that when they fail to pin.
        if let Err(error) = rlimit::raise_memlock(None) {
            tracing::debug!("RLIMIT_MEMLOCK stays as it is: {error}");
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
            request_timeout: config.request_timeout,
            heartbeat: watchdog.as_mut().and_then(Watchdog::take_heartbeat),
            heartbeat_interval: config.watchdog_timeout / 5,
            ..Options::default()
        };
        let holder = |action| move |errno| StartError::Holder { action, errno };
        let mut legacy = match &survival {
            Some(survival) => survival.legacy().map_err(holder("take back what is held"))?,
            None => Legacy::default(),
        };
        let adopted = legacy.mount.take();
        if let Some(survival) =
            survival.as_ref().filter(|survival| survival.is_candidate() && adopted.is_none())
        {
            let error = TakeOverError::NoMount;
            survival.refuse(&error);
            return Err(error.into());
        }
        let continues = adopted.is_some();
        let files = match (&place, &survival, adopted) {
            (_, Some(survival), Some(mount)) => survival.adopt(mount, options)?,
            (Place::Dev(dir), _, _) => DeviceFiles::cuse(dir, options)?,
            (Place::Mount(dir), _, _) => DeviceFiles::mount(dir, options)?,
        };
        if let Some(survival) = survival.as_ref().filter(|_| !continues) {
            survival.hold_mount(&files).map_err(holder("have the mount held"))?;
        }
        let mark = |what| survival.iter().for_each(|survival| survival.mark(what));
        mark("items taken");
        let rings = std::mem::take(&mut legacy.rings);
        let bus = Bus::new(Arc::clone(&files), config.workers, config.poll, survival.clone(), rings);
        let bus = Arc::new(bus);
        if continues {
            let devices = std::mem::take(&mut legacy.devices);
            match survival.as_ref().filter(|survival| survival.is_candidate()) {
                Some(survival) => {
                    survival.take_over(&bus, devices).inspect_err(|error| survival.refuse(error))?
                }
                None => bus.restore(devices),
            }
            mark("rings served");
            files.resume()?;
            mark("files served");
            bus.release_unclaimed();
        }
        // After a crash, those that had to end with the former daemon. The others were restored, or deleted before.
        for device in config.devices.iter().filter(|device| !continues || bus.is_lost_in_crash(device)) {
            match bus.add(device.clone()) {
                Ok(()) => {}
                // Another device may have the name by now. The restored ones must not end for that.
                Err(error) if continues => {
                    tracing::warn!(device = %device.name, %error, "a device of --dev is not created anew");
                }
                Err(source) => return Err(StartError::Device { name: device.name.clone(), source }),
            }
        }
        let control = match survival.as_ref().is_some_and(|survival| survival.is_candidate()) {
            true => Server::replace(&config.socket, Arc::clone(&bus) as _)?,
            false => Server::start(&config.socket, Arc::clone(&bus) as _)?,
        };
        if let Some(survival) = &survival {
            survival.ready().map_err(holder("tell the holder that this daemon serves"))?;
            // Shares the address space: a crash is noticed before gigabytes of page tables are freed.
            match MmReaper::spawn() {
                Ok(reaper) => std::mem::forget(reaper),
                Err(errno) => tracing::warn!(%errno, "a crash of this daemon will be noticed late"),
            }
        }
        Ok(Self { control, bus, files, watchdog, survival })
    }

    /// Blocks until SIGTERM or SIGINT, or until the device files are ended from outside. Calls `ready` and notifies the service
    /// manager when signals are handled, and notifies it again when the daemon stops.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn run(&self, ready: impl FnOnce()) -> Result<(), RunError> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RunError::Signals)?;
        runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
            // After the handlers are installed: whoever is notified may send a signal at once.
            ready();
            notify::service_manager("READY=1");
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
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

    /// Closes the control socket, then revokes the devices from their clients and removes their files.
    pub fn stop(self) {
        if let Some(survival) = &self.survival {
            survival.stopping();
        }
        self.control.shutdown();
        self.bus.shutdown();
        self.files.shutdown();
        if let Some(watchdog) = self.watchdog
            && let Err(error) = watchdog.wait()
        {
            tracing::warn!("cannot wait for the watchdog process: {error}");
        }
    }
}

impl StartError {
    fn environment(error: &dyn std::error::Error) -> Self {
        Self::Environment { what: error.to_string() }
    }
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

/// Why the value of `--dev` is not a device specification.
#[derive(Debug, thiserror::Error)]
pub enum DeviceSpecError {
    /// A field without an equals sign.
    #[error("\"{field}\" is not of the form name=value")]
    NotAPair {
        /// The field.
        field: String,
    },
    /// `name` or `mgmtdev` is missing.
    #[error("\"{key}\" is missing; name=NAME mgmtdev=MGMTDEV are needed")]
    Missing {
        /// The missing one.
        key: &'static str,
    },
    /// An attribute occurs twice.
    #[error(transparent)]
    Attr(#[from] AttrError),
}

/// Parses a device specification: `name=NAME mgmtdev=MGMTDEV attribute=value ...`.
///
/// Fields are separated by white space. A value that contains white space can only be given over the control socket.
///
/// # Errors
/// [`DeviceSpecError`].
pub fn parse_device_spec(text: &str) -> Result<AddRequest, DeviceSpecError> {
    let (mut name, mut mgmtdev) = (None, None);
    let mut attrs = Attrs::new();
    for field in text.split_whitespace() {
        let (key, value) =
            field.split_once('=').ok_or_else(|| DeviceSpecError::NotAPair { field: field.into() })?;
        let slot = match key {
            "name" => &mut name,
            "mgmtdev" => &mut mgmtdev,
            _ => {
                attrs.insert(key, value)?;
                continue;
            }
        };
        if slot.replace(value.to_owned()).is_some() {
            return Err(AttrError::Twice { name: key.into() }.into());
        }
    }
    let required = |slot: Option<String>, key| {
        slot.filter(|value| !value.is_empty()).ok_or(DeviceSpecError::Missing { key })
    };
    Ok(AddRequest { name: required(name, "name")?, mgmtdev: required(mgmtdev, "mgmtdev")?, attrs })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(front: Front, dir: Option<&str>, cuse: bool) -> Result<Place, String> {
        let config = Config {
            front,
            dir: dir.map(PathBuf::from),
            mount_dir: "/run/vdpad/dev".into(),
            socket: PathBuf::new(),
            request_timeout: Duration::from_secs(1),
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

    #[test]
    fn device_specifications_are_parsed() {
        let device = parse_device_spec("name=d0  mgmtdev=blk path=/a=b direct=on").unwrap();
        assert_eq!((device.name.as_str(), device.mgmtdev.as_str()), ("d0", "blk"));
        assert_eq!(device.attrs.iter().collect::<Vec<_>>(), [("path", "/a=b"), ("direct", "on")]);
    }

    #[test]
    fn errors_of_device_specifications_name_the_field() {
        let text = |text| parse_device_spec(text).unwrap_err().to_string();
        assert!(text("name=d0").starts_with("\"mgmtdev\" is missing"));
        assert!(text("name= mgmtdev=blk").starts_with("\"name\" is missing"));
        assert_eq!(text("name=d0 readonly"), "\"readonly\" is not of the form name=value");
        assert!(text("name=a name=b").contains("given twice"));
        assert!(text("name=a mgmtdev=b x=1 x=2").contains("given twice"));
    }
}
