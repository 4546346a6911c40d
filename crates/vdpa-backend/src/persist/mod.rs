//! Devices that outlive the process that serves them.
//!
//! The state of each device is in a journal, a memory file that another process holds ([`Store`], the holder of
//! `vdpa-holder`), with copies of all descriptors that it names: the client's eventfds, memory objects and address space.
//! A request of the client that changes the device is answered when its change is in the journal. When this process dies,
//! its successor takes everything back from the holder ([`DeviceLog::reopen`]) and builds the device again.
//!
//! | type | is |
//! |---|---|
//! | [`Store`] | where descriptors are held |
//! | [`DeviceLog`] | the journal of one device, as the device file writes it |
//! | [`DeviceFront`] | what the journal says beside the state of the device: the opens, and the last request |
//! | [`SharedDevice`] | a device that a second client can open, as it is written |
//! | [`Reopened`] | what a successor finds; [`SharedRecords`] of a device that a second client could open |

mod front;
#[cfg(test)]
mod golden_tests;
pub mod items;
mod journal;
mod notes;
mod objects;

use std::fmt::Debug;
use std::os::fd::{AsFd, BorrowedFd};

use parking_lot::Mutex;
use vdpa_core::Errno;
use vdpa_holder::client::Client;
use vdpa_sys::uring::RingRecord;

pub use front::{DeviceFront, SharedFront, SuccessorFront};
pub use journal::{DeviceLog, LogError, Reopened, SharedDevice, SharedRecords};
pub use notes::DeviceNotes;
pub(crate) use notes::{OWN as OWN_NOTES, WORDS as NOTES};
pub use objects::RestoredSpaces;
pub use vdpa_holder::client::Held;
pub use vdpa_holder::protocol::Kind;

/// Holds copies of descriptors for a successor of this process. Any thread may call it; each call may block for some ten
/// microseconds.
pub trait Store: Debug + Send + Sync {
    /// Holds a copy of `fd` as `key`, with a record of at most 128 bytes.
    ///
    /// # Errors
    /// `EEXIST` for a key in use; `ENOSPC` when too much is held; those of the holder's connection.
    fn hold(&self, key: u64, kind: Kind, fd: BorrowedFd<'_>, record: &[u8]) -> Result<(), Errno>;

    /// Holds an io_uring, with its registered buffers.
    ///
    /// # Errors
    /// As [`hold`](Self::hold).
    fn hold_ring(&self, key: u64, ring: BorrowedFd<'_>, record: &RingRecord) -> Result<(), Errno>;

    /// Holds it no more.
    ///
    /// # Errors
    /// `ENOENT` for a key that is not in use.
    fn release(&self, key: u64) -> Result<(), Errno>;
}

impl Store for Mutex<Client> {
    fn hold(&self, key: u64, kind: Kind, fd: BorrowedFd<'_>, record: &[u8]) -> Result<(), Errno> {
        self.lock().hold(key, kind, fd, record)
    }

    fn hold_ring(&self, key: u64, ring: BorrowedFd<'_>, record: &RingRecord) -> Result<(), Errno> {
        self.lock().hold_ring(key, ring.as_fd(), record)
    }

    fn release(&self, key: u64) -> Result<(), Errno> {
        self.lock().release(key)
    }
}

/// Items of device 0 from this one on are the io_urings of worker threads and their tables: see
/// [`WorkerPool::keeping`](crate::worker::WorkerPool::keeping).
pub const RINGS: u32 = 1 << 16;

/// Keys of what belongs to device `device`, a number that is not used twice in the life of the holder; 0 is for what belongs
/// to no device.
#[must_use]
pub const fn key(device: u32, item: u32) -> u64 {
    (device as u64) << 32 | item as u64
}

/// The device of a key, and which of its items it is.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the halves of a key")]
pub const fn split_key(key: u64) -> (u32, u32) {
    ((key >> 32) as u32, key as u32)
}
