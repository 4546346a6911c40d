//! [`MemoryView`]: the translation that a worker thread uses for one address space.

use std::sync::Arc;

use vdpa_core::iotlb::{Mapping, Table, Tree};
use vdpa_core::ring::{BufferSlice, Fault};
use vdpa_core::types::Perm;
use vdpa_sys::guest::GuestMemory;
use vdpa_sys::snapshot::{Change, Snapshot};
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
/// The control side makes a new view for each change of the table, which shares nearly all of the one before, and installs it
/// with [`QueueControl::set_view`](super::QueueControl::set_view). A [`QueueHandler`](super::QueueHandler) gets the present view
/// of a queue from [`Queues::view`](super::Queues::view), on the device's thread. A request that is in flight keeps the view
/// that it began with: its memory stays mapped in this process for as long as the view, or a clone of
/// [`memory`](Self::memory), exists. No method blocks.
#[derive(Clone, Debug, Default)]
pub struct MemoryView {
    pub(super) snapshot: Snapshot,
    pub(super) memory: Arc<MemorySet>,
    /// By their addresses in this process.
    pub(super) pinned: Tree<PinnedRange>,
}

impl MemoryView {
    /// A view of all entries of `table`, none of which is pinned. A device that takes memory through a
    /// [`ClientMemory`](super::ClientMemory) does not call this.
    #[must_use]
    pub fn new(table: &Table<GuestMemory>) -> Self {
        let memory = MemorySet::new(table.iter().filter_map(|entry| entry.memory.stable()));
        Self { snapshot: Snapshot::new(table), memory: Arc::new(memory), pinned: Tree::default() }
    }

    /// The view after these changes, which lead to the mappings `now`. The mappings of this process that `memory` has are those of
    /// `now` already.
    pub(super) fn changed(
        &self,
        changes: &[Change<'_>],
        now: &Tree<Mapping<GuestMemory>>,
        pinned: Option<&Tree<PinnedRange>>,
    ) -> Self {
        let all = || now.iter().map(|(_, entry)| entry);
        let snapshot = self.snapshot.changed(changes, now.len(), all);
        Self { snapshot, memory: Arc::clone(&self.memory), pinned: pinned.cloned().unwrap_or_default() }
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
        let (_, range) = self.pinned.floor(piece.addr as u64)?;
        let offset = piece.addr - range.addr;
        let inside = offset <= range.len && piece.len <= range.len - offset;
        let iovec = IoVec { addr: range.registered.wrapping_add(offset), len: piece.len };
        inside.then_some(FixedIoVec { slot: range.slot, iovec })
    }
}
