//! [`Disk`]: what a block device makes of requests, as operations of the kernel.

use std::sync::Arc;

use vdpa_core::blk::{BlkRequest, ShapeError, Status};
use vdpa_core::ring::Buffer;
use vdpa_core::types::Result;
use vdpa_sys::uring::{Op, OwnedBuf, Registrar};

use super::View;

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
    /// Client memory is out of reach: the request goes back, and the queue rests until the next kick.
    Unreachable,
    /// No request at all: completed with length 0 and no status.
    Misshapen {
        /// Whether the client is told.
        notify: bool,
    },
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
    /// The bytes go from a bounce buffer to the client.
    CopyOut {
        /// Destination.
        to: Vec<Buffer>,
        /// Bytes.
        len: u32,
    },
    /// Nothing more than success counts.
    Success {
        /// Make it stable before answering.
        sync: bool,
    },
    /// A discard is a hint: a file system that cannot do it is no error.
    Hint,
    /// Zero a range; where the file system cannot, by writing zeros from `at` to `end`.
    Zero {
        /// First byte not yet zero.
        at: u64,
        /// End, in bytes.
        end: u64,
        /// Whether zeros are being written already.
        writing: bool,
        /// Make it stable before answering.
        sync: bool,
    },
}

impl After {
    /// Whether the client's buffers are in use until then.
    pub(super) const fn moves_data(&self) -> bool {
        matches!(self, Self::Transfer { .. } | Self::CopyOut { .. })
    }
}

/// A disk as the worker uses it. Called from the worker's thread only.
pub(crate) trait Disk: Send + 'static {
    /// Before the first request: what is to be registered with the ring of the thread that serves the disk.
    fn register(&mut self, _registrar: &Registrar) {}

    /// The disk goes while some of its operations have not ended: nobody else may get what they use by its number.
    fn abandon(&mut self) {}

    /// Looks at a request and starts it. `write_back`: the driver has a flush command and uses it.
    fn begin(&mut self, request: &BlkRequest<'_>, view: &Arc<View>, write_back: bool) -> Verdict;

    /// A chain that is no request.
    fn misshapen(&mut self, error: &ShapeError) -> Verdict;

    /// An I/O of a request has completed. Disks that never answer [`Verdict::Io`] are never called.
    fn proceed(
        &mut self,
        after: After,
        result: Result<u32>,
        buffer: Option<OwnedBuf>,
        view: &Arc<View>,
    ) -> Verdict;
}
