//! `just bench-survival`: how long I/O stands still when vdpad, below its holder, is upgraded or killed.
//!
//! One thread drives all queues of all devices, and verifies what it reads. It sleeps until it gets an interrupt, as a guest does; with
//! `--driver poll` it never sleeps, and takes a whole processor from the daemons. The gap of an upgrade is from the last completion of
//! any queue before it to the first one after it; with several queues also to the first one of the last queue. For a crash both are
//! counted from the kill.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::Timespec;
use tempfile::TempDir;
use vdpa_bench::process::PrivateDaemon;
use vdpa_client::Session;
use vdpa_client::device::Device;
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, Attrs, UpgradeRequest};
use vdpa_control::client::Client;
use vdpa_core::blk::{SECTOR, kind};
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::memfd;
use vdpa_sys::mmap::SharedMap;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

const IOVA: u64 = 0x1_0000_0000;
const GIB: u64 = 1 << 30;
const RING: u16 = 64;
const DATA: u32 = 4096;
/// Bytes of memory for the ring and the requests of one queue.
const AREA: u64 = 1 << 20;
const DATA_AT: u64 = 0x2_0000;
/// How long completions are recorded after the next daemon has answered.
const AFTER: Duration = Duration::from_millis(100);
/// A request that takes longer is lost.
const LOST: Duration = Duration::from_secs(30);

/// Measures upgrades and crashes of vdpad under verified load.
#[derive(Debug, Parser)]
struct Options {
    /// The daemon
    #[arg(long, value_name = "PATH")]
    vdpad: PathBuf,
    /// Memory that each client has pinned, in GiB; one run for each
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,4,16")]
    memory: Vec<u64>,
    /// What is done to the daemon
    #[arg(long, value_name = "upgrade|kill,...", value_delimiter = ',', default_value = "upgrade,kill")]
    what: Vec<What>,
    /// How often
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Devices. They have the same memory, which is pinned once for each
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    devices: u16,
    /// Queues of each device
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Requests in flight of each queue
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=16))]
    depth: u16,
    /// Use O_DIRECT, so that requests are in flight in the kernel
    #[arg(long)]
    direct: bool,
    /// How the driver learns of completions
    #[arg(long, default_value = "interrupts")]
    driver: Driver,
    /// What the daemon logs, to standard error
    #[arg(long, value_name = "FILTER", default_value = "error")]
    log: String,
    /// Directory of the disks [default: the system's for temporary files]
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// What is done to the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    Upgrade,
    Kill,
}

/// How the driver learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Driver {
    /// It sleeps until the device signals an eventfd.
    Interrupts,
    /// It looks at its rings all the time, on a processor of its own.
    Poll,
}

/// One measurement, in ms.
#[derive(Clone, Copy, Debug)]
struct Gap {
    /// To the first completion of any queue.
    first: f64,
    /// To the first completion of the last queue.
    all: f64,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "bench-survival: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let mut base: Vec<(What, f64)> = Vec::new();
    writeln!(out, "ms, median / p99 / longest of {} rounds", options.rounds)?;
    for &gib in &options.memory {
        for &what in &options.what {
            let gaps = measure(options, gib, what)?;
            let of = |value: fn(&Gap) -> f64| {
                let mut values: Vec<f64> = gaps.iter().map(value).collect();
                values.sort_by(f64::total_cmp);
                let at = |share: f64| {
                    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank")]
                    let rank = (share * values.len() as f64).ceil() as usize;
                    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
                };
                (at(0.5), at(0.99), at(1.0))
            };
            let (first, all) = (of(|gap| gap.first), of(|gap| gap.all));
            let before = base.iter().find(|(other, _)| *other == what).map(|(_, median)| *median);
            let ratio = before.map_or(String::new(), |before| {
                format!("; {:.2} times that of the first size", first.0 / before)
            });
            if before.is_none() {
                base.push((what, first.0));
            }
            writeln!(
                out,
                "{what:?}, {gib} GiB pinned by each of {} devices with {} queues: first completion \
                 {:.2} / {:.2} / {:.2}, every queue {:.2} / {:.2} / {:.2}{ratio}",
                options.devices, options.queues, first.0, first.1, first.2, all.0, all.1, all.2
            )?;
        }
    }
    Ok(())
}

