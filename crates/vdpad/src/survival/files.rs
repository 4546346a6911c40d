//! The device files, as they are held for the next daemon: mounts, character devices, and attributes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vdpa_backend::front::fuse::{
    AddError, DeviceFile, DeviceFiles, Options, OwnConnection, Place, SavedAttributes, ServeError,
};
use vdpa_backend::persist::items::device::{
    ATTRIBUTES, CONNECTION, CONTENTS, IDENTITY, INTERFACE, KEEPER, of_program,
};
use vdpa_backend::persist::items::program::{
    CONFIGURED, DEV_DIR, MOUNT, MOUNT_ATTRIBUTES, MOUNT_DIR, NEW_MOUNT, REQUESTS,
};
use vdpa_backend::persist::{Held, Kind, key, split_key};
use vdpa_core::Errno;
use vdpa_sys::fuse::{Connection, Negotiated, RequestLog, unmount};

use crate::devices::Kept;
use crate::vdpa_bus::Bind;

use super::{Identity, Legacy, Survival, read, text};

/// The files that a predecessor has served.
#[derive(Debug, Default)]
pub(crate) struct LegacyFiles {
    /// Connection of the mount of the directory, and what INIT agreed on.
    mount: Option<(OwnedFd, Negotiated)>,
    mount_dir: Option<PathBuf>,
    mount_attributes: Option<SavedAttributes>,
    dev_dir: Option<PathBuf>,
    requests: Option<OwnedFd>,
    /// Nobody has served the mount.
    new: bool,
    /// The devices of the configuration have been added.
    pub(crate) configured: bool,
}

/// What of a device is neither in its journal nor in its in-flight logs.
#[derive(Debug, Default)]
pub(crate) struct LegacyParts {
    /// The memory that is its disk.
    pub(crate) contents: Option<OwnedFd>,
    /// The queues of its interface, in their order.
    pub(crate) taps: Vec<OwnedFd>,
    /// What reaches its keeper, or the open file of the locks on its disk.
    pub(crate) keeper: Option<OwnedFd>,
    attributes: Option<SavedAttributes>,
    connection: Option<(OwnedFd, Negotiated)>,
}

/// Where a device file is that has a connection of its own, as it is saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SavedPlace {
    /// As [`Place::File`].
    File { path: PathBuf, created: bool },
    /// As [`Place::Device`].
    Device,
    /// None: the device is the kernel's, by VDUSE.
    Vduse { bind: Bind },
}

impl SavedPlace {
    fn of(place: &Place) -> Self {
        match place {
            Place::File { path, created } => Self::File { path: path.clone(), created: *created },
            Place::Device => Self::Device,
        }
    }

    fn place(&self) -> Option<Place> {
        match self {
            Self::File { path, created } => Some(Place::File { path: path.clone(), created: *created }),
            Self::Device => Some(Place::Device),
            Self::Vduse { .. } => None,
        }
    }
}

impl LegacyFiles {
    /// Takes an item that belongs to no device; returns one that is not of this module.
    pub(super) fn take(&mut self, item: u32, held: Held) -> Option<Held> {
        match item {
            MOUNT => self.mount = Negotiated::from_bytes(&held.record).map(|agreed| (held.fd, agreed)),
            MOUNT_DIR => self.mount_dir = read(held.fd).map(PathBuf::from),
            MOUNT_ATTRIBUTES => self.mount_attributes = Some(SavedAttributes::open(held.fd)),
            DEV_DIR => self.dev_dir = read(held.fd).map(PathBuf::from),
            CONFIGURED => self.configured = true,
            NEW_MOUNT => self.new = true,
            REQUESTS => self.requests = Some(held.fd),
            _ => return Some(held),
        }
        None
    }

    /// Whether a predecessor has served any.
    pub(crate) const fn are_served(&self) -> bool {
        self.dev_dir.is_some() || self.is_mounted() && !self.new
    }

    /// Whether there is a mount that nobody has served yet.
    pub(crate) const fn are_new(&self) -> bool {
        self.is_mounted() && self.new
    }

    const fn is_mounted(&self) -> bool {
        self.mount.is_some() && self.mount_dir.is_some()
    }
}

