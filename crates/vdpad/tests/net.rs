//! `net` of a real daemon, on a TAP interface in a network namespace that ends with the test. The host side is the kernel's UDP and TCP.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "support/net.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod net;
mod support;
#[path = "support/tap.rs"]
mod tap;

use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use vdpa_control::client::Client;
use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::net::Ack;
use vdpa_core::ops::{VdpaOps as _, read_all_config};
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Asid, QueueIndex};

use net::{CONTROL, HEADER, Net, RX, TX};
use support::daemon::Daemon;
use tap::{MAC, fold, host, ip, namespace, sum, udp};

const OTHER: [u8; 6] = [0x52, 0x54, 0x11, 0x12, 0x34, 0x57];
/// All that is tested, without MQ and without mergeable buffers.
const FEATURES: Features = Features::of(&[
    Features::NET_CSUM,
    Features::NET_GUEST_CSUM,
    Features::NET_MTU,
    Features::NET_MAC,
    Features::NET_HOST_TSO4,
    Features::NET_STATUS,
    Features::NET_CTRL_VQ,
    Features::NET_CTRL_RX,
    Features::NET_CTRL_VLAN,
    Features::NET_GUEST_ANNOUNCE,
    Features::NET_CTRL_MAC_ADDR,
    Features::VERSION_1,
    Features::ACCESS_PLATFORM,
]);

fn setup(attrs: &[(&str, &str)]) -> Option<(Daemon, PathBuf, UdpSocket)> {
    namespace(false)?;
    let daemon = Daemon::start();
    let base = [("tap", "tap0"), ("mac", "52:54:11:12:34:56")];
    let path = daemon.add("net0", "net", &[&base[..], attrs].concat());
    Some((daemon, path, host()))
}

/// A packet with a header, whose fields from `flags` to `csum_offset` are given.
fn with_header(flags: u8, gso: u8, fields: [u16; 4], frame: &[u8]) -> Vec<u8> {
    let fields: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
    [&[flags, gso][..], &fields, &[0, 0], frame].concat()
}

fn plain(frame: &[u8]) -> Vec<u8> {
    with_header(0, 0, [0; 4], frame)
}

fn payload(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| at.to_le_bytes()[0].wrapping_mul(31) ^ at.to_le_bytes()[1] ^ seed).collect()
}

fn start(path: &std::path::Path, features: Features) -> Net {
    let backend = vdpa_core::features::BackendFeatures(0x37e);
    Net::with(path, features, Asid(1), backend)
}

/// Offers a buffer, and kicks.
fn offer(net: &mut Net, len: usize) {
    net.offer(len);
    net.queue(RX).kick.signal();
}

fn counter(daemon: &Daemon, queue: u16, name: &str) -> u64 {
    let client = Client::new(daemon.dir().join("control.sock")).unwrap();
    let stats = client.vstats("net0", Some(queue.into())).unwrap();
    stats.counters.into_iter().find(|(known, _)| known == name).unwrap().1
}

fn vdpactl(daemon: &Daemon, line: &str) -> support::Outcome {
    support::vdpactl(&daemon.dir().join("control.sock"), line)
}

/// Receives into `net` what the host sends, and returns what is behind the UDP header.
fn receive(net: &mut Net) -> Vec<u8> {
    let packet = net.receive();
    assert_eq!(packet[10..12], [1, 0], "one buffer");
    assert_eq!(packet[HEADER..HEADER + 6], MAC);
    packet[HEADER + 42..].to_vec()
}

