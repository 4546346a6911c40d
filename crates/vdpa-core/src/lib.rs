//! vhost-vdpa devices without I/O.
#![forbid(unsafe_code)]

pub mod blk;
pub mod device;
pub mod errno;
pub mod features;
pub mod host;
pub mod iotlb;
pub mod ops;
pub mod parent;
pub mod ring;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod types;
pub mod vq;

pub use errno::Errno;
