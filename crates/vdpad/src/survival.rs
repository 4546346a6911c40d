//! [`Survival`]: what this daemon has held for its successor, and what it finds of its predecessor.
//!
//! With `--holder` the main process of the service is the holder of `vdpa-holder`, and the daemon is its child. The daemon
//! has its mount, the journal of each device, and what the journals name held there. After a crash the holder starts the
//! daemon again, which finds all of that, and goes on.
//! An upgrade is the same with another program, which is started in advance.

mod files;
mod upgrade;

pub use upgrade::TakeOverError;

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vdpa_backend::front::fuse::{DeviceFiles, FileAttributes};
use vdpa_backend::persist::items::{device::IDENTITY, program::CONTROL};
use vdpa_backend::persist::{Held, Kind, RINGS, RestoredSpaces, Store, key, split_key};
use vdpa_control::api::{AddRequest, CrashInfo, CtlError, DaemonInfo, DaemonRole, HolderInfo, Phase};
use vdpa_core::Errno;
use vdpa_core::error::chain;
use vdpa_holder::client::{Client, Start};
use vdpa_holder::progress;
use vdpa_holder::protocol::{Role, Status};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::memfd;

pub(crate) use self::files::LegacyParts;
use self::files::{LegacyFiles, SavedPlace};
use crate::bus::{HeldDevices, file_name};
use crate::control::{Access, BindError, ControlSocket, Pauser};
use crate::devices::{DiskFacts, Kept};

/// Bytes of the longest identity: a request to add a device is at most that long.
const IDENTITY_MAX: u64 = 1 << 20;

/// The phase at whose end a process serves.
const SERVE: &str = "serve";

/// The connection to the holder.
#[derive(Debug)]
pub struct Survival {
    client: Arc<Mutex<Client>>,
    start: Start,
    next_device: AtomicU32,
    /// What this process did before, each with its end: `CLOCK_MONOTONIC` in ns. The first is a beginning.
    phases: Mutex<Vec<(&'static str, u64)>>,
    /// Pauses the control socket.
    pauser: OnceLock<Pauser>,
    /// Path of the control socket.
    control_path: OnceLock<PathBuf>,
    /// What the holder said of itself last, when another process has become the daemon.
    last_status: OnceLock<Status>,
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
    /// Where the file is, if it has a connection of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) place: Option<SavedPlace>,
    /// Place of the mark on its open file, by which the next process knows that this one's requests have ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mark: Option<u64>,
    /// What its disk was when it was made. Programs of version 1 take what the file is when they make it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) disk: Option<DiskFacts>,
    /// As it was asked for, without the attributes of every device.
    pub(crate) request: AddRequest,
}

impl Identity {
    /// Of a new device, whose file is in `files`.
    pub(crate) fn new(number: u32, request: &AddRequest, kept: &Kept, files: &DeviceFiles) -> Self {
        let name = file_name(number);
        let FileAttributes { mode, uid, gid } =
            files.attributes(&name).unwrap_or_else(FileAttributes::private);
        let node = files.node(&name).unwrap_or(0);
        let (mark, disk) = (kept.mark(), kept.disk());
        Self { number, node, mode, uid, gid, place: None, mark, disk, request: request.clone() }
    }

