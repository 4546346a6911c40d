//! One FUSE connection: the descriptor of `/dev/fuse` behind a mount.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vdpa_core::Errno;
use zerocopy::IntoBytes;

use super::{BUFFER_SIZE, LeftRequest, MAX_WRITE, Operation, Request, RequestLog};
use crate::uapi::fuse::{
    InitIn, InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION, NotifyInvalEntryOut, OutHeader, UNIQUE_RESEND,
    init_flags, notify,
};

/// The oldest protocol served: Linux 5.4.
pub(super) const MIN_MINOR: u32 = 31;

/// Largest number of unanswered background requests. RELEASE is one: beyond this number the kernel queues further ones, and
/// an OPEN that follows would overtake them, so that exclusive open would fail with a false `EBUSY`.
const MAX_BACKGROUND: u16 = 4096;

/// The first kernel-internal errno. `fuse_dev_do_write()` refuses an answer with such an errno in its header, and the caller
/// would wait for ever.
const FIRST_KERNEL_ERRNO: i32 = 512;

/// What INIT asks the kernel for.
const WANTED: u64 = init_flags::BIG_WRITES
    | init_flags::ATOMIC_O_TRUNC
    | init_flags::PARALLEL_DIROPS
    | init_flags::HANDLE_KILLPRIV_V2
    | init_flags::INIT_EXT
    | init_flags::HAS_RESEND;

/// A FUSE connection; clones refer to the same one. Any thread may answer.
///
/// The kernel ends the mount when the last descriptor of its connection is closed, in whatever process.
#[derive(Clone, Debug)]
pub struct Connection {
    fd: Arc<OwnedFd>,
    /// Where requests are kept until they are answered, with the number of this connection there.
    kept: Arc<OnceLock<(Arc<RequestLog>, u64)>>,
}

/// The result of INIT, which happens once per mount. A new image of the daemon that adopts the connection must get it from
/// the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Protocol version, major.
    pub major: u32,
    /// Protocol version, minor: the lower one of the kernel's and ours.
    pub minor: u32,
    /// [`init_flags`] in force.
    pub flags: u64,
    /// Bytes of the largest write.
    pub max_write: u32,
}

impl Negotiated {
    /// Bytes of the record of an agreement.
    pub const RECORD: usize = 20;

    /// Whether the kernel can send unanswered requests again after a crash (`HAS_RESEND`).
    #[must_use]
    pub const fn has_resend(&self) -> bool {
        self.flags & init_flags::HAS_RESEND != 0
    }

    /// The bytes to keep for a successor of the server: four little-endian fields.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::RECORD] {
        let mut bytes = [0; Self::RECORD];
        let fields = self.major.to_le_bytes().into_iter().chain(self.minor.to_le_bytes());
        let fields = fields.chain(self.flags.to_le_bytes()).chain(self.max_write.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        bytes
    }

    /// The agreement in bytes that were kept; `None` unless they can be an agreement of this server: a protocol it
    /// knows, flags it asks for, the size of writes it reads.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (major, rest) = bytes.split_first_chunk()?;
        let (minor, rest) = rest.split_first_chunk()?;
        let (flags, rest) = rest.split_first_chunk()?;
        let negotiated = Self {
            major: u32::from_le_bytes(*major),
            minor: u32::from_le_bytes(*minor),
            flags: u64::from_le_bytes(*flags),
            max_write: u32::from_le_bytes(rest.try_into().ok()?),
        };
        let known = negotiated.major == KERNEL_VERSION
            && (MIN_MINOR..=KERNEL_MINOR_VERSION).contains(&negotiated.minor)
            && negotiated.flags & !WANTED == 0
            && negotiated.max_write == MAX_WRITE;
        known.then_some(negotiated)
    }
}

/// Why the handshake of a new mount failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// No request came.
    #[error("the kernel sent no INIT within {waited:?}")]
    Silent {
        /// The timeout.
        waited: Duration,
    },
    /// Another request came first: the connection is in service already.
    #[error("the first request is {found}, not INIT: this connection is in service already")]
    NotInit {
        /// The request that came.
        found: String,
    },
    /// The protocol version of the kernel is unknown or too old.
    #[error("the kernel speaks FUSE {major}.{minor}; 7.31 (Linux 5.4) or later is needed")]
    Version {
        /// Major version.
        major: u32,
        /// Minor version.
        minor: u32,
    },
    /// Reading or writing failed.
    #[error("the FUSE connection failed during INIT: {errno}")]
    Io {
        /// The reason.
        errno: Errno,
    },
}

