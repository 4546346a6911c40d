//! The requests of cloud-hypervisor to a vhost-vdpa device (`--vdpa`), in its order, through the crate `vhost` that it uses. The
//! program itself needs KVM.
//!
//! Unusual are: mappings in the version-2 format before any backend feature was acknowledged to the device,
//! every backend bit acknowledged, the status set from 0 to `DRIVER_OK` in one step, and a reset after which it expects its
//! mappings to be there.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod support;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_core::ring::driver::SplitDriver;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{MapArea, Prot, SharedMap};
use vhost::vdpa::VhostVdpa as _;
use vhost::vhost_kern::VhostKernFeatures as _;
use vhost::vhost_kern::vdpa::VhostKernVdpa;
use vhost::{VhostBackend as _, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use support::blk::TIMEOUT;
use support::daemon::{Daemon, pattern};

type Memory = GuestMemoryMmap<()>;

const QUEUES: usize = 2;
const SIZE: u16 = 256;
/// The guest's memory, from address 0 on.
const BYTES: usize = 1 << 20;
/// Distance of the queues' areas.
const QUEUE: u64 = 0x1_0000;
const DATA: u64 = 0x8_0000;

/// A guest, with the driver of each queue, and the events that the hypervisor makes for them.
struct Guest {
    map: SharedMap,
    features: Features,
    drivers: Vec<SplitDriver<MapArea>>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    config: EventFd,
}

impl Guest {
    fn new(map: SharedMap, features: u64) -> Self {
        let event = |_| EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut guest = Self {
            map,
            features: Features(features),
            drivers: Vec::new(),
            kicks: (0..QUEUES).map(event).collect(),
            calls: (0..QUEUES).map(event).collect(),
            config: event(0),
        };
        guest.begin();
        guest
    }

    /// Rings as after a reset.
    fn begin(&mut self) {
        self.map.write(0, &vec![0; usize::try_from(QUEUE).unwrap() * QUEUES]).unwrap();
        let area = |offset: u64, len| self.map.area(usize::try_from(offset).unwrap(), len).unwrap();
        let driver = |queue| {
            let at = queue as u64 * QUEUE;
            let (desc, avail, used) =
                (area(at, 16 * 256), area(at + 0x2000, 6 + 2 * 256), area(at + 0x1000, 6 + 8 * 256));
            SplitDriver::new(SIZE, self.features, desc, avail, used).unwrap()
        };
        self.drivers = (0..QUEUES).map(driver).collect();
    }

    /// A request of 4096 bytes on the blocks from `sector` on.
    fn request(&mut self, queue: usize, kind: u32, sector: u64) {
        let head = queue as u64 * QUEUE + 0x8000;
        let at = |address: u64| usize::try_from(address).unwrap();
        self.map.write(at(head), &RequestHeader { kind, ioprio: 0, sector }.encode()).unwrap();
        self.map.write(at(head + 32), &[0xff]).unwrap();
        let (header, status) = (Buffer { iova: head, len: 16 }, Buffer { iova: head + 32, len: 1 });
        let data = Buffer { iova: DATA, len: 4096 };
        let driver = &mut self.drivers[queue];
        if kind == kind::OUT {
            driver.add(&[header, data], &[status], 7).unwrap();
        } else {
            driver.add(&[header], &[data, status], 7).unwrap();
        }
        // A device that is busy-polling has disabled kicks.
        if driver.publish().unwrap() {
            self.kicks[queue].write(1).unwrap();
        }
        let deadline = Instant::now() + TIMEOUT;
        while self.calls[queue].read().is_err() {
            assert!(Instant::now() < deadline, "no interrupt");
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.drivers[queue].pop_used().unwrap().map(|done| done.token), Some(7));
        let mut answer = [0xee];
        self.map.read(at(head + 32), &mut answer).unwrap();
        assert_eq!(answer, [0]);
    }

    /// Writes on the first queue and reads back on the second.
    fn check(&mut self, round: u64) {
        let bytes = pattern(round << 40, 4096);
        let at = usize::try_from(DATA).unwrap();
        self.map.write(at, &bytes).unwrap();
        self.request(0, kind::OUT, 8 * round);
        self.map.write(at, &[0; 4096]).unwrap();
        self.request(1, kind::IN, 8 * round);
        let mut found = vec![0; 4096];
        self.map.read(at, &mut found).unwrap();
        assert!(found == bytes, "round {round}");
    }
}

fn open<'a>(path: &Path, memory: &'a Memory) -> VhostKernVdpa<&'a Memory> {
    let vdpa = VhostKernVdpa::new(path.to_str().unwrap(), memory).unwrap();
    vdpa.set_owner().unwrap();
    vdpa
}

