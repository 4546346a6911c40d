//! Packed rings written by drivers that follow the specification, and by drivers that do not.

use super::*;
use crate::ring::layout::INDIRECT;
use crate::ring::{Buffer, Fault, Ring};
use crate::testing::{RingPair, TestArea};
use crate::types::{IovaRange, Perm};

const PACKED: Features = Features::of(&[Features::RING_PACKED]);
const EVENT_IDX: Features = Features::of(&[Features::RING_PACKED, Features::RING_EVENT_IDX]);
const SIZE: u16 = 4;
/// Flags of an available descriptor in a lap with wrap counter 1, and in one with 0.
const AVAIL_1: u16 = 1 << 7;
const AVAIL_0: u16 = 1 << 15;

/// A ring whose memory the test writes in place of a driver.
struct Raw {
    pair: RingPair,
    chain: Chain,
}

impl Raw {
    fn new() -> Self {
        Self::with(SIZE, PACKED)
    }

    fn with(size: u16, features: Features) -> Self {
        Self { pair: RingPair::new(size, features), chain: Chain::new() }
    }

    fn queue(&mut self) -> &mut PackedQueue<TestArea> {
        let Ring::Packed(queue) = &mut self.pair.queue else { panic!("a packed ring") };
        queue
    }

    /// Writes a descriptor of the ring: address, length, id, flags.
    fn desc(&self, index: u16, (addr, len, id, flags): (u64, u32, u16, u16)) {
        let raw = layout::encode(Descriptor { addr, len, flags, next: id });
        self.pair.memory.poke(self.pair.ring.desc + u64::from(index) * 16, &raw);
    }

    /// Writes an indirect table to the buffers and returns its address.
    fn table(&self, entries: &[(u64, u32, u16)]) -> u64 {
        let table = self.pair.buffers();
        for (i, &(addr, len, flags)) in (0..).zip(entries) {
            let raw = layout::encode(Descriptor { addr, len, flags, next: 0x1234 });
            self.pair.memory.poke(table + i * 16, &raw);
        }
        table
    }

    fn pop(&mut self) -> Result<bool, RingError> {
        self.pair.queue.pop(&self.pair.memory, &mut self.chain)
    }

    /// Id, length and flags of a descriptor as the device left it.
    fn used(&self, index: u16) -> (u16, u32, u16) {
        let raw = self.pair.memory.peek(self.pair.ring.desc + u64::from(index) * 16, 16);
        let Descriptor { len, flags, next: id, .. } = layout::parse(raw.try_into().unwrap());
        (id, len, flags)
    }

    fn expect_broken(mut self, error: RingError) {
        assert_eq!(self.pop(), Err(error));
        self.desc(0, (0, 1, 0, AVAIL_1));
        assert_eq!(self.pop(), Err(error), "the error persists after the driver has repaired the ring");
        assert_eq!(self.pair.queue.enable_kick(), Err(error));
        assert_eq!((self.pair.queue.in_flight(), self.pair.queue.broken()), (0, Some(error)));
    }
}

fn buffer(iova: u64, len: u32) -> Buffer {
    Buffer { iova, len }
}

fn place(avail: (u16, bool), used: (u16, bool)) -> QueueState {
    QueueState::Packed {
        last_avail_idx: avail.0,
        last_avail_wrap: avail.1,
        last_used_idx: used.0,
        last_used_wrap: used.1,
    }
}

/// The count is limited by the descriptors that the driver may have made available, whatever the ring contains.
#[test]
fn waiting_requests_are_counted_in_one_lap_at_most() {
    let mut raw = Raw::new();
    (0..SIZE).for_each(|index| raw.desc(index, (0, 1, index, AVAIL_1)));
    assert_eq!(raw.queue().waiting(u16::MAX), Ok(SIZE));
    assert_eq!(raw.pop(), Ok(true));
    raw.desc(0, (0, 1, 0, AVAIL_0));
    assert_eq!(
        raw.queue().waiting(u16::MAX),
        Ok(SIZE - 1),
        "the driver cannot make descriptors of a request in flight available"
    );
    raw.desc(2, (0, 1, 0, AVAIL_1 | NEXT));
    assert_eq!(raw.queue().waiting(u16::MAX), Ok(SIZE - 2), "two descriptors are one request");
    // A chain without a last descriptor.
    raw.desc(3, (0, 1, 0, AVAIL_1 | NEXT));
    assert_eq!(raw.queue().waiting(u16::MAX), Ok(1));
    let error = RingError::Room { head: 2, room: 2 };
    assert_eq!((raw.pop(), raw.pop()), (Ok(true), Err(error)));
    assert_eq!(raw.queue().waiting(u16::MAX), Err(error));
}

