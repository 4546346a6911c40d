//! [`Pins`]: pins client memory as registered buffers of the thread's io_uring.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::host::MemoryObject;
use vdpa_core::iotlb::{Mapping, Tree};
use vdpa_core::types::Result;
use vdpa_sys::guest::{GuestMemory, MemoryRecord, ObjectId};
use vdpa_sys::uring::{IoVec, MemorySet, StableMemory};

use super::buffers::{Buffers, Pinned};
use super::slots::Piece;
use super::view::PinnedRange;

/// Maximum size of a registered buffer, in bytes. The kernel holds the io_uring's lock while it pins pages, about 20 ms for
/// each GiB of 4 KiB pages, and the I/O of all devices of the thread waits meanwhile: this size bounds the wait to about a
/// millisecond. The slots of one io_uring suffice for 1 TiB in buffers of this size.
const PIECE_BYTES: usize = 64 << 20;

/// The pinned memory of one address space. Mappings that begin and end at the same bytes of an object share their buffers.
///
/// When no slot is left, further mappings are served without buffers: the kernel looks their pages up for each request, and may
/// move them. An io_uring has 16,384 slots for all devices of its thread.
#[derive(Default)]
pub(super) struct Pins {
    pieces: BTreeMap<Place, Buffer>,
    /// What the data path looks up: of the buffers that begin at an address, the longest.
    ranges: Tree<PinnedRange>,
    /// Buffers that no mapping uses any more, and a request may.
    unused: HashMap<Piece, Vec<Place>>,
    /// First I/O virtual addresses of the mappings that were to have buffers and have none.
    without: BTreeSet<u64>,
}

/// Address in this process and bytes.
type Place = (usize, usize);

/// A mapping of this process.
type Memory = Arc<dyn StableMemory>;

/// A registered buffer.
struct Buffer {
    piece: Piece,
    pinned: Pinned,
    /// Mappings that use it.
    users: usize,
    /// Keeps the mapping: while it exists no other mapping can get its address.
    _memory: Memory,
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pins").field("ranges", &self.ranges).finish_non_exhaustive()
    }
}

impl Pins {
    /// Pins a mapping. What an earlier process has pinned is used as it is, and its pages are not touched. Otherwise blocks while
    /// the kernel allocates and pins pages, about half a second for 4 GiB of fresh 4 KiB pages.
    ///
    /// # Errors
    /// `ENOMEM` when the RLIMIT_MEMLOCK of this process does not suffice, `EFAULT`, `EOPNOTSUPP` for file systems whose pages
    /// cannot be pinned. Nothing of the mapping is pinned then.
    pub(super) fn pin(&mut self, entry: &Mapping<GuestMemory>, buffers: &Buffers) -> Result<()> {
        let Some(Pinnable { addr, len, object }) = Pinnable::of(entry) else { return Ok(()) };
        let mut populated = false;
        let mut done = Vec::new();
        for place in pieces(addr, len) {
            let offset = object.offset + (place.0 - addr) as u64;
            let piece = Piece { object: ObjectId { offset, ..object }, len: place.1 as u64 };
            let pinned = self.use_piece(place, piece, entry, buffers, &mut populated);
            match pinned {
                Ok(true) => done.push(place),
                // All or none of its pieces, so that it is clear what is pinned.
                Ok(false) => {
                    done.into_iter().for_each(|place| self.drop_user(place));
                    self.without.insert(entry.range.first());
                    return Ok(());
                }
                Err(errno) => {
                    done.into_iter().for_each(|place| self.drop_user(place));
                    return Err(errno);
                }
            }
        }
        Ok(())
    }

    /// A mapping that was [pinned](Self::pin) is not there any more. Its buffers stay until
    /// [`release_unused`](Self::release_unused).
    pub(super) fn unpin(&mut self, entry: &Mapping<GuestMemory>) {
        let Some(Pinnable { addr, len, .. }) = Pinnable::of(entry) else { return };
        if !self.without.remove(&entry.range.first()) {
            pieces(addr, len).for_each(|place| self.drop_user(place));
        }
    }

    /// The pinned ranges.
    pub(super) const fn ranges(&self) -> &Tree<PinnedRange> {
        &self.ranges
    }

