//! A block device whose process is killed under load, and successors that continue its ring from the in-flight log.
//!
//! The test binary is also the device: it runs itself with [`DEVICE`] set.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, getpid, kill_process, set_parent_process_death_signal};
use vdpa_backend::worker::{MemoryView, log_words};
use vdpa_core::blk::{BlkRequest, FramingError, RequestHeader, Status, kind};
use vdpa_core::iotlb::{Mapping, RecordId, Table};
use vdpa_core::parent::SetMap;
use vdpa_core::ring::driver::Driver;
use vdpa_core::ring::{Buffer, area_sizes};
use vdpa_core::types::{Asid, IovaRange, Perm};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::{GuestMemory, ObjectId};
use vdpa_sys::mmap::{MapArea, Prot, SharedMap};
use vdpa_sys::shared_words::SharedWords;
use vdpa_sys::uring::OwnedBuf;

use super::*;
use crate::block::{Continuation, RequestContext, Step};

/// Set for the device: features, descriptors, attribute `direct` and path, separated by spaces.
const DEVICE: &str = "VDPAD_TEST_CRASH_DEVICE";

/// Bytes of client memory, and where in it the ring and the requests are.
const MEMORY: u64 = 1 << 20;
const RING: [u64; 3] = [0, 0x4000, 0x8000];
const REQUESTS: u64 = 0x10000;
/// Bytes of client memory for a request: header, status, data.
const ROOM: u64 = 0x2000;
const STATUS: u64 = 0x100;
const DATA: u64 = 0x1000;
/// Bytes that one request writes or reads.
const BLOCK: usize = 4096;
const BLOCK_SECTORS: u64 = 8;
const SIZE: u16 = 128;
/// Requests at a time; each has a block of the disk.
const DEPTH: u64 = 16;
const LIMIT: Duration = Duration::from_secs(20);

/// What the driver does with one block of the disk.
#[derive(Clone, Copy)]
struct Slot {
    /// What was written into it, or is being written.
    version: u64,
    writing: bool,
}

struct Bench {
    features: Features,
    /// Attribute `direct` of the device.
    direct: &'static str,
    path: PathBuf,
    memory: SharedMap,
    driver: Driver<MapArea>,
    kick: EventFd,
    call: EventFd,
    files: [OwnedFd; 2],
    slots: Vec<Slot>,
    open: u64,
    answered: u64,
    /// Requests that were answered with an error.
    refused: Vec<u64>,
}

impl Bench {
    fn new(features: Features, direct: &'static str, path: &Path) -> Self {
        let file = vdpa_sys::memfd::create(c"client", MEMORY, None).unwrap();
        let memory = SharedMap::map(&file, 0, usize::try_from(MEMORY).unwrap(), Prot::RW, false).unwrap();
        let (log, _) = SharedWords::create(c"log", log_words(SIZE)).unwrap();
        let (kick, call) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        for fd in [file.as_fd(), log.as_fd(), kick.as_fd(), call.as_fd()] {
            fcntl_setfd(fd, FdFlags::empty()).unwrap();
        }
        let sizes = area_sizes(SIZE, features);
        let area = |at: u64, size| memory.area(at.try_into().unwrap(), size).unwrap();
        let [desc, avail, used] = RING;
        let (desc, avail, used) = (area(desc, sizes.desc), area(avail, sizes.avail), area(used, sizes.used));
        Self {
            features,
            direct,
            path: path.to_owned(),
            driver: Driver::new(SIZE, features, desc, avail, used).unwrap(),
            memory,
            kick,
            call,
            files: [file, log],
            slots: vec![Slot { version: 0, writing: true }; DEPTH.try_into().unwrap()],
            open: 0,
            answered: 0,
            refused: Vec::new(),
        }
    }

