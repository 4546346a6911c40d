//! Dirty tracking in the worker threads: [`DirtyLog`] on the control side, [`RingWrites`] on the worker's.
//!
//! A device need not do anything for it. It writes client memory in two ways, both of which the library sees:
//!
//! | what | when it is marked |
//! |---|---|
//! | used ring, descriptors of a packed ring, event suppression | at each write, by [`GuestArea`](vdpa_sys::snapshot::GuestArea) |
//! | data and status, whoever writes them: this process, or the kernel for it, also from a bounce buffer | when the request is pushed as used: all buffers that it may have written |
//!
//! A request that goes back to the ring, or is never completed, is marked then. A process that dies leaves no request that was pushed
//! and not marked; one that was not pushed is done again by its successor, and marked by that one.

use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Weak};

use vdpa_core::Errno;
use vdpa_core::dirty::{DirtyLimits, DirtyRange, DirtySink, DirtyTracking, Tracked, VhostLog};
use vdpa_core::faults::{self, Fault};
use vdpa_core::features::Features;
use vdpa_core::ring::{Buffer, Chain, area_sizes};
use vdpa_core::types::{Asid, Result};
use vdpa_core::vq::QueueSetup;
use vdpa_sys::dirty::DirtyMemory;
use vdpa_sys::guest::LinuxHost;

use super::Command;
use super::thread::WorkerThread;

/// The dirty pages of a device, for its client. See [`QueueControl::dirty_tracking`](super::QueueControl::dirty_tracking).
#[derive(Debug)]
pub(super) struct DirtyLog {
    memory: Arc<DirtyMemory>,
    /// The thread that serves the device, which has this number there.
    thread: Weak<WorkerThread>,
    device: u16,
}

impl DirtyLog {
    pub(super) fn new(memory: Arc<DirtyMemory>, thread: &Arc<WorkerThread>, device: u16) -> Self {
        Self { memory, thread: Arc::downgrade(thread), device }
    }

    /// Has the worker thread record what requests write, or stop to. Blocks until requests that it had not recorded are done.
    fn set_tracking(&self, on: bool) -> Result<()> {
        let (reply, receiver) = sync_channel(1);
        let thread = self.thread.upgrade().ok_or(Errno::IO)?;
        thread.send_and_wake(self.device, Command::SetTracking { on, reply })?;
        receiver.recv().map_err(|_| Errno::IO)
    }

    fn end(&self) -> Result<()> {
        self.memory.stop_marking();
        // A thread that has ended marks nothing.
        let _ = self.set_tracking(self.memory.is_of_requests());
        self.memory.forget()
    }
}

impl DirtyTracking for DirtyLog {
    fn limits(&self) -> DirtyLimits {
        DirtyLimits::MAP
    }

    fn tracked(&self) -> Option<Tracked> {
        self.memory.tracked()
    }

    fn start(&self, page_size: u64, ranges: &[DirtyRange], request: u64) -> Result<()> {
        let begun = request != 0 && self.memory.request() == Some(request);
        if !begun {
            self.memory.start(page_size, ranges, request)?;
        }
        self.set_tracking(true).inspect_err(|_| {
            let _ = self.end();
        })
    }

    fn stop(&self) -> Result<()> {
        if self.memory.tracked().is_some() { self.end() } else { Ok(()) }
    }

    fn set_vhost_log(&self, log: Option<VhostLog>) -> Result<()> {
        self.memory.set_vhost_log(log);
        self.set_tracking(self.memory.is_of_requests())
    }

    fn report(&self, of: DirtyRange, clear: bool, sink: DirtySink<'_>) -> Result<()> {
        if self.memory.is_on()
            && let Some(thread) = self.thread.upgrade()
        {
            // What the driver was shown before this call is marked when the thread has answered.
            let (reply, receiver) = sync_channel(1);
            if thread.send_and_wake(self.device, Command::SyncDirty { reply }).is_ok() {
                let _ = receiver.recv();
            }
        }
        self.memory.report(of, clear, sink)
    }
}

/// What the requests of a ring may write, between the pop and the push of each.
#[derive(Debug)]
pub(super) struct RingWrites {
    memory: Arc<DirtyMemory>,
    asid: Asid,
    /// Requests are recorded. Off, nothing is done for a request.
    tracking: bool,
    /// By [`Chain::head`].
    records: Vec<Record>,
    /// Requests in flight that were popped before the recording began.
    unrecorded: u16,
}

