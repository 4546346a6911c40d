//! The layout of virtio block requests and of their configuration space (virtio 1.2 section 5.2).

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ring::{Buffer, BufferSlice, Chain, Fault, Memory};

/// Bytes of a sector: the unit of every sector number and of the capacity, whatever the block size is.
pub const SECTOR: u64 = 512;

/// Bytes of the answer to [`kind::GET_ID`].
pub const ID_BYTES: usize = 20;

/// Bytes of a request header.
pub const HEADER_BYTES: u64 = 16;

/// Request types: `VIRTIO_BLK_T_*`.
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Write completed writes to stable storage.
    pub const FLUSH: u32 = 4;
    /// Read the device's name.
    pub const GET_ID: u32 = 8;
    /// The contents of ranges are no longer needed.
    pub const DISCARD: u32 = 11;
    /// Ranges shall read as zeroes.
    pub const WRITE_ZEROES: u32 = 13;
    /// Ranges shall be erased beyond recovery.
    pub const SECURE_ERASE: u32 = 14;
}

/// The last byte of a request: `VIRTIO_BLK_S_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The request succeeded.
    Ok = 0,
    /// The device or the request failed.
    IoErr = 1,
    /// The device does not support the request or one of its flags.
    Unsupp = 2,
}

impl Status {
    /// Decodes a status byte; `None` for any other value.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Ok),
            1 => Some(Self::IoErr),
            2 => Some(Self::Unsupp),
            _ => None,
        }
    }

    /// The byte the device writes.
    #[must_use]
    pub const fn byte(self) -> u8 {
        self as u8
    }
}

/// Configuration space: `struct virtio_blk_config`, 96 bytes.
///
/// A field is valid if the device offers the feature in parentheses, and 0 otherwise.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct BlkConfig {
    /// Sectors of 512 bytes.
    pub capacity: U64,
    /// Bytes of the largest segment (`SIZE_MAX`).
    pub size_max: U32,
    /// Segments of the largest request (`SEG_MAX`).
    pub seg_max: U32,
    /// Cylinders (`GEOMETRY`).
    pub cylinders: U16,
    /// Heads (`GEOMETRY`).
    pub heads: u8,
    /// Sectors of a track (`GEOMETRY`).
    pub sectors: u8,
    /// Bytes of a logical block (`BLK_SIZE`).
    pub blk_size: U32,
    /// Logical blocks of a physical one, as a power of two (`TOPOLOGY`).
    pub physical_block_exp: u8,
    /// First aligned logical block (`TOPOLOGY`).
    pub alignment_offset: u8,
    /// Logical blocks of the smallest request worth making (`TOPOLOGY`).
    pub min_io_size: U16,
    /// Logical blocks of the best request (`TOPOLOGY`).
    pub opt_io_size: U32,
    /// 1: write-back, 0: write-through (`CONFIG_WCE`).
    pub wce: u8,
    /// 0.
    pub unused: u8,
    /// Request queues (`MQ`).
    pub num_queues: U16,
    /// Sectors of the largest discard segment (`DISCARD`).
    pub max_discard_sectors: U32,
    /// Segments of a discard request (`DISCARD`).
    pub max_discard_seg: U32,
    /// Alignment of a discard, in sectors (`DISCARD`).
    pub discard_sector_alignment: U32,
    /// Sectors of the largest write-zeroes segment (`WRITE_ZEROES`).
    pub max_write_zeroes_sectors: U32,
    /// Segments of a write-zeroes request (`WRITE_ZEROES`).
    pub max_write_zeroes_seg: U32,
    /// 1: write-zeroes may unmap (`WRITE_ZEROES`).
    pub write_zeroes_may_unmap: u8,
    /// 0.
    pub unused1: [u8; 3],
    /// Sectors of the largest secure-erase segment (`SECURE_ERASE`).
    pub max_secure_erase_sectors: U32,
    /// Segments of a secure-erase request (`SECURE_ERASE`).
    pub max_secure_erase_seg: U32,
    /// Alignment of a secure erase, in sectors (`SECURE_ERASE`).
    pub secure_erase_sector_alignment: U32,
    /// Zones (`ZONED`); this crate offers none.
    pub zoned: BlkZoned,
}

/// The zoned part of [`BlkConfig`]: `struct virtio_blk_zoned_characteristics`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct BlkZoned {
    /// Sectors of a zone.
    pub zone_sectors: U32,
    /// Zones that may be open.
    pub max_open_zones: U32,
    /// Zones that may be active.
    pub max_active_zones: U32,
    /// Sectors of the largest append.
    pub max_append_sectors: U32,
    /// Bytes of the smallest write.
    pub write_granularity: U32,
    /// `VIRTIO_BLK_Z_*`; 0 for a device without zones.
    pub model: u8,
    /// 0.
    pub unused2: [u8; 3],
}

