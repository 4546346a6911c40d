//! `<linux/fuse.h>`, ABI 7.45: what a file system of device files needs of it.
//!
//! Field names are the header's without their prefixes. All numbers are in host byte order.
#![expect(
    missing_debug_implementations,
    reason = "zerocopy's derive makes a nameless public type for each field"
)]

use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use cuse::{CuseInitIn, CuseInitOut};
pub use numbers::{cuse_flags, init_flags, ioctl_flags, notify, opcode, open_flags, setattr_valid};

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

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident[$size:literal] { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
        pub struct $name { $($(#[$fdoc])* pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

mod cuse;
mod numbers;

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
impl InHeader {
    /// Whether the request was sent before, to a server that may have carried it out without answering.
    #[must_use]
    pub const fn is_resent(&self) -> bool {
        self.unique & UNIQUE_RESEND != 0
    }

    /// The number under which the request came the first time. Answers carry [`unique`](Self::unique), mark included.
    #[must_use]
    pub const fn first_unique(&self) -> u64 {
        self.unique & !UNIQUE_RESEND
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
