//! A machine moves to a second process, on a second daemon, while its guest reads and writes a disk and verifies every block.
//!
//! ```text
//! cargo run -p vdpa-client --example migrate -- destination DEVICE SOCKET &
//! cargo run -p vdpa-client --example migrate -- source DEVICE SOCKET [--copy FILE FILE]
//! ```
//!
//! DEVICE is a device file of `blk`; each process has its own, of daemons that need not be the same. Either both devices have one disk, with
//! the attribute `shared on`; or `--copy` names the files behind the disk of the source and that of the destination, and the
//! first is copied while the machine stands still. The first 1 MiB of the disk is overwritten: it has to be zeros.
//!
//! The guest is a thread, and what it writes is noted in a bitmap of this program. A hypervisor stops its virtual CPUs in
//! [`Machine::pause`], and asks KVM for its dirty log in [`Machine::written`].

#[expect(dead_code, reason = "tests and benchmarks use more of it")]
#[path = "support/machine.rs"]
mod machine;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vdpa_client::device::Device;
use vdpa_client::dma::Backing;
use vdpa_client::memory::Memory;
use vdpa_client::migrate::{
    self, Arrival, Arrived, Landed, Machine, MachineError, Plan, RegionOffer, SendError, Step, Target,
};
use vdpa_client::session::DirtyPages;
use vdpa_client::state::{Section, Sections};
use vdpa_core::features::Features;
use vdpa_core::types::Perm;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use machine::{BASE, Cpu, DISK, PLACE, QUEUE, Result, Shared, Vcpu};

/// Memory of the guest, which most limits on pinned memory allow.
const SIZE: u64 = 6 << 20;
/// Bytes that the guest writes in a second.
const RATE: u64 = 8 << 20;
/// The section with the registers of the guest.
const CPU: &str = "example/cpu";
/// How long a side waits for the other one.
const PATIENCE: Duration = Duration::from_secs(10);

/// The machine at the source.
struct Computer {
    memory: Arc<Memory>,
    events: [EventFd; 2],
    vcpu: Option<Vcpu>,
    /// What the guest has written, also when it is stopped.
    shared: Arc<Shared>,
    cpu: Option<Cpu>,
    /// The disk, and where it is copied to.
    copy: Option<(PathBuf, PathBuf)>,
}

impl Machine for Computer {
    fn track(&mut self) -> std::result::Result<(), MachineError> {
        // It always tracks. What was written up to now is copied anyway.
        Ok(())
    }

    fn written(&mut self, _region: &str, pages: &mut DirtyPages) -> std::result::Result<(), MachineError> {
        self.shared.take_dirty(pages);
        Ok(())
    }

    fn untrack(&mut self) {}

    fn pause(&mut self) -> std::result::Result<(), MachineError> {
        self.cpu = Some(self.vcpu.take().ok_or("it does not run")?.pause()?);
        Ok(())
    }

    fn save(&mut self) -> std::result::Result<Sections, MachineError> {
        if let Some((from, to)) = &self.copy {
            // No request is in flight, and no other comes.
            std::fs::copy(from, to)?;
        }
        let cpu = self.cpu.as_ref().ok_or("it was not stopped")?;
        Ok(Sections::from_iter([Section::json(CPU, 1, cpu)?]))
    }

    fn resume(&mut self) {
        let resumed = self.cpu.take().map(|cpu| Vcpu::resume(&self.memory, self.events.clone(), cpu));
        match resumed {
            Some(Ok(vcpu)) => {
                self.shared = Arc::clone(&vcpu.shared);
                self.vcpu = Some(vcpu);
            }
            Some(Err(error)) => eprintln!("the guest does not go on: {error}"),
            None => {}
        }
    }

    fn step(&mut self, step: Step) {
        println!("source: {step:?}");
    }
}

/// The machine at the destination.
#[derive(Default)]
struct Place {
    memory: Option<Arc<Memory>>,
    cpu: Option<Cpu>,
}

