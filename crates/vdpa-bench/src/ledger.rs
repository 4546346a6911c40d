//! What every block of the disk should hold, in memory that outlives the tenant's image and that the
//! orchestrator maps too.

use std::os::fd::{AsFd, OwnedFd};

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::ring::Fault;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};

use super::block::{Corruption, Stamp};

const MAGIC: u64 = u64::from_le_bytes(*b"ledger01");
const HEADER: usize = 64;
const ENTRY: usize = 16;
/// Blocks of the largest ledger: 1 TiB of 4 KiB blocks.
const MAX_BLOCKS: u64 = 1 << 28;

/// Why a ledger cannot be used.
#[derive(Debug, Error)]
pub enum LedgerError {
    /// It cannot be created or mapped.
    #[error("cannot map the ledger")]
    Map(#[source] Errno),
    /// The memory is gone or too short.
    #[error("cannot access the ledger")]
    Access(#[from] Fault),
    /// Something else than a ledger.
    #[error("the descriptor given as ledger holds none")]
    NotALedger,
    /// More blocks than can be kept account of.
    #[error("a disk of {blocks} blocks is too large for a ledger; at most {MAX_BLOCKS} are possible")]
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

/// Per block: the sequence of the last write that completed, and of the one in flight.
#[derive(Debug)]
pub struct Ledger {
    map: SharedMap,
    blocks: u64,
    block_size: u64,
    tenant: u64,
}

impl Ledger {
    /// An empty ledger: every block of the disk is zeros. Also returns its memory, for other processes.
    ///
    /// # Errors
    /// [`LedgerError::TooLarge`], [`LedgerError::Map`].
    pub fn create(blocks: u64, block_size: u64, tenant: u64) -> Result<(Self, OwnedFd), LedgerError> {
        if blocks > MAX_BLOCKS {
            return Err(LedgerError::TooLarge { blocks });
        }
        let size = HEADER as u64 + blocks * ENTRY as u64;
        let fd = memfd::create(c"vdpa-load-ledger", size, None).map_err(LedgerError::Map)?;
        let map = map(&fd, size)?;
        for (at, value) in [MAGIC, blocks, block_size, tenant].into_iter().enumerate() {
            map.store_u64(at * 8, value)?;
        }
        Ok((Self { map, blocks, block_size, tenant }, fd))
    }

    /// The ledger that another process or image created.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn open(fd: impl AsFd) -> Result<Self, LedgerError> {
        let stat = rustix::fs::fstat(&fd).map_err(|e| LedgerError::Map(Errno::from_raw(e.raw_os_error())))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size < HEADER as u64 {
            return Err(LedgerError::NotALedger);
        }
        let map = map(&fd, size)?;
        let (magic, blocks, block_size, tenant) =
            (map.load_u64(0)?, map.load_u64(8)?, map.load_u64(16)?, map.load_u64(24)?);
        if magic != MAGIC || blocks > MAX_BLOCKS || size != HEADER as u64 + blocks * ENTRY as u64 {
            return Err(LedgerError::NotALedger);
        }
        Ok(Self { map, blocks, block_size, tenant })
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

    /// What the block should hold.
    ///
    /// # Errors
    /// [`LedgerError::Block`], [`LedgerError::Access`].
    pub fn expected(&self, block: u64) -> Result<Stamp, LedgerError> {
        let sequence = self.map.load_u64(self.entry(block)?)?;
        Ok(Stamp { block, sequence, tenant: self.tenant })
    }

    /// The write in flight to a block, if any.
    ///
    /// # Errors
    /// As [`expected`](Self::expected).
    pub fn pending(&self, block: u64) -> Result<Option<u64>, LedgerError> {
        let sequence = self.map.load_u64(self.entry(block)? + 8)?;
        Ok((sequence != 0).then_some(sequence))
    }

    /// Notes that a write begins; returns the stamp for it. Before it is made available to the device.
    ///
    /// # Errors
    /// As [`expected`](Self::expected).
    pub fn begin(&self, block: u64, sequence: u64) -> Result<Stamp, LedgerError> {
        self.map.store_u64(self.entry(block)? + 8, sequence)?;
        Ok(Stamp { block, sequence, tenant: self.tenant })
    }

    /// Notes that a write has completed.
    ///
    /// # Errors
    /// As [`expected`](Self::expected).
    pub fn commit(&self, block: u64, sequence: u64) -> Result<(), LedgerError> {
        let entry = self.entry(block)?;
        self.map.store_u64(entry, sequence)?;
        Ok(self.map.store_u64(entry + 8, 0)?)
    }

    /// Judges the bytes of a block.
    ///
    /// # Errors
    /// [`LedgerError`]; the verdict is inside.
    pub fn judge(&self, block: u64, data: &[u8]) -> Result<Result<u64, Corruption>, LedgerError> {
        let pending = self.pending(block)?;
        Ok(self.expected(block)?.verify(data, pending))
    }

    fn entry(&self, block: u64) -> Result<usize, LedgerError> {
        let at = usize::try_from(block).ok().filter(|_| block < self.blocks);
        at.map(|at| HEADER + at * ENTRY).ok_or(LedgerError::Block { block, blocks: self.blocks })
    }
}

fn map(fd: impl AsFd, size: u64) -> Result<SharedMap, LedgerError> {
    let len = usize::try_from(size).map_err(|_| LedgerError::Map(Errno::NOMEM))?;
    SharedMap::map(fd, 0, len, Prot::RW, false).map_err(LedgerError::Map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_processes_keep_one_account() {
        let (ledger, fd) = Ledger::create(10, 512, 9).unwrap();
        let other = Ledger::open(&fd).unwrap();
        assert_eq!((other.blocks(), other.block_size()), (10, 512));
        let mut data = vec![0; 512];
        assert_eq!(other.judge(3, &data).unwrap(), Ok(0));

        ledger.begin(3, 77).unwrap().write(&mut data);
        assert_eq!(other.pending(3).unwrap(), Some(77));
        assert_eq!(other.judge(3, &data).unwrap(), Ok(77));
        assert_eq!(other.judge(3, &[0; 512]).unwrap(), Ok(0));
        ledger.commit(3, 77).unwrap();
        assert_eq!(other.judge(3, &data).unwrap(), Ok(77));
        assert!(matches!(other.judge(3, &[0; 512]).unwrap(), Err(Corruption::NoStamp { expected: 77, .. })));
        assert!(matches!(other.expected(10), Err(LedgerError::Block { block: 10, blocks: 10 })));
    }

    #[test]
    fn what_is_no_ledger_is_refused() {
        for size in [0, 64, 8192] {
            let fd = memfd::create(c"other", size, None).unwrap();
            assert!(matches!(Ledger::open(&fd), Err(LedgerError::NotALedger)));
        }
        assert!(matches!(Ledger::create(u64::MAX, 512, 1), Err(LedgerError::TooLarge { .. })));
    }
}
