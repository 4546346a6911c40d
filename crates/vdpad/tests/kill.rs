//! Clients that are killed: at any time, and between the steps of an update.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};
use vdpa_client::device::DeviceFile;
use vdpa_client::update::Strategy;
use vdpa_core::Errno;
use vdpa_core::blk::kind;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{Asid, Perm, VringAddr};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::exec::{Program, execve};
use vdpa_sys::inherit;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use robust::disk::{self, Disk, IOVA, Q0, SLOTS};
use robust::{Resources, RoleProcess, Vdpad, eventually, has_role, send_line, variable};

/// Guest memory of a client that is killed; all of it is pinned if the device pins.
const MEMORY: u64 = 16 << 20;
/// How long a device may be busy after its client was killed.
const BUSY_MAX: Duration = Duration::from_secs(1);

/// A client that does I/O until it is killed. It reports how long the device was busy when it started.
#[test]
fn load() {
    if !has_role("load") {
        return;
    }
    let (mut disk, busy) = Disk::start_timed(Path::new(&variable("DEVICE")), disk::pinnable(MEMORY));
    let mut seed = variable("SEED").parse::<u64>().unwrap();
    disk.check(seed);
    send_line(&format!("ready {}", busy.as_nanos()));
    let mut free: Vec<u64> = (0..SLOTS).collect();
    loop {
        for slot in free.drain(..) {
            seed += 1;
            disk.submit(slot, (kind::OUT, 2 + slot, seed));
        }
        disk.kick();
        disk.wait();
        free = disk.reap();
    }
}

fn start_load(device: &Path, seed: u64, packed: bool) -> RoleProcess {
    let seed = seed.to_string();
    let mut variables = vec![("DEVICE", device.to_str().unwrap()), ("SEED", &seed)];
    if packed {
        variables.push((disk::PACKED, "1"));
    }
    RoleProcess::start("load", &variables)
}

/// Well distributed numbers, the same in each run.
fn random(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below
}

/// Kills `rounds` clients: every other one at any time after its start, the rest while they do I/O. Returns the
/// longest time that a client found the device busy. With `both`, two of four clients have packed rings.
fn kill_clients(device: &Path, rounds: u64, chance: &mut u64, both: bool) -> Duration {
    let mut longest = Duration::ZERO;
    for round in 0..rounds {
        let mut client = start_load(device, round << 32, both && round & 2 != 0);
        if round.is_multiple_of(2) {
            thread::sleep(Duration::from_micros(random(chance, 25_000)));
        } else {
            longest = longest.max(Duration::from_nanos(client.receive("ready").parse().unwrap()));
            thread::sleep(Duration::from_micros(random(chance, 3_000)));
        }
        client.kill();
    }
    longest
}

/// The resources of vdpad when nobody uses `device`. Waits until there are as many descriptors and threads as in `before`.
fn at_rest(vdpad: &Vdpad, device: &str, before: Option<&Resources>) -> Resources {
    const QUIET: Duration = Duration::from_millis(20);
    vdpad.is_released(device);
    let deadline = Instant::now() + robust::SOON;
    let mut last = vdpad.resources();
    // Connections of the control socket are closed, and a device's thread ends, some time after their clients
    // have gone.
    loop {
        let same = |a: &Resources, b: &Resources| a.fds == b.fds && a.threads == b.threads;
        if before.is_some_and(|before| same(before, &last)) {
            return last;
        }
        thread::sleep(QUIET);
        let now = vdpad.resources();
        if before.is_none() && same(&now, &last) || Instant::now() > deadline {
            return now;
        }
        last = now;
    }
}

