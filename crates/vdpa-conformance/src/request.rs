//! The requests of the interface: names, numbers, and what a device does with them.
//!
//! The suite has its own table of numbers and does not use that of `vdpa-sys`: with shared numbers, it could not find a wrong
//! one. The exception are the requests of the live-update series if other numbers are configured for them ([`live::ENV`]).

use vdpa_sys::uapi::live::{self, Numbers};

/// One request: an ioctl, an IOTLB message type or a system call on the device file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The kernel's name.
    pub name: &'static str,
    /// The ioctl number, for an ioctl.
    pub number: Option<u32>,
    /// Section of the interface specification (uapi-spec).
    pub spec: &'static str,
    /// How a device of vdpad handles the request, for the matrix.
    pub effect: &'static str,
}

impl Request {
    const fn ioctl(name: &'static str, number: u32, spec: &'static str) -> Self {
        Self { name, number: Some(number), spec, effect: "served" }
    }

    const fn other(name: &'static str, spec: &'static str) -> Self {
        Self { name, number: None, spec, effect: "served" }
    }

    /// The ioctl number that this program uses. It differs from `number` if another one is configured for a request of the
    /// live-update series.
    pub(crate) fn wire_number(self) -> Option<u32> {
        let set = live::configured();
        // If none is configured, the suite's own number is used, so that a wrong one in vdpa-sys is found.
        let dirty =
            [Self::DIRTY_INFO, Self::DIRTY_START, Self::DIRTY_STOP, Self::DIRTY_GET, Self::DIRTY_UNMAP];
        match dirty.iter().zip(0..).find(|(request, _)| **request == self) {
            Some((_, index)) if set.dirty != Numbers::POSTED.dirty => {
                Some(0xaf00 | u32::from(set.dirty.wrapping_add(index)))
            }
            _ if self == Self::STATE_SAVE && set.state != Numbers::POSTED.state => {
                Some(0xaf00 | u32::from(set.state))
            }
            _ if self == Self::STATE_LOAD && set.state != Numbers::POSTED.state => {
                Some(0xaf00 | u32::from(set.state.wrapping_add(1)))
            }
            _ if self == Self::NEW_OWNER && set.new_owner != Numbers::POSTED.new_owner => Some(set.new_owner),
            _ => self.number,
        }
    }

    const fn effect(mut self, effect: &'static str) -> Self {
        self.effect = effect;
        self
    }
}

