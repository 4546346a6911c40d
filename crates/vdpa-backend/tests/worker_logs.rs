//! In-flight logs over starts, stops and changes of the mappings. A device that is dropped with requests which it has taken
//! and not answered leaves its logs as a process that has died; `worker_crash` has real ones.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vdpa_backend::worker::{Placement, Popped, Queue, QueueHandler, Queues, Size, WorkerPool, log_words};
use vdpa_backend::{Outcome, Request, RequestHandler, SimpleDevice};
use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::iotlb::{Mapping, RecordId, Table};
use vdpa_core::parent::{Dma, Parent, Profile};
use vdpa_core::ring::driver::Driver;
use vdpa_core::ring::inflight::LogMemory;
use vdpa_core::ring::{Buffer, Chain, Fault, RingError, area_sizes};
use vdpa_core::types::{Asid, IovaRange, Perm, QueueIndex};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::{GuestMemory, LinuxHost, ObjectId};
use vdpa_sys::mmap::{MapArea, Prot, SharedMap};
use vdpa_sys::shared_words::SharedWords;

const MEMORY: u64 = 1 << 20;
const RING: [u64; 3] = [0, 0x4000, 0x8000];
const BUFFERS: u64 = 0x10000;
const SIZE: u16 = 16;
const LIMIT: Duration = Duration::from_secs(20);
const QUEUE: QueueIndex = QueueIndex(0);

/// Client memory with a ring, and the log of the ring's queue.
struct Client {
    features: Features,
    file: Arc<vdpa_sys::guest::ObjectFile>,
    map: SharedMap,
    driver: Driver<MapArea>,
    setup: QueueSetup<LinuxHost>,
    log: SharedWords,
    pool: WorkerPool,
}

impl Client {
    fn new(packed: bool) -> Self {
        let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
        let features = if packed { features.with(Features::RING_PACKED) } else { features };
        let file = vdpa_sys::memfd::create(c"client", MEMORY, None).unwrap();
        let map = SharedMap::map(&file, 0, usize::try_from(MEMORY).unwrap(), Prot::RW, false).unwrap();
        let [desc, avail, used] = RING;
        let setup = QueueSetup {
            size: SIZE,
            desc,
            avail,
            used,
            asid: Asid(0),
            log_used: None,
            features,
            kick: Some(EventFd::new().unwrap()),
            call: Some(EventFd::new().unwrap()),
        };
        let driver = driver(&map, features);
        let (_, log) = SharedWords::create(c"log", log_words(SIZE)).unwrap();
        let pool = WorkerPool::new(1, Duration::ZERO);
        Self { features, file: Arc::new(file.into()), map, driver, setup, log, pool }
    }

    /// A device whose memory is mapped, with its log; its queue is not started.
    fn device(&self, handler: impl RequestHandler, recover: bool) -> SimpleDevice {
        let profile = Profile::on_objects(0xffff, self.features, 1);
        let place = Placement::default();
        let mut device = SimpleDevice::new("test", profile, &[], handler, &self.pool, &place).unwrap();
        device.set_logs(vec![self.log.clone()], recover).unwrap();
        self.map(&mut device, true);
        device
    }

    /// Maps client memory anew, or unmaps it.
    fn map(&self, device: &mut SimpleDevice, mapped: bool) {
        let id = ObjectId { dev_major: 0, dev_minor: 0, inode: 0, created_ns: 0, offset: 0 };
        let memory = GuestMemory::from_object(Arc::clone(&self.file), id, MEMORY, true).unwrap();
        let range = IovaRange::from_size(0, MEMORY).unwrap();
        let record = RecordId::default();
        let mapping = Mapping { range, uaddr: 0, perm: Perm::RW, memory, stale: false, record };
        let table: Table<GuestMemory> = mapped.then_some(mapping).into_iter().collect();
        let Dma::SetMap(dma) = device.dma() else { unreachable!() };
        dma.set_map(Asid(0), &table).unwrap();
    }

    fn start(&self, device: &mut SimpleDevice) {
        device.start_queue(QUEUE, &self.setup, QueueState::initial(self.features)).unwrap();
    }

    fn add(&mut self, tokens: std::ops::Range<u64>) {
        for token in tokens {
            let at = BUFFERS + token * 64;
            let (request, answer) = (Buffer { iova: at, len: 8 }, Buffer { iova: at + 32, len: 8 });
            self.map.store_u64(usize::try_from(at).unwrap(), token).unwrap();
            self.driver.add(&[request], &[answer], token).unwrap();
        }
        if self.driver.publish().unwrap() {
            self.setup.kick.as_ref().unwrap().signal();
        }
    }

