//! Updates in which one of the two programs is killed, or stops, at a named point: for each point, way, strategy and
//! device, which program has the disk afterwards, and that no data is lost.
//!
//! The same with the daemon in the place of a program: it is killed or upgraded at each point, and the update goes on.
//!
//! The points that an update passes are asserted as well, so that a point that is not reached is not taken for one that
//! was survived.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;
#[path = "support/updating.rs"]
mod updating;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Write as _};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, waitpgid};
use vdpa_client::update::checkpoint::Checkpoint;
use vdpa_client::update::{Strategy, Way};

use robust::disk::{self, Disk};
use robust::{Resources, Vdpad, eventually, has_role};
use updating::{Action, Fault, NEW, OLD, OLD_SEED};

/// How long a device may be busy after its client was killed.
const BUSY_MAX: Duration = Duration::from_secs(1);

#[test]
fn program() {
    if has_role("program") {
        updating::program();
    }
}

/// Which program has the devices after one of them was killed or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// Neither, since no program is left.
    Closed,
    /// The predecessor.
    WentOn,
    /// The successor.
    TookOver,
}

/// The points of an update without a fault, in their order.
fn path_of(way: Way, strategy: Strategy) -> Vec<Checkpoint> {
    use Checkpoint as P;
    let exec = way == Way::Exec;
    let with = |point, condition: bool| condition.then_some(point);
    let reopen = strategy == Strategy::Reopen;
    [
        Some(P::Checked),
        with(P::Connected, !exec),
        with(P::Offered, !exec),
        Some(P::Ready),
        Some(P::Switching),
        with(P::Suspended, strategy != Strategy::Live),
        Some(P::Stopped),
        Some(P::Saved),
        with(P::BeforeExec, exec),
        with(P::Sent, !exec),
        with(P::TakenReceived, !exec),
        with(P::Committed, !exec),
        with(P::Released, !exec),
        // A program with a given socket does not create one.
        with(P::Entered, way != Way::HandOver),
        Some(P::Received),
        Some(P::Loaded),
        with(P::ReadySent, !exec),
        with(P::SwitchReceived, !exec),
        Some(P::Adopted),
        Some(P::Owned),
        with(P::Vrings, strategy == Strategy::Reset),
        with(P::Remapped, !reopen),
        // A device that was closed is started when the predecessor cannot take it back any more.
        with(P::Running, exec || !reopen),
        with(P::TakenSent, !exec),
        with(P::CommitReceived, !exec),
        with(P::Running, !exec && reopen),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Which program must have the devices after a fault at `point`.
fn expected(way: Way, strategy: Strategy, point: Checkpoint, action: Action) -> Outcome {
    use Checkpoint as P;
    if way == Way::Exec {
        // There is one process; one that was stopped continues when it is told to.
        return if action == Action::Kill { Outcome::Closed } else { Outcome::TookOver };
    }
    match point {
        // With the complete state a successor does not need its predecessor.
        P::Sent | P::TakenReceived | P::Committed | P::Released => Outcome::TookOver,
        point if !point.is_in_successor() => Outcome::Closed,
        // The predecessor knows that the update is complete, and has no devices any more.
        P::CommitReceived if action == Action::Kill => Outcome::Closed,
        P::Running if strategy == Strategy::Reopen && action == Action::Kill => Outcome::Closed,
        P::CommitReceived => Outcome::TookOver,
        P::Running if strategy == Strategy::Reopen => Outcome::TookOver,
        _ => Outcome::WentOn,
    }
}

/// One update.
#[derive(Clone, Debug)]
struct Case {
    way: Way,
    /// One for each disk.
    strategies: Vec<Strategy>,
    fault: Option<Fault>,
    outcome: Outcome,
    /// With packed rings, which the simulators do not have.
    packed: bool,
    /// The process id of the daemon's service, and its directory.
    service: (i32, PathBuf),
}

/// Disks that one case uses at a time: name and path.
type Disks = Vec<(String, PathBuf)>;

/// The result of a case.
#[derive(Debug)]
struct Ended {
    outcome: Outcome,
    /// The points of each process, in the order in which they were reached.
    reached: Vec<(i32, String)>,
    predecessor: i32,
    /// All processes, with how they ended.
    exits: BTreeMap<i32, rustix::process::WaitStatus>,
    said: Vec<String>,
}

/// Processes of one case. Dropping it kills those that are left.
struct Group(Pid);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = kill_process_group(self.0, Signal::KILL);
        while waitpgid(self.0, WaitOptions::empty()).is_ok() {}
    }
}

