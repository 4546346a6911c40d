//! Cases about a network card for packets of others: what drivers rely on in its features, its configuration space and its control queue
//! (virtio 1.3 section 5.1). They need neither a peer nor a network: nothing is received, and what is sent may be lost.

use vdpa_core::Errno;
use vdpa_core::features::{Bit, Features};
use vdpa_core::net::missing_dependency;

use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::net_driver::{CONTROL, HEADER, MAC, NetDriver, TX, max_pairs, packet};
use crate::request::Request;

/// The needs of each case: a card with a control queue. The kernel's simulator has no checksum offload.
const N: [Need; 4] = [
    Need::DeviceId(1),
    Need::RingSize(64),
    Need::Feature(Features::NET_CTRL_VQ),
    Need::Feature(Features::NET_CSUM),
];

macro_rules! case {
    ($id:literal, $spec:literal, [$($request:ident),+], [$($feature:ident),*], $run:ident) => {
        Case {
            id: $id,
            spec: $spec,
            covers: &[$(Request::$request),+],
            needs: &[N[0], N[1], N[2], N[3], $(Need::Feature(Features::$feature)),*],
            run: $run,
        }
    };
}

pub(super) const CASES: &[Case] = &[
    case!("card.config", "1.5, virtio 1.3 5.1.4", [GET_CONFIG, GET_CONFIG_SIZE, GET_FEATURES], [], config),
    case!(
        "card.config-read-only",
        "1.5, virtio 1.3 5.1.4",
        [SET_CONFIG],
        [NET_CTRL_MAC_ADDR],
        config_read_only
    ),
    case!("card.feature-needs", "1.4, virtio 1.3 5.1.3.1", [GET_FEATURES, SET_FEATURES], [], feature_needs),
    case!("card.control-queue", "1.6, virtio 1.3 5.1.2", [GET_VQS_COUNT], [], control_queue),
    case!(
        "card.control-queue-pairs",
        "1.6, virtio 1.3 5.1.2",
        [GET_VQS_COUNT],
        [NET_MQ],
        control_queue_pairs
    ),
    case!("card.unknown-command", "1.6, virtio 1.3 5.1.6.5", [SET_VRING_KICK], [], unknown_command),
    case!("card.not-negotiated", "1.4, virtio 1.3 5.1.6.5", [SET_FEATURES], [], not_negotiated),
    case!("card.no-room-for-ack", "1.6, virtio 1.3 5.1.6.5", [SET_VRING_KICK], [], no_room_for_ack),
    case!("card.modes", "1.6, virtio 1.3 5.1.6.5.1", [SET_VRING_KICK], [NET_CTRL_RX], modes),
    case!("card.more-modes", "1.6, virtio 1.3 5.1.6.5.1", [SET_VRING_KICK], [NET_CTRL_RX_EXTRA], more_modes),
    case!("card.mac-table", "1.6, virtio 1.3 5.1.6.5.2", [SET_VRING_KICK], [NET_CTRL_RX], mac_table),
    case!("card.mac-address", "1.5, virtio 1.3 5.1.6.5.2", [GET_CONFIG], [NET_CTRL_MAC_ADDR], mac_address),
    case!("card.vlans", "1.6, virtio 1.3 5.1.6.5.3", [SET_VRING_KICK], [NET_CTRL_VLAN], vlans),
    case!("card.announcement", "1.5, virtio 1.3 5.1.6.5.4", [GET_CONFIG], [NET_GUEST_ANNOUNCE], announcement),
    case!("card.pairs", "1.6, virtio 1.3 5.1.6.5.5", [GET_CONFIG], [NET_MQ], pairs),
    case!(
        "card.offloads",
        "1.4, virtio 1.3 5.1.6.5.8",
        [SET_FEATURES],
        [NET_CTRL_GUEST_OFFLOADS, NET_GUEST_CSUM],
        offloads
    ),
    case!("card.transmit", "1.6, virtio 1.3 5.1.6.2", [SET_VRING_KICK, GET_VRING_BASE], [], transmit),
    case!("card.bad-headers", "1.6, virtio 1.3 5.1.6.2.2", [SET_VRING_KICK], [], bad_headers),
];

const OK: u8 = 0;
const ERR: u8 = 1;

