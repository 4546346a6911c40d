//! Split rings written by drivers that follow the specification, and by drivers that do not.

use super::*;
use crate::ring::Buffer;
use crate::testing::{Pair, TestMemory};
use crate::types::{IovaRange, Perm};

const EVENT_IDX: Features = Features::of(&[Features::RING_EVENT_IDX]);
const SIZE: u16 = 8;

/// A ring whose memory the test writes directly, as a driver that violates the specification does.
struct Raw {
    pair: Pair,
    chain: Chain,
}

impl Raw {
    fn new() -> Self {
        Self { pair: Pair::new(SIZE, Features::NONE), chain: Chain::new() }
    }

    /// Writes a descriptor: address, length, flags, next.
    fn desc(&self, index: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let raw = Descriptor { addr, len, flags, next }.encode();
        self.pair.memory.poke(self.pair.ring.desc + 16 * u64::from(index), &raw);
    }

    /// Writes an indirect table to unused memory and returns its address.
    fn table(&mut self, entries: &[(u64, u32, u16, u16)]) -> u64 {
        let at = self.pair.allocate(16 * u32::try_from(entries.len()).unwrap()).iova;
        for (position, &(addr, len, flags, next)) in (0..).zip(entries) {
            self.pair.memory.poke(at + 16 * position, &Descriptor { addr, len, flags, next }.encode());
        }
        at
    }

    fn avail(&self, position: u16, head: u16) {
        self.pair.memory.poke(self.pair.ring.avail + 4 + 2 * u64::from(position), &head.to_le_bytes());
    }

    fn avail_index(&self, index: u16) {
        self.pair.memory.poke(self.pair.ring.avail + 2, &index.to_le_bytes());
    }

    fn pop(&mut self) -> Result<bool, RingError> {
        self.pair.queue.pop(&self.pair.memory, &mut self.chain)
    }

    /// Makes the chain at descriptor 0 available and expects an error that persists.
    fn expect_broken(mut self, error: RingError) {
        self.avail_index(1);
        assert_eq!(self.pop(), Err(error));
        self.desc(0, (0, 1, 0, 0));
        assert_eq!(self.pop(), Err(error), "the error persists after the driver has repaired the ring");
        assert_eq!(self.pair.queue.enable_kick(), Err(error));
        assert_eq!(self.pair.queue.in_flight(), 0);
    }
}

fn buffer(iova: u64, len: u32) -> Buffer {
    Buffer { iova, len }
}

#[test]
fn a_chain_has_all_its_buffers_in_order_including_empty_ones() {
    let mut raw = Raw::new();
    raw.desc(5, (0x100, 16, NEXT, 2));
    raw.desc(2, (0x200, 0, NEXT, 7));
    raw.desc(7, (0x300, 512, NEXT | layout::WRITE, 0));
    raw.desc(0, (u64::MAX, 1, layout::WRITE, 99));
    raw.avail(0, 5);
    raw.avail_index(1);
    assert_eq!(raw.pop(), Ok(true));
    assert_eq!(raw.chain.head, 5);
    assert_eq!(raw.chain.readable, [buffer(0x100, 16), buffer(0x200, 0)]);
    assert_eq!(raw.chain.writable, [buffer(0x300, 512), buffer(u64::MAX, 1)]);
    assert_eq!(raw.pop(), Ok(false));
}

#[test]
fn indirect_tables_are_followed_in_their_own_order() {
    let mut raw = Raw::new();
    let mut entries: Vec<_> = (0..40u16).map(|i| (0x1000 + u64::from(i), 1, NEXT, i + 1)).collect();
    entries[39] = (0x2000, 4, layout::WRITE, 0);
    // 0 -> 30 .. 38 -> 1 .. 29 -> 39: jumps out of the block that is read at once, in both directions.
    (entries[0].3, entries[38].3, entries[29].3) = (30, 1, 39);
    let table = raw.table(&entries);
    raw.desc(0, (0x500, 16, NEXT, 3));
    raw.desc(3, (table, 40 * 16, INDIRECT | layout::WRITE, 0));
    raw.avail_index(1);
    assert_eq!(raw.pop(), Ok(true));
    let expected = [0x500, 0x1000].into_iter().chain(0x101e..=0x1026).chain(0x1001..=0x101d);
    assert!(raw.chain.readable.iter().map(|buffer| buffer.iova).eq(expected));
    assert_eq!(raw.chain.writable, [buffer(0x2000, 4)]);
}

