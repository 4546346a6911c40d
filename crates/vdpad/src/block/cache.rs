//! [`WriteCache`]: whether a write may be answered before it is stable.

use std::sync::atomic::{AtomicU8, Ordering};

use vdpa_core::features::Features;

/// Cache mode of a block device (virtio 1.2 section 5.2.5.2). Write-through: a write is stable when it is answered.
#[derive(Debug, Default)]
pub(crate) struct WriteCache(AtomicU8);

impl WriteCache {
    const AS_NEGOTIATED: u8 = 0;
    const WRITE_THROUGH: u8 = 1;
    const WRITE_BACK: u8 = 2;

    /// Stores what the driver has written into the configuration field `writeback`. Applies to requests that start later.
    pub(crate) fn set(&self, write_back: bool) {
        let mode = if write_back { Self::WRITE_BACK } else { Self::WRITE_THROUGH };
        self.0.store(mode, Ordering::Release);
    }

    /// Forgets what the driver has written: the mode follows from the negotiated features again.
    pub(crate) fn reset(&self) {
        self.0.store(Self::AS_NEGOTIATED, Ordering::Release);
    }

    /// The mode, for [`restore`](Self::restore).
    pub(crate) fn save(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }

    /// Sets the mode that [`save`](Self::save) has returned; `false` for another number.
    pub(crate) fn restore(&self, mode: u8) -> bool {
        let known = matches!(mode, Self::AS_NEGOTIATED | Self::WRITE_THROUGH | Self::WRITE_BACK);
        if known {
            self.0.store(mode, Ordering::Release);
        }
        known
    }

    /// Whether a write may be answered before it is stable, for a driver that has accepted `features`. One that has
    /// accepted the flush command is taken to use it until it writes `writeback`.
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
