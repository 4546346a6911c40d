//! [`Survival`]: what this daemon has held for its successor, and what it finds of its predecessor.
//!
//! With `--holder` the main process of the service is the holder of `vdpa-holder`, and the daemon is its child. The daemon
//! has its mount, the journal of each device, and what the journals name held there. After a crash the holder starts the
//! daemon again, which finds all of that, and goes on.
//! An upgrade is the same with another program, which is started in advance.

mod files;
mod upgrade;

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vdpa_backend::front::fuse::{DeviceFiles, FileAttributes};
use vdpa_backend::persist::{Held, RestoredSpaces, Store, split_key};
use vdpa_control::api::{AddRequest, CrashInfo, HolderInfo};
use vdpa_core::Errno;
use vdpa_holder::client::{Client, Start};
use vdpa_holder::protocol::{Role, Status};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::memfd;

pub(crate) use self::files::LegacyParts;
use self::files::{IDENTITY, LegacyFiles, SavedPlace};
use crate::bus::file_name;

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
    /// Locked during an upgrade.
    upgrading: Mutex<()>,
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
    /// Where the file is, if it has a connection of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) place: Option<SavedPlace>,
    /// Place of the mark on its open file, by which the next process knows that this one's requests have ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mark: Option<u64>,
    /// As it was asked for, without the attributes of every device.
    pub(crate) request: AddRequest,
}

impl Identity {
    /// Of a new device, whose file is in `files`.
    pub(crate) fn new(number: u32, request: &AddRequest, mark: Option<u64>, files: &DeviceFiles) -> Self {
        let name = file_name(number);
        let FileAttributes { mode, uid, gid } =
            files.attributes(&name).unwrap_or_else(FileAttributes::private);
        let node = files.node(&name).unwrap_or(0);
        Self { number, node, mode, uid, gid, place: None, mark, request: request.clone() }
    }

    pub(crate) const fn attributes(&self) -> FileAttributes {
        FileAttributes { mode: self.mode, uid: self.uid, gid: self.gid }
    }

    /// Name of the device file.
    pub(crate) fn file_name(&self) -> String {
        file_name(self.number)
    }
}

/// What a predecessor has left.
#[derive(Debug, Default)]
pub(crate) struct Legacy {
    /// The device files.
    pub(crate) files: LegacyFiles,
    /// Devices by their number: what they are, and everything that is held of them.
    pub(crate) devices: BTreeMap<u32, (Identity, Vec<Held>)>,
}

impl Survival {
    /// The connection to the holder that has started this process; `None` without one. To be called first, before other files
    /// are opened.
    ///
    /// # Errors
    /// Of the inherited socket.
    pub fn from_env() -> Result<Option<Self>, Errno> {
        let Some(client) = Client::from_env()? else { return Ok(None) };
        let start = client.start();
        let client = Arc::new(Mutex::new(client));
        Ok(Some(Self {
            client,
            start,
            next_device: AtomicU32::new(1),
            served_ns: AtomicU64::new(0),
            upgrading: Mutex::default(),
            spaces: RestoredSpaces::default(),
        }))
    }

    /// What this process is to be.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.start.role
    }

    /// How often a daemon was started for this service, this one included.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.start.status.generation
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
        self.client.lock().ready()
    }

    /// Says that the service ends with this process.
    pub fn stopping(&self) {
        if let Err(errno) = self.client.lock().stopping() {
            tracing::warn!(%errno, "the holder does not know that the service ends");
        }
    }

    /// Ends the device files that a predecessor has left, if any: clients get `ECONNABORTED`, those that wait too.
    pub fn give_up(&self) {
        match self.legacy() {
            Ok(legacy) => legacy.unmount(),
            Err(errno) => tracing::error!(%errno, "the mount of the device files is left behind"),
        }
        self.stopping();
    }

    /// A number for one more device.
    pub(crate) fn new_device(&self) -> u32 {
        self.next_device.fetch_add(1, Ordering::Relaxed)
    }

    /// What a predecessor has left. Whatever belongs to no device that can be restored is released.
    ///
    /// # Errors
    /// Those of the holder's connection.
    pub(crate) fn legacy(&self) -> Result<Legacy, Errno> {
        let mut legacy = Legacy::default();
        let mut items: BTreeMap<u32, Vec<Held>> = BTreeMap::new();
        for held in self.client.lock().list()? {
            match split_key(held.key) {
                (0, item) => {
                    if legacy.files.take(item, held).is_some() {
                        tracing::warn!(item, "something unknown is held");
                    }
                }
                (device, _) => items.entry(device).or_default().push(held),
            }
        }
        self.next_device.fetch_max(items.keys().next_back().map_or(1, |last| last + 1), Ordering::Relaxed);
        for (device, mut items) in items {
            let at = items.iter().position(|held| split_key(held.key).1 == IDENTITY);
            let identity = at.map(|at| items.swap_remove(at)).and_then(|held| read(held.fd));
            match identity.and_then(|json| serde_json::from_str(&json).ok()) {
                Some(identity) => drop(legacy.devices.insert(device, (identity, items))),
                // It was being added, or deleted.
                None => items.iter().for_each(|held| {
                    let _ = self.store().release(held.key);
                }),
            }
        }
        Ok(legacy)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a device is, as version 1 has saved it. `VDPA_WRITE_GOLDEN=1` writes it where there is none; it never changes.
    #[test]
    fn the_identity_of_version_1_is_read() {
        let path = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/identity-v1.json");
        let mut attrs = vdpa_control::api::Attrs::new();
        attrs.insert("path", "/srv/disk.img").unwrap();
        let request = AddRequest { name: "disk0".into(), mgmtdev: "blk".into(), attrs };
        let (place, mark) = (None, None);
        let identity = Identity { number: 3, node: 4, mode: 0o600, uid: 0, gid: 6, place, mark, request };
        let json = serde_json::to_string(&identity).unwrap();
        if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() && !path.exists() {
            std::fs::write(&path, &json).unwrap();
        }
        let found: Identity = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(serde_json::to_string(&found).unwrap(), json);
    }
}
