//! Device files in real FUSE mounts. Needs `/dev/fuse` and the right to mount; fails where they are missing.
#![expect(unsafe_code, reason = "the ioctl of a client, as clients make it")]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use vdpa_backend::front::fuse::{
    AddError, DeviceFile, DeviceFiles, FileAttributes, IoctlCall, IoctlReply, Opener, Options, ServeError,
};
use vdpa_core::Errno;
use vdpa_sys::fuse::{MountOptions, unmount};

const LIMIT: Duration = Duration::from_secs(20);
const NOBODY: u32 = 65534;

/// A mount in a directory of its own that cannot hang a test for longer than [`LIMIT`].
struct Fixture {
    fs: Option<Arc<DeviceFiles>>,
    dir: PathBuf,
    _outer: tempfile::TempDir,
    _done: mpsc::Sender<()>,
}

impl Fixture {
    fn new(options: Options) -> Self {
        let outer = tempfile::tempdir().unwrap();
        // Others must get as far as the mount.
        fs::set_permissions(outer.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let dir = fs::canonicalize(outer.path()).unwrap().join("made/by/mount");
        let (done, wait) = mpsc::channel();
        let guarded = dir.clone();
        thread::spawn(move || {
            if wait.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the test takes longer than {LIMIT:?}: ending its mount");
                let _ = unmount(&guarded);
                std::process::abort();
            }
        });
        let fs =
            DeviceFiles::mount(&dir, options).expect("these tests need /dev/fuse and the right to mount");
        Self { fs: Some(fs), dir, _outer: outer, _done: done }
    }

    fn fs(&self) -> &DeviceFiles {
        self.fs.as_ref().unwrap()
    }

    fn add(&self, name: &str) -> Arc<Device> {
        let device = Arc::new(Device::default());
        self.fs().add(name, Arc::clone(&device) as _).unwrap();
        device
    }

    fn open(&self, name: &str) -> std::io::Result<File> {
        OpenOptions::new().read(true).write(true).open(self.dir.join(name))
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(fs) = self.fs.take() {
            fs.shutdown();
        }
        let _ = unmount(&self.dir);
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Open(u32),
    Release,
    Ioctl { cmd: u32, arg: u64, input: Vec<u8>, out_size: u32 },
    Write(Vec<u8>),
}

/// Exclusive; does as the argument of the ioctl says; can be made to block.
#[derive(Default)]
struct Device {
    open: AtomicBool,
    seen: Mutex<Vec<Seen>>,
    tid: AtomicU32,
    blocked: Mutex<bool>,
    unblock: Condvar,
    block_open: AtomicBool,
}

impl Device {
    fn block(&self) {
        *self.blocked.lock() = true;
    }

    fn unblock(&self) {
        *self.blocked.lock() = false;
        self.unblock.notify_all();
    }

    fn wait_while_blocked(&self) {
        let mut blocked = self.blocked.lock();
        self.unblock.wait_while_for(&mut blocked, |blocked| *blocked, LIMIT);
    }

    fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.seen.lock())
    }

    /// Waits for something that happens after the answer to a client.
    fn wait_for(&self, what: &Seen) {
        let deadline = Instant::now() + LIMIT / 4;
        while !self.seen.lock().contains(what) {
            assert!(Instant::now() < deadline, "{what:?} did not come: {:?}", self.seen.lock());
            thread::yield_now();
        }
    }
}

const FAIL: u32 = 0xF0;

impl DeviceFile for Device {
    fn open(&self, opener: &Opener) -> Result<(), Errno> {
        if self.block_open.load(Ordering::SeqCst) {
            self.wait_while_blocked();
        }
        if self.open.swap(true, Ordering::SeqCst) {
            return Err(Errno::BUSY);
        }
        self.seen.lock().push(Seen::Open(opener.flags));
        Ok(())
    }

    fn release(&self, _: u64) {
        self.seen.lock().push(Seen::Release);
        assert!(self.open.swap(false, Ordering::SeqCst), "released without being open");
    }