/// Kills clients of a device and asserts that the next one always gets it, and that vdpad keeps nothing of them.
fn killed_at_any_moment(mgmtdev: &str, rounds: u64) {
    let vdpad = Vdpad::start(Duration::from_secs(240));
    let device = vdpad.add_any("disk0", mgmtdev);
    let (mut chance, both) = (42, mgmtdev == "blk");
    // Set up once and kept: thread stacks, arenas of the allocator, the table of registered buffers.
    kill_clients(&device, 20, &mut chance, both);
    let before = at_rest(&vdpad, "disk0", None);

    let longest = kill_clients(&device, rounds, &mut chance, both);
    println!("{rounds} clients of {mgmtdev} killed; busy for {longest:?} at most");
    assert!(longest < BUSY_MAX, "{longest:?}");
    at_rest(&vdpad, "disk0", Some(&before)).are_back_to(&before);

    // Proves that the check above can fail: it sees a running client.
    let mut client = start_load(&device, 1, both);
    client.receive("ready");
    let during = vdpad.resources();
    if mgmtdev == "blk" {
        let memory = disk::pinnable(MEMORY);
        assert_eq!(vdpad.info("disk0").state.pinned_pages * 4096, memory);
        assert_eq!((during.registered, during.pinned_kib), (memory, memory >> 10), "{during:?}");
    }
    assert_eq!(during.memfds, 1, "{during:?}");
    assert!(during.fds != before.fds);
    client.kill();
    at_rest(&vdpad, "disk0", Some(&before)).are_back_to(&before);
}

/// Names of the steps, in order, after which [`step`] kills its process. A strategy has those that apply to it.
const SUSPENDED: &str = "suspended";
const RESET: &str = "reset";
const CLOSED: &str = "closed";
const EXECED: &str = "execed";
const OWNED: &str = "owned";
const VRINGS: &str = "vrings";
const REMAPPED: &str = "remapped";
/// After the last step: the process does not kill itself.
const RUNNING: &str = "running";

fn points(strategy: Strategy, mgmtdev: &str) -> Vec<&'static str> {
    let remap = mgmtdev == "sim-blk";
    let all: &[&str] = match strategy {
        Strategy::Live => &[EXECED, OWNED],
        Strategy::Resume => &[SUSPENDED, EXECED, OWNED, REMAPPED],
        Strategy::Reset => &[SUSPENDED, RESET, EXECED, OWNED, VRINGS, REMAPPED],
        Strategy::Reopen => &[SUSPENDED, CLOSED, EXECED, OWNED, REMAPPED, VRINGS],
    };
    let remapped = remap || strategy == Strategy::Reopen;
    all.iter().copied().filter(|&point| remapped || point != REMAPPED).chain([RUNNING]).collect()
}

/// Kills this process if it is to be killed after this step.
fn point(name: &str) {
    if variable("VDPA_TEST_KILL_AT") == name {
        kill_process(getpid(), Signal::KILL).unwrap();
    }
}

/// A client that is updated by the documented sequence, step by step, and killed after one of the steps.
#[test]
fn step() {
    if !has_role("step") {
        return;
    }
    let strategy: Strategy = variable("STRATEGY").parse().unwrap();
    match std::env::var("INHERITED") {
        Err(_) => old_image(strategy),
        Ok(inherited) => new_image(strategy, &inherited),
    }
}

