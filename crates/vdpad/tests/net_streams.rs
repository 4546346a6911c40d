//! Streams through `net` with its offloads, between two kernels: that of the host, and the guest's in a network namespace of its own.
//! Every byte is compared.
#![expect(unsafe_code, reason = "an option of a socket is set")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "support/guest.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod guest;
#[path = "support/held.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod held;
#[path = "support/robust.rs"]
mod robust;
#[path = "support/streams.rs"]
mod streams;
#[path = "support/tap.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod tap;

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use vdpa_core::features::Features;
use vdpa_core::net::transmit::gso;

use guest::{FEATURES, Guest, Namespace, Seen, host_side, tcp_counter, without_offloads};
use held::{replace, upgrade};
use robust::Vdpad;

/// Number of upgrades and crashes, on a machine that has nothing else to do.
const UPDATES: &str = "VDPA_TEST_UPDATES";
/// Bytes of a stream.
const BYTES: u64 = 48 << 20;

/// A card in use.
struct Ground {
    vdpad: Vdpad,
    guest: Namespace,
    ends: Arc<AtomicBool>,
    driver: JoinHandle<Seen>,
}

impl Ground {
    fn new(features: Features, mtu: u16) -> Option<Self> {
        tap::namespace(false)?;
        host_side(mtu);
        let vdpad = held::start(&["--crash-limit", "60000"]);
        let line = format!("tap tap0 mac 52:54:11:12:34:56 mtu {mtu} packed on in_order on");
        let path = vdpad.add("net0", "net", &line);
        let (guest, interface) = Namespace::new(mtu);
        let ends = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ends);
        let driver = thread::spawn(move || {
            let mut driver = Guest::start(&path, interface, features);
            driver.run(None, |_| !end.load(Ordering::Relaxed));
            driver.seen
        });
        Some(Self { vdpad, guest, ends, driver })
    }

    fn end(self) -> Seen {
        self.ends.store(true, Ordering::Relaxed);
        self.driver.join().unwrap()
    }

    /// What a queue has counted.
    fn counter(&self, queue: u32, name: &str) -> u64 {
        let stats = self.vdpad.client().vstats("net0", Some(queue)).unwrap();
        stats.counters.into_iter().find(|(known, _)| known == name).unwrap().1
    }

    /// A connection from the guest to the host: the guest's end, and the host's.
    fn guest_to_host(&self, address: &'static str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).unwrap();
        let there = self.guest.connect(address);
        (there, listener.accept().unwrap().0)
    }

    /// A connection from the host to the guest: the host's end, and the guest's.
    fn host_to_guest(&self, address: &'static str) -> (TcpStream, TcpStream) {
        let listener = self.guest.listen(address);
        let here = TcpStream::connect(address).unwrap();
        (here, listener.accept().unwrap().0)
    }
}

/// One stream, of which every byte arrives.
fn stream((from, to): (TcpStream, TcpStream), seed: u64) {
    let receiver = thread::spawn(move || streams::verify(to, seed));
    let sent = streams::send(from, seed, |sent| sent < BYTES);
    assert_eq!(receiver.join().unwrap(), sent);
}

fn segmented(counts: &std::collections::BTreeMap<u8, u64>, kind: u8) -> u64 {
    counts.iter().filter(|(known, _)| **known & !gso::ECN == kind).map(|(_, count)| count).sum()
}

