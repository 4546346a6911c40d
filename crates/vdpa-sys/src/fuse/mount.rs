//! Mounting and unmounting.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use vdpa_core::Errno;

use super::Connection;

/// The file system type in `/proc/self/mountinfo`: FUSE with our subtype.
pub const FS_TYPE: &str = "fuse.vdpad";

/// How a file system is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Allow access by users other than the one who mounts. In a user namespace the kernel still refuses users outside it
    /// (`fuse_allow_current_process()`).
    pub allow_other: bool,
    /// Let the kernel check mode, uid and gid. Without it every user who can access the mount may open a file of mode 0600.
    pub default_permissions: bool,
    /// The source of the mount in `/proc/self/mountinfo`.
    pub fsname: String,
    /// Type and permissions of the root node: a directory, or `S_IFREG` to mount over a single file.
    pub rootmode: u32,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            allow_other: true,
            default_permissions: true,
            fsname: "vdpad".into(),
            rootmode: libc::S_IFDIR | 0o755,
        }
    }
}

/// Why a mount could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// `/dev/fuse` cannot be opened.
    #[error("cannot open /dev/fuse: {errno}; {}", hint(*errno))]
    Device {
        /// The reason.
        errno: Errno,
    },
    /// A text contains a NUL or a comma, which the kernel does not allow there.
    #[error(
        "{what} contains a character that mount options cannot carry (comma, backslash or NUL): {text:?}"
    )]
    Text {
        /// What the text is.
        what: &'static str,
        /// The text.
        text: String,
    },
    /// `mount(2)` failed.
    #[error(
        "cannot mount FUSE at {}: {errno}; mounting takes CAP_SYS_ADMIN in the user namespace of the mount namespace, \
         and a kernel with FUSE", dir.display()
    )]
    Mount {
        /// Mount point.
        dir: PathBuf,
        /// The reason.
        errno: Errno,
    },
    /// `umount2(2)` failed.
    #[error("cannot unmount {}: {errno}", dir.display())]
    Unmount {
        /// Mount point.
        dir: PathBuf,
        /// The reason.
        errno: Errno,
    },
    /// The table of mounts cannot be read.
    #[error("cannot read /proc/self/mountinfo: {message}")]
    Table {
        /// The reason.
        message: String,
    },
}

const fn hint(errno: Errno) -> &'static str {
    match errno.raw() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => "load the module: modprobe fuse",
        libc::EACCES | libc::EPERM => {
            "it must be readable and writable for this user (distributions ship it with mode 0666)"
        }
        _ => "FUSE is not usable on this system",
    }
}

/// Mounts a new FUSE connection at `dir`, which exists. The caller answers INIT next
/// ([`Connection::handshake`]); until then every access to the mount waits.
///
/// # Errors
/// [`MountError`].
pub fn mount(dir: &Path, options: &MountOptions) -> Result<Connection, MountError> {
    if options.fsname.contains([',', '\\', '\0']) {
        return Err(MountError::Text { what: "the file system name", text: options.fsname.clone() });
    }
    let fd = open_device().map_err(|errno| MountError::Device { errno })?;
    let mut data = format!(
        "fd={},rootmode={:o},user_id={},group_id={}",
        fd.as_raw_fd(),
        options.rootmode,
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    if options.default_permissions {
        data.push_str(",default_permissions");
    }
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let data = CString::new(data)
        .map_err(|error| MountError::Text { what: "the mount options", text: error.to_string() })?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let failed = |errno| MountError::Mount { dir: dir.into(), errno };
    rustix::mount::mount(options.fsname.as_str(), dir, FS_TYPE, flags, data.as_c_str())
        .map_err(|error| failed(Errno::from_raw(error.raw_os_error())))?;
    Connection::new(fd).map_err(failed)
}

/// Opens `/dev/fuse`, close-on-exec.
pub(crate) fn open_device() -> Result<std::os::fd::OwnedFd, Errno> {
    rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Errno::from_raw(error.raw_os_error()))
}

