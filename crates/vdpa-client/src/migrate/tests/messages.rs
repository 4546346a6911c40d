//! Messages as the fuzz target `migration` reads them.

use super::*;

/// What a source sends, for the target `migration`: with `VDPA_WRITE_SEEDS` it is written as seeds.
#[test]
fn what_is_sent_is_read_by_the_fuzz_target() {
    let mut all = Vec::new();
    for (number, payload) in [
        (0, br#"{"id":"x","device_id":2,"features":12884901888,"page_size":4096,"regions":[{"name":"ram","iova":0,"size":4096,"perm":3}]}"#.to_vec()),
        (1, Vec::new()),
        (2, b"\"no room\"".to_vec()),
        (3, [0_u32.to_le_bytes().to_vec(), 1_u32.to_le_bytes().to_vec(), 3_u64.to_le_bytes().to_vec(), 2_u64.to_le_bytes().to_vec()].concat()),
        (4, Vec::new()),
        (12, b"\"not-mine\"".to_vec()),
    ] {
        let bytes = fuzzing::message(number, &payload);
        assert_eq!(fuzzing::messages(&bytes).unwrap(), 1, "{number}");
        write_seed(&format!("message-{number}"), &bytes);
        all.extend(bytes);
    }
    let (session, _memory) = running(&node(true));
    session.ops().with(|device, _| device.suspend()).unwrap();
    let device = session.ops().with(|device, _| device.save_to_move()).unwrap();
    write_seed("device", &device);
    let switched = offer::Switched { features: session.features(), running: true, queues: Vec::new() };
    let sections = Sections::from_iter([
        Section::json(SWITCHED, 1, &switched).unwrap(),
        Section::new(DEVICE, 1, device),
        Section::new("test/cpu", 1, b"registers".to_vec()),
    ]);
    let state = fuzzing::message(6, &crate::state::encode(&sections).unwrap());
    write_seed("state", &state);
    all.extend(state);
    assert_eq!(fuzzing::messages(&all).unwrap(), 7);
    // Whatever bytes: an error, and no panic.
    let mut random = 1_u64;
    for _ in 0..20_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let mut damaged = all.clone();
        let at = usize::try_from(random).unwrap() % damaged.len();
        damaged[at] ^= u8::try_from(random >> 56).unwrap() | 1;
        assert!(fuzzing::messages(&damaged).is_err(), "byte {at}");
        assert!(fuzzing::messages(&all[at..]).is_err() || at == 0 || all[at..].starts_with(b"VDPM"));
    }
}

fn write_seed(name: &str, bytes: &[u8]) {
    if let Some(dir) = std::env::var_os("VDPA_WRITE_SEEDS") {
        let dir = std::path::Path::new(&dir).join("migration");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(name), bytes).unwrap();
    }
}
