//! [`WriteCache`]: whether a write may be answered before it is stable.

use std::sync::atomic::{AtomicU8, Ordering};

use vdpa_core::features::Features;

/// Whether writes of a block device have to be stable when they are answered (virtio 1.2 section 5.2.5.2).
#[derive(Debug, Default)]
pub(crate) struct WriteCache(AtomicU8);

impl WriteCache {
    const AS_NEGOTIATED: u8 = 0;
    const WRITE_THROUGH: u8 = 1;
    const WRITE_BACK: u8 = 2;

    /// What the driver has written into the field `writeback`: for every request that it makes from now on.
    pub(crate) fn set(&self, write_back: bool) {
        let mode = if write_back { Self::WRITE_BACK } else { Self::WRITE_THROUGH };
        self.0.store(mode, Ordering::Release);
    }

    /// The driver has written nothing.
    pub(crate) fn reset(&self) {
        self.0.store(Self::AS_NEGOTIATED, Ordering::Release);
    }

    /// Whether a write may be answered before it is stable, by a driver that has accepted `features`. One that has a flush
    /// command is taken to use it until it says otherwise.
    pub(crate) fn is_write_back(&self, features: Features) -> bool {
        let mode = if features.has(Features::BLK_CONFIG_WCE) {
            self.0.load(Ordering::Acquire)
        } else {
            Self::AS_NEGOTIATED
        };
        match mode {
            Self::WRITE_THROUGH => false,
            Self::WRITE_BACK => true,
            _ => features.has(Features::BLK_FLUSH),
        }
    }
}
