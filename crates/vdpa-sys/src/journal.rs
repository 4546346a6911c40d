//! A crash-safe, append-only journal in a memory file.
//!
//! One process writes; when it is killed at any instruction, the records it had committed are there for the next
//! process that opens the same memory file, in order and whole. Nothing is synchronised with a disk: the memory file
//! is kept by a process that outlives the writer.
//!
//! # Layout
//! All numbers are little-endian. The file begins with a page that has the magic number at 0, the version at 8 and, at
//! 16, the offset of the current segment. A segment begins at a page:
//!
//! | Offset | Field |
//! |---|---|
//! | 0 | `SEGMENT_MAGIC` |
//! | 8 | generation: 1 for the first segment, one more for each that follows |
//! | 16 | capacity: bytes of the segment, this header included |
//! | 24 | committed: bytes of this header and of the records that count |
//! | 32 | records |
//!
//! A record is its length, its kind, its checksum and 4 bytes of zero, then the payload, padded to 8 bytes. The
//! CRC-32C covers generation, offset, length, kind and payload, so that bytes of an older segment at the same place are
//! never taken for a record.
//!
//! An append writes the record behind the committed ones and then stores `committed`. A checkpoint writes a new segment
//! into a part of the file that the current one does not use and then stores the offset of the current segment. Both
//! stores are single and atomic, so that a reader finds the journal before or after, never between.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crc::{CRC_32_ISCSI, Crc, Table};
use rustix::fs::{FallocateFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};

use crate::mmap::{Prot, SharedMap};
use crate::{errno, memfd};

const MAGIC: u64 = u64::from_le_bytes(*b"VDPAJRNL");
const VERSION: u32 = 1;
const SEGMENT_MAGIC: u64 = u64::from_le_bytes(*b"VDPASEGM");
/// Unit of placement, whatever the machine's page size is: a file can then be read on any.
const PAGE: usize = 4096;
const AT_VERSION: usize = 8;
const AT_CURRENT: usize = 16;
const AT_GENERATION: usize = 8;
const AT_CAPACITY: usize = 16;
const AT_COMMITTED: usize = 24;
const SEGMENT_HEADER: usize = 32;
const RECORD_HEADER: usize = 16;
/// Old segments of more bytes than this are given back to the system.
const PUNCH_FROM: usize = 16 * PAGE;
/// How often a reader begins again because the writer made a checkpoint meanwhile.
const READ_ATTEMPTS: u32 = 64;
/// How many of these may fail before the file is taken to be damaged.
const READ_ERRORS: u32 = 8;

static CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// The writer of a journal. There must be one at a time; nothing enforces it.
#[derive(Debug)]
pub struct Journal {
    fd: OwnedFd,
    map: SharedMap,
    segment: Segment,
    /// Bytes of the segment that are in use.
    used: usize,
    max_size: usize,
}

/// Where a segment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    start: usize,
    capacity: usize,
    generation: u64,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is; the journal gives it no meaning.
    pub kind: u32,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// What a journal says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// In the order they were appended, from the last checkpoint on.
    pub records: Vec<Record>,
    /// Checkpoints made so far, plus one.
    pub generation: u64,
    /// Where a committed record is not what was written, if one is: something else has written to the memory. What is
    /// behind it cannot be told from garbage and is left out.
    pub damage: Option<usize>,
}

/// Why a file cannot be used as a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The file is something else, or was damaged beyond its records.
    #[error("the file is not a journal: {what}")]
    NotAJournal {
        /// What is wrong.
        what: &'static str,
    },
    /// Written by another version.
    #[error("the journal has version {found}; version {VERSION} is known")]
    Version {
        /// The version in it.
        found: u32,
    },
    /// A system call failed.
    #[error("cannot use the journal's memory file: {errno}")]
    Io {
        /// The reason.
        errno: Errno,
    },
}

/// Why a record was not appended or a checkpoint not made. The journal is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// There is no room: make a checkpoint. From a checkpoint: the limit of the file is too low for it.
    #[error("the journal has no room for {needed} more bytes")]
    Full {
        /// Bytes that did not fit.
        needed: usize,
    },
    /// A system call failed.
    #[error("cannot write the journal: {errno}")]
    Io {
        /// The reason.
        errno: Errno,
    },
}

