//! The headers and the control commands of a driver of `net`, and what a network card saves.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vdpa_core::features::Features;
use vdpa_core::net::card::{CardState, Effects, GUEST_OFFLOADS, PAIRS_MAX, WORDS};
use vdpa_core::net::transmit::{self, FRAME_MAX, flags, gso};
use vdpa_core::net::{Ack, LINK_UP, NetHeader};
use zerocopy::FromBytes;

#[derive(Arbitrary, Debug)]
struct Input {
    mac: [u8; 6],
    pairs: u8,
    features: u64,
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug)]
enum Op {
    /// A packet header, before a frame of so many bytes.
    Header([u8; 12], u32),
    /// As [`Op::Header`], of a kind of segments that is often right.
    Segments { kind: u8, hdr_len: u8, gso_size: u8, csum_start: u8, csum_offset: u8, frame: u16 },
    /// A command, which has its effects or not.
    Command(Vec<u8>, bool),
    /// A command of a class that there is.
    Known { class: u8, command: u8, body: Vec<u8>, succeeds: bool },
    /// A table of addresses.
    Table { single: Vec<[u8; 6]>, groups: Vec<[u8; 6]> },
    /// The first bytes of a packet that is received.
    Receive(Vec<u8>),
    Link(bool),
    Announce,
    Mac([u8; 6]),
    Reset,
    /// State of another process.
    Restore(Vec<u8>, bool),
    /// As [`Op::Restore`], of the right size and with marks that are often right.
    Words([u64; 8], u8),
}

/// What commands have changed beside the state.
struct Noted {
    succeeds: bool,
    pairs: u16,
    offloads: Option<Features>,
}

impl Effects for Noted {
    fn set_pairs(&mut self, pairs: u16) -> bool {
        if self.succeeds {
            self.pairs = pairs;
        }
        self.succeeds
    }

    fn set_offloads(&mut self, offloads: Features) -> bool {
        if self.succeeds {
            self.offloads = Some(offloads);
        }
        self.succeeds
    }
}

/// What the kernel gets of a header is within the packet, and was negotiated.
fn check_header(header: NetHeader, frame: u64, features: Features) {
    let Ok(checked) = transmit::check(header, frame, features) else { return };
    assert!((14..=FRAME_MAX).contains(&frame));
    assert_eq!(checked.flags & !flags::NEEDS_CSUM, 0);
    assert_eq!(checked.num_buffers.get(), 0);
    assert!(u64::from(checked.hdr_len.get()) <= frame);
    if checked.flags == 0 {
        assert_eq!((checked.csum_start.get(), checked.csum_offset.get(), checked.gso_type), (0, 0, gso::NONE));
    } else {
        assert!(features.has(Features::NET_CSUM) && checked.csum_start.get() >= 14);
        let end = u64::from(checked.csum_start.get()) + u64::from(checked.csum_offset.get()) + 2;
        assert!(end <= frame);
    }
    let needed = match checked.gso_type & !gso::ECN {
        gso::NONE => {
            assert_eq!((checked.gso_type, checked.gso_size.get(), checked.hdr_len.get()), (0, 0, 0));
            return;
        }
        gso::TCPV4 => Features::NET_HOST_TSO4,
        gso::TCPV6 => Features::NET_HOST_TSO6,
        gso::UDP_L4 => Features::NET_HOST_USO,
        other => panic!("segments of kind {other}"),
    };
    assert!(features.has(needed) && checked.gso_size.get() > 0 && checked.flags != 0);
    assert_eq!(transmit::check(checked, frame, features), Ok(checked), "what was checked passes");
}

fn check_state(state: &CardState, pairs: u16, features: Features) {
    assert!((1..=pairs).contains(&state.pairs()));
    assert!((GUEST_OFFLOADS & features).contains(state.offloads(features)));
    let status = state.status(features);
    assert_eq!(status & LINK_UP != 0, state.is_link_up());
    assert!(status < 4);
    let saved = state.save();
    let other = CardState::new([2; 6]);
    assert_eq!(other.restore(&saved, pairs, false), Ok(()), "what a card has saved is restored");
    assert_eq!(other.save(), saved);
    assert_eq!((other.mac(), other.pairs()), (state.mac(), state.pairs()));
}

