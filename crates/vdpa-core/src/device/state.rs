//! The state of a device as [`Record`]s: written to a log, and restored in another process.
//!
//! | step | who | call |
//! |---|---|---|
//! | everything at once | the process that has the device | [`Device::snapshot`](super::Device::snapshot) |
//! | what has changed, after each request and before its answer | the same | [`Device::take_changes`](super::Device::take_changes) |
//! | stop the queues, to give the device away | the same | [`Device::quiesce`](super::Device::quiesce) |
//! | go on after all | the same | [`Device::resume_queues`](super::Device::resume_queues) |
//! | build the device again, queues stopped | its successor | [`Device::restore`](super::Device::restore) |
//! | start the queues that ran | the successor | [`Device::resume_queues`](super::Device::resume_queues) |
//!
//! Address spaces, memory and events are objects of the platform. Records name them by numbers that a [`StateSink`]
//! gives out and a [`StateSource`] takes back. [`encode`] and [`decode`] turn records into bytes and back; [`Image`]
//! is what a sequence of them says.
//!
//! Records are a trust boundary, like a client's requests: they may come from another version of the program, or from
//! a damaged log. `docs/daemon-state.md` describes them.

mod codec;
mod image;
pub(crate) mod kind;
mod payload;
mod record;
mod restore;
mod snapshot;
mod validate;

pub use codec::{
    CHECKSUM_LEN, DecodeError, EncodeError, HEADER_LEN, MAX_PAYLOAD, decode, decode_all, encode, encode_all,
};
pub use image::{ApplyError, Image};
pub use kind::{KINDS, Kind};
pub use record::{
    ConfigBytes, HandleState, HandoverState, LogState, MappingState, MemoryRef, Record, Ring, Shape, TableId,
    TableRole, VringState,
};
pub(crate) use restore::{check_group, check_vring};
pub(crate) use snapshot::mapping_record;
pub use validate::RestoreError;
pub(crate) use validate::{check_shape, ensure, ensure_handle, require};

use crate::host::Host;
use crate::types::{Perm, Result};

/// Names objects of the platform in records, for whoever keeps them.
///
/// The same object must get the same number each time as long as it is in use, since a record that says the same as
/// the one before is left out. A number says nothing to anybody but the [`StateSource`] that belongs to the sink.
/// Called in [`Device::snapshot`](super::Device::snapshot) and [`Device::take_changes`](super::Device::take_changes),
/// under the device's lock; should not block.
pub trait StateSink<H: Host> {
    /// The number of an address space.
    ///
    /// # Errors
    /// Whatever keeps it from being kept (`EMFILE`); the snapshot fails with it.
    fn address_space(&mut self, space: &H::AddressSpace) -> Result<u64>;

    /// Where a piece of memory is.
    ///
    /// # Errors
    /// As [`address_space`](Self::address_space).
    fn memory(&mut self, memory: &H::Memory) -> Result<MemoryRef>;

    /// The number of an event.
    ///
    /// # Errors
    /// As [`address_space`](Self::address_space).
    fn event(&mut self, event: &H::Event) -> Result<u64>;
}

/// Finds the objects that records name.
///
/// The numbers are as untrusted as everything else in a record.
pub trait StateSource<H: Host> {
    /// The address space with this number. It is the same one for each device, so that all of them charge one account.
    ///
    /// # Errors
    /// `ENOENT` when nothing has this number; whatever keeps it from being used.
    fn address_space(&mut self, id: u64) -> Result<H::AddressSpace>;

    /// `size` bytes of memory, of which the device needs the access `perm`.
    ///
    /// # Errors
    /// As [`address_space`](Self::address_space), and when the object does not have so many bytes there.
    fn memory(&mut self, at: MemoryRef, size: u64, perm: Perm) -> Result<H::Memory>;

    /// The event with this number.
    ///
    /// # Errors
    /// As [`address_space`](Self::address_space).
    fn event(&mut self, id: u64) -> Result<H::Event>;
}
