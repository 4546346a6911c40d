//! `<linux/fuse.h>`, ABI 7.45: what a file system of device files needs of it.
//!
//! Field names are the header's without their prefixes. All numbers are in host byte order.
#![expect(
    missing_debug_implementations,
    reason = "zerocopy's derive makes a nameless public type for each field"
)]

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// `FUSE_KERNEL_VERSION`.
pub const KERNEL_VERSION: u32 = 7;
/// `FUSE_KERNEL_MINOR_VERSION` these definitions were written from.
pub const KERNEL_MINOR_VERSION: u32 = 45;
/// `FUSE_ROOT_ID`: the node id of the root of the mount.
pub const ROOT_ID: u64 = 1;
/// `FUSE_MIN_READ_BUFFER`: the kernel refuses reads into less.
pub const MIN_READ_BUFFER: usize = 8192;
/// `FUSE_UNIQUE_RESEND`: set in [`InHeader::unique`] of a request that is sent again.
pub const UNIQUE_RESEND: u64 = 1 << 63;

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

/// `FUSE_IOCTL_*`: flags of [`IoctlIn`].
pub mod ioctl_flags {
    /// A 32-bit caller on a 64-bit kernel.
    pub const COMPAT: u32 = 1 << 0;
    /// CUSE: the server may ask for other memory of the caller.
    pub const UNRESTRICTED: u32 = 1 << 1;
    /// The file is a directory.
    pub const DIR: u32 = 1 << 4;
}

