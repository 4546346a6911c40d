//! `just bench-migrate`: how long a machine stands still when it moves between two daemons of this machine.
//!
//! A guest reads and writes a disk and verifies it, and writes memory at a given rate, page after page, of which it verifies each before it
//! writes it again. It moves to another daemon over a Unix socket, in three ways, which take turns:
//!
//! - *tracked*: rounds while it runs, mappings made before it stops (`IOTLB_PERSIST` keeps them over the reset)
//! - *no persist*: the same, but the mappings are made while it stands still
//! - *no tracking*: all memory is copied while it stands still
//!
//! Told are the downtime as the library reports it, and the longest time between two answers that the guest has had around the move.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::Parser;
use tempfile::TempDir;
use vdpa_bench::process::PrivateDaemon;
use vdpa_client::device::Device;
use vdpa_client::dma::Backing;
use vdpa_client::memory::Memory;
use vdpa_client::migrate::{
    self, Arrival, Arrived, Machine, MachineError, Plan, RegionOffer, Report, Step, Target,
};
use vdpa_client::session::{DirtyPages, Session};
use vdpa_client::state::{Section, Sections};
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, Attrs};
use vdpa_control::client::Client;
use vdpa_core::features::Features;
use vdpa_core::types::Perm;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

#[path = "../../vdpa-client/examples/support/machine.rs"]
mod machine;

use machine::{BASE, Cpu, DISK, PLACE, QUEUE, Shared, Vcpu};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

const CPU: &str = "bench/cpu";
const MIB: u64 = 1 << 20;

/// Measures moves between two daemons.
#[derive(Debug, Parser)]
struct Options {
    /// The daemon
    #[arg(long, value_name = "PATH")]
    vdpad: PathBuf,
    /// Memory of the machine in MiB
    #[arg(long, default_value_t = 4096)]
    memory: u64,
    /// Megabytes of memory that the guest writes in a second
    #[arg(long, default_value_t = 200)]
    rate: u64,
    /// Moves of each way
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

/// How a machine moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Tracked,
    NoPersist,
    NoTracking,
}

impl Way {
    const ALL: [Self; 3] = [Self::Tracked, Self::NoPersist, Self::NoTracking];

    const fn name(self) -> &'static str {
        match self {
            Self::Tracked => "tracked",
            Self::NoPersist => "no persist",
            Self::NoTracking => "no tracking",
        }
    }
}

struct Computer {
    memory: Arc<Memory>,
    events: [EventFd; 2],
    vcpu: Option<Vcpu>,
    shared: Arc<Shared>,
    cpu: Option<Cpu>,
    stopped: Option<Instant>,
}

impl Machine for Computer {
    fn track(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn written(&mut self, _region: &str, pages: &mut DirtyPages) -> Result<(), MachineError> {
        self.shared.take_dirty(pages);
        Ok(())
    }

    fn untrack(&mut self) {}

    fn pause(&mut self) -> Result<(), MachineError> {
        self.stopped = Some(Instant::now());
        self.cpu = Some(self.vcpu.take().ok_or("it does not run")?.pause()?);
        Ok(())
    }

    fn save(&mut self) -> Result<Sections, MachineError> {
        Ok(Sections::from_iter([Section::json(CPU, 1, self.cpu.as_ref().ok_or("it was not stopped")?)?]))
    }

    fn resume(&mut self) {
        let resumed = self.cpu.take().map(|cpu| Vcpu::resume(&self.memory, self.events.clone(), cpu));
        self.vcpu = resumed.and_then(Result::ok);
    }
}

#[derive(Default)]
struct Place {
    memory: Option<Arc<Memory>>,
    cpu: Option<Cpu>,
}

impl Target for Place {
    fn memory(&mut self, region: &RegionOffer) -> Result<Backing, MachineError> {
        let fd = memfd::create(c"there", region.size, None)?;
        let memory = Memory::map(&region.name, fd, 0, region.size, false)?;
        self.memory = Some(Arc::clone(&memory));
        Ok(Backing::Memory(memory, 0))
    }

    fn load(&mut self, mut sections: Sections) -> Result<(), MachineError> {
        self.cpu = Some(sections.take(CPU).ok_or("no registers")?.parse(1)?);
        Ok(sections.ensure_consumed()?)
    }

