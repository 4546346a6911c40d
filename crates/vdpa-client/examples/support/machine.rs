//! A machine without a virtual CPU: a thread in place of its guest, which writes and reads blocks of a disk and verifies each, and
//! writes memory at a given rate. It can be stopped at any point, and goes on from what was saved, in another process too.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vdpa_client::memory::Memory;
use vdpa_client::session::DirtyPages;
use vdpa_client::vring::GuestRing;
use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_core::ring::driver::{DriverState, InFlight, SplitDriver};
use vdpa_core::types::QueueIndex;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::mmap::{MapArea, SharedMap};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

pub(crate) const QUEUE: QueueIndex = QueueIndex(0);
/// First guest-physical address of the memory.
pub(crate) const BASE: u64 = 0x10_0000;
const PAGE: u64 = 4096;
/// Bytes of a page and of a block.
const BYTES: usize = 4096;
const RING: u16 = 64;
/// Where the guest has its ring.
pub(crate) const PLACE: GuestRing =
    GuestRing { size: RING, desc: BASE, driver: BASE + 0x1000, device: BASE + 0x2000 };
/// Requests in flight; each has a page for its data and its header and status in another one.
const SLOTS: u64 = 8;
const HEADERS: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
/// From here on the guest writes memory of its own.
const OWN: u64 = 0x10_0000;
/// Blocks of the disk that are used.
pub(crate) const BLOCKS: u64 = 256;
/// Bytes of disk that the guest needs.
pub(crate) const DISK: u64 = BLOCKS * PAGE;

/// What the registers of a virtual CPU would be: all that the guest keeps outside of its memory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Cpu {
    random: u64,
    /// Requests that were answered.
    pub(crate) done: u64,
    /// Version of each block.
    versions: Vec<u64>,
    /// Block of each slot, and whether it is written; `None` for a free one.
    slots: Vec<Option<(u64, bool)>>,
    /// Pages of its own memory, and how often it has gone through them.
    next_page: u64,
    lap: u64,
    /// Bytes of memory to be written in a second.
    pub(crate) rate: u64,
    avail_index: u16,
    last_used_index: u16,
    free: u16,
    in_flight: Vec<(u64, Vec<u16>, u32)>,
}

/// What the guest and whoever stops it share.
#[derive(Debug)]
pub(crate) struct Shared {
    stop: AtomicBool,
    /// Pages that the guest has written, as a hypervisor's dirty log would have them.
    dirty: Vec<AtomicU64>,
    /// The longest time in ns between two requests that were answered.
    pub(crate) gap: AtomicU64,
    /// As [`Cpu::done`].
    pub(crate) done: AtomicU64,
}

/// A guest that runs.
pub(crate) struct Vcpu {
    pub(crate) shared: Arc<Shared>,
    thread: JoinHandle<Result<Cpu>>,
}

impl Vcpu {
    /// Starts a machine: its firmware finds the disk and sets up its ring. `rate` bytes of memory are written in a second.
    pub(crate) fn boot(memory: &Arc<Memory>, events: [EventFd; 2], rate: u64) -> Result<Self> {
        let [desc, avail, used] = areas(memory)?;
        let ring = SplitDriver::new(RING, Features::NONE, desc, avail, used)?;
        let slots = vec![None; usize::try_from(SLOTS)?];
        let versions = vec![0; usize::try_from(BLOCKS)?];
        let cpu = Cpu { random: 1, versions, slots, rate, ..Cpu::default() };
        Self::start(memory, events, ring, cpu)
    }

    /// Continues a guest that was stopped.
    pub(crate) fn resume(memory: &Arc<Memory>, events: [EventFd; 2], cpu: Cpu) -> Result<Self> {
        let in_flight = cpu.in_flight.iter().cloned();
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
        let [desc, avail, used] = areas(memory)?;
        let ring = SplitDriver::adopt(state, desc, avail, used)?;
        Self::start(memory, events, ring, cpu)
    }

