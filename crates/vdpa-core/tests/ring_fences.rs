//! The memory barriers between a side's store and its load of the other side's store, in every interleaving and with
//! every reordering that the memory model allows.
//!
//! One side publishes a request while the other enables notifications and decides whether to sleep. The wake-up is lost
//! if the second side sleeps and the first does not notify. Without one of the two barriers this must happen in some
//! execution; otherwise the test could not detect a missing barrier.
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

/// A ring area. The model checker tracks the words that synchronise the two sides. The other words are plain, because
/// they would multiply its work and are not tested here.
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

/// Memory without content: neither side accesses the buffers of a request.
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

/// A ring that has served one request, so that both sides have had their first notification. Both sides have disabled
/// notifications. A second request is added; with `in_flight` it is also published, popped and completed.
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

/// Runs `race` in all executions; it returns whether one side sleeps and whether the other notifies. Returns whether a
/// wake-up is lost in at least one execution.
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
                assert!(loses_kick(without_driver(BITS)), "the barrier of the driver is needed");
                assert!(loses_kick(without_device(BITS)), "the barrier of the device is needed");
            }

            #[test]
            fn no_call_is_lost_with_both_barriers_and_only_then() {
                assert!(!loses_call(setup(BITS)));
                assert!(loses_call(without_driver(BITS)), "the barrier of the driver is needed");
                assert!(loses_call(without_device(BITS)), "the barrier of the device is needed");
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
