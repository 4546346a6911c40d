//! libblkio's own core, the crate `blkio` as published, with its driver `virtio-blk-vhost-vdpa`: the cases of libblkio's
//! test suite for virtio-blk drivers, on `blk`. The C library and QEMU's use of it: `tests/clients/libblkio`.
#![expect(unsafe_code, reason = "blkio returns completions in uninitialised places")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod support;

#[path = "support/standstill.rs"]
mod standstill;

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use blkio::{Blkio, BlkioStartOutcome, Blkioq, Completion, Errno, MemoryRegion, ReqFlags, State, iovec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

use support::daemon::{Daemon, Disk, pattern};

const DRIVER: &str = "virtio-blk-vhost-vdpa";
const DISK: usize = 4 << 20;
const NO_FLAGS: ReqFlags = ReqFlags::empty();

fn device(attrs: &[(&str, &str)]) -> (Daemon, Disk, PathBuf) {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", DISK);
    let path = daemon.add_blk("d0", &disk, attrs);
    (daemon, disk, path)
}

fn connected(path: &Path) -> Blkio {
    let mut blkio = Blkio::new(DRIVER).unwrap();
    blkio.set_str("path", path.to_str().unwrap()).unwrap();
    blkio.connect().unwrap();
    blkio
}

/// A started instance with one queue of one kind and a mapped region.
struct Client {
    // Dropped before the instance, whose memory it uses.
    queue: Blkioq,
    region: MemoryRegion,
    blkio: Blkio,
}

impl Client {
    fn start(path: &Path) -> Self {
        Self::start_with(connected(path), 1, 0)
    }

    fn start_with(mut blkio: Blkio, queues: i32, poll_queues: i32) -> Self {
        blkio.set_i32("num-queues", queues).unwrap();
        blkio.set_i32("num-poll-queues", poll_queues).unwrap();
        let BlkioStartOutcome { queues: all, poll_queues } = blkio.start().unwrap();
        let region = blkio.alloc_mem_region(1 << 20).unwrap();
        blkio.map_mem_region(&region).unwrap();
        Self { queue: all.into_iter().chain(poll_queues).next().unwrap(), region, blkio }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.region.len);
        std::ptr::with_exposed_provenance_mut(self.region.addr + offset)
    }

    fn file(&self) -> File {
        // SAFETY: the region is a memfd of blkio's, open as long as the region exists, which this borrow lives in.
        let fd = unsafe { BorrowedFd::borrow_raw(self.region.fd) };
        File::from(fd.try_clone_to_owned().unwrap())
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        std::os::unix::fs::FileExt::write_all_at(&self.file(), bytes, offset as u64).unwrap();
    }

    fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        std::os::unix::fs::FileExt::read_exact_at(&self.file(), &mut bytes, offset as u64).unwrap();
        bytes
    }

    fn write(&mut self, start: u64, bytes: &[u8], flags: ReqFlags) -> i32 {
        self.put(0, bytes);
        self.queue.write(start, self.at(0), bytes.len(), 1, flags);
        only(&mut self.queue)
    }

    fn read(&mut self, start: u64, len: usize) -> Vec<u8> {
        self.put(0, &vec![0xa5; len]);
        self.queue.read(start, self.at(0), len, 2, NO_FLAGS);
        assert_eq!(only(&mut self.queue), 0);
        self.get(0, len)
    }
}

/// `min` completions or more, at most 10 s later, in order of arrival.
fn wait(queue: &mut Blkioq, min: usize, max: usize) -> Result<Vec<Completion>, blkio::Error> {
    let mut time = Duration::from_secs(10);
    wait_for(queue, min, max, &mut time)
}

fn wait_for(
    queue: &mut Blkioq,
    min: usize,
    max: usize,
    time: &mut Duration,
) -> Result<Vec<Completion>, blkio::Error> {
    let mut places: Vec<MaybeUninit<Completion>> = (0..max).map(|_| MaybeUninit::uninit()).collect();
    let count = queue.do_io(&mut places, min, Some(time), None)?;
    // SAFETY: do_io returns how many places it has filled, from the first on.
    Ok(places.into_iter().take(count).map(|place| unsafe { place.assume_init() }).collect())
}

/// The result of the only request in flight.
#[track_caller]
fn only(queue: &mut Blkioq) -> i32 {
    let done = wait(queue, 1, 2).unwrap();
    assert_eq!(done.len(), 1);
    done[0].ret
}

