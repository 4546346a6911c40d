//! Saved states of every released version are understood for ever.

use vdpa_client::state::v1::State;
use vdpa_client::state::{Sections, decode, encode};

const V1: &[u8] = include_bytes!("golden/v1.state");

#[test]
fn version_1() {
    let mut sections = decode(V1).unwrap();
    let state = State::take(&mut sections).unwrap();
    assert_eq!(state.update.strategy, "resume");
    assert_eq!((state.update.pid, state.update.suspend_ns), (4711, 1_000));
    assert_eq!(state.session.device_fd, Some(5));
    assert_eq!(state.session.path.as_deref(), Some("/run/vdpa/dev/vdpa0"));
    assert_eq!((state.session.features, state.session.backend_features), (0x3_0000_0200, 0x33e));
    assert_eq!(state.memory.regions.len(), 2);
    assert_eq!(state.memory.regions[1].iova, 0x1_0000_0000);
    let queue = &state.queues.queues[0];
    assert_eq!((queue.size, queue.base, queue.kick_fd, queue.call_fd), (256, Some(65535), 8, 9));
    assert_eq!((queue.driver.avail_index, queue.driver.last_used_index, queue.driver.free), (1, 65535, 251));
    assert_eq!(queue.driver.in_flight[1].descriptors, [3, 4]);
    assert_eq!(sections.take("vmm/cpu").unwrap().payload, b"opaque");
    assert!(sections.take("vmm/hint").unwrap().optional);
    sections.ensure_consumed().unwrap();
}

/// What is written today is the same, byte for byte.
#[test]
fn version_1_is_still_written() {
    let sections = decode(V1).unwrap();
    let mut again = decode(V1).unwrap();
    let state = State::take(&mut again).unwrap();
    let mut written = again.clone();
    state.put(&mut written).unwrap();
    for section in sections.iter() {
        assert_eq!(written.take(&section.name).as_ref(), Some(section));
    }
    assert_eq!(encode(&sections).unwrap(), V1);
}

/// With `VDPA_WRITE_SEEDS` these begin the corpus of the fuzz target `saved_state`.
#[test]
fn parts_of_version_1_are_whole_states() {
    let sections = decode(V1).unwrap();
    let mut seeds = vec![("v1".to_owned(), V1.to_vec())];
    for section in sections.iter() {
        let mut one = Sections::default();
        one.push(section.clone());
        let bytes = encode(&one).unwrap();
        assert_eq!(decode(&bytes).as_ref(), Ok(&one));
        seeds.push((section.name.replace('/', "-"), bytes));
    }
    if let Some(dir) = std::env::var_os("VDPA_WRITE_SEEDS") {
        let dir = std::path::Path::new(&dir).join("saved_state");
        std::fs::create_dir_all(&dir).unwrap();
        seeds.iter().for_each(|(name, bytes)| std::fs::write(dir.join(name), bytes).unwrap());
    }
}
