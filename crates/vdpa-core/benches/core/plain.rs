//! Ring memory without a platform: shows the cost of the core when memory accesses are as cheap as possible.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use vdpa_core::iotlb::Lookup;
use vdpa_core::ring::{Area, Buffer, Fault, Memory};
use vdpa_core::types::{IovaRange, Perm};

/// An area of a split ring. Words, descriptors and used elements are stored separately, because safe code cannot access
/// the same memory in several widths. The length of an access selects one of them.
#[derive(Clone)]
pub(crate) struct PlainArea {
    size: usize,
    words: Arc<[AtomicU16]>,
    descriptors: Arc<[[AtomicU64; 2]]>,
    elements: Arc<[AtomicU64]>,
}

impl PlainArea {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            size,
            words: (0..size.div_ceil(2)).map(|_| AtomicU16::new(0)).collect(),
            descriptors: (0..size.div_ceil(16)).map(|_| [0, 0].map(AtomicU64::new)).collect(),
            elements: (0..size.div_ceil(8)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    #[inline]
    fn word(&self, offset: usize) -> Result<&AtomicU16, Fault> {
        self.words.get(offset / 2).ok_or(Fault { addr: offset as u64 })
    }

    #[inline]
    fn descriptor(&self, offset: usize) -> Result<&[AtomicU64; 2], Fault> {
        self.descriptors.get(offset / 16).ok_or(Fault { addr: offset as u64 })
    }

    #[inline]
    fn element(&self, offset: usize) -> Result<&AtomicU64, Fault> {
        self.elements.get(offset / 8).ok_or(Fault { addr: offset as u64 })
    }
}

impl Area for PlainArea {
    fn size(&self) -> usize {
        self.size
    }

    #[inline]
    fn load_u16(&self, offset: usize) -> Result<u16, Fault> {
        Ok(self.word(offset)?.load(Ordering::Acquire))
    }

    #[inline]
    fn store_u16(&self, offset: usize, value: u16) -> Result<(), Fault> {
        self.word(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    #[inline]
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault> {
        match buf.as_chunks_mut() {
            ([low, high], []) => {
                let [first, second] = self.descriptor(offset)?;
                *low = first.load(Ordering::Relaxed).to_le_bytes();
                *high = second.load(Ordering::Relaxed).to_le_bytes();
            }
            ([element], []) => *element = self.element(offset)?.load(Ordering::Relaxed).to_le_bytes(),
            _ => return Err(Fault { addr: offset as u64 }),
        }
        Ok(())
    }

    #[inline]
    fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault> {
        match data.as_chunks() {
            (&[low, high], []) => {
                let [first, second] = self.descriptor(offset)?;
                first.store(u64::from_le_bytes(low), Ordering::Relaxed);
                second.store(u64::from_le_bytes(high), Ordering::Relaxed);
            }
            (&[element], []) => {
                self.element(offset)?.store(u64::from_le_bytes(element), Ordering::Relaxed);
            }
            _ => {
                for (at, &bytes) in (offset..).step_by(2).zip(data.as_chunks().0) {
                    self.store_u16(at, u16::from_le_bytes(bytes))?;
                }
            }
        }
        Ok(())
    }
}

/// Memory regions by address, with a made-up host address for each.
pub(crate) struct PlainTable {
    lookup: Lookup<Perm>,
}

impl PlainTable {
    pub(crate) fn new(ranges: Vec<IovaRange>) -> Self {
        Self { lookup: Lookup::new(ranges.into_iter().map(|range| (range, Perm::RW)).collect()) }
    }

    /// Returns the host address of a buffer and how many of its bytes are contiguous there.
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
