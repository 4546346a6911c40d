//! Cases about the data path of the kernel's network simulator, which loops packets back (uapi-spec 6.2).

use vdpa_core::features::{Features, Status};

use super::net::{PROFILE, SIMULATOR};
use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::pair;
use crate::net_driver::{CONTROL, HEADER, MAC, NetDriver, RX, TX, UNWRITTEN, packet, packet_with};
use crate::request::Request;

/// The needs of each case: the simulator's profile, and the features that the driver uses.
const N: [Need; 8] = [
    PROFILE[0],
    PROFILE[1],
    PROFILE[2],
    PROFILE[3],
    Need::RingSize(64),
    Need::Feature(Features::NET_CTRL_VQ),
    Need::Feature(Features::NET_MAC),
    SIMULATOR,
];

macro_rules! case {
    ($id:literal, $spec:literal, [$($request:ident),+], [$($need:expr),*], $run:ident) => {
        Case {
            id: $id,
            spec: $spec,
            covers: &[$(Request::$request),+],
            needs: &[N[0], N[1], N[2], N[3], N[4], N[5], N[6], N[7], $($need),*],
            run: $run,
        }
    };
}

pub(super) const CASES: &[Case] = &[
    case!("net.loop-back", "6.2", [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ADDR], [], loop_back),
    case!("net.burst", "6.2", [SET_VRING_KICK], [], burst),
    case!("net.calls", "6.2", [SET_VRING_CALL], [], calls),
    case!("net.filter", "6.2", [SET_CONFIG], [], filter),
    case!("net.filter-nul", "6.2", [SET_CONFIG], [], filter_nul),
    case!("net.legacy-header", "6.2", [SET_FEATURES], [], legacy_header),
    case!("net.cut-off", "6.2", [SET_VRING_ADDR], [], cut_off),
    case!("net.no-room", "6.2", [SET_VRING_KICK], [], no_room),
    case!("net.room-unmapped", "6.1, 6.2", [IOTLB_UPDATE], [], room_unmapped),
    case!("net.disabled-queue", "6.2", [SET_VRING_ENABLE], [], disabled_queue),
    case!("net.suspend", "1.8, 6.1", [SUSPEND, RESUME, GET_VRING_BASE], [], suspend),
    case!("net.control-mac", "6.2", [GET_CONFIG], [], control_mac),
    case!("net.control-refused", "6.2", [GET_CONFIG], [], control_refused),
    case!("net.control-short", "6.2", [SET_VRING_KICK], [], control_short),
    case!("net.control-answer-repeats", "6.2", [SET_VRING_KICK], [], control_answer_repeats),
    case!("net.control-unnegotiated", "6.2", [SET_FEATURES], [], control_unnegotiated),
    case!("net.control-asid", "2.7, 6.2", [SET_GROUP_ASID, IOTLB_INVALIDATE], [], control_asid),
    case!("net.statistics", "6.2, 7.3", [SET_STATUS, CLOSE], [Need::Vstats], statistics),
];

/// A MAC address other than [`MAC`].
const OTHER: [u8; 6] = [0x52, 0x54, 0x11, 0x12, 0x34, 0x57];
const OK: u8 = 0;
const ERR: u8 = 1;

fn loop_back(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    for len in [0, 1, 60, 1500] {
        net.expect_loopback(&format!("a packet of {len} bytes"), &packet(MAC, len))?;
    }
    check("GET_VRING_BASE of all queues when idle", net.bases()?, [4, 4, 0])
}

fn burst(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    for len in 0..40 {
        net.add_receive_buffer(128)?;
        net.add_request(TX, &packet(MAC, len), 0)?;
    }
    net.kick(TX)?;
    for len in 0..40 {
        check(&format!("packet {len} of one kick"), net.receive()?, packet(MAC, len))?;
    }
    Ok(())
}

