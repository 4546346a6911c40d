//! The barriers between a side's own store and its look at the other side, in every interleaving and with every
//! reordering that the memory model allows.
//!
//! One request is on its way while the side that waits for it goes to sleep. If it sleeps and the other side did not
//! want to notify, the wake-up is lost. Without the barrier of either side that must happen in some execution, or this
//! test would notice nothing.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its ring must fail")]

use loom::sync::atomic::{AtomicU16, Ordering, fence};
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vdpa_core::features::{Bit, Features};
use vdpa_core::ring::driver::Driver;
use vdpa_core::ring::{Area, Buffer, Chain, Fault, Memory, Ring, area_sizes};
use vdpa_core::types::Perm;
use vdpa_core::vq::QueueState;

const SIZE: u16 = 2;

/// A ring area. The words by which the two sides talk are known to the model checker; what they only point to would
/// multiply its work and is not what is tested.
#[derive(Clone)]
struct ModelArea {
    words: Arc<[Word]>,
    fenced: bool,
}

enum Word {
    Modelled(AtomicU16),
    Plain(std::sync::atomic::AtomicU16),
}

impl Word {
    fn load(&self, ordering: Ordering) -> u16 {
        match self {
            Self::Modelled(word) => word.load(ordering),
            Self::Plain(word) => word.load(ordering),
        }
    }

    fn store(&self, value: u16, ordering: Ordering) {
        match self {
            Self::Modelled(word) => word.store(value, ordering),
            Self::Plain(word) => word.store(value, ordering),
        }
    }
}

impl ModelArea {
    fn new(size: usize, modelled: impl Fn(usize) -> bool) -> Self {
        let word = |offset| {
            if modelled(offset) { Word::Modelled(AtomicU16::new(0)) } else { Word::Plain(0.into()) }
        };
        Self { words: (0..size).step_by(2).map(word).collect(), fenced: true }
    }

    fn word(&self, offset: usize) -> Result<&Word, Fault> {
        self.words.get(offset / 2).ok_or(Fault { addr: offset as u64 })
    }
}

impl Area for ModelArea {
    fn size(&self) -> usize {
        self.words.len() * 2
    }

    fn load_u16(&self, offset: usize) -> Result<u16, Fault> {
        Ok(self.word(offset)?.load(Ordering::Acquire))
    }

