//! The cost of idle devices: no wake-up of any thread of the daemon, and little memory.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "support/net.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod net;
mod support;
#[path = "support/tap.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod tap;

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::types::Asid;

use support::blk::{Blk, FEATURES, OK};
use support::daemon::Daemon;

/// Devices.
const DEVICES: usize = 1000;
/// How long they are observed.
const WATCHED: Duration = Duration::from_secs(5);
/// Resident memory for each device, in KiB.
const RESIDENT_KIB: u64 = 200;

/// For each thread: its name, its number of context switches, and its run time in ns.
fn threads(pid: u32) -> BTreeMap<u32, (String, u64, u64)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let read = |task: &std::path::Path, file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
    tasks
        .map(|task| {
            let task = task.unwrap();
            let id = task.file_name().to_str().unwrap().parse().unwrap();
            let task = task.path();
            let switches: u64 = read(&task, "status")
                .lines()
                .filter_map(|line| line.split_once("_ctxt_switches:"))
                .map(|(_, count)| count.trim().parse::<u64>().unwrap())
                .sum();
            let ran = read(&task, "schedstat").split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0);
            (id, (read(&task, "comm").trim().to_owned(), switches, ran))
        })
        .collect()
}

/// `VmRSS`, in KiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Raises the limit on descriptors of this process, and of the daemon that it starts. Returns how many devices clients can
/// have open with that, each with rings that run, when each needs so many.
fn running(each: u64) -> usize {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let devices = limit.maximum.map_or(DEVICES, |limit| usize::try_from(limit / each).unwrap());
    devices.min(DEVICES)
}

mod heavy {
    #[test]
    fn a_thousand_idle_devices_cost_no_wake_up_and_little_memory() {
        super::idle_devices(&[]);
    }

    #[test]
    fn nor_do_a_thousand_cards() {
        super::idle_cards();
    }

    /// Neither in the daemon nor in what waits to free its memory.
    #[test]
    fn nor_below_a_holder() {
        super::idle_devices(&["--holder", "--front", "fuse"]);
    }
}

/// The processes of a service, which its main process does not end when it is killed.
struct Service(Vec<u32>);

