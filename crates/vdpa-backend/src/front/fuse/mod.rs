//! Device files: in one flat directory, over single files, or as character devices.
//!
//! One thread reads the requests of all connections and answers what concerns names and attributes; it never calls a
//! device. What concerns an open device goes, in order, to that device's own thread. While a request is in progress the
//! reader looks again and again, and answers in place of a device that does not.

pub mod cuse;
mod device;
mod mount_point;
mod request_queue;
mod server;
mod session;
mod tree;

use std::fmt;
use std::fs;
use std::io::PipeWriter;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use tracing::{info, warn};
use vdpa_sys::fuse::{HandshakeError, MountError, MountOptions, Negotiated, mount, unmount, unmount_lazily};
use vdpa_sys::uapi::fuse::ROOT_ID;

pub use device::{DeviceFile, IoctlCall, IoctlReply, Opener, POLLIN, POLLOUT};
pub use mount_point::prepare_dir;
pub use tree::{AddError, FileAttributes};

use super::watchdog::protocol::{Message, WatchdogLink, Watched};
use server::Server;
use session::{Endpoint, Session};

/// Time for the kernel's first request on a new mount.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// How files are created and watched.
#[derive(Debug)]
pub struct Options {
    /// Let all users in; mode and owner of each file decide who may open it, checked by the kernel. Without it only
    /// the user who runs the daemon sees the directory.
    pub allow_other: bool,
    /// The source that `mount` shows; by default it names this process, so that a watchdog can tell its mount from
    /// that of a successor.
    pub fsname: String,
    /// How long a device may take for one request before the client gets `EIO`.
    pub request_timeout: Duration,
    /// Where the reader proves that it is alive: [`Watchdog::take_heartbeat`](super::watchdog::Watchdog::take_heartbeat).
    pub heartbeat: Option<PipeWriter>,
    /// How often, well below the watchdog's time-out.
    pub heartbeat_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            allow_other: true,
            fsname: source_of(std::process::id()),
            request_timeout: Duration::from_secs(30),
            heartbeat: None,
            heartbeat_interval: Duration::from_secs(1),
        }
    }
}

/// Why the files cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The directory cannot be created or looked at.
    #[error("cannot use {} as mount directory", dir.display())]
    Directory {
        /// Which.
        dir: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Another daemon is there.
    #[error(
        "{} is served by another vdpad; stop that one or choose another directory", dir.display()
    )]
    Served {
        /// Which.
        dir: PathBuf,
    },
    /// Another daemon is there and does not answer.
    #[error(
        "{} is served by a vdpad that does not answer; end that process, or: umount -f {}", dir.display(), dir.display()
    )]
    Hung {
        /// Which.
        dir: PathBuf,
    },
    /// Mounting failed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The kernel and we do not understand each other.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The directory is not one for character devices.
    #[error("{} is not below /dev, where character devices are; choose such a directory or the front end \"fuse\"", dir.display())]
    NotDev {
        /// Which.
        dir: PathBuf,
    },
    /// A thread or descriptor is missing.
    #[error("cannot start serving {}", dir.display())]
    Start {
        /// Which.
        dir: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
}

/// The source of the mount that the process `pid` serves.
#[must_use]
pub fn source_of(pid: u32) -> String {
    format!("vdpad-{pid}")
}

/// Where files appear that are given no path of their own.
#[derive(Debug)]
enum FileRoot {
    /// A mount.
    Mount { directory: Arc<Session>, negotiated: Negotiated },
    /// `/dev`, as character devices.
    Dev(cuse::NodeFactory),
}

/// The device files of a daemon. Dropping it is [`DeviceFiles::shutdown`].
pub struct DeviceFiles {
    dir: PathBuf,
    root: FileRoot,
    options: MountOptions,
    server: Arc<Server>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

impl DeviceFiles {
    /// Mounts at `dir` and begins to serve. Creates `dir` when it is missing and removes what a daemon that died
    /// left mounted there.
    ///
    /// # Errors
    /// [`ServeError`]; nothing is left mounted then.
    pub fn mount(dir: &Path, options: Options) -> Result<Arc<Self>, ServeError> {
        let dir = prepare_dir(dir)?;
        let mount_options = options.mount();
        let server = new_server(&dir, options)?;
        let watched = Watched::Mount(dir.clone());
        server.watchdog.send(&Message::Watch(watched));
        let connection = mount(&dir, &mount_options)?;
        let mut guard = UnmountOnDrop(Some(dir.clone()));
        let negotiated = connection.handshake(HANDSHAKE_TIMEOUT)?;
        let directory = Session::directory(connection, dir.clone());
        server.attach(Arc::clone(&directory));
        let reader = start(&server, &dir)?;
        guard.0 = None;
        info!(dir = %dir.display(), flags = format_args!("{:#x}", negotiated.flags), "serving device files");
        let root = FileRoot::Mount { directory, negotiated };
        Ok(Arc::new(Self { dir, root, options: mount_options, server, reader: Mutex::new(Some(reader)) }))
    }

