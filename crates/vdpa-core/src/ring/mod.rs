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

/// A failed access to ring or buffer memory: unmapped, not permitted, or no longer existing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("no access to client memory at {addr:#x}")]
pub struct Fault {
    /// I/O virtual address, or offset in the area, that could not be accessed.
    pub addr: u64,
}

/// Client memory through one translation table, accessed by I/O virtual address. Called by the thread that serves the ring;
/// no method waits for the client or for other requests.
pub trait Memory {
    /// A ring area whose address is translated once.
    type Area: Area;

    /// Copies from client memory, which must be readable for the device throughout.
    ///
    /// # Errors
    /// [`Fault`]; `buf` may be partly overwritten.
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), Fault>;

    /// Copies into client memory, which must be writable for the device throughout.
    ///
    /// # Errors
    /// [`Fault`]; part of the data may be written.
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Fault>;

    /// Translates `size` bytes for repeated access.
    ///
    /// # Errors
    /// [`Fault`] when a byte is not mapped or its mapping does not allow `perm`.
    fn area(&self, iova: u64, size: u64, perm: Perm) -> Result<Self::Area, Fault>;
}

/// A piece of shared memory with the atomic accesses a ring needs. Offsets are in bytes from its start.
///
/// The other side is hostile and runs concurrently, so every method accesses memory once, and the caller checks the values
/// it reads.
pub trait Area {
    /// Size in bytes.
    fn size(&self) -> usize;

    /// Loads a little-endian u16 at an even offset, with acquire ordering.
    ///
    /// # Errors
    /// [`Fault`] beyond the end, or when the memory no longer exists.
    fn load_u16(&self, offset: usize) -> Result<u16, Fault>;

    /// Stores a little-endian u16 at an even offset, with release ordering.
    ///
    /// # Errors
    /// As [`load_u16`](Self::load_u16).
    fn store_u16(&self, offset: usize, value: u16) -> Result<(), Fault>;

    /// Copies `buf.len()` bytes from `offset` into `buf`.
    ///
    /// # Errors
    /// As [`load_u16`](Self::load_u16).
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault>;

    /// Copies `data` to `offset`.
    ///
    /// # Errors
    /// As [`load_u16`](Self::load_u16).
    fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault>;

    /// Orders every access before it with every access after it, also a store with a later load.
    ///
    /// The default is a full barrier of the processor, which is correct for mapped memory. A model checker overrides it.
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
