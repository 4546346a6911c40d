//! A machine monitor in small: it knows where a guest's ring is, and nothing of what is in it. The guest, a thread that
//! stands for a virtual CPU, drives the ring itself and does not notice that the program around it is replaced.
//!
//! `cargo run -p vdpa-client --example vmm -- /run/vdpa/dev/vhost-vdpa-0 5`: the monitor starts its successor as a child
//! five times. The disk is overwritten.
//!
//! What is left out of a real one: KVM. There the guest's registers would be read from the virtual CPU, and a new virtual
//! machine would be made around the same memory, since KVM's belong to the address space that made them. The events stay:
//! bind them anew as irqfd and ioeventfd.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vdpa_client::device::Device;
use vdpa_client::memory::Memory;
use vdpa_client::state::{Section, Sections};
use vdpa_client::update::{self, Devices, Image, Plan, Restored, Via};
use vdpa_client::vring::GuestRing;
use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_core::ring::driver::{DriverState, InFlight, SplitDriver};
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::mmap::MapArea;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const SIZE: u64 = 1 << 20;
const QUEUE: QueueIndex = QueueIndex(0);
const RING: u16 = 64;
/// Where the guest has put its ring and its buffers, as the machine's physical addresses.
const PLACE: GuestRing = GuestRing { size: RING, desc: 0x1000, driver: 0x2000, device: 0x3000 };
const BUFFERS: u64 = 0x1_0000;
const BLOCK: u64 = 4096;

/// The monitor's own state: known before, so that a successor can refuse it in time.
const MACHINE: &str = "example/machine";
/// The guest's registers: known only when it is stopped.
const CPU: &str = "example/cpu";

/// What a virtual CPU is to this monitor.
#[derive(Serialize, Deserialize)]
struct Cpu {
    rounds: u64,
    avail_index: u16,
    last_used_index: u16,
    free: u16,
    in_flight: Vec<(u64, Vec<u16>, u32)>,
}

/// The guest's driver of its disk: writes a block, reads it back, and compares.
struct Guest {
    memory: Arc<Memory>,
    ring: SplitDriver<MapArea>,
    kick: EventFd,
    call: EventFd,
    rounds: u64,
}

impl Guest {
    fn areas(memory: &Memory) -> Result<[MapArea; 3]> {
        let map = memory.as_map().ok_or("the monitor has mapped it")?;
        let n = usize::from(RING);
        let area =
            |at: u64, len: usize| Ok::<_, Box<dyn Error + Send + Sync>>(map.area(usize::try_from(at)?, len)?);
        Ok([area(PLACE.desc, 16 * n)?, area(PLACE.driver, 6 + 2 * n)?, area(PLACE.device, 6 + 8 * n)?])
    }

    fn run(mut self, stop: &AtomicBool) -> Result<Cpu> {
        let map = self.memory.as_map().cloned().ok_or("the monitor has mapped it")?;
        let at = |offset: u64, len: u32| Buffer { iova: BUFFERS + offset, len };
        while !stop.load(Ordering::Relaxed) {
            // A write is begun in one round and heard of in the next, so that there always is one in flight.
            if self.ring.in_flight() == 0 {
                self.rounds += 1;
                let pattern = [u8::try_from(self.rounds % 251)?; 4096];
                let header = RequestHeader { kind: kind::OUT, ioprio: 0, sector: 8 * (self.rounds % 64) };
                map.write(usize::try_from(BUFFERS)?, &header.encode())?;
                map.write(usize::try_from(BUFFERS + 16)?, &[0xff])?;
                map.write(usize::try_from(BUFFERS + BLOCK)?, &pattern)?;
                self.ring.add(&[at(0, 16), at(BLOCK, 4096)], &[at(16, 1)], self.rounds)?;
                if self.ring.publish()? {
                    self.kick.signal();
                }
            } else if let Some(done) = self.ring.pop_used()? {
                let mut status = [0xff];
                map.read(usize::try_from(BUFFERS + 16)?, &mut status)?;
                if done.token != self.rounds || status != [0] {
                    return Err(
                        format!("round {}: answered {} with {status:?}", self.rounds, done.token).into()
                    );
                }
            } else if !self.ring.enable_interrupts()? {
                let _ = self.call.wait(Some(Duration::from_millis(1)));
                let _ = self.call.drain();
            }
        }
        let DriverState { avail_index, last_used_index, free, in_flight, .. } = self.ring.state();
        let in_flight = in_flight.into_iter().map(|r| (r.token, r.descriptors, r.writable)).collect();
        Ok(Cpu { rounds: self.rounds, avail_index, last_used_index, free, in_flight })
    }
}