/// Up to the exec, with requests in flight.
fn old_image(strategy: Strategy) {
    let device = variable("DEVICE");
    let mut disk = Disk::start(Path::new(&device), disk::pinnable(MEMORY));
    disk.check(7);
    (0..SLOTS).for_each(|slot| disk.submit(slot, (kind::OUT, 2 + slot, 7)));
    disk.kick();
    let ops = disk.session.ops();
    let mut base = 0;
    if strategy != Strategy::Live {
        ops.suspend().unwrap();
        point(SUSPENDED);
    }
    if matches!(strategy, Strategy::Reset | Strategy::Reopen) {
        base = ops.vring_base(Q0).unwrap();
    }
    if strategy == Strategy::Reset {
        ops.set_status(Status::RESET).unwrap();
        point(RESET);
    }
    let queue = disk.session.queue(Q0).unwrap();
    let ram = disk.session.region("ram").unwrap().object().unwrap();
    // Duplicated descriptors are not closed on exec.
    let fds: [BorrowedFd<'_>; 4] = [ops.as_fd(), ram, queue.kick().as_fd(), queue.call().as_fd()];
    let mut kept = fds.map(|fd| rustix::io::dup(fd).ok());
    if strategy == Strategy::Reopen {
        kept[0] = None;
        drop(disk);
        point(CLOSED);
    }
    let numbers = kept.each_ref().map(|fd| fd.as_ref().map_or(-1, AsRawFd::as_raw_fd));
    let [device, ram, kick, call] = numbers;
    let inherited = format!("INHERITED={device} {ram} {kick} {call} {base}");
    let text = |text: &str| CString::new(text).unwrap();
    let args: Vec<_> = std::env::args().map(|arg| text(&arg)).collect();
    let mut env: Vec<_> = std::env::vars().map(|(name, value)| text(&format!("{name}={value}"))).collect();
    env.push(text(&inherited));
    panic!("{:?}", execve(Program::Path(c"/proc/self/exe"), &args, &env));
}

/// From the exec on.
fn new_image(strategy: Strategy, inherited: &str) {
    point(EXECED);
    let mut numbers = inherited.split(' ').map(|number| number.parse::<i32>().unwrap());
    let mut next = || numbers.next().unwrap();
    let (device, ram, kick, call) = (next(), next(), next(), next());
    let base = next().cast_unsigned();
    let memory = usize::try_from(disk::pinnable(MEMORY)).unwrap();
    let map = SharedMap::map(inherit::take(ram).unwrap(), 0, memory, Prot::RW, false).unwrap();
    let [kick, call] = [kick, call].map(|fd| EventFd::from_fd(inherit::take(fd).unwrap()).unwrap());
    let _open = if strategy == Strategy::Reopen {
        let ops = reopened(&map);
        set_vring(&ops, base, &kick, &call);
        point(VRINGS);
        run(&ops);
        ops
    } else {
        let ops = VhostVdpaFd::from_fd(inherit::take(device).unwrap());
        // The owner is the previous image.
        assert_eq!(ops.vring_group(Q0), Err(Errno::PERM));
        ops.new_owner().unwrap();
        ops.vring_group(Q0).unwrap();
        point(OWNED);
        ops.set_backend_features(acknowledged(&ops)).unwrap();
        if strategy == Strategy::Reset {
            negotiate(&ops);
            set_vring(&ops, base, &kick, &call);
            point(VRINGS);
        }
        if acknowledged(&ops).has(BackendFeatures::IOTLB_REMAP) {
            ops.dma_remap(Asid(0), IOVA, map.len() as u64, map.addr() as u64).unwrap();
            point(REMAPPED);
        }
        match strategy {
            Strategy::Resume => ops.resume().unwrap(),
            Strategy::Reset => run(&ops),
            Strategy::Live | Strategy::Reopen => {}
        }
        ops
    };
    kick.signal();
    send_line("running");
    // Until the test kills this process, or ends.
    robust::receive_line();
}

fn acknowledged(ops: &VhostVdpaFd) -> BackendFeatures {
    ops.backend_features().unwrap() & vdpa_client::device::BACKEND_FEATURES
}

fn negotiate(ops: &VhostVdpaFd) {
    let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    ops.set_status(Status::RESET).unwrap();
    ops.set_status(Status::ACKNOWLEDGE | Status::DRIVER).unwrap();
    ops.set_features(features).unwrap();
    ops.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK).unwrap();
}

fn reopened(map: &SharedMap) -> VhostVdpaFd {
    let (device, begin) = (variable("DEVICE"), Instant::now());
    let ops = loop {
        match <VhostVdpaFd as DeviceFile>::open(Path::new(&device)) {
            Err(Errno::BUSY) if begin.elapsed() < BUSY_MAX => thread::sleep(Duration::from_micros(100)),
            result => break result.unwrap(),
        }
    };
    ops.set_owner().unwrap();
    point(OWNED);
    ops.set_backend_features(acknowledged(&ops)).unwrap();
    negotiate(&ops);
    ops.dma_map(Asid(0), IOVA, map.len() as u64, map.addr() as u64, Perm::RW).unwrap();
    point(REMAPPED);
    ops
}

