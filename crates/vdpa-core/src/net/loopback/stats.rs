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

/// Words that the counters of a device need, and the note of the packet that is being handed over.
pub const STATS_WORDS: usize = 12;
/// The word of that note.
const PACKET: usize = 11;

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

/// A packet that is in its receive buffer, and whose two chains are being answered: one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Delivery {
    /// Head of the chain that was sent.
    pub(super) tx: u16,
    /// Head of the chain that it was received in, and bytes that were written there.
    pub(super) rx: u16,
    pub(super) len: u16,
}

/// Where the present [`Delivery`] is noted.
#[derive(Clone)]
pub(super) struct Note(StatsMemory);

impl fmt::Debug for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

impl Note {
    const VALID: u64 = 1 << 63;

    /// Notes that the chains are being answered, or that they are.
    pub(super) fn set(&self, delivery: Option<Delivery>) {
        let word = delivery.map_or(0, |Delivery { tx, rx, len }| {
            Self::VALID | u64::from(tx) << 32 | u64::from(rx) << 16 | u64::from(len)
        });
        self.0.store(PACKET, word);
    }

    /// What was noted last.
    pub(super) fn get(&self) -> Option<Delivery> {
        let word = self.0.load(PACKET);
        let field = |shift: u32| u16::try_from(word >> shift & u64::from(u16::MAX)).unwrap_or(0);
        (word & Self::VALID != 0).then(|| Delivery { tx: field(32), rx: field(16), len: field(0) })
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
    pub(super) delivery: Note,
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
            delivery: Note(Arc::clone(memory)),
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
