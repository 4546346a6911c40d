//! The client: the published crate `virtio-driver`, the same code for every server.

use std::collections::HashSet;
use std::error::Error;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vdpa_bench::block::{SplitMix64, Stamp};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VhostVdpa, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use crate::cpu;
use crate::plan::{Kind, Workload};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const FEATURES: u64 = VirtioFeatureFlags::VERSION_1.bits()
    | VirtioFeatureFlags::RING_EVENT_IDX.bits()
    | VirtioBlkFeatureFlags::SEG_MAX.bits()
    | VirtioBlkFeatureFlags::BLK_SIZE.bits()
    | VirtioBlkFeatureFlags::FLUSH.bits()
    | VirtioBlkFeatureFlags::MQ.bits();

/// Descriptors of a queue: three for each of 128 requests.
const QUEUE_SIZE: u16 = 512;

/// Writes between two flushes of the mixed workload.
const WRITES_PER_FLUSH: u32 = 32;

/// Time for a completion.
const COMPLETION_TIMEOUT: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// Where to connect to a server.
#[derive(Clone, Debug)]
pub(crate) enum Address {
    /// A vhost-vdpa device file.
    Vdpa(std::path::PathBuf),
    /// A socket of a vhost-user server.
    User(std::path::PathBuf),
}

/// Result of one measurement.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    /// Latency in ns.
    pub(crate) latency: Histogram<u64>,
    /// CPU time of this thread in ns.
    pub(crate) client_ns: u64,
    /// Blocks that were read and are correct, with verification.
    pub(crate) verified: u64,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Read(u64),
    Write(u64),
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    begun_ns: u64,
    request: Request,
}

struct Queue {
    ring: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completed: Arc<EventFd>,
    /// Offset of the data of slot 0 in memory.
    base: usize,
    in_flight: Vec<InFlight>,
    free: Vec<usize>,
}

/// The expected sequence number of every block, for verification.
struct Journal {
    sequences: Vec<u64>,
    busy: HashSet<u64>,
    verified: u64,
}

/// A connection to a device, which runs one workload.
pub(crate) struct Client {
    workload: Workload,
    // Dropped before the transport, whose memory they use.
    queues: Vec<Queue>,
    memory: SharedMap,
    _memory_fd: OwnedFd,
    _transport: Box<VirtioBlkTransport>,
    /// Number of blocks, of the workload's block size.
    blocks: u64,
    rng: SplitMix64,
    next: u64,
    writes: u32,
    journal: Option<Journal>,
}

impl Client {
    /// Connects and uses the first `bytes` of the disk.
    pub(crate) fn connect(address: &Address, workload: &Workload, bytes: u64, verify: bool) -> Result<Self> {
        let text = |path: &Path| path.to_str().map(str::to_owned).ok_or("a path that is not UTF-8");
        let mut transport: Box<VirtioBlkTransport> = match address {
            Address::Vdpa(path) => Box::new(
                VhostVdpa::with_path(&text(path)?, FEATURES)
                    .map_err(|error| format!("{}: {error:?}", path.display()))?,
            ),
            Address::User(path) => Box::new(VhostUser::new(&text(path)?, FEATURES)?),
        };
        let rings = VirtioBlkQueue::setup_queues(transport.as_mut(), workload.queues, QUEUE_SIZE)?;
        let part = workload.depth * workload.block;
        let memory_fd = memfd::create(c"bench", (part * workload.queues) as u64, None)?;
        let memory = SharedMap::map(&memory_fd, 0, part * workload.queues, Prot::RW, true)?;
        transport.map_mem_region(memory.addr(), memory.len(), memory_fd.as_raw_fd(), 0)?;
        let queue = |(index, mut ring): (usize, VirtioBlkQueue<'static, usize>)| {
            ring.set_used_notif_enabled(true);
            Queue {
                ring,
                notifier: transport.get_submission_notifier(index),
                completed: transport.get_completion_fd(index),
                base: index * part,
                in_flight: vec![InFlight { begun_ns: 0, request: Request::Flush }; workload.depth],
                free: (0..workload.depth).rev().collect(),
            }
        };
        let queues = rings.into_iter().enumerate().map(queue).collect();
        let blocks = (bytes / workload.block as u64).max(1);
        let journal = verify.then(|| Journal {
            sequences: vec![0; usize::try_from(blocks).unwrap_or(0)],
            busy: HashSet::new(),
            verified: 0,
        });
        Ok(Self {
            workload: *workload,
            queues,
            memory,
            _memory_fd: memory_fd,
            _transport: transport,
            blocks,
            rng: SplitMix64(1),
            next: 0,
            writes: 0,
            journal,
        })
    }

