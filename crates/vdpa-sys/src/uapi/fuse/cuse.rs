//! The first request of a character device.
#![expect(
    missing_debug_implementations,
    reason = "zerocopy's derive makes a nameless public type for each field"
)]

use zerocopy::{FromBytes, Immutable, IntoBytes};

wire! {
    /// `struct cuse_init_in`.
    CuseInitIn[16] {
        /// Major version.
        major: u32,
        /// Minor version.
        minor: u32,
        /// Padding.
        unused: u32,
        /// See [`cuse_flags`](super::cuse_flags): what the kernel can.
        flags: u32,
    }
}
wire! {
    /// `struct cuse_init_out`; `NAME=VALUE` strings, each with a NUL, follow.
    CuseInitOut[72] {
        /// Major version.
        major: u32,
        /// Minor version.
        minor: u32,
        /// Padding.
        unused: u32,
        /// See [`cuse_flags`](super::cuse_flags).
        flags: u32,
        /// Bytes of the largest read.
        max_read: u32,
        /// Bytes of the largest write.
        max_write: u32,
        /// Major number of the character device, 0 for one of the kernel's choice.
        dev_major: u32,
        /// Minor number of the character device.
        dev_minor: u32,
        /// Padding.
        spare: [u32; 10],
    }
}
