//! Character devices in user space: one open descriptor of `/dev/cuse` is one device in `/dev`.
//!
//! The requests are those of FUSE, about one file without a name or node. The device and its node last as long as the
//! descriptor, in whatever process it is open.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, makedev};
use vdpa_core::Errno;
use zerocopy::IntoBytes;

use super::connection::MIN_MINOR;
use super::{BUFFER_SIZE, Connection, HandshakeError, MAX_WRITE, Negotiated, Operation, fs_type_at};
use crate::uapi::fuse::{CuseInitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION, cuse_flags, init_flags};

/// The device node by which devices are created.
pub const CONTROL: &str = "/dev/cuse";

/// The directory in which the kernel lists the devices of all servers.
const CLASS: &str = "/sys/class/cuse";

/// The protocol in which `FUSE_NOTIFY_RESEND` appeared (Linux 6.9). CUSE_INIT has no flag for it.
const RESEND_MINOR: u32 = 40;

/// Largest length of a device name in bytes: the kernel's buffer for `/proc/devices`, without the NUL.
const NAME_MAX: usize = 63;

/// Device number of a character device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number {
    /// Major number, 1 to 511.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// Why a device could not be created.
#[derive(Debug, thiserror::Error)]
pub enum CuseError {
    /// `/dev/cuse` cannot be opened.
    #[error("cannot open {CONTROL}: {errno}; {}", hint(*errno))]
    Control {
        /// The reason.
        errno: Errno,
    },
    /// `/dev` is not a devtmpfs, so the kernel creates no node there.
    #[error(
        "/dev is no devtmpfs here, so no character devices appear in it (a container, or PrivateDevices= of systemd)"
    )]
    NoDevtmpfs,
    /// The name is not valid for a device.
    #[error(
        "{name:?} is no name of a character device: it must have 1 to {NAME_MAX} letters, digits, and any of \"-._/\""
    )]
    Name {
        /// The name.
        name: String,
    },
    /// A device or another file has this name.
    #[error("there is {} already", path.display())]
    Exists {
        /// Path of the node.
        path: PathBuf,
    },
    /// The handshake with the kernel failed.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The kernel has refused to create the device.
    #[error(
        "the kernel has refused the character device {name} with the number {asked}; its log may say why"
    )]
    Refused {
        /// Name.
        name: String,
        /// Number asked for.
        asked: String,
    },
    /// The device exists, but its node does not.
    #[error("{} did not appear; is /dev a devtmpfs?", path.display())]
    NoNode {
        /// Expected path of the node.
        path: PathBuf,
    },
}

impl CuseError {
    /// Whether loading the kernel module may help.
    #[must_use]
    pub const fn lacks_module(&self) -> bool {
        matches!(self, Self::Control { errno } if matches!(errno.raw(), libc::ENOENT | libc::ENODEV | libc::ENXIO))
    }
}

const fn hint(errno: Errno) -> &'static str {
    match errno.raw() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => "load the module: modprobe cuse",
        libc::EACCES | libc::EPERM => "it is reserved to root",
        _ => "CUSE is not usable on this system",
    }
}

/// Checks that this process can open `/dev/cuse` and that devices appear in `/dev`. Creates no device.
///
/// # Errors
/// [`CuseError::Control`], with what would make it possible; [`CuseError::NoDevtmpfs`].
pub fn available() -> Result<(), CuseError> {
    open_control().map(drop)?;
    // If the table of mounts cannot be read, the creation of a device will show the error.
    match fs_type_at(Path::new("/dev")) {
        Ok(kind) if kind.as_deref() != Some("devtmpfs") => Err(CuseError::NoDevtmpfs),
        _ => Ok(()),
    }
}

fn open_control() -> Result<Connection, CuseError> {
    let refused = |errno| CuseError::Control { errno };
    let fd = rustix::fs::open(CONTROL, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| refused(Errno::from_raw(error.raw_os_error())))?;
    Connection::new(fd).map_err(refused)
}

