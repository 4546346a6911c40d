//! Saved state: a checked envelope around named, versioned sections.
//!
//! Saved state is a trust boundary: it comes from another version of the program, perhaps from another program. So
//! [`decode`] trusts nothing, allocates no more memory than the input has, and has its own error for each defect. The layout and the library's own
//! sections are described in `docs/saved-state.md`. Their types are no part of the interface: states are versioned by themselves.
//!
//! ```
//! use vdpa_client::state::{self, Section, Sections};
//!
//! let mut sections = Sections::default();
//! sections.push(Section::new("my-program", 3, b"anything".to_vec()));
//! let bytes = state::encode(&sections)?;
//!
//! let mut restored = state::decode(&bytes)?;
//! assert_eq!(restored.take("my-program").map(|s| s.payload), Some(b"anything".to_vec()));
//! assert!(restored.ensure_consumed().is_ok());
//! # Ok::<(), vdpa_client::state::StateError>(())
//! ```

// The types are the format, which is versioned by itself: no part of the interface.
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "fuzz targets reach them"))]
pub(crate) mod config;
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "fuzz targets reach them"))]
pub(crate) mod mappings;
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "fuzz targets reach them"))]
pub(crate) mod packed;
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "fuzz targets reach them"))]
pub(crate) mod v1;
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "fuzz targets reach them"))]
pub(crate) mod v2;

/// The format for fuzz targets.
#[cfg(fuzzing)]
pub mod fuzzing {
    /// Version 1.
    pub mod v1 {
        pub use crate::state::v1::*;
    }
    /// Version 2.
    pub mod v2 {
        pub use crate::state::v2::*;
    }
}

use std::collections::HashSet;

use crc::{CRC_32_ISCSI, Crc, Table};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// First bytes of every saved state.
pub const MAGIC: [u8; 8] = *b"VDPALIVE";
/// The envelope version this library writes.
pub const FORMAT_VERSION: u32 = 1;
/// The envelope versions this library reads.
pub const SUPPORTED_VERSIONS: std::ops::RangeInclusive<u32> = 1..=1;
/// Longest payload accepted, in bytes. State grows with mappings and requests in flight, not with memory;
/// 64 MiB is a thousand times what has been seen.
pub const MAX_PAYLOAD: u64 = 64 << 20;
/// Bytes of the header: magic, version, checksum, payload length.
pub const HEADER_LEN: usize = 24;
/// Prefix of the names of the library's own sections.
pub const RESERVED_PREFIX: &str = "vdpa/";

const SECTION_HEADER_LEN: usize = 16;
const MAX_NAME: usize = 255;
const FLAG_OPTIONAL: u16 = 1;

