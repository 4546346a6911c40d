//! Statistics of the network simulator (uapi-spec 6.2).

use std::sync::atomic::{AtomicU64, Ordering};

use crate::errno::Errno;
use crate::parent::QueueStats;
use crate::types::{QueueIndex, Result};

/// A counter that one thread increments and any thread reads.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters of a device since its creation. Neither a reset nor a close clears them.
#[derive(Debug, Default)]
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

impl Stats {
    /// The statistics of one queue under the kernel's names, in the kernel's order.
    ///
    /// # Errors
    /// `EINVAL` for a queue the device does not have.
    pub fn vendor(&self, index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        let rows: &[(&'static str, &Counter)] = match index.0 {
            super::RX => &[
                ("rx packets", &self.rx_packets),
                ("rx bytes", &self.rx_bytes),
                ("rx errors", &self.rx_errors),
                ("rx overruns", &self.rx_overruns),
                ("rx drops", &self.rx_drops),
            ],
            super::TX => &[
                ("tx packets", &self.tx_packets),
                ("tx bytes", &self.tx_bytes),
                ("tx errors", &self.tx_errors),
                // The kernel reports this name but never counts it.
                ("tx drops", &Counter(AtomicU64::new(0))),
            ],
            super::CONTROL => &[
                ("cvq requests", &self.cvq_requests),
                ("cvq successes", &self.cvq_successes),
                ("cvq errors", &self.cvq_errors),
            ],
            _ => return Err(Errno::INVAL),
        };
        Ok(rows.iter().map(|(name, counter)| (*name, counter.get())).collect())
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
        QueueStats { requests, bytes, errors }
    }
}
