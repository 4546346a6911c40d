//! `uapi/linux/vduse.h`, Linux 7.3: devices of the kernel's vdpa bus that a program implements (uapi-spec 6.4).
//!
//! Structures are in the byte order of the machine.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ioctl::{io, ior, iow, iowr};

/// The type byte of all VDUSE requests.
pub const VDUSE_BASE: u8 = 0x81;
/// Bytes of a name, with the zero at its end.
pub const NAME_MAX: usize = 256;

/// `VDUSE_F_*`: what a program chooses before it makes a device, from Linux 7.3 on.
pub mod feature {
    /// The program is told when the driver enables or disables a queue.
    pub const QUEUE_READY: u64 = 1 << 0;
    /// The device can be suspended.
    pub const SUSPEND: u64 = 1 << 1;
}

/// Types of the requests that the kernel makes of the program: `enum vduse_req_type`.
pub mod request {
    /// The position of a queue is wanted.
    pub const GET_VQ_STATE: u32 = 0;
    /// The driver sets the device's status; 0 is a reset.
    pub const SET_STATUS: u32 = 1;
    /// Mappings have changed.
    pub const UPDATE_IOTLB: u32 = 2;
    /// A group of queues gets another address space; API version 1.
    pub const SET_VQ_GROUP_ASID: u32 = 3;
    /// A queue is enabled or disabled; [`QUEUE_READY`](super::feature::QUEUE_READY).
    pub const SET_VQ_READY: u32 = 4;
    /// The device is to stop; [`SUSPEND`](super::feature::SUSPEND).
    pub const SUSPEND: u32 = 5;
}

/// The kernel writes: `u64`.
pub const GET_API_VERSION: u32 = ior::<u64>(VDUSE_BASE, 0x00);
/// The kernel reads: `u64`.
pub const SET_API_VERSION: u32 = iow::<u64>(VDUSE_BASE, 0x01);
/// The kernel reads: [`DevConfig`] and the bytes of configuration space behind it.
pub const CREATE_DEV: u32 = iow::<DevConfig>(VDUSE_BASE, 0x02);
/// The kernel reads: a name.
pub const DESTROY_DEV: u32 = iow::<[u8; NAME_MAX]>(VDUSE_BASE, 0x03);
/// The kernel writes: `u64`, [`feature`].
pub const GET_FEATURES: u32 = ior::<u64>(VDUSE_BASE, 0x04);
/// The kernel reads: `u64`, [`feature`].
pub const SET_FEATURES: u32 = iow::<u64>(VDUSE_BASE, 0x05);
/// The kernel reads, then writes: [`IotlbEntry`]; returns a descriptor.
pub const IOTLB_GET_FD: u32 = iowr::<IotlbEntry>(VDUSE_BASE, 0x10);
/// The kernel writes: `u64`.
pub const DEV_GET_FEATURES: u32 = ior::<u64>(VDUSE_BASE, 0x11);
/// The kernel reads: [`ConfigHeader`] and the bytes behind it.
pub const DEV_SET_CONFIG: u32 = iow::<ConfigHeader>(VDUSE_BASE, 0x12);
/// No argument.
pub const DEV_INJECT_CONFIG_IRQ: u32 = io(VDUSE_BASE, 0x13);
/// The kernel reads: [`VqConfig`].
pub const VQ_SETUP: u32 = iow::<VqConfig>(VDUSE_BASE, 0x14);
/// The kernel reads, then writes: [`VqInfo`].
pub const VQ_GET_INFO: u32 = iowr::<VqInfo>(VDUSE_BASE, 0x15);
/// The kernel reads: [`VqEventfd`].
pub const VQ_SETUP_KICKFD: u32 = iow::<VqEventfd>(VDUSE_BASE, 0x16);
/// The kernel reads: `u32`.
pub const VQ_INJECT_IRQ: u32 = iow::<u32>(VDUSE_BASE, 0x17);
/// The kernel reads, then writes: [`IotlbEntryV2`]; returns a descriptor. API version 1.
pub const IOTLB_GET_FD2: u32 = iowr::<IotlbEntryV2>(VDUSE_BASE, 0x1b);

