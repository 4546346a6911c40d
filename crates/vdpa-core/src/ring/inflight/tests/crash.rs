//! Every request is answered once, wherever the device dies.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;

use super::expand::Expander;
use super::*;
use crate::features::Features;
use crate::ring::inflight::wrong::{self, Wrong};
use crate::ring::inflight::{Log, LogError, log_size};
use crate::ring::{Buffer, Chain, Memory, Ring};
use crate::testing::RingPair;
use crate::vq::QueueState;

const SIZE: u16 = 8;
const FOREVER: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
enum Op {
    Add { readable: u8, writable: bool, indirect: bool },
    Pop,
    Complete(usize),
    Publish,
    TakeUsed,
    Abandon,
}

type Device = Ring<MortalArea, Log<MortalLog>>;

struct Request {
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
    begun: u8,
}

struct World {
    pair: RingPair,
    features: Features,
    words: Rc<RefCell<Vec<u64>>>,
    life: Rc<Life>,
    /// Stores after which each successor dies.
    deaths: Vec<u64>,
    crashes: u8,
    device: Option<Device>,
    /// Taken by the device that lives.
    held: Vec<(Chain, u64)>,
    /// The last one held can be put back.
    abandonable: bool,
    requests: HashMap<u64, Request>,
    answered: HashSet<u64>,
    next: u64,
    stores: u64,
    expander: Option<Expander>,
}

impl World {
    fn new(features: Features, state: QueueState, first: u64, deaths: &[u64]) -> Self {
        let pair = RingPair::starting_at(SIZE, features.without(Features::IN_ORDER), state);
        let packed = features.has(Features::RING_PACKED);
        let start = match state {
            QueueState::Split { avail_index } => avail_index.into(),
            QueueState::Packed { last_avail_idx: index, last_avail_wrap: wrap, .. } => {
                u64::from(index) + if wrap { 0 } else { u64::from(SIZE) }
            }
        };
        let words = Rc::new(RefCell::new(vec![0; log_size(SIZE, features) / 8]));
        let mut deaths = deaths.to_vec();
        deaths.reverse();
        let life = Life::new(FOREVER);
        let mut world = Self {
            pair,
            features,
            words,
            life,
            deaths,
            crashes: 0,
            device: None,
            held: Vec::new(),
            abandonable: false,
            requests: HashMap::new(),
            answered: HashSet::new(),
            next: 0,
            stores: 0,
            expander: features.has(Features::IN_ORDER).then(|| Expander::new(packed, SIZE, start)),
        };
        let [desc, avail, used] = world.areas();
        let ring = Ring::new(SIZE, features, desc, avail, used, state).unwrap();
        world.device = Some(ring.with_log(world.log(), features).unwrap());
        world.life.left.set(first);
        world.life.done.set(0);
        world
    }

    fn areas(&self) -> [MortalArea; 3] {
        self.pair.areas().map(|area| MortalArea { area, life: Rc::clone(&self.life) })
    }

