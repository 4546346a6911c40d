//! [`Survival`]: what this daemon has held for its successor, and what it finds of its predecessor.
//!
//! With `--holder` the main process of the service is the holder of `vdpa-holder`, and the daemon is its child. The daemon
//! has its mount, the journal of each device, and what the journals name held there. After a crash the holder starts the
//! daemon again, which finds all of that, and goes on.
//! An upgrade is the same with another program, which is started in advance.

mod upgrade;

pub use upgrade::TakeOverError;

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vdpa_backend::front::fuse::{DeviceFiles, FileAttributes, Options, ServeError};
use vdpa_backend::persist::{Held, Kind, RINGS, RestoredSpaces, Store, key, split_key};
use vdpa_control::api::{AddRequest, CrashInfo, HolderInfo};
use vdpa_core::Errno;
use vdpa_holder::client::{Client, Start};
use vdpa_holder::protocol::{Role, Status};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::fuse::{Negotiated, unmount};
use vdpa_sys::memfd;

use crate::bus::HeldDevices;

/// Items that belong to no device.
const MOUNT: u32 = 1;
const MOUNT_DIR: u32 = 2;
/// The item of a device that says what was added.
const IDENTITY: u32 = 2;
/// Bytes of the longest identity: a request to add a device is at most that long.
const IDENTITY_MAX: u64 = 1 << 20;

/// The connection to the holder.
#[derive(Debug)]
pub struct Survival {
    client: Arc<Mutex<Client>>,
    start: Start,
    next_device: AtomicU32,
    /// When this process began to serve: `CLOCK_MONOTONIC` in ns.
    served_ns: AtomicU64,
    /// What this process has done by when: `CLOCK_MONOTONIC` in ns.
    phases: Mutex<Vec<(&'static str, u64)>>,
    /// Locked during an upgrade.
    upgrading: Mutex<()>,
    /// For a candidate: the socket to the daemon.
    peer: Mutex<Option<OwnedFd>>,
    /// Address spaces of the devices that are restored.
    pub(crate) spaces: RestoredSpaces,
}

/// What was added, to make the device again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// The N of `vhost-vdpa-N`.
    pub(crate) number: u32,
    /// Node id of the device file in the mount.
    pub(crate) node: u64,
    /// Mode, owner and group of the file when it was added.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// As it was asked for.
    pub(crate) request: AddRequest,
}

impl Identity {
    pub(crate) const fn attributes(&self) -> FileAttributes {
        FileAttributes { mode: self.mode, uid: self.uid, gid: self.gid }
    }
}

/// What a predecessor has left.
#[derive(Debug, Default)]
pub(crate) struct Legacy {
    /// The mount: its connection, what INIT agreed on, and where it is.
    pub(crate) mount: Option<(OwnedFd, Negotiated, PathBuf)>,
    /// io_urings of worker threads, with their tables.
    pub(crate) rings: Vec<Held>,
    /// Devices by their number: what they are, and everything that is held of them.
    pub(crate) devices: HeldDevices,
}

impl Survival {
    /// The connection to the holder that has started this process; `None` without one. To be called first, before other files
    /// are opened.
    ///
    /// # Errors
    /// Of the inherited socket.
    pub fn from_env() -> Result<Option<Self>, Errno> {
        let Some(mut client) = Client::from_env()? else { return Ok(None) };
        let (start, peer) = (client.start(), Mutex::new(client.take_peer()));
        let client = Arc::new(Mutex::new(client));
        Ok(Some(Self {
            client,
            start,
            next_device: AtomicU32::new(1),
            served_ns: AtomicU64::new(0),
            phases: Mutex::new(vec![("program started", monotonic_ns())]),
            upgrading: Mutex::default(),
            peer,
            spaces: RestoredSpaces::default(),
        }))
    }