    fn ioctl(&self, call: &IoctlCall<'_>) -> Result<IoctlReply, Errno> {
        self.tid.store(call.tid, Ordering::SeqCst);
        let IoctlCall { cmd, arg, input, out_size, .. } = *call;
        self.seen.lock().push(Seen::Ioctl { cmd, arg, input: input.to_vec(), out_size });
        self.wait_while_blocked();
        match cmd & 0xFF {
            FAIL => Err(Errno::from_raw(i32::try_from(arg).unwrap())),
            // Returns its argument.
            0xF1 => Ok(IoctlReply { result: i32::try_from(arg).unwrap(), out: Vec::new() }),
            // Says nothing, as GET_CONFIG does.
            0xF2 => Ok(IoctlReply::default()),
            // More than there is room for.
            0xF3 => Ok(IoctlReply::data(vec![0; out_size as usize + 1])),
            0xF4 => panic!("a device that panics"),
            _ => Ok(IoctlReply::data((0..out_size).map(|at| at.to_le_bytes()[0] ^ 0x5A).collect::<Vec<_>>())),
        }
    }

    fn write(&self, _: u64, tid: u32, data: &[u8]) -> Result<u32, Errno> {
        self.tid.store(tid, Ordering::SeqCst);
        self.seen.lock().push(Seen::Write(data.to_vec()));
        match data.first() {
            Some(&errno @ 1..) => Err(Errno::from_raw(errno.into())),
            _ => Ok(72),
        }
    }
}

const fn ioc(dir: u32, nr: u32, size: u32) -> u32 {
    dir << 30 | size << 16 | 0xAF << 8 | nr
}
const NONE: u32 = 0;
const W: u32 = 1;
const R: u32 = 2;

/// `ioctl(2)` with a buffer as the argument.
fn ioctl(file: &File, cmd: u32, buffer: &mut [u8]) -> Result<i32, i32> {
    assert!(buffer.len() >= (cmd >> 16 & 0x3FFF) as usize);
    ioctl_value(file, cmd, buffer.as_mut_ptr().expose_provenance())
}