/// `FATTR_*`: which fields of [`SetattrIn`] count.
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

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident[$size:literal] { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
        pub struct $name { $($(#[$fdoc])* pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

wire! {
    /// `struct fuse_in_header`: begins every request.
    InHeader[40] {
        /// Bytes of the request, this header included.
        len: u32,
        /// See [`opcode`].
        opcode: u32,
        /// Identifies the request in its answer.
        unique: u64,
        /// The node the request is about.
        nodeid: u64,
        /// Caller's fsuid in the user namespace of the mount.
        uid: u32,
        /// Caller's fsgid in the user namespace of the mount.
        gid: u32,
        /// Caller's *thread* id in the pid namespace of the mount; 0 when there is none or it is not visible.
        pid: u32,
        /// Length of extensions in units of 8 bytes; 0 without negotiation.
        total_extlen: u16,
        /// Padding.
        padding: u16,
    }
}
wire! {
    /// `struct fuse_out_header`: begins every answer and notification.
    OutHeader[16] {
        /// Bytes of the answer, this header included.
        len: u32,
        /// 0, or a negative errno above -512; for notifications the code.
        error: i32,
        /// The request's, 0 for notifications.
        unique: u64,
    }
}
wire! {
    /// `struct fuse_init_in`. Kernels before 7.36 send only the first 16 bytes.
    InitIn[64] {
        /// Major version.
        major: u32,
        /// Minor version.
        minor: u32,
        /// Read-ahead limit.
        max_readahead: u32,
        /// See [`init_flags`].
        flags: u32,
        /// Upper half of the flags, valid with `INIT_EXT`.
        flags2: u32,
        /// Padding.
        unused: [u32; 11],
    }
}
wire! {
    /// `struct fuse_init_out`.
    InitOut[64] {
        /// Major version.
        major: u32,
        /// Minor version.
        minor: u32,
        /// Read-ahead limit.
        max_readahead: u32,
        /// See [`init_flags`].
        flags: u32,
        /// How many background requests (RELEASE is one) may be unanswered before further ones wait.
        max_background: u16,
        /// When the mount counts as congested.
        congestion_threshold: u16,
        /// Bytes of the largest write.
        max_write: u32,
        /// Granularity of time stamps in ns.
        time_gran: u32,
        /// Pages of the largest request, with `FUSE_MAX_PAGES`.
        max_pages: u16,
        /// DAX only.
        map_alignment: u16,
        /// Upper half of the flags.
        flags2: u32,
        /// Stacking depth, passthrough only.
        max_stack_depth: u32,
        /// Seconds until the kernel aborts the mount for an unanswered request; 0 = never.
        request_timeout: u16,
        /// Padding.
        unused: [u16; 11],
    }
}
wire! {
    /// `struct fuse_attr`.
    Attr[88] {
        /// Inode number.
        ino: u64,
        /// Bytes.
        size: u64,
        /// 512-byte blocks.
        blocks: u64,
        /// Access time, s.
        atime: u64,
        /// Modification time, s.
        mtime: u64,
        /// Change time, s.
        ctime: u64,
        /// Access time, ns.
        atimensec: u32,
        /// Modification time, ns.
        mtimensec: u32,
        /// Change time, ns.
        ctimensec: u32,
        /// Type and permissions, `S_IF*`.
        mode: u32,
        /// Links.
        nlink: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Device number.
        rdev: u32,
        /// Preferred I/O size.
        blksize: u32,
        /// `FUSE_ATTR_*`.
        flags: u32,
    }
}
wire! {
    /// `struct fuse_entry_out`: answers LOOKUP.
    EntryOut[128] {
        /// Node id, 0 for "no such name".
        nodeid: u64,
        /// Distinguishes reuses of a node id.
        generation: u64,
        /// How long the name may be cached, s.
        entry_valid: u64,
        /// How long the attributes may be cached, s.
        attr_valid: u64,
        /// The same, ns.
        entry_valid_nsec: u32,
        /// The same, ns.
        attr_valid_nsec: u32,
        /// Attributes.
        attr: Attr,
    }
}
wire! {
    /// `struct fuse_attr_out`: answers GETATTR and SETATTR.
    AttrOut[104] {
        /// How long the attributes may be cached, s.
        attr_valid: u64,
        /// The same, ns.
        attr_valid_nsec: u32,
        /// Padding.
        dummy: u32,
        /// Attributes.
        attr: Attr,
    }
}
wire! {
    /// `struct fuse_forget_in`.
    ForgetIn[8] {
        /// How many look-ups to take back.
        nlookup: u64,
    }
}
wire! {
    /// `struct fuse_forget_one`.
    ForgetOne[16] {
        /// Node.
        nodeid: u64,
        /// How many look-ups to take back.
        nlookup: u64,
    }
}
wire! {
    /// `struct fuse_batch_forget_in`; [`ForgetOne`] follow.
    BatchForgetIn[8] {
        /// How many follow.
        count: u32,
        /// Padding.
        dummy: u32,
    }
}
wire! {
    /// `struct fuse_getattr_in`.
    GetattrIn[16] {
        /// `FUSE_GETATTR_FH`: `fh` is valid.
        getattr_flags: u32,
        /// Padding.
        dummy: u32,
        /// Open file.
        fh: u64,
    }
}
wire! {
    /// `struct fuse_setattr_in`.
    SetattrIn[88] {
        /// See [`setattr_valid`].
        valid: u32,
        /// Padding.
        padding: u32,
        /// Open file.
        fh: u64,
        /// Bytes.
        size: u64,
        /// Owner of locks.
        lock_owner: u64,
        /// Access time, s.
        atime: u64,
        /// Modification time, s.
        mtime: u64,
        /// Change time, s.
        ctime: u64,
        /// Access time, ns.
        atimensec: u32,
        /// Modification time, ns.
        mtimensec: u32,
        /// Change time, ns.
        ctimensec: u32,
        /// Permissions.
        mode: u32,
        /// Padding.
        unused4: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Padding.
        unused5: u32,
    }
}
wire! {
    /// `struct fuse_open_in`.
    OpenIn[8] {
        /// `O_*` of the caller without `O_CREAT`, `O_EXCL` and `O_NOCTTY`.
        flags: u32,
        /// `FUSE_OPEN_*`.
        open_flags: u32,
    }
}
wire! {
    /// `struct fuse_open_out`.
    OpenOut[16] {
        /// The server's name of the open file.
        fh: u64,
        /// See [`open_flags`].
        open_flags: u32,
        /// Passthrough only.
        backing_id: i32,
    }
}
wire! {
    /// `struct fuse_release_in`.
    ReleaseIn[24] {
        /// Open file.
        fh: u64,
        /// `O_*`.
        flags: u32,
        /// `FUSE_RELEASE_*`.
        release_flags: u32,
        /// Owner of locks.
        lock_owner: u64,
    }
}
wire! {
    /// `struct fuse_flush_in`.
    FlushIn[24] {
        /// Open file.
        fh: u64,
        /// Padding.
        unused: u32,
        /// Padding.
        padding: u32,
        /// Owner of locks.
        lock_owner: u64,
    }
}
wire! {
    /// `struct fuse_read_in`.
    ReadIn[40] {
        /// Open file or directory.
        fh: u64,
        /// Position; for a directory the cookie of the last entry seen.
        offset: u64,
        /// Room in the caller's buffer.
        size: u32,
        /// `FUSE_READ_*`.
        read_flags: u32,
        /// Owner of locks.
        lock_owner: u64,
        /// `O_*`.
        flags: u32,
        /// Padding.
        padding: u32,
    }
}
wire! {
    /// `struct fuse_write_in`; the data follows.
    WriteIn[40] {
        /// Open file.
        fh: u64,
        /// Position; means nothing for a stream.
        offset: u64,
        /// Bytes of data.
        size: u32,
        /// `FUSE_WRITE_*`.
        write_flags: u32,
        /// Owner of locks.
        lock_owner: u64,
        /// `O_*`.
        flags: u32,
        /// Padding.
        padding: u32,
    }
}
wire! {
    /// `struct fuse_write_out`.
    WriteOut[8] {
        /// Bytes taken. More than were offered makes the caller's write fail with `EIO`
        /// (`fuse_send_write()`).
        size: u32,
        /// Padding.
        padding: u32,
    }
}
wire! {
    /// `struct fuse_kstatfs`: answers STATFS (`struct fuse_statfs_out`).
    Kstatfs[80] {
        /// Blocks.
        blocks: u64,
        /// Free blocks.
        bfree: u64,
        /// Free blocks for everybody.
        bavail: u64,
        /// Inodes.
        files: u64,
        /// Free inodes.
        ffree: u64,
        /// Preferred I/O size.
        bsize: u32,
        /// Longest name.
        namelen: u32,
        /// Bytes of a block.
        frsize: u32,
        /// Padding.
        padding: u32,
        /// Padding.
        spare: [u32; 6],
    }
}
wire! {
    /// `struct fuse_getxattr_in`; the name follows.
    GetxattrIn[8] {
        /// Room in the caller's buffer; 0 asks for the length.
        size: u32,
        /// Padding.
        padding: u32,
    }
}
wire! {
    /// `struct fuse_access_in`.
    AccessIn[8] {
        /// `R_OK`, `W_OK`, `X_OK`.
        mask: u32,
        /// Padding.
        padding: u32,
    }
}
wire! {
    /// `struct fuse_interrupt_in`.
    InterruptIn[8] {
        /// The request whose caller got a signal.
        unique: u64,
    }
}
wire! {
    /// `struct fuse_ioctl_in`; the input follows.
    IoctlIn[32] {
        /// Open file.
        fh: u64,
        /// See [`ioctl_flags`].
        flags: u32,
        /// The request number.
        cmd: u32,
        /// The third argument as the caller gave it, a pointer for most requests.
        arg: u64,
        /// Bytes of input, `_IOC_SIZE` when the direction has `_IOC_WRITE`.
        in_size: u32,
        /// Room for output, `_IOC_SIZE` when the direction has `_IOC_READ`.
        out_size: u32,
    }
}
wire! {
    /// `struct fuse_ioctl_out`; the output follows.
    IoctlOut[16] {
        /// What the ioctl returns; a negative errno is passed on, also one of 512 and above.
        result: i32,
        /// `FUSE_IOCTL_RETRY`, CUSE only.
        flags: u32,
        /// CUSE only.
        in_iovs: u32,
        /// CUSE only.
        out_iovs: u32,
    }
}
wire! {
    /// `struct fuse_poll_in`.
    PollIn[24] {
        /// Open file.
        fh: u64,
        /// What [`notify::POLL`] names.
        kh: u64,
        /// `FUSE_POLL_SCHEDULE_NOTIFY`.
        flags: u32,
        /// Wanted events.
        events: u32,
    }
}
wire! {
    /// `struct fuse_poll_out`.
    PollOut[8] {
        /// `POLL*`.
        revents: u32,
        /// Padding.
        padding: u32,
    }
}
wire! {
    /// `struct fuse_dirent`; the name follows, padded to 8 bytes.
    Dirent[24] {
        /// Inode number.
        ino: u64,
        /// Cookie to continue after this entry.
        off: u64,
        /// Bytes of the name.
        namelen: u32,
        /// `DT_*`.
        kind: u32,
    }
}
wire! {
    /// `struct fuse_notify_inval_entry_out`; the name and a NUL follow.
    NotifyInvalEntryOut[16] {
        /// Directory.
        parent: u64,
        /// Bytes of the name without its NUL.
        namelen: u32,
        /// `FUSE_EXPIRE_ONLY`.
        flags: u32,
    }
}
