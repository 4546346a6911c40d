//! The driver side of a ring in the format that was negotiated.

use super::{AddError, Completion, PackedDriver, SplitDriver};
use crate::features::Features;
use crate::ring::{Area, Buffer, RingError};

/// The driver side of a ring of either format; see [`SplitDriver`] for what holds for both.
#[derive(Debug)]
pub enum Driver<A: Area> {
    /// Without `RING_PACKED`.
    Split(SplitDriver<A>),
    /// With `RING_PACKED`.
    Packed(PackedDriver<A>),
}

macro_rules! either {
    ($ring:expr, $driver:ident => $result:expr) => {
        match $ring {
            Driver::Split($driver) => $result,
            Driver::Packed($driver) => $result,
        }
    };
}

impl<A: Area> Driver<A> {
    /// Sets up an empty ring in the descriptor, driver and device areas, in the format that `features` asks for;
    /// to be called before the device runs.
    ///
    /// # Errors
    /// As [`SplitDriver::new`] and [`PackedDriver::new`].
    pub fn new(size: u16, features: Features, desc: A, driver: A, device: A) -> Result<Self, RingError> {
        if features.has(Features::RING_PACKED) {
            PackedDriver::new(size, features, desc, driver, device).map(Self::Packed)
        } else {
            SplitDriver::new(size, features, desc, driver, device).map(Self::Split)
        }
    }

    /// Adds a request; [`publish`](Self::publish) makes it available to the device.
    ///
    /// # Errors
    /// As [`SplitDriver::add`].
    pub fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u64) -> Result<(), AddError> {
        either!(self, driver => driver.add(readable, writable, token))
    }

    /// Makes all added requests available; returns whether the device must be kicked.
    ///
    /// # Errors
    /// As [`SplitDriver::publish`].
    pub fn publish(&mut self) -> Result<bool, RingError> {
        either!(self, driver => driver.publish())
    }

    /// Pops the next completion; `None` when there is none.
    ///
    /// # Errors
    /// As [`SplitDriver::pop_used`] and [`PackedDriver::pop_used`].
    pub fn pop_used(&mut self) -> Result<Option<Completion>, RingError> {
        either!(self, driver => driver.pop_used())
    }

    /// Asks for a notification at the next completion; returns whether a completion is available already.
    ///
    /// # Errors
    /// As [`SplitDriver::enable_interrupts`].
    pub fn enable_interrupts(&mut self) -> Result<bool, RingError> {
        either!(self, driver => driver.enable_interrupts())
    }

    /// Tells the device that no notification is needed. This is only a hint.
    ///
    /// # Errors
    /// [`RingError::Fault`].
    pub fn disable_interrupts(&mut self) -> Result<(), RingError> {
        either!(self, driver => driver.disable_interrupts())
    }

    /// Number of requests added and not completed.
    #[must_use]
    pub const fn in_flight(&self) -> u16 {
        either!(self, driver => driver.in_flight())
    }

    /// Number of free descriptors.
    #[must_use]
    pub const fn free(&self) -> u16 {
        either!(self, driver => driver.free())
    }

    /// Number of entries of the ring.
    #[must_use]
    pub const fn size(&self) -> u16 {
        either!(self, driver => driver.size())
    }
}
