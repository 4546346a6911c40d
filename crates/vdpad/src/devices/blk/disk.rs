//! [`FileDisk`]: a disk on a file or a block device.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::fstat;
use vdpa_core::Errno;
use vdpa_core::blk::{BlkRequest, FramingError, ID_BYTES, SECTOR, Status, kind};
use vdpa_core::ring::BufferSlice;
use vdpa_core::types::{Perm, Result};
use vdpa_sys::uring::{
    AlignedBuf, Buffers, Direction, File, FileSlot, GuestIoVecs, IoVec, MAX_IOVECS, Op, OwnedBuf, Registrar,
    Wait, transfer_now,
};

use super::backoff::Backoff;
use super::file::{Backing, ReadMode};
use vdpa_backend::worker::MemoryView;

use crate::block::{Continuation, Disk, FixedRead, RequestContext, Step};

/// Bytes of the largest transfer. No driver needs more, and without a limit a hostile one could make the daemon allocate
/// bounce buffers of any size.
const TRANSFER_MAX: u64 = 64 << 20;

pub(super) const IO_ERROR: Step = Step::Complete { status: Status::IoErr, written: 0 };
pub(super) const UNSUPPORTED: Step = Step::Complete { status: Status::Unsupp, written: 0 };
pub(super) const OK: Step = Step::Complete { status: Status::Ok, written: 0 };

/// A disk on a file or a block device.
pub(super) struct FileDisk {
    pub(super) backing: Backing,
    file: Arc<OwnedFd>,
    /// The file's slot in the io_uring of the worker; `None` if it could not be registered.
    slot: Option<FileSlot>,
    backoff: Backoff,
    serial: [u8; ID_BYTES],
    /// The end of the file in this pass over the rings, in bytes, once a write has asked for it.
    end: Option<u64>,
    /// The log says that the file is too short.
    short: bool,
}

/// Client memory that a transfer uses.
enum DataMemory {
    /// One piece that the kernel can access.
    Single(IoVec),
    /// Several of them.
    Vectored(Vec<IoVec>),
    /// Memory that can only be copied, through a bounce buffer.
    Bounce,
}

/// The part of the disk that a request is about, checked against the size of the disk.
#[derive(Clone, Copy)]
pub(super) struct Transfer {
    /// First byte on the disk.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u32,
}

impl FileDisk {
    pub(super) fn new(backing: Backing, serial: [u8; ID_BYTES]) -> Self {
        let (file, backoff) = (Arc::clone(&backing.file), Backoff::default());
        Self { file, backing, slot: None, backoff, serial, end: None, short: false }
    }

    pub(super) fn file(&self) -> File {
        match &self.slot {
            Some(slot) => slot.file(),
            None if self.backing.may_block => File::Blocking(Arc::clone(&self.file)),
            None => File::Fd(Arc::clone(&self.file)),
        }
    }

    /// Whether sectors `[sector, sector + count)` exist.
    pub(super) fn contains(&self, sector: u64, count: u64) -> bool {
        sector.checked_add(count).is_some_and(|end| end <= self.backing.capacity.sectors())
    }

    /// Whether the file reaches as far as the disk does, up to the byte before `end`. One that was truncated must not grow again by a
    /// write: nobody would know that its data is gone. Asked once in a pass over the rings. A file system that may block is not
    /// asked.
    pub(super) fn reaches(&mut self, end: u64) -> bool {
        if self.backing.is_block || self.backing.may_block {
            return true;
        }
        let file = &self.file;
        let size = || fstat(file).map_or(u64::MAX, |stat| u64::try_from(stat.st_size).unwrap_or(0));
        let reaches = end <= *self.end.get_or_insert_with(size);
        if !reaches && !std::mem::replace(&mut self.short, true) {
            let (bytes, disk) = (self.end, self.backing.capacity.sectors() * SECTOR);
            tracing::error!(bytes, disk, "the file of a disk was truncated: what is behind its end fails");
        }
        self.short &= !reaches;
        reaches
    }