/// Creates the device `/dev/NAME` with this number. A slash in the name makes a directory; a major number of 0 lets the kernel
/// choose. Ioctls arrive without their argument (`CUSE_UNRESTRICTED_IOCTL`).
///
/// Blocks until the node exists. It belongs to root and has mode 0600, unless rules of udev change that.
///
/// Also returns the number that it has, and what was agreed on.
///
/// # Errors
/// [`CuseError`]; no device exists then.
pub fn create(
    name: &str,
    number: Number,
    timeout: Duration,
) -> Result<(Connection, Number, Negotiated), CuseError> {
    check_name(name)?;
    let path = node(name);
    // The kernel would create the device, but the node of the other device would stay.
    if path.symlink_metadata().is_ok() || number_of(name).is_some() {
        return Err(CuseError::Exists { path });
    }
    let connection = open_control()?;
    let negotiated = announce(&connection, name, number, timeout)?;
    // The kernel creates device and node before the write of the answer returns, or closes the connection.
    let made = number_of(name).ok_or_else(|| CuseError::Refused {
        name: name.into(),
        asked: format!("{}:{}", number.major, number.minor),
    })?;
    let there = fs::symlink_metadata(&path).is_ok_and(|meta| {
        meta.file_type().is_char_device() && meta.rdev() == makedev(made.major, made.minor)
    });
    if there { Ok((connection, made, negotiated)) } else { Err(CuseError::NoNode { path }) }
}

/// Answers CUSE_INIT.
fn announce(
    connection: &Connection,
    name: &str,
    number: Number,
    timeout: Duration,
) -> Result<Negotiated, HandshakeError> {
    let io = |errno| HandshakeError::Io { errno };
    let mut buffer = vec![0; BUFFER_SIZE];
    let request = connection.first_request(&mut buffer, timeout)?;
    let Operation::CuseInit(init) = request.operation else {
        return Err(HandshakeError::NotInit { found: format!("opcode {}", request.header.opcode) });
    };
    if init.major != KERNEL_VERSION || init.minor < MIN_MINOR {
        connection.reply(request.header.unique, Err(Errno::from_raw(libc::EPROTO))).map_err(io)?;
        return Err(HandshakeError::Version { major: init.major, minor: init.minor });
    }
    let negotiated = Negotiated {
        major: KERNEL_VERSION,
        minor: init.minor.min(KERNEL_MINOR_VERSION),
        flags: if init.minor >= RESEND_MINOR { init_flags::HAS_RESEND } else { 0 },
        max_write: MAX_WRITE,
    };
    let answer = CuseInitOut {
        major: negotiated.major,
        minor: negotiated.minor,
        flags: cuse_flags::UNRESTRICTED_IOCTL,
        max_read: MAX_WRITE,
        max_write: MAX_WRITE,
        dev_major: number.major,
        dev_minor: number.minor,
        ..CuseInitOut::default()
    };
    let devname = format!("DEVNAME={name}\0");
    connection.reply(request.header.unique, Ok(&[answer.as_bytes(), devname.as_bytes()])).map_err(io)?;
    Ok(negotiated)
}

fn check_name(name: &str) -> Result<(), CuseError> {
    let fits = (1..=NAME_MAX).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._/".contains(c))
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    if fits { Ok(()) } else { Err(CuseError::Name { name: name.into() }) }
}

/// Path of the node of the device `name`.
#[must_use]
pub fn node(name: &str) -> PathBuf {
    Path::new("/dev").join(name)
}

/// Number of the device `name`; `None` if it does not exist.
#[must_use]
pub fn number_of(name: &str) -> Option<Number> {
    parse_number(&fs::read_to_string(sysfs(name).join("dev")).ok()?)
}

