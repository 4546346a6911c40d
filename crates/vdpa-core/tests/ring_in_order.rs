//! A device with VIRTIO_F_IN_ORDER whose requests complete in any order, and a driver that reads the ring as the
//! specification says (virtio 1.2 sections 2.7.9 and 2.8.13).
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up its ring must fail")]

use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;
use vdpa_core::features::Features;
use vdpa_core::ring::{Buffer, Chain, Ring, RingError};
use vdpa_core::testing::RingPair;
use vdpa_core::vq::QueueState;

const SIZE: u16 = 8;

#[derive(Clone, Copy, Debug)]
enum Op {
    Add { descriptors: u16 },
    Pop,
    Complete { position: prop::sample::Index, full: bool },
    Publish,
    Abandon,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1..4u16).prop_map(|descriptors| Op::Add { descriptors }),
        4 => Just(Op::Pop),
        4 => (any::<prop::sample::Index>(), prop::bool::weighted(0.8))
            .prop_map(|(position, full)| Op::Complete { position, full }),
        2 => Just(Op::Publish),
        1 => Just(Op::Abandon),
    ]
}

/// A driver that negotiated VIRTIO_F_IN_ORDER.
struct InOrderDriver {
    packed: bool,
    pair: RingPair,
    /// Requests in order: head (split) or buffer id (packed), descriptors, token.
    in_flight: VecDeque<(u16, u16, u64)>,
    /// Next descriptor to use; the table of a split ring is used in ring order, as the feature demands.
    next: u16,
    wrap: bool,
    avail: u16,
    used: u16,
    used_wrap: bool,
    token: u64,
}

impl InOrderDriver {
    fn new(packed: bool, features: Features) -> Self {
        let pair = RingPair::new(SIZE, features.without(Features::IN_ORDER));
        let mut driver = Self {
            packed,
            pair,
            in_flight: VecDeque::new(),
            next: 0,
            wrap: true,
            avail: 0,
            used: 0,
            used_wrap: true,
            token: 0,
        };
        let [desc, avail, used] = driver.pair.areas();
        let state = QueueState::initial(features);
        driver.pair.queue = Ring::new(SIZE, features, desc, avail, used, state).unwrap();
        driver
    }

    fn buffer(token: u64, i: u16) -> Buffer {
        Buffer { iova: token << 16 | u64::from(i), len: 10 }
    }

    /// Makes a request of writable buffers available; `false` when it does not fit.
    fn add(&mut self, descriptors: u16) -> bool {
        let busy: u16 = self.in_flight.iter().map(|&(_, descriptors, _)| descriptors).sum();
        if busy + descriptors > SIZE {
            return false;
        }
        let (head, memory) = (self.next, &self.pair.memory);
        let mut flags_of_first = Vec::new();
        for i in 0..descriptors {
            let Buffer { iova, len } = Self::buffer(self.token, i);
            let more = u16::from(i + 1 < descriptors);
            let at = self.pair.ring.desc + u64::from(self.next) * 16;
            memory.poke(at, &iova.to_le_bytes());
            memory.poke(at + 8, &len.to_le_bytes());
            let wrapped = self.next + 1 == SIZE;
            if self.packed {
                let flags = 2 | more | if self.wrap { 1 << 7 } else { 1 << 15 };
                memory.poke(at + 12, &head.to_le_bytes());
                if i == 0 {
                    flags_of_first = flags.to_le_bytes().to_vec();
                } else {
                    memory.poke(at + 14, &flags.to_le_bytes());
                }
            } else {
                memory.poke(at + 12, &(2 | more).to_le_bytes());
                memory.poke(at + 14, &((self.next + 1) % SIZE).to_le_bytes());
            }
            self.next = if wrapped { 0 } else { self.next + 1 };
            self.wrap ^= wrapped;
        }
        if self.packed {
            memory.poke(self.pair.ring.desc + u64::from(head) * 16 + 14, &flags_of_first);
        } else {
            let at = self.pair.ring.avail + 4 + u64::from(self.avail % SIZE) * 2;
            memory.poke(at, &head.to_le_bytes());
            self.avail = self.avail.wrapping_add(1);
            memory.poke(self.pair.ring.avail + 2, &self.avail.to_le_bytes());
        }
        self.in_flight.push_back((head, descriptors, self.token));
        self.token += 1;
        true
    }

    fn peek_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.pair.memory.peek(at, 2).try_into().unwrap())
    }

    /// The id and length in the next used element, if there is one.
    fn used_element(&self) -> Option<(u16, u32)> {
        let (at, id_at, len_at) = if self.packed {
            let at = self.pair.ring.desc + u64::from(self.used) * 16;
            let expected = if self.used_wrap { 0x8080 } else { 0 };
            if self.in_flight.is_empty() || self.peek_u16(at + 14) & 0x8080 != expected {
                return None;
            }
            (at, 12, 8)
        } else {
            if self.peek_u16(self.pair.ring.used + 2) == self.used {
                return None;
            }
            (self.pair.ring.used + 4 + u64::from(self.used % SIZE) * 8, 0, 4)
        };
        let len = self.pair.memory.peek(at + len_at, 4).try_into().unwrap();
        Some((self.peek_u16(at + id_at), u32::from_le_bytes(len)))
    }

    /// Pops all completed requests. Those without a used element of their own count as written in full.
    fn pop_all_used(&mut self) -> Vec<(u64, u32)> {
        let mut done = Vec::new();
        while let Some((id, len)) = self.used_element() {
            loop {
                let (head, descriptors, token) = self.in_flight.pop_front().expect("the id is in flight");
                let last = head == id;
                done.push((token, if last { len } else { u32::from(descriptors) * 10 }));
                if self.packed {
                    self.used += descriptors;
                    if self.used >= SIZE {
                        self.used -= SIZE;
                        self.used_wrap ^= true;
                    }
                } else {
                    self.used = self.used.wrapping_add(1);
                }
                if last {
                    break;
                }
            }
        }
        done
    }
}

