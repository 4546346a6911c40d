//! Both sides of a ring of either format.

use super::{Pair, RingAddresses, TestArea, TestMemory, areas, memory_for};
use crate::features::Features;
use crate::ring::driver::{Driver, PackedDriver, SplitDriver};
use crate::ring::{Area, Buffer, Ring};
use crate::vq::QueueState;

/// A driver and a device on one ring in the format that the features say, at the start of a [`TestMemory`]; as
/// [`Pair`] for code that handles both formats.
#[derive(Debug)]
pub struct RingPair {
    /// The memory of both sides; it begins at [`Pair::BASE`].
    pub memory: TestMemory,
    /// The driver side.
    pub driver: Driver<TestArea>,
    /// The device side.
    pub queue: Ring<TestArea>,
    /// The addresses of the ring.
    pub ring: RingAddresses,
    size: u16,
    features: Features,
    buffers: u64,
}

impl RingPair {
    /// An empty ring of `size` entries with both sides started.
    ///
    /// # Panics
    /// When there is no such ring.
    #[must_use]
    pub fn new(size: u16, features: Features) -> Self {
        Self::starting_at(size, features, QueueState::initial(features))
    }

    /// As [`new`](Self::new), with both sides at `state` as if all requests before it had been served.
    ///
    /// # Panics
    /// When there is no such ring, or `state` is not one of a drained ring of this format.
    #[must_use]
    pub fn starting_at(size: u16, features: Features, state: QueueState) -> Self {
        let (memory, ring, buffers) = memory_for(size, features);
        let [desc, avail, used] = areas(&memory, ring, size, features);
        let mut driver =
            Driver::new(size, features, desc.clone(), avail.clone(), used.clone()).expect("a ring");
        if state != QueueState::initial(features) {
            driver = moved(driver, state, [&desc, &avail, &used]);
        }
        let queue = Ring::new(size, features, desc, avail, used, state).expect("a ring");
        Self { memory, driver, queue, ring, size, features, buffers }
    }

    /// The three areas, translated again: descriptor, driver, device.
    ///
    /// # Panics
    /// When a part of the ring was made a hole.
    #[must_use]
    pub fn areas(&self) -> [TestArea; 3] {
        areas(&self.memory, self.ring, self.size, self.features)
    }

    /// First address of the [`Pair::BUFFER_BYTES`] for buffers.
    #[must_use]
    pub const fn buffers(&self) -> u64 {
        self.buffers
    }

    /// `len` bytes for buffers, `at` bytes from their first.
    #[must_use]
    pub const fn buffer(&self, at: u64, len: u32) -> Buffer {
        Buffer { iova: self.buffers + at % Pair::BUFFER_BYTES, len }
    }

    /// Replaces the device side by one that starts at its position.
    ///
    /// # Panics
    /// When requests are in flight.
    pub fn restart_queue(&mut self) {
        assert_eq!((self.queue.in_flight(), self.queue.unpublished()), (0, 0), "the queue is not drained");
        let [desc, avail, used] = self.areas();
        let state = self.queue.state();
        self.queue = Ring::new(self.size, self.features, desc, avail, used, state).expect("the same ring");
    }

    /// Replaces the driver by one adopted from its state, as an exec does.
    ///
    /// # Panics
    /// When the state is refused.
    pub fn restart_driver(&mut self) {
        let [desc, avail, used] = self.areas();
        self.driver = match &self.driver {
            Driver::Split(driver) => {
                Driver::Split(SplitDriver::adopt(driver.state(), desc, avail, used).expect("its own state"))
            }
            Driver::Packed(driver) => Driver::Packed(
                PackedDriver::adopt(&driver.state(), desc, avail, used).expect("its own state"),
            ),
        };
    }
}

/// A driver of an empty ring at `state`. The ring memory is as earlier laps would have left it.
fn moved(
    driver: Driver<TestArea>,
    state: QueueState,
    [desc, avail, used]: [&TestArea; 3],
) -> Driver<TestArea> {
    let own = || (desc.clone(), avail.clone(), used.clone());
    match (driver, state) {
        (Driver::Split(driver), QueueState::Split { avail_index }) => {
            let mut state = driver.state();
            (state.avail_index, state.last_used_index) = (avail_index, avail_index);
            avail.store_u16(2, avail_index).expect("a ring");
            used.store_u16(2, avail_index).expect("a ring");
            let (desc, avail, used) = own();
            Driver::Split(SplitDriver::adopt(state, desc, avail, used).expect("an empty ring"))
        }
        (Driver::Packed(driver), QueueState::Packed { last_avail_idx: index, last_avail_wrap: wrap, .. }) => {
            let mut state = driver.state();
            let position = index | u16::from(wrap) << 15;
            (state.next_avail, state.published, state.last_used) = (position, position, position);
            for entry in 0..state.size {
                // As the previous lap has used it: both flags equal its wrap counter.
                let flags = if (entry < index) == wrap { 1 << 7 | 1 << 15 } else { 0 };
                desc.store_u16(usize::from(entry) * 16 + 14, flags).expect("a ring");
            }
            let (desc, avail, used) = own();
            Driver::Packed(PackedDriver::adopt(&state, desc, avail, used).expect("an empty ring"))
        }
        _ => panic!("{state:?} is of the other format"),
    }
}
