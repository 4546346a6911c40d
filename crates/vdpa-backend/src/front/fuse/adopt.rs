//! A mount that an earlier process has served, or that a later one will serve.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tracing::{info, warn};
use vdpa_core::Errno;
use vdpa_sys::fuse::{Connection, Negotiated};

use super::session::Session;
use super::{
    AddError, DeviceFile, DeviceFiles, FileAttributes, FileRoot, Options, ServeError, new_server, start,
};

impl DeviceFiles {
    /// Continues to serve a mount at `dir` that an earlier process had mounted and died or handed over: `connection` is its
    /// `/dev/fuse` descriptor, `negotiated` what INIT had agreed on, and `generation` a number that no process before had.
    ///
    /// Nothing is served before [`resume`](Self::resume): first every device is [restored](Self::restore).
    ///
    /// # Errors
    /// [`ServeError::Start`].
    pub fn adopt(
        dir: &Path,
        options: Options,
        connection: OwnedFd,
        negotiated: Negotiated,
        generation: u64,
    ) -> Result<Arc<Self>, ServeError> {
        let mount_options = options.mount();
        let server = new_server(dir, options)?;
        let connection = Connection::new(connection).map_err(|errno| ServeError::Start {
            dir: dir.into(),
            source: std::io::Error::from_raw_os_error(errno.raw()),
        })?;
        let directory = Session::directory(connection, dir.to_owned());
        directory.outlive(generation);
        server.attach(Arc::clone(&directory));
        let root = FileRoot::Mount { directory, negotiated };
        let dir = dir.to_owned();
        Ok(Arc::new(Self { dir, root, options: mount_options, server, reader: Mutex::new(None) }))
    }

    /// Adds a device file that an earlier process had served as the node `node`, with the handles that clients have open.
    ///
    /// # Errors
    /// [`AddError::Exists`]; [`AddError::Create`] for character devices, which cannot be restored.
    pub fn restore(
        &self,
        name: &str,
        file: Arc<dyn DeviceFile>,
        node: u64,
        attributes: FileAttributes,
        opens: &[u64],
    ) -> Result<PathBuf, AddError> {
        let FileRoot::Mount { directory, .. } = &self.root else {
            return Err(AddError::Create { reason: "a character device cannot be restored".into() });
        };
        directory.restore(node, name, file, attributes, opens)?;
        Ok(self.dir.join(name))
    }

    /// Starts to serve an [adopted](Self::adopt) mount. Asks the kernel to send again every request that the earlier process
    /// had read and not answered; without that (before Linux 6.9) their callers wait until the connection ends.
    ///
    /// # Errors
    /// [`ServeError::Start`].
    pub fn resume(&self) -> Result<(), ServeError> {
        if let FileRoot::Mount { directory, negotiated } = &self.root
            && negotiated.has_resend()
            && let Err(errno) = directory.connection.notify_resend()
        {
            warn!(%errno, "requests in progress at the end of the earlier process are lost");
        }
        *self.reader.lock() = Some(start(&self.server, &self.dir)?);
        info!(dir = %self.dir.display(), "serving device files again");
        Ok(())
    }

    /// Stops serving for a while, so that another process can go on: when this returns no request is in progress, and none is
    /// read before [`unpause`](Self::unpause). Callers wait meanwhile. Waits at most `timeout`.
    ///
    /// # Errors
    /// `ETIMEDOUT` when a request is still in progress then. Requests are served again.
    pub fn pause(&self, timeout: Duration) -> Result<(), Errno> {
        self.server.pause(timeout)
    }

    /// Serves again after a [`pause`](Self::pause).
    pub fn unpause(&self) {
        self.server.unpause();
    }

    /// Keeps the state of this mount for a successor of this process: its connection, and what INIT agreed on. `None` for
    /// character devices. From now on, a RELEASE is answered when it was executed.
    #[must_use]
    pub fn outlive(&self, generation: u64) -> Option<(Connection, Negotiated)> {
        let FileRoot::Mount { directory, negotiated } = &self.root else { return None };
        directory.outlive(generation);
        Some((directory.connection.clone(), *negotiated))
    }

    /// The node id of a device file in the mount.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<u64> {
        let FileRoot::Mount { directory, .. } = &self.root else { return None };
        directory.node(name)
    }
}