    /// Begins to serve character devices in `dir`, which is `/dev` or a directory below it.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn cuse(dir: &Path, options: Options) -> Result<Arc<Self>, ServeError> {
        let prefix = cuse::prefix_of(dir).ok_or_else(|| ServeError::NotDev { dir: dir.into() })?;
        let mount_options = options.mount();
        let server = new_server(dir, options)?;
        let reader = start(&server, dir)?;
        info!(dir = %dir.display(), "serving device files as character devices");
        let root = FileRoot::Dev(cuse::NodeFactory::new(prefix));
        let dir = dir.components().collect();
        Ok(Arc::new(Self { dir, root, options: mount_options, server, reader: Mutex::new(Some(reader)) }))
    }

    /// Adds a device file, mode 0600, owned by the daemon's user; a character device gets what udev's rules say.
    /// Returns where it is.
    ///
    /// # Errors
    /// [`AddError`].
    pub fn add(&self, name: &str, file: Arc<dyn DeviceFile>) -> Result<PathBuf, AddError> {
        match &self.root {
            FileRoot::Mount { directory, .. } => directory.add(name, file, FileAttributes::private())?,
            FileRoot::Dev(factory) => {
                let session = factory.create(name, file)?;
                self.server.watchdog.send(&Message::Watch(session.place.watched()));
                self.server.attach(session);
            }
        }
        Ok(self.dir.join(name))
    }

    /// Adds a device file with attributes of its own, such as those saved before a restart.
    ///
    /// # Errors
    /// [`AddError`].
    pub fn add_with(
        &self,
        name: &str,
        file: Arc<dyn DeviceFile>,
        attributes: FileAttributes,
    ) -> Result<PathBuf, AddError> {
        if let FileRoot::Mount { directory, .. } = &self.root {
            directory.add(name, file, attributes)?;
            return Ok(self.dir.join(name));
        }
        let path = self.add(name, file)?;
        let set = fs::set_permissions(&path, fs::Permissions::from_mode(attributes.mode))
            .and_then(|()| std::os::unix::fs::chown(&path, Some(attributes.uid), Some(attributes.gid)));
        set.map_err(|error| {
            self.remove(name);
            AddError::Create { reason: format!("cannot set the attributes of {}: {error}", path.display()) }
        })?;
        Ok(path)
    }

    /// Adds a device file called `name` that is mounted over the file `path`. Without a file there, an empty one is created,
    /// and removed in the end.
    ///
    /// # Errors
    /// [`AddError`].
    pub fn add_at(&self, path: &Path, name: &str, file: Arc<dyn DeviceFile>) -> Result<PathBuf, AddError> {
        let failed = |reason: String| AddError::Create { reason };
        let (path, created) = mount_point::prepare_file(path).map_err(failed)?;
        let place = Endpoint::File { path: path.clone(), created };
        self.server.watchdog.send(&Message::Watch(place.watched()));
        let options = MountOptions { rootmode: mount_point::FILE_MODE, ..self.options.clone() };
        let mounted = mount(&path, &options).map_err(|error| error.to_string()).and_then(|connection| {
            let mut guard = UnmountOnDrop(Some(path.clone()));
            connection.handshake(HANDSHAKE_TIMEOUT).map_err(|error| error.to_string())?;
            guard.0 = None;
            Ok(connection)
        });
        let connection = mounted.map_err(|reason| {
            self.server.watchdog.send(&Message::Unwatch(place.watched()));
            mount_point::remove_placeholder(&path, created);
            failed(reason)
        })?;
        self.server.attach(Session::one_file(connection, place, ROOT_ID, name, file));
        info!(path = %path.display(), "serving a device file");
        Ok(path)
    }

    /// Takes a file away; new opens give `ENOENT` from now on, also when it is open. Those who have
    /// it open keep it until they close it. Whether there was such a file.
    pub fn remove(&self, name: &str) -> bool {
        if let FileRoot::Mount { directory, .. } = &self.root
            && directory.remove(name)
        {
            return true;
        }
        let session = self.server.sessions().into_iter().find(|session| session.remove(name));
        let Some(session) = session else { return false };
        session.close_when_idle();
        match session.place.clone() {
            Endpoint::File { path, created } => {
                unmount_logged(unmount_lazily(&path));
                mount_point::remove_placeholder(&path, created);
                self.server.watchdog.send(&Message::Unwatch(Watched::Mount(path)));
            }
            Endpoint::Device(node) if session.is_idle() => {
                self.server.detach(&session);
                drop(session);
                node.wait_gone();
            }
            // Its connection is needed until it is closed, and the device lasts as long as that.
            Endpoint::Device(node) => node.hide(),
            Endpoint::Directory(_) => {}
        }
        true
    }

