//! Transfers of parts of blocks, where the kernel moves whole blocks only: O_DIRECT on disks whose blocks are larger than
//! sectors.

use vdpa_core::Errno;
use vdpa_core::blk::{BlkRequest, SECTOR};
use vdpa_core::types::Result;
use vdpa_sys::uring::{Buffers, Op, OwnedBuf};

use super::disk::{FileDisk, Transfer};
use vdpa_backend::worker::MemoryView;

use crate::block::{After, Claim, Claimed, Patch, Verdict};

impl FileDisk {
    /// Whether the kernel can do a transfer as it is: in whole blocks, where it insists on them.
    pub(super) fn is_whole(&self, transfer: Transfer) -> bool {
        let block = self.backing.block_size;
        !self.backing.direct
            || transfer.offset.is_multiple_of(block.into()) && transfer.len.is_multiple_of(block)
    }

    /// The whole blocks that hold a transfer: the first byte, and the one behind the last.
    fn blocks(&self, transfer: Transfer) -> (u64, u64) {
        let block = u64::from(self.backing.block_size);
        let end = transfer.offset + u64::from(transfer.len);
        (transfer.offset - transfer.offset % block, end.next_multiple_of(block))
    }

    /// The first operation of a request that changes these bytes of the disk. Where that may mean to write back what was
    /// read, nobody else may change the blocks meanwhile.
    pub(super) fn changes(&self, range: Transfer, op: Op, after: After) -> Verdict {
        if !self.backing.direct || u64::from(self.backing.block_size) <= SECTOR {
            return Verdict::Io { op, after };
        }
        let (first, end) = self.blocks(range);
        let claim = Claim { first, end, alone: !self.is_whole(range) };
        Verdict::Claimed(Box::new(Claimed { claim, op, after }))
    }

    /// Reads whole blocks, of which the client gets a part.
    pub(super) fn read_around(&self, request: &BlkRequest<'_>, transfer: Transfer) -> Result<Verdict> {
        let (offset, end) = self.blocks(transfer);
        let skip = u32::try_from(transfer.offset - offset).map_err(|_| Errno::INVAL)?;
        let blocks = self.bounce(u32::try_from(end - offset).map_err(|_| Errno::INVAL)?)?;
        let buffers = Buffers::Owned(OwnedBuf::Aligned(blocks));
        let after = After::CopyOut { to: request.data_in.iter().collect(), skip, len: transfer.len };
        Ok(Verdict::Io { op: Op::Read { file: self.file(), buffers, offset }, after })
    }

    /// Writes whole blocks, of which a part is the client's.
    pub(super) fn write_around(
        &self,
        request: &BlkRequest<'_>,
        transfer: Transfer,
        view: &MemoryView,
        sync: bool,
    ) -> Result<Verdict> {
        let copy = |bytes: &mut [u8]| {
            request.data_out.read(view.snapshot(), bytes).map_err(|_| Errno::FAULT).map(drop)
        };
        Ok(match self.patch(transfer, copy, |len| After::CopiedIn { len, sync })? {
            Verdict::Io { op, after } => self.changes(transfer, op, after),
            verdict => verdict,
        })
    }

    /// Writes what `fill` puts in the place of `range`, and before that finds out what else is in its blocks. `then` gets
    /// the number of bytes that are written in the end.
    ///
    /// The first block and the last one are read one after the other: nearly always they are the same.
    pub(super) fn patch(
        &self,
        range: Transfer,
        fill: impl FnOnce(&mut [u8]) -> Result<()>,
        then: impl FnOnce(u32) -> After,
    ) -> Result<Verdict> {
        let (offset, end) = self.blocks(range);
        let len = u32::try_from(end - offset).map_err(|_| Errno::INVAL)?;
        let mut blocks = self.bounce(len)?;
        let first = usize::try_from(range.offset - offset).map_err(|_| Errno::INVAL)?;
        let end = first + range.len as usize;
        fill(blocks.get_mut(first..end).ok_or(Errno::INVAL)?)?;
        self.go_on(Patch { blocks, offset, first, end, then: then(len) }).ok_or(Errno::NOMEM)
    }

    /// Goes on with a patch whose next block has been read.
    pub(super) fn complete(&self, mut patch: Patch, read: &[u8]) -> Option<Verdict> {
        let Patch { blocks, first, end, .. } = &mut patch;
        let (len, block) = (blocks.len(), read.len());
        if !first.is_multiple_of(block) {
            blocks.get_mut(..*first)?.copy_from_slice(read.get(..*first)?);
            *first = 0;
            if len > block {
                return self.go_on(patch);
            }
        }
        let behind = len - *end;
        blocks.get_mut(*end..)?.copy_from_slice(read.get(block.checked_sub(behind)?..)?);
        *end = len;
        self.go_on(patch)
    }

    /// Reads the next block of which something is missing, or writes all of them.
    fn go_on(&self, patch: Patch) -> Option<Verdict> {
        let (block, len) = (self.backing.block_size as usize, patch.blocks.len());
        let missing = if !patch.first.is_multiple_of(block) {
            0
        } else if patch.end < len {
            len - block
        } else {
            let Patch { blocks, offset, then, .. } = patch;
            let buffers = Buffers::Owned(OwnedBuf::Aligned(blocks));
            return Some(Verdict::Io { op: Op::Write { file: self.file(), buffers, offset }, after: then });
        };
        let buffers = Buffers::Owned(OwnedBuf::Aligned(self.bounce(self.backing.block_size).ok()?));
        let offset = patch.offset + missing as u64;
        let op = Op::Read { file: self.file(), buffers, offset };
        Some(Verdict::Io { op, after: After::Patch(Box::new(patch)) })
    }
}
