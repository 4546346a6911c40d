//! Many devices on one thread: no device affects the others, whatever it does or suffers.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/hanging.rs"]
mod hanging;
mod support;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vdpa_core::Errno;
use vdpa_core::blk::kind;
use vdpa_core::features::{Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Asid, Perm, QueueIndex};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;

use hanging::HangingFile;
use support::blk::{
    Blk, DATA, FEATURES, IOERR, MEMORY, NEXT, OK, Private, TIMEOUT, WRITE, data, over_packed_rings,
};
use support::daemon::{Daemon, Disk, pattern};

const DISK: usize = 1 << 20;

/// A daemon with one worker thread.
fn one_worker() -> Daemon {
    Daemon::start_with(&["--workers", "1"])
}

/// Names and processors of the threads that serve rings, one line each.
fn workers(daemon: &Daemon) -> Vec<(String, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let mut workers: Vec<_> = tasks
        .map(|task| {
            let task = task.unwrap().path();
            let name = std::fs::read_to_string(task.join("comm")).unwrap().trim().to_owned();
            let status = std::fs::read_to_string(task.join("status")).unwrap();
            let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
            (name, cpus.trim().to_owned())
        })
        .filter(|(name, _)| name.starts_with("vq-"))
        .collect();
    workers.sort();
    workers
}

fn add(daemon: &Daemon, number: usize, attrs: &[(&str, &str)]) -> (Disk, PathBuf) {
    let disk = daemon.disk(&format!("disk{number}"), DISK);
    let attrs = [attrs, &[("memlock", "unlimited")]].concat();
    let path = daemon.add_blk(&format!("d{number}"), &disk, &attrs);
    (disk, path)
}

#[test]
fn one_thread_serves_many_devices_and_keeps_them_apart() {
    let daemon = one_worker();
    let devices: Vec<_> = (0..8).map(|number| add(&daemon, number, &[])).collect();
    daemon.add("net", "sim-net", &[]);
    let mut clients: Vec<Blk> = devices.iter().map(|(_, path)| Blk::start(path)).collect();
    assert_eq!(workers(&daemon).len(), 1, "{:?}", workers(&daemon));
    for round in 0..20_u64 {
        for (number, client) in (0..).zip(&mut clients) {
            client.put(DATA, &pattern((number << 40) + (round << 32), 4096));
            for _ in 0..4 {
                client.submit(0, kind::OUT, 8 * round, &[data(0, 4096)], &[]);
            }
            client.notify(0);
        }
        for client in &mut clients {
            for _ in 0..4 {
                assert_eq!(client.finish(0, TIMEOUT).map(|done| done.status), Some(OK));
            }
        }
    }
    for (number, (disk, _)) in (0..).zip(&devices) {
        for round in 0..20_u64 {
            assert_eq!(disk.read(4096 * round, 4096), pattern((number << 40) + (round << 32), 4096));
        }
        assert_eq!(daemon.info(&format!("d{number}")).state.queues[0].requests, 80);
    }
    // Device ids are reused, and a client of a former device has no effect.
    drop(clients.remove(3));
    daemon.wait_for("d3", "the close", |info| !info.state.open);
    daemon.delete("d3").unwrap();
    let mut again = Blk::start(&add(&daemon, 9, &[]).1);
    assert_eq!(again.read(0, 8, 512), Ok(pattern(4096, 512)));
    assert_eq!(clients[0].read(0, 1000, 512), Ok(pattern(512_000, 512)));
}