    fn start(
        memory: &Arc<Memory>,
        [kick, call]: [EventFd; 2],
        ring: SplitDriver<MapArea>,
        cpu: Cpu,
    ) -> Result<Self> {
        let words = usize::try_from((memory.size() / PAGE).div_ceil(64))?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            dirty: (0..words).map(|_| AtomicU64::new(0)).collect(),
            gap: AtomicU64::new(0),
            done: AtomicU64::new(cpu.done),
        });
        let map = memory.as_map().cloned().ok_or("the machine has mapped it")?;
        let guest = Guest { map, ring, kick, call, cpu, shared: Arc::clone(&shared), last: Instant::now() };
        Ok(Self { shared, thread: thread::spawn(move || guest.run()) })
    }

    /// Stops it at any point. Its requests remain in flight.
    pub(crate) fn pause(self) -> Result<Cpu> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| "the guest has crashed")?
    }

    /// Whether it runs: it ends by itself when something is wrong.
    pub(crate) fn is_alive(&self) -> bool {
        !self.thread.is_finished()
    }
}

impl Shared {
    /// Moves the pages that were written to `pages`.
    pub(crate) fn take_dirty(&self, pages: &mut DirtyPages) {
        let words: Vec<u64> = self.dirty.iter().map(|word| word.swap(0, Ordering::AcqRel)).collect();
        pages.add_words(&words);
    }
}

fn areas(memory: &Memory) -> Result<[MapArea; 3]> {
    let map = memory.as_map().ok_or("the machine has mapped it")?;
    let n = usize::from(RING);
    let area = |at: u64, len: usize| -> Result<MapArea> { Ok(map.area(usize::try_from(at - BASE)?, len)?) };
    Ok([area(PLACE.desc, 16 * n)?, area(PLACE.driver, 6 + 2 * n)?, area(PLACE.device, 6 + 8 * n)?])
}

struct Guest {
    map: SharedMap,
    ring: SplitDriver<MapArea>,
    kick: EventFd,
    call: EventFd,
    cpu: Cpu,
    shared: Arc<Shared>,
    /// When the last request was answered.
    last: Instant,
}