    /// The part of the disk that a read or write is about; `None` if the request must fail.
    fn transfer(&self, sector: u64, bytes: BufferSlice<'_>) -> Option<Transfer> {
        let len = bytes.len();
        if !len.is_multiple_of(SECTOR) || len > TRANSFER_MAX || !self.contains(sector, len / SECTOR) {
            return None;
        }
        Some(Transfer { offset: sector * SECTOR, len: u32::try_from(len).ok()? })
    }

    /// Whether a piece of memory is aligned as O_DIRECT requires.
    fn is_usable(&self, piece: &IoVec) -> bool {
        let aligned = |value: usize, to: u32| (value as u64).is_multiple_of(to.into());
        !self.backing.direct
            || aligned(piece.addr, self.backing.memory_align) && aligned(piece.len, self.backing.block_size)
    }

    /// How the kernel can access the client's buffers.
    fn data_memory(&self, bytes: BufferSlice<'_>, perm: Perm, view: &MemoryView) -> Result<DataMemory> {
        if let Some(piece) = view.piece(bytes, perm) {
            return Ok(if self.is_usable(&piece) { DataMemory::Single(piece) } else { DataMemory::Bounce });
        }
        let pieces = view.pieces(bytes, perm).map_err(|_| Errno::FAULT)?;
        let pieces = pieces
            .filter(|pieces| pieces.len() <= MAX_IOVECS && pieces.iter().all(|piece| self.is_usable(piece)));
        Ok(pieces.map_or(DataMemory::Bounce, DataMemory::Vectored))
    }

    /// Does a transfer on this thread, without io_uring, where that is faster; `None` where it is not. `alone`: no other request
    /// is waiting.
    fn transfer_inline(
        &mut self,
        direction: Direction,
        alone: bool,
        memory: &DataMemory,
        view: &MemoryView,
        Transfer { offset, len }: Transfer,
    ) -> Option<Result<u32>> {
        let wait = match (direction, self.backing.reads) {
            (Direction::Read, ReadMode::Inline) => Wait::Allowed,
            (Direction::Read, ReadMode::InlineIfOnly) if alone => Wait::Refused,
            (Direction::Write, _) if self.backing.inline_writes => Wait::Allowed,
            _ => return None,
        };
        let pieces = match memory {
            DataMemory::Single(piece) => std::slice::from_ref(piece),
            DataMemory::Vectored(pieces) => pieces,
            DataMemory::Bounce => return None,
        };
        let file = &self.file;
        let transfer = || transfer_now(file, direction, wait, pieces, view.memory(), offset);
        let moved = match wait {
            // Data that is not in the page cache, or only in part, is read by io_uring.
            Wait::Refused => transfer().ok().filter(|moved| *moved == len as usize).map(Ok)?,
            Wait::Allowed if self.backoff.is_over() => self.backoff.measure(transfer),
            Wait::Allowed => return None,
        };
        Some(moved.and_then(|moved| u32::try_from(moved).map_err(|_| Errno::INVAL)))
    }

    pub(super) fn bounce_buffer(&self, len: u32) -> Result<AlignedBuf> {
        let align = usize::try_from(self.backing.memory_align.max(64)).map_err(|_| Errno::INVAL)?;
        AlignedBuf::new(usize::try_from(len).map_err(|_| Errno::INVAL)?, align)
    }

    fn read(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, alone: bool) -> Result<Step> {
        let Some(transfer) = self.transfer(request.header.sector, request.data_in) else {
            return Ok(IO_ERROR);
        };
        let Transfer { offset, len } = transfer;
        if len == 0 {
            return Ok(OK);
        }
        if !self.is_aligned(transfer) {
            return self.read_unaligned(request, transfer);
        }
        let file = self.file();
        let then = Continuation::Transfer { len, written: len, sync: false };
        let memory = self.data_memory(request.data_in, Perm::WO, view)?;
        if let Some(moved) = self.transfer_inline(Direction::Read, alone, &memory, view, transfer) {
            return Ok(self.transferred(moved, len, len, false));
        }
        let op = match memory {
            DataMemory::Single(piece) => match view.fixed(piece) {
                Some(to) => Op::ReadFixed { file, to, offset },
                None => Op::Read { file, buffers: guest(vec![piece], view)?, offset },
            },
            DataMemory::Vectored(pieces) => Op::Read { file, buffers: guest(pieces, view)?, offset },
            DataMemory::Bounce => {
                let buffers = Buffers::Owned(OwnedBuf::Aligned(self.bounce_buffer(len)?));
                let then = Continuation::BounceRead { to: request.data_in.iter().collect(), skip: 0, len };
                return Ok(Step::Submit { op: Op::Read { file, buffers, offset }, then });
            }
        };
        Ok(Step::Submit { op, then })
    }