    /// Attributes of a file as `chmod` and `chown` left them.
    #[must_use]
    pub fn attributes(&self, name: &str) -> Option<FileAttributes> {
        match &self.root {
            FileRoot::Mount { directory, .. } => directory.attributes(name),
            FileRoot::Dev(_) => {
                let meta = fs::symlink_metadata(self.dir.join(name)).ok()?;
                Some(FileAttributes { mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid() })
            }
        }
    }

    /// Where files appear that are given no path of their own: absolute, without symbolic links.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Name of the front end: `fuse` or `cuse`.
    #[must_use]
    pub const fn front(&self) -> &'static str {
        match self.root {
            FileRoot::Mount { .. } => "fuse",
            FileRoot::Dev(_) => "cuse",
        }
    }

    /// What INIT of the mount agreed on; `None` for character devices.
    #[must_use]
    pub const fn negotiated(&self) -> Option<Negotiated> {
        match self.root {
            FileRoot::Mount { negotiated, .. } => Some(negotiated),
            FileRoot::Dev(_) => None,
        }
    }

    /// Whether requests are served. False after a shutdown and after the mount, or a character device, was ended from
    /// outside (`umount`, or the watchdog); devices that were open have been released then.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        !self.server.has_ended()
    }

    /// Returns when requests are not [served](Self::is_serving) any more. Costs nothing until then.
    pub async fn ended(&self) {
        self.server.ended().await;
    }

    /// Ends all mounts and devices and waits for the threads. Clients get `ECONNABORTED` or `ENOTCONN`; each open device
    /// is released. A device that hangs is waited for no longer than the request time-out. Idempotent.
    pub fn shutdown(&self) {
        let mut reader = self.reader.lock();
        let Some(thread) = reader.take() else { return };
        let lost = self.server.has_ended();
        let mut places: Vec<_> = self
            .server
            .sessions()
            .iter()
            .map(|session| {
                session.close_when_idle();
                session.place.clone()
            })
            .collect();
        if lost && let FileRoot::Mount { directory, .. } = &self.root {
            places.push(directory.place.clone());
        }
        for place in &places {
            match place {
                // Ended from outside: the place may belong to somebody else by now, unless it is a dead mount.
                Endpoint::Directory(path) if lost && !mount_point::is_stale(path) => {}
                Endpoint::Directory(path) => unmount_logged(unmount(path)),
                Endpoint::File { path, created } => {
                    unmount_logged(unmount(path));
                    mount_point::remove_placeholder(path, *created);
                }
                Endpoint::Device(_) => {}
            }
        }
        self.server.end();
        if thread.join().is_err() {
            warn!(dir = %self.dir.display(), "the FUSE reader had panicked");
        }
        self.server.close();
        self.server.watchdog.send(&Message::Shutdown);
        info!(dir = %self.dir.display(), "no longer serving device files");
    }
}

impl Drop for DeviceFiles {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl fmt::Debug for DeviceFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceFiles")
            .field("dir", &self.dir)
            .field("serving", &self.is_serving())
            .finish_non_exhaustive()
    }
}

impl Options {
    fn mount(&self) -> MountOptions {
        MountOptions { allow_other: self.allow_other, fsname: self.fsname.clone(), ..MountOptions::default() }
    }
}

fn new_server(dir: &Path, options: Options) -> Result<Arc<Server>, ServeError> {
    let failed = |source| ServeError::Start { dir: dir.into(), source };
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let wake = wake.map_err(|error| failed(error.into()))?;
    let watchdog = WatchdogLink::new(options.heartbeat, options.heartbeat_interval).map_err(failed)?;
    Ok(Server::new(wake, options.request_timeout, watchdog))
}

fn start(server: &Arc<Server>, dir: &Path) -> Result<JoinHandle<()>, ServeError> {
    server.spawn_reader().map_err(|source| {
        server.end();
        ServeError::Start { dir: dir.into(), source }
    })
}

/// Removes a mount that could not be taken into service.
struct UnmountOnDrop(Option<PathBuf>);

impl Drop for UnmountOnDrop {
    fn drop(&mut self) {
        if let Some(dir) = &self.0 {
            unmount_logged(unmount(dir));
        }
    }
}

fn unmount_logged(outcome: Result<(), MountError>) {
    if let Err(error) = outcome {
        warn!(%error, "the mount could not be removed");
    }
}

/// Whether a moment lies `span` or more in the past.
fn is_past(moment: Instant, span: Duration) -> bool {
    moment.elapsed() >= span
}
