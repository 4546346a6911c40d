//! [`Load`]: work on a device in bursts, of which everything is verified. A fault is counted and does not end the test at once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::UdpSocket;
use std::ops::AddAssign;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vdpa_core::blk::kind;
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::net::{Ack, MAC_BYTES};
use vdpa_core::ring::Buffer;
use vdpa_core::types::Asid;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use super::net::{self, Net, RX, TX};
use super::robust::disk::{self, Disk, Flight, Q0};
use super::tap;

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
    /// Packets that a network has delivered twice, as it may after a crash.
    pub(crate) again: u64,
}

impl AddAssign for Faults {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.lost += other.lost;
        self.corrupt += other.corrupt;
        self.twice += other.twice;
        self.errors += other.errors;
        self.again += other.again;
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
    /// Its packets go through a network, which may lose or repeat the one that it has at a crash. [`prepare`] makes the network.
    pub(crate) wire: bool,
}

impl Kind {
    const fn disk(name: &'static str, mgmtdev: &'static str) -> Self {
        Self { name, mgmtdev, start: |path| Box::new(Blocks::start(path, false)), lossy: false, wire: false }
    }

    /// Packets that one crash may lose, and may repeat: one that is being received and one that waits for buffers; one that is being
    /// sent.
    pub(crate) const WIRE: u64 = 2;
}

/// Makes the network of the kinds that need one, for this thread and what it starts. `false` where that is not possible, which is said.
pub(crate) fn prepare() -> bool {
    tap::namespace(false).is_some()
}