impl Request {
    pub(crate) const GET_FEATURES: Self = Self::ioctl("VHOST_GET_FEATURES", 0x8008_AF00, "1.4");
    pub(crate) const SET_FEATURES: Self = Self::ioctl("VHOST_SET_FEATURES", 0x4008_AF00, "1.4");
    pub(crate) const SET_OWNER: Self = Self::ioctl("VHOST_SET_OWNER", 0x0000_AF01, "1.6a");
    pub(crate) const RESET_OWNER: Self =
        Self::ioctl("VHOST_RESET_OWNER", 0x0000_AF02, "1.1").effect("refused, or see notes");
    pub(crate) const SET_MEM_TABLE: Self =
        Self::ioctl("VHOST_SET_MEM_TABLE", 0x4008_AF03, "1.6a").effect("no effect, or see notes");
    pub(crate) const SET_LOG_BASE: Self =
        Self::ioctl("VHOST_SET_LOG_BASE", 0x4008_AF04, "1.1").effect("refused, or see notes");
    pub(crate) const SET_LOG_FD: Self =
        Self::ioctl("VHOST_SET_LOG_FD", 0x4004_AF07, "1.1").effect("refused, or see notes");
    pub(crate) const NEW_WORKER: Self = Self::ioctl("VHOST_NEW_WORKER", 0x8004_AF08, "1.1").effect("refused");
    pub(crate) const FREE_WORKER: Self =
        Self::ioctl("VHOST_FREE_WORKER", 0x4004_AF09, "1.1").effect("refused");
    pub(crate) const SET_VRING_NUM: Self = Self::ioctl("VHOST_SET_VRING_NUM", 0x4008_AF10, "1.6");
    pub(crate) const SET_VRING_ADDR: Self = Self::ioctl("VHOST_SET_VRING_ADDR", 0x4028_AF11, "1.6");
    pub(crate) const SET_VRING_BASE: Self = Self::ioctl("VHOST_SET_VRING_BASE", 0x4008_AF12, "1.6");
    pub(crate) const GET_VRING_BASE: Self = Self::ioctl("VHOST_GET_VRING_BASE", 0xC008_AF12, "1.6");
    pub(crate) const SET_VRING_ENDIAN: Self =
        Self::ioctl("VHOST_SET_VRING_ENDIAN", 0x4008_AF13, "1.1").effect("refused");
    pub(crate) const GET_VRING_ENDIAN: Self =
        Self::ioctl("VHOST_GET_VRING_ENDIAN", 0x4008_AF14, "1.1").effect("refused");
    pub(crate) const ATTACH_VRING_WORKER: Self =
        Self::ioctl("VHOST_ATTACH_VRING_WORKER", 0x4008_AF15, "1.1").effect("refused");
    pub(crate) const GET_VRING_WORKER: Self =
        Self::ioctl("VHOST_GET_VRING_WORKER", 0xC008_AF16, "1.1").effect("refused");
    pub(crate) const SET_VRING_KICK: Self = Self::ioctl("VHOST_SET_VRING_KICK", 0x4008_AF20, "1.6");
    pub(crate) const SET_VRING_CALL: Self = Self::ioctl("VHOST_SET_VRING_CALL", 0x4008_AF21, "1.6");
    pub(crate) const SET_VRING_ERR: Self =
        Self::ioctl("VHOST_SET_VRING_ERR", 0x4008_AF22, "1.6").effect("stored, never signalled");
    pub(crate) const SET_VRING_BUSYLOOP_TIMEOUT: Self =
        Self::ioctl("VHOST_SET_VRING_BUSYLOOP_TIMEOUT", 0x4008_AF23, "1.6").effect("stored, no effect");
    pub(crate) const GET_VRING_BUSYLOOP_TIMEOUT: Self =
        Self::ioctl("VHOST_GET_VRING_BUSYLOOP_TIMEOUT", 0x4008_AF24, "1.6").effect("stored, no effect");
    pub(crate) const SET_BACKEND_FEATURES: Self =
        Self::ioctl("VHOST_SET_BACKEND_FEATURES", 0x4008_AF25, "1.4");
    pub(crate) const GET_BACKEND_FEATURES: Self =
        Self::ioctl("VHOST_GET_BACKEND_FEATURES", 0x8008_AF26, "1.4");
    pub(crate) const NEW_OWNER: Self = Self::ioctl("VHOST_NEW_OWNER", 0x0000_AF27, "8.4");
    pub(crate) const NET_SET_BACKEND: Self =
        Self::ioctl("VHOST_NET_SET_BACKEND", 0x4008_AF30, "1.1").effect("refused");
    pub(crate) const GET_DEVICE_ID: Self = Self::ioctl("VHOST_VDPA_GET_DEVICE_ID", 0x8004_AF70, "1.4");
    pub(crate) const GET_STATUS: Self = Self::ioctl("VHOST_VDPA_GET_STATUS", 0x8001_AF71, "1.5");
    pub(crate) const SET_STATUS: Self = Self::ioctl("VHOST_VDPA_SET_STATUS", 0x4001_AF72, "1.5");
    pub(crate) const GET_CONFIG: Self = Self::ioctl("VHOST_VDPA_GET_CONFIG", 0x8008_AF73, "1.5");
    pub(crate) const SET_CONFIG: Self = Self::ioctl("VHOST_VDPA_SET_CONFIG", 0x4008_AF74, "1.5");
    pub(crate) const SET_VRING_ENABLE: Self = Self::ioctl("VHOST_VDPA_SET_VRING_ENABLE", 0x4008_AF75, "1.6");
    pub(crate) const GET_VRING_NUM: Self = Self::ioctl("VHOST_VDPA_GET_VRING_NUM", 0x8002_AF76, "1.4");
    pub(crate) const SET_CONFIG_CALL: Self = Self::ioctl("VHOST_VDPA_SET_CONFIG_CALL", 0x4004_AF77, "1.5");
    pub(crate) const GET_IOVA_RANGE: Self = Self::ioctl("VHOST_VDPA_GET_IOVA_RANGE", 0x8010_AF78, "1.4");
    pub(crate) const GET_CONFIG_SIZE: Self = Self::ioctl("VHOST_VDPA_GET_CONFIG_SIZE", 0x8004_AF79, "1.5");
    pub(crate) const GET_AS_NUM: Self = Self::ioctl("VHOST_VDPA_GET_AS_NUM", 0x8004_AF7A, "1.4");
    pub(crate) const GET_VRING_GROUP: Self = Self::ioctl("VHOST_VDPA_GET_VRING_GROUP", 0xC008_AF7B, "1.6");
    pub(crate) const SET_GROUP_ASID: Self = Self::ioctl("VHOST_VDPA_SET_GROUP_ASID", 0x4008_AF7C, "1.6");
    pub(crate) const SUSPEND: Self = Self::ioctl("VHOST_VDPA_SUSPEND", 0x0000_AF7D, "1.8");
    pub(crate) const RESUME: Self = Self::ioctl("VHOST_VDPA_RESUME", 0x0000_AF7E, "1.8");
    pub(crate) const GET_VRING_DESC_GROUP: Self =
        Self::ioctl("VHOST_VDPA_GET_VRING_DESC_GROUP", 0xC008_AF7F, "1.6").effect("EOPNOTSUPP");
    pub(crate) const GET_VQS_COUNT: Self = Self::ioctl("VHOST_VDPA_GET_VQS_COUNT", 0x8004_AF80, "1.4");
    pub(crate) const GET_GROUP_NUM: Self = Self::ioctl("VHOST_VDPA_GET_GROUP_NUM", 0x8004_AF81, "1.4");
    pub(crate) const GET_VRING_SIZE: Self =
        Self::ioctl("VHOST_VDPA_GET_VRING_SIZE", 0xC008_AF82, "1.6").effect("EOPNOTSUPP, or see notes");
    pub(crate) const GET_FEATURES_ARRAY: Self =
        Self::ioctl("VHOST_GET_FEATURES_ARRAY", 0x8008_AF83, "1.1").effect("refused");
    pub(crate) const SET_FEATURES_ARRAY: Self =
        Self::ioctl("VHOST_SET_FEATURES_ARRAY", 0x4008_AF83, "1.1").effect("refused");
    pub(crate) const SET_FORK_FROM_OWNER: Self =
        Self::ioctl("VHOST_SET_FORK_FROM_OWNER", 0x4001_AF84, "1.6a");
    pub(crate) const GET_FORK_FROM_OWNER: Self =
        Self::ioctl("VHOST_GET_FORK_FROM_OWNER", 0x8001_AF85, "1.6a");
    pub(crate) const DIRTY_INFO: Self = Self::ioctl("VDPA_DIRTY_INFO", 0x0000_AFE0, "8.9");
    pub(crate) const DIRTY_START: Self = Self::ioctl("VDPA_DIRTY_START", 0x0000_AFE1, "8.9");
    pub(crate) const DIRTY_STOP: Self = Self::ioctl("VDPA_DIRTY_STOP", 0x0000_AFE2, "8.9");
    pub(crate) const DIRTY_GET: Self = Self::ioctl("VDPA_DIRTY_GET", 0x0000_AFE3, "8.9");
    pub(crate) const DIRTY_UNMAP: Self = Self::ioctl("VDPA_DIRTY_UNMAP", 0x0000_AFE4, "8.9");
    pub(crate) const STATE_SAVE: Self = Self::ioctl("VDPA_STATE_SAVE", 0x0000_AFE8, "8.9");
    pub(crate) const STATE_LOAD: Self = Self::ioctl("VDPA_STATE_LOAD", 0x0000_AFE9, "8.9");
    pub(crate) const IOTLB_UPDATE: Self = Self::other("UPDATE", "2.4");
    pub(crate) const IOTLB_INVALIDATE: Self = Self::other("INVALIDATE", "2.5");
    pub(crate) const IOTLB_BATCH_BEGIN: Self = Self::other("BATCH_BEGIN", "2.6");
    pub(crate) const IOTLB_BATCH_END: Self = Self::other("BATCH_END", "2.6");
    pub(crate) const IOTLB_REMAP: Self =
        Self::other("REMAP", "8.5").effect("served by sim-blk, EFAULT on blk");
    pub(crate) const IOTLB_OTHER: Self = Self::other("other messages", "2.3").effect("EFAULT");
    pub(crate) const OPEN: Self = Self::other("open", "4.2");
    pub(crate) const CLOSE: Self = Self::other("close", "4.7");
    pub(crate) const READ: Self = Self::other("read", "1.10").effect("EINVAL");
    pub(crate) const LSEEK: Self = Self::other("lseek", "1.10").effect("ESPIPE");
    pub(crate) const POLL: Self = Self::other("poll, epoll_ctl", "1.10");
    pub(crate) const MMAP: Self = Self::other("mmap", "1.9").effect("no doorbells");
    pub(crate) const UNKNOWN: Self = Self::other("unknown ioctl", "1.1").effect("refused");

