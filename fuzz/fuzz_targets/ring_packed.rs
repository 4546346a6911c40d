//! Both sides of a packed ring whose memory changes between any two calls.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vdpa_core::features::Features;
use vdpa_core::ring::driver::Driver;
use vdpa_core::ring::{Buffer, Ring, RingError};
use vdpa_core::testing::RingPair;
use vdpa_core::types::{IovaRange, Perm};
use vdpa_core::vq::QueueState;
use vdpa_fuzz::ring::{InFlight, descriptor, memory_bytes, poke, protect, write_descriptor, write_indirect};

#[derive(Arbitrary, Debug)]
struct Input {
    size: u8,
    event_idx: bool,
    in_order: bool,
    refuse_indirect: bool,
    /// Position at which the device starts, in the encoding of `VHOST_SET_VRING_BASE`.
    base: u32,
    /// Requests in flight from before the start.
    lost: u16,
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug)]
enum Op {
    /// Writes anywhere in the ring or the buffers.
    Poke {
        at: u16,
        bytes: [u8; 4],
    },
    /// Writes a descriptor of the ring that is often nearly valid.
    Descriptor {
        index: u8,
        at: u16,
        len: u16,
        id: u8,
        flags: u8,
        wrap: u8,
    },
    /// Writes a descriptor of an indirect table in the buffers.
    Indirect {
        table: u8,
        index: u8,
        at: u16,
        len: u16,
        flags: u8,
    },
    /// Writes a descriptor with any content.
    Raw {
        index: u8,
        bytes: [u8; 16],
    },
    Protect {
        at: u16,
        pages: u8,
        perm: u8,
    },
    /// Lets one memory access fail, after this many that succeed.
    Fail(u8),
    Pop,
    Abandon,
    Push {
        which: u8,
        len: u32,
    },
    /// Completes a head that may not be in flight.
    PushWrong(u16),
    Publish,
    EnableKick,
    DisableKick,
    Waiting {
        limit: u8,
    },
    Add {
        readable: u8,
        writable: u8,
    },
    DriverPublish,
    DriverPopUsed,
    EnableInterrupts,
    DisableInterrupts,
    RestartDriver,
}

/// The ring and the model that [`State::check`] compares it with after each operation.
struct State {
    pair: RingPair,
    size: u16,
    in_flight: InFlight,
    /// Requests in flight from before the start, and the number of their descriptors.
    lost: (u16, u16),
    /// By token: whether it was completed.
    tokens: Vec<bool>,
}

impl State {
    fn new(input: &Input) -> Option<Self> {
        let size = 1 + u16::from(input.size % 17);
        let mut features = Features::of(&[Features::RING_PACKED]);
        if input.event_idx {
            features = features.with(Features::RING_EVENT_IDX);
        }
        let mut pair = RingPair::new(size, features);
        if input.in_order {
            features = features.with(Features::IN_ORDER);
        }
        let [desc, driver, device] = pair.areas();
        let state = QueueState::decode(input.base, features)?;
        let queue = Ring::new(size, features, desc, driver, device, state).ok()?.with_in_flight(input.lost);
        assert_eq!(queue.state(), state);
        let lost = (queue.in_flight(), queue.undelivered());
        pair.queue = if input.refuse_indirect { queue.refuse_unnegotiated_indirect(features) } else { queue };
        Some(Self { pair, size, in_flight: InFlight::default(), lost, tokens: Vec::new() })
    }

    fn memory(&mut self, op: &Op) {
        let (pair, size) = (&self.pair, self.size);
        let (buffers, bytes) = (pair.buffers(), memory_bytes(pair));
        match *op {
            Op::Poke { at, bytes: raw } => poke(&pair.memory, bytes, at, raw),
            Op::Descriptor { index, at, len, id, flags, wrap } => {
                let wrap = [1 << 7, 1 << 15, 0, 1 << 7 | 1 << 15][usize::from(wrap % 4)];
                let flags = u16::from(flags & 7) | wrap;
                let raw = descriptor(buffers + u64::from(at), len.into(), id.into(), flags);
                write_descriptor(pair, size, index, &raw);
            }
            Op::Indirect { table, index, at, len, flags } => {
                let raw = descriptor(buffers + u64::from(at), len.into(), 0, flags.into());
                write_indirect(pair, table, index, &raw);
            }
            Op::Raw { index, bytes } => write_descriptor(pair, size, index, &bytes),
            Op::Protect { at, pages, perm } => protect(&pair.memory, bytes, at, pages, perm),
            Op::Fail(accesses) => pair.memory.fail_after(accesses.into()),
            _ => {}
        }
    }