/// `struct vduse_dev_config` without the bytes of configuration space.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DevConfig {
    /// Name, with a zero at its end.
    pub name: [u8; NAME_MAX],
    /// Virtio vendor id.
    pub vendor_id: u32,
    /// Virtio device id: 1 net, 2 block, 26 file system.
    pub device_id: u32,
    /// Virtio features offered.
    pub features: u64,
    /// Number of queues.
    pub vq_num: u32,
    /// Alignment of the rings in bytes, a power of two from 4 to 4096.
    pub vq_align: u32,
    /// Number of groups of queues; API version 1.
    pub ngroups: u32,
    /// Number of address spaces; API version 1.
    pub nas: u32,
    /// Zeros.
    pub reserved: [u32; 11],
    /// Bytes of configuration space, which follow; at most 4096.
    pub config_size: u32,
}
layout!(DevConfig, 336, vendor_id @ 256, device_id @ 260, features @ 264, vq_num @ 272, vq_align @ 276, ngroups @ 280, nas @ 284, reserved @ 288, config_size @ 332);

/// `struct vduse_config_data` without its bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ConfigHeader {
    /// Offset in configuration space.
    pub offset: u32,
    /// Bytes that follow.
    pub length: u32,
}
layout!(ConfigHeader, 8, offset @ 0, length @ 4);

/// `struct vduse_vq_config`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VqConfig {
    /// Index of the queue.
    pub index: u32,
    /// Entries of the largest ring.
    pub max_size: u16,
    /// Zero.
    pub reserved1: u16,
    /// Group of the queue; API version 1.
    pub group: u32,
    /// Zeros.
    pub reserved2: [u16; 10],
}
layout!(VqConfig, 32, index @ 0, max_size @ 4, group @ 8, reserved2 @ 12);

/// `struct vduse_vq_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VqInfo {
    /// Index of the queue.
    pub index: u32,
    /// Entries of its ring.
    pub num: u32,
    /// Descriptor area.
    pub desc_addr: u64,
    /// Driver area.
    pub driver_addr: u64,
    /// Device area.
    pub device_addr: u64,
    /// The position that the driver has set: one word of a split ring, four of a packed one.
    pub state: [u16; 4],
    /// 1 when the queue is enabled.
    pub ready: u8,
    /// Zeros.
    pub padding: [u8; 7],
}
layout!(VqInfo, 48, num @ 4, desc_addr @ 8, driver_addr @ 16, device_addr @ 24, state @ 32, ready @ 40);

/// `struct vduse_vq_eventfd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VqEventfd {
    /// Index of the queue.
    pub index: u32,
    /// Descriptor, or -1 to remove it.
    pub fd: i32,
}
layout!(VqEventfd, 8, index @ 0, fd @ 4);

/// `struct vduse_iotlb_entry`, both ends included.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IotlbEntry {
    /// Offset of `start` in the file.
    pub offset: u64,
    /// First I/O virtual address.
    pub start: u64,
    /// Last I/O virtual address.
    pub last: u64,
    /// `VDUSE_ACCESS_*`: 1 read, 2 write.
    pub perm: u8,
    /// Zeros.
    pub padding: [u8; 7],
}
layout!(IotlbEntry, 32, start @ 8, last @ 16, perm @ 24);

/// `struct vduse_iotlb_entry_v2`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IotlbEntryV2 {
    /// The range and its file.
    pub entry: IotlbEntry,
    /// Address space.
    pub asid: u32,
    /// Zeros.
    pub reserved: [u32; 11],
}
layout!(IotlbEntryV2, 80, asid @ 32, reserved @ 36);

/// `struct vduse_dev_request`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DevRequest {
    /// One of [`request`]; `type` in the header.
    pub kind: u32,
    /// Number, which the response repeats.
    pub request_id: u32,
    /// Ignored.
    pub reserved: [u32; 4],
    /// The arguments.
    pub payload: [u32; 32],
}
layout!(DevRequest, 152, request_id @ 4, reserved @ 8, payload @ 24);

/// `struct vduse_dev_response`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DevResponse {
    /// Number of the request.
    pub request_id: u32,
    /// 0: done; 1: failed.
    pub result: u32,
    /// Zeros.
    pub reserved: [u32; 4],
    /// The answer.
    pub payload: [u32; 32],
}
layout!(DevResponse, 152, result @ 4, reserved @ 8, payload @ 24);
