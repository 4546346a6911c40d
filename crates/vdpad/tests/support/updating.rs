//! Programs that update themselves, as roles of the test program: what they do with their disks before an update, and how they
//! prove afterwards that nothing is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, kill_process};
use vdpa_client::state::{Section, Sections};
use vdpa_client::update::checkpoint::{self, Checkpoint};
use vdpa_client::update::{
    self, Cancel, Devices, Image, Incoming, Plan, Restored, Strategy, UpdateError, Via, Way,
};
use vdpa_core::blk::kind;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use super::robust::disk::{self, Disk, Flight, Q0};
use super::robust::{SOON, eventually, receive_line, run, send_line, variable, vdpactl};

/// Blocks with data from before the update.
pub(crate) const OLD: std::ops::Range<u64> = 100..108;
pub(crate) const OLD_SEED: u64 = 1;
/// First of the blocks that are written when the update begins; one for each slot of the lower half.
pub(crate) const NEW: u64 = 2;
/// Requests in flight over the update: writes in the lower half, reads of old blocks in the upper.
pub(crate) const FLYING: u64 = 16;
/// Requests that a survivor makes on each disk to check that it works.
pub(crate) const CHECKS: u64 = FLYING / 2 + (OLD.end - OLD.start) + 2;

const LATE: &str = "test/flying";

/// The fault at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// SIGKILL.
    Kill,
    /// SIGSTOP.
    Stop,
    /// The daemon is killed, and this program goes on.
    KillDaemon,
    /// The daemon is upgraded, and this program goes on when the next one serves.
    UpgradeDaemon,
}

impl Action {
    const ALL: [Self; 4] = [Self::Kill, Self::Stop, Self::KillDaemon, Self::UpgradeDaemon];

    /// Whether it is done to the daemon and not to a program under test.
    pub(crate) fn is_of_daemon(self) -> bool {
        matches!(self, Self::KillDaemon | Self::UpgradeDaemon)
    }
}

/// A fault, when a process passes the point for the `nth` time (from 1 on).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) point: Checkpoint,
    pub(crate) nth: usize,
    pub(crate) action: Action,
}

impl Fault {
    pub(crate) fn text(self) -> String {
        format!("{} {} {:?}", self.point.name(), self.nth, self.action)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let (name, nth, action) = (words.next()?, words.next()?, words.next()?);
        let point = Checkpoint::ALL.into_iter().find(|point| point.name() == name)?;
        let action = Action::ALL.into_iter().find(|known| format!("{known:?}") == action)?;
        Some(Self { point, nth: nth.parse().ok()?, action })
    }
}

/// Environment variables that control a program.
pub(crate) const DISKS: &str = "TEST_DISKS";
pub(crate) const WAY: &str = "TEST_WAY";
pub(crate) const FAULT: &str = "TEST_FAULT";
pub(crate) const REACHED: &str = "TEST_REACHED";
/// File beside it. A stopped process continues only if it exists.
pub(crate) const GO_ON: &str = "go-on";
/// Where the successor of a hand-over listens; a program with [`WAITS`] is the successor.
pub(crate) const SOCKET: &str = "TEST_SOCKET";
/// Process id of the holder, and directory of the daemon.
pub(crate) const HOLDER: &str = "TEST_HOLDER";
pub(crate) const DAEMON_DIR: &str = "TEST_DAEMON_DIR";
pub(crate) const WAITS: &str = "TEST_WAITS";

fn text(error: &dyn std::error::Error) -> String {
    vdpa_core::error::chain(error)
}

fn pid() -> i32 {
    getpid().as_raw_nonzero().get()
}

