//! Adoption of rings in use, and devices that write invalid used elements.

use super::*;
use crate::ring::Chain;
use crate::testing::{Pair, TestArea};
use crate::vq::QueueState;

const EVENT_IDX: Features = Features::of(&[Features::RING_EVENT_IDX]);
const SIZE: u16 = 8;

fn buffer(iova: u64, len: u32) -> Buffer {
    Buffer { iova, len }
}

/// A ring with two requests, of two and of three descriptors. The first is used and not yet popped by the driver; the
/// second is in flight, and its chain is returned.
fn ring_in_use(index: u16, features: Features) -> (Pair, Chain) {
    let mut pair = Pair::starting_at(SIZE, features, index);
    pair.driver.add(&[buffer(1, 1)], &[buffer(2, 5)], 20).unwrap();
    pair.driver.add(&[buffer(3, 1)], &[buffer(4, 6), buffer(5, 6)], 30).unwrap();
    pair.driver.publish().unwrap();
    let mut chain = Chain::new();
    assert!(pair.queue.pop(&pair.memory, &mut chain).unwrap());
    pair.queue.push_used(chain.head, 5).unwrap();
    pair.queue.publish().unwrap();
    assert!(pair.queue.pop(&pair.memory, &mut chain).unwrap());
    (pair, chain)
}

fn adopt(pair: &Pair, state: DriverState) -> Result<SplitDriver<TestArea>, AdoptError> {
    let [desc, avail, used] = pair.areas();
    SplitDriver::adopt(state, desc, avail, used)
}

#[test]
fn a_ring_in_use_is_adopted_at_every_index() {
    for index in (0..=64).chain(0xffc0..=0xffff).chain(0x7ff0..=0x8010u16) {
        let features = if index.is_multiple_of(2) { Features::NONE } else { EVENT_IDX };
        let (mut pair, chain) = ring_in_use(index, features);
        // Added, but not published when the state is saved.
        pair.driver.add(&[buffer(6, 1)], &[], 40).unwrap();
        let state = pair.driver.state();
        // The device completes a request between the save and the adoption.
        pair.queue.push_used(chain.head, 12).unwrap();
        pair.queue.publish().unwrap();

        pair.driver = adopt(&pair, state.clone()).unwrap();
        assert_eq!(pair.driver.state(), state, "the adopted driver has the saved state");
        assert_eq!((pair.driver.in_flight(), pair.driver.free()), (3, 2));
        assert_eq!(pair.driver.pop_used(), Ok(Some(Completion { token: 20, len: 5 })));
        assert_eq!(pair.driver.pop_used(), Ok(Some(Completion { token: 30, len: 12 })));
        assert_eq!(pair.driver.pop_used(), Ok(None));
        assert!(pair.driver.publish().unwrap(), "a kick may have been lost");
        assert_eq!(pair.driver.free(), 7);
        // Every descriptor is usable again, once.
        for token in 0..7 {
            pair.driver.add(&[buffer(0, 1)], &[], token).unwrap();
        }
        assert_eq!(pair.driver.add(&[buffer(0, 1)], &[], 9), Err(AddError::Full { needed: 1, free: 0 }),);
        pair.driver.publish().unwrap();
        pair.serve(|_, _| 0).unwrap();
        let tokens = std::iter::from_fn(|| pair.driver.pop_used().unwrap()).map(|done| done.token);
        assert_eq!(tokens.collect::<Vec<_>>(), [40, 0, 1, 2, 3, 4, 5, 6], "index {index}");
    }
}