/// Result of [`Connection::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// A request can be read, or the connection has ended, which the read reports.
    Request,
    /// The other descriptor is readable.
    Wake,
    /// The timeout has passed.
    TimedOut,
}

impl Connection {
    /// Takes a descriptor of `/dev/fuse` that is mounted, new or in service. Reads are made non-blocking.
    ///
    /// # Errors
    /// `EBADF` when the descriptor is not open; others of fcntl(2).
    pub fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(errno)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK).map_err(errno)?;
        Ok(Self { fd: Arc::new(fd), kept: Arc::default() })
    }

    /// Answers INIT. Called once for a new mount, by one thread, before anything else is read.
    ///
    /// # Errors
    /// [`HandshakeError`]; the mount cannot be used then and should be removed.
    pub fn handshake(&self, timeout: Duration) -> Result<Negotiated, HandshakeError> {
        let io = |errno| HandshakeError::Io { errno };
        let mut buffer = vec![0; BUFFER_SIZE];
        let request = self.first_request(&mut buffer, timeout)?;
        let Operation::Init(init) = request.operation else {
            return Err(HandshakeError::NotInit { found: format!("opcode {}", request.header.opcode) });
        };
        // A kernel of a later major version would repeat INIT with ours; there has been none since 2006.
        if init.major != KERNEL_VERSION || init.minor < MIN_MINOR {
            let refused = HandshakeError::Version { major: init.major, minor: init.minor };
            self.reply(request.header.unique, Err(Errno::from_raw(libc::EPROTO))).map_err(io)?;
            return Err(refused);
        }
        let (negotiated, answer) = agree(&init);
        self.reply(request.header.unique, Ok(&[answer.as_bytes()])).map_err(io)?;
        Ok(negotiated)
    }

    /// Reads the first request of a new connection.
    pub(super) fn first_request<'a>(
        &self,
        buffer: &'a mut [u8],
        timeout: Duration,
    ) -> Result<Request<'a>, HandshakeError> {
        let io = |errno| HandshakeError::Io { errno };
        if self.wait(None, timeout).map_err(io)? == Readiness::TimedOut {
            return Err(HandshakeError::Silent { waited: timeout });
        }
        let len = self.read_request(buffer).map_err(io)?.ok_or(HandshakeError::Silent { waited: timeout })?;
        Request::decode(buffer.get(..len).unwrap_or_default())
            .map_err(|error| HandshakeError::NotInit { found: error.to_string() })
    }

    /// Blocks until a request can be read, `wake` is readable or the timeout has passed.
    ///
    /// # Errors
    /// What `poll(2)` reports; `EINTR` is retried with the full time.
    pub fn wait(&self, wake: Option<BorrowedFd<'_>>, timeout: Duration) -> Result<Readiness, Errno> {
        let timeout = Timespec::try_from(timeout).map_err(|_| Errno::INVAL)?;
        let mut fds = vec![PollFd::new(&*self.fd, PollFlags::IN)];
        fds.extend(wake.map(|wake| PollFd::from_borrowed_fd(wake, PollFlags::IN)));
        loop {
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Ok(Readiness::TimedOut),
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(errno(error)),
            }
        }
        let woken = fds.get(1).is_some_and(|wake| !wake.revents().is_empty());
        Ok(if woken { Readiness::Wake } else { Readiness::Request })
    }

    /// From now on every request is kept in `log`, under the number `connection`, until it is answered: for a kernel that does not
    /// [send it again](Self::notify_resend). Holds for all clones; only the first call has an effect.
    pub fn keep_requests(&self, log: Arc<RequestLog>, connection: u64) {
        let _ = self.kept.set((log, connection));
    }

    /// The requests that an earlier process had read and not answered; `None` where they [are not kept](Self::keep_requests). Their
    /// numbers have the mark [`UNIQUE_RESEND`], as if the kernel had sent them again.
    #[must_use]
    pub fn kept_requests(&self) -> Option<Vec<Vec<u8>>> {
        const UNIQUE: std::ops::Range<usize> = 8..16;
        let (log, connection) = self.kept.get()?;
        let marked = log.left(*connection).into_iter().map(|LeftRequest { unique, mut bytes }| {
            if let Some(field) = bytes.get_mut(UNIQUE) {
                field.copy_from_slice(&(unique | UNIQUE_RESEND).to_ne_bytes());
            }
            bytes
        });
        Some(marked.collect())
    }

    /// The request needs no answer, and is done.
    pub fn request_done(&self, unique: u64) {
        if let Some((log, _)) = self.kept.get() {
            log.answered(unique & !UNIQUE_RESEND);
        }
    }

    /// Reads one request into `buffer`, which has at least [`BUFFER_SIZE`] bytes. Does not block; `None` when
    /// there is no request.
    ///
    /// # Errors
    /// `ENODEV` when the mount has ended, by unmounting or by a forced unmount.
    pub fn read_request(&self, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
        loop {
            let kept = self.kept.get();
            let read = kept.and_then(|(log, connection)| log.read(self.fd.as_fd(), *connection, buffer));
            match read.unwrap_or_else(|| rustix::io::read(&self.fd, &mut *buffer)) {
                Ok(len) => return Ok(Some(len)),
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                // ENOENT: the kernel withdrew the request while it was being read, because its caller was killed.
                Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(errno(error)),
            }
        }
    }

    /// Answers the request `unique`: with the concatenated parts (at most three), or with an error.
    ///
    /// Does not block. An errno of 512 or above cannot be sent and becomes `EIO`; an ioctl can return it in
    /// [`IoctlOut::result`](crate::uapi::fuse::IoctlOut::result).
    ///
    /// # Errors
    /// `ENOENT` when no caller waits for this answer: it was sent already, or the mount was aborted.
    /// `ENODEV` or `EPERM` when the mount has ended. `EINVAL` for an answer that the kernel does not
    /// accept; the caller gets `EIO`.
    pub fn reply(&self, unique: u64, answer: Result<&[&[u8]], Errno>) -> Result<(), Errno> {
        // Only a kernel that sends requests again knows the mark.
        let number = if self.kept.get().is_some() { unique & !UNIQUE_RESEND } else { unique };
        let sent = match answer {
            Ok(parts) => self.send(number, 0, parts),
            Err(error) if error.raw() >= FIRST_KERNEL_ERRNO => self.send(number, -Errno::IO.raw(), &[]),
            Err(error) => self.send(number, -error.raw(), &[]),
        };
        // An answer that the kernel refuses ends the request as well.
        self.request_done(unique);
        sent
    }

    /// Removes the entry `name` of the directory `parent` from the kernel's cache.
    ///
    /// Must not be called by the thread that answers LOOKUP: the kernel takes the lock of the directory, which a
    /// look-up in progress may hold.
    ///
    /// # Errors
    /// `ENOENT` when the kernel has not cached the entry, which has the same effect.
    pub fn notify_inval_entry(&self, parent: u64, name: &[u8]) -> Result<(), Errno> {
        let namelen = u32::try_from(name.len()).map_err(|_| Errno::INVAL)?;
        let out = NotifyInvalEntryOut { parent, namelen, flags: 0 };
        self.send(0, notify::INVAL_ENTRY, &[out.as_bytes(), name, &[0]])
    }

    /// Asks the kernel to send every request again that was read and not answered, marked with
    /// [`UNIQUE_RESEND`](crate::uapi::fuse::UNIQUE_RESEND): for the successor of a daemon that died. They come before
    /// requests that were made later; an answer carries the number with the mark.
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.9, which does not support it.
    pub fn notify_resend(&self) -> Result<(), Errno> {
        self.send(0, notify::RESEND, &[])
    }

    fn send(&self, unique: u64, error: i32, parts: &[&[u8]]) -> Result<(), Errno> {
        const PARTS: usize = 3;
        let total = size_of::<OutHeader>() + parts.iter().map(|part| part.len()).sum::<usize>();
        let len = u32::try_from(total).map_err(|_| Errno::TOOBIG)?;
        let header = OutHeader { len, error, unique };
        let mut slices = [IoSlice::new(&[]); PARTS + 1];
        let (first, rest) = slices.split_first_mut().ok_or(Errno::TOOBIG)?;
        *first = IoSlice::new(header.as_bytes());
        if parts.len() > rest.len() {
            return Err(Errno::TOOBIG);
        }
        for (slot, part) in rest.iter_mut().zip(parts) {
            *slot = IoSlice::new(part);
        }
        loop {
            match rustix::io::writev(&self.fd, &slices) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(errno(error)),
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Negotiates with a kernel that sent `init`; returns the result and the answer.
fn agree(init: &InitIn) -> (Negotiated, InitOut) {
    let offered = u64::from(init.flags) | u64::from(init.flags2) << 32;
    let flags = offered & WANTED;
    let [f0, f1, f2, f3, g0, g1, g2, g3] = flags.to_le_bytes();
    let negotiated = Negotiated {
        major: KERNEL_VERSION,
        minor: init.minor.min(KERNEL_MINOR_VERSION),
        flags,
        max_write: MAX_WRITE,
    };
    let answer = InitOut {
        major: negotiated.major,
        minor: negotiated.minor,
        max_readahead: 0,
        flags: u32::from_le_bytes([f0, f1, f2, f3]),
        max_background: MAX_BACKGROUND,
        congestion_threshold: MAX_BACKGROUND,
        max_write: MAX_WRITE,
        time_gran: 1,
        flags2: u32::from_le_bytes([g0, g1, g2, g3]),
        // request_timeout stays 0, since a timeout would abort the whole mount with all devices for one that hangs.
        ..InitOut::default()
    };
    (negotiated, answer)
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::uapi::fuse::{InHeader, opcode};

    /// A connection whose kernel is the other end of a socket.
    fn pair() -> (Connection, UnixStream) {
        let (ours, kernel) = UnixStream::pair().unwrap();
        kernel.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (Connection::new(ours.into()).unwrap(), kernel)
    }

    fn send_init(kernel: &mut UnixStream, major: u32, minor: u32) {
        use std::io::Write;
        let header = InHeader { len: 104, opcode: opcode::INIT, unique: 2, ..InHeader::default() };
        let init = InitIn { major, minor, flags: u32::MAX, flags2: u32::MAX, ..InitIn::default() };
        kernel.write_all(&[header.as_bytes(), init.as_bytes()].concat()).unwrap();
    }

    #[test]
    fn init_requests_resend_and_never_io_uring_or_no_open() {
        let (connection, mut kernel) = pair();
        send_init(&mut kernel, 7, 99);
        let negotiated = connection.handshake(Duration::from_secs(5)).unwrap();
        assert!(negotiated.has_resend());
        assert_eq!(negotiated.flags & (init_flags::OVER_IO_URING | init_flags::NO_OPEN_SUPPORT), 0);
        assert_eq!((negotiated.minor, negotiated.max_write), (45, MAX_WRITE));
        let record = negotiated.to_bytes();
        assert_eq!(Negotiated::from_bytes(&record), Some(negotiated));
        assert_eq!(Negotiated::from_bytes(&record[1..]), None);
        for byte in 0..record.len() {
            let mut wrong = record;
            wrong[byte] ^= 0x80;
            assert_ne!(Negotiated::from_bytes(&wrong), Some(negotiated), "byte {byte}");
        }
        let mut answer = [0; 80];
        kernel.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..16], [80, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        // flags2 is at byte 32 of fuse_init_out: bit 39 is HAS_RESEND.
        assert_eq!(answer[16 + 32], 0x80);
    }

    #[test]
    fn an_unknown_protocol_is_refused_with_an_answer() {
        let (connection, mut kernel) = pair();
        send_init(&mut kernel, 7, 30);
        let error = connection.handshake(Duration::from_secs(5)).unwrap_err();
        assert!(matches!(error, HandshakeError::Version { major: 7, minor: 30 }));
        let mut answer = [0; 16];
        kernel.read_exact(&mut answer).unwrap();
        assert_eq!(i32::from_ne_bytes(answer[4..8].try_into().unwrap()), -libc::EPROTO);
    }

    #[test]
    fn errors_that_the_kernel_would_refuse_become_eio() {
        let (connection, mut kernel) = pair();
        for (error, sent) in [(Errno::BUSY, -16), (Errno::NOTSUPP, -5)] {
            connection.reply(9, Err(error)).unwrap();
            let mut answer = [0; 16];
            kernel.read_exact(&mut answer).unwrap();
            assert_eq!(i32::from_ne_bytes(answer[4..8].try_into().unwrap()), sent);
        }
    }

    #[test]
    fn a_handshake_without_init_times_out() {
        let (connection, _kernel) = pair();
        let error = connection.handshake(Duration::from_millis(10)).unwrap_err();
        assert!(matches!(error, HandshakeError::Silent { .. }));
    }
}