#[test]
fn indirect_descriptors_can_be_refused_without_their_feature() {
    for (features, allowed) in
        [(Features::NONE, false), (Features::of(&[Features::RING_INDIRECT_DESC]), true)]
    {
        let mut raw = Raw::new();
        let [desc, avail, used] = raw.pair.areas();
        let state = QueueState::Split { avail_index: 0 };
        raw.pair.queue = SplitQueue::new(SIZE, features, desc, avail, used, state)
            .unwrap()
            .refuse_unnegotiated_indirect(features);
        let table = raw.table(&[(0, 1, 0, 0)]);
        raw.desc(0, (table, 16, INDIRECT, 0));
        raw.avail_index(1);
        assert_eq!(raw.pop().is_ok(), allowed);
    }
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
    broken(&[(0, 1, NEXT, 8)], RingError::DescriptorIndex { index: 8, entries: 8 });
    broken(&[(0, 0, NEXT, 1), (0, 0, NEXT, 0)], RingError::Loop { head: 0, entries: 8 });
    broken(&[(0, 0, NEXT, 0)], RingError::Loop { head: 0, entries: 8 });
    broken(&[(0, 1, 3, 1), (0, 1, 0, 0)], RingError::Order { head: 0 });
    broken(&[(u64::MAX, 2, 0, 0)], RingError::Wraps { iova: u64::MAX, len: 2 });
    broken(&[(0, u32::MAX, NEXT, 1), (0, 2, 0, 0)], RingError::Length { head: 0 });
    broken(&[(0, 0, INDIRECT, 0)], RingError::IndirectSize { len: 0 });
    broken(&[(0, 24, INDIRECT, 0)], RingError::IndirectSize { len: 24 });
    broken(&[(u64::MAX - 15, 32, INDIRECT, 0)], RingError::Wraps { iova: u64::MAX - 15, len: 32 });
    let reason = "an indirect descriptor must end its chain";
    broken(&[(0, 16, INDIRECT | NEXT, 1)], RingError::Indirect { head: 0, reason });

    let raw = Raw::new();
    raw.avail(0, 8);
    raw.expect_broken(RingError::DescriptorIndex { index: 8, entries: 8 });
}

#[test]
fn each_violation_in_an_indirect_table_has_its_own_error_and_the_error_persists() {
    let broken = |entries: &[(u64, u32, u16, u16)], error| {
        let mut raw = Raw::new();
        let table = raw.table(entries);
        raw.desc(0, (table, 16 * u32::try_from(entries.len()).unwrap(), INDIRECT, 0));
        raw.expect_broken(error);
    };
    broken(&[(0, 1, NEXT, 1)], RingError::DescriptorIndex { index: 1, entries: 1 });
    broken(&[(0, 1, NEXT, 1), (0, 1, NEXT, 0)], RingError::Loop { head: 0, entries: 2 });
    broken(&[(0, 1, 3, 1), (0, 1, 0, 0)], RingError::Order { head: 0 });
    let reason = "an indirect table refers to another one";
    broken(&[(0, 16, INDIRECT, 0)], RingError::Indirect { head: 0, reason });
    broken(&[(0, u32::MAX, NEXT, 1), (0, 2, 0, 0)], RingError::Length { head: 0 });

    // Descriptors before the table count as well.
    let mut raw = Raw::new();
    let table = raw.table(&[(0, 2, 0, 0)]);
    raw.desc(0, (0, u32::MAX, NEXT, 1));
    raw.desc(1, (table, 16, INDIRECT, 0));
    raw.expect_broken(RingError::Length { head: 0 });
}

