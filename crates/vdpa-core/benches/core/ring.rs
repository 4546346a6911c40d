//! The device side of a request: it reads and translates three descriptors and writes one used element.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vdpa_core::features::Features;
use vdpa_core::iotlb::{Mapping, RecordId, Table};
use vdpa_core::ring::driver::Driver;
use vdpa_core::ring::inflight::{MaybeLog, log_size};
use vdpa_core::ring::{Buffer, Chain, Memory, Ring, area_sizes};
use vdpa_core::types::{IovaRange, Perm};
use vdpa_core::vq::QueueState;
use vdpa_sys::guest::{GuestMemory, ObjectFile, ObjectId};
use vdpa_sys::snapshot::{GuestArea, Snapshot};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::measure::{Contender, Make};
use crate::plain::{PlainArea, PlainTable};

/// Entries of the ring.
const SIZE: u16 = 256;
/// Requests the driver makes available at once.
const BATCH: u64 = 64;
/// Bytes of a region. An unmapped gap of the same size follows each region.
const REGION: u64 = 1 << 20;
/// Address of the first region, which begins with the ring.
const BASE: u64 = 0x1_0000_0000;

/// The three buffers of each request of a batch, scattered over the regions: header, data and status, as of a block device.
fn requests(regions: u64) -> Vec<[Buffer; 3]> {
    let place = |n: u64| {
        // The multiplier scatters neighbours over the regions.
        let region = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        BASE + region % regions * 2 * REGION + 0x1_0000 + n * 0x1100
    };
    let buffer = |n, len| Buffer { iova: place(n), len };
    (0..BATCH).map(|i| [buffer(3 * i, 16), buffer(3 * i + 1, 4096), buffer(3 * i + 2, 1)]).collect()
}

/// Client memory as a device maps it: objects mapped in this process, and a snapshot of the table over them.
fn snapshot(regions: u64) -> Snapshot {
    let mapping = |i: u64| {
        let file = Arc::new(ObjectFile::new(vdpa_sys::memfd::create(c"bench-core", REGION, None).unwrap()));
        let id = ObjectId { dev_major: 0, dev_minor: 0, inode: i, created_ns: 0, offset: 0 };
        let memory = GuestMemory::from_object(file, id, REGION, true).unwrap();
        let range = IovaRange::from_size(BASE + i * 2 * REGION, REGION).unwrap();
        Mapping { range, uaddr: 0, perm: Perm::RW, memory, stale: false, record: RecordId::default() }
    };
    Snapshot::new(&(0..regions).map(mapping).collect::<Table<GuestMemory>>())
}

/// A ring at the start of the first region.
fn areas(memory: &Snapshot, features: Features) -> [GuestArea; 3] {
    let sizes = area_sizes(SIZE, features);
    let (avail, used) = (BASE + 0x2000, BASE + 0x3000);
    [(BASE, sizes.desc), (avail, sizes.avail), (used, sizes.used)]
        .map(|(iova, size)| memory.area(iova, size as u64, Perm::RW).unwrap())
}

/// Translates buffers to host addresses, as for an iovec.
#[inline]
fn translate(memory: &Snapshot, buffers: &[Buffer], perm: Perm) {
    for buffer in buffers {
        for segment in memory.translate(buffer.iova, buffer.len.into(), perm) {
            let segment = segment.unwrap();
            black_box((segment.memory.host_addr(segment.offset).unwrap(), segment.len));
        }
    }
}

/// vdpa-core with client memory as a device maps it, protected against files that shrink.
fn mapped(name: &'static str, features: Features, regions: u64) -> Contender {
    let memory = snapshot(regions);
    let areas = areas(&memory, features);
    ours(name, features, areas, memory, regions, translate)
}

/// As [`mapped`], with an in-flight log.
fn logged(name: &'static str, features: Features, regions: u64) -> Contender {
    let memory = snapshot(regions);
    let [desc, avail, used] = areas(&memory, features);
    let driver = Driver::new(SIZE, features, desc.clone(), avail.clone(), used.clone()).unwrap();
    let queue = Ring::new(SIZE, features, desc, avail, used, QueueState::initial(features)).unwrap();
    let words: Arc<[AtomicU64]> = (0..log_size(SIZE, features) / 8).map(|_| AtomicU64::new(0)).collect();
    let queue = queue.with_log(words, features).unwrap();
    serve(name, driver, queue, memory, regions, translate)
}

/// vdpa-core with plain memory.
fn plain(regions: u64) -> Contender {
    let sizes = area_sizes(SIZE, Features::NONE);
    let areas = [sizes.desc, sizes.avail, sizes.used].map(PlainArea::new);
    let range = |i: u64| IovaRange::from_size(BASE + i * 2 * REGION, REGION).unwrap();
    let table = PlainTable::new((0..regions).map(range).collect());
    ours("vdpa-core alone, split", Features::NONE, areas, table, regions, |table, buffers, perm| {
        for &buffer in buffers {
            black_box(table.translate(buffer, perm).unwrap());
        }
    })
}

fn ours<M: Memory + 'static>(
    name: &'static str,
    features: Features,
    [desc, avail, used]: [M::Area; 3],
    memory: M,
    regions: u64,
    translate: impl Fn(&M, &[Buffer], Perm) + 'static,
) -> Contender
where
    M::Area: Clone + 'static,
{
    let driver = Driver::new(SIZE, features, desc.clone(), avail.clone(), used.clone()).unwrap();
    let state = QueueState::initial(features);
    let queue = Ring::new(SIZE, features, desc, avail, used, state).unwrap();
    serve(name, driver, queue, memory, regions, translate)
}

