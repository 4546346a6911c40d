//! Reads and writes of 4 KiB blocks through a session: the part of a virtio-blk driver that the examples share.

use std::error::Error;

use vdpa_client::Session;
use vdpa_client::device::{Device, DeviceFile};
use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::memfd;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Bytes of a block.
pub(crate) const BLOCK: usize = 4096;
/// Requests that can be in flight.
pub(crate) const SLOTS: u64 = 8;

const QUEUE: QueueIndex = QueueIndex(0);
const IOVA: u64 = 0x10_0000;
/// Offset of the slots in memory, after the ring. Each slot has the data, then the header and the status byte.
const SLOTS_AT: u64 = 0x4000;
const SLOT: u64 = 2 * BLOCK as u64;

/// A disk that this program drives.
pub(crate) struct Disk<D> {
    pub(crate) session: Session<D>,
}

impl<D: DeviceFile> Disk<D> {
    /// Opens a device for the first time.
    pub(crate) fn open(path: &str) -> Result<Self> {
        let size = SLOTS_AT + SLOTS * SLOT;
        let mut session = Device::<D>::open(path)?.negotiate(Features::of(&[Features::BLK_FLUSH]))?;
        session.map_memfd("dma", memfd::create(c"dma", size, None)?, IOVA, size, Perm::RW)?;
        session.add_queue(QUEUE, 64, "dma", 0)?;
        session.start()?;
        Ok(Self { session })
    }

    /// Submits a write of `data` to a block, using a free slot.
    pub(crate) fn begin_write(&mut self, slot: u64, block: u64, data: &[u8; BLOCK]) -> Result<()> {
        self.copy_in(slot, 0, data)?;
        let (header, status) = self.request(slot, kind::OUT, block)?;
        let queue = self.session.queue_mut(QUEUE)?;
        queue.submit(&[header, at(slot, 0, BLOCK)], &[status], slot)?;
        Ok(queue.notify()?)
    }

    fn begin_read(&mut self, slot: u64, block: u64) -> Result<()> {
        let (header, status) = self.request(slot, kind::IN, block)?;
        let queue = self.session.queue_mut(QUEUE)?;
        queue.submit(&[header], &[at(slot, 0, BLOCK), status], slot)?;
        Ok(queue.notify()?)
    }

    /// Waits for the next completion and returns its slot.
    pub(crate) fn next_done(&mut self) -> Result<u64> {
        loop {
            let queue = self.session.queue_mut(QUEUE)?;
            if let Some(done) = queue.reap()? {
                let mut status = [0xff];
                self.copy_out(done.token, BLOCK as u64 + 16, &mut status)?;
                return if status == [0] { Ok(done.token) } else { Err(format!("status {status:?}").into()) };
            }
            queue.wait(None)?;
        }
    }

    /// Reads one block.
    pub(crate) fn read(&mut self, block: u64) -> Result<[u8; BLOCK]> {
        self.begin_read(0, block)?;
        self.next_done()?;
        let mut data = [0; BLOCK];
        self.copy_out(0, 0, &mut data)?;
        Ok(data)
    }

    fn request(&self, slot: u64, kind: u32, block: u64) -> Result<(Buffer, Buffer)> {
        let header = RequestHeader { kind, ioprio: 0, sector: block * (BLOCK as u64 / 512) };
        self.copy_in(slot, BLOCK as u64, &header.encode())?;
        self.copy_in(slot, BLOCK as u64 + 16, &[0xff])?;
        Ok((at(slot, BLOCK as u64, 16), at(slot, BLOCK as u64 + 16, 1)))
    }

    fn copy_in(&self, slot: u64, offset: u64, data: &[u8]) -> Result<()> {
        let memory = self.session.region("dma").and_then(|region| region.map()).ok_or("no memory")?;
        Ok(memory.write(usize::try_from(SLOTS_AT + slot * SLOT + offset)?, data)?)
    }

    fn copy_out(&self, slot: u64, offset: u64, data: &mut [u8]) -> Result<()> {
        let memory = self.session.region("dma").and_then(|region| region.map()).ok_or("no memory")?;
        Ok(memory.read(usize::try_from(SLOTS_AT + slot * SLOT + offset)?, data)?)
    }
}

fn at(slot: u64, offset: u64, len: usize) -> Buffer {
    Buffer { iova: IOVA + SLOTS_AT + slot * SLOT + offset, len: u32::try_from(len).unwrap_or(u32::MAX) }
}