    /// What is held of a device says what it is, or why that cannot be read.
    fn of(held: Held) -> Result<Self, String> {
        let json = read(held.fd).ok_or("what it is cannot be read")?;
        serde_json::from_str(&json).map_err(|error| format!("what it is cannot be understood: {error}"))
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
    /// The socket of the control API.
    pub(crate) control: Option<Held>,
    /// io_urings of worker threads, with their tables.
    pub(crate) rings: Vec<Held>,
    /// Devices by their number: what they are, and everything that is held of them.
    pub(crate) devices: HeldDevices,
    /// Why other devices cannot be read: by a program of another version, for example.
    pub(crate) unreadable: Vec<String>,
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
        progress::install(client.progress().clone());
        let begin = start.crash.map_or_else(monotonic_ns, |end| end.heard_ns);
        let phases = Mutex::new(vec![("", begin), ("start", monotonic_ns())]);
        let client = Arc::new(Mutex::new(client));
        let this = Self {
            client,
            start,
            next_device: AtomicU32::new(1),
            phases,
            pauser: OnceLock::new(),
            control_path: OnceLock::new(),
            last_status: OnceLock::new(),
            upgrading: Mutex::default(),
            peer,
            spaces: RestoredSpaces::default(),
        };
        this.say_hello();
        Ok(Some(this))
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

    /// Tells the log how long the recovery from a crash has taken, from the holder's notice of it on.
    fn log_recovery(&self, heard_ns: u64) {
        let since = |at: u64| Duration::from_nanos(at.saturating_sub(heard_ns)).as_secs_f64() * 1e3;
        let phases = self.phases.lock();
        let phases = phases.iter().skip(1).map(|(what, at)| format!("{what} {:.2} ms", since(*at)));
        let phases: Vec<_> = phases.collect();
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

    /// A part of the recovery has ended.
    pub(crate) fn phase(&self, name: &'static str) {
        self.phases.lock().push((name, monotonic_ns()));
    }

    /// What `daemon show` tells of this process, without what its devices know.
    ///
    /// # Errors
    /// When the holder does not answer.
    pub(crate) fn daemon_info(&self, since: SystemTime) -> Result<DaemonInfo, CtlError> {
        let holder = self.info().map_err(|errno| {
            CtlError::new(errno, "the holder does not answer")
                .with_hint("The service is not protected; see its log.")
        })?;
        let since = since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let role = if self.role() == Role::Failed { DaemonRole::Failed } else { DaemonRole::Daemon };
        let (version, pid) = (env!("CARGO_PKG_VERSION").into(), std::process::id());
        Ok(DaemonInfo { version, pid, since, role, poison: 0, holder: Some(holder) })
    }

    /// What `daemon show` tells of the holder.
    fn info(&self) -> Result<HolderInfo, Errno> {
        let Status { pid, generation, upgrades, crashes, held, kinds, .. } = {
            let mut client = self.client.lock();
            self.last_status.get().map_or_else(|| client.status(), |status| Ok(*status))?
        };
        let phases = self.phases.lock();
        let served_ns = phases.iter().rfind(|(name, _)| *name == SERVE).map_or(0, |(_, at)| *at);
        let last_crash = self.start.crash.map(|end| CrashInfo {
            pid: end.pid.unsigned_abs(),
            signal: end.signal,
            status: end.status,
            core: end.core,
            hung: end.hung,
            recovery_ms: Duration::from_nanos(served_ns.saturating_sub(end.heard_ns)).as_secs_f64() * 1e3,
        });
        let names = Kind::ALL.map(|kind| format!("{kind:?}").to_lowercase());
        let held_kinds = names.into_iter().zip(kinds).filter(|&(_, count)| count > 0).collect();
        let recovery = phases.windows(2).filter_map(|pair| {
            let [(_, begin), (name, end)] = *pair else { return None };
            let ms = Duration::from_nanos(end.saturating_sub(begin)).as_secs_f64() * 1e3;
            (self.generation() > 1).then(|| Phase { name: name.into(), ms })
        });
        let recovery = recovery.collect();
        let pid = pid.unsigned_abs();
        Ok(HolderInfo { pid, generation, upgrades, crashes, held, held_kinds, recovery, last_crash })
    }

    /// Says that this process serves.
    ///
    /// # Errors
    /// `EPIPE` without a holder.
    pub fn ready(&self) -> Result<(), Errno> {
        self.phase(SERVE);
        if let Some(crash) = self.start.crash {
            self.log_recovery(crash.heard_ns);
        }
        self.client.lock().ready()
    }

    /// Says that this process goes on, and there was no upgrade: whoever has asked for it by a signal may wait.
    pub(crate) fn goes_on(&self) {
        if let Err(errno) = self.client.lock().ready() {
            tracing::warn!(%errno, "the holder does not know that there was no upgrade");
        }
    }

    /// Says that the service ends with this process. Returns whether it is to be ended: when the holder has died, the service
    /// manager has what was held and starts the next one, which needs everything in its place.
    #[must_use]
    pub fn stopping(&self) -> bool {
        match self.client.lock().stopping() {
            Ok(()) => true,
            Err(errno) => {
                let stored = self.start.status.stored;
                tracing::warn!(%errno, stored, "the holder has died before this daemon");
                !stored
            }
        }
    }

    /// What pauses the control socket, for an upgrade.
    pub(crate) fn set_pauser(&self, pauser: Pauser) {
        let _ = self.pauser.set(pauser);
    }

    /// The control socket at `path`: that of a predecessor if there is one, else a new one, which is held.
    ///
    /// # Errors
    /// [`BindError`].
    pub(crate) fn control_socket(
        &self,
        path: &Path,
        access: Access,
        held: Option<Held>,
    ) -> Result<ControlSocket, BindError> {
        let _ = self.control_path.set(path.to_owned());
        if let Some(Held { fd, record, .. }) = held {
            match ControlSocket::adopt(path, fd, &record, access) {
                Ok(socket) => return Ok(socket),
                Err(error) => tracing::warn!("the control socket is made anew: {}", chain(&error)),
            }
            let _ = self.store().release(key(0, CONTROL));
        }
        // A former daemon may still be ending, so that its socket seems to be in use.
        let goes_on = self.generation() > 1;
        let socket =
            if goes_on { ControlSocket::rebind(path, access)? } else { ControlSocket::bind(path, access)? };
        if let Err(errno) = self.store().hold(key(0, CONTROL), Kind::Other, socket.as_fd(), &socket.record())
        {
            tracing::warn!(%errno, "the control socket does not survive a crash of this daemon");
        }
        Ok(socket)
    }

    /// A number for one more device.
    pub(crate) fn new_device(&self) -> u32 {
        self.next_device.fetch_add(1, Ordering::Relaxed)
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
        let (legacy, last, orphans) = Legacy::of(self.client.lock().list()?);
        self.next_device.fetch_max(last + 1, Ordering::Relaxed);
        // A candidate finds them being added, or deleted, or refuses to take over.
        if !self.is_candidate() {
            for reason in &legacy.unreadable {
                tracing::error!("a device cannot be restored: {reason}");
            }
            for key in orphans {
                let _ = self.store().release(key);
            }
        }
        Ok(legacy)
    }
}

impl Legacy {
    /// What these items are; with the greatest number of a device, and the keys of what belongs to none.
    fn of(held: Vec<Held>) -> (Self, u32, Vec<u64>) {
        let mut legacy = Self::default();
        let mut items: BTreeMap<u32, Vec<Held>> = BTreeMap::new();
        for held in held {
            match split_key(held.key) {
                (0, CONTROL) => legacy.control = Some(held),
                (0, item) if item >= RINGS => legacy.rings.push(held),
                (0, item) => {
                    if legacy.files.take(item, held).is_some() {
                        tracing::warn!(item, "something unknown is held");
                    }
                }
                (device, _) => items.entry(device).or_default().push(held),
            }
        }
        let last = items.keys().next_back().copied().unwrap_or(0);
        let mut orphans = Vec::new();
        for (device, mut items) in items {
            let keys: Vec<u64> = items.iter().map(|held| held.key).collect();
            let at = items.iter().position(|held| split_key(held.key).1 == IDENTITY);
            match at.map(|at| Identity::of(items.swap_remove(at))) {
                Some(Ok(identity)) => drop(legacy.devices.insert(device, (identity, items))),
                Some(Err(reason)) => {
                    legacy.unreadable.push(reason);
                    orphans.extend(keys);
                }
                // It was being added, or deleted.
                None => orphans.extend(keys),
            }
        }
        (legacy, last, orphans)
    }
}

/// Ends the mounts that are among `items`, after the last daemon: their clients get an error from the kernel. That of the directory
/// ends when no process has its connection any more, if it was `given` to this service.
pub fn unmount_held(items: Vec<Held>, given: bool) {
    Legacy::of(items).0.unmount(given);
}

/// A memory file with this text.
pub(crate) fn text(text: &str) -> Result<OwnedFd, Errno> {
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
    use super::files::SavedPlace;
    use super::*;
    use crate::vdpa_bus::Bind;

    /// A candidate of another version must not take it for one that is being added, and lose it.
    #[test]
    fn a_device_that_cannot_be_read_is_told_from_one_that_is_being_added() {
        let held = |device, item, json| {
            let fd = text(json).unwrap();
            Held { key: key(device, item), kind: Kind::Memory, record: Vec::new(), fd }
        };
        let good = r#"{"number":3,"node":4,"mode":384,"uid":0,"gid":6,"request":{"name":"a","mgmtdev":"blk","attrs":{}}}"#;
        let items = vec![
            held(1, 0, ""),
            held(2, 0, ""),
            held(2, IDENTITY, good),
            held(3, 0, ""),
            held(3, IDENTITY, r#"{"number":"of a later version"}"#),
        ];
        let (legacy, last, orphans) = Legacy::of(items);
        assert_eq!((legacy.devices.keys().copied().collect::<Vec<_>>(), last), (vec![2], 3));
        assert_eq!(legacy.unreadable.len(), 1);
        assert!(legacy.unreadable[0].contains("of a later version"), "{:?}", legacy.unreadable);
        assert_eq!(orphans, [key(1, 0), key(3, 0), key(3, IDENTITY)]);
    }

    #[test]
    fn the_identity_of_version_1_is_read() {
        identity_is_read("identity-v1.json", None, None);
    }

    #[test]
    fn the_identity_of_a_disk_of_version_2_is_read() {
        identity_is_read("identity-v2.json", Some(DiskFacts { sectors: 2048, discard: false }), None);
    }

    #[test]
    fn the_identity_of_a_device_of_vduse_of_version_3_is_read() {
        let disk = Some(DiskFacts { sectors: 2048, discard: false });
        identity_is_read("identity-v3.json", disk, Some(SavedPlace::Vduse { bind: Bind::Virtio }));
    }

    /// What a device is, as a version has saved it. `VDPA_WRITE_GOLDEN=1` writes it where there is none; it never changes.
    fn identity_is_read(golden: &str, disk: Option<DiskFacts>, place: Option<SavedPlace>) {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(golden);
        let mut attrs = vdpa_control::api::Attrs::new();
        attrs.insert("path", "/srv/disk.img").unwrap();
        let request = AddRequest { name: "disk0".into(), mgmtdev: "blk".into(), attrs };
        let (number, mark) = (3, None);
        let identity = Identity { number, node: 4, mode: 0o600, uid: 0, gid: 6, place, mark, disk, request };
        let json = serde_json::to_string(&identity).unwrap();
        if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() && !path.exists() {
            std::fs::write(&path, &json).unwrap();
        }
        let found: Identity = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(serde_json::to_string(&found).unwrap(), json);
    }
}