fn execute(state: &CardState, noted: &mut Noted, command: &[u8], features: Features, pairs: u16) {
    let before = state.save();
    if state.execute(command, features, pairs, noted) == Ack::Err {
        assert_eq!(state.save(), before, "a command that is refused changes nothing: {command:?}");
    }
    assert_eq!(state.pairs(), noted.pairs, "after {command:?}");
    if let Some(offloads) = noted.offloads {
        assert_eq!(state.offloads(features), offloads, "after {command:?}");
    }
}

fn list(addresses: &[[u8; 6]]) -> Vec<u8> {
    let count = u32::try_from(addresses.len()).unwrap_or(u32::MAX).to_le_bytes();
    [&count[..], addresses.as_flattened()].concat()
}

fuzz_target!(|input: Input| {
    let (pairs, features) = (u16::from(input.pairs) % PAIRS_MAX + 1, Features(input.features));
    let state = CardState::new(input.mac);
    let mut noted = Noted { succeeds: true, pairs: 1, offloads: None };
    for op in input.ops.iter().take(200) {
        match op {
            Op::Header(bytes, frame) => {
                let header = NetHeader::read_from_bytes(bytes).expect("12 bytes");
                check_header(header, (*frame).into(), features);
                check_header(header, u64::from(*frame) % FRAME_MAX, Features(u64::MAX));
            }
            Op::Segments { kind, hdr_len, gso_size, csum_start, csum_offset, frame } => {
                let header = NetHeader {
                    flags: flags::NEEDS_CSUM,
                    gso_type: kind & 0x87,
                    hdr_len: u16::from(*hdr_len).into(),
                    gso_size: u16::from(*gso_size).into(),
                    csum_start: u16::from(*csum_start).into(),
                    csum_offset: u16::from(*csum_offset).into(),
                    num_buffers: 0.into(),
                };
                check_header(header, (*frame).into(), features);
            }
            Op::Command(bytes, succeeds) => {
                noted.succeeds = *succeeds;
                execute(&state, &mut noted, bytes, features, pairs);
            }
            Op::Known { class, command, body, succeeds } => {
                noted.succeeds = *succeeds;
                let bytes = [&[class % 7, command % 7][..], body].concat();
                execute(&state, &mut noted, &bytes, features, pairs);
            }
            Op::Table { single, groups } => {
                let bytes = [vec![1, 0], list(single), list(groups)].concat();
                execute(&state, &mut noted, &bytes, features, pairs);
            }
            Op::Receive(frame) => {
                let accepted = state.accepts(frame, features);
                assert!(accepted || !state.is_promiscuous());
            }
            Op::Link(up) => state.set_link(*up),
            Op::Announce => state.announce(),
            Op::Mac(mac) => state.set_mac(*mac),
            Op::Reset => {
                state.reset();
                noted = Noted { succeeds: true, pairs: 1, offloads: None };
            }
            Op::Restore(bytes, outlived) => restore(&state, &mut noted, bytes, pairs, *outlived),
            Op::Words(words, mark) => {
                let all = (0..WORDS - usize::from(PAIRS_MAX)).map(|word| words[word % words.len()] & (u64::MAX >> (mark % 64)));
                let mut bytes: Vec<u8> =
                    std::iter::once(1).chain(all.flat_map(u64::to_le_bytes)).collect();
                // The mark of words that were written.
                bytes[8] |= 0x80;
                restore(&state, &mut noted, &bytes, pairs, false);
            }
        }
        check_state(&state, pairs, features);
    }
});

/// Restores state that nobody has saved: all of it, or nothing.
fn restore(state: &CardState, noted: &mut Noted, bytes: &[u8], pairs: u16, outlived: bool) {
    let before = state.save();
    match state.restore(bytes, pairs, outlived) {
        Ok(()) if !outlived => {
            assert_eq!(state.save(), bytes);
            *noted = Noted { succeeds: true, pairs: state.pairs(), offloads: None };
        }
        _ => assert_eq!(state.save(), before),
    }
}