/// `activate_vdpa`.
fn activate(vdpa: &mut VhostKernVdpa<&Memory>, guest: &Guest, backend_features: u64) {
    vdpa.set_features(guest.features.0).unwrap();
    vdpa.set_backend_features(backend_features).unwrap();
    for queue in 0..QUEUES {
        let at = queue as u64 * QUEUE;
        vdpa.set_vring_num(queue, SIZE).unwrap();
        let addresses = VringConfigData {
            queue_max_size: vdpa.get_vring_num().unwrap(),
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: at,
            used_ring_addr: at + 0x1000,
            avail_ring_addr: at + 0x2000,
            log_addr: None,
        };
        vdpa.set_vring_addr(queue, &addresses).unwrap();
        vdpa.set_vring_base(queue, 0).unwrap();
        vdpa.set_vring_call(queue, &guest.calls[queue]).unwrap();
        vdpa.set_vring_kick(queue, &guest.kicks[queue]).unwrap();
    }
    vdpa.set_config_call(&guest.config).unwrap();
    for queue in 0..QUEUES {
        vdpa.set_vring_enable(queue, true).unwrap();
    }
    vdpa.set_status(0xf).unwrap();
}

/// `reset_vdpa`.
fn reset(vdpa: &VhostKernVdpa<&Memory>) {
    for queue in 0..QUEUES {
        vdpa.set_vring_enable(queue, false).unwrap();
    }
    vdpa.set_status(0).unwrap();
}

#[test]
fn a_machine_that_boots_twice_and_migrates() {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", 1 << 20);
    let path = daemon.add_blk("d0", &disk, &[("queues", "2")]);
    let unused: Memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let fd = memfd::create(c"guest", BYTES as u64, None).unwrap();
    let map = SharedMap::map(&fd, 0, BYTES, Prot::RW, false).unwrap();
    let host = map.addr();

    // Vdpa::new
    let mut vdpa = open(&path, &unused);
    assert_eq!(vdpa.get_device_id().unwrap(), 2);
    assert!(vdpa.get_vring_num().unwrap() >= SIZE);
    let offered = Features(vdpa.get_features().unwrap());
    assert!(offered.has(Features::ACCESS_PLATFORM));
    let backend_features = vdpa.get_backend_features().unwrap();
    vdpa.set_backend_features_acked(backend_features);
    let range = vdpa.get_iova_range().unwrap();
    assert!(range.first == 0 && range.last >= BYTES as u64);
    // VdpaDmaMapping::map, although version-2 messages were not acknowledged to the device.
    vdpa.dma_map(0, BYTES as u64, std::ptr::with_exposed_provenance(host), false).unwrap();

    let features = Features::of(&[
        Features::VERSION_1,
        Features::ACCESS_PLATFORM,
        Features::BLK_FLUSH,
        Features::BLK_MQ,
    ]);
    let mut guest = Guest::new(map, features.0);
    activate(&mut vdpa, &guest, backend_features);
    guest.check(1);

    // The guest reboots; nothing is mapped again.
    reset(&vdpa);
    assert_eq!(daemon.info("d0").state.mappings, 1);
    guest.begin();
    activate(&mut vdpa, &guest, backend_features);
    guest.check(2);

    // Pausable::pause and Migratable::start_migration: the state is saved, and the file closed.
    vdpa.suspend().unwrap();
    let mut config = vec![0; vdpa.get_config_size().unwrap() as usize];
    vdpa.get_config(0, &mut config).unwrap();
    drop(vdpa);

    // The destination, which opens the device at once.
    let mut vdpa = open(&path, &unused);
    vdpa.set_backend_features_acked(backend_features);
    vdpa.set_config(0, &config).unwrap();
    assert_eq!(daemon.info("d0").state.mappings, 0);
    vdpa.dma_map(0, BYTES as u64, std::ptr::with_exposed_provenance(host), false).unwrap();
    guest.begin();
    activate(&mut vdpa, &guest, backend_features);
    guest.check(3);
    vdpa.dma_unmap(0, BYTES as u64).unwrap();
    drop(vdpa);
    for round in 1..=3 {
        assert_eq!(disk.read(4096 * round, 4096), pattern(round << 40, 4096));
    }
    assert_eq!(daemon.info("d0").state.queues.iter().map(|queue| queue.requests).collect::<Vec<_>>(), [3, 3]);
}
