//! Split and packed rings with arbitrary content: the ring code does not panic, its work is bounded, and it terminates.
#![expect(clippy::unwrap_used, reason = "a ring operation that fails must fail the test")]

use std::cell::Cell;

use proptest::prelude::*;
use vdpa_core::features::Features;
use vdpa_core::ring::driver::{
    Driver, DriverState, InFlight, PackedDriver, PackedDriverState, PackedInFlight, SplitDriver,
};
use vdpa_core::ring::{Buffer, Chain, Fault, Memory, Ring};
use vdpa_core::testing::{Pair, RingPair, TestArea, TestMemory};
use vdpa_core::types::Perm;
use vdpa_core::vq::QueueState;

const SIZE: u16 = 8;

/// Counts reads of buffers and indirect tables.
struct Counting<'a> {
    memory: &'a TestMemory,
    reads: Cell<usize>,
}

impl Memory for Counting<'_> {
    type Area = TestArea;

    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), Fault> {
        self.reads.set(self.reads.get() + 1);
        self.memory.read(iova, buf)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Fault> {
        self.memory.write(iova, data)
    }

    fn area(&self, iova: u64, size: u64, perm: Perm) -> Result<TestArea, Fault> {
        self.memory.area(iova, size, perm)
    }
}

/// Address, length and flags that are often nearly valid: near the ring's memory, less than `units` times 16 bytes, known
/// flags.
fn buffer(units: u32) -> impl Strategy<Value = (u64, u32, u16)> {
    let addr = prop_oneof![
        3 => (Pair::BASE..Pair::BASE + 0x800).prop_map(|addr| addr & !15),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![3 => (0..units).prop_map(|len| len * 16), 1 => any::<u32>()];
    let flags = prop_oneof![3 => prop::sample::select(vec![0, 1, 1, 2, 3, 4, 6]), 1 => any::<u16>()];
    (addr, len, flags)
}

/// A descriptor of either format: the last two fields are flags and next in a split ring, id and flags in a packed one.
fn encode(addr: u64, len: u32, third: u16, fourth: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&addr.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    raw[12..14].copy_from_slice(&third.to_le_bytes());
    raw[14..].copy_from_slice(&fourth.to_le_bytes());
    raw
}

/// A descriptor of a split ring that is often nearly valid.
fn descriptor() -> impl Strategy<Value = [u8; 16]> {
    let next = prop_oneof![6 => 0..SIZE, 1 => any::<u16>()];
    (buffer(8), next).prop_map(|((addr, len, flags), next)| encode(addr, len, flags, next))
}

/// Pops and completes requests until none is left or the ring is broken, with at most `reads` reads for each. Returns
/// their number.
fn serve(queue: &mut Ring<TestArea>, memory: &TestMemory, reads: usize) -> Result<u16, TestCaseError> {
    let memory = Counting { memory, reads: Cell::new(0) };
    let mut chain = Chain::new();
    let mut popped = 0;
    loop {
        memory.reads.set(0);
        let result = queue.pop(&memory, &mut chain);
        prop_assert!(memory.reads.get() <= reads);
        match result {
            Ok(true) => {
                prop_assert!(chain.head < queue.size());
                prop_assert!(chain.readable().len() + chain.writable().len() <= 1 << 32);
                queue.push_used(chain.head, 0).unwrap();
                popped += 1;
            }
            Ok(false) => break,
            Err(error) => {
                prop_assert_eq!(queue.pop(&memory, &mut chain), Err(error));
                break;
            }
        }
    }
    queue.publish().unwrap();
    queue.disable_kick().unwrap();
    let _ = queue.enable_kick();
    Ok(popped)
}

fn ring_entry() -> impl Strategy<Value = u16> {
    prop_oneof![8 => 0..SIZE, 1 => any::<u16>()]
}

fn features(event_idx: bool) -> Features {
    if event_idx { Features::of(&[Features::RING_EVENT_IDX]) } else { Features::NONE }
}

fn state() -> impl Strategy<Value = DriverState> {
    let request = (any::<u64>(), prop::collection::vec(ring_entry(), 0..5), 0..40u32)
        .prop_map(|(token, descriptors, writable)| InFlight { token, descriptors, writable });
    let size = prop_oneof![8 => Just(SIZE), 1 => any::<u16>()];
    let free = prop_oneof![8 => 0..=SIZE, 1 => any::<u16>()];
    let index = || prop_oneof![0..10u16, any::<u16>()];
    (size, any::<bool>(), index(), index(), free, prop::collection::vec(request, 0..5)).prop_map(
        |(size, event_idx, avail_index, last_used_index, free, in_flight)| DriverState {
            size,
            features: features(event_idx),
            avail_index,
            last_used_index,
            free,
            in_flight,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2048) })]

    #[test]
    fn a_hostile_driver_gets_bounded_work(
        event_idx: bool,
        start in prop_oneof![Just(0u16), any::<u16>()],
        advance in prop_oneof![4 => 0..=SIZE, 1 => any::<u16>()],
        table in prop::collection::vec(descriptor(), 8),
        ring in prop::collection::vec(ring_entry(), 9),
    ) {
        let mut pair = RingPair::new(SIZE, features(event_idx));
        pair.memory.poke(pair.ring.desc, table.as_flattened());
        let ring: Vec<u8> = ring.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        pair.memory.poke(pair.ring.avail + 4, if event_idx { &ring } else { &ring[..16] });
        pair.memory.poke(pair.ring.avail + 2, &start.wrapping_add(advance).to_le_bytes());
        let [desc, avail, used] = pair.areas();
        let state = QueueState::Split { avail_index: start };
        pair.queue = Ring::new(SIZE, features(event_idx), desc, avail, used, state).unwrap();
        let popped = serve(&mut pair.queue, &pair.memory, 1 << 16)?;
        prop_assert!(popped <= SIZE, "{} requests in a ring of {}", popped, SIZE);
    }

    #[test]
    fn a_hostile_device_completes_each_request_at_most_once(
        event_idx: bool,
        added in 0..=SIZE,
        used in prop::collection::vec((prop_oneof![8 => 0..u32::from(SIZE), 1 => any::<u32>()], 0..20u32), 8),
        steps in prop::collection::vec(prop_oneof![8 => 0..=SIZE, 1 => any::<u16>()], 1..4),
    ) {
        let mut pair = Pair::new(SIZE, features(event_idx));
        for token in 0..added {
            pair.driver.add(&[], &[Buffer { iova: 0, len: 10 }], token.into()).unwrap();
        }
        pair.driver.publish().unwrap();
        let elements = used.iter().flat_map(|(id, len)| [id.to_le_bytes(), len.to_le_bytes()]);
        let elements: Vec<u8> = elements.flatten().collect();
        pair.memory.poke(pair.ring.used + 4, &elements);
        let mut seen = [false; SIZE as usize];
        for index in steps {
            pair.memory.poke(pair.ring.used + 2, &index.to_le_bytes());
            while let Ok(Some(done)) = pair.driver.pop_used() {
                prop_assert!(done.len <= 10);
                let seen = &mut seen[usize::try_from(done.token).unwrap()];
                prop_assert!(!std::mem::replace(seen, true), "token {} completed twice", done.token);
            }
        }
        let completed = seen.iter().filter(|&&seen| seen).count();
        prop_assert_eq!(usize::from(pair.driver.in_flight()) + completed, usize::from(added));
    }

    #[test]
    fn a_driver_that_adopts_any_state_is_sound(
        state in state(),
        table in prop::collection::vec(descriptor(), 8),
        index in 0..10u16,
    ) {
        let pair = Pair::new(SIZE, Features::of(&[Features::RING_EVENT_IDX]));
        pair.memory.poke(pair.ring.desc, table.as_flattened());
        pair.memory.poke(pair.ring.avail + 2, &index.to_le_bytes());
        let [desc, avail, used] = pair.areas();
        if let Ok(mut driver) = SplitDriver::adopt(state, desc, avail, used) {
            let in_flight = driver.in_flight();
            let mut more = 0;
            while driver.add(&[Buffer { iova: 0, len: 1 }], &[], 0).is_ok() {
                more += 1;
            }
            prop_assert_eq!(driver.free(), 0);
            prop_assert_eq!(driver.in_flight(), in_flight + more);
        }
    }

    #[test]
    fn a_hostile_driver_of_a_packed_ring_gets_bounded_work(
        features in packed(),
        (size, state) in packed_start(),
        rounds in prop::collection::vec(prop::collection::vec(packed_descriptor(), 8), 1..4),
    ) {
        let mut pair = RingPair::new(size, Features::of(&[Features::RING_PACKED]));
        let [desc, driver, device] = pair.areas();
        let Ok(queue) = Ring::new(size, features, desc, driver, device, state) else {
            return Ok(());
        };
        pair.queue = queue;
        let lost = pair.queue.undelivered();
        for table in rounds {
            pair.memory.poke(pair.ring.desc, &table.as_flattened()[..usize::from(size) * 16]);
            // One read fetches 16 descriptors of an indirect table.
            let popped = serve(&mut pair.queue, &pair.memory, 1 << 12)?;
            prop_assert!(popped + lost <= size, "{} requests in a ring of {}", popped, size);
            prop_assert_eq!(pair.queue.undelivered(), lost);
        }
    }

    #[test]
    fn a_hostile_device_of_a_packed_ring_completes_each_request_at_most_once(
        event_idx: bool,
        added in prop::collection::vec((0..3usize, 1..3usize), 0..6),
        steps in prop::collection::vec(prop::collection::vec(packed_descriptor(), 8), 1..4),
    ) {
        let mut features = Features::of(&[Features::RING_PACKED]);
        if event_idx {
            features = features.with(Features::RING_EVENT_IDX);
        }
        let mut pair = RingPair::new(SIZE, features);
        let buffer = Buffer { iova: 0, len: 10 };
        let mut tokens = Vec::new();
        for (token, (readable, writable)) in (0..).zip(added) {
            let [readable, writable] = [readable, writable].map(|count| vec![buffer; count]);
            if pair.driver.add(&readable, &writable, token).is_ok() {
                tokens.push(writable.len() * 10);
            }
        }
        pair.driver.publish().unwrap();
        let mut seen = [false; 6];
        let mut completed = 0;
        for table in steps {
            pair.memory.poke(pair.ring.desc, table.as_flattened());
            while let Ok(Some(done)) = pair.driver.pop_used() {
                let seen = &mut seen[usize::try_from(done.token).unwrap()];
                prop_assert!(!std::mem::replace(seen, true), "token {} completed twice", done.token);
                prop_assert!(done.len <= 20);
                completed += 1;
            }
            let _ = pair.driver.publish();
        }
        prop_assert_eq!(usize::from(pair.driver.in_flight()) + completed, tokens.len());
    }

    #[test]
    fn a_packed_driver_that_adopts_any_state_is_sound(
        state in packed_state(),
        table in prop::collection::vec(packed_descriptor(), 8),
    ) {
        let pair = RingPair::new(SIZE, Features::of(&[Features::RING_PACKED]));
        pair.memory.poke(pair.ring.desc, table.as_flattened());
        let [desc, driver, device] = pair.areas();
        if let Ok(driver) = PackedDriver::adopt(&state, desc, driver, device) {
            prop_assert_eq!(usize::from(driver.in_flight()), state.in_flight.len());
            let mut again = driver.state();
            let key = |request: &PackedInFlight| request.id;
            let mut sorted = state;
            sorted.in_flight.sort_by_key(key);
            again.in_flight.sort_by_key(key);
            prop_assert_eq!(again, sorted);
            let mut driver = Driver::Packed(driver);
            let in_flight = driver.in_flight();
            let mut more = 0;
            while driver.add(&[Buffer { iova: 0, len: 1 }], &[], 0).is_ok() {
                more += 1;
            }
            prop_assert_eq!((driver.free(), driver.in_flight()), (0, in_flight + more));
        }
    }
}

