//! [`Pins`]: pins client memory as registered buffers of the thread's io_uring.

use std::collections::BTreeMap;

use vdpa_core::Errno;
use vdpa_core::host::MemoryObject;
use vdpa_core::iotlb::{Mapping, Table};
use vdpa_core::types::Result;
use vdpa_sys::guest::{GuestMemory, MemoryRecord, ObjectId};
use vdpa_sys::uring::{IoVec, MemorySet};

use super::buffers::{Buffers, Pinned};
use super::slots::Piece;
use super::view::PinnedRange;

/// Maximum size of a registered buffer, in bytes. The kernel holds the io_uring's lock while it pins pages, about 20 ms for
/// each GiB of 4 KiB pages, and the I/O of all devices of the thread waits meanwhile: this size bounds the wait to about a
/// millisecond. The slots of one io_uring suffice for 1 TiB in buffers of this size.
const PIECE_BYTES: usize = 64 << 20;

/// The pinned memory of one address space.
#[derive(Debug, Default)]
pub(super) struct Pins {
    /// By address in this process.
    regions: BTreeMap<usize, Region>,
}

/// A pinned mapping.
#[derive(Debug)]
struct Region {
    /// The memory object, and where the mapping begins in it.
    object: ObjectId,
    /// Bytes.
    len: usize,
    /// One per [`PIECE_BYTES`].
    buffers: Vec<Pinned>,
    /// Keeps the mapping: while it exists no other mapping can get its address, which identifies the region.
    _memory: MemorySet,
}

impl Pins {
    /// Pins the entries of `table` that are not pinned yet. What an earlier process has pinned is used as it is, and its pages are
    /// not touched. Otherwise blocks while the kernel allocates and pins pages, about half a second for 4 GiB of fresh 4 KiB pages.
    ///
    /// # Errors
    /// `ENOMEM` when the RLIMIT_MEMLOCK of this process or the slots do not suffice, `EFAULT`, `EOPNOTSUPP` for file systems
    /// whose pages cannot be pinned. What this call has pinned is unpinned then.
    pub(super) fn pin_new(&mut self, table: &Table<GuestMemory>, buffers: &Buffers) -> Result<()> {
        let mut added = Vec::new();
        for entry in table.iter() {
            let Some((addr, len)) = pinnable(entry) else { continue };
            if self.regions.contains_key(&addr) || self.has_moved(table, entry, addr, len) {
                continue;
            }
            match self.pin(entry, addr, len, buffers) {
                Ok(()) => added.push(addr),
                Err(error) => {
                    added.iter().for_each(|addr| self.unpin(*addr, buffers));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Whether a region that `table` does not have any more is the same memory, mapped elsewhere in this process; it is that of
    /// `entry` from now on. So it is when a batch ends that a device was restored in: the parent's table and the device's are
    /// mapped on their own.
    fn has_moved(
        &mut self,
        table: &Table<GuestMemory>,
        entry: &Mapping<GuestMemory>,
        addr: usize,
        len: usize,
    ) -> bool {
        let MemoryRecord::Object { object, .. } = entry.memory.record() else { return false };
        let same = self.regions.iter().filter(|(_, region)| region.object == object && region.len == len);
        let mut unused = same
            .map(|(addr, _)| *addr)
            .filter(|region| !table.iter().filter_map(pinnable).any(|(addr, _)| addr == *region));
        let Some(region) = unused.next().and_then(|addr| self.regions.remove(&addr)) else {
            return false;
        };
        let memory = MemorySet::new(entry.memory.stable());
        self.regions.insert(addr, Region { _memory: memory, ..region });
        true
    }

    /// Whether an entry may be used: it is pinned, or is of a kind that is never pinned.
    pub(super) fn is_usable(&self, entry: &Mapping<GuestMemory>) -> bool {
        pinnable(entry).is_none_or(|(addr, _)| self.regions.contains_key(&addr))
    }

    /// The pinned ranges of these entries, in ascending order of addresses.
    pub(super) fn of(&self, entries: &[&Mapping<GuestMemory>]) -> Vec<PinnedRange> {
        let mut pins: Vec<PinnedRange> = entries
            .iter()
            .filter_map(|entry| pinnable(entry))
            .filter_map(|(addr, _)| self.regions.get_key_value(&addr))
            .flat_map(|(&addr, region)| {
                let place = |(piece, &Pinned { slot, addr }): (IoVec, &Pinned)| PinnedRange {
                    addr: piece.addr,
                    len: piece.len,
                    slot,
                    registered: addr,
                };
                pieces(addr, region.len).zip(&region.buffers).map(place)
            })
            .collect();
        pins.sort_unstable_by_key(|pin| pin.addr);
        pins
    }

    /// Unpins regions that `table` does not have any more. No request may use them.
    pub(super) fn unpin_gone(&mut self, table: &Table<GuestMemory>, buffers: &Buffers) {
        let wanted: std::collections::BTreeSet<usize> =
            table.iter().filter_map(pinnable).map(|(addr, _)| addr).collect();
        let gone: Vec<usize> = self.regions.keys().copied().filter(|addr| !wanted.contains(addr)).collect();
        gone.iter().for_each(|addr| self.unpin(*addr, buffers));
    }

    /// Unpins all regions. No request may use them.
    pub(super) fn unpin_all(&mut self, buffers: &Buffers) {
        let regions = std::mem::take(&mut self.regions);
        let pinned = regions.into_values().flat_map(|region| region.buffers);
        pinned.for_each(|pinned| buffers.release(pinned.slot));
    }

    fn pin(
        &mut self,
        entry: &Mapping<GuestMemory>,
        addr: usize,
        len: usize,
        buffers: &Buffers,
    ) -> Result<()> {
        let memory = MemorySet::new(entry.memory.stable());
        let MemoryRecord::Object { object, .. } = entry.memory.record() else { return Err(Errno::INVAL) };
        let mut pinned = Vec::new();
        let mut populated = false;
        for at in pieces(addr, len) {
            let offset = object.offset + (at.addr - addr) as u64;
            let piece = Piece { object: ObjectId { offset, ..object }, len: at.len as u64 };
            let result = buffers.claim(piece).map_or_else(
                || {
                    // Pinning pages that are present is five times as fast as having each allocated by the pinning.
                    if !std::mem::replace(&mut populated, true) {
                        entry.memory.populate()?;
                    }
                    buffers.pin(at, piece, &memory)?.ok_or(Errno::NOMEM)
                },
                Ok,
            );
            match result {
                Ok(one) => pinned.push(one),
                Err(error) => {
                    pinned.into_iter().for_each(|one| buffers.release(one.slot));
                    return Err(error);
                }
            }
        }
        self.regions.insert(addr, Region { object, len, buffers: pinned, _memory: memory });
        Ok(())
    }

    fn unpin(&mut self, addr: usize, buffers: &Buffers) {
        if let Some(region) = self.regions.remove(&addr) {
            region.buffers.into_iter().for_each(|pinned| buffers.release(pinned.slot));
        }
    }
}

/// Address in this process and length of an entry whose pages can be pinned.
fn pinnable(entry: &Mapping<GuestMemory>) -> Option<(usize, usize)> {
    if entry.stale || entry.memory.pin_pages() == 0 {
        return None;
    }
    Some((entry.memory.host_addr(0)?, usize::try_from(entry.range.size()).ok()?))
}

fn pieces(addr: usize, len: usize) -> impl Iterator<Item = IoVec> {
    (0..len)
        .step_by(PIECE_BYTES)
        .map(move |offset| IoVec { addr: addr + offset, len: PIECE_BYTES.min(len - offset) })
}