#[test]
fn a_state_with_any_invalid_field_is_refused() {
    let (pair, _) = ring_in_use(0xffff, EVENT_IDX);
    let good = pair.driver.state();
    assert_eq!(good.in_flight[1].descriptors, [2, 3, 4]);
    adopt(&pair, good.clone()).unwrap();
    let refused = |name: &str, change: &dyn Fn(&mut DriverState)| {
        let mut state = good.clone();
        change(&mut state);
        assert_ne!(state, good, "{name}: the state is unchanged");
        adopt(&pair, state).map(drop).expect_err(name)
    };
    for size in (0..=u16::MAX).filter(|&size| size != SIZE) {
        refused("size", &|state| state.size = size);
    }
    for bit in [Features::RING_PACKED, Features::IN_ORDER] {
        refused("features", &|state| state.features = state.features.with(bit));
    }
    for index in (0..=u16::MAX).filter(|&index| index != good.avail_index) {
        refused("avail_index", &|state| state.avail_index = index);
    }
    for index in (0..=u16::MAX).filter(|&index| index != good.last_used_index) {
        refused("last_used_index", &|state| state.last_used_index = index);
    }
    for free in (0..=u16::MAX).filter(|&free| free != good.free) {
        refused("free", &|state| state.free = free);
    }
    refused("request missing", &|state| drop(state.in_flight.pop()));
    refused("request duplicated", &|state| state.in_flight.push(state.in_flight[0].clone()));
    for (request, entry) in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)] {
        let right = good.in_flight[request].descriptors[entry];
        for index in (0..=u16::MAX).filter(|&index| index != right) {
            refused("descriptor", &|state| state.in_flight[request].descriptors[entry] = index);
        }
    }
    for request in 0..2 {
        refused("chain shorter", &|state| state.in_flight[request].descriptors.truncate(1));
        refused("chain empty", &|state| state.in_flight[request].descriptors.clear());
        refused("chain longer", &|state| state.in_flight[request].descriptors.push(7));
        refused("chain longer, free adjusted", &|state| {
            state.in_flight[request].descriptors.push(7);
            state.free -= 1;
        });
        for writable in [0, 4, 13, u32::MAX] {
            refused("writable", &|state| state.in_flight[request].writable = writable);
        }
    }
}

#[test]
fn an_outdated_state_is_refused() {
    let (mut pair, chain) = ring_in_use(0xfffe, EVENT_IDX);
    let old = pair.driver.state();
    pair.queue.push_used(chain.head, 0).unwrap();
    pair.queue.publish().unwrap();
    while pair.driver.pop_used().unwrap().is_some() {}
    for token in 0..3 {
        pair.driver.add(&[buffer(0, 1)], &[], token).unwrap();
    }
    pair.driver.publish().unwrap();
    assert_eq!(
        adopt(&pair, old).map(drop),
        Err(AdoptError::Index { ring: "available", found: 3, first: 0xfffe, last: 0 }),
    );
}

#[test]
fn a_state_round_trips_through_json_and_unknown_fields_are_refused() {
    let (pair, _) = ring_in_use(7, EVENT_IDX);
    let text = serde_json::to_string(&pair.driver.state()).unwrap();
    assert_eq!(serde_json::from_str::<DriverState>(&text).unwrap(), pair.driver.state());
    let extended = text.replacen('{', "{\"more\":1,", 1);
    assert!(serde_json::from_str::<DriverState>(&extended).is_err());
}

/// Writes used elements (id, length) after those of [`ring_in_use`] as a device would, and pops all of them.
fn pop_elements(elements: &[(u32, u32)], advance: u16) -> Result<Vec<u64>, RingError> {
    let (mut pair, _) = ring_in_use(0xffff, Features::NONE);
    for (position, (id, len)) in (0..).zip(elements) {
        let at = pair.ring.used + 4 + 8 * position;
        pair.memory.poke(at, &id.to_le_bytes());
        pair.memory.poke(at + 4, &len.to_le_bytes());
    }
    pair.memory.poke(pair.ring.used + 2, &advance.to_le_bytes());
    let mut tokens = Vec::new();
    loop {
        match pair.driver.pop_used() {
            Ok(Some(done)) => tokens.push(done.token),
            Ok(None) => return Ok(tokens),
            Err(error) => {
                assert_eq!(pair.driver.pop_used(), Err(error), "the error persists");
                assert_eq!(pair.driver.enable_interrupts(), Err(error));
                return Err(error);
            }
        }
    }
}

