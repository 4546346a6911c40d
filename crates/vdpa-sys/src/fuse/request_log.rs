//! [`RequestLog`]: requests that were read and not answered, in memory that outlives the process.
//!
//! Linux 6.9 and later send such requests again to the successor of a server that has died ([`Connection::notify_resend`]). Before that,
//! nobody but the server knows of them, and their callers wait for ever. So a server there has the kernel write each request into memory
//! that a successor finds: at no instant is a request in neither place.
//!
//! | Bytes of a slot | what |
//! |---|---|
//! | 0 | the connection, by a number that its server has chosen |
//! | 64 | the request, as the kernel has written it. Its number, `unique`, is 0 while the slot is free |
//!
//! [`Connection::notify_resend`]: super::Connection::notify_resend
#![expect(unsafe_code, reason = "the kernel writes a request to an address in shared memory")]

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use parking_lot::Mutex;
use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};
use vdpa_core::Errno;

use super::BUFFER_SIZE;
use crate::mmap::{Prot, SharedMap};
use crate::{errno, memfd};

/// Requests that are kept. Further ones are read as without a log, and are lost with the process: as many threads of clients have to
/// be in an ioctl at the same time.
const SLOTS: usize = 64;
/// Bytes of a slot, whose pages get memory when it is first used.
const SLOT: usize = (REQUEST + BUFFER_SIZE).next_multiple_of(4096);
/// Where the request lies in a slot.
const REQUEST: usize = 64;
/// Where `struct fuse_in_header` has `len` and `unique` (include/uapi/linux/fuse.h).
const LEN: usize = REQUEST;
const UNIQUE: usize = REQUEST + 8;

/// See the module. Any thread may use it.
#[derive(Debug)]
pub struct RequestLog {
    map: SharedMap,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    /// The last one was used last, so that few pages are used.
    free: Vec<usize>,
    /// Slots by the numbers of their requests.
    taken: HashMap<u64, usize>,
    /// Those that this process has used: it has their pages.
    used: HashSet<usize>,
}

/// A request of an earlier process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftRequest {
    /// The number that the answer must carry.
    pub unique: u64,
    /// The request, for [`Request::decode`](super::Request::decode).
    pub bytes: Vec<u8>,
}

impl RequestLog {
    /// An empty log, with its memory file for a successor.
    ///
    /// # Errors
    /// `EMFILE`, `ENOMEM`.
    pub fn create() -> Result<(OwnedFd, Self), Errno> {
        let fd = memfd::create(c"vdpa-requests", (SLOTS * SLOT) as u64, None)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(errno::from_rustix)?;
        let log = Self::open(&fd)?;
        log.begin();
        Ok((fd, log))
    }

    /// The log of an earlier process. It is not used before [`begin`](Self::begin).
    ///
    /// # Errors
    /// `EINVAL` for a file that is none; `ENOMEM`.
    pub fn open(fd: impl AsFd) -> Result<Self, Errno> {
        // Before the size is read: from here on it can only grow.
        let sealed = fcntl_get_seals(&fd).map_err(errno::from_rustix)?.contains(SealFlags::SHRINK);
        let bytes = usize::try_from(fstat(&fd).map_err(errno::from_rustix)?.st_size).unwrap_or(0);
        if !sealed || bytes != SLOTS * SLOT {
            return Err(Errno::INVAL);
        }
        let map = SharedMap::map(fd, 0, bytes, Prot::RW, false)?;
        Ok(Self { map, slots: Mutex::default() })
    }

    /// The earlier process does not use it any more: finds what it has left.
    pub fn begin(&self) {
        let mut slots = Slots::default();
        for slot in (0..SLOTS).rev() {
            match self.unique(slot) {
                0 => slots.free.push(slot),
                unique => drop(slots.taken.insert(unique, slot)),
            }
        }
        *self.slots.lock() = slots;
    }

    /// The requests of this connection that an earlier process had read and not answered, in the order in which they were made.
    #[must_use]
    pub fn left(&self, connection: u64) -> Vec<LeftRequest> {
        let slots = self.slots.lock();
        let of_connection = slots.taken.iter().filter(|(_, slot)| self.load(**slot, 0) == connection);
        let mut left: Vec<_> = of_connection
            .map(|(&unique, &slot)| {
                let len = self.map.load_u32(slot * SLOT + LEN).map_or(0, u32::from_le) as usize;
                let mut bytes = vec![0; len.min(BUFFER_SIZE)];
                // Within the mapping.
                let _ = self.map.read(slot * SLOT + REQUEST, &mut bytes);
                LeftRequest { unique, bytes }
            })
            .collect();
        left.sort_by_key(|request| request.unique);
        left
    }