#[test]
fn driver_name_states_and_properties() {
    let (_daemon, _disk, path) = device(&[("serial", "x")]);
    let mut blkio = Blkio::new(DRIVER).unwrap();
    assert_eq!(blkio.get_str("driver").unwrap(), DRIVER);
    assert!(blkio.state() == State::Created && blkio.start().is_err());
    assert!(blkio.alloc_mem_region(4096).is_err(), "not connected yet");
    blkio.set_str("path", path.to_str().unwrap()).unwrap();
    blkio.connect().unwrap();
    assert_eq!(blkio.state(), State::Connected);
    assert!(blkio.connect().is_err() && blkio.set_str("path", "x").is_err());
    assert_eq!(blkio.get_u64("capacity").unwrap(), DISK as u64);
    assert_eq!(blkio.get_i32("max-queues").unwrap(), 4);
    assert_eq!(blkio.get_i32("max-segments").unwrap(), 126);
    assert_eq!(blkio.get_i32("request-alignment").unwrap(), 512);
    assert_eq!(blkio.get_i32("discard-alignment").unwrap(), 512);
    assert_eq!(blkio.get_u64("max-discard-len").unwrap(), 1 << 30);
    assert_eq!(blkio.get_u64("max-write-zeroes-len").unwrap(), 1 << 30);
    assert!(blkio.get_bool("needs-mem-region-fd").unwrap() && blkio.get_bool("flush-needed").unwrap());
    assert!(blkio.set_i32("num-queues", -1).is_err() && blkio.set_i32("queue-size", 3).is_err());
    blkio.set_i32("num-queues", 5).unwrap();
    assert!(blkio.start().is_err(), "more queues than the device has");
    blkio.set_i32("num-queues", 4).unwrap();
    assert_eq!(blkio.start().unwrap().queues.len(), 4);
    assert!(blkio.state() == State::Started && blkio.start().is_err());
    assert_eq!(blkio.add_queue(false).err().unwrap().errno(), Errno::NOTSUP);
}

#[test]
fn one_open_at_a_time() {
    let (daemon, _disk, path) = device(&[]);
    let mut client = Client::start(&path);
    let mut other = Blkio::new(DRIVER).unwrap();
    other.set_str("path", path.to_str().unwrap()).unwrap();
    let open = File::options().write(true).open(&path).unwrap_err();
    assert_eq!(open.raw_os_error(), Some(libc::EBUSY));
    assert_eq!(other.connect().err().unwrap().errno(), Errno::IO, "its word for any failure to open");
    assert_eq!(client.read(0, 512), pattern(0, 512));
    // It only closes the file: no reset and no unmapping.
    drop(client);
    other.connect().unwrap();
    let info = daemon.info("d0").state;
    assert_eq!((info.status.0, info.mappings, info.pinned_pages), (3 | 8, 0, 0));
    assert_eq!(Client::start_with(other, 1, 0).read(512, 512), pattern(512, 512));
}

/// `fd`: a descriptor in place of a path, as QEMU uses libblkio.
#[test]
fn a_descriptor_in_place_of_a_path() {
    let (daemon, _disk, path) = device(&[]);
    for options in [(true, true), (true, false), (false, true)] {
        let open = File::options().read(options.0).write(options.1).open(&path);
        let mut blkio = Blkio::new(DRIVER).unwrap();
        blkio.set_i32("fd", open.unwrap().into_raw_fd()).unwrap();
        // The IOTLB is written to.
        assert_eq!(blkio.connect().is_ok() && blkio.start().is_ok(), options.1, "{options:?}");
        drop(blkio);
        daemon.wait_for("d0", "the close", |info| !info.state.open);
    }
}

/// `write-read`, `write-fua`, `flush` and `user-data`.
#[test]
fn what_is_written_is_read_and_in_the_file() {
    let (_daemon, disk, path) = device(&[]);
    let mut client = Client::start(&path);
    assert_eq!(client.read(4096, 8192), pattern(4096, 8192));
    let bytes = pattern(1 << 40, 64 << 10);
    assert_eq!(client.write(512 * 3, &bytes, NO_FLAGS), 0);
    assert_eq!(client.write(1 << 20, &bytes, ReqFlags::FUA), 0);
    client.queue.flush(0xfeed, NO_FLAGS);
    let done = wait(&mut client.queue, 1, 4).unwrap();
    assert_eq!((done.len(), done[0].ret, done[0].user_data), (1, 0, 0xfeed));
    assert_eq!(disk.read(512 * 3, bytes.len()), bytes);
    assert_eq!(client.read(1 << 20, bytes.len()), bytes);
    assert_eq!(client.write(DISK as u64, &[0; 512], NO_FLAGS), -libc::EIO);
}

