//! The messages of a migration: a frame of 24 bytes, a payload that is checked, and for pages the data behind it.
//!
//! | bytes | field of a frame, little endian |
//! |---|---|
//! | 4 | `VDPM` |
//! | 2 | version of the protocol |
//! | 2 | kind |
//! | 8 | length of the payload |
//! | 4 | CRC-32C of the first 16 bytes and the payload |
//! | 4 | 0 |

use std::io::{Read, Write};

use crc::{CRC_32_ISCSI, Crc, Table};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::{Malformed, MigrateError};

/// First bytes of each frame.
const MAGIC: [u8; 4] = *b"VDPM";
/// The version of the protocol that this library speaks.
pub const PROTOCOL_VERSION: u16 = 1;
/// Bytes of a frame.
const FRAME: usize = 24;
/// Longest payload of an answer, and of an offer.
const TEXT_MAX: u64 = 4 << 20;
/// Longest payload of the state of the device and of the machine.
const STATE_MAX: u64 = crate::state::MAX_PAYLOAD + (2 << 20);
/// Most runs of one message of pages.
pub(super) const RUNS_MAX: usize = 4096;
/// Bytes of one run on the wire.
const RUN: usize = 24;

static CRC32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Kind {
    /// Source: what would move. JSON, [`Offer`](super::Offer).
    Offer = 1,
    /// Destination: memory and mappings are made.
    Ready = 2,
    /// Destination: it does not want what is offered, or could not take it. JSON, a text.
    Refused = 3,
    /// Source: pages; [`Run`]s, then the data of those that have some.
    Pages = 4,
    /// Source: a round ends.
    Round = 5,
    /// Destination: everything up to the end of the round is in memory.
    RoundDone = 6,
    /// Source: the state of the device and of the machine, as sections.
    State = 7,
    /// Destination: the state is loaded; all that is left is to start.
    Loaded = 8,
    /// Source: the device is the destination's.
    Commit = 9,
    /// Destination: the device runs there.
    Running = 10,
    /// Source: it goes on alone. JSON, a text.
    Abort = 11,
    /// Either: where does the device of a migration run? JSON, its id.
    Ask = 12,
    /// The other: JSON, a [`Fate`](super::Fate).
    Answer = 13,
}

impl Kind {
    pub(super) const ALL: [Self; 13] = [
        Self::Offer,
        Self::Ready,
        Self::Refused,
        Self::Pages,
        Self::Round,
        Self::RoundDone,
        Self::State,
        Self::Loaded,
        Self::Commit,
        Self::Running,
        Self::Abort,
        Self::Ask,
        Self::Answer,
    ];

    fn of(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == number)
    }

    /// Name, for errors and documents.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Offer => "offer",
            Self::Ready => "ready",
            Self::Refused => "refused",
            Self::Pages => "pages",
            Self::Round => "round",
            Self::RoundDone => "round-done",
            Self::State => "state",
            Self::Loaded => "loaded",
            Self::Commit => "commit",
            Self::Running => "running",
            Self::Abort => "abort",
            Self::Ask => "ask",
            Self::Answer => "answer",
        }
    }

    const fn longest(self) -> u64 {
        match self {
            Self::Offer | Self::Refused | Self::Abort | Self::Ask | Self::Answer => TEXT_MAX,
            Self::Pages => (RUNS_MAX * RUN) as u64,
            Self::State => STATE_MAX,
            Self::Ready | Self::Round | Self::RoundDone | Self::Loaded | Self::Commit | Self::Running => 0,
        }
    }
}

/// One message, without the data of pages.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) payload: Vec<u8>,
}

impl Message {
    /// Reads a payload that is JSON.
    pub(super) fn parse<T: DeserializeOwned>(&self) -> Result<T, MigrateError> {
        let unreadable =
            |error: serde_json::Error| Malformed::Text { kind: self.kind.name(), reason: error.to_string() };
        serde_json::from_slice(&self.payload).map_err(|error| unreadable(error).into())
    }
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut digest = CRC32C.digest();
    digest.update(head);
    digest.update(payload);
    digest.finalize()
}

