//! What becomes of a request.

use vdpa_core::Errno;

use super::OwnedBuf;

/// The result of a request.
#[derive(Debug)]
pub struct Completion {
    /// The token of the request, as given to `submit`.
    pub token: u64,
    /// Number of bytes, events, or 0; or the error. Cancelled requests give `ECANCELED`.
    pub result: Result<u32, Errno>,
    /// Whether further completions of this request will come ([`Op::PollMultishot`](super::Op::PollMultishot)).
    pub more: bool,
    /// The buffer, if the request owned one.
    pub buffer: Option<OwnedBuf>,
}

/// Why a request was not queued. Nothing was done, and its memory and files were dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The request itself is invalid.
    #[error("request refused: {errno}")]
    Request {
        /// `EINVAL`: a transfer of more than 4 GiB.
        errno: Errno,
    },
    /// The submission queue is full and the kernel does not consume it: reap completions first.
    #[error("the submission queue is full and the kernel takes nothing: {errno}; reap completions first")]
    Full {
        /// The error of `io_uring_enter`.
        errno: Errno,
    },
}

impl SubmitError {
    /// The error number of the request.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match *self {
            Self::Request { errno } | Self::Full { errno } => errno,
        }
    }
}
