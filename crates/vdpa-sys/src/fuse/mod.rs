//! A low-level FUSE server: mount, decode, answer.
//!
//! Made for device files, so it has what general libraries lack: the raw `arg` of an ioctl, a connection that
//! a new image of the daemon can adopt without a second INIT, and `RESEND`. It knows nothing of names and
//! nodes; those are the file system's.

mod connection;
pub mod cuse;
mod mount;
mod request;
mod waiting;

pub use connection::{Connection, HandshakeError, Negotiated, Readiness};
pub(crate) use mount::open_device;
pub use mount::{
    FS_TYPE, MountError, MountOptions, Mounted, fs_type_at, mount, mounted_at, unmount, unmount_lazily,
};
pub use request::{DecodeError, Forgets, Operation, Request};
pub use waiting::Connections;

/// Bytes of the largest write the kernel is told to send. The messages of the interface have 72 bytes; the
/// rest is room for what a curious caller writes.
pub const MAX_WRITE: u32 = 65536;

/// Bytes a request buffer needs: the largest write or ioctl input with its headers.
pub const BUFFER_SIZE: usize = 65536 + 4096;
