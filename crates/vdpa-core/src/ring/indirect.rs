//! Indirect tables of both ring formats.

use super::layout::{DESCRIPTOR, wraps};
use super::{Memory, RingError};

/// Number of descriptors read at once, since translating an address costs more than copying 256 bytes.
const WINDOW: usize = 16;

/// Largest number of descriptors of a table that are read: those that the 16-bit `next` of a split ring can reach.
pub(super) const ENTRIES_MAX: u32 = 1 << 16;

/// An indirect table, read a few descriptors at a time, each of them once unless the chain jumps back.
pub(super) struct Window {
    iova: u64,
    entries: u32,
    first: u32,
    loaded: u32,
    raw: [[u8; DESCRIPTOR]; WINDOW],
}

impl Window {
    /// A table of `len` bytes. Descriptors beyond [`ENTRIES_MAX`] are ignored.
    pub(super) fn new(iova: u64, len: u32) -> Result<Self, RingError> {
        if len == 0 || !len.is_multiple_of(16) {
            return Err(RingError::IndirectSize { len });
        }
        if wraps(iova, len) {
            return Err(RingError::Wraps { iova, len });
        }
        let entries = (len / 16).min(ENTRIES_MAX);
        Ok(Self { iova, entries, first: 0, loaded: 0, raw: [[0; DESCRIPTOR]; WINDOW] })
    }

    /// Number of descriptors.
    #[inline]
    pub(super) const fn entries(&self) -> u32 {
        self.entries
    }

    #[inline]
    pub(super) fn check(&self, index: u16) -> Result<(), RingError> {
        let (index, entries) = (u32::from(index), self.entries);
        if index < entries { Ok(()) } else { Err(RingError::DescriptorIndex { index, entries }) }
    }

    /// The bytes of the descriptor at `index`, which the caller has checked.
    #[inline]
    pub(super) fn descriptor<M: Memory>(
        &mut self,
        memory: &M,
        index: u32,
    ) -> Result<[u8; DESCRIPTOR], RingError> {
        if index < self.first || index >= self.first + self.loaded {
            let count = self.entries.saturating_sub(index).min(16);
            let bytes = &mut self.raw.as_flattened_mut()[..count as usize * DESCRIPTOR];
            memory.read(self.iova + u64::from(index) * 16, bytes)?;
            (self.first, self.loaded) = (index, count);
        }
        Ok(self.raw[(index - self.first) as usize])
    }
}
