//! The Linux interfaces of vdpa-live: vhost-vdpa, VDUSE, FUSE, io_uring, guest memory.
//!
//! What only servers of devices use (FUSE, io_uring, journals, snapshots, namespaces) is behind the feature `server`.
//!
//! The only crate with unsafe code. Each module that needs it states the reason at its top. All interfaces are safe unless
//! they are marked `unsafe`.

pub mod clock;
#[cfg(feature = "server")]
pub mod dirty;
mod dma;
mod errno;
pub mod eventfd;
pub mod exec;
mod fence;
pub mod fork;
#[cfg(feature = "server")]
pub mod fuse;
pub mod guest;
#[cfg(feature = "server")]
pub mod image_lock;
pub mod inherit;
pub mod ioctl;
#[cfg(feature = "server")]
pub mod journal;
#[cfg(feature = "server")]
pub mod machine;
pub mod maps;
pub mod memfd;
pub mod mm_reaper;
pub mod mmap;
mod object;
mod object_file;
#[cfg(feature = "server")]
mod ofd;
#[cfg(feature = "server")]
pub mod open_mark;
#[cfg(feature = "server")]
pub mod peer;
#[cfg(feature = "server")]
mod prefetch;
pub mod priority;
pub mod process;
pub mod rlimit;
#[cfg(feature = "server")]
pub mod shared_words;
pub mod sigbus;
#[cfg(feature = "server")]
pub mod signals;
#[cfg(feature = "server")]
pub mod sigsys;
#[cfg(feature = "server")]
pub mod snapshot;
pub mod space;
pub mod stable;
#[cfg(feature = "server")]
pub mod tap;
#[cfg(feature = "test-utils")]
pub mod testing;
#[cfg(feature = "server")]
pub mod thread_state;
pub mod uapi;
#[cfg(feature = "server")]
pub mod uring;
#[cfg(feature = "server")]
pub mod userns;
pub mod vduse;
pub mod vhost_vdpa;
#[cfg(feature = "vm-memory")]
mod vm_memory;
