//! The requests of a device that moves to another host, which are of this project: its state is saved and loaded.
//!
//! | request | argument | what it does |
//! |---|---|---|
//! | `VDPA_STATE_SAVE` | [`DeviceState`] | copies the state of a device whose queues rest to the caller |
//! | `VDPA_STATE_LOAD` | [`DeviceState`] | makes a device that was reset what another one was |
//!
//! A client looks at the backend feature first (`VHOST_BACKEND_F_DEVICE_STATE`). The numbers are in the table of
//! [`live`](super::live); the argument follows the rules of those of [dirty tracking](super::dirty). What the state is made of
//! is the server's affair: `docs/migration.md`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::dirty::Sized32;
use crate::ioctl::io;
use crate::uapi::vhost::VHOST_VIRTIO;

/// Number of `VDPA_STATE_SAVE`, unless configured otherwise; that of `VDPA_STATE_LOAD` follows.
pub const NUMBER: u8 = 0xe8;

/// The requests, in the order of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Request {
    /// `VDPA_STATE_SAVE`: the owner.
    Save = 0,
    /// `VDPA_STATE_LOAD`: the owner.
    Load = 1,
}

impl Request {
    /// All requests.
    pub const ALL: [Self; 2] = [Self::Save, Self::Load];

    /// The ioctl, where `VDPA_STATE_SAVE` has the number `first` (`_IO`).
    #[must_use]
    pub const fn number(self, first: u8) -> u32 {
        io(VHOST_VIRTIO, first.wrapping_add(self as u8))
    }

    /// The request of an ioctl.
    #[must_use]
    pub fn of(ioctl: u32, first: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|request| request.number(first) == ioctl)
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Save => "VDPA_STATE_SAVE",
            Self::Load => "VDPA_STATE_LOAD",
        }
    }
}

/// Argument of both requests.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DeviceState {
    /// Bytes of the argument.
    pub argsz: u32,
    /// 0.
    pub flags: u32,
    /// Bytes of the buffer. After SAVE: of the state, also where that is `E2BIG` because the buffer is too small.
    pub size: u64,
    /// Address of the buffer.
    pub data: u64,
}

const _: () = {
    assert!(size_of::<DeviceState>() == 24);
    assert!(std::mem::offset_of!(DeviceState, size) == 8);
};

impl Sized32 for DeviceState {
    const MIN: u32 = 24;
    const FLAGS: u32 = 0;

    fn head(&self) -> (u32, u32) {
        (self.argsz, self.flags)
    }

    fn new() -> Self {
        Self { argsz: Self::MIN, flags: 0, size: 0, data: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_the_first() {
        for request in Request::ALL {
            assert_eq!(Request::of(request.number(NUMBER), NUMBER), Some(request));
        }
        assert_eq!(Request::Load.number(NUMBER), 0xafe9);
        assert_eq!(Request::of(0xafea, NUMBER), None);
    }
}
