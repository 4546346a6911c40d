//! Requests of a block device as operations on its file.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::blk::{BlkRequest, FramingError, ID_BYTES, SECTOR, Status, kind};
use vdpa_core::ring::BufferSlice;
use vdpa_core::types::{Perm, Result};
use vdpa_sys::uring::{
    AlignedBuf, Buffers, Direction, File, FileSlot, GuestIoVecs, IoVec, MAX_IOVECS, Op, OwnedBuf, Registrar,
    Wait, transfer_now,
};

use super::file::{Backing, Reads};
use super::pace::Pace;
use vdpa_backend::worker::MemoryView;

use crate::block::{After, Direct, Disk, Moment, Verdict};

/// Bytes of the largest transfer. A driver has no reason to ask for more, and a hostile one could make the daemon
/// allocate bounce buffers of any size.
const TRANSFER_MAX: u64 = 64 << 20;

pub(super) const IO_ERROR: Verdict = Verdict::Done { status: Status::IoErr, written: 0 };
pub(super) const UNSUPPORTED: Verdict = Verdict::Done { status: Status::Unsupp, written: 0 };
pub(super) const OK: Verdict = Verdict::Done { status: Status::Ok, written: 0 };

/// A disk on a file.
pub(super) struct FileDisk {
    pub(super) backing: Backing,
    file: Arc<OwnedFd>,
    /// The file as registered with the ring, if it could be.
    slot: Option<FileSlot>,
    pace: Pace,
    serial: [u8; ID_BYTES],
}

/// Where the bytes of a transfer are.
enum Places {
    /// In one piece of memory that the kernel can use.
    One(IoVec),
    /// In several.
    Many(Vec<IoVec>),
    /// Where they can only be copied.
    Bounce,
}

/// A checked transfer.
#[derive(Clone, Copy)]
pub(super) struct Transfer {
    /// First byte on the disk.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u32,
}

impl FileDisk {
    pub(super) fn new(backing: Backing, serial: [u8; ID_BYTES]) -> Self {
        Self { file: Arc::clone(&backing.file), backing, slot: None, pace: Pace::default(), serial }
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
        sector.checked_add(count).is_some_and(|end| end <= self.backing.sectors)
    }

    /// Bounds of a read or write; `None` for one that must fail.
    fn transfer(&self, sector: u64, bytes: BufferSlice<'_>) -> Option<Transfer> {
        let len = bytes.len();
        if !len.is_multiple_of(SECTOR) || len > TRANSFER_MAX || !self.contains(sector, len / SECTOR) {
            return None;
        }
        Some(Transfer { offset: sector * SECTOR, len: u32::try_from(len).ok()? })
    }

    /// Whether the kernel can use a piece of memory as it is.
    fn fits(&self, piece: &IoVec) -> bool {
        let aligned = |value: usize, to: u32| (value as u64).is_multiple_of(to.into());
        !self.backing.direct
            || aligned(piece.addr, self.backing.memory_align) && aligned(piece.len, self.backing.block_size)
    }

    /// The client's buffers as the kernel can use them.
    fn in_place(&self, bytes: BufferSlice<'_>, perm: Perm, view: &MemoryView) -> Result<Places> {
        if let Some(place) = view.place(bytes, perm) {
            return Ok(if self.fits(&place) { Places::One(place) } else { Places::Bounce });
        }
        let places = view.places(bytes, perm).map_err(|_| Errno::FAULT)?;
        let places =
            places.filter(|places| places.len() <= MAX_IOVECS && places.iter().all(|place| self.fits(place)));
        Ok(places.map_or(Places::Bounce, Places::Many))
    }

    /// Does a transfer at once, if that is the best way now. `alone`: no other request waits.
    fn now(
        &mut self,
        direction: Direction,
        alone: bool,
        places: &Places,
        view: &MemoryView,
        Transfer { offset, len }: Transfer,
    ) -> Option<Result<u32>> {
        let wait = match (direction, self.backing.reads) {
            (Direction::Read, Reads::Now) => Wait::Allowed,
            (Direction::Read, Reads::AloneNow) if alone => Wait::Refused,
            (Direction::Write, _) if self.backing.writes_now => Wait::Allowed,
            _ => return None,
        };
        let pieces = match places {
            Places::One(place) => std::slice::from_ref(place),
            Places::Many(places) => places,
            Places::Bounce => return None,
        };
        let file = &self.file;
        let transfer = || transfer_now(file, direction, wait, pieces, view.memory(), offset);
        let moved = match wait {
            // What is not there, or only in part, is a matter for the kernel's own ways.
            Wait::Refused => transfer().ok().filter(|moved| *moved == len as usize).map(Ok)?,
            Wait::Allowed if self.pace.allows() => self.pace.time(transfer),
            Wait::Allowed => return None,
        };
        Some(moved.and_then(|moved| u32::try_from(moved).map_err(|_| Errno::INVAL)))
    }

