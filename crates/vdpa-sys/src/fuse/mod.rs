//! A low-level FUSE server: mount, decode, answer.
//!
//! It serves device files, so it supports what general libraries do not: the raw `arg` of an ioctl, a connection that a new
//! image of the daemon can adopt without a second INIT, and `RESEND`. Names and nodes are up to the file system above it.

mod connection;
pub mod cuse;
mod mount;
mod request;
mod request_log;
mod waiting;

pub use connection::{Connection, HandshakeError, Negotiated, Readiness};
pub(crate) use mount::open_device;
pub use mount::{
    FS_TYPE, MountError, MountOptions, Mounted, fs_type_at, mount, mounted_at, unmount, unmount_lazily,
};
pub use request::{DecodeError, Forgets, Operation, Request};
pub use request_log::{LeftRequest, RequestLog};
pub use waiting::Connections;

/// Largest write in bytes, as negotiated with the kernel. The messages of vhost-vdpa have 72 bytes; longer writes must reach
/// the server so that it can refuse them.
pub const MAX_WRITE: u32 = 65536;

/// Size of a request buffer in bytes: the largest write or ioctl input with its headers.
pub const BUFFER_SIZE: usize = 65536 + 4096;