impl LegacyParts {
    /// Takes the items of this module; the others stay.
    pub(crate) fn take(items: &mut Vec<Held>) -> Self {
        let mut parts = Self::default();
        let mut taps = BTreeMap::new();
        for held in std::mem::take(items) {
            match split_key(held.key).1 {
                CONTENTS => parts.contents = Some(held.fd),
                item if INTERFACE.contains(&item) => drop(taps.insert(item, held.fd)),
                KEEPER => parts.keeper = Some(held.fd),
                ATTRIBUTES => parts.attributes = Some(SavedAttributes::open(held.fd)),
                CONNECTION => {
                    let agreed = Negotiated::from_bytes(&held.record);
                    parts.connection = agreed.map(|agreed| (held.fd, agreed));
                }
                _ => items.push(held),
            }
        }
        parts.taps = taps.into_values().collect();
        parts
    }

    /// Puts `file` in the place of the file of a device that a predecessor has served, with the handles that clients have open.
    /// Returns its path.
    ///
    /// # Errors
    /// [`AddError`].
    pub(crate) fn restore_file(
        &mut self,
        files: &DeviceFiles,
        identity: &Identity,
        file: Arc<dyn DeviceFile>,
        opens: &[u64],
    ) -> Result<PathBuf, AddError> {
        let failed = |what: &str| AddError::Create { reason: what.into() };
        let name = identity.file_name();
        let path = match &identity.place {
            None => files.restore(&name, file, identity.node, identity.attributes(), opens)?,
            Some(place) => {
                let place = place
                    .place()
                    .ok_or_else(|| failed("the kernel has it by VDUSE, and nobody serves it"))?;
                let (fd, negotiated) =
                    self.connection.take().ok_or_else(|| failed("the connection of its file is not held"))?;
                let connection = Connection::new(fd);
                let connection = connection.map_err(|_| failed("the connection of its file is closed"))?;
                let own = OwnConnection { connection, negotiated, place };
                files.restore_own(&name, file, own, opens)?
            }
        };
        if let Some(saved) = self.attributes.take()
            && let Err(errno) = files.save_attributes(Some(&name), saved)
        {
            tracing::warn!(file = name, %errno, "changes of the attributes of the file will not survive");
        }
        Ok(path)
    }
}

impl Legacy {
    /// Ends the mounts that a predecessor has left: clients get `ECONNABORTED`, those that wait too. Character devices end when
    /// nobody holds them, and so does the mount of the directory if it is `given`.
    pub(super) fn unmount(&self, given: bool) {
        self.devices.values().for_each(|(identity, _)| identity.unmount());
        if !given
            && let Some(dir) = &self.files.mount_dir
            && let Err(error) = unmount(dir)
        {
            tracing::error!(%error, "the mount of the device files is left behind");
        }
    }
}

impl Identity {
    /// The key under which it is held, for the device with the number `device`.
    pub(crate) const fn key(&self, device: u32) -> u64 {
        key(device, IDENTITY)
    }

    /// Path of its file, if it has one of its own.
    pub(crate) fn own_path(&self) -> Option<&Path> {
        match &self.place {
            Some(SavedPlace::File { path, .. }) => Some(path),
            _ => None,
        }
    }

    /// As a device of VDUSE, with this driver.
    #[must_use]
    pub(crate) fn with_vduse(self, bind: Bind) -> Self {
        Self { place: Some(SavedPlace::Vduse { bind }), ..self }
    }

    /// The driver that a device of VDUSE is to have; `None` for other devices.
    pub(crate) const fn vduse(&self) -> Option<Bind> {
        match self.place {
            Some(SavedPlace::Vduse { bind }) => Some(bind),
            _ => None,
        }
    }

    /// Name of the front end of its file.
    pub(crate) fn front(&self, files: &DeviceFiles) -> &'static str {
        if matches!(self.place, Some(SavedPlace::File { .. })) { "fuse" } else { files.front() }
    }

    /// Ends the mount of a device that cannot be restored, if it has one of its own.
    pub(crate) fn unmount(&self) {
        let Some(SavedPlace::File { path, created }) = &self.place else { return };
        if let Err(error) = unmount(path) {
            tracing::error!(%error, "the mount of a device file is left behind");
        } else if *created && let Err(error) = std::fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "the file below a device file stays");
        }
    }
}

impl Survival {
    /// Has the new device files held: their mount, or that they are character devices.
    ///
    /// # Errors
    /// Those of [`Store::hold`](vdpa_backend::persist::Store::hold), and of memory.
    pub(crate) fn hold_files(&self, files: &DeviceFiles) -> Result<(), Errno> {
        let store = self.store();
        self.keep_requests(files)?;
        let dir = text(&files.dir().to_string_lossy())?;
        let Some((connection, negotiated)) = files.outlive(self.generation()) else {
            return store.hold(key(0, DEV_DIR), Kind::Memory, dir.as_fd(), &[]);
        };
        self.hold_directory_attributes(files)?;
        store.hold(key(0, MOUNT_DIR), Kind::Memory, dir.as_fd(), &[])?;
        store.hold(key(0, MOUNT), Kind::Fuse, connection.as_fd(), &negotiated.to_bytes())
    }