    fn log(&self) -> MortalLog {
        MortalLog { words: Rc::clone(&self.words), life: Rc::clone(&self.life) }
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Add { readable, writable, indirect } => self.add(readable, writable, indirect),
            Op::TakeUsed => self.take_used(),
            Op::Pop => self.pop(),
            Op::Complete(position) => self.complete(position),
            Op::Publish => drop(self.device.as_mut().unwrap().publish().unwrap()),
            Op::Abandon => {
                if std::mem::take(&mut self.abandonable)
                    && let Some((chain, token)) = self.held.pop()
                {
                    self.device.as_mut().unwrap().abandon(&chain).unwrap();
                    self.requests.get_mut(&token).unwrap().begun = 0;
                }
            }
        }
        while self.life.is_over() {
            self.recover();
        }
    }

    fn add(&mut self, readable: u8, writable: bool, indirect: bool) {
        let token = self.next;
        let at = token * 64;
        let mut list = vec![self.pair.buffer(at, 8)];
        list.extend((1..readable).map(|i| self.pair.buffer(at + 8 + u64::from(i), 1)));
        let answer = if writable { vec![self.pair.buffer(at + 16, 8)] } else { vec![] };
        let table = self.pair.buffer(at + 32, 32);
        let memory = self.pair.memory.clone();
        let added = if indirect {
            let both = [(list[0], 1u16, 1u16), (self.pair.buffer(at + 16, 8), 2, 0)];
            for (i, (buffer, flags, next)) in (0..).zip(both) {
                let tail = if self.features.has(Features::RING_PACKED) { [0, flags] } else { [flags, next] };
                let mut raw = [0; 16];
                raw[..8].copy_from_slice(&buffer.iova.to_le_bytes());
                raw[8..12].copy_from_slice(&buffer.len.to_le_bytes());
                raw[12..14].copy_from_slice(&tail[0].to_le_bytes());
                raw[14..].copy_from_slice(&tail[1].to_le_bytes());
                memory.write(table.iova + 16 * i, &raw).unwrap();
            }
            // As writable, so that the driver accepts the length.
            self.pair.driver.add(&[], &[table], token)
        } else {
            self.pair.driver.add(&list, &answer, token)
        };
        if added.is_err() {
            return;
        }
        memory.write(list[0].iova, &token.to_le_bytes()).unwrap();
        memory.write(at_answer(&self.pair, token), &[0xff; 8]).unwrap();
        self.pair.driver.publish().unwrap();
        if let Some(expander) = &mut self.expander {
            let descriptors = if indirect { 1 } else { list.len() + answer.len() };
            expander.add(&self.pair, descriptors as u64, if indirect || writable { 8 } else { 0 });
        }
        let (mut list, mut answer) = (list, answer);
        if indirect {
            self.make_indirect(table);
            list.truncate(1);
            answer = vec![self.pair.buffer(at + 16, 8)];
        }
        self.requests.insert(token, Request { readable: list, writable: answer, begun: 0 });
        self.next += 1;
    }

    fn make_indirect(&self, table: Buffer) {
        let flags = if self.features.has(Features::RING_PACKED) { 14 } else { 12 };
        for index in 0..u64::from(SIZE) {
            let at = self.pair.ring.desc + index * 16;
            let (mut address, mut old) = ([0; 8], [0; 2]);
            self.pair.memory.read(at, &mut address).unwrap();
            self.pair.memory.read(at + flags, &mut old).unwrap();
            if u64::from_le_bytes(address) == table.iova && u16::from_le_bytes(old) & 2 != 0 {
                let new = u16::from_le_bytes(old) & !2 | 4;
                self.pair.memory.write(at + flags, &new.to_le_bytes()).unwrap();
            }
        }
    }

    fn take_used(&mut self) {
        if let Some(expander) = &mut self.expander {
            expander.expand(&self.pair);
        }
        while let Some(done) = self.pair.driver.pop_used().unwrap() {
            let request = &self.requests[&done.token];
            assert!(self.answered.insert(done.token), "request {} answered twice", done.token);
            if let [buffer] = request.writable[..] {
                let mut answer = [0; 8];
                self.pair.memory.read(buffer.iova, &mut answer).unwrap();
                assert_eq!(u64::from_le_bytes(answer), !done.token, "answer of request {}", done.token);
                assert_eq!(done.len, 8);
            } else {
                assert!(request.begun > 0, "answered, but nobody has begun it");
                assert_eq!(done.len, 0);
            }
        }
    }

    fn hold(&mut self, chain: Chain) {
        let mut token = [0; 8];
        self.pair.memory.read(chain.readable[0].iova, &mut token).unwrap();
        let token = u64::from_le_bytes(token);
        let request = self.requests.get_mut(&token).unwrap();
        assert_eq!((&chain.readable, &chain.writable), (&request.readable, &request.writable));
        assert!(!self.answered.contains(&token), "request {token} is done again after its answer");
        request.begun += 1;
        self.held.push((chain, token));
    }

    fn pop(&mut self) {
        let mut chain = Chain::new();
        if self.device.as_mut().unwrap().pop(&self.pair.memory, &mut chain).unwrap() && !self.life.is_over() {
            self.hold(chain);
            self.abandonable = true;
        }
    }

    fn complete(&mut self, position: usize) {
        if self.held.is_empty() {
            return;
        }
        let (chain, token) = self.held.remove(position % self.held.len());
        self.abandonable = false;
        let mut len = 0;
        if let [buffer] = chain.writable[..] {
            if self.life.store() {
                self.pair.memory.write(buffer.iova, &(!token).to_le_bytes()).unwrap();
            }
            len = 8;
        }
        self.device.as_mut().unwrap().push_used(chain.head, len).unwrap();
    }

    /// The next process, which may die as well.
    fn recover(&mut self) {
        self.device = None;
        self.held.clear();
        self.abandonable = false;
        self.crashes += 1;
        self.stores += self.life.done.get();
        self.life = Life::new(self.deaths.pop().unwrap_or(FOREVER));
        let (mut device, repeats) = Ring::recover(SIZE, self.features, self.areas(), self.log()).unwrap();
        let mut last = None;
        for repeat in repeats {
            if self.life.is_over() {
                return;
            }
            let mut chain = Chain::new();
            device.retake(repeat, &self.pair.memory, &mut chain).unwrap();
            self.hold(chain);
            let token = self.held.last().unwrap().1;
            assert!(last.replace(token) < Some(token), "in the order of the ring");
            let begun = self.requests[&token].begun;
            assert!((begun - 1..=self.crashes).contains(&repeat.attempts), "{repeat:?}, {begun} begun");
        }
        device.publish().unwrap();
        self.device = Some(device);
    }

    fn finish(&mut self) -> u64 {
        for _ in 0..64 {
            for op in [Op::Pop, Op::Complete(0), Op::Publish, Op::TakeUsed] {
                self.step(op);
            }
        }
        assert_eq!(self.answered.len() as u64, self.next, "a request was lost");
        // Drained: the log is empty.
        let (_, repeats) = Ring::recover(SIZE, self.features, self.areas(), self.log()).unwrap();
        assert_eq!(repeats, []);
        self.stores + self.life.done.get()
    }
}