impl Case {
    fn describe(&self) -> String {
        let rings = if self.packed { "packed" } else { "split" };
        format!("{}, {:?}, {:?}, {rings} rings", self.way, self.strategies, self.fault)
    }

    fn command(&self, disks: &Disks, dir: &Path, output: &PipeWriter, input: &PipeReader) -> Command {
        let disks = disks.iter().zip(&self.strategies);
        let disks = disks.map(|((name, path), strategy)| format!("{name}={}={strategy}", path.display()));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["program", "--exact", "--nocapture"])
            .env("VDPA_TEST_ROLE", "program")
            .env(updating::DISKS, disks.collect::<Vec<_>>().join(","))
            .env(updating::WAY, self.way.name())
            .env(updating::FAULT, self.fault.map_or_else(String::new, Fault::text))
            .env(updating::REACHED, dir.join("reached"))
            .env(updating::SOCKET, dir.join("socket"))
            .env(updating::HOLDER, self.service.0.to_string())
            .env(updating::DAEMON_DIR, &self.service.1)
            .stdin(Stdio::from(input.try_clone().unwrap()))
            .stdout(Stdio::from(output.try_clone().unwrap()));
        if self.packed {
            command.env(disk::PACKED, "1");
        }
        command
    }

    /// Runs the update and checks the survivor while it has the devices.
    fn run(&self, disks: &Disks, look: impl FnOnce(i32)) -> Ended {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("reached"), "").unwrap();
        let (lines, output) = std::io::pipe().unwrap();
        let (input, mut tell) = std::io::pipe().unwrap();
        let mut group = None;
        let mut start = |waits: bool| {
            let mut command = self.command(disks, dir.path(), &output, &input);
            if waits {
                command.env(updating::WAITS, "1");
            }
            let leader = *group.get_or_insert(0);
            let pid = i32::try_from(command.process_group(leader).spawn().unwrap().id()).unwrap();
            group = group.filter(|&leader| leader != 0).or(Some(pid));
            pid
        };
        let waiting = (self.way == Way::HandOver).then(|| start(true));
        let predecessor = start(false);
        let group = Group(Pid::from_raw(group.unwrap()).unwrap());
        drop((output, input));

        let mut ended = Ended {
            outcome: Outcome::Closed,
            reached: Vec::new(),
            predecessor,
            exits: BTreeMap::new(),
            said: Vec::new(),
        };
        let mut look = Some(look);
        if let Some(fault) = self.fault.filter(|_| self.continues()) {
            let at_point = |(pid, point): (i32, String)| (point == fault.point.name()).then_some(pid);
            let stopped = eventually("the program stops", || dir.reached().into_iter().find_map(at_point));
            eventually("the program has stopped", || is_stopped(stopped).then_some(()));
            go_on(dir.path(), stopped);
        }
        for line in BufReader::new(lines).lines() {
            let Some((_, said)) = line.as_deref().unwrap().split_once('@') else { continue };
            let words: Vec<&str> = said.split(' ').collect();
            let outcome = match words[0] {
                "went-on" => Some(Outcome::WentOn),
                "took-over" => Some(Outcome::TookOver),
                _ => None,
            };
            if let Some(outcome) = outcome {
                assert_eq!(ended.outcome, Outcome::Closed, "two survive: {:?}, {said}", ended.said);
                ended.outcome = outcome;
                look.take().unwrap()(words[1].parse().unwrap());
                // A successor that stopped before it was ready survives, and is told that the update was aborted.
                if let Some(pid) = waiting.filter(|&pid| is_stopped(pid)) {
                    go_on(dir.path(), pid);
                }
                tell.write_all(b"end\n").unwrap();
            }
            ended.said.push(said.to_owned());
        }
        ended.reached = dir.reached();
        while let Ok(Some((pid, status))) = waitpgid(group.0, WaitOptions::empty()) {
            ended.exits.insert(pid.as_raw_nonzero().get(), status);
        }
        ended
    }

    /// Whether the test must continue a program that was stopped, because no other program does.
    fn continues(&self) -> bool {
        self.fault.is_some_and(|f| f.action == Action::Stop) && self.outcome == Outcome::TookOver
    }
}

