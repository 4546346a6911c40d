//! Cancels what waits.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vdpa_core::Errno;
use vdpa_sys::eventfd::EventFd;

/// Cancels a side of an update that waits, from another thread.
///
/// Clones share one eventfd. It stays signalled: what is given a used one fails at once.
#[derive(Clone, Debug)]
pub struct Cancel(Arc<EventFd>);

impl AsFd for Cancel {
    /// Readable once it is cancelled.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Cancel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Cancel {
    /// A cancellation that has not been used yet.
    ///
    /// # Errors
    /// Those of eventfd(2): `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn new() -> Result<Self, Errno> {
        Ok(Self(Arc::new(EventFd::new()?)))
    }

    /// Cancels everything that was given this, now and later. Does not block; any thread may call it.
    pub fn cancel(&self) {
        self.0.signal();
    }

    /// Whether it is cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.wait(Some(Duration::ZERO))
    }
}
