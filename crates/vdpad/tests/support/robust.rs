//! A real daemon for tests that kill and stop processes: its resources, and clients that are processes of their own.
#![expect(dead_code, reason = "every test binary uses its own part")]

#[path = "robust_disk.rs"]
pub(crate) mod disk;
#[path = "more_args.rs"]
mod more_args;
#[path = "programs.rs"]
pub(crate) mod programs;
#[path = "registered.rs"]
pub(crate) mod registered;
#[path = "standstill.rs"]
mod standstill;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vdpa_client::update;
use vdpa_control::api::DevInfo;
use vdpa_control::client::Client;
use vdpa_sys::fuse::{FS_TYPE, fs_type_at, unmount};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

/// Time for everything that happens soon or never.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// Ends a test that hangs: a client that blocks in the kernel is released only by the end of the connection.
struct Guard(Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>);

impl Guard {
    fn new(limit: Duration, pid: Pid, mount: PathBuf) -> Self {
        let (done, wait) = mpsc::channel();
        let guard = thread::spawn(move || {
            if wait.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the test takes longer than {limit:?}: ending its daemon, its mount and itself");
                let _ = kill_process(pid, Signal::KILL);
                let _ = unmount(&mount);
                std::process::abort();
            }
        });
        Self(Some((done, guard)))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some((done, guard)) = self.0.take() {
            drop(done);
            let _ = guard.join();
        }
    }
}

/// A running vdpad in a directory of its own. Dropping it kills it.
pub(crate) struct Vdpad {
    child: Child,
    dir: PathBuf,
    _guard: Guard,
    outer: Option<tempfile::TempDir>,
}

impl Vdpad {
    /// Starts it; the test may take `limit` from now on.
    pub(crate) fn start(limit: Duration) -> Self {
        Self::start_with(limit, &[])
    }

    pub(crate) fn start_with(limit: Duration, args: &[&str]) -> Self {
        let outer = tempfile::tempdir().unwrap();
        let dir = fs::canonicalize(outer.path()).unwrap();
        let mut vdpad = Self::start_at(&dir, limit, args);
        vdpad.outer = Some(outer);
        vdpad
    }

    /// As `start_with`, with an environment variable.
    pub(crate) fn start_with_env(limit: Duration, args: &[&str], (name, value): (&str, &str)) -> Self {
        let outer = tempfile::tempdir().unwrap();
        let dir = fs::canonicalize(outer.path()).unwrap();
        let mut command = command_at(&dir);
        command.env(name, value).args(args);
        let mut vdpad = Self::start_command(&dir, limit, command);
        vdpad.outer = Some(outer);
        vdpad
    }

    /// Starts it in a directory that is kept when it ends.
    pub(crate) fn start_at(dir: &Path, limit: Duration, args: &[&str]) -> Self {
        let mut command = command_at(dir);
        command.args(args);
        Self::start_command(dir, limit, command)
    }

    /// Starts a command of [`command_at`].
    pub(crate) fn start_command(dir: &Path, limit: Duration, mut command: Command) -> Self {
        let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap();
        // Who brings the programs along runs in an emulated machine, or may.
        let slowness = if std::env::var_os(programs::PROGRAMS).is_some() { 10 } else { 1 };
        let guard = Guard::new(limit * slowness, Pid::from_child(&child), dir.join("dev"));
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{}", fs::read_to_string(dir.join("log")).unwrap());
        Self { child, dir: dir.into(), _guard: guard, outer: None }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn mount(&self) -> PathBuf {
        self.dir.join("dev")
    }

    pub(crate) fn is_mounted(&self) -> bool {
        fs_type_at(&self.mount()).unwrap().as_deref() == Some(FS_TYPE)
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap()
    }

    /// Stops it, with all of its threads.
    pub(crate) fn stop(&self) {
        standstill::stop(self.pid());
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.dir.join("control.sock")).unwrap()
    }

    pub(crate) fn info(&self, name: &str) -> DevInfo {
        self.client().device(name).unwrap()
    }

    /// Runs vdpactl with the arguments in `line`.
    pub(crate) fn ctl(&self, line: &str) -> Output {
        run(vdpactl(&self.dir).args(line.split_whitespace()))
    }

    /// Adds a device of the management device `mgmtdev` and returns the path of its file.
    #[track_caller]
    pub(crate) fn add(&self, name: &str, mgmtdev: &str, attrs: &str) -> PathBuf {
        self.ctl(&format!("dev add name {name} mgmtdev {mgmtdev} {attrs}")).succeeds();
        self.info(name).path
    }

    /// Adds a block device on a new file of `size` bytes.
    #[track_caller]
    pub(crate) fn add_blk(&self, name: &str, size: u64, attrs: &str) -> PathBuf {
        let image = self.image(name, size);
        self.add(name, "blk", &format!("path {} {attrs}", image.display()))
    }