fn calls(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    net.expect_loopback("a packet", &packet(MAC, 1))?;
    for queue in [RX, TX, CONTROL] {
        net.enable_calls(queue, false)?;
        net.read_call_counter(queue)?;
    }
    net.expect_loopback("a packet, no calls wanted", &packet(MAC, 2))?;
    check("calls of the receive queue", net.read_call_counter(RX)?, 0)?;
    check("calls of the transmit queue", net.read_call_counter(TX)?, 0)?;
    net.add_request(CONTROL, &[1, 0], 1)?;
    net.kick(CONTROL)?;
    net.expect_call(CONTROL, "a command, no calls wanted")?;
    net.next_ack()?;
    net.enable_calls(RX, true)?;
    net.enable_calls(TX, true)?;
    net.add_receive_buffer(128)?;
    net.send(&packet(MAC, 3))?;
    net.expect_call(RX, "a packet received, calls wanted")?;
    net.expect_call(TX, "a packet sent, calls wanted")
}

fn filter(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    net.add_receive_buffer(2048)?;
    net.expect_dropped("a packet to another address", &packet(OTHER, 10))?;
    net.expect_dropped("a packet that ends in its address", &packet(MAC, 0)[..HEADER + 5])?;
    for group in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        net.expect_loopback(&format!("a packet to the group {group:02x?}"), &packet(group, 10))?;
    }
    prepare("VHOST_VDPA_SET_CONFIG", net.device.set_config(0, &OTHER))?;
    net.expect_dropped("a packet to the address it had", &packet(MAC, 10))?;
    net.expect_loopback("a packet to the address it was given", &packet(OTHER, 10))
}

fn filter_nul(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    prepare("VHOST_VDPA_SET_CONFIG", net.device.set_config(0, &[0x52, 0, 1, 2, 3, 4]))?;
    net.add_receive_buffer(2048)?;
    net.expect_loopback("an address that is the same up to a byte 00", &packet([0x52, 0, 9, 9, 9, 9], 10))?;
    net.expect_dropped("an address that differs before", &packet([0x54, 0, 1, 2, 3, 4], 10))
}

fn legacy_header(ctx: &mut Ctx<'_>) -> Outcome {
    let features = ctx.probe().features.without(Features::VERSION_1);
    let mut net = NetDriver::start_with(ctx, features, 0)?;
    net.add_receive_buffer(2048)?;
    net.expect_dropped("a packet with a header of 12 bytes, without VERSION_1", &packet(MAC, 10))?;
    net.expect_loopback("a packet with a header of 10 bytes, without VERSION_1", &packet_with(10, MAC, 10))
}

fn cut_off(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    let sent = packet(MAC, 5000);
    for (room, len) in [(20, 20), (6000, 4096)] {
        net.add_receive_buffer(room)?;
        net.transmit(&sent)?;
        let what = format!("a packet of {} bytes into {room}", sent.len());
        check(&what, net.receive()?, sent.get(..len).unwrap_or_default().to_vec())?;
    }
    Ok(())
}

fn no_room(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    net.transmit(&packet(MAC, 1))?;
    net.add_receive_buffer(64)?;
    net.kick(RX)?;
    net.expect_no_completion(RX, "a buffer that came after the packet")?;
    net.transmit(&packet(MAC, 2))?;
    check("the next packet", net.receive()?, packet(MAC, 2))
}

fn room_unmapped(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    net.add_unmapped_receive_buffer(64)?;
    net.add_receive_buffer(64)?;
    net.send(&packet(MAC, 1))?;
    net.expect_no_completion(TX, "a packet whose receive buffer is not mapped")?;
    net.expect_no_completion(RX, "a receive buffer that is not mapped")?;
    // The packet and the buffer are lost, but the next ones are not.
    net.transmit(&packet(MAC, 2))?;
    check("the packet after that", net.receive()?, packet(MAC, 2))
}