/// Starts a daemon with its clients, and does `what` to it.
fn measure(options: &Options, gib: u64, what: What) -> Result<Vec<Gap>> {
    let directory = match &options.directory {
        Some(directory) => TempDir::new_in(directory)?,
        None => TempDir::new()?,
    };
    let args = ["--holder", "--crash-limit", "65535"];
    let daemon =
        PrivateDaemon::start_with(&options.vdpad, directory.path(), Front::Fuse, &options.log, &args)?;
    let client = Client::new(daemon.socket())?;
    let memory = memfd::create(c"client-memory", gib * GIB, None)?;
    let mut load = Vec::new();
    for device in 0..options.devices {
        let path = add(options, &client, directory.path(), device)?;
        load.extend(Load::start(options, &path, &memory, gib * GIB, device)?);
    }
    let recording = AtomicBool::new(false);
    // Each round ends when its gap was taken.
    let (sender, events) = sync_channel(0);
    thread::scope(|scope| {
        let act = scope.spawn(|| act(options, &client, what, &recording, &sender));
        let gaps = drive(&mut load, options, &recording, &events);
        act.join().map_err(|_| "the thread that ends the daemon has panicked")??;
        gaps
    })
}

fn add(options: &Options, client: &Client, directory: &Path, device: u16) -> Result<PathBuf> {
    let name = format!("disk{device}");
    let image = directory.join(&name);
    let blocks = u64::from(options.queues) * u64::from(options.depth);
    std::fs::write(&image, vec![0; usize::try_from(blocks * u64::from(DATA))?])?;
    let mut attrs = Attrs::new();
    for (key, value) in [
        ("path", image.to_str().ok_or("a path that is not UTF-8")?),
        ("memlock", "unlimited"),
        ("queues", &options.queues.to_string()),
        ("direct", if options.direct { "on" } else { "off" }),
    ] {
        attrs.insert(key, value)?;
    }
    client.add(&AddRequest { name: name.clone(), mgmtdev: "blk".into(), attrs })?;
    Ok(client.device(&name)?.path)
}

/// Ends the daemon again and again. Sends when each of it began, and when it was over.
fn act(
    options: &Options,
    client: &Client,
    what: What,
    recording: &AtomicBool,
    events: &SyncSender<u64>,
) -> Result<()> {
    for _ in 0..options.rounds {
        let before = answer(client, 0)?;
        thread::sleep(AFTER);
        recording.store(true, Ordering::Release);
        thread::sleep(Duration::from_millis(5));
        let begin = monotonic_ns();
        match what {
            What::Upgrade => client.upgrade(&UpgradeRequest::default())?,
            What::Kill => {
                kill_process(Pid::from_raw(before.1.cast_signed()).ok_or("no process")?, Signal::KILL)?;
            }
        }
        answer(client, before.0 + 1)?;
        thread::sleep(AFTER);
        recording.store(false, Ordering::Release);
        events.send(begin)?;
    }
    Ok(())
}

