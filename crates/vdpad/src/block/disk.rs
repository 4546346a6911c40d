//! [`Disk`]: what a kind of disk implements. It turns each request into I/O operations of the kernel.

use std::sync::Arc;

use vdpa_core::blk::{BlkRequest, FramingError, Status};
use vdpa_core::ring::Buffer;
use vdpa_core::types::Result;
use vdpa_sys::uring::{AlignedBuf, Buffers, FixedIoVec, Op, OwnedBuf, Registrar};

use vdpa_backend::worker::MemoryView;

use super::range_lock::RangeLock;

/// The next step of a request.
#[derive(Debug)]
pub(crate) enum Step {
    /// Answer the request; `written` bytes of data are in the client's buffers.
    Complete {
        /// The status byte.
        status: Status,
        /// Bytes of data, without the status byte.
        written: u32,
    },
    /// Submit an I/O operation, and continue when it has completed.
    Submit {
        /// The operation.
        op: Op,
        /// What to do with its result.
        then: Continuation,
    },
    /// As [`Submit`](Self::Submit), once the range of the disk is locked. The request holds the lock until it is answered
    /// or only waits for a flush.
    SubmitLocked(Box<LockedIo>),
    /// Client memory is not mapped: put the request back, and leave the queue alone until the next kick.
    Unreachable,
    /// The chain is not a request: return it with length 0 and without a status.
    Malformed {
        /// Whether to signal the driver.
        notify: bool,
    },
}

/// See [`Step::SubmitLocked`].
#[derive(Debug)]
pub(crate) struct LockedIo {
    /// The lock that the operation needs.
    pub(crate) lock: RangeLock,
    /// The operation.
    pub(crate) op: Op,
    /// What to do with its result.
    pub(crate) then: Continuation,
}

impl Step {
    /// Bytes of bounce buffers that the step holds.
    pub(super) fn bounced(&self) -> u32 {
        let (op, then) = match self {
            Self::Submit { op, then } => (op, then),
            Self::SubmitLocked(io) => (&io.op, &io.then),
            _ => return 0,
        };
        let moved = match op {
            Op::Read { buffers: Buffers::Owned(buffer), .. }
            | Op::Write { buffers: Buffers::Owned(buffer), .. } => buffer.len(),
            _ => 0,
        };
        let modified = if let Continuation::ReadModifyWrite(io) = then { io.blocks.len() } else { 0 };
        u32::try_from(moved + modified).unwrap_or(u32::MAX)
    }
}

/// What to do with the result of an I/O operation.
#[derive(Debug)]
pub(crate) enum Continuation {
    /// Data moved between the disk and the client's memory: check that it was `len` bytes.
    Transfer {
        /// Bytes expected.
        len: u32,
        /// Bytes of them in the client's memory, for the used element.
        written: u32,
        /// Make the data stable before the request is answered (write-through).
        sync: bool,
    },
    /// A bounce buffer was written, whose data came from the client earlier: check that it was `len` bytes.
    BounceWrite {
        /// Bytes expected.
        len: u32,
        /// Make the data stable before the request is answered (write-through).
        sync: bool,
    },
    /// A bounce buffer was read: check that it is full, and copy the bytes from `skip` on to the client.
    BounceRead {
        /// The client's buffers.
        to: Vec<Buffer>,
        /// Bytes of the buffer in front of those that were requested.
        skip: u32,
        /// Bytes that were requested.
        len: u32,
    },
    /// A block of the disk was read, of which a part is to be overwritten: merge the two, then write them.
    ReadModifyWrite(Box<ReadModifyWrite>),
    /// Check that the operation has succeeded.
    Check {
        /// Make the data stable before the request is answered.
        sync: bool,
    },
    /// A discard. It is a hint, so a file system that does not support it is not an error.
    Discard,
    /// A part of a range was zeroed: continue with the next part.
    Zero(Box<ZeroRange>),
}