    /// Adds a device of any kind. A card is on the interface `tap0`.
    #[track_caller]
    pub(crate) fn add_any(&self, name: &str, mgmtdev: &str) -> PathBuf {
        match mgmtdev {
            "blk" => self.add_blk(name, 64 << 20, "packed on"),
            "net" => self.add(name, "net", "tap tap0 mac 52:54:11:12:34:56 packed on"),
            other => self.add(name, other, ""),
        }
    }

    /// A file of `size` zeros.
    pub(crate) fn image(&self, name: &str, size: u64) -> PathBuf {
        let path = self.dir.join(format!("{name}.img"));
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// Waits until nobody has the device open, and asserts that no resource of its last client is left.
    #[track_caller]
    pub(crate) fn is_released(&self, name: &str) {
        let info = eventually("the device is released", || Some(self.info(name)).filter(|i| !i.state.open));
        let state = info.state;
        assert_eq!((state.pinned_pages, state.mappings), (0, 0), "{state:?}");
        assert!(state.owner.is_none() && !state.suspended && state.status.0 == 0, "{state:?}");
        assert!(state.queues.iter().all(|queue| !queue.running && !queue.enabled), "{state:?}");
    }

    pub(crate) fn resources(&self) -> Resources {
        Resources::of(self.pid())
    }
}

impl Drop for Vdpad {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- log of vdpad\n{}---", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mount = self.mount();
        if fs_type_at(&mount).is_ok_and(|kind| kind.as_deref() == Some(FS_TYPE)) {
            // The watchdog may do the same concurrently.
            let _ = unmount(&mount);
        }
        more_args::nothing_was_refused(&fs::read_to_string(self.dir.join("log")).unwrap_or_default());
    }
}

/// vdpad with its directory and its socket in `dir`.
pub(crate) fn command_at(dir: &Path) -> Command {
    let mut command = Command::new(programs::program("vdpad"));
    command.env_remove("NOTIFY_SOCKET").env_remove("VDPAD_LOG");
    match std::env::var_os("VDPAD_TEST_FRONT") {
        Some(front) => command.arg("--front").arg(front),
        None => command.arg("--dir").arg(dir.join("dev")),
    };
    command.arg("--socket").arg(dir.join("control.sock")).args(more_args::more_args());
    command
}

/// The arguments for FUSE files, unless `VDPAD_TEST_FRONT` chooses the front end: [`command_at`] has it then.
pub(crate) fn front() -> &'static [&'static str] {
    if std::env::var_os("VDPAD_TEST_FRONT").is_some() { &[] } else { &["--front", "fuse"] }
}

/// vdpactl for a daemon in `dir`.
pub(crate) fn vdpactl(dir: &Path) -> Command {
    let mut command = Command::new(programs::program("vdpactl"));
    command.env("VDPAD_SOCKET", dir.join("control.sock"));
    command
}

/// Exit status and output of a process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Output {
    #[track_caller]
    pub(crate) fn succeeds(&self) {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
    }

    /// Asserts this exit status and exactly this on standard error.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, stderr: &str) {
        assert_eq!(self.stderr.lines().collect::<Vec<_>>(), stderr.lines().collect::<Vec<_>>());
        assert_eq!(self.code, Some(code), "{self:?}");
    }
}

