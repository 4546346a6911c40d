//! `uapi/linux/virtio_blk.h` and `uapi/linux/virtio_net.h`, Linux 7.3: structures that are read and written whole.
//!
//! Little-endian (virtio 1) whatever the machine. Feature bits are in [`vdpa_core::features`].

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Disk geometry (virtio 1.2 section 5.2.4).
///
/// Source: `struct virtio_blk_geometry`.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct BlkGeometry {
    /// Cylinders.
    pub cylinders: U16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors: u8,
}
const _: () = {
    assert!(size_of::<BlkGeometry>() == 4);
    assert!(std::mem::offset_of!(BlkGeometry, cylinders) == 0);
    assert!(std::mem::offset_of!(BlkGeometry, heads) == 2);
    assert!(std::mem::offset_of!(BlkGeometry, sectors) == 3);
};

/// Zones of a zoned device.
///
/// Source: `struct virtio_blk_zoned_characteristics`.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct BlkZoned {
    /// Sectors per zone.
    pub zone_sectors: U32,
    /// Open zones, at most.
    pub max_open_zones: U32,
    /// Active zones, at most.
    pub max_active_zones: U32,
    /// Sectors of one zone append, at most.
    pub max_append_sectors: U32,
    /// Bytes.
    pub write_granularity: U32,
    /// None 0, host managed 1, host aware 2.
    pub model: u8,
    /// Zero.
    pub unused2: [u8; 3],
}
const _: () = {
    assert!(size_of::<BlkZoned>() == 24);
    assert!(std::mem::offset_of!(BlkZoned, zone_sectors) == 0);
    assert!(std::mem::offset_of!(BlkZoned, max_open_zones) == 4);
    assert!(std::mem::offset_of!(BlkZoned, max_active_zones) == 8);
    assert!(std::mem::offset_of!(BlkZoned, max_append_sectors) == 12);
    assert!(std::mem::offset_of!(BlkZoned, write_granularity) == 16);
    assert!(std::mem::offset_of!(BlkZoned, model) == 20);
    assert!(std::mem::offset_of!(BlkZoned, unused2) == 21);
};

/// Configuration space of a block device (virtio 1.2 section 5.2.4). Fields are valid with their feature bit.
///
/// Source: `struct virtio_blk_config`.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct BlkConfig {
    /// 512-byte sectors.
    pub capacity: U64,
    /// Largest segment, in bytes.
    pub size_max: U32,
    /// Segments of one request, at most.
    pub seg_max: U32,
    /// See [`BlkGeometry`].
    pub geometry: BlkGeometry,
    /// Bytes of a logical block.
    pub blk_size: U32,
    /// Logical blocks per physical block, as a power of two.
    pub physical_block_exp: u8,
    /// Of the first physical block, in logical blocks.
    pub alignment_offset: u8,
    /// In logical blocks.
    pub min_io_size: U16,
    /// In logical blocks.
    pub opt_io_size: U32,
    /// Write cache: 0 write-through, 1 write-back.
    pub wce: u8,
    /// Zero.
    pub unused: u8,
    /// Request queues.
    pub num_queues: U16,
    /// Of one segment, in sectors.
    pub max_discard_sectors: U32,
    /// Segments of one discard, at most.
    pub max_discard_seg: U32,
    /// In sectors.
    pub discard_sector_alignment: U32,
    /// Of one segment, in sectors.
    pub max_write_zeroes_sectors: U32,
    /// Segments of one request, at most.
    pub max_write_zeroes_seg: U32,
    /// 1: may deallocate.
    pub write_zeroes_may_unmap: u8,
    /// Zero.
    pub unused1: [u8; 3],
    /// Of one segment, in sectors.
    pub max_secure_erase_sectors: U32,
    /// Segments of one request, at most.
    pub max_secure_erase_seg: U32,
    /// In sectors.
    pub secure_erase_sector_alignment: U32,
    /// See [`BlkZoned`].
    pub zoned: BlkZoned,
}
const _: () = {
    assert!(size_of::<BlkConfig>() == 96);
    assert!(std::mem::offset_of!(BlkConfig, capacity) == 0);
    assert!(std::mem::offset_of!(BlkConfig, size_max) == 8);
    assert!(std::mem::offset_of!(BlkConfig, seg_max) == 12);
    assert!(std::mem::offset_of!(BlkConfig, geometry) == 16);
    assert!(std::mem::offset_of!(BlkConfig, blk_size) == 20);
    assert!(std::mem::offset_of!(BlkConfig, physical_block_exp) == 24);
    assert!(std::mem::offset_of!(BlkConfig, alignment_offset) == 25);
    assert!(std::mem::offset_of!(BlkConfig, min_io_size) == 26);
    assert!(std::mem::offset_of!(BlkConfig, opt_io_size) == 28);
    assert!(std::mem::offset_of!(BlkConfig, wce) == 32);
    assert!(std::mem::offset_of!(BlkConfig, unused) == 33);
    assert!(std::mem::offset_of!(BlkConfig, num_queues) == 34);
    assert!(std::mem::offset_of!(BlkConfig, max_discard_sectors) == 36);
    assert!(std::mem::offset_of!(BlkConfig, max_discard_seg) == 40);
    assert!(std::mem::offset_of!(BlkConfig, discard_sector_alignment) == 44);
    assert!(std::mem::offset_of!(BlkConfig, max_write_zeroes_sectors) == 48);
    assert!(std::mem::offset_of!(BlkConfig, max_write_zeroes_seg) == 52);
    assert!(std::mem::offset_of!(BlkConfig, write_zeroes_may_unmap) == 56);
    assert!(std::mem::offset_of!(BlkConfig, unused1) == 57);
    assert!(std::mem::offset_of!(BlkConfig, max_secure_erase_sectors) == 60);
    assert!(std::mem::offset_of!(BlkConfig, max_secure_erase_seg) == 64);
    assert!(std::mem::offset_of!(BlkConfig, secure_erase_sector_alignment) == 68);
    assert!(std::mem::offset_of!(BlkConfig, zoned) == 72);
};