/// Writes a message, and flushes unless data follows.
pub(super) fn write(stream: &mut impl Write, kind: Kind, payload: &[u8]) -> Result<(), MigrateError> {
    let len = payload.len() as u64;
    if len > kind.longest() {
        return Err(Malformed::Long { kind: kind.name(), len, most: kind.longest() }.into());
    }
    let mut frame = Vec::with_capacity(FRAME + payload.len());
    frame.extend(MAGIC);
    frame.extend(PROTOCOL_VERSION.to_le_bytes());
    frame.extend((kind as u16).to_le_bytes());
    frame.extend(len.to_le_bytes());
    frame.extend(checksum(&frame, payload).to_le_bytes());
    frame.extend([0; 4]);
    frame.extend_from_slice(payload);
    stream.write_all(&frame)?;
    if kind == Kind::Pages { Ok(()) } else { Ok(stream.flush()?) }
}

/// Writes a message whose payload is JSON.
pub(super) fn write_json<T: Serialize>(
    stream: &mut impl Write,
    kind: Kind,
    value: &T,
) -> Result<(), MigrateError> {
    let text = serde_json::to_vec(value)
        .map_err(|error| Malformed::Text { kind: kind.name(), reason: error.to_string() })?;
    write(stream, kind, &text)
}

/// Reads a message. Allocates no more than arrives.
pub(super) fn read(stream: &mut impl Read) -> Result<Message, MigrateError> {
    let mut frame = [0; FRAME];
    stream.read_exact(&mut frame)?;
    let (head, rest) = frame.split_at(16);
    let (magic, version) = (field(head, 0), u16::from_le_bytes(field(head, 4)));
    if magic != MAGIC {
        return Err(Malformed::Magic { found: magic }.into());
    }
    if version != PROTOCOL_VERSION {
        return Err(Malformed::Version { found: version }.into());
    }
    let number = u16::from_le_bytes(field(head, 6));
    let kind = Kind::of(number).ok_or(Malformed::Kind { number })?;
    let len = u64::from_le_bytes(field(head, 8));
    if len > kind.longest() {
        return Err(Malformed::Long { kind: kind.name(), len, most: kind.longest() }.into());
    }
    let mut payload = Vec::new();
    stream.take(len).read_to_end(&mut payload)?;
    if payload.len() as u64 != len {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    let stored = u32::from_le_bytes(field(rest, 0));
    let reserved = rest.get(4..).is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
    if stored != checksum(head, &payload) || !reserved {
        return Err(Malformed::Damaged { kind: kind.name() }.into());
    }
    Ok(Message { kind, payload })
}

/// A field of a frame, which has all of them.
fn field<const N: usize>(frame: &[u8], at: usize) -> [u8; N] {
    frame.get(at..).and_then(|bytes| bytes.first_chunk().copied()).unwrap_or([0; N])
}

/// Reads a message of a kind, or the text of one that says that the other side has ended the migration.
pub(super) fn expect(stream: &mut impl Read, wanted: Kind) -> Result<Message, MigrateError> {
    let message = read(stream)?;
    match message.kind {
        kind if kind == wanted => Ok(message),
        Kind::Refused | Kind::Abort => Err(MigrateError::Refused { reason: message.parse()? }),
        kind => Err(Malformed::Unexpected { found: kind.name(), wanted: wanted.name() }.into()),
    }
}

/// Adjacent pages of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Number of the region in the offer.
    pub(super) region: u32,
    /// Whether they have nothing but zeros, so that no data follows.
    pub(super) zero: bool,
    /// Number of the first page in its region.
    pub(super) first: u64,
    /// How many there are.
    pub(super) count: u64,
}

/// Writes pages without their data.
pub(super) fn write_runs(stream: &mut impl Write, runs: &[Run]) -> Result<(), MigrateError> {
    let mut payload = Vec::with_capacity(runs.len() * RUN);
    for run in runs {
        payload.extend(run.region.to_le_bytes());
        payload.extend(u32::from(run.zero).to_le_bytes());
        payload.extend(run.first.to_le_bytes());
        payload.extend(run.count.to_le_bytes());
    }
    write(stream, Kind::Pages, &payload)
}

/// Reads the payload of a message of pages. `pages` has the number of pages of each region.
pub(super) fn runs(payload: &[u8], pages: &[u64]) -> Result<Vec<Run>, MigrateError> {
    let (chunks, rest) = payload.as_chunks::<RUN>();
    if !rest.is_empty() {
        return Err(Malformed::Pages { what: "a run is cut short" }.into());
    }
    chunks.iter().map(|bytes| run(bytes, pages).map_err(|what| Malformed::Pages { what }.into())).collect()
}

