//! The messages of the control API.
//!
//! They carry what the kernel's netlink family `vdpa` carries (uapi-spec 7.2, 7.3), under the names of iproute2's JSON where
//! it has one. Feature words are hexadecimal strings, because many JSON readers lose the bits of a number above 2^53.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vdpa_core::Errno;
use vdpa_core::features::{Features, Status};

use super::config::MacAddr;

mod attrs;
pub(crate) mod hex;
mod size;
mod updates;

pub use attrs::{AttrError, Attrs, PASSED_ATTR, PATH_ATTRS, parse_size};
pub use size::NewSize;
pub use updates::{LastUpdate, UpdateInfo};

/// The virtio device id of network devices (virtio 1.2 section 5).
pub const ID_NET: u32 = 1;
/// The virtio device id of block devices (virtio 1.2 section 5).
pub const ID_BLOCK: u32 = 2;

/// Largest queue index a request for vendor statistics may name (uapi-spec 7.3).
pub const VSTATS_INDEX_MAX: u32 = 0x8000;

/// A management device, which creates devices of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MgmtDev {
    /// Name, unique together with the bus.
    pub name: String,
    /// Bus it is on, if any: `auxiliary`, `pci`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// Virtio device ids of the devices that it can create, in ascending order.
    pub supported_classes: Vec<u32>,
    /// Most virtqueues of its devices; 0 when it does not report that.
    pub max_supported_vqs: u32,
    /// Features that its devices can offer; 0 when it does not report them.
    #[serde(with = "hex")]
    pub dev_features: Features,
}

impl MgmtDev {
    /// Its name in requests: `NAME` or `BUS/NAME`.
    #[must_use]
    pub fn handle(&self) -> String {
        match &self.bus {
            Some(bus) => format!("{bus}/{}", self.name),
            None => self.name.clone(),
        }
    }
}

/// A device: its constant properties and its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevInfo {
    /// Name, unique.
    pub name: String,
    /// Virtio device id ([`ID_NET`], [`ID_BLOCK`]).
    pub device_id: u32,
    /// Handle of the management device it was created on.
    pub mgmtdev: String,
    /// Vendor id.
    pub vendor_id: u32,
    /// Number of virtqueues.
    pub max_vqs: u32,
    /// Largest ring, in entries.
    pub max_vq_size: u16,
    /// Smallest ring, in entries.
    pub min_vq_size: u16,
    /// The device file that clients open.
    pub path: PathBuf,
    /// Front end that serves it: `fuse` for a file, `cuse` for a character device.
    #[serde(default)]
    pub front: String,
    /// What it serves was opened by whoever has asked for it ([`PASSED_ATTR`]): no path leads the daemon there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub passed: bool,
    /// Its state.
    pub state: DevState,
}

/// State of a device. The fields are read one after the other, so each was true at some time during the request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevState {
    /// Whether a client holds the device file open.
    pub open: bool,
    /// Status register.
    pub status: Status,
    /// Whether the device is suspended.
    pub suspended: bool,
    /// The address space that owns it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// The client that is about to take it over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<Successor>,
    /// Negotiated features; `None` before FEATURES_OK.
    #[serde(default, with = "hex::option", skip_serializing_if = "Option::is_none")]
    pub negotiated_features: Option<Features>,
    /// Pages of 4096 bytes charged to the owner.
    pub pinned_pages: u64,
    /// Most pages of 4096 bytes that may be charged to the owner: the device attribute `memlock`, or else the owner's
    /// RLIMIT_MEMLOCK; `None` when unlimited or without an owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memlock_limit_pages: Option<u64>,
    /// Entries of all IOTLB tables.
    pub mappings: u64,
    /// Most entries of one of them: the device attribute `max_iotlb_entries`, or its default. 0 from a daemon that does not say.
    #[serde(default)]
    pub max_iotlb_entries: u64,
    /// The dirty tracking that the client has begun; `None` when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty: Option<Dirty>,
    /// One entry per virtqueue, in order of index.
    #[serde(default)]
    pub queues: Vec<QueueInfo>,
}

/// Dirty tracking of a device: which pages it writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dirty {
    /// Bytes of a page.
    pub page_size: u64,
    /// Number of ranges of addresses that are tracked.
    pub ranges: u64,
    /// Their pages.
    pub pages: u64,
}

/// The process whose address space owns a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Process id, in the daemon's pid namespace.
    pub pid: u32,
    /// Name of its main thread (`/proc/PID/comm`).
    pub comm: String,
    /// Since when it is the owner, in seconds since 1970-01-01 UTC.
    pub since: u64,
}