/// Data that must be written in whole blocks of the disk, while its first and its last block are covered in part only. What is
/// missing is read from the disk first.
#[derive(Debug)]
pub(crate) struct ReadModifyWrite {
    /// The blocks, with the new data in its place.
    pub(crate) blocks: AlignedBuf,
    /// Offset of the blocks on the disk, in bytes.
    pub(crate) offset: u64,
    /// The bytes of `blocks` that are valid begin here ...
    pub(crate) first: usize,
    /// ... and end before this one.
    pub(crate) end: usize,
    /// What to do with the result of the write.
    pub(crate) then: Continuation,
}

/// Progress of zeroing a range.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ZeroRange {
    /// First byte that the operation in flight zeroes.
    pub(crate) at: u64,
    /// First byte behind that operation.
    pub(crate) next: u64,
    /// The result that the operation must report.
    pub(crate) expected: u32,
    /// First byte behind the range.
    pub(crate) end: u64,
    /// The mode of fallocate(2), `FALLOC_FL_*`; `None` where the file system does not support it, and zeros are written.
    pub(crate) mode: Option<i32>,
    /// Make the zeros stable before the request is answered.
    pub(crate) sync: bool,
}

impl Continuation {
    /// The number of bytes in the client's buffers, if the request is complete with this result and needs no further step.
    pub(super) fn completes(&self, result: Result<u32>) -> Option<u32> {
        match *self {
            Self::Transfer { len, written, sync: false } if result == Ok(len) => Some(written),
            _ => None,
        }
    }

    /// Whether the client's data buffers are accessed until then.
    pub(super) const fn uses_data(&self) -> bool {
        matches!(self, Self::Transfer { .. } | Self::BounceRead { .. })
    }
}

/// A read of a registered file into registered memory (`IORING_OP_READ_FIXED`). Most requests are such reads. It is not a
/// [`Step`], because moving that large enum costs as much as the rest of starting the request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FixedRead {
    /// Slot of the file.
    pub(crate) file: u32,
    /// Where to put the data.
    pub(crate) to: FixedIoVec,
    /// Offset in the file, in bytes.
    pub(crate) offset: u64,
}

/// What a disk must know when a request starts, beside the request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestContext {
    /// The driver sends a flush where it needs one (write-back), so writes need not be stable when they are answered.
    pub(crate) write_back: bool,
    /// No other request of this queue is waiting.
    pub(crate) alone: bool,
}

/// A kind of disk. Called on the worker's thread only; must not block for long.
pub(crate) trait Disk: Send + 'static {
    /// Registers files with the ring of the thread that serves the disk. Called once, before the first request.
    fn register(&mut self, _registrar: &Registrar) {}

    /// A pass over the rings begins: what was found out for the one before may have changed.
    fn begin_pass(&mut self) {}

    /// Another process may serve the disk from now on: releases what only one may have. No operation is in flight.
    fn hand_over(&mut self) {}

    /// Takes what [`hand_over`](Self::hand_over) has released, in this process or in another one. Called before the first request,
    /// or any other.
    ///
    /// # Errors
    /// The errno of what cannot be had: the disk fails.
    fn take_over(&mut self) -> Result<()> {
        Ok(())
    }

    /// Keeps the slots of registered files from being used again. Called when the disk is dropped while operations of it are in
    /// flight, which still refer to these slots.
    fn abandon(&mut self) {}

    /// The read that carries out `request`, if one [`FixedRead`] is all that it needs.
    fn fixed_read(
        &self,
        _request: &BlkRequest<'_>,
        _view: &MemoryView,
        _context: RequestContext,
    ) -> Option<FixedRead> {
        None
    }

    /// Starts a request for which [`fixed_read`](Self::fixed_read) has returned `None`.
    fn start(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, context: RequestContext) -> Step;

    /// Decides what to do with a chain that is not a request.
    fn malformed(&mut self, error: &FramingError) -> Step;

    /// Continues a request whose I/O operation has completed. Never called for disks that submit none.
    fn io_completed(
        &mut self,
        then: Continuation,
        result: Result<u32>,
        buffer: Option<OwnedBuf>,
        view: &Arc<MemoryView>,
    ) -> Step;
}
