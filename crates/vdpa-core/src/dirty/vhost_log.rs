//! [`VhostLog`]: vhost's own log of dirty pages, in memory of the client.

use std::fmt;
use std::sync::Arc;

use crate::types::{Asid, IovaRange};

/// Bytes of a page of the log, log2 (`VHOST_PAGE_SIZE`): always 4 KiB.
pub const LOG_PAGE_SHIFT: u32 = 12;

/// The address space whose addresses are those of the guest, and so of the log.
const GUEST: Asid = Asid(0);

/// Memory of bits, which this process sets while others take them away.
pub trait BitLog: fmt::Debug + Send + Sync {
    /// Number of pages that it has bits for.
    fn pages(&self) -> u64;

    /// Sets the bits of pages `first` to `last`, by atomic operations: bit `n % 8` of byte `n / 8` is page `n`. Ignores pages that it has
    /// no bits for, and memory that does not exist any more.
    fn set(&self, first: u64, last: u64);
}

/// Where a device marks the pages that it writes, as vhost does: bit `n` is the page of 4 KiB at guest address `4096 * n`.
#[derive(Clone)]
pub struct VhostLog {
    /// The bits (`VHOST_SET_LOG_BASE`).
    pub bits: Arc<dyn BitLog>,
    /// Signals the event of the client after pages were marked (`VHOST_SET_LOG_FD`).
    pub signal: Option<Arc<dyn Fn() + Send + Sync>>,
    /// `VHOST_F_LOG_ALL` is in force: buffers of requests are marked. Without it only rings whose address has the flag
    /// `VHOST_VRING_F_LOG` are.
    pub all: bool,
}

impl fmt::Debug for VhostLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bits, signal, all } = self;
        f.debug_struct("VhostLog")
            .field("bits", bits)
            .field("signal", &signal.is_some())
            .field("all", all)
            .finish()
    }
}

impl VhostLog {
    /// Marks `len` bytes of a request from `iova` on, if those are marked. Returns whether they were.
    #[must_use]
    pub fn mark_data(&self, asid: Asid, iova: u64, len: u64) -> bool {
        self.all && self.mark(asid, iova, len)
    }

    /// Marks `len` bytes of a ring that is at guest address `addr`.
    #[must_use]
    pub fn mark_ring(&self, asid: Asid, addr: u64, len: u64) -> bool {
        self.mark(asid, addr, len)
    }

    fn mark(&self, asid: Asid, addr: u64, len: u64) -> bool {
        let Some(range) = IovaRange::from_size(addr, len).filter(|_| asid == GUEST) else { return false };
        self.bits.set(range.first() >> LOG_PAGE_SHIFT, range.last() >> LOG_PAGE_SHIFT);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Calls(Mutex<Vec<(u64, u64)>>);

    impl BitLog for Calls {
        fn pages(&self) -> u64 {
            8
        }
        fn set(&self, first: u64, last: u64) {
            self.0.lock().unwrap().push((first, last));
        }
    }

    #[test]
    fn what_is_marked_depends_on_the_feature_and_the_address_space() {
        let calls = Arc::new(Calls::default());
        let log = VhostLog { bits: Arc::clone(&calls) as _, signal: None, all: false };
        assert!(!log.mark_data(Asid(0), 0x1000, 1) && log.mark_ring(Asid(0), 0x1fff, 2));
        let log = VhostLog { all: true, ..log };
        assert!(log.mark_data(Asid(0), 0x3000, 0x1000) && !log.mark_data(Asid(0), 0x3000, 0));
        assert!(!log.mark_data(Asid(1), 0, 1) && !log.mark_ring(Asid(1), 0, 1), "not addresses of the guest");
        assert!(!log.mark_data(Asid(0), u64::MAX, 2));
        assert_eq!(*calls.0.lock().unwrap(), [(1, 2), (3, 3)]);
    }
}