impl Guest {
    fn run(mut self) -> Result<Cpu> {
        let (begun, mut written) = (Instant::now(), 0_u64);
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.submit()?;
            let reaped = self.reap()?;
            // Not all that is late at once: a guest that was stopped does not run faster afterwards.
            let due = u64::try_from(begun.elapsed().as_micros())?.saturating_mul(self.cpu.rate) / 1_000_000;
            let burst = due.saturating_sub(written) / PAGE;
            for _ in 0..burst.min(256) {
                self.write_own_page()?;
            }
            written += burst * PAGE;
            if burst == 0 && reaped == 0 && !self.ring.enable_interrupts()? {
                let _ = self.call.wait(Some(Duration::from_millis(1)));
                let _ = self.call.drain();
            }
        }
        let DriverState { avail_index, last_used_index, free, in_flight, .. } = self.ring.state();
        let in_flight = in_flight.into_iter().map(|r| (r.token, r.descriptors, r.writable)).collect();
        Ok(Cpu { avail_index, last_used_index, free, in_flight, ..self.cpu })
    }

    fn random(&mut self) -> u64 {
        self.cpu.random ^= self.cpu.random << 13;
        self.cpu.random ^= self.cpu.random >> 7;
        self.cpu.random ^= self.cpu.random << 17;
        self.cpu.random
    }

    /// Writes memory, and notes that it did: after it, so that nobody takes the note and misses what was written.
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.map.write(usize::try_from(at)?, bytes)?;
        self.mark(at, bytes.len() as u64);
        Ok(())
    }

    fn mark(&self, at: u64, len: u64) {
        for page in at / PAGE..=(at + len.max(1) - 1) / PAGE {
            let word = usize::try_from(page / 64).ok().and_then(|word| self.shared.dirty.get(word));
            if let Some(word) = word {
                word.fetch_or(1 << (page % 64), Ordering::AcqRel);
            }
        }
    }

    fn submit(&mut self) -> Result<()> {
        let mut any = false;
        for slot in 0..SLOTS {
            let index = usize::try_from(slot)?;
            if self.cpu.slots.get(index).copied().flatten().is_some() {
                continue;
            }
            let block = self.random() % BLOCKS;
            if self.cpu.slots.iter().flatten().any(|(busy, _)| *busy == block) {
                continue;
            }
            let writes = self.random().is_multiple_of(2);
            let (header, data) = (HEADERS + slot * PAGE, DATA + slot * PAGE);
            let kind = if writes { kind::OUT } else { kind::IN };
            self.write(header, &RequestHeader { kind, ioprio: 0, sector: block * 8 }.encode())?;
            self.write(header + 16, &[0xff])?;
            let version = self.cpu.versions.get_mut(usize::try_from(block)?).ok_or("no such block")?;
            *version += u64::from(writes);
            let bytes = if writes { pattern(block, *version) } else { [0xaa; BYTES] };
            self.write(data, &bytes)?;
            let at = |offset: u64, len| Buffer { iova: BASE + offset, len };
            let (head, body, status) = (at(header, 16), at(data, 4096), at(header + 16, 1));
            let added = if writes {
                self.ring.add(&[head, body], &[status], slot)
            } else {
                self.ring.add(&[head], &[body, status], slot)
            };
            added?;
            any = true;
            if let Some(place) = self.cpu.slots.get_mut(index) {
                *place = Some((block, writes));
            }
        }
        if any {
            let kick = self.ring.publish()?;
            self.mark(0, 2 * PAGE);
            if kick {
                self.kick.signal();
            }
        }
        Ok(())
    }

    /// Takes the answers, and verifies what was read; how many.
    fn reap(&mut self) -> Result<u64> {
        let mut count = 0;
        while let Some(done) = self.ring.pop_used()? {
            let slot = self.cpu.slots.get_mut(usize::try_from(done.token)?).ok_or("no such slot")?;
            let (block, writes) = slot.take().ok_or("a request was answered twice")?;
            let (mut status, mut data) = ([0xff], [0; BYTES]);
            self.map.read(usize::try_from(HEADERS + done.token * PAGE + 16)?, &mut status)?;
            self.map.read(usize::try_from(DATA + done.token * PAGE)?, &mut data)?;
            let version = self.cpu.versions.get(usize::try_from(block)?).copied().unwrap_or(0);
            if status != [0] {
                return Err(format!("block {block}: status {status:?}").into());
            }
            if !writes && data != pattern(block, version) {
                return Err(format!("block {block} is not version {version}: lost or damaged").into());
            }
            self.cpu.done += 1;
            count += 1;
        }
        // The driver writes the event index and the descriptors that are free again.
        self.mark(0, 2 * PAGE);
        if count > 0 {
            let gap = u64::try_from(self.last.elapsed().as_nanos())?;
            self.shared.gap.fetch_max(gap, Ordering::Relaxed);
            self.shared.done.store(self.cpu.done, Ordering::Relaxed);
            self.last = Instant::now();
        }
        Ok(count)
    }

    /// Checks the next page of its own memory, and writes the next version of it.
    fn write_own_page(&mut self) -> Result<()> {
        let pages = (self.map.len() as u64).saturating_sub(OWN) / PAGE;
        if pages == 0 {
            return Ok(());
        }
        let at = OWN + self.cpu.next_page * PAGE;
        let mut found = [0; 8];
        self.map.read(usize::try_from(at)?, &mut found)?;
        let (found, expected) = (u64::from_le_bytes(found), self.cpu.lap);
        if found != expected {
            return Err(format!(
                "page {} of memory has {found} and not {expected}: lost",
                self.cpu.next_page
            )
            .into());
        }
        let mut page = [0x5a; BYTES];
        page.first_chunk_mut::<8>().into_iter().for_each(|head| *head = (self.cpu.lap + 1).to_le_bytes());
        self.write(at, &page)?;
        self.cpu.next_page += 1;
        if self.cpu.next_page == pages {
            self.cpu.next_page = 0;
            self.cpu.lap += 1;
        }
        Ok(())
    }
}

/// What a version of a block has; a disk begins with zeros, which are version 0.
fn pattern(block: u64, version: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    if version > 0 {
        let (words, _) = bytes.as_chunks_mut::<16>();
        for (index, word) in words.iter_mut().enumerate() {
            *word = (u128::from(block) << 64 | u128::from(version) << 16 | index as u128).to_le_bytes();
        }
    }
    bytes
}
