//! Both sides of a split or packed ring compared with queues of tokens: no request is lost or duplicated, and a side that
//! waits is notified.

use std::collections::VecDeque;
use std::fmt::Debug;

use proptest::prelude::*;
use vdpa_core::features::Features;
use vdpa_core::ring::driver::{AddError, Completion};
use vdpa_core::ring::{Buffer, Chain};
use vdpa_core::testing::RingPair;
use vdpa_core::vq::QueueState;

const SIZE: u16 = 8;

#[derive(Clone, Copy, Debug)]
enum Op {
    Add { readable: usize, writable: usize },
    DriverPublish,
    DevicePop,
    DeviceComplete { position: prop::sample::Index },
    DevicePublish,
    DriverPopUsed,
    CheckAvailable,
    EnableKick,
    DisableKick,
    EnableInterrupts,
    DisableInterrupts,
    RestartDriver,
    RestartDevice,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..3usize, 0..3usize).prop_map(|(readable, writable)| Op::Add { readable, writable }),
        2 => Just(Op::DriverPublish),
        4 => Just(Op::DevicePop),
        3 => any::<prop::sample::Index>().prop_map(|position| Op::DeviceComplete { position }),
        2 => Just(Op::DevicePublish),
        4 => Just(Op::DriverPopUsed),
        1 => Just(Op::CheckAvailable),
        1 => Just(Op::EnableKick),
        1 => Just(Op::DisableKick),
        1 => Just(Op::EnableInterrupts),
        1 => Just(Op::DisableInterrupts),
        1 => Just(Op::RestartDriver),
        1 => Just(Op::RestartDevice),
    ]
}

/// What a side must do about a notification when it publishes, according to the other side's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Notification {
    /// The other side waits: the next publication must notify.
    Required,
    /// The other side disabled notifications: no publication may notify, except the first after a start.
    Forbidden,
    /// Both are allowed.
    Optional,
}

struct Model {
    pair: RingPair,
    size: u16,
    event_idx: bool,
    packed: bool,
    /// Requests by state, in ring order; those in flight have their head.
    added: VecDeque<Request>,
    available: VecDeque<Request>,
    in_flight: Vec<(u16, Request)>,
    pushed: VecDeque<Completion>,
    used: VecDeque<Completion>,
    next_token: u64,
    kick: Notification,
    call: Notification,
    first_kick: bool,
    first_call: bool,
}

#[derive(Clone, Debug)]
struct Request {
    token: u64,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

fn failed(error: impl Debug) -> TestCaseError {
    TestCaseError::fail(format!("{error:?}"))
}

impl Model {
    fn new(size: u16, features: Features, state: QueueState) -> Self {
        Self {
            pair: RingPair::starting_at(size, features, state),
            size,
            packed: features.has(Features::RING_PACKED),
            event_idx: features.has(Features::RING_EVENT_IDX),
            added: VecDeque::new(),
            available: VecDeque::new(),
            in_flight: Vec::new(),
            pushed: VecDeque::new(),
            used: VecDeque::new(),
            next_token: 0,
            kick: Notification::Optional,
            call: Notification::Optional,
            first_kick: true,
            first_call: true,
        }
    }

    /// Tokens of the requests in each state, and the driver's free descriptors.
    fn requests(&self) -> (Vec<u64>, Vec<u64>, Vec<u64>, Vec<Completion>, u16) {
        let tokens = |list: &VecDeque<Request>| list.iter().map(|request| request.token).collect();
        let in_flight = self.in_flight.iter().map(|(_, request)| request.token).collect();
        let done = self.pushed.iter().chain(&self.used).copied().collect();
        (tokens(&self.added), tokens(&self.available), in_flight, done, self.pair.driver.free())
    }

    fn descriptors(&self) -> usize {
        let of = |request: &Request| request.readable.len() + request.writable.len();
        let waiting = self.added.iter().chain(&self.available);
        waiting.chain(self.in_flight.iter().map(|(_, request)| request)).map(of).sum()
    }