    fn store_u16(&self, offset: usize, value: u16) -> Result<(), Fault> {
        self.word(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault> {
        for (at, bytes) in (offset..).step_by(2).zip(buf.chunks_exact_mut(2)) {
            bytes.copy_from_slice(&self.word(at)?.load(Ordering::Relaxed).to_le_bytes());
        }
        Ok(())
    }

    fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault> {
        for (at, bytes) in (offset..).step_by(2).zip(data.chunks_exact(2)) {
            self.word(at)?.store(u16::from_le_bytes([bytes[0], bytes[1]]), Ordering::Relaxed);
        }
        Ok(())
    }

    fn barrier(&self) {
        if self.fenced {
            fence(Ordering::SeqCst);
        }
    }
}

/// The requests have no buffers that anybody looks at.
struct NoMemory;

impl Memory for NoMemory {
    type Area = ModelArea;

    fn read(&self, iova: u64, _: &mut [u8]) -> Result<(), Fault> {
        Err(Fault { addr: iova })
    }

    fn write(&self, iova: u64, _: &[u8]) -> Result<(), Fault> {
        Err(Fault { addr: iova })
    }

    fn area(&self, iova: u64, _: u64, _: Perm) -> Result<ModelArea, Fault> {
        Err(Fault { addr: iova })
    }
}

#[derive(Clone, Copy)]
struct Setup {
    features: Features,
    driver_fenced: bool,
    device_fenced: bool,
}

/// A ring that has served one request, so that both sides have had their first notification; the next is added, or
/// also popped, as `in_flight` says. Both sides have asked for silence.
fn ring(setup: Setup, in_flight: bool) -> (Driver<ModelArea>, Ring<ModelArea>) {
    let Setup { features, driver_fenced, device_fenced } = setup;
    let packed = features.has(Features::RING_PACKED);
    let sizes = area_sizes(SIZE, features);
    let ends = |size: usize| move |offset: usize| packed || offset < 4 || offset + 2 == size;
    let desc = ModelArea::new(sizes.desc, |offset| packed && offset % 16 == 14);
    let avail = ModelArea::new(sizes.avail, ends(sizes.avail));
    let used = ModelArea::new(sizes.used, ends(sizes.used));
    let of = |area: &ModelArea, fenced| ModelArea { fenced, ..area.clone() };
    let [d, a, u] = [&desc, &avail, &used].map(|area| of(area, driver_fenced));
    let mut driver = Driver::new(SIZE, features, d, a, u).unwrap();
    let [d, a, u] = [&desc, &avail, &used].map(|area| of(area, device_fenced));
    let mut queue = Ring::new(SIZE, features, d, a, u, QueueState::initial(features)).unwrap();

    let mut chain = Chain::new();
    let request = [Buffer { iova: 0, len: 1 }];
    driver.add(&request, &[], 0).unwrap();
    driver.publish().unwrap();
    assert!(queue.pop(&NoMemory, &mut chain).unwrap());
    queue.push_used(chain.head, 0).unwrap();
    queue.publish().unwrap();
    assert!(driver.pop_used().unwrap().is_some());
    driver.disable_interrupts().unwrap();
    queue.disable_kick().unwrap();
    driver.add(&request, &[], 1).unwrap();
    if in_flight {
        driver.publish().unwrap();
        assert!(queue.pop(&NoMemory, &mut chain).unwrap());
        queue.push_used(chain.head, 0).unwrap();
    }
    (driver, queue)
}

/// Runs `race`, which returns whether the one side sleeps and the other notifies, in all executions; returns whether
/// a wake-up is lost in one of them.
fn loses(race: impl Fn() -> (bool, bool) + Send + Sync + 'static) -> bool {
    let lost = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&lost);
    loom::model(move || {
        if race() == (true, false) {
            seen.store(true, Ordering::Relaxed);
        }
    });
    lost.load(Ordering::Relaxed)
}

/// The driver makes a request available while the device goes to sleep.
fn loses_kick(setup: Setup) -> bool {
    loses(move || {
        let (mut driver, mut queue) = ring(setup, false);
        let device = thread::spawn(move || !queue.enable_kick().unwrap());
        let kick = driver.publish().unwrap();
        (device.join().unwrap(), kick)
    })
}

/// The device uses a request while the driver goes to sleep.
fn loses_call(setup: Setup) -> bool {
    loses(move || {
        let (mut driver, mut queue) = ring(setup, true);
        let waiter = thread::spawn(move || !driver.enable_interrupts().unwrap());
        let call = queue.publish().unwrap();
        (waiter.join().unwrap(), call)
    })
}

const fn setup(bits: &[Bit]) -> Setup {
    Setup { features: Features::of(bits), driver_fenced: true, device_fenced: true }
}

const fn without_driver(bits: &[Bit]) -> Setup {
    Setup { driver_fenced: false, ..setup(bits) }
}

const fn without_device(bits: &[Bit]) -> Setup {
    Setup { device_fenced: false, ..setup(bits) }
}

macro_rules! each_format {
    ($($format:ident: $bits:expr;)*) => {
        $(mod $format {
            use super::*;

            const BITS: &[Bit] = &$bits;

            #[test]
            fn no_kick_is_lost_with_both_barriers_and_only_then() {
                assert!(!loses_kick(setup(BITS)));
                assert!(loses_kick(without_driver(BITS)), "the driver's is needed");
                assert!(loses_kick(without_device(BITS)), "the device's is needed");
            }

            #[test]
            fn no_call_is_lost_with_both_barriers_and_only_then() {
                assert!(!loses_call(setup(BITS)));
                assert!(loses_call(without_driver(BITS)), "the driver's is needed");
                assert!(loses_call(without_device(BITS)), "the device's is needed");
            }
        })*
    };
}

each_format! {
    split: [];
    split_with_event_idx: [Features::RING_EVENT_IDX];
    packed: [Features::RING_PACKED];
    packed_with_event_idx: [Features::RING_PACKED, Features::RING_EVENT_IDX];
}
