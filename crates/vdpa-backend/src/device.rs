//! [`RequestHandler`] and [`SimpleDevice`]: a virtio device that answers each request at once.

use std::fmt;

use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::parent::{Dma, Parent, Profile, QueueStats};
use vdpa_core::ring::{BufferSlice, Chain, Fault, RingError};
use vdpa_core::types::{QueueIndex, Result};
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::shared_words::SharedWords;
use vdpa_sys::snapshot::Snapshot;

use crate::worker::{ClientMemory, Placement, Popped, Queue, QueueHandler, Queues, Size, WorkerPool};

/// Requests taken from one queue before the next queue, and the next device of the thread, is served.
const BUDGET: usize = 64;

/// What is logged of a request that is [`Popped::Poison`].
const POISON: &str =
    "a request that was begun by two processes, which have died, is answered without being done";

/// What a device does with one request.
///
/// All calls come from the worker thread that serves the device, one at a time, so that the device's data needs no lock.
/// No method may block or compute for long: other devices share the thread. A device that has to wait for something
/// implements [`QueueHandler`] instead, which submits operations to the thread's io_uring.
pub trait RequestHandler: Send + 'static {
    /// Answers a request of queue `queue`. If the device keeps [logs](SimpleDevice::set_logs), it may be one that an earlier
    /// process had begun; one that two had begun is answered with length 0 instead.
    ///
    /// # Errors
    /// [`Fault`] when client memory that the request names is not mapped, as [`Request`]'s methods return it. The request
    /// stays in the ring, and is handled again after the next kick or change of the mappings.
    fn handle(&mut self, queue: u16, request: &Request<'_>) -> Result<Outcome, Fault>;

    /// The driver has reset the device: what was kept of earlier requests is to be forgotten.
    fn reset(&mut self) {}
}

/// How a request was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is complete. So many bytes of its writable buffers, from their start on, were written (the used length of virtio
    /// 1.2 section 2.7.8).
    Done(u32),
    /// It stays in the ring, and is handled again after the next kick: a receive queue for which there is no data.
    Later,
}

/// A request as the driver made it available: a descriptor chain, and the client memory that its buffers are in.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    chain: &'a Chain,
    memory: &'a Snapshot,
}

impl<'a> Request<'a> {
    /// The descriptor chain.
    #[must_use]
    pub const fn chain(&self) -> &'a Chain {
        self.chain
    }

    /// The client memory, by I/O virtual address. Both sides can change its bytes at any time: what decides something is
    /// to be read once.
    #[must_use]
    pub const fn memory(&self) -> &'a Snapshot {
        self.memory
    }

    /// The buffers that the device reads, as one run of bytes.
    #[must_use]
    pub fn readable(&self) -> BufferSlice<'a> {
        self.chain.readable()
    }

    /// The buffers that the device writes, as one run of bytes.
    #[must_use]
    pub fn writable(&self) -> BufferSlice<'a> {
        self.chain.writable()
    }
}

/// The device of a [`RequestHandler`], as the control side drives it: a [`Parent`] with constant configuration space.
///
/// It takes client memory as objects, so that a change of owner touches no mapping.
pub struct SimpleDevice {
    profile: Profile,
    config: Vec<u8>,
    memory: ClientMemory,
}

impl SimpleDevice {
    /// Makes the device `name` and has `handler` called on a thread of `pool`. `config` is the configuration space, of
    /// which [`Profile::config_size`] becomes the size.
    ///
    /// # Errors
    /// As [`WorkerPool::add`].
    pub fn new(
        name: &str,
        profile: Profile,
        config: &[u8],
        handler: impl RequestHandler,
        pool: &WorkerPool,
        placement: &Placement,
    ) -> Result<Self> {
        let config_size = u32::try_from(config.len()).map_err(|_| Errno::INVAL)?;
        let profile = Profile { config_size, ..profile };
        let address_spaces = usize::try_from(profile.address_spaces).map_err(|_| Errno::INVAL)?;
        let size = Size { queues: profile.queues, address_spaces };
        let queues = pool.add(name, size, placement, Adapter { handler, chain: Chain::new() })?;
        Ok(Self { profile, config: config.to_vec(), memory: ClientMemory::new(name, queues, false) })
    }
}

impl SimpleDevice {
    /// Has the requests in flight logged, so that a successor of this process can continue the rings: see
    /// [`QueueControl::set_logs`](crate::worker::QueueControl::set_logs).
    ///
    /// # Errors
    /// As there.
    pub fn set_logs(&self, logs: Vec<SharedWords>, recover: bool) -> Result<()> {
        self.memory.queues().set_logs(logs, recover)
    }
}

impl fmt::Debug for SimpleDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimpleDevice").field("device_id", &self.profile.device_id).finish_non_exhaustive()
    }
}

impl Parent for SimpleDevice {
    type Host = LinuxHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(part) = self.config.get(from..).and_then(|rest| rest.get(..out.len())) {
            out.copy_from_slice(part);
        }
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        if !features.has(Features::ACCESS_PLATFORM) || !features.has(Features::VERSION_1) {
            return Err(Errno::INVAL);
        }
        Ok(features & self.profile.features)
    }

    crate::queue_methods!(self => self.memory.queues());

    fn dma(&mut self) -> Dma<'_, LinuxHost> {
        Dma::SetMap(&mut self.memory)
    }

    fn reset(&mut self) {
        self.memory.queues().reset();
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        self.memory.queues().stats(index)
    }
}

/// The queues of a [`RequestHandler`].
struct Adapter<H> {
    handler: H,
    /// Kept for its memory.
    chain: Chain,
}

impl<H: RequestHandler> QueueHandler for Adapter<H> {
    fn retry_on_map_change(&self) -> bool {
        true
    }

    fn serve(&mut self, queues: &mut Queues) {
        queues.serve_each(|queues, index, queue| self.serve_queue(queues, index, queue));
    }

    fn reset(&mut self) {
        self.handler.reset();
    }
}

impl<H: RequestHandler> Adapter<H> {
    /// Handles the requests of one queue up to the budget; whether there may be more.
    fn serve_queue(&mut self, queues: &Queues, index: u16, queue: &mut Queue) -> Result<bool, RingError> {
        let view = queues.view(queue);
        queue.ring(&view)?.disable_kick()?;
        for _ in 0..BUDGET {
            match queue.ring(&view)?.pop(view.snapshot(), &mut self.chain)? {
                Popped::None => {
                    queues.publish(queue)?;
                    return queues.wait_for_kick(queue, &view);
                }
                Popped::Poison => {
                    queues.log_error(index, &POISON);
                    queue.ring(&view)?.push_used(self.chain.head, 0)?;
                    queues.count_request(index, 0, true);
                    queues.count_poison(index);
                    continue;
                }
                Popped::Request => {}
            }
            let request = Request { chain: &self.chain, memory: view.snapshot() };
            let outcome = self.handler.handle(index, &request);
            let ring = queue.ring(&view)?;
            let Ok(Outcome::Done(written)) = outcome else {
                ring.abandon(&self.chain)?;
                ring.enable_kick()?;
                queues.publish(queue)?;
                if let Err(fault) = outcome {
                    queues.log_error(index, &fault);
                }
                return Ok(false);
            };
            ring.push_used(self.chain.head, written)?;
            queues.count_request(index, u64::from(written), false);
        }
        queues.publish(queue)?;
        Ok(true)
    }
}