/// Runs a command, which must end soon.
pub(crate) fn run(command: &mut Command) -> Output {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let drain = |mut pipe: Box<dyn Read + Send>| {
        thread::spawn(move || {
            let mut text = String::new();
            pipe.read_to_string(&mut text).map(|_| text).unwrap_or_else(|error| error.to_string())
        })
    };
    let stdout = drain(Box::new(child.stdout.take().unwrap()));
    let stderr = drain(Box::new(child.stderr.take().unwrap()));
    let deadline = Instant::now() + SOON * 3;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{command:?} has not ended within {:?}", SOON * 3);
        }
        thread::sleep(Duration::from_millis(2));
    };
    Output { code: status.code(), stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// Calls `ask` repeatedly until it returns a value.
#[track_caller]
pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Resources of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resources {
    /// Open descriptors by kind.
    pub(crate) fds: BTreeMap<String, usize>,
    /// Threads but the kernel's workers for io_uring and vdpad's for control requests, which come when needed and go when
    /// idle.
    pub(crate) threads: usize,
    /// Lines of `/proc/PID/maps`.
    pub(crate) maps: usize,
    /// Mapped memory files of clients among them.
    pub(crate) memfds: usize,
    /// Bytes of its io_uring instances' registered buffers, all together.
    pub(crate) registered: u64,
    /// `VmRSS`, in KiB.
    pub(crate) rss_kib: u64,
    /// `VmPin`, in KiB.
    pub(crate) pinned_kib: u64,
}

impl Resources {
    pub(crate) fn of(pid: Pid) -> Self {
        let proc = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
        let mut fds = BTreeMap::new();
        for entry in fs::read_dir(proc.join("fd")).unwrap() {
            let entry = entry.unwrap();
            // It may have been closed just now.
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let target = target.to_string_lossy();
            // Numbers of sockets and ids of processes are new each time.
            let kinds = ["socket:", "pipe:", "/proc/"];
            let kind = kinds.into_iter().find(|kind| target.starts_with(kind)).unwrap_or(&target);
            *fds.entry(kind.to_owned()).or_default() += 1;
        }
        let maps = fs::read_to_string(proc.join("maps")).unwrap();
        let status = fs::read_to_string(proc.join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
        };
        Self {
            fds,
            threads: fs::read_dir(proc.join("task")).unwrap().filter(is_lasting).count(),
            maps: maps.lines().count(),
            memfds: maps
                .lines()
                .filter(|line| line.contains("/memfd:") && !line.contains("/memfd:vdpad"))
                .count(),
            registered: registered::buffers(pid.as_raw_nonzero().get().cast_unsigned())
                .iter()
                .map(|buffer| buffer.len)
                .sum(),
            rss_kib: field("VmRSS"),
            pinned_kib: field("VmPin"),
        }
    }

    /// Asserts that there are no more resources than `before`; memory may have grown by 8 MiB.
    #[track_caller]
    pub(crate) fn are_back_to(&self, before: &Self) {
        assert_eq!((self.pinned_kib, self.registered, self.memfds), (0, 0, 0), "{self:?}");
        assert_eq!(self.fds, before.fds);
        assert_eq!(self.threads, before.threads);
        // An arena of the allocator may be split or joined.
        assert!(self.maps <= before.maps + 8, "{} mappings, {} before", self.maps, before.maps);
        assert!(self.rss_kib <= before.rss_kib + 8192, "{} KiB, {} before", self.rss_kib, before.rss_kib);
    }
}

fn is_lasting(task: &std::io::Result<fs::DirEntry>) -> bool {
    let name = fs::read_to_string(task.as_ref().unwrap().path().join("comm"));
    name.is_ok_and(|name| !name.starts_with("iou-wrk") && !name.starts_with("ctl-call"))
}

/// Environment variable with the role of this instance of the test program.
const ROLE: &str = "VDPA_TEST_ROLE";

/// Whether this process has the role `part`. A test that is run normally has none; it checks that there is no saved state to
/// restore.
pub(crate) fn has_role(part: &str) -> bool {
    let found = std::env::var(ROLE).is_ok_and(|role| role == part);
    if !found {
        assert!(update::restore::<VhostVdpaFd>().unwrap().is_none(), "a first start has nothing to restore");
    }
    found
}

/// Another instance of the test program with a role: a single test, started with [`ROLE`].
pub(crate) struct RoleProcess {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl RoleProcess {
    /// Starts this program with the role `part` and environment variables.
    pub(crate) fn start(part: &str, variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([part, "--exact", "--nocapture"]).env(ROLE, part).envs(variables.iter().copied());
        Self::spawn(&mut command)
    }

    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Receives the next line that it has sent with [`send_line`]. It must begin with the word `topic`; the rest is returned.
    #[track_caller]
    pub(crate) fn receive(&mut self, topic: &str) -> String {
        loop {
            let mut line = String::new();
            let len = self.lines.read_line(&mut line).unwrap();
            assert!(len > 0, "the process ended ({:?}) before it sent \"{topic}\"", self.child.wait());
            // The output of the test runner precedes the mark.
            let Some((_, received)) = line.split_once('@') else { continue };
            let (word, rest) = received.trim_end().split_once(' ').unwrap_or((received.trim_end(), ""));
            assert_eq!(word, topic, "{received}");
            return rest.to_owned();
        }
    }

    /// The next line that it has sent; `None` when it has ended.
    pub(crate) fn next_line(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some((_, received)) = line.split_once('@') {
                return Some(received.trim_end().to_owned());
            }
        }
    }

    pub(crate) fn send(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for the end of all programs with the same standard output: its successors.
    pub(crate) fn end_of_all(&mut self) {
        self.lines.read_to_end(&mut Vec::new()).unwrap();
        // An error is ignored, since a process that waits for its orphaned descendants may have waited for it already.
        let _ = self.child.wait();
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

impl Drop for RoleProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a role: sends a line to [`RoleProcess::receive`].
pub(crate) fn send_line(line: &str) {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "@{line}").and_then(|()| stdout.flush()).unwrap();
}

/// In a role: receives a line of [`RoleProcess::send`]. Not buffered, so that an exec loses nothing.
pub(crate) fn receive_line() -> String {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while rustix::io::read(std::io::stdin(), &mut byte).unwrap() == 1 && byte != *b"\n" {
        line.extend(byte);
    }
    String::from_utf8(line).unwrap()
}

/// In a role: an environment variable that must be set.
pub(crate) fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: this test runs only in a role, started by another test")
    })
}

/// Gives another user access.
pub(crate) fn open_to_all(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}
