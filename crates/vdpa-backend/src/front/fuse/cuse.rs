//! Character devices by CUSE: everything in which it differs from FUSE.
//!
//! Each device is a connection of its own, and there is no directory to serve. An ioctl arrives without its argument, which is
//! read from and written to the caller's memory at the moment at which the kernel's vhost-vdpa would.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::{debug, warn};
use vdpa_core::Errno;
use vdpa_sys::fuse::cuse::{self, CuseError, Number};
use vdpa_sys::fuse::{Connection, Negotiated};
use vdpa_sys::process::Caller;

use super::device::{Completed, DeviceFile, IoctlCall, IoctlReply, Opener};
use super::session::{Endpoint, Link, Session};
use super::tree::AddError;
use crate::front::watchdog::protocol::Watched;

/// The node id in requests about a character device.
const NODE: u64 = 0;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The kernel removes a device that was closed within this time, unless the device's thread hangs.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(2);

/// Checks whether character devices can be created. Runs `modprobe cuse` when the module is missing, and blocks until that has
/// ended.
///
/// # Errors
/// [`CuseError::Control`], whose text has the remedy; [`CuseError::NoDevtmpfs`].
pub fn available() -> Result<(), CuseError> {
    let Err(error) = cuse::available() else { return Ok(()) };
    if !error.lacks_module() {
        return Err(error);
    }
    let modprobe =
        Command::new("modprobe").args(["-q", "cuse"]).stdin(Stdio::null()).stderr(Stdio::null()).status();
    debug!(?modprobe, "tried to load the module cuse");
    cuse::available()
}

/// The prefix of the names of devices in `dir`, relative to `/dev`: "" for `/dev`, `a/` for `/dev/a`. `None` for a directory
/// outside of `/dev`, where CUSE cannot create devices.
#[must_use]
pub fn prefix_of(dir: &Path) -> Option<String> {
    let inside = dir.strip_prefix("/dev").ok()?.to_str()?;
    let plain = inside.split('/').all(|part| part != "..");
    plain.then(|| if inside.is_empty() { String::new() } else { format!("{inside}/") })
}

/// A character device that this process serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    name: String,
    number: Number,
}

impl Node {
    pub(super) fn watched(&self) -> Watched {
        Watched::Device { name: self.name.clone(), number: self.number }
    }

    /// Path of the device node.
    pub(super) fn path(&self) -> PathBuf {
        cuse::node(&self.name)
    }

    /// Removes the node from `/dev`, for a device that is still open. The kernel tolerates that the node is missing later.
    pub(super) fn hide(&self) {
        if cuse::number_of(&self.name) != Some(self.number) {
            return;
        }
        if let Err(error) = fs::remove_file(self.path()) {
            warn!(node = %self.path().display(), %error, "the node of a removed device stays until it is closed");
        }
    }

