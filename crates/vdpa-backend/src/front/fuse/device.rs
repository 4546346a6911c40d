//! [`DeviceFile`]: what a file of the mount stands for.

use vdpa_core::Errno;

/// An ioctl as the kernel passes it on.
///
/// The kernel copies exactly `_IOC_SIZE(cmd)` bytes in and out, as the direction bits of `cmd` say. Everything
/// else has to be read from and written to the caller's memory at `arg`.
#[derive(Clone, Copy, Debug)]
pub struct IoctlCall<'a> {
    /// The open it came by: see [`Opener::handle`].
    pub handle: u64,
    /// The caller's *thread* id as the mount sees it; 0 when it is not visible. The caller cannot exit or exec
    /// before it has its answer, so `/proc/TID` look-ups are free of races until then.
    pub tid: u32,
    /// The request number.
    pub cmd: u32,
    /// The third argument, a pointer in the caller for most requests.
    pub arg: u64,
    /// What was at `arg`, for requests with `_IOC_WRITE`; else empty.
    pub input: &'a [u8],
    /// Room for [`IoctlReply::out`]; 0 without `_IOC_READ`.
    pub out_size: u32,
}

/// The answer to an ioctl.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoctlReply {
    /// What the ioctl returns, 0 or positive.
    pub result: i32,
    /// What the kernel copies to `arg`: at most `out_size` bytes. Less is allowed and leaves the rest of the
    /// caller's structure alone (`GET_CONFIG` relies on it).
    pub out: Vec<u8>,
}

impl IoctlReply {
    /// Returns 0 and copies `out`.
    #[must_use]
    pub fn data(out: impl Into<Vec<u8>>) -> Self {
        Self { result: 0, out: out.into() }
    }
}

/// Who opens a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opener {
    /// Names the open in all later calls; not used twice.
    pub handle: u64,
    /// The user, as the mount sees it.
    pub uid: u32,
    /// The thread, in the process-id namespace of the daemon; 0 when it is not visible there. It waits while
    /// [`DeviceFile::open`] runs, and may be gone afterwards.
    pub tid: u32,
    /// `O_*`; any access mode is to be accepted.
    pub flags: u32,
}

/// A device behind a file. All calls for one device come from one thread, in the order the kernel sent them, so
/// that the RELEASE of one open precedes the next OPEN; they may block without disturbing other devices.
///
/// A call that takes longer than [`Options::request_timeout`](super::Options::request_timeout) is answered with
/// `EIO` in its place; its own result is dropped then, and an `open` that succeeds too late is followed by
/// `release`.
pub trait DeviceFile: Send + Sync {
    /// Opens.
    ///
    /// # Errors
    /// `EBUSY` when the device is open already; exclusiveness is the device's business.
    fn open(&self, opener: &Opener) -> Result<(), Errno>;

    /// Closes: the last descriptor of one successful open is gone. Exactly one call for each, also when the
    /// mount is aborted or the file was removed.
    fn release(&self, handle: u64);

    /// Answers an ioctl.
    ///
    /// # Errors
    /// Passed to the caller as they are, numbers of 512 and above included.
    fn ioctl(&self, call: &IoctlCall<'_>) -> Result<IoctlReply, Errno>;

    /// Does what the answer to the last ioctl need not wait for. Called when it was sent.
    fn after_reply(&self) {}

    /// Takes one `write` with all its bytes, up to the mount's largest write. `handle` and `tid` as in [`IoctlCall`].
    ///
    /// The return value is what the caller's `write` returns, except that FUSE cannot report more than was
    /// offered: a larger number is cut to `data.len()`.
    ///
    /// # Errors
    /// Passed to the caller as they are; numbers of 512 and above become `EIO`.
    fn write(&self, handle: u64, tid: u32, data: &[u8]) -> Result<u32, Errno>;

    /// The `POLL*` events that hold now; vhost-vdpa is always ready. Must not block.
    fn poll(&self) -> u32 {
        POLLIN | POLLOUT
    }
}

/// `POLLIN`.
pub const POLLIN: u32 = 0x1;
/// `POLLOUT`.
pub const POLLOUT: u32 = 0x4;