trait Reached {
    fn reached(&self) -> Vec<(i32, String)>;
}

impl Reached for tempfile::TempDir {
    fn reached(&self) -> Vec<(i32, String)> {
        let text = std::fs::read_to_string(self.path().join("reached")).unwrap();
        let line = |line: &str| {
            let (pid, point) = line.split_once(' ').unwrap();
            (pid.parse().unwrap(), point.to_owned())
        };
        text.lines().map(line).collect()
    }
}

/// Continues a stopped process.
fn go_on(dir: &Path, pid: i32) {
    std::fs::write(dir.join(updating::GO_ON), "").unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::CONT).unwrap();
}

fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}

/// A daemon with the devices of the updates, and the expected contents of their blocks.
struct Ground {
    vdpad: Vdpad,
    /// Its resources when nobody uses it.
    idle: Mutex<Option<Resources>>,
    longest: Mutex<Duration>,
}

impl Ground {
    fn new() -> Self {
        Self::with(&[])
    }

    fn with(args: &[&str]) -> Self {
        // Programs whose predecessor is killed become children of this process, which waits for their group.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let vdpad = Vdpad::start_with(Duration::from_secs(110), args);
        Self { vdpad, idle: Mutex::default(), longest: Mutex::default() }
    }

    /// Runs a case and checks its result.
    fn judge(&self, case: &Case, disks: &Disks) -> Ended {
        let mut case = case.clone();
        case.service = (self.vdpad.pid().as_raw_nonzero().get(), self.vdpad.dir().to_owned());
        let case = &case;
        if case.fault.is_some_and(|fault| fault.action.is_of_daemon()) {
            return self.judge_daemon(case, disks);
        }
        let served = || -> Vec<u64> {
            disks.iter().map(|(name, _)| self.vdpad.info(name).state.queues[0].requests).collect()
        };
        let before = served();
        let ended = case.run(disks, |pid| {
            // Each request was answered once: the old blocks, those in flight, and the survivor's.
            let each = OLD.end - OLD.start + updating::FLYING + updating::CHECKS;
            let after: Vec<u64> = before.iter().map(|before| before + each).collect();
            assert_eq!(served(), after, "{}", case.describe());
            for (name, _) in disks {
                let state = self.vdpad.info(name).state;
                assert_eq!(state.owner.as_ref().unwrap().pid, pid.unsigned_abs(), "{state:?}");
                assert!(state.open && !state.suspended && state.queues[0].running, "{state:?}");
                assert_eq!((state.mappings, state.queues[0].errors), (1, 0), "{state:?}");
            }
        });
        self.are_usable(disks, &ended);
        assert_eq!(ended.outcome, case.outcome, "{}: {ended:?}", case.describe());
        ended
    }

    /// As [`judge`](Self::judge), where the daemon is killed or upgraded: its counters begin again.
    fn judge_daemon(&self, case: &Case, disks: &Disks) -> Ended {
        let holder =
            || eventually("the daemon answers", || self.vdpad.client().daemon().ok()).holder.unwrap();
        let before = holder().generation;
        let ended = case.run(disks, |pid| {
            // A predecessor may still be at the point when its successor has the devices.
            eventually("the point is reached", || (holder().generation == before + 1).then_some(()));
            for (name, _) in disks {
                let state = self.vdpad.info(name).state;
                assert_eq!(state.owner.as_ref().unwrap().pid, pid.unsigned_abs(), "{state:?}");
                assert!(state.open && !state.suspended && state.queues[0].running, "{state:?}");
                assert_eq!((state.mappings, state.queues[0].errors), (1, 0), "{state:?}");
            }
        });
        self.are_usable(disks, &ended);
        assert_eq!(ended.outcome, case.outcome, "{}: {ended:?}", case.describe());
        let well = ended.exits.values().all(|status| status.exit_status() == Some(0));
        assert!(well, "{}: {ended:?}", case.describe());
        ended
    }