/// A running virtual CPU.
struct Vcpu {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Cpu>>,
}

impl Vcpu {
    fn start(guest: Guest) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        Self { stop, thread: thread::spawn(move || guest.run(&flag)) }
    }

    /// Stops it wherever it is; requests stay in flight.
    fn pause(self) -> Result<Cpu> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| "the guest has crashed")?
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: vmm DEVICE UPDATES")?;
    let wanted: u64 = args.next().ok_or("usage: vmm DEVICE UPDATES")?.parse()?;
    let (devices, vcpu, made) = match update::incoming::<VhostVdpaFd>()? {
        None => power_on(&path)?,
        Some(incoming) => {
            let restored = incoming.understands(&[(MACHINE, 1..=1), (CPU, 1..=1)])?.take_over()?;
            go_on(restored)?
        }
    };
    thread::sleep(Duration::from_millis(50));
    if made == wanted {
        let cpu = vcpu.pause()?;
        println!("{made} updates, the guest wrote {} blocks and lost none", cpu.rounds);
        return Ok(());
    }
    // The guest runs while the successor starts, looks at everything and maps the memory.
    let plan = Plan::new().section(Section::json(MACHINE, 1, &made)?).late_section(CPU, 1, false);
    let prepared = plan.prepare(&devices, Via::Fork(Image::new("/proc/self/exe")))?;
    let cpu = vcpu.pause()?;
    let late = Sections::from_iter([Section::json(CPU, 1, &cpu)?]);
    match prepared.switch(devices, late) {
        // The terminal waits for the first program; so this one waits for the second.
        Ok(departed) => match departed.child.map(|mut child| child.wait()).transpose()? {
            Some(status) if !status.success() => Err(format!("the successor: {status}").into()),
            _ => Ok(()),
        },
        // A real program would let the guest go on with `failed.devices`.
        Err(failed) => Err(failed.error.into()),
    }
}

type Machine = (Devices<VhostVdpaFd>, Vcpu, u64);

/// A machine that begins: the guest's firmware finds the disk and places its ring.
fn power_on(path: &str) -> Result<Machine> {
    let memory = Memory::map("ram", memfd::create(c"ram", SIZE, None)?, 0, SIZE, false)?;
    let mut disk = Device::<VhostVdpaFd>::open(path)?.negotiate(Features::NONE)?;
    disk.map_memory("ram", &memory, 0, 0, SIZE, Perm::RW)?;
    let events = (EventFd::new()?, EventFd::new()?);
    disk.add_guest_queue(QUEUE, PLACE, events.0.clone(), events.1.clone())?;
    disk.start()?;
    let [desc, avail, used] = Guest::areas(&memory)?;
    let ring = SplitDriver::new(RING, Features::NONE, desc, avail, used)?;
    let guest = Guest { memory, ring, kick: events.0, call: events.1, rounds: 0 };
    Ok((Devices::one("disk", disk), Vcpu::start(guest), 0))
}

/// A machine that goes on in this process.
fn go_on(mut restored: Restored<VhostVdpaFd>) -> Result<Machine> {
    let mut section = |name: &str| restored.sections.take(name).ok_or(format!("no section {name}"));
    let made: u64 = section(MACHINE)?.parse(1)?;
    let cpu: Cpu = section(CPU)?.parse(1)?;
    let disk = restored.devices.get("disk").ok_or("no disk")?;
    let memory = Arc::clone(disk.region("ram").ok_or("no memory")?.memory());
    let queue = disk.guest_queue(QUEUE)?;
    let in_flight = cpu.in_flight.into_iter();
    let state = DriverState {
        size: RING,
        features: Features::NONE,
        avail_index: cpu.avail_index,
        last_used_index: cpu.last_used_index,
        free: cpu.free,
        in_flight: in_flight
            .map(|(token, descriptors, writable)| InFlight { token, descriptors, writable })
            .collect(),
    };
    let [desc, avail, used] = Guest::areas(&memory)?;
    let ring = SplitDriver::adopt(state, desc, avail, used)?;
    let (kick, call) = (queue.kick().clone(), queue.call().clone());
    let vcpu = Vcpu::start(Guest { memory, ring, kick, call, rounds: cpu.rounds });
    restored.report_to_server();
    println!("{}", restored.report);
    Ok((restored.devices, vcpu, made + 1))
}
