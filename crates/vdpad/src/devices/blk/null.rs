//! [`NullDisk`]: a disk without storage, to measure everything except storage.

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::blk::{BlkRequest, FramingError, ID_BYTES, SECTOR, Status, kind};
use vdpa_core::types::Result;
use vdpa_sys::uring::OwnedBuf;

use super::disk::{get_id, malformed};
use vdpa_backend::worker::MemoryView;

use crate::block::{Continuation, Disk, RequestContext, Step};

/// Answers every request as a disk of this size would, without moving data: reads leave the driver's buffers as they are,
/// and writes are dropped.
pub(super) struct NullDisk {
    sectors: u64,
    serial: [u8; ID_BYTES],
}

impl NullDisk {
    /// `sectors` of 512 bytes.
    pub(super) const fn new(sectors: u64, serial: [u8; ID_BYTES]) -> Self {
        Self { sectors, serial }
    }

    fn transfer(&self, sector: u64, len: u64, read: bool) -> Step {
        let end = sector.checked_add(len / SECTOR);
        let fits = len.is_multiple_of(SECTOR) && end.is_some_and(|end| end <= self.sectors);
        match u32::try_from(len) {
            Ok(len) if fits => Step::Complete { status: Status::Ok, written: if read { len } else { 0 } },
            _ => Step::Complete { status: Status::IoErr, written: 0 },
        }
    }
}

impl Disk for NullDisk {
    fn start(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, _context: RequestContext) -> Step {
        let done = |status| Step::Complete { status, written: 0 };
        match request.header.kind {
            kind::IN => self.transfer(request.header.sector, request.data_in.len(), true),
            kind::OUT => self.transfer(request.header.sector, request.data_out.len(), false),
            kind::FLUSH | kind::DISCARD | kind::WRITE_ZEROES => done(Status::Ok),
            kind::GET_ID => get_id(&self.serial, request, view).unwrap_or(done(Status::IoErr)),
            _ => done(Status::Unsupp),
        }
    }

    fn malformed(&mut self, error: &FramingError) -> Step {
        malformed(error)
    }

    fn io_completed(
        &mut self,
        _: Continuation,
        _: Result<u32, Errno>,
        _: Option<OwnedBuf>,
        _: &Arc<MemoryView>,
    ) -> Step {
        Step::Complete { status: Status::IoErr, written: 0 }
    }
}
