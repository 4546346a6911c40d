//! [`Service`]: device files, worker threads and devices of a program that does nothing else.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};
use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::parent::{Parent, Profile};
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::process::Spaces;

use crate::device::{RequestHandler, SimpleDevice};
use crate::front::fuse::{AddError, DeviceFiles, Options, ServeError};
use crate::front::vhost::{AnyParent, SharedDevice, VhostVdpaFile};
use crate::worker::{Placement, WorkerPool};

/// Device files in one directory, and the worker threads of their devices. Dropping it ends the mount.
///
/// A program with needs of its own, such as a watchdog process, files at any path, or character devices, puts the same
/// parts together itself: [`DeviceFiles`], [`WorkerPool`] and [`VhostVdpaFile`].
pub struct Service {
    // Before the pool: devices are gone when their threads end.
    files: Arc<DeviceFiles>,
    pool: WorkerPool,
    spaces: Spaces,
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// The directory cannot be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The device's file cannot be made.
    #[error("cannot add the file of device {name}")]
    Add {
        /// Name of the device.
        name: String,
        /// The reason.
        source: AddError,
    },
    /// The device has no worker thread. `ENOSYS` or `EPERM`: the kernel does not let this process use io_uring.
    #[error("cannot start device {name}")]
    Start {
        /// Name of the device.
        name: String,
        /// The reason.
        source: Errno,
    },
    /// Signals cannot be waited for.
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
    /// The mount was ended from outside.
    #[error("the device files in {} were ended from outside", dir.display())]
    Ended {
        /// Where they were.
        dir: PathBuf,
    },
}

impl Service {
    /// Mounts at `dir` and begins to serve. Creates `dir` when it is missing and removes the mount of a program that died
    /// there. Needs `/dev/fuse` and the right to mount (`CAP_SYS_ADMIN`); blocks until the kernel has answered.
    ///
    /// # Errors
    /// [`ServiceError::Serve`]; nothing is left mounted then.
    pub fn mount(dir: &Path) -> Result<Self, ServiceError> {
        let files = DeviceFiles::mount(dir, Options::default())?;
        // One thread for each processor at most; each is started when it is needed.
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { files, pool: WorkerPool::new(threads, Duration::ZERO), spaces: Spaces::default() })
    }

    /// Serves a device that answers each request at once. Returns the path of its file. `config` is its configuration
    /// space.
    ///
    /// # Errors
    /// [`ServiceError::Start`] and [`ServiceError::Add`].
    pub fn add(
        &self,
        name: &str,
        profile: Profile,
        config: &[u8],
        handler: impl RequestHandler,
    ) -> Result<PathBuf, ServiceError> {
        let device = SimpleDevice::new(name, profile, config, handler, &self.pool, &Placement::default());
        self.add_parent(name, device.map_err(|source| ServiceError::Start { name: name.into(), source })?)
    }

    /// Serves any device. Returns the path of its file.
    ///
    /// # Errors
    /// [`ServiceError::Add`].
    pub fn add_parent(
        &self,
        name: &str,
        parent: impl Parent<Host = LinuxHost> + 'static,
    ) -> Result<PathBuf, ServiceError> {
        let parent: AnyParent = Box::new(parent);
        let device: SharedDevice = Arc::new(Mutex::new(Device::new(parent)));
        let file = VhostVdpaFile::new(name.into(), device, self.spaces.clone());
        let added = self.files.add(name, Arc::new(file));
        added.map_err(|source| ServiceError::Add { name: name.into(), source })
    }

    /// The threads that serve rings, for devices that are made apart from [`add`](Self::add).
    #[must_use]
    pub const fn pool(&self) -> &WorkerPool {
        &self.pool
    }

    /// Blocks until SIGTERM or SIGINT, then ends the mount.
    ///
    /// # Errors
    /// [`ServiceError::Signals`], and [`ServiceError::Ended`] when the mount was ended by somebody else.
    pub fn run(self) -> Result<(), ServiceError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ServiceError::Signals)?;
        let outcome = runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate()).map_err(ServiceError::Signals)?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(ServiceError::Signals)?;
            tokio::select! {
                _ = terminate.recv() => Ok(()),
                _ = interrupt.recv() => Ok(()),
                () = self.files.ended() => Err(ServiceError::Ended { dir: self.files.dir().into() }),
            }
        });
        self.files.shutdown();
        outcome
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("files", &self.files)
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}