/// Records every point that this process passes, and kills or stops it at the point of the fault.
fn watch() {
    let log = File::options().append(true).open(variable(REACHED)).unwrap();
    let fault = Fault::parse(&variable(FAULT));
    let times = std::sync::Mutex::new(BTreeMap::<String, usize>::new());
    checkpoint::on_checkpoint(move |point| {
        let mut times = times.lock().unwrap();
        let count = times.entry(point.name()).or_default();
        *count += 1;
        // One write for each line: two processes share the file.
        (&log).write_all(format!("{} {}\n", pid(), point.name()).as_bytes()).unwrap();
        if let Some(fault) = fault.filter(|fault| fault.point == point && fault.nth == *count) {
            if fault.action.is_of_daemon() {
                return end_daemon(fault.action);
            }
            let signal = if fault.action == Action::Kill { Signal::KILL } else { Signal::STOP };
            kill_process(getpid(), signal).unwrap();
            // Another thread may take the signal and stop this one a moment later.
            let go_on = PathBuf::from(variable(REACHED)).with_file_name(GO_ON);
            while !go_on.exists() {
                thread::sleep(Duration::from_millis(1));
            }
        }
    });
}

/// Kills or upgrades the daemon.
fn end_daemon(action: Action) {
    if action == Action::UpgradeDaemon {
        let output = run(vdpactl(Path::new(&variable(DAEMON_DIR))).args(["daemon", "upgrade"]));
        assert_eq!(output.code, Some(0), "{output:?}");
        return;
    }
    let holder = variable(HOLDER);
    let children = std::fs::read_to_string(format!("/proc/{holder}/task/{holder}/children")).unwrap();
    kill_process(Pid::from_raw(children.trim().parse().unwrap()).unwrap(), Signal::KILL).unwrap();
}

/// The program under test: a predecessor, or the successor of one.
pub(crate) fn program() {
    watch();
    if std::env::var_os(WAITS).is_some() {
        let listener = UnixListener::bind(variable(SOCKET)).unwrap();
        let (socket, _) = listener.accept().unwrap();
        return successor(Incoming::receive(socket));
    }
    match update::incoming::<VhostVdpaFd>() {
        Ok(None) => predecessor(),
        Ok(Some(incoming)) => successor(Ok(incoming)),
        Err(error) => successor(Err(error)),
    }
}

/// Name, path and strategy of each disk.
fn disks() -> Vec<(String, PathBuf, Strategy)> {
    let one = |disk: &str| {
        let [name, path, strategy] = disk.split('=').collect::<Vec<_>>()[..] else { panic!("{disk}") };
        (name.to_owned(), PathBuf::from(path), strategy.parse().unwrap())
    };
    variable(DISKS).split(',').map(one).collect()
}

/// A disk with old blocks, and requests in flight of which the device may have seen half.
pub(crate) fn start(path: &Path) -> Disk {
    let mut disk = Disk::start(path, disk::MEMORY_MIN);
    for (slot, block) in OLD.enumerate() {
        disk.submit(slot as u64, (kind::OUT, block, OLD_SEED));
    }
    disk.kick();
    disk.settle();
    disk
}

/// Makes requests, the second half of them without a kick.
pub(crate) fn fly(disk: &mut Disk, seed: u64) {
    for slot in 0..FLYING / 2 {
        disk.submit(slot, (kind::OUT, NEW + slot, seed));
        disk.submit(FLYING / 2 + slot, (kind::IN, OLD.start + slot, OLD_SEED));
        if slot == FLYING / 4 {
            disk.kick();
        }
    }
}

/// Every request in flight completes once and correctly, and all data is as before.
pub(crate) fn prove(disk: &mut Disk, seed: u64) {
    let flying: BTreeSet<u64> = disk.flying.keys().copied().collect();
    disk.kick();
    let slots = disk.settle();
    assert_eq!(slots.len(), flying.len(), "{slots:?}");
    assert_eq!(slots.into_iter().collect::<BTreeSet<_>>(), flying);
    let new = (NEW..NEW + FLYING / 2).map(|block| (kind::IN, block, seed));
    let old = OLD.map(|block| (kind::IN, block, OLD_SEED));
    for (slot, flight) in new.chain(old).enumerate() {
        disk.submit(slot as u64, flight);
    }
    disk.kick();
    disk.settle();
    disk.check(seed);
    assert!(disk.reap().is_empty());
    assert_eq!(disk.session.queue(Q0).unwrap().in_flight(), 0);
}