impl Journal {
    /// A new journal with room for `initial` bytes of records, in a file that grows to `max_size` bytes at most. The file
    /// is closed on exec and cannot shrink, so that a reader's mapping stays valid. `name` is for `/proc/PID/maps`.
    ///
    /// Allow for three times the largest checkpoint in `max_size`: the old segment stays until the new one is written.
    ///
    /// # Errors
    /// `EINVAL` when `max_size` is too small for `initial`; `EMFILE`, `ENOMEM`.
    pub fn create(name: &CStr, initial: usize, max_size: usize) -> Result<Self, Errno> {
        let capacity = initial.checked_add(SEGMENT_HEADER).and_then(page_up).ok_or(Errno::INVAL)?;
        let size = capacity.checked_add(PAGE).filter(|&size| size <= max_size).ok_or(Errno::INVAL)?;
        let fd = memfd::create(name, size as u64, None)?;
        seal(fd.as_fd())?;
        let map = SharedMap::map(&fd, 0, size, Prot::RW, false)?;
        let segment = Segment { start: PAGE, capacity, generation: 1 };
        let mut journal = Self { fd, map, segment, used: SEGMENT_HEADER, max_size };
        journal.write_segment(segment, &[])?;
        journal.store(AT_VERSION, VERSION.into())?;
        journal.store(AT_CURRENT, PAGE as u64)?;
        // Last: a file without it is no journal.
        journal.store(0, MAGIC)?;
        Ok(journal)
    }