#[test]
fn a_chain_is_in_ring_order_and_its_last_descriptor_has_the_id() {
    let mut raw = Raw::new();
    raw.desc(1, (0x200, 0, 8, AVAIL_1 | NEXT));
    raw.desc(2, (0x300, 512, 0xfffe, AVAIL_1 | WRITE));
    assert_eq!(raw.pop(), Ok(false), "the first descriptor is written last");
    raw.desc(0, (0x100, 16, 7, AVAIL_1 | NEXT));
    assert_eq!(raw.pop(), Ok(true));
    assert_eq!(raw.chain.readable, [buffer(0x100, 16), buffer(0x200, 0)]);
    assert_eq!(raw.chain.writable, [buffer(0x300, 512)]);
    assert_eq!(raw.pair.queue.state(), place((3, true), (0, true)));
    assert_eq!(raw.pop(), Ok(false));
    let head = raw.chain.head;
    assert!(head < SIZE, "a number that the device chose, not the buffer id");
    raw.pair.queue.push_used(head, 512).unwrap();
    assert_eq!(raw.pair.queue.push_used(head, 512), Err(RingError::NotInFlight { head }));
    assert!(raw.pair.queue.publish().unwrap());
    assert_eq!(raw.used(0), (0xfffe, 512, AVAIL_1 | AVAIL_0 | WRITE));
    assert_eq!(raw.pair.queue.state(), place((3, true), (3, true)));
}

#[test]
fn a_batch_becomes_used_with_its_first_descriptor() {
    let mut raw = Raw::new();
    for index in 0..3 {
        raw.desc(index, (0x100, 1, 10 + index, AVAIL_1));
    }
    let heads = [(); 3].map(|()| {
        assert_eq!(raw.pop(), Ok(true));
        raw.chain.head
    });
    for (head, len) in heads.into_iter().zip([0, 5, 0]) {
        raw.pair.queue.push_used(head, len).unwrap();
    }
    assert_eq!(raw.used(0).2, AVAIL_1, "not visible yet");
    assert_eq!((raw.used(1), raw.used(2)), ((11, 5, 0x8082), (12, 0, 0x8080)));
    assert_eq!((raw.pair.queue.in_flight(), raw.pair.queue.unpublished()), (0, 3));
    raw.pair.queue.publish().unwrap();
    assert_eq!((raw.used(0), raw.pair.queue.unpublished()), ((10, 0, 0x8080), 0));
    assert_eq!(raw.pair.queue.publish(), Ok(false), "nothing new");
}

#[test]
fn descriptors_of_the_previous_lap_are_not_available() {
    let mut raw = Raw::with(3, PACKED);
    for lap in 0..4 {
        let (available, used) = if lap % 2 == 0 { (AVAIL_1, 0x8080) } else { (AVAIL_0, 0) };
        for index in 0..3 {
            assert_eq!(raw.pop(), Ok(false), "lap {lap}, descriptor {index}");
            raw.desc(index, (1, 1, index, available));
            assert_eq!(raw.pop(), Ok(true), "lap {lap}, descriptor {index}");
            raw.pair.queue.push_used(raw.chain.head, 0).unwrap();
            raw.pair.queue.publish().unwrap();
            assert_eq!(raw.used(index), (index, 0, used));
        }
    }
}

#[test]
fn indirect_tables_are_read_whole_and_in_order() {
    let mut raw = Raw::new();
    // NEXT, AVAIL and USED are reserved in a table.
    let mut entries: Vec<_> = (0..40u32).map(|i| (0x1000 + u64::from(i), 1, 0x8081)).collect();
    entries[39] = (0x2000, 4, WRITE);
    let table = raw.table(&entries);
    raw.desc(0, (table, 40 * 16, 9, AVAIL_1 | INDIRECT | WRITE));
    assert_eq!(raw.pop(), Ok(true));
    assert!(raw.chain.readable.iter().map(|buffer| buffer.iova).eq(0x1000..0x1027));
    assert_eq!(raw.chain.writable, [buffer(0x2000, 4)]);
    assert_eq!(raw.pair.queue.state(), place((1, true), (0, true)));
}