    fn step(&mut self, _step: Step) {}
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "bench-migrate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let dirs = [TempDir::new()?, TempDir::new()?];
    let disk = dirs[0].path().join("disk");
    std::fs::File::create(&disk)?.set_len(DISK)?;
    let daemons = [
        PrivateDaemon::start(&options.vdpad, dirs[0].path(), Front::Fuse)?,
        PrivateDaemon::start(&options.vdpad, dirs[1].path(), Front::Fuse)?,
    ];
    let [here, there] = [device(&daemons[0], &disk)?, device(&daemons[1], &disk)?];
    let size = options.memory * MIB;
    writeln!(
        std::io::stdout(),
        "{} MiB of memory, {} MB/s written, a disk shared by two daemons, {} processors",
        options.memory,
        options.rate,
        std::thread::available_parallelism()?
    )?;
    let mut all: Vec<(Way, Report, Duration)> = Vec::new();
    for round in 0..options.rounds {
        for way in Way::ALL {
            std::fs::File::create(&disk)?.set_len(DISK)?;
            let (report, gap) = one(way, &here, &there, size, options.rate * 1_000_000)?;
            let mut line = format!(
                "{round} {:12} downtime {:>9.2} ms, gap {:>9.2} ms,",
                way.name(),
                ms(report.downtime),
                ms(gap)
            );
            for (phase, time) in &report.phases {
                line += &format!(" {phase} {:.2}", ms(*time));
            }
            let sent: u64 = report.rounds.iter().map(|(sent, _)| sent.bytes).sum();
            let rounds = report.rounds.len();
            writeln!(
                std::io::stdout(),
                "{line}; {rounds} rounds of {} MiB, then {} KiB",
                sent / MIB,
                report.last.bytes >> 10
            )?;
            all.push((way, report, gap));
        }
    }
    for way in Way::ALL {
        let of_way = || all.iter().filter(|(other, ..)| *other == way);
        let down = spread(of_way().map(|(_, report, _)| report.downtime));
        let gap = spread(of_way().map(|(.., gap)| *gap));
        writeln!(
            std::io::stdout(),
            "{:12} downtime median {:.2} ms ({:.2} to {:.2}), gap of the guest median {:.2} ms ({:.2} to {:.2}), nothing lost",
            way.name(),
            down[1],
            down[0],
            down[2],
            gap[1],
            gap[0],
            gap[2]
        )?;
    }
    Ok(())
}

fn device(daemon: &PrivateDaemon, disk: &Path) -> Result<PathBuf> {
    let control = Client::new(daemon.socket())?;
    let mut attrs = Attrs::new();
    attrs.insert("path", disk.to_str().ok_or("the name of a temporary file")?)?;
    for (name, value) in [("shared", "on"), ("queues", "1"), ("memlock", "unlimited")] {
        attrs.insert(name, value)?;
    }
    control.add(&AddRequest { name: "disk".into(), mgmtdev: "blk".into(), attrs })?;
    Ok(control.device("disk")?.path)
}

/// Moves one machine; the report, and the longest time without an answer.
fn one(way: Way, here: &Path, there: &Path, size: u64, rate: u64) -> Result<(Report, Duration)> {
    let memory = Memory::map("ram", memfd::create(c"here", size, None)?, 0, size, false)?;
    fill(&memory)?;
    let mut session = open(here)?.negotiate(Features::NONE)?;
    session.map_memory("ram", &memory, 0, BASE, size, Perm::RW)?;
    let events = [EventFd::new()?, EventFd::new()?];
    let [kick, call] = events.clone();
    session.add_guest_queue(QUEUE, PLACE, kick, call)?;
    session.start()?;
    let vcpu = Vcpu::boot(&memory, events.clone(), rate)?;
    std::thread::sleep(Duration::from_millis(500));
    let shared = Arc::clone(&vcpu.shared);
    let mut computer = Computer { memory, events, vcpu: Some(vcpu), shared, cpu: None, stopped: None };
    let (mut ours, theirs) = UnixStream::pair()?;
    let target = open(there)?;
    let destination = std::thread::spawn(move || arrive(theirs, target, way != Way::NoPersist));
    let plan = Plan { track: way != Way::NoTracking, ..Plan::default() };
    let report = migrate::send(&mut session, &mut computer, &mut ours, &plan)?;
    drop(session);
    let (vcpu, landed, first) = destination.join().map_err(|_| "the destination has panicked")??;
    let stopped = computer.stopped.ok_or("it was not stopped")?;
    // What was written arrives, or the guest ends with an error.
    std::thread::sleep(Duration::from_millis(500));
    vcpu.pause()?;
    drop(landed);
    Ok((report, first - stopped))
}

type There = (Vcpu, Session<VhostVdpaFd>, Instant);

/// Runs the machine there; with the time of its first answer.
fn arrive(stream: UnixStream, device: Device<VhostVdpaFd>, early: bool) -> Result<There> {
    let mut place = Place::default();
    let Arrived::Landed(landed) =
        Arrival::accept(stream)?.prepare(device, early, &mut place)?.receive(&mut place)?
    else {
        return Err("the source was not heard of any more".into());
    };
    let queue = landed.session.guest_queue(QUEUE)?;
    let events = [queue.kick().clone(), queue.call().clone()];
    let (memory, cpu) = (place.memory.take().ok_or("no memory")?, place.cpu.take().ok_or("no registers")?);
    let before = cpu.done;
    let vcpu = Vcpu::resume(&memory, events, cpu)?;
    while vcpu.shared.done.load(Ordering::Relaxed) == before && vcpu.is_alive() {
        std::thread::yield_now();
    }
    let first = Instant::now();
    Ok((vcpu, landed.session, first))
}

/// Opens a device; the one before may just be closing.
fn open(path: &Path) -> Result<Device<VhostVdpaFd>> {
    let begun = Instant::now();
    loop {
        match Device::open(path) {
            Ok(device) => return Ok(device),
            Err(_) if begun.elapsed() < Duration::from_secs(10) => {
                std::thread::sleep(Duration::from_millis(5))
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// No page of the memory is zeros, as in a machine that has been up for a while.
fn fill(memory: &Memory) -> Result<()> {
    let map = memory.as_map().ok_or("it was mapped")?;
    for at in (0x10_0000..map.len()).step_by(4096) {
        map.write(at + 8, &[0x5a; 4088])?;
    }
    Ok(())
}

fn spread(times: impl Iterator<Item = Duration>) -> [f64; 3] {
    let mut all: Vec<f64> = times.map(ms).collect();
    all.sort_by(f64::total_cmp);
    [all.first(), all.get(all.len() / 2), all.last()].map(|time| time.copied().unwrap_or(0.0))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