/// `writev-readv`.
#[test]
fn several_buffers_in_one_request() {
    let (_daemon, disk, path) = device(&[]);
    let mut client = Client::start(&path);
    let bytes = pattern(1 << 41, 6 * 512);
    client.put(0, &bytes);
    let piece = |offset, len| iovec { iov_base: client.at(offset).cast(), iov_len: len };
    let parts = [piece(0, 512), piece(512, 1024), piece(1536, 1536)];
    client.queue.writev(8192, parts.as_ptr(), 3, 0, NO_FLAGS);
    assert_eq!(only(&mut client.queue), 0);
    assert_eq!(disk.read(8192, bytes.len()), bytes);
    let parts = [
        iovec { iov_base: client.at(65536 + 2048).cast(), iov_len: 1024 },
        iovec { iov_base: client.at(65536).cast(), iov_len: 2048 },
    ];
    client.queue.readv(8192, parts.as_ptr(), 2, 0, NO_FLAGS);
    assert_eq!(only(&mut client.queue), 0);
    assert_eq!(client.get(65536 + 2048, 1024), bytes[..1024]);
    assert_eq!(client.get(65536, 2048), bytes[1024..]);
}

/// `discard` and `write-zeroes`.
#[test]
fn ranges_are_discarded_and_zeroed() {
    let (_daemon, disk, path) = device(&[]);
    let mut client = Client::start(&path);
    for (flags, at) in [(NO_FLAGS, 0), (ReqFlags::NO_UNMAP, 1 << 20)] {
        client.queue.write_zeroes(at, 128 << 10, 0, flags);
        assert_eq!(only(&mut client.queue), 0);
        assert_eq!(disk.read(at, 128 << 10), vec![0; 128 << 10]);
        assert_eq!(disk.read(at + (128 << 10), 512), pattern(at + (128 << 10), 512));
    }
    client.queue.discard(2 << 20, 1 << 20, 0, NO_FLAGS);
    assert_eq!(only(&mut client.queue), 0);
    assert_eq!(disk.read(3 << 20, 4096), pattern(3 << 20, 4096));
    client.queue.write_zeroes(512, 100, 0, NO_FLAGS);
    assert_eq!(only(&mut client.queue), -libc::EINVAL, "no whole sectors");
    client.queue.discard(DISK as u64, 512, 0, NO_FLAGS);
    assert_eq!(only(&mut client.queue), -libc::EIO, "beyond the end");
}

/// `read-invalid-flags`.
#[test]
fn flags_a_request_does_not_have_are_refused() {
    let (daemon, _disk, path) = device(&[]);
    let mut client = Client::start(&path);
    client.queue.read(0, client.at(0), 512, 0, ReqFlags::FUA);
    assert_eq!(only(&mut client.queue), -libc::EINVAL);
    assert_eq!(daemon.info("d0").state.queues[0].requests, 0);
}

/// `read-only`.
#[test]
fn a_read_only_device_takes_no_writes() {
    let (_daemon, disk, path) = device(&[("readonly", "on")]);
    let mut blkio = connected(&path);
    assert_eq!(blkio.start().err().unwrap().errno(), Errno::ROFS, "it must be asked for");
    drop(blkio);
    let mut blkio = Blkio::new(DRIVER).unwrap();
    blkio.set_str("path", path.to_str().unwrap()).unwrap();
    blkio.set_bool("read-only", true).unwrap();
    blkio.connect().unwrap();
    let mut queue = blkio.start().unwrap().queues.remove(0);
    let region = blkio.alloc_mem_region(4096).unwrap();
    blkio.map_mem_region(&region).unwrap();
    let at = std::ptr::with_exposed_provenance_mut(region.addr);
    queue.read(0, at, 4096, 0, NO_FLAGS);
    assert_eq!(only(&mut queue), 0);
    queue.write(0, at, 4096, 0, NO_FLAGS);
    assert_eq!(only(&mut queue), -libc::EBADF);
    assert!(disk.all() == pattern(0, DISK));
}

/// `alloc-mem-region`, `map-mem-region` and `auto-free-mem-regions`.
#[test]
fn regions_come_and_go() {
    let (daemon, _disk, path) = device(&[]);
    let mut client = Client::start(&path);
    let mapped = daemon.info("d0").state.mappings;
    let other = client.blkio.alloc_mem_region(64 << 10).unwrap();
    assert_eq!(daemon.info("d0").state.mappings, mapped, "only allocated");
    client.blkio.map_mem_region(&other).unwrap();
    assert!(client.blkio.map_mem_region(&other).is_err(), "mapped already");
    assert_eq!(daemon.info("d0").state.mappings, mapped + 1);
    client.queue.read(0, std::ptr::with_exposed_provenance_mut(other.addr), 4096, 0, NO_FLAGS);
    assert_eq!(only(&mut client.queue), 0);
    client.blkio.unmap_mem_region(&other);
    assert_eq!(daemon.info("d0").state.mappings, mapped);
    client.blkio.free_mem_region(&other);
    assert_eq!(client.read(0, 512), pattern(0, 512));
    drop(client);
    daemon.wait_for("d0", "the end of all mappings", |info| info.state.mappings == 0 && !info.state.open);
}