fn ioctl_value(file: &File, cmd: u32, arg: usize) -> Result<i32, i32> {
    // SAFETY: the mount serves restricted ioctls only: the kernel copies no more than the size in `cmd`, and
    // `arg` is no pointer, or one to at least as many bytes (checked by `ioctl`).
    let result = unsafe { libc::ioctl(file.as_raw_fd(), cmd.into(), arg) };
    if result < 0 { Err(std::io::Error::last_os_error().raw_os_error().unwrap()) } else { Ok(result) }
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn ioctls_carry_exactly_their_size_and_the_raw_argument() {
    let fixture = Fixture::new(Options::default());
    let device = fixture.add("vdpa0");
    let file = fixture.open("vdpa0").unwrap();
    device.take();
    for size in [0, 1, 8, 16, 40] {
        for dir in [NONE, W, R, R | W] {
            let mut buffer = [0xEE; 64];
            let cmd = ioc(dir, 0x10, size);
            let arg = buffer.as_ptr().addr() as u64;
            assert_eq!(ioctl(&file, cmd, &mut buffer), Ok(0), "{dir} {size}");
            let sized = |wanted| if dir & wanted != 0 { size } else { 0 };
            let input = vec![0xEE; sized(W) as usize];
            assert_eq!(device.take(), [Seen::Ioctl { cmd, arg, input, out_size: sized(R) }]);
            for (at, &byte) in buffer.iter().enumerate() {
                let written = at < sized(R) as usize;
                let expected = if written { u8::try_from(at).unwrap() ^ 0x5A } else { 0xEE };
                assert_eq!(byte, expected, "byte {at} of {dir} {size}");
            }
        }
    }
    let tid = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
    assert_eq!(device.tid.load(Ordering::SeqCst), tid, "the thread that calls, not its process");
}

#[test]
fn ioctl_results_and_errors_pass() {
    let fixture = Fixture::new(Options::default());
    fixture.add("vdpa0");
    let file = fixture.open("vdpa0").unwrap();
    for errno in [1, 5, 7, 9, 11, 14, 16, 17, 22, 25, 28, 95, 105, 524] {
        assert_eq!(ioctl_value(&file, ioc(NONE, FAIL, 0), errno), Err(i32::try_from(errno).unwrap()));
    }
    assert_eq!(ioctl_value(&file, ioc(NONE, 0xF1, 0), 4711), Ok(4711));
    let mut config = *b"offset, length";
    assert_eq!(ioctl(&file, ioc(R, 0xF2, 8), &mut config), Ok(0));
    assert_eq!(&config, b"offset, length", "an empty answer leaves the caller's bytes alone");
    assert_eq!(ioctl(&file, ioc(R, 0xF3, 8), &mut config), Err(libc::EIO));
    assert_eq!(ioctl_value(&file, ioc(W, 0x10, 8), 8), Err(libc::EFAULT), "a bad pointer");
    assert_eq!(ioctl_value(&file, ioc(NONE, 0xF4, 0), 0), Err(libc::EIO), "a panic");
    assert_eq!(ioctl_value(&file, ioc(NONE, 0x10, 0), 0), Ok(0), "and the device goes on");
}

#[test]
fn writes_are_messages() {
    let fixture = Fixture::new(Options::default());
    let device = fixture.add("vdpa0");
    let mut file = fixture.open("vdpa0").unwrap();
    device.take();
    for (len, result) in [(72, 72), (100, 72), (40, 40), (4, 4), (65536, 72), (100_000, 72)] {
        assert_eq!(file.write(&vec![0; len]).unwrap(), result, "{len} bytes");
        assert_eq!(device.take(), [Seen::Write(vec![0; len.min(65536)])]);
    }
    for error in [libc::EINVAL, libc::EFAULT, libc::EPERM] {
        let data = vec![u8::try_from(error).unwrap(); 72];
        assert_eq!(errno(file.write(&data)), error);
    }
    assert_eq!(errno(file.read(&mut [0; 8])), libc::EINVAL);
    assert_eq!(errno(file.stream_position()), libc::ESPIPE);
    let mut fds = [rustix::event::PollFd::new(&file, rustix::event::PollFlags::all())];
    assert_eq!(
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 })),
        Ok(1)
    );
    assert_eq!(fds[0].revents(), rustix::event::PollFlags::IN | rustix::event::PollFlags::OUT);
}

