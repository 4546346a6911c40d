//! [`Bus`] and [`Program`]: what a case needs to be the program behind a VDUSE device of the kernel.

use std::fmt;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::uapi::vduse::{DevConfig, DevRequest, VqConfig, feature};
use vdpa_sys::vduse::{Control, VduseDevice};

use crate::case::{Stop, prepare};
use crate::device::{Device, Target};

/// Virtio device id of a block device.
const BLOCK: u32 = 2;
/// Bytes of its configuration space.
pub(crate) const SPACE: usize = 96;
/// Entries of the largest ring.
pub(crate) const RING: u16 = 64;
/// How long anything may take that the kernel or the program does at once.
const LIMIT: Duration = Duration::from_secs(20);

/// How devices get onto the vdpa bus: a command such as `vdpa` of iproute2, to which `dev add name NAME mgmtdev vduse` and
/// `dev del NAME` are appended.
#[derive(Clone, Debug)]
pub struct Bus {
    words: Vec<String>,
}

impl From<&str> for Bus {
    /// Splits a command line at whitespace.
    fn from(line: &str) -> Self {
        Self { words: line.split_whitespace().map(str::to_owned).collect() }
    }
}

impl fmt::Display for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words.join(" "))
    }
}

impl Bus {
    fn run(&self, more: &[&str]) -> Result<(), Stop> {
        let failed = |what: String| Stop::Failed(format!("set-up: {self} {}: {what}", more.join(" ")));
        let (program, words) = self.words.split_first().ok_or_else(|| failed("no command".to_owned()))?;
        let output = Command::new(program).args(words).args(more).stdin(Stdio::null()).output();
        let output = output.map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ")))
    }
}

/// What a device is made with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// API version.
    pub(crate) version: u64,
    /// `VDUSE_F_*`.
    pub(crate) features: u64,
    /// Queues; with groups, each has its own.
    pub(crate) queues: u32,
    /// Groups of queues, and address spaces; above 1 with version 1 only.
    pub(crate) groups: u32,
}

impl Default for Options {
    /// What a program of today chooses.
    fn default() -> Self {
        Self { version: 1, features: feature::QUEUE_READY | feature::SUSPEND, queues: 1, groups: 1 }
    }
}

impl Options {
    /// What a program chooses that knows none of the additions.
    pub(crate) const FIRST: Self = Self { version: 0, features: 0, queues: 1, groups: 1 };
}

/// A request of the kernel: its type and the first words of its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) words: [u32; 5],
}

impl Message {
    fn of(request: &DevRequest) -> Self {
        let [a, b, c, d, e, ..] = request.payload;
        Self { kind: request.kind, id: request.request_id, words: [a, b, c, d, e] }
    }
}

/// How the program answers, and what it was asked.
#[derive(Debug, Default)]
struct Conduct {
    seen: Vec<Message>,
    /// Types that it refuses.
    refused: Vec<u32>,
    /// Types that it does not answer.
    ignored: Vec<u32>,
    /// What it says of a queue's position.
    position: u16,
}