    /// What this process is to be.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.start.role
    }

    /// How often a daemon was started for this service, this one included. A candidate counts as the daemon that it may become.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.start.status.generation + u64::from(self.is_candidate())
    }

    /// Whether this process was started to replace a daemon that still serves.
    #[must_use]
    pub fn is_candidate(&self) -> bool {
        self.start.role == Role::Candidate
    }

    /// Notes that something is done, for the log of a recovery.
    pub(crate) fn mark(&self, what: &'static str) {
        self.phases.lock().push((what, monotonic_ns()));
    }

    /// Tells the log how long the recovery from a crash has taken, from the holder's notice of it on.
    fn log_recovery(&self, heard_ns: u64) {
        let since = |at: u64| Duration::from_nanos(at.saturating_sub(heard_ns)).as_secs_f64() * 1e3;
        let phases = self.phases.lock();
        let phases: Vec<_> = phases.iter().map(|(what, at)| format!("{what} {:.2} ms", since(*at))).collect();
        tracing::info!("recovered: {}", phases.join(", "));
    }

    /// Tells the log how the daemon before this one ended.
    pub fn log_crash(&self) {
        if let Some(end) = self.start.crash {
            tracing::error!(
                pid = end.pid,
                signal = end.signal,
                status = end.status,
                core = end.core,
                hung = end.hung,
                crashes = self.start.status.crashes,
                "the daemon before this one has crashed"
            );
        }
    }

    /// Where descriptors are held.
    pub(crate) fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.client) as Arc<dyn Store>
    }

    /// What `daemon show` tells of the holder.
    ///
    /// # Errors
    /// `EPIPE` without a holder.
    pub(crate) fn info(&self) -> Result<HolderInfo, Errno> {
        let Status { pid, generation, upgrades, crashes, held, .. } = self.client.lock().status()?;
        let served_ns = self.served_ns.load(Ordering::Relaxed);
        let last_crash = self.start.crash.map(|end| CrashInfo {
            pid: end.pid.unsigned_abs(),
            signal: end.signal,
            status: end.status,
            core: end.core,
            hung: end.hung,
            recovery_ms: Duration::from_nanos(served_ns.saturating_sub(end.heard_ns)).as_secs_f64() * 1e3,
        });
        Ok(HolderInfo { pid: pid.unsigned_abs(), generation, upgrades, crashes, held, last_crash })
    }

    /// Says that this process serves.
    ///
    /// # Errors
    /// `EPIPE` without a holder.
    pub fn ready(&self) -> Result<(), Errno> {
        self.served_ns.store(monotonic_ns(), Ordering::Relaxed);
        self.mark("ready");
        if let Some(crash) = self.start.crash {
            self.log_recovery(crash.heard_ns);
        }
        self.client.lock().ready()
    }

    /// Says that the service ends with this process.
    pub fn stopping(&self) {
        if let Err(errno) = self.client.lock().stopping() {
            tracing::warn!(%errno, "the holder does not know that the service ends");
        }
    }

    /// Ends the mount that a predecessor has left, if any: clients get `ECONNABORTED`, those that wait too.
    pub fn give_up(&self) {
        let mount = self.legacy().map(|legacy| legacy.mount);
        let ended = match mount {
            Ok(Some((_, _, dir))) => unmount(&dir).map_err(|error| error.to_string()),
            Ok(None) => Ok(()),
            Err(errno) => Err(errno.to_string()),
        };
        if let Err(error) = ended {
            tracing::error!(error, "the mount of the device files is left behind");
        }
        self.stopping();
    }

    /// A number for one more device.
    pub(crate) fn new_device(&self) -> u32 {
        self.next_device.fetch_add(1, Ordering::Relaxed)
    }

    /// Has a new mount held.
    ///
    /// # Errors
    /// Those of [`Store::hold`].
    pub(crate) fn hold_mount(&self, files: &DeviceFiles) -> Result<(), Errno> {
        let Some((connection, negotiated)) = files.outlive(self.generation()) else {
            tracing::warn!("character devices do not survive a crash of this daemon");
            return Ok(());
        };
        let store = self.store();
        let dir = text(&files.dir().to_string_lossy())?;
        store.hold(key(0, MOUNT_DIR), Kind::Memory, dir.as_fd(), &[])?;
        store.hold(key(0, MOUNT), Kind::Fuse, connection.as_fd(), &negotiated.to_bytes())
    }

    /// Has held what a device is. The device can be restored from then on.
    ///
    /// # Errors
    /// Those of [`Store::hold`].
    pub(crate) fn hold_identity(&self, device: u32, identity: &Identity) -> Result<(), Errno> {
        let json = serde_json::to_string(identity).map_err(|_| Errno::INVAL)?;
        self.store().hold(key(device, IDENTITY), Kind::Memory, text(&json)?.as_fd(), &[])
    }

    /// The device is deleted: what is held of it beside its log is released.
    pub(crate) fn release_identity(&self, device: u32) {
        if let Err(errno) = self.store().release(key(device, IDENTITY)) {
            tracing::warn!(device, %errno, "a deleted device is still held");
        }
    }

    /// What is held of devices.
    ///
    /// # Errors
    /// Those of the holder's connection.
    pub(crate) fn devices(&self) -> Result<HeldDevices, Errno> {
        self.legacy().map(|legacy| legacy.devices)
    }

    /// What a predecessor has left. Whatever belongs to no device that can be restored is released.
    ///
    /// # Errors
    /// Those of the holder's connection.
    pub(crate) fn legacy(&self) -> Result<Legacy, Errno> {
        let mut legacy = Legacy::default();
        let (mut connection, mut dir) = (None, None);
        let mut items: BTreeMap<u32, Vec<Held>> = BTreeMap::new();
        for held in self.client.lock().list()? {
            match split_key(held.key) {
                (0, MOUNT) => connection = Some(held),
                (0, MOUNT_DIR) => dir = read(held.fd),
                (0, item) if item >= RINGS => legacy.rings.push(held),
                (0, item) => tracing::warn!(item, "something unknown is held"),
                (device, _) => items.entry(device).or_default().push(held),
            }
        }
        if let (Some(held), Some(dir)) = (connection, dir)
            && let Some(negotiated) = Negotiated::from_bytes(&held.record)
        {
            legacy.mount = Some((held.fd, negotiated, dir.into()));
        }
        self.next_device.fetch_max(items.keys().next_back().map_or(1, |last| last + 1), Ordering::Relaxed);
        for (device, mut items) in items {
            let at = items.iter().position(|held| split_key(held.key).1 == IDENTITY);
            let identity = at.map(|at| items.swap_remove(at)).and_then(|held| read(held.fd));
            match identity.and_then(|json| serde_json::from_str(&json).ok()) {
                Some(identity) => drop(legacy.devices.insert(device, (identity, items))),
                // A candidate finds it being added, or deleted.
                None if self.is_candidate() => {}
                // It was being added, or deleted.
                None => items.iter().for_each(|held| {
                    let _ = self.store().release(held.key);
                }),
            }
        }
        Ok(legacy)
    }

    /// The device files of a predecessor.
    ///
    /// # Errors
    /// As [`DeviceFiles::adopt`].
    pub(crate) fn adopt(
        &self,
        mount: (OwnedFd, Negotiated, PathBuf),
        options: Options,
    ) -> Result<Arc<DeviceFiles>, ServeError> {
        let (connection, negotiated, dir) = mount;
        DeviceFiles::adopt(&dir, options, connection, negotiated, self.generation())
    }
}

/// A memory file with this text.
fn text(text: &str) -> Result<OwnedFd, Errno> {
    let fd = memfd::create(c"vdpad", 0, None)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(text.as_bytes()).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(5)))?;
    Ok(file.into())
}

/// The text of such a file.
fn read(fd: OwnedFd) -> Option<String> {
    let mut file = std::fs::File::from(fd);
    file.seek(SeekFrom::Start(0)).ok()?;
    let mut text = String::new();
    file.take(IDENTITY_MAX).read_to_string(&mut text).ok()?;
    Some(text)
}
