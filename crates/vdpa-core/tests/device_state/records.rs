//! Records as bytes: what is written is read, and nothing else is.

use proptest::prelude::*;
use vdpa_core::device::state::{
    CHECKSUM_LEN, DecodeError, HEADER_LEN, HandleState, HandoverState, Image, KINDS, LogState, MAX_PAYLOAD,
    MappingState, MemoryRef, Record, Ring, Shape, TableId, TableRole, VringState, decode, decode_all, encode,
    encode_all,
};
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::parent::AddressMode;
use vdpa_core::testing::{RamBlk, TestObjects, restore_from_bytes};
use vdpa_core::types::{Asid, GroupIndex, IovaRange, Perm, QueueIndex, VringAddr};
use vdpa_core::vq::QueueState;

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(first, last).unwrap()
}

const fn table(role: TableRole, asid: u32) -> TableId {
    TableId { role, asid: Asid(asid) }
}

/// How many samples there are.
const SAMPLES: usize = 33;

const INTERFACE: TableId = table(TableRole::Interface, 0);

/// What [`golden`](super::golden) says: at least one record of each kind.
pub(crate) fn samples() -> Vec<Record> {
    [words(), vrings().into(), tables(), handover(), logs(), moving()].concat()
}

fn moving() -> Vec<Record> {
    vec![Record::Config { bytes: vec![0, 8, 255] }]
}

const fn shape() -> Shape {
    Shape {
        device_id: 2,
        queues: 4,
        queue_size_max: 256,
        groups: 2,
        address_spaces: 2,
        config_size: 96,
        features: Features(0x7_0000_0200),
        backend_features: BackendFeatures(0x37e),
        iova_range: IovaRange::ALL,
        address_mode: AddressMode::Pinned,
    }
}

fn words() -> Vec<Record> {
    vec![
        Record::Device(shape()),
        Record::Open { open: true, failed: false },
        Record::Features { in_force: Some(Features(0x3_0000_0200)), base: Features(0x3_0000_0200) },
        Record::Features { in_force: None, base: Features::NONE },
        Record::BackendFeatures { acked: BackendFeatures(0x20e) },
        Record::Status { status: Status(15), suspended: true, paused: false, ring_max: 256 },
        Record::ForkFromOwner { value: 1 },
        Record::Owner { space: Some(2) },
        Record::ConfigCall { event: None },
        Record::Batch { asid: Some(Asid(1)) },
        Record::Pinned { pages: 256 },
        Record::Group { group: GroupIndex(1), asid: Asid(1) },
        Record::Translation { asid: Asid(1), passthrough: false, refused: true },
        Record::Parent { bytes: vec![1, 2, 3] },
    ]
}

fn vrings() -> [Record; 4] {
    let split = VringState {
        index: QueueIndex(0),
        group: GroupIndex(0),
        num: 128,
        addr: Some(VringAddr { flags: 1, desc: 0x1000, used: 0x3000, avail: 0x2000, log: 0x4000 }),
        state: Some(QueueState::Split { avail_index: 65535 }),
        busyloop_timeout: 50,
        enabled: true,
        running: true,
        started: None,
        call_installed: true,
        kick: Some(7),
        call: Some(8),
        err: Some(9),
    };
    let packed = QueueState::Packed {
        last_avail_idx: 5,
        last_avail_wrap: true,
        last_used_idx: 3,
        last_used_wrap: false,
    };
    let other =
        VringState { index: QueueIndex(1), state: Some(packed), running: false, kick: None, ..split.clone() };
    let fresh = VringState { index: QueueIndex(2), num: 0, addr: None, state: None, ..other.clone() };
    let addr = VringAddr { flags: 0, desc: 0x5000, used: 0x7000, avail: 0x6000, log: 0 };
    let started = Some(Ring { size: 64, addr, features: Features(0x3_0000_0000) });
    let changed = VringState { index: QueueIndex(3), started, ..split.clone() };
    [split, other, fresh, changed].map(Record::Vring)
}

fn tables() -> Vec<Record> {
    let update_range = range(0x10_0000, 0x2f_ffff);
    let mapping = MappingState {
        table: INTERFACE,
        range: range(0x10_0000, 0x1f_ffff),
        uaddr: 0x7f00_0000_0000,
        perm: Perm::RW,
        stale: false,
        memory: MemoryRef { id: 3, offset: 0x20_0000 },
        update: 11,
        update_range,
        broken: true,
    };
    let (rollback, parent) = (table(TableRole::Rollback, 0), table(TableRole::Parent, 0));
    vec![
        Record::Table { table: INTERFACE, next_update: 12 },
        Record::Mapping(mapping),
        Record::TableCopied { from: INTERFACE, to: rollback },
        Record::TableCopied { from: INTERFACE, to: parent },
        Record::Stale { table: INTERFACE },
        Record::Broken { table: INTERFACE, update: 11, range: update_range },
        Record::Unmapped { table: INTERFACE, firsts: range(0, u64::MAX) },
        Record::TableRemoved { table: rollback },
    ]
}

fn logs() -> Vec<Record> {
    let base = Some((0x7f00_0000_0000, 0x8000, MemoryRef { id: 4, offset: 0x1000 }));
    vec![
        Record::Log(LogState { base, event: Some(10), all: true }),
        Record::Log(LogState { base: None, event: None, all: false }),
    ]
}