    fn spawn(&self) -> Device {
        let [memory, log] = &self.files;
        let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().to_string();
        let fds = [memory.as_fd(), log.as_fd(), self.kick.as_fd(), self.call.as_fd()].map(number).join(" ");
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "devices::blk::crash_tests::device_process", "--nocapture", "--quiet"])
            .env(DEVICE, format!("{} {fds} {} {}", self.features.0, self.direct, self.path.display()))
            .stdout(std::process::Stdio::null())
            .spawn();
        Device(child.unwrap())
    }

    fn at(token: u64, offset: u64) -> usize {
        usize::try_from(REQUESTS + token * ROOM + offset).unwrap()
    }

    /// Writes the block of `token` with a new version, or reads it.
    fn add(&mut self, token: u64) {
        let slot = &mut self.slots[usize::try_from(token).unwrap()];
        slot.version += u64::from(slot.writing);
        let Slot { version, writing } = *slot;
        let kind = if writing { kind::OUT } else { kind::IN };
        let header = RequestHeader { kind, ioprio: 0, sector: token * BLOCK_SECTORS };
        self.memory.write(Self::at(token, 0), &header.encode()).unwrap();
        self.memory.write(Self::at(token, STATUS), &[0xff]).unwrap();
        let data = if writing { pattern(token, version) } else { vec![0; BLOCK] };
        self.memory.write(Self::at(token, DATA), &data).unwrap();
        let buffer = |offset, len| Buffer { iova: REQUESTS + token * ROOM + offset, len };
        let (header, status, data) =
            (buffer(0, 16), buffer(STATUS, 1), buffer(DATA, u32::try_from(BLOCK).unwrap()));
        let added = if writing {
            self.driver.add(&[header, data], &[status], token)
        } else {
            self.driver.add(&[header], &[data, status], token)
        };
        added.unwrap();
        self.open += 1;
    }

    fn publish(&mut self) {
        if self.driver.publish().unwrap() {
            self.kick.signal();
        }
    }

    /// Checks the answers that there are, and makes the next request of each block if `more`.
    fn collect(&mut self, more: bool) -> bool {
        let _ = self.call.drain();
        let before = self.answered;
        while let Some(done) = self.driver.pop_used().unwrap() {
            (self.answered, self.open) = (self.answered + 1, self.open - 1);
            let token = done.token;
            let slot = &mut self.slots[usize::try_from(token).unwrap()];
            let mut status = [0];
            self.memory.read(Self::at(token, STATUS), &mut status).unwrap();
            match status {
                [0] if slot.writing => slot.writing = false,
                [0] => {
                    let mut data = vec![0; BLOCK];
                    self.memory.read(Self::at(token, DATA), &mut data).unwrap();
                    assert!(data == pattern(token, slot.version), "block {token}, version {}", slot.version);
                    slot.writing = true;
                }
                [1] => {
                    // Refused, since three processes had begun it: a write may be done or not, and is made anew.
                    assert_eq!(done.len, 1);
                    self.refused.push(token);
                }
                _ => panic!("status {status:?}"),
            }
            if more {
                self.add(token);
            }
        }
        self.publish();
        self.answered > before
    }

    fn drain(&mut self) {
        let deadline = Instant::now() + LIMIT;
        while self.open > 0 {
            assert!(Instant::now() < deadline, "{} requests are not answered", self.open);
            if !self.collect(false) && !self.driver.enable_interrupts().unwrap() {
                assert!(self.call.wait(Some(LIMIT)), "no interrupt, {} requests open", self.open);
            }
        }
    }
}

fn pattern(token: u64, version: u64) -> Vec<u8> {
    let word = (version << 8 | token).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK).collect()
}

