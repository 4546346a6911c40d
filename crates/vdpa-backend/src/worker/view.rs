//! [`MemoryView`]: the translation that a worker thread uses for one address space.

use std::sync::Arc;

use vdpa_core::iotlb::{Mapping, Table};
use vdpa_core::ring::{BufferSlice, Fault};
use vdpa_core::types::Perm;
use vdpa_sys::guest::GuestMemory;
use vdpa_sys::snapshot::Snapshot;
use vdpa_sys::uring::{FixedIoVec, IoVec, MemorySet};

/// A range of addresses that is pinned as one registered buffer of the thread's io_uring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PinnedRange {
    /// First address, in this process.
    pub(super) addr: usize,
    /// Bytes.
    pub(super) len: usize,
    /// Slot of the registered buffer (`IORING_REGISTER_BUFFERS_UPDATE`).
    pub(super) slot: u16,
    /// The address that it was registered with: that of an earlier process, if that one has pinned it.
    pub(super) registered: usize,
}

/// An immutable translation of one address space: the entries of an IOTLB table, the mappings behind them, and which of
/// them are pinned.
///
/// The control side makes a new view for each change of the table and installs it with
/// [`QueueControl::set_view`](super::QueueControl::set_view). A [`QueueHandler`](super::QueueHandler) gets the present view
/// of a queue from [`Queues::view`](super::Queues::view), on the device's thread. A request that is in flight keeps the view
/// that it began with: its memory stays mapped in this process for as long as the view, or a clone of
/// [`memory`](Self::memory), exists. No method blocks.
#[derive(Debug)]
pub struct MemoryView {
    snapshot: Snapshot,
    memory: Arc<MemorySet>,
    /// In ascending order of addresses.
    pinned: Vec<PinnedRange>,
}

impl MemoryView {
    /// A view of all entries of `table`, none of which is pinned. A device that takes memory through a
    /// [`ClientMemory`](super::ClientMemory) does not call this.
    #[must_use]
    pub fn new(table: &Table<GuestMemory>) -> Self {
        Self::from_entries(&table.iter().collect::<Vec<_>>(), Vec::new())
    }

    /// A view of some entries of a table, in ascending order of I/O virtual addresses. `pinned` is in ascending order of
    /// addresses in this process, and lies inside mappings of the entries.
    pub(super) fn from_entries(entries: &[&Mapping<GuestMemory>], pinned: Vec<PinnedRange>) -> Self {
        debug_assert!(pinned.is_sorted_by_key(|range| range.addr));
        let maps = entries.iter().filter_map(|entry| entry.memory.stable());
        let memory = Arc::new(MemorySet::new(maps));
        Self { snapshot: Snapshot::of(entries.iter().copied()), memory, pinned }
    }

    /// The memory by I/O virtual address, to pop descriptor chains and to copy their buffers.
    pub const fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The mappings. An operation of the kernel that uses the addresses of [`pieces`](Self::pieces) holds a clone of it
    /// until the operation has completed.
    pub const fn memory(&self) -> &Arc<MemorySet> {
        &self.memory
    }

    /// The addresses of `bytes` in this process, in order, adjacent ones merged. `None` when a part of `bytes` is in memory
    /// that is not mapped here and can only be copied.
    ///
    /// # Errors
    /// [`Fault`] when a byte is not mapped, or is mapped without `perm`.
    pub fn pieces(&self, bytes: BufferSlice<'_>, perm: Perm) -> Result<Option<Vec<IoVec>>, Fault> {
        let mut pieces: Vec<IoVec> = Vec::with_capacity(1);
        let mut direct = true;
        for buffer in bytes {
            for piece in self.snapshot.translate(buffer.iova, buffer.len.into(), perm) {
                let piece = piece?;
                let fault = Fault { addr: buffer.iova };
                let len = usize::try_from(piece.len).map_err(|_| fault)?;
                match piece.memory.host_addr(piece.offset) {
                    None => direct = false,
                    Some(addr) => match pieces.last_mut() {
                        Some(last) if last.addr + last.len == addr => last.len += len,
                        _ => pieces.push(IoVec { addr, len }),
                    },
                }
            }
        }
        Ok(direct.then_some(pieces))
    }

    /// As [`pieces`](Self::pieces), for the usual case of one buffer in one piece of memory; `None` for
    /// anything else, which includes memory that is not mapped. Does not allocate.
    #[inline]
    pub fn piece(&self, bytes: BufferSlice<'_>, perm: Perm) -> Option<IoVec> {
        let buffer = bytes.iter().next().filter(|buffer| u64::from(buffer.len) == bytes.len())?;
        let piece = self.snapshot.whole(buffer.iova, buffer.len.into(), perm)?;
        let addr = piece.memory.host_addr(piece.offset)?;
        Some(IoVec { addr, len: buffer.len as usize })
    }

    /// The registered buffer that holds all of `piece`, for `IORING_OP_READ_FIXED` and `IORING_OP_WRITE_FIXED`; `None` when it
    /// is not pinned as a whole.
    #[inline]
    pub fn fixed(&self, piece: IoVec) -> Option<FixedIoVec> {
        let after = self.pinned.partition_point(|range| range.addr <= piece.addr);
        let range = self.pinned.get(after.checked_sub(1)?)?;
        let offset = piece.addr - range.addr;
        let inside = offset <= range.len && piece.len <= range.len - offset;
        let iovec = IoVec { addr: range.registered.wrapping_add(offset), len: piece.len };
        inside.then_some(FixedIoVec { slot: range.slot, iovec })
    }
}