    /// The next `count` answers, in order.
    fn answers(&mut self, count: usize) -> Vec<u64> {
        let end = Instant::now() + LIMIT;
        let mut answers = Vec::new();
        while answers.len() < count {
            assert!(Instant::now() < end, "only {answers:?} are answered");
            match self.driver.pop_used().unwrap() {
                Some(done) => answers.push(done.token),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        answers
    }

    /// A device that takes all requests and dies.
    fn die_with_requests_in_flight(&self, count: u64, recover: bool) {
        let taken = Arc::new(AtomicU64::new(0));
        let handler = Swallow { taken: Arc::clone(&taken), chain: Chain::new() };
        let size = Size { queues: 1, address_spaces: 1 };
        let queues = self.pool.add("dies", size, &Placement::default(), handler).unwrap();
        queues.set_logs(vec![self.log.clone()], recover).unwrap();
        let mut memory = vdpa_backend::worker::ClientMemory::new("dies", queues, false);
        let id = ObjectId { dev_major: 0, dev_minor: 0, inode: 0, created_ns: 0, offset: 0 };
        let object = GuestMemory::from_object(Arc::clone(&self.file), id, MEMORY, true).unwrap();
        let range = IovaRange::from_size(0, MEMORY).unwrap();
        let record = RecordId::default();
        let mapping = Mapping { range, uaddr: 0, perm: Perm::RW, memory: object, stale: false, record };
        let table: Table<GuestMemory> = std::iter::once(mapping).collect();
        vdpa_core::parent::SetMap::set_map(&mut memory, Asid(0), &table).unwrap();
        memory.queues().start(QUEUE, &self.setup, QueueState::initial(self.features)).unwrap();
        wait_until(|| taken.load(Ordering::Acquire) == count);
    }
}

fn driver(map: &SharedMap, features: Features) -> Driver<MapArea> {
    let sizes = area_sizes(SIZE, features);
    let area = |at: u64, size| map.area(usize::try_from(at).unwrap(), size).unwrap();
    let [desc, avail, used] = RING;
    Driver::new(SIZE, features, area(desc, sizes.desc), area(avail, sizes.avail), area(used, sizes.used))
        .unwrap()
}

fn wait_until(condition: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Takes requests and never answers them.
struct Swallow {
    taken: Arc<AtomicU64>,
    chain: Chain,
}

impl Swallow {
    fn take(&mut self, queues: &Queues, queue: &mut Queue) -> Result<bool, RingError> {
        let view = queues.view(queue);
        while queue.ring(&view)?.pop(view.snapshot(), &mut self.chain)? != Popped::None {
            self.taken.fetch_add(1, Ordering::AcqRel);
        }
        queues.wait_for_kick(queue, &view)
    }
}

impl QueueHandler for Swallow {
    fn retry_on_map_change(&self) -> bool {
        true
    }

    fn serve(&mut self, queues: &mut Queues) {
        let Some(mut queue) = queues.take(0) else { return };
        if queue.has_work() {
            let more = self.take(queues, &mut queue).unwrap();
            queue.set_pending(more);
        }
        queues.put(0, queue);
    }
}

/// Answers requests once `open`; before, it leaves them in the ring. Counts what it was given.
#[derive(Clone)]
struct Gate {
    open: Arc<AtomicU64>,
    given: Arc<AtomicU64>,
}

impl Gate {
    fn new(open: bool) -> Self {
        Self { open: Arc::new(AtomicU64::new(open.into())), given: Arc::default() }
    }
}

impl RequestHandler for Gate {
    fn handle(&mut self, _queue: u16, _request: &Request<'_>) -> Result<Outcome, Fault> {
        self.given.fetch_add(1, Ordering::AcqRel);
        Ok(if self.open.load(Ordering::Acquire) == 1 { Outcome::Done(8) } else { Outcome::Later })
    }
}

fn both(test: fn(bool)) {
    [false, true].into_iter().for_each(test);
}

#[test]
fn requests_in_flight_are_repeated_in_order_before_new_ones() {
    both(|packed| {
        let mut client = Client::new(packed);
        client.add(0..3);
        client.die_with_requests_in_flight(3, false);
        client.add(3..5);
        let mut device = client.device(Gate::new(true), true);
        client.start(&mut device);
        assert_eq!(client.answers(5), [0, 1, 2, 3, 4]);
        assert!(client.setup.call.as_ref().unwrap().wait(Some(LIMIT)));
    });
}

/// After two deaths each request is begun alone, so that only the one of the third death is not tried again.
#[test]
fn a_request_of_three_processes_is_poison_and_the_others_are_done() {
    both(|packed| {
        let mut client = Client::new(packed);
        client.add(0..2);
        client.die_with_requests_in_flight(2, false);
        client.die_with_requests_in_flight(2, true);
        client.die_with_requests_in_flight(1, true);
        client.add(2..3);
        let gate = Gate::new(true);
        let mut device = client.device(gate.clone(), true);
        client.start(&mut device);
        assert_eq!(client.answers(3), [0, 1, 2]);
        assert_eq!(gate.given.load(Ordering::Acquire), 2);
        wait_until(|| device.queue_stats(QUEUE).errors == 1);
        assert_eq!(device.queue_stats(QUEUE).poison, 1);
    });
}

#[test]
fn a_queue_that_was_drained_continues_at_its_position() {
    both(|packed| {
        let mut client = Client::new(packed);
        let mut device = client.device(Gate::new(true), false);
        client.start(&mut device);
        client.add(0..5);
        assert_eq!(client.answers(5).len(), 5);
        let state = device.stop_queue(QUEUE).unwrap();
        drop(device);
        // At the position of the log, whatever is given.
        let gate = Gate::new(true);
        let mut device = client.device(gate.clone(), true);
        client.start(&mut device);
        assert_eq!(device.stop_queue(QUEUE).unwrap(), state);
        device.start_queue(QUEUE, &client.setup, state.unwrap()).unwrap();
        client.add(0..2);
        assert_eq!(client.answers(2), [0, 1]);
        assert_eq!(gate.given.load(Ordering::Acquire), 2, "nothing was repeated");
    });
}

#[test]
fn a_change_of_the_mappings_loses_no_request_to_be_repeated() {
    both(|packed| {
        let mut client = Client::new(packed);
        client.add(0..3);
        client.die_with_requests_in_flight(3, false);
        let gate = Gate::new(false);
        let mut device = client.device(gate.clone(), true);
        client.start(&mut device);
        wait_until(|| gate.given.load(Ordering::Acquire) > 0);
        client.map(&mut device, false);
        client.add(3..4);
        gate.open.store(1, Ordering::Release);
        client.map(&mut device, true);
        assert_eq!(client.answers(4), [0, 1, 2, 3]);
        // Nor one that comes after it.
        client.map(&mut device, true);
        client.add(4..5);
        assert_eq!(client.answers(1), [4]);
    });
}

#[test]
fn a_stop_keeps_what_cannot_be_repeated_yet() {
    both(|packed| {
        let mut client = Client::new(packed);
        client.add(0..3);
        client.die_with_requests_in_flight(3, false);
        let gate = Gate::new(false);
        let mut device = client.device(gate.clone(), true);
        client.start(&mut device);
        wait_until(|| gate.given.load(Ordering::Acquire) > 0);
        let state = device.stop_queue(QUEUE).unwrap().unwrap();
        gate.open.store(1, Ordering::Release);
        device.start_queue(QUEUE, &client.setup, state).unwrap();
        assert_eq!(client.answers(3), [0, 1, 2]);
    });
}

#[test]
fn a_reset_and_a_new_base_end_the_log() {
    both(|packed| {
        let mut client = Client::new(packed);
        client.add(0..3);
        client.die_with_requests_in_flight(3, false);
        let gate = Gate::new(true);
        let mut device = client.device(gate.clone(), true);
        device.reset();
        client.map.write(0, &vec![0; usize::try_from(BUFFERS).unwrap()]).unwrap();
        client.driver = driver(&client.map, client.features);
        client.start(&mut device);
        client.add(7..8);
        assert_eq!(client.answers(1), [7]);
        assert_eq!(gate.given.load(Ordering::Acquire), 1);
        // Without a reset as well.
        device.stop_queue(QUEUE).unwrap();
        client.map.write(0, &vec![0; usize::try_from(BUFFERS).unwrap()]).unwrap();
        client.driver = driver(&client.map, client.features);
        client.start(&mut device);
        client.add(8..9);
        assert_eq!(client.answers(1), [8]);
    });
}

#[test]
fn a_damaged_log_breaks_its_queue_until_a_reset() {
    let mut client = Client::new(false);
    client.add(0..3);
    client.die_with_requests_in_flight(3, false);
    client.log.store(4, 1);
    let mut device = client.device(Gate::new(true), true);
    client.start(&mut device);
    wait_until(|| device.needs_reset());
    assert_eq!(device.queue_stats(QUEUE).errors, 1);
    device.stop_queue(QUEUE).unwrap();
    device.reset();
    assert!(!device.needs_reset());
    client.map.write(0, &vec![0; usize::try_from(BUFFERS).unwrap()]).unwrap();
    client.driver = driver(&client.map, client.features);
    client.start(&mut device);
    client.add(0..1);
    assert_eq!(client.answers(1), [0]);
}

#[test]
fn logs_are_given_once_and_for_all_queues() {
    let client = Client::new(false);
    let device = client.device(Gate::new(true), false);
    assert_eq!(device.set_logs(vec![client.log.clone()], false), Err(Errno::BUSY));
    assert_eq!(device.set_logs(Vec::new(), false), Err(Errno::INVAL));
}

#[test]
fn a_log_that_is_too_small_breaks_the_queue() {
    let mut client = Client::new(true);
    client.log = client.log.slice(0, 20).unwrap();
    let mut device = client.device(Gate::new(true), false);
    client.start(&mut device);
    client.add(0..1);
    wait_until(|| device.needs_reset());
}
