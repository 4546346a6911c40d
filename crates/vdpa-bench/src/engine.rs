//! Issues random reads and writes through a session and judges what comes back.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vdpa_client::device::DeviceFile;
use vdpa_client::dma::{Backing, RegionSpec};
use vdpa_client::queue::Queue;
use vdpa_client::{Device, Session};
use vdpa_core::Errno;
use vdpa_core::blk::{HEADER_BYTES, RequestHeader, SECTOR, Status, kind};
use vdpa_core::features::Features;
use vdpa_core::ring::driver::AddError;
use vdpa_core::ring::{Buffer, Fault, RingError};
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::memfd;
use vdpa_sys::mmap::SharedMap;

use super::block::Pattern;
use super::layout::{Layout, SLOT_BYTES};
use super::ledger::{Ledger, LedgerError};
use super::requests::{Kind, Request, Requests, SavedRequests};
use super::timeline::Timeline;
use super::wire::{TenantConfig, Totals};

const RAM: &str = "ram";
const QUEUE: QueueIndex = QueueIndex(0);
/// Where guest memory begins for the device: not at 0, so that a request with an address left out fails.
const RAM_IOVA: u64 = 1 << 20;
const STATUS_AT: u64 = HEADER_BYTES;
/// A status no device writes.
const NO_STATUS: u8 = 0xff;
/// Tries to find a block or a buffer that is not in use.
const TRIES: usize = 64;

