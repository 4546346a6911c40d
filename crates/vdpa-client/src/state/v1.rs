//! Version 1 of the library's own sections.
//!
//! These types are the format. After a release they never change, and only saving and restoring use them, even where a
//! runtime type has the same fields today. A later version adds its own module and converts from these types. File
//! descriptors have the numbers they had in the process that saved, which exec keeps.

use serde::{Deserialize, Serialize};
use vdpa_core::features::Features;
use vdpa_core::ring::driver;

use super::{Sections, StateError};

/// Version of each section below.
pub const VERSION: u32 = 1;
/// Name of the section that holds [`Update`].
pub const UPDATE: &str = "vdpa/update";
/// Name of the section that holds [`Session`].
pub const SESSION: &str = "vdpa/session";
/// Name of the section that holds [`Memory`].
pub const MEMORY: &str = "vdpa/memory";
/// Name of the section that holds [`Queues`].
pub const QUEUES: &str = "vdpa/queues";

/// How the previous image was replaced, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// `live`, `resume`, `reset` or `reopen`.
    pub strategy: String,
    /// Process id of the process that saved; an exec does not change it.
    pub pid: i32,
    /// How long suspending the device took, in ns.
    pub suspend_ns: u64,
    /// How long collecting the state took, in ns.
    pub save_ns: u64,
    /// `CLOCK_MONOTONIC` when the state was complete, in ns.
    pub exec_begin_ns: u64,
}

/// The device and the features negotiated with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Session {
    /// Descriptor of the device's open file; `None` if it was closed (reopen).
    pub device_fd: Option<i32>,
    /// Path at which the device can be opened again, if known.
    pub path: Option<String>,
    /// Virtio device id.
    pub device_id: u32,
    /// Negotiated device features.
    pub features: u64,
    /// Acknowledged backend features.
    pub backend_features: u64,
    /// Whether the device was running (DRIVER_OK).
    pub running: bool,
}

/// All mappings, in the order in which they were made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// One entry for each UPDATE message.
    pub regions: Vec<Region>,
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Name, unique in the session.
    pub name: String,
    /// Descriptor of the memory object.
    pub fd: i32,
    /// First I/O virtual address.
    pub iova: u64,
    /// Size in bytes.
    pub size: u64,
    /// What the device may do: `VHOST_ACCESS_*`.
    pub perm: u8,
    /// Identifier of the address space.
    pub asid: u32,
}

/// All queues, in the order in which they were set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queues {
    /// One entry for each vring.
    pub queues: Vec<Queue>,
}

/// One vring and the state of its driver side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// Index of the virtqueue.
    pub index: u16,
    /// Entries of the ring.
    pub size: u16,
    /// Name of the region that contains the ring.
    pub region: String,
    /// Offset of the descriptor area in the region, in bytes.
    pub desc: u64,
    /// Offset of the driver area (available ring) in the region, in bytes.
    pub avail: u64,
    /// Offset of the device area (used ring) in the region, in bytes.
    pub used: u64,
    /// The kick eventfd.
    pub kick_fd: i32,
    /// The call eventfd.
    pub call_fd: i32,
    /// The vring base (`VHOST_GET_VRING_BASE`), at which the device continues; `None` if it was not stopped.
    pub base: Option<u32>,
    /// The driver side of the ring.
    pub driver: Driver,
}

/// The driver side of a split ring. Its size is that of the queue, its features are those of the session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Driver {
    /// Free-running index of the next entry of the available ring to fill.
    pub avail_index: u16,
    /// Free-running index of the next entry of the used ring to read.
    pub last_used_index: u16,
    /// Number of descriptors that are not in flight.
    pub free: u16,
    /// Requests in flight, in any order.
    pub in_flight: Vec<InFlight>,
}

/// One request in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InFlight {
    /// The token with which the request was submitted.
    pub token: u64,
    /// Indices of its descriptors, in the order of the chain.
    pub descriptors: Vec<u16>,
    /// Number of bytes that the device may write.
    pub writable: u32,
}

impl Driver {
    pub(crate) fn save(state: driver::DriverState) -> Self {
        let driver::DriverState { size: _, features: _, avail_index, last_used_index, free, in_flight } =
            state;
        let in_flight = in_flight
            .into_iter()
            .map(|driver::InFlight { token, descriptors, writable }| InFlight {
                token,
                descriptors,
                writable,
            })
            .collect();
        Self { avail_index, last_used_index, free, in_flight }
    }

    /// Converts without any check. [`driver::SplitDriver::adopt`] checks the result.
    pub(crate) fn restore(self, size: u16, features: Features) -> driver::DriverState {
        let Self { avail_index, last_used_index, free, in_flight } = self;
        let in_flight = in_flight
            .into_iter()
            .map(|InFlight { token, descriptors, writable }| driver::InFlight {
                token,
                descriptors,
                writable,
            })
            .collect();
        driver::DriverState { size, features, avail_index, last_used_index, free, in_flight }
    }
}

/// All sections of the library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// See [`Update`].
    pub update: Update,
    /// See [`Session`].
    pub session: Session,
    /// See [`Memory`].
    pub memory: Memory,
    /// See [`Queues`].
    pub queues: Queues,
}

impl State {
    /// Adds the library's sections to `sections`, which has those of the caller. This version is not written any more.
    ///
    /// # Errors
    /// [`StateError::Name`] if a section of the caller has a name that is reserved for the library.
    #[cfg(fuzzing)]
    pub fn put(&self, sections: &mut Sections) -> Result<(), StateError> {
        sections.check_names()?;
        sections.push_json(UPDATE, VERSION, &self.update)?;
        sections.push_json(SESSION, VERSION, &self.session)?;
        sections.push_json(MEMORY, VERSION, &self.memory)?;
        sections.push_json(QUEUES, VERSION, &self.queues)?;
        Ok(())
    }

    /// Removes the library's sections from `sections` and decodes them. The caller's sections remain.
    ///
    /// # Errors
    /// [`StateError`] if a section is missing, has another version or cannot be decoded, or if there is an unknown section
    /// of the library that is not optional.
    pub fn take(sections: &mut Sections) -> Result<Self, StateError> {
        let state = Self {
            update: sections.require_json(UPDATE, VERSION)?,
            session: sections.require_json(SESSION, VERSION)?,
            memory: sections.require_json(MEMORY, VERSION)?,
            queues: sections.require_json(QUEUES, VERSION)?,
        };
        sections.end_of_own()?;
        Ok(state)
    }
}
