//! Statistics of the network simulator (uapi-spec 6.2).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::errno::Errno;
use crate::parent::QueueStats;
use crate::ring::inflight::LogMemory;
use crate::types::{QueueIndex, Result};

/// Memory of the counters: words that one thread writes and any thread reads. It may outlive the process.
pub type StatsMemory = Arc<dyn LogMemory + Send + Sync>;

/// Words that the counters of a device need.
pub const STATS_WORDS: usize = 11;

/// A counter that one thread increments and any thread reads.
#[derive(Clone)]
pub(super) struct Counter {
    memory: StatsMemory,
    word: usize,
}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

impl Counter {
    pub(super) fn add(&self, count: usize) {
        self.memory.store(self.word, self.get().wrapping_add(count as u64));
    }

    fn get(&self) -> u64 {
        self.memory.load(self.word)
    }
}

/// All counters of a device since its creation. Neither a reset nor a close clears them.
#[derive(Debug)]
pub struct Stats {
    pub(super) rx_packets: Counter,
    pub(super) rx_bytes: Counter,
    pub(super) rx_errors: Counter,
    pub(super) rx_overruns: Counter,
    pub(super) rx_drops: Counter,
    pub(super) tx_packets: Counter,
    pub(super) tx_bytes: Counter,
    pub(super) tx_errors: Counter,
    pub(super) cvq_requests: Counter,
    pub(super) cvq_successes: Counter,
    pub(super) cvq_errors: Counter,
}

impl Default for Stats {
    fn default() -> Self {
        let memory: Arc<[AtomicU64]> = (0..STATS_WORDS).map(|_| AtomicU64::new(0)).collect();
        Self::new(&(Arc::new(memory) as StatsMemory))
    }
}

impl Stats {
    /// Counters in `memory`, of [`STATS_WORDS`] words, that go on from what is in there.
    #[must_use]
    pub fn new(memory: &StatsMemory) -> Self {
        let counter = |word| Counter { memory: Arc::clone(memory), word };
        Self {
            rx_packets: counter(0),
            rx_bytes: counter(1),
            rx_errors: counter(2),
            rx_overruns: counter(3),
            rx_drops: counter(4),
            tx_packets: counter(5),
            tx_bytes: counter(6),
            tx_errors: counter(7),
            cvq_requests: counter(8),
            cvq_successes: counter(9),
            cvq_errors: counter(10),
        }
    }

    /// The statistics of one queue under the kernel's names, in the kernel's order.
    ///
    /// # Errors
    /// `EINVAL` for a queue the device does not have.
    pub fn vendor(&self, index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        let rows: &[(&'static str, u64)] = match index.0 {
            super::RX => &[
                ("rx packets", self.rx_packets.get()),
                ("rx bytes", self.rx_bytes.get()),
                ("rx errors", self.rx_errors.get()),
                ("rx overruns", self.rx_overruns.get()),
                ("rx drops", self.rx_drops.get()),
            ],
            super::TX => &[
                ("tx packets", self.tx_packets.get()),
                ("tx bytes", self.tx_bytes.get()),
                ("tx errors", self.tx_errors.get()),
                // The kernel reports this name but never counts it.
                ("tx drops", 0),
            ],
            super::CONTROL => &[
                ("cvq requests", self.cvq_requests.get()),
                ("cvq successes", self.cvq_successes.get()),
                ("cvq errors", self.cvq_errors.get()),
            ],
            _ => return Err(Errno::INVAL),
        };
        Ok(rows.to_vec())
    }

    /// The counters of one queue in the form common to all devices; zeros for a queue the device does not have.
    #[must_use]
    pub fn queue(&self, index: QueueIndex) -> QueueStats {
        let (requests, bytes, errors) = match index.0 {
            super::RX => (self.rx_packets.get(), self.rx_bytes.get(), self.rx_errors.get()),
            super::TX => (self.tx_packets.get(), self.tx_bytes.get(), self.tx_errors.get()),
            super::CONTROL => (self.cvq_requests.get(), 0, self.cvq_errors.get()),
            _ => (0, 0, 0),
        };
        QueueStats { requests, bytes, errors, poison: 0 }
    }
}
