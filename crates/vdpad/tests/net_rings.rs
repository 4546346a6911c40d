//! `net` with rings that the drivers of the library do not make, and with drivers that mean harm.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "support/net.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod net;
#[path = "support/raw_ring.rs"]
mod raw_ring;
mod support;
#[path = "support/tap.rs"]
mod tap;

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vdpa_control::client::Client;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Asid, Perm};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use net::{HEADER, IOVA, MEMORY, Net, RX, Space, TX};
use raw_ring::RawRing;
use support::daemon::Daemon;
use tap::{host, ip, namespace, udp};

const FEATURES: Features = Features::of(&[
    Features::NET_CSUM,
    Features::NET_GUEST_CSUM,
    Features::NET_HOST_TSO4,
    Features::NET_HOST_TSO6,
    Features::NET_HOST_USO,
    Features::NET_MAC,
    Features::NET_MRG_RXBUF,
    Features::VERSION_1,
    Features::ACCESS_PLATFORM,
]);

fn setup(attrs: &[(&str, &str)]) -> Option<(Daemon, PathBuf, UdpSocket)> {
    namespace(false)?;
    ip(&["link", "set", "tap0", "mtu", "9000"]);
    let daemon = Daemon::start();
    let base = [("tap", "tap0"), ("mac", "52:54:11:12:34:56"), ("mtu", "9000")];
    let path = daemon.add("net0", "net", &[&base[..], attrs].concat());
    Some((daemon, path, host()))
}

fn counter(daemon: &Daemon, queue: u16, name: &str) -> u64 {
    let client = Client::new(daemon.dir().join("control.sock")).unwrap();
    let stats = client.vstats("net0", Some(queue.into())).unwrap();
    stats.counters.into_iter().find(|(known, _)| known == name).unwrap().1
}

fn payload(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| at.to_le_bytes()[0].wrapping_mul(29) ^ at.to_le_bytes()[1] ^ seed).collect()
}

/// A driver with two rings written by hand.
struct Raw {
    device: VhostVdpaFd,
    space: Space,
    rx: RawRing,
    tx: RawRing,
}

impl Raw {
    fn start(path: &Path, features: Features) -> Self {
        let device = VhostVdpaFd::open(path).unwrap();
        device.set_owner().unwrap();
        device.set_backend_features(BackendFeatures(0x37e)).unwrap();
        let mut space = Space::new(Asid(0), IOVA);
        let in_order = features.has(Features::IN_ORDER);
        let (rx, tx) = (RawRing::new(RX, &mut space, in_order), RawRing::new(TX, &mut space, in_order));
        device.dma_map(space.asid, space.iova, MEMORY, space.map.addr() as u64, Perm::RW).unwrap();
        device.set_status(Status(3)).unwrap();
        device.set_features(features).unwrap();
        device.set_status(Status(0xb)).unwrap();
        rx.set_up(&device);
        tx.set_up(&device);
        device.set_status(Status(0xf)).unwrap();
        Self { device, space, rx, tx }
    }

    /// Makes a packet available, in pieces of these sizes and a last one.
    fn send(&mut self, packet: &[u8], pieces: &[usize], indirect: bool) {
        let (mut rest, mut buffers) = (packet, Vec::new());
        for len in pieces {
            let (piece, behind) = rest.split_at(*len);
            buffers.push(self.space.holding(piece));
            rest = behind;
        }
        buffers.push(self.space.holding(rest));
        self.tx.add(&mut self.space, &buffers, &[], indirect);
    }

    /// The next packet, which is in as many buffers as its header says.
    fn receive(&mut self) -> Vec<u8> {
        let mut packet = self.rx.answer(&self.space);
        for _ in 1..u16::from_le_bytes([packet[10], packet[11]]) {
            packet.extend(self.rx.answer(&self.space));
        }
        packet[HEADER + 42..].to_vec()
    }
}

