//! A device process that is killed at random instants, and successors that continue its rings from the in-flight log.
//!
//! This program plays all parts: the driver, and with the argument `device` the device.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "worker_crash/device.rs"]
mod device;
#[path = "worker_crash/driver.rs"]
mod driver;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use vdpa_backend::worker::log_words;
use vdpa_core::features::Features;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::shared_words::SharedWords;

use driver::{Driver, FULL};

/// Bytes of client memory, and where in it the ring and the buffers are.
const MEMORY: u64 = 1 << 20;
const DESC: u64 = 0;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
const BUFFERS: u64 = 0x10000;
/// Entries of the ring.
const SIZE: u16 = 64;
/// A request with this number kills the device.
const DEADLY: u64 = u64::MAX;
/// Within this time a device answers, on a machine that is busy.
const LIMIT: Duration = Duration::from_secs(20);

/// What the device answers to a request.
const fn answer(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) ^ 0x5bd1_e995
}

/// A ring of which the device may die.
struct Bench {
    features: Features,
    kind: &'static str,
    memory: SharedMap,
    driver: Driver,
    kick: EventFd,
    call: EventFd,
    /// Kept for the children, which inherit them.
    files: [OwnedFd; 2],
    /// Requests that were added and not answered, by token: their numbers.
    open: HashMap<u64, u64>,
    free: Vec<u64>,
    next: u64,
    answered: u64,
    poisoned: HashSet<u64>,
}

impl Bench {
    fn new(kind: &'static str, features: Features) -> Self {
        let file = vdpa_sys::memfd::create(c"client", MEMORY, None).unwrap();
        let memory = SharedMap::map(&file, 0, usize::try_from(MEMORY).unwrap(), Prot::RW, false).unwrap();
        let (log, _) = SharedWords::create(c"log", log_words(SIZE)).unwrap();
        let (kick, call) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        for fd in [file.as_fd(), log.as_fd(), kick.as_fd(), call.as_fd()] {
            fcntl_setfd(fd, FdFlags::empty()).unwrap();
        }
        let driver = Driver::new(&memory, features);
        let free = (0..u64::from(SIZE) / 2).collect();
        Self {
            features,
            kind,
            memory,
            driver,
            kick,
            call,
            files: [file, log],
            open: HashMap::new(),
            free,
            next: 1,
            answered: 0,
            poisoned: HashSet::new(),
        }
    }

    fn spawn(&self) -> Device {
        let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().to_string();
        let [memory, log] = &self.files;
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["device", self.kind, &self.features.0.to_string()])
            .args([memory.as_fd(), log.as_fd(), self.kick.as_fd(), self.call.as_fd()].map(number))
            .spawn();
        Device(child.unwrap())
    }

    fn add(&mut self, number: u64) {
        let Some(token) = self.free.pop() else { return };
        let at = usize::try_from(BUFFERS + token * 64).unwrap();
        self.memory.store_u64(at, number).unwrap();
        self.memory.store_u64(at + 32, 0).unwrap();
        self.driver.add(token);
        assert_eq!(self.open.insert(token, number), None);
    }

    fn submit(&mut self) {
        while !self.free.is_empty() {
            self.add(self.next);
            self.next += 1;
        }
        if self.driver.publish() {
            self.kick.signal();
        }
    }

    /// Takes the answers that there are and checks them.
    fn collect(&mut self) -> usize {
        let _ = self.call.drain();
        let mut count = 0;
        while let Some((token, len)) = self.driver.pop() {
            // The driver refuses what is not in flight, so a request that is answered twice is found there or here.
            let number = self.open.remove(&token).expect("an answer to a request that was made");
            let found = self.memory.load_u64(usize::try_from(BUFFERS + token * 64 + 32).unwrap()).unwrap();
            if len == FULL {
                assert_eq!(found, answer(number), "request {number}");
            } else {
                assert_eq!(len, 0, "request {number}");
                self.poisoned.insert(number);
            }
            self.free.push(token);
            self.answered += 1;
            count += 1;
        }
        count
    }

    /// Waits until all requests are answered; the call eventfd must say when.
    fn drain(&mut self) {
        let deadline = Instant::now() + LIMIT;
        while !self.open.is_empty() {
            assert!(Instant::now() < deadline, "{} requests are not answered", self.open.len());
            if self.collect() == 0 && !self.driver.enable_interrupts() {
                assert!(self.call.wait(Some(LIMIT)), "no interrupt, {} requests open", self.open.len());
            }
        }
    }
}

