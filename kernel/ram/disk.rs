// SPDX-License-Identifier: GPL-2.0-only

//! A block device in memory: its configuration, and its requests (virtio 1.3, 5.2).

use super::ring::{Chain, Memory};
use kernel::alloc::KVVec;
use kernel::prelude::*;

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Bytes of `virtio_blk_config`.
pub(crate) const CONFIG: usize = 96;

/// VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH.
pub(crate) const FEATURES: u64 = 1 << 2 | 1 << 6 | 1 << 9;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// The disk.
pub(crate) struct Disk {
    bytes: KVVec<u8>,
}

impl Disk {
    pub(crate) fn new(mib: usize) -> Result<Self> {
        let size = mib.checked_mul(1 << 20).ok_or(EINVAL)?;
        Ok(Self { bytes: KVVec::from_elem(0, size, GFP_KERNEL)? })
    }

    /// Byte `index` of the configuration space.
    pub(crate) fn config_byte(&self, index: usize) -> u8 {
        let capacity = (self.bytes.len() as u64 / SECTOR).to_le_bytes();
        let seg_max = 126_u32.to_le_bytes();
        let block_size = 512_u32.to_le_bytes();
        let field = |bytes: &[u8], first: usize| index.checked_sub(first).and_then(|at| bytes.get(at).copied());
        field(&capacity, 0).or_else(|| field(&seg_max, 12)).or_else(|| field(&block_size, 20)).unwrap_or(0)
    }

    /// Carries out a request. Returns how many bytes were written, or an error of memory that the device cannot use.
    pub(crate) fn serve(&mut self, chain: &Chain, memory: &impl Memory) -> Result<u32> {
        let mut header = [0; 16];
        chain.read(memory, 0, &mut header)?;
        let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = header;
        let [_, _, _, _, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes(kind), u64::from_le_bytes(sector));
        // The last byte that the device may write is the status.
        let room = chain.writable().checked_sub(1).ok_or(EINVAL)?;
        let (status, written) = match kind {
            READ => match self.range(sector, room) {
                Some(bytes) => {
                    chain.write(memory, 0, bytes)?;
                    (OK, room)
                }
                None => (IO_ERROR, 0),
            },
            WRITE => {
                let length = chain.readable().saturating_sub(16);
                match self.range_mut(sector, length) {
                    Some(bytes) => {
                        chain.read(memory, 16, bytes)?;
                        (OK, 0)
                    }
                    None => (IO_ERROR, 0),
                }
            }
            FLUSH => (OK, 0),
            GET_ID => {
                let mut id = [0; 20];
                id.iter_mut().zip(b"vdpa_ram").for_each(|(to, from)| *to = *from);
                let length = room.min(20);
                chain.write(memory, 0, id.get(..length as usize).unwrap_or(&id))?;
                (OK, length)
            }
            _ => (UNSUPPORTED, 0),
        };
        chain.write(memory, room, &[status])?;
        Ok(u32::try_from(written.saturating_add(1)).unwrap_or(u32::MAX))
    }

    fn bounds(&self, sector: u64, length: u64) -> Option<core::ops::Range<usize>> {
        let first = usize::try_from(sector.checked_mul(SECTOR)?).ok()?;
        let last = first.checked_add(usize::try_from(length).ok()?)?;
        (length % SECTOR == 0).then_some(first..last)
    }

    fn range(&self, sector: u64, length: u64) -> Option<&[u8]> {
        self.bytes.get(self.bounds(sector, length)?)
    }

    fn range_mut(&mut self, sector: u64, length: u64) -> Option<&mut [u8]> {
        let bounds = self.bounds(sector, length)?;
        self.bytes.get_mut(bounds)
    }
}
