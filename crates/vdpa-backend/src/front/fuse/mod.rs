//! [`DeviceFiles`]: device files in one flat directory, over single files, or as character devices.
//!
//! A device implements [`DeviceFile`]; [`VhostVdpaFile`](super::vhost::VhostVdpaFile) does for vhost-vdpa. One thread, the
//! reader, reads the FUSE requests of all connections and answers those about names and attributes; it never calls a device.
//! Each open device has a thread of its own, which handles the device's requests in order. While a request is in progress the
//! reader checks its duration periodically, and replies `EIO` in place of a device that exceeds
//! [`Options::request_timeout`].

mod adopt;
mod attributes;
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
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use tracing::{info, warn};
use vdpa_sys::fuse::{HandshakeError, MountError, MountOptions, Negotiated, mount, unmount, unmount_lazily};
use vdpa_sys::uapi::fuse::ROOT_ID;

pub use adopt::{OwnConnection, Place};
pub use attributes::{FileAttributes, SavedAttributes};
pub use device::{Completed, DeviceFile, IoctlCall, IoctlReply, Opener, POLLIN, POLLOUT};
pub use mount_point::{MountState, mount_state, prepare_dir};
pub use tree::AddError;

use super::watchdog::protocol::{Message, WatchdogLink, Watched};
use server::Server;
use session::{Endpoint, Link, Session};

/// Time for the kernel's first request on a new mount.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// How [`DeviceFiles`] mounts, and how it is watched.
#[derive(Debug)]
pub struct Options {
    /// Mount option `allow_other`: all users can access the files, and mode and owner of each file, which the kernel checks,
    /// decide who may open it. With `false` only the user who runs this process can access the directory. Default: `true`.
    pub allow_other: bool,
    /// The source of the mount, as in `/proc/mounts`. Default: [`source_of`] this process, by which a watchdog tells the
    /// mount of its server from that of another one.
    pub fsname: String,
    /// How long a device may take for one request before the client gets `EIO`. Default: 30 s.
    pub request_timeout: Duration,
    /// The pipe to a watchdog process, from [`Watchdog::take_heartbeat`](super::watchdog::Watchdog::take_heartbeat). Default:
    /// `None`, for no watchdog.
    pub heartbeat: Option<PipeWriter>,
    /// Time between two heartbeats, well below the watchdog's time-out. Default: 1 s.
    pub heartbeat_interval: Duration,
    /// Whether the kernel is asked to send the requests of a process that has died again, where it can. With `false` they are
    /// [kept](DeviceFiles::keep_requests) everywhere. Default: `true`.
    pub resend: bool,
    /// Whether the mount of the directory is removed when it is served no more. With `false` another process does that, which has
    /// made it ([`adopt`](DeviceFiles::adopt)), and its clients wait until then. Default: `true`.
    pub unmount: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            allow_other: true,
            fsname: source_of(std::process::id()),
            request_timeout: Duration::from_secs(30),
            heartbeat: None,
            heartbeat_interval: Duration::from_secs(1),
            resend: true,
            unmount: true,
        }
    }
}

/// Why device files cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The directory cannot be created or resolved.
    #[error("cannot use {} as mount directory", dir.display())]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Another server has mounted at the directory, and answers.
    #[error(
        "{} is served by another vdpad; stop that one or choose another directory", dir.display()
    )]
    Served {
        /// The directory.
        dir: PathBuf,
    },
    /// Another server has mounted at the directory, and does not answer within 2 s.
    #[error(
        "{} is served by a vdpad that does not answer; end that process, or: umount -f {}", dir.display(), dir.display()
    )]
    Hung {
        /// The directory.
        dir: PathBuf,
    },
    /// `/dev/fuse` cannot be opened, or `mount(2)` failed: `EPERM` without `CAP_SYS_ADMIN`.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The kernel did not send INIT within 5 s, or lacks a feature that is required.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// Character devices can be created below `/dev` only.
    #[error("{} is not below /dev, where character devices are; choose such a directory or the front end \"fuse\"", dir.display())]
    NotDev {
        /// The directory.
        dir: PathBuf,
    },
    /// A thread (`EAGAIN`) or descriptor (`EMFILE`) cannot be created.
    #[error("cannot start serving {}", dir.display())]
    Start {
        /// The directory.
        dir: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
}

/// The default source of the mounts that process `pid` serves: `vdpad-PID`.
#[must_use]
pub fn source_of(pid: u32) -> String {
    format!("vdpad-{pid}")
}

/// Where device files are created that have no path of their own.
#[derive(Debug)]
enum FileRoot {
    /// In the directory of a mount.
    Mount { directory: Arc<Session>, negotiated: Negotiated },
    /// Below `/dev`, as character devices.
    Dev(cuse::NodeFactory),
}

