//! States saved by every released version remain readable.

use super::v1::{Driver, InFlight, State};
use super::{Section, Sections, StateError, decode, encode, mappings, packed, v2};

const V1: &[u8] = include_bytes!("../../tests/golden/v1.state");
const V2: &[u8] = include_bytes!("../../tests/golden/v2.state");
/// Version 2 with the sections for mappings without a name and rings that are not enabled.
const MAPPINGS: &[u8] = include_bytes!("../../tests/golden/v2-mappings.state");
/// Version 2 with the sections for packed rings.
const PACKED: &[u8] = include_bytes!("../../tests/golden/v2-packed.state");

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
    assert!(v2::take(&mut decode(V1).unwrap()).is_ok());
}

/// The contents of the version-2 file.
fn current() -> (v2::Prepared, v2::Switch) {
    let memory = |name: &str, fd, offset, size| v2::Memory { name: name.to_owned(), fd, offset, size };
    let mapping = |name: &str, memory, offset, iova, size, perm| v2::Mapping {
        name: name.to_owned(),
        memory,
        offset,
        iova,
        size,
        perm,
        asid: 0,
    };
    let disk = v2::Device {
        name: "disk0".to_owned(),
        strategy: "reset".to_owned(),
        fd: Some(5),
        path: Some("/run/vdpa/dev/vdpa0".to_owned()),
        device_id: 2,
        features: 0x3_0000_0200,
        backend_features: 0x33e,
        running: true,
        mappings: vec![
            mapping("low", 0, 0, 0, 0xc000_0000, 3),
            mapping("high", 0, 0xc000_0000, 0x1_0000_0000, 0x4000_0000, 3),
            mapping("rom", 1, 0, 0x2_0000_0000, 0x1000, 1),
        ],
        queues: vec![v2::Queue {
            index: 1,
            size: 256,
            region: "low".to_owned(),
            desc: 0x1000,
            avail: 0x2000,
            used: 0x3000,
            kick_fd: 8,
            call_fd: 9,
        }],
        guest_queues: vec![v2::GuestQueue {
            index: 0,
            size: 128,
            desc: 0x1_0000_0000,
            driver: 0x1_0000_1000,
            device: 0x1_0000_2000,
            kick_fd: 10,
            call_fd: 11,
        }],
    };
    let update = v2::Update {
        way: "exec".to_owned(),
        predecessor: 4711,
        begun_unix_ns: 1_795_000_000_000_000_000,
        late: vec![v2::Late { name: "vmm/cpu".to_owned(), version: 3, optional: false }],
    };
    let prepared = v2::Prepared {
        update,
        memory: v2::Memories { memories: vec![memory("ram", 6, 0, 1 << 32), memory("rom", 7, 4096, 4096)] },
        devices: v2::Devices { devices: vec![disk] },
        descriptors: v2::Descriptors {
            descriptors: vec![v2::Descriptor { name: "listener".to_owned(), fd: 12 }],
        },
        announced: mappings::Announcement::default(),
    };
    let driver = Driver {
        avail_index: 1,
        last_used_index: 65535,
        free: 253,
        in_flight: vec![
            InFlight { token: 77, descriptors: vec![0], writable: 0 },
            InFlight { token: u64::MAX, descriptors: vec![3, 4], writable: 513 },
        ],
    };
    let (bases, drivers) = (vec![65535, 17], vec![driver]);
    let disk = v2::DeviceState { suspend_ns: 3_000, bases, drivers, ..v2::DeviceState::default() };
    let (begun_ns, saved_ns, prepare_ns, save_ns) = (1_000, 5_000, 123_456, 1_000);
    (prepared, v2::Switch { begun_ns, saved_ns, prepare_ns, save_ns, devices: vec![disk] })
}