    /// Runs the workload for `length`.
    pub(crate) fn run(&mut self, length: Duration) -> Result<Sample> {
        let mut latency = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
        let before = self.journal.as_ref().map_or(0, |journal| journal.verified);
        let client_before = cpu::this_thread_ns();
        let begin = monotonic_ns();
        let end = begin + u64::try_from(length.as_nanos())?;
        let mut requests = 0;
        let mut now = begin;
        let mut seconds = None;
        loop {
            let issue = now < end;
            let mut done = 0;
            for index in 0..self.queues.len() {
                done += self.reap(index, &mut latency)?;
                if issue {
                    self.issue(index)?;
                }
            }
            now = monotonic_ns();
            if seconds.is_none() {
                requests += done;
                // The rate needs at least one request.
                if now >= end && requests > 0 {
                    seconds = Some(secs(now - begin));
                }
            } else if self.is_idle() {
                break;
            }
            if done == 0 && !self.is_idle() {
                self.wait()?;
            }
        }
        let client_ns = cpu::this_thread_ns() - client_before;
        let verified = self.journal.as_ref().map_or(0, |journal| journal.verified) - before;
        Ok(Sample { requests, seconds: seconds.unwrap_or(0.0), latency, client_ns, verified })
    }

    /// Writes a stamp into every block.
    pub(crate) fn fill(&mut self) -> Result<()> {
        self.sweep(Request::Write)
    }

    /// Reads and verifies every block. Returns how many are correct.
    pub(crate) fn read_all(&mut self) -> Result<u64> {
        let verified = |client: &Self| client.journal.as_ref().map_or(0, |journal| journal.verified);
        let before = verified(self);
        self.sweep(Request::Read)?;
        Ok(verified(self) - before)
    }

    fn sweep(&mut self, request: impl Fn(u64) -> Request) -> Result<()> {
        let mut latency = Histogram::new_with_bounds(1, 60_000_000_000, 1)?;
        let mut block = 0;
        while block < self.blocks || !self.is_idle() {
            let done = self.reap(0, &mut latency)?;
            let now = monotonic_ns();
            while block < self.blocks && self.start(0, request(block), now)? {
                block += 1;
            }
            self.notify(0)?;
            if done == 0 {
                self.wait()?;
            }
        }
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.queues.iter().all(|queue| queue.free.len() == queue.in_flight.len())
    }

    /// Takes completions.
    fn reap(&mut self, index: usize, latency: &mut Histogram<u64>) -> Result<u64> {
        let Self { queues, memory, journal, workload, .. } = self;
        let queue = queues.get_mut(index).ok_or("no such queue")?;
        let mut now = 0;
        let mut done = 0;
        for completion in queue.ring.completions() {
            if now == 0 {
                now = monotonic_ns();
            }
            let slot = completion.context;
            let in_flight = queue.in_flight.get(slot).ok_or("a completion of nothing")?;
            if completion.ret != 0 {
                return Err(format!("{:?} failed with {}", in_flight.request, completion.ret).into());
            }
            latency.saturating_record(now.saturating_sub(in_flight.begun_ns));
            if let Some(journal) = journal {
                journal.request_completed(
                    in_flight.request,
                    memory,
                    queue.base + slot * workload.block,
                    workload.block,
                )?;
            }
            queue.free.push(slot);
            done += 1;
        }
        Ok(done)
    }

    /// Fills a queue with new requests.
    fn issue(&mut self, index: usize) -> Result<()> {
        if self.queues.get(index).is_none_or(|queue| queue.free.is_empty()) {
            return Ok(());
        }
        let now = monotonic_ns();
        // A request is chosen only if a slot is free: with all blocks busy the choice would not end.
        while self.queues.get(index).is_some_and(|queue| !queue.free.is_empty()) {
            let request = self.choose();
            self.start(index, request, now)?;
        }
        self.notify(index)
    }

    fn notify(&mut self, index: usize) -> Result<()> {
        let queue = self.queues.get_mut(index).ok_or("no such queue")?;
        if queue.ring.avail_notif_needed() {
            queue.notifier.notify()?;
        }
        Ok(())
    }

