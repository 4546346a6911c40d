//! Device files over single files, `device_file PATH`: for clients with a fixed path, and for containers.
//!
//! Needs /dev/fuse and the right to mount, and fails without.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vdpa_core::ops::VdpaOps;
use vdpa_sys::fuse::{FS_TYPE, fs_type_at, unmount_lazily};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use robust::disk::{self, Disk};
use robust::{Vdpad, eventually};

const LIMIT: Duration = Duration::from_secs(60);

fn is_mounted(path: &Path) -> bool {
    fs_type_at(path).unwrap().as_deref() == Some(FS_TYPE)
}

/// The directory of a test's file. Dropping it unmounts the file, so that the directory can be removed.
struct Place {
    outer: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { outer: tempfile::tempdir().unwrap() }
    }

    fn file(&self) -> std::path::PathBuf {
        fs::canonicalize(self.outer.path()).unwrap().join("dev/vhost-vdpa-0")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = unmount_lazily(&self.file());
    }
}

#[test]
fn a_client_works_at_a_path_of_the_operators_choice() {
    let (vdpad, place) = (Vdpad::start(LIMIT), Place::new());
    let file = place.file();
    let device = vdpad.add_blk("disk0", 64 << 20, &format!("device_file {}", file.display()));
    assert_eq!(device, file);
    assert_eq!(vdpad.info("disk0").front, "fuse");
    let meta = fs::symlink_metadata(&file).unwrap();
    assert!(meta.file_type().is_file() && !meta.file_type().is_char_device());
    assert_eq!(meta.mode() & 0o7777, 0o600);
    assert_eq!(fs::read_dir(vdpad.mount()).unwrap().count(), 0, "it is in no other place");

    let mut disk = Disk::start(&file, disk::MEMORY_MIN);
    disk.check(1);
    let busy = fs::File::options().read(true).write(true).open(&file).unwrap_err();
    assert_eq!(busy.raw_os_error(), Some(libc::EBUSY), "one client at a time");
    assert!(vdpad.ctl("dev del disk0").stderr.contains("device disk0 is open"));
    disk.check(2);
    drop(disk);
    vdpad.is_released("disk0");

    vdpad.ctl("dev del disk0").succeeds();
    assert!(!is_mounted(&file) && !file.exists(), "the file was made for the device");
}

#[test]
fn a_file_that_was_there_comes_back() {
    let (vdpad, place) = (Vdpad::start(LIMIT), Place::new());
    let file = place.file();
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "as it was").unwrap();
    vdpad.add("blk0", "sim-blk", &format!("device_file {}", file.display()));
    fs::set_permissions(&file, fs::Permissions::from_mode(0o660)).unwrap();
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o660);
    VhostVdpaFd::open(&file).unwrap().status().unwrap();
    vdpad.is_released("blk0");
    vdpad.ctl("dev del blk0").succeeds();
    assert_eq!(fs::read_to_string(&file).unwrap(), "as it was");
    assert_ne!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o660);
}

#[test]
fn places_that_cannot_be_are_refused_and_nothing_is_left() {
    let (vdpad, place) = (Vdpad::start(LIMIT), Place::new());
    let file = place.file();
    let dir = file.parent().unwrap();
    let refused = |path: &str, why: &str| {
        let output = vdpad.ctl(&format!("dev add name blk0 mgmtdev sim-blk device_file {path}"));
        assert!(output.code != Some(0) && output.stderr.contains(why), "{path}: {output:?}");
        assert_eq!(vdpad.ctl("dev show").stdout, "");
    };
    fs::create_dir_all(dir).unwrap();
    refused(dir.to_str().unwrap(), "something else than a regular file");
    let taken = vdpad.add("blk1", "sim-blk", &format!("device_file {}", file.display()));
    let output = vdpad.ctl(&format!("dev add name blk0 mgmtdev sim-blk device_file {}", taken.display()));
    assert!(output.stderr.contains("served by another vdpad"), "{output:?}");
    VhostVdpaFd::open(&taken).unwrap().status().unwrap();
    // A device without the attribute still gets a file in the directory; both are removed in the end.
    let other = vdpad.add("blk2", "sim-blk", "");
    VhostVdpaFd::open(&other).unwrap().status().unwrap();
    vdpad.ctl("dev del blk1").succeeds();
    assert!(!taken.exists());
}

