//! `sim-net` of a real daemon, with a driver of the test: it behaves as the kernel's network simulator.
#![expect(unsafe_code, reason = "another process forks before its main")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "support/net.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod net;
#[path = "support/peer.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod peer;
mod support;

use std::path::PathBuf;

use vdpa_control::client::Client;
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::net::Ack;
use vdpa_core::ops::{VdpaOps as _, read_all_config};
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Asid, Perm, QueueIndex};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use net::{CONTROL, FEATURES, HEADER, IOVA, Net, RX, TX, all_backend_features, packet};
use peer::Peer;
use support::daemon::Daemon;

const MAC: [u8; 6] = [0x52, 0x54, 0x11, 0x12, 0x34, 0x56];
const OTHER: [u8; 6] = [0x52, 0x54, 0x11, 0x12, 0x34, 0x57];

/// A daemon with the device `n0`, whose address is [`MAC`].
fn setup() -> (Daemon, PathBuf) {
    let daemon = Daemon::start();
    let path = daemon.add("n0", "sim-net", &[("mac", "52:54:11:12:34:56")]);
    (daemon, path)
}

/// Vendor statistics of a queue of `n0`.
fn counters(daemon: &Daemon, queue: u16) -> Vec<u64> {
    let client = Client::new(daemon.dir().join("control.sock")).unwrap();
    let stats = client.vstats("n0", Some(queue.into())).unwrap();
    stats.counters.into_iter().map(|(_, value)| value).collect()
}

fn vdpactl(daemon: &Daemon, line: &str) -> support::Outcome {
    support::vdpactl(&daemon.dir().join("control.sock"), line)
}

#[test]
fn packets_come_back() {
    let (daemon, path) = setup();
    let mut net = Net::start(&path);
    for len in [0, 1, 60, 1500] {
        net.loops(&packet(MAC, len));
    }
    let bytes = 1561 + 4 * (HEADER as u64 + 6);
    assert_eq!(counters(&daemon, RX), [4, bytes, 0, 0, 0]);
    assert_eq!(counters(&daemon, TX), [4, bytes, 0, 0]);
    // The counters every device has.
    let queues = daemon.info("n0").state.queues;
    assert_eq!((queues[0].requests, queues[0].bytes, queues[1].requests), (4, bytes, 4));
}

#[test]
fn a_burst_larger_than_a_pass_is_served_by_one_kick() {
    let (_daemon, path) = setup();
    let mut net = Net::start(&path);
    for len in 0..40 {
        net.offer(2048);
        let buffer = net.data.holding(&packet(MAC, len));
        net.queue(TX).ring.add(&[buffer], &[], 0).unwrap();
    }
    net.queue(TX).ring.publish().unwrap();
    net.queue(TX).kick.signal();
    for len in 0..40 {
        assert_eq!(net.receive(), packet(MAC, len));
    }
}

#[test]
fn the_filter_takes_its_own_address_and_groups() {
    let (daemon, path) = setup();
    let mut net = Net::start(&path);
    net.transmit(&packet(OTHER, 10));
    assert_eq!(counters(&daemon, RX), [0, 0, 0, 0, 1], "dropped, although there is no room either");
    for group in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        net.loops(&packet(group, 10));
    }
    net.transmit(&packet(MAC, 10)[..HEADER + 5]);
    assert_eq!(counters(&daemon, RX), [2, 56, 0, 0, 2]);
    assert_eq!(counters(&daemon, TX), [4, 28 + 56 + 17, 0, 0]);
    net.queue(RX).stays_silent();
}

#[test]
fn an_address_that_begins_with_00_is_everybodys_that_begins_so() {
    let daemon = Daemon::start();
    let path = daemon.add("n0", "sim-net", &[]);
    let mut net = Net::start(&path);
    net.loops(&packet([0, 1, 2, 3, 4, 5], 10));
    net.transmit(&packet([2, 0, 0, 0, 0, 0], 10));
    assert_eq!(counters(&daemon, RX), [1, 28, 0, 0, 1]);
}

