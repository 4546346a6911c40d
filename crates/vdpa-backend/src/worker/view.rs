//! What the worker translates with: an immutable picture of the client's memory.

use std::sync::Arc;

use vdpa_core::iotlb::{Mapping, Table};
use vdpa_core::ring::{BufferSlice, Fault};
use vdpa_core::types::Perm;
use vdpa_sys::guest::GuestMemory;
use vdpa_sys::snapshot::Snapshot;
use vdpa_sys::uring::{FixedIoVec, IoVec, MemorySet};

/// A run of addresses that is pinned as a registered buffer of the worker's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Address in the daemon.
    pub addr: usize,
    /// Bytes.
    pub len: usize,
    /// Slot of the registered buffer.
    pub slot: u16,
}

/// A translation table, the mappings behind it and what of them is pinned.
#[derive(Debug)]
pub struct MemoryView {
    snapshot: Snapshot,
    memory: Arc<MemorySet>,
    /// By address.
    pins: Vec<Pin>,
}

impl MemoryView {
    /// A picture of `table`. `pins` are sorted by address and lie in mappings of the table.
    pub fn new(table: &Table<GuestMemory>, pins: Vec<Pin>) -> Self {
        Self::of(&table.iter().collect::<Vec<_>>(), pins)
    }

    /// As [`new`](Self::new), of some entries of a table, in address order.
    pub fn of(entries: &[&Mapping<GuestMemory>], pins: Vec<Pin>) -> Self {
        debug_assert!(pins.is_sorted_by_key(|pin| pin.addr));
        let maps = entries.iter().filter_map(|entry| entry.memory.stable());
        let memory = Arc::new(MemorySet::new(maps));
        Self { snapshot: Snapshot::of(entries.iter().copied()), memory, pins }
    }

    /// The memory by I/O virtual address.
    pub const fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The mappings, to be held by requests.
    pub const fn memory(&self) -> &Arc<MemorySet> {
        &self.memory
    }

    /// The places of a run of bytes in this process, merged where they adjoin; `None` when a part of it can only
    /// be copied.
    ///
    /// # Errors
    /// [`Fault`] when a byte is unmapped or forbidden.
    pub fn places(&self, bytes: BufferSlice<'_>, perm: Perm) -> Result<Option<Vec<IoVec>>, Fault> {
        let mut places: Vec<IoVec> = Vec::with_capacity(1);
        let mut direct = true;
        for buffer in bytes {
            for piece in self.snapshot.translate(buffer.iova, buffer.len.into(), perm) {
                let piece = piece?;
                let fault = Fault { addr: buffer.iova };
                let len = usize::try_from(piece.len).map_err(|_| fault)?;
                match piece.memory.host_addr(piece.offset) {
                    None => direct = false,
                    Some(addr) => match places.last_mut() {
                        Some(last) if last.addr + last.len == addr => last.len += len,
                        _ => places.push(IoVec { addr, len }),
                    },
                }
            }
        }
        Ok(direct.then_some(places))
    }

    /// As [`places`](Self::places), for what nearly every request has: one buffer in one piece of memory; `None` for
    /// anything else. Allocates nothing.
    #[inline]
    pub fn place(&self, bytes: BufferSlice<'_>, perm: Perm) -> Option<IoVec> {
        let buffer = bytes.iter().next().filter(|buffer| u64::from(buffer.len) == bytes.len())?;
        let piece = self.snapshot.whole(buffer.iova, buffer.len.into(), perm)?;
        let addr = piece.memory.host_addr(piece.offset)?;
        Some(IoVec { addr, len: buffer.len as usize })
    }

    /// The registered buffer that holds all of `piece`.
    #[inline]
    pub fn fixed(&self, piece: IoVec) -> Option<FixedIoVec> {
        let after = self.pins.partition_point(|pin| pin.addr <= piece.addr);
        let pin = self.pins.get(after.checked_sub(1)?)?;
        let inside = piece.addr - pin.addr <= pin.len && piece.len <= pin.len - (piece.addr - pin.addr);
        inside.then_some(FixedIoVec { slot: pin.slot, iovec: piece })
    }
}
