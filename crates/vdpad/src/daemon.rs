//! [`Daemon`]: start, run and stop of everything vdpad does.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use vdpa_sys::rlimit;

use crate::bus::Bus;
use crate::ctl::api::{AddRequest, AttrError, Attrs, Backend, CtlError};
use crate::ctl::server::{self, Server};
use crate::front::fuse::{FuseFs, Options, ServeError, prepare_dir};
use crate::front::watchdog::{self, Watchdog};

pub mod notify;

/// What the daemon is to do.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory in which the device files appear.
    pub dir: PathBuf,
    /// Path of the control socket.
    pub control: PathBuf,
    /// Time for the device file's requests, after which the client gets an error.
    pub request_timeout: Duration,
    /// Time without progress after which the watchdog ends the daemon's connection to the kernel.
    pub watchdog_timeout: Duration,
    /// Threads that serve the rings of devices that ask for no processors of their own, at most.
    pub workers: usize,
    /// How long such a thread may look at its rings before it sleeps, if that pays; 0 is never.
    pub poll: Duration,
    /// Devices to create at start, in this order.
    pub devices: Vec<AddRequest>,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    control: Server,
    bus: Arc<Bus>,
    files: Arc<FuseFs>,
    watchdog: Watchdog,
}

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The machine lacks something that no option of ours can replace.
    #[error("{what}")]
    Environment {
        /// What is missing and how to get it.
        what: String,
    },
    /// The device files cannot be served.
    #[error("cannot serve device files")]
    Files(#[from] ServeError),
    /// The process that watches over this one did not start.
    #[error("cannot start the watchdog process")]
    Watchdog(#[source] io::Error),
    /// A device asked for at start was refused.
    #[error("device \"{name}\" was refused")]
    Device {
        /// Name of the device.
        name: String,
        /// What the bus said.
        #[source]
        source: CtlError,
    },
    /// The control interface did not start.
    #[error(transparent)]
    Control(#[from] server::StartError),
}

/// Why the daemon ended other than by a signal.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Signals cannot be waited for.
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
    /// The mount of the device files was ended from outside, by umount or by the watchdog.
    #[error("the mount {} has been ended; the device files are gone", dir.display())]
    MountLost {
        /// Where it was.
        dir: PathBuf,
    },
}

impl Daemon {
    /// Mounts the device files, creates the devices of `config` and opens the control socket.
    ///
    /// When this returns, devices and socket can be used. On an error nothing is left running.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(config: &Config) -> Result<Self, StartError> {
        vdpa_sys::userns::fuse_available()
            .map_err(|error| StartError::Environment { what: error.to_string() })?;
        // Pinned guest memory is charged to its owner by us; the daemon's own limit must not come first. Where it
        // cannot be raised, a device that is to pin says so.
        if let Err(error) = rlimit::raise_memlock(None) {
            tracing::debug!("RLIMIT_MEMLOCK stays as it is: {error}");
        }
        let dir = prepare_dir(&config.dir)?;
        let exe = std::env::current_exe().map_err(StartError::Watchdog)?;
        let mut watchdog =
            watchdog::spawn(&exe, &dir, config.watchdog_timeout).map_err(StartError::Watchdog)?;
        let options = Options {
            request_timeout: config.request_timeout,
            heartbeat: watchdog.take_heartbeat(),
            heartbeat_interval: config.watchdog_timeout / 5,
            ..Options::default()
        };
        let files = FuseFs::mount(&dir, options)?;
        let bus = Arc::new(Bus::new(Arc::clone(&files), config.workers, config.poll));
        for device in &config.devices {
            bus.add(device.clone())
                .map_err(|source| StartError::Device { name: device.name.clone(), source })?;
        }
        let control = Server::start(&config.control, Arc::clone(&bus) as _)?;
        Ok(Self { control, bus, files, watchdog })
    }

    /// Blocks until SIGTERM or SIGINT or until the mount is gone, and tells the service manager when it is ready and when it stops.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn run(&self, ready: impl FnOnce()) -> Result<(), RunError> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RunError::Signals)?;
        runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
            // Only now: a signal that follows the news at once must find its handler.
            ready();
            notify::service_manager("READY=1");
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                () = self.mount_lost() => {
                    notify::service_manager("STOPPING=1");
                    return Err(RunError::MountLost { dir: self.files.dir().into() });
                }
            };
            tracing::info!(signal = name, "stopping");
            notify::service_manager("STOPPING=1");
            Ok(())
        })
    }

    /// Returns when the device files cannot be served any more: a daemon without them is of no use, and whoever
    /// supervises it can start another one.
    async fn mount_lost(&self) {
        let mut look = tokio::time::interval(Duration::from_secs(1));
        while self.files.is_serving() {
            look.tick().await;
        }
    }

    /// Closes the control socket, then takes the devices from their clients and removes the mount.
    pub fn stop(self) {
        self.control.shutdown();
        self.bus.shutdown();
        self.files.shutdown();
        if let Err(error) = self.watchdog.wait() {
            tracing::warn!("the watchdog's end was not seen: {error}");
        }
    }
}

/// A text that does not describe a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceTextError {
    /// A word without an equals sign.
    #[error("\"{word}\" is not of the form name=value")]
    NotAPair {
        /// The word.
        word: String,
    },
    /// `name` or `mgmtdev` is missing.
    #[error("\"{key}\" is missing; name=NAME mgmtdev=MGMTDEV are needed")]
    Missing {
        /// Which of the two.
        key: &'static str,
    },
    /// An attribute occurs twice.
    #[error(transparent)]
    Attr(#[from] AttrError),
}

/// Reads a device from `name=NAME mgmtdev=MGMTDEV attribute=value ...`.
///
/// Words are separated by white space; a value that contains some can only be given over the control socket.
///
/// # Errors
/// [`DeviceTextError`].
pub fn parse_device(text: &str) -> Result<AddRequest, DeviceTextError> {
    let (mut name, mut mgmtdev) = (None, None);
    let mut attrs = Attrs::new();
    for word in text.split_whitespace() {
        let (key, value) =
            word.split_once('=').ok_or_else(|| DeviceTextError::NotAPair { word: word.into() })?;
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
    let needed = |slot: Option<String>, key| {
        slot.filter(|value| !value.is_empty()).ok_or(DeviceTextError::Missing { key })
    };
    Ok(AddRequest { name: needed(name, "name")?, mgmtdev: needed(mgmtdev, "mgmtdev")?, attrs })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_from_words() {
        let device = parse_device("name=d0  mgmtdev=blk path=/a=b direct=on").unwrap();
        assert_eq!((device.name.as_str(), device.mgmtdev.as_str()), ("d0", "blk"));
        assert_eq!(device.attrs.iter().collect::<Vec<_>>(), [("path", "/a=b"), ("direct", "on")]);
    }

    #[test]
    fn incomplete_devices_name_what_is_missing() {
        let text = |text| parse_device(text).unwrap_err().to_string();
        assert!(text("name=d0").starts_with("\"mgmtdev\" is missing"));
        assert!(text("name= mgmtdev=blk").starts_with("\"name\" is missing"));
        assert_eq!(text("name=d0 readonly"), "\"readonly\" is not of the form name=value");
        assert!(text("name=a name=b").contains("given twice"));
        assert!(text("name=a mgmtdev=b x=1 x=2").contains("given twice"));
    }
}