    /// Blocks until the kernel has removed the device, at most [`REMOVAL_TIMEOUT`].
    pub(super) fn wait_gone(&self) {
        let deadline = Instant::now() + REMOVAL_TIMEOUT;
        while cuse::number_of(&self.name) == Some(self.number) {
            if Instant::now() > deadline {
                return warn!(node = %self.path().display(), "the device is not gone yet");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Creates the character devices of a server.
#[derive(Debug)]
pub(super) struct NodeFactory {
    prefix: String,
    /// The major number that all share, once the kernel has chosen it: DPDK takes the first line of `/proc/devices` that
    /// begins with "vhost-vdpa" for that of every vhost-vdpa device.
    major: Mutex<Option<u32>>,
}

impl NodeFactory {
    pub(super) fn new(prefix: String) -> Self {
        Self { prefix, major: Mutex::default() }
    }

    /// Creates the device `name` below the directory. Its minor number is the number that its name ends in.
    pub(super) fn create(&self, name: &str, file: Arc<dyn DeviceFile>) -> Result<Arc<Session>, AddError> {
        let minor = minor_of(name);
        let full = format!("{}{name}", self.prefix);
        let mut major = self.major.lock();
        let number = |major: Option<u32>| Number { major: major.unwrap_or(0), minor };
        let mut created = cuse::create(&full, number(*major), HANDSHAKE_TIMEOUT);
        if major.is_some() && matches!(created, Err(CuseError::Refused { .. })) {
            // When the last device was removed, another driver may have got the number.
            warn!(device = full, major = *major, "the major number is taken: asking for another one");
            created = cuse::create(&full, number(None), HANDSHAKE_TIMEOUT);
        }
        let (connection, number, negotiated) = created.map_err(|error| match error {
            CuseError::Name { name } => AddError::Name { name },
            CuseError::Exists { .. } => AddError::Exists { name: name.into() },
            other => AddError::Create { reason: other.to_string() },
        })?;
        *major = Some(number.major);
        let endpoint = Endpoint::Device(Node { name: full, number });
        let link = Link { connection, endpoint, negotiated };
        Ok(Session::one_file(link, NODE, name, Arc::new(CopyingFile(file))))
    }

    /// Continues the device `name`, which an earlier process has created.
    pub(super) fn adopt(
        &self,
        name: &str,
        file: Arc<dyn DeviceFile>,
        connection: Connection,
        negotiated: Negotiated,
    ) -> Result<Arc<Session>, AddError> {
        let full = format!("{}{name}", self.prefix);
        let number = cuse::number_of(&full)
            .ok_or_else(|| AddError::Create { reason: format!("the character device {full} is gone") })?;
        *self.major.lock() = Some(number.major);
        let link = Link { connection, endpoint: Endpoint::Device(Node { name: full, number }), negotiated };
        Ok(Session::one_file(link, NODE, name, Arc::new(CopyingFile(file))))
    }
}

fn minor_of(name: &str) -> u32 {
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    name.get(name.len() - digits..).and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// A device file whose ioctls arrive without their arguments (`FUSE_IOCTL_UNRESTRICTED`): copies them from and to the caller's
/// memory, and calls the device as FUSE would.
struct CopyingFile(Arc<dyn DeviceFile>);

impl DeviceFile for CopyingFile {
    fn open(&self, opener: &Opener) -> Result<(), Errno> {
        self.0.open(opener)
    }

    fn release(&self, handle: u64) {
        self.0.release(handle);
    }

    fn ioctl(&self, call: &IoctlCall<'_>) -> Result<IoctlReply, Errno> {
        let (input_size, out_size) = sizes(call.cmd);
        let caller = Caller::new(i32::try_from(call.tid).unwrap_or(0));
        let mut input = vec![0; input_size];
        // An argument that cannot be read is no error until the device uses it.
        if input_size > 0
            && caller
                .as_ref()
                .map_or(Err(Errno::FAULT), |caller| caller.read_mem(call.arg, &mut input))
                .is_err()
        {
            input.clear();
        }
        let reply = self.0.ioctl(&IoctlCall { input: &input, out_size, ..*call })?;
        copy_out(call, caller, reply)
    }

    fn begin_request(&self, unique: u64, resent: bool) -> Option<Completed> {
        self.0.begin_request(unique, resent)
    }

    fn answer_again(&self, call: &IoctlCall<'_>, reply: IoctlReply) -> Result<IoctlReply, Errno> {
        let (_, out_size) = sizes(call.cmd);
        let reply = self.0.answer_again(&IoctlCall { out_size, ..*call }, reply)?;
        copy_out(call, Caller::new(i32::try_from(call.tid).unwrap_or(0)), reply)
    }

    fn after_reply(&self) {
        self.0.after_reply();
    }

    fn write(&self, handle: u64, tid: u32, data: &[u8]) -> Result<u32, Errno> {
        self.0.write(handle, tid, data)
    }

    fn poll(&self) -> u32 {
        self.0.poll()
    }
}

/// Copies the answer to the caller's memory.
fn copy_out(
    call: &IoctlCall<'_>,
    caller: Result<Caller, Errno>,
    reply: IoctlReply,
) -> Result<IoctlReply, Errno> {
    if !reply.out.is_empty() {
        caller?.write_mem(call.arg, &reply.out)?;
    }
    Ok(IoctlReply { out: Vec::new(), ..reply })
}

/// Bytes that FUSE would copy in and out for a request number: `_IOC_SIZE`, as its direction says.
fn sizes(cmd: u32) -> (usize, u32) {
    const WRITE: u32 = 1 << 30;
    const READ: u32 = 1 << 31;
    let size = cmd >> 16 & 0x3FFF;
    let input = if cmd & WRITE != 0 { size as usize } else { 0 };
    (input, if cmd & READ != 0 { size } else { 0 })
}

#[cfg(test)]
mod tests {
    use vdpa_sys::uapi::vhost as uapi;

    use super::*;

    #[test]
    fn names_follow_the_directory() {
        let prefix = |dir: &str| prefix_of(Path::new(dir));
        assert_eq!(prefix("/dev").as_deref(), Some(""));
        assert_eq!(prefix("/dev/").as_deref(), Some(""));
        assert_eq!(prefix("/dev/vhost-vdpa/a").as_deref(), Some("vhost-vdpa/a/"));
        for elsewhere in ["/run/vdpad/dev", "dev", "/device", "/", "/dev/../run"] {
            assert_eq!(prefix(elsewhere), None, "{elsewhere}");
        }
    }

    #[test]
    fn the_minor_number_is_that_of_the_name() {
        for (name, minor) in [("vhost-vdpa-0", 0), ("vhost-vdpa-12", 12), ("a1b", 0), ("7", 7), ("", 0)] {
            assert_eq!(minor_of(name), minor, "{name}");
        }
    }

    #[test]
    fn arguments_have_the_size_and_direction_of_their_request() {
        assert_eq!(sizes(uapi::VHOST_SET_OWNER), (0, 0));
        assert_eq!(sizes(uapi::VHOST_SET_VRING_ADDR), (40, 0));
        assert_eq!(sizes(uapi::VHOST_GET_VRING_BASE), (8, 8));
        assert_eq!(sizes(uapi::VHOST_VDPA_GET_VRING_NUM), (0, 2));
        assert_eq!(sizes(0x5401), (0, 0));
    }

    /// A device that returns its input twice, or says how much it got.
    struct Echo;

    impl DeviceFile for Echo {
        fn open(&self, _: &Opener) -> Result<(), Errno> {
            Ok(())
        }
        fn release(&self, _: u64) {}
        fn ioctl(&self, call: &IoctlCall<'_>) -> Result<IoctlReply, Errno> {
            let out: Vec<u8> = call.input.iter().rev().copied().collect();
            Ok(IoctlReply { result: i32::try_from(call.input.len()).unwrap(), out })
        }
        fn write(&self, _: u64, _: u32, _: &[u8]) -> Result<u32, Errno> {
            Err(Errno::INVAL)
        }
    }

    /// The calling thread of these calls is this one.
    fn call(cmd: u32, arg: u64) -> Result<IoctlReply, Errno> {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        CopyingFile(Arc::new(Echo)).ioctl(&IoctlCall { handle: 0, tid, cmd, arg, input: &[], out_size: 0 })
    }

    /// A device that notes what it is asked.
    #[derive(Default)]
    struct Notes(Mutex<Vec<&'static str>>);

    impl DeviceFile for Notes {
        fn open(&self, _: &Opener) -> Result<(), Errno> {
            self.0.lock().push("open");
            Ok(())
        }
        fn release(&self, _: u64) {
            self.0.lock().push("release");
        }
        fn ioctl(&self, _call: &IoctlCall<'_>) -> Result<IoctlReply, Errno> {
            self.0.lock().push("ioctl");
            Ok(IoctlReply::default())
        }
        fn after_reply(&self) {
            self.0.lock().push("after_reply");
        }
        fn write(&self, _: u64, _: u32, _: &[u8]) -> Result<u32, Errno> {
            self.0.lock().push("write");
            Ok(0)
        }
        fn begin_request(&self, _: u64, _: bool) -> Option<Completed> {
            self.0.lock().push("begin_request");
            Some(Completed::Release)
        }
        fn answer_again(&self, _: &IoctlCall<'_>, reply: IoctlReply) -> Result<IoctlReply, Errno> {
            self.0.lock().push("answer_again");
            Ok(reply)
        }
        fn poll(&self) -> u32 {
            self.0.lock().push("poll");
            0
        }
    }

    /// Methods with a default too, which a wrapper forgets without a word of the compiler.
    #[test]
    fn every_call_reaches_the_device() {
        let notes = Arc::new(Notes::default());
        let file = CopyingFile(Arc::clone(&notes) as _);
        let call = IoctlCall { handle: 1, tid: 0, cmd: 0xAF01, arg: 0, input: &[], out_size: 0 };
        file.open(&Opener { handle: 1, uid: 0, tid: 0, flags: 0 }).unwrap();
        assert_eq!(file.begin_request(1, true), Some(Completed::Release));
        file.answer_again(&call, IoctlReply::default()).unwrap();
        file.ioctl(&call).unwrap();
        file.after_reply();
        file.write(1, 0, &[]).unwrap();
        assert_eq!(file.poll(), 0);
        file.release(1);
        assert_eq!(
            *notes.0.lock(),
            ["open", "begin_request", "answer_again", "ioctl", "after_reply", "write", "poll", "release"]
        );
    }

    /// The answer that a crash has kept is written to the caller's memory, as the first one would have been.
    #[test]
    fn an_answer_that_is_repeated_is_copied_too() {
        let mut buffer = [0_u8; 8];
        let arg = std::hint::black_box(&mut buffer).as_mut_ptr().expose_provenance() as u64;
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        let call =
            IoctlCall { handle: 0, tid, cmd: uapi::VHOST_GET_VRING_BASE, arg, input: &[], out_size: 0 };
        let kept = IoctlReply { result: 3, out: (1..=8).collect() };
        let reply = CopyingFile(Arc::new(Echo)).answer_again(&call, kept).unwrap();
        assert_eq!(reply, IoctlReply { result: 3, out: Vec::new() });
        assert_eq!(std::hint::black_box(&buffer), &[1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn arguments_are_read_and_written_where_the_caller_has_them() {
        let mut buffer: [u8; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        let arg = std::hint::black_box(&mut buffer).as_mut_ptr().expose_provenance() as u64;
        let reply = call(uapi::VHOST_GET_VRING_BASE, arg).unwrap();
        assert_eq!(reply, IoctlReply { result: 8, out: Vec::new() });
        // Written by the kernel, behind the compiler's back.
        assert_eq!(std::hint::black_box(&buffer), &[8, 7, 6, 5, 4, 3, 2, 1, 9]);
    }

    #[test]
    fn an_argument_that_cannot_be_read_is_the_device_s_to_refuse() {
        assert_eq!(call(uapi::VHOST_SET_VRING_ADDR, 8), Ok(IoctlReply::default()));
    }
}