fn predecessor() {
    let way: Way = variable(WAY).parse().unwrap();
    let seed = u64::from(pid().unsigned_abs());
    let mut plan = Plan::new().late_section(LATE, 1, false);
    let (mut devices, mut flying) = (Devices::new(), BTreeMap::new());
    for (name, path, strategy) in disks() {
        let mut disk = start(&path);
        fly(&mut disk, seed);
        flying.insert(name.clone(), disk.flying.into_iter().collect::<Vec<(u64, Flight)>>());
        devices.push(&name, disk.session);
        plan = plan.strategy_of(&name, strategy);
    }
    let image = Image::new("/proc/self/exe");
    let via = match way {
        Way::Exec => Via::Exec(image),
        Way::Fork => Via::Fork(image),
        Way::HandOver => Via::HandOver(connect(Path::new(&variable(SOCKET)))),
    };
    let fault = Fault::parse(&variable(FAULT));
    let stops = fault.filter(|fault| fault.action == Action::Stop && way != Way::Exec);
    let cancel = Cancel::new().unwrap();
    if let Some(fault) = stops {
        plan = plan.deadline(DEADLINE).grace(GRACE).cancel(&cancel);
        cancel_after(fault, &cancel);
    }
    let late = Section::json(LATE, 1, &(seed, &flying)).unwrap();
    let switched = match plan.prepare(&devices, via) {
        Ok(prepared) => prepared.switch(devices, Sections::from_iter([late])),
        Err(error) => Err(Box::new(update::Failed { error, devices, lost: Vec::new() })),
    };
    match switched {
        Ok(_) => send_line("departed"),
        Err(failed) => {
            assert!(failed.lost.is_empty(), "{:?}", failed.lost.iter().map(|e| text(e)).collect::<Vec<_>>());
            survives("went-on", failed.devices, flying, seed, &text(&failed.error));
        }
    }
}

/// How long a switch may take when the successor is to stop in it.
const DEADLINE: Duration = Duration::from_secs(2);

const GRACE: Duration = Duration::from_millis(200);

/// The predecessor waits for a successor that stops before it is ready until the update is cancelled.
fn cancel_after(fault: Fault, cancel: &Cancel) {
    if !matches!(fault.point, Checkpoint::Entered | Checkpoint::Received | Checkpoint::Loaded) {
        return;
    }
    let (cancel, reached) = (cancel.clone(), variable(REACHED));
    thread::spawn(move || {
        eventually("the successor has stopped", || {
            let text = std::fs::read_to_string(&reached).unwrap();
            text.lines().any(|line| line.ends_with(&format!(" {}", fault.point.name()))).then_some(())
        });
        cancel.cancel();
    });
}

/// Connects to the successor of a hand-over, which may not listen yet.
pub(crate) fn connect(path: &Path) -> UnixStream {
    let begin = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return socket,
            Err(_) if begin.elapsed() < SOON => thread::sleep(Duration::from_micros(200)),
            Err(error) => panic!("nobody listens at {}: {error}", path.display()),
        }
    }
}

type Flying = BTreeMap<String, Vec<(u64, Flight)>>;

fn successor(incoming: Result<Incoming<VhostVdpaFd>, UpdateError>) {
    match incoming.and_then(Incoming::take_over) {
        Ok(Restored { devices, mut sections, report, .. }) => {
            let section = sections.take(LATE).unwrap();
            sections.ensure_consumed().unwrap();
            let (seed, flying): (u64, Flying) = section.parse(1).unwrap();
            survives("took-over", devices, flying, seed, report.way.name());
        }
        Err(error) => send_line(&format!("gave-up {} {}", pid(), text(&error))),
    }
}

/// Has the devices: checks them, reports that, and waits until it may end.
fn survives(what: &str, devices: Devices<VhostVdpaFd>, mut flying: Flying, seed: u64, how: &str) {
    let mut disks = Vec::new();
    for (name, session) in devices {
        let mut disk = Disk { session, flying: flying.remove(&name).unwrap().into_iter().collect() };
        prove(&mut disk, seed);
        disks.push(disk);
    }
    assert!(flying.is_empty());
    send_line(&format!("{what} {} {seed} {how}", pid()));
    receive_line();
}