/// `get_completion_fd` and `set-completion-fd`.
#[test]
fn completions_are_told_when_that_is_asked_for() {
    let (_daemon, _disk, path) = device(&[]);
    let mut client = Client::start(&path);
    let fd = client.queue.get_completion_fd().unwrap();
    // SAFETY: the queue, which lives to the end of the test, owns the descriptor.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let ready = |time: Duration| {
        let time = Timespec::try_from(time).unwrap();
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&time)).unwrap() == 1
    };
    client.queue.set_completion_fd_enabled(true);
    client.queue.read(0, client.at(0), 512, 0, NO_FLAGS);
    assert!(wait(&mut client.queue, 0, 0).unwrap().is_empty(), "only submits");
    assert!(ready(Duration::from_secs(10)));
    assert_eq!(only(&mut client.queue), 0);
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).unwrap();
    assert!(!ready(Duration::ZERO) && fd.as_raw_fd() > 2);

    // With event indices the driver is signalled once more, for the next completion, and then not any more.
    client.queue.set_completion_fd_enabled(false);
    for told in [true, false] {
        client.queue.read(0, client.at(0), 512, 0, NO_FLAGS);
        while wait(&mut client.queue, 0, 1).unwrap().is_empty() {}
        assert_eq!(ready(if told { Duration::from_secs(10) } else { Duration::from_millis(50) }), told);
        if told {
            rustix::io::read(fd, &mut count).unwrap();
        }
    }
}

/// `poll-queues` and `polled`.
#[test]
fn a_queue_that_is_polled() {
    let (_daemon, _disk, path) = device(&[]);
    let mut client = Client::start_with(connected(&path), 0, 2);
    assert_eq!(client.queue.get_completion_fd(), None);
    assert_eq!(client.read(512, 1024), pattern(512, 1024));
    assert_eq!(client.write(512, &[7; 512], NO_FLAGS), 0);
    assert_eq!(client.read(512, 512), [7; 512]);
}

/// `queue-full`: more requests than the ring has entries, and as many as the largest ring has.
#[test]
fn more_requests_than_the_queue_holds() {
    const COUNT: usize = 1000;
    let (daemon, _disk, path) = device(&[]);
    for (round, size) in [(1, 16), (2, 256), (3, 1024)] {
        let mut blkio = connected(&path);
        blkio.set_i32("queue-size", size).unwrap();
        let mut client = Client::start_with(blkio, 1, 0);
        for index in 0..COUNT {
            client.queue.read(512 * index as u64, client.at(512 * index), 512, index, NO_FLAGS);
        }
        let mut seen = vec![false; COUNT];
        while seen.iter().any(|seen| !seen) {
            for done in wait(&mut client.queue, 1, 64).unwrap() {
                assert_eq!(done.ret, 0);
                assert!(!std::mem::replace(&mut seen[done.user_data], true), "{} twice", done.user_data);
            }
        }
        assert_eq!(client.get(0, 512 * COUNT), pattern(0, 512 * COUNT));
        let queue = &daemon.info("d0").state.queues[0];
        assert_eq!(
            (queue.size, queue.requests, queue.errors),
            (u16::try_from(size).unwrap(), round * COUNT as u64, 0)
        );
        drop(client);
        daemon.wait_for("d0", "the close", |info| !info.state.open);
    }
}

/// `timeout`, and the numbers of completions that can be waited for.
#[test]
fn waiting_has_an_end() {
    let (daemon, _disk, path) = device(&[]);
    let mut client = Client::start(&path);
    let error = wait(&mut client.queue, 1, 1).err().unwrap();
    assert_eq!(error.errno(), Errno::INVAL, "nothing is in flight");
    // Nothing is answered while the daemon is stopped, for much less than the time-out of its watchdog.
    let pid = Pid::from_raw(i32::try_from(daemon.pid()).unwrap()).unwrap();
    standstill::stop(pid);
    client.queue.read(0, client.at(0), 512, 9, NO_FLAGS);
    let mut time = Duration::from_millis(100);
    let error = wait_for(&mut client.queue, 1, 1, &mut time).err();
    kill_process(pid, Signal::CONT).unwrap();
    assert_eq!((error.unwrap().errno(), time), (Errno::TIME, Duration::ZERO));
    assert_eq!(wait(&mut client.queue, 1, 1).unwrap()[0].user_data, 9);
    daemon.assert_alive();
}
