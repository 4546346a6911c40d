//! The requests of a ring.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::squeue::{Entry, Flags};
use io_uring::{opcode, types};
use vdpa_core::Errno;

use super::{Buffers, IoVec, OwnedBuf};

/// A file of a request.
#[derive(Clone, Debug)]
pub enum File {
    /// By descriptor, which the request owns until it completes.
    Fd(Arc<OwnedFd>),
    /// As [`Fd`](Self::Fd), on a file system that may block even in non-blocking requests. Every request goes to a kernel
    /// thread (`IOSQE_ASYNC`), so that the submitting thread never blocks.
    Blocking(Arc<OwnedFd>),
    /// A registered file, by slot; an empty slot gives `EBADF`.
    Registered(u32),
}

/// A part of a registered buffer. The request owns nothing for it: the pages are pinned, and the kernel keeps a registered
/// buffer while requests use it, even if its slot is emptied or its mapping is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedIoVec {
    /// Slot of the registered buffer.
    pub slot: u16,
    /// The bytes, by the address the buffer was registered with. The kernel reports `EFAULT` for bytes outside
    /// the buffer. It uses the pinned pages and not the address space.
    pub iovec: IoVec,
}

/// One request.
#[derive(Debug)]
pub enum Op {
    /// Reads into `buffers` from byte `offset` of the file. The result is the number of bytes.
    Read {
        /// File.
        file: File,
        /// Destination.
        buffers: Buffers,
        /// Byte position.
        offset: u64,
    },
    /// Writes `buffers` at byte `offset` of the file. The result is the number of bytes.
    Write {
        /// File.
        file: File,
        /// Source.
        buffers: Buffers,
        /// Byte position.
        offset: u64,
    },
    /// [`Op::Read`] into pinned memory.
    ReadFixed {
        /// File.
        file: File,
        /// Destination.
        to: FixedIoVec,
        /// Byte position.
        offset: u64,
    },
    /// [`Op::Write`] from pinned memory.
    WriteFixed {
        /// File.
        file: File,
        /// Source.
        from: FixedIoVec,
        /// Byte position.
        offset: u64,
    },
    /// `fsync(2)`, or `fdatasync(2)` when `data_only`.
    Fsync {
        /// File.
        file: File,
        /// Whether to omit metadata that is not needed to read the data.
        data_only: bool,
    },
    /// `fallocate(2)`: discard and write zeroes.
    Fallocate {
        /// File.
        file: File,
        /// `FALLOC_FL_*`.
        mode: i32,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Completes each time the file becomes readable, until it is cancelled; the result has the `POLL*` events.
    ///
    /// Edge-triggered: an eventfd that is never read gives one completion per signal (signals between two
    /// reaps may be merged into one), and one at once if it has been signalled before. While
    /// [`Completion::more`](super::Completion::more) is true the poll continues; when it is false the request
    /// must be submitted again.
    PollMultishot {
        /// What to poll.
        fd: Arc<OwnedFd>,
    },
    /// Completes once, when the file is readable or, with `writable`, can be written to; the result has the `POLL*` events.
    PollOnce {
        /// What to poll.
        fd: Arc<OwnedFd>,
        /// Wait until it can be written to.
        writable: bool,
    },
}

/// The resources that a request needs until its completion.
#[derive(Debug)]
pub(super) enum Resources {
    /// Nothing: the pages are pinned and the file is registered.
    Nothing,
    /// Guest memory or files.
    Other {
        /// Owned only to be dropped after the completion.
        _keep: (Option<Buffers>, Option<File>),
    },
    /// A buffer that is returned to the caller.
    Owned {
        /// The buffer.
        buffer: OwnedBuf,
        /// The file of the request.
        _file: File,
    },
}

impl Resources {
    /// The resources of a request on `file` that owns no memory.
    fn file(file: File) -> Self {
        match file {
            File::Registered(_) => Self::Nothing,
            File::Fd(_) | File::Blocking(_) => Self::Other { _keep: (None, Some(file)) },
        }
    }

