//! Device files in one flat directory, served by FUSE.
//!
//! One thread reads requests and answers what concerns names and attributes; it never calls a device. What
//! concerns an open device goes, in order, to that device's own thread. A third thread answers in place of a
//! device that does not.

mod device;
mod lane;
mod serve;
mod tree;

use std::fmt;
use std::fs;
use std::io::PipeWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno as OsErrno;
use tracing::{info, warn};
use vdpa_sys::fuse::{
    FS_TYPE, HandshakeError, MountError, MountOptions, Negotiated, fs_type_at, mount, unmount,
};

pub use device::{DeviceFile, IoctlCall, IoctlReply, POLLIN, POLLOUT};
pub use tree::{AddError, FileAttributes};

use serve::Server;

/// How the mount is made and watched.
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

/// Why the directory could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The directory cannot be made or looked at.
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

/// A mount that serves device files. Dropping it is [`FuseFs::shutdown`].
pub struct FuseFs {
    dir: PathBuf,
    server: Arc<Server>,
    negotiated: Negotiated,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl FuseFs {
    /// Mounts at `dir` and begins to serve. Creates `dir` when it is missing and removes what a daemon that died
    /// left mounted there.
    ///
    /// # Errors
    /// [`ServeError`]; nothing is left mounted then.
    pub fn mount(dir: &Path, options: Options) -> Result<Arc<Self>, ServeError> {
        const HANDSHAKE: Duration = Duration::from_secs(5);
        let dir = prepare_dir(dir)?;
        let mount_options = MountOptions {
            allow_other: options.allow_other,
            fsname: options.fsname.clone(),
            ..MountOptions::default()
        };
        let connection = mount(&dir, &mount_options)?;
        let mut guard = Unmount(Some(dir.clone()));
        let negotiated = connection.handshake(HANDSHAKE)?;
        let start = |source: std::io::Error| ServeError::Start { dir: dir.clone(), source };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| start(error.into()))?;
        let server = Server::new(connection, wake, options.request_timeout);
        let mut threads = Vec::new();
        threads.push(server.spawn_watch().map_err(start)?);
        match server.spawn_reader(options.heartbeat, options.heartbeat_interval) {
            Ok(reader) => threads.push(reader),
            Err(error) => {
                server.end();
                return Err(start(error));
            }
        }
        guard.0 = None;
        info!(dir = %dir.display(), flags = format_args!("{:#x}", negotiated.flags), "serving device files");
        Ok(Arc::new(Self { dir, server, negotiated, threads: Mutex::new(threads) }))
    }

    /// Adds a device file, mode 0600, owned by the daemon's user.
    ///
    /// # Errors
    /// [`AddError`].
    pub fn add(&self, name: &str, file: Arc<dyn DeviceFile>) -> Result<(), AddError> {
        self.add_with(name, file, FileAttributes::private())
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
    ) -> Result<(), AddError> {
        self.server.add(name, file, attributes)
    }

    /// Takes a file out of the directory; new opens give `ENOENT` from now on, also when it is open. Those who have
    /// it open keep it until they close it. Whether there was such a file.
    pub fn remove(&self, name: &str) -> bool {
        self.server.remove(name)
    }

    /// Attributes of a file as `chmod` and `chown` left them.
    #[must_use]
    pub fn attributes(&self, name: &str) -> Option<FileAttributes> {
        self.server.attributes(name)
    }

    /// Where the mount is: absolute, without symbolic links.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What INIT agreed on.
    #[must_use]
    pub const fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// Whether requests are served. False after a shutdown and after the mount was ended from outside (`umount`, or
    /// the watchdog); devices that were open have been released then.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        !self.server.has_ended()
    }

    /// Ends the mount and waits for the threads. Clients get `ECONNABORTED` or `ENOTCONN`; each open device is
    /// released. A device that hangs is waited for no longer than the request time-out. Idempotent.
    pub fn shutdown(&self) {
        let mut threads = self.threads.lock();
        if threads.is_empty() {
            return;
        }
        if self.server.has_ended() {
            // Ended from outside: the place may belong to somebody else by now, unless it is a dead mount.
            if is_stale(&self.dir) {
                unmount_logged(&self.dir);
            }
        } else {
            unmount_logged(&self.dir);
        }
        self.server.end();
        for thread in threads.drain(..) {
            if thread.join().is_err() {
                warn!(dir = %self.dir.display(), "a FUSE thread had panicked");
            }
        }
        self.server.wait_lanes();
        info!(dir = %self.dir.display(), "no longer serving device files");
    }
}

