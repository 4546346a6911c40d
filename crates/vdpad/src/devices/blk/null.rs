//! A disk that is none, to measure everything but a disk.

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::blk::{BlkRequest, FramingError, ID_BYTES, SECTOR, Status, kind};
use vdpa_core::types::Result;
use vdpa_sys::uring::OwnedBuf;

use super::disk::{get_id, misshapen};
use vdpa_backend::worker::MemoryView;

use crate::block::{After, Disk, Moment, Verdict};

/// Answers every request that a disk of this size could carry out, and carries out none: reads leave the driver's
/// buffers as they are, writes are forgotten.
pub(super) struct NullDisk {
    sectors: u64,
    serial: [u8; ID_BYTES],
}

impl NullDisk {
    /// `sectors` of 512 bytes.
    pub(super) const fn new(sectors: u64, serial: [u8; ID_BYTES]) -> Self {
        Self { sectors, serial }
    }

    fn transfer(&self, sector: u64, len: u64, read: bool) -> Verdict {
        let end = sector.checked_add(len / SECTOR);
        let fits = len.is_multiple_of(SECTOR) && end.is_some_and(|end| end <= self.sectors);
        match u32::try_from(len) {
            Ok(len) if fits => Verdict::Done { status: Status::Ok, written: if read { len } else { 0 } },
            _ => Verdict::Done { status: Status::IoErr, written: 0 },
        }
    }
}

impl Disk for NullDisk {
    fn begin(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, _moment: Moment) -> Verdict {
        let done = |status| Verdict::Done { status, written: 0 };
        match request.header.kind {
            kind::IN => self.transfer(request.header.sector, request.data_in.len(), true),
            kind::OUT => self.transfer(request.header.sector, request.data_out.len(), false),
            kind::FLUSH | kind::DISCARD | kind::WRITE_ZEROES => done(Status::Ok),
            kind::GET_ID => get_id(&self.serial, request, view).unwrap_or(done(Status::IoErr)),
            _ => done(Status::Unsupp),
        }
    }

    fn misshapen(&mut self, error: &FramingError) -> Verdict {
        misshapen(error)
    }

    fn proceed(
        &mut self,
        _: After,
        _: Result<u32, Errno>,
        _: Option<OwnedBuf>,
        _: &Arc<MemoryView>,
    ) -> Verdict {
        Verdict::Done { status: Status::IoErr, written: 0 }
    }
}
