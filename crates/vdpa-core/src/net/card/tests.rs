use super::*;

const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
const FEATURES: Features = Features(u64::MAX);

/// Effects that succeed, or not.
struct Noted(Vec<String>, bool);

impl Effects for Noted {
    fn set_pairs(&mut self, pairs: u16) -> bool {
        self.0.push(format!("pairs {pairs}"));
        self.1
    }

    fn set_offloads(&mut self, offloads: Features) -> bool {
        self.0.push(format!("offloads {offloads}"));
        self.1
    }
}

fn run(state: &CardState, command: &[u8]) -> Ack {
    state.execute(command, FEATURES, 4, &mut Noted(Vec::new(), true))
}

/// A packet to an address, in a VLAN or in none.
fn frame(to: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
    let tag = vlan.map(|vlan| [[0x81, 0], vlan.to_be_bytes()].concat()).unwrap_or_default();
    [&to[..], &MAC_B, &tag, &[8, 0]].concat()
}

fn table(single: &[[u8; 6]], groups: &[[u8; 6]]) -> Vec<u8> {
    let list =
        |list: &[[u8; 6]]| [&u32::try_from(list.len()).unwrap().to_le_bytes()[..], &list.concat()].concat();
    [vec![1, 0], list(single), list(groups)].concat()
}

#[test]
fn everything_is_received_until_the_driver_says_what_it_wants() {
    let state = CardState::new(MAC_A);
    assert!(state.accepts(&frame(MAC_B, Some(7)), FEATURES));
    assert_eq!(run(&state, &[0, 0, 0]), Ack::Ok);
    assert!(!state.accepts(&frame(MAC_B, None), FEATURES) && state.accepts(&frame(MAC_A, None), FEATURES));
    assert!(
        state.accepts(&frame([0xff; 6], None), FEATURES) && !state.accepts(&frame(GROUP, None), FEATURES)
    );
    state.reset();
    assert!(state.accepts(&frame(MAC_B, None), FEATURES));
}

#[test]
fn filters_and_modes() {
    let state = CardState::new(MAC_A);
    run(&state, &[0, 0, 0]);
    assert_eq!(run(&state, &table(&[MAC_B], &[GROUP])), Ack::Ok);
    assert!(state.accepts(&frame(MAC_B, None), FEATURES) && state.accepts(&frame(GROUP, None), FEATURES));
    assert!(!state.accepts(&frame([1, 0, 0, 0, 0, 9], None), FEATURES));
    for (mode, to) in [(3, GROUP), (4, MAC_A), (5, [0xff; 6])] {
        assert_eq!(run(&state, &[0, mode, 1]), Ack::Ok);
        assert!(!state.accepts(&frame(to, None), FEATURES), "mode {mode}");
        run(&state, &[0, mode, 0]);
    }
    let many: Vec<_> = (0..30).map(|n| [2, 0, 0, 0, 1, n]).collect();
    assert_eq!(run(&state, &table(&many, &[GROUP])), Ack::Ok);
    assert!(state.accepts(&frame([2, 9, 9, 9, 9, 9], None), FEATURES), "the list was too long");
    assert!(!state.accepts(&frame([1, 0, 0, 0, 0, 9], None), FEATURES), "that of groups was not");
    assert!(state.accepts(&frame(GROUP, None), FEATURES));
    for wrong in [&table(&[MAC_A], &[])[..14], &[1, 0, 0, 0, 0, 0], &[1, 0, 255, 255, 255, 255, 0, 0, 0, 0]] {
        assert_eq!(run(&state, wrong), Ack::Err);
    }
}

#[test]
fn vlans() {
    let state = CardState::new(MAC_A);
    run(&state, &[0, 0, 0]);
    assert!(!state.accepts(&frame(MAC_A, Some(5)), FEATURES));
    assert!(state.accepts(&frame(MAC_A, Some(5)), FEATURES.without(Features::NET_CTRL_VLAN)));
    assert_eq!(run(&state, &[2, 0, 5, 0]), Ack::Ok);
    assert!(
        state.accepts(&frame(MAC_A, Some(5)), FEATURES) && !state.accepts(&frame(MAC_A, Some(6)), FEATURES)
    );
    assert_eq!(run(&state, &[2, 1, 5, 0]), Ack::Ok);
    assert!(!state.accepts(&frame(MAC_A, Some(5)), FEATURES));
    assert_eq!(run(&state, &[2, 0, 0, 0x10]), Ack::Err, "4096");
    for vlan in 1..=17 {
        assert_eq!(run(&state, &[2, 0, vlan, 0]), Ack::Ok);
        assert!((1..=vlan).all(|vlan| state.accepts(&frame(MAC_A, Some(vlan.into())), FEATURES)));
        assert_eq!(state.accepts(&frame(MAC_A, Some(99)), FEATURES), vlan > 16);
    }
}

