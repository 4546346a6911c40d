//! The file or block device behind a disk, as its neighbours, its operator and its driver see it: paths, formats, locks, size.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/blk.rs"]
mod blk;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;
#[path = "support/skips.rs"]
mod skips;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use vdpa_core::blk::{BlkConfig, kind};
use vdpa_core::ops::VdpaOps;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::image_lock::{self, Access};
use zerocopy::FromBytes;

use blk::{Blk, IOERR, OK};
use held::{replace, start, upgrade};
use robust::disk::{self, Disk};
use robust::{Output, Vdpad, eventually, run, vdpactl};
use skips::skip;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_ok() {
        return true;
    }
    skip(&format!("{program} is missing (package qemu-utils): locks are not compared with QEMU's"));
    false
}

fn vdpad() -> Vdpad {
    Vdpad::start_with(LIMIT, &["--front", "fuse"])
}

#[track_caller]
fn fails_with(output: &Output, words: &[&str]) {
    assert_eq!(output.code, Some(1), "{output:?}");
    for word in words {
        assert!(output.stderr.contains(word), "no {word:?} in {output:?}");
    }
}

/// Of the caller, not of the daemon; over the API, which knows no caller, they are refused.
#[test]
fn relative_paths_are_of_the_callers_directory() {
    let vdpad = vdpad();
    let elsewhere = tempfile::tempdir().unwrap();
    File::create(elsewhere.path().join("a.img")).unwrap().set_len(2 * MIB).unwrap();
    let mut add = vdpactl(vdpad.dir());
    add.current_dir(elsewhere.path())
        .args("dev add name d0 mgmtdev blk path a.img device_file d0".split(' '));
    run(&mut add).succeeds();
    assert_eq!(vdpad.info("d0").path, elsewhere.path().join("d0"));
    assert!(vdpad.ctl("-s dev config show d0").stdout.contains("capacity 4096"));
    let mut attrs = vdpa_control::api::Attrs::new();
    attrs.insert("path", "a.img").unwrap();
    let request = vdpa_control::api::AddRequest { name: "d1".into(), mgmtdev: "blk".into(), attrs };
    let refused = vdpad.client().add(&request).unwrap_err().to_string();
    assert!(refused.contains("path is \"a.img\", which is not an absolute path"), "{refused}");
}

#[test]
fn an_image_of_another_format_is_no_raw_disk() {
    let vdpad = vdpad();
    for (name, at, magic) in [
        ("qcow2", 0, &b"QFI\xfb\0\0\0\x03"[..]),
        ("vmdk", 0, b"KDMV"),
        ("vhdx", 0, b"vhdxfile"),
        ("luks", 0, b"LUKS\xba\xbe"),
        ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ] {
        let image = vdpad.image(name, MIB);
        File::options().write(true).open(&image).unwrap().write_all_at(magic, at).unwrap();
        let add = format!("dev add name {name} mgmtdev blk path {}", image.display());
        let remedy = if name == "luks" { "cryptsetup open" } else { "qemu-img convert -f" };
        fails_with(&vdpad.ctl(&add), &[&format!("is a {name} image, not a raw one"), remedy, "format raw"]);
        vdpad.ctl(&format!("{add} format raw")).succeeds();
    }
    if has("qemu-img") {
        // What qemu-img makes itself.
        for format in ["qcow2", "vmdk", "vhdx", "vdi", "vpc", "qed", "parallels"] {
            let image = vdpad.dir().join(format!("real.{format}"));
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", format, image.to_str().unwrap(), "8M"])
                .status();
            if !made.unwrap().success() {
                continue;
            }
            let add = format!("dev add name real-{format} mgmtdev blk path {}", image.display());
            fails_with(&vdpad.ctl(&add), &[&format!("is a {format} image, not a raw one")]);
        }
    }
}

/// qemu-io with an image open until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    fn open(options: &[&str], image: &Path) -> Self {
        let child = Command::new("qemu-io")
            .args(["-f", "raw"])
            .args(options)
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let this = Self(child.unwrap());
        let inode = fs::metadata(image).unwrap().ino();
        eventually("qemu-io has locked the image", || {
            let locks = fs::read_to_string("/proc/locks").unwrap();
            locks
                .lines()
                .any(|line| line.contains("OFDLCK") && line.contains(&format!(":{inode} ")))
                .then_some(())
        });
        this
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.0.stdin.take().unwrap().write_all(b"quit\n");
        self.0.wait().unwrap();
    }
}

