//! [`DeviceFile`]: what a device does with the system calls on its file.

use vdpa_core::Errno;

/// An ioctl of a client (fuse.h `struct fuse_ioctl_in`).
///
/// The kernel copies exactly `_IOC_SIZE(cmd)` bytes in and out, as the direction bits of `cmd` say. The device reads and writes
/// anything else in the caller's memory at `arg`, through [`Caller`](vdpa_sys::process::Caller).
#[derive(Clone, Copy, Debug)]
pub struct IoctlCall<'a> {
    /// The open that the ioctl was made on: see [`Opener::handle`].
    pub handle: u64,
    /// The caller's *thread* id in the process-id namespace of this process; 0 when it is not visible there. The thread cannot
    /// exit or exec before it has the reply, so that `/proc/TID` stays that of the caller until then.
    pub tid: u32,
    /// The request number.
    pub cmd: u32,
    /// The third argument of `ioctl(2)`: for most requests a pointer in the caller's address space.
    pub arg: u64,
    /// The bytes at `arg` for requests with `_IOC_WRITE`, otherwise empty.
    pub input: &'a [u8],
    /// Maximum length of [`IoctlReply::out`]; 0 without `_IOC_READ`.
    pub out_size: u32,
}

/// The reply to an ioctl that succeeds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoctlReply {
    /// Return value of the ioctl, 0 or positive.
    pub result: i32,
    /// The bytes that the kernel copies to `arg`, at most [`IoctlCall::out_size`]; more become `EIO`. With fewer, the rest
    /// of the caller's structure is unchanged (`GET_CONFIG` relies on that).
    pub out: Vec<u8>,
}

impl IoctlReply {
    /// A reply that returns 0 and copies `out`.
    #[must_use]
    pub fn data(out: impl Into<Vec<u8>>) -> Self {
        Self { result: 0, out: out.into() }
    }
}

/// An open of a device file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opener {
    /// Identifies the open in all later calls. Each number is used once.
    pub handle: u64,
    /// The user who opens, in the user namespace of the mount.
    pub uid: u32,
    /// The thread that opens, in the process-id namespace of this process; 0 when it is not visible there. It waits while
    /// [`DeviceFile::open`] runs, and may have exited afterwards.
    pub tid: u32,
    /// The `O_*` flags of `open(2)`. vhost-vdpa accepts every access mode.
    pub flags: u32,
}

/// A device behind a device file.
///
/// The device's own thread makes all calls, one at a time and in the order in which the kernel sent the requests, so that
/// `release` of one open precedes the next `open`. A method may block without delaying other devices, but not longer than
/// [`Options::request_timeout`](super::Options::request_timeout): the client gets `EIO` then, the result of the call is
/// dropped, and an `open` that succeeds too late is followed by `release`. A panic in a method becomes `EIO`.
pub trait DeviceFile: Send + Sync {
    /// Opens the device. The device itself makes sure that it is opened once at a time, if it wants that.
    ///
    /// # Errors
    /// Passed to the client: `EBUSY` when the device is open already.
    fn open(&self, opener: &Opener) -> Result<(), Errno>;

    /// Closes an open: its last descriptor was closed. Called exactly once for each successful `open`, also when the mount is
    /// aborted or the file was removed.
    fn release(&self, handle: u64);

    /// Handles an ioctl, whose caller waits meanwhile.
    ///
    /// # Errors
    /// Passed to the client unchanged, including numbers of 512 and above, such as `ENOTSUPP` (524).
    fn ioctl(&self, call: &IoctlCall<'_>) -> Result<IoctlReply, Errno>;

    /// Called after the reply to each ioctl was sent, for work that the client need not wait for.
    fn after_reply(&self) {}

    /// Handles one `write(2)` with all its bytes, up to the maximum of the mount. `handle` and `tid` are as in [`IoctlCall`].
    ///
    /// Returns what the client's `write` returns. FUSE cannot report more than the client wrote: a larger number is reduced to
    /// `data.len()`.
    ///
    /// # Errors
    /// Passed to the client unchanged; numbers of 512 and above become `EIO`.
    fn write(&self, handle: u64, tid: u32, data: &[u8]) -> Result<u32, Errno>;

    /// Called before each request, on the same thread, with the number that the kernel gave it. `resent`: a process that died
    /// had read it and not replied. Returns what that process returned for it, if it had executed it: then the request is not
    /// executed again. Does not block.
    fn begin_request(&self, _unique: u64, _resent: bool) -> Option<Completed> {
        None
    }

    /// An ioctl that [`begin_request`](Self::begin_request) has found to be executed is answered, with this reply. Returns the
    /// reply to send.
    ///
    /// # Errors
    /// Passed to the client instead.
    fn answer_again(&self, _call: &IoctlCall<'_>, reply: IoctlReply) -> Result<IoctlReply, Errno> {
        Ok(reply)
    }

    /// Whether the request may be begun, which [`begin_request`](Self::begin_request) has not found to be executed. If not, the
    /// client gets `EIO`: earlier processes had begun it, and died. May wait about a second, for those of other devices.
    fn may_begin(&self, _unique: u64, _resent: bool) -> bool {
        true
    }

    /// The request that was begun has ended.
    fn request_ended(&self) {}

    /// The `POLL*` events that are set now. vhost-vdpa is always ready for both directions, which is the default. Must not
    /// block.
    fn poll(&self) -> u32 {
        POLLIN | POLLOUT
    }
}

/// `POLLIN` of `poll(2)`: readable.
pub const POLLIN: u32 = 0x1;
/// `POLLOUT` of `poll(2)`: writable.
pub const POLLOUT: u32 = 0x4;

/// The result of a request that an earlier process had executed: see [`DeviceFile::begin_request`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completed {
    /// An open succeeded, with this handle.
    Open {
        /// As [`Opener::handle`].
        handle: u64,
    },
    /// An ioctl succeeded.
    Ioctl(IoctlReply),
    /// A write succeeded with this count.
    Write(u32),
    /// A release was executed.
    Release,
}