/// The device files of a server program. Dropping it is [`DeviceFiles::shutdown`].
///
/// Any thread may call it, except from inside a [`DeviceFile`] method. Methods that add or remove files block while the kernel
/// mounts, unmounts, or creates a character device.
///
/// ```no_run
/// use std::path::Path;
/// use std::sync::Arc;
/// use vdpa_backend::front::fuse::{DeviceFile, DeviceFiles, Options};
///
/// fn serve(dir: &Path, device: impl DeviceFile + 'static) -> Result<(), Box<dyn std::error::Error>> {
///     let files = DeviceFiles::mount(dir, Options::default())?;
///     let path = files.add("vdpa0", Arc::new(device))?;
///     println!("serving {}", path.display());
///     // Until the mount is ended from outside, or the program calls `shutdown`.
///     while files.is_serving() {
///         std::thread::sleep(std::time::Duration::from_secs(1));
///     }
///     Ok(())
/// }
/// ```
pub struct DeviceFiles {
    dir: PathBuf,
    root: FileRoot,
    options: MountOptions,
    unmounts: bool,
    server: Arc<Server>,
    reader: Mutex<Option<JoinHandle<()>>>,
    /// Number of this process among those that serve the files one after the other; 0 if there is no successor.
    generation: AtomicU64,
}

impl DeviceFiles {
    /// Mounts at `dir` and starts the reader thread. Creates `dir` when it is missing and removes the mount that a dead server
    /// has left there. Needs `/dev/fuse` and `CAP_SYS_ADMIN`. Blocks until the kernel's INIT request, at most 5 s.
    ///
    /// # Errors
    /// Each [`ServeError`] but [`NotDev`](ServeError::NotDev); nothing is left mounted then.
    pub fn mount(dir: &Path, options: Options) -> Result<Arc<Self>, ServeError> {
        let dir = prepare_dir(dir)?;
        let mount_options = (options.mount(), options.unmount);
        let server = new_server(&dir, options)?;
        let watched = Watched::Mount(dir.clone());
        server.watchdog.send(&Message::Watch(watched));
        let connection = mount(&dir, &mount_options.0)?;
        let mut guard = UnmountOnDrop(Some(dir.clone()));
        let negotiated = connection.handshake(HANDSHAKE_TIMEOUT)?;
        let directory = Session::directory(connection, dir.clone(), negotiated);
        server.attach(Arc::clone(&directory));
        let reader = start(&server, &dir)?;
        guard.0 = None;
        info!(dir = %dir.display(), flags = format_args!("{:#x}", negotiated.flags), "serving device files");
        let root = FileRoot::Mount { directory, negotiated };
        Ok(Self::assemble((dir, root), mount_options, server, Some(reader)))
    }

    fn assemble(
        (dir, root): (PathBuf, FileRoot),
        (options, unmounts): (MountOptions, bool),
        server: Arc<Server>,
        reader: Option<JoinHandle<()>>,
    ) -> Arc<Self> {
        let (reader, generation) = (Mutex::new(reader), AtomicU64::new(0));
        Arc::new(Self { dir, root, options, unmounts, server, reader, generation })
    }

    /// Starts the reader thread for character devices in `dir`, which is `/dev` or a directory below it. Check
    /// [`cuse::available`] first: without CUSE, [`add`](Self::add) fails.
    ///
    /// # Errors
    /// [`ServeError::NotDev`] and [`ServeError::Start`].
    pub fn cuse(dir: &Path, options: Options) -> Result<Arc<Self>, ServeError> {
        let prefix = cuse::prefix_of(dir).ok_or_else(|| ServeError::NotDev { dir: dir.into() })?;
        let mount_options = (options.mount(), options.unmount);
        let server = new_server(dir, options)?;
        let reader = start(&server, dir)?;
        info!(dir = %dir.display(), "serving device files as character devices");
        let root = FileRoot::Dev(cuse::NodeFactory::new(prefix));
        let dir = dir.components().collect();
        Ok(Self::assemble((dir, root), mount_options, server, Some(reader)))
    }

    /// Adds the device file `name` and returns its path. Its mode is 0600 and its owner this process's user; a character device
    /// gets what udev's rules say. Clients can open it as soon as this returns.
    ///
    /// # Errors
    /// [`AddError`]; there is no file then.
    pub fn add(&self, name: &str, file: Arc<dyn DeviceFile>) -> Result<PathBuf, AddError> {
        match &self.root {
            FileRoot::Mount { directory, .. } => directory.add(name, file, FileAttributes::private())?,
            FileRoot::Dev(factory) => {
                let session = factory.create(name, file)?;
                self.server.watchdog.send(&Message::Watch(session.endpoint.watched()));
                self.attach(session);
            }
        }
        Ok(self.dir.join(name))
    }