/// What qemu-io says to one command on an image.
fn qemu_io(options: &[&str], command: &str, image: &Path) -> (bool, String) {
    let output = Command::new("qemu-io")
        .args(["-f", "raw"])
        .args(options)
        .args(["-c", command])
        .arg(image)
        .output()
        .unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

#[track_caller]
fn qemu_io_is_refused(options: &[&str], command: &str, image: &Path) {
    let (success, text) = qemu_io(options, command, image);
    assert!(!success && text.contains("lock"), "qemu-io {options:?} {command}: {text}");
}

#[track_caller]
fn qemu_io_works(options: &[&str], command: &str, image: &Path) {
    let (success, text) = qemu_io(options, command, image);
    assert!(success, "qemu-io {options:?} {command}: {text}");
}

#[test]
fn what_vdpad_serves_qemu_leaves_alone() {
    if !has("qemu-io") {
        return;
    }
    let vdpad = vdpad();
    let image = vdpad.image("d0", 4 * MIB);
    let linked = vdpad.dir().join("linked.img");
    fs::hard_link(&image, &linked).unwrap();
    let add = format!("dev add name d0 mgmtdev blk path {}", image.display());
    vdpad.ctl(&add).succeeds();
    for path in [&image, &linked] {
        qemu_io_is_refused(&[], "write 0 4k", path);
        // Whoever says that the image may change meanwhile can look at it, as qemu-io does.
        qemu_io_works(&["-r"], "read 0 4k", path);
        qemu_io_works(&["-r", "-U"], "read 0 4k", path);
        let info = Command::new("qemu-img").args(["info", "-U", "-f", "raw"]).arg(path).output().unwrap();
        assert!(info.status.success(), "{info:?}");
    }
    assert!(fs::read(&image).unwrap().iter().all(|byte| *byte == 0));
    vdpad.ctl("dev del d0").succeeds();
    qemu_io_works(&[], "write 0 4k", &image);
    // Readers accept each other, and no writer.
    vdpad.ctl(&format!("{add} readonly on")).succeeds();
    qemu_io_works(&["-r"], "read 0 4k", &linked);
    qemu_io_is_refused(&[], "write 0 4k", &linked);
    vdpad.ctl("dev del d0").succeeds();
    qemu_io_works(&[], "write 0 4k", &image);
}

#[test]
fn what_qemu_uses_vdpad_leaves_alone() {
    if !has("qemu-io") {
        return;
    }
    let vdpad = vdpad();
    let image = vdpad.image("d0", 4 * MIB);
    let linked = vdpad.dir().join("linked.img");
    fs::hard_link(&image, &linked).unwrap();
    let add = |path: &Path, more: &str| {
        vdpad.ctl(&format!("dev add name d0 mgmtdev blk path {} {more}", path.display()))
    };
    let writer = QemuIo::open(&[], &image);
    for more in ["", "readonly on"] {
        let refused = add(&linked, more);
        fails_with(&refused, &["is in use by qemu-io (pid ", "kernel answers: Device or resource busy"]);
        assert!(refused.stderr.contains(&format!("pid {}", writer.0.id())), "{refused:?}");
    }
    // qemu-io lets others write.
    add(&linked, "shared on").succeeds();
    vdpad.ctl("dev del d0").succeeds();
    drop(writer);
    let reader = QemuIo::open(&["-r"], &image);
    add(&linked, "").succeeds();
    vdpad.ctl("dev del d0").succeeds();
    drop(reader);
    // A guest's disk that is read only does not.
    let reader = File::open(&image).unwrap();
    image_lock::take(&reader, Access::Read).unwrap();
    let refused = add(&linked, "");
    fails_with(&refused, &[&format!("(pid {})", std::process::id())]);
    add(&linked, "readonly on").succeeds();
    vdpad.ctl("dev del d0").succeeds();
    drop(reader);
    add(&linked, "").succeeds();
    fails_with(
        &vdpad.ctl(&format!("dev add name d1 mgmtdev blk path {}", image.display())),
        &["is in use by another device of this daemon"],
    );
}

/// Disks that several write, such as those of cluster file systems, as QEMU means share-rw.
#[test]
fn writers_that_share_accept_each_other() {
    let vdpad = vdpad();
    let image = vdpad.image("d0", 4 * MIB);
    let add = |name: &str, more: &str| {
        vdpad.ctl(&format!("dev add name {name} mgmtdev blk path {} {more}", image.display()))
    };
    let first = {
        add("d0", "shared on").succeeds();
        vdpad.info("d0").path
    };
    add("d1", "shared on").succeeds();
    for more in ["", "readonly on"] {
        fails_with(&add("d2", more), &["is in use by another device of this daemon"]);
    }
    Disk::start(&first, disk::MEMORY_MIN).check(1);
    Disk::start(&vdpad.info("d1").path, disk::MEMORY_MIN).check(2);
    // Neither may pull the size away from below the other.
    fails_with(&vdpad.ctl("dev set name d0 size 8M"), &["needs it as it is"]);
}

/// The file is known by its inode, wherever it is mounted.
#[test]
fn a_bind_mount_leads_to_the_same_locks() {
    if !has("qemu-io") {
        return;
    }
    let vdpad = vdpad();
    let image = vdpad.image("d0", 4 * MIB);
    let bound = vdpad.dir().join("bound");
    fs::create_dir(&bound).unwrap();
    let mount =
        |args: &[&str]| Command::new("mount").args(args).status().is_ok_and(|status| status.success());
    let (from, to) = (vdpad.dir().to_str().unwrap(), bound.to_str().unwrap());
    if !mount(&["--bind", from, to]) {
        return skip("bind mounts are not permitted: locks are not compared over one");
    }
    let seen = bound.join("d0.img");
    vdpad.ctl(&format!("dev add name d0 mgmtdev blk path {}", image.display())).succeeds();
    let (written, text) = qemu_io(&[], "write 0 4k", &seen);
    vdpad.ctl("dev del d0").succeeds();
    let writer = QemuIo::open(&[], &seen);
    let refused = vdpad.ctl(&format!("dev add name d0 mgmtdev blk path {}", image.display()));
    drop(writer);
    rustix::mount::unmount(&bound, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(!written && text.contains("lock"), "{text}");
    fails_with(&refused, &["is in use by qemu-io"]);
}

/// While one daemon follows the other, and after that.
#[test]
fn neighbours_never_get_between_two_daemons() {
    if !has("qemu-io") {
        return;
    }
    let vdpad = start(&[]);
    let image = vdpad.image("d0", 64 * MIB);
    let device = vdpad.add("d0", "blk", &format!("path {} packed on", image.display()));
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let intruder = {
        let image = image.clone();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let mut tried = 0;
            loop {
                let (written, text) = qemu_io(&[], "read 0 512", &image);
                assert!(!written && text.contains("lock"), "{text}");
                tried += 1;
                if stopped.try_recv() != Err(std::sync::mpsc::TryRecvError::Empty) {
                    return tried;
                }
            }
        });
        (stop, thread)
    };
    disk.check(1);
    replace(&vdpad);
    disk.check(2);
    upgrade(&vdpad);
    disk.check(3);
    replace(&vdpad);
    disk.check(4);
    drop(intruder.0);
    assert!(intruder.1.join().unwrap() >= 3);
    drop(disk);
    vdpad.is_released("d0");
    vdpad.ctl("dev del d0").succeeds();
    qemu_io_works(&[], "write 0 4k", &image);
}