fn at_answer(pair: &RingPair, token: u64) -> u64 {
    pair.buffer(token * 64 + 16, 8).iova
}

fn run(features: Features, state: QueueState, ops: &[Op], first: u64, deaths: &[u64]) -> u64 {
    let mut world = World::new(features, state, first, deaths);
    ops.iter().for_each(|&op| world.step(op));
    world.finish()
}

const fn add(readable: u8, writable: bool) -> Op {
    Op::Add { readable, writable, indirect: false }
}

/// Requests that overtake each other, in batches, over more than a lap of the ring.
fn script() -> Vec<Op> {
    let indirect = Op::Add { readable: 1, writable: true, indirect: true };
    let mut ops = vec![add(1, true), add(1, true), add(4, true), Op::Pop, Op::Pop, Op::Pop];
    ops.extend([Op::Complete(1), Op::Publish, Op::TakeUsed, indirect, Op::Pop, Op::Complete(2)]);
    ops.extend([Op::Complete(1), Op::Publish, Op::TakeUsed, add(2, false), add(1, true), Op::Pop]);
    ops.extend([Op::Abandon, Op::Pop, Op::Pop, Op::Complete(1), Op::Complete(1), Op::Publish]);
    ops.extend([Op::TakeUsed, add(1, true), add(1, false), indirect, Op::Pop, Op::Complete(1)]);
    ops.extend([Op::Pop, Op::Pop, Op::Complete(2), Op::Complete(0), Op::Publish, Op::TakeUsed]);
    ops.extend([Op::Complete(0), add(1, true), Op::Pop, Op::Complete(0), Op::Publish]);
    ops
}

fn states(features: Features) -> [QueueState; 2] {
    let packed = features.has(Features::RING_PACKED);
    let late = QueueState::decode(if packed { 0x0006_0006 } else { 0xfffd }, features).unwrap();
    [QueueState::initial(features), late]
}

const FORMATS: [Features; 6] = [
    Features::NONE,
    Features::of(&[Features::RING_EVENT_IDX]),
    Features::of(&[Features::RING_PACKED]),
    Features::of(&[Features::RING_PACKED, Features::RING_EVENT_IDX]),
    Features::of(&[Features::IN_ORDER]),
    Features::of(&[Features::RING_PACKED, Features::IN_ORDER]),
];

