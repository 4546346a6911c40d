//! User namespaces as an ordinary user gets them. Run as root, which starts processes of user nobody.
//!
//! This program is also every process of its tests: the first argument names the role. The tests are at the end.
#![expect(unsafe_code, reason = "a mount namespace for the test itself")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "userns/harness.rs"]
mod harness;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::process::{getgid, getuid};
use vdpa_sys::fuse::{FS_TYPE, MountOptions, fs_type_at, unmount};
use vdpa_sys::userns::{enter, fuse_available};

use harness::{NOBODY, run_tests, with_fuse_mode};

/// Runs a copy of this program as the user `uid` in the given role, and checks that it succeeds.
fn run_role(role: &str, uid: u32) -> String {
    assert!(getuid().is_root(), "this test starts processes of another user: run it as root");
    // Other users may have no access to the build directory.
    let dir = tempfile::tempdir().unwrap();
    let exe = dir.path().join("userns-test");
    fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    for path in [dir.path(), &exe] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let output = Command::new(&exe).arg(role).current_dir("/").uid(uid).gid(uid).output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("ROLE COMPLETE"), "{role}: {}: {text}", output.status);
    text
}

/// As nobody: enters a namespace and mounts a FUSE file system that completes its handshake.
fn enter_and_mount() {
    assert_eq!(getuid().as_raw(), NOBODY);
    fuse_available().unwrap();
    enter().unwrap();
    assert_eq!((getuid().as_raw(), getgid().as_raw()), (0, 0));
    assert_eq!(fs::read_to_string("/proc/self/setgroups").unwrap().trim(), "deny");
    let none = None::<&std::ffi::CStr>;
    mount("none", "/tmp", "tmpfs", MountFlags::empty(), none).unwrap();
    assert_eq!(fs::read_dir("/tmp").unwrap().count(), 0, "a private, empty /tmp");
    let dir = Path::new("/tmp/vdpa");
    fs::create_dir(dir).unwrap();
    let connection = vdpa_sys::fuse::mount(dir, &MountOptions::default()).unwrap();
    connection.handshake(Duration::from_secs(5)).unwrap();
    assert_eq!(fs_type_at(dir).unwrap().as_deref(), Some(FS_TYPE));
    // Unmounting works inside the namespace, too.
    unmount(dir).unwrap();
    assert_eq!(fs_type_at(dir).unwrap(), None);
}

/// As nobody without access to `/dev/fuse`: the error gives the reason, and the process stays in its namespaces.
fn enter_without_fuse_access() {
    let error = enter().unwrap_err().to_string();
    assert!(error.contains("cannot open /dev/fuse: Permission denied"), "{error}");
    assert!(error.contains("readable and writable for this user"), "{error}");
    assert_eq!(getuid().as_raw(), NOBODY);
}

fn an_ordinary_user_becomes_root_of_a_namespace_and_mounts() {
    run_role("fuse-for-all", 0);
}

fn an_ordinary_user_without_access_to_dev_fuse_gets_the_reason() {
    run_role("fuse-for-root", 0);
}

const TESTS: [(&str, fn()); 2] = [
    (
        "an_ordinary_user_becomes_root_of_a_namespace_and_mounts",
        an_ordinary_user_becomes_root_of_a_namespace_and_mounts,
    ),
    (
        "an_ordinary_user_without_access_to_dev_fuse_gets_the_reason",
        an_ordinary_user_without_access_to_dev_fuse_gets_the_reason,
    ),
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["fuse-for-all"] => with_fuse_mode(0o666, || print!("{}", run_role("enter-and-mount", NOBODY))),
        ["fuse-for-root"] => {
            with_fuse_mode(0o600, || print!("{}", run_role("enter-without-fuse-access", NOBODY)))
        }
        ["enter-and-mount"] => enter_and_mount(),
        ["enter-without-fuse-access"] => enter_without_fuse_access(),
        _ => return run_tests(&words, &TESTS),
    }
    println!("ROLE COMPLETE");
}