impl Service {
    /// All that have the command line of the daemon.
    fn of(daemon: &Daemon) -> Self {
        // The holder adds a word for the daemon below it.
        let command = |pid: u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words = line.split(|byte| *byte == 0).filter(|word| *word != b"--options-read");
            words.map(<[u8]>::to_vec).collect::<Vec<_>>()
        };
        let wanted = command(daemon.pid());
        let all =
            fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        Self(all.filter(|&pid| command(pid) == wanted).collect())
    }

    /// As [`threads`], of all.
    fn threads(&self) -> BTreeMap<u32, (String, u64, u64)> {
        self.0.iter().flat_map(|&pid| threads(pid)).collect()
    }

    /// Of all.
    fn resident(&self) -> u64 {
        // What waits to free the memory of a daemon shares it.
        let mut sizes: Vec<u64> = self.0.iter().map(|&pid| resident(pid)).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes.into_iter().sum()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        for &pid in &self.0 {
            let pid = Pid::from_raw(pid.cast_signed()).unwrap();
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn idle_devices(options: &[&str]) {
    let count = running(12);
    let daemon = Daemon::start_for(Duration::from_secs(200), options);
    let service = Service::of(&daemon);
    let (processes, below_holder) = (service.0.len(), options.contains(&"--holder"));
    assert_eq!(processes, if below_holder { 3 } else { 1 }, "{:?}", service.0);
    let disk = |number: usize| daemon.dir().join(format!("disk{number}"));
    // The first devices start the threads of the pool and of the control socket, which all devices share.
    let add = |number: usize| {
        fs::File::create(disk(number)).unwrap().set_len(1 << 20).unwrap();
        let path = disk(number);
        daemon.add(&format!("d{number}"), "blk", &[("path", path.to_str().unwrap()), ("pin", "off")])
    };
    let first = (0..8).map(add).collect::<Vec<_>>();
    let before = service.resident();
    let rest = (8..DEVICES).map(add).collect::<Vec<_>>();
    let made = service.resident();
    let mut clients: Vec<Blk> =
        first.iter().chain(&rest).take(count).map(|path| Blk::with(path, FEATURES, 1)).collect();
    // Each has made requests.
    for client in &mut clients {
        assert_eq!(client.io(0, vdpa_core::blk::kind::FLUSH, 0, &[], &[]).status, OK);
    }
    let running = service.resident();
    let each = |from: u64, to: u64, count: usize| to.saturating_sub(from) / count as u64;
    println!(
        "{before} KiB with 8 devices; {} KiB for each more, {} KiB for each of {count} that run besides",
        each(before, made, DEVICES - 8),
        each(made, running, count)
    );
    assert!(each(before, made, DEVICES - 8) < RESIDENT_KIB, "{before} KiB, then {made} KiB");
    assert!(each(made, running, count) < RESIDENT_KIB, "{made} KiB, then {running} KiB");

    assert!(stays_asleep(&service, &daemon, below_holder), "nothing serves these rings");
    drop(clients);
}

/// As disks, cards whose interfaces have nothing for them, which wait for packets, for buffers and for kicks.
fn idle_cards() {
    const FEATURES: Features = Features::of(&[
        Features::NET_MAC,
        Features::NET_CTRL_VQ,
        Features::VERSION_1,
        Features::ACCESS_PLATFORM,
    ]);
    if tap::namespace(false).is_none() {
        return;
    }
    let count = running(20);
    let daemon = Daemon::start_for(Duration::from_secs(200), &[]);
    let service = Service::of(&daemon);
    let add = |number: usize| {
        let tap = format!("idle{number}");
        daemon.add(&format!("n{number}"), "net", &[("tap", &tap), ("create", "on")])
    };
    let paths: Vec<_> = (0..DEVICES).map(add).collect();
    let start = |path: &std::path::PathBuf| net::Net::with(path, FEATURES, Asid(0), BackendFeatures(0x37e));
    let mut cards: Vec<net::Net> = paths.iter().take(count).map(start).collect();
    for (number, card) in cards.iter_mut().enumerate() {
        // Half of them wait for packets, the others for buffers.
        if number % 2 == 0 {
            card.offer(2048);
            card.queue(net::RX).kick.signal();
        }
        card.transmit(&[0; net::HEADER + 60]);
    }
    println!("{DEVICES} cards, {} of which have a driver", cards.len());
    assert!(stays_asleep(&service, &daemon, false), "nothing serves these rings");
    drop(cards);
}

/// Asserts that no thread of the service wakes up, but those that are known. Whether there are threads that serve rings.
fn stays_asleep(service: &Service, daemon: &Daemon, below_holder: bool) -> bool {
    // Idle threads of the control socket end after a while, and so do those of the kernel.
    std::thread::sleep(Duration::from_secs(12));
    let before = service.threads();
    std::thread::sleep(WATCHED);
    let after = service.threads();
    let mut woken = Vec::new();
    for (id, (name, switches, ran)) in &after {
        let (_, before_switches, before_ran) = before.get(id).cloned().unwrap_or_default();
        if *switches != before_switches || *ran != before_ran {
            woken.push(format!(
                "{name} {id}: {} times, {} us",
                switches - before_switches,
                (ran - before_ran) / 1000
            ));
        }
    }
    println!("{} processes, {} threads; woken in {WATCHED:?}: {woken:?}", service.0.len(), after.len());
    let holder = format!("vdpad {}:", daemon.pid());
    let is_known = |line: &str| {
        // The last thread that the kernel keeps for requests that may block, such as a flush, wakes up every five seconds to check
        // whether it is still needed. The holder looks for a daemon that hangs, four times in the time that it may hang.
        line.starts_with("iou-wrk-") || below_holder && line.starts_with(&holder)
    };
    let elsewhere = |line: &&String| !is_known(line);
    assert_eq!(woken.iter().filter(elsewhere).collect::<Vec<_>>(), [""; 0]);
    after.values().any(|(name, ..)| name.starts_with("vq-"))
}