fn disabled_queue(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    let enable =
        |net: &NetDriver, on| net.device.set(Request::SET_VRING_ENABLE, &pair(u32::from(RX), u32::from(on)));
    check("SET_VRING_ENABLE 0 of the receive queue", enable(&net, false), Ok(()))?;
    net.add_receive_buffer(64)?;
    net.send(&packet(MAC, 1))?;
    net.expect_no_completion(TX, "a packet while the receive queue is disabled")?;
    check("the control queue goes on", net.command(&[1, 0])?, ERR)?;
    check("SET_VRING_ENABLE 1", enable(&net, true), Ok(()))?;
    net.kick(TX)?;
    net.expect_sent()?;
    check("the packet", net.receive()?, packet(MAC, 1))
}

fn suspend(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    net.expect_loopback("a packet before SUSPEND", &packet(MAC, 1))?;
    check("SUSPEND", net.device.call(Request::SUSPEND), Ok(()))?;
    let bases = net.bases()?;
    check("GET_VRING_BASE, suspended", bases, [1, 1, 0])?;
    net.add_receive_buffer(64)?;
    net.send(&packet(MAC, 2))?;
    net.add_request(CONTROL, &[1, 0], 1)?;
    net.kick(CONTROL)?;
    for queue in [RX, TX, CONTROL] {
        net.expect_no_completion(queue, "suspended")?;
    }
    check("GET_VRING_BASE afterwards", net.bases()?, bases)?;
    check("RESUME", net.device.call(Request::RESUME), Ok(()))?;
    net.expect_sent()?;
    check("the packet sent while suspended", net.receive()?, packet(MAC, 2))?;
    check("the command given while suspended", net.next_ack()?, ERR)
}

fn set_mac(mac: [u8; 6]) -> Vec<u8> {
    [&[1, 1], &mac[..]].concat()
}

fn config_mac(net: &NetDriver) -> Result<Vec<u8>, Stop> {
    prepare("VHOST_VDPA_GET_CONFIG", net.device.config(0, 6))
}

fn control_mac(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    check("answer to MAC_ADDR_SET", net.command(&set_mac(OTHER))?, OK)?;
    check("the address in the configuration", config_mac(&net)?, OTHER.to_vec())?;
    net.add_receive_buffer(2048)?;
    net.expect_dropped("a packet to the address it had", &packet(MAC, 4))?;
    net.expect_loopback("a packet to the address it was given", &packet(OTHER, 4))
}

fn control_refused(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    check("answer to a command of another class", net.command(&[0, 0, 1])?, ERR)?;
    check("answer to MAC_TABLE_SET", net.command(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0])?, ERR)?;
    check("the address after these", config_mac(&net)?, MAC.to_vec())?;
    check("answer to MAC_ADDR_SET with one byte", net.command(&[1, 1, 2])?, ERR)?;
    check("that byte is stored", config_mac(&net)?, vec![2, 0x54, 0x11, 0x12, 0x34, 0x56])
}

fn control_short(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    net.add_request(CONTROL, &[1], 1)?;
    net.kick(CONTROL)?;
    net.expect_no_completion(CONTROL, "a command of one byte")?;
    // The device never completes that command, but it completes the next one.
    check("answer to the next command", net.command(&set_mac(OTHER))?, OK)
}

fn control_answer_repeats(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    for command in [&[0, 0, 1][..], &set_mac(OTHER), &[0, 0, 1], &[1, 0], &[0, 0, 1]] {
        net.add_request(CONTROL, command, 1)?;
    }
    net.kick(CONTROL)?;
    let answers = (0..5).map(|_| net.next_ack()).collect::<Result<Vec<_>, _>>()?;
    // Another class, a new address, another class, another command, another class.
    check("answers to five commands of one kick", answers, vec![ERR, OK, OK, ERR, ERR])
}

fn control_unnegotiated(ctx: &mut Ctx<'_>) -> Outcome {
    let features = ctx.probe().features.without(Features::NET_CTRL_VQ);
    let mut net = NetDriver::start_with(ctx, features, 0)?;
    net.add_request(CONTROL, &set_mac(OTHER), 1)?;
    net.kick(CONTROL)?;
    net.expect_no_completion(CONTROL, "a command without CTRL_VQ")?;
    net.expect_loopback("a packet without CTRL_VQ", &packet(MAC, 4))
}