fn both_ways(features: Features, indirect: bool) {
    let Some((daemon, path, host)) = setup(&[("in_order", "on")]) else { return };
    let mut raw = Raw::start(&path, features);
    // Several at once, so that one used element may stand for many.
    for seed in 0..10 {
        let packet = [&[0; HEADER][..], &udp(&payload(500, seed), false)].concat();
        raw.send(&packet, &[HEADER, 14, 1], indirect);
    }
    raw.tx.publish(&raw.space);
    for seed in 0..10 {
        assert!(raw.tx.answer(&raw.space).is_empty());
        let mut buffer = [0; 600];
        assert_eq!(host.recv(&mut buffer).unwrap(), 500);
        assert!(buffer[..500] == payload(500, seed), "packet {seed}");
    }
    // Sixteen requests, of three buffers each and 1,000 bytes.
    let offer = |raw: &mut Raw, count: usize| {
        for _ in 0..count {
            let parts = [12, 500, 488].map(|len| raw.space.allocate(len));
            raw.rx.add(&mut raw.space, &[], &parts, indirect);
        }
        raw.rx.publish(&raw.space);
    };
    offer(&mut raw, 16);
    for (seed, len) in (0..).zip([8000, 10, 946, 947, 3000]) {
        host.send_to(&payload(len, seed), "10.0.0.2:2000").unwrap();
    }
    for (seed, (len, requests)) in (0..).zip([(8000, 9), (10, 1), (946, 1), (947, 2), (3000, 4)]) {
        if len == 3000 {
            offer(&mut raw, 4);
        }
        assert!(raw.receive() == payload(len, seed), "{len} bytes in {requests} requests");
    }
    assert_eq!((counter(&daemon, RX, "packets"), counter(&daemon, TX, "packets")), (5, 10));
    assert!(raw.device.status().unwrap() == Status(0xf));
}

#[test]
fn indirect_tables() {
    both_ways(FEATURES.with(Features::RING_INDIRECT_DESC), true);
}

#[test]
fn chains() {
    both_ways(FEATURES, false);
}

#[test]
fn answers_in_order() {
    both_ways(FEATURES.with(Features::IN_ORDER), false);
}

#[test]
fn answers_in_order_with_indirect_tables() {
    both_ways(FEATURES.with(Features::IN_ORDER).with(Features::RING_INDIRECT_DESC), true);
}