    fn choose(&mut self) -> Request {
        if self.writes == WRITES_PER_FLUSH && self.workload.kind == Kind::Mixed {
            self.writes = 0;
            return Request::Flush;
        }
        let block = loop {
            let block = match self.workload.kind {
                Kind::SequentialRead => {
                    self.next = (self.next + 1) % self.blocks;
                    self.next
                }
                _ => self.rng.below(self.blocks),
            };
            // Verification needs blocks without overlapping requests, since virtio does not order them.
            if self.journal.as_ref().is_none_or(|journal| !journal.busy.contains(&block)) {
                break block;
            }
        };
        let write = match self.workload.kind {
            Kind::RandomRead | Kind::SequentialRead => false,
            Kind::RandomWrite => true,
            Kind::Mixed => self.rng.next() & 1 == 0,
        };
        if write {
            self.writes += 1;
            Request::Write(block)
        } else {
            Request::Read(block)
        }
    }

    /// Queues a request; `false` when no slot is free.
    fn start(&mut self, index: usize, request: Request, now: u64) -> Result<bool> {
        let Self { queues, memory, journal, workload, .. } = self;
        let queue = queues.get_mut(index).ok_or("no such queue")?;
        let Some(slot) = queue.free.pop() else { return Ok(false) };
        let size = workload.block;
        let at = queue.base + slot * size;
        if let Some(journal) = journal {
            journal.request_started(request, memory, at, size)?;
        }
        let offset = |block: u64| block * size as u64;
        let data = std::ptr::with_exposed_provenance_mut::<u8>(memory.addr() + at);
        match request {
            // SAFETY: `[at, at + size)` lies in the mapping, which lives as long as the queue does, and no reference to
            // its bytes is ever made.
            Request::Read(block) => unsafe { queue.ring.read_raw(offset(block), data, size, slot) }?,
            // SAFETY: as for the read.
            Request::Write(block) => unsafe { queue.ring.write_raw(offset(block), data, size, slot) }?,
            Request::Flush => queue.ring.flush(slot)?,
        }
        if let Some(in_flight) = queue.in_flight.get_mut(slot) {
            *in_flight = InFlight { begun_ns: now, request };
        }
        Ok(true)
    }

    /// Waits until the server signals. With poll(2), as programs do that wait for several things. QEMU makes the eventfds that it
    /// receives non-blocking in any case.
    fn wait(&self) -> Result<()> {
        let mut fds: Vec<_> = self
            .queues
            .iter()
            .map(|queue| PollFd::from_borrowed_fd(queue.completed.as_fd(), PollFlags::IN))
            .collect();
        if poll(&mut fds, Some(&COMPLETION_TIMEOUT))? == 0 {
            return Err("no completion within 20 s".into());
        }
        for (fd, queue) in fds.iter().zip(&self.queues) {
            if !fd.revents().is_empty() {
                queue.completed.read()?;
            }
        }
        Ok(())
    }
}

impl Journal {
    fn request_started(
        &mut self,
        request: Request,
        memory: &SharedMap,
        at: usize,
        size: usize,
    ) -> Result<()> {
        let mut bytes = vec![0xa5; size];
        let (Request::Read(block) | Request::Write(block)) = request else { return Ok(()) };
        self.busy.insert(block);
        if let Request::Write(_) = request {
            let sequence = self.sequences.get_mut(usize::try_from(block)?).ok_or("no such block")?;
            *sequence += 1;
            Stamp { block, sequence: *sequence, client: 1 }.write(&mut bytes);
        }
        memory.write(at, &bytes).map_err(|_| "the memory is gone")?;
        Ok(())
    }

    fn request_completed(
        &mut self,
        request: Request,
        memory: &SharedMap,
        at: usize,
        size: usize,
    ) -> Result<()> {
        let (Request::Read(block) | Request::Write(block)) = request else { return Ok(()) };
        self.busy.remove(&block);
        if let Request::Read(_) = request {
            let mut bytes = vec![0; size];
            memory.read(at, &mut bytes).map_err(|_| "the memory is gone")?;
            let sequence = *self.sequences.get(usize::try_from(block)?).ok_or("no such block")?;
            Stamp { block, sequence, client: 1 }.verify(&bytes, None)?;
            self.verified += 1;
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate")]
fn secs(ns: u64) -> f64 {
    ns as f64 / 1e9
}