/// Why bytes are not a saved state that this library can restore.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StateError {
    /// The bytes are too few for a header.
    #[error("saved state has {len} bytes, fewer than the {HEADER_LEN} of its header")]
    Truncated {
        /// Number of bytes.
        len: usize,
    },
    /// The bytes do not begin with [`MAGIC`].
    #[error("this is not saved state: it begins with {found:02x?} and not with \"VDPALIVE\"")]
    BadMagic {
        /// The first eight bytes.
        found: [u8; 8],
    },
    /// The envelope has a version that this library cannot read.
    #[error(
        "saved state has format version {found}; this program reads versions {} to {}",
        SUPPORTED_VERSIONS.start(),
        SUPPORTED_VERSIONS.end()
    )]
    Version {
        /// The version in the header.
        found: u32,
    },
    /// The sections are longer than the library accepts or writes.
    #[error("saved state claims {len} bytes of sections; at most {MAX_PAYLOAD} are accepted")]
    TooLong {
        /// Length in the header, or length of the sections to be written.
        len: u64,
    },
    /// The length in the header and the bytes present differ.
    #[error("saved state claims {claimed} bytes of sections, but {present} follow the header")]
    Length {
        /// Length in the header.
        claimed: u64,
        /// Number of bytes after the header.
        present: u64,
    },
    /// The checksum does not match the contents.
    #[error("saved state is damaged: its checksum is {stored:#010x}, its contents give {computed:#010x}")]
    Checksum {
        /// Checksum in the header.
        stored: u32,
        /// Checksum of the contents.
        computed: u32,
    },
    /// The header of a section is malformed.
    #[error("saved state, byte {offset} of the sections: {what}")]
    Section {
        /// Offset of the section from the end of the header, in bytes.
        offset: usize,
        /// Why the header is malformed.
        what: &'static str,
    },
    /// The state has a section that the program does not know and that is not optional.
    #[error("saved state has a section \"{name}\" (version {version}) that this program does not know")]
    Unknown {
        /// Name of the section.
        name: String,
        /// Version of the section.
        version: u32,
    },
    /// A required section is missing.
    #[error("saved state has no section \"{name}\"")]
    Missing {
        /// Name of the section.
        name: &'static str,
    },
    /// A known section has a version that cannot be read.
    #[error("section \"{name}\" has version {found}; this program reads version {supported}")]
    SectionVersion {
        /// Name of the section.
        name: String,
        /// Version of the section.
        found: u32,
        /// Newest version that the program can read.
        supported: u32,
    },
    /// The payload of a section cannot be decoded.
    #[error("section \"{name}\" cannot be read: {reason}")]
    Payload {
        /// Name of the section.
        name: String,
        /// Error message of the parser.
        reason: String,
    },
    /// The caller used a name that is reserved for the library, a name twice, or a name of wrong length.
    #[error("section name \"{name}\" cannot be used: {reason}")]
    Name {
        /// Name of the section.
        name: String,
        /// Why it cannot be used.
        reason: &'static str,
    },
}

/// One named piece of saved state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Name, unique in a state; 1 to 255 bytes.
    pub name: String,
    /// Version of the payload's layout.
    pub version: u32,
    /// Whether a program that does not know the section may ignore it.
    pub optional: bool,
    /// Contents.
    pub payload: Vec<u8>,
}

impl Section {
    /// A section that a reader must understand (not optional).
    #[must_use]
    pub fn new(name: &str, version: u32, payload: Vec<u8>) -> Self {
        Self { name: name.to_owned(), version, optional: false, payload }
    }

    /// A section whose payload is `value` as JSON.
    ///
    /// # Errors
    /// [`StateError::Payload`] when `value` has no JSON form (a map with keys that are not strings).
    pub fn json<T: Serialize>(name: &str, version: u32, value: &T) -> Result<Self, StateError> {
        let payload = serde_json::to_vec(value)
            .map_err(|e| StateError::Payload { name: name.to_owned(), reason: e.to_string() })?;
        Ok(Self::new(name, version, payload))
    }

    /// This section, marked as one that may be skipped.
    #[must_use]
    pub fn optional(self) -> Self {
        Self { optional: true, ..self }
    }

    /// Parses a payload written by [`json`](Self::json) in exactly this version.
    ///
    /// # Errors
    /// [`StateError::SectionVersion`] or [`StateError::Payload`].
    pub fn parse<T: DeserializeOwned>(&self, supported: u32) -> Result<T, StateError> {
        if self.version != supported {
            return Err(StateError::SectionVersion {
                name: self.name.clone(),
                found: self.version,
                supported,
            });
        }
        serde_json::from_slice(&self.payload)
            .map_err(|e| StateError::Payload { name: self.name.clone(), reason: e.to_string() })
    }
}

impl FromIterator<Section> for Sections {
    fn from_iter<I: IntoIterator<Item = Section>>(sections: I) -> Self {
        Self(sections.into_iter().collect())
    }
}

/// The sections of one saved state. Taking a section removes it, so [`ensure_consumed`](Self::ensure_consumed) finds those
/// that the program does not know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sections(Vec<Section>);