/// The first 16 bytes of a request: `struct virtio_blk_outhdr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// One of [`kind`], or an unknown value.
    pub kind: u32,
    /// Priority; not used.
    pub ioprio: u32,
    /// First sector of a read or write.
    pub sector: u64,
}

impl RequestHeader {
    /// Decodes a header. All values are valid.
    #[must_use]
    pub fn parse(raw: &[u8; 16]) -> Self {
        let [k0, k1, k2, k3, p0, p1, p2, p3, sector @ ..] = *raw;
        Self {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            ioprio: u32::from_le_bytes([p0, p1, p2, p3]),
            sector: u64::from_le_bytes(sector),
        }
    }

    /// The bytes a driver writes.
    #[must_use]
    pub fn encode(&self) -> [u8; 16] {
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&self.kind.to_le_bytes());
        raw[4..8].copy_from_slice(&self.ioprio.to_le_bytes());
        raw[8..].copy_from_slice(&self.sector.to_le_bytes());
        raw
    }
}

/// A range of a discard, write-zeroes or secure-erase request: `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub num_sectors: u32,
    /// [`UNMAP`](Self::UNMAP); all other bits are reserved.
    pub flags: u32,
}

impl Segment {
    /// Bytes of a segment.
    pub const BYTES: usize = 16;
    /// The device may unmap the range (`VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`).
    pub const UNMAP: u32 = 1;

    /// Decodes a segment. All values are valid.
    #[must_use]
    pub fn parse(raw: &[u8; 16]) -> Self {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *raw;
        Self {
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            num_sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes(flags),
        }
    }

    /// The bytes a driver writes.
    #[must_use]
    pub fn encode(&self) -> [u8; 16] {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&self.sector.to_le_bytes());
        raw[8..12].copy_from_slice(&self.num_sectors.to_le_bytes());
        raw[12..].copy_from_slice(&self.flags.to_le_bytes());
        raw
    }
}

/// Why a chain does not have the framing of a block request (virtio 1.2 section 2.7.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FramingError {
    /// The header cannot be accessed; the request may be parsed again later.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// Too few readable bytes.
    #[error("request has {readable} readable bytes: a header of 16 is required")]
    Header {
        /// Readable bytes.
        readable: u64,
    },
    /// There is no writable buffer, or the last one is empty.
    #[error("request has no room for its status: the last writable buffer must have a byte")]
    Status,
}

/// A block request: its header, and the addresses of its data and status.
#[derive(Clone, Copy, Debug)]
pub struct BlkRequest<'a> {
    /// The header.
    pub header: RequestHeader,
    /// Readable bytes after the header: the data of a write, or the segments of a discard.
    pub data_out: BufferSlice<'a>,
    /// Writable bytes before the status: the destination of a read.
    pub data_in: BufferSlice<'a>,
    /// Address of the status byte.
    pub status: u64,
}

impl<'a> BlkRequest<'a> {
    /// Finds the parts of a request, for any division into buffers. Reads the header from client memory, but no data.
    ///
    /// # Errors
    /// [`FramingError`]; the rules are those of uapi-spec 6.3.
    pub fn parse<M: Memory>(memory: &M, chain: &'a Chain) -> Result<Self, FramingError> {
        let readable = chain.readable();
        let short = FramingError::Header { readable: readable.len() };
        let Some(&Buffer { iova, len: last @ 1.. }) = chain.writable.last() else {
            return Err(FramingError::Status);
        };
        let (header, data_out) = readable.split_at(HEADER_BYTES).ok_or(short)?;
        let writable = chain.writable();
        let (data_in, _) = writable.split_at(writable.len().saturating_sub(1)).ok_or(FramingError::Status)?;
        let mut raw = [0; 16];
        header.read(memory, &mut raw)?;
        Ok(Self {
            header: RequestHeader::parse(&raw),
            data_out,
            data_in,
            status: iova.wrapping_add(u64::from(last - 1)),
        })
    }

    /// Writes the status byte. The length to report as used is the data written plus 1.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn write_status<M: Memory>(&self, memory: &M, status: Status) -> Result<(), Fault> {
        memory.write(self.status, &[status.byte()])
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;
    use crate::testing::TestMemory;
    use crate::types::{IovaRange, Perm};