struct Device(Child);

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn killed(more: &[vdpa_core::features::Bit], direct: &'static str) {
    const KILLS: u64 = 30;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let slots = usize::try_from(DEPTH).unwrap();
    std::fs::write(&path, vec![0; BLOCK * slots]).unwrap();
    let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    let features = more.iter().fold(features, |all, &bit| all.with(bit));
    let mut bench = Bench::new(features, direct, &path);
    (0..DEPTH).for_each(|token| bench.add(token));
    bench.publish();
    for number in 0..KILLS {
        let _device = bench.spawn();
        // Two lives of three may end before they have answered anything; the third one works first, however slow the machine is.
        let wanted = bench.answered + if number % 3 == 2 { DEPTH } else { 0 };
        let deadline = Instant::now() + LIMIT;
        while bench.answered < wanted {
            assert!(Instant::now() < deadline, "{} of {wanted} answered", bench.answered);
            if !bench.collect(true) && !bench.driver.enable_interrupts().unwrap() {
                let _ = bench.call.wait(Some(deadline.saturating_duration_since(Instant::now())));
            }
        }
        // The lives differ by a number that is prime to everything else here.
        let end = Instant::now() + Duration::from_micros(4_000 + number * 7_919 % 37_000);
        while Instant::now() < end {
            if !bench.collect(true) && !bench.driver.enable_interrupts().unwrap() {
                let _ = bench.call.wait(Some(end.saturating_duration_since(Instant::now())));
            }
        }
    }
    let _device = bench.spawn();
    bench.drain();
    (0..DEPTH).for_each(|token| bench.add(token));
    bench.publish();
    bench.drain();
    println!("{KILLS} kills, {} answered, {} of them refused", bench.answered, bench.refused.len());
    assert!(bench.answered >= KILLS / 3 * DEPTH);
}

#[test]
fn a_split_ring_survives_the_death_of_its_process() {
    killed(&[Features::BLK_FLUSH], "off");
}

#[test]
fn a_packed_ring_survives_the_death_of_its_process() {
    killed(&[Features::BLK_FLUSH, Features::RING_PACKED, Features::RING_EVENT_IDX], "off");
}

/// Without the page cache, operations are in flight in the kernel when their process is killed.
#[test]
fn operations_of_a_dead_process_change_nothing_later() {
    killed(&[], "on");
}

#[test]
fn a_request_that_ends_three_processes_is_answered_with_an_error() {
    let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    let mut bench = Bench::new(features, "off", Path::new("deadly"));
    bench.add(3);
    bench.publish();
    for _ in 0..3 {
        assert!(!bench.spawn().0.wait().unwrap().success());
    }
    let _device = bench.spawn();
    bench.drain();
    assert_eq!((bench.answered, &bench.refused[..]), (1, &[3][..]));
    // Others are done.
    bench.slots[4].writing = false;
    bench.add(4);
    bench.publish();
    let deadline = Instant::now() + LIMIT;
    while bench.driver.pop_used().unwrap().is_none() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One of 32 requests ends its process, again and again. It is refused, and all others are done, although many of them were in
/// flight at each death.
fn one_of_many(more: &[vdpa_core::features::Bit], deadly: u64) {
    const REQUESTS: u64 = 32;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; BLOCK * usize::try_from(REQUESTS).unwrap()]).unwrap();
    let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    let features = more.iter().fold(features, |all, &bit| all.with(bit));
    let path = format!("deadly:{}:{}", deadly * BLOCK_SECTORS, path.display());
    // Without the page cache, requests are in flight until the kernel has answered.
    let mut bench = Bench::new(features, "on", Path::new(&path));
    bench.slots = vec![Slot { version: 0, writing: true }; REQUESTS.try_into().unwrap()];
    (0..REQUESTS).for_each(|token| bench.add(token));
    bench.publish();
    for life in 1..=3 {
        assert!(!bench.spawn().0.wait().unwrap().success(), "life {life}");
    }
    let _device = bench.spawn();
    bench.drain();
    assert_eq!(bench.refused, [deadly]);
    assert_eq!(bench.answered, REQUESTS);
    // What was written is there.
    (0..REQUESTS).filter(|&token| token != deadly).for_each(|token| bench.add(token));
    bench.publish();
    bench.drain();
    assert_eq!((bench.answered, bench.refused.len()), (2 * REQUESTS - 1, 1));
}

#[test]
fn a_deadly_request_is_the_only_one_that_is_refused() {
    for deadly in [0, 7, 15, 31] {
        one_of_many(&[Features::BLK_FLUSH], deadly);
    }
}

#[test]
fn a_deadly_request_is_the_only_one_that_is_refused_on_a_packed_ring() {
    for deadly in [0, 15, 31] {
        one_of_many(&[Features::BLK_FLUSH, Features::RING_PACKED, Features::RING_EVENT_IDX], deadly);
    }
}