/// Why the load cannot go on.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The configuration makes no sense.
    #[error("{what}")]
    Config {
        /// What is wrong and what would be right.
        what: String,
    },
    /// The device or its set-up.
    #[error("the device cannot be used")]
    Device(#[from] vdpa_client::Error),
    /// The ring.
    #[error("the queue is broken")]
    Ring(#[from] RingError),
    /// A request could not be added.
    #[error("a request cannot be added")]
    Add(#[from] AddError),
    /// Guest memory.
    #[error("guest memory cannot be accessed")]
    Memory(#[from] Fault),
    /// The ledger.
    #[error("the ledger cannot be used")]
    Ledger(#[from] LedgerError),
    /// A system call.
    #[error("cannot {action}")]
    System {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: Errno,
    },
}

/// State of an engine that travels to the next image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedEngine {
    requests: SavedRequests,
    totals: Totals,
    next_sequence: u64,
    chance: u64,
    last_completion_ns: u64,
}

/// Drives one block device.
#[derive(Debug)]
pub struct Engine<D> {
    session: Session<D>,
    ram: SharedMap,
    ledger: Ledger,
    timeline: Timeline,
    requests: Requests,
    totals: Totals,
    next_sequence: u64,
    chance: Pattern,
    last_completion_ns: u64,
    /// When the first completion of the last batch was seen.
    batch_ns: u64,
    layout: Layout,
    scratch: Vec<u8>,
    /// From submission to completion in ns, when somebody wants to know.
    latency: Option<Histogram<u64>>,
}

/// Features the load asks for.
pub const WANTED: Features = Features::of(&[
    Features::BLK_FLUSH,
    Features::BLK_BLK_SIZE,
    Features::RING_EVENT_IDX,
    Features::RING_PACKED,
]);

impl<D: DeviceFile> Engine<D> {
    /// Opens the device and sets everything up; nothing is issued yet. Populates all memory, which takes
    /// about 0.1 s per GiB.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn new(config: &TenantConfig, ledger: Ledger, timeline: Timeline) -> Result<Self, LoadError> {
        let layout = Layout::new(config)?;
        let system = |action| move |source| LoadError::System { action, source };
        let ram = memfd::create(c"vdpa-load-ram", config.memory, config.pages.huge())
            .map_err(system("create guest memory"))?;
        let mut session = Device::<D>::open(&config.device)?.negotiate(WANTED)?;
        check_disk(&session.config()?, &ledger, layout.block_size)?;
        session.map(vec![RegionSpec {
            name: RAM.to_owned(),
            backing: Backing::Object(ram),
            iova: RAM_IOVA,
            size: config.memory,
            perm: Perm::RW,
            populate: true,
        }])?;
        session.add_queue(QUEUE, layout.ring_size, RAM, 0)?;
        session.start()?;
        Ok(Self {
            ram: ram_of(&session)?,
            session,
            ledger,
            timeline,
            requests: Requests::new(layout.queue_depth),
            totals: Totals::default(),
            next_sequence: 1,
            chance: Pattern(config.seed),
            last_completion_ns: monotonic_ns(),
            batch_ns: 0,
            scratch: vec![0; usize::from(u16::MAX).max(config.block_size as usize)],
            layout,
            latency: None,
        })
    }

    /// Goes on where another image stopped.
    ///
    /// # Errors
    /// [`LoadError::Config`] when the saved state contradicts itself.
    pub fn restore(
        config: &TenantConfig,
        session: Session<D>,
        (ledger, timeline): (Ledger, Timeline),
        saved: SavedEngine,
    ) -> Result<Self, LoadError> {
        let layout = Layout::new(config)?;
        let SavedEngine { requests, totals, next_sequence, chance, last_completion_ns } = saved;
        let requests = Requests::restore(requests)
            .ok_or_else(|| LoadError::Config { what: "the saved requests contradict each other".into() })?;
        Ok(Self {
            ram: ram_of(&session)?,
            session,
            ledger,
            timeline,
            requests,
            totals,
            next_sequence,
            chance: Pattern(chance),
            last_completion_ns,
            batch_ns: 0,
            scratch: vec![0; usize::from(u16::MAX).max(config.block_size as usize)],
            layout,
            latency: None,
        })
    }

    /// Takes the engine apart for an update.
    #[must_use]
    pub fn into_parts(self) -> (Session<D>, SavedEngine, Ledger, Timeline) {
        let saved = SavedEngine {
            requests: self.requests.save(),
            totals: self.totals,
            next_sequence: self.next_sequence,
            chance: self.chance.0,
            last_completion_ns: self.last_completion_ns,
        };
        (self.session, saved, self.ledger, self.timeline)
    }

    /// The session.
    #[must_use]
    pub const fn session(&self) -> &Session<D> {
        &self.session
    }

    /// Guest memory.
    #[must_use]
    pub const fn ram(&self) -> &SharedMap {
        &self.ram
    }

    /// Counters until now.
    #[must_use]
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Measures how long requests take from now on.
    pub fn measure_latency(&mut self) {
        // Three digits; fails only for a precision beyond five.
        self.latency = Histogram::new(3).ok();
    }

    /// What was measured, in ns.
    #[must_use]
    pub const fn latency(&self) -> Option<&Histogram<u64>> {
        self.latency.as_ref()
    }

    /// Requests in flight.
    #[must_use]
    pub const fn in_flight(&self) -> usize {
        self.requests.in_flight()
    }

    /// When the last completion was seen, `CLOCK_MONOTONIC` in ns.
    #[must_use]
    pub const fn last_completion_ns(&self) -> u64 {
        self.last_completion_ns
    }

    /// When the first completion of the last [`reap`](Self::reap) was seen, `CLOCK_MONOTONIC` in ns.
    #[must_use]
    pub const fn batch_ns(&self) -> u64 {
        self.batch_ns
    }

    /// Prepares for waiting on [`Queue::call`]; whether there is no need to wait.
    ///
    /// # Errors
    /// [`LoadError::Ring`].
    pub fn arm(&mut self) -> Result<bool, LoadError> {
        Ok(self.queue_mut()?.arm()?)
    }

    /// The queue driven.
    ///
    /// # Errors
    /// [`LoadError::Device`] never, as long as the session is the one this engine set up.
    pub fn queue(&self) -> Result<&Queue, LoadError> {
        Ok(self.session.queue(QUEUE)?)
    }

    fn queue_mut(&mut self) -> Result<&mut Queue, LoadError> {
        Ok(self.session.queue_mut(QUEUE)?)
    }

    /// Fills the queue up to its depth and tells the device.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn issue(&mut self) -> Result<(), LoadError> {
        while let Some(slot) = self.requests.free_slot() {
            let Some((block, buffer)) = self.choose() else { break };
            if self.chance.below(100) < self.layout.read_percent {
                let sequence = self.ledger.expected(block)?.sequence;
                self.submit(slot, Kind::Read, block, sequence, buffer)?;
            } else {
                let sequence = self.next_sequence;
                self.next_sequence += 1;
                let stamp = self.ledger.begin(block, sequence)?;
                let mut scratch = std::mem::take(&mut self.scratch);
                let data = scratch.get_mut(..self.block_len()).unwrap_or_default();
                stamp.write(data);
                let written = self.ram.write(self.at(buffer), data);
                self.scratch = scratch;
                written?;
                self.submit(slot, Kind::Write, block, sequence, buffer)?;
            }
        }
        Ok(self.queue_mut()?.notify()?)
    }

    /// Issues a flush if the device has that, and nothing is in flight.
    ///
    /// Returns whether one was issued.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn flush(&mut self) -> Result<bool, LoadError> {
        if !self.session.features().has(Features::BLK_FLUSH) {
            return Ok(false);
        }
        let Some(slot) = self.requests.free_slot() else { return Ok(false) };
        self.submit(slot, Kind::Flush, 0, 0, self.layout.data)?;
        self.queue_mut()?.notify()?;
        Ok(true)
    }

    /// A block and a buffer that no request in flight uses.
    fn choose(&mut self) -> Option<(u64, u64)> {
        let block = (0..TRIES).find_map(|_| {
            let block = self.chance.below(self.ledger.blocks());
            (!self.requests.touches(block)).then_some(block)
        })?;
        let buffer = (0..TRIES).find_map(|_| {
            let buffer = self.layout.data + self.chance.below(self.layout.buffers) * self.layout.block_size;
            (!self.requests.uses(buffer)).then_some(buffer)
        })?;
        Some((block, buffer))
    }

    fn submit(
        &mut self,
        slot: usize,
        request: Kind,
        block: u64,
        sequence: u64,
        buffer: u64,
    ) -> Result<(), LoadError> {
        let header_at = self.layout.slots + SLOT_BYTES * slot as u64;
        let status_at = header_at + STATUS_AT;
        let kind = match request {
            Kind::Read => kind::IN,
            Kind::Write => kind::OUT,
            Kind::Flush => kind::FLUSH,
        };
        let sector = block * (self.layout.block_size / SECTOR);
        let header = RequestHeader { kind, ioprio: 0, sector };
        self.ram.write(self.at(header_at), &header.encode())?;
        self.ram.write(self.at(status_at), &[NO_STATUS])?;

        let piece =
            |at: u64, len: u64| Buffer { iova: RAM_IOVA + at, len: u32::try_from(len).unwrap_or(u32::MAX) };
        let header = piece(header_at, HEADER_BYTES);
        let status = piece(status_at, 1);
        let data = piece(buffer, self.layout.block_size);
        let submitted_ns = monotonic_ns();
        let made = Request { kind: request, block, sequence, buffer, submitted_ns, overdue: false };
        let Some(token) = self.requests.insert(slot, made) else { return Ok(()) };
        let queue = self.session.queue_mut(QUEUE)?;
        let added = match request {
            Kind::Read => queue.submit(&[header], &[data, status], token),
            Kind::Write => queue.submit(&[header, data], &[status], token),
            Kind::Flush => queue.submit(&[header], &[status], token),
        };
        Ok(added?)
    }

    /// Takes and judges all completions there are; returns how many.
    ///
    /// # Errors
    /// [`LoadError`]; a buffer used twice breaks the ring and is counted before.
    pub fn reap(&mut self) -> Result<u64, LoadError> {
        let mut count = 0;
        loop {
            let done = match self.queue_mut()?.reap() {
                Ok(Some(done)) => done,
                Ok(None) => break,
                Err(e) => {
                    if matches!(e, RingError::NotInFlight { .. }) {
                        self.totals.duplicate += 1;
                    }
                    return Err(e.into());
                }
            };
            // Before it is judged, which takes longer than the device needs.
            self.last_completion_ns = monotonic_ns();
            if count == 0 {
                self.batch_ns = self.last_completion_ns;
            }
            count += 1;
            match self.requests.complete(done.token) {
                Ok(request) => self.judge(Requests::slot(done.token), &request)?,
                Err(_) => self.totals.duplicate += 1,
            }
        }
        if count > 0 {
            self.timeline.record(self.last_completion_ns, count);
        }
        Ok(count)
    }

    fn judge(&mut self, slot: usize, request: &Request) -> Result<(), LoadError> {
        self.totals.requests += 1;
        if let Some(latency) = &mut self.latency {
            // It grows as needed, up to any value.
            let _ = latency.record(self.last_completion_ns.saturating_sub(request.submitted_ns));
        }
        if request.overdue {
            // Late, but not lost.
            self.totals.lost = self.totals.lost.saturating_sub(1);
        }
        let mut status = [NO_STATUS];
        self.ram.read(self.at(self.layout.slots + SLOT_BYTES * slot as u64 + STATUS_AT), &mut status)?;
        if status != [Status::Ok.byte()] {
            self.totals.errors += 1;
            return Ok(());
        }
        match request.kind {
            Kind::Flush => {}
            Kind::Write => {
                self.totals.writes += 1;
                self.ledger.commit(request.block, request.sequence)?;
            }
            Kind::Read => {
                self.totals.reads += 1;
                let mut scratch = std::mem::take(&mut self.scratch);
                let data = scratch.get_mut(..self.block_len()).unwrap_or_default();
                let read = self.ram.read(self.at(request.buffer), data);
                let verdict = self.ledger.expected(request.block).map(|s| s.verify(data, None));
                self.scratch = scratch;
                read?;
                if let Err(corruption) = verdict? {
                    self.totals.corrupt += 1;
                    self.totals.first_corruption.get_or_insert_with(|| corruption.to_string());
                }
            }
        }
        Ok(())
    }

    /// Counts requests that take longer than `deadline` as lost.
    pub fn check_deadline(&mut self, deadline: Duration) {
        let deadline = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
        self.totals.lost += self.requests.mark_overdue(monotonic_ns(), deadline);
    }

    fn block_len(&self) -> usize {
        self.at(self.layout.block_size)
    }

    /// An offset in guest memory, which is mapped and therefore below `usize::MAX`; a larger one faults.
    fn at(&self, offset: u64) -> usize {
        usize::try_from(offset).unwrap_or(usize::MAX)
    }
}

fn ram_of<D: DeviceFile>(session: &Session<D>) -> Result<SharedMap, LoadError> {
    let map = session.region(RAM).and_then(|r| r.map());
    map.cloned().ok_or_else(|| LoadError::Config { what: "the session has no guest memory".into() })
}

fn check_disk(config: &[u8], ledger: &Ledger, block_size: u64) -> Result<(), LoadError> {
    let capacity = config.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let needed = ledger.blocks().saturating_mul(block_size / SECTOR);
    if ledger.block_size() != block_size || ledger.blocks() == 0 || needed > capacity {
        let what = format!(
            "the ledger is for {} blocks of {} bytes, the disk has {capacity} sectors and blocks of {block_size} \
             bytes were asked for",
            ledger.blocks(),
            ledger.block_size()
        );
        return Err(LoadError::Config { what });
    }
    Ok(())
}