/// Ends the mount at `dir`: aborts its connection (waiting callers get `ECONNABORTED`, its server gets
/// `ENODEV`) and removes it from the mount namespace, even while files are open.
///
/// Does not wait for the server, does not need `/sys/fs/fuse/connections`, and works in a user namespace. Does not follow `dir`
/// if it is a symbolic link.
///
/// # Errors
/// `EINVAL` when nothing is mounted there.
pub fn unmount(dir: &Path) -> Result<(), MountError> {
    rustix::mount::unmount(dir, UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).map_err(
        |error| MountError::Unmount { dir: dir.into(), errno: Errno::from_raw(error.raw_os_error()) },
    )
}

/// Removes the mount at `path` from the mount namespace. Open files stay usable: the connection ends when the last open file
/// is closed and the last bind mount is removed.
///
/// # Errors
/// `EINVAL` when nothing is mounted there.
pub fn unmount_lazily(path: &Path) -> Result<(), MountError> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).map_err(|error| {
        MountError::Unmount { dir: path.into(), errno: Errno::from_raw(error.raw_os_error()) }
    })
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Type of the file system.
    pub fs_type: String,
    /// Source: [`MountOptions::fsname`] for a mount of ours.
    pub source: String,
    /// Minor number of its device, which names a FUSE connection; its major number is 0.
    pub minor: u32,
}

/// The type of the file system mounted exactly at `dir`, the topmost one; `None` when it is no mount point.
///
/// # Errors
/// As [`mounted_at`].
pub fn fs_type_at(dir: &Path) -> Result<Option<String>, MountError> {
    Ok(mounted_at(dir)?.map(|mounted| mounted.fs_type))
}

/// The topmost mount exactly at `dir`; `None` when it is no mount point.
///
/// Reads the table of mounts only, so it never waits for a server that hangs. `dir` must be absolute and
/// without symbolic links, as the kernel shows it.
///
/// # Errors
/// [`MountError::Table`].
pub fn mounted_at(dir: &Path) -> Result<Option<Mounted>, MountError> {
    let table =
        fs::read("/proc/self/mountinfo").map_err(|error| MountError::Table { message: error.to_string() })?;
    Ok(find(&String::from_utf8_lossy(&table), &dir.to_string_lossy()))
}

/// The last line for `dir` wins: a later mount covers an earlier one.
fn find(table: &str, dir: &str) -> Option<Mounted> {
    table.lines().rev().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let place = left.split(' ').nth(4)?;
        let minor = left.split(' ').nth(2)?.split_once(':')?.1.parse().ok()?;
        let mut words = right.split(' ');
        let (fs_type, source) = (words.next()?.to_owned(), unescape(words.next()?));
        (unescape(place) == dir).then_some(Mounted { fs_type, source, minor })
    })
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_mount_is_found() {
        let table = "1 0 8:1 / / rw - ext4 /dev/sda rw\n\
                     2 1 0:5 / /run/vdpa\\040x rw shared:7 - tmpfs tmpfs rw\n\
                     3 2 0:6 / /run/vdpa\\040x rw - fuse.vdpad vdpad rw,user_id=0\n";
        let mounted = |fs_type: &str, source: &str, minor| Mounted {
            fs_type: fs_type.into(),
            source: source.into(),
            minor,
        };
        assert_eq!(find(table, "/run/vdpa x"), Some(mounted("fuse.vdpad", "vdpad", 6)));
        assert_eq!(find(table, "/"), Some(mounted("ext4", "/dev/sda", 1)));
        assert_eq!(find(table, "/run"), None);
    }

    #[test]
    fn a_name_cannot_contain_options() {
        let options = MountOptions { fsname: "x,allow_other".into(), ..MountOptions::default() };
        assert!(matches!(mount(Path::new("/"), &options), Err(MountError::Text { .. })));
    }

    #[test]
    fn unmounting_no_mount_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = unmount(dir.path()).unwrap_err();
        assert!(matches!(error, MountError::Unmount { .. }), "{error}");
        assert_eq!(fs_type_at(dir.path()).unwrap(), None);
    }
}
