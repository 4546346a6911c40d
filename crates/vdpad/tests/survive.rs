//! Thousands of kills at random instants and upgrades in a row, with every kind of device that survives in verified use.
//!
//! `testbed/survival` runs it; as a test it runs for some seconds only.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/loads.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod loads;
#[path = "support/net.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod net;
#[path = "support/requests.rs"]
mod requests;
#[path = "support/robust.rs"]
mod robust;
#[path = "support/tap.rs"]
mod tap;

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use vdpa_control::api::{AddRequest, Attrs, UpgradeRequest};
use vdpa_core::Errno;

use loads::{Faults, KINDS, Kind};
use robust::{Resources, Vdpad, eventually};

/// Of 4 kills, this many do not wait until there was progress since the one before.
const HASTY: u64 = 1;
/// Longest time between two kills, in microseconds.
const PAUSE_US: u64 = 60_000;
/// Items that a journal may keep without using them.
const UNUSED: usize = 80;
/// Upgrades after which a process has what it needs for good.
const WARM_UP: u64 = 10;

/// The client that adds and deletes devices.
const CONTROL: &str = "control";

/// What is asked for.
#[derive(Clone, Copy, Debug)]
struct Plan {
    kills: u64,
    upgrades: u64,
    seed: u64,
}

/// As a test among others.
const SHORT: Plan = Plan { kills: 60, upgrades: 20, seed: 1 };
const LONG: Plan = Plan { kills: 10_000, upgrades: 1000, seed: 0 };

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|other| other == word);
    if has("--list") {
        // The name of a module of tests that run one at a time.
        if !has("--ignored") {
            println!("heavy::kills_and_upgrades: test");
        }
        return;
    }
    let plan = if has("--run") { parse(&words) } else { SHORT };
    println!("seed {}", plan.seed);
    run(plan);
}

