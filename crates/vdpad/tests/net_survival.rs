//! `net` goes on when its daemon is killed and upgraded: the interface, its packets, and what the driver has set. And with several pairs
//! of queues.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "support/held.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod held;
#[path = "support/net.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod net;
#[path = "support/robust.rs"]
mod robust;
#[path = "support/tap.rs"]
mod tap;

use std::net::UdpSocket;

use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::net::Ack;
use vdpa_core::ops::{VdpaOps as _, read_all_config};
use vdpa_core::types::{Asid, GroupIndex, Perm};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use held::{replace, upgrade};
use net::{HEADER, IOVA, MEMORY, Net, Queue, RX, Space};
use robust::Vdpad;
use tap::{MAC, host, ip, namespace, udp, udp_from};

const OTHER: [u8; 6] = [0x52, 0x54, 0x11, 0x12, 0x34, 0x57];
const FEATURES: Features = Features::of(&[
    Features::NET_CSUM,
    Features::NET_GUEST_CSUM,
    Features::NET_MRG_RXBUF,
    Features::NET_MAC,
    Features::NET_STATUS,
    Features::NET_CTRL_VQ,
    Features::NET_CTRL_RX,
    Features::NET_CTRL_MAC_ADDR,
    Features::VERSION_1,
    Features::ACCESS_PLATFORM,
]);

fn index() -> String {
    let output = std::process::Command::new("ip").args(["-o", "link", "show", "tap0"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("LOWER_UP"), "the carrier is there: {text}");
    text.split(':').next().unwrap().to_owned()
}

/// A packet each way.
#[track_caller]
fn ping(net: &mut Net, host: &UdpSocket, data: &[u8]) {
    net.transmit(&[&[0; HEADER][..], &udp(data, false)].concat());
    let mut buffer = [0; 2000];
    let len = host.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], data);
    host.send_to(data, "10.0.0.2:2000").unwrap();
    assert_eq!(receive(net), data);
}

/// The next packet that is one: buffers that the dead daemon had taken may come back empty.
#[track_caller]
fn receive(net: &mut Net) -> Vec<u8> {
    loop {
        let packet = net.receive();
        net.offer(2048);
        net.queue(RX).kick.signal();
        if !packet.is_empty() {
            return packet[HEADER + 42..].to_vec();
        }
    }
}

fn survives(replaced: impl Fn(&Vdpad), rounds: u8) {
    if namespace(false).is_none() {
        return;
    }
    // Made and held by the daemon: it is gone as soon as nobody has it.
    ip(&["tuntap", "del", "tap0", "mode", "tap"]);
    let vdpad = held::start(&["--crash-limit", "20"]);
    let path = vdpad.add("net0", "net", "tap tap0 create on mac 52:54:11:12:34:56");
    let host = host();
    let mut net = Net::with(&path, FEATURES, Asid(0), BackendFeatures(0x37e));
    for _ in 0..16 {
        net.offer(2048);
    }
    net.queue(RX).kick.signal();
    assert_eq!(net.command(&[&[1, 1], &OTHER[..]].concat()), Ack::Ok);
    let table = [&[1, 0, 1, 0, 0, 0][..], &MAC, &[0; 4]].concat();
    assert_eq!((net.command(&[0, 0, 0]), net.command(&table)), (Ack::Ok, Ack::Ok));
    let before = index();
    for round in 0..rounds {
        ping(&mut net, &host, &[round; 700]);
        replaced(&vdpad);
        // Those that come while nobody serves wait at the interface.
        ping(&mut net, &host, &[round | 0x80; 700]);
        assert_eq!(index(), before);
        assert_eq!(read_all_config(&net.device).unwrap()[..6], OTHER);
    }
    let stats = vdpad.client().vstats("net0", Some(0)).unwrap().counters;
    assert_eq!(stats[0], ("packets".into(), 2 * u64::from(rounds)));
    vdpad.ctl("dev del net0 -f").succeeds();
    robust::eventually("the interface ends with the device", || {
        let output = std::process::Command::new("ip").args(["link", "show", "tap0"]).output().unwrap();
        (!output.status.success()).then_some(())
    });
}

#[test]
fn a_killed_daemon_loses_neither_interface_nor_packets() {
    survives(replace, 8);
}

#[test]
fn an_upgrade_loses_neither_interface_nor_packets() {
    survives(upgrade, 5);
}

/// A card with four pairs of queues, all running.
struct Pairs {
    device: VhostVdpaFd,
    space: Space,
    control: Space,
    queues: Vec<Queue>,
    buffers: Vec<Vec<vdpa_core::ring::Buffer>>,
}