/// A check of the available index breaks the ring while requests of an earlier index are still available.
#[test]
fn no_request_is_popped_from_a_broken_ring() {
    let ring = || {
        let mut raw = Raw::new();
        (0..SIZE).for_each(|index| raw.desc(index, (0, 1, 0, 0)));
        raw.avail_index(3);
        assert_eq!(raw.pop(), Ok(true));
        raw.avail_index(100);
        raw
    };
    let error = RingError::AvailIndex { index: 100, first: 1, room: SIZE - 1 };
    for kick in [false, true] {
        let mut raw = ring();
        let queue = &mut raw.pair.queue;
        let result = if kick { queue.enable_kick().map(drop) } else { queue.waiting().map(drop) };
        assert_eq!(result, Err(error));
        raw.avail_index(3);
        assert_eq!(raw.pop(), Err(error));
        assert_eq!(raw.pair.queue.has_request(), Err(error));
        // An abandoned request is not popped either.
        raw.pair.queue.abandon(&raw.chain).unwrap();
        assert_eq!(raw.pop(), Err(error));
        assert_eq!(raw.pair.queue.has_request(), Err(error));
    }
}

#[test]
fn the_available_index_moves_forward_and_within_the_ring() {
    for index in [SIZE + 1, 0x8000, 0xffff] {
        let raw = Raw::new();
        raw.avail_index(index);
        let mut queue = raw.pair.queue;
        let error = RingError::AvailIndex { index, first: 0, room: SIZE };
        assert_eq!(queue.pop(&raw.pair.memory, &mut Chain::new()), Err(error));
        assert_eq!(queue.broken(), Some(error));
    }
    // Requests in flight and unpublished requests reduce the room: the driver cannot have reused their descriptors.
    let mut raw = Raw::new();
    (0..SIZE).for_each(|index| raw.desc(index, (0, 1, 0, 0)));
    raw.avail_index(3);
    (0..3).for_each(|_| assert_eq!(raw.pop(), Ok(true)));
    raw.pair.queue.push_used(0, 0).unwrap();
    raw.avail_index(9);
    assert_eq!(raw.pop(), Err(RingError::AvailIndex { index: 9, first: 3, room: 5 }));
    // Backwards, to a request that was popped already.
    let mut raw = Raw::new();
    raw.desc(0, (0, 1, 0, 0));
    raw.avail_index(2);
    (0..2).for_each(|_| assert_eq!(raw.pop(), Ok(true)));
    raw.avail_index(1);
    assert_eq!(raw.pop(), Err(RingError::AvailIndex { index: 1, first: 2, room: 6 }));
}

#[test]
fn a_fault_leaves_the_request_in_the_ring() {
    let mut raw = Raw::new();
    let table = raw.table(&[(0x77, 1, 0, 0)]);
    raw.desc(0, (table, 16, INDIRECT, 0));
    raw.avail_index(1);
    let page = |iova| IovaRange::from_size(iova, 1).unwrap();
    for iova in [raw.pair.ring.desc, raw.pair.ring.avail, table] {
        raw.pair.memory.protect(page(iova), Perm::NONE);
        assert!(raw.pop().unwrap_err().is_fault());
        raw.pair.memory.protect(page(iova), Perm::RW);
    }
    assert_eq!(raw.pop(), Ok(true));
    assert_eq!(raw.chain.readable, [buffer(0x77, 1)]);
    raw.pair.queue.abandon(&raw.chain).unwrap();
    assert_eq!(raw.pair.queue.state(), QueueState::Split { avail_index: 0 });
    assert_eq!(raw.pop(), Ok(true));
    assert_eq!((raw.chain.head, raw.pair.queue.in_flight()), (0, 1));
}