#[test]
fn packets_go_both_ways() {
    let Some((daemon, path, host)) = setup(&[]) else { return };
    let mut net = start(&path, FEATURES);
    for len in [0, 1, 100, 1472] {
        let data = payload(len, 7);
        net.transmit(&plain(&udp(&data, false)));
        let mut buffer = [0; 2000];
        let (received, from) = host.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..received], from.to_string()), (&data[..], "10.0.0.2:2000".into()));
        offer(&mut net, 2048);
        host.send_to(&data, from).unwrap();
        assert_eq!(receive(&mut net), data);
    }
    assert_eq!((counter(&daemon, TX, "packets"), counter(&daemon, RX, "packets")), (4, 4));
    let sent: u64 = [0, 1, 100, 1472].iter().map(|len| len + 42).sum();
    assert_eq!((counter(&daemon, TX, "bytes"), counter(&daemon, RX, "bytes")), (sent, sent));
}

#[test]
fn the_kernel_completes_a_checksum_and_leaves_one_out() {
    let Some((_daemon, path, host)) = setup(&[]) else { return };
    let mut net = start(&path, FEATURES);
    let data = payload(999, 3);
    net.transmit(&with_header(1, 0, [0, 0, 34, 6], &udp(&data, true)));
    let mut buffer = [0; 2000];
    assert_eq!(host.recv(&mut buffer).unwrap(), 999);
    assert_eq!(buffer[..999], data);
    offer(&mut net, 2048);
    host.send_to(&data, "10.0.0.2:2000").unwrap();
    let packet = net.receive();
    assert_eq!((packet[0], &packet[6..10]), (1, &[34, 0, 6, 0][..]), "the checksum is the driver's");
    drop(net);
    // A driver that takes none gets one.
    let mut net = start(&path, FEATURES.without(Features::NET_GUEST_CSUM));
    offer(&mut net, 2048);
    host.send_to(&data, "10.0.0.2:2000").unwrap();
    let packet = net.receive();
    assert_eq!(packet[0], 0);
    let udp = &packet[HEADER + 34..];
    let pseudo = sum(&packet[HEADER + 26..HEADER + 34]) + 17 + u32::try_from(udp.len()).unwrap();
    assert_eq!(fold(pseudo + sum(udp)), 0xffff);
}

#[test]
fn a_full_ring_leaves_packets_at_the_interface() {
    let Some((daemon, path, host)) = setup(&[]) else { return };
    let mut net = start(&path, FEATURES);
    for n in 0..30 {
        host.send_to(&payload(500, n), "10.0.0.2:2000").unwrap();
    }
    net.queue(RX).stays_silent();
    for n in 0..30 {
        offer(&mut net, 2048);
        assert_eq!(receive(&mut net), payload(500, n));
    }
    assert_eq!(counter(&daemon, RX, "packets"), 30);
}

#[test]
fn a_large_packet_is_in_several_buffers_and_waits_for_them() {
    let Some((daemon, path, host)) = setup(&[("mtu", "9000")]) else { return };
    ip(&["link", "set", "tap0", "mtu", "9000"]);
    let mut net = start(&path, FEATURES.with(Features::NET_MRG_RXBUF));
    let data = payload(8000, 1);
    for seed in 0..3 {
        let data = payload(8000, seed);
        for _ in 0..6 {
            offer(&mut net, 1000);
        }
        host.send_to(&data, "10.0.0.2:2000").unwrap();
        net.queue(RX).stays_silent();
        for _ in 0..3 {
            offer(&mut net, 1000);
        }
        let parts: Vec<_> = (0..9).map(|_| net.receive()).collect();
        assert_eq!(parts[0][10..12], [9, 0]);
        assert!(parts[..8].iter().all(|part| part.len() == 1000));
        assert_eq!(parts.concat()[HEADER + 42..], data);
    }
    assert_eq!((counter(&daemon, RX, "waits"), counter(&daemon, RX, "packets")), (3, 3));
    drop(net);
    // Without mergeable buffers it has no room, and does not stop the others.
    let mut net = start(&path, FEATURES);
    host.send_to(&data, "10.0.0.2:2000").unwrap();
    host.send_to(&data[..10], "10.0.0.2:2000").unwrap();
    offer(&mut net, 1000);
    assert_eq!(receive(&mut net), data[..10]);
    assert_eq!(counter(&daemon, RX, "too_long"), 1);
}