/// All features that the suite's driver of a card can use.
fn features(ctx: &Ctx<'_>) -> Features {
    [Features::RING_PACKED, Features::IN_ORDER, Features::RING_EVENT_IDX]
        .into_iter()
        .fold(ctx.probe().features, Features::without)
}

fn start(ctx: &Ctx<'_>) -> Result<NetDriver, Stop> {
    NetDriver::start_card(ctx, features(ctx))
}

fn word(bytes: Vec<u8>) -> u16 {
    bytes.try_into().map_or(0, u16::from_le_bytes)
}

fn config(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let offers = |bit| ctx.probe().features.has(bit);
    let bytes =
        |offset, len, what| prepare(&format!("VHOST_VDPA_GET_CONFIG of {what}"), device.config(offset, len));
    if offers(Features::NET_MAC) {
        let mac = bytes(0, 6, "mac")?;
        let valid = mac.first().is_some_and(|first| first & 1 == 0) && mac.iter().any(|byte| *byte != 0);
        check(&format!("mac {mac:02x?} is the address of one card"), valid, true)?;
    }
    if offers(Features::NET_STATUS) {
        let status = word(bytes(6, 2, "status")?);
        check("bits of status that there are not", status & !3, 0)?;
    }
    if offers(Features::NET_MQ) {
        let pairs = word(bytes(8, 2, "max_virtqueue_pairs")?);
        check(&format!("{pairs} pairs are 1 to 0x8000"), (1..=0x8000).contains(&pairs), true)?;
        check("queues for all pairs, and that for commands", ctx.probe().queues, 2 * u32::from(pairs) + 1)?;
    }
    if offers(Features::NET_MTU) {
        let mtu = word(bytes(10, 2, "mtu")?);
        check(&format!("an MTU of {mtu} is at least 68"), mtu >= 68, true)?;
    }
    Ok(())
}

fn config_read_only(ctx: &mut Ctx<'_>) -> Outcome {
    let net = start(ctx)?;
    let before = prepare("VHOST_VDPA_GET_CONFIG", net.device.config(0, 12))?;
    // The request itself may be refused or not: drivers of version 1 make none.
    let _ = net.device.set_config(0, &[0xff; 12]);
    check("GET_CONFIG after SET_CONFIG", net.device.config(0, 12), Ok(before))
}

fn feature_needs(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let offered = ctx.probe().features;
    check("a feature that another one needs and that is not offered", missing_dependency(offered), None)?;
    let bits = (0..64).map(Bit).filter(|bit| offered.has(*bit));
    for bit in bits {
        let left = offered.without(bit);
        if missing_dependency(left).is_some() {
            let set = device.set_features(left);
            check(&format!("SET_FEATURES of {left}, without bit {}", bit.0), set, Err(Errno::INVAL))?;
        }
    }
    check("SET_FEATURES of all", device.set_features(offered), Ok(()))
}

fn control_queue(ctx: &mut Ctx<'_>) -> Outcome {
    // Without MQ the third queue is that of commands, however many there are.
    let mut net = NetDriver::start_card(ctx, features(ctx).without(Features::NET_MQ))?;
    check("an unknown command", net.command(&[0xff, 0])?, ERR)
}

fn control_queue_pairs(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    let queues = 2 * u32::from(max_pairs(&net.device)?) + 1;
    check("GET_VQS_COUNT", net.device.get(Request::GET_VQS_COUNT).map(u32::from_ne_bytes), Ok(queues))?;
    check("an unknown command in the last queue", net.command(&[0xff, 0])?, ERR)
}

fn unknown_command(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    for command in
        [&[0xff, 0][..], &[0xff, 0xff, 1, 2, 3, 4], &[0, 0xff, 1], &[1, 0xff], &[4, 0xff, 1, 0], &[1]]
    {
        check(&format!("the command {command:02x?}"), net.command(command)?, ERR)?;
    }
    Ok(())
}

