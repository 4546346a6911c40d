//! [`Guest`]: a driver of a card that passes packets between it and a TAP interface in another network namespace. The kernel there is
//! the guest: what its sockets see is what a guest behind the card sees.
#![expect(unsafe_code, reason = "a thread enters a network namespace of its own")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vdpa_client::Session;
use vdpa_client::device::Device;
use vdpa_client::state::{Section, Sections};
use vdpa_core::features::Features;
use vdpa_core::net::NetHeader;
use vdpa_core::net::card::GUEST_OFFLOADS;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::memfd;
use vdpa_sys::tap::{self, Open, offload};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;
use zerocopy::FromBytes;

use super::tap::ip;

pub(crate) const RX: QueueIndex = QueueIndex(0);
pub(crate) const TX: QueueIndex = QueueIndex(1);
const CONTROL: QueueIndex = QueueIndex(2);

/// All that a kernel takes and gives on a card with one pair.
pub(crate) const FEATURES: Features = Features::of(&[
    Features::NET_CSUM,
    Features::NET_MTU,
    Features::NET_MAC,
    Features::NET_STATUS,
    Features::NET_MRG_RXBUF,
    Features::NET_CTRL_VQ,
    Features::NET_CTRL_RX,
    Features::NET_HOST_TSO4,
    Features::NET_HOST_TSO6,
    Features::NET_HOST_ECN,
    Features::NET_HOST_USO,
    Features::NET_GUEST_CSUM,
    Features::NET_GUEST_TSO4,
    Features::NET_GUEST_TSO6,
    Features::NET_GUEST_ECN,
    Features::NET_GUEST_USO4,
    Features::NET_GUEST_USO6,
    Features::RING_EVENT_IDX,
]);

const RAM: u64 = 32 << 20;
const IOVA: u64 = 0x1_0000_0000;
/// Entries of a ring, and bytes for it.
const RING: u16 = 256;
const RING_BYTES: u64 = 0x4000;
/// Transmit buffers, each for the largest packet.
const SLOTS: u64 = 64;
const SLOT: u64 = 0x1_1000;
const TX_AT: u64 = 1 << 20;
const RX_AT: u64 = 8 << 20;
/// Bytes of a mergeable receive buffer.
const ROOM: u64 = 4096;
const HEADER: usize = size_of::<NetHeader>();
/// Name of the section with the transmit buffers in flight.
pub(crate) const SECTION: &str = "test/sent";

/// How many packets have gone each way, by their kind of segments (0: none).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) sent: BTreeMap<u8, u64>,
    pub(crate) received: BTreeMap<u8, u64>,
    /// Buffers that came back without a packet.
    pub(crate) empty: u64,
}

/// The driver.
pub(crate) struct Guest {
    pub(crate) session: Session<VhostVdpaFd>,
    tap: OwnedFd,
    /// Transmit buffers in flight.
    flying: BTreeSet<u64>,
    pub(crate) seen: Seen,
    packet: Vec<u8>,
}

impl Guest {
    /// Opens and runs the card, with these features as far as it has them.
    pub(crate) fn start(path: &Path, tap: OwnedFd, features: Features) -> Self {
        let device = Device::<VhostVdpaFd>::open(path).unwrap();
        let mut session = device.negotiate(features).unwrap();
        let ram = memfd::create(c"guest", RAM, None).unwrap();
        session.map_memfd("ram", ram, IOVA, RAM, Perm::RW).unwrap();
        for (at, queue) in [RX, TX, CONTROL].into_iter().enumerate() {
            session.add_queue(queue, RING, "ram", at as u64 * RING_BYTES).unwrap();
        }
        session.start().unwrap();
        let mut this = Self::over(session, tap, BTreeSet::new());
        (0..this.rooms()).for_each(|room| this.offer(room));
        this.session.queue_mut(RX).unwrap().notify().unwrap();
        this
    }

    /// Goes on with what another one had.
    pub(crate) fn adopt(session: Session<VhostVdpaFd>, tap: OwnedFd, section: &Section) -> Self {
        let flying: BTreeSet<u64> = section.parse(1).unwrap();
        let mut this = Self::over(session, tap, flying);
        // What was published without a kick.
        for queue in [RX, TX] {
            this.session.queue_mut(queue).unwrap().notify().unwrap();
            this.session.queue(queue).unwrap().kick().signal();
        }
        this
    }

