//! Device files that an earlier process has served, or that a later one will serve.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::info;
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_sys::fuse::{Connection, Negotiated, RequestLog};
use vdpa_sys::uapi::fuse::ROOT_ID;

use super::session::{Endpoint, Link, Session};
use super::{
    AddError, DeviceFile, DeviceFiles, FileAttributes, FileRoot, Options, SavedAttributes, ServeError, cuse,
    new_server, start,
};

/// Where a device file is that has a connection of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A mount over a regular file.
    File {
        /// Path of the file: absolute, without symbolic links.
        path: PathBuf,
        /// Whether the file was created for the mount, and is removed after it.
        created: bool,
    },
    /// A character device in the directory of the device files.
    Device,
}

/// What a successor needs to continue a device file that has a connection of its own: see
/// [`DeviceFiles::own_connection`].
#[derive(Clone, Debug)]
pub struct OwnConnection {
    /// The connection to the kernel, whose end is the end of the file.
    pub connection: Connection,
    /// What INIT has agreed on.
    pub negotiated: Negotiated,
    /// Where the file is.
    pub place: Place,
}

impl DeviceFiles {
    /// Continues to serve a mount at `dir` that an earlier process had mounted and died or handed over: `connection` is its
    /// `/dev/fuse` descriptor, `negotiated` what INIT had agreed on, and `generation` a number that no process before had.
    ///
    /// Nothing is served before [`resume`](Self::resume): first every device is restored, by [`restore`](Self::restore) or
    /// [`restore_own`](Self::restore_own).
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
        let mount_options = (options.mount(), options.unmount);
        let server = new_server(dir, options)?;
        let connection = Connection::new(connection).map_err(|errno| ServeError::Start {
            dir: dir.into(),
            source: std::io::Error::from_raw_os_error(errno.raw()),
        })?;
        let directory = Session::directory(connection, dir.to_owned(), negotiated);
        server.attach(Arc::clone(&directory));
        let root = FileRoot::Mount { directory, negotiated };
        let this = Self::assemble((dir.to_owned(), root), mount_options, server, None);
        this.outlive(generation);
        Ok(this)
    }

    /// As [`adopt`](Self::adopt), for the character devices in `dir`. Each has a connection of its own.
    ///
    /// # Errors
    /// [`ServeError::NotDev`] and [`ServeError::Start`].
    pub fn adopt_cuse(dir: &Path, options: Options, generation: u64) -> Result<Arc<Self>, ServeError> {
        let prefix = cuse::prefix_of(dir).ok_or_else(|| ServeError::NotDev { dir: dir.into() })?;
        let mount_options = (options.mount(), options.unmount);
        let server = new_server(dir, options)?;
        let root = FileRoot::Dev(cuse::NodeFactory::new(prefix));
        let this = Self::assemble((dir.components().collect(), root), mount_options, server, None);
        this.outlive(generation);
        Ok(this)
    }

    /// Adds a device file that an earlier process had served as the node `node` of the mount, with the handles that clients
    /// have open.
    ///
    /// # Errors
    /// [`AddError::Exists`]; [`AddError::Create`] for character devices, which have connections of their own.
    pub fn restore(
        &self,
        name: &str,
        file: Arc<dyn DeviceFile>,
        node: u64,
        attributes: FileAttributes,
        opens: &[u64],
    ) -> Result<PathBuf, AddError> {
        let FileRoot::Mount { directory, .. } = &self.root else {
            return Err(AddError::Create { reason: "there is no mounted directory".into() });
        };
        directory.restore(node, name, file, attributes, opens)?;
        Ok(self.dir.join(name))
    }

    /// Adds a device file that an earlier process had served on a connection of its own, with the handles that clients have
    /// open. Returns its path.
    ///
    /// # Errors
    /// [`AddError::Create`] for a character device that is gone, or where there are only files.
    pub fn restore_own(
        &self,
        name: &str,
        file: Arc<dyn DeviceFile>,
        own: OwnConnection,
        opens: &[u64],
    ) -> Result<PathBuf, AddError> {
        let OwnConnection { connection, negotiated, place } = own;
        let (path, session) = match (place, &self.root) {
            (Place::File { path, created }, _) => {
                let endpoint = Endpoint::File { path: path.clone(), created };
                (path, Session::one_file(Link { connection, endpoint, negotiated }, ROOT_ID, name, file))
            }
            (Place::Device, FileRoot::Dev(factory)) => {
                (self.dir.join(name), factory.adopt(name, file, connection, negotiated)?)
            }
            (Place::Device, FileRoot::Mount { .. }) => {
                return Err(AddError::Create { reason: "character devices are not served".into() });
            }
        };
        session.restore_opens(opens);
        self.attach(session);
        Ok(path)
    }

    /// Keeps requests in `log` until they are answered, where the kernel does not send them again to a successor (before Linux 6.9).
    /// For adopted files it is the log of the earlier process, which is read by [`resume`](Self::resume).
    pub fn keep_requests(&self, log: RequestLog) {
        self.server.keep_requests(Arc::new(log));
    }

    /// Whether requests are kept where the kernel does not send them again.
    #[must_use]
    pub fn keeps_requests(&self) -> bool {
        self.server.keeps_requests()
    }

    /// Starts to serve [adopted](Self::adopt) files. Requests that the earlier process had read and not answered are answered: the kernel
    /// is asked to send them again, or they [were kept](Self::keep_requests); otherwise their callers wait until the connection
    /// ends.
    ///
    /// # Errors
    /// [`ServeError::Start`].
    pub fn resume(&self) -> Result<(), ServeError> {
        self.server.resend();
        reach(CrashPoint::Resent);
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

    /// Keeps the state of all files for a successor of this process, the `generation`-th to serve them. Returns the
    /// connection of the mount, and what INIT agreed on; `None` for character devices, each of which has
    /// [a connection of its own](Self::own_connection). From now on, a RELEASE is answered when it was executed.
    pub fn outlive(&self, generation: u64) -> Option<(Connection, Negotiated)> {
        self.generation.store(generation, Ordering::Release);
        self.server.sessions().iter().for_each(|session| session.outlive(generation));
        let FileRoot::Mount { directory, negotiated } = &self.root else { return None };
        Some((directory.connection.clone(), *negotiated))
    }

    /// What a successor needs to continue the file `name`, if it has a connection of its own.
    #[must_use]
    pub fn own_connection(&self, name: &str) -> Option<OwnConnection> {
        let sessions = self.server.sessions();
        sessions.iter().filter(|session| !session.is_closing()).find_map(|session| {
            let place = match &session.endpoint {
                Endpoint::File { path, created } => Place::File { path: path.clone(), created: *created },
                Endpoint::Device(_) => Place::Device,
                Endpoint::Directory(_) => return None,
            };
            session.node(name)?;
            let (connection, negotiated) = (session.connection.clone(), session.negotiated);
            Some(OwnConnection { connection, negotiated, place })
        })
    }

    /// Has each change of the attributes of the file `name` written to `saved` before it is answered; of the directory
    /// itself without a name. If `saved` has attributes, of an earlier process, they are taken over. Does nothing for
    /// character devices, whose attributes the kernel keeps.
    ///
    /// # Errors
    /// `ENOENT` for a file that there is not; those of writing.
    pub fn save_attributes(&self, name: Option<&str>, saved: SavedAttributes) -> Result<(), Errno> {
        let Some(name) = name else {
            let FileRoot::Mount { directory, .. } = &self.root else { return Ok(()) };
            return directory.save_attributes(None, saved);
        };
        let sessions = self.server.sessions();
        let session = sessions.iter().filter(|session| !session.is_closing());
        let session = session.rev().find(|session| session.node(name).is_some()).ok_or(Errno::NOENT)?;
        match session.endpoint {
            Endpoint::Device(_) => Ok(()),
            Endpoint::Directory(_) | Endpoint::File { .. } => session.save_attributes(Some(name), saved),
        }
    }

    /// The node id of a device file in the mount.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<u64> {
        let FileRoot::Mount { directory, .. } = &self.root else { return None };
        directory.node(name)
    }
}