    /// Every request, in the order of the matrix.
    pub const ALL: &[Self] = &[
        Self::GET_FEATURES,
        Self::SET_FEATURES,
        Self::SET_OWNER,
        Self::RESET_OWNER,
        Self::SET_MEM_TABLE,
        Self::SET_LOG_BASE,
        Self::SET_LOG_FD,
        Self::NEW_WORKER,
        Self::FREE_WORKER,
        Self::SET_VRING_NUM,
        Self::SET_VRING_ADDR,
        Self::SET_VRING_BASE,
        Self::GET_VRING_BASE,
        Self::SET_VRING_ENDIAN,
        Self::GET_VRING_ENDIAN,
        Self::ATTACH_VRING_WORKER,
        Self::GET_VRING_WORKER,
        Self::SET_VRING_KICK,
        Self::SET_VRING_CALL,
        Self::SET_VRING_ERR,
        Self::SET_VRING_BUSYLOOP_TIMEOUT,
        Self::GET_VRING_BUSYLOOP_TIMEOUT,
        Self::SET_BACKEND_FEATURES,
        Self::GET_BACKEND_FEATURES,
        Self::NEW_OWNER,
        Self::NET_SET_BACKEND,
        Self::GET_DEVICE_ID,
        Self::GET_STATUS,
        Self::SET_STATUS,
        Self::GET_CONFIG,
        Self::SET_CONFIG,
        Self::SET_VRING_ENABLE,
        Self::GET_VRING_NUM,
        Self::SET_CONFIG_CALL,
        Self::GET_IOVA_RANGE,
        Self::GET_CONFIG_SIZE,
        Self::GET_AS_NUM,
        Self::GET_VRING_GROUP,
        Self::SET_GROUP_ASID,
        Self::SUSPEND,
        Self::RESUME,
        Self::GET_VRING_DESC_GROUP,
        Self::GET_VQS_COUNT,
        Self::GET_GROUP_NUM,
        Self::GET_VRING_SIZE,
        Self::GET_FEATURES_ARRAY,
        Self::SET_FEATURES_ARRAY,
        Self::SET_FORK_FROM_OWNER,
        Self::GET_FORK_FROM_OWNER,
        Self::DIRTY_INFO,
        Self::DIRTY_START,
        Self::DIRTY_STOP,
        Self::DIRTY_GET,
        Self::DIRTY_UNMAP,
        Self::STATE_SAVE,
        Self::STATE_LOAD,
        Self::IOTLB_UPDATE,
        Self::IOTLB_INVALIDATE,
        Self::IOTLB_BATCH_BEGIN,
        Self::IOTLB_BATCH_END,
        Self::IOTLB_REMAP,
        Self::IOTLB_OTHER,
        Self::OPEN,
        Self::CLOSE,
        Self::READ,
        Self::LSEEK,
        Self::POLL,
        Self::MMAP,
        Self::UNKNOWN,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `_IOC` of the kernel: direction (1 written, 2 read by the caller), size, type 0xAF, number.
    fn encode(direction: u32, size: u32, number: u32) -> u32 {
        direction << 30 | size << 16 | 0xaf << 8 | number
    }

    #[test]
    fn numbers_are_unique_and_of_the_vhost_type() {
        let mut numbers: Vec<_> = Request::ALL.iter().filter_map(|request| request.number).collect();
        assert!(numbers.iter().all(|number| number >> 8 & 0xff == 0xaf));
        let all = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), all);
    }

    #[test]
    fn numbers_encode_direction_and_size() {
        assert_eq!(Request::GET_FEATURES.number, Some(encode(2, 8, 0x00)));
        assert_eq!(Request::SET_VRING_ADDR.number, Some(encode(1, 40, 0x11)));
        assert_eq!(Request::GET_VRING_BASE.number, Some(encode(3, 8, 0x12)));
        assert_eq!(Request::GET_STATUS.number, Some(encode(2, 1, 0x71)));
        assert_eq!(Request::GET_VRING_NUM.number, Some(encode(2, 2, 0x76)));
        assert_eq!(Request::GET_IOVA_RANGE.number, Some(encode(2, 16, 0x78)));
        assert_eq!(Request::NEW_OWNER.number, Some(encode(0, 0, 0x27)));
    }
}