fn run(packed: bool, ops: &[Op]) -> Result<(), TestCaseError> {
    let mut features = Features::of(&[Features::IN_ORDER]);
    if packed {
        features = features.with(Features::RING_PACKED);
    }
    let mut driver = InOrderDriver::new(packed, features);
    let mut popped: Vec<(u16, u64, u32)> = Vec::new();
    let mut last: Option<(Chain, u64)> = None;
    let mut lengths: HashMap<u64, u32> = HashMap::new();
    let (mut next_popped, mut completed) = (0, 0);
    for &op in ops {
        match op {
            Op::Add { descriptors } => drop(driver.add(descriptors)),
            Op::Pop => {
                let mut chain = Chain::new();
                if driver.pair.queue.pop(&driver.pair.memory, &mut chain).unwrap() {
                    prop_assert_eq!(chain.writable[0], InOrderDriver::buffer(next_popped, 0));
                    let len = u32::try_from(chain.writable().len()).unwrap();
                    popped.push((chain.head, next_popped, len));
                    last = Some((chain, next_popped));
                    next_popped += 1;
                }
            }
            Op::Abandon => {
                if let Some((chain, token)) = last.take() {
                    driver.pair.queue.abandon(&chain).unwrap();
                    popped.retain(|&(_, other, _)| other != token);
                    next_popped -= 1;
                }
            }
            Op::Complete { position, full } => {
                if popped.is_empty() {
                    continue;
                }
                let (head, token, writable) = popped.swap_remove(position.index(popped.len()));
                let len = if full { writable } else { 3 };
                driver.pair.queue.push_used(head, len).unwrap();
                prop_assert_eq!(driver.pair.queue.push_used(head, len), Err(RingError::NotInFlight { head }));
                lengths.insert(token, len);
                last = None;
            }
            Op::Publish => {
                driver.pair.queue.publish().unwrap();
                let ready = (completed..).take_while(|token| lengths.contains_key(token)).count();
                let done = driver.pop_all_used();
                prop_assert_eq!(
                    done.len(),
                    ready,
                    "exactly the requests with no incomplete request before them"
                );
                for (token, len) in done {
                    prop_assert_eq!((token, Some(&len)), (completed, lengths.get(&token)));
                    completed += 1;
                }
                let waiting = lengths.keys().filter(|&&token| token >= completed).count();
                prop_assert_eq!(usize::from(driver.pair.queue.unpublished()), waiting);
            }
        }
        prop_assert_eq!(usize::from(driver.pair.queue.in_flight()), popped.len());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn a_split_ring_publishes_completions_in_order(ops in prop::collection::vec(op(), 1..200)) {
        run(false, &ops)?;
    }

    #[test]
    fn a_packed_ring_publishes_completions_in_order(ops in prop::collection::vec(op(), 1..200)) {
        run(true, &ops)?;
    }
}

/// If a driver makes a head available again before it was used, two requests have the same id.
#[test]
fn the_same_head_twice_breaks_an_in_order_split_ring() {
    let mut driver = InOrderDriver::new(false, Features::of(&[Features::IN_ORDER]));
    assert!(driver.add(1));
    driver.pair.memory.poke(driver.pair.ring.avail + 6, &[0, 0]);
    driver.pair.memory.poke(driver.pair.ring.avail + 2, &[2, 0]);
    let mut chain = Chain::new();
    assert_eq!(driver.pair.queue.pop(&driver.pair.memory, &mut chain), Ok(true));
    assert_eq!(driver.pair.queue.pop(&driver.pair.memory, &mut chain), Err(RingError::Again { head: 0 }));
    driver.pair.queue.push_used(0, 10).unwrap();
    assert_eq!(driver.pair.queue.in_flight(), 0, "the first request can still be completed");
    driver.pair.queue.publish().unwrap();
    assert_eq!(driver.pop_all_used(), [(0, 10)]);
}

/// A request that was popped before the start and is never completed holds back all later ones: with a later used
/// element the driver would count it as completed.
#[test]
fn no_request_is_published_before_a_lost_one() {
    for packed in [false, true] {
        let mut features = Features::of(&[Features::IN_ORDER]);
        if packed {
            features = features.with(Features::RING_PACKED);
        }
        let mut driver = InOrderDriver::new(packed, features);
        assert!(driver.add(1) && driver.add(1));
        let mut chain = Chain::new();
        assert_eq!(driver.pair.queue.pop(&driver.pair.memory, &mut chain), Ok(true));
        let [desc, avail, used] = driver.pair.areas();
        let state = driver.pair.queue.state();
        driver.pair.queue = Ring::new(SIZE, features, desc, avail, used, state).unwrap().with_in_flight(1);
        assert_eq!(driver.pair.queue.pop(&driver.pair.memory, &mut chain), Ok(true));
        driver.pair.queue.push_used(chain.head, 10).unwrap();
        assert_eq!(driver.pair.queue.publish(), Ok(false));
        assert_eq!((driver.pop_all_used(), driver.pair.queue.unpublished()), (vec![], 1));
    }
}