fn parse(words: &[String]) -> Plan {
    let number = |name: &str| {
        let at = words.iter().position(|word| word == name)?;
        let value = words.get(at + 1).and_then(|word| word.parse::<u64>().ok());
        Some(value.unwrap_or_else(|| panic!("{name} takes a number")))
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Plan {
        kills: number("--kills").unwrap_or(LONG.kills),
        upgrades: number("--upgrades").unwrap_or(LONG.upgrades),
        seed: number("--seed").unwrap_or_else(|| u64::from(now.subsec_nanos())),
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }
}

/// A progress bar where somebody sees it.
struct Progress {
    what: &'static str,
    end: u64,
    drawn: Instant,
}

impl Progress {
    fn new(what: &'static str, end: u64) -> Self {
        Self { what, end, drawn: Instant::now() }
    }

    fn show(&mut self, done: u64) {
        let mut out = std::io::stderr();
        if !out.is_terminal() || done < self.end && self.drawn.elapsed() < Duration::from_millis(100) {
            return;
        }
        self.drawn = Instant::now();
        let filled = usize::try_from(40 * done / self.end.max(1)).unwrap();
        let _ = write!(out, "\r[{:40}] {done}/{} {}", "#".repeat(filled), self.end, self.what);
        if done == self.end {
            let _ = writeln!(out);
        }
    }
}

/// What the clients have in common with the test.
#[derive(Default)]
struct Shared {
    ends: AtomicBool,
    /// Held for reading by every client that is at work.
    working: RwLock<()>,
    /// Faults of each client, and how much it has done.
    faults: Mutex<BTreeMap<&'static str, Faults>>,
    bursts: Mutex<BTreeMap<&'static str, u64>>,
    /// Kills so far: for each a packet may be lost.
    kills: AtomicU64,
}

impl Shared {
    fn add(&self, name: &'static str, faults: Faults) {
        *self.faults.lock().unwrap().entry(name).or_default() += faults;
        *self.bursts.lock().unwrap().entry(name).or_default() += 1;
    }

    /// Waits until every client of a device has done something since.
    fn waits_for_progress(&self) {
        let mut before = self.bursts.lock().unwrap().clone();
        before.remove(CONTROL);
        // The burst at the time may have been over but for its count.
        let done = || {
            let now = self.bursts.lock().unwrap();
            before.iter().all(|(name, count)| now[name] >= count + 2).then_some(())
        };
        let deadline = Instant::now() + Duration::from_secs(40);
        while done().is_none() {
            assert!(Instant::now() < deadline, "no progress: {before:?}, {:?}", self.bursts.lock().unwrap());
            thread::sleep(Duration::from_micros(500));
        }
    }
}

/// Starts a client for each kind of device, and one that adds, uses and deletes devices.
fn clients(vdpad: &Vdpad, shared: &Arc<Shared>) -> Vec<JoinHandle<()>> {
    let mut threads = Vec::new();
    for kind in KINDS {
        let path = vdpad.add_any(kind.name, kind.mgmtdev);
        let mut load = (kind.start)(&path);
        let shared = Arc::clone(shared);
        shared.add(kind.name, Faults::default());
        threads.push(thread::spawn(move || {
            while !shared.ends.load(Ordering::Acquire) {
                let _working = shared.working.read().unwrap();
                let faults = load.burst();
                shared.add(kind.name, faults);
            }
        }));
    }
    let path = vdpad.add_blk("requests", 1 << 20, "");
    let (client, shared) = (vdpad.client().with_timeout(Duration::from_secs(30)), Arc::clone(shared));
    let image = vdpad.image("third", 1 << 20);
    shared.add(CONTROL, Faults::default());
    threads.push(thread::spawn(move || {
        let mut attrs = Attrs::new();
        attrs.insert("path", image.to_str().unwrap()).unwrap();
        let third = AddRequest { name: "third".into(), mgmtdev: "blk".into(), attrs };
        while !shared.ends.load(Ordering::Acquire) {
            let working = shared.working.read().unwrap();
            let mut faults = Faults { requests: 80, ..Faults::default() };
            if let Err(errno) = requests::requests(&path) {
                // Refused after two crashes in a row. Anything else is a device that was lost.
                assert_eq!(errno, Errno::IO, "a request of a client");
                faults.errors += 1;
            }
            // The connection breaks with the daemon. Whatever became of the request, the device is there or not.
            while !client.devices().is_ok_and(|all| all.iter().any(|info| info.name == "third")) {
                let _ = client.add(&third);
            }
            while !client.devices().is_ok_and(|all| all.iter().all(|info| info.name != "third")) {
                let _ = client.delete("third", false);
            }
            shared.add(CONTROL, faults);
            drop(working);
        }
    }));
    threads
}

/// The daemon: the child of the holder that is one, by the kernel.
fn daemon(vdpad: &Vdpad) -> Option<Pid> {
    let holder = vdpad.pid().as_raw_nonzero();
    let children = std::fs::read_to_string(format!("/proc/{holder}/task/{holder}/children")).ok()?;
    children.split_whitespace().last()?.parse().ok().and_then(Pid::from_raw)
}

fn run(plan: Plan) {
    assert!(loads::prepare(), "the card needs a network namespace");
    let limit = Duration::from_secs(60 + plan.kills + plan.upgrades);
    let vdpad = Vdpad::start_with(
        limit,
        &["--holder", "--front", "fuse", "--crash-limit", "60000", "--log", "error"],
    );
    let shared = Arc::new(Shared::default());
    let threads = clients(&vdpad, &shared);
    shared.waits_for_progress();
    let hasty = kill(&vdpad, &shared, plan);
    upgrade(&vdpad, &shared, plan.upgrades);
    shared.waits_for_progress();
    shared.ends.store(true, Ordering::Release);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let crashes = vdpad.client().daemon().unwrap().holder.unwrap().crashes;
    result(&shared, plan, crashes, hasty);
}

/// Prints and judges.
fn result(shared: &Shared, plan: Plan, crashes: u64, hasty: u64) {
    let all = shared.faults.lock().unwrap();
    let mut total = Faults::default();
    for (name, faults) in &*all {
        println!("{name}: {faults:?}");
        total += *faults;
    }
    // A packet with which two processes have died in a row is not tried again.
    let lost = |wire| {
        let kinds = KINDS.iter().filter(|kind| kind.lossy && kind.wire == wire);
        kinds.map(|kind| all[kind.name].lost).sum::<u64>()
    };
    // As on a wire, a packet may be lost or repeated that was on its way at a crash.
    let (lossy, on_wire) = (lost(false), lost(true));
    println!(
        "{} kills, {hasty} of them soon after another, and {} upgrades under {} requests; {} answered with an I/O error \
         because of two crashes in a row; {lossy} packets dropped for the same reason",
        plan.kills, plan.upgrades, total.requests, total.errors
    );
    println!("the card has lost {on_wire} packets, and repeated {}", total.again);
    let lost = total.lost - lossy - on_wire;
    println!("{lost} lost, {} corrupt, {} twice", total.corrupt, total.twice);
    assert_eq!((lost, total.corrupt, total.twice), (0, 0, 0));
    let most = Kind::WIRE * (plan.kills + hasty);
    assert!(on_wire <= most && total.again <= most, "{on_wire} lost, {} repeated", total.again);
    assert!(lossy <= hasty * 3, "{lossy} packets");
    assert!(total.errors <= hasty * 3 * loads::DEPTH, "{} errors", total.errors);
    assert!(crashes >= plan.kills - hasty, "{crashes} crashes");
}

/// Kills the daemon again and again; returns how often it did so soon after it had done so before.
fn kill(vdpad: &Vdpad, shared: &Shared, plan: Plan) -> u64 {
    let mut random = Random(plan.seed.max(1));
    let mut progress = Progress::new("kills", plan.kills);
    let mut hasty = 0;
    for done in 1..=plan.kills {
        if done > 1 && random.below(4) < HASTY {
            hasty += 1;
        } else {
            shared.waits_for_progress();
        }
        thread::sleep(Duration::from_micros(random.below(PAUSE_US)));
        let pid = eventually("there is a daemon", || daemon(vdpad));
        // It may have ended, and not been collected yet.
        let _ = kill_process(pid, Signal::KILL);
        shared.kills.fetch_add(1, Ordering::Relaxed);
        progress.show(done);
    }
    shared.waits_for_progress();
    hasty
}

/// What the processes of a service have.
#[derive(Debug)]
struct Everything {
    holder: Resources,
    daemon: Resources,
    held: u64,
    /// Pages pinned in the whole machine.
    pinned: i64,
}

/// Pages that are pinned in the whole machine.
fn pinned() -> i64 {
    let all = std::fs::read_to_string("/proc/vmstat").unwrap();
    let field = |name: &str| {
        let line =
            all.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<i64>().ok());
        line.unwrap_or(0)
    };
    field("nr_foll_pin_acquired") - field("nr_foll_pin_released")
}

