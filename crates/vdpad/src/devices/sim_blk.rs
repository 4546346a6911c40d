//! `sim-blk`: a model of the kernel's block simulator (`vdpa_sim_blk`), with its constants and its quirks. The disk is a memory
//! file, which the holder keeps for the next daemon.

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::blk::{BlkConfig, BlkRequest, FramingError, SECTOR, Segment, Status, kind};
use vdpa_core::features::Features;
use vdpa_core::parent::{Profile, QueueStats};
use vdpa_core::ring::BufferSlice;
use vdpa_core::types::{QueueIndex, Result};
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::uring::OwnedBuf;

use super::blk::copy_config;
use super::options::no_worker;
use super::sim::{Model, Options, Simulator};
use super::{Kept, MgmtDevice};
use vdpa_backend::front::vhost::AnyParent;
use vdpa_backend::worker::{MemoryView, QueueControl, Size, WorkerPool};
use vdpa_control::api::{Attrs, CtlError, ID_BLOCK, MgmtDev};

use crate::block::{Continuation, Disk, RequestContext, Requests, Step};

/// SIZE_MAX, SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES and the features that all simulators have.
const FEATURES: Features = Features(0x3_0800_7646);

/// Sectors of the disk: 128 MiB.
const CAPACITY: u64 = 0x4_0000;

/// Sectors of the largest transfer.
const SECTORS_MAX: u64 = 131_072;

const ID: &[u8; 20] = b"vdpa_blk_sim\0\0\0\0\0\0\0\0";

/// The management device `sim-blk`.
#[derive(Debug)]
pub(crate) struct SimBlkMgmt;

impl MgmtDevice for SimBlkMgmt {
    fn describe(&self) -> MgmtDev {
        MgmtDev {
            name: "sim-blk".into(),
            bus: None,
            supported_classes: vec![ID_BLOCK],
            max_supported_vqs: 0,
            dev_features: Features::NONE,
        }
    }

    fn create(
        &self,
        name: &str,
        attrs: &Attrs,
        pool: &WorkerPool,
        kept: &Kept,
    ) -> Result<AnyParent, CtlError> {
        let options = Options::parse("sim-blk", attrs, &[])?;
        let disk = RamDisk::new(kept)?;
        let place = &options.placement;
        let size = Size { queues: 1, address_spaces: 1 };
        let worker = pool.add(name, size, place, Requests::new(disk, Arc::default(), Arc::default()));
        let worker = worker.map_err(|errno| no_worker(name, place, errno))?;
        let config_size = u32::try_from(size_of::<BlkConfig>()).unwrap_or(0);
        let profile = Profile::simulator(ID_BLOCK, FEATURES, 1, config_size);
        Ok(Box::new(Simulator::new(name, profile, options, Blk, worker)))
    }
}

fn config() -> BlkConfig {
    BlkConfig {
        capacity: CAPACITY.into(),
        size_max: 4096.into(),
        seg_max: 32.into(),
        blk_size: 512.into(),
        min_io_size: 1.into(),
        opt_io_size: 1.into(),
        num_queues: 1.into(),
        max_discard_sectors: u32::MAX.into(),
        max_discard_seg: 1.into(),
        discard_sector_alignment: 512.into(),
        max_write_zeroes_sectors: u32::MAX.into(),
        max_write_zeroes_seg: 1.into(),
        ..BlkConfig::default()
    }
}

#[derive(Debug)]
struct Blk;

impl Model for Blk {
    fn read_config(&self, offset: u32, out: &mut [u8]) {
        copy_config(&config(), offset, out);
    }

    fn write_config(&self, _offset: u32, _data: &[u8]) {
        // Ignored, since the contents are built anew for every read.
    }

    fn fail(&self, worker: &QueueControl) -> Result<()> {
        worker.fail()
    }

    fn queue_stats(&self, worker: &QueueControl, index: QueueIndex) -> QueueStats {
        worker.stats(index)
    }
}

struct RamDisk {
    memory: SharedMap,
    /// For what is copied between the disk and client memory.
    buffer: Box<[u8]>,
}

/// Bytes copied at a time.
const COPIED: usize = 64 << 10;

impl RamDisk {
    fn new(kept: &Kept) -> Result<Self, CtlError> {
        let bytes = CAPACITY * SECTOR;
        // The kernel zeroes each page when it is touched first.
        let file = kept.memory(c"vdpad-sim-blk", bytes)?;
        let failed = |errno| CtlError::new(errno, format!("the disk cannot be mapped: {errno}"));
        let len = usize::try_from(bytes).map_err(|_| failed(Errno::NOMEM))?;
        let memory = SharedMap::map(&*file, 0, len, Prot::RW, false).map_err(failed)?;
        // A crash must not wait until they are written into a core dump.
        if let Err(errno) = memory.leave_out_of_dumps(0, len) {
            tracing::debug!(%errno, "the contents of a disk are in core dumps");
        }
        Ok(Self { memory, buffer: vec![0; COPIED].into() })
    }