    /// Serves a mount that another process has made. What else is held is of daemons that have served another mount, which has ended:
    /// it is released.
    ///
    /// # Errors
    /// [`ServeError::Start`].
    pub(crate) fn serve_new_mount(
        &self,
        legacy: &mut Legacy,
        options: Options,
    ) -> Result<Arc<DeviceFiles>, ServeError> {
        for (number, (identity, items)) in std::mem::take(&mut legacy.devices) {
            let mut keys: Vec<u64> = items.iter().map(|held| held.key).collect();
            keys.push(identity.key(number));
            self.give_up_device(&keys, &identity);
        }
        let LegacyFiles { requests, configured, mount_attributes, .. } = &mut legacy.files;
        let stale = [
            (REQUESTS, requests.take().is_some()),
            (CONFIGURED, std::mem::take(configured)),
            (MOUNT_ATTRIBUTES, mount_attributes.take().is_some()),
        ];
        for (item, held) in stale {
            if held && let Err(errno) = self.store().release(key(0, item)) {
                tracing::warn!(item, %errno, "what belongs to a mount that has ended is still held");
            }
        }
        let files = self.adopt_connections(&mut legacy.files, options)?;
        if let Err(errno) = self.keep_requests(&files) {
            tracing::warn!(%errno, "requests do not survive a crash where the kernel does not send them again");
        }
        files.resume()?;
        // From here on the next daemon continues.
        if let Err(errno) = self.store().release(key(0, NEW_MOUNT)) {
            tracing::warn!(%errno, "after a crash the next daemon will serve no devices of this one");
        }
        Ok(files)
    }

    /// Has requests in progress held, where the kernel does not send them again, unless those of a predecessor are.
    ///
    /// # Errors
    /// Those of [`Store::hold`](vdpa_backend::persist::Store::hold), and of memory.
    pub(crate) fn keep_requests(&self, files: &DeviceFiles) -> Result<(), Errno> {
        if files.keeps_requests() {
            return Ok(());
        }
        let (fd, log) = RequestLog::create()?;
        self.store().hold(key(0, REQUESTS), Kind::Memory, fd.as_fd(), &[])?;
        files.keep_requests(log);
        Ok(())
    }

    fn hold_directory_attributes(&self, files: &DeviceFiles) -> Result<(), Errno> {
        let attributes = SavedAttributes::create()?;
        self.store().hold(key(0, MOUNT_ATTRIBUTES), Kind::Memory, attributes.as_fd(), &[])?;
        files.save_attributes(None, attributes)
    }

    /// Continues the device files of a predecessor.
    ///
    /// # Errors
    /// As [`DeviceFiles::adopt`]; [`ServeError::NotDev`] also where nothing [is served](LegacyFiles::are_served).
    pub(crate) fn adopt_files(
        &self,
        legacy: &mut LegacyFiles,
        options: Options,
    ) -> Result<Arc<DeviceFiles>, ServeError> {
        let requests = legacy.requests.take();
        let files = self.adopt_connections(legacy, options)?;
        match requests.map(RequestLog::open) {
            Some(Ok(log)) => files.keep_requests(log),
            Some(Err(errno)) => tracing::warn!(%errno, "requests that were in progress are lost"),
            // Of a daemon of an earlier version.
            None => {}
        }
        Ok(files)
    }

    fn adopt_connections(
        &self,
        legacy: &mut LegacyFiles,
        options: Options,
    ) -> Result<Arc<DeviceFiles>, ServeError> {
        let generation = self.generation();
        let (Some((connection, negotiated)), Some(dir)) = (legacy.mount.take(), legacy.mount_dir.take())
        else {
            return DeviceFiles::adopt_cuse(&legacy.dev_dir.take().unwrap_or_default(), options, generation);
        };
        let files = DeviceFiles::adopt(&dir, options, connection, negotiated, generation)?;
        let saved = match legacy.mount_attributes.take() {
            Some(saved) => files.save_attributes(None, saved),
            None => self.hold_directory_attributes(&files),
        };
        if let Err(errno) = saved {
            tracing::warn!(%errno, "changes of the attributes of the directory will not survive");
        }
        Ok(files)
    }