    fn step(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Add { readable, writable } => self.add(readable, writable),
            Op::DriverPublish => self.driver_publish(),
            Op::DevicePop => self.device_pop(),
            Op::DeviceComplete { position } => self.device_complete(position),
            Op::DevicePublish => self.device_publish(),
            Op::DriverPopUsed => self.driver_pop_used(),
            Op::CheckAvailable => {
                let more = self.pair.queue.has_request().map_err(failed)?;
                prop_assert_eq!(more, !self.available.is_empty());
                for limit in [0, 2, u16::MAX] {
                    let waiting = self.pair.queue.waiting(limit).map_err(failed)?;
                    prop_assert_eq!(usize::from(waiting), self.available.len().min(limit.into()));
                }
                Ok(())
            }
            Op::EnableKick => {
                let more = self.pair.queue.enable_kick().map_err(failed)?;
                prop_assert_eq!(more, !self.available.is_empty());
                self.kick = if more { Notification::Optional } else { Notification::Required };
                Ok(())
            }
            Op::DisableKick => {
                // With the event index of a split ring the last requested event stays set and may still be ahead.
                let disabled = self.packed || !self.event_idx;
                self.kick = if disabled { Notification::Forbidden } else { Notification::Optional };
                self.pair.queue.disable_kick().map_err(failed)
            }
            Op::EnableInterrupts => {
                let more = self.pair.driver.enable_interrupts().map_err(failed)?;
                prop_assert_eq!(more, !self.used.is_empty());
                self.call = if more { Notification::Optional } else { Notification::Required };
                Ok(())
            }
            Op::DisableInterrupts => {
                self.call = Notification::Forbidden;
                self.pair.driver.disable_interrupts().map_err(failed)
            }
            Op::RestartDriver => {
                self.pair.restart_driver();
                self.first_kick = true;
                Ok(())
            }
            Op::RestartDevice => {
                if self.in_flight.is_empty() && self.pushed.is_empty() {
                    self.pair.restart_queue();
                    prop_assert_eq!(self.pair.queue.undelivered(), 0);
                    self.first_call = true;
                }
                Ok(())
            }
        }
    }

    fn add(&mut self, readable: usize, writable: usize) -> Result<(), TestCaseError> {
        let token = self.next_token;
        let list = |count: usize, kind: u64| {
            (0..count as u64)
                .map(|i| Buffer { iova: token << 16 | kind << 8 | i, len: 10 })
                .collect::<Vec<_>>()
        };
        let request = Request { token, readable: list(readable, 0), writable: list(writable, 1) };
        let needed = readable + writable;
        // Descriptors are free again when the driver pops the completion.
        let free = self.pair.driver.free();
        match self.pair.driver.add(&request.readable, &request.writable, token) {
            Ok(()) => {
                prop_assert!(needed > 0 && needed <= usize::from(free));
                self.next_token += 1;
                self.added.push_back(request);
            }
            Err(AddError::Empty) => prop_assert_eq!(needed, 0),
            Err(AddError::Full { .. } | AddError::TooLong { .. }) => prop_assert!(needed > usize::from(free)),
            Err(error) => return Err(failed(error)),
        }
        Ok(())
    }

    fn driver_publish(&mut self) -> Result<(), TestCaseError> {
        let any = !self.added.is_empty();
        let kicked = self.pair.driver.publish().map_err(failed)?;
        let expected = if any { self.kick } else { Notification::Optional };
        check(expected, kicked, self.first_kick)?;
        if any {
            self.first_kick = false;
            if self.event_idx && self.kick == Notification::Required {
                self.kick = Notification::Optional;
            }
        }
        self.available.append(&mut self.added);
        Ok(())
    }

    fn device_pop(&mut self) -> Result<(), TestCaseError> {
        let mut chain = Chain::new();
        let popped = self.pair.queue.pop(&self.pair.memory, &mut chain).map_err(failed)?;
        let expected = self.available.pop_front();
        prop_assert_eq!(popped, expected.is_some());
        if let Some(request) = expected {
            prop_assert_eq!(&chain.readable, &request.readable);
            prop_assert_eq!(&chain.writable, &request.writable);
            self.in_flight.push((chain.head, request));
        }
        prop_assert_eq!(usize::from(self.pair.queue.in_flight()), self.in_flight.len());
        Ok(())
    }