    /// Releases the buffers that no mapping uses. No request may use them.
    pub(super) fn release_unused(&mut self, buffers: &Buffers) {
        for place in std::mem::take(&mut self.unused).into_values().flatten() {
            // It may be used again since.
            if self.pieces.get(&place).is_some_and(|buffer| buffer.users == 0) {
                self.remove(place).into_iter().for_each(|buffer| buffers.release(buffer.pinned.slot));
            }
        }
    }

    /// Number of mappings that were to have buffers and have none, because no slot was left.
    pub(super) fn without_buffers(&self) -> usize {
        self.without.len()
    }

    /// Unpins everything. No request may use it.
    pub(super) fn unpin_all(&mut self, buffers: &Buffers) {
        let pieces = std::mem::take(self).pieces;
        pieces.into_values().for_each(|buffer| buffers.release(buffer.pinned.slot));
    }

    /// Adds a user to the buffer at `place`, which is made if there is none; `false` if there is no slot for it.
    fn use_piece(
        &mut self,
        place: Place,
        piece: Piece,
        entry: &Mapping<GuestMemory>,
        buffers: &Buffers,
        populated: &mut bool,
    ) -> Result<bool> {
        if let Some(buffer) = self.pieces.get_mut(&place) {
            buffer.users += 1;
            return Ok(true);
        }
        let memory = entry.memory.stable().ok_or(Errno::INVAL)?;
        let pinned = match self.moved(piece).or_else(|| buffers.claim(piece)) {
            Some(pinned) => pinned,
            None => {
                // Pinning pages that are present is five times as fast as having each allocated by the pinning.
                if !std::mem::replace(populated, true) {
                    entry.memory.populate()?;
                }
                let at = IoVec { addr: place.0, len: place.1 };
                match buffers.pin(at, piece, &MemorySet::new([Arc::clone(&memory)]))? {
                    Some(pinned) => pinned,
                    None => return Ok(false),
                }
            }
        };
        self.pieces.insert(place, Buffer { piece, pinned, users: 1, _memory: memory });
        self.show(place.0);
        Ok(true)
    }

    /// A buffer that no mapping uses any more and that has the same bytes, mapped elsewhere in this process. So it is when a
    /// client that was restored maps its memory anew in a batch.
    fn moved(&mut self, piece: Piece) -> Option<Pinned> {
        while let Some(place) = self.unused.get_mut(&piece).and_then(Vec::pop) {
            if self.pieces.get(&place).is_some_and(|buffer| buffer.users == 0) {
                return self.remove(place).map(|buffer| buffer.pinned);
            }
        }
        None
    }

    fn drop_user(&mut self, place: Place) {
        let Some(buffer) = self.pieces.get_mut(&place) else { return };
        buffer.users -= 1;
        if buffer.users == 0 {
            self.unused.entry(buffer.piece).or_default().push(place);
        }
    }

    fn remove(&mut self, place: Place) -> Option<Buffer> {
        let buffer = self.pieces.remove(&place);
        self.show(place.0);
        buffer
    }

    /// Makes the longest buffer at an address the one that the data path finds there.
    fn show(&mut self, addr: usize) {
        match self.pieces.range((addr, 0)..=(addr, usize::MAX)).next_back() {
            Some((&(addr, len), Buffer { pinned: Pinned { slot, addr: registered }, .. })) => {
                let range = PinnedRange { addr, len, slot: *slot, registered: *registered };
                self.ranges.insert(addr as u64, range);
            }
            None => drop(self.ranges.remove(addr as u64)),
        }
    }
}

/// A mapping whose pages can be pinned.
struct Pinnable {
    /// Its address in this process.
    addr: usize,
    len: usize,
    /// The object, and where the mapping begins in it.
    object: ObjectId,
}

impl Pinnable {
    fn of(entry: &Mapping<GuestMemory>) -> Option<Self> {
        if entry.stale || entry.memory.pin_pages() == 0 {
            return None;
        }
        let MemoryRecord::Object { object, .. } = entry.memory.record() else { return None };
        let len = usize::try_from(entry.range.size()).ok()?;
        Some(Self { addr: entry.memory.host_addr(0)?, len, object })
    }
}

/// Whether a mapping is of a kind that is pinned.
pub(super) fn is_pinnable(entry: &Mapping<GuestMemory>) -> bool {
    Pinnable::of(entry).is_some()
}

fn pieces(addr: usize, len: usize) -> impl Iterator<Item = Place> {
    (0..len).step_by(PIECE_BYTES).map(move |offset| (addr + offset, PIECE_BYTES.min(len - offset)))
}