fn parse_number(text: &str) -> Option<Number> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(Number { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// The kernel writes a slash in a device name as an exclamation mark in sysfs.
fn sysfs(name: &str) -> PathBuf {
    Path::new(CLASS).join(OsStr::new(&name.replace('/', "!")))
}

/// Aborts the connection of the device `name`, if the device has this number: waiting callers get `ECONNABORTED`, its server
/// gets `ENODEV`. The node is removed when the server closes its descriptor.
///
/// # Errors
/// `ENOENT` when the device no longer exists; others of writing to sysfs.
pub fn abort(name: &str, number: Number) -> io::Result<()> {
    if number_of(name) != Some(number) {
        return Err(io::ErrorKind::NotFound.into());
    }
    fs::write(sysfs(name).join("abort"), "1")
}

/// Number of unanswered requests of the device `name` with this number; `None` when it no longer exists.
#[must_use]
pub fn waiting(name: &str, number: Number) -> Option<u64> {
    let count = fs::read_to_string(sysfs(name).join("waiting")).ok()?;
    count.trim().parse().ok().filter(|_| number_of(name) == Some(number))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::uapi::fuse::{CuseInitIn, InHeader, opcode};

    const NUMBER: Number = Number { major: 240, minor: 7 };

    /// The answer that a kernel (the other end of a socket) gets for a CUSE_INIT of this protocol version.
    fn answer_to(minor: u32) -> (Result<Negotiated, HandshakeError>, Vec<u8>) {
        let (ours, mut kernel) = UnixStream::pair().unwrap();
        let connection = Connection::new(ours.into()).unwrap();
        let header = InHeader { len: 56, opcode: opcode::CUSE_INIT, unique: 9, ..InHeader::default() };
        let init = CuseInitIn { major: 7, minor, unused: 0, flags: cuse_flags::UNRESTRICTED_IOCTL };
        kernel.write_all(&[header.as_bytes(), init.as_bytes()].concat()).unwrap();
        let result = announce(&connection, "vhost-vdpa-7", NUMBER, Duration::from_secs(5));
        drop(connection);
        let mut answer = Vec::new();
        kernel.read_to_end(&mut answer).unwrap();
        (result, answer)
    }

    #[test]
    fn the_answer_to_cuse_init_byte_by_byte() {
        let (result, answer) = answer_to(41);
        let negotiated = result.unwrap();
        assert!(negotiated.minor == 41 && negotiated.has_resend());
        assert_eq!(Negotiated::from_bytes(&negotiated.to_bytes()), Some(negotiated));
        assert!(!answer_to(39).0.unwrap().has_resend(), "Linux 6.8 cannot send a request again");
        let words: Vec<u32> =
            answer[..88].chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
        // Header: length, error, unique.
        assert_eq!(words[..4], [109, 0, 9, 0]);
        // Version, padding, CUSE_UNRESTRICTED_IOCTL, largest read and write, major and minor number.
        assert_eq!(words[4..12], [7, 41, 0, 1, 65536, 65536, 240, 7]);
        assert_eq!(words[12..], [0; 10]);
        assert_eq!(&answer[88..], b"DEVNAME=vhost-vdpa-7\0");
    }

    #[test]
    fn an_old_kernel_is_refused_with_an_answer() {
        let (result, answer) = answer_to(30);
        assert!(matches!(result, Err(HandshakeError::Version { major: 7, minor: 30 })));
        assert_eq!(answer.len(), 16);
        assert_eq!(i32::from_ne_bytes(answer[4..8].try_into().unwrap()), -libc::EPROTO);
    }

    #[test]
    fn a_request_other_than_cuse_init_is_refused() {
        let (ours, mut kernel) = UnixStream::pair().unwrap();
        let connection = Connection::new(ours.into()).unwrap();
        let header = InHeader { len: 40, opcode: opcode::STATFS, unique: 2, ..InHeader::default() };
        kernel.write_all(header.as_bytes()).unwrap();
        let error = announce(&connection, "vhost-vdpa-0", NUMBER, Duration::from_secs(5)).unwrap_err();
        assert!(matches!(error, HandshakeError::NotInit { .. }), "{error}");
    }

    #[test]
    fn only_names_that_the_kernel_keeps_unchanged_are_accepted() {
        let long = "v".repeat(63);
        for good in ["vhost-vdpa-0", "vhost-vdpa/blk.0", "a_b", long.as_str()] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "v".repeat(64);
        for bad in ["", "/a", "a/", "a//b", "../a", "a/.", "a b", "a\0b", "a\nb", "a,b", "a=b", "ä", &long] {
            assert!(matches!(check_name(bad), Err(CuseError::Name { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_slash_is_a_directory_in_dev_and_an_exclamation_mark_in_sysfs() {
        assert_eq!(node("vhost-vdpa/0"), Path::new("/dev/vhost-vdpa/0"));
        assert_eq!(sysfs("vhost-vdpa/0"), Path::new("/sys/class/cuse/vhost-vdpa!0"));
    }

    #[test]
    fn numbers_are_read_as_sysfs_writes_them() {
        assert_eq!(parse_number("240:7\n"), Some(NUMBER));
        for bad in ["", "240", "240:", ":7", "240:-1", "a:b"] {
            assert_eq!(parse_number(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_missing_device_cannot_be_aborted() {
        let error = abort("no-such-device", NUMBER).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