    /// Opens the journal of a writer that has ended, to read and to go on writing. Nothing is written before the next
    /// append; when [`Contents::damage`] is set, that append overwrites what is behind the damage.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(fd: OwnedFd, max_size: usize) -> Result<(Self, Contents), OpenError> {
        seal(fd.as_fd()).map_err(|errno| OpenError::Io { errno })?;
        let map = map_whole(fd.as_fd(), Prot::RW)?;
        let (segment, bytes) = copy_current(&map)?;
        let (contents, used) = parse(&segment, &bytes);
        Ok((Self { fd, map, segment, used, max_size }, contents))
    }

    /// Appends a record. It counts from the moment this returns, and may count when the process is killed before. Does
    /// not block and makes no system call.
    ///
    /// # Errors
    /// [`AppendError::Full`] when a checkpoint has to be made first.
    pub fn append(&mut self, kind: u32, payload: &[u8]) -> Result<(), AppendError> {
        let needed = record_size(payload.len()).ok_or(AppendError::Full { needed: usize::MAX })?;
        if needed > self.segment.capacity - self.used {
            return Err(AppendError::Full { needed });
        }
        let header = record_header(self.segment.generation, self.used, kind, payload)
            .ok_or(AppendError::Full { needed })?;
        let at = self.segment.start + self.used;
        self.write(at, &header)?;
        self.write(at + RECORD_HEADER, payload)?;
        reach(CrashPoint::RecordWritten);
        self.store(self.segment.start + AT_COMMITTED, (self.used + needed) as u64)?;
        self.used += needed;
        reach(CrashPoint::RecordCommitted);
        Ok(())
    }

    /// Replaces all records by these, in one step: the journal then begins with them. Takes about a microsecond per
    /// KiB and up to three system calls.
    ///
    /// # Errors
    /// [`AppendError`]; the records before stay.
    pub fn checkpoint<'a>(
        &mut self,
        records: impl IntoIterator<Item = (u32, &'a [u8])>,
    ) -> Result<(), AppendError> {
        let generation = self.segment.generation + 1;
        let mut image = Vec::new();
        for (kind, payload) in records {
            let full = AppendError::Full { needed: payload.len() };
            let size = record_size(payload.len()).ok_or(full)?;
            let offset = SEGMENT_HEADER + image.len();
            image.extend_from_slice(&record_header(generation, offset, kind, payload).ok_or(full)?);
            image.extend_from_slice(payload);
            image.resize(offset - SEGMENT_HEADER + size, 0);
        }
        let segment = self.place(image.len(), generation)?;
        let old = self.segment;
        self.write_segment(segment, &image).map_err(|errno| AppendError::Io { errno })?;
        reach(CrashPoint::CheckpointWritten);
        self.store(AT_CURRENT, segment.start as u64)?;
        reach(CrashPoint::CheckpointSwitched);
        self.segment = segment;
        self.used = SEGMENT_HEADER + image.len();
        if old.capacity > PUNCH_FROM {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Memory that cannot be given back is used again later.
            let _ = fallocate(&self.fd, flags, old.start as u64, old.capacity as u64);
        }
        Ok(())
    }

    /// Whether nobody has written to it since this one has opened it, or has last written itself.
    #[must_use]
    pub fn is_current(&self) -> bool {
        let load = |at| self.map.load_u64(at);
        load(AT_CURRENT) == Ok(self.segment.start as u64)
            && load(self.segment.start + AT_GENERATION) == Ok(self.segment.generation)
            && load(self.segment.start + AT_COMMITTED) == Ok(self.used as u64)
    }

    /// Bytes that records take in the current segment, with their headers.
    #[must_use]
    pub const fn used(&self) -> usize {
        self.used - SEGMENT_HEADER
    }

    /// Bytes that records can take before a checkpoint is needed.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.segment.capacity - SEGMENT_HEADER
    }

    /// Bytes of the file.
    #[must_use]
    pub fn file_size(&self) -> usize {
        self.map.len()
    }

    /// Finds room for a segment of `len` bytes of records, preferably twice that, and makes the file longer if needed.
    fn place(&mut self, len: usize, generation: u64) -> Result<Segment, AppendError> {
        let full = AppendError::Full { needed: len };
        let least = len.checked_add(SEGMENT_HEADER).and_then(page_up).ok_or(full)?;
        let wanted = len.checked_mul(2).and_then(|len| page_up(len + SEGMENT_HEADER)).ok_or(full)?;
        let (before, after) = (self.segment.start - PAGE, self.segment.start + self.segment.capacity);
        let behind = self.max_size.saturating_sub(after) / PAGE * PAGE;
        let (start, capacity) = match (before, behind) {
            (room, _) if room >= wanted => (PAGE, room),
            (_, room) if room >= wanted => (after, wanted.max((self.map.len() - after) / PAGE * PAGE)),
            (room, _) if room >= least => (PAGE, room),
            (_, room) if room >= least => (after, room),
            _ => return Err(full),
        };
        let end = start + capacity;
        if end > self.map.len() {
            let io = |errno| AppendError::Io { errno };
            ftruncate(&self.fd, end as u64).map_err(|error| io(errno::from_rustix(error)))?;
            self.map = SharedMap::map(&self.fd, 0, end, Prot::RW, false).map_err(io)?;
        }
        Ok(Segment { start, capacity, generation })
    }

    fn write_segment(&mut self, segment: Segment, image: &[u8]) -> Result<(), Errno> {
        let Segment { start, capacity, generation } = segment;
        let committed = (SEGMENT_HEADER + image.len()) as u64;
        for (at, value) in [
            (0, SEGMENT_MAGIC),
            (AT_GENERATION, generation),
            (AT_CAPACITY, capacity as u64),
            (AT_COMMITTED, committed),
        ] {
            self.map.store_u64(start + at, value).map_err(|_| Errno::FAULT)?;
        }
        self.map.write(start + SEGMENT_HEADER, image).map_err(|_| Errno::FAULT)
    }

    fn store(&self, at: usize, value: u64) -> Result<(), StoreError> {
        self.map.store_u64(at, value).map_err(|_| StoreError)
    }

    fn write(&self, at: usize, bytes: &[u8]) -> Result<(), StoreError> {
        self.map.write(at, bytes).map_err(|_| StoreError)
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// An access outside of the mapping; the bounds are checked before, so it is an error of this module.
struct StoreError;

impl From<StoreError> for Errno {
    fn from(_: StoreError) -> Self {
        Self::FAULT
    }
}

impl From<StoreError> for AppendError {
    fn from(error: StoreError) -> Self {
        Self::Io { errno: error.into() }
    }
}

/// Reads a journal, also while another process writes it.
///
/// # Errors
/// [`OpenError`]; `EBUSY` when the writer makes checkpoints faster than this can read.
pub fn read(fd: impl AsFd) -> Result<Contents, OpenError> {
    let mut errors = 0;
    for _ in 0..READ_ATTEMPTS {
        let map = map_whole(fd.as_fd(), Prot::RO)?;
        match copy_current(&map) {
            // The copy is of one segment only if that was the current one from the beginning to the end.
            Ok((segment, bytes)) if current(&map)? == segment.start && is_at(&map, &segment) => {
                return Ok(parse(&segment, &bytes).0);
            }
            Ok(_) => {}
            // A writer may have moved the segment, or made the file longer, meanwhile; not that often in a row.
            Err(error) => {
                errors += 1;
                if errors == READ_ERRORS {
                    return Err(error);
                }
            }
        }
        std::thread::yield_now();
    }
    Err(OpenError::Io { errno: Errno::BUSY })
}

fn is_at(map: &SharedMap, segment: &Segment) -> bool {
    map.load_u64(segment.start + AT_GENERATION) == Ok(segment.generation)
}

/// Keeps the file from shrinking under a mapping. A file that came through a kexec has lost the seal.
fn seal(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let seals = fcntl_get_seals(fd).map_err(errno::from_rustix)?;
    if seals.contains(SealFlags::SHRINK) {
        return Ok(());
    }
    fcntl_add_seals(fd, SealFlags::SHRINK).map_err(errno::from_rustix)
}

fn size_of_file(fd: BorrowedFd<'_>) -> Result<usize, Errno> {
    let size = fstat(fd).map_err(errno::from_rustix)?.st_size;
    usize::try_from(size).map_err(|_| Errno::INVAL)
}

fn map_whole(fd: BorrowedFd<'_>, prot: Prot) -> Result<SharedMap, OpenError> {
    let io = |errno| OpenError::Io { errno };
    let size = size_of_file(fd).map_err(io)?;
    if size < 2 * PAGE {
        return Err(OpenError::NotAJournal { what: "it is too short" });
    }
    // Truncation would end this process, and is excluded for files that came from this module.
    if !fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
        return Err(OpenError::NotAJournal { what: "it is not sealed against shrinking" });
    }
    SharedMap::map(fd, 0, size, prot, false).map_err(io)
}

