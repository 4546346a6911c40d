//! Virtqueue rings over abstract memory: the device side and the driver side.
//!
//! | side | type | the other side is |
//! |---|---|---|
//! | device | [`Ring`]: [`SplitQueue`](split::SplitQueue) or [`PackedQueue`](packed::PackedQueue) | the driver: hostile, concurrent |
//! | driver | [`SplitDriver`](driver::SplitDriver), [`PackedDriver`](driver::PackedDriver) | the device: untrusted, concurrent |
//!
//! All rings are those of virtio 1: little endian, whatever the machine is.

mod chain;
pub mod driver;
mod error;
mod in_order;
mod indirect;
pub mod inflight;
mod layout;
pub mod packed;
mod queue;
pub mod split;

pub use chain::{BufferSlice, Chain, Pieces};
pub use error::RingError;
pub use layout::AreaSizes;
pub use queue::{Ring, area_sizes};

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;

use crate::types::Perm;

/// An access to ring or buffer memory that failed: unmapped, forbidden, or gone with its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("no access to client memory at {addr:#x}")]
pub struct Fault {
    /// Address (of the table) or offset (in the area) that could not be reached.
    pub addr: u64,
}

/// Client memory through one translation table, by I/O virtual address.
pub trait Memory {
    /// A ring area resolved once.
    type Area: Area;

    /// Copies from client memory, which must be readable for the device throughout.
    ///
    /// # Errors
    /// [`Fault`]; `buf` may have been changed in part.
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), Fault>;

    /// Copies into client memory, which must be writable for the device throughout.
    ///
    /// # Errors
    /// [`Fault`]; a part may have been written.
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Fault>;

    /// Resolves `size` bytes for repeated access.
    ///
    /// # Errors
    /// [`Fault`] when a byte is unmapped or does not allow `perm`.
    fn area(&self, iova: u64, size: u64, perm: Perm) -> Result<Self::Area, Fault>;
}

/// A piece of shared memory with the atomic accesses a ring needs. Offsets are in bytes from its start.
///
/// The other side is hostile and concurrent: every access reads or writes memory once, and what was read is the
/// caller's to check.
pub trait Area {
    /// Bytes.
    fn size(&self) -> usize;

    /// Loads a little-endian u16 at an even offset, with acquire ordering.
    ///
    /// # Errors
    /// [`Fault`] beyond the end or when the memory is gone.
    fn load_u16(&self, offset: usize) -> Result<u16, Fault>;

    /// Stores a little-endian u16 at an even offset, with release ordering.
    ///
    /// # Errors
    /// As [`load_u16`](Self::load_u16).
    fn store_u16(&self, offset: usize, value: u16) -> Result<(), Fault>;

    /// Copies out.
    ///
    /// # Errors
    /// As [`load_u16`](Self::load_u16).
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault>;

    /// Copies in.
    ///
    /// # Errors
    /// As [`load_u16`](Self::load_u16).
    fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault>;

    /// Orders every access before it with every access after it, also a store with a later load.
    ///
    /// A full barrier of the processor, which is right for memory that is mapped. For memory with rules of its own,
    /// such as that of a model checker.
    #[inline]
    fn barrier(&self) {
        fence(Ordering::SeqCst);
    }
}

/// One buffer of a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// I/O virtual address.
    pub iova: u64,
    /// Bytes.
    pub len: u32,
}