/// A client that has opened a device to take it over (device attribute `handover open`) and does not drive it yet. All other
/// fields of [`DevState`] are about the client that drives it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Successor {
    /// Process id, in the daemon's pid namespace: of its owner, and before VHOST_SET_OWNER of the process that opened the device.
    /// `None` when the process is not visible in that namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Name of its main thread, and before VHOST_SET_OWNER of the thread that opened the device; empty when unknown.
    pub comm: String,
    /// When it opened the device, in seconds since 1970-01-01 UTC.
    pub since: u64,
    /// Its own status register. DRIVER_OK is not set before the take-over.
    pub status: Status,
    /// Entries of its own IOTLB tables.
    pub mappings: u64,
}

/// One virtqueue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueInfo {
    /// Index, from 0.
    pub index: u16,
    /// Ring size in entries; 0 before the driver has set it.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub enabled: bool,
    /// Whether the device is processing it.
    pub running: bool,
    /// Requests answered since the device was created. Not reset by a device reset or a live update.
    pub requests: u64,
    /// Bytes of data that these requests moved.
    pub bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests answered with an error because daemons had begun them, and died.
    #[serde(default)]
    pub poison: u64,
}

/// Vendor statistics of one queue (uapi-spec 7.3, DEV_VSTATS_GET).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueVstats {
    /// Device name.
    pub name: String,
    /// Virtio device id.
    pub device_id: u32,
    /// Negotiated features.
    #[serde(with = "hex")]
    pub negotiated_features: Features,
    /// Pairs of data queues, when MQ or RSS is negotiated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vq_pairs: Option<u16>,
    /// Index of the queue.
    pub queue_index: u16,
    /// Names and values, in the order of the parent.
    pub counters: Vec<(String, u64)>,
}

/// A request to create a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddRequest {
    /// Name of the new device.
    pub name: String,
    /// Handle of the management device: `NAME` or `BUS/NAME`.
    pub mgmtdev: String,
    /// Attributes. The management device defines which ones exist.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// The devices that run, as they would be asked for, and where the configuration is. The answer to `GET /v1/config`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The main configuration file.
    pub path: PathBuf,
    /// The devices, in order of creation.
    pub devices: Vec<AddRequest>,
}

/// What was done with the configuration. The answer to `POST /v1/config/reload`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Devices that were added.
    pub added: Vec<String>,
    /// Devices that run in another way than is written: they are as they were, and need to be deleted and added.
    pub differ: Vec<String>,
    /// Devices that run and are not written.
    pub unwritten: Vec<String>,
}

/// A request to change attributes of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    /// The new Ethernet address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// Whether the link is up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<Link>,
    /// The new size of a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<NewSize>,
    /// New limits of a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitChange>,
    /// Whether the disk may become smaller.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// New limits of a disk; those that are not given stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitChange {
    /// Requests in a second; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Bytes in a second; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps: Option<u64>,
    /// For how many milliseconds what is not used is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst_ms: Option<u64>,
}

/// The link of a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Link {
    /// It is up.
    Up,
    /// It is down.
    Down,
}

/// The answer to a [`SetRequest`] that succeeded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAnswer {
    /// Why nothing has changed: the kernel's message, without a full stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// The answer to `GET /v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Always `vdpad`.
    pub daemon: String,
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
}

/// The answer to `GET /v1/daemon`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DaemonInfo {
    /// Version of the daemon.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// When it was started, in seconds since 1970.
    pub since: u64,
    /// What it does.
    #[serde(default)]
    pub role: DaemonRole,
    /// Requests that were answered with an error because two processes or more had begun them, and died.
    #[serde(default)]
    pub poison: u64,
    /// The process that starts it again; absent without `--holder`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<HolderInfo>,
}

/// What a daemon does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DaemonRole {
    /// It serves.
    #[default]
    Daemon,
    /// It has crashed too often: it answers every request with an error.
    Failed,
}

/// A request to replace the running daemon by another program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpgradeRequest {
    /// Absolute path of the program; without one, what lies at the path of the running one by now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
    /// Start the program and have it check what it would take over; the daemon goes on.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a daemon's holder says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HolderInfo {
    /// Its process id, which is that of the service.
    pub pid: u32,
    /// Daemons that it has started, the present one included.
    pub generation: u64,
    /// How many of them were replaced by an upgrade.
    pub upgrades: u64,
    /// How many of them have crashed.
    pub crashes: u64,
    /// Descriptors that it holds.
    pub held: u64,
    /// How many of each kind.
    #[serde(default)]
    pub held_kinds: BTreeMap<String, u64>,
    /// What the present daemon did before it served, if it goes on for another one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recovery: Vec<Phase>,
    /// How the daemon before the present one has ended, if that was a crash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_crash: Option<CrashInfo>,
}