    pub(super) fn bounce(&self, len: u32) -> Result<AlignedBuf> {
        let align = usize::try_from(self.backing.memory_align.max(64)).map_err(|_| Errno::INVAL)?;
        AlignedBuf::new(usize::try_from(len).map_err(|_| Errno::INVAL)?, align)
    }

    fn read(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, alone: bool) -> Result<Verdict> {
        let Some(transfer) = self.transfer(request.header.sector, request.data_in) else {
            return Ok(IO_ERROR);
        };
        let Transfer { offset, len } = transfer;
        if len == 0 {
            return Ok(OK);
        }
        if !self.is_whole(transfer) {
            return self.read_around(request, transfer);
        }
        let file = self.file();
        let after = After::Transfer { len, written: len, sync: false };
        let places = self.in_place(request.data_in, Perm::WO, view)?;
        if let Some(moved) = self.now(Direction::Read, alone, &places, view, transfer) {
            return Ok(self.transferred(moved, len, len, false));
        }
        let op = match places {
            Places::One(place) => match view.fixed(place) {
                Some(to) => Op::ReadFixed { file, to, offset },
                None => Op::Read { file, buffers: guest(vec![place], view)?, offset },
            },
            Places::Many(places) => Op::Read { file, buffers: guest(places, view)?, offset },
            Places::Bounce => {
                let buffers = Buffers::Owned(OwnedBuf::Aligned(self.bounce(len)?));
                let after = After::CopyOut { to: request.data_in.iter().collect(), skip: 0, len };
                return Ok(Verdict::Io { op: Op::Read { file, buffers, offset }, after });
            }
        };
        Ok(Verdict::Io { op, after })
    }

    fn write(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, sync: bool) -> Result<Verdict> {
        let Some(transfer) = self.transfer(request.header.sector, request.data_out) else {
            return Ok(IO_ERROR);
        };
        let Transfer { offset, len } = transfer;
        if self.backing.read_only {
            return Ok(IO_ERROR);
        }
        if len == 0 {
            return Ok(OK);
        }
        if !self.is_whole(transfer) {
            return self.write_around(request, transfer, view, sync);
        }
        let file = self.file();
        let places = self.in_place(request.data_out, Perm::RO, view)?;
        if let Some(moved) = self.now(Direction::Write, false, &places, view, transfer) {
            return Ok(self.transferred(moved, len, 0, sync));
        }
        let after = After::Transfer { len, written: 0, sync };
        let op = match places {
            Places::One(place) => match view.fixed(place) {
                Some(from) => Op::WriteFixed { file, from, offset },
                None => Op::Write { file, buffers: guest(vec![place], view)?, offset },
            },
            Places::Many(places) => Op::Write { file, buffers: guest(places, view)?, offset },
            Places::Bounce => {
                let mut buffer = self.bounce(len)?;
                request.data_out.read(view.snapshot(), &mut buffer).map_err(|_| Errno::FAULT)?;
                let buffers = Buffers::Owned(OwnedBuf::Aligned(buffer));
                let after = After::CopiedIn { len, sync };
                return Ok(self.changes(transfer, Op::Write { file, buffers, offset }, after));
            }
        };
        Ok(self.changes(transfer, op, after))
    }

    /// Goes on after a read or a write of `len` bytes.
    fn transferred(&self, result: Result<u32>, len: u32, written: u32, sync: bool) -> Verdict {
        match result {
            Ok(moved) if moved == len => match self.stable(sync) {
                Verdict::Done { status, .. } => Verdict::Done { status, written },
                sync => sync,
            },
            _ => IO_ERROR,
        }
    }

    /// Ends a request that has changed the disk: at once, or after a flush when the driver relies on it.
    pub(super) fn stable(&self, sync: bool) -> Verdict {
        if !sync {
            return OK;
        }
        Verdict::Io {
            op: Op::Fsync { file: self.file(), data_only: true },
            after: After::Success { sync: false },
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
            // Slower, and nothing else.
            Err(error) => tracing::debug!("a disk's file is not registered: {error}"),
        }
    }

