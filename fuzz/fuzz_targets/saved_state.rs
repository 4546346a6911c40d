//! Saved state: the envelope, the sections, and the checks of a restore before it accesses a device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vdpa_client::state::fuzzing::{v1, v2};
use vdpa_client::state::{self, HEADER_LEN, MAGIC};
use vdpa_client::update::fuzzing::{adopt_driver, validate};
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_core::ring::driver::SplitDriver;
use vdpa_core::testing::Pair;

fuzz_target!(|data: &[u8]| {
    check(data);
    // Length and checksum are hard to guess: repair them, so that the sections are reached.
    let payload = data.get(HEADER_LEN..).unwrap_or(data);
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&state::FORMAT_VERSION.to_le_bytes());
    let length = (payload.len() as u64).to_le_bytes();
    bytes.extend_from_slice(&crc32c::crc32c_append(crc32c::crc32c(&length), payload).to_le_bytes());
    bytes.extend_from_slice(&length);
    bytes.extend_from_slice(payload);
    check(&bytes);
});

fn check(bytes: &[u8]) {
    let mut sections = match state::decode(bytes) {
        Ok(sections) => sections,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert!(sections.iter().map(|s| s.payload.len() + s.name.len()).sum::<usize>() <= bytes.len());
    assert_eq!(state::encode(&sections).as_deref(), Ok(bytes), "encoding gives the decoded bytes");
    let mut again = sections.clone();
    if let Ok(state) = v1::State::take(&mut again) {
        state.put(&mut again).expect("its names were just taken");
        assert_eq!(v1::State::take(&mut again).as_ref(), Ok(&state));
    }
    let Ok((prepared, switch)) = v2::take(&mut sections) else { return };
    let mut again = sections.clone();
    prepared.put(&mut again).expect("its names were just taken");
    switch.put(&mut again).expect("its name was just taken");
    assert_eq!(v2::take(&mut again), Ok((prepared.clone(), switch.clone())));
    drop(validate(&prepared));
    for (device, rest) in prepared.devices.devices.into_iter().zip(switch.devices) {
        let features = Features(device.features);
        for (queue, driver) in device.queues.into_iter().zip(rest.drivers) {
            adopt(features, queue.size, driver);
        }
    }
}

fn adopt(features: Features, size: u16, driver: v1::Driver) {
    if !size.is_power_of_two() || size > 64 {
        return;
    }
    let ring = features & Features::of(&[Features::RING_EVENT_IDX]);
    let pair = Pair::new(size, ring);
    let driver = adopt_driver(driver, size, ring);
    // Write the descriptors of the requests in flight to the table, as far as the state describes them.
    for request in &driver.in_flight {
        for (at, index) in request.descriptors.iter().enumerate().filter(|(_, index)| **index < size) {
            let next = request.descriptors.get(at + 1);
            let mut raw = [0; 16];
            raw[8..12].copy_from_slice(&request.writable.to_le_bytes());
            raw[12] = u8::from(next.is_some()) | if next.is_none() { 2 } else { 0 };
            raw[14..].copy_from_slice(&next.copied().unwrap_or(0).to_le_bytes());
            pair.memory.poke(pair.ring.desc + u64::from(*index) * 16, &raw);
        }
    }
    pair.memory.poke(pair.ring.avail + 2, &driver.avail_index.to_le_bytes());
    pair.memory.poke(pair.ring.used + 2, &driver.last_used_index.to_le_bytes());
    let [desc, avail, used] = pair.areas();
    if let Ok(mut driver) = SplitDriver::adopt(driver, desc, avail, used) {
        let in_flight = driver.in_flight();
        let free = driver.free();
        for _ in 0..free {
            driver.add(&[Buffer { iova: 0, len: 1 }], &[], 0).expect("there are free descriptors");
        }
        assert_eq!((driver.free(), driver.in_flight()), (0, in_flight + free));
    }
}
