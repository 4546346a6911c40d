//! [`Daemon`]: a vdpad for one test.

#[path = "more_args.rs"]
mod more_args;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use vdpa_control::api::{AddRequest, Attrs, DevInfo};
use vdpa_control::client::{Client, ClientError};

/// Longest lifetime of a daemon where a test asks for no other. It is killed then, which releases every client that waits for it in the kernel.
const LIFE: Duration = Duration::from_secs(60);

/// A running daemon with a directory of its own. Killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    pidfd: OwnedFd,
    dir: tempfile::TempDir,
    /// Ends the guard when it is dropped.
    _done: Sender<()>,
}

impl Daemon {
    /// Starts one in a temporary directory and waits until it is ready.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts one with additional options.
    pub(crate) fn start_with(options: &[&str]) -> Self {
        Self::start_for(LIFE, options)
    }

    /// As [`start_with`](Self::start_with), for a test that takes longer.
    pub(crate) fn start_for(life: Duration, options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(super::programs::program("vdpad"));
        match std::env::var_os("VDPAD_TEST_FRONT") {
            Some(front) => command.arg("--front").arg(front),
            None => command.arg("--dir").arg(dir.path().join("dev")),
        };
        let mut child = command
            .env_remove("NOTIFY_SOCKET")
            .env_remove("VDPAD_LOG")
            .arg("--socket")
            .arg(dir.path().join("control.sock"))
            .args(["--request-timeout", "8", "--watchdog-timeout", "5", "--log", "debug"])
            .args(more_args::more_args())
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let (done, ended) = mpsc::channel();
        guard(pidfd.try_clone().unwrap(), ended, life);
        let mut line = String::new();
        // Returns at the latest when the daemon ends.
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let daemon = Self { child, pidfd, dir, _done: done };
        assert_eq!(line, "ready\n", "{}", daemon.log());
        daemon
    }

    /// A directory for files that exists as long as the daemon.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Adds a device; returns its device file.
    pub(crate) fn add(&self, name: &str, mgmtdev: &str, attrs: &[(&str, &str)]) -> PathBuf {
        self.try_add(name, mgmtdev, attrs).unwrap();
        self.info(name).path
    }

    pub(crate) fn try_add(
        &self,
        name: &str,
        mgmtdev: &str,
        attrs: &[(&str, &str)],
    ) -> Result<(), ClientError> {
        let mut all = Attrs::new();
        attrs.iter().for_each(|(name, value)| all.insert(*name, *value).unwrap());
        self.client().add(&AddRequest { name: name.into(), mgmtdev: mgmtdev.into(), attrs: all })
    }

    /// Adds a `blk` device on `disk`, which offers rings of both formats; returns its device file.
    pub(crate) fn add_blk(&self, name: &str, disk: &Disk, attrs: &[(&str, &str)]) -> PathBuf {
        let mut all = vec![("path", disk.path.to_str().unwrap()), ("packed", "on")];
        all.extend_from_slice(attrs);
        self.add(name, "blk", &all)
    }

    /// Deletes a device, in use or not.
    pub(crate) fn delete(&self, name: &str) -> Result<(), ClientError> {
        self.client().delete(name, true)
    }

    /// A file of `bytes` bytes for a device, full of a pattern.
    pub(crate) fn disk(&self, name: &str, bytes: usize) -> Disk {
        Disk::new(self.dir.path().join(name), bytes)
    }

    pub(crate) fn info(&self, name: &str) -> DevInfo {
        self.client().device(name).unwrap()
    }

    /// Waits until `wanted` is true of the device.
    pub(crate) fn wait_for(&self, name: &str, what: &str, wanted: impl Fn(&DevInfo) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !wanted(&self.info(name)) {
            assert!(Instant::now() < deadline, "{what} did not come: {:?}", self.info(name));
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The log of the daemon.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Asserts that it still runs.
    #[track_caller]
    pub(crate) fn assert_alive(&self) {
        let time = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ended = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&time));
        assert_eq!(ended, Ok(0), "the daemon has ended: {}", self.log());
        let pid = self.client().version().unwrap().pid;
        assert_eq!(pid, self.pid());
    }

    fn client(&self) -> Client {
        let client = Client::new(self.dir.path().join("control.sock")).unwrap();
        client.with_timeout(Duration::from_secs(15))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Its watchdog may not have unmounted it yet, and the directory cannot be removed with a mount in it.
        let _ = vdpa_sys::fuse::unmount(&self.dir.path().canonicalize().unwrap_or_default().join("dev"));
        if thread::panicking() {
            eprintln!("---- log of the daemon\n{}----", self.log());
        }
        more_args::nothing_was_refused(&self.log());
    }
}

/// Kills the daemon when the test takes too long.
fn guard(pidfd: OwnedFd, ended: Receiver<()>, life: Duration) {
    thread::spawn(move || {
        if ended.recv_timeout(life) == Err(RecvTimeoutError::Timeout) {
            eprintln!("the test takes longer than {life:?}: killing its daemon");
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
    });
}

/// The backing file of a `blk` device.
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    file: File,
}

impl Disk {
    /// Creates the file, with different contents in every sector.
    pub(crate) fn new(path: PathBuf, bytes: usize) -> Self {
        fs::write(&path, pattern(0, bytes)).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        Self { path, file }
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    pub(crate) fn all(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }
}

/// Contents of a [`Disk`] from byte `offset` on: 8-byte words with their own offsets.
pub(crate) fn pattern(offset: u64, len: usize) -> Vec<u8> {
    let words = (offset / 8..).map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    words.flat_map(u64::to_le_bytes).take(len).collect()
}