#[test]
fn packets_are_cut_off_where_they_do_not_fit() {
    let (daemon, path) = setup();
    let mut net = Net::start(&path);
    net.offer(20);
    net.transmit(&packet(MAC, 100));
    assert_eq!(net.receive(), packet(MAC, 100)[..20]);
    net.offer(6000);
    net.transmit(&packet(MAC, 5000));
    assert_eq!(net.receive(), packet(MAC, 5000)[..4096]);
    assert_eq!(counters(&daemon, RX), [2, 4116, 0, 0, 0]);
    assert_eq!(counters(&daemon, TX), [2, 118 + 4096, 0, 0]);
}

#[test]
fn without_a_receive_buffer_a_packet_is_lost() {
    let (daemon, path) = setup();
    let mut net = Net::start(&path);
    net.transmit(&packet(MAC, 1));
    assert_eq!(counters(&daemon, RX), [0, 0, 0, 1, 0]);
    net.offer(64);
    net.queue(RX).kick.signal();
    net.queue(RX).stays_silent();
    net.transmit(&packet(MAC, 2));
    assert_eq!(net.receive(), packet(MAC, 2));
    assert_eq!(counters(&daemon, RX), [1, 20, 0, 1, 0]);
}

#[test]
fn a_receive_buffer_out_of_reach_keeps_both_chains_and_no_completion_is_made_up() {
    let (daemon, path) = setup();
    let mut net = Net::start(&path);
    let nowhere = Buffer { iova: 0x1000, len: 64 };
    net.queue(RX).submit(&[], &[nowhere], 99);
    net.send(&packet(MAC, 1));
    net.queue(TX).stays_silent();
    assert_eq!(counters(&daemon, RX), [0, 0, 1, 0, 0]);
    // Stopping, mapping and continuing must not publish used entries that were never written.
    net.device.vring_base(QueueIndex(RX)).unwrap();
    net.device.suspend().unwrap();
    net.device.resume().unwrap();
    net.device.dma_map(Asid(0), 0x1000, 4096, net.data.map.addr() as u64, Perm::RO).unwrap();
    net.offer(64);
    net.send(&packet(MAC, 2));
    assert_eq!(net.receive(), packet(MAC, 2));
    assert_eq!(net.queue(TX).completion().len, 0);
    net.queue(TX).stays_silent();
    assert_eq!((net.queue(RX).ring.in_flight(), net.queue(TX).ring.in_flight()), (1, 1));
}

#[test]
fn the_control_queue_sets_the_address() {
    let (daemon, path) = setup();
    let mut net = Net::start(&path);
    let set = |mac: [u8; 6]| [&[1, 1], &mac[..]].concat();
    assert_eq!(net.command(&set(OTHER)), Ack::Ok);
    assert_eq!(read_all_config(&net.device).unwrap()[..6], OTHER);
    net.loops(&packet(OTHER, 4));
    net.transmit(&packet(MAC, 4));
    assert_eq!(net.command(&[0, 0, 1]), Ack::Err, "another class");
    assert_eq!(net.command(&[1, 0, 0, 0, 0, 0]), Ack::Err, "another command");
    assert_eq!(net.command(&[1, 1, 2]), Ack::Err, "no whole address");
    assert_eq!(read_all_config(&net.device).unwrap()[..6], [2, 0x54, 0x11, 0x12, 0x34, 0x57]);
    assert_eq!(counters(&daemon, CONTROL), [4, 1, 3]);
    assert_eq!(counters(&daemon, RX), [1, 22, 0, 0, 1]);
    // A command without a whole header is never answered.
    let (command, answer) = (net.control.holding(&[1]), net.control.holding(&[0xee]));
    net.queue(CONTROL).submit(&[command], &[answer], 0);
    net.queue(CONTROL).stays_silent();
    assert_eq!(counters(&daemon, CONTROL), [5, 1, 4]);
}