    fn are_usable(&self, disks: &Disks, ended: &Ended) {
        let busy = blocks_are_there(disks, ended, BUSY_MAX);
        let mut longest = self.longest.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *longest = busy.max(*longest);
        for (name, _) in disks {
            self.vdpad.is_released(name);
        }
    }

    /// Asserts that the daemon has no more resources than before its first client.
    fn is_idle(&self) {
        let mut idle = self.idle.lock().unwrap();
        // A thread for requests of the control socket ends when it had none for a while.
        let same = |a: &Resources, b: &Resources| a.fds == b.fds && a.threads <= b.threads;
        let Some(idle) = &*idle else {
            // Connections are closed and threads end some time after their clients.
            let (mut last, mut times) = (self.vdpad.resources(), 0);
            while times < 10 {
                std::thread::sleep(Duration::from_millis(20));
                let now = self.vdpad.resources();
                times = if same(&now, &last) { times + 1 } else { 0 };
                last = now;
            }
            *idle = Some(last);
            return;
        };
        let deadline = Instant::now() + robust::SOON;
        let mut now = self.vdpad.resources();
        while !same(&now, idle) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
            now = self.vdpad.resources();
        }
        // The allocator has as many arenas as threads ever ran at a time. That no client memory is mapped is asserted separately.
        assert!(now.maps <= idle.maps + 48, "{} mappings, {} before", now.maps, idle.maps);
        let (threads, maps) = (now.threads.max(idle.threads), now.maps.min(idle.maps));
        Resources { threads, maps, ..now }.are_back_to(idle);
    }
}

/// The next client opens each device at once and reads every acknowledged write; a write in flight may be there or not. Returns
/// the longest time that a device was busy.
fn blocks_are_there(disks: &Disks, ended: &Ended, busy_max: Duration) -> Duration {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    // Because this process can have little memory pinned.
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut longest = Duration::ZERO;
    for (name, path) in disks {
        let (mut disk, busy) = Disk::start_timed(path, disk::MEMORY_MIN);
        assert!(busy < busy_max, "{name} is busy for {busy:?}");
        longest = busy.max(longest);
        for block in OLD {
            assert!(disk.read_block(block) == disk::pattern(block, OLD_SEED), "{name}, block {block}");
        }
        let seed = u64::from(ended.predecessor.unsigned_abs());
        for block in NEW..NEW + updating::FLYING / 2 {
            let new = disk.read_block(block) == disk::pattern(block, seed);
            assert!(new || ended.outcome == Outcome::Closed, "{name}, block {block}, {ended:?}");
            // The next case must find contents other than those that it writes.
            disk.one((vdpa_core::blk::kind::OUT, block, 0));
        }
    }
    longest
}

/// Kills at each point on a device that no daemon serves: `testbed/kernel-module kills` runs this in a machine. VDPA_KILL_DEVICE is
/// the file of a block device, VDPA_KILL_STRATEGIES are those that it supports.
#[test]
#[ignore = "needs a device of a kernel: testbed/kernel-module kills"]
fn on_a_device_of_a_kernel() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let disks = vec![("disk".to_owned(), PathBuf::from(std::env::var_os("VDPA_KILL_DEVICE").unwrap()))];
    let strategies = std::env::var("VDPA_KILL_STRATEGIES").unwrap();
    let mut kills = 0;
    for way in Way::ALL {
        for strategy in strategies.split(',').map(|name| name.parse::<Strategy>().unwrap()) {
            for point in path_of(way, strategy) {
                let fault = Fault { point, nth: 1, action: Action::Kill };
                let outcome = expected(way, strategy, point, Action::Kill);
                let service = (0, PathBuf::new());
                let strategies = vec![strategy];
                let case = Case { way, strategies, fault: Some(fault), outcome, packed: false, service };
                let ended = case.run(&disks, |_| {});
                // An emulated machine is slow.
                blocks_are_there(&disks, &ended, Duration::from_secs(30));
                assert_eq!(ended.outcome, case.outcome, "{}: {ended:?}", case.describe());
                check_exits(&case, &ended, fault);
                kills += 1;
            }
        }
    }
    println!("{kills} kills with {strategies}: nothing lost");
}