struct Device(Child);

impl Device {
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// xorshift64.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Kills the device again and again under load.
fn killed(kind: &'static str, features: Features) {
    const KILLS: u32 = 40;
    let seed = u64::from(std::process::id()) << 20 | 1;
    let mut state = seed;
    let mut bench = Bench::new(kind, features);
    for _ in 0..KILLS {
        let mut device = bench.spawn();
        // From before it has started to long after that.
        let life = Duration::from_micros(random(&mut state) % 25_000);
        let end = Instant::now() + life;
        while Instant::now() < end {
            bench.submit();
            if bench.collect() == 0 && !bench.driver.enable_interrupts() {
                let _ = bench.call.wait(Some(end.saturating_duration_since(Instant::now())));
            }
        }
        device.kill();
    }
    let _device = bench.spawn();
    bench.submit();
    bench.drain();
    bench.submit();
    bench.drain();
    assert_eq!(bench.answered, bench.next - 1);
    let (answered, poisoned) = (bench.answered, bench.poisoned.len());
    println!(
        "{kind} {features}: {KILLS} kills, {answered} answered, {poisoned} of them as poison (seed {seed})"
    );
}

/// A request that kills the device is tried three times, the last time alone. No other is refused.
fn poison(kind: &'static str, features: Features) {
    let mut bench = Bench::new(kind, features);
    for number in [1, DEADLY, 2] {
        bench.add(number);
    }
    assert!(bench.driver.publish());
    bench.kick.signal();
    for _ in 0..3 {
        let mut device = bench.spawn();
        assert!(!device.0.wait().unwrap().success());
    }
    let _device = bench.spawn();
    bench.drain();
    assert_eq!(bench.poisoned, HashSet::from([DEADLY]));
    bench.submit();
    bench.drain();
}

fn features(bits: &[vdpa_core::features::Bit]) -> Features {
    bits.iter()
        .fold(Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]), |all, &bit| all.with(bit))
}

const TESTS: [(&str, fn()); 9] = [
    ("killed_split", || killed("simple", features(&[]))),
    ("killed_split_event_idx", || killed("batch", features(&[Features::RING_EVENT_IDX]))),
    ("killed_split_in_order", || killed("simple", features(&[Features::IN_ORDER]))),
    ("killed_split_in_order_batch", || killed("batch", features(&[Features::IN_ORDER]))),
    ("killed_packed", || killed("simple", features(&[Features::RING_PACKED]))),
    ("killed_packed_batch", || killed("batch", features(&[Features::RING_PACKED, Features::RING_EVENT_IDX]))),
    ("poison_split", || poison("simple", features(&[]))),
    ("poison_in_order", || poison("simple", features(&[Features::IN_ORDER]))),
    ("poison_packed", || poison("batch", features(&[Features::RING_PACKED]))),
];

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let ["device", kind, features, fds @ ..] = &words[..] {
        device::run(kind, Features(features.parse().unwrap()), fds);
    } else {
        run_tests(&words);
    }
}

/// As much of libtest's command line as cargo and nextest use.
fn run_tests(words: &[&str]) {
    let ignored = words.contains(&"--ignored");
    let filter = words.iter().find(|word| !word.starts_with('-') && **word != "terse");
    for (name, test) in TESTS {
        if ignored || filter.is_some_and(|filter| !name.contains(filter)) {
            continue;
        }
        if words.contains(&"--list") {
            println!("{name}: test");
        } else {
            test();
            println!("test {name} ... ok");
        }
    }
}