    /// Offset and length of a transfer in bytes; `None` where it exceeds the disk. The kernel's simulator checks whole sectors
    /// only, so a length that is not a multiple of 512 can exceed its buffer; here every byte is checked.
    fn range(&self, sector: u64, len: u64) -> Option<(usize, usize)> {
        if sector >= CAPACITY || len.div_ceil(SECTOR) > SECTORS_MAX.min(CAPACITY - sector) {
            return None;
        }
        let (from, len) = (usize::try_from(sector * SECTOR).ok()?, usize::try_from(len).ok()?);
        (len <= self.memory.len() - from).then_some((from, len))
    }

    /// Copies `len` bytes from `from` on to the buffers; `None` when client memory is not mapped.
    fn read(&mut self, (from, len): (usize, usize), to: BufferSlice<'_>, view: &MemoryView) -> Option<()> {
        let mut rest = to;
        for at in (0..len).step_by(COPIED) {
            let piece = self.buffer.get_mut(..COPIED.min(len - at))?;
            self.memory.read(from + at, piece).ok()?;
            let (now, later) = rest.split_at(piece.len() as u64)?;
            now.write(view.snapshot(), piece).ok()?;
            rest = later;
        }
        Some(())
    }

    /// Copies the buffers to `len` bytes from `to` on; `None` when client memory is not mapped.
    fn write(&mut self, from: BufferSlice<'_>, (to, len): (usize, usize), view: &MemoryView) -> Option<()> {
        let mut rest = from;
        for at in (0..len).step_by(COPIED) {
            let piece = self.buffer.get_mut(..COPIED.min(len - at))?;
            let (now, later) = rest.split_at(piece.len() as u64)?;
            now.read(view.snapshot(), piece).ok()?;
            self.memory.write(to + at, piece).ok()?;
            rest = later;
        }
        Some(())
    }

    fn zero(&mut self, from: usize, len: usize) -> Option<()> {
        self.buffer.fill(0);
        for at in (0..len).step_by(COPIED) {
            self.memory.write(from + at, self.buffer.get(..COPIED.min(len - at))?).ok()?;
        }
        Some(())
    }

    fn discard_or_zero(&mut self, request: &BlkRequest<'_>, view: &MemoryView) -> Option<Step> {
        let mut raw = [0; Segment::BYTES];
        if request.data_out.len() != raw.len() as u64 {
            return Some(done(Status::IoErr));
        }
        request.data_out.read(view.snapshot(), &mut raw).ok()?;
        let segment = Segment::parse(&raw);
        let zero = request.header.kind == kind::WRITE_ZEROES;
        let allowed = if zero { Segment::UNMAP } else { 0 };
        if segment.flags & !allowed != 0 {
            return Some(done(Status::Unsupp));
        }
        let sectors = u64::from(segment.num_sectors);
        if segment.sector >= CAPACITY || sectors > CAPACITY - segment.sector {
            return Some(done(Status::IoErr));
        }
        if zero {
            let from = usize::try_from(segment.sector * SECTOR).ok()?;
            let len = usize::try_from(sectors * SECTOR).ok()?;
            self.zero(from, len)?;
        }
        Some(done(Status::Ok))
    }

    /// `None` when client memory is not mapped.
    fn serve(&mut self, request: &BlkRequest<'_>, view: &MemoryView) -> Option<Step> {
        let header = request.header;
        if header.sector != 0 && !matches!(header.kind, kind::IN | kind::OUT) {
            return Some(done(Status::IoErr));
        }
        match header.kind {
            kind::IN => {
                let Some(range) = self.range(header.sector, request.data_in.len()) else {
                    return Some(done(Status::IoErr));
                };
                self.read(range, request.data_in, view)?;
                let written = u32::try_from(range.1).ok()?;
                Some(Step::Complete { status: Status::Ok, written })
            }
            kind::OUT => {
                let Some(range) = self.range(header.sector, request.data_out.len()) else {
                    return Some(done(Status::IoErr));
                };
                self.write(request.data_out, range, view)?;
                Some(done(Status::Ok))
            }
            kind::FLUSH => Some(done(Status::Ok)),
            // With a smaller buffer, the kernel's simulator overwrites the status byte with the id: the request is completed
            // without a status, and the driver is not signalled.
            kind::GET_ID if request.data_in.len() < ID.len() as u64 => {
                Some(Step::Malformed { notify: false })
            }
            kind::GET_ID => {
                request.data_in.write(view.snapshot(), ID).ok()?;
                Some(Step::Complete { status: Status::Ok, written: 20 })
            }
            kind::DISCARD | kind::WRITE_ZEROES => self.discard_or_zero(request, view),
            _ => Some(done(Status::IoErr)),
        }
    }
}

const fn done(status: Status) -> Step {
    Step::Complete { status, written: 0 }
}

impl Disk for RamDisk {
    fn start(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, _context: RequestContext) -> Step {
        self.serve(request, view).unwrap_or(Step::Unreachable)
    }

    fn malformed(&mut self, error: &FramingError) -> Step {
        match error {
            FramingError::Fault(_) => Step::Unreachable,
            _ => Step::Malformed { notify: false },
        }
    }

    fn io_completed(
        &mut self,
        _: Continuation,
        _: Result<u32>,
        _: Option<OwnedBuf>,
        _: &Arc<MemoryView>,
    ) -> Step {
        done(Status::IoErr)
    }
}