/// Asserts that the process with the fault ended as expected, and the others normally.
fn check_exits(case: &Case, ended: &Ended, fault: Fault) {
    let name = fault.point.name();
    let at: Vec<_> = ended.reached.iter().filter(|(_, point)| *point == name).collect();
    assert_eq!(at.len(), fault.nth, "{}: {ended:?}", case.describe());
    let victim = at.last().unwrap().0;
    let is_predecessor = victim == ended.predecessor;
    assert_eq!(
        case.way == Way::Exec || is_predecessor,
        !fault.point.is_in_successor() || case.way == Way::Exec
    );
    let last = ended.reached.iter().rev().find(|(pid, _)| *pid == victim).unwrap();
    let acting = ![Checkpoint::Entered, Checkpoint::Received, Checkpoint::Loaded].contains(&fault.point)
        || case.way == Way::Fork;
    let killed = fault.action == Action::Kill || ended.outcome == Outcome::WentOn && acting;
    assert!(!killed || last.1 == name, "{}: {ended:?}", case.describe());
    for (pid, status) in &ended.exits {
        let (code, signal) = (status.exit_status(), status.terminating_signal());
        if *pid == victim && killed {
            assert_eq!(signal, Some(Signal::KILL.as_raw()), "{}: {ended:?}", case.describe());
        } else {
            assert_eq!(code, Some(0), "{}: process {pid}, {ended:?}", case.describe());
        }
    }
}

/// Runs cases, `at_once` in parallel. Returns the longest time that a device was busy after its client had ended.
fn run_all(mgmtdev: &str, cases: &[Case], at_once: usize) -> Duration {
    let ground = Ground::new();
    let sets: Vec<Disks> = (0..at_once)
        .map(|number| {
            let name = format!("disk{number}");
            let path = ground.vdpad.add_any(&name, mgmtdev);
            vec![(name, path)]
        })
        .collect();
    // What the daemon makes once and keeps, also for as many threads at a time: stacks and arenas of the allocator.
    let plain = Case { fault: None, outcome: Outcome::TookOver, ..cases[0].clone() };
    run_on(&ground, &sets, &vec![plain; 2 * at_once]);
    run_on(&ground, &sets, cases);
    ground.longest.into_inner().unwrap()
}

/// Runs cases, as many at a time as there are sets of disks.
fn run_on(ground: &Ground, sets: &[Disks], cases: &[Case]) {
    let next = Mutex::new(cases.iter());
    std::thread::scope(|scope| {
        for disks in sets {
            let next = &next;
            scope.spawn(move || {
                loop {
                    let case = next.lock().unwrap().next();
                    let Some(case) = case else { break };
                    let ended = ground.judge(case, disks);
                    match case.fault {
                        Some(fault) => check_exits(case, &ended, fault),
                        None => check_path(case, &ended),
                    }
                    if sets.len() == 1 {
                        ground.is_idle();
                    }
                }
            });
        }
    });
    ground.is_idle();
}

/// Asserts that each of the two programs has passed its points, and no others.
fn check_path(case: &Case, ended: &Ended) {
    let path = path_of(case.way, case.strategies[0]);
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for (pid, point) in &ended.reached {
        let point = Checkpoint::ALL.into_iter().find(|p| p.name() == *point).unwrap();
        if point.is_in_successor() {
            after.push(point)
        } else {
            before.push(point)
        }
        let is_predecessor = *pid == ended.predecessor;
        assert!(case.way == Way::Exec || is_predecessor != point.is_in_successor(), "{ended:?}");
    }
    let (wanted_after, wanted_before): (Vec<_>, Vec<_>) = path.into_iter().partition(|p| p.is_in_successor());
    assert_eq!((before, after), (wanted_before, wanted_after), "{}", case.describe());
    assert!(ended.exits.values().all(|status| status.exit_status() == Some(0)), "{ended:?}");
}

