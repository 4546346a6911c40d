//! Updates of clients, as the control interface shows them.

use serde::{Deserialize, Serialize};

use super::Owner;

/// Who owns a device, and how that came to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateInfo {
    /// Device name.
    pub name: String,
    /// The address space that owns it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// How often the owner was changed (`VHOST_NEW_OWNER`) since the device was created.
    pub owner_changes: u64,
    /// When it was changed last, in seconds since 1970-01-01 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner_changed: Option<u64>,
    /// Updates that clients have reported as done. A client need not report any.
    pub updates: u64,
    /// Updates that clients have reported as rolled back.
    pub rolled_back: u64,
    /// The last one reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<LastUpdate>,
}

/// An update as its client has reported it: nothing in it was checked but its form.
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
    /// How long no driver was there, in ns.
    pub total_ns: u64,
    /// How long preparing took, in ns.
    pub prepare_ns: u64,
    /// Each phase of the switch by name, in ns, in the order in which they happen.
    pub phases_ns: Vec<(String, u64)>,
    /// Mappings the device has.
    pub mappings: u32,
    /// Virtqueues it has.
    pub queues: u32,
}