/// TCP both ways, of which the packets that segments were left in must be many.
fn tcp(features: Features, kind: u8, [host, guest]: [&'static str; 2]) -> Option<Seen> {
    let ground = Ground::new(features, 1500)?;
    stream(ground.guest_to_host(host), 1);
    stream(ground.host_to_guest(guest), 2);
    for (queue, name) in [(1, "bad_header"), (1, "refused"), (0, "too_long"), (0, "bad_buffers")] {
        assert_eq!(ground.counter(queue, name), 0, "{name}");
    }
    let seen = ground.end();
    println!("{seen:?}");
    assert!(segmented(&seen.sent, kind) > 100, "{seen:?}");
    Some(seen)
}

const IPV4: [&str; 2] = ["10.0.0.1:5001", "10.0.0.2:5002"];
const IPV6: [&str; 2] = ["[fd00::1]:5001", "[fd00::2]:5002"];

#[test]
fn tcp_over_ipv4_stays_in_one_piece_both_ways() {
    let Some(seen) = tcp(FEATURES, gso::TCPV4, IPV4) else { return };
    assert!(segmented(&seen.received, gso::TCPV4) > 100, "{seen:?}");
}

#[test]
fn tcp_over_ipv6_stays_in_one_piece_both_ways() {
    let Some(seen) = tcp(FEATURES, gso::TCPV6, IPV6) else { return };
    assert!(segmented(&seen.received, gso::TCPV6) > 100, "{seen:?}");
}

#[test]
fn large_packets_are_in_one_buffer_without_mergeable_ones() {
    let Some(seen) = tcp(FEATURES.without(Features::NET_MRG_RXBUF), gso::TCPV4, IPV4) else { return };
    assert!(segmented(&seen.received, gso::TCPV4) > 100, "{seen:?}");
}

#[test]
fn packed_rings() {
    let Some(seen) = tcp(FEATURES.with(Features::RING_PACKED), gso::TCPV4, IPV4) else { return };
    assert!(segmented(&seen.received, gso::TCPV4) > 100, "{seen:?}");
}

#[test]
fn without_event_indices() {
    let features = FEATURES.without(Features::RING_EVENT_IDX);
    for features in [features, features.with(Features::RING_PACKED)] {
        let Some(seen) = tcp(features, gso::TCPV4, IPV4) else { return };
        assert!(segmented(&seen.received, gso::TCPV4) > 100, "{seen:?}");
    }
}

/// A guest that takes no segments gets none: the kernel makes them, with their checksums.
#[test]
fn a_guest_without_offloads_gets_packets_as_on_a_wire() {
    let Some(seen) = tcp(without_offloads(FEATURES), gso::TCPV4, IPV4) else { return };
    assert_eq!(seen.received.keys().collect::<Vec<_>>(), [&gso::NONE], "{seen:?}");
}

/// Sends datagrams of `PART` bytes, several in one call (udp(7), `UDP_SEGMENT`), and receives them one by one.
fn datagrams(from: &UdpSocket, to: &UdpSocket, seed: u64) {
    const PART: usize = 1400;
    const PARTS: usize = 40;
    let part = libc::c_int::try_from(PART).unwrap();
    let len = libc::socklen_t::try_from(size_of_val(&part)).unwrap();
    // SAFETY: the option is an int, which is read during the call only.
    let set = unsafe {
        libc::setsockopt(from.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, (&raw const part).cast(), len)
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    let address = to.local_addr().unwrap();
    for round in 0..100 {
        let all = streams::bytes(seed + round, PART * PARTS);
        from.send_to(&all, address).unwrap();
        for part in all.chunks(PART) {
            let mut buffer = [0; 2 * PART];
            let len = to.recv(&mut buffer).unwrap();
            assert!(buffer[..len] == *part, "a datagram of round {round} differs");
        }
    }
}

#[test]
fn segments_of_udp_both_ways() {
    for [host, guest] in [["10.0.0.1:6001", "10.0.0.2:6002"], ["[fd00::1]:6001", "[fd00::2]:6002"]] {
        let Some(ground) = Ground::new(FEATURES, 1500) else { return };
        let here = UdpSocket::bind(host).unwrap();
        here.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        let there = ground.guest.udp(guest);
        datagrams(&there, &here, 10);
        datagrams(&here, &there, 20);
        let seen = ground.end();
        println!("{seen:?}");
        // The first one may wait for the address of the other side, in segments.
        assert!(segmented(&seen.sent, gso::UDP_L4) > 90, "{seen:?}");
        assert!(segmented(&seen.received, gso::UDP_L4) > 90, "{seen:?}");
    }
}

/// A stream each way while the daemon is replaced again and again. Every byte arrives; `on_time` if TCP is not to notice anything that it
/// waits for.
fn survives(replaced: fn(&Vdpad), rounds: u64, on_time: bool) {
    let Some(ground) = Ground::new(FEATURES, 1500) else { return };
    let ends = Arc::new(AtomicBool::new(false));
    let pairs = [ground.guest_to_host("10.0.0.1:5001"), ground.host_to_guest("10.0.0.2:5002")];
    let mut sides = Vec::new();
    for (seed, (from, to)) in (1..).zip(pairs) {
        let end = Arc::clone(&ends);
        let sender = thread::spawn(move || streams::send(from, seed, |_| !end.load(Ordering::Relaxed)));
        sides.push((sender, thread::spawn(move || streams::verify(to, seed))));
    }
    let timeouts = || tcp_counter("TCPTimeouts") + ground.guest.call(|| tcp_counter("TCPTimeouts"));
    let before = timeouts();
    for _ in 0..rounds {
        replaced(&ground.vdpad);
        thread::sleep(std::time::Duration::from_millis(50));
    }
    let during = timeouts() - before;
    ends.store(true, Ordering::Relaxed);
    let mut bytes = Vec::new();
    for (sender, receiver) in sides {
        let sent = sender.join().unwrap();
        assert_eq!(receiver.join().unwrap(), sent, "every byte arrives");
        bytes.push(sent);
    }
    println!("{rounds} rounds, {bytes:?} bytes, {during} timeouts of TCP; {:?}", ground.end());
    assert!(bytes.iter().all(|bytes| *bytes > rounds * 100_000), "{bytes:?}");
    // On a machine that is busy, TCP waits for its turn on a processor as well.
    let on_time = on_time && std::env::var_os(UPDATES).is_some();
    assert!(!on_time || during == 0, "{during} retransmission timeouts");
}

fn rounds() -> u64 {
    std::env::var(UPDATES).map_or(5, |number| number.parse().unwrap())
}

#[test]
fn streams_go_on_over_upgrades_of_the_daemon() {
    survives(upgrade, rounds(), true);
}

/// A packet that was on its way may be lost.
#[test]
fn streams_go_on_over_crashes_of_the_daemon() {
    survives(replace, rounds(), false);
}
