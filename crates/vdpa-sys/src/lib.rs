//! The Linux interfaces of vdpa-live: vhost-vdpa, FUSE, io_uring, guest memory.
//!
//! The only crate with unsafe code. Each module that needs it states the reason at its top. All interfaces are safe unless
//! they are marked `unsafe`.

pub mod clock;
mod dma;
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
pub mod maps;
pub mod memfd;
pub mod mm_reaper;
pub mod mmap;
mod object;
pub mod open_mark;
mod prefetch;
pub mod priority;
pub mod process;
pub mod rlimit;
pub mod shared_words;
pub mod sigbus;
pub mod signals;
pub mod snapshot;
pub mod space;
pub mod stable;
#[cfg(feature = "test-utils")]
pub mod testing;
pub mod thread_state;
pub mod uapi;
pub mod uring;
pub mod userns;
pub mod vhost_vdpa;
#[cfg(feature = "vm-memory")]
mod vm_memory;