/// Dies at every `step`th store of the script, and then at some of the first stores of the successor.
fn exhaust(features: Features, step: usize, seconds: &[u64]) {
    for state in states(features) {
        let stores = run(features, state, &script(), FOREVER, &[]);
        for first in (1..=stores).step_by(step) {
            for &second in seconds {
                run(features, state, &script(), first, &[second]);
            }
        }
    }
}

#[test]
fn every_request_is_answered_once_wherever_the_device_dies() {
    for features in FORMATS {
        exhaust(features, 1, &[FOREVER]);
    }
}

#[test]
fn every_request_is_answered_once_when_the_successor_dies_as_well() {
    let seconds = [1, 2, 5, 11];
    for features in [FORMATS[0], FORMATS[2], FORMATS[4], FORMATS[5]] {
        exhaust(features, 3, &seconds);
    }
}

#[test]
fn a_wrong_order_of_stores_is_noticed() {
    let packed = Features::of(&[Features::RING_PACKED]);
    let cases = [
        (Wrong::LogBeforeElement, Features::NONE),
        (Wrong::LogBeforeElement, packed),
        (Wrong::NoPublished, Features::NONE),
        (Wrong::FlagsBeforeLog, packed),
        (Wrong::NoPublished, packed),
        (Wrong::PublishedBeforeFlags, packed),
        (Wrong::NameFreedAtPush, packed),
        (Wrong::TakenBeforeDescriptors, packed),
    ];
    let missed: Vec<_> = cases
        .into_iter()
        .filter(|&(order, features)| {
            wrong::plant(Some(order));
            let result = catch_unwind(AssertUnwindSafe(|| exhaust(features, 1, &[FOREVER])));
            wrong::plant(None);
            result.is_ok()
        })
        .collect();
    assert_eq!(missed, [], "not noticed");
}

#[test]
fn a_request_counts_its_attempts() {
    for features in FORMATS {
        let mut world = World::new(features, QueueState::initial(features), FOREVER, &[]);
        world.step(add(1, true));
        world.step(Op::Pop);
        for attempts in 1..4 {
            let (mut device, repeats) = Ring::recover(SIZE, features, world.areas(), world.log()).unwrap();
            assert_eq!(repeats.len(), 1);
            assert_eq!(repeats[0].attempts, attempts);
            let mut chain = Chain::new();
            device.retake(repeats[0], &world.pair.memory, &mut chain).unwrap();
        }
    }
}

#[test]
fn a_log_that_was_never_finished_is_absent() {
    for features in FORMATS {
        let mut world = World::new(features, QueueState::initial(features), FOREVER, &[]);
        world.step(add(1, true));
        world.step(Op::Pop);
        let before = world.life.done.get();
        let saved = world.words.borrow().clone();
        world.device.as_mut().unwrap().restart_log();
        let stores = world.life.done.get() - before;
        for count in 1..=stores {
            *world.words.borrow_mut() = saved.clone();
            world.life.left.set(count);
            world.device.as_mut().unwrap().restart_log();
            world.life.left.set(FOREVER);
            match Ring::recover(SIZE, features, world.areas(), world.log()) {
                Err(LogError::Absent) => assert!(count < stores),
                Ok((_, repeats)) => assert_eq!((repeats, count), (vec![], stores)),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1..5u8, any::<bool>(), prop::bool::weighted(0.2))
            .prop_map(|(readable, writable, indirect)| Op::Add { readable, writable, indirect }),
        4 => Just(Op::Pop),
        4 => any::<usize>().prop_map(Op::Complete),
        2 => Just(Op::Publish),
        2 => Just(Op::TakeUsed),
        1 => Just(Op::Abandon),
    ]
}

proptest! {
    #[test]
    fn long_runs_with_many_deaths(
        format in 0..FORMATS.len(),
        late in any::<bool>(),
        ops in prop::collection::vec(op(), 1..200),
        deaths in prop::collection::vec(1..200u64, 1..12),
    ) {
        let features = FORMATS[format];
        run(features, states(features)[usize::from(late)], &ops, deaths[0], &deaths[1..]);
    }
}
