//! What moves between hosts: the messages of a migration, and the state of a device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vdpa_client::migrate::fuzzing::{message, messages};
use vdpa_core::device::Device;
use vdpa_core::device::state::{decode_all, encode_all};
use vdpa_core::features::Status;
use vdpa_core::host::Caller;
use vdpa_core::testing::{RamBlk, TestProcess};

fuzz_target!(|data: &[u8]| {
    let _ = messages(data);
    // The checksum is hard to guess.
    if let Some(([kind, ..], payload)) = data.split_first_chunk::<1>() {
        let _ = messages(&message(u16::from(*kind), payload));
    }
    load(data);
    // Also with right checksums: records that can be read, in any order.
    if let Some(records) = repaired(data) {
        load(&records);
    }
});

/// Records with the checksums that their contents have.
fn repaired(data: &[u8]) -> Option<Vec<u8>> {
    let (mut rest, mut out) = (data, Vec::new());
    while let Some(length) = rest.first_chunk::<4>() {
        let end = 8 + usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let record = rest.get(..end)?;
        out.extend_from_slice(record);
        out.extend_from_slice(&crc32c::crc32c(record).to_le_bytes());
        rest = rest.get(end + 4..).unwrap_or_default();
    }
    // An old version of a record is written as a new one.
    let records = decode_all(&out).ok()?;
    let newest = encode_all(&records).expect("they were just read");
    assert_eq!(decode_all(&newest).as_ref(), Ok(&records));
    Some(out)
}

fn load(state: &[u8]) {
    let process = TestProcess::new();
    let mut device = Device::new(RamBlk::new(8).with(|profile| profile.moves = true));
    device.open().expect("it is closed");
    device.set_owner(&process as &dyn Caller<_>).expect("it has no owner");
    match device.load_moved(state) {
        Ok(()) => {
            let again = device.save_to_move().expect("nothing runs");
            let mut other = Device::new(RamBlk::new(8).with(|profile| profile.moves = true));
            other.open().expect("it is closed");
            other.load_moved(&again).expect("what was saved can be loaded");
            assert_eq!(other.status(), device.status());
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert_eq!(device.status(), Status::RESET);
        }
    }
}