fn load(map: &SharedMap, at: usize) -> Result<u64, OpenError> {
    map.load_u64(at).map_err(|_| OpenError::NotAJournal { what: "an offset lies outside of it" })
}

fn load_size(map: &SharedMap, at: usize) -> Result<usize, OpenError> {
    usize::try_from(load(map, at)?).map_err(|_| OpenError::NotAJournal { what: "a size is too large" })
}

/// The offset of the current segment.
fn current(map: &SharedMap) -> Result<usize, OpenError> {
    if load(map, 0)? != MAGIC {
        return Err(OpenError::NotAJournal { what: "the magic number is another" });
    }
    let found = map.load_u32(AT_VERSION).unwrap_or(0);
    if found != VERSION {
        return Err(OpenError::Version { found });
    }
    load_size(map, AT_CURRENT)
}

/// The current segment and a copy of its committed bytes behind the header.
fn copy_current(map: &SharedMap) -> Result<(Segment, Vec<u8>), OpenError> {
    let wrong = |what| OpenError::NotAJournal { what };
    let start = current(map)?;
    if start < PAGE || start % PAGE != 0 || start > map.len() - PAGE {
        return Err(wrong("the current segment is not in the file"));
    }
    if load(map, start)? != SEGMENT_MAGIC {
        return Err(wrong("the current segment has no header"));
    }
    let generation = load(map, start + AT_GENERATION)?;
    let capacity = load_size(map, start + AT_CAPACITY)?;
    let committed = load_size(map, start + AT_COMMITTED)?;
    if capacity > map.len() - start || committed < SEGMENT_HEADER || committed > capacity {
        return Err(wrong("the sizes of the current segment do not fit"));
    }
    let mut bytes = vec![0; committed - SEGMENT_HEADER];
    map.read(start + SEGMENT_HEADER, &mut bytes).map_err(|_| wrong("the current segment is cut off"))?;
    Ok((Segment { start, capacity, generation }, bytes))
}

