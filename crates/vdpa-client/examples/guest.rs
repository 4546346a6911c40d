//! The rings of a guest in a minimal virtual machine monitor, which knows where a ring is, but not its contents. The guest, a thread in place of
//! a virtual CPU, drives the ring itself and does not notice that the monitor is replaced.
//!
//! `cargo run -p vdpa-client --example guest -- /run/vdpad/dev/vhost-vdpa-0 5`: the monitor is replaced five times, each time by
//! a successor that it starts as a child. The disk is overwritten.
//!
//! The example has no KVM. A real monitor would read the guest's registers from the virtual CPU and create a new virtual
//! machine with the same memory, since a KVM machine belongs to the address space that created it. The eventfds remain; the
//! successor binds them again as irqfd and ioeventfd.

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
/// Guest-physical addresses of the ring; [`BUFFERS`] is that of the buffers.
const PLACE: GuestRing = GuestRing { size: RING, desc: 0x1000, driver: 0x2000, device: 0x3000 };
const BUFFERS: u64 = 0x1_0000;
const BLOCK: u64 = 4096;

/// Section with the monitor's own state. It is known before the switch, so that a successor can refuse it in time.
const MACHINE: &str = "example/machine";
/// Section with the guest's registers, which are known only once the guest is stopped.
const CPU: &str = "example/cpu";

/// The saved state of the virtual CPU.
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
            // A write is submitted in one round and completed in a later one, so that one is nearly always in flight.
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

    /// Stops the virtual CPU at any point. Its requests remain in flight.
    fn pause(self) -> Result<Cpu> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| "the guest has crashed")?
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: guest DEVICE UPDATES")?;
    let wanted: u64 = args.next().ok_or("usage: guest DEVICE UPDATES")?.parse()?;
    let (devices, vcpu, made) = match update::incoming::<VhostVdpaFd>()? {
        None => power_on(&path)?,
        Some(incoming) => {
            let restored = incoming.understands(&[(MACHINE, 1..=1), (CPU, 1..=1)])?.take_over()?;
            resume(restored)?
        }
    };
    thread::sleep(Duration::from_millis(50));
    if made == wanted {
        let cpu = vcpu.pause()?;
        println!("{made} updates, the guest wrote {} blocks and lost none", cpu.rounds);
        return Ok(());
    }
    // The guest runs while the successor starts, checks the state and maps the memory.
    let plan = Plan::new().section(Section::json(MACHINE, 1, &made)?).late_section(CPU, 1, false);
    let prepared = plan.prepare(&devices, Via::Fork(Image::new("/proc/self/exe")))?;
    let cpu = vcpu.pause()?;
    let late = Sections::from_iter([Section::json(CPU, 1, &cpu)?]);
    match prepared.switch(devices, late) {
        // The shell waits for the first program only, so each program waits for its successor.
        Ok(departed) => match departed.child.map(|mut child| child.wait()).transpose()? {
            Some(status) if !status.success() => Err(format!("the successor: {status}").into()),
            _ => Ok(()),
        },
        // A real monitor would let the guest continue with `failed.devices`.
        Err(failed) => Err(failed.error.into()),
    }
}

type Machine = (Devices<VhostVdpaFd>, Vcpu, u64);

/// Starts a machine: the guest's firmware finds the disk and sets up its ring.
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

/// Continues the machine in this process.
fn resume(mut restored: Restored<VhostVdpaFd>) -> Result<Machine> {
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