/// A part of a recovery or an upgrade.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

/// A crash of the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CrashInfo {
    /// Process id of the daemon that crashed.
    pub pid: u32,
    /// The signal that ended it; 0 if it exited.
    pub signal: i32,
    /// Its exit status; 0 if a signal ended it.
    pub status: i32,
    /// Whether a core was dumped.
    pub core: bool,
    /// Whether the holder had killed it because it made no progress.
    pub hung: bool,
    /// Milliseconds from the moment at which the holder noticed the crash to that at which the next daemon served.
    pub recovery_ms: f64,
}

/// Why a request was refused.
///
/// Displayed as the message alone; the errno and the hint go to their own lines or fields.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CtlError {
    /// The errno that the kernel would return.
    pub errno: Errno,
    /// What was wrong: the kernel's message where it has one, with its capitalisation, without a full stop.
    pub message: String,
    /// What would be right: a sentence.
    pub hint: Option<String>,
}

impl CtlError {
    /// An error without a hint.
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self { errno, message: message.into(), hint: None }
    }

    /// Adds the sentence that says what would be right.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// The error for an unknown device name (uapi-spec 7.3).
    #[must_use]
    pub fn no_device() -> Self {
        Self::new(Errno::NODEV, "device not found")
            .with_hint("\"vdpactl dev show\" lists the devices that exist.")
    }

    /// The error for an unknown management device in a request to create a device (uapi-spec 7.3, DEV_NEW).
    #[must_use]
    pub fn no_mgmtdev() -> Self {
        Self::new(Errno::NODEV, "Fail to find the specified management device")
            .with_hint("\"vdpactl mgmtdev show\" lists the management devices that exist.")
    }
}

/// The body of every response that is not a success: [`CtlError`] as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// [`CtlError::message`].
    pub error: String,
    /// Symbolic name, such as `ENODEV`; `E?` for a number without a known name.
    pub errno: String,
    /// Its number.
    pub code: i32,
    /// [`CtlError::hint`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl From<CtlError> for ErrorBody {
    fn from(error: CtlError) -> Self {
        Self {
            errno: format!("E{}", error.errno.name().unwrap_or("?")),
            code: error.errno.raw(),
            error: error.message,
            hint: error.hint,
        }
    }
}

impl From<ErrorBody> for CtlError {
    fn from(body: ErrorBody) -> Self {
        Self { errno: Errno::from_raw(body.code), message: body.error, hint: body.hint }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_equal_after_a_round_trip() {
        let error = CtlError::no_device();
        let text = serde_json::to_string(&ErrorBody::from(error.clone())).unwrap();
        assert!(
            text.starts_with(r#"{"error":"device not found","errno":"ENODEV","code":19,"hint":"#),
            "{text}"
        );
        let back: ErrorBody = serde_json::from_str(&text).unwrap();
        assert_eq!(CtlError::from(back), error);
    }

    #[test]
    fn feature_words_keep_all_bits() {
        let mgmtdev = MgmtDev {
            name: "sf.4".into(),
            bus: Some("auxiliary".into()),
            supported_classes: vec![ID_NET],
            max_supported_vqs: 65,
            dev_features: Features(u64::MAX),
        };
        let text = serde_json::to_string(&mgmtdev).unwrap();
        assert!(text.contains(r#""dev_features":"0xffffffffffffffff""#), "{text}");
        assert_eq!(serde_json::from_str::<MgmtDev>(&text).unwrap(), mgmtdev);
        assert_eq!(mgmtdev.handle(), "auxiliary/sf.4");
        assert!(serde_json::from_str::<MgmtDev>(&text.replace("0xf", "f")).is_err());
    }

    #[test]
    fn absent_features_differ_from_no_features() {
        let mut state = DevState::default();
        let text = serde_json::to_string(&state).unwrap();
        assert!(!text.contains("negotiated_features"), "{text}");
        assert_eq!(serde_json::from_str::<DevState>(&text).unwrap(), state);
        state.negotiated_features = Some(Features::NONE);
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<DevState>(&text).unwrap(), state);
    }
}
