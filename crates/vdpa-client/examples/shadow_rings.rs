//! Shadow rings: a monitor puts memory of its own behind the ring of a guest, sees every request from then on, and takes it away again. The
//! ring's addresses are mapped all the while.
//!
//! `cargo run -p vdpa-client --example shadow_rings -- /run/vdpad/dev/vhost-vdpa-0 20`: the ring is moved twenty times under load. The
//! disk is overwritten. The device must offer `VHOST_IOTLB_REMAP` and not check that it names the same memory:
//! `vdpactl dev add name sim mgmtdev sim-blk verify_remap off`.
//!
//! The shadow ring has the guest's layout, so the monitor copies descriptors and entries as they are. A real one that migrates its guest
//! would look at them first: what the device may write is what becomes dirty.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use vdpa_client::Session;
use vdpa_client::device::Device;
use vdpa_client::memory::Memory;
use vdpa_client::vring::GuestRing;
use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_core::ring::driver::SplitDriver;
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{MapArea, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const QUEUE: QueueIndex = QueueIndex(0);
const RING: u16 = 64;
/// The guest has its ring here, in a region of its own: REMAP is about whole mappings.
const PLACE: GuestRing = GuestRing { size: RING, desc: 0x1000, driver: 0x2000, device: 0x3000 };
const RINGS: u64 = 0x1000;
const RING_BYTES: u64 = 0x3000;
const BUFFERS: u64 = 0x1_0000;
const SIZE: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const BLOCK_LEN: usize = 4096;

/// The guest: writes a block, reads it back, and compares.
struct Guest {
    map: SharedMap,
    kick: EventFd,
    call: EventFd,
}

impl Guest {
    fn run(&self, stop: &AtomicBool) -> Result<u64> {
        let area = |at: u64, len: usize| -> Result<MapArea> { Ok(self.map.area(usize::try_from(at)?, len)?) };
        let n = usize::from(RING);
        let areas =
            (area(PLACE.desc, 16 * n)?, area(PLACE.driver, 6 + 2 * n)?, area(PLACE.device, 6 + 8 * n)?);
        let mut ring = SplitDriver::new(RING, Features::NONE, areas.0, areas.1, areas.2)?;
        let mut rounds = 0;
        while !stop.load(Ordering::Relaxed) {
            rounds += 1;
            let pattern = [u8::try_from(rounds % 251)?; BLOCK_LEN];
            let sector = 8 * (rounds % 64);
            self.map.write(usize::try_from(BUFFERS + BLOCK)?, &pattern)?;
            self.request(&mut ring, kind::OUT, sector)?;
            self.map.write(usize::try_from(BUFFERS + BLOCK)?, &[0xff; BLOCK_LEN])?;
            self.request(&mut ring, kind::IN, sector)?;
            let mut back = [0; BLOCK_LEN];
            self.map.read(usize::try_from(BUFFERS + BLOCK)?, &mut back)?;
            if back != pattern {
                return Err(format!("round {rounds}: another block was read than was written").into());
            }
        }
        Ok(rounds)
    }

    fn request(&self, ring: &mut SplitDriver<MapArea>, kind: u32, sector: u64) -> Result<()> {
        let at = |offset: u64, len: u32| Buffer { iova: BUFFERS + offset, len };
        self.map.write(usize::try_from(BUFFERS)?, &RequestHeader { kind, ioprio: 0, sector }.encode())?;
        self.map.write(usize::try_from(BUFFERS + 16)?, &[0xff])?;
        let (header, data, status) = (at(0, 16), at(BLOCK, 4096), at(16, 1));
        if kind == kind::OUT {
            ring.add(&[header, data], &[status], sector)?;
        } else {
            ring.add(&[header], &[data, status], sector)?;
        }
        if ring.publish()? {
            self.kick.signal();
        }
        let mut waited = 0;
        while ring.pop_used()?.is_none() {
            if !ring.enable_interrupts()? && !self.call.wait(Some(Duration::from_millis(100))) {
                waited += 1;
            }
            let _ = self.call.drain();
            if waited > 100 {
                return Err("a request is not answered".into());
            }
        }
        let mut status = [0xff];
        self.map.read(usize::try_from(BUFFERS + 16)?, &mut status)?;
        if status == [0] { Ok(()) } else { Err(format!("a request has the status {status:?}").into()) }
    }
}

/// The monitor.
struct Monitor {
    disk: Session<VhostVdpaFd>,
    guest: Arc<Memory>,
    shadow: Arc<Memory>,
    /// The device has the shadow ring.
    shadowed: bool,
    relayed: u64,
}

impl Monitor {
    fn maps(&self) -> Result<(&SharedMap, &SharedMap)> {
        Ok((self.guest.as_map().ok_or("not mapped")?, self.shadow.as_map().ok_or("not mapped")?))
    }

    /// Offsets of an area in the guest's memory and in the shadow.
    fn at(address: u64) -> Result<(usize, usize)> {
        Ok((usize::try_from(address)?, usize::try_from(address - RINGS)?))
    }

    /// Copies what the guest has made available into the shadow ring: the index last.
    fn forward(&mut self) -> Result<()> {
        let (guest, shadow) = self.maps()?;
        let (index, shadow_index) = Self::at(PLACE.driver + 2)?;
        let now = guest.load_u16(index)?;
        let new = now.wrapping_sub(shadow.load_u16(shadow_index)?);
        copy(guest, shadow, PLACE.desc, 16 * usize::from(RING))?;
        copy(guest, shadow, PLACE.driver + 4, 2 * usize::from(RING))?;
        shadow.store_u16(shadow_index, now)?;
        self.relayed += u64::from(new);
        Ok(())
    }

    /// Copies what the device has used back into the guest's ring; whether there was something.
    fn back(&self) -> Result<bool> {
        let (guest, shadow) = self.maps()?;
        let (index, shadow_index) = Self::at(PLACE.device + 2)?;
        let now = shadow.load_u16(shadow_index)?;
        if now == guest.load_u16(index)? {
            return Ok(false);
        }
        copy_back(guest, shadow, PLACE.device + 4, 8 * usize::from(RING))?;
        guest.store_u16(index, now)?;
        Ok(true)
    }

    /// Moves the ring of the device to the other memory, at the same addresses. Nothing is in flight meanwhile, and nothing unmapped.
    fn move_ring(&mut self) -> Result<()> {
        self.disk.suspend()?;
        if self.shadowed {
            self.back()?;
            self.disk.remap_to("ring", &self.guest, RINGS)?;
        } else {
            let (guest, shadow) = self.maps()?;
            copy(guest, shadow, RINGS, usize::try_from(RING_BYTES)?)?;
            self.disk.remap_to("ring", &self.shadow, 0)?;
        }
        self.shadowed = !self.shadowed;
        if self.shadowed {
            self.forward()?;
        }
        self.disk.resume()?;
        Ok(())
    }
}

fn copy(from: &SharedMap, to: &SharedMap, address: u64, len: usize) -> Result<()> {
    let (guest, shadow) = Monitor::at(address)?;
    let mut bytes = vec![0; len];
    from.read(guest, &mut bytes)?;
    Ok(to.write(shadow, &bytes)?)
}

fn copy_back(to: &SharedMap, from: &SharedMap, address: u64, len: usize) -> Result<()> {
    let (guest, shadow) = Monitor::at(address)?;
    let mut bytes = vec![0; len];
    from.read(shadow, &mut bytes)?;
    Ok(to.write(guest, &bytes)?)
}

fn main() -> Result<()> {
    const USAGE: &str = "usage: shadow_rings DEVICE MOVES";
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or(USAGE)?;
    let moves: u64 = args.next().ok_or(USAGE)?.parse()?;
    let object = |name, size| -> Result<Arc<Memory>> {
        Ok(Memory::map(name, memfd::create(c"shadow-rings", size, None)?, 0, size, false)?)
    };
    let (guest, shadow) = (object("ram", SIZE)?, object("shadow", RING_BYTES)?);
    let mut disk = Device::<VhostVdpaFd>::open(&path)?.negotiate(Features::NONE)?;
    disk.map_memory("ring", &guest, RINGS, RINGS, RING_BYTES, Perm::RW)?;
    disk.map_memory("ram", &guest, BUFFERS, BUFFERS, SIZE - BUFFERS, Perm::RW)?;
    // The monitor is between the guest's events and the device's, as it is where it binds them.
    let [kick, call, device_kick, device_call] =
        [EventFd::new()?, EventFd::new()?, EventFd::new()?, EventFd::new()?];
    disk.add_guest_queue(QUEUE, PLACE, device_kick.clone(), device_call.clone())?;
    disk.start()?;
    let map = guest.as_map().cloned().ok_or("not mapped")?;
    let mut monitor = Monitor { disk, guest, shadow, shadowed: false, relayed: 0 };
    let (stop, driver) = (AtomicBool::new(false), Guest { map, kick: kick.clone(), call: call.clone() });
    let rounds = thread::scope(|scope| -> Result<u64> {
        let running = scope.spawn(|| driver.run(&stop));
        let mut made = 0;
        let mut turn = 0;
        let ended = loop {
            turn += 1;
            if kick.wait(Some(Duration::from_millis(1))) && kick.drain() > 0 {
                if monitor.shadowed {
                    monitor.forward()?;
                }
                device_kick.signal();
            }
            let called = device_call.drain() > 0;
            if called | (monitor.shadowed && monitor.back()?) {
                call.signal();
            }
            if running.is_finished() {
                break Ok(());
            }
            if turn % 40 == 0 && made < moves {
                if let Err(error) = monitor.move_ring() {
                    stop.store(true, Ordering::Relaxed);
                    break Err(error);
                }
                made += 1;
                call.signal();
            } else if made == moves {
                stop.store(true, Ordering::Relaxed);
            }
        };
        let rounds = running.join().map_err(|_| "the guest has crashed")?;
        ended.and(rounds)
    })?;
    println!(
        "{moves} moves, {} of {} requests by the shadow ring, nothing lost",
        monitor.relayed,
        2 * rounds
    );
    Ok(())
}