/// Header of a block request (virtio 1.2 section 5.2.6).
///
/// Source: `struct virtio_blk_outhdr`.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct BlkOutHdr {
    /// `VIRTIO_BLK_T_*`; `type` in the header.
    pub kind: U32,
    /// Reserved.
    pub ioprio: U32,
    /// In 512-byte sectors, whatever the block size.
    pub sector: U64,
}
const _: () = {
    assert!(size_of::<BlkOutHdr>() == 16);
    assert!(std::mem::offset_of!(BlkOutHdr, kind) == 0);
    assert!(std::mem::offset_of!(BlkOutHdr, ioprio) == 4);
    assert!(std::mem::offset_of!(BlkOutHdr, sector) == 8);
};

/// One segment of a discard or write-zeroes request.
///
/// Source: `struct virtio_blk_discard_write_zeroes`.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct BlkDiscardWriteZeroes {
    /// First sector.
    pub sector: U64,
    /// Sectors.
    pub num_sectors: U32,
    /// Bit 0: unmap.
    pub flags: U32,
}
const _: () = {
    assert!(size_of::<BlkDiscardWriteZeroes>() == 16);
    assert!(std::mem::offset_of!(BlkDiscardWriteZeroes, sector) == 0);
    assert!(std::mem::offset_of!(BlkDiscardWriteZeroes, num_sectors) == 8);
    assert!(std::mem::offset_of!(BlkDiscardWriteZeroes, flags) == 12);
};

/// Configuration space of a network device (virtio 1.2 section 5.1.4).
///
/// Source: `struct virtio_net_config`.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct NetConfig {
    /// MAC address.
    pub mac: [u8; 6],
    /// Bit 0: link up; bit 1: announce.
    pub status: U16,
    /// 1 to 0x8000.
    pub max_virtqueue_pairs: U16,
    /// Bytes.
    pub mtu: U16,
    /// Mbit/s.
    pub speed: U32,
    /// 0 half, 1 full, 0xff unknown.
    pub duplex: u8,
    /// Bytes.
    pub rss_max_key_size: u8,
    /// Entries.
    pub rss_max_indirection_table_length: U16,
    /// Mask.
    pub supported_hash_types: U32,
}
const _: () = {
    assert!(size_of::<NetConfig>() == 24);
    assert!(std::mem::offset_of!(NetConfig, mac) == 0);
    assert!(std::mem::offset_of!(NetConfig, status) == 6);
    assert!(std::mem::offset_of!(NetConfig, max_virtqueue_pairs) == 8);
    assert!(std::mem::offset_of!(NetConfig, mtu) == 10);
    assert!(std::mem::offset_of!(NetConfig, speed) == 12);
    assert!(std::mem::offset_of!(NetConfig, duplex) == 16);
    assert!(std::mem::offset_of!(NetConfig, rss_max_key_size) == 17);
    assert!(std::mem::offset_of!(NetConfig, rss_max_indirection_table_length) == 18);
    assert!(std::mem::offset_of!(NetConfig, supported_hash_types) == 20);
};

/// Header of every packet (virtio 1.2 section 5.1.6).
///
/// Source: `struct virtio_net_hdr_v1`.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct NetHdrV1 {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`.
    pub gso_type: u8,
    /// Bytes of the headers.
    pub hdr_len: U16,
    /// Bytes of a segment.
    pub gso_size: U16,
    /// Offset from which to sum.
    pub csum_start: U16,
    /// Where the sum goes, from there.
    pub csum_offset: U16,
    /// Buffers this packet is in.
    pub num_buffers: U16,
}
const _: () = {
    assert!(size_of::<NetHdrV1>() == 12);
    assert!(std::mem::offset_of!(NetHdrV1, flags) == 0);
    assert!(std::mem::offset_of!(NetHdrV1, gso_type) == 1);
    assert!(std::mem::offset_of!(NetHdrV1, hdr_len) == 2);
    assert!(std::mem::offset_of!(NetHdrV1, gso_size) == 4);
    assert!(std::mem::offset_of!(NetHdrV1, csum_start) == 6);
    assert!(std::mem::offset_of!(NetHdrV1, csum_offset) == 8);
    assert!(std::mem::offset_of!(NetHdrV1, num_buffers) == 10);
};