#[test]
fn each_violation_has_its_own_error_and_the_error_persists() {
    let broken = |descriptors: &[(u64, u32, u16, u16)], error| {
        let raw = Raw::new();
        for (index, &descriptor) in (0..).zip(descriptors) {
            raw.desc(index, descriptor);
        }
        raw.expect_broken(error);
    };
    broken(&[(0, 1, 0, AVAIL_1 | NEXT); 4], RingError::Room { head: 0, room: 4 });
    broken(&[(0, 1, 0, AVAIL_1 | 3), (0, 1, 0, AVAIL_1)], RingError::Order { head: 0 });
    broken(&[(u64::MAX, 2, 0, AVAIL_1)], RingError::Wraps { iova: u64::MAX, len: 2 });
    broken(&[(0, u32::MAX, 0, AVAIL_1 | NEXT), (0, 2, 0, 0)], RingError::Length { head: 0 });
    broken(&[(0, 0, 0, AVAIL_1 | INDIRECT)], RingError::IndirectSize { len: 0 });
    broken(&[(0, 24, 0, AVAIL_1 | INDIRECT)], RingError::IndirectSize { len: 24 });
    let len = (1 << 20) + 16;
    broken(&[(0, len, 0, AVAIL_1 | INDIRECT)], RingError::IndirectSize { len });
    let wraps = RingError::Wraps { iova: u64::MAX - 15, len: 32 };
    broken(&[(u64::MAX - 15, 32, 0, AVAIL_1 | INDIRECT)], wraps);
    let alone = RingError::Indirect { head: 0, reason: "an indirect descriptor must be alone in its chain" };
    broken(&[(0, 16, 0, AVAIL_1 | INDIRECT | NEXT)], alone);
    broken(&[(0, 16, 0, AVAIL_1 | NEXT), (0, 16, 0, AVAIL_1 | INDIRECT)], alone);

    let raw = Raw::new();
    let table = raw.table(&[(0, 1, INDIRECT)]);
    raw.desc(0, (table, 16, 0, AVAIL_1 | INDIRECT));
    raw.expect_broken(RingError::Indirect { head: 0, reason: "an indirect table refers to another one" });

    let raw = Raw::new();
    let table = raw.table(&[(0, u32::MAX, 0), (0, 2, 0)]);
    raw.desc(0, (table, 32, 0, AVAIL_1 | INDIRECT));
    raw.expect_broken(RingError::Length { head: 0 });

    let mut raw = Raw::new();
    let [desc, driver, device] = raw.pair.areas();
    let state = QueueState::initial(PACKED);
    raw.pair.queue =
        Ring::new(SIZE, PACKED, desc, driver, device, state).unwrap().refuse_unnegotiated_indirect(PACKED);
    raw.desc(0, (table, 16, 0, AVAIL_1 | INDIRECT));
    raw.expect_broken(RingError::Indirect { head: 0, reason: "indirect descriptors were not negotiated" });
}

#[test]
fn a_driver_cannot_reuse_descriptors_before_they_are_used() {
    let mut raw = Raw::new();
    for index in 0..SIZE {
        raw.desc(index, (0, 1, index, AVAIL_1));
        assert_eq!(raw.pop(), Ok(true));
    }
    assert_eq!(raw.pop(), Ok(false), "a full ring is no violation");
    raw.pair.queue.push_used(raw.chain.head, 0).unwrap();
    raw.desc(0, (0, 1, 0, AVAIL_0));
    let error = RingError::Room { head: 0, room: 0 };
    assert_eq!(raw.pop(), Err(error), "completed, but not published");
    raw.pair.queue.publish().unwrap();
    assert_eq!(raw.pop(), Err(error));
}