/// A command of each kind, and the feature without which it is an error.
const COMMANDS: [(Bit, &[u8]); 8] = [
    (Features::NET_CTRL_RX, &[0, 0, 1]),
    (Features::NET_CTRL_RX, &[0, 1, 1]),
    (Features::NET_CTRL_RX_EXTRA, &[0, 2, 1]),
    (Features::NET_CTRL_RX, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    (Features::NET_CTRL_VLAN, &[2, 0, 1, 0]),
    (Features::NET_GUEST_ANNOUNCE, &[3, 0]),
    (Features::NET_MQ, &[4, 0, 1, 0]),
    (Features::NET_CTRL_GUEST_OFFLOADS, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
];

fn not_negotiated(ctx: &mut Ctx<'_>) -> Outcome {
    let all = features(ctx);
    for (bit, command) in COMMANDS.into_iter().filter(|(bit, _)| all.has(*bit)) {
        // Without what needs it, too.
        let mut left = all.without(bit);
        if bit == Features::NET_CTRL_RX {
            left = left.without(Features::NET_CTRL_RX_EXTRA);
        }
        if missing_dependency(left).is_some() {
            continue;
        }
        let mut net = NetDriver::start_card(ctx, left)?;
        check(
            &format!("the command {command:02x?} without feature bit {}", bit.0),
            net.command(command)?,
            ERR,
        )?;
        drop(net);
        let mut net = NetDriver::start_card(ctx, all)?;
        check(&format!("the command {command:02x?} with all features"), net.command(command)?, OK)?;
    }
    Ok(())
}

fn no_room_for_ack(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    net.add_request(CONTROL, &[0xff, 0], 0)?;
    net.kick(CONTROL)?;
    check("length of the answer to a command without room for one", net.completed_len(CONTROL)?, 0)?;
    check("the next command", net.command(&[0xff, 0])?, ERR)
}

fn modes(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    switches(&mut net, &[0, 1])
}

fn more_modes(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    switches(&mut net, &[2, 3, 4, 5])
}

/// Modes of reception are switched on and off; a command with another length is an error.
fn switches(net: &mut NetDriver, commands: &[u8]) -> Outcome {
    for &command in commands {
        for (body, want) in [(&[1][..], OK), (&[0], OK), (&[], ERR), (&[1, 0], ERR)] {
            let ack = net.command(&[&[0, command], body].concat())?;
            check(&format!("command {command} of class 0 with {body:02x?}"), ack, want)?;
        }
    }
    Ok(())
}

fn mac_table(ctx: &mut Ctx<'_>) -> Outcome {
    const ONE: [u8; 10] = [1, 0, 0, 0, 2, 0, 0, 0, 0, 1];
    const NONE: [u8; 4] = [0; 4];
    let mut net = start(ctx)?;
    let many = [&200_u32.to_le_bytes()[..], &[2; 1200], &NONE].concat();
    for (what, body, want) in [
        ("two empty lists", [NONE, NONE].concat(), OK),
        ("an address", [&ONE[..], &NONE].concat(), OK),
        ("an address and a group", [ONE, [1, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1]].concat(), OK),
        ("more addresses than a card can have", many, OK),
        ("one list", ONE.to_vec(), ERR),
        ("a list that is longer than the command", [&[9, 0, 0, 0][..], &ONE, &NONE].concat(), ERR),
        ("the longest list", [&[0xff; 4][..], &NONE].concat(), ERR),
        ("a byte too many", [&ONE[..], &NONE, &[0]].concat(), ERR),
        ("nothing", Vec::new(), ERR),
    ] {
        check(what, net.command(&[&[1, 0][..], &body].concat())?, want)?;
    }
    Ok(())
}

fn mac_address(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    let before = prepare("VHOST_VDPA_GET_CONFIG", net.device.config(0, 6))?;
    check("an address of 5 bytes", net.command(&[&[1, 1], &MAC[..5]].concat())?, ERR)?;
    check("GET_CONFIG", net.device.config(0, 6), Ok(before.clone()))?;
    check("another address", net.command(&[&[1, 1], &MAC[..]].concat())?, OK)?;
    check("GET_CONFIG", net.device.config(0, 6), Ok(MAC.to_vec()))?;
    check("the address it had", net.command(&[&[1, 1], &before[..]].concat())?, OK)
}

fn vlans(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    for command in [0, 1] {
        for (body, want) in [(&[5, 0][..], OK), (&[0xff, 0x0f], OK), (&[5], ERR), (&[5, 0, 0], ERR)] {
            let ack = net.command(&[&[2, command], body].concat())?;
            check(&format!("command {command} of class 2 with {body:02x?}"), ack, want)?;
        }
    }
    Ok(())
}

fn announcement(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    check("VIRTIO_NET_CTRL_ANNOUNCE_ACK", net.command(&[3, 0])?, OK)?;
    let status = prepare("VHOST_VDPA_GET_CONFIG of status", net.device.config(6, 2))?;
    check("the bit that asks for an announcement, after that", word(status) & 2, 0)?;
    check("another command of the class", net.command(&[3, 1])?, ERR)
}

fn pairs(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    let most = max_pairs(&net.device)?;
    let mut set = |pairs: u16| net.command(&[&[4, 0][..], &pairs.to_le_bytes()].concat());
    for pairs in [0, most + 1, 0x8000, 0x8001, u16::MAX] {
        check(&format!("{pairs:#x} of {most} pairs"), set(pairs)?, ERR)?;
    }
    for pairs in [1, most, 1, most] {
        check(&format!("{pairs} of {most} pairs"), set(pairs)?, OK)?;
    }
    check("one byte", net.command(&[4, 0, 1])?, ERR)
}

fn offloads(ctx: &mut Ctx<'_>) -> Outcome {
    let all = features(ctx);
    let guest = [
        Features::NET_GUEST_CSUM,
        Features::NET_GUEST_TSO4,
        Features::NET_GUEST_TSO6,
        Features::NET_GUEST_ECN,
        Features::NET_GUEST_USO4,
        Features::NET_GUEST_USO6,
    ];
    let mut net = NetDriver::start_card(ctx, all)?;
    let command = |features: Features| [&[5, 0][..], &features.0.to_le_bytes()].concat();
    let negotiated = guest.into_iter().filter(|bit| all.has(*bit)).fold(Features::NONE, Features::with);
    for (what, bits, want) in [
        ("none", Features::NONE, OK),
        ("checksums", Features::of(&[Features::NET_GUEST_CSUM]), OK),
        ("all that were negotiated", negotiated, OK),
        ("one of the device", negotiated.with(Features::NET_CSUM), ERR),
        ("bits that there are not", Features(u64::MAX), ERR),
    ] {
        check(what, net.command(&command(bits))?, want)?;
    }
    check("seven bytes", net.command(&command(negotiated)[..9])?, ERR)?;
    drop(net);
    if all.has(Features::NET_GUEST_TSO4) {
        let left =
            [Features::NET_GUEST_TSO4, Features::NET_GUEST_ECN].into_iter().fold(all, Features::without);
        let mut net = NetDriver::start_card(ctx, left)?;
        let not_negotiated = Features::of(&[Features::NET_GUEST_CSUM, Features::NET_GUEST_TSO4]);
        check("one that was not negotiated", net.command(&command(not_negotiated))?, ERR)?;
    }
    Ok(())
}

fn transmit(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    for len in [54, 60, 1500] {
        net.transmit(&packet(MAC, len))?;
    }
    let base = net.device.vring(Request::GET_VRING_BASE, TX.into(), 0);
    check("GET_VRING_BASE of the transmit queue", base, Ok(3))
}

/// A packet whose header is wrong is dropped, and does not stop those behind it.
fn bad_headers(ctx: &mut Ctx<'_>) -> Outcome {
    let mut net = start(ctx)?;
    let good = packet(MAC, 100);
    let with = |at: usize, bytes: &[u8]| {
        let mut packet = good.clone();
        if let Some(to) = packet.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
        packet
    };
    // Flags, kind of segments, bytes of the headers, of a segment, where the checksum begins, and where it is.
    for (what, packet) in [
        ("a checksum outside of the packet", with(0, &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])),
        ("a checksum behind the packet", with(0, &[1, 0, 0, 0, 0, 0, 34, 0, 200, 0])),
        ("segments of no size", with(0, &[1, 1, 54, 0, 0, 0, 34, 0, 16, 0])),
        ("segments without a checksum", with(0, &[0, 1, 54, 0, 10, 0, 34, 0, 16, 0])),
        ("segments of no kind", with(0, &[1, 0x7f, 54, 0, 10, 0, 34, 0, 16, 0])),
        ("headers that are longer than the packet", with(0, &[1, 1, 0xff, 0xff, 10, 0, 34, 0, 16, 0])),
        ("no packet", good.get(..HEADER).unwrap_or_default().to_vec()),
        ("half a header", vec![0; 5]),
    ] {
        let sent = net.transmit(&packet);
        sent.map_err(|stop| Stop::Failed(format!("{what}: {stop}")))?;
        net.transmit(&good)?;
    }
    Ok(())
}