/// All faults of one way on one kind of device.
fn survived(mgmtdev: &str, strategies: &[Strategy], way: Way) {
    let case = |strategy, fault: Option<Fault>| Case {
        way,
        strategies: vec![strategy],
        fault,
        outcome: fault.map_or(Outcome::TookOver, |f| expected(way, strategy, f.point, f.action)),
        // Either format at each point, and with each strategy.
        packed: mgmtdev == "blk" && fault.map_or(0, |f| place(f.point)) % 2 == place_of(strategy) % 2,
        service: (0, PathBuf::new()),
    };
    let faults = |action, of: fn(Checkpoint) -> bool| -> Vec<Case> {
        let points = |&strategy: &Strategy| {
            let points = path_of(way, strategy).into_iter().filter(move |&p| of(p));
            points.map(move |point| case(strategy, Some(Fault { point, nth: 1, action })))
        };
        strategies.iter().flat_map(points).collect()
    };
    let paths: Vec<Case> = strategies.iter().map(|&strategy| case(strategy, None)).collect();
    let killed = faults(Action::Kill, |_| true);
    let stopped = faults(Action::Stop, Checkpoint::is_in_successor);
    let begin = Instant::now();
    let mut busy = run_all(mgmtdev, &[paths, killed.clone()].concat(), 1);
    let kills = begin.elapsed();
    busy = busy.max(run_all(mgmtdev, &stopped, STOPPED_AT_ONCE));
    print!("{}", table(mgmtdev, way, strategies, &[killed.clone(), stopped.clone()].concat()));
    println!(
        "{} killed in {kills:?}, {} stopped in {:?}; busy for {busy:?} at most",
        killed.len(),
        stopped.len(),
        begin.elapsed() - kills,
    );
}

fn place(point: Checkpoint) -> usize {
    Checkpoint::ALL.iter().position(|&p| p == point).unwrap()
}

fn place_of(strategy: Strategy) -> usize {
    Strategy::ALL.iter().position(|&s| s == strategy).unwrap()
}

/// Programs that stop are waited for until a deadline: many at a time.
const STOPPED_AT_ONCE: usize = 12;

/// Each point, and which program has the device after a fault there; `-` where the update does not pass the point.
fn table(mgmtdev: &str, way: Way, strategies: &[Strategy], cases: &[Case]) -> String {
    let mut text = format!("{mgmtdev}, {way}\n{:14}", "");
    let mut counts = BTreeMap::<_, usize>::new();
    let columns: Vec<_> = [Action::Kill, Action::Stop]
        .into_iter()
        .flat_map(|a| strategies.iter().map(move |&s| (a, s)))
        .collect();
    for (action, strategy) in &columns {
        write!(text, "{:13}", format!("{action:?}/{strategy}").to_lowercase()).unwrap();
    }
    for point in Checkpoint::ALL {
        write!(text, "\n{:14}", point.name()).unwrap();
        for &(action, strategy) in &columns {
            let is_it = |c: &&Case| {
                c.strategies == [strategy] && c.fault.is_some_and(|f| (f.point, f.action) == (point, action))
            };
            let outcome = cases.iter().find(is_it).map(|case| case.outcome);
            if let Some(outcome) = outcome {
                *counts.entry((action == Action::Stop, outcome)).or_default() += 1;
            }
            let word = outcome.map_or("-".to_owned(), |outcome| format!("{outcome:?}"));
            write!(text, "{word:13}").unwrap();
        }
    }
    for ((stop, outcome), count) in counts {
        write!(text, "\n{} and {outcome:?}: {count}", if stop { "stopped" } else { "killed" }).unwrap();
    }
    text + "\n"
}

const WITH_REMAP: [Strategy; 3] = [Strategy::Resume, Strategy::Reset, Strategy::Reopen];

#[test]
fn blk_by_exec() {
    survived("blk", &Strategy::ALL, Way::Exec);
}

#[test]
fn blk_by_fork() {
    survived("blk", &Strategy::ALL, Way::Fork);
}

#[test]
fn blk_by_hand_over() {
    survived("blk", &Strategy::ALL, Way::HandOver);
}