impl Pairs {
    fn start(path: &std::path::Path) -> Self {
        let features = FEATURES.with(Features::NET_MQ).without(Features::NET_MRG_RXBUF);
        let device = VhostVdpaFd::open(path).unwrap();
        device.set_owner().unwrap();
        device.set_backend_features(BackendFeatures(0x37e)).unwrap();
        let (mut space, mut control) = (Space::new(Asid(0), IOVA), Space::new(Asid(1), IOVA));
        let mut queues: Vec<_> = (0..8).map(|index| Queue::new(index, &mut space, features)).collect();
        queues.push(Queue::new(8, &mut control, features));
        for space in [&space, &control] {
            device.dma_map(space.asid, space.iova, MEMORY, space.map.addr() as u64, Perm::RW).unwrap();
        }
        device.set_status(Status(3)).unwrap();
        device.set_features(features).unwrap();
        device.set_status(Status(0xb)).unwrap();
        assert_eq!(device.vring_group(vdpa_core::types::QueueIndex(8)), Ok(GroupIndex(1)));
        device.set_group_asid(GroupIndex(1), Asid(1)).unwrap();
        queues.iter().for_each(|queue| queue.set_up(&device, 0));
        device.set_status(Status(0xf)).unwrap();
        let mut this = Self { device, space, control, queues, buffers: vec![Vec::new(); 4] };
        for pair in 0..4 {
            for token in 0..20 {
                let buffer = this.space.allocate(2048);
                this.buffers[pair].push(buffer);
                this.queues[2 * pair].submit(&[], &[buffer], token);
            }
        }
        this
    }

    fn set_pairs(&mut self, pairs: u16) -> Option<Ack> {
        let command = self.control.holding(&[&[4, 0][..], &pairs.to_le_bytes()].concat());
        let answer = self.control.holding(&[0xee]);
        self.queues[8].submit(&[command], &[answer], 0);
        self.queues[8].completion();
        Ack::from_byte(self.control.read(answer, 1)[0])
    }

    /// Sends a packet by a pair; the host's answer must come in another one.
    #[track_caller]
    fn ping(&mut self, host: &UdpSocket, by: u16, answered_in: usize) {
        let data = [by.to_le_bytes()[0]; 100];
        let packet = self.space.holding(&[&[0; HEADER][..], &udp_from(3000 + by, &data, false)].concat());
        let by = usize::from(by);
        self.queues[2 * by + 1].submit(&[packet], &[], 0);
        self.queues[2 * by + 1].completion();
        let (len, from) = host.recv_from(&mut [0; 200]).unwrap();
        assert_eq!(len, 100);
        host.send_to(&data, from).unwrap();
        let done = self.queues[2 * answered_in].completion();
        let buffer = self.buffers[answered_in][usize::try_from(done.token).unwrap()];
        assert_eq!(self.space.read(buffer, done.len)[HEADER + 42..], data);
    }
}

#[test]
fn pairs_are_used_as_the_driver_says() {
    if namespace(true).is_none() {
        return;
    }
    let vdpad = held::start(&[]);
    let path = vdpad.add("net0", "net", "tap tap0 mac 52:54:11:12:34:56 max_vqp 4");
    let host = host();
    let mut card = Pairs::start(&path);
    assert_eq!(read_all_config(&card.device).unwrap()[8..10], [4, 0]);
    // Before the driver says so, pair 1 has everything.
    (0..4).for_each(|pair| card.ping(&host, pair, 0));
    for wrong in [0, 5, 0x8001] {
        assert_eq!(card.set_pairs(wrong), Some(Ack::Err), "{wrong}");
    }
    assert_eq!(card.set_pairs(4), Some(Ack::Ok));
    (0..4).for_each(|pair| card.ping(&host, pair, usize::from(pair)));
    replace(&vdpad);
    (0..4).for_each(|pair| card.ping(&host, pair, usize::from(pair)));
    assert_eq!(card.set_pairs(1), Some(Ack::Ok));
    (0..4).for_each(|pair| card.ping(&host, pair, 0));
}

/// The daemon is in a network namespace where there is no such interface: whoever has the right to it opens it.
#[test]
fn queues_that_were_passed_outlive_daemons() {
    let vdpad = held::start(&[]);
    if namespace(false).is_none() {
        return;
    }
    let refused = vdpad.ctl("dev add name net0 mgmtdev net tap tap0");
    assert!(refused.stderr.contains("there is no persistent interface tap0"), "{refused:?}");
    let wrong = vdpad.ctl("dev add name net0 mgmtdev net tap tap1 passed on");
    assert!(wrong.stderr.contains("cannot open tap1"), "{wrong:?}");
    let path = vdpad.add("net0", "net", "tap tap0 passed on mac 52:54:11:12:34:56");
    let host = host();
    let mut net = Net::with(&path, FEATURES, Asid(0), BackendFeatures(0x37e));
    for _ in 0..16 {
        net.offer(2048);
    }
    net.queue(RX).kick.signal();
    ping(&mut net, &host, &[1; 700]);
    replace(&vdpad);
    ping(&mut net, &host, &[2; 700]);
    upgrade(&vdpad);
    ping(&mut net, &host, &[3; 700]);
    assert!(vdpad.info("net0").passed);
}
