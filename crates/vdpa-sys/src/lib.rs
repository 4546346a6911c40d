//! The Linux interfaces of vdpa-live: vhost-vdpa, FUSE, io_uring, guest memory; the only crate with unsafe code.
#![expect(unsafe_code, reason = "this crate is where system interfaces are made safe for all others")]

pub mod fuse;
pub mod uapi;
pub mod uring;
pub mod userns;
