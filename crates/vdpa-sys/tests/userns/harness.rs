//! Harness of the test programs that start processes of an ordinary user. Shared with the tests of vdpad.
//!
//! Such a program has its own `main`: with an argument that names a role it runs as one of the processes of a test, and
//! without one it runs the tests.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use vdpa_sys::fuse::unmount;

/// The uid and gid of the ordinary user.
pub(crate) const NOBODY: u32 = 65534;

/// Runs `inside` in a new mount namespace in which `/dev/fuse` has this mode. Requires root and a single thread.
pub(crate) fn with_fuse_mode(mode: u32, inside: impl FnOnce()) {
    // SAFETY: the process has one thread, so no other thread stays in the old mount namespace; descriptors and memory
    // are not unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let dir = tempfile::tempdir().unwrap();
    mount("none", dir.path(), "tmpfs", MountFlags::empty(), None::<&std::ffi::CStr>).unwrap();
    let node = dir.path().join("fuse");
    mknodat(CWD, &node, FileType::CharacterDevice, Mode::RWXU, makedev(10, 229)).unwrap();
    fs::set_permissions(&node, fs::Permissions::from_mode(mode)).unwrap();
    mount_bind(&node, "/dev/fuse").unwrap();
    inside();
    unmount(dir.path()).unwrap();
}

/// Runs or lists `tests`, with the part of libtest's command line that cargo and nextest use.
pub(crate) fn run_tests(args: &[&str], tests: &[(&str, fn())]) {
    let ignored = args.contains(&"--ignored");
    let filter = args.iter().find(|arg| !arg.starts_with('-') && **arg != "terse");
    for (name, test) in tests {
        if ignored || !filter.is_none_or(|filter| name.contains(filter)) {
            continue;
        }
        if args.contains(&"--list") {
            println!("{name}: test");
        } else {
            test();
            println!("test {name} ... ok");
        }
    }
}
