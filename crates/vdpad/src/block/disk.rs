//! [`Disk`]: what a block device makes of requests, as operations of the kernel.

use std::sync::Arc;

use vdpa_core::blk::{BlkRequest, FramingError, Status};
use vdpa_core::ring::Buffer;
use vdpa_core::types::Result;
use vdpa_sys::uring::{AlignedBuf, Buffers, FixedIoVec, Op, OwnedBuf, Registrar};

use vdpa_backend::worker::MemoryView;

use super::claims::Claim;

/// What a request comes to.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Answered: `written` bytes of data are in the client's buffers.
    Done {
        /// The status byte.
        status: Status,
        /// Bytes.
        written: u32,
    },
    /// The kernel is to do this first.
    Io {
        /// What.
        op: Op,
        /// What then.
        after: After,
    },
    /// As [`Io`](Self::Io), once no other request changes these bytes of the disk. The request has them to itself, as far
    /// as it needs that, until it is answered or only waits for a flush.
    Claimed(Box<Claimed>),
    /// Client memory is out of reach: the request goes back, and the queue rests until the next kick.
    Unreachable,
    /// No request at all: completed with length 0 and no status.
    Misshapen {
        /// Whether the client is told.
        notify: bool,
    },
}

/// See [`Verdict::Claimed`].
#[derive(Debug)]
pub(crate) struct Claimed {
    /// Which bytes.
    pub(crate) claim: Claim,
    /// What.
    pub(crate) op: Op,
    /// What then.
    pub(crate) after: After,
}

impl Verdict {
    /// Bytes of the buffers that come with it.
    pub(super) fn bounced(&self) -> u32 {
        let (op, after) = match self {
            Self::Io { op, after } => (op, after),
            Self::Claimed(claimed) => (&claimed.op, &claimed.after),
            _ => return 0,
        };
        let moved = match op {
            Op::Read { buffers: Buffers::Owned(buffer), .. }
            | Op::Write { buffers: Buffers::Owned(buffer), .. } => buffer.len(),
            _ => 0,
        };
        let patched = if let After::Patch(patch) = after { patch.blocks.len() } else { 0 };
        u32::try_from(moved + patched).unwrap_or(u32::MAX)
    }
}

/// What follows a completed I/O.
#[derive(Debug)]
pub(crate) enum After {
    /// `len` bytes must have been moved; `written` of them into the client's memory.
    Transfer {
        /// Expected.
        len: u32,
        /// For the used element.
        written: u32,
        /// Make them stable before answering (write-through).
        sync: bool,
    },
    /// `len` bytes that were copied from the client before must have been written.
    CopiedIn {
        /// Expected.
        len: u32,
        /// Make them stable before answering (write-through).
        sync: bool,
    },
    /// The bytes from `skip` on go from a bounce buffer, which must have been filled, to the client.
    CopyOut {
        /// Destination.
        to: Vec<Buffer>,
        /// Bytes before those that were asked for.
        skip: u32,
        /// Bytes.
        len: u32,
    },
    /// A block of the disk is completed: what was read is written back with changes.
    Patch(Box<Patch>),
    /// Nothing more than success counts.
    Success {
        /// Make it stable before answering.
        sync: bool,
    },
    /// A discard is a hint: a file system that cannot do it is no error.
    Hint,
    /// A part of a range is zero.
    Zero(Box<Zero>),
}

/// Bytes that are to be written in whole blocks of the disk, of which the first and the last are not known as a whole.
#[derive(Debug)]
pub(crate) struct Patch {
    /// The blocks, with what is to be written in its place.
    pub(crate) blocks: AlignedBuf,
    /// Where they are on the disk, in bytes.
    pub(crate) offset: u64,
    /// What of them is known: bytes from here on ...
    pub(crate) first: usize,
    /// ... up to here.
    pub(crate) end: usize,
    /// What follows when they are written.
    pub(crate) then: After,
}

/// How far a range has been zeroed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Zero {
    /// First byte that the operation in flight zeroes.
    pub(crate) at: u64,
    /// First byte behind those.
    pub(crate) next: u64,
    /// What the operation is to report.
    pub(crate) expected: u32,
    /// First byte behind the range.
    pub(crate) end: u64,
    /// How the file system does it (`FALLOC_FL_*`); `None` where it cannot, and zeros are written.
    pub(crate) mode: Option<i32>,
    /// Make it stable before answering.
    pub(crate) sync: bool,
}

impl After {
    /// Bytes in the client's buffers, if a request that has come to this result is over.
    pub(super) fn ends(&self, result: Result<u32>) -> Option<u32> {
        match *self {
            Self::Transfer { len, written, sync: false } if result == Ok(len) => Some(written),
            _ => None,
        }
    }

    /// Whether the client's buffers are in use until then.
    pub(super) const fn moves_data(&self) -> bool {
        matches!(self, Self::Transfer { .. } | Self::CopyOut { .. })
    }
}

/// A read of a registered file into registered memory. Handed on by itself, not as a [`Verdict`]: it is what most requests
/// come to, and copying what is many things costs as much as the rest of its start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Direct {
    /// Slot of the file.
    pub(crate) file: u32,
    /// Where the bytes go.
    pub(crate) to: FixedIoVec,
    /// Where they are, in bytes.
    pub(crate) offset: u64,
}

/// What else there is to know when a request begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    /// The driver asks for a flush where it needs one.
    pub(crate) write_back: bool,
    /// No other request waits in its queue.
    pub(crate) alone: bool,
}

/// A disk as the worker uses it. Called from the worker's thread only.
pub(crate) trait Disk: Send + 'static {
    /// Before the first request: what is to be registered with the ring of the thread that serves the disk.
    fn register(&mut self, _registrar: &Registrar) {}

    /// The disk goes while some of its operations have not ended: nobody else may get what they use by its number.
    fn abandon(&mut self) {}

    /// What a request comes to, if it is no more than that read.
    fn direct(&self, _request: &BlkRequest<'_>, _view: &MemoryView, _moment: Moment) -> Option<Direct> {
        None
    }

    /// Looks at a request that is not [`direct`](Self::direct) and starts it.
    fn begin(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, moment: Moment) -> Verdict;

    /// A chain that is no request.
    fn misshapen(&mut self, error: &FramingError) -> Verdict;

    /// An I/O of a request has completed. Disks that never answer [`Verdict::Io`] are never called.
    fn proceed(
        &mut self,
        after: After,
        result: Result<u32>,
        buffer: Option<OwnedBuf>,
        view: &Arc<MemoryView>,
    ) -> Verdict;
}