#[test]
fn headers_that_lie_are_dropped_and_counted() {
    let Some((daemon, path, host)) = setup(&[]) else { return };
    let mut net = start(&path, FEATURES);
    let frame = udp(&payload(100, 0), true);
    let hostile = [
        with_header(1, 0, [0, 0, 65535, 65535], &frame),
        with_header(1, 0, [0, 0, 34, 200], &frame),
        with_header(1, 0, [0, 0, 0, 0], &frame),
        with_header(1, 1, [54, 0, 34, 16], &frame),
        with_header(0, 1, [54, 100, 34, 16], &frame),
        with_header(1, 3, [42, 100, 34, 6], &frame),
        with_header(1, 0x80, [42, 100, 34, 6], &frame),
        with_header(1, 4, [42, 100, 34, 6], &frame),
        with_header(0, 0, [65535, 0, 0, 0], &frame),
        plain(&frame[..13]),
        vec![0; 11],
        vec![0; 1],
        vec![0; 70000],
    ];
    for packet in &hostile {
        net.transmit(packet);
    }
    assert_eq!(counter(&daemon, TX, "bad_header"), hostile.len() as u64);
    // What the kernel finds wrong: TCP segments in a packet of UDP.
    net.transmit(&with_header(1, 1, [54, 10, 34, 16], &frame));
    // A buffer that is none, and one that nobody can write to.
    let (readable, short) = (net.data.holding(&[0; 64]), net.data.allocate(11));
    net.queue(RX).submit(&[readable], &[], 90);
    net.queue(RX).submit(&[], &[short], 91);
    assert_eq!((net.queue(RX).completion().len, net.queue(RX).completion().len), (0, 0));
    assert_eq!(counter(&daemon, RX, "bad_buffers"), 2);
    let nowhere = Buffer { iova: 0x1000, len: 64 };
    net.queue(TX).submit(&[nowhere], &[], 92);
    net.queue(TX).stays_silent();
    daemon.assert_alive();
    drop(net);
    let mut net = start(&path, FEATURES);
    net.transmit(&with_header(1, 0, [0, 0, 34, 6], &frame));
    assert_eq!(host.recv(&mut [0; 200]).unwrap(), 100, "the next driver is served");
}

#[test]
fn the_driver_says_what_it_wants_to_receive() {
    let Some((daemon, path, host)) = setup(&[]) else { return };
    let mut net = start(&path, FEATURES);
    assert_eq!(net.command(&[0, 0, 0]), Ack::Ok, "not promiscuous");
    assert_eq!(net.command(&[&[1, 1], &OTHER[..]].concat()), Ack::Ok);
    assert_eq!(read_all_config(&net.device).unwrap()[..6], OTHER);
    offer(&mut net, 2048);
    host.send_to(b"to the old address", "10.0.0.2:2000").unwrap();
    net.queue(RX).stays_silent();
    assert_eq!(counter(&daemon, RX, "filtered"), 1);
    let table = [&[1, 0, 1, 0, 0, 0][..], &MAC, &[0; 4]].concat();
    assert_eq!(net.command(&table), Ack::Ok);
    host.send_to(b"to an address of the table", "10.0.0.2:2000").unwrap();
    assert_eq!(receive(&mut net), b"to an address of the table");
    for wrong in [&[1, 1, 1, 0, 0, 0, 0, 0][..], &[4, 0, 1, 0], &[9, 9], &[1], &[2, 0, 0, 0x10]] {
        assert_eq!(net.command(wrong), Ack::Err, "{wrong:?}");
    }
    assert_eq!((counter(&daemon, CONTROL, "commands"), counter(&daemon, CONTROL, "refused")), (8, 5));
    // What was set is that of this driver; the next one begins anew.
    drop(net);
    let mut net = start(&path, FEATURES);
    offer(&mut net, 2048);
    host.send_to(b"promiscuous again", "10.0.0.2:2000").unwrap();
    assert_eq!(receive(&mut net), b"promiscuous again");
}