fn written((prepared, switch): &(v2::Prepared, v2::Switch)) -> Vec<u8> {
    let mut sections =
        Sections::from_iter([Section::new("vmm/hint", 1, b"may be skipped".to_vec()).optional()]);
    prepared.put(&mut sections).unwrap();
    switch.put(&mut sections).unwrap();
    sections.push(Section::new("vmm/cpu", 3, b"opaque".to_vec()));
    encode(&sections).unwrap()
}

/// The state written today equals the released file byte for byte, and reading it gives the original values. Returns what of the
/// file is the caller's. The environment variable names a file to be written instead.
fn stays_as(variable: &str, state: &(v2::Prepared, v2::Switch), released: &[u8]) -> Sections {
    if let Some(path) = std::env::var_os(variable) {
        std::fs::write(path, written(state)).unwrap();
    }
    assert_eq!(written(state), released);
    let mut sections = decode(released).unwrap();
    assert_eq!(v2::take(&mut sections).unwrap(), *state);
    sections
}

/// A program that does not know these sections of the file refuses it.
fn must_be_known(released: &[u8], names: &[&str]) {
    let sections = decode(released).unwrap();
    for name in names {
        assert!(!sections.get(name).unwrap().optional, "{name}");
        let mut newer = sections.clone();
        let mut section = newer.take(name).unwrap();
        section.version = 2;
        newer.push(section);
        let refused = v2::take(&mut newer).unwrap_err().to_string();
        assert!(refused.contains(&format!("section \"{name}\" has version 2")), "{refused}");
    }
}

#[test]
fn version_2() {
    let mut sections = stays_as("VDPA_WRITE_GOLDEN", &current(), V2);
    assert_eq!(sections.take("vmm/cpu").unwrap().payload, b"opaque");
    sections.ensure_consumed().unwrap();
}

/// The same state with RING_PACKED negotiated.
fn current_packed() -> (v2::Prepared, v2::Switch) {
    let (mut prepared, mut switch) = current();
    prepared.devices.devices[0].features |= 1 << 34;
    let state = &mut switch.devices[0];
    state.bases = vec![0x8011_0011, 0x8000_8000];
    state.drivers.clear();
    state.packed_drivers = vec![packed::Driver {
        next_avail: 0x0016,
        published: 0x0015,
        last_used: 0x8011,
        in_flight: vec![
            packed::InFlight { token: 77, id: 255, descriptors: 4, writable: 513 },
            packed::InFlight { token: u64::MAX, id: 0, descriptors: 1, writable: 0 },
        ],
    }];
    (prepared, switch)
}

#[test]
fn version_2_with_packed_rings() {
    let sections = stays_as("VDPA_WRITE_GOLDEN_PACKED", &current_packed(), PACKED);
    assert!(sections.iter().all(|section| section.name.starts_with("vmm/")));
    // A program that does not know packed rings must refuse the state, both at the offer and at the switch.
    must_be_known(PACKED, &[packed::ANNOUNCEMENT, packed::DRIVERS]);
    assert!(decode(V2).unwrap().get(packed::ANNOUNCEMENT).is_none(), "split rings are not announced");
}

/// The same state with mappings of a virtual IOMMU, and a queue of the guest that is not enabled.
fn current_mappings() -> (v2::Prepared, v2::Switch) {
    let (mut prepared, mut switch) = current();
    prepared.announced = mappings::Announcement { mappings: true, disabled: true };
    let state = &mut switch.devices[0];
    let mapping = |iova, offset, memory, perm| mappings::Mapping { iova, size: 0x1000, offset, memory, perm };
    state.mappings = vec![mapping(0x8_0000_0000, 0x5000, 0, 3), mapping(0xffff_ffff_ffff_f000, 0, 1, 1)];
    state.disabled = vec![0];
    (prepared, switch)
}