#[test]
fn no_request_and_no_notification_is_lost_whichever_access_fails() {
    for features in [Features::NONE, EVENT_IDX] {
        for failing in 0.. {
            let mut pair = Pair::starting_at(SIZE, features, 0xfffe);
            for token in 0..3 {
                pair.driver.add(&[buffer(token, 1)], &[], token).unwrap();
            }
            pair.driver.publish().unwrap();
            pair.memory.fail_after(failing);
            let notified = serve_through_faults(&mut pair);
            let all_done = !pair.memory.cancel_failure();
            assert_eq!(notified, 1, "access {failing}");
            let tokens: Vec<_> =
                std::iter::from_fn(|| pair.driver.pop_used().unwrap()).map(|done| done.token).collect();
            assert_eq!(tokens, [0, 1, 2], "access {failing}");
            if !all_done {
                assert!(failing > 10, "only {failing} accesses were made to fail");
                break;
            }
        }
    }
}

/// Serves three requests and repeats calls that fault. Returns the number of notifications that the queue requested.
fn serve_through_faults(pair: &mut Pair) -> usize {
    let mut chain = Chain::new();
    let mut served = 0;
    while served < 3 {
        match pair.queue.pop(&pair.memory, &mut chain) {
            Ok(true) => {
                while pair.queue.push_used(chain.head, 0).is_err() {}
                served += 1;
            }
            Ok(false) => panic!("request {served} got lost"),
            Err(error) => assert!(error.is_fault(), "{error}"),
        }
    }
    let mut publish = || pair.queue.publish().or_else(|_| pair.queue.publish()).unwrap();
    usize::from(publish()) + usize::from(publish())
}

#[test]
fn completions_are_visible_only_when_published_and_in_the_order_pushed() {
    let mut pair = Pair::starting_at(4, EVENT_IDX, u16::MAX);
    for token in [10, 11] {
        pair.driver.add(&[], &[buffer(0, 9)], token).unwrap();
    }
    pair.driver.publish().unwrap();
    let (mut first, mut second) = (Chain::new(), Chain::new());
    assert!(pair.queue.pop(&pair.memory, &mut first).unwrap());
    assert!(pair.queue.pop(&pair.memory, &mut second).unwrap());
    assert_eq!(pair.queue.in_flight(), 2);
    pair.queue.push_used(second.head, 9).unwrap();
    pair.queue.push_used(first.head, 8).unwrap();
    assert_eq!((pair.queue.in_flight(), pair.queue.unpublished()), (0, 2));
    assert_eq!(pair.driver.pop_used(), Ok(None));
    assert!(pair.queue.publish().unwrap());
    assert!(!pair.queue.publish().unwrap(), "nothing new");
    let done = [pair.driver.pop_used(), pair.driver.pop_used()].map(|done| done.unwrap().unwrap());
    assert_eq!(done.map(|done| (done.token, done.len)), [(11, 9), (10, 8)]);
}

#[test]
fn a_device_cannot_complete_more_than_it_popped() {
    let mut pair = Pair::new(SIZE, Features::NONE);
    assert_eq!(pair.queue.push_used(0, 0), Err(RingError::NotInFlight { head: 0 }));
    assert_eq!(pair.queue.push_used(8, 0), Err(RingError::DescriptorIndex { index: 8, entries: 8 }));
    assert_eq!(pair.queue.abandon(&Chain::new()), Err(RingError::NotInFlight { head: 0 }));
    assert_eq!(pair.queue.publish(), Ok(false));
}

#[test]
fn enabling_kicks_reports_requests_that_are_available_already() {
    for features in [Features::NONE, EVENT_IDX] {
        let mut pair = Pair::starting_at(SIZE, features, 0xfffd);
        let add = |pair: &mut Pair| {
            pair.driver.add(&[buffer(0, 1)], &[], 0).unwrap();
            pair.driver.publish().unwrap()
        };
        assert!(add(&mut pair), "the first kick is always requested");
        pair.queue.disable_kick().unwrap();
        assert!(!add(&mut pair), "the device does not wait for a kick");
        assert!(pair.queue.enable_kick().unwrap(), "two requests are available already");
        pair.serve(|_, _| 0).unwrap();
        assert!(!pair.queue.enable_kick().unwrap());
        assert!(add(&mut pair), "the device waits");
    }
}