    /// Reads a request of this connection, whose descriptor is `fd` and does not block, into a slot and into `buffer`. `None` when no
    /// slot is free: it is to be read without the log.
    ///
    /// # Errors
    /// The number of bytes, or the errno of `read(2)`.
    pub(super) fn read(
        &self,
        fd: BorrowedFd<'_>,
        connection: u64,
        buffer: &mut [u8],
    ) -> Option<Result<usize, rustix::io::Errno>> {
        let mut slots = self.slots.lock();
        let slot = slots.free.pop()?;
        let at = slot * SLOT;
        if slots.used.insert(slot) {
            // The kernel must not meet a page that it has to map while it writes a request: if this process is killed then, the
            // request ends with an error, and half of it is here.
            let _ = self.map.write(at + REQUEST, &vec![0; SLOT - REQUEST]);
        }
        self.store(slot, 0, connection);
        let result = self.read_at(fd, at + REQUEST);
        let unique = self.unique(slot);
        match result {
            Ok(len) if unique != 0 => {
                let len = len.min(buffer.len());
                // Within the mapping.
                let _ = self.map.read(at + REQUEST, buffer.get_mut(..len).unwrap_or_default());
                slots.taken.insert(unique, slot);
                Some(Ok(len))
            }
            other => {
                self.store(slot, UNIQUE, 0);
                slots.free.push(slot);
                Some(other)
            }
        }
    }

    /// The request is answered, or needs no answer.
    pub(super) fn answered(&self, unique: u64) {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.taken.remove(&unique) {
            self.store(slot, UNIQUE, 0);
            slots.free.push(slot);
        }
    }

    fn read_at(&self, fd: BorrowedFd<'_>, offset: usize) -> Result<usize, rustix::io::Errno> {
        let to = std::ptr::with_exposed_provenance_mut::<libc::c_void>(self.map.addr() + offset);
        // SAFETY: the BUFFER_SIZE bytes from there on lie within the slot (`SLOT` is larger than both together), and so in the mapping,
        // which is writable, shared, and lives as long as `self`. No reference to them exists: the mapping is accessed by copies only.
        let len = unsafe { libc::read(fd.as_raw_fd(), to, BUFFER_SIZE) };
        usize::try_from(len).map_err(|_| {
            let error = std::io::Error::last_os_error();
            rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO)
        })
    }

    fn unique(&self, slot: usize) -> u64 {
        self.load(slot, UNIQUE)
    }

    /// Words of this machine's byte order, within the mapping.
    fn load(&self, slot: usize, at: usize) -> u64 {
        self.map.load_u64(slot * SLOT + at).map_or(0, u64::to_le)
    }

    fn store(&self, slot: usize, at: usize, value: u64) {
        let _ = self.map.store_u64(slot * SLOT + at, u64::from_le(value));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixDatagram;

    use zerocopy::IntoBytes as _;

    use super::*;
    use crate::uapi::fuse::InHeader;

    fn request(unique: u64, len: usize) -> Vec<u8> {
        let header = InHeader { len: u32::try_from(len).unwrap(), opcode: 39, unique, ..InHeader::default() };
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(len, 0x5a);
        bytes
    }

    #[test]
    fn what_was_not_answered_is_found_by_the_next_process() {
        let (fd, log) = RequestLog::create().unwrap();
        let (kernel, ours) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut buffer = vec![0; BUFFER_SIZE];
        let none = log.read(ours.as_fd(), 7, &mut buffer);
        assert_eq!(none, Some(Err(rustix::io::Errno::AGAIN)));
        for (unique, connection, len) in [(12, 7, 100), (4, 7, 5000), (6, 8, 48), (8, 7, 40)] {
            kernel.send(&request(unique, len)).unwrap();
            assert_eq!(log.read(ours.as_fd(), connection, &mut buffer), Some(Ok(len)));
            assert_eq!(buffer[..len], request(unique, len));
        }
        log.answered(8);
        log.answered(99);
        let next = RequestLog::open(&fd).unwrap();
        assert_eq!(next.left(7), []);
        next.begin();
        let left = |unique, len| LeftRequest { unique, bytes: request(unique, len) };
        assert_eq!(next.left(7), [left(4, 5000), left(12, 100)]);
        assert_eq!(next.left(8), [left(6, 48)]);
        next.answered(4);
        let third = RequestLog::open(&fd).unwrap();
        third.begin();
        assert_eq!(third.left(7), [left(12, 100)]);
    }

    #[test]
    fn more_requests_than_slots_are_read_without_the_log() {
        let (_fd, log) = RequestLog::create().unwrap();
        let (kernel, ours) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut buffer = vec![0; BUFFER_SIZE];
        for unique in 1..=SLOTS as u64 {
            kernel.send(&request(unique, 40)).unwrap();
            assert_eq!(log.read(ours.as_fd(), 1, &mut buffer), Some(Ok(40)));
        }
        assert_eq!(log.read(ours.as_fd(), 1, &mut buffer), None);
        log.answered(3);
        kernel.send(&request(1000, 40)).unwrap();
        assert_eq!(log.read(ours.as_fd(), 1, &mut buffer), Some(Ok(40)));
        assert_eq!(log.left(1).len(), SLOTS);
    }

    #[test]
    fn another_file_is_refused() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; 4096]).unwrap();
        assert_eq!(RequestLog::open(&file).unwrap_err(), Errno::INVAL);
        let short = memfd::create(c"short", 4096, None).unwrap();
        fcntl_add_seals(&short, SealFlags::SHRINK).unwrap();
        assert_eq!(RequestLog::open(&short).unwrap_err(), Errno::INVAL);
    }
}