fn set_vring(ops: &VhostVdpaFd, base: u32, kick: &EventFd, call: &EventFd) {
    let layout = vdpa_client::queue::RingLayout::at(0, disk::RING);
    let addr = VringAddr {
        desc: IOVA + layout.desc,
        avail: IOVA + layout.avail,
        used: IOVA + layout.used,
        ..VringAddr::default()
    };
    ops.set_vring_num(Q0, disk::RING.into()).unwrap();
    ops.set_vring_base(Q0, base).unwrap();
    ops.set_vring_addr(Q0, &addr).unwrap();
    ops.set_vring_kick(Q0, Some(kick)).unwrap();
    ops.set_vring_call(Q0, Some(call)).unwrap();
    ops.set_vring_enable(Q0, true).unwrap();
}

fn run(ops: &VhostVdpaFd) {
    let running = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
    ops.set_status(running).unwrap();
}

/// Kills updates of one device at every point of every strategy.
fn killed_in_an_update(mgmtdev: &str, strategies: &[Strategy]) {
    let vdpad = Vdpad::start(Duration::from_secs(120));
    let device = vdpad.add_any("disk0", mgmtdev);
    let mut before: Option<Resources> = None;
    for &strategy in strategies {
        for kill_at in points(strategy, mgmtdev) {
            println!("{mgmtdev}, {strategy}, killed at {kill_at}");
            let served = || vdpad.info("disk0").state.queues[0].requests;
            let served_before = served();
            let variables = [
                ("DEVICE", device.to_str().unwrap()),
                ("STRATEGY", strategy.name()),
                ("VDPA_TEST_KILL_AT", kill_at),
            ];
            let mut client = RoleProcess::start("step", &variables);
            if kill_at == RUNNING {
                client.receive("running");
                let state = vdpad.info("disk0").state;
                assert!(state.open && !state.suspended, "{state:?}");
                assert_eq!(state.owner.unwrap().pid, client.pid().as_raw_nonzero().get().unsigned_abs());
                assert!(state.queues[0].running && state.mappings == 1, "{:?}", state.queues);
                // Every request in flight is answered once before the process is killed.
                eventually("all requests are served", || {
                    (served() == served_before + 2 + SLOTS).then_some(())
                });
                client.kill();
            } else {
                use std::os::unix::process::ExitStatusExt;
                assert_eq!(client.end().signal(), Some(Signal::KILL.as_raw()), "{strategy}, {kill_at}");
            }
            usable_at_once(&device);
            let now = at_rest(&vdpad, "disk0", before.as_ref());
            match &before {
                Some(before) => now.are_back_to(before),
                None => before = Some(now),
            }
        }
    }
}

/// The next client opens the device and reads what it wrote.
fn usable_at_once(device: &Path) {
    let (mut next, busy) = Disk::start_timed(device, disk::MEMORY_MIN);
    assert!(busy < BUSY_MAX, "busy for {busy:?}");
    next.check(11);
}

mod heavy {
    use super::*;

    #[test]
    fn clients_of_blk_are_killed_at_any_moment() {
        killed_at_any_moment("blk", 800);
    }

    #[test]
    fn clients_of_sim_blk_are_killed_at_any_moment() {
        killed_at_any_moment("sim-blk", 200);
    }

    #[test]
    fn clients_of_blk_are_killed_in_an_update() {
        killed_in_an_update("blk", &Strategy::ALL);
    }

    #[test]
    fn clients_of_sim_blk_are_killed_in_an_update() {
        // The strategy live does not apply to a device that uses addresses of its owner.
        killed_in_an_update("sim-blk", &[Strategy::Resume, Strategy::Reset, Strategy::Reopen]);
    }
}