impl Target for Place {
    fn memory(&mut self, region: &RegionOffer) -> std::result::Result<Backing, MachineError> {
        if region.name != "ram" || region.size != SIZE {
            return Err(format!("this machine has {SIZE} bytes of memory, called \"ram\"").into());
        }
        let memory = Memory::map("ram", memfd::create(c"ram", SIZE, None)?, 0, SIZE, false)?;
        self.memory = Some(Arc::clone(&memory));
        Ok(Backing::Memory(memory, 0))
    }

    fn load(&mut self, mut sections: Sections) -> std::result::Result<(), MachineError> {
        self.cpu = Some(sections.take(CPU).ok_or("no registers of the guest")?.parse(1)?);
        Ok(sections.ensure_consumed()?)
    }

    fn step(&mut self, step: Step) {
        println!("destination: {step:?}");
    }
}

fn source(device: &str, socket: &str, copy: Option<(PathBuf, PathBuf)>) -> Result<()> {
    let memory = Memory::map("ram", memfd::create(c"ram", SIZE, None)?, 0, SIZE, false)?;
    let mut disk = Device::<VhostVdpaFd>::open(device)?.negotiate(Features::NONE)?;
    disk.map_memory("ram", &memory, 0, BASE, SIZE, Perm::RW)?;
    let events = [EventFd::new()?, EventFd::new()?];
    let [kick, call] = events.clone();
    disk.add_guest_queue(QUEUE, PLACE, kick, call)?;
    disk.start()?;
    let vcpu = Vcpu::boot(&memory, events.clone(), RATE)?;
    std::thread::sleep(Duration::from_millis(300));
    let shared = Arc::clone(&vcpu.shared);
    let mut computer = Computer { memory, events, vcpu: Some(vcpu), shared, cpu: None, copy };
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    match migrate::send(&mut disk, &mut computer, &mut stream, &Plan::default()) {
        Ok(report) => {
            let cpu = computer.cpu.as_ref().map_or(0, |cpu| cpu.done);
            println!(
                "source: {} rounds, downtime {:?}, {cpu} requests so far",
                report.rounds.len(),
                report.downtime
            );
            for (phase, time) in &report.phases {
                println!("source: {phase} {time:?}");
            }
            Ok(())
        }
        Err(SendError::Here(error)) => {
            println!("source: the guest runs on here: {}", vdpa_client::error::chain(&error));
            let done = computer.vcpu.take().ok_or("it does not run")?.pause()?.done;
            println!("source: {done} requests");
            Ok(())
        }
        // A real monitor asks the destination, or has it fenced.
        Err(error) => Err(error.into()),
    }
}

fn destination(device: &str, socket: &str) -> Result<()> {
    let listener = UnixListener::bind(socket)?;
    println!("destination: waits");
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut place = Place::default();
    let prepared =
        Arrival::accept(stream)?.prepare(Device::<VhostVdpaFd>::open(device)?, true, &mut place)?;
    let landed: Landed<VhostVdpaFd> = match prepared.receive(&mut place)? {
        Arrived::Landed(landed) => landed,
        // A real monitor asks the source, or waits until it is fenced, and calls `start`.
        Arrived::Waiting(waiting) => {
            return Err(format!("not heard of the source: {}", waiting.reason).into());
        }
    };
    let queue = landed.session.guest_queue(QUEUE)?;
    let events = [queue.kick().clone(), queue.call().clone()];
    let memory = place.memory.take().ok_or("no memory")?;
    let cpu = place.cpu.take().ok_or("no registers")?;
    let before = cpu.done;
    let vcpu = Vcpu::resume(&memory, events, cpu)?;
    std::thread::sleep(Duration::from_millis(500));
    let done = vcpu.pause()?.done;
    if done <= before {
        return Err("the guest does not get answers here".into());
    }
    println!("destination: {} requests here, nothing lost in {DISK} bytes of disk", done - before);
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["source", device, socket] => source(device, socket, None),
        ["source", device, socket, "--copy", from, to] => {
            source(device, socket, Some((from.into(), to.into())))
        }
        ["destination", device, socket] => destination(device, socket),
        _ => Err("usage: migrate source DEVICE SOCKET [--copy FILE FILE] | destination DEVICE SOCKET".into()),
    }
}
