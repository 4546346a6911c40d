//! Ring memory with nothing around it: what the core costs when reaching memory costs as little as it can.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use vdpa_core::iotlb::Lookup;
use vdpa_core::ring::{Area, Buffer, Fault, Memory};
use vdpa_core::types::{IovaRange, Perm};

/// An area of a split ring. Words and what is read in one piece are kept apart, since safe code cannot have both in one
/// place; which of them an access means follows from its length.
#[derive(Clone)]
pub(crate) struct PlainArea(Arc<Words>);

struct Words {
    size: usize,
    narrow: Box<[AtomicU16]>,
    wide: Box<[AtomicU64]>,
}

impl PlainArea {
    pub(crate) fn new(size: usize) -> Self {
        let narrow = (0..size.div_ceil(2)).map(|_| AtomicU16::new(0)).collect();
        let wide = (0..=size.div_ceil(8)).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Words { size, narrow, wide }))
    }

    #[inline]
    fn narrow(&self, offset: usize) -> Result<&AtomicU16, Fault> {
        self.0.narrow.get(offset / 2).ok_or(Fault { addr: offset as u64 })
    }

    /// Descriptors begin at multiples of 16, used elements 4 bytes behind a multiple of 8.
    #[inline]
    fn wide(&self, offset: usize, len: usize) -> Result<&[AtomicU64], Fault> {
        let at = (offset + 4) / 8;
        self.0.wide.get(at..at + len / 8).ok_or(Fault { addr: offset as u64 })
    }
}

impl Area for PlainArea {
    fn size(&self) -> usize {
        self.0.size
    }

    #[inline]
    fn load_u16(&self, offset: usize) -> Result<u16, Fault> {
        Ok(self.narrow(offset)?.load(Ordering::Acquire))
    }

    #[inline]
    fn store_u16(&self, offset: usize, value: u16) -> Result<(), Fault> {
        self.narrow(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    #[inline]
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault> {
        for (word, bytes) in self.wide(offset, buf.len())?.iter().zip(buf.as_chunks_mut().0) {
            *bytes = word.load(Ordering::Relaxed).to_le_bytes();
        }
        Ok(())
    }

    #[inline]
    fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault> {
        if let [low, high] = *data {
            self.narrow(offset)?.store(u16::from_le_bytes([low, high]), Ordering::Relaxed);
            return Ok(());
        }
        for (word, &bytes) in self.wide(offset, data.len())?.iter().zip(data.as_chunks().0) {
            word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Regions by address, and where each would be in this process.
pub(crate) struct PlainTable {
    lookup: Lookup<Perm>,
}

impl PlainTable {
    pub(crate) fn new(ranges: Vec<IovaRange>) -> Self {
        Self { lookup: Lookup::new(ranges.into_iter().map(|range| (range, Perm::RW)).collect()) }
    }

    /// Where a buffer is and how much of it is there in one piece.
    #[inline]
    pub(crate) fn translate(&self, buffer: Buffer, perm: Perm) -> Option<(u64, u64)> {
        let &(range, allowed) = self.lookup.find(buffer.iova)?;
        let (offset, room) = (buffer.iova - range.first(), (range.last() - buffer.iova).saturating_add(1));
        allowed.allows(perm).then(|| (0x7f00_0000_0000 + offset, room.min(buffer.len.into())))
    }
}

impl Memory for PlainTable {
    type Area = PlainArea;

    fn read(&self, iova: u64, _: &mut [u8]) -> Result<(), Fault> {
        Err(Fault { addr: iova })
    }

    fn write(&self, iova: u64, _: &[u8]) -> Result<(), Fault> {
        Err(Fault { addr: iova })
    }

    fn area(&self, iova: u64, _: u64, _: Perm) -> Result<PlainArea, Fault> {
        Err(Fault { addr: iova })
    }
}