    /// As [`add`](Self::add), with other attributes, such as those saved before a restart.
    ///
    /// # Errors
    /// As [`add`](Self::add), and [`AddError::Create`] when the attributes of a character device cannot be set.
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

    /// Adds a device file called `name` by a mount over the regular file `path`, and returns that path without symbolic links.
    /// When there is no file, it creates an empty one, and removes it when the device file is removed.
    ///
    /// # Errors
    /// [`AddError::Create`]; nothing is left mounted then.
    pub fn add_at(&self, path: &Path, name: &str, file: Arc<dyn DeviceFile>) -> Result<PathBuf, AddError> {
        let failed = |reason: String| AddError::Create { reason };
        let (path, created) = mount_point::prepare_file(path).map_err(failed)?;
        let endpoint = Endpoint::File { path: path.clone(), created };
        self.server.watchdog.send(&Message::Watch(endpoint.watched()));
        let options = MountOptions { rootmode: mount_point::FILE_MODE, ..self.options.clone() };
        let mounted = mount(&path, &options).map_err(|error| error.to_string()).and_then(|connection| {
            let mut guard = UnmountOnDrop(Some(path.clone()));
            let negotiated = connection.handshake(HANDSHAKE_TIMEOUT).map_err(|error| error.to_string())?;
            guard.0 = None;
            Ok((connection, negotiated))
        });
        let (connection, negotiated) = mounted.map_err(|reason| {
            self.server.watchdog.send(&Message::Unwatch(endpoint.watched()));
            mount_point::remove_placeholder(&path, created);
            failed(reason)
        })?;
        self.attach(Session::one_file(Link { connection, endpoint, negotiated }, ROOT_ID, name, file));
        info!(path = %path.display(), "serving a device file");
        Ok(path)
    }

    fn attach(&self, session: Arc<Session>) {
        match self.generation.load(Ordering::Acquire) {
            0 => {}
            generation => session.outlive(generation),
        }
        self.server.attach(session);
    }

    /// Removes a device file; `false` when there is no file of that name. Later opens fail with `ENOENT`. Clients that have the
    /// file open can use it until they close it. Blocks at most 2 s, for a character device that is not open.
    pub fn remove(&self, name: &str) -> bool {
        if let FileRoot::Mount { directory, .. } = &self.root
            && directory.remove(name)
        {
            return true;
        }
        let session = self.server.sessions().into_iter().find(|session| session.remove(name));
        let Some(session) = session else { return false };
        session.set_closing();
        match session.endpoint.clone() {
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
            // The device and its connection must last until the last client closes it.
            Endpoint::Device(node) => node.hide(),
            Endpoint::Directory(_) => {}
        }
        true
    }

    /// The present attributes of a file in the directory, after any `chmod` and `chown`; `None` for other files.
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

    /// The directory of files that were added without a path of their own: absolute, and without symbolic links if mounted.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Name of the front end for files in the directory: `fuse` or `cuse`.
    #[must_use]
    pub const fn front(&self) -> &'static str {
        match self.root {
            FileRoot::Mount { .. } => "fuse",
            FileRoot::Dev(_) => "cuse",
        }
    }

    /// What was negotiated by INIT for the mount of the directory (fuse.h `struct fuse_init_out`); `None` for character
    /// devices.
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

    /// Completes when requests are not [served](Self::is_serving) any more. Any async runtime can poll it.
    pub async fn ended(&self) {
        self.server.ended().await;
    }

    /// Ends all mounts and devices, but for a mount of [somebody else](Options::unmount), and waits for their threads, for devices that hang no longer than the request time-out.
    /// Clients get `ECONNABORTED` or `ENOTCONN`, and [`DeviceFile::release`] is called for each open. Idempotent.
    pub fn shutdown(&self) {
        let mut reader = self.reader.lock();
        let Some(thread) = reader.take() else { return };
        let lost = self.server.has_ended();
        let mut endpoints: Vec<_> = self
            .server
            .sessions()
            .iter()
            .map(|session| {
                session.set_closing();
                session.endpoint.clone()
            })
            .collect();
        if lost && let FileRoot::Mount { directory, .. } = &self.root {
            endpoints.push(directory.endpoint.clone());
        }
        for endpoint in &endpoints {
            match endpoint {
                // The mount was ended from outside: another server may have mounted there, unless the mount is dead.
                Endpoint::Directory(_) if !self.unmounts => {}
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
    Ok(Server::new(wake, options.request_timeout, watchdog, options.resend))
}

fn start(server: &Arc<Server>, dir: &Path) -> Result<JoinHandle<()>, ServeError> {
    server.spawn_reader().map_err(|source| {
        server.end();
        ServeError::Start { dir: dir.into(), source }
    })
}

/// Removes a mount when an error occurs before it is served.
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

/// Whether `span` or more has passed since `moment`.
fn is_past(moment: Instant, span: Duration) -> bool {
    moment.elapsed() >= span
}