    fn over(session: Session<VhostVdpaFd>, tap: OwnedFd, flying: BTreeSet<u64>) -> Self {
        set_offloads(&tap, session.features());
        Self { session, tap, flying, seen: Seen::default(), packet: vec![0; 0x1_2000] }
    }

    pub(crate) fn tap(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }

    /// What [`adopt`](Self::adopt) needs.
    pub(crate) fn late(&self) -> Sections {
        Sections::from_iter([Section::json(SECTION, 1, &self.flying).unwrap()])
    }

    fn is_mergeable(&self) -> bool {
        self.session.features().has(Features::NET_MRG_RXBUF)
    }

    fn rooms(&self) -> u64 {
        if self.is_mergeable() { RING.into() } else { SLOTS }
    }

    fn room(&self, room: u64) -> Buffer {
        let len = if self.is_mergeable() { ROOM } else { SLOT };
        Buffer { iova: IOVA + RX_AT + room * len, len: u32::try_from(len).unwrap() }
    }

    fn offer(&mut self, room: u64) {
        let buffer = self.room(room);
        self.session.queue_mut(RX).unwrap().submit(&[], &[buffer], room).unwrap();
    }

    fn read(&self, room: u64, to: &mut [u8]) {
        let at = usize::try_from(self.room(room).iova - IOVA).unwrap();
        self.session.region("ram").unwrap().map().unwrap().read(at, to).unwrap();
    }

    /// Passes packets on until `more` says that it is enough; asked when one of these descriptors can be read, and every 100 ms.
    pub(crate) fn run(&mut self, also: Option<BorrowedFd<'_>>, mut more: impl FnMut(&Self) -> bool) {
        while more(self) {
            self.receive();
            self.transmit();
            let waiting = [RX, TX].map(|queue| self.session.queue_mut(queue).unwrap().arm().unwrap());
            if waiting.contains(&true) {
                continue;
            }
            let calls = [RX, TX].map(|queue| self.session.queue(queue).unwrap().call());
            let mut fds: Vec<_> = calls.iter().map(|call| PollFd::new(*call, PollFlags::IN)).collect();
            if (self.flying.len() as u64) < SLOTS {
                fds.push(PollFd::new(&self.tap, PollFlags::IN));
            }
            fds.extend(also.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
            let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }));
        }
    }

    /// From the card to the guest.
    fn receive(&mut self) {
        let mut offered = false;
        while let Some(done) = self.session.queue_mut(RX).unwrap().reap().unwrap() {
            offered = true;
            let len = usize::try_from(done.len).unwrap();
            if len < HEADER {
                self.seen.empty += 1;
                self.offer(done.token);
                continue;
            }
            let mut packet = std::mem::take(&mut self.packet);
            self.read(done.token, &mut packet[..len]);
            self.offer(done.token);
            let header = NetHeader::read_from_bytes(&packet[..HEADER]).unwrap();
            let mut end = len;
            for _ in 1..header.num_buffers.get() {
                // A packet is published as a whole.
                let next = self.session.queue_mut(RX).unwrap().reap().unwrap().unwrap();
                let len = usize::try_from(next.len).unwrap();
                self.read(next.token, &mut packet[end..end + len]);
                self.offer(next.token);
                end += len;
            }
            *self.seen.received.entry(header.gso_type).or_default() += 1;
            assert_eq!(rustix::io::write(&self.tap, &packet[..end]), Ok(end), "{header:?}, {end} bytes");
            self.packet = packet;
        }
        if offered {
            self.session.queue_mut(RX).unwrap().notify().unwrap();
        }
    }

    /// From the guest to the card.
    fn transmit(&mut self) {
        while let Some(done) = self.session.queue_mut(TX).unwrap().reap().unwrap() {
            assert!(self.flying.remove(&done.token), "{done:?} was not in flight");
        }
        let mut sent = false;
        while let Some(slot) = (0..SLOTS).find(|slot| !self.flying.contains(slot)) {
            let Ok(len) = rustix::io::read(&self.tap, &mut self.packet) else { break };
            *self.seen.sent.entry(self.packet[1]).or_default() += 1;
            let at = TX_AT + slot * SLOT;
            let map = self.session.region("ram").unwrap().map().unwrap();
            map.write(usize::try_from(at).unwrap(), &self.packet[..len]).unwrap();
            let packet = Buffer { iova: IOVA + at, len: u32::try_from(len).unwrap() };
            self.session.queue_mut(TX).unwrap().submit(&[packet], &[], slot).unwrap();
            self.flying.insert(slot);
            sent = true;
        }
        if sent {
            self.session.queue_mut(TX).unwrap().notify().unwrap();
        }
    }
}