#[test]
fn the_place_of_a_device_that_is_deleted_in_use_is_free_at_once() {
    let (vdpad, place) = (Vdpad::start(LIMIT), Place::new());
    let file = place.file();
    let attrs = format!("device_file {}", file.display());
    vdpad.add("blk0", "sim-blk", &attrs);
    let old = VhostVdpaFd::open(&file).unwrap();
    vdpad.ctl("dev del blk0 --force").succeeds();
    assert!(!is_mounted(&file) && !file.exists());
    // It still answers clients that have it open: their requests fail.
    old.status().unwrap();
    vdpad.add("blk0", "sim-blk", &attrs);
    VhostVdpaFd::open(&file).unwrap().set_owner().unwrap();
    drop(old);
    vdpad.is_released("blk0");
}

/// An administrator can unmount one file without an effect on the daemon and its other devices.
#[test]
fn a_file_that_is_unmounted_takes_nothing_else_along() {
    let (vdpad, place) = (Vdpad::start(LIMIT), Place::new());
    let file = place.file();
    vdpad.add("blk0", "sim-blk", &format!("device_file {}", file.display()));
    let other = vdpad.add("blk1", "sim-blk", "");
    vdpa_sys::fuse::unmount(&file).unwrap();
    eventually("the daemon notices", || vdpad.log().contains("its device has no file now").then_some(()));
    VhostVdpaFd::open(&other).unwrap().status().unwrap();
    vdpad.ctl("dev del blk0").succeeds();
    vdpad.add("blk0", "sim-blk", &format!("device_file {}", file.display()));
    VhostVdpaFd::open(&file).unwrap().status().unwrap();
}

mod heavy {
    use super::*;

    #[test]
    fn the_watchdog_frees_clients_of_a_stopped_daemon_there_too() {
        const TIMEOUT: Duration = Duration::from_secs(3);
        let mut vdpad = Vdpad::start_with(LIMIT, &["--watchdog-timeout", "3"]);
        let place = Place::new();
        let file = place.file();
        vdpad.add("blk0", "sim-blk", &format!("device_file {}", file.display()));
        let device = VhostVdpaFd::open(&file).unwrap();
        device.status().unwrap();
        vdpad.stop();
        let begin = Instant::now();
        let error = device.status().unwrap_err();
        assert!([libc::ECONNABORTED, libc::ENOTCONN].contains(&error.raw()), "{error}");
        assert!(begin.elapsed() < TIMEOUT * 4, "{:?}", begin.elapsed());
        eventually("the mount is gone", || (!is_mounted(&file)).then_some(()));
        vdpad.signal(Signal::CONT);
        assert_eq!(vdpad.wait().code(), Some(1), "{}", vdpad.log());
    }

    #[test]
    fn a_daemon_that_was_killed_leaves_no_mount_and_the_next_one_takes_the_place() {
        let outer = tempfile::tempdir().unwrap();
        let dir = fs::canonicalize(outer.path()).unwrap();
        let place = Place::new();
        let file = place.file();
        for _ in 0..3 {
            let mut vdpad = Vdpad::start_at(&dir, LIMIT, &[]);
            // The watchdog of the previous daemon may not have unmounted it yet.
            vdpad.add("blk0", "sim-blk", &format!("device_file {}", file.display()));
            VhostVdpaFd::open(&file).unwrap().status().unwrap();
            vdpad.signal(Signal::KILL);
            vdpad.wait();
        }
        eventually("the watchdog has removed the mount", || (!is_mounted(&file)).then_some(()));
    }
}