#[test]
fn flags_that_change_after_the_check_are_not_read_again() {
    // The flags are loaded once, for the check. NEXT, which the driver sets afterwards, does not extend the chain.
    let raw = Raw::new();
    raw.desc(0, (0x100, 1, 0, AVAIL_1 | NEXT));
    let flags = AVAIL_1;
    let Ring::Packed(queue) = &raw.pair.queue else { panic!("a packed ring") };
    let mut chain = Chain::new();
    assert_eq!(
        queue.walk(&raw.pair.memory, flags, &mut chain).map(|chain| (chain.id, chain.descriptors)),
        Ok((0, 1))
    );
    assert_eq!(chain.readable, [buffer(0x100, 1)]);
}

#[test]
fn only_states_within_one_lap_are_accepted() {
    let start = |size, state| {
        let pair = RingPair::new(SIZE, PACKED);
        let [desc, driver, device] = pair.areas();
        PackedQueue::new(size, PACKED, desc, driver, device, state).map(|queue| queue.undelivered())
    };
    assert_eq!(start(4, place((1, true), (1, true))), Ok(0));
    assert_eq!(start(4, place((1, false), (3, true))), Ok(2));
    assert_eq!(start(4, place((1, false), (1, true))), Ok(4));
    for (avail, used) in
        [((2, false), (1, true)), ((1, true), (2, true)), ((4, true), (4, true)), ((0, true), (4, true))]
    {
        let error = RingError::Place { avail: avail.0, used: used.0, size: 4 };
        assert_eq!(start(4, place(avail, used)), Err(error));
    }
    assert_eq!(start(0, place((0, true), (0, true))), Err(RingError::PackedSize { size: 0 }));
    assert_eq!(start(32769, place((0, true), (0, true))), Err(RingError::PackedSize { size: 32769 }));
    assert_eq!(start(4, QueueState::Split { avail_index: 0 }), Err(RingError::SplitState));
    let needed =
        |size: u16| RingError::AreaSize { area: "descriptor", size: 64, needed: usize::from(size) * 16 };
    assert_eq!(start(5, place((0, true), (0, true))), Err(needed(5)));
    let pair = RingPair::new(SIZE, PACKED);
    let [desc, driver, device] = pair.areas();
    let result = PackedQueue::new(4, Features::NONE, desc, driver, device, place((0, true), (0, true)));
    assert_eq!(result.map(drop), Err(RingError::NotPacked { features: Features::NONE }));
}

#[test]
fn descriptors_in_flight_before_the_start_are_not_reused() {
    let mut raw = Raw::new();
    let [desc, driver, device] = raw.pair.areas();
    raw.pair.queue =
        Ring::new(SIZE, PACKED, desc, driver, device, place((2, true), (0, true))).unwrap().with_in_flight(1);
    assert_eq!((raw.pair.queue.in_flight(), raw.pair.queue.undelivered()), (1, 2));
    raw.desc(2, (0, 1, 7, AVAIL_1 | NEXT));
    raw.desc(3, (0, 1, 7, AVAIL_1));
    assert_eq!(raw.pop(), Ok(true));
    assert_eq!((raw.pair.queue.in_flight(), raw.pair.queue.undelivered()), (2, 2));
    raw.pair.queue.push_used(raw.chain.head, 0).unwrap();
    raw.pair.queue.publish().unwrap();
    assert_eq!(raw.used(0), (7, 0, 0x8080), "written to the first descriptor that the device may use");
    assert_eq!(raw.pair.queue.state(), place((0, false), (2, true)));
    assert_eq!(raw.pair.queue.undelivered(), 2);
}

#[test]
fn an_abandoned_request_is_popped_again() {
    let mut raw = Raw::new();
    raw.desc(0, (0, 1, 0, AVAIL_1));
    raw.desc(1, (1, 1, 0, AVAIL_1 | NEXT));
    raw.desc(2, (2, 1, 5, AVAIL_1));
    assert_eq!(raw.pair.queue.abandon(&raw.chain), Err(RingError::NotInFlight { head: 0 }));
    assert_eq!((raw.pop(), raw.pop()), (Ok(true), Ok(true)));
    let state = raw.pair.queue.state();
    raw.pair.queue.abandon(&raw.chain).unwrap();
    assert_eq!((raw.pair.queue.state(), raw.pair.queue.in_flight()), (place((1, true), (0, true)), 1));
    assert_eq!(raw.pop(), Ok(true));
    assert_eq!((raw.pair.queue.state(), raw.chain.readable.len()), (state, 2));
}

