//! [`Journal`]: the expected contents of every block of the disk, in shared memory. It outlives the image of the client, and the
//! orchestrator maps it as well.

use std::os::fd::{AsFd, OwnedFd};

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::ring::Fault;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};

use super::block::{Corruption, Stamp};

const MAGIC: u64 = u64::from_le_bytes(*b"journal1");
const HEADER: usize = 64;
const ENTRY: usize = 16;
/// Blocks of the largest disk: 1 TiB in blocks of 4 KiB.
const MAX_BLOCKS: u64 = 1 << 28;

/// Why a journal cannot be used.
#[derive(Debug, Error)]
pub enum JournalError {
    /// It cannot be created or mapped.
    #[error("cannot map the journal")]
    Map(#[source] Errno),
    /// The memory was truncated.
    #[error("cannot access the journal")]
    Access(#[from] Fault),
    /// The descriptor is not a journal.
    #[error("the descriptor given as journal is not one")]
    NotAJournal,
    /// The disk has too many blocks.
    #[error("a disk of {blocks} blocks is too large for a journal; at most {MAX_BLOCKS} are possible")]
    TooLarge {
        /// Blocks of the disk.
        blocks: u64,
    },
    /// A block beyond the end.
    #[error("block {block} is beyond the disk of {blocks} blocks")]
    Block {
        /// The block.
        block: u64,
        /// Blocks of the disk.
        blocks: u64,
    },
}

/// For each block: the sequence number of the last completed write, and of the write in flight.
#[derive(Debug)]
pub struct Journal {
    map: SharedMap,
    blocks: u64,
    block_size: u64,
    client: u64,
}

impl Journal {
    /// Creates an empty journal, for a disk of zeros. Also returns the descriptor of its memory, for other processes.
    ///
    /// # Errors
    /// [`JournalError::TooLarge`], [`JournalError::Map`].
    pub fn create(blocks: u64, block_size: u64, client: u64) -> Result<(Self, OwnedFd), JournalError> {
        if blocks > MAX_BLOCKS {
            return Err(JournalError::TooLarge { blocks });
        }
        let size = HEADER as u64 + blocks * ENTRY as u64;
        let fd = memfd::create(c"vdpa-load-journal", size, None).map_err(JournalError::Map)?;
        let map = map(&fd, size)?;
        for (at, value) in [MAGIC, blocks, block_size, client].into_iter().enumerate() {
            map.store_u64(at * 8, value)?;
        }
        Ok((Self { map, blocks, block_size, client }, fd))
    }

    /// Opens the journal that another process or image created.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(fd: impl AsFd) -> Result<Self, JournalError> {
        let stat =
            rustix::fs::fstat(&fd).map_err(|e| JournalError::Map(Errno::from_raw(e.raw_os_error())))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size < HEADER as u64 {
            return Err(JournalError::NotAJournal);
        }
        let map = map(&fd, size)?;
        let (magic, blocks, block_size, client) =
            (map.load_u64(0)?, map.load_u64(8)?, map.load_u64(16)?, map.load_u64(24)?);
        if magic != MAGIC || blocks > MAX_BLOCKS || size != HEADER as u64 + blocks * ENTRY as u64 {
            return Err(JournalError::NotAJournal);
        }
        Ok(Self { map, blocks, block_size, client })
    }

    /// Blocks of the disk.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Bytes of a block.
    #[must_use]
    pub const fn block_size(&self) -> u64 {
        self.block_size
    }

    /// The expected stamp of a block, without regard to a write in flight.
    ///
    /// # Errors
    /// [`JournalError::Block`], [`JournalError::Access`].
    pub fn expected(&self, block: u64) -> Result<Stamp, JournalError> {
        let sequence = self.map.load_u64(self.entry(block)?)?;
        Ok(Stamp { block, sequence, client: self.client })
    }

    /// The sequence number of the write in flight to a block, if there is one.
    ///
    /// # Errors
    /// As [`expected`](Self::expected).
    pub fn pending(&self, block: u64) -> Result<Option<u64>, JournalError> {
        let sequence = self.map.load_u64(self.entry(block)? + 8)?;
        Ok((sequence != 0).then_some(sequence))
    }

    /// Records that a write begins, and returns the stamp for it. Call it before the request is made available to the device.
    ///
    /// # Errors
    /// As [`expected`](Self::expected).
    pub fn begin(&self, block: u64, sequence: u64) -> Result<Stamp, JournalError> {
        self.map.store_u64(self.entry(block)? + 8, sequence)?;
        Ok(Stamp { block, sequence, client: self.client })
    }

    /// Records that a write has completed.
    ///
    /// # Errors
    /// As [`expected`](Self::expected).
    pub fn commit(&self, block: u64, sequence: u64) -> Result<(), JournalError> {
        let entry = self.entry(block)?;
        self.map.store_u64(entry, sequence)?;
        Ok(self.map.store_u64(entry + 8, 0)?)
    }

    /// Verifies the bytes of a block. Returns the sequence number found, or what is wrong.
    ///
    /// # Errors
    /// [`JournalError`] if the journal cannot be read.
    pub fn verify(&self, block: u64, data: &[u8]) -> Result<Result<u64, Corruption>, JournalError> {
        let pending = self.pending(block)?;
        Ok(self.expected(block)?.verify(data, pending))
    }

    fn entry(&self, block: u64) -> Result<usize, JournalError> {
        let at = usize::try_from(block).ok().filter(|_| block < self.blocks);
        at.map(|at| HEADER + at * ENTRY).ok_or(JournalError::Block { block, blocks: self.blocks })
    }
}

fn map(fd: impl AsFd, size: u64) -> Result<SharedMap, JournalError> {
    let len = usize::try_from(size).map_err(|_| JournalError::Map(Errno::NOMEM))?;
    SharedMap::map(fd, 0, len, Prot::RW, false).map_err(JournalError::Map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_processes_share_a_journal() {
        let (journal, fd) = Journal::create(10, 512, 9).unwrap();
        let other = Journal::open(&fd).unwrap();
        assert_eq!((other.blocks(), other.block_size()), (10, 512));
        let mut data = vec![0; 512];
        assert_eq!(other.verify(3, &data).unwrap(), Ok(0));

        journal.begin(3, 77).unwrap().write(&mut data);
        assert_eq!(other.pending(3).unwrap(), Some(77));
        assert_eq!(other.verify(3, &data).unwrap(), Ok(77));
        assert_eq!(other.verify(3, &[0; 512]).unwrap(), Ok(0));
        journal.commit(3, 77).unwrap();
        assert_eq!(other.verify(3, &data).unwrap(), Ok(77));
        assert!(matches!(other.verify(3, &[0; 512]).unwrap(), Err(Corruption::NoStamp { expected: 77, .. })));
        assert!(matches!(other.expected(10), Err(JournalError::Block { block: 10, blocks: 10 })));
    }

    #[test]
    fn other_descriptors_are_refused() {
        for size in [0, 64, 8192] {
            let fd = memfd::create(c"other", size, None).unwrap();
            assert!(matches!(Journal::open(&fd), Err(JournalError::NotAJournal)));
        }
        assert!(matches!(Journal::create(u64::MAX, 512, 1), Err(JournalError::TooLarge { .. })));
    }
}