/// Waits until a daemon of at least that generation answers; its generation and process id.
fn answer(client: &Client, generation: u64) -> Result<(u64, u32)> {
    let begin = Instant::now();
    loop {
        if let Ok(daemon) = client.daemon()
            && let Some(holder) = daemon.holder
            && holder.generation >= generation
        {
            return Ok((holder.generation, daemon.pid));
        }
        if begin.elapsed() > LOST {
            return Err("the next daemon does not answer".into());
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Drives all queues until everything was measured.
fn drive(
    load: &mut [Load],
    options: &Options,
    recording: &AtomicBool,
    events: &Receiver<u64>,
) -> Result<Vec<Gap>> {
    let queues: Vec<(usize, usize)> = (load.iter().enumerate())
        .flat_map(|(device, load)| (0..load.queues.len()).map(move |queue| (device, queue)))
        .collect();
    let interrupts = match options.driver {
        Driver::Interrupts => Some(Interrupts::new(load, &queues)?),
        Driver::Poll => None,
    };
    let mut gaps = Vec::new();
    let mut seen: Vec<(u64, usize)> = Vec::new();
    let mut last = Instant::now();
    let mut due: Vec<usize> = (0..queues.len()).collect();
    while gaps.len() < options.rounds as usize {
        let record = recording.load(Ordering::Acquire);
        let mut idle = true;
        for &number in &due {
            let (device, queue) = queues.get(number).copied().ok_or("no such queue")?;
            let load = load.get_mut(device).ok_or("no such device")?;
            loop {
                let done = load.turn(queue)?;
                if done > 0 {
                    (last, idle) = (Instant::now(), false);
                    if record {
                        seen.push((monotonic_ns(), number));
                    }
                }
                // What completes from here on comes with an interrupt.
                if interrupts.is_none() || !load.queue(queue)?.arm()? {
                    break;
                }
            }
        }
        match &interrupts {
            Some(interrupts) => due = interrupts.wait()?,
            // A guest has processors of its own. Here, the daemons would wait for the end of this thread's time slices.
            None if idle => thread::yield_now(),
            None => {}
        }
        if last.elapsed() > LOST {
            return Err("a request is lost".into());
        }
        if !record && !seen.is_empty() {
            let begin = events.recv()?;
            gaps.push(gap(&seen, queues.len(), begin)?);
            seen.clear();
        }
    }
    Ok(gaps)
}

/// The interrupts of all queues, by the numbers of the queues.
struct Interrupts {
    epoll: OwnedFd,
}

impl Interrupts {
    fn new(load: &mut [Load], queues: &[(usize, usize)]) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (number, &(device, queue)) in queues.iter().enumerate() {
            let load = load.get_mut(device).ok_or("no such device")?;
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&epoll, load.queue(queue)?.call(), epoll::EventData::new_u64(number as u64), flags)?;
        }
        Ok(Self { epoll })
    }

    /// The queues that have got an interrupt. Sleeps until there is one, at most a tenth of a second.
    fn wait(&self) -> Result<Vec<usize>> {
        let timeout = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(events.iter().filter_map(|event| usize::try_from(event.data.u64()).ok()).collect())
    }
}

/// The longest time without a completion that ends after `begin`.
fn gap(seen: &[(u64, usize)], queues: usize, begin: u64) -> Result<Gap> {
    let pairs = seen.windows(2).filter_map(|pair| match pair {
        [(before, _), (after, _)] if *after >= begin => Some((*before, *after)),
        _ => None,
    });
    let (before, after) = pairs.max_by_key(|(before, after)| after - before).ok_or("no completions")?;
    // In a crash the last completion may be one that came after the signal.
    let start = if before < begin { begin } else { before };
    let mut open: Vec<bool> = vec![true; queues];
    let mut left = queues;
    let mut all = after;
    for &(at, queue) in seen.iter().filter(|(at, _)| *at >= after) {
        if let Some(first) = open.get_mut(queue)
            && std::mem::take(first)
        {
            left -= 1;
            all = at;
        }
    }
    if left > 0 {
        return Err(format!("{left} queues stand still").into());
    }
    let ms = |to: u64| Duration::from_nanos(to.saturating_sub(start)).as_secs_f64() * 1e3;
    Ok(Gap { first: ms(after), all: ms(all) })
}

/// The load on one device.
struct Load {
    session: Session<VhostVdpaFd>,
    map: SharedMap,
    queues: Vec<u64>,
    /// By queue and slot: what was written last, and whether it is being read.
    slots: Vec<Vec<(u64, bool)>>,
    depth: u16,
}

impl Load {
    /// Opens a device, and has `depth` requests in flight on each of its queues.
    fn start(
        options: &Options,
        path: &Path,
        memory: &OwnedFd,
        size: u64,
        device: u16,
    ) -> Result<Option<Self>> {
        let mut session = Device::<VhostVdpaFd>::open(path)?.negotiate(Features::of(&[Features::BLK_MQ]))?;
        session.map_memfd("memory", memory.try_clone()?, IOVA, size, Perm::RW)?;
        let mut queues = Vec::new();
        for queue in 0..options.queues {
            let area = AREA * (u64::from(device) * u64::from(options.queues) + u64::from(queue));
            if area + AREA > size {
                return Err("the memory is too small for so many queues".into());
            }
            session.add_queue(QueueIndex(queue), RING, "memory", area)?;
            queues.push(area);
        }
        let map = session.region("memory").and_then(|region| region.map()).cloned().ok_or("no mapping")?;
        session.start()?;
        let slots = vec![vec![(0, true); usize::from(options.depth)]; queues.len()];
        let mut load = Self { session, map, queues, slots, depth: options.depth };
        for queue in 0..load.queues.len() {
            for slot in 0..options.depth {
                load.submit(queue, slot)?;
            }
            load.queue(queue)?.notify()?;
        }
        Ok(Some(load))
    }

    fn queue(&mut self, queue: usize) -> Result<&mut vdpa_client::queue::Queue> {
        Ok(self.session.queue_mut(QueueIndex(u16::try_from(queue)?))?)
    }

    /// Takes the completions of a queue, verifies them, and submits a request for each; how many there were.
    fn turn(&mut self, queue: usize) -> Result<u32> {
        let mut count = 0;
        while let Some(done) = self.queue(queue)?.reap()? {
            let slot = u16::try_from(done.token)?;
            self.verify(queue, slot)?;
            self.submit(queue, slot)?;
            count += 1;
        }
        if count > 0 {
            self.queue(queue)?.notify()?;
        }
        Ok(count)
    }

    /// Offset of the header, and of the data, of a request.
    fn offsets(&self, queue: usize, slot: u16) -> (u64, u64) {
        let area = self.queues.get(queue).copied().unwrap_or(0);
        let (header, data) = (0x1_0000 + u64::from(slot) * 64, DATA_AT + u64::from(slot) * u64::from(DATA));
        (area + header, area + data)
    }

    fn block(&self, queue: usize, slot: u16) -> u64 {
        queue as u64 * u64::from(self.depth) + u64::from(slot)
    }

    /// Writes a block, or reads what was written.
    fn submit(&mut self, queue: usize, slot: u16) -> Result<()> {
        let (header, data) = self.offsets(queue, slot);
        let block = self.block(queue, slot);
        let state = self.slots.get_mut(queue).and_then(|slots| slots.get_mut(usize::from(slot)));
        let (seed, reading) = state.ok_or("no such slot")?;
        *reading = !*reading;
        *seed += u64::from(!*reading);
        let (seed, reading) = (*seed, *reading);
        let kind = if reading { kind::IN } else { kind::OUT };
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&(block * u64::from(DATA) / SECTOR).to_le_bytes());
        self.map.write(usize::try_from(header)?, &bytes).map_err(|_| "fault")?;
        self.map.write(usize::try_from(header + 32)?, &[0xff]).map_err(|_| "fault")?;
        let contents = if reading { vec![0xa5; DATA as usize] } else { pattern(block, seed) };
        self.map.write(usize::try_from(data)?, &contents).map_err(|_| "fault")?;
        let at = |offset, len| Buffer { iova: IOVA + offset, len };
        let (head, data, status) = (at(header, 16), at(data, DATA), at(header + 32, 1));
        let driver = self.queue(queue)?;
        if reading {
            driver.submit(&[head], &[data, status], slot.into())?;
        } else {
            driver.submit(&[head, data], &[status], slot.into())?;
        }
        Ok(())
    }

    fn verify(&self, queue: usize, slot: u16) -> Result<()> {
        let (header, data) = self.offsets(queue, slot);
        let mut status = [0xff];
        self.map.read(usize::try_from(header + 32)?, &mut status).map_err(|_| "fault")?;
        if status != [0] {
            return Err(format!("a request of queue {queue} has failed: {status:?}").into());
        }
        let state = self.slots.get(queue).and_then(|slots| slots.get(usize::from(slot)));
        if let Some(&(seed, true)) = state {
            let block = self.block(queue, slot);
            let mut bytes = vec![0; DATA as usize];
            self.map.read(usize::try_from(data)?, &mut bytes).map_err(|_| "fault")?;
            // Before the first write the block is empty.
            if seed > 0 && bytes != pattern(block, seed) {
                return Err(format!("block {block} of queue {queue} is corrupt").into());
            }
        }
        Ok(())
    }
}

/// Contents of a block, different for each seed.
fn pattern(block: u64, seed: u64) -> Vec<u8> {
    let first = block.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
    (0..u64::from(DATA / 8)).flat_map(|word| first.rotate_left(17).wrapping_add(word).to_le_bytes()).collect()
}