#[test]
fn every_access_mode_opens_and_only_one_at_a_time() {
    let fixture = Fixture::new(Options::default());
    let device = fixture.add("vdpa0");
    for (read, write) in [(true, false), (false, true), (true, true)] {
        let path = fixture.dir.join("vdpa0");
        let file = OpenOptions::new().read(read).write(write).open(&path).unwrap();
        assert_eq!(errno(fixture.open("vdpa0")), libc::EBUSY);
        let copy = file.try_clone().unwrap();
        drop(file);
        assert_eq!(errno(fixture.open("vdpa0")), libc::EBUSY, "a duplicate keeps it open");
        drop(copy);
    }
    device.take();
    let file = OpenOptions::new().write(true).truncate(true).open(fixture.dir.join("vdpa0")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn a_closed_device_opens_again_at_once() {
    let fixture = Fixture::new(Options::default());
    let device = fixture.add("vdpa0");
    for round in 0..2000 {
        if let Err(error) = fixture.open("vdpa0") {
            panic!("round {round}: {error}");
        }
    }
    device.unblock();
    assert!(device.take().chunks(2).all(|pair| matches!(pair[0], Seen::Open(_))));
}

#[test]
fn the_kernel_enforces_the_mode_and_keeps_changes() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test starts a process as another user: run it as root"
    );
    let fixture = Fixture::new(Options::default());
    fixture.add("vdpa0");
    let path = fixture.dir.join("vdpa0");
    assert_eq!(path.metadata().unwrap().mode(), 0o100_600);
    let by_nobody = || {
        let script = format!("exec 3<>'{}'", path.display());
        let output = Command::new("/bin/sh").args(["-c", &script]).uid(NOBODY).gid(NOBODY).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (opened, message) = by_nobody();
    assert!(!opened && message.contains("Permission denied"), "{message}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    assert!(by_nobody().0);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(&path, Some(NOBODY), Some(7)).unwrap();
    assert!(by_nobody().0);
    let kept = FileAttributes { mode: 0o600, uid: NOBODY, gid: 7 };
    assert_eq!(fixture.fs().attributes("vdpa0"), Some(kept));
    let device = Arc::new(Device::default());
    fixture.fs().add_with("vdpa1", device, FileAttributes { mode: 0o640, ..kept }).unwrap();
    let meta = fixture.dir.join("vdpa1").metadata().unwrap();
    assert_eq!((meta.mode(), meta.uid(), meta.gid()), (0o100_640, NOBODY, 7));
}

#[test]
fn a_device_that_hangs_disturbs_no_other_and_its_client_is_freed() {
    let timeout = Duration::from_millis(300);
    let fixture = Fixture::new(Options { request_timeout: timeout, ..Options::default() });
    let (stuck, _other) = (fixture.add("stuck"), fixture.add("other"));
    let (file, other) = (fixture.open("stuck").unwrap(), fixture.open("other").unwrap());
    stuck.take();
    stuck.block();
    let call = ioc(NONE, 0x10, 0);
    let begin = Instant::now();
    let client = thread::spawn(move || (ioctl_value(&file, call, 0), begin.elapsed(), file));
    stuck.wait_for(&Seen::Ioctl { cmd: call, arg: 0, input: vec![], out_size: 0 });
    assert_eq!(ioctl_value(&other, call, 0), Ok(0), "another device answers meanwhile");
    assert!(begin.elapsed() < timeout);
    let (result, took, file) = client.join().unwrap();
    assert_eq!(result, Err(libc::EIO));
    assert!(took >= timeout && took < timeout * 10, "{took:?}");
    let begin = Instant::now();
    assert_eq!(ioctl_value(&file, call, 0), Err(libc::EIO), "refused at once while it hangs");
    assert_eq!(errno(fixture.open("stuck")), libc::EIO);
    assert!(begin.elapsed() < timeout);
    stuck.unblock();
    let deadline = Instant::now() + LIMIT / 4;
    while ioctl_value(&file, call, 0) != Ok(0) {
        assert!(Instant::now() < deadline, "the device does not come back");
        thread::yield_now();
    }
}

#[test]
fn an_open_that_succeeds_too_late_is_released() {
    let fixture = Fixture::new(Options { request_timeout: Duration::from_millis(100), ..Options::default() });
    let device = fixture.add("vdpa0");
    device.block_open.store(true, Ordering::SeqCst);
    device.block();
    assert_eq!(errno(fixture.open("vdpa0")), libc::EIO);
    device.unblock();
    device.wait_for(&Seen::Release);
    let deadline = Instant::now() + LIMIT / 4;
    while fixture.open("vdpa0").is_err() {
        assert!(Instant::now() < deadline, "the device does not come back");
    }
}

#[test]
fn a_release_behind_a_hanging_call_is_not_lost() {
    let fixture = Fixture::new(Options { request_timeout: Duration::from_millis(100), ..Options::default() });
    let device = fixture.add("vdpa0");
    let file = fixture.open("vdpa0").unwrap();
    device.block();
    assert_eq!(ioctl_value(&file, ioc(NONE, 0x10, 0), 0), Err(libc::EIO));
    drop(file);
    device.unblock();
    device.wait_for(&Seen::Release);
}

#[test]
fn a_removed_file_is_gone_for_new_opens_only() {
    let fixture = Fixture::new(Options::default());
    let device = fixture.add("vdpa0");
    let file = fixture.open("vdpa0").unwrap();
    assert!(fixture.fs().remove("vdpa0"));
    assert!(!fixture.fs().remove("vdpa0"));
    assert_eq!(errno(fixture.open("vdpa0")), libc::ENOENT);
    assert_eq!(names(&fixture.dir), [""; 0]);
    assert_eq!(ioctl_value(&file, ioc(NONE, 0xF1, 0), 3), Ok(3), "whoever has it open keeps it");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    let second = fixture.add("vdpa0");
    let again = fixture.open("vdpa0").unwrap();
    assert_eq!(ioctl_value(&again, ioc(NONE, 0xF1, 0), 4), Ok(4));
    assert_eq!(second.take().len(), 2);
    drop(file);
    device.wait_for(&Seen::Release);
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_directory_lists_its_files() {
    let fixture = Fixture::new(Options::default());
    let many: Vec<_> = (0..300).map(|at| format!("vhost-vdpa-{at:0>100}")).collect();
    for name in &many {
        fixture.add(name);
    }
    assert_eq!(names(&fixture.dir), many);
    let stat = rustix::fs::statfs(&fixture.dir).unwrap();
    assert_eq!((stat.f_files, stat.f_namelen), (300, 255));
    for name in ["", ".", "..", "a/b", "nul\0", &"x".repeat(256)] {
        let error = fixture.fs().add(name, Arc::new(Device::default())).unwrap_err();
        assert!(matches!(error, AddError::Name { .. }), "{error}");
    }
    let error = fixture.fs().add(&many[0], Arc::new(Device::default())).unwrap_err();
    assert_eq!(error, AddError::Exists { name: many[0].clone() });
    assert_eq!(errno(fixture.open("nobody")), libc::ENOENT);
    assert_eq!(errno(File::create(fixture.dir.join("new"))), libc::ENOSYS);
    assert_eq!(errno(fs::remove_file(fixture.dir.join(&many[0]))), libc::ENOSYS);
}

#[test]
fn a_shutdown_frees_clients_and_releases_devices() {
    let fixture = Fixture::new(Options::default());
    let device = fixture.add("vdpa0");
    let file = fixture.open("vdpa0").unwrap();
    fixture.fs().shutdown();
    fixture.fs().shutdown();
    assert!(!fixture.fs().is_serving());
    assert_eq!(device.seen.lock().last(), Some(&Seen::Release));
    let error = ioctl_value(&file, ioc(NONE, 0x10, 0), 0).unwrap_err();
    assert!([libc::ENOTCONN, libc::ECONNABORTED].contains(&error), "{error}");
    assert_eq!(names(&fixture.dir), [""; 0], "an empty directory of the file system below");
}

#[test]
fn a_forced_unmount_from_outside_is_noticed() {
    let fixture = Fixture::new(Options::default());
    let device = fixture.add("vdpa0");
    let file = fixture.open("vdpa0").unwrap();
    device.block();
    let client = thread::spawn(move || ioctl_value(&file, ioc(NONE, 0x10, 0), 0));
    let call = Seen::Ioctl { cmd: ioc(NONE, 0x10, 0), arg: 0, input: vec![], out_size: 0 };
    device.wait_for(&call);
    unmount(&fixture.dir).unwrap();
    assert_eq!(client.join().unwrap(), Err(libc::ECONNABORTED));
    device.unblock();
    device.wait_for(&Seen::Release);
    assert!(!fixture.fs().is_serving());
}

#[test]
fn a_live_mount_is_refused_and_a_dead_one_replaced() {
    let mut fixture = Fixture::new(Options::default());
    let error = DeviceFiles::mount(&fixture.dir, Options::default()).unwrap_err();
    assert!(matches!(error, ServeError::Served { .. }), "{error}");
    fixture.fs.take().unwrap().shutdown();
    // What a daemon leaves that was killed: a mount whose connection nobody holds.
    drop(vdpa_sys::fuse::mount(&fixture.dir, &MountOptions::default()).unwrap());
    assert_eq!(errno(fs::metadata(&fixture.dir)), libc::ENOTCONN);
    fixture.fs = Some(DeviceFiles::mount(&fixture.dir, Options::default()).unwrap());
    fixture.add("vdpa0");
    assert_eq!(names(&fixture.dir), ["vdpa0"]);
}