    #[test]
    fn the_configuration_has_the_layout_of_linux() {
        assert_eq!((size_of::<BlkConfig>(), align_of::<BlkConfig>(), size_of::<BlkZoned>()), (96, 1, 24));
        assert_eq!(offset_of!(BlkConfig, blk_size), 20);
        assert_eq!(offset_of!(BlkConfig, wce), 32);
        assert_eq!(offset_of!(BlkConfig, num_queues), 34);
        assert_eq!(offset_of!(BlkConfig, max_discard_sectors), 36);
        assert_eq!(offset_of!(BlkConfig, discard_sector_alignment), 44);
        assert_eq!(offset_of!(BlkConfig, write_zeroes_may_unmap), 56);
        assert_eq!(offset_of!(BlkConfig, max_secure_erase_sectors), 60);
        assert_eq!(offset_of!(BlkConfig, zoned), 72);
        let config = BlkConfig { capacity: 0x0102.into(), num_queues: 0x0304.into(), ..BlkConfig::default() };
        assert_eq!((config.as_bytes()[0], config.as_bytes()[34]), (2, 4), "little endian");
    }

    #[test]
    fn headers_and_segments_round_trip() {
        let raw: [u8; 16] = std::array::from_fn(|i| u8::try_from(i).unwrap());
        let header = RequestHeader { kind: 0x0302_0100, ioprio: 0x0706_0504, sector: 0x0f0e_0d0c_0b0a_0908 };
        assert_eq!(RequestHeader::parse(&raw), header);
        assert_eq!(header.encode(), raw);
        let segment = Segment { sector: 0x0706_0504_0302_0100, num_sectors: 0x0b0a_0908, flags: 0x0f0e_0d0c };
        assert_eq!(Segment::parse(&raw), segment);
        assert_eq!(segment.encode(), raw);
        for status in [Status::Ok, Status::IoErr, Status::Unsupp] {
            assert_eq!(Status::from_byte(status.byte()), Some(status));
        }
        assert_eq!(Status::from_byte(0xff), None);
    }

    /// Cuts `bytes` bytes from `base` into buffers of these lengths; the rest is the last buffer.
    fn cut(base: u64, bytes: u32, lengths: &[u32]) -> Vec<Buffer> {
        let mut at = 0;
        let mut list: Vec<Buffer> = Vec::new();
        for &len in lengths {
            list.push(Buffer { iova: base + u64::from(at), len });
            at += len;
        }
        list.push(Buffer { iova: base + u64::from(at), len: bytes - at });
        list
    }

    fn chain(readable: Vec<Buffer>, writable: Vec<Buffer>) -> Chain {
        let mut chain = Chain::new();
        (chain.readable, chain.writable) = (readable, writable);
        chain
    }

    #[test]
    fn a_request_is_the_same_whatever_its_buffer_boundaries() {
        let memory = TestMemory::new(0x1000, 0x400);
        let header = RequestHeader { kind: kind::OUT, ioprio: 0, sector: 77 };
        memory.poke(0x1000, &header.encode());
        let cuts: [&[u32]; 6] = [&[], &[16], &[1, 0, 9], &[15, 1], &[17], &[16, 0, 3]];
        for out in cuts {
            for back in cuts {
                let chain = chain(cut(0x1000, 40, out), cut(0x1200, 33, back));
                let request = BlkRequest::parse(&memory, &chain).unwrap();
                assert_eq!(request.header, header, "{out:?}");
                assert_eq!((request.data_out.len(), request.data_in.len()), (24, 32));
                assert_eq!(request.data_out.iter().next().map(|piece| piece.iova), Some(0x1010));
                assert_eq!(request.status, 0x1220);
                let data: Vec<u8> = (1..=32).collect();
                assert!(request.data_in.write(&memory, &data).unwrap());
                request.write_status(&memory, Status::Unsupp).unwrap();
                assert_eq!(memory.peek(0x1200, 34), [&data[..], &[2, 0]].concat());
                memory.poke(0x1200, &[0; 34]);
            }
        }
    }

    #[test]
    fn a_chain_of_another_shape_is_refused() {
        let memory = TestMemory::new(0x1000, 0x400);
        let parse = |readable, writable| BlkRequest::parse(&memory, &chain(readable, writable)).map(drop);
        let good = || vec![Buffer { iova: 0x1000, len: 16 }];
        let buffer = |iova, len| vec![Buffer { iova, len }];
        assert_eq!(parse(good(), good()), Ok(()));
        assert_eq!(parse(vec![], good()), Err(FramingError::Header { readable: 0 }));
        assert_eq!(parse(buffer(0x1000, 15), good()), Err(FramingError::Header { readable: 15 }));
        assert_eq!(parse(good(), vec![]), Err(FramingError::Status));
        assert_eq!(parse(good(), [good(), buffer(0x1100, 0)].concat()), Err(FramingError::Status));
        memory.protect(IovaRange::new(0x1000, 0x1000).unwrap(), Perm::NONE);
        assert_eq!(parse(good(), good()), Err(FramingError::Fault(Fault { addr: 0x1000 })));
    }
}