fn control_asid(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start_with(ctx, ctx.probe().features, 1)?;
    check("a command in another address space", net.command(&set_mac(OTHER))?, OK)?;
    net.expect_loopback("a packet, same addresses, other memory", &packet(OTHER, 100))?;
    net.unmap(0)?;
    net.send(&packet(OTHER, 1))?;
    net.expect_no_completion(TX, "the data queues unmapped")?;
    check("a command, the data queues unmapped", net.command(&set_mac(MAC))?, OK)?;
    net.map_data()?;
    net.add_receive_buffer(2048)?;
    net.kick(TX)?;
    net.expect_sent()?;
    net.expect_no_completion(RX, "sent to the address it had")?;
    net.unmap(1)?;
    net.add_request(CONTROL, &[1, 0], 1)?;
    net.kick(CONTROL)?;
    net.expect_no_completion(CONTROL, "the control queue unmapped")?;
    net.expect_loopback("a packet, the control queue unmapped", &packet(MAC, 100))?;
    net.map_control(1)?;
    net.kick(CONTROL)?;
    check("the command, mapped again", net.next_ack()?, ERR)
}

/// The increments of a queue's counters since `before`.
fn counted(ctx: &Ctx<'_>, net: &NetDriver, queue: u16, before: &[(String, u64)]) -> Result<Vec<u64>, Stop> {
    let now = ctx.counters(&net.device, queue)?;
    let names =
        |counters: &[(String, u64)]| counters.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    check("names of the counters", names(&now), names(before))?;
    Ok(now.iter().zip(before).map(|((_, now), (_, before))| now.wrapping_sub(*before)).collect())
}

fn statistics(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = NetDriver::start(ctx)?;
    let names: [(u16, &[&str]); 3] = [
        (RX, &["rx packets", "rx bytes", "rx errors", "rx overruns", "rx drops"]),
        (TX, &["tx packets", "tx bytes", "tx errors", "tx drops"]),
        (CONTROL, &["cvq requests", "cvq successes", "cvq errors"]),
    ];
    let mut before = Vec::new();
    for (queue, names) in names {
        let counters = ctx.counters(&net.device, queue)?;
        let seen: Vec<_> = counters.iter().map(|(name, _)| name.as_str()).collect();
        check(&format!("counters of queue {queue}"), seen, names.to_vec())?;
        before.push(counters);
    }
    let [rx, tx, control] = before.as_slice() else { return Err(Stop::Failed("no counters".to_owned())) };
    // Header, address and 46 bytes: 64.
    net.expect_loopback("a packet", &packet(MAC, 46))?;
    net.transmit(&packet(OTHER, 46))?;
    net.transmit(&packet(MAC, 46))?;
    net.add_unmapped_receive_buffer(64)?;
    net.send(&packet(MAC, 46))?;
    net.expect_no_completion(TX, "a packet whose receive buffer is not mapped")?;
    check("counters of the receive queue", counted(ctx, &net, RX, rx)?, vec![1, 64, 1, 1, 1])?;
    check("counters of the transmit queue", counted(ctx, &net, TX, tx)?, vec![4, 256, 0, 0])?;
    net.command(&set_mac(OTHER))?;
    net.command(&[1, 0])?;
    net.add_request(CONTROL, &[UNWRITTEN], 1)?;
    net.kick(CONTROL)?;
    net.expect_no_completion(CONTROL, "a command of one byte")?;
    check("counters of the control queue", counted(ctx, &net, CONTROL, control)?, vec![3, 1, 2])?;
    // Neither reset nor close clears the counters.
    prepare("VHOST_VDPA_SET_STATUS", net.device.set_status(Status::RESET))?;
    drop(net);
    let mut net = NetDriver::start(ctx)?;
    net.expect_loopback("a packet after another open", &packet(MAC, 46))?;
    check("counters of the receive queue", counted(ctx, &net, RX, rx)?, vec![2, 128, 1, 1, 1])
}
