// SPDX-License-Identifier: GPL-2.0-only

//! Numbers and structures of the device file (include/uapi/linux/vhost.h), and those of the live-update series.

use kernel::ioctl::{_IO, _IOR, _IOW, _IOWR};

/// `struct vhost_vring_state`: index, number.
pub(crate) type VringState = [u32; 2];
/// The head of `struct vhost_vdpa_config`: offset, length.
pub(crate) type ConfigHead = [u32; 2];
/// `struct vhost_vdpa_iova_range`: first, last.
pub(crate) type IovaRange = [u64; 2];

const VHOST: u32 = 0xAF;

pub(crate) const GET_FEATURES: u32 = _IOR::<u64>(VHOST, 0x00);
pub(crate) const SET_FEATURES: u32 = _IOW::<u64>(VHOST, 0x00);
pub(crate) const SET_OWNER: u32 = _IO(VHOST, 0x01);
pub(crate) const SET_LOG_BASE: u32 = _IOW::<u64>(VHOST, 0x04);
pub(crate) const SET_LOG_FD: u32 = _IOW::<i32>(VHOST, 0x07);
pub(crate) const SET_VRING_NUM: u32 = _IOW::<VringState>(VHOST, 0x10);
pub(crate) const SET_VRING_ADDR: u32 = _IOW::<[u64; 5]>(VHOST, 0x11);
pub(crate) const SET_VRING_BASE: u32 = _IOW::<VringState>(VHOST, 0x12);
pub(crate) const GET_VRING_BASE: u32 = _IOWR::<VringState>(VHOST, 0x12);
pub(crate) const SET_VRING_CALL: u32 = _IOW::<VringState>(VHOST, 0x21);
pub(crate) const SET_BACKEND_FEATURES: u32 = _IOW::<u64>(VHOST, 0x25);
pub(crate) const GET_BACKEND_FEATURES: u32 = _IOR::<u64>(VHOST, 0x26);
/// Of the live-update series.
pub(crate) const NEW_OWNER: u32 = _IO(VHOST, 0x27);
pub(crate) const GET_DEVICE_ID: u32 = _IOR::<u32>(VHOST, 0x70);
pub(crate) const GET_STATUS: u32 = _IOR::<u8>(VHOST, 0x71);
pub(crate) const SET_STATUS: u32 = _IOW::<u8>(VHOST, 0x72);
pub(crate) const GET_CONFIG: u32 = _IOR::<ConfigHead>(VHOST, 0x73);
pub(crate) const SET_CONFIG: u32 = _IOW::<ConfigHead>(VHOST, 0x74);
pub(crate) const SET_VRING_ENABLE: u32 = _IOW::<VringState>(VHOST, 0x75);
pub(crate) const GET_VRING_NUM: u32 = _IOR::<u16>(VHOST, 0x76);
pub(crate) const SET_CONFIG_CALL: u32 = _IOW::<i32>(VHOST, 0x77);
pub(crate) const GET_IOVA_RANGE: u32 = _IOR::<IovaRange>(VHOST, 0x78);
pub(crate) const GET_CONFIG_SIZE: u32 = _IOR::<u32>(VHOST, 0x79);
pub(crate) const GET_AS_NUM: u32 = _IOR::<u32>(VHOST, 0x7A);
pub(crate) const GET_VRING_GROUP: u32 = _IOWR::<VringState>(VHOST, 0x7B);
pub(crate) const SET_GROUP_ASID: u32 = _IOW::<VringState>(VHOST, 0x7C);
pub(crate) const SUSPEND: u32 = _IO(VHOST, 0x7D);
pub(crate) const RESUME: u32 = _IO(VHOST, 0x7E);
pub(crate) const GET_VRING_DESC_GROUP: u32 = _IOWR::<VringState>(VHOST, 0x7F);
pub(crate) const GET_VQS_COUNT: u32 = _IOR::<u32>(VHOST, 0x80);
pub(crate) const GET_GROUP_NUM: u32 = _IOR::<u32>(VHOST, 0x81);
pub(crate) const GET_VRING_SIZE: u32 = _IOWR::<VringState>(VHOST, 0x82);

/// IOTLB messages.
pub(crate) mod iotlb {
    pub(crate) const UPDATE: u8 = 2;
    pub(crate) const INVALIDATE: u8 = 3;
    pub(crate) const BATCH_BEGIN: u8 = 5;
    pub(crate) const BATCH_END: u8 = 6;
    /// Of the live-update series.
    pub(crate) const REMAP: u8 = 7;
}

/// Backend features, besides those in [`crate::rules::backend`].
pub(crate) mod backend {
    pub(crate) const BASE: u64 = 1 << 1 | 1 << 2 | ASID;
    pub(crate) const ASID: u64 = 1 << 3;
    pub(crate) const SUSPEND: u64 = 1 << 4;
    pub(crate) const RESUME: u64 = 1 << 5;
    pub(crate) const ENABLE_AFTER_DRIVER_OK: u64 = 1 << 6;
    pub(crate) const DESC_ASID: u64 = 1 << 7;
}

/// Bits of the status.
pub(crate) mod status {
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
}

/// Feature bit of packed rings.
pub(crate) const RING_PACKED: u64 = 1 << 34;
/// Permission bit: the device may write.
pub(crate) const ACCESS_WO: u32 = 2;