    /// The buffer to return to the caller, if there is one.
    pub(super) fn into_buffer(self) -> Option<OwnedBuf> {
        match self {
            Self::Owned { buffer, .. } => Some(buffer),
            Self::Nothing | Self::Other { .. } => None,
        }
    }
}

macro_rules! with_file {
    ($file:expr, |$fd:ident| $entry:expr) => {
        match $file {
            File::Fd(fd) => {
                let $fd = types::Fd(fd.as_raw_fd());
                $entry
            }
            File::Blocking(fd) => {
                let $fd = types::Fd(fd.as_raw_fd());
                $entry.flags(Flags::ASYNC)
            }
            File::Registered(slot) => {
                let $fd = types::Fixed(*slot);
                $entry
            }
        }
    };
}

impl Op {
    /// Creates the submission queue entry, and the resources that must exist until its completion.
    ///
    /// All addresses in the entry point into memory owned by the returned `Resources`, on the heap or mapped, so moving
    /// the `Resources` leaves them valid.
    ///
    /// # Errors
    /// `EINVAL` for a length beyond 2^32.
    pub(super) fn prepare(self) -> Result<(Entry, Resources), Errno> {
        match self {
            Self::Read { file, buffers, offset } => transfer(file, buffers, offset, false),
            Self::Write { file, buffers, offset } => transfer(file, buffers, offset, true),
            Self::ReadFixed { file, to, offset } => {
                let (at, len) = fixed(&to)?;
                let entry = with_file!(&file, |fd| opcode::ReadFixed::new(fd, at, len, to.slot)
                    .offset(offset)
                    .build());
                Ok((entry, Resources::file(file)))
            }
            Self::WriteFixed { file, from, offset } => {
                let (at, len) = fixed(&from)?;
                let entry = with_file!(&file, |fd| opcode::WriteFixed::new(fd, at, len, from.slot)
                    .offset(offset)
                    .build());
                Ok((entry, Resources::file(file)))
            }
            Self::Fsync { file, data_only } => {
                let flags = if data_only { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
                let entry = with_file!(&file, |fd| opcode::Fsync::new(fd).flags(flags).build());
                Ok((entry, Resources::file(file)))
            }
            Self::Fallocate { file, mode, offset, len } => {
                let entry =
                    with_file!(&file, |fd| opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build());
                Ok((entry, Resources::file(file)))
            }
            Self::PollMultishot { fd } => {
                const IN: u32 = 1;
                const _: () = assert!(libc::POLLIN == 1);
                let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), IN).multi(true).build();
                Ok((entry, Resources::Other { _keep: (None, Some(File::Fd(fd))) }))
            }
            Self::PollOnce { fd, writable } => {
                const EVENTS: [u32; 2] = [1, 4];
                const _: () = assert!(libc::POLLIN == 1 && libc::POLLOUT == 4);
                let events = if writable { EVENTS[1] } else { EVENTS[0] };
                let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events).build();
                Ok((entry, Resources::Other { _keep: (None, Some(File::Fd(fd))) }))
            }
        }
    }
}

fn transfer(file: File, buffers: Buffers, offset: u64, write: bool) -> Result<(Entry, Resources), Errno> {
    match buffers {
        Buffers::Guest(guest) => {
            if let [iovec] = *guest.iovecs {
                // A list of one range costs the kernel an additional copy.
                let entry = plain(&file, iovec, offset, write)?;
                return Ok((entry, Resources::Other { _keep: (Some(Buffers::Guest(guest)), Some(file)) }));
            }
            let count = u32::try_from(guest.iovecs.len()).map_err(|_| Errno::INVAL)?;
            let iov = guest.iovecs.as_ptr().cast::<libc::iovec>();
            let entry = with_file!(&file, |fd| if write {
                opcode::Writev::new(fd, iov, count).offset(offset).build()
            } else {
                opcode::Readv::new(fd, iov, count).offset(offset).build()
            });
            Ok((entry, Resources::Other { _keep: (Some(Buffers::Guest(guest)), Some(file)) }))
        }
        Buffers::Owned(mut buffer) => {
            let entry = plain(&file, buffer.iovec(), offset, write)?;
            Ok((entry, Resources::Owned { buffer, _file: file }))
        }
    }
}

/// A transfer of one range that is not registered.
fn plain(file: &File, iovec: IoVec, offset: u64, write: bool) -> Result<Entry, Errno> {
    let len = u32::try_from(iovec.len).map_err(|_| Errno::INVAL)?;
    let at = std::ptr::with_exposed_provenance_mut(iovec.addr);
    Ok(with_file!(file, |fd| if write {
        opcode::Write::new(fd, at, len).offset(offset).build()
    } else {
        opcode::Read::new(fd, at, len).offset(offset).build()
    }))
}

fn fixed(fixed: &FixedIoVec) -> Result<(*mut u8, u32), Errno> {
    let len = u32::try_from(fixed.iovec.len).map_err(|_| Errno::INVAL)?;
    Ok((std::ptr::with_exposed_provenance_mut(fixed.iovec.addr), len))
}
