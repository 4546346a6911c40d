//! Requests that name a range of the disk and carry no data: discard and write-zeroes.

use vdpa_core::Errno;
use vdpa_core::blk::{BlkRequest, SECTOR, Segment};
use vdpa_core::types::Result;
use vdpa_sys::uring::{Buffers, Op, OwnedBuf};

use super::disk::{FileDisk, IO_ERROR, OK, Transfer, UNSUPPORTED};
use vdpa_backend::worker::MemoryView;

use crate::block::{Continuation, Step, ZeroRange};

/// Bytes of zeros that are written at a time where the file system does not support zeroing ranges.
const ZEROS: u64 = 1 << 20;

const FALLOC_KEEP_SIZE: i32 = 0x1;
const FALLOC_PUNCH_HOLE: i32 = 0x2;
const FALLOC_ZERO_RANGE: i32 = 0x10;

impl FileDisk {
    /// The segment of a discard or write-zeroes request, as a part of the disk and as the driver gave it; `Err` with the
    /// answer when it is empty or cannot be carried out. `flags` are those that the request may have.
    fn segment(
        &self,
        request: &BlkRequest<'_>,
        flags: u32,
        view: &MemoryView,
    ) -> Result<std::result::Result<(Transfer, Segment), Step>> {
        let mut raw = [0; Segment::BYTES];
        if request.data_out.len() != raw.len() as u64 {
            return Ok(Err(IO_ERROR));
        }
        request.data_out.read(view.snapshot(), &mut raw).map_err(|_| Errno::FAULT)?;
        let segment = Segment::parse(&raw);
        if segment.flags & !flags != 0 {
            return Ok(Err(UNSUPPORTED));
        }
        let sectors = segment.num_sectors;
        if self.backing.read_only
            || sectors > super::RANGE_SECTORS_MAX
            || !self.contains(segment.sector, sectors.into())
        {
            return Ok(Err(IO_ERROR));
        }
        let Ok(len) = u32::try_from(u64::from(sectors) * SECTOR) else { return Ok(Err(IO_ERROR)) };
        if len == 0 {
            Ok(Err(OK))
        } else {
            Ok(Ok((Transfer { offset: segment.sector * SECTOR, len }, segment)))
        }
    }

    pub(super) fn discard(&self, request: &BlkRequest<'_>, view: &MemoryView) -> Result<Step> {
        let (range, _) = match self.segment(request, 0, view)? {
            Ok(found) => found,
            Err(step) => return Ok(step),
        };
        // A discard is a hint, so blocks that it covers in part are left as they are.
        let block = u64::from(self.backing.block_size);
        let end = range.offset + u64::from(range.len);
        let (offset, end) = (range.offset.next_multiple_of(block), end - end % block);
        if offset >= end {
            return Ok(OK);
        }
        let op = self.fallocate(offset, end, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE);
        Ok(self.submit_write(range, op, Continuation::Discard))
    }

    pub(super) fn write_zeroes(
        &mut self,
        request: &BlkRequest<'_>,
        view: &MemoryView,
        sync: bool,
    ) -> Result<Step> {
        let (range, segment) = match self.segment(request, Segment::UNMAP, view)? {
            Ok(found) => found,
            Err(step) => return Ok(step),
        };
        let unmap = segment.flags & Segment::UNMAP != 0;
        let mode = if unmap { FALLOC_PUNCH_HOLE } else { FALLOC_ZERO_RANGE } | FALLOC_KEEP_SIZE;
        let end = range.offset + u64::from(range.len);
        if !self.reaches(end) {
            return Ok(IO_ERROR);
        }
        Ok(match self.zero(range.offset, end, Some(mode), sync) {
            Step::Submit { op, then } => self.submit_write(range, op, then),
            step => step,
        })
    }

    fn fallocate(&self, offset: u64, end: u64, mode: i32) -> Op {
        Op::Fallocate { file: self.file(), mode, offset, len: end - offset }
    }

    /// Zeroes the next part of `[at, end)`: the rest of a block, or whole blocks.
    fn zero(&self, at: u64, end: u64, mode: Option<i32>, sync: bool) -> Step {
        if at >= end {
            return self.flush_if(sync);
        }
        let block = u64::from(self.backing.block_size);
        let whole_end = end - end % block;
        let zero = |next, expected| Box::new(ZeroRange { at, next, expected, end, mode, sync });
        let whole = at.is_multiple_of(block) && at < whole_end;
        if let (true, Some(mode)) = (whole, mode) {
            let op = self.fallocate(at, whole_end, mode);
            return Step::Submit { op, then: Continuation::Zero(zero(whole_end, 0)) };
        }
        let next = if whole { whole_end.min(at + ZEROS) } else { end.min(at - at % block + block) };
        let Ok(len) = u32::try_from(next - at) else { return IO_ERROR };
        let range = Transfer { offset: at, len };
        let step = if self.is_aligned(range) {
            self.bounce_buffer(len).map(|zeros| {
                let buffers = Buffers::Owned(OwnedBuf::Aligned(zeros));
                let op = Op::Write { file: self.file(), buffers, offset: at };
                Step::Submit { op, then: Continuation::Zero(zero(next, len)) }
            })
        } else {
            self.read_modify_write(range, |_| Ok(()), |written| Continuation::Zero(zero(next, written)))
        };
        step.unwrap_or(IO_ERROR)
    }

    /// Continues after the operation that zeroes a part of a range.
    pub(super) fn zeroed(&self, zero: ZeroRange, result: Result<u32>) -> Step {
        let ZeroRange { at, next, expected, end, mode, sync } = zero;
        match result {
            Ok(moved) if moved == expected => self.zero(next, end, mode, sync),
            // Storage has many words for what it cannot do (EOPNOTSUPP, EINVAL, ENOTTY, EPERM, ENOSYS), and may lack the space for the
            // metadata of a hole: zeros that are written are the same.
            Err(errno) if mode.is_some() && errno != Errno::IO => self.zero(at, end, None, sync),
            _ => IO_ERROR,
        }
    }
}