#[test]
fn devices_go_where_there_are_fewest_and_to_the_processors_they_ask_for() {
    let daemon = Daemon::start_with(&["--workers", "2"]);
    assert!(workers(&daemon).is_empty(), "none is needed");
    let _all: Vec<_> = (0..4).map(|number| add(&daemon, number, &[])).collect();
    assert_eq!(workers(&daemon).iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["vq-0", "vq-1"]);
    let first = &std::fs::read_to_string("/proc/self/status").unwrap();
    let allowed = first.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    let cpu = allowed.split([',', '-']).next().unwrap();
    let pinned: Vec<_> = (10..12).map(|number| add(&daemon, number, &[("cpus", cpu)])).collect();
    let name = format!("vq-cpu{cpu}");
    assert_eq!(workers(&daemon)[2..], [(name.clone(), cpu.to_owned())], "one for both");
    let mut client = Blk::start(&pinned[1].1);
    assert_eq!(client.read(0, 8, 512), Ok(pattern(4096, 512)));
    drop(client);
    for device in ["d10", "d11"] {
        daemon.wait_for(device, "the close", |info| !info.state.open);
        assert!(workers(&daemon).iter().any(|(found, _)| *found == name));
        daemon.delete(device).unwrap();
    }
    assert_eq!(workers(&daemon).len(), 2, "nobody needs it any more");
    let own = add(&daemon, 20, &[("worker", "own"), ("cpus", cpu)]);
    assert_eq!(workers(&daemon)[2..], [("vq-d20".into(), cpu.to_owned())]);
    assert_eq!(Blk::start(&own.1).read(0, 8, 512), Ok(pattern(4096, 512)));
    let error = daemon.try_add("bad", "sim-blk", &[("worker", "mine")]).unwrap_err().to_string();
    assert!(error.contains("worker is \"mine\""), "{error}");
    for (cpus, words) in [("x", "cpus is \"x\""), ("1023", "cannot start the worker"), ("3-1", "cpus is")] {
        let error = daemon.try_add("bad", "sim-blk", &[("cpus", cpus)]).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// Waits until this number of requests waits at the disk.
fn wait_for(file: &HangingFile, requests: usize) {
    let deadline = Instant::now() + TIMEOUT;
    while file.waiting() < requests {
        assert!(Instant::now() < deadline, "only {} requests have reached the disk", file.waiting());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Requests to a disk that hangs, each in a kernel thread of its own.
const STUCK: u64 = 80;

#[test]
fn a_disk_that_hangs_is_no_concern_of_its_neighbours() {
    let daemon = one_worker();
    let file = HangingFile::new(&daemon.dir().join("hanging"), DISK as u64);
    let hanging = daemon.add("hanging", "blk", &[("path", file.path.to_str().unwrap()), ("format", "raw")]);
    let mut stuck = Blk::with(&hanging, FEATURES, 4);
    let submit = |stuck: &mut Blk, i| {
        let queue = u16::try_from(i % 4).unwrap();
        stuck.submit(queue, kind::IN, 8 * i, &[], &[data(4096 * i, 4096)])
    };
    let tokens: Vec<u64> = (0..STUCK).map(|i| submit(&mut stuck, i)).collect();
    (0..4).for_each(|queue| stuck.notify(queue));
    wait_for(&file, tokens.len());

    let (disk, path) = add(&daemon, 1, &[]);
    assert_eq!(workers(&daemon).len(), 1);
    let begin = Instant::now();
    // Every kind of request and of command, including those that wait for requests.
    let mut neighbour = Blk::start(&path);
    for round in 0..50 {
        assert_eq!(neighbour.write(0, 8 * round, &pattern(1 << 40, 4096)), OK);
        assert_eq!(neighbour.io(0, kind::FLUSH, 0, &[], &[]).status, OK, "a flush takes a kernel thread");
        assert_eq!(neighbour.read(0, 8 * round, 4096), Ok(pattern(1 << 40, 4096)));
    }
    assert_eq!(disk.read(0, 4096), pattern(1 << 40, 4096));
    let ops = neighbour.session.ops();
    let memory = MEMORY;
    let uaddr = neighbour.memory().addr() as u64;
    ops.dma_map(Asid(0), 0x2_0000_0000, memory, uaddr, Perm::RW).unwrap();
    ops.dma_unmap(Asid(0), 0x2_0000_0000, memory).unwrap();
    ops.suspend().unwrap();
    ops.vring_base(QueueIndex(0)).unwrap();
    ops.resume().unwrap();
    ops.set_status(Status::RESET).unwrap();
    drop(neighbour);
    daemon.wait_for("d1", "the close", |info| !info.state.open);
    daemon.delete("d1").unwrap();
    assert!(begin.elapsed() < TIMEOUT, "{:?}", begin.elapsed());
    assert_eq!(file.waiting(), tokens.len(), "nothing of this has waited for the disk that hangs");

    file.recover();
    let mut done: Vec<u64> =
        (0..STUCK).map(|i| stuck.finish((i % 4) as u16, TIMEOUT).unwrap().token).collect();
    done.sort_unstable();
    assert_eq!(done, tokens);
}

/// The kernel has four threads per CPU for operations on files that may block, unless it is told to create more.
#[test]
fn flushes_of_disks_that_hang_leave_a_thread_to_their_neighbour() {
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap().matches("processor\t:").count();
    let daemon = one_worker();
    let mut stuck: Vec<(HangingFile, Blk)> = (0..4 * processors.max(1))
        .map(|number| {
            let file = HangingFile::new(&daemon.dir().join(format!("hanging{number}")), DISK as u64);
            let attrs = [("path", file.path.to_str().unwrap()), ("format", "raw"), ("memlock", "unlimited")];
            let mut blk = Blk::start(&daemon.add(&format!("hanging{number}"), "blk", &attrs));
            blk.submit(0, kind::FLUSH, 0, &[], &[]);
            blk.notify(0);
            (file, blk)
        })
        .collect();
    stuck.iter().for_each(|(file, _)| wait_for(file, 1));

    let (_disk, path) = add(&daemon, 1, &[]);
    assert_eq!(workers(&daemon).len(), 1);
    assert_eq!(Blk::start(&path).io(0, kind::FLUSH, 0, &[], &[]).status, OK);
    for (file, blk) in &mut stuck {
        assert_eq!(file.waiting(), 1);
        file.recover();
        assert_eq!(blk.finish(0, TIMEOUT).map(|done| done.status), Some(OK));
    }
}

/// A write that was answered after a flush of the disk began need not be covered by it: one more flush is needed, and is enough
/// for all.
#[test]
fn flushes_that_arrive_during_a_flush_share_the_next_one() {
    let daemon = one_worker();
    let file = HangingFile::new(&daemon.dir().join("hanging"), DISK as u64);
    let mut blk = Blk::start(&daemon.add(
        "hanging",
        "blk",
        &[("path", file.path.to_str().unwrap()), ("format", "raw")],
    ));
    let tokens: Vec<u64> = (0..9).map(|_| blk.submit(0, kind::FLUSH, 0, &[], &[])).collect();
    blk.notify(0);
    wait_for(&file, 1);
    assert_eq!(blk.finish(0, Duration::ZERO), None, "nothing is stable yet");
    file.recover();
    let done: Vec<_> = tokens.iter().map(|_| blk.finish(0, TIMEOUT).unwrap()).collect();
    assert!(done.iter().all(|done| done.status == OK), "{done:?}");
    assert_eq!(done.iter().map(|done| done.token).collect::<Vec<_>>(), tokens);
    assert_eq!(file.flushes(), 2);
}

/// Its name is free at once; its file is free, and its other requests end, when the disk has answered.
#[test]
fn a_device_whose_disk_hangs_is_deleted_by_force() {
    let daemon = one_worker();
    let file = HangingFile::new(&daemon.dir().join("hanging"), DISK as u64);
    let attrs = [("path", file.path.to_str().unwrap()), ("format", "raw")];
    let mut stuck = Blk::start(&daemon.add("d0", "blk", &attrs));
    stuck.submit(0, kind::IN, 0, &[], &[data(0, 4096)]);
    stuck.notify(0);
    wait_for(&file, 1);
    let said = daemon.delete("d0").unwrap_err().to_string();
    assert!(said.contains("device d0 is deleted, but its disk has not answered yet"), "{said}");
    assert!(stuck.session.ops().status().unwrap().contains(Status::NEEDS_RESET));
    let (_disk, path) = add(&daemon, 0, &[]);
    assert_eq!(Blk::start(&path).read(0, 8, 512), Ok(pattern(4096, 512)), "another device of that name");
    let locked = daemon.try_add("d1", "blk", &attrs).unwrap_err().to_string();
    assert!(locked.contains("is in use by another device of this daemon"), "{locked}");

    file.recover();
    assert_eq!(stuck.finish(0, TIMEOUT).map(|done| done.status), Some(OK));
    assert_eq!(stuck.write(0, 0, &[1; 512]), IOERR);
    daemon.try_add("d1", "blk", &attrs).unwrap();
}

fn is_set(event: &EventFd) -> bool {
    let time = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&time)).unwrap() == 1
}

/// The owner of an eventfd can make writes to it block, at any time.
#[test]
fn a_driver_that_fills_the_counter_of_its_call_is_no_concern_of_its_neighbours() {
    let daemon = one_worker();
    let (_disk, path) = add(&daemon, 0, &[]);
    let (_other, neighbour) = add(&daemon, 1, &[]);
    let (mut hostile, mut neighbour) = (Blk::start(&path), Blk::start(&neighbour));
    let ring = hostile.by_hand(0);
    rustix::fs::fcntl_setfl(&ring.call, rustix::fs::OFlags::empty()).unwrap();
    let full = u64::MAX - 1;
    rustix::io::write(&ring.call, &full.to_ne_bytes()).unwrap();
    for done in 1..4 {
        hostile.submit(0, kind::IN, 8, &[], &[data(0, 512)]);
        hostile.notify(0);
        let deadline = Instant::now() + TIMEOUT;
        while ring.used() != done {
            assert!(Instant::now() < deadline, "{} requests are done", ring.used());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(neighbour.read(0, 8, 512), Ok(pattern(4096, 512)));
    }
    assert_eq!(ring.call.drain(), full);
}

/// Requests whose data must be copied need memory of the daemon while they wait for the disk.
#[test]
fn requests_that_need_copies_take_a_bounded_amount_of_memory() {
    const LARGE: usize = 32 << 20;
    const COUNT: usize = 12;
    let daemon = one_worker();
    let file = HangingFile::new(&daemon.dir().join("hanging"), LARGE as u64);
    let path = daemon.add("d0", "blk", &[("path", file.path.to_str().unwrap()), ("format", "raw")]);
    let mut blk = Blk::start(&path);
    let private = Private::new(LARGE);
    let ops = blk.session.ops();
    ops.dma_map(Asid(0), 0x2_0000_0000, LARGE as u64, private.addr(), Perm::RW).unwrap();
    let size = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
    };
    let before = size();
    let into = Buffer { iova: 0x2_0000_0000, len: u32::try_from(LARGE).unwrap() };
    for _ in 0..COUNT {
        blk.submit(0, kind::IN, 0, &[], &[into]);
    }
    blk.notify(0);
    // Until nothing has been added for a while.
    let (mut most, mut since) = (before, Instant::now());
    while most == before || since.elapsed() < Duration::from_millis(500) {
        let now = size();
        if now > most {
            (most, since) = (now, Instant::now());
        }
        assert!(since.elapsed() < TIMEOUT, "the requests have not begun");
        std::thread::sleep(Duration::from_millis(2));
    }
    // Three, and the overhead of the allocator.
    assert!(most - before < COUNT / 2 * LARGE, "{} bytes for requests that wait", most - before);
    file.recover();
    for _ in 0..COUNT {
        let done = blk.finish(0, TIMEOUT).unwrap();
        assert_eq!((done.status, done.len as usize), (OK, LARGE + 1));
    }
    assert!(private.get(0, LARGE).iter().all(|byte| *byte == 0));
}

/// With IN_ORDER and only then, a slow request delays the later answers, and one used
/// element is written for all of them.
#[test]
fn answers_come_in_order_where_the_driver_has_accepted_that() {
    let daemon = one_worker();
    for in_order in [false, true] {
        let file = HangingFile::new(&daemon.dir().join(format!("order-{in_order}")), DISK as u64);
        let attrs = [
            ("path", file.path.to_str().unwrap()),
            ("format", "raw"),
            ("in_order", if in_order { "on" } else { "off" }),
        ];
        let path = daemon.add(&format!("order-{in_order}"), "blk", &attrs);
        let mut blk = Blk::negotiated(&path, FEATURES.with(Features::IN_ORDER));
        assert_eq!(blk.session.features().has(Features::IN_ORDER), in_order);
        blk.map(memfd::create(c"blk", MEMORY, None).unwrap());
        let ring = blk.run_by_hand();
        // A read that hangs, and then the id of the disk, which takes no time. Descriptors in order, too.
        for (position, kind, len) in [(0, kind::IN, 4096), (1, kind::GET_ID, 20), (2, kind::GET_ID, 20)] {
            let head = 3 * position;
            let (header, status) = blk.frame(position.into(), kind, 0);
            ring.descriptor(head, header, NEXT, head + 1);
            ring.descriptor(head + 1, data(8192 * u64::from(position), len), NEXT | WRITE, head + 2);
            ring.descriptor(head + 2, status, WRITE, 0);
            ring.entry(position, head);
        }
        ring.available(3);
        let deadline = Instant::now() + TIMEOUT;
        while file.waiting() == 0 || blk.status(2) != OK {
            assert!(Instant::now() < deadline, "the requests have not begun");
            std::thread::sleep(Duration::from_millis(1));
        }
        if in_order {
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(ring.used(), 0, "the first is not answered");
            file.recover();
            assert!(ring.wait_used(3), "not answered");
            assert_eq!(ring.used_element(0), (6, 21), "one for three");
        } else {
            assert!(ring.wait_used(2), "what is answered waits for nobody");
            assert_eq!([ring.used_element(0), ring.used_element(1)], [(3, 21), (6, 21)]);
            file.recover();
            assert!(ring.wait_used(3), "not answered");
            assert_eq!(ring.used_element(2), (0, 4097));
        }
    }
}

/// Answers from before the ring broke are published, even those of the same pass.
#[test]
fn answers_before_a_broken_request_are_not_lost() {
    let daemon = one_worker();
    let (_disk, path) = add(&daemon, 0, &[]);
    let mut blk = Blk::start(&path);
    assert_eq!(blk.read(0, 8, 512), Ok(pattern(4096, 512)));
    let config = EventFd::new().unwrap();
    blk.session.ops().set_config_call(Some(&config)).unwrap();
    // Without a kick: both requests are in one pass, and the first, which has no data, is answered in it.
    blk.submit(0, kind::IN, 8, &[], &[]);
    let ring = blk.by_hand(0);
    ring.entry(2, 200);
    ring.available(3);
    assert!(config.wait(Some(TIMEOUT)), "no config interrupt");
    assert!(blk.session.ops().status().unwrap().contains(Status::NEEDS_RESET));
    assert_eq!(ring.used(), 2);
}

/// The driver has work while the second half is served.
#[test]
fn half_of_many_requests_is_shown_before_the_other_half_is_done() {
    let daemon = Daemon::start_with(&["--workers", "1", "--poll-us", "0"]);
    let (_disk, path) = add(&daemon, 0, &[]);
    let mut blk = Blk::start(&path);
    for (requests, publications, total) in [(32, 2, 32), (16, 1, 48)] {
        // Without data, so that each is answered as soon as it is taken.
        (0..requests).for_each(|_| _ = blk.submit(0, kind::IN, 8, &[], &[]));
        blk.notify(0);
        let ring = blk.by_hand(0);
        let deadline = Instant::now() + TIMEOUT;
        while ring.used() != total {
            assert!(Instant::now() < deadline, "{} requests are done", ring.used());
            std::thread::sleep(Duration::from_millis(1));
        }
        // Without event indices each publication is a signal; all have been given when the queue has stopped.
        blk.session.ops().suspend().unwrap();
        assert_eq!(ring.call.drain(), publications, "{requests} requests");
        for _ in 0..requests {
            assert_eq!(blk.finish(0, TIMEOUT).map(|done| done.status), Some(OK));
        }
        blk.session.ops().resume().unwrap();
    }
}

/// A ring that breaks while a request is taken from it: requests taken before are answered.
#[test]
fn what_was_taken_is_answered_whenever_the_ring_breaks() {
    let daemon = one_worker();
    let (_disk, path) = add(&daemon, 0, &[]);
    let mut blk = Blk::start(&path);
    let (config, features) = (EventFd::new().unwrap(), blk.session.features());
    blk.session.ops().set_config_call(Some(&config)).unwrap();
    let mut taken = 0;
    for round in 0..400_u32 {
        let ring = blk.by_hand(0);
        let (header, status) = blk.frame(u64::from(round), kind::IN, 8);
        ring.descriptor(0, header, NEXT, 1);
        ring.descriptor(1, status, WRITE, 0);
        ring.entry(0, 0);
        ring.available(1);
        (0..round * 7 % 6000).for_each(|_| std::hint::spin_loop());
        ring.available(1000);
        assert!(config.wait(Some(TIMEOUT)), "no config interrupt");
        let _ = config.drain();
        blk.session.ops().suspend().unwrap();
        let base = blk.session.ops().vring_base(QueueIndex(0)).unwrap();
        assert_eq!(u32::from(ring.used()), base, "round {round}");
        taken += base;
        blk.session.reset().unwrap();
        blk.session.renegotiate(features).unwrap();
        blk.run(1);
        blk.session.ops().set_config_call(Some(&config)).unwrap();
    }
    println!("{taken} requests were taken");
}

/// The driver is told to reset the device, and can continue after that.
fn a_broken_ring_needs_a_reset() {
    let daemon = one_worker();
    let (_disk, path) = add(&daemon, 0, &[("queues", "2")]);
    let mut neighbour = Blk::start(&add(&daemon, 1, &[]).1);
    let mut blk = Blk::with(&path, FEATURES, 2);
    let config = EventFd::new().unwrap();
    blk.session.ops().set_config_call(Some(&config)).unwrap();
    assert_eq!(blk.read(0, 8, 512), Ok(pattern(4096, 512)));
    let status = |blk: &Blk| blk.session.ops().status().unwrap();
    assert!(!status(&blk).contains(Status::NEEDS_RESET) && !is_set(&config));
    // A chain that has no end, whatever the format.
    let packed = blk.session.features().has(Features::RING_PACKED);
    let ring = blk.by_hand(0);
    for index in 0..64_u16 {
        let (flags, next) = if packed { (0, NEXT | 1 << 7) } else { (NEXT, (index + 1) % 64) };
        // The next available descriptor is written last; the ring is three descriptors into its first lap.
        let index = (66 - index) % 64;
        let next = if packed { next } else { (index + 1) % 64 };
        ring.descriptor(index, data(0, 16), flags, next);
    }
    if packed {
        blk.session.queue(QueueIndex(0)).unwrap().kick().signal();
    } else {
        ring.entry(1, 0);
        ring.available(2);
    }
    assert!(config.wait(Some(TIMEOUT)), "no config interrupt");
    assert!(status(&blk).contains(Status::NEEDS_RESET));
    assert_eq!(blk.read(1, 8, 512), Ok(pattern(4096, 512)), "its other queue is sound");
    assert_eq!(neighbour.read(0, 8, 512), Ok(pattern(4096, 512)));
    assert!(!neighbour.session.ops().status().unwrap().contains(Status::NEEDS_RESET));

    let _ = config.drain();
    let features = blk.session.features();
    blk.session.reset().unwrap();
    assert_eq!(status(&blk), Status::RESET);
    blk.session.renegotiate(features).unwrap();
    blk.run(2);
    assert_eq!(blk.read(0, 8, 512), Ok(pattern(4096, 512)), "as new");
    assert!(!status(&blk).contains(Status::NEEDS_RESET) && !is_set(&config));
    drop(blk);
    daemon.assert_alive();
}

#[test]
fn a_broken_split_ring_needs_a_reset() {
    a_broken_ring_needs_a_reset();
}

#[test]
fn a_broken_packed_ring_needs_a_reset() {
    over_packed_rings(a_broken_ring_needs_a_reset);
}

/// A device with more work than it can do is served in turn with the others.
#[test]
fn a_busy_device_leaves_turns_to_its_neighbours() {
    let daemon = one_worker();
    daemon.add("busy", "sim-blk", &[]);
    let mut busy = Blk::start(&daemon.info("busy").path);
    let (_disk, path) = add(&daemon, 0, &[]);
    let mut neighbour = Blk::start(&path);
    // Requests of 2 MiB that the thread copies itself; 16 at a time.
    let large = Buffer { iova: data(0, 0).iova, len: 2 << 20 };
    let (mut longest, mut answered) = (Duration::ZERO, 0);
    for _ in 0..16 {
        busy.submit(0, kind::IN, 0, &[], &[large]);
    }
    busy.notify(0);
    for _ in 0..100 {
        while let Some(done) = busy.finish(0, Duration::ZERO) {
            assert_eq!(done.status, OK);
            answered += 1;
            busy.submit(0, kind::IN, 0, &[], &[large]);
            busy.notify(0);
        }
        let begin = Instant::now();
        assert_eq!(neighbour.read(0, 8, 512), Ok(pattern(4096, 512)));
        longest = longest.max(begin.elapsed());
    }
    println!("{answered} large requests beside; the longest small one took {longest:?}");
    assert!(answered > 0, "the neighbour was not busy");
}

#[test]
fn what_is_taken_away_is_that_device_alone() {
    let daemon = one_worker();
    let (_first, path) = add(&daemon, 0, &[]);
    let (_second, other) = add(&daemon, 1, &[]);
    let (mut blk, mut neighbour) = (Blk::start(&path), Blk::start(&other));
    daemon.delete("d0").unwrap();
    assert_eq!(blk.read(0, 8, 512), Err(IOERR));
    assert_eq!(neighbour.read(0, 8, 512), Ok(pattern(4096, 512)));
    let ops = blk.session.ops();
    assert_eq!(ops.vring_base(QueueIndex(0)), Ok(1));
    assert_eq!(ops.set_vring_base(QueueIndex(0), 0), Err(Errno::INVAL), "it runs");
}