/// The records in the bytes of a segment behind its header, and the bytes in use with the header.
fn parse(segment: &Segment, bytes: &[u8]) -> (Contents, usize) {
    let mut contents = Contents { records: Vec::new(), generation: segment.generation, damage: None };
    let mut at = 0;
    while at < bytes.len() {
        let offset = SEGMENT_HEADER + at;
        let Some((record, size)) = bytes.get(at..).and_then(|rest| parse_one(segment, offset, rest)) else {
            contents.damage = Some(segment.start + offset);
            break;
        };
        contents.records.push(record);
        at += size;
    }
    (contents, SEGMENT_HEADER + at)
}

fn parse_one(segment: &Segment, offset: usize, rest: &[u8]) -> Option<(Record, usize)> {
    let (header, body) = rest.split_first_chunk::<RECORD_HEADER>()?;
    let [l0, l1, l2, l3, k0, k1, k2, k3, ..] = *header;
    let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    let payload = body.get(..len)?;
    let size = record_size(len).filter(|&size| size <= rest.len())?;
    let right = record_header(segment.generation, offset, kind, payload)?;
    (right == *header).then(|| (Record { kind, payload: payload.to_vec() }, size))
}

fn record_header(generation: u64, offset: usize, kind: u32, payload: &[u8]) -> Option<[u8; RECORD_HEADER]> {
    let len = u32::try_from(payload.len()).ok()?.to_le_bytes();
    let kind = kind.to_le_bytes();
    let mut digest = CRC.digest();
    digest.update(&generation.to_le_bytes());
    digest.update(&(offset as u64).to_le_bytes());
    digest.update(&len);
    digest.update(&kind);
    digest.update(payload);
    let sum = digest.finalize().to_le_bytes();
    let mut header = [0; RECORD_HEADER];
    let bytes = len.into_iter().chain(kind).chain(sum);
    header.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    Some(header)
}

/// Bytes of a record whose payload has `len`.
fn record_size(len: usize) -> Option<usize> {
    len.checked_add(RECORD_HEADER)?.checked_next_multiple_of(8)
}