#[test]
fn without_the_feature_the_control_queue_rests() {
    let (_daemon, path) = setup();
    let features = FEATURES.without(Features::NET_CTRL_VQ);
    let mut net = Net::with(&path, features, Asid(0), all_backend_features());
    let (command, answer) = (net.control.holding(&[1, 1, 2, 3, 4, 5, 6, 7]), net.control.holding(&[0xee]));
    net.queue(CONTROL).submit(&[command], &[answer], 0);
    net.queue(CONTROL).stays_silent();
    net.loops(&packet(MAC, 4));
}

#[test]
fn the_control_queue_has_an_address_space_of_its_own() {
    let (_daemon, path) = setup();
    // The same addresses refer to different memory for the control queue and for the data queues.
    let mut net = Net::with(&path, FEATURES, Asid(1), all_backend_features());
    assert_eq!((net.data.iova, net.control.iova), (IOVA, IOVA));
    assert_eq!(net.command(&[1, 1, 0x52, 0x54, 0x11, 0x12, 0x34, 0x57]), Ack::Ok);
    net.loops(&packet(OTHER, 100));
    // Each works without the other's memory.
    net.unmap(&net.data);
    net.send(&packet(MAC, 1));
    net.queue(TX).stays_silent();
    assert_eq!(net.command(&[1, 1, 0x52, 0x54, 0x11, 0x12, 0x34, 0x56]), Ack::Ok);
    net.map(&net.data);
    net.offer(64);
    net.queue(TX).kick.signal();
    assert_eq!(net.receive(), packet(MAC, 1));
    net.queue(TX).completion();
    net.unmap(&net.control);
    let (command, answer) = (net.control.holding(&[1, 0]), net.control.holding(&[0xee]));
    net.queue(CONTROL).submit(&[command], &[answer], 0);
    net.queue(CONTROL).stays_silent();
    net.loops(&packet(MAC, 100));
    net.map(&net.control);
    net.queue(CONTROL).kick.signal();
    assert_eq!(net.queue(CONTROL).completion().len, 1);
}

#[test]
fn suspend_stops_everything_and_resume_serves_what_came_meanwhile() {
    let (daemon, path) = setup();
    let mut net = Net::start(&path);
    net.loops(&packet(MAC, 1));
    net.device.suspend().unwrap();
    let bases = net.bases();
    assert_eq!(bases, [1, 1, 0]);
    net.offer(64);
    net.send(&packet(MAC, 2));
    let (command, answer) = (net.control.holding(&[1, 0]), net.control.holding(&[0xee]));
    net.queue(CONTROL).submit(&[command], &[answer], 0);
    for index in [RX, TX, CONTROL] {
        net.queue(index).stays_silent();
    }
    assert_eq!(net.bases(), bases);
    assert_eq!(counters(&daemon, TX), [1, 19, 0, 0]);
    net.device.resume().unwrap();
    assert_eq!(net.receive(), packet(MAC, 2));
    net.queue(TX).completion();
    net.queue(CONTROL).completion();
    net.loops(&packet(MAC, 3));
}

#[test]
fn statistics_outlive_reset_and_close() {
    let (daemon, path) = setup();
    let mut net = Net::start(&path);
    net.loops(&packet(MAC, 1));
    net.device.set_status(Status::RESET).unwrap();
    vdpactl(&daemon, "dev vstats show n0 qidx 0").fails(
        "",
        "Error: vdpa: feature negotiation not complete.\n\
         kernel answers: Resource temporarily unavailable\n\
         There are statistics once a client has set FEATURES_OK.\n",
    );
    drop(net);
    daemon.wait_for("n0", "the release", |info| !info.state.open);
    let mut net = Net::start(&path);
    net.loops(&packet(MAC, 1));
    assert_eq!(counters(&daemon, RX), [2, 38, 0, 0, 0]);
}