#[test]
fn pairs_and_offloads_have_their_limits() {
    let state = CardState::new(MAC_A);
    assert_eq!(state.pairs(), 1);
    for (pairs, ack) in [(0, Ack::Err), (5, Ack::Err), (0x8001, Ack::Err), (4, Ack::Ok), (1, Ack::Ok)] {
        let command = [&[4, 0][..], &u16::to_le_bytes(pairs)].concat();
        assert_eq!(run(&state, &command), ack, "{pairs}");
    }
    let mut fails = Noted(Vec::new(), false);
    assert_eq!(state.execute(&[4, 0, 2, 0], FEATURES, 4, &mut fails), Ack::Err);
    assert_eq!((state.pairs(), fails.0), (1, vec!["pairs 2".into()]));
    let negotiated = FEATURES.without(Features::NET_GUEST_ECN);
    let set = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    let offloads = |bits| state.execute(&set(bits), negotiated, 4, &mut Noted(Vec::new(), true));
    assert_eq!(state.offloads(negotiated), negotiated & GUEST_OFFLOADS);
    assert_eq!(
        (offloads(1 << 9), offloads(1 << 11)),
        (Ack::Err, Ack::Err),
        "not negotiated, none of the driver's"
    );
    assert_eq!(offloads(1 << 1), Ack::Ok);
    assert_eq!(state.offloads(negotiated), Features(2));
    assert_eq!(offloads(0), Ack::Ok);
    assert_eq!(state.offloads(negotiated), Features::NONE);
}

#[test]
fn commands_need_their_features() {
    let state = CardState::new(MAC_A);
    let commands: [(&[u8], _); 8] = [
        (&[0, 0, 1], Features::NET_CTRL_RX),
        (&[0, 2, 1], Features::NET_CTRL_RX_EXTRA),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], Features::NET_CTRL_RX),
        (&[1, 1, 2, 0, 0, 0, 0, 3], Features::NET_CTRL_MAC_ADDR),
        (&[2, 0, 1, 0], Features::NET_CTRL_VLAN),
        (&[3, 0], Features::NET_GUEST_ANNOUNCE),
        (&[4, 0, 1, 0], Features::NET_MQ),
        (&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0], Features::NET_CTRL_GUEST_OFFLOADS),
    ];
    for (command, feature) in commands {
        let run = |features| state.execute(command, features, 4, &mut Noted(Vec::new(), true));
        assert_eq!((run(FEATURES.without(feature)), run(FEATURES)), (Ack::Err, Ack::Ok), "{command:?}");
    }
    for wrong in
        [&[][..], &[0], &[0, 6, 1], &[0, 0], &[0, 0, 1, 1], &[1, 2], &[6, 0], &[1, 1, 1, 0, 0, 0, 0, 3]]
    {
        assert_eq!(run(&state, wrong), Ack::Err, "{wrong:?}");
    }
    assert_eq!(state.mac(), [2, 0, 0, 0, 0, 3]);
}

#[test]
fn the_link_and_announcements() {
    let state = CardState::new(MAC_A);
    assert_eq!(state.status(FEATURES), LINK_UP);
    state.set_link(false);
    assert_eq!(state.status(FEATURES), 0);
    state.set_link(true);
    assert_eq!(state.status(FEATURES), LINK_UP | ANNOUNCE);
    assert_eq!(state.status(FEATURES.without(Features::NET_GUEST_ANNOUNCE)), LINK_UP);
    assert_eq!(run(&state, &[3, 0]), Ack::Ok);
    assert_eq!(state.status(FEATURES), LINK_UP);
}