/// The capacity that the driver reads, in bytes.
fn capacity(disk: &Disk) -> u64 {
    let config = disk.session.config().unwrap();
    BlkConfig::read_from_bytes(&config).unwrap().capacity.get() * 512
}

/// The status of a request of the 4 KiB that begin at `sector`.
fn one(disk: &mut Disk, kind: u32, sector: u64) -> u8 {
    disk.submit(0, (kind, sector / 8, 1));
    disk.kick();
    disk.settle_but(sector / 8);
    disk.answer(0)
}

#[test]
fn a_disk_grows_below_its_client() {
    let vdpad = start(&[]);
    let image = vdpad.image("d0", 64 * MIB);
    let device = vdpad.add("d0", "blk", &format!("path {} packed on", image.display()));
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let changed = EventFd::new().unwrap();
    disk.session.ops().set_config_call(Some(&changed)).unwrap();
    let old = 64 * MIB / 512;
    assert_eq!((one(&mut disk, kind::OUT, old - 8), one(&mut disk, kind::OUT, old)), (OK, IOERR));
    // The file grows, and nothing happens until the operator says so.
    File::options().write(true).open(&image).unwrap().set_len(96 * MIB).unwrap();
    assert_eq!((capacity(&disk), one(&mut disk, kind::OUT, old)), (64 * MIB, IOERR));
    vdpad.ctl("dev set name d0 size auto").succeeds();
    assert!(changed.wait(Some(Duration::from_secs(5))), "no config event");
    let _ = changed.drain();
    assert_eq!((capacity(&disk), one(&mut disk, kind::OUT, old)), (96 * MIB, OK));
    // The file is made longer.
    vdpad.ctl("dev set name d0 size 128M").succeeds();
    assert!(changed.wait(Some(Duration::from_secs(5))), "no config event");
    assert_eq!(fs::metadata(&image).unwrap().len(), 128 * MIB);
    let last = 128 * MIB / 512 - 8;
    for replaced in [None, Some(replace as fn(&Vdpad)), Some(upgrade), Some(replace)] {
        replaced.into_iter().for_each(|replace| replace(&vdpad));
        assert_eq!(capacity(&disk), 128 * MIB);
        assert_eq!((one(&mut disk, kind::OUT, last), one(&mut disk, kind::OUT, last + 8)), (OK, IOERR));
        disk.check(1);
    }
    // One that is as it was made stays so over a crash, whatever the file is by then.
    let other = vdpad.image("d1", MIB);
    vdpad.ctl(&format!("dev add name d1 mgmtdev blk path {}", other.display())).succeeds();
    File::options().write(true).open(&other).unwrap().set_len(2 * MIB).unwrap();
    replace(&vdpad);
    assert!(vdpad.ctl("-s dev config show d1").stdout.contains("capacity 2048"));
    vdpad.ctl("dev set name d1 size auto").succeeds();
    replace(&vdpad);
    assert!(vdpad.ctl("-s dev config show d1").stdout.contains("capacity 4096"));
}

