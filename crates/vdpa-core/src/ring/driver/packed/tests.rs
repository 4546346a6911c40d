//! The driver side of a packed ring: devices that write invalid used descriptors, and saved states that do not match.

use super::*;
use crate::ring::driver::Driver;
use crate::ring::layout::NEXT;
use crate::testing::{RingPair, TestArea};

const PACKED: Features = Features::of(&[Features::RING_PACKED]);
const ONE: Buffer = Buffer { iova: 0x1000, len: 10 };

struct Raw {
    pair: RingPair,
    driver: PackedDriver<TestArea>,
}

impl Raw {
    fn new(size: u16) -> Self {
        let mut pair = RingPair::new(size, PACKED);
        let Driver::Packed(driver) = std::mem::replace(&mut pair.driver, split()) else { panic!("packed") };
        Self { pair, driver }
    }

    /// Writes a descriptor as a device does: id, length, flags.
    fn used(&self, index: u16, (id, len, flags): (u16, u32, u16)) {
        let at = self.pair.ring.desc + u64::from(index) * 16;
        self.pair.memory.poke(at + 8, &len.to_le_bytes());
        self.pair.memory.poke(at + 12, &id.to_le_bytes());
        self.pair.memory.poke(at + 14, &flags.to_le_bytes());
    }

    fn flags(&self, index: u16) -> u16 {
        let at = self.pair.ring.desc + u64::from(index) * 16 + 14;
        u16::from_le_bytes(self.pair.memory.peek(at, 2).try_into().unwrap())
    }

    fn adopt(&self, state: &PackedDriverState) -> Result<PackedDriver<TestArea>, PackedAdoptError> {
        let [desc, driver, device] = self.pair.areas();
        PackedDriver::adopt(state, desc, driver, device)
    }
}

fn split() -> Driver<TestArea> {
    RingPair::new(1, Features::NONE).driver
}

#[test]
fn a_batch_becomes_available_with_its_first_descriptor() {
    let mut raw = Raw::new(4);
    raw.driver.add(&[ONE], &[ONE], 1).unwrap();
    raw.driver.add(&[], &[ONE], 2).unwrap();
    assert_eq!([0, 1, 2].map(|index| raw.flags(index)), [NEXT, 0x82, 0x82]);
    assert!(raw.driver.publish().unwrap(), "a zeroed event structure enables notifications");
    assert_eq!(raw.flags(0), 0x81);
    raw.driver.add(&[ONE], &[], 3).unwrap();
    assert_eq!(raw.flags(3), 0);
    assert_eq!(raw.driver.add(&[ONE], &[], 4), Err(AddError::Full { needed: 1, free: 0 }));
}

#[test]
fn each_invalid_used_descriptor_has_its_own_error_and_the_error_persists() {
    let broken = |element, error| {
        let mut raw = Raw::new(4);
        raw.driver.add(&[ONE], &[], 1).unwrap();
        raw.driver.add(&[], &[ONE, ONE], 2).unwrap();
        raw.driver.publish().unwrap();
        raw.used(0, element);
        assert_eq!(raw.driver.pop_used(), Err(error));
        raw.used(0, (0, 0, 0x8080));
        assert_eq!(raw.driver.pop_used(), Err(error));
        assert_eq!(raw.driver.enable_interrupts(), Err(error));
        assert_eq!(raw.driver.in_flight(), 2);
    };
    broken((2, 0, 0x8080), RingError::BufferId { id: 2 });
    broken((4, 0, 0x8080), RingError::BufferId { id: 4 });
    broken((0, 1, 0x8082), RingError::UsedLength { head: 0, len: 1, writable: 0 });
    broken((1, 21, 0x8082), RingError::UsedLength { head: 1, len: 21, writable: 20 });
}

#[test]
fn a_used_length_without_the_write_flag_counts_only_if_it_fits() {
    for (element, expected) in [((0, 10, 0x8082), 10), ((0, 10, 0x8080), 10), ((0, 11, 0x8080), 0)] {
        let mut raw = Raw::new(4);
        raw.driver.add(&[], &[ONE], 1).unwrap();
        raw.driver.publish().unwrap();
        assert_eq!(raw.driver.pop_used(), Ok(None));
        raw.used(0, element);
        assert_eq!(raw.driver.pop_used(), Ok(Some(Completion { token: 1, len: expected })));
        assert_eq!(raw.driver.pop_used(), Ok(None));
    }
}