impl Sections {
    /// No sections.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds a section. [`encode`] checks the name.
    pub fn push(&mut self, section: Section) {
        self.0.push(section);
    }

    /// Removes a section and returns it; `None` if there is none of that name.
    pub fn take(&mut self, name: &str) -> Option<Section> {
        let at = self.0.iter().position(|s| s.name == name)?;
        Some(self.0.remove(at))
    }

    /// Removes a section that must exist, and returns it.
    ///
    /// # Errors
    /// [`StateError::Missing`].
    pub fn require(&mut self, name: &'static str) -> Result<Section, StateError> {
        self.take(name).ok_or(StateError::Missing { name })
    }

    /// Adds a section whose payload is `value` as JSON.
    fn push_json<T: Serialize>(&mut self, name: &str, version: u32, value: &T) -> Result<(), StateError> {
        self.push(Section::json(name, version, value)?);
        Ok(())
    }

    /// Removes a section that must exist in exactly this version, and parses it.
    fn require_json<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
        version: u32,
    ) -> Result<T, StateError> {
        self.require(name)?.parse(version)
    }

    /// Checks that no section has a name of the library.
    ///
    /// # Errors
    /// [`StateError::Name`] with the first such name.
    pub fn check_names(&self) -> Result<(), StateError> {
        match self.iter().find(|s| s.name.starts_with(RESERVED_PREFIX)) {
            Some(section) => Err(StateError::Name {
                name: section.name.clone(),
                reason: "names that begin with vdpa/ are the library's",
            }),
            None => Ok(()),
        }
    }

    /// A section by its name, without removing it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Section> {
        self.0.iter().find(|s| s.name == name)
    }

    /// Moves all sections of `other` to the end of these.
    pub fn append(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// The sections that were not taken.
    pub fn iter(&self) -> impl Iterator<Item = &Section> {
        self.0.iter()
    }

    /// Checks that everything that must be understood was taken.
    ///
    /// # Errors
    /// [`StateError::Unknown`] with the first section that is neither taken nor optional.
    pub fn ensure_consumed(&self) -> Result<(), StateError> {
        self.ensure_consumed_below("")
    }

    /// As [`ensure_consumed`](Self::ensure_consumed), for the library's sections only. Drops the optional ones that were not
    /// taken, so that only the caller's remain.
    pub(crate) fn end_of_own(&mut self) -> Result<(), StateError> {
        self.ensure_consumed_below(RESERVED_PREFIX)?;
        self.0.retain(|s| !s.name.starts_with(RESERVED_PREFIX));
        Ok(())
    }

    fn ensure_consumed_below(&self, prefix: &str) -> Result<(), StateError> {
        match self.0.iter().find(|s| !s.optional && s.name.starts_with(prefix)) {
            Some(s) => Err(StateError::Unknown { name: s.name.clone(), version: s.version }),
            None => Ok(()),
        }
    }
}

/// Writes the envelope around `sections`.
///
/// # Errors
/// [`StateError::Name`] for an empty, overlong or repeated name; [`StateError::TooLong`].
pub fn encode(sections: &Sections) -> Result<Vec<u8>, StateError> {
    let mut payload = Vec::new();
    let mut names = HashSet::new();
    for section in &sections.0 {
        if !names.insert(section.name.as_str()) {
            return Err(StateError::Name { name: section.name.clone(), reason: "it is there twice" });
        }
        put_section(&mut payload, section)?;
    }
    let len = payload.len() as u64;
    if len > MAX_PAYLOAD {
        return Err(StateError::TooLong { len });
    }
    let mut out = Vec::with_capacity(HEADER_LEN + payload.len());
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    out.extend_from_slice(&checksum(len, &payload).to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&payload);
    Ok(out)
}

