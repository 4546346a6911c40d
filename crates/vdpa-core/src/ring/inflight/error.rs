//! What can be wrong with a log.

use thiserror::Error;

use crate::ring::RingError;

/// Why a queue cannot be continued from a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LogError {
    /// The memory is too small.
    #[error("in-flight log of {words} words: {needed} are needed")]
    Room {
        /// 64-bit words there are.
        words: usize,
        /// Words that are needed.
        needed: usize,
    },

    /// There is no log: the queue was never started, or its process died while it made the log, before it took the
    /// first request. The queue starts at the position it was set to, with nothing in flight.
    #[error("no in-flight log: the queue had not taken a request")]
    Absent,

    /// The memory has something else in it.
    #[error("in-flight log begins with {found:#x}: this is no log")]
    Magic {
        /// The first word.
        found: u64,
    },

    /// The log has another version, or is that of another kind of ring.
    #[error("in-flight log is of kind {found:#x}, the queue needs {needed:#x} (version, features, size)")]
    Kind {
        /// The second word of the log.
        found: u64,
        /// What it should be.
        needed: u64,
    },

    /// The header was damaged.
    #[error("in-flight log has checksum {found:#x} of its header, it should be {needed:#x}")]
    Checksum {
        /// Checksum read.
        found: u64,
        /// Checksum of what was read.
        needed: u64,
    },

    /// A position cannot be.
    #[error("in-flight log counts {count} as {what}: too many")]
    Count {
        /// Which count.
        what: &'static str,
        /// The count read.
        count: u64,
    },

    /// A record contradicts the others.
    #[error("in-flight log, request {name}: {reason}")]
    Request {
        /// Name of the request.
        name: u16,
        /// What is wrong.
        reason: &'static str,
    },

    /// The ring cannot be continued.
    #[error(transparent)]
    Ring(#[from] RingError),
}
