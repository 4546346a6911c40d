//! Transfers that begin or end within a block, where the kernel moves whole blocks only: O_DIRECT on disks with blocks larger
//! than a sector.

use vdpa_core::Errno;
use vdpa_core::blk::{BlkRequest, SECTOR};
use vdpa_core::types::Result;
use vdpa_sys::uring::{Buffers, Op, OwnedBuf};

use super::disk::{FileDisk, Transfer};
use vdpa_backend::worker::MemoryView;

use crate::block::{Continuation, LockedIo, RangeLock, ReadModifyWrite, Step};

impl FileDisk {
    /// Whether the kernel can do a transfer as it is: without O_DIRECT always, with it in whole blocks.
    pub(super) fn is_aligned(&self, transfer: Transfer) -> bool {
        let block = self.backing.block_size;
        !self.backing.direct
            || transfer.offset.is_multiple_of(block.into()) && transfer.len.is_multiple_of(block)
    }

    /// The whole blocks around a transfer: their first byte, and the byte behind their last.
    fn blocks(&self, transfer: Transfer) -> (u64, u64) {
        let block = u64::from(self.backing.block_size);
        let end = transfer.offset + u64::from(transfer.len);
        (transfer.offset - transfer.offset % block, end.next_multiple_of(block))
    }

    /// The first operation of a request that changes these bytes of the disk. With blocks larger than a sector it needs a lock on
    /// its blocks: an exclusive one for a read-modify-write, else a shared one.
    pub(super) fn submit_write(&self, range: Transfer, op: Op, then: Continuation) -> Step {
        if !self.backing.direct || u64::from(self.backing.block_size) <= SECTOR {
            return Step::Submit { op, then };
        }
        let (start, end) = self.blocks(range);
        let lock = RangeLock { start, end, exclusive: !self.is_aligned(range) };
        Step::SubmitLocked(Box::new(LockedIo { lock, op, then }))
    }

    /// Reads the whole blocks around a transfer into a bounce buffer, of which the client gets a part.
    pub(super) fn read_unaligned(&self, request: &BlkRequest<'_>, transfer: Transfer) -> Result<Step> {
        let (offset, end) = self.blocks(transfer);
        let skip = u32::try_from(transfer.offset - offset).map_err(|_| Errno::INVAL)?;
        let blocks = self.bounce_buffer(u32::try_from(end - offset).map_err(|_| Errno::INVAL)?)?;
        let buffers = Buffers::Owned(OwnedBuf::Aligned(blocks));
        let then = Continuation::BounceRead { to: request.data_in.iter().collect(), skip, len: transfer.len };
        Ok(Step::Submit { op: Op::Read { file: self.file(), buffers, offset }, then })
    }

    /// Writes the whole blocks around a transfer, of which a part is the client's data.
    pub(super) fn write_unaligned(
        &self,
        request: &BlkRequest<'_>,
        transfer: Transfer,
        view: &MemoryView,
        sync: bool,
    ) -> Result<Step> {
        let copy = |bytes: &mut [u8]| {
            request.data_out.read(view.snapshot(), bytes).map_err(|_| Errno::FAULT).map(drop)
        };
        Ok(match self.read_modify_write(transfer, copy, |len| Continuation::BounceWrite { len, sync })? {
            Step::Submit { op, then } => self.submit_write(transfer, op, then),
            step => step,
        })
    }

    /// Replaces `range` by what `fill` writes into a buffer of its length, with a read-modify-write of its blocks. `then` gets the
    /// number of bytes that the final write moves.
    ///
    /// The first block and the last one are read one after the other; nearly always they are the same block.
    pub(super) fn read_modify_write(
        &self,
        range: Transfer,
        fill: impl FnOnce(&mut [u8]) -> Result<()>,
        then: impl FnOnce(u32) -> Continuation,
    ) -> Result<Step> {
        let (offset, end) = self.blocks(range);
        let len = u32::try_from(end - offset).map_err(|_| Errno::INVAL)?;
        let mut blocks = self.bounce_buffer(len)?;
        let first = usize::try_from(range.offset - offset).map_err(|_| Errno::INVAL)?;
        let end = first + range.len as usize;
        fill(blocks.get_mut(first..end).ok_or(Errno::INVAL)?)?;
        self.next_block_io(ReadModifyWrite { blocks, offset, first, end, then: then(len) })
            .ok_or(Errno::NOMEM)
    }

    /// Continues a read-modify-write: merges the block that was read with the new data.
    pub(super) fn merge(&self, mut io: ReadModifyWrite, read: &[u8]) -> Option<Step> {
        let ReadModifyWrite { blocks, first, end, .. } = &mut io;
        let (len, block) = (blocks.len(), read.len());
        if !first.is_multiple_of(block) {
            blocks.get_mut(..*first)?.copy_from_slice(read.get(..*first)?);
            *first = 0;
            if len > block {
                return self.next_block_io(io);
            }
        }
        let behind = len - *end;
        blocks.get_mut(*end..)?.copy_from_slice(read.get(block.checked_sub(behind)?..)?);
        *end = len;
        self.next_block_io(io)
    }

    /// Reads the next block that is incomplete, or writes all blocks if none is.
    fn next_block_io(&self, io: ReadModifyWrite) -> Option<Step> {
        let (block, len) = (self.backing.block_size as usize, io.blocks.len());
        let missing = if !io.first.is_multiple_of(block) {
            0
        } else if io.end < len {
            len - block
        } else {
            let ReadModifyWrite { blocks, offset, then, .. } = io;
            let buffers = Buffers::Owned(OwnedBuf::Aligned(blocks));
            return Some(Step::Submit { op: Op::Write { file: self.file(), buffers, offset }, then });
        };
        let buffers = Buffers::Owned(OwnedBuf::Aligned(self.bounce_buffer(self.backing.block_size).ok()?));
        let offset = io.offset + missing as u64;
        let op = Op::Read { file: self.file(), buffers, offset };
        Some(Step::Submit { op, then: Continuation::ReadModifyWrite(Box::new(io)) })
    }
}