fn put_section(out: &mut Vec<u8>, section: &Section) -> Result<(), StateError> {
    let name_error = |reason| StateError::Name { name: section.name.clone(), reason };
    if section.name.is_empty() {
        return Err(name_error("it is empty"));
    }
    let name_len = u16::try_from(section.name.len())
        .ok()
        .filter(|&len| usize::from(len) <= MAX_NAME)
        .ok_or_else(|| name_error("it is longer than 255 bytes"))?;
    let flags = if section.optional { FLAG_OPTIONAL } else { 0 };
    out.extend_from_slice(&name_len.to_le_bytes());
    out.extend_from_slice(&flags.to_le_bytes());
    out.extend_from_slice(&section.version.to_le_bytes());
    out.extend_from_slice(&(section.payload.len() as u64).to_le_bytes());
    out.extend_from_slice(section.name.as_bytes());
    out.extend_from_slice(&section.payload);
    Ok(())
}

/// Reads what [`encode`] wrote. Never panics, whatever the bytes are.
///
/// # Errors
/// See [`StateError`]; each reason has its own variant.
pub fn decode(bytes: &[u8]) -> Result<Sections, StateError> {
    let Some((header, payload)) = bytes.split_first_chunk::<HEADER_LEN>() else {
        return Err(StateError::Truncated { len: bytes.len() });
    };
    let mut header = Reader { bytes: header, offset: 0 };
    let (Some(magic), Some(version), Some(stored), Some(claimed)) =
        (header.array(), header.u32(), header.u32(), header.u64())
    else {
        return Err(StateError::Truncated { len: bytes.len() });
    };
    // Checked in this order: the version counts only after the magic, the other fields only in a known version.
    if magic != MAGIC {
        return Err(StateError::BadMagic { found: magic });
    }
    if !SUPPORTED_VERSIONS.contains(&version) {
        return Err(StateError::Version { found: version });
    }
    if claimed > MAX_PAYLOAD {
        return Err(StateError::TooLong { len: claimed });
    }
    if claimed != payload.len() as u64 {
        return Err(StateError::Length { claimed, present: payload.len() as u64 });
    }
    let computed = checksum(claimed, payload);
    if stored != computed {
        return Err(StateError::Checksum { stored, computed });
    }
    read_sections(payload)
}

fn read_sections(payload: &[u8]) -> Result<Sections, StateError> {
    let mut reader = Reader { bytes: payload, offset: 0 };
    let mut sections = Sections::default();
    let mut names = HashSet::new();
    while !reader.bytes.is_empty() {
        let offset = reader.offset;
        let section = reader.section().map_err(|what| StateError::Section { offset, what })?;
        if !names.insert(section.name.clone()) {
            return Err(StateError::Section { offset, what: "a second section of the same name" });
        }
        sections.push(section);
    }
    Ok(sections)
}

static CRC32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// The checksum covers the length too, so that no single field of the header can change unseen.
fn checksum(len: u64, payload: &[u8]) -> u32 {
    let mut digest = CRC32C.digest();
    digest.update(&len.to_le_bytes());
    digest.update(payload);
    digest.finalize()
}

struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.bytes.split_first_chunk::<N>()?;
        self.bytes = rest;
        self.offset += N;
        Some(*head)
    }

    fn slice(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.bytes.split_at_checked(len)?;
        self.bytes = rest;
        self.offset += len;
        Some(head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn section(&mut self) -> Result<Section, &'static str> {
        if self.bytes.len() < SECTION_HEADER_LEN {
            return Err("a section header is cut short");
        }
        let cut = "a section header is cut short";
        let name_len = usize::from(self.u16().ok_or(cut)?);
        let flags = self.u16().ok_or(cut)?;
        let version = self.u32().ok_or(cut)?;
        let len = self.u64().ok_or(cut)?;
        if flags & !FLAG_OPTIONAL != 0 {
            return Err("a section has flags that are not known");
        }
        if name_len == 0 || name_len > MAX_NAME {
            return Err("a section name must have 1 to 255 bytes");
        }
        let name = self.slice(name_len).ok_or("a section name is cut short")?;
        let name = std::str::from_utf8(name).map_err(|_| "a section name is not UTF-8")?.to_owned();
        let len = usize::try_from(len).map_err(|_| "a section is longer than memory")?;
        let payload = self.slice(len).ok_or("a section is cut short")?.to_vec();
        Ok(Section { name, version, optional: flags & FLAG_OPTIONAL != 0, payload })
    }
}

