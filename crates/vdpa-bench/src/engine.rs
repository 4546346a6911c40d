//! [`Engine`]: issues random reads and writes through a session, and verifies what it reads.

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

use super::block::SplitMix64;
use super::journal::{Journal, JournalError};
use super::layout::{Layout, SLOT_BYTES};
use super::requests::{Kind, Request, Requests, SavedRequests};
use super::timeline::Timeline;
use super::wire::{ClientConfig, Totals};

const RAM: &str = "ram";
const QUEUE: QueueIndex = QueueIndex(0);
/// I/O virtual address of guest memory. Not 0, so that a request without an address fails.
const RAM_IOVA: u64 = 1 << 20;
const STATUS_AT: u64 = HEADER_BYTES;
/// A status that no device writes.
const NO_STATUS: u8 = 0xff;
/// Attempts to find a block or a buffer that is not in use.
const TRIES: usize = 64;

/// Why the load cannot continue.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The configuration is invalid.
    #[error("{what}")]
    Config {
        /// What is wrong and what would be right.
        what: String,
    },
    /// The device cannot be set up or driven.
    #[error("the device cannot be used")]
    Device(#[from] vdpa_client::Error),
    /// The ring is broken.
    #[error("the queue is broken")]
    Ring(#[from] RingError),
    /// A request could not be added.
    #[error("a request cannot be added")]
    Add(#[from] AddError),
    /// Guest memory cannot be accessed.
    #[error("guest memory cannot be accessed")]
    Memory(#[from] Fault),
    /// The journal cannot be used.
    #[error("the journal cannot be used")]
    Journal(#[from] JournalError),
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// The operation.
        action: &'static str,
        /// Its error.
        source: Errno,
    },
}

/// State of an engine that is handed to the next image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedEngine {
    requests: SavedRequests,
    totals: Totals,
    next_sequence: u64,
    rng: u64,
    last_completion_ns: u64,
}

/// Drives one block device.
#[derive(Debug)]
pub struct Engine<D> {
    session: Session<D>,
    ram: SharedMap,
    journal: Journal,
    timeline: Timeline,
    requests: Requests,
    totals: Totals,
    next_sequence: u64,
    rng: SplitMix64,
    last_completion_ns: u64,
    /// Time of the first completion of the last batch, `CLOCK_MONOTONIC` in ns.
    batch_ns: u64,
    layout: Layout,
    scratch: Vec<u8>,
    /// Time from submission to completion in ns, if it is measured.
    latency: Option<Histogram<u64>>,
}

/// Features that the load accepts.
pub const WANTED: Features = Features::of(&[
    Features::BLK_FLUSH,
    Features::BLK_BLK_SIZE,
    Features::RING_EVENT_IDX,
    Features::RING_PACKED,
]);

impl<D: DeviceFile> Engine<D> {
    /// Opens the device and sets it up, without issuing a request. Populates guest memory, which takes about 0.1 s per GiB.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn new(config: &ClientConfig, journal: Journal, timeline: Timeline) -> Result<Self, LoadError> {
        let layout = Layout::new(config)?;
        let system = |action| move |source| LoadError::System { action, source };
        let ram = memfd::create(c"vdpa-load-ram", config.memory, config.pages.huge())
            .map_err(system("create guest memory"))?;
        let mut session = Device::<D>::open(&config.device)?.negotiate(WANTED)?;
        check_disk(&session.config()?, &journal, layout.block_size)?;
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
            journal,
            timeline,
            requests: Requests::new(layout.queue_depth),
            totals: Totals::default(),
            next_sequence: 1,
            rng: SplitMix64(config.seed),
            last_completion_ns: monotonic_ns(),
            batch_ns: 0,
            scratch: vec![0; usize::from(u16::MAX).max(config.block_size as usize)],
            layout,
            latency: None,
        })
    }

    /// Continues from the state of another image.
    ///
    /// # Errors
    /// [`LoadError::Config`] when the saved state is inconsistent.
    pub fn restore(
        config: &ClientConfig,
        session: Session<D>,
        (journal, timeline): (Journal, Timeline),
        saved: SavedEngine,
    ) -> Result<Self, LoadError> {
        let layout = Layout::new(config)?;
        let SavedEngine { requests, totals, next_sequence, rng, last_completion_ns } = saved;
        let requests = Requests::restore(requests)
            .ok_or_else(|| LoadError::Config { what: "the saved requests are inconsistent".into() })?;
        Ok(Self {
            ram: ram_of(&session)?,
            session,
            journal,
            timeline,
            requests,
            totals,
            next_sequence,
            rng: SplitMix64(rng),
            last_completion_ns,
            batch_ns: 0,
            scratch: vec![0; usize::from(u16::MAX).max(config.block_size as usize)],
            layout,
            latency: None,
        })
    }

    /// Splits the engine for an update.
    #[must_use]
    pub fn into_parts(self) -> (Session<D>, SavedEngine, Journal, Timeline) {
        let saved = SavedEngine {
            requests: self.requests.save(),
            totals: self.totals,
            next_sequence: self.next_sequence,
            rng: self.rng.0,
            last_completion_ns: self.last_completion_ns,
        };
        (self.session, saved, self.journal, self.timeline)
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

    /// The counters.
    #[must_use]
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Begins to measure latency.
    pub fn measure_latency(&mut self) {
        // Three significant digits; more than five would fail.
        self.latency = Histogram::new(3).ok();
    }

    /// Latency in ns, if it is measured.
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

    /// Enables call signals, to wait on [`Queue::call`]. Returns `true` if completions are there already and waiting is not needed.
    ///
    /// # Errors
    /// [`LoadError::Ring`].
    pub fn arm(&mut self) -> Result<bool, LoadError> {
        Ok(self.queue_mut()?.arm()?)
    }

    /// The queue that it drives.
    ///
    /// # Errors
    /// [`LoadError::Device`] if the session has no such queue, which cannot happen after [`new`](Self::new).
    pub fn queue(&self) -> Result<&Queue, LoadError> {
        Ok(self.session.queue(QUEUE)?)
    }

    fn queue_mut(&mut self) -> Result<&mut Queue, LoadError> {
        Ok(self.session.queue_mut(QUEUE)?)
    }

    /// Fills the queue up to its depth and notifies the device.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn issue(&mut self) -> Result<(), LoadError> {
        while let Some(slot) = self.requests.free_slot() {
            let Some((block, buffer)) = self.choose() else { break };
            if self.rng.below(100) < self.layout.read_percent {
                let sequence = self.journal.expected(block)?.sequence;
                self.submit(slot, Kind::Read, block, sequence, buffer)?;
            } else {
                let sequence = self.next_sequence;
                self.next_sequence += 1;
                let stamp = self.journal.begin(block, sequence)?;
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

    /// Issues a flush if the device supports it. Call it with nothing in flight.
    ///
    /// Returns whether a flush was issued.
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

    /// Chooses a block and a buffer that no request in flight uses.
    fn choose(&mut self) -> Option<(u64, u64)> {
        let block = (0..TRIES).find_map(|_| {
            let block = self.rng.below(self.journal.blocks());
            (!self.requests.touches(block)).then_some(block)
        })?;
        let buffer = (0..TRIES).find_map(|_| {
            let buffer = self.layout.data + self.rng.below(self.layout.buffers) * self.layout.block_size;
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

    /// Takes all completions and verifies them. Returns their number.
    ///
    /// # Errors
    /// [`LoadError`]. A used element without a request is counted as a duplicate and breaks the ring.
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
            // Taken before verification, which takes longer than the device needs for a request.
            self.last_completion_ns = monotonic_ns();
            if count == 0 {
                self.batch_ns = self.last_completion_ns;
            }
            count += 1;
            match self.requests.complete(done.token) {
                Ok(request) => self.verify(Requests::slot(done.token), &request)?,
                Err(_) => self.totals.duplicate += 1,
            }
        }
        if count > 0 {
            self.timeline.record(self.last_completion_ns, count);
        }
        Ok(count)
    }

    fn verify(&mut self, slot: usize, request: &Request) -> Result<(), LoadError> {
        self.totals.requests += 1;
        if let Some(latency) = &mut self.latency {
            // The histogram grows as needed, so this does not fail.
            let _ = latency.record(self.last_completion_ns.saturating_sub(request.submitted_ns));
        }
        if request.overdue {
            // Late but not lost: correct the count.
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
                self.journal.commit(request.block, request.sequence)?;
            }
            Kind::Read => {
                self.totals.reads += 1;
                let mut scratch = std::mem::take(&mut self.scratch);
                let data = scratch.get_mut(..self.block_len()).unwrap_or_default();
                let read = self.ram.read(self.at(request.buffer), data);
                let result = self.journal.expected(request.block).map(|s| s.verify(data, None));
                self.scratch = scratch;
                read?;
                if let Err(corruption) = result? {
                    self.totals.corrupt += 1;
                    self.totals.first_corruption.get_or_insert_with(|| corruption.to_string());
                }
            }
        }
        Ok(())
    }

    /// Counts the requests that take longer than `deadline` as lost.
    pub fn check_deadline(&mut self, deadline: Duration) {
        let deadline = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
        self.totals.lost += self.requests.mark_overdue(monotonic_ns(), deadline);
    }

    fn block_len(&self) -> usize {
        self.at(self.layout.block_size)
    }

    /// An offset in guest memory. All of it is mapped, so valid offsets fit; a larger one fails at the access.
    fn at(&self, offset: u64) -> usize {
        usize::try_from(offset).unwrap_or(usize::MAX)
    }
}

fn ram_of<D: DeviceFile>(session: &Session<D>) -> Result<SharedMap, LoadError> {
    let map = session.region(RAM).and_then(|r| r.map());
    map.cloned().ok_or_else(|| LoadError::Config { what: "the session has no guest memory".into() })
}

fn check_disk(config: &[u8], journal: &Journal, block_size: u64) -> Result<(), LoadError> {
    let capacity = config.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let needed = journal.blocks().saturating_mul(block_size / SECTOR);
    if journal.block_size() != block_size || journal.blocks() == 0 || needed > capacity {
        let what = format!(
            "the journal is for {} blocks of {} bytes, the disk has {capacity} sectors and blocks of {block_size} \
             bytes were asked for",
            journal.blocks(),
            journal.block_size()
        );
        return Err(LoadError::Config { what });
    }
    Ok(())
}