#[test]
fn a_disk_shrinks_only_by_force() {
    let vdpad = vdpad();
    let device = vdpad.add_blk("d0", 64 * MIB, "packed on");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    fails_with(
        &vdpad.ctl("dev set name d0 size 32M"),
        &["the disk would shrink from 67108864 to 33554432 bytes", "--force"],
    );
    assert_eq!(capacity(&disk), 64 * MIB);
    vdpad.ctl("dev set name d0 size 32M --force").succeeds();
    assert_eq!(capacity(&disk), 32 * MIB);
    let end = 32 * MIB / 512;
    assert_eq!((one(&mut disk, kind::OUT, end - 8), one(&mut disk, kind::IN, end)), (OK, IOERR));
    assert_eq!(fs::metadata(vdpad.dir().join("d0.img")).unwrap().len(), 64 * MIB, "the file stays");
    fails_with(
        &vdpad.ctl("dev set name d0 size 1000"),
        &["a disk cannot have 1000 bytes", "A multiple of 512"],
    );
    fails_with(&vdpad.ctl("dev set name d0 size large"), &["size is \"large\""]);
    vdpad.add("n0", "sim-blk", "");
    fails_with(&vdpad.ctl("dev set name n0 size auto"), &["the size of n0 cannot be changed"]);
}

/// Its driver gets errors for what is gone, and the file does not grow again by what it writes there.
#[test]
fn a_file_that_is_truncated_stays_so() {
    let vdpad = vdpad();
    let image = vdpad.image("d0", 64 * MIB);
    let device = vdpad.add("d0", "blk", &format!("path {}", image.display()));
    let mut disk = Blk::start(&device);
    let sector = 40 * MIB / 512;
    assert_eq!(disk.write(0, sector, &[1; 4096]), OK);
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(32 * MIB).unwrap();
    let errors = || vdpad.info("d0").state.queues[0].errors;
    let before = errors();
    assert_eq!(disk.write(0, sector, &[2; 4096]), IOERR);
    assert_eq!(disk.read(0, sector, 4096), Err(IOERR));
    assert_eq!(disk.range(kind::WRITE_ZEROES, sector, 8, 0), IOERR);
    assert_eq!(fs::metadata(&image).unwrap().len(), 32 * MIB);
    assert_eq!(errors(), before + 3);
    assert!(vdpad.log().contains("the file of a disk was truncated"), "{}", vdpad.log());
    assert_eq!(disk.write(0, 32 * MIB / 512 - 8, &[3; 4096]), OK);
    // It is there again, as zeros.
    file.set_len(64 * MIB).unwrap();
    assert_eq!(disk.write(0, sector, &[4; 4096]), OK);
    assert_eq!(disk.read(0, sector, 4096), Ok(vec![4; 4096]));
}