#[test]
fn sim_blk_by_exec() {
    survived("sim-blk", &WITH_REMAP, Way::Exec);
}

#[test]
fn sim_blk_by_fork() {
    survived("sim-blk", &WITH_REMAP, Way::Fork);
}

#[test]
fn sim_blk_by_hand_over() {
    survived("sim-blk", &WITH_REMAP, Way::HandOver);
}

/// The daemon is killed, and upgraded, at each point of an update of its client: the update is completed all the same. Each point
/// with one of the strategies, with `VDPA_TEST_ALL` with each.
fn without_daemon(mgmtdev: &str, strategies: &[Strategy], way: Way) {
    let ground = Ground::with(&["--holder", "--front", "fuse", "--crash-limit", "60000"]);
    let disks = vec![("disk0".to_owned(), ground.vdpad.add_any("disk0", mgmtdev))];
    let all = std::env::var_os("VDPA_TEST_ALL").is_some();
    let begin = Instant::now();
    let mut count = 0;
    for (number, &strategy) in strategies.iter().enumerate() {
        let mut points = path_of(way, strategy);
        points.dedup();
        for point in points {
            for action in [Action::KillDaemon, Action::UpgradeDaemon] {
                let turn = place(point) + usize::from(action == Action::UpgradeDaemon);
                if !all && turn % strategies.len() != number {
                    continue;
                }
                let case = Case {
                    way,
                    strategies: vec![strategy],
                    fault: Some(Fault { point, nth: 1, action }),
                    outcome: Outcome::TookOver,
                    packed: mgmtdev == "blk" && place(point).is_multiple_of(2),
                    service: (0, PathBuf::new()),
                };
                ground.judge(&case, &disks);
                count += 1;
            }
        }
    }
    println!("{mgmtdev}, {way}: {count} updates completed in {:?}", begin.elapsed());
    assert!(count > 15, "{count}");
}

#[test]
fn blk_by_exec_without_daemon() {
    without_daemon("blk", &Strategy::ALL, Way::Exec);
}

#[test]
fn blk_by_fork_without_daemon() {
    without_daemon("blk", &Strategy::ALL, Way::Fork);
}

#[test]
fn blk_by_hand_over_without_daemon() {
    without_daemon("blk", &Strategy::ALL, Way::HandOver);
}

/// Four disks of two kinds, each with another strategy, and a fault between any two steps of theirs.
#[test]
fn mixed_devices() {
    let ground = Ground::new();
    let strategies = vec![Strategy::Live, Strategy::Resume, Strategy::Reset, Strategy::Reopen];
    let disks: Disks = ["blk", "sim-blk", "sim-blk", "blk"]
        .into_iter()
        .enumerate()
        .map(|(number, mgmtdev)| {
            (format!("disk{number}"), ground.vdpad.add_any(&format!("disk{number}"), mgmtdev))
        })
        .collect();
    use Checkpoint as P;
    let mut cases = Vec::new();
    for way in [Way::Fork, Way::HandOver] {
        let mut fault = |point, nth, outcome| {
            let fault = Some(Fault { point, nth, action: Action::Kill });
            cases.push(Case {
                way,
                strategies: strategies.clone(),
                fault,
                outcome,
                packed: false,
                service: (0, PathBuf::new()),
            });
        };
        (1..=3).for_each(|nth| fault(P::Suspended, nth, Outcome::Closed));
        (1..=4).for_each(|nth| fault(P::Stopped, nth, Outcome::Closed));
        (1..=4).for_each(|nth| fault(P::Owned, nth, Outcome::WentOn));
        fault(P::Vrings, 1, Outcome::WentOn);
        (1..=3).for_each(|nth| fault(P::Remapped, nth, Outcome::WentOn));
        (1..=3).for_each(|nth| fault(P::Running, nth, Outcome::WentOn));
        fault(P::TakenSent, 1, Outcome::WentOn);
        fault(P::Sent, 1, Outcome::TookOver);
        fault(P::CommitReceived, 1, Outcome::Closed);
        fault(P::Running, 4, Outcome::Closed);
    }
    run_on(&ground, &[disks], &cases);
}