#[test]
fn a_disabled_queue_stops_the_loop() {
    let (_daemon, path) = setup();
    let mut net = Net::start(&path);
    net.device.set_vring_enable(QueueIndex(RX), false).unwrap();
    net.offer(64);
    net.send(&packet(MAC, 1));
    net.queue(TX).stays_silent();
    net.device.set_vring_enable(QueueIndex(RX), true).unwrap();
    net.queue(RX).kick.signal();
    assert_eq!(net.receive(), packet(MAC, 1));
}

#[test]
fn a_reset_keeps_or_drops_the_map_as_was_agreed() {
    let (_daemon, path) = setup();
    // uapi-spec 9.4, vector 45.
    let persist = BackendFeatures(0x17e);
    let mut net = Net::with(&path, FEATURES, Asid(0), persist);
    net.loops(&packet(MAC, 1));
    let bases = net.bases();
    net.device.set_status(Status::RESET).unwrap();
    net.negotiate();
    net.run(bases);
    net.loops(&packet(MAC, 2));
    // Vector 46.
    net.device.set_backend_features(persist.without(BackendFeatures::IOTLB_PERSIST)).unwrap();
    let bases = net.bases();
    net.device.set_status(Status::RESET).unwrap();
    let again = net.device.dma_map(Asid(0), IOVA, 4096, net.data.map.addr() as u64, Perm::RW);
    assert_eq!(again, Err(Errno::FAULT));
    net.negotiate();
    net.run(bases);
    net.offer(64);
    net.send(&packet(MAC, 3));
    net.queue(TX).stays_silent();
    net.device.batch_begin(Asid(0)).unwrap();
    net.device.batch_end(Asid(0)).unwrap();
    net.queue(TX).kick.signal();
    assert_eq!(net.receive(), packet(MAC, 3));
}

#[test]
fn after_a_change_of_owner_memory_is_out_of_reach_until_it_is_remapped() {
    let (_daemon, path) = setup();
    let mut net = Net::start(&path);
    net.loops(&packet(MAC, 1));
    // uapi-spec 9.4, vector L10.
    let mut peer = Peer::inheriting(&net.descriptor());
    peer.send("new_owner").unwrap();
    net.offer(64);
    net.send(&packet(MAC, 2));
    net.queue(TX).stays_silent();
    net.device.new_owner().unwrap();
    net.remap(&net.data);
    net.remap(&net.control);
    net.queue(TX).kick.signal();
    assert_eq!(net.receive(), packet(MAC, 2));
    net.queue(TX).completion();
    // Vector L11: NEW_OWNER implies PERSIST.
    let live = all_backend_features().without(BackendFeatures::IOTLB_PERSIST);
    net.device.set_backend_features(live).unwrap();
    net.device.suspend().unwrap();
    let bases = net.bases();
    net.device.set_status(Status::RESET).unwrap();
    peer.send("new_owner").unwrap();
    net.device.new_owner().unwrap();
    net.negotiate();
    net.remap(&net.data);
    net.remap(&net.control);
    net.run(bases);
    net.loops(&packet(MAC, 3));
    assert_eq!(net.command(&[1, 0]), Ack::Err);
}

#[test]
fn the_configuration_can_be_written_except_for_the_link() {
    let (_daemon, path) = setup();
    let device = VhostVdpaFd::open(&path).unwrap();
    device.set_config(0, &[9, 8, 7, 6, 5, 4, 0, 0, 1]).unwrap();
    let config = read_all_config(&device).unwrap();
    assert_eq!(config[..12], [9, 8, 7, 6, 5, 4, 1, 0, 1, 0, 0xdc, 5]);
    assert_eq!(config[12..], [0; 12]);
    assert_eq!((device.vqs_count(), device.group_num(), device.as_num()), (Ok(3), Ok(2), Ok(2)));
}