impl Drop for FuseFs {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl fmt::Debug for FuseFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FuseFs")
            .field("dir", &self.dir)
            .field("serving", &self.is_serving())
            .finish_non_exhaustive()
    }
}

/// Removes a mount that could not be taken into service.
struct Unmount(Option<PathBuf>);

impl Drop for Unmount {
    fn drop(&mut self) {
        if let Some(dir) = &self.0 {
            unmount_logged(dir);
        }
    }
}

fn unmount_logged(dir: &Path) {
    if let Err(error) = unmount(dir) {
        warn!(%error, "the mount could not be removed");
    }
}

/// Makes `dir` ready to be mounted on and returns its true path: creates it when it is missing and removes what a
/// daemon that died left mounted there. [`FuseFs::mount`] does this too; separately it serves those who need the
/// true path before.
///
/// # Errors
/// [`ServeError::Served`], [`ServeError::Hung`], [`ServeError::Directory`] and [`ServeError::Mount`].
pub fn prepare_dir(dir: &Path) -> Result<PathBuf, ServeError> {
    let failed = |source: std::io::Error| {
        // Of something that is no directory, making it says that it exists.
        let exists = source.kind() == std::io::ErrorKind::AlreadyExists;
        let source = if exists { OsErrno::NOTDIR.into() } else { source };
        ServeError::Directory { dir: dir.into(), source }
    };
    let absolute = std::path::absolute(dir).map_err(failed)?;
    // Only the parent is resolved at first: a dead or hanging mount must not be touched.
    let target = match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => {
            fs::create_dir_all(parent).map_err(failed)?;
            fs::canonicalize(parent).map_err(failed)?.join(name)
        }
        _ => absolute,
    };
    if fs_type_at(&target)?.as_deref() == Some(FS_TYPE) {
        clear(&target)?;
    }
    fs::create_dir_all(&target).map_err(failed)?;
    fs::canonicalize(&target).map_err(failed)
}

/// Removes a dead mount of ours.
fn clear(target: &Path) -> Result<(), ServeError> {
    match ask(target) {
        Some(Err(OsErrno::NOTCONN | OsErrno::CONNABORTED)) => {
            info!(dir = %target.display(), "removing the mount of a daemon that is gone");
            match unmount(target) {
                // Its watchdog may have been faster.
                Err(_) if fs_type_at(target)?.as_deref() != Some(FS_TYPE) => Ok(()),
                other => Ok(other?),
            }
        }
        Some(_) => Err(ServeError::Served { dir: target.into() }),
        None => Err(ServeError::Hung { dir: target.into() }),
    }
}

fn is_stale(dir: &Path) -> bool {
    fs_type_at(dir).is_ok_and(|kind| kind.as_deref() == Some(FS_TYPE))
        && matches!(ask(dir), Some(Err(OsErrno::NOTCONN | OsErrno::CONNABORTED)))
}

/// Asks the server of a mount for a sign of life; `None` when there is no answer. The question may block for ever,
/// so it is asked by a thread that is left behind then.
fn ask(dir: &Path) -> Option<Result<(), OsErrno>> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let (send, receive) = mpsc::channel();
    let path = dir.to_path_buf();
    let asker = thread::Builder::new().name("mount-probe".into()).spawn(move || {
        // The other side may have stopped waiting.
        let _ = send.send(rustix::fs::statfs(&path).map(drop));
    });
    asker.ok()?;
    receive.recv_timeout(PATIENCE).ok()
}

/// Whether a moment lies `span` or more in the past.
fn is_past(moment: Instant, span: Duration) -> bool {
    moment.elapsed() >= span
}