/// The thread that answers, and the open device.
#[derive(Debug)]
struct Server {
    device: Arc<VduseDevice>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(device: VduseDevice, conduct: &Arc<Mutex<Conduct>>) -> Result<Self, Stop> {
        let stop = Arc::new(prepare("eventfd", EventFd::new())?);
        let device = Arc::new(device);
        let (served, end, conduct) = (Arc::clone(&device), Arc::clone(&stop), Arc::clone(conduct));
        let thread = thread::spawn(move || serve(&served, &end, &conduct));
        Ok(Self { device, stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(thread) = self.thread.take() {
            // A panic in it was printed already.
            let _ = thread.join();
        }
    }
}

/// Answers requests until `end` is signalled or the device is broken.
fn serve(device: &VduseDevice, end: &EventFd, conduct: &Mutex<Conduct>) {
    loop {
        let mut fds =
            [PollFd::new(device, PollFlags::IN), PollFd::from_borrowed_fd(end.as_fd(), PollFlags::IN)];
        if poll(&mut fds, None).is_err_and(|error| error != rustix::io::Errno::INTR) {
            return;
        }
        let [device_events, end_events] = fds.map(|fd| fd.revents());
        if !end_events.is_empty() || device_events.contains(PollFlags::ERR) {
            return;
        }
        let Ok(request) = device.read() else { continue };
        let mut conduct = lock(conduct);
        conduct.seen.push(Message::of(&request));
        if conduct.ignored.contains(&request.kind) {
            continue;
        }
        let mut answer = request.done();
        answer.result = u32::from(conduct.refused.contains(&request.kind));
        let [index, ..] = request.payload;
        // The answer to GET_VQ_STATE; others have no payload, and the kernel does not look at it.
        let [first, second, ..] = &mut answer.payload;
        (*first, *second) = (index, conduct.position.into());
        // It may have been answered by the time-out.
        let _ = device.answer(&answer);
    }
}

fn lock(conduct: &Mutex<Conduct>) -> MutexGuard<'_, Conduct> {
    conduct.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A VDUSE device and the program behind it, which ends with the value.
#[derive(Debug)]
pub(crate) struct Program {
    bus: Bus,
    control: Control,
    name: String,
    conduct: Arc<Mutex<Conduct>>,
    server: Option<Server>,
    attached: bool,
}

/// A name that no other device has.
pub(crate) fn new_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("conform-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The configuration of a block device with these options.
pub(crate) fn config(name: &str, options: Options) -> DevConfig {
    let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    let mut config = DevConfig::new(name, BLOCK, features.0, options.queues, options.version);
    if options.version > 0 {
        (config.ngroups, config.nas) = (options.groups, options.groups);
    }
    config
}

/// Opens the control file with the version and features of `options`.
pub(crate) fn control(options: Options) -> Result<Control, Stop> {
    let control = prepare("/dev/vduse/control", Control::open())?;
    if options.version > 0 {
        prepare("VDUSE_SET_API_VERSION", control.set_api_version(options.version))?;
    }
    if options.features != 0 {
        prepare("VDUSE_SET_FEATURES", control.set_features(options.features))?;
    }
    Ok(control)
}

impl Program {
    /// Makes a block device and starts to serve it. It is not on the bus yet.
    pub(crate) fn new(bus: &Bus, options: Options) -> Result<Self, Stop> {
        let name = new_name();
        let control = control(options)?;
        prepare("VDUSE_CREATE_DEV", control.create(config(&name, options), &[0; SPACE]))?;
        let conduct = Arc::default();
        let bus = bus.clone();
        let mut program = Self { bus, control, name, conduct, server: None, attached: false };
        let device = prepare("open", VduseDevice::open(&program.name))?;
        for index in 0..options.queues {
            let group = if options.groups > 1 { index } else { 0 };
            let queue = VqConfig { index, max_size: RING, group, ..VqConfig::default() };
            prepare("VDUSE_VQ_SETUP", device.setup_queue(&queue))?;
        }
        program.server = Some(Server::start(device, &program.conduct)?);
        Ok(program)
    }

    /// As [`new`](Self::new), and puts the device on the bus.
    pub(crate) fn attached(bus: &Bus, options: Options) -> Result<Self, Stop> {
        let mut program = Self::new(bus, options)?;
        program.bus.run(&["dev", "add", "name", &program.name, "mgmtdev", "vduse"])?;
        program.attached = true;
        Ok(program)
    }

    /// The program's side of the device.
    pub(crate) fn device(&self) -> Result<&VduseDevice, Stop> {
        let server = self.server.as_ref();
        server
            .map(|server| &*server.device)
            .ok_or_else(|| Stop::Failed("set-up: the program has ended".to_owned()))
    }

    pub(crate) fn control(&self) -> &Control {
        &self.control
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Opens the device as a client of vhost-vdpa, which must be its driver.
    pub(crate) fn open(&self) -> Result<Device, Stop> {
        let path = self.node()?;
        Device::open(Target::File(&path)).map_err(|errno| Stop::setup("open", errno))
    }

    /// Opens it, and becomes its owner.
    pub(crate) fn open_owned(&self) -> Result<Device, Stop> {
        let device = self.open()?;
        prepare("VHOST_SET_OWNER", device.call(crate::request::Request::SET_OWNER))?;
        Ok(device)
    }

    /// The character device of vhost-vdpa.
    fn node(&self) -> Result<PathBuf, Stop> {
        let directory = PathBuf::from("/sys/bus/vdpa/devices").join(&self.name);
        let end = Instant::now() + LIMIT;
        loop {
            let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            let node = names.into_iter().find(|name| name.starts_with("vhost-vdpa-"));
            if let Some(path) = node.map(|name| PathBuf::from("/dev").join(name)).filter(|path| path.exists())
            {
                return Ok(path);
            }
            if Instant::now() > end {
                return Err(Stop::CannotRun(format!(
                    "{} has no vhost-vdpa: is it the driver?",
                    directory.display()
                )));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Refuses requests of this type from now on.
    pub(crate) fn refuse(&self, kind: u32) {
        lock(&self.conduct).refused.push(kind);
    }

    /// Does not answer requests of this type from now on.
    pub(crate) fn ignore(&self, kind: u32) {
        lock(&self.conduct).ignored.push(kind);
    }

    /// Answers everything again.
    pub(crate) fn answer_all(&self) {
        let mut conduct = lock(&self.conduct);
        (conduct.refused, conduct.ignored) = (Vec::new(), Vec::new());
    }

    /// What the program says of a queue's position from now on.
    pub(crate) fn set_position(&self, position: u16) {
        lock(&self.conduct).position = position;
    }

    /// The requests since the last call.
    pub(crate) fn seen(&self) -> Vec<Message> {
        std::mem::take(&mut lock(&self.conduct).seen)
    }

    /// Waits for the first request of this type since the last call of [`seen`](Self::seen).
    pub(crate) fn wait_for(&self, kind: u32) -> Result<Message, Stop> {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(message) = lock(&self.conduct).seen.iter().find(|message| message.kind == kind) {
                return Ok(*message);
            }
            if Instant::now() > end {
                return Err(Stop::Failed(format!("no request of type {kind} within {} s", LIMIT.as_secs())));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the program as a crash does, which closes its descriptor, and starts the next one, which answers everything.
    pub(crate) fn restart(&mut self) -> Result<(), Stop> {
        self.server = None;
        self.answer_all();
        let device = prepare("open again", VduseDevice::open(&self.name))?;
        self.server = Some(Server::start(device, &self.conduct)?);
        Ok(())
    }

    /// Seconds for which the kernel waits for an answer.
    pub(crate) fn set_timeout(&self, seconds: u32) -> Result<(), Stop> {
        let file = PathBuf::from("/sys/class/vduse").join(&self.name).join("msg_timeout");
        let written = std::fs::write(&file, seconds.to_string());
        written.map_err(|error| Stop::CannotRun(format!("{}: {error}", file.display())))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let told =
            |what: &str, error: &dyn fmt::Display| eprintln!("vdpa-conform: {}: {what}: {error}", self.name);
        if self.attached
            && let Err(Stop::Failed(error) | Stop::CannotRun(error)) =
                self.bus.run(&["dev", "del", &self.name])
        {
            told("not removed from the bus", &error);
        }
        self.server = None;
        // What is left of it is in nobody's way: the next device has another name.
        match self.control.destroy(&self.name) {
            // Not made yet.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => told("not destroyed", &errno),
        }
    }
}