    /// The devices of the configuration have been added: the next daemon does not add those that are missing.
    ///
    /// # Errors
    /// Those of [`Store::hold`](vdpa_backend::persist::Store::hold), and of memory.
    pub(crate) fn hold_configured(&self) -> Result<(), Errno> {
        self.store().hold(key(0, CONFIGURED), Kind::Memory, text("")?.as_fd(), &[])
    }

    /// Has held what a device is that is in `files`, and what it keeps: memory that is its disk, or the queues of its interface. The
    /// device can be restored from then on.
    ///
    /// # Errors
    /// Those of [`Store::hold`](vdpa_backend::persist::Store::hold), and of memory.
    pub(crate) fn hold_device(
        &self,
        device: u32,
        mut identity: Identity,
        files: &DeviceFiles,
        kept: &Kept,
    ) -> Result<(), Errno> {
        let store = self.store();
        let name = identity.file_name();
        self.hold_kept(device, kept)?;
        if let Some(OwnConnection { connection, negotiated, place }) = files.own_connection(&name) {
            store.hold(key(device, CONNECTION), Kind::Fuse, connection.as_fd(), &negotiated.to_bytes())?;
            identity.place = Some(SavedPlace::of(&place));
        }
        // The kernel keeps those of a character device.
        if !matches!(identity.place, Some(SavedPlace::Device)) {
            let attributes = SavedAttributes::create()?;
            store.hold(key(device, ATTRIBUTES), Kind::Memory, attributes.as_fd(), &[])?;
            files.save_attributes(Some(&name), attributes)?;
        }
        self.hold_identity(device, &identity)
    }

    /// Has held what a device is. Last: a device without it was being added.
    ///
    /// # Errors
    /// Those of [`Store::hold`](vdpa_backend::persist::Store::hold), and of memory.
    pub(crate) fn hold_identity(&self, device: u32, identity: &Identity) -> Result<(), Errno> {
        let json = serde_json::to_string(identity).map_err(|_| Errno::INVAL)?;
        self.store().hold(key(device, IDENTITY), Kind::Memory, text(&json)?.as_fd(), &[])
    }

    /// Has held what a device keeps: memory that is its disk, the locks on its file, the queues of its interface, its keeper.
    ///
    /// # Errors
    /// Those of [`Store::hold`](vdpa_backend::persist::Store::hold).
    pub(crate) fn hold_kept(&self, device: u32, kept: &Kept) -> Result<(), Errno> {
        let store = self.store();
        if let Some(contents) = kept.held_memory() {
            store.hold(key(device, CONTENTS), Kind::Memory, contents.as_fd(), &[])?;
        }
        if let Some(lock) = kept.lock() {
            self.hold_lock(device, &lock)?;
        }
        for (item, tap) in INTERFACE.into_iter().zip(kept.held_taps()) {
            store.hold(key(device, item), Kind::Other, tap.as_fd(), &[])?;
        }
        if let Some(lobby) = kept.keeper() {
            store.hold(key(device, KEEPER), Kind::Other, lobby.as_fd(), &[])?;
        }
        Ok(())
    }

    /// Has the open file of the locks on a disk held.
    ///
    /// # Errors
    /// Those of [`Store::hold`](vdpa_backend::persist::Store::hold).
    pub(crate) fn hold_lock(&self, device: u32, lock: &OwnedFd) -> Result<(), Errno> {
        self.store().hold(key(device, KEEPER), Kind::Other, lock.as_fd(), &[])
    }

    /// The file of a device ends: the kernel keeps it as long as anybody holds its connection.
    pub(crate) fn release_connection(&self, device: u32) {
        // Most have none of their own.
        let _ = self.store().release(key(device, CONNECTION));
    }

    /// The device is deleted: what is held of it beside its log is released.
    pub(crate) fn release_device(&self, device: u32) {
        for item in of_program() {
            match self.store().release(key(device, item)) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => tracing::warn!(device, %errno, "a deleted device is still held"),
            }
        }
    }

    /// A device of a predecessor cannot be restored: everything that is held of it is released, and its clients get errors.
    pub(crate) fn give_up_device(&self, keys: &[u64], identity: &Identity) {
        for key in keys {
            if let Err(errno) = self.store().release(*key) {
                tracing::warn!(key, %errno, "a device that cannot be restored is still held");
            }
        }
        identity.unmount();
    }
}