    fn device_complete(&mut self, position: prop::sample::Index) -> Result<(), TestCaseError> {
        if self.in_flight.is_empty() { Ok(()) } else { self.complete(position.index(self.in_flight.len())) }
    }

    fn complete(&mut self, position: usize) -> Result<(), TestCaseError> {
        let (head, request) = self.in_flight.swap_remove(position);
        let len = request.writable.iter().map(|buffer| buffer.len).sum();
        self.pair.queue.push_used(head, len).map_err(failed)?;
        self.pushed.push_back(Completion { token: request.token, len });
        Ok(())
    }

    fn device_publish(&mut self) -> Result<(), TestCaseError> {
        let any = !self.pushed.is_empty();
        let called = self.pair.queue.publish().map_err(failed)?;
        prop_assert!(any || !called, "nothing to notify of");
        let expected = if any { self.call } else { Notification::Optional };
        check(expected, called, self.first_call)?;
        if any {
            self.first_call = false;
            if self.event_idx && self.call == Notification::Required {
                self.call = Notification::Optional;
            }
        }
        self.used.append(&mut self.pushed);
        Ok(())
    }

    fn driver_pop_used(&mut self) -> Result<(), TestCaseError> {
        let completion = self.pair.driver.pop_used().map_err(failed)?;
        prop_assert_eq!(completion, self.used.pop_front());
        Ok(())
    }

    /// Completes all requests.
    fn drain(&mut self) -> Result<(), TestCaseError> {
        self.driver_publish()?;
        while !self.available.is_empty() {
            self.device_pop()?;
        }
        while !self.in_flight.is_empty() {
            self.complete(0)?;
        }
        self.device_publish()?;
        while !self.used.is_empty() {
            self.driver_pop_used()?;
        }
        self.driver_pop_used()?;
        prop_assert_eq!((self.pair.driver.in_flight(), self.pair.driver.free()), (0, self.size));
        Ok(())
    }
}

fn check(expected: Notification, notified: bool, first: bool) -> Result<(), TestCaseError> {
    match expected {
        Notification::Required => prop_assert!(notified, "a side that waits was not notified"),
        Notification::Forbidden => {
            prop_assert!(!notified || first, "a side that disabled notifications was notified")
        }
        Notification::Optional => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn a_split_ring_agrees_with_the_model(
        event_idx: bool,
        index: u16,
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let state = QueueState::Split { avail_index: index };
        run(Model::new(SIZE, features(event_idx, false), state), &ops)?;
    }

    /// The size of a packed ring need not be a power of two.
    #[test]
    fn a_packed_ring_agrees_with_the_model(
        event_idx: bool,
        size in 1..=SIZE,
        index in 0..SIZE,
        wrap: bool,
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let index = index % size;
        let state = QueueState::Packed {
            last_avail_idx: index,
            last_avail_wrap: wrap,
            last_used_idx: index,
            last_used_wrap: wrap,
        };
        run(Model::new(size, features(event_idx, true), state), &ops)?;
    }

    /// With the same requests in both formats the device gets the same buffers and the driver the same completions.
    #[test]
    fn both_formats_give_the_same_results(
        event_idx: bool,
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let mut runs = [false, true].map(|packed| {
            let features = features(event_idx, packed);
            (Model::new(SIZE, features, QueueState::initial(features)), Vec::new())
        });
        for op in ops {
            for (model, results) in &mut runs {
                model.step(op)?;
                results.push(model.requests());
            }
        }
        prop_assert_eq!(&runs[0].1, &runs[1].1);
    }
}

fn features(event_idx: bool, packed: bool) -> Features {
    let mut features = Features::NONE;
    if event_idx {
        features = features.with(Features::RING_EVENT_IDX);
    }
    if packed { features.with(Features::RING_PACKED) } else { features }
}

fn run(mut model: Model, ops: &[Op]) -> Result<(), TestCaseError> {
    for &op in ops {
        model.step(op)?;
        prop_assert!(model.descriptors() <= usize::from(model.size));
    }
    model.drain()
}