fn page_up(len: usize) -> Option<usize> {
    len.checked_next_multiple_of(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 1 << 20;

    fn payloads(contents: &Contents) -> Vec<(u32, &[u8])> {
        contents.records.iter().map(|record| (record.kind, &*record.payload)).collect()
    }

    fn copy(fd: impl AsFd) -> OwnedFd {
        fd.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn records_come_back_in_order_and_writing_goes_on() {
        let mut journal = Journal::create(c"journal", 100, MAX).unwrap();
        journal.append(1, b"one").unwrap();
        journal.append(2, b"").unwrap();
        let (mut next, contents) = Journal::open(copy(&journal), MAX).unwrap();
        drop(journal);
        assert_eq!(payloads(&contents), [(1, &b"one"[..]), (2, b"")]);
        assert_eq!((contents.generation, contents.damage), (1, None));
        next.append(3, &[7; 9]).unwrap();
        assert_eq!(payloads(&read(&next).unwrap())[2], (3, &[7; 9][..]));
        assert_eq!(next.used(), 24 + 16 + 32);
    }

    #[test]
    fn a_full_journal_takes_a_checkpoint_and_stays_within_its_limit() {
        let mut journal = Journal::create(c"journal", 0, 5 * PAGE).unwrap();
        let payload = [1; 1000];
        for _ in 0..4 {
            journal.append(1, &payload).unwrap();
        }
        let left = journal.capacity() - journal.used();
        assert_eq!(journal.append(1, &payload), Err(AppendError::Full { needed: 1016 }), "{left} are left");
        for round in 0..100_u32 {
            journal.checkpoint([(8, &payload[..]), (9, &round.to_le_bytes())]).unwrap();
            while journal.append(round, &payload).is_ok() {}
            let contents = read(&journal).unwrap();
            assert_eq!(payloads(&contents)[1], (9, &round.to_le_bytes()[..]));
            assert_eq!(contents.generation, u64::from(round) + 2);
            assert!(contents.records.len() > 3 && journal.file_size() <= 5 * PAGE);
        }
        let large = vec![0; 4 * PAGE];
        assert!(matches!(journal.checkpoint([(1, &*large)]), Err(AppendError::Full { .. })));
        assert_eq!(payloads(&read(&journal).unwrap())[0].0, 8, "what was there before stays");
    }

    #[test]
    fn a_segment_grows_with_its_checkpoints_and_is_given_back() {
        let mut journal = Journal::create(c"journal", 0, MAX).unwrap();
        for size in [1000, 10_000, 100_000, 200_000, 10, 200_000, 10, 10] {
            let payload = vec![5; size];
            journal.checkpoint([(1, &*payload)]).unwrap();
            assert_eq!(payloads(&read(&journal).unwrap()), [(1, &*payload)]);
            assert!(journal.file_size() <= MAX);
        }
        let blocks = fstat(&journal).unwrap().st_blocks;
        assert!(blocks <= 64, "{blocks} blocks of 512 bytes for a record of 10 bytes");
    }

    #[test]
    fn bytes_changed_by_others_end_the_records() {
        let mut journal = Journal::create(c"journal", 100, MAX).unwrap();
        for kind in 0..3 {
            journal.append(kind, b"payload").unwrap();
        }
        let second = PAGE + SEGMENT_HEADER + 24;
        for at in [second, second + 4, second + 8, second + 12, second + 16, second + 22] {
            let mut byte = [0];
            journal.map.read(at, &mut byte).unwrap();
            journal.map.write(at, &[!byte[0]]).unwrap();
            let contents = read(&journal).unwrap();
            assert_eq!((contents.records.len(), contents.damage), (1, Some(second)), "byte {at}");
            journal.map.write(at, &byte).unwrap();
        }
        assert_eq!(read(&journal).unwrap().records.len(), 3);
    }

    #[test]
    fn no_header_makes_it_read_outside() {
        let journal = Journal::create(c"journal", 100, MAX).unwrap();
        for at in [0, 8, 16, PAGE, PAGE + 16, PAGE + 24] {
            let right = journal.map.load_u64(at).unwrap();
            for wrong in [0, 1, 31, 4095, 4097, 1 << 20, u64::MAX, u64::MAX - 4095] {
                journal.map.store_u64(at, wrong).unwrap();
                // Never a panic or a fault; a size that fits by chance is a journal without records.
                let _ = read(&journal).map(|contents| assert!(contents.records.is_empty()));
                let _ = Journal::open(copy(&journal), MAX);
            }
            journal.map.store_u64(at, right).unwrap();
        }
        assert!(read(&journal).unwrap().records.is_empty());
        let other = memfd::create(c"other", 8192, None).unwrap();
        assert!(matches!(read(&other), Err(OpenError::NotAJournal { .. })));
        assert!(matches!(Journal::open(other, MAX), Err(OpenError::NotAJournal { .. })));
    }

    #[test]
    fn a_reader_beside_a_writer_sees_one_state() {
        let mut journal = Journal::create(c"journal", 0, 16 * PAGE).unwrap();
        let fd = copy(&journal);
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let (mut last, mut seen) = (0, 0);
                while last < 20_000 {
                    let Ok(contents) = read(&fd) else { continue };
                    assert_eq!(contents.damage, None);
                    let Some(first) = contents.records.first().map(|record| record.kind) else { continue };
                    for (record, kind) in contents.records.iter().zip(first..) {
                        assert_eq!(
                            (record.kind, &*record.payload),
                            (kind, &kind.to_le_bytes().repeat(10)[..])
                        );
                        last = kind;
                    }
                    seen += 1;
                }
                seen
            });
            for number in 1..=20_000_u32 {
                let payload = number.to_le_bytes().repeat(10);
                if journal.append(number, &payload).is_err() {
                    journal.checkpoint([(number, &*payload)]).unwrap();
                }
            }
            assert!(reader.join().unwrap() > 0);
        });
    }
}
