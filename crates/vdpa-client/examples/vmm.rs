//! A virtual machine monitor over `vm-memory` and `vmm-sys-util` that is replaced under load.
//!
//! `cargo run -p vdpa-client --features vm-memory,vmm-sys-util --example vmm -- /run/vdpad/dev/vhost-vdpa-0 5`: five updates of a
//! program with a disk of `vdpad` (kind `blk`), which is overwritten. Guest memory has two regions and is mapped once in each program.
//! Three threads, in place of virtual CPUs, drive a queue each: they write a block, read it back and compare, while the successor
//! starts, and stop for the switch with requests in flight.

use std::{error::Error, fs::File, os::fd::AsRawFd, thread, time::Duration};

use vdpa_client::blk::{RequestHeader, kind};
use vdpa_client::state::{Section, Sections};
use vdpa_client::types::{Perm, QueueIndex};
use vdpa_client::update::{self, Devices, Image, Plan, Via};
use vdpa_client::vhost_vdpa::VhostVdpaFd;
use vdpa_client::{Device, Session, features::Features, memfd, queue::Queue, ring::Buffer};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Guest addresses and sizes of the memory: rings in the first region, buffers in the second.
const RAM: [(GuestAddress, usize); 2] = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 20)];
const QUEUES: u16 = 3;
/// Section with the number of updates made.
const MADE: &str = "example/made";

/// A thread of the guest with its queue. The token of a request is twice the number of its block, and one more for a read.
struct Vcpu {
    queue: Queue,
    ram: GuestMemoryMmap,
    stop: EventFd,
}

impl Vcpu {
    fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress((1 << 32) + u64::from(self.queue.index().0) * 0x1_0000 + offset)
    }

    fn pattern(&self, token: u64) -> [u8; 4096] {
        [(token / 2 + 7 * u64::from(self.queue.index().0)).to_le_bytes()[0]; 4096]
    }

    fn submit(&mut self, token: u64) -> Result<()> {
        let write = token.is_multiple_of(2);
        let sector = 8 * (u64::from(self.queue.index().0) * 64 + token / 2 % 64);
        let header = RequestHeader { kind: if write { kind::OUT } else { kind::IN }, ioprio: 0, sector };
        self.ram.write_slice(&header.encode(), self.at(0))?;
        self.ram.write_obj(0xff_u8, self.at(16))?;
        self.ram.write_slice(&if write { self.pattern(token) } else { [0; 4096] }, self.at(4096))?;
        let buffer = |offset, len| Buffer { iova: self.at(offset).0, len };
        let all = [buffer(0, 16), buffer(4096, 4096), buffer(16, 1)];
        let readable = if write { 2 } else { 1 };
        self.queue.submit(&all[..readable], &all[readable..], token)?;
        Ok(self.queue.notify()?)
    }

    /// Runs until it is stopped, with a request in flight; returns the queue and the number of blocks.
    fn run(mut self) -> Result<(Queue, u64)> {
        let epoll = Epoll::new()?;
        for (fd, data) in [(self.queue.call().as_raw_fd(), 0), (self.stop.as_raw_fd(), 1)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data))?;
        }
        if self.queue.in_flight() == 0 {
            self.submit(0)?;
        }
        let mut blocks = 0;
        loop {
            while let Some(done) = self.queue.reap()? {
                let mut data = [0; 4096];
                self.ram.read_slice(&mut data, self.at(4096))?;
                if self.ram.read_obj::<u8>(self.at(16))? != 0 || data != self.pattern(done.token) {
                    return Err(format!("request {} is not as it was written", done.token).into());
                }
                blocks = done.token / 2 + 1;
                self.submit(done.token + 1)?;
            }
            if !self.queue.arm()? {
                let mut events = [EpollEvent::default(); 2];
                let count = epoll.wait(-1, &mut events)?;
                if events[..count].iter().any(|event| event.data() == 1) {
                    return Ok((self.queue, blocks));
                }
            }
        }
    }
}

/// The first start: guest memory, and a disk whose rings lie in it.
fn power_on(path: &str) -> Result<(Session<VhostVdpaFd>, GuestMemoryMmap, u64)> {
    let mut ranges = Vec::new();
    for (at, size) in RAM {
        let file = File::from(memfd::create(c"guest-ram", size as u64, None)?);
        ranges.push((at, size, Some(FileOffset::new(file, 0))));
    }
    let ram = GuestMemoryMmap::from_ranges_with_files(ranges)?;
    let mut disk = Device::open(path)?.negotiate(Features::NONE)?;
    disk.map_guest_memory(&ram, Perm::RW)?;
    for index in 0..QUEUES {
        disk.add_queue(QueueIndex(index), 64, "guest@0x0", 0x4000 * u64::from(index))?;
    }
    disk.start()?;
    Ok((disk, ram, 0))
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, path, updates] = args.as_slice() else { return Err("usage: vmm DEVICE UPDATES".into()) };
    let (mut disk, ram, made) = match update::incoming::<VhostVdpaFd>()? {
        None => power_on(path)?,
        Some(mut incoming) => {
            let made: u64 = incoming.sections().take(MADE).ok_or("no state of this program")?.parse(1)?;
            let ram = incoming.guest_memory("disk")?;
            let mut restored = incoming.take_over()?;
            restored.report_to_server();
            println!("{}", restored.report);
            (restored.devices.take("disk").ok_or("no disk")?, ram, made + 1)
        }
    };
    let stop = EventFd::new(EFD_NONBLOCK)?;
    let mut vcpus = Vec::new();
    for index in 0..QUEUES {
        let queue = disk.take_queue(QueueIndex(index))?;
        let vcpu = Vcpu { queue, ram: ram.clone(), stop: stop.try_clone()? };
        vcpus.push(thread::spawn(|| vcpu.run()));
    }
    thread::sleep(Duration::from_millis(50));
    let mapped = std::fs::read_to_string("/proc/self/maps")?.matches("guest-ram").count();
    let plan = Plan::new().section(Section::json(MADE, 1, &made)?);
    let via = Via::Fork(Image::new("/proc/self/exe"));
    let prepared = (made < updates.parse()?).then(|| plan.prepare([("disk", &disk)], via)).transpose()?;
    stop.write(1)?;
    let mut blocks = 0;
    for vcpu in vcpus {
        let (queue, done) = vcpu.join().map_err(|_| "a virtual CPU has crashed")??;
        disk.put_queue(queue)?;
        blocks += done;
    }
    println!("{blocks} blocks by {QUEUES} queues; guest memory: {} regions, {mapped} mappings", RAM.len());
    let Some(prepared) = prepared else { return Ok(()) };
    // A real monitor would go on with the devices in the error.
    let departed = prepared.switch(Devices::one("disk", disk), Sections::new()).map_err(|f| f.error)?;
    let status = departed.child.map(|mut child| child.wait()).transpose()?;
    if status.is_some_and(|status| status.success()) {
        Ok(())
    } else {
        Err("the successor has failed".into())
    }
}