#[test]
fn version_2_with_mappings_without_a_name() {
    let _ = stays_as("VDPA_WRITE_GOLDEN_MAPPINGS", &current_mappings(), MAPPINGS);
    must_be_known(MAPPINGS, &[mappings::ANNOUNCEMENT, mappings::MAPPINGS, mappings::DISABLED]);
    let sections = decode(MAPPINGS).unwrap();
    let payload = &sections.get(mappings::MAPPINGS).unwrap().payload;
    let mut uneven = payload.clone();
    uneven[7] = 1;
    let mut record = payload.clone();
    record[8 + 31] = 1;
    for damaged in
        [&payload[1..], &payload[..payload.len() - 1], &[&payload[..], &[0]].concat(), &uneven, &record]
    {
        let mut sections = sections.clone();
        sections.take(mappings::MAPPINGS);
        sections.push(Section::new(mappings::MAPPINGS, 1, damaged.to_vec()));
        let refused = v2::take(&mut sections).unwrap_err().to_string();
        assert!(refused.contains("\"vdpa/mappings\" cannot be read"), "{refused}");
    }
}

/// A later version of this library may add sections. This version still reads the state (a downgrade) if the sections that it
/// does not know are optional, and otherwise refuses the state, naming the section.
#[test]
fn what_a_newer_library_adds_is_skipped_if_it_is_optional() {
    let with = |extra: Section| {
        let mut sections = decode(V2).unwrap();
        sections.push(extra);
        let mut sections = decode(&encode(&sections).unwrap()).unwrap();
        let taken = v2::take(&mut sections)?;
        // The remaining sections are the caller's, who may pass them on again.
        assert!(sections.iter().all(|s| s.name.starts_with("vmm/")));
        Ok::<_, StateError>(taken)
    };
    let extra = Section::new("vdpa/dirty-log", 1, b"{}".to_vec());
    assert_eq!(with(extra.clone().optional()).unwrap(), current());
    let refused = with(extra).unwrap_err();
    assert!(
        matches!(&refused, StateError::Unknown { name, version: 1 } if name == "vdpa/dirty-log"),
        "{refused}"
    );
    // In a section that this library knows, another version or an unknown field is an error.
    let mut sections = decode(V2).unwrap();
    let mut newer = sections.take(v2::SWITCH).unwrap();
    newer.version = 3;
    sections.push(newer);
    let refused = v2::take(&mut sections).unwrap_err();
    assert!(
        refused.to_string().contains("section \"vdpa/switch\" has version 3; this program reads version 2")
    );
    let mut sections = decode(V2).unwrap();
    let mut more = sections.take(v2::MEMORY).unwrap();
    more.payload = br#"{"memories":[],"surprise":1}"#.to_vec();
    sections.push(more);
    assert!(v2::take(&mut sections).unwrap_err().to_string().contains("surprise"));
}

/// Each section of a state is a valid state of its own. With `VDPA_WRITE_SEEDS` they are written as seeds for the corpus of
/// the fuzz target `saved_state`.
#[test]
fn each_section_of_a_state_is_a_state() {
    let mut seeds = vec![("v1".to_owned(), V1.to_vec()), ("v2".to_owned(), V2.to_vec())];
    seeds.push(("v2-packed".to_owned(), PACKED.to_vec()));
    seeds.push(("v2-mappings".to_owned(), MAPPINGS.to_vec()));
    for (version, bytes) in [("v1", V1), ("v2", V2), ("v2-packed", PACKED), ("v2-mappings", MAPPINGS)] {
        for section in decode(bytes).unwrap().iter() {
            let mut one = Sections::default();
            one.push(section.clone());
            let bytes = encode(&one).unwrap();
            assert_eq!(decode(&bytes).as_ref(), Ok(&one));
            seeds.push((format!("{version}-{}", section.name.replace('/', "-")), bytes));
        }
    }
    if let Some(dir) = std::env::var_os("VDPA_WRITE_SEEDS") {
        let dir = std::path::Path::new(&dir).join("saved_state");
        std::fs::create_dir_all(&dir).unwrap();
        seeds.iter().for_each(|(name, bytes)| std::fs::write(dir.join(name), bytes).unwrap());
    }
}
