//! [`Counters`]: what is counted of the queues of a device.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vdpa_core::parent::QueueStats;
use vdpa_core::ring::inflight::LogMemory as _;
use vdpa_sys::shared_words::SharedWords;

/// Words of the counters of one queue: a cache line.
pub(super) const COUNTERS: usize = 8;
// Counters of a queue by what they count: completed requests, bytes of data in both directions, requests completed with an
// error, and requests that were refused as `Popped::Poison`.
const REQUESTS: usize = 0;
const BYTES: usize = 1;
const ERRORS: usize = 2;
pub(super) const POISON: usize = 3;
/// The rest are the device's own.
pub(super) const OWN: usize = 4;
/// Counters of each queue that a device defines itself: see [`Queues::count_own`](super::Queues::count_own).
pub const OWN_COUNTERS: usize = COUNTERS - OWN;

/// The counters of a device's queues. A reset does not clear them.
#[derive(Debug)]
pub(super) enum Counters {
    Own(Arc<[AtomicU64]>),
    /// In memory that outlives this process.
    Shared(SharedWords),
}

impl Counters {
    pub(super) fn own(queues: u16) -> Self {
        Self::Own((0..usize::from(queues) * COUNTERS).map(|_| AtomicU64::new(0)).collect())
    }

    /// Only the queue's thread writes them: a load and a store are enough, and avoid a locked addition.
    #[inline]
    pub(super) fn add(&self, queue: u16, counter: usize, more: u64) {
        let word = usize::from(queue) * COUNTERS + counter;
        match self {
            Self::Own(words) => words.store(word, words.load(word).wrapping_add(more)),
            Self::Shared(words) => words.store(word, words.load(word).wrapping_add(more)),
        }
    }

    pub(super) fn count(&self, queue: u16, bytes: u64, failed: bool) {
        self.add(queue, REQUESTS, 1);
        self.add(queue, BYTES, bytes);
        if failed {
            self.add(queue, ERRORS, 1);
        }
    }

    pub(super) fn get(&self, queue: u16, counter: usize) -> u64 {
        match self {
            Self::Own(words) => words.load(usize::from(queue) * COUNTERS + counter),
            Self::Shared(words) => words.load(usize::from(queue) * COUNTERS + counter),
        }
    }

    pub(super) fn read(&self, queue: u16) -> QueueStats {
        let get = |counter| self.get(queue, counter);
        let [requests, bytes, errors, poison] = [REQUESTS, BYTES, ERRORS, POISON].map(get);
        QueueStats { requests, bytes, errors, poison }
    }
}
