//! The device process.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process, set_parent_process_death_signal};
use vdpa_backend::worker::{ClientMemory, Placement, Popped, Queue, QueueHandler, Queues, Size, WorkerPool};
use vdpa_backend::{Outcome, Request, RequestHandler, SimpleDevice};
use vdpa_core::features::Features;
use vdpa_core::iotlb::{Mapping, RecordId, Table};
use vdpa_core::parent::{Dma, Parent, Profile, SetMap};
use vdpa_core::ring::{Chain, Fault, Memory, RingError};
use vdpa_core::types::{Asid, IovaRange, Perm, QueueIndex};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::{GuestMemory, ObjectId};
use vdpa_sys::inherit;
use vdpa_sys::shared_words::SharedWords;

use super::driver::FULL;
use super::{AVAIL, DEADLY, DESC, MEMORY, SIZE, USED, answer};

/// Serves a ring until it is killed. `fds`: client memory, log, kick, call.
pub(super) fn run(kind: &str, features: Features, fds: &[&str]) {
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let fds: Vec<OwnedFd> = fds.iter().map(|fd| inherit::take(fd.parse().unwrap()).unwrap()).collect();
    let [memory, log, kick, call] = <[OwnedFd; 4]>::try_from(fds).unwrap();
    let logs = vec![SharedWords::map(log).unwrap()];
    let table = table(memory);
    let setup = QueueSetup {
        size: SIZE,
        desc: DESC,
        avail: AVAIL,
        used: USED,
        asid: Asid(0),
        log_used: None,
        features,
        kick: Some(EventFd::from_fd(kick).unwrap()),
        call: Some(EventFd::from_fd(call).unwrap()),
    };
    let state = QueueState::initial(features);
    let pool = WorkerPool::new(1, Duration::from_micros(50));
    let place = Placement::default();
    if kind == "simple" {
        let profile = Profile::on_objects(0xffff, features, 1);
        let mut device = SimpleDevice::new("test", profile, &[], Simple, &pool, &place).unwrap();
        device.set_logs(logs, true).unwrap();
        let Dma::SetMap(dma) = device.dma() else { panic!("a simple device takes tables") };
        dma.set_map(Asid(0), &table).unwrap();
        device.start_queue(QueueIndex(0), &setup, state).unwrap();
        wait();
    } else {
        let size = Size { queues: 1, address_spaces: 1 };
        let queues = pool.add("test", size, &place, Batch { chains: Default::default() }).unwrap();
        queues.set_logs(logs, true).unwrap();
        let mut memory = ClientMemory::new("test", queues, false);
        // The other order: the ring is continued when its memory is mapped.
        memory.queues().start(QueueIndex(0), &setup, state).unwrap();
        memory.set_map(Asid(0), &table).unwrap();
        wait();
    }
}

fn wait() -> ! {
    loop {
        std::thread::park();
    }
}

fn table(memory: OwnedFd) -> Table<GuestMemory> {
    let id = ObjectId { dev_major: 0, dev_minor: 0, inode: 0, created_ns: 0, offset: 0 };
    let memory = GuestMemory::from_object(Arc::new(memory.into()), id, MEMORY, true).unwrap();
    let range = IovaRange::from_size(0, MEMORY).unwrap();
    let mapping =
        Mapping { range, uaddr: 0, perm: Perm::RW, memory, stale: false, record: RecordId::default() };
    std::iter::once(mapping).collect()
}

/// Does one request, of which the buffers are those of the driver of this test.
fn serve(memory: &impl Memory, chain: &Chain) -> Result<u32, Fault> {
    let (Some(request), Some(place)) = (chain.readable.first(), chain.writable.first()) else { return Ok(0) };
    let mut number = [0; 8];
    memory.read(request.iova, &mut number)?;
    let number = u64::from_le_bytes(number);
    if number == DEADLY {
        kill_process(getpid(), Signal::KILL).unwrap();
        wait();
    }
    memory.write(place.iova, &answer(number).to_le_bytes())?;
    Ok(FULL)
}

/// Answers each request at once.
struct Simple;

impl RequestHandler for Simple {
    fn handle(&mut self, _queue: u16, request: &Request<'_>) -> Result<Outcome, Fault> {
        serve(request.memory(), request.chain()).map(Outcome::Done)
    }
}

/// Has several requests in flight, and answers the last one first.
struct Batch {
    chains: [Chain; 4],
}

impl Batch {
    fn serve_queue(&mut self, queues: &Queues, queue: &mut Queue) -> Result<bool, RingError> {
        let view = queues.view(queue);
        let mut taken = Vec::new();
        for chain in &mut self.chains {
            let found = queue.ring(&view)?.pop(view.snapshot(), chain)?;
            if found == Popped::None {
                break;
            }
            taken.push(found);
        }
        if let [.., _, _] = taken[..]
            && queue.ring(&view)?.in_flight() % 3 == 0
            && let Some(chain) = self.chains.get(taken.len() - 1)
        {
            // As if its memory were not mapped at the moment.
            queue.ring(&view)?.abandon(chain)?;
            taken.pop();
        }
        // So that many of the kills find requests in flight.
        std::thread::sleep(Duration::from_micros(20));
        for (found, chain) in taken.iter().zip(&self.chains).rev() {
            let len = if *found == Popped::Poison { 0 } else { serve(view.snapshot(), chain).unwrap() };
            queue.ring(&view)?.push_used(chain.head, len)?;
        }
        queues.publish(queue)?;
        if taken.is_empty() { queues.wait_for_kick(queue, &view) } else { Ok(true) }
    }
}

impl QueueHandler for Batch {
    fn retry_on_map_change(&self) -> bool {
        true
    }

    fn serve(&mut self, queues: &mut Queues) {
        let Some(mut queue) = queues.take(0) else { return };
        if queue.has_work() {
            let more = self.serve_queue(queues, &mut queue);
            let more = more.unwrap_or_else(|error| panic!("the ring is broken: {error}"));
            queue.set_pending(more);
        }
        queues.put(0, queue);
    }
}
