//! The Linux interfaces of vdpa-live: vhost-vdpa, FUSE, io_uring, guest memory.
//!
//! The only crate with unsafe code. Every module that needs it says so at its top and why; what it offers is
//! safe.

pub mod clock;
mod errno;
pub mod eventfd;
pub mod exec;
mod fence;
pub mod fork;
pub mod fuse;
pub mod guest;
pub mod inherit;
pub mod ioctl;
pub mod journal;
pub mod keeper;
pub mod maps;
pub mod memfd;
pub mod mmap;
mod object;
mod prefetch;
pub mod priority;
pub mod process;
pub mod rlimit;
pub mod sigbus;
pub mod signals;
pub mod snapshot;
pub mod space;
pub mod uapi;
pub mod uring;
pub mod userns;
pub mod vhost_vdpa;
