//! Structures and numbers of the kernel's headers, one file per header.

pub mod dirty;
pub mod fuse;
pub mod live;
pub(crate) mod proc;
pub mod report;
pub mod vduse;
pub mod vhost;