/// The guest's interface hands over what the card takes.
fn set_offloads(tap: &OwnedFd, features: Features) {
    let pairs = [
        (Features::NET_CSUM, offload::CSUM),
        (Features::NET_HOST_TSO4, offload::TSO4),
        (Features::NET_HOST_TSO6, offload::TSO6),
        (Features::NET_HOST_ECN, offload::TSO_ECN),
        (Features::NET_HOST_USO, offload::USO4 | offload::USO6),
    ];
    let all = pairs.into_iter().filter(|(bit, _)| features.has(*bit)).fold(0, |all, (_, one)| all | one);
    tap::set_offloads(tap, all).unwrap();
}

/// All offloads of the guest.
pub(crate) fn without_offloads(features: Features) -> Features {
    Features(features.0 & !GUEST_OFFLOADS.0)
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with the interface `eth0`: the guest's, with the addresses 10.0.0.2 and fd00::2.
pub(crate) struct Namespace {
    jobs: mpsc::Sender<Job>,
}

impl Namespace {
    /// Makes it, and returns what a driver passes packets to and from.
    pub(crate) fn new(mtu: u16) -> (Self, OwnedFd) {
        let (jobs, waiting) = mpsc::channel::<Job>();
        let (sender, made) = mpsc::channel();
        thread::spawn(move || {
            // SAFETY: a network namespace concerns neither memory nor descriptors.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
            let tap = tap::open("eth0", Open { multi_queue: false, create: true }).unwrap();
            ip(&["link", "set", "lo", "up"]);
            ip(&["link", "set", "eth0", "address", "52:54:11:12:34:56", "mtu", &mtu.to_string(), "up"]);
            ip(&["addr", "add", "10.0.0.2/24", "dev", "eth0"]);
            ip(&["addr", "add", "fd00::2/64", "dev", "eth0", "nodad"]);
            sender.send(tap).unwrap();
            waiting.into_iter().for_each(|job| job());
        });
        (Self { jobs }, made.recv().unwrap())
    }

    /// Calls `job` in it: sockets that it makes belong there.
    pub(crate) fn call<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, result) = mpsc::channel();
        self.jobs.send(Box::new(move || sender.send(job()).unwrap())).unwrap();
        result.recv().unwrap()
    }

    pub(crate) fn listen(&self, address: &'static str) -> TcpListener {
        self.call(move || TcpListener::bind(address).unwrap())
    }

    pub(crate) fn connect(&self, address: &'static str) -> TcpStream {
        self.call(move || TcpStream::connect(address).unwrap())
    }

    pub(crate) fn udp(&self, address: &'static str) -> UdpSocket {
        self.call(move || {
            let socket = UdpSocket::bind(address).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            socket
        })
    }
}

/// Gives the host's side of the card its addresses, 10.0.0.1 and fd00::1, and has it up.
pub(crate) fn host_side(mtu: u16) {
    std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "0").unwrap();
    ip(&["link", "set", "lo", "up"]);
    ip(&["link", "set", "tap0", "mtu", &mtu.to_string(), "up"]);
    ip(&["addr", "add", "10.0.0.1/24", "dev", "tap0"]);
    ip(&["addr", "add", "fd00::1/64", "dev", "tap0", "nodad"]);
}

/// A counter of TCP in the network namespace of this thread, such as `TCPTimeouts`.
pub(crate) fn tcp_counter(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("TcpExt:")).collect();
    let [names, values] = lines[..] else { panic!("{text}") };
    let at = names.split(' ').position(|known| known == name).unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}