#[cfg(test)]
mod golden_tests;

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sections {
        let mut sections = Sections::default();
        sections.push(Section::new("a", 1, b"one".to_vec()));
        sections.push(Section::new("vdpa/extra", 7, Vec::new()).optional());
        sections.push(Section::json("j", 2, &[1, 2, 3]).unwrap());
        sections
    }

    /// Repairs length and checksum after a test has damaged the sections.
    fn reseal(bytes: &mut [u8]) {
        let len = (bytes.len() - HEADER_LEN) as u64;
        bytes[16..24].copy_from_slice(&len.to_le_bytes());
        let sum = checksum(len, &bytes[HEADER_LEN..]);
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
    }

    #[test]
    fn round_trip() {
        let mut sections = decode(&encode(&sample()).unwrap()).unwrap();
        assert_eq!(sections, sample());
        assert_eq!(sections.take("j").unwrap().parse::<Vec<u8>>(2).unwrap(), [1, 2, 3]);
        assert!(
            matches!(sections.ensure_consumed(), Err(StateError::Unknown { name, version: 1 }) if name == "a")
        );
        sections.end_of_own().unwrap();
        assert_eq!(sections.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["a"]);
        sections.take("a").unwrap();
        sections.ensure_consumed().unwrap();
    }

    #[test]
    fn each_damage_has_its_own_error() {
        let good = encode(&sample()).unwrap();
        assert_eq!(decode(&good[..10]), Err(StateError::Truncated { len: 10 }));
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            decode(&bytes).unwrap_err()
        };
        assert!(matches!(with(0, b'X'), StateError::BadMagic { .. }));
        assert_eq!(with(8, 9), StateError::Version { found: 9 });
        assert!(with(8, 9).to_string().contains("reads versions 1 to 1"));
        assert!(matches!(with(12, !good[12]), StateError::Checksum { .. }));
        assert!(matches!(with(23, 1), StateError::TooLong { .. }));
        assert!(matches!(decode(&good[..good.len() - 1]), Err(StateError::Length { .. })));
        assert!(matches!(with(good.len() - 1, !good[good.len() - 1]), StateError::Checksum { .. }));
    }

    #[test]
    fn every_single_bit_counts() {
        let good = encode(&sample()).unwrap();
        for at in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            assert!(decode(&bytes).is_err(), "bit {at}");
        }
    }

    #[test]
    fn sections_are_checked_even_with_a_good_checksum() {
        let good = encode(&sample()).unwrap();
        for at in HEADER_LEN..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                reseal(&mut bytes);
                // Whatever comes out, it comes out without a panic and within the bytes given.
                if let Ok(sections) = decode(&bytes) {
                    assert!(sections.iter().map(|s| s.payload.len()).sum::<usize>() < bytes.len());
                }
            }
        }
        let mut flags = good.clone();
        flags[HEADER_LEN + 2] = 0x80;
        reseal(&mut flags);
        assert!(matches!(decode(&flags), Err(StateError::Section { offset: 0, .. })));
    }

    #[test]
    fn names_are_checked() {
        for (name, twice) in [(String::new(), false), ("x".repeat(256), false), ("x".into(), true)] {
            let mut sections = Sections::default();
            sections.push(Section::new(&name, 1, Vec::new()));
            if twice {
                sections.push(Section::new(&name, 1, Vec::new()));
            }
            assert!(matches!(encode(&sections), Err(StateError::Name { .. })), "{name}");
        }
    }
}