impl Everything {
    /// While no client makes requests.
    fn of(vdpad: &Vdpad, shared: &Shared) -> Self {
        let _still = shared.working.write().unwrap();
        let info = eventually("the daemon answers", || vdpad.client().daemon().ok());
        let daemon = Pid::from_raw(info.pid.cast_signed()).unwrap();
        Self {
            holder: vdpad.resources(),
            daemon: Resources::of(daemon),
            held: info.holder.unwrap().held,
            pinned: pinned(),
        }
    }

    fn has_not_grown(&self, before: &Self, upgrades: u64) {
        // A journal has some unused items before its next checkpoint.
        let count = |of: &Resources| of.fds.values().sum::<usize>();
        assert!(count(&self.holder) <= count(&before.holder) + UNUSED, "{self:?}, {before:?}");
        assert_eq!(self.holder.maps, before.holder.maps);
        assert!(self.holder.rss_kib <= before.holder.rss_kib + 512, "{self:?}, {before:?}");
        assert!(count(&self.daemon) <= count(&before.daemon) + UNUSED, "{self:?}, {before:?}");
        assert!(self.daemon.maps <= before.daemon.maps + 8, "{self:?}, {before:?}");
        assert!(self.daemon.rss_kib <= before.daemon.rss_kib + 4096, "{self:?}, {before:?}");
        assert_eq!(self.daemon.registered, before.daemon.registered);
        assert!(
            usize::try_from(self.held).unwrap() <= usize::try_from(before.held).unwrap() + UNUSED,
            "{self:?}, {before:?}"
        );
        // Others may pin, too, and their pins end; less than one page for each upgrade is no leak of a device's memory.
        let most = before.pinned + 4096 + upgrades.cast_signed();
        eventually("no more pages are pinned", || (pinned() <= most).then_some(()));
    }
}

/// Upgrades the daemon again and again, to the same program.
fn upgrade(vdpad: &Vdpad, shared: &Shared, upgrades: u64) {
    let client = vdpad.client();
    let mut progress = Progress::new("upgrades", upgrades);
    let mut before = None;
    for done in 1..=upgrades {
        let generation = eventually("the daemon answers", || client.daemon().ok()).holder.unwrap().generation;
        eventually("the daemon can be upgraded", || client.upgrade(&UpgradeRequest::default()).ok());
        eventually("the next daemon serves", || {
            client.daemon().ok()?.holder.filter(|now| now.generation > generation)
        });
        shared.waits_for_progress();
        if done == WARM_UP.min(upgrades.div_ceil(2)) {
            before = Some(Everything::of(vdpad, shared));
        }
        progress.show(done);
    }
    if let Some(before) = before {
        let after = Everything::of(vdpad, shared);
        println!("after {WARM_UP} upgrades: {before:?}\nafter {upgrades}: {after:?}");
        after.has_not_grown(&before, upgrades);
    }
}