#[test]
fn vdpactl_shows_what_the_command_vdpa_shows_of_the_kernels() {
    let (daemon, path) = setup();
    let run = |line: &str| vdpactl(&daemon, line);
    run("mgmtdev show sim-net").prints(concat!(
        "sim-net: \n",
        "  supported_classes net\n",
        "  max_supported_vqs 3\n",
        "  dev_features MTU MAC STATUS CTRL_VQ CTRL_MAC_ADDR ANY_LAYOUT VERSION_1 ACCESS_PLATFORM\n",
    ));
    run("dev show n0").prints("n0: type network mgmtdev sim-net vendor_id 0 max_vqs 3 max_vq_size 256\n");
    let config = "n0: mac 52:54:11:12:34:56 link up link_announce false mtu 1500 \n";
    run("dev config show n0").prints(config);
    let mut net = Net::start(&path);
    run("dev config show n0").prints(&format!(
        "{config}  negotiated_features MTU MAC STATUS CTRL_VQ CTRL_MAC_ADDR ANY_LAYOUT VERSION_1 \
         ACCESS_PLATFORM\n"
    ));
    run("-j dev config show n0").prints(concat!(
        r#"{"config":{"n0":{"mac":"52:54:11:12:34:56","link ":"up","link_announce ":false,"mtu":1500,"#,
        r#""negotiated_features":["MTU","MAC","STATUS","CTRL_VQ","CTRL_MAC_ADDR","ANY_LAYOUT","VERSION_1","#,
        r#""ACCESS_PLATFORM"]}}}"#,
        "\n",
    ));
    net.loops(&packet(MAC, 46));
    net.transmit(&packet(OTHER, 46));
    net.transmit(&packet(OTHER, 46));
    net.command(&[1, 0]);
    run("dev vstats show n0 qidx 1")
        .prints("n0: queue_type tx tx packets 3 tx bytes 192 tx errors 0 tx drops 0 \n");
    run("dev vstats show n0 qidx 0")
        .prints("n0: queue_type control_vq rx packets 1 rx bytes 64 rx errors 0 rx overruns 0 rx drops 2 \n");
    run("dev vstats show n0 qidx 2")
        .prints("n0: queue_type rx cvq requests 1 cvq successes 0 cvq errors 1 \n");
    run("-j dev vstats show n0 qidx 1").prints(concat!(
        r#"{"vstats":{"n0":{"queue_type":"tx","tx packets":3,"tx bytes":192,"tx errors":0,"tx drops":0}}}"#,
        "\n",
    ));
}

#[test]
fn the_address_can_be_set_from_outside() {
    let (daemon, path) = setup();
    daemon.add("s0", "sim-blk", &[]);
    let set = |line: &str| {
        let outcome = vdpactl(&daemon, &format!("dev set {line}"));
        (outcome.code, outcome.stderr.lines().take(2).map(str::to_owned).collect::<Vec<_>>())
    };
    let refused = |message: &str, errno: &str| {
        (Some(1), vec![format!("Error: vdpa: {message}."), format!("kernel answers: {errno}")])
    };
    let unsupported = "Operation not supported";
    let mut net = Net::start(&path);
    net.loops(&packet(MAC, 1));
    assert_eq!(set("name n0 mac 52:54:11:12:34:57"), (Some(0), vec![]));
    assert_eq!(read_all_config(&net.device).unwrap()[..6], OTHER);
    net.loops(&packet(OTHER, 1));
    net.transmit(&packet(MAC, 1));
    // The messages are those of Linux 7.2.
    assert_eq!(set("name n0 mac 00:00:00:00:00:00"), refused("Invalid MAC address", unsupported));
    assert_eq!(set("name n0 mac 01:00:5e:00:00:01"), refused("Invalid MAC address", unsupported));
    assert_eq!(set("name n0"), refused("no attribute to be set", unsupported));
    assert_eq!(set("name nosuch mac 0:0:0:0:0:0"), refused("device not found", "No such device"));
    let warning = vec!["Warning: vdpa: s0 device not supported.".to_owned()];
    for line in ["name s0 mac 52:54:11:12:34:57", "name s0 mac 01:00:5e:00:00:01", "name s0"] {
        assert_eq!(set(line), (Some(0), warning.clone()), "{line}");
    }
    assert_eq!(read_all_config(&net.device).unwrap()[..6], OTHER, "refusals change nothing");
}