    fn device(&mut self, op: &Op) {
        let (queue, memory) = (&mut self.pair.queue, &self.pair.memory);
        match *op {
            Op::Pop => {
                let (before, broken) = (self.in_flight.heads.len(), queue.broken());
                if let Some(head) = self.in_flight.pop(queue, memory) {
                    assert!(head < self.size && !self.in_flight.heads[..before].contains(&head));
                    assert_eq!(broken, None);
                }
            }
            Op::Abandon => self.in_flight.abandon(queue),
            Op::Push { which, len } => self.in_flight.push(queue, which, len),
            Op::PushWrong(head) => {
                if !self.in_flight.heads.contains(&head) {
                    assert_eq!(queue.push_used(head, 0), Err(RingError::NotInFlight { head }));
                }
            }
            Op::Publish => drop(queue.publish()),
            Op::EnableKick => drop(queue.enable_kick()),
            Op::DisableKick => drop(queue.disable_kick()),
            Op::Waiting { limit } => {
                assert!(queue.waiting(limit.into()).unwrap_or(0) <= self.size.min(limit.into()));
            }
            _ => {}
        }
    }

    fn driver(&mut self, op: &Op) {
        let driver = &mut self.pair.driver;
        match *op {
            Op::Add { readable, writable } => {
                let list = |count: u8| vec![Buffer { iova: 0, len: 10 }; usize::from(count % 8)];
                let free = driver.free();
                if driver.add(&list(readable), &list(writable), self.tokens.len() as u64).is_ok() {
                    self.tokens.push(false);
                    assert!(driver.free() < free);
                }
            }
            Op::DriverPublish => drop(driver.publish()),
            Op::DriverPopUsed => {
                if let Ok(Some(done)) = driver.pop_used() {
                    let completed =
                        &mut self.tokens[usize::try_from(done.token).expect("a token that was added")];
                    assert!(!std::mem::replace(completed, true), "completed twice");
                    assert!(done.len <= 70);
                }
            }
            Op::EnableInterrupts => drop(driver.enable_interrupts()),
            Op::DisableInterrupts => drop(driver.disable_interrupts()),
            Op::RestartDriver => self.adopt(),
            _ => {}
        }
    }

    /// Adopts the driver's own state. That fails only if the memory cannot be accessed or the device changed it.
    fn adopt(&mut self) {
        let Driver::Packed(driver) = &self.pair.driver else { return };
        let state = driver.state();
        let memory = self.pair.memory.clone();
        let _ = memory.cancel_failure();
        memory.protect(IovaRange::ALL, Perm::RW);
        let [desc, avail, used] = self.pair.areas();
        if let Ok(driver) = vdpa_core::ring::driver::PackedDriver::adopt(&state, desc, avail, used) {
            assert_eq!(driver.state(), state);
            self.pair.driver = Driver::Packed(driver);
        }
    }

    fn check(&self, op: &Op) {
        let (queue, driver) = (&self.pair.queue, &self.pair.driver);
        assert_eq!(
            usize::from(queue.in_flight()),
            self.in_flight.heads.len() + usize::from(self.lost.0),
            "after {op:?}"
        );
        assert!(
            self.in_flight.heads.len() + usize::from(queue.unpublished()) <= usize::from(self.size),
            "after {op:?}"
        );
        assert_eq!(queue.undelivered(), self.lost.1, "after {op:?}");
        let open = self.tokens.iter().filter(|&&completed| !completed).count();
        assert_eq!(usize::from(driver.in_flight()), open, "after {op:?}");
        assert!(driver.free() <= self.size && open <= usize::from(self.size - driver.free()), "after {op:?}");
    }
}

fuzz_target!(|input: Input| {
    let Some(mut state) = State::new(&input) else { return };
    for op in input.ops.iter().take(400) {
        state.memory(op);
        state.device(op);
        state.driver(op);
        state.check(op);
    }
});
