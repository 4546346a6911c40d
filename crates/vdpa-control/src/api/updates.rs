//! Updates of clients, as the control API reports them.

use serde::{Deserialize, Serialize};

use super::Owner;

/// The owner of a device, and the updates of its clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateInfo {
    /// Device name.
    pub name: String,
    /// The address space that owns it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// Number of changes of the owner (`VHOST_NEW_OWNER`) since the device was created.
    pub owner_changes: u64,
    /// Time of the last change of the owner, in seconds since 1970-01-01 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner_changed: Option<u64>,
    /// Updates that clients have reported as done. A client need not report any.
    pub updates: u64,
    /// Updates that clients have reported as rolled back.
    pub rolled_back: u64,
    /// The update that was reported last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<LastUpdate>,
}

/// An update as its client has reported it. The daemon checks the format of a report, not its contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastUpdate {
    /// When it was reported, in seconds since 1970-01-01 UTC.
    pub at: u64,
    /// `exec`, `fork` or `hand-over`.
    pub way: String,
    /// `live`, `resume`, `reset` or `reopen`.
    pub strategy: String,
    /// `done` or `rolled back`.
    pub outcome: String,
    /// Why it was rolled back.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Process that had the device, in the client's pid namespace.
    pub predecessor: i32,
    /// Process that has it.
    pub successor: i32,
    /// Downtime: how long no process drove the device, in ns.
    pub total_ns: u64,
    /// Duration of the preparation, in ns.
    pub prepare_ns: u64,
    /// Phases of the switch in the order in which they happen: name, and duration in ns.
    pub phases_ns: Vec<(String, u64)>,
    /// Mappings of the device.
    pub mappings: u32,
    /// Virtqueues of the device.
    pub queues: u32,
}
