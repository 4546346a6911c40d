//! Records of every released version are understood for ever, and described in `docs/daemon-state.md`.

use vdpa_core::device::state::{KINDS, Record, decode_all, encode_all};

use super::records::samples;

const V1: &[u8] = include_bytes!("../golden/records-v1.bin");
const V2: &[u8] = include_bytes!("../golden/records-v2.bin");
const V3: &[u8] = include_bytes!("../golden/records-v3.bin");
const DOCUMENT: &str = include_str!("../../../../docs/daemon-state.md");

/// What could be said when every kind had version 1.
fn samples_v1() -> Vec<Record> {
    let known = |record: &Record| !matches!(record, Record::Vring(vring) if vring.started.is_some());
    samples_v2().into_iter().filter(known).collect()
}

/// What could be said before there was a log of vhost, and before devices moved.
fn samples_v2() -> Vec<Record> {
    let newer = |record: &Record| matches!(record, Record::Log(_) | Record::Config { .. });
    samples().into_iter().filter(|record| !newer(record)).collect()
}

#[test]
fn version_1() {
    assert_eq!(decode_all(V1).unwrap(), samples_v1());
}

/// `vring` has version 2, the others have 1.
#[test]
fn version_2() {
    assert_eq!(decode_all(V2).unwrap(), samples_v2());
    assert_eq!(encode_all(&samples_v2()).unwrap(), V2, "version 2 is written as it was released");
}

/// There are `log` and `config`.
#[test]
fn version_3() {
    if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/records-v3.bin");
        std::fs::write(path, encode_all(&samples()).unwrap()).unwrap();
        return;
    }
    assert_eq!(decode_all(V3).unwrap(), samples());
    assert_eq!(encode_all(&samples()).unwrap(), V3, "version 3 is written as it was released");
}

/// The rows of the table of kinds: number, name, version.
fn documented() -> Vec<(u16, String, u16)> {
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| ")?.split('|').map(str::trim);
        let number = cells.next()?.parse().ok()?;
        let name = cells.next()?.strip_prefix('`')?.strip_suffix('`')?.to_owned();
        Some((number, name, cells.next()?.parse().ok()?))
    };
    DOCUMENT.lines().filter_map(row).collect()
}

#[test]
fn the_document_has_every_kind() {
    let kinds: Vec<_> = KINDS.iter().map(|kind| (kind.number, kind.name.to_owned(), kind.version)).collect();
    assert_eq!(documented(), kinds);
}