/// Each value of each field of a header that is at a border, with many of the others: every packet is answered once, and counted once.
#[test]
fn no_header_stops_a_queue() {
    const AT_BORDERS: [u16; 14] = [0, 1, 13, 14, 33, 34, 53, 54, 141, 142, 143, 255, 0x7fff, 0xffff];
    const KINDS: [u8; 11] = [0, 1, 2, 3, 4, 5, 6, 0x7f, 0x80, 0x81, 0xff];
    let Some((daemon, path, host)) = setup(&[]) else { return };
    let mut net =
        Net::with(&path, FEATURES.without(Features::NET_MRG_RXBUF), Asid(0), BackendFeatures(0x37e));
    let frame = udp(&payload(100, 0), true);
    let buffer = net.data.allocate(HEADER + frame.len());
    let mut random = 1_u64;
    let mut choose = |from: &[u16]| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        from[usize::try_from(random >> 40).unwrap() % from.len()]
    };
    let mut sent = 0;
    for field in 0..6_usize {
        for round in 0..600_u16 {
            let mut fields =
                [34, 6, 0, 0].map(|usual| if round % 3 == 0 { usual } else { choose(&AT_BORDERS) });
            fields[2] = choose(&AT_BORDERS);
            let kinds = KINDS.map(u16::from);
            let [flags, gso] =
                [choose(&[0, 1, 1, 2, 3, 0xff]), choose(&kinds)].map(|value| value.to_le_bytes()[0]);
            let [start, offset, hdr_len, size] = fields;
            let mut header = [flags, gso, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            for (at, value) in [(2, hdr_len), (4, size), (6, start), (8, offset)] {
                header[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
            match field {
                0 => header[0] = round.to_le_bytes()[0],
                1 => header[1] = round.to_le_bytes()[0],
                other => {
                    let at = 2 * (other - 1);
                    let value = AT_BORDERS[usize::from(round) % AT_BORDERS.len()];
                    header[at..at + 2].copy_from_slice(&value.to_le_bytes());
                }
            }
            net.data.write(buffer, &[&header[..], &frame].concat());
            net.queue(TX).submit(&[buffer], &[], 0);
            assert_eq!(net.queue(TX).completion().len, 0, "{header:?}");
            sent += 1;
        }
    }
    let all = ["packets", "bad_header", "refused", "down"].map(|name| counter(&daemon, TX, name));
    println!("packets, bad headers, refused, down: {all:?} of {sent}");
    assert_eq!(all.iter().sum::<u64>(), sent, "each is counted once");
    assert!(all[0] > 0 && all[1] > 0, "{all:?}");
    // What was sent is over: the thread sleeps.
    let before = counter(&daemon, TX, "packets");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(counter(&daemon, TX, "packets"), before);
    host.set_nonblocking(true).unwrap();
    while host.recv(&mut [0; 200]).is_ok() {}
    host.set_nonblocking(false).unwrap();
    net.transmit(&[&[1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0][..], &frame].concat());
    assert_eq!(host.recv(&mut [0; 200]).unwrap(), 100, "a good packet is sent");
}

/// Buffers with lengths that make no sense are answered, and those behind them serve.
#[test]
fn no_length_of_a_buffer_stops_a_queue() {
    let Some((daemon, path, host)) = setup(&[]) else { return };
    let mut raw = Raw::start(&path, FEATURES);
    let mut bad = 0;
    for len in [1, 4, 11] {
        let room = raw.space.allocate(len);
        raw.rx.add(&mut raw.space, &[], &[room], false);
        bad += 1;
    }
    // Of no bytes, and with a part that the device is to read.
    let room = raw.space.allocate(64);
    raw.rx.add(&mut raw.space, &[room], &[room], false);
    bad += 1;
    raw.rx.publish(&raw.space);
    for _ in 0..bad {
        assert!(raw.rx.answer(&raw.space).is_empty());
    }
    assert_eq!(counter(&daemon, RX, "bad_buffers"), bad);
    let room = raw.space.allocate(2048);
    raw.rx.add(&mut raw.space, &[], &[room], false);
    raw.rx.publish(&raw.space);
    host.send_to(&payload(700, 3), "10.0.0.2:2000").unwrap();
    assert!(raw.receive() == payload(700, 3));
    // A packet of which a part is writable, one of nothing but a header, and one beyond what there is.
    let good = [&[0; HEADER][..], &udp(&payload(60, 1), false)].concat();
    let (all, header) = (raw.space.holding(&good), raw.space.holding(&[0; HEADER]));
    raw.tx.add(&mut raw.space, &[all], &[room], false);
    raw.tx.add(&mut raw.space, &[header], &[], false);
    raw.tx.add(&mut raw.space, &[all; 30], &[], false);
    raw.tx.add(&mut raw.space, &[all], &[], false);
    raw.tx.publish(&raw.space);
    for _ in 0..4 {
        raw.tx.answer(&raw.space);
    }
    assert_eq!(host.recv(&mut [0; 200]).unwrap(), 60);
    assert!(counter(&daemon, TX, "bad_header") >= 2);
}

/// A driver that breaks the protocol of a ring needs a reset; nothing else of the device, and no other driver, is harmed.
#[test]
fn a_loop_of_descriptors_needs_a_reset() {
    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;
    let Some((daemon, path, host)) = setup(&[]) else { return };
    for (queue, flags, indirect) in
        [(TX, NEXT, false), (RX, NEXT | 2, false), (TX, INDIRECT, true), (TX, NEXT, true)]
    {
        let features = if indirect { FEATURES.with(Features::RING_INDIRECT_DESC) } else { FEATURES };
        let mut raw = Raw::start(&path, features);
        let buffer = raw.space.allocate(64);
        // A table that has itself in it.
        let table = Buffer { len: 16, ..buffer };
        raw.space.write(
            table,
            &[&table.iova.to_le_bytes()[..], &16_u32.to_le_bytes(), &INDIRECT.to_le_bytes(), &[0, 0]]
                .concat(),
        );
        let ring = if queue == TX { &mut raw.tx } else { &mut raw.rx };
        ring.poke(&raw.space, 0, table, flags, 0);
        ring.offer(&raw.space, 0, Vec::new());
        ring.publish(&raw.space);
        let deadline = Instant::now() + Duration::from_secs(10);
        // Reception looks at its ring when there is a packet.
        while !raw.device.status().unwrap().contains(Status::NEEDS_RESET) {
            host.send_to(b"packet", "10.0.0.2:2000").unwrap();
            assert!(Instant::now() < deadline, "queue {queue}, flags {flags:#x} are no error");
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon.assert_alive();
    }
    let mut net =
        Net::with(&path, FEATURES.without(Features::NET_MRG_RXBUF), Asid(0), BackendFeatures(0x37e));
    net.transmit(&[&[0; HEADER][..], &udp(b"still there", false)].concat());
    let mut buffer = [0; 100];
    assert_eq!(host.recv(&mut buffer).unwrap(), 11);
}
