//! [`Load`]: work on a device in bursts, of which everything is verified. A fault is counted and does not end the test at once.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::AddAssign;
use std::path::Path;
use std::time::{Duration, Instant};

use vdpa_core::blk::kind;
use vdpa_core::net::MAC_BYTES;
use vdpa_core::ring::Buffer;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use super::net::{self, Net, RX, TX};
use super::robust::disk::{self, Disk, Flight, Q0};

/// Longest time for the answers to a burst.
const LIMIT: Duration = Duration::from_secs(20);
/// How long a packet that is not there may still come, when its transmission is complete.
const LATE: Duration = Duration::from_millis(500);
/// Requests in a burst.
pub(crate) const DEPTH: u64 = 32;

/// Numbers of requests, and of what went wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Faults {
    pub(crate) requests: u64,
    /// Never answered, or a packet that was never received.
    pub(crate) lost: u64,
    /// Read or received with other contents.
    pub(crate) corrupt: u64,
    /// Answered or received more than once, or without having been made.
    pub(crate) twice: u64,
    /// Answered with an error.
    pub(crate) errors: u64,
}

impl AddAssign for Faults {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.lost += other.lost;
        self.corrupt += other.corrupt;
        self.twice += other.twice;
        self.errors += other.errors;
    }
}

/// A device in use.
pub(crate) trait Load: Send {
    /// Makes at most [`DEPTH`] requests. None may be in flight.
    fn begin(&mut self);

    /// Waits for the answers and verifies them.
    fn end(&mut self) -> Faults;

    /// Asserts that a disk's file has everything whose write was answered.
    fn check_image(&self, _image: &Path) {}

    /// The device file.
    fn device(&self) -> &VhostVdpaFd;

    fn burst(&mut self) -> Faults {
        self.begin();
        self.end()
    }
}

/// A kind of device with its load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) mgmtdev: &'static str,
    pub(crate) start: fn(&Path) -> Box<dyn Load>,
    /// Packets that are lost with two crashes in a row, or with a program that does not note what it delivers: none of its answers is
    /// missing then.
    pub(crate) lossy: bool,
}

/// The devices that survive. One more is one more line.
pub(crate) const KINDS: [Kind; 4] = [
    Kind { name: "split", mgmtdev: "blk", start: |path| Box::new(Blocks::start(path, false)), lossy: false },
    Kind { name: "packed", mgmtdev: "blk", start: |path| Box::new(Blocks::start(path, true)), lossy: false },
    Kind {
        name: "sim",
        mgmtdev: "sim-blk",
        start: |path| Box::new(Blocks::start(path, false)),
        lossy: false,
    },
    Kind { name: "net", mgmtdev: "sim-net", start: |path| Box::new(Packets::start(path)), lossy: true },
];

/// Writes and reads of a block device: each burst reads what the one before has written.
pub(crate) struct Blocks {
    pub(crate) disk: Disk,
    /// Contents of the blocks by their seeds; a block whose write has failed is missing.
    seeds: BTreeMap<u64, u64>,
    round: u64,
}

impl Blocks {
    pub(crate) fn start(path: &Path, packed: bool) -> Self {
        let disk = Disk::start_with(path, disk::MEMORY_MIN, packed);
        Self { disk, seeds: BTreeMap::new(), round: 0 }
    }
}

impl Load for Blocks {
    fn begin(&mut self) {
        self.round += 1;
        let half = DEPTH / 2;
        let (written, read) = if self.round.is_multiple_of(2) { (0, half) } else { (half, 0) };
        for slot in 0..half {
            let block = written + slot;
            // Unknown until the answer is there.
            self.seeds.remove(&block);
            self.disk.submit(slot, (kind::OUT, block, self.round));
            if let Some(&seed) = self.seeds.get(&(read + slot)) {
                self.disk.submit(half + slot, (kind::IN, read + slot, seed));
            }
        }
        self.disk.kick();
    }