fn run(bytes: &[u8; RUN], pages: &[u64]) -> Result<Run, &'static str> {
    let cut = "a run is cut short";
    let (region, rest) = bytes.split_first_chunk().ok_or(cut)?;
    let (flags, rest) = rest.split_first_chunk().ok_or(cut)?;
    let (first, rest) = rest.split_first_chunk().ok_or(cut)?;
    let region = u32::from_le_bytes(*region);
    let zero = match u32::from_le_bytes(*flags) {
        0 => false,
        1 => true,
        _ => return Err("a run has flags that are not known"),
    };
    let first = u64::from_le_bytes(*first);
    let count = rest.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)).ok_or(cut)?;
    let there = usize::try_from(region).ok().and_then(|at| pages.get(at)).ok_or("a run is of no region")?;
    if count == 0 || first.checked_add(count).is_none_or(|end| end > *there) {
        return Err("a run is empty, or not inside of its region");
    }
    Ok(Run { region, zero, first, count })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(kind: Kind, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&mut bytes, kind, payload).unwrap();
        bytes
    }

    #[test]
    fn every_bit_of_a_message_counts_and_nothing_less_is_one() {
        for (kind, payload) in
            [(Kind::Ready, &b""[..]), (Kind::Abort, b"\"why\""), (Kind::State, b"sections")]
        {
            let good = one(kind, payload);
            let message = read(&mut &good[..]).unwrap();
            assert_eq!((message.kind, &message.payload[..]), (kind, payload));
            for at in 0..good.len() * 8 {
                let mut bytes = good.clone();
                bytes[at / 8] ^= 1 << (at % 8);
                assert!(read(&mut &bytes[..]).is_err(), "{kind:?}, bit {at}");
            }
            for len in 0..good.len() {
                assert!(read(&mut &good[..len]).is_err(), "{kind:?}, {len} bytes");
            }
        }
    }

    #[test]
    fn errors_say_what_would_be_right() {
        let text = |bytes: &[u8]| read(&mut &bytes[..]).unwrap_err().to_string();
        assert!(text(b"GET / HTTP/1.1\r\nHost: a.b\r\n").contains("begins with \"GET \""));
        let mut later = one(Kind::Ready, b"");
        later[4] = 9;
        assert!(text(&later).contains("version 9; this program speaks version 1"));
        let mut unknown = one(Kind::Ready, b"");
        unknown[6] = 99;
        assert!(text(&unknown).contains("kind 99"));
        let mut long = one(Kind::Ready, b"");
        long[15] = 1;
        assert!(text(&long).contains("at most 0"));
        let unexpected = expect(&mut &one(Kind::Ready, b"")[..], Kind::Loaded).unwrap_err().to_string();
        assert!(unexpected.contains("\"ready\"") && unexpected.contains("\"loaded\""), "{unexpected}");
        let refused = expect(&mut &one(Kind::Refused, b"\"no room\"")[..], Kind::Ready).unwrap_err();
        assert!(refused.to_string().contains("no room"));
    }

    #[test]
    fn runs_are_of_the_memory_that_was_offered() {
        let good = [
            Run { region: 1, zero: false, first: 3, count: 5 },
            Run { region: 0, zero: true, first: 0, count: 1 },
        ];
        let mut bytes = Vec::new();
        write_runs(&mut bytes, &good).unwrap();
        let payload = read(&mut &bytes[..]).unwrap().payload;
        assert_eq!(runs(&payload, &[1, 8]).unwrap(), good);
        for (pages, what) in [(&[1, 7][..], "not inside"), (&[1], "no region"), (&[0, 8], "not inside")] {
            assert!(runs(&payload, pages).unwrap_err().to_string().contains(what));
        }
        assert!(runs(&payload[1..], &[1, 8]).is_err());
        let empty = Run { count: 0, ..good[0] };
        let huge = Run { first: u64::MAX, count: 2, ..good[0] };
        for bad in [empty, huge] {
            let mut bytes = Vec::new();
            write_runs(&mut bytes, &[bad]).unwrap();
            assert!(runs(&read(&mut &bytes[..]).unwrap().payload, &[1, 8]).is_err());
        }
    }

    #[test]
    fn the_document_has_every_message() {
        let document = include_str!("../../../../docs/migration.md");
        let rows = document.lines().skip_while(|line| *line != "## Messages").filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.split('|').map(str::trim);
            let number: u16 = cells.next()?.parse().ok()?;
            Some((number, cells.next()?.trim_matches('`').to_owned()))
        });
        let kinds = Kind::ALL.map(|kind| (kind as u16, kind.name().to_owned()));
        assert_eq!(rows.collect::<Vec<_>>(), kinds);
    }
}