#[test]
fn invalid_used_elements_are_detected() {
    assert_eq!(pop_elements(&[(2, 12)], 1), Ok(vec![20, 30]), "a valid element");
    assert_eq!(pop_elements(&[(0, 0)], 1), Err(RingError::NotInFlight { head: 0 }), "completed twice");
    assert_eq!(
        pop_elements(&[(3, 0)], 1),
        Err(RingError::NotInFlight { head: 3 }),
        "in the middle of a chain"
    );
    assert_eq!(pop_elements(&[(7, 0)], 1), Err(RingError::NotInFlight { head: 7 }), "never added");
    let outside = |index| Err(RingError::DescriptorIndex { index, entries: 8 });
    assert_eq!(pop_elements(&[(8, 0)], 1), outside(8));
    assert_eq!(pop_elements(&[(0x1_0002, 0)], 1), outside(0x1_0002), "an id is 32 bits wide");
    assert_eq!(pop_elements(&[(2, 13)], 1), Err(RingError::UsedLength { head: 2, len: 13, writable: 12 }));
    assert_eq!(pop_elements(&[(2, 0)], 2), Err(RingError::UsedIndex { index: 2, first: 0xffff, room: 2 }));
    assert_eq!(
        pop_elements(&[], 0xfffe),
        Err(RingError::UsedIndex { index: 0xfffe, first: 0xffff, room: 2 })
    );
}

#[test]
fn requests_that_do_not_fit_change_nothing() {
    let mut pair = Pair::new(4, Features::NONE);
    let one = [buffer(0, 1)];
    assert_eq!(pair.driver.add(&[], &[], 0), Err(AddError::Empty));
    assert_eq!(pair.driver.add(&[one[0]; 3], &[one[0]; 2], 0), Err(AddError::TooLong { needed: 5, size: 4 }));
    let huge = [buffer(0, u32::MAX), buffer(0, 1)];
    assert_eq!(pair.driver.add(&huge, &[], 0), Err(AddError::Length { bytes: 1 << 32 }));
    pair.driver.add(&[one[0]; 3], &[], 1).unwrap();
    assert_eq!(pair.driver.add(&one, &one, 0), Err(AddError::Full { needed: 2, free: 1 }));
    for failing in 0..2 {
        pair.memory.fail_after(failing);
        assert!(matches!(pair.driver.add(&one, &[], 0), Err(AddError::Fault(_))));
    }
    pair.driver.add(&one, &[], 2).unwrap();
    pair.driver.publish().unwrap();
    let mut chain = Chain::new();
    let mut lengths = Vec::new();
    while pair.queue.pop(&pair.memory, &mut chain).unwrap() {
        lengths.push(chain.readable.len());
    }
    assert_eq!(lengths, [3, 1]);
    assert_eq!(pair.queue.state(), QueueState::Split { avail_index: 2 });
}

#[test]
fn interrupts_are_sent_only_while_they_are_enabled() {
    for features in [Features::NONE, EVENT_IDX] {
        let mut pair = Pair::starting_at(SIZE, features, 0xfffe);
        let serve_one = |pair: &mut Pair| {
            pair.driver.add(&[buffer(0, 1)], &[], 0).unwrap();
            pair.driver.publish().unwrap();
            pair.serve(|_, _| 0).unwrap()
        };
        assert!(serve_one(&mut pair));
        pair.driver.pop_used().unwrap().unwrap();
        pair.driver.disable_interrupts().unwrap();
        assert!(!serve_one(&mut pair));
        assert!(pair.driver.enable_interrupts().unwrap(), "a completion is there already");
        pair.driver.pop_used().unwrap().unwrap();
        assert!(!pair.driver.enable_interrupts().unwrap());
        assert!(serve_one(&mut pair), "the driver waits");
    }
}