/// Not a test: the device process of the others.
#[test]
fn device_process() {
    let Ok(words) = std::env::var(DEVICE) else { return };
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let [features, fds @ .., direct, path] = &words.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{words}")
    };
    let take = |fd: &&str| vdpa_sys::inherit::take(fd.parse().unwrap()).unwrap();
    let fds: Vec<OwnedFd> = fds.iter().map(take).collect();
    let [memory, log, kick, call] = <[OwnedFd; 4]>::try_from(fds).unwrap();
    let [desc, avail, used] = RING;
    let features = Features(features.parse().unwrap());
    let setup = QueueSetup {
        size: SIZE,
        desc,
        avail,
        used,
        asid: Asid(0),
        log_used: None,
        features,
        kick: Some(EventFd::from_fd(kick).unwrap()),
        call: Some(EventFd::from_fd(call).unwrap()),
    };
    let pool = WorkerPool::new(1, Duration::ZERO);
    let options = |source: &str, value: &str| {
        let mut attrs = Attrs::default();
        attrs.insert("packed", "on").unwrap();
        attrs.insert("direct", *direct).unwrap();
        attrs.insert("queues", "1").unwrap();
        attrs.insert(source, value).unwrap();
        Options::parse("disk", &attrs).unwrap()
    };
    let deadly = path.strip_prefix("deadly:").and_then(|rest| rest.split_once(':'));
    let mut blk = if *path == "deadly" {
        let options = options("null", "1048576");
        let capacity = Arc::new(Capacity::new(2048));
        let geometry = Geometry { capacity, block_size: 512, read_only: false, discard: true };
        Blk::new("disk", &options, geometry, Deadly { sector: None, disk: None }, &pool).unwrap()
    } else {
        let path = deadly.map_or(*path, |(_, path)| path);
        let options = options("path", path);
        let backing = open(Path::new(path), &options);
        let capacity = Arc::clone(&backing.capacity);
        let geometry = Geometry { capacity, block_size: 512, read_only: false, discard: true };
        let disk = FileDisk::new(backing, options.serial);
        match deadly {
            Some((sector, _)) => {
                let disk = Deadly { sector: sector.parse().ok(), disk: Some(disk) };
                Blk::new("disk", &options, geometry, disk, &pool).unwrap()
            }
            None => Blk::new("disk", &options, geometry, disk, &pool).unwrap(),
        }
    };
    blk.queues().set_logs(vec![SharedWords::map(log).unwrap()], true).unwrap();
    blk.memory.set_map(Asid(0), &table(memory)).unwrap();
    blk.start_queue(QueueIndex(0), &setup, QueueState::initial(features)).unwrap();
    loop {
        std::thread::park();
    }
}

/// The file stays locked until the operations of the process that has died are done: none of them changes the disk after one
/// of this process.
fn open(path: &Path, options: &Options) -> Backing {
    let deadline = Instant::now() + LIMIT;
    loop {
        match Backing::open(path, options, &Kept::default(), false) {
            Ok(backing) => return backing,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
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

/// A disk that ends its process when it is written to, at this sector or at any.
struct Deadly {
    sector: Option<u64>,
    disk: Option<FileDisk>,
}

impl Disk for Deadly {
    fn register(&mut self, registrar: &vdpa_sys::uring::Registrar) {
        self.disk.iter_mut().for_each(|disk| disk.register(registrar));
    }

    fn start(&mut self, request: &BlkRequest<'_>, view: &Arc<MemoryView>, context: RequestContext) -> Step {
        let here = self.sector.is_none_or(|sector| sector == request.header.sector);
        if request.header.kind == kind::OUT && here {
            kill_process(getpid(), Signal::KILL).unwrap();
            loop {
                std::thread::park();
            }
        }
        match &mut self.disk {
            Some(disk) => disk.start(request, view, context),
            None => Step::Complete { status: Status::Ok, written: 0 },
        }
    }

    fn malformed(&mut self, _: &FramingError) -> Step {
        Step::Unreachable
    }

    fn io_completed(
        &mut self,
        then: Continuation,
        result: Result<u32>,
        buffer: Option<OwnedBuf>,
        view: &Arc<MemoryView>,
    ) -> Step {
        match &mut self.disk {
            Some(disk) => disk.io_completed(then, result, buffer, view),
            None => Step::Unreachable,
        }
    }
}