    fn write(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, sync: bool) -> Result<Step> {
        let Some(transfer) = self.transfer(request.header.sector, request.data_out) else {
            return Ok(IO_ERROR);
        };
        let Transfer { offset, len } = transfer;
        if self.backing.read_only || !self.reaches(offset + u64::from(len)) {
            return Ok(IO_ERROR);
        }
        if len == 0 {
            return Ok(OK);
        }
        if !self.is_aligned(transfer) {
            return self.write_unaligned(request, transfer, view, sync);
        }
        let file = self.file();
        let memory = self.data_memory(request.data_out, Perm::RO, view)?;
        if let Some(moved) = self.transfer_inline(Direction::Write, false, &memory, view, transfer) {
            return Ok(self.transferred(moved, len, 0, sync));
        }
        let then = Continuation::Transfer { len, written: 0, sync };
        let op = match memory {
            DataMemory::Single(piece) => match view.fixed(piece) {
                Some(from) => Op::WriteFixed { file, from, offset },
                None => Op::Write { file, buffers: guest(vec![piece], view)?, offset },
            },
            DataMemory::Vectored(pieces) => Op::Write { file, buffers: guest(pieces, view)?, offset },
            DataMemory::Bounce => {
                let mut buffer = self.bounce_buffer(len)?;
                request.data_out.read(view.snapshot(), &mut buffer).map_err(|_| Errno::FAULT)?;
                let buffers = Buffers::Owned(OwnedBuf::Aligned(buffer));
                let then = Continuation::BounceWrite { len, sync };
                return Ok(self.submit_write(transfer, Op::Write { file, buffers, offset }, then));
            }
        };
        Ok(self.submit_write(transfer, op, then))
    }

    /// Continues after a read or a write that was to move `len` bytes.
    fn transferred(&self, result: Result<u32>, len: u32, written: u32, sync: bool) -> Step {
        match result {
            Ok(moved) if moved == len => match self.flush_if(sync) {
                Step::Complete { status, .. } => Step::Complete { status, written },
                sync => sync,
            },
            _ => IO_ERROR,
        }
    }

    /// Completes a request that has changed the disk: after a flush if `sync`, which write-through needs, else at once.
    pub(super) fn flush_if(&self, sync: bool) -> Step {
        if !sync {
            return OK;
        }
        Step::Submit {
            op: Op::Fsync { file: self.file(), data_only: true },
            then: Continuation::Check { sync: false },
        }
    }
}

impl Disk for FileDisk {
    fn register(&mut self, registrar: &Registrar) {
        if self.backing.may_block {
            return;
        }
        match registrar.add_file(&self.file) {
            Ok(slot) => self.slot = Some(slot),
            // Operations on it are slower, but work.
            Err(error) => tracing::debug!("a disk's file is not registered: {error}"),
        }
    }

    fn begin_pass(&mut self) {
        self.end = None;
    }

    fn hand_over(&mut self) {
        self.backing.unlock();
    }

    fn take_over(&mut self) -> Result<()> {
        self.backing.lock()
    }

    fn abandon(&mut self) {
        if let Some(slot) = self.slot.take() {
            slot.retire();
        }
    }