#[test]
fn what_was_saved_is_restored_and_nothing_else() {
    let state = CardState::new(MAC_A);
    for command in
        [&[0, 0, 0][..], &[1, 1, 2, 0, 0, 0, 0, 2], &table(&[MAC_A], &[GROUP]), &[2, 0, 7, 0], &[4, 0, 3, 0]]
    {
        assert_eq!(run(&state, command), Ack::Ok);
    }
    let saved = state.save();
    let other = CardState::new([2; 6]);
    assert_eq!(other.restore(&saved, 2, false), Err(Errno::INVAL), "three pairs");
    assert_eq!(other.restore(&saved, 4, false), Ok(()));
    assert_eq!((other.mac(), other.pairs(), other.save()), (MAC_B, 3, saved.clone()));
    assert!(
        other.accepts(&frame(GROUP, Some(7)), FEATURES) && !other.accepts(&frame(GROUP, Some(8)), FEATURES)
    );
    let newer = CardState::new(MAC_A);
    assert_eq!((newer.restore(&saved, 4, true), newer.mac()), (Ok(()), MAC_A));
    let later = [&[2], &saved[1..]].concat();
    let zeros = [&[1][..], &[0; PARTS * 8]].concat();
    let ones = [&[1][..], &[0xff; PARTS * 8]].concat();
    let (short, long) = (&saved[..saved.len() - 1], [&saved[..], &[0]].concat());
    for wrong in [short, &long, &later, &zeros, &ones, &[]] {
        assert_eq!(newer.restore(wrong, 4, false), Err(Errno::INVAL));
    }
    let memory = Arc::clone(&state.memory);
    assert_eq!(CardState::within(memory, [4; 6]).mac(), MAC_B, "what is in there goes before the attribute");
}

#[test]
fn a_packet_in_parts_is_finished_by_who_finds_some_of_them_given() {
    let state = CardState::new(MAC_A);
    let parts = Parts { in_flight: 300, buffers: 3, last: 70_000 };
    assert_eq!(state.parts(7), None);
    state.note_parts(7, Some(parts));
    state.note_parts(8, Some(parts));
    assert_eq!((state.parts(7), state.parts(6), state.parts(8)), (Some(parts), None, None));
    let left = [300, 299, 298, 297, 290, 0].map(|in_flight| parts.left(in_flight));
    assert_eq!(left, [0, 2, 1, 0, 0, 0]);
    let saved = state.save();
    state.note_parts(7, None);
    assert_eq!((state.parts(7), state.save()), (None, saved), "it is no state of the card");
    state.note_parts(0, Some(parts));
    state.reset();
    assert_eq!(state.parts(0), None);
}

/// What version 1 has saved is read for ever. `VDPA_WRITE_GOLDEN` writes the file where there is none.
#[test]
fn the_state_of_version_1_is_read() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/net-card-v1.bin");
    if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, everything_set().save()).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    let state = CardState::new(MAC_A);
    assert_eq!(state.restore(&golden, 4, false), Ok(()));
    assert_eq!(
        (state.mac(), state.pairs(), state.is_link_up(), state.is_promiscuous()),
        (MAC_B, 3, false, false)
    );
    assert_eq!(state.offloads(FEATURES), Features(2));
    let features = FEATURES;
    for (to, vlan, passes) in [
        (MAC_B, Some(7), true),
        (MAC_B, Some(4095), true),
        (MAC_B, Some(8), false),
        (MAC_A, None, true),
        ([2, 0, 0, 0, 0, 9], None, false),
        (GROUP, None, true),
        ([1, 0, 0, 0, 0, 9], None, false),
        ([0xff; 6], None, false),
    ] {
        assert_eq!(state.accepts(&frame(to, vlan), features), passes, "{to:x?} {vlan:?}");
    }
    state.set_link(true);
    assert_eq!(state.status(FEATURES), LINK_UP | ANNOUNCE);
    assert_eq!(everything_set().save(), golden, "version 1 is written as it was released");
    // The same words, in memory that has outlived a process.
    let memory = CardState::new(MAC_A);
    let words = golden[1..].chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    words.enumerate().for_each(|(word, value)| memory.memory.store(word, value));
    assert_eq!(CardState::within(Arc::clone(&memory.memory), MAC_A).save(), golden);
}

/// A card of which every field was set.
fn everything_set() -> CardState {
    let state = CardState::new(MAC_A);
    let commands = [
        &[0, 0, 0][..],
        &[0, 5, 1],
        &[1, 1, 2, 0, 0, 0, 0, 2],
        &table(&[MAC_A], &[GROUP]),
        &[2, 0, 7, 0],
        &[2, 0, 0xff, 0x0f],
        &[4, 0, 3, 0],
        &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        &[3, 0],
    ];
    state.announce();
    for command in commands {
        assert_eq!(run(&state, command), Ack::Ok, "{command:?}");
    }
    state.set_link(false);
    state
}
