//! Opcodes, flags and notification codes.

/// `enum fuse_opcode`.
pub mod opcode {
    /// Look up a name in a directory.
    pub const LOOKUP: u32 = 1;
    /// Drop lookup counts of one node; has no answer.
    pub const FORGET: u32 = 2;
    /// Read attributes.
    pub const GETATTR: u32 = 3;
    /// Change attributes.
    pub const SETATTR: u32 = 4;
    /// Open a file.
    pub const OPEN: u32 = 14;
    /// Read from a file.
    pub const READ: u32 = 15;
    /// Write to a file.
    pub const WRITE: u32 = 16;
    /// Describe the file system.
    pub const STATFS: u32 = 17;
    /// The last reference to an open file is gone.
    pub const RELEASE: u32 = 18;
    /// Read an extended attribute.
    pub const GETXATTR: u32 = 22;
    /// A descriptor of an open file was closed.
    pub const FLUSH: u32 = 25;
    /// First request of a mount.
    pub const INIT: u32 = 26;
    /// Open a directory.
    pub const OPENDIR: u32 = 27;
    /// List a directory.
    pub const READDIR: u32 = 28;
    /// The last reference to an open directory is gone.
    pub const RELEASEDIR: u32 = 29;
    /// `access(2)`; not sent to mounts with `default_permissions`.
    pub const ACCESS: u32 = 34;
    /// The caller of another request got a signal.
    pub const INTERRUPT: u32 = 36;
    /// Last request of a mount.
    pub const DESTROY: u32 = 38;
    /// `ioctl(2)`.
    pub const IOCTL: u32 = 39;
    /// `poll(2)` and relatives.
    pub const POLL: u32 = 40;
    /// Drop lookup counts of several nodes; has no answer.
    pub const BATCH_FORGET: u32 = 42;
    /// First request of a character device.
    pub const CUSE_INIT: u32 = 4096;
}

/// Flags of `CUSE_INIT`.
pub mod cuse_flags {
    /// `CUSE_UNRESTRICTED_IOCTL`: ioctls come without a copy of their argument, whatever the request number says.
    pub const UNRESTRICTED_IOCTL: u32 = 1 << 0;
}

/// `INIT` flags, bits 0..31 in `flags` and 32..63 in `flags2`.
pub mod init_flags {
    /// `FUSE_BIG_WRITES`: writes of more than one page.
    pub const BIG_WRITES: u64 = 1 << 5;
    /// `FUSE_ATOMIC_O_TRUNC`: `O_TRUNC` comes with OPEN, not as a SETATTR before it.
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    /// `FUSE_NO_OPEN_SUPPORT`: the kernel copes with a server without OPEN. Never asked for: exclusive open
    /// needs OPEN and RELEASE.
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    /// `FUSE_PARALLEL_DIROPS`: look-ups and listings of one directory may run in parallel.
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    /// `FUSE_HANDLE_KILLPRIV_V2`: the server clears set-user-id bits, so that the kernel does not ask for
    /// `security.capability` before each write.
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    /// `FUSE_INIT_EXT`: `flags2` is present.
    pub const INIT_EXT: u64 = 1 << 30;
    /// `FUSE_HAS_RESEND`: unanswered requests can be asked for again by [`super::notify::RESEND`].
    pub const HAS_RESEND: u64 = 1 << 39;
    /// `FUSE_OVER_IO_URING`. Never asked for: its queues do not survive an exec of the server.
    pub const OVER_IO_URING: u64 = 1 << 41;
}

/// `FOPEN_*`: how the kernel treats an open file.
pub mod open_flags {
    /// Every read and write reaches the server as it was made.
    pub const DIRECT_IO: u32 = 1 << 0;
    /// No file position is kept and `lseek` gives `ESPIPE`.
    pub const NONSEEKABLE: u32 = 1 << 2;
    /// The file is a stream: no file position at all.
    pub const STREAM: u32 = 1 << 4;
    /// No FLUSH at close.
    pub const NOFLUSH: u32 = 1 << 5;
}

/// `FUSE_IOCTL_*`: flags of [`IoctlIn`](super::IoctlIn).
pub mod ioctl_flags {
    /// A 32-bit caller on a 64-bit kernel.
    pub const COMPAT: u32 = 1 << 0;
    /// CUSE: the server may ask for other memory of the caller.
    pub const UNRESTRICTED: u32 = 1 << 1;
    /// The file is a directory.
    pub const DIR: u32 = 1 << 4;
}

/// `FATTR_*`: which fields of [`SetattrIn`](super::SetattrIn) count.
pub mod setattr_valid {
    /// `mode`.
    pub const MODE: u32 = 1 << 0;
    /// `uid`.
    pub const UID: u32 = 1 << 1;
    /// `gid`.
    pub const GID: u32 = 1 << 2;
    /// `size`.
    pub const SIZE: u32 = 1 << 3;
    /// `atime`.
    pub const ATIME: u32 = 1 << 4;
    /// `mtime`.
    pub const MTIME: u32 = 1 << 5;
    /// The time is now and not `atime`.
    pub const ATIME_NOW: u32 = 1 << 7;
    /// The time is now and not `mtime`.
    pub const MTIME_NOW: u32 = 1 << 8;
    /// `ctime`.
    pub const CTIME: u32 = 1 << 10;
}

/// `enum fuse_notify_code`: messages of the server's own accord.
pub mod notify {
    /// A poll that was answered "not ready" should be asked again.
    pub const POLL: i32 = 1;
    /// Forget a directory entry.
    pub const INVAL_ENTRY: i32 = 3;
    /// Send every unanswered request again.
    pub const RESEND: i32 = 7;
}