/// The devices that survive. One more is one more line.
pub(crate) const KINDS: [Kind; 5] = [
    Kind { start: |path| Box::new(Blocks::start(path, false)), ..Kind::disk("split", "blk") },
    Kind { start: |path| Box::new(Blocks::start(path, true)), ..Kind::disk("packed", "blk") },
    Kind { start: |path| Box::new(Blocks::start(path, false)), ..Kind::disk("sim", "sim-blk") },
    Kind {
        name: "net",
        mgmtdev: "sim-net",
        start: |path| Box::new(Packets::start(path, None)),
        lossy: true,
        wire: false,
    },
    Kind {
        name: "card",
        mgmtdev: "net",
        start: |path| Box::new(Packets::start(path, Some(Echo::start()))),
        lossy: true,
        wire: true,
    },
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

/// Sends back on the host what a card sends to it.
struct Echo {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start() -> Self {
        let socket: UdpSocket = tap::host();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ends);
        let thread = thread::spawn(move || {
            let mut packet = [0; 2048];
            while !end.load(Ordering::Relaxed) {
                if let Ok((len, from)) = socket.recv_from(&mut packet) {
                    socket.send_to(&packet[..len], from).unwrap();
                }
            }
        });
        Self { ends, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

/// Packets that a network device returns, or that the host behind it sends back.
pub(crate) struct Packets {
    net: Net,
    echo: Option<Echo>,
    sent: [Buffer; SENT],
    rooms: [Buffer; 2 * SENT],
    /// What has come of a packet, and how many buffers of it are missing.
    partial: (Vec<u8>, u16),
    /// Numbers of packets that were sent and not received.
    missing: BTreeSet<u64>,
    next: u64,
    in_flight: u64,
}

/// Packets in a burst; there are receive buffers for twice as many.
const SENT: usize = 16;
/// Bytes of a packet behind its header.
const PACKET: usize = 600;
/// Bytes of a receive buffer of a card: a packet needs two of them.
const HALF: usize = 400;
/// Bytes of Ethernet, IP and UDP.
const HEADERS: usize = 42;
/// A command that changes nothing more when it is repeated: each burst has one.
const VLAN: [u8; 4] = [2, 0, 7, 0];

/// What the driver of a card negotiates.
const CARD: Features = Features::of(&[
    Features::NET_MRG_RXBUF,
    Features::NET_MAC,
    Features::NET_STATUS,
    Features::NET_CTRL_VQ,
    Features::NET_CTRL_VLAN,
    Features::VERSION_1,
    Features::ACCESS_PLATFORM,
]);

impl Packets {
    fn start(path: &Path, echo: Option<Echo>) -> Self {
        let mut net = match &echo {
            None => Net::start(path),
            Some(_) => Net::with(path, CARD, Asid(0), BackendFeatures(0x37e)),
        };
        let (sent, room) = if echo.is_some() { (HEADERS + PACKET, HALF) } else { (PACKET, 2048) };
        let sent = std::array::from_fn(|_| net.data.allocate(net::HEADER + sent));
        let rooms = std::array::from_fn(|_| net.data.allocate(room));
        let (missing, partial) = (BTreeSet::new(), (Vec::new(), 0));
        let mut this = Self { net, echo, sent, rooms, partial, missing, next: 0, in_flight: 0 };
        for room in 0..rooms.len() as u64 {
            this.offer(room);
        }
        this
    }

    fn offer(&mut self, room: u64) {
        let buffer = self.rooms[usize::try_from(room).unwrap()];
        let kick = self.echo.is_some();
        let rx = self.net.queue(RX);
        rx.ring.add(&[], &[buffer], room).unwrap();
        if rx.ring.publish().unwrap() && kick {
            rx.kick.signal();
        }
    }

    /// What is told from any other packet.
    fn contents(number: u64) -> Vec<u8> {
        let words = number.to_le_bytes().into_iter().chain(disk::pattern(number, 1));
        words.take(PACKET - MAC_BYTES).collect()
    }

    fn packet(&self, number: u64) -> Vec<u8> {
        let contents = Self::contents(number);
        let frame = match &self.echo {
            None => [&[0xff; MAC_BYTES][..], &contents].concat(),
            Some(_) => tap::udp(&contents, false),
        };
        [&[0; net::HEADER][..], &frame].concat()
    }

    /// Where the contents of a packet begin.
    fn at(&self) -> usize {
        net::HEADER + if self.echo.is_some() { HEADERS } else { MAC_BYTES }
    }

    /// Takes a packet that is there as a whole.
    fn judge(&mut self, packet: &[u8], faults: &mut Faults) {
        let contents = packet.get(self.at()..).unwrap_or_default();
        match contents.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)) {
            // The network changes the headers, the simulator nothing.
            Some(number)
                if contents == Self::contents(number)
                    && (self.echo.is_some() || packet == self.packet(number)) =>
            {
                if !self.missing.remove(&number) {
                    eprintln!("packet {number} was received twice");
                    *(if self.echo.is_some() { &mut faults.again } else { &mut faults.twice }) += 1;
                }
            }
            _ => {
                eprintln!("{} bytes that nobody has sent", packet.len());
                faults.corrupt += 1;
            }
        }
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
        let part = self.net.data.read(buffer, done.len);
        self.offer(done.token);
        if part.is_empty() && self.partial.1 == 0 && self.echo.is_some() {
            // The device has returned it.
            return true;
        }
        let (mut packet, left) = std::mem::take(&mut self.partial);
        packet.extend(part);
        let buffers =
            |packet: &[u8]| packet.get(10..12).map_or(1, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
        let left = if left > 0 { left - 1 } else { buffers(&packet).max(1) - 1 };
        if left > 0 && self.echo.is_some() {
            self.partial = (packet, left);
        } else {
            self.judge(&packet, faults);
        }
        true
    }
}

impl Load for Packets {
    fn begin(&mut self) {
        for slot in 0..self.sent.len() {
            let buffer = self.sent[slot];
            self.net.data.write(buffer, &self.packet(self.next));
            self.net.queue(TX).ring.add(&[buffer], &[], self.next).unwrap();
            self.missing.insert(self.next);
            self.next += 1;
            self.in_flight += 1;
        }
        self.net.queue(TX).ring.publish().unwrap();
        self.net.queue(TX).kick.signal();
        if self.echo.is_some() {
            self.net.begin_command(&VLAN);
        }
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
                break;
            }
            if self.in_flight == 0 {
                complete.get_or_insert(now);
            }
            if now > deadline || complete.is_some_and(|since| now > since + LATE) {
                faults.lost += self.in_flight + self.missing.len() as u64;
                self.missing.clear();
                break;
            }
            thread::sleep(Duration::from_micros(100));
        }
        if self.echo.is_some() {
            match self.net.end_command() {
                Some(Ack::Ok) => {}
                Some(Ack::Err) => faults.errors += 1,
                None => faults.lost += 1,
            }
        }
        faults
    }

    fn device(&self) -> &VhostVdpaFd {
        &self.net.device
    }
}