/// The writable buffers of a request. Kept to reuse its memory.
#[derive(Clone, Debug, Default)]
struct Record {
    in_use: bool,
    buffers: Vec<Buffer>,
}

impl RingWrites {
    pub(super) const fn new(memory: Arc<DirtyMemory>, asid: Asid, tracking: bool) -> Self {
        Self { memory, asid, tracking, records: Vec::new(), unrecorded: 0 }
    }

    /// Begins or ends to record. `in_flight` requests are being done, those with a record included.
    pub(super) fn set_tracking(&mut self, on: bool, in_flight: u16) {
        let recorded = self.records.iter().filter(|record| record.in_use).count();
        self.unrecorded =
            if on { in_flight.saturating_sub(u16::try_from(recorded).unwrap_or(u16::MAX)) } else { 0 };
        self.tracking = on;
        if !on {
            self.records = Vec::new();
        }
    }

    /// Whether requests are in flight that have no record.
    pub(super) const fn has_unrecorded(&self) -> bool {
        self.unrecorded > 0
    }

    /// A request was popped.
    #[inline]
    pub(super) fn popped(&mut self, chain: &Chain) {
        if self.tracking {
            self.record(chain);
        }
    }

    /// The request `head` is about to be pushed as used, or goes back to the ring: its buffers were written.
    #[inline]
    pub(super) fn ended(&mut self, head: u16) {
        if self.tracking {
            self.mark(head);
        }
    }

    #[inline(never)]
    fn record(&mut self, chain: &Chain) {
        let index = usize::from(chain.head);
        if self.records.len() <= index {
            self.records.resize(index + 1, Record::default());
        }
        if let Some(record) = self.records.get_mut(index) {
            record.in_use = true;
            record.buffers.clear();
            record.buffers.extend_from_slice(&chain.writable);
        }
    }

    #[inline(never)]
    fn mark(&mut self, head: u16) {
        let Some(record) = self.records.get_mut(usize::from(head)).filter(|record| record.in_use) else {
            self.unrecorded = self.unrecorded.saturating_sub(1);
            return;
        };
        record.in_use = false;
        mark_buffers(&self.memory, self.asid, &record.buffers);
    }

    /// No request of the ring is done any more: what those in flight may have written is marked.
    pub(super) fn mark_in_flight(&mut self) {
        for record in self.records.iter_mut().filter(|record| record.in_use) {
            record.in_use = false;
            mark_buffers(&self.memory, self.asid, &record.buffers);
        }
        self.unrecorded = 0;
    }

    /// Marks the areas of the ring that a device writes: an earlier process may have died after a write and before its mark.
    pub(super) fn mark_ring(&self, setup: &QueueSetup<LinuxHost>) {
        let sizes = area_sizes(setup.size, setup.features);
        let mark = |iova, logged, len: usize| self.memory.mark_ring(self.asid, iova, logged, len as u64);
        if setup.features.has(Features::RING_PACKED) {
            mark(setup.desc, setup.log_used, sizes.desc);
            mark(setup.used, setup.log_used.map(|_| setup.used), sizes.used);
        } else {
            mark(setup.used, setup.log_used, sizes.used);
        }
    }

    /// Tells the client of a log of vhost what was marked.
    #[inline]
    pub(super) fn signal_log(&self) {
        self.memory.signal_log();
    }

    /// The memory of the marks.
    pub(super) const fn memory(&self) -> &Arc<DirtyMemory> {
        &self.memory
    }
}

/// Marks what a request may have written. Adjacent buffers are one: data and status often share a page.
fn mark_buffers(memory: &DirtyMemory, asid: Asid, buffers: &[Buffer]) {
    if faults::is(Fault::DirtyDataUnmarked) {
        return;
    }
    let mut buffers = buffers.iter().filter(|buffer| buffer.len > 0);
    let Some(first) = buffers.next() else { return };
    let (mut iova, mut len) = (first.iova, u64::from(first.len));
    for buffer in buffers {
        if iova.wrapping_add(len) == buffer.iova {
            len += u64::from(buffer.len);
        } else {
            memory.mark(asid, iova, len);
            (iova, len) = (buffer.iova, buffer.len.into());
        }
    }
    memory.mark(asid, iova, len);
}