    #[inline]
    fn fixed_read(
        &self,
        request: &BlkRequest<'_>,
        view: &MemoryView,
        context: RequestContext,
    ) -> Option<FixedRead> {
        let inline = match self.backing.reads {
            ReadMode::Queued => false,
            ReadMode::InlineIfOnly => context.alone,
            ReadMode::Inline => true,
        };
        if inline || request.header.kind != kind::IN {
            return None;
        }
        let file = self.slot.as_ref()?.number();
        let transfer = self.transfer(request.header.sector, request.data_in)?;
        if !self.is_aligned(transfer) {
            return None;
        }
        let piece = view.piece(request.data_in, Perm::WO).filter(|piece| self.is_usable(piece))?;
        Some(FixedRead { file, to: view.fixed(piece)?, offset: transfer.offset })
    }

    fn start(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, context: RequestContext) -> Step {
        let RequestContext { write_back, alone } = context;
        let step = match request.header.kind {
            kind::IN => self.read(request, view, alone),
            kind::OUT => self.write(request, view, !write_back),
            kind::FLUSH => Ok(self.flush_if(true)),
            kind::GET_ID => get_id(&self.serial, request, view),
            kind::DISCARD => self.discard(request, view),
            kind::WRITE_ZEROES => self.write_zeroes(request, view, !write_back),
            _ => Ok(UNSUPPORTED),
        };
        // Unmapped data buffers are an error of the driver. It gets an answer, rather than none.
        step.unwrap_or(IO_ERROR)
    }

    fn malformed(&mut self, error: &FramingError) -> Step {
        malformed(error)
    }

    fn io_completed(
        &mut self,
        then: Continuation,
        result: Result<u32>,
        buffer: Option<OwnedBuf>,
        view: &Arc<MemoryView>,
    ) -> Step {
        match (then, result) {
            (Continuation::Transfer { len, written, sync }, result) => {
                self.transferred(result, len, written, sync)
            }
            (Continuation::BounceWrite { len, sync }, result) => self.transferred(result, len, 0, sync),
            (Continuation::BounceRead { to, skip, len }, Ok(moved)) => {
                let bytes = buffer.as_deref().filter(|bytes| bytes.len() == moved as usize);
                let skip = skip as usize;
                let requested = bytes.and_then(|bytes| bytes.get(skip..skip + len as usize));
                match requested.map(|bytes| BufferSlice::new(&to).write(view.snapshot(), bytes)) {
                    Some(Ok(true)) => Step::Complete { status: Status::Ok, written: len },
                    _ => IO_ERROR,
                }
            }
            (Continuation::ReadModifyWrite(io), Ok(moved)) => {
                let block = buffer.as_deref().filter(|block| block.len() == moved as usize);
                block.and_then(|block| self.merge(*io, block)).unwrap_or(IO_ERROR)
            }
            (Continuation::Check { sync }, Ok(_)) => self.flush_if(sync),
            // It is a hint, which storage need not take; only broken storage is an error.
            (Continuation::Discard, Err(Errno::IO)) => IO_ERROR,
            (Continuation::Discard, _) => OK,
            (Continuation::Zero(zero), result) => self.zeroed(*zero, result),
            _ => IO_ERROR,
        }
    }
}

/// Answers GET_ID. The id is cut to the length of the driver's buffers.
pub(super) fn get_id(serial: &[u8; ID_BYTES], request: &BlkRequest<'_>, view: &MemoryView) -> Result<Step> {
    let len = request.data_in.len().min(ID_BYTES as u64);
    let id = serial.get(..usize::try_from(len).map_err(|_| Errno::INVAL)?).ok_or(Errno::INVAL)?;
    request.data_in.write(view.snapshot(), id).map_err(|_| Errno::FAULT)?;
    Ok(Step::Complete { status: Status::Ok, written: u32::try_from(len).unwrap_or(0) })
}

/// What to do with a chain that is not a request: one whose header is not mapped is put back, since it may be mapped later.
pub(super) const fn malformed(error: &FramingError) -> Step {
    match error {
        FramingError::Fault(_) => Step::Unreachable,
        _ => Step::Malformed { notify: true },
    }
}

fn guest(pieces: Vec<IoVec>, view: &MemoryView) -> Result<Buffers> {
    GuestIoVecs::new(pieces, Arc::clone(view.memory())).map(Buffers::Guest)
}