    fn abandon(&mut self) {
        if let Some(slot) = self.slot.take() {
            slot.retire();
        }
    }

    #[inline]
    fn direct(&self, request: &BlkRequest<'_>, view: &MemoryView, moment: Moment) -> Option<Direct> {
        let now = match self.backing.reads {
            Reads::Queued => false,
            Reads::AloneNow => moment.alone,
            Reads::Now => true,
        };
        if now || request.header.kind != kind::IN {
            return None;
        }
        let file = self.slot.as_ref()?.number();
        let transfer = self.transfer(request.header.sector, request.data_in)?;
        if !self.is_whole(transfer) {
            return None;
        }
        let place = view.place(request.data_in, Perm::WO).filter(|place| self.fits(place))?;
        Some(Direct { file, to: view.fixed(place)?, offset: transfer.offset })
    }

    fn begin(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, moment: Moment) -> Verdict {
        let Moment { write_back, alone } = moment;
        let verdict = match request.header.kind {
            kind::IN => self.read(request, view, alone),
            kind::OUT => self.write(request, view, !write_back),
            kind::FLUSH => Ok(self.stable(true)),
            kind::GET_ID => get_id(&self.serial, request, view),
            kind::DISCARD => self.discard(request, view),
            kind::WRITE_ZEROES => self.write_zeroes(request, view, !write_back),
            _ => Ok(UNSUPPORTED),
        };
        // Buffers the device cannot reach are the driver's mistake, and an answer is better than silence.
        verdict.unwrap_or(IO_ERROR)
    }

    fn misshapen(&mut self, error: &FramingError) -> Verdict {
        misshapen(error)
    }

    fn proceed(
        &mut self,
        after: After,
        result: Result<u32>,
        buffer: Option<OwnedBuf>,
        view: &Arc<MemoryView>,
    ) -> Verdict {
        match (after, result) {
            (After::Transfer { len, written, sync }, result) => self.transferred(result, len, written, sync),
            (After::CopiedIn { len, sync }, result) => self.transferred(result, len, 0, sync),
            (After::CopyOut { to, skip, len }, Ok(moved)) => {
                let bytes = buffer.as_deref().filter(|bytes| bytes.len() == moved as usize);
                let skip = skip as usize;
                let asked = bytes.and_then(|bytes| bytes.get(skip..skip + len as usize));
                match asked.map(|bytes| BufferSlice::new(&to).write(view.snapshot(), bytes)) {
                    Some(Ok(true)) => Verdict::Done { status: Status::Ok, written: len },
                    _ => IO_ERROR,
                }
            }
            (After::Patch(patch), Ok(moved)) => {
                let block = buffer.as_deref().filter(|block| block.len() == moved as usize);
                block.and_then(|block| self.complete(*patch, block)).unwrap_or(IO_ERROR)
            }
            (After::Success { sync }, Ok(_)) => self.stable(sync),
            (After::Hint, Ok(_) | Err(Errno::OPNOTSUPP)) => OK,
            (After::Zero(zero), result) => self.zeroed(*zero, result),
            _ => IO_ERROR,
        }
    }
}

/// Answers GET_ID, with as much of the id as the driver has room for.
pub(super) fn get_id(
    serial: &[u8; ID_BYTES],
    request: &BlkRequest<'_>,
    view: &MemoryView,
) -> Result<Verdict> {
    let len = request.data_in.len().min(ID_BYTES as u64);
    let id = serial.get(..usize::try_from(len).map_err(|_| Errno::INVAL)?).ok_or(Errno::INVAL)?;
    request.data_in.write(view.snapshot(), id).map_err(|_| Errno::FAULT)?;
    Ok(Verdict::Done { status: Status::Ok, written: u32::try_from(len).unwrap_or(0) })
}

/// A chain that is no request: one whose header is out of reach may be tried again.
pub(super) const fn misshapen(error: &FramingError) -> Verdict {
    match error {
        FramingError::Fault(_) => Verdict::Unreachable,
        _ => Verdict::Misshapen { notify: true },
    }
}

fn guest(places: Vec<IoVec>, view: &MemoryView) -> Result<Buffers> {
    GuestIoVecs::new(places, Arc::clone(view.memory())).map(Buffers::Guest)
}
