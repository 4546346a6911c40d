//! [`Record`]s as bytes.
//!
//! All integers are little endian.
//!
//! | bytes | field |
//! |---|---|
//! | 4 | length of the payload |
//! | 2 | kind |
//! | 2 | version of the payload |
//! | .. | payload |
//! | 4 | CRC-32C over everything before |

use crc::{CRC_32_ISCSI, Crc, Table};
use thiserror::Error;

use super::kind::{KINDS, Kind};
use super::payload::{self, Reader};
use super::record::Record;

/// Longest payload accepted, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Bytes before the payload.
pub const HEADER_LEN: usize = 8;
/// Bytes after the payload.
pub const CHECKSUM_LEN: usize = 4;

static CRC32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// Why bytes are not a record that this program understands.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// They end too soon: the end of a log whose last record was not written in full looks so.
    #[error("a record of {needed} bytes is cut short after {present}")]
    Truncated {
        /// Bytes that the record has, as far as that is known.
        needed: usize,
        /// Bytes that are there.
        present: usize,
    },
    /// Longer than any record.
    #[error("a record claims a payload of {len} bytes; at most {MAX_PAYLOAD} are accepted")]
    TooLong {
        /// Length claimed.
        len: u32,
    },
    /// Damaged.
    #[error("a record is damaged: its checksum is {stored:#010x}, its contents give {computed:#010x}")]
    Checksum {
        /// Checksum after the record.
        stored: u32,
        /// Checksum of what is there.
        computed: u32,
    },
    /// Written by a program that knows more kinds.
    #[error("record of kind {kind} (version {version}) is not known; this program knows kinds 1 to {}", KINDS.len())]
    UnknownKind {
        /// Number of the kind.
        kind: u16,
        /// Version of its payload.
        version: u16,
    },
    /// Written by a program that has another version of the kind.
    #[error(
        "record \"{kind}\" has version {found}; this program reads versions {} to {}",
        supported.0, supported.1
    )]
    UnknownVersion {
        /// Name of the kind.
        kind: &'static str,
        /// The version found.
        found: u16,
        /// The oldest and the newest version that can be read.
        supported: (u16, u16),
    },
    /// The payload is not what its kind has.
    #[error("record \"{kind}\" cannot be read: {what}")]
    Payload {
        /// Name of the kind.
        kind: &'static str,
        /// What is wrong.
        what: &'static str,
    },
}

/// A record does not fit: its variable part is longer than [`MAX_PAYLOAD`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("record \"{kind}\" has a payload of {len} bytes; at most {MAX_PAYLOAD} can be written")]
pub struct EncodeError {
    /// Name of the kind.
    pub kind: &'static str,
    /// Bytes of the payload.
    pub len: usize,
}

/// Appends a record to `out`.
///
/// # Errors
/// [`EncodeError`]; `out` is as it was then.
pub fn encode(record: &Record, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let kind = record.kind();
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_LEN]);
    payload::write(record, out);
    let len = out.len() - start - HEADER_LEN;
    if len > MAX_PAYLOAD {
        out.truncate(start);
        return Err(EncodeError { kind: kind.name, len });
    }
    let len = u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
    let header = len.into_iter().chain(kind.number.to_le_bytes()).chain(kind.version.to_le_bytes());
    out.iter_mut().skip(start).zip(header).for_each(|(byte, value)| *byte = value);
    let checksum = CRC32C.checksum(out.get(start..).unwrap_or_default());
    out.extend_from_slice(&checksum.to_le_bytes());
    Ok(())
}

/// Encodes records one after the other.
///
/// # Errors
/// [`EncodeError`].
pub fn encode_all<'a>(records: impl IntoIterator<Item = &'a Record>) -> Result<Vec<u8>, EncodeError> {
    let mut out = Vec::new();
    records.into_iter().try_for_each(|record| encode(record, &mut out))?;
    Ok(out)
}

/// Reads the record at the beginning of `bytes`; returns it with what follows it. Never panics, whatever the bytes are,
/// and allocates no more than they are long.
///
/// # Errors
/// See [`DecodeError`].
pub fn decode(bytes: &[u8]) -> Result<(Record, &[u8]), DecodeError> {
    let truncated = |needed| DecodeError::Truncated { needed, present: bytes.len() };
    let mut header = Reader::new(bytes.get(..HEADER_LEN).ok_or(truncated(HEADER_LEN))?);
    let (Ok(claimed), Ok(number), Ok(version)) = (header.u32(), header.u16(), header.u16()) else {
        return Err(truncated(HEADER_LEN));
    };
    let len = usize::try_from(claimed)
        .ok()
        .filter(|len| *len <= MAX_PAYLOAD)
        .ok_or(DecodeError::TooLong { len: claimed })?;
    let needed = HEADER_LEN + len + CHECKSUM_LEN;
    let (covered, rest) = bytes.split_at_checked(HEADER_LEN + len).ok_or(truncated(needed))?;
    let (stored, rest) = rest.split_first_chunk::<CHECKSUM_LEN>().ok_or(truncated(needed))?;
    // Before kind and version, as a damaged number is not another program's.
    let (stored, computed) = (u32::from_le_bytes(*stored), CRC32C.checksum(covered));
    if stored != computed {
        return Err(DecodeError::Checksum { stored, computed });
    }
    let kind = Kind::by_number(number).ok_or(DecodeError::UnknownKind { kind: number, version })?;
    if !kind.versions().contains(&version) {
        let supported = (kind.oldest, kind.version);
        return Err(DecodeError::UnknownVersion { kind: kind.name, found: version, supported });
    }
    let mut reader = Reader::new(covered.get(HEADER_LEN..).unwrap_or_default());
    let record = payload::read(kind, version, &mut reader)
        .and_then(|record| reader.end().map(|()| record))
        .map_err(|what| DecodeError::Payload { kind: kind.name, what })?;
    Ok((record, rest))
}

/// Reads all records of `bytes`.
///
/// # Errors
/// See [`DecodeError`]. A log whose end may be torn is read record by record, with [`decode`].
pub fn decode_all(mut bytes: &[u8]) -> Result<Vec<Record>, DecodeError> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let (record, rest) = decode(bytes)?;
        records.push(record);
        bytes = rest;
    }
    Ok(records)
}