/// Both sides of a ring, with or without a log.
fn serve<M: Memory + 'static, L: MaybeLog + 'static>(
    name: &'static str,
    mut driver: Driver<M::Area>,
    mut queue: Ring<M::Area, L>,
    memory: M,
    regions: u64,
    translate: impl Fn(&M, &[Buffer], Perm) + 'static,
) -> Contender
where
    M::Area: Clone + 'static,
{
    let requests = requests(regions);
    let mut chain = Chain::new();
    let mut heads = Vec::new();
    Contender::new(name, move |times| {
        let mut taken = Duration::ZERO;
        for _ in 0..times.div_ceil(BATCH) {
            for [header, data, status] in &requests {
                driver.add(&[*header], &[*data, *status], 0).unwrap();
            }
            driver.publish().unwrap();
            let started = Instant::now();
            heads.clear();
            while queue.pop(&memory, &mut chain).unwrap() {
                translate(&memory, &chain.readable, Perm::RO);
                translate(&memory, &chain.writable, Perm::WO);
                heads.push(chain.head);
            }
            for &head in &heads {
                queue.push_used(head, 4097).unwrap();
            }
            black_box(queue.publish().unwrap());
            taken += started.elapsed();
            assert_eq!(heads.len() as u64, BATCH);
            while driver.pop_used().unwrap().is_some() {}
        }
        taken.mul_f64(scale(times))
    })
}

/// The share of `times` requests in the whole batches that were run.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn scale(times: u64) -> f64 {
    times as f64 / (times.div_ceil(BATCH) * BATCH) as f64
}

fn virtio_queue(regions: u64) -> Contender {
    let list: Vec<_> = (0..regions)
        .map(|i| (GuestAddress(BASE + i * 2 * REGION), usize::try_from(REGION).unwrap()))
        .collect();
    let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&list).unwrap();
    let (desc, avail, used) = (GuestAddress(BASE), GuestAddress(BASE + 0x2000), GuestAddress(BASE + 0x3000));
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.try_set_desc_table_address(desc).unwrap();
    queue.try_set_avail_ring_address(avail).unwrap();
    queue.try_set_used_ring_address(used).unwrap();
    queue.set_ready(true);
    assert!(queue.is_valid(&memory));
    for (i, buffers) in (0u16..).zip(requests(regions)) {
        for (position, (buffer, flags)) in (0u16..).zip(buffers.into_iter().zip([1u16, 3, 2])) {
            let index = 3 * i + position;
            let at = desc.unchecked_add(u64::from(index) * 16);
            memory.write_obj(buffer.iova, at).unwrap();
            memory.write_obj(buffer.len, at.unchecked_add(8)).unwrap();
            memory.write_obj(flags, at.unchecked_add(12)).unwrap();
            memory.write_obj(index + 1, at.unchecked_add(14)).unwrap();
        }
    }
    for entry in 0..SIZE {
        let head = entry % u16::try_from(BATCH).unwrap() * 3;
        memory.write_obj(head, avail.unchecked_add(4 + u64::from(entry) * 2)).unwrap();
    }
    let mut index = 0u16;
    let mut heads = Vec::new();
    Contender::new("virtio-queue + vm-memory", move |times| {
        let mut taken = Duration::ZERO;
        for _ in 0..times.div_ceil(BATCH) {
            index = index.wrapping_add(u16::try_from(BATCH).unwrap());
            memory.store(index, avail.unchecked_add(2), Ordering::Release).unwrap();
            let started = Instant::now();
            heads.clear();
            for chain in queue.iter(&memory).unwrap() {
                heads.push(chain.head_index());
                for descriptor in chain {
                    let len = descriptor.len() as usize;
                    let slice = memory.get_slice(descriptor.addr(), len).unwrap();
                    black_box((slice.ptr_guard().as_ptr(), slice.len(), descriptor.is_write_only()));
                }
            }
            for &head in &heads {
                queue.add_used(&memory, head, 4097).unwrap();
            }
            black_box(queue.needs_notification(&memory).unwrap());
            taken += started.elapsed();
            assert_eq!(heads.len() as u64, BATCH);
        }
        taken.mul_f64(scale(times))
    })
}

/// One table per number of regions.
pub(crate) fn tables() -> Vec<(String, Make)> {
    let table = |regions: u64| {
        let make: Make = Box::new(move || {
            vec![
                mapped("vdpa-core, split", Features::NONE, regions),
                plain(regions),
                mapped("vdpa-core, packed", Features::of(&[Features::RING_PACKED]), regions),
                virtio_queue(regions),
            ]
        });
        (format!("request of 3 descriptors, {regions} regions"), make)
    };
    let logs: Make = Box::new(|| {
        let packed = Features::of(&[Features::RING_PACKED]);
        vec![
            mapped("split", Features::NONE, 4),
            logged("split, with a log", Features::NONE, 4),
            mapped("packed", packed, 4),
            logged("packed, with a log", packed, 4),
        ]
    });
    let mut all: Vec<_> = [1, 4, 32].map(table).into();
    all.push(("in-flight log, request of 3 descriptors".to_owned(), logs));
    all
}