#[test]
fn the_link_follows_the_operator() {
    let Some((daemon, path, host)) = setup(&[("mtu", "1400")]) else { return };
    let mut net = start(&path, FEATURES);
    let event = vdpa_sys::eventfd::EventFd::new().unwrap();
    net.device.set_config_call(Some(&event)).unwrap();
    let config = read_all_config(&net.device).unwrap();
    assert_eq!(
        (&config[..6], &config[6..8], &config[10..12]),
        (&MAC[..], &[1, 0][..], &1400_u16.to_le_bytes()[..])
    );
    assert_eq!(vdpactl(&daemon, "dev set name net0 link down").code, Some(0));
    assert!(event.wait(Some(Duration::from_secs(5))));
    assert_eq!(read_all_config(&net.device).unwrap()[6], 0);
    net.transmit(&plain(&udp(b"lost", false)));
    assert_eq!(counter(&daemon, TX, "down"), 1);
    assert_eq!(vdpactl(&daemon, "dev set name net0 link up").code, Some(0));
    assert_eq!(read_all_config(&net.device).unwrap()[6], 3, "up, and to be announced");
    assert_eq!(net.command(&[3, 0]), Ack::Ok);
    assert_eq!(read_all_config(&net.device).unwrap()[6], 1);
    net.transmit(&plain(&udp(b"there", false)));
    let mut buffer = [0; 100];
    assert_eq!(host.recv(&mut buffer).unwrap(), 5);
}

#[test]
fn packets_wait_while_a_client_is_suspended() {
    let Some((_daemon, path, host)) = setup(&[]) else { return };
    let mut net = start(&path, FEATURES);
    for round in 0..20 {
        net.offer(2048);
        net.queue(RX).kick.signal();
        net.device.suspend().unwrap();
        host.send_to(&payload(300, round), "10.0.0.2:2000").unwrap();
        let base = net.device.vring_base(QueueIndex(RX)).unwrap();
        assert_eq!(base, u32::from(round));
        net.device.resume().unwrap();
        assert_eq!(receive(&mut net), payload(300, round));
    }
}