    fn end(&mut self) -> Faults {
        let mut faults = Faults { requests: self.disk.flying.len() as u64, ..Faults::default() };
        let deadline = Instant::now() + LIMIT;
        loop {
            loop {
                let next = self.disk.session.queue_mut(Q0).unwrap().reap();
                match next {
                    Ok(Some(done)) => match self.disk.flying.remove(&done.token) {
                        Some(flight) => self.judge(done.token, flight, &mut faults),
                        None => faults.twice += 1,
                    },
                    Ok(None) => break,
                    Err(error) => {
                        eprintln!("the ring: {error}");
                        faults.twice += 1;
                        return faults;
                    }
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if self.disk.flying.is_empty() {
                return faults;
            }
            if !self.disk.session.queue_mut(Q0).unwrap().wait(Some(left)).unwrap() && left.is_zero() {
                faults.lost += self.disk.flying.len() as u64;
                return faults;
            }
        }
    }

    fn check_image(&self, image: &Path) {
        let bytes = std::fs::read(image).unwrap();
        for (&block, &seed) in &self.seeds {
            let at = usize::try_from(block).unwrap() * disk::DATA as usize;
            assert!(
                bytes[at..at + disk::DATA as usize] == disk::pattern(block, seed),
                "block {block}, seed {seed}"
            );
        }
    }

    fn device(&self) -> &VhostVdpaFd {
        self.disk.session.ops()
    }
}

impl Blocks {
    fn judge(&mut self, slot: u64, (kind, block, seed): Flight, faults: &mut Faults) {
        if self.disk.answer(slot) != 0 {
            faults.errors += 1;
        } else if kind == kind::OUT {
            self.seeds.insert(block, seed);
        } else if self.disk.data(slot) != disk::pattern(block, seed) {
            eprintln!("block {block} does not hold seed {seed}");
            faults.corrupt += 1;
        }
    }
}

/// Packets that a network device returns.
pub(crate) struct Packets {
    net: Net,
    sent: [Buffer; SENT],
    rooms: [Buffer; 2 * SENT],
    /// Numbers of packets that were sent and not received.
    missing: BTreeSet<u64>,
    next: u64,
    in_flight: u64,
}

/// Packets in a burst; there are receive buffers for twice as many.
const SENT: usize = 16;
/// Bytes of a packet behind its header.
const PACKET: usize = 600;

impl Packets {
    pub(crate) fn start(path: &Path) -> Self {
        let mut net = Net::start(path);
        let sent = std::array::from_fn(|_| net.data.allocate(net::HEADER + PACKET));
        let rooms = std::array::from_fn(|_| net.data.allocate(2048));
        let mut this = Self { net, sent, rooms, missing: BTreeSet::new(), next: 0, in_flight: 0 };
        for room in 0..rooms.len() as u64 {
            this.offer(room);
        }
        this
    }

    fn offer(&mut self, room: u64) {
        let buffer = self.rooms[usize::try_from(room).unwrap()];
        let ring = &mut self.net.queue(RX).ring;
        ring.add(&[], &[buffer], room).unwrap();
        ring.publish().unwrap();
    }

    fn packet(number: u64) -> Vec<u8> {
        let words = number.to_le_bytes().into_iter().chain(disk::pattern(number, 1));
        let packet = [0; net::HEADER].into_iter().chain([0xff; MAC_BYTES]).chain(words);
        packet.take(net::HEADER + PACKET).collect()
    }

    fn receive(&mut self, faults: &mut Faults) -> bool {
        let done = match self.net.queue(RX).ring.pop_used() {
            Ok(Some(done)) => done,
            Ok(None) => return false,
            Err(error) => {
                eprintln!("the receive ring: {error}");
                faults.twice += 1;
                return false;
            }
        };
        let buffer = self.rooms[usize::try_from(done.token).unwrap()];
        let packet = self.net.data.read(buffer, done.len);
        let at = net::HEADER + MAC_BYTES;
        match packet.get(at..at + 8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())) {
            Some(number) if packet == Self::packet(number) => {
                if !self.missing.remove(&number) {
                    eprintln!("packet {number} was received twice");
                    faults.twice += 1;
                }
            }
            _ => faults.corrupt += 1,
        }
        self.offer(done.token);
        true
    }
}

impl Load for Packets {
    fn begin(&mut self) {
        for slot in 0..self.sent.len() {
            let buffer = self.sent[slot];
            self.net.data.write(buffer, &Self::packet(self.next));
            self.net.queue(TX).ring.add(&[buffer], &[], self.next).unwrap();
            self.missing.insert(self.next);
            self.next += 1;
            self.in_flight += 1;
        }
        self.net.queue(TX).ring.publish().unwrap();
        self.net.queue(TX).kick.signal();
    }

    fn end(&mut self) -> Faults {
        let mut faults = Faults { requests: self.in_flight, ..Faults::default() };
        let deadline = Instant::now() + LIMIT;
        let mut complete = None;
        loop {
            match self.net.queue(TX).ring.pop_used() {
                Ok(Some(_)) => {
                    self.in_flight -= 1;
                    continue;
                }
                Ok(None) => {}
                Err(error) => {
                    eprintln!("the transmit ring: {error}");
                    faults.twice += 1;
                    return faults;
                }
            }
            if self.receive(&mut faults) {
                continue;
            }
            let now = Instant::now();
            if self.in_flight == 0 && self.missing.is_empty() {
                return faults;
            }
            if self.in_flight == 0 {
                complete.get_or_insert(now);
            }
            if now > deadline || complete.is_some_and(|since| now > since + LATE) {
                faults.lost += self.in_flight + self.missing.len() as u64;
                self.missing.clear();
                return faults;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn device(&self) -> &VhostVdpaFd {
        &self.net.device
    }
}