fn handover() -> Vec<Record> {
    let shared = HandoverState {
        shape: shape(),
        active: Some(0),
        deferred: true,
        next_handle: 2,
        written: vec![(32, 1)],
        written_before: vec![(32, 0), (33, 9)],
        parent: vec![4, 5],
    };
    let handle = HandleState {
        id: 1,
        features: Some(Features(0x3_0000_0000)),
        owner: Some(2),
        superseded: true,
        written: vec![(32, 1)],
    };
    vec![
        Record::Handover(shared),
        Record::Handle(handle),
        Record::Table { table: table(TableRole::Installed, 0), next_update: 0 },
        Record::Table { table: table(TableRole::Handle(1), 1), next_update: 1 },
    ]
}

/// The checksum of records as another program computes it.
fn seal(bytes: &mut Vec<u8>) {
    let mut sum = !0u32;
    for byte in &*bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 };
        }
    }
    bytes.extend((!sum).to_le_bytes());
}

fn bytes_of(kind: u16, version: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend(kind.to_le_bytes());
    bytes.extend(version.to_le_bytes());
    bytes.extend(payload);
    seal(&mut bytes);
    bytes
}

#[test]
fn what_is_written_is_read() {
    let samples = samples();
    for kind in KINDS {
        assert!(samples.iter().any(|record| record.kind() == kind), "no sample of \"{}\"", kind.name);
    }
    let bytes = encode_all(&samples).unwrap();
    assert_eq!(decode_all(&bytes).unwrap(), samples);
    assert_eq!(samples.len(), SAMPLES);
    Image::of(&samples).unwrap();
}

#[test]
fn every_single_bit_counts() {
    for record in samples() {
        let mut good = Vec::new();
        encode(&record, &mut good).unwrap();
        for at in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            assert!(decode(&bytes).is_err(), "{record:?}, bit {at}");
        }
        for len in 0..good.len() {
            let torn = decode(&good[..len]);
            assert!(
                matches!(torn, Err(DecodeError::Truncated { .. })),
                "{record:?} of {len} bytes: {torn:?}"
            );
        }
    }
}

#[test]
fn whoever_does_not_understand_a_record_says_so() {
    let unknown = decode(&bytes_of(999, 3, b"later")).unwrap_err();
    assert_eq!(unknown, DecodeError::UnknownKind { kind: 999, version: 3 });
    let known = KINDS.len();
    assert_eq!(
        unknown.to_string(),
        format!("record of kind 999 (version 3) is not known; this program knows kinds 1 to {known}")
    );
    for kind in KINDS {
        for version in [0, kind.version + 1, u16::MAX] {
            let error = decode(&bytes_of(kind.number, version, &[])).unwrap_err();
            let supported = (kind.oldest, kind.version);
            assert_eq!(error, DecodeError::UnknownVersion { kind: kind.name, found: version, supported });
            let text = error.to_string();
            assert!(text.contains(kind.name) && text.contains(&version.to_string()), "{text}");
        }
    }
    let long = u32::try_from(MAX_PAYLOAD).unwrap() + 1;
    let mut bytes = long.to_le_bytes().to_vec();
    bytes.extend([0; 8]);
    assert_eq!(decode(&bytes), Err(DecodeError::TooLong { len: long }));
    let parent = Record::Parent { bytes: vec![0; MAX_PAYLOAD] };
    let mut out = b"before".to_vec();
    assert_eq!(encode(&parent, &mut out).unwrap_err().kind, "parent");
    assert_eq!(out, b"before");
}

proptest! {
    /// Payloads with a good checksum: each value has one encoding, and whatever is read can be applied or is refused.
    #[test]
    fn any_payload_is_refused_or_written_the_same_way(
        which in 0..SAMPLES,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let record = &samples()[which];
        let mut good = Vec::new();
        encode(record, &mut good).unwrap();
        let mut payload = good[HEADER_LEN..good.len() - CHECKSUM_LEN].to_vec();
        for (at, value) in changes {
            if !payload.is_empty() {
                let at = at.index(payload.len());
                payload[at] = value;
            }
        }
        if let Some(cut) = cut {
            payload.truncate(cut.index(payload.len() + 1));
        }
        // One that was cut may be that of an earlier version, which is not written again.
        let version = u16::from_le_bytes([good[6], good[7]]);
        let bytes = bytes_of(record.kind().number, version, &payload);
        if let Ok((read, rest)) = decode(&bytes) {
            prop_assert!(rest.is_empty());
            let mut again = Vec::new();
            encode(&read, &mut again).unwrap();
            prop_assert_eq!(again, bytes);
        }
    }

    /// Records in any order with any values: a device or an error.
    #[test]
    fn any_sequence_of_records_restores_or_is_refused(
        picks in prop::collection::vec((0..SAMPLES, any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 0..40),
    ) {
        let mut bytes = encode_all(&samples()[..1]).unwrap();
        for (which, at, value, change) in picks {
            let mut good = Vec::new();
            encode(&samples()[which], &mut good).unwrap();
            let mut payload = good[HEADER_LEN..good.len() - CHECKSUM_LEN].to_vec();
            if change && !payload.is_empty() {
                let at = at.index(payload.len());
                payload[at] = value;
            }
            bytes.extend(bytes_of(samples()[which].kind().number, 1, &payload));
        }
        let _ = restore_from_bytes(RamBlk::new(8), &bytes, &mut TestObjects::new());
    }
}
