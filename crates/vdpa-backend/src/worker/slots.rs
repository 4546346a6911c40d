//! [`SlotTable`]: what is pinned in the slots of an io_uring, in memory that outlives this process.
//!
//! A ring that another process keeps has its registered buffers after this process has died, and its successor uses them by
//! the addresses that they were registered with. The table tells it which memory is in which slot.
//!
//! | words | what |
//! |---|---|
//! | 0 | [`MAGIC`], which has the version |
//! | 1 | 1 when the slots are reserved with the ring |
//! | 2 | slots from this one on were never used |
//! | 3, 4, 5 | what the ring [shares](vdpa_sys::uring::Ring::share): requests in flight that are no polls; processes that have used it; what was true at its last submission |
//! | 512 + 8 n | slot n: [state](State), device (major in the upper half), inode, creation time in ns since 1970, offset in bytes, length in bytes, address when it was registered |
//!
//! An entry is written after the registration, and made [`State::CHANGING`] before a registration begins or ends: at any
//! instruction, a slot that is not empty for the ring is not empty in the table.

use std::os::fd::{AsFd, OwnedFd};

use vdpa_core::Errno;
use vdpa_core::ring::inflight::LogMemory as _;
use vdpa_core::types::Result;
use vdpa_sys::guest::ObjectId;
use vdpa_sys::shared_words::SharedWords;
use vdpa_sys::uring::Ring;

const MAGIC: u64 = u64::from_le_bytes(*b"VDPASLT1");
const RESERVED: usize = 1;
const USED: usize = 2;
const SHARED: usize = 3;
const FIRST: usize = 512;
const STRIDE: usize = 8;

/// A part of a memory object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Piece {
    /// The object, and where the part begins in it.
    pub(super) object: ObjectId,
    /// Bytes.
    pub(super) len: u64,
}

/// The state of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing is registered.
    Empty,
    /// Something may be registered.
    Changing,
    /// This memory is registered, at this address.
    Pinned(Piece, usize),
}

impl State {
    const EMPTY: u64 = 0;
    const CHANGING: u64 = 1;
    const PINNED: u64 = 2;
}

/// The table of one ring. A clone is the same memory.
#[derive(Clone, Debug)]
pub(super) struct SlotTable(SharedWords);

impl SlotTable {
    /// An empty table for `slots` slots, with its memory file.
    ///
    /// # Errors
    /// As [`SharedWords::create`].
    pub(super) fn create(slots: u16) -> Result<(OwnedFd, Self)> {
        let (fd, words) = SharedWords::create(c"vdpa-slots", FIRST + STRIDE * usize::from(slots))?;
        words.store(0, MAGIC);
        Ok((fd, Self(words)))
    }

    /// The table of another process.
    ///
    /// # Errors
    /// `EINVAL` for one of another version, or no table; as [`SharedWords::map`].
    pub(super) fn open(fd: impl AsFd) -> Result<Self> {
        let words = SharedWords::map(fd)?;
        if words.load(0) == MAGIC { Ok(Self(words)) } else { Err(Errno::INVAL) }
    }

    /// What the ring itself tells.
    pub(super) fn shared(&self) -> Option<SharedWords> {
        self.0.slice(SHARED, Ring::SHARED_WORDS)
    }

    pub(super) fn is_reserved(&self) -> bool {
        self.0.load(RESERVED) == 1
    }

    pub(super) fn set_reserved(&self) {
        self.0.store(RESERVED, 1);
    }

    /// Slots from this one on were never used; at most `max`.
    pub(super) fn used(&self, max: u16) -> u16 {
        u16::try_from(self.0.load(USED)).map_or(max, |used| used.min(max))
    }

    pub(super) fn set_used(&self, used: u16) {
        self.0.store(USED, used.into());
    }

    pub(super) fn state(&self, slot: u16) -> State {
        let word = |field: usize| self.0.load(at(slot) + field);
        match word(0) {
            State::EMPTY => State::Empty,
            State::PINNED => {
                let device = word(1);
                #[expect(clippy::cast_possible_truncation, reason = "the halves of a word")]
                let (dev_major, dev_minor) = ((device >> 32) as u32, device as u32);
                let (inode, created_ns, offset) = (word(2), word(3), word(4));
                let object = ObjectId { dev_major, dev_minor, inode, created_ns, offset };
                match usize::try_from(word(6)) {
                    Ok(addr) => State::Pinned(Piece { object, len: word(5) }, addr),
                    Err(_) => State::Changing,
                }
            }
            _ => State::Changing,
        }
    }

    pub(super) fn set(&self, slot: u16, state: State) {
        let (at, word) = (
            at(slot),
            match state {
                State::Empty => State::EMPTY,
                State::Changing => State::CHANGING,
                State::Pinned(..) => State::PINNED,
            },
        );
        if let State::Pinned(Piece { object, len }, addr) = state {
            let ObjectId { dev_major, dev_minor, inode, created_ns, offset } = object;
            let device = u64::from(dev_major) << 32 | u64::from(dev_minor);
            for (field, value) in (1..).zip([device, inode, created_ns, offset, len, addr as u64]) {
                self.0.store(at + field, value);
            }
        }
        // Last: an entry counts as a whole.
        self.0.store(at, word);
    }
}

fn at(slot: u16) -> usize {
    FIRST + STRIDE * usize::from(slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: Piece = Piece {
        object: ObjectId { dev_major: 1, dev_minor: u32::MAX, inode: 3, created_ns: 4, offset: 5 << 40 },
        len: 6,
    };

    #[test]
    fn a_table_is_read_by_another_process_as_it_was_written() {
        let (fd, table) = SlotTable::create(16).unwrap();
        let other = SlotTable::open(&fd).unwrap();
        assert_eq!((other.is_reserved(), other.used(16)), (false, 0));
        table.set_reserved();
        table.set_used(3);
        table.set(15, State::Changing);
        table.set(2, State::Pinned(PIECE, 0x7000));
        assert_eq!((other.is_reserved(), other.used(16), other.used(2)), (true, 3, 2));
        let states = [0, 2, 15].map(|slot| other.state(slot));
        assert_eq!(states, [State::Empty, State::Pinned(PIECE, 0x7000), State::Changing]);
        other.set(2, State::Empty);
        assert_eq!(table.state(2), State::Empty);
    }

    /// The words of version 1, which later versions must still understand or refuse.
    #[test]
    fn the_layout_is_that_of_version_1() {
        let (fd, table) = SlotTable::create(4).unwrap();
        table.set_reserved();
        table.set_used(2);
        table.set(1, State::Pinned(PIECE, 0x7000));
        let words = SharedWords::map(&fd).unwrap();
        let read =
            |from: usize, count: usize| (from..from + count).map(|at| words.load(at)).collect::<Vec<_>>();
        assert_eq!(read(0, 3), [0x3154_4c53_4150_4456, 1, 2]);
        assert_eq!(read(520, 8), [2, 0x1_ffff_ffff, 3, 4, 5 << 40, 6, 0x7000, 0]);
        words.store(0, MAGIC + (1 << 56));
        assert_eq!(SlotTable::open(&fd).unwrap_err(), Errno::INVAL, "another version");
    }
}
