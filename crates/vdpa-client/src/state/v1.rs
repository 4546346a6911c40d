//! Version 1 of the library's own sections.
//!
//! These types are the format: they are never changed once released and never used outside saving and
//! restoring, even where a runtime type looks the same today. A later version adds its own module and
//! converts from these. Numbers of file descriptors are those of the process that saved; exec keeps them.

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

/// How and when the old image left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// `live`, `resume`, `reset` or `reopen`.
    pub strategy: String,
    /// Process that saved; an exec keeps it.
    pub pid: i32,
    /// Time that suspending took, in ns.
    pub suspend_ns: u64,
    /// Time that collecting the state took, in ns.
    pub save_ns: u64,
    /// `CLOCK_MONOTONIC` when the state was complete, in ns.
    pub exec_begin_ns: u64,
}

/// The device and what was negotiated with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Session {
    /// The device's open file; `None` if it was closed (reopen).
    pub device_fd: Option<i32>,
    /// Where the device can be opened again, if known.
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
    /// One entry per UPDATE.
    pub regions: Vec<Region>,
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Name, unique in the session.
    pub name: String,
    /// The memory object.
    pub fd: i32,
    /// First I/O virtual address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Access for the device: `VHOST_ACCESS_*`.
    pub perm: u8,
    /// Address space.
    pub asid: u32,
}

/// All queues, in the order in which they were set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queues {
    /// One entry per vring.
    pub queues: Vec<Queue>,
}

/// One vring and where its driver side stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// Index of the virtqueue.
    pub index: u16,
    /// Entries of the ring.
    pub size: u16,
    /// Name of the region it lies in.
    pub region: String,
    /// Offset of the descriptor area in the region, in bytes.
    pub desc: u64,
    /// Offset of the driver area.
    pub avail: u64,
    /// Offset of the device area.
    pub used: u64,
    /// The kick eventfd.
    pub kick_fd: i32,
    /// The call eventfd.
    pub call_fd: i32,
    /// Where the device goes on (`VHOST_GET_VRING_BASE`), if it was stopped.
    pub base: Option<u32>,
    /// The driver side of the ring.
    pub driver: Driver,
}

/// The driver side of a split ring; its size and features are those of the queue and the session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Driver {
    /// The next entry of the available ring to fill, free running.
    pub avail_index: u16,
    /// The next entry of the used ring to take, free running.
    pub last_used_index: u16,
    /// Descriptors not in flight.
    pub free: u16,
    /// Requests in flight, in any order.
    pub in_flight: Vec<InFlight>,
}

/// One request in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InFlight {
    /// The submitter's token.
    pub token: u64,
    /// Its descriptors, in order.
    pub descriptors: Vec<u16>,
    /// Bytes the device may write.
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

    /// Unchecked; adopting it checks.
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

/// The library's sections together.
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
    /// Adds the library's sections to the caller's.
    ///
    /// # Errors
    /// [`StateError::Name`] when a caller's section has a name of the library.
    pub fn put(&self, sections: &mut Sections) -> Result<(), StateError> {
        sections.check_names()?;
        sections.push_json(UPDATE, VERSION, &self.update)?;
        sections.push_json(SESSION, VERSION, &self.session)?;
        sections.push_json(MEMORY, VERSION, &self.memory)?;
        sections.push_json(QUEUES, VERSION, &self.queues)?;
        Ok(())
    }

    /// Takes the library's sections out; the caller's stay.
    ///
    /// # Errors
    /// [`StateError`]: missing, of another version, unreadable, or a section of the library that is not
    /// known and not optional.
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