#[test]
fn a_ring_continues_where_it_stopped_and_counts_undelivered_requests() {
    let mut pair = Pair::starting_at(SIZE, EVENT_IDX, 0xffff);
    for round in 0..3 {
        pair.driver.add(&[buffer(0, 1)], &[], round).unwrap();
        pair.driver.publish().unwrap();
        assert!(pair.serve(|_, _| 0).unwrap(), "the first publication after a start always notifies");
        pair.restart_queue();
        assert_eq!(pair.queue.undelivered(), 0);
        assert_eq!(pair.driver.pop_used().unwrap().unwrap().token, round);
    }
    assert_eq!(pair.queue.state(), QueueState::Split { avail_index: 2 });
    let [desc, avail, used] = pair.areas();
    let state = QueueState::Split { avail_index: 5 };
    assert_eq!(SplitQueue::new(SIZE, EVENT_IDX, desc, avail, used, state).unwrap().undelivered(), 3);
}

#[test]
fn rings_with_invalid_sizes_features_or_states_are_refused() {
    let memory = TestMemory::new(0, 4096);
    let area = |size| memory.area(0, size, Perm::RW).unwrap();
    let state = QueueState::Split { avail_index: 0 };
    let new = |size, features, bytes: [u64; 3], state| {
        let [desc, avail, used] = bytes.map(area);
        SplitQueue::new(size, features, desc, avail, used, state).map(drop)
    };
    assert_eq!(new(8, EVENT_IDX, [128, 22, 70], state), Ok(()));
    for size in [0, 3, 0x8001] {
        assert_eq!(new(size, Features::NONE, [4096; 3], state), Err(RingError::Size { size }));
    }
    for (area, bytes, size, needed) in [
        ("descriptor", [127, 22, 70], 127, 128),
        ("available", [128, 21, 70], 21, 22),
        ("used", [128, 22, 69], 69, 70),
    ] {
        let error = RingError::AreaSize { area, size, needed };
        assert_eq!(new(8, EVENT_IDX, bytes, state), Err(error));
    }
    let packed = Features::of(&[Features::RING_PACKED]);
    let error = RingError::Features { features: packed, unsupported: "RING_PACKED" };
    assert_eq!(new(8, packed, [4096; 3], state), Err(error));
    let state = QueueState::initial(packed);
    assert_eq!(new(8, Features::NONE, [4096; 3], state), Err(RingError::PackedState));
}

#[test]
fn a_restarted_ring_does_not_reuse_entries_of_requests_in_flight() {
    let mut pair = Pair::new(SIZE, Features::NONE);
    let buffers = [pair.allocate(16), pair.allocate(16), pair.allocate(16)];
    for (token, buffer) in (0..).zip(&buffers[..2]) {
        pair.driver.add(&[*buffer], &[], token).unwrap();
    }
    pair.driver.publish().unwrap();
    let mut chain = Chain::new();
    assert_eq!(pair.queue.pop(&pair.memory, &mut chain), Ok(true));
    // The first request is never completed, and the ring is restarted.
    let (state, in_flight) = (pair.queue.state(), pair.queue.in_flight());
    assert_eq!(in_flight, 1);
    let area = |at: u64, size: usize, perm| pair.memory.area(at, size as u64, perm).unwrap();
    let (ring, sizes) = (pair.ring, area_sizes(SIZE, false));
    let desc = area(ring.desc, sizes.desc, Perm::RO);
    let avail = area(ring.avail, sizes.avail, Perm::RO);
    let used = area(ring.used, sizes.used, Perm::RW);
    let queue = SplitQueue::new(SIZE, Features::NONE, desc, avail, used, state).unwrap();
    let mut queue = queue.with_in_flight(in_flight);
    assert_eq!(queue.pop(&pair.memory, &mut chain), Ok(true));
    queue.push_used(chain.head, 0).unwrap();
    assert_eq!(queue.publish(), Ok(true));
    assert_eq!(pair.driver.pop_used().unwrap().map(|done| done.token), Some(1));
    assert_eq!(pair.driver.pop_used(), Ok(None));
}