#[test]
fn a_request_that_is_not_published_cannot_be_used() {
    let mut raw = Raw::new(4);
    raw.driver.add(&[ONE], &[], 1).unwrap();
    raw.used(0, (0, 0, 0x8080));
    assert_eq!(raw.driver.pop_used(), Ok(None));
    let mut raw = Raw::new(4);
    raw.driver.add(&[ONE], &[], 1).unwrap();
    raw.driver.publish().unwrap();
    raw.driver.add(&[ONE, ONE], &[], 2).unwrap();
    raw.used(0, (1, 0, 0x8080));
    assert_eq!(raw.driver.pop_used(), Err(RingError::BufferId { id: 1 }));
}

#[test]
fn an_adopted_driver_keeps_requests_that_are_not_published() {
    let mut raw = Raw::new(4);
    raw.driver.add(&[ONE], &[], 1).unwrap();
    raw.driver.publish().unwrap();
    raw.driver.add(&[ONE], &[ONE], 2).unwrap();
    let state = raw.driver.state();
    raw.driver = raw.adopt(&state).unwrap();
    assert_eq!((raw.driver.state(), raw.driver.in_flight(), raw.driver.free()), (state, 2, 1));
    assert_eq!(raw.flags(1), NEXT);
    assert!(raw.driver.publish().unwrap());
    assert_eq!(raw.flags(1), 0x81);
    raw.used(0, (1, 10, 0x8082));
    assert_eq!(raw.driver.pop_used(), Ok(Some(Completion { token: 2, len: 10 })));
    raw.used(2, (0, 0, 0x8080));
    assert_eq!(raw.driver.pop_used(), Ok(Some(Completion { token: 1, len: 0 })));
    assert_eq!((raw.driver.in_flight(), raw.driver.free()), (0, 4));
}

#[test]
fn inconsistent_states_are_refused() {
    let mut raw = Raw::new(4);
    raw.driver.add(&[ONE], &[], 1).unwrap();
    raw.driver.add(&[ONE, ONE], &[], 2).unwrap();
    raw.driver.publish().unwrap();
    let good = raw.driver.state();
    assert!(raw.adopt(&good).is_ok());
    let refused = |change: fn(&mut PackedDriverState)| {
        let mut state = good.clone();
        change(&mut state);
        raw.adopt(&state).err()
    };
    let is_place = |error| matches!(error, Some(PackedAdoptError::Places { .. }));
    assert!(is_place(refused(|state| state.next_avail = 0x8004)));
    assert!(is_place(refused(|state| state.next_avail = 0x8000)));
    assert!(is_place(refused(|state| state.last_used = 2)));
    assert!(is_place(refused(|state| state.published = 0)));
    let count = refused(|state| state.in_flight[0].descriptors = 2);
    assert_eq!(count, Some(PackedAdoptError::Descriptors { descriptors: 4, expected: 3 }));
    let twice = refused(|state| state.in_flight[0].id = 1);
    assert_eq!(twice, Some(PackedAdoptError::Id { id: 1, size: 4 }));
    assert_eq!(refused(|state| state.in_flight[1].id = 4), Some(PackedAdoptError::Id { id: 4, size: 4 }));
    let empty = refused(|state| {
        state.in_flight[0].descriptors = 0;
        state.in_flight[1].descriptors = 3;
    });
    assert_eq!(empty, Some(PackedAdoptError::Empty { token: 1 }));
    let published = refused(|state| state.published = 0x8001);
    assert_eq!(published, Some(PackedAdoptError::Published { index: 1 }));
    let size = refused(|state| state.size = 0);
    assert_eq!(size, Some(PackedAdoptError::Ring(RingError::PackedSize { size: 0 })));
    let json = serde_json::to_string(&good).unwrap();
    assert_eq!(serde_json::from_str::<PackedDriverState>(&json).unwrap(), good);
}