#[test]
fn every_access_may_fail_once_and_nothing_is_lost() {
    for accesses in 0.. {
        let mut raw = Raw::with(SIZE, EVENT_IDX);
        let table = raw.table(&[(1, 1, 0), (2, 1, WRITE)]);
        raw.desc(0, (0, 1, 3, AVAIL_1));
        raw.desc(1, (table, 32, 4, AVAIL_1 | INDIRECT));
        raw.pair.memory.fail_after(accesses);
        let retry = |result: Result<bool, RingError>| match result {
            Ok(value) => Some(value),
            Err(error) => {
                assert_eq!((error.is_fault(), error), (true, error));
                None
            }
        };
        let mut heads = Vec::new();
        while heads.len() < 2 {
            if retry(raw.pop()) == Some(true) {
                heads.push(raw.chain.head);
            }
        }
        for head in heads {
            while retry(raw.pair.queue.push_used(head, 1).map(|()| true)).is_none() {}
        }
        let notify = loop {
            if let Some(notify) = retry(raw.pair.queue.publish()) {
                break notify;
            }
        };
        assert!(notify, "after {accesses} accesses");
        assert_eq!((raw.used(0), raw.used(1)), ((3, 1, 0x8082), (4, 1, 0x8082)));
        assert_eq!((raw.pair.queue.in_flight(), raw.pair.queue.unpublished()), (0, 0));
        while retry(raw.pair.queue.enable_kick()).is_none() {}
        if raw.pair.memory.cancel_failure() {
            assert!(accesses > 10, "only {accesses} accesses were made to fail");
            return;
        }
    }
}

#[test]
fn the_driver_is_notified_at_its_event_offset() {
    // (event offset and wrap counter, flags), and after which of four used descriptors the driver is notified.
    let cases: [((u16, u16), [bool; 4]); 6] = [
        ((0x8001, 2), [true, true, false, false]),
        ((0x8003, 2), [true, false, false, true]),
        ((0x0000, 2), [true, false, false, false]),
        ((0x8003, 0), [true, true, true, true]),
        ((0x8003, 3), [true, true, true, true]),
        ((0x8003, 1), [false, false, false, false]),
    ];
    for ((event, flags), expected) in cases {
        let mut raw = Raw::with(SIZE, EVENT_IDX);
        raw.pair.memory.poke(raw.pair.ring.avail, &event.to_le_bytes());
        raw.pair.memory.poke(raw.pair.ring.avail + 2, &flags.to_le_bytes());
        for (index, expected) in (0..).zip(expected) {
            raw.desc(index, (0, 1, 0, AVAIL_1));
            assert_eq!(raw.pop(), Ok(true));
            raw.pair.queue.push_used(raw.chain.head, 0).unwrap();
            assert_eq!(raw.pair.queue.publish(), Ok(expected), "{event:#x} {flags}, descriptor {index}");
        }
    }
}

#[test]
fn the_device_requests_a_kick_at_its_next_position() {
    for (features, expected) in [(PACKED, [0, 0, 0, 0]), (EVENT_IDX, [1, 0x80, 2, 0])] {
        let mut raw = Raw::with(SIZE, features);
        raw.desc(0, (0, 1, 0, AVAIL_1));
        assert_eq!(raw.pair.queue.enable_kick(), Ok(true), "a request is available already");
        assert_eq!(raw.pop(), Ok(true));
        assert_eq!(raw.pair.queue.enable_kick(), Ok(false));
        assert_eq!(raw.pair.memory.peek(raw.pair.ring.used, 4), expected);
        raw.pair.queue.disable_kick().unwrap();
        assert_eq!(raw.pair.memory.peek(raw.pair.ring.used + 2, 2), [1, 0]);
    }
}

#[test]
fn memory_that_cannot_be_accessed_is_no_violation() {
    let mut raw = Raw::new();
    raw.desc(0, (0x100, 1, 0, AVAIL_1));
    let page = IovaRange::from_size(raw.pair.ring.desc, 64).unwrap();
    raw.pair.memory.protect(page, Perm::NONE);
    assert!(matches!(raw.pop(), Err(RingError::Fault(Fault { .. }))));
    raw.pair.memory.protect(page, Perm::RW);
    assert_eq!(raw.pop(), Ok(true));
    assert_eq!(raw.queue().in_flight(), 1);
}