#[test]
fn statistics_are_refused_in_the_kernels_order() {
    let (daemon, path) = setup();
    daemon.add("s0", "sim-blk", &[]);
    let answer = |line: &str| {
        let outcome = vdpactl(&daemon, &format!("dev vstats show {line}"));
        outcome.stderr.lines().nth(1).unwrap_or_default().to_owned()
    };
    assert_eq!(answer("n0"), "kernel answers: Invalid argument");
    assert_eq!(answer("nosuch qidx 99999"), "kernel answers: No such device");
    assert_eq!(answer("s0 qidx 99999"), "kernel answers: Operation not supported");
    assert_eq!(answer("n0 qidx 32769"), "kernel answers: Numerical result out of range");
    assert_eq!(answer("n0 qidx 3"), "kernel answers: Resource temporarily unavailable");
    let _net = Net::start(&path);
    assert_eq!(answer("n0 qidx 3"), "kernel answers: Invalid argument");
    assert_eq!(answer("n0 qidx 32768"), "kernel answers: Invalid argument");
}

#[test]
fn devices_are_made_with_the_kernels_checks_and_words() {
    let (daemon, _path) = setup();
    let add = |line: &str| {
        let outcome = vdpactl(&daemon, &format!("dev add {line}"));
        let mut lines = outcome.stderr.lines().map(str::to_owned);
        (lines.next().unwrap_or_default(), lines.next().unwrap_or_default())
    };
    let refused =
        |message: &str, errno: &str| (format!("Error: vdpa: {message}."), format!("kernel answers: {errno}"));
    let (invalid, unsupported) = ("Invalid argument", "Operation not supported");
    assert_eq!(
        add("name a mgmtdev nosuch max_vqp 0"),
        refused("At least one pair of VQs is required", invalid)
    );
    assert_eq!(
        add("name a mgmtdev nosuch mac 52:0:0:0:0:1 device_features 0x300000008"),
        refused("Missing features 0x20 for provided attributes", invalid)
    );
    assert_eq!(
        add("name a mgmtdev nosuch"),
        refused("Fail to find the specified management device", "No such device")
    );
    assert_eq!(
        add("name a mgmtdev sim-net max_vqp 2 mtu 1400"),
        refused("Some provided attributes are not supported: 0x3000", unsupported)
    );
    assert_eq!(
        add("name n0 mgmtdev sim-blk mac 52:0:0:0:0:1"),
        refused("Some provided attributes are not supported: 0x400", unsupported)
    );
    assert_eq!(add("name n0 mgmtdev sim-net mtu 60").1, "kernel answers: Numerical result out of range");
    assert_eq!(add("name n0 mgmtdev sim-net").1, "kernel answers: File exists");
    assert_eq!(add("name a mgmtdev sim-net device_features 0x400000").1, "kernel answers: Invalid argument");
    assert_eq!(add("name a mgmtdev sim-net path /x").1, "kernel answers: Operation not supported");

    let silence = (String::new(), String::new());
    assert_eq!(add("name a mgmtdev sim-net mac 52:0:0:0:0:1 mtu 9000 device_features 300000028"), silence);
    vdpactl(&daemon, "dev config show a").prints("a: mac 52:00:00:00:00:01 mtu 9000 \n");
    let device = VhostVdpaFd::open(daemon.info("a").path).unwrap();
    assert_eq!(device.features(), Ok(Features(0x3_0000_0028)));
    assert_eq!(device.set_features(FEATURES), Ok(()));
    device.set_status(Status::FEATURES_OK).unwrap();
    assert_eq!(daemon.info("a").state.negotiated_features, Some(Features(0x3_0000_0028)));
}