/// A descriptor of a packed ring that is often available, or used, in one of the two laps.
fn packed_descriptor() -> impl Strategy<Value = [u8; 16]> {
    let id = prop_oneof![6 => 0..SIZE, 1 => any::<u16>()];
    let lap = prop::sample::select(vec![0, 1 << 7, 1 << 15, 1 << 7 | 1 << 15]);
    (buffer(3), id, lap).prop_map(|((addr, len, flags), id, lap)| encode(addr, len, id, flags & 0x7f7f | lap))
}

fn packed() -> impl Strategy<Value = Features> {
    (any::<bool>(), any::<bool>()).prop_map(|(event_idx, in_order)| {
        let mut features = Features::of(&[Features::RING_PACKED]);
        if event_idx {
            features = features.with(Features::RING_EVENT_IDX);
        }
        if in_order { features.with(Features::IN_ORDER) } else { features }
    })
}

fn packed_start() -> impl Strategy<Value = (u16, QueueState)> {
    let place = || (0..SIZE, any::<bool>());
    (1..=SIZE, place(), place(), any::<bool>()).prop_map(|(size, avail, used, same)| {
        let used = if same { avail } else { used };
        let state = QueueState::Packed {
            last_avail_idx: avail.0,
            last_avail_wrap: avail.1,
            last_used_idx: used.0,
            last_used_wrap: used.1,
        };
        (size, state)
    })
}

fn packed_state() -> impl Strategy<Value = PackedDriverState> {
    let request = (any::<u64>(), ring_entry(), prop_oneof![8 => 0..3u16, 1 => any::<u16>()], 0..40u32)
        .prop_map(|(token, id, descriptors, writable)| PackedInFlight { token, id, descriptors, writable });
    let place = || {
        prop_oneof![
            8 => (0..SIZE, any::<bool>()).prop_map(|(index, wrap)| index | u16::from(wrap) << 15),
            1 => any::<u16>(),
        ]
    };
    let size = prop_oneof![8 => 1..=SIZE, 1 => any::<u16>()];
    (size, packed(), place(), place(), place(), prop::collection::vec(request, 0..4)).prop_map(
        |(size, features, next_avail, published, last_used, in_flight)| PackedDriverState {
            size,
            features,
            next_avail,
            published,
            last_used,
            in_flight,
        },
    )
}
