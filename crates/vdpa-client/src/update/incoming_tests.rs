use super::*;
use crate::state::{StateError, v1};
use crate::update::load::check_numbers;

#[test]
fn only_a_sealed_memfd_is_read() {
    let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(matches!(read_state(7, &file), Err(StateFileError::NotMemfd { number: 7 })));
    let open = memfd::create(c"open", 100, None).unwrap();
    let error = read_state(7, &open).unwrap_err();
    assert!(error.to_string().contains("not sealed"), "{error}");
    let sealed = memfd::sealed(c"sealed", b"something else entirely, long enough").unwrap();
    let bytes = read_state(7, &sealed).unwrap();
    assert!(matches!(state::decode(&bytes), Err(StateError::BadMagic { .. })));
}

fn states() -> [(v2::Prepared, v2::Switch); 2] {
    let golden: [&[u8]; 2] =
        [include_bytes!("../../tests/golden/v1.state"), include_bytes!("../../tests/golden/v2.state")];
    golden.map(|bytes| v2::take(&mut state::decode(bytes).unwrap()).unwrap())
}

#[test]
fn state_of_another_process_or_with_shared_descriptors_is_refused() {
    for (mut known, _) in states() {
        let error = check_process(&known.update).unwrap_err().to_string();
        assert!(error.contains("process 4711 saved it"), "{error}");
        known.update.predecessor = steps::own_pid();
        check_process(&known.update).unwrap();

        check_numbers(&known).unwrap();
        let number = known.memory.memories[1].fd;
        known.devices.devices[0].queues[0].call_fd = number;
        let error = check_numbers(&known).unwrap_err().to_string();
        assert!(error.contains(&format!("number {number} is there twice")), "{error}");
    }
}

#[test]
fn sections_that_are_missing_or_of_another_version_are_named() {
    let mut sections = Sections::default();
    let error = v2::take(&mut sections).unwrap_err();
    assert!(matches!(error, StateError::Missing { name: v2::UPDATE }));
    sections.push(Section::new(v2::UPDATE, 3, b"{}".to_vec()));
    let error = v2::take(&mut sections).unwrap_err();
    assert!(error.to_string().contains("has version 3; this program reads version 2"), "{error}");
}

/// A state of version 1 says the same in version 2.
#[test]
fn version_1_is_one_device_without_a_name() {
    let [(known, switch), _] = states();
    let old = v1::State::take(&mut state::decode(include_bytes!("../../tests/golden/v1.state")).unwrap());
    let old = old.unwrap();
    let [device] = &known.devices.devices[..] else { panic!("{known:?}") };
    assert_eq!((device.name.as_str(), device.strategy.as_str()), (v2::V1_DEVICE, "resume"));
    assert_eq!((device.fd, device.features), (old.session.device_fd, old.session.features));
    assert_eq!(device.mappings.len(), old.memory.regions.len());
    for (mapping, region) in device.mappings.iter().zip(&old.memory.regions) {
        let memory = &known.memory.memories[mapping.memory as usize];
        assert_eq!((memory.fd, memory.size, memory.offset), (region.fd, region.size, 0));
        assert_eq!((&mapping.name, mapping.iova, mapping.size), (&region.name, region.iova, region.size));
    }
    assert_eq!(switch.devices[0].bases, [65535]);
    assert_eq!(switch.devices[0].drivers[0], old.queues.queues[0].driver);
    assert_eq!(switch.saved_ns - switch.begun_ns, old.update.suspend_ns + old.update.save_ns);
}