#[test]
fn a_created_interface_ends_with_its_device() {
    if namespace(false).is_none() {
        return;
    }
    let daemon = Daemon::start();
    let path = daemon.add("net0", "net", &[("tap", "vdpa0"), ("create", "on"), ("mtu", "9000")]);
    let show = || Command::new("ip").args(["-o", "link", "show", "vdpa0"]).output().unwrap();
    let text = String::from_utf8(show().stdout).unwrap();
    assert!(text.contains("mtu 9000") && text.contains("UP"), "{text}");
    // A client that has it open does not keep it.
    let net = start(&path, FEATURES);
    daemon.delete("net0").unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while show().status.success() {
        assert!(Instant::now() < deadline, "the interface stays");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(net);
    daemon.add("net0", "net", &[("tap", "vdpa0"), ("create", "on")]);
}

/// A macvtap on one end of a pair of interfaces, of which the host has the other.
#[test]
fn a_macvtap_is_an_interface_too() {
    if namespace(false).is_none() {
        return;
    }
    ip(&["link", "add", "veth0", "type", "veth", "peer", "name", "veth1"]);
    ip(&["link", "add", "link", "veth0", "name", "mac0", "type", "macvtap", "mode", "bridge"]);
    ip(&["link", "set", "mac0", "address", "52:54:11:12:34:56", "up"]);
    ip(&["link", "set", "veth0", "up"]);
    ip(&["link", "set", "veth1", "address", "52:54:11:12:34:57", "up"]);
    ip(&["addr", "add", "10.0.0.1/24", "dev", "veth1"]);
    ip(&["neigh", "add", "10.0.0.2", "lladdr", "52:54:11:12:34:56", "dev", "veth1"]);
    let host = UdpSocket::bind("10.0.0.1:1000").unwrap();
    host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // Its file in /dev is that of the first namespace's: one is made.
    let show = "mount -t sysfs sysfs /sys && cat /sys/class/net/mac0/tap*/dev";
    let output = Command::new("unshare").args(["-m", "sh", "-c", show]).output().unwrap();
    let number = String::from_utf8(output.stdout).unwrap();
    let (major, minor) = number.trim().split_once(':').unwrap();
    let daemon = Daemon::start();
    let node = daemon.dir().join("tap");
    let made = Command::new("mknod").arg(&node).args(["c", major, minor]).status().unwrap();
    assert!(made.success());
    let path = daemon.add("net0", "net", &[("tap", node.to_str().unwrap()), ("mac", "52:54:11:12:34:56")]);
    let mut net = start(&path, FEATURES);
    let data = payload(1000, 5);
    let mut frame = udp(&data, false);
    frame[..6].copy_from_slice(&OTHER);
    net.transmit(&plain(&frame));
    let mut buffer = [0; 2000];
    assert_eq!(host.recv(&mut buffer).unwrap(), 1000);
    assert!(buffer[..1000] == data);
    offer(&mut net, 2048);
    host.send_to(&data, "10.0.0.2:2000").unwrap();
    assert!(receive(&mut net) == data);
    // The driver hears of the link; the card below keeps its carrier.
    assert_eq!(vdpactl(&daemon, "dev set name net0 link down").code, Some(0));
    frame.truncate(60);
    net.transmit(&plain(&frame));
    assert_eq!(counter(&daemon, TX, "down"), 1);
    drop(net);
    daemon.delete("net0").unwrap();
    for (tap, word) in [("/dev/null", "cannot be used"), ("/dev/tap-that-is-not-there", "cannot be used")] {
        let error = daemon.try_add("n", "net", &[("tap", tap)]).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn errors_say_what_is_wrong() {
    if namespace(false).is_none() {
        return;
    }
    ip(&["link", "add", "dummy0", "type", "veth", "peer", "name", "dummy1"]);
    let daemon = Daemon::start();
    let refused = |attrs: &[(&str, &str)]| match daemon.try_add("n", "net", attrs) {
        Err(vdpa_control::client::ClientError::Refused(error)) => (error.errno, error.message),
        other => panic!("{other:?}"),
    };
    for (attrs, errno, word) in [
        (&[("tap", "nothing")][..], Errno::NODEV, "no persistent interface"),
        (&[("tap", "dummy0")], Errno::INVAL, "no TAP interface"),
        (&[("tap", "tap0"), ("max_vqp", "2")], Errno::INVAL, "with several queues"),
        (&[("tap", "tap0"), ("create", "on")], Errno::EXIST, "there already"),
        (&[("tap", "tap0"), ("device_features", "300400000")], Errno::INVAL, "more than net can offer"),
        (&[("tap", "tap0"), ("device_features", "300040000")], Errno::INVAL, "not complete"),
        (&[("tap", "tap0"), ("device_features", "20")], Errno::INVAL, "too few"),
        (&[], Errno::INVAL, "attribute tap"),
    ] {
        let (found, message) = refused(attrs);
        assert_eq!(found, errno, "{message}");
        assert!(message.contains(word), "{message}");
    }
    daemon.add("net0", "net", &[("tap", "tap0")]);
    assert_eq!(refused(&[("tap", "tap0")]).0, Errno::BUSY);
    daemon.delete("net0").unwrap();
    let path = daemon.add("net0", "net", &[("tap", "tap0"), ("device_features", "300030020")]);
    let device = vdpa_sys::vhost_vdpa::VhostVdpaFd::open(&path).unwrap();
    assert_eq!(device.features(), Ok(Features(0x3_0003_0020)));
}
