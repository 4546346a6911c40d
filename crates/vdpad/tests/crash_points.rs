//! A daemon below a holder that ends at every named point: alone, its holder alone, and both.
//!
//! Each case asserts that the point was reached, so that a point that is not reached is not taken for one that was survived.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/crash.rs"]
mod crash;
#[path = "support/loads.rs"]
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
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vdpa_control::api::{AddRequest, Attrs, UpgradeRequest};
use vdpa_control::client::ClientError;
use vdpa_core::Errno;
use vdpa_core::crash_points::CrashPoint;
use vdpa_core::features::Status;
use vdpa_core::ops::VdpaOps;
use vdpad::crash_points::Action;

use crash::Crashes;
use loads::{DEPTH, Faults, KINDS, Kind, Load};
use requests::requests;
use robust::{Vdpad, eventually};

const LIMIT: Duration = Duration::from_secs(200);
/// How long anything may take after a crash.
const SOON: Duration = Duration::from_secs(10);
/// The errors of clients whose daemon is gone.
const GONE: [i32; 4] = [libc::ECONNABORTED, libc::ENOTCONN, libc::ENODEV, libc::ENOENT];

/// What leads to a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Requests of a client on a device file.
    Request,
    /// Requests in rings.
    Ring,
    /// A device is added.
    Add,
    /// A device is deleted.
    Del,
    /// A daemon was killed before.
    Restore,
    /// The daemon is upgraded.
    Upgrade,
}

use Way::{Add, Del, Request, Restore, Ring, Upgrade};

const fn way(point: CrashPoint) -> Way {
    use CrashPoint as P;
    match point {
        P::RequestRead
        | P::RequestBegun
        | P::RequestExecuted
        | P::HoldBegun
        | P::SpaceHalfHeld
        | P::ObjectHeld
        | P::RecordReady
        | P::RecordWritten
        | P::RecordCommitted
        | P::CheckpointWritten
        | P::CheckpointSwitched
        | P::ObjectReleased
        | P::ReplyReady
        | P::ReplySent
        | P::QueueStarted => Request,
        P::AddCreated | P::AddLogHeld | P::AddFileMade | P::AddIdentityHeld | P::AddDone => Add,
        P::DelFileRemoved | P::DelRevoked | P::DelIdentityReleased | P::DelDone => Del,
        P::ChainWalked
        | P::DescriptorsLogged
        | P::TakenLogged
        | P::SubmitBegun
        | P::Submitted
        | P::CompletionTaken
        | P::StatusWritten
        | P::PacketCopied
        | P::PacketHalfDone
        | P::PacketSent
        | P::PacketRead
        | P::CommandDone
        | P::UsedWritten
        | P::PushedLogged
        | P::UsedPublished
        | P::PublishedLogged
        | P::SignalBegun
        | P::Signalled => Ring,
        P::ItemsListed
        | P::ConnectionAdopted
        | P::JournalRead
        | P::ParentMade
        | P::StateRestored
        | P::QueuesResumed
        | P::RingRecovered
        | P::RepeatTaken
        | P::FileRestored
        | P::Resent
        | P::ControlOpen
        | P::ReadySaid => Restore,
        P::CandidateBegun
        | P::CandidateChecked
        | P::CandidateReady
        | P::UpgradePrepared
        | P::UpgradeReady
        | P::CommitBegun
        | P::Committed
        | P::CommitReceived
        | P::TakenOver => Upgrade,
    }
}

/// Whether the load of `kind` comes to `point`.
fn is_on_path(kind: Kind, point: CrashPoint) -> bool {
    use CrashPoint as P;
    match point {
        P::DescriptorsLogged => kind.name == "packed",
        // tests/queue_changes.rs
        P::QueueStarted => false,
        P::PacketCopied => kind.mgmtdev == "sim-net",
        P::PacketHalfDone => matches!(kind.mgmtdev, "sim-net" | "net"),
        P::PacketSent | P::PacketRead | P::CommandDone => kind.mgmtdev == "net",
        P::StatusWritten | P::CompletionTaken => kind.mgmtdev == "blk",
        _ => true,
    }
}

/// Points that cannot be told apart by the rings in use are tried with one kind only.
fn points(kind: Kind) -> impl Iterator<Item = CrashPoint> {
    let all = CrashPoint::ALL.iter().copied();
    all.filter(move |&point| {
        is_on_path(kind, point) && (kind.name == "split" || matches!(way(point), Ring | Restore))
    })
}

/// A service with one device in use.
struct Ground {
    vdpad: Vdpad,
    crashes: Crashes,
    load: Box<dyn Load>,
    kind: Kind,
    /// A device for requests, opened by nobody else.
    other: PathBuf,
    total: Faults,
    /// Packets that may have been lost, since two processes have died with them.
    lossy: u64,
    dir: Option<tempfile::TempDir>,
}

impl Drop for Ground {
    fn drop(&mut self) {
        // A daemon that has lost its holder would go on.
        if let Ok(version) = self.vdpad.client().version()
            && let Some(pid) = Pid::from_raw(version.pid.cast_signed())
            && pid != self.vdpad.pid()
        {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// What is left after the end of processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// A daemon, which serves the device.
    Serves,
    /// Nothing: clients get errors.
    Gone,
}

impl Ground {
    fn new(kind: Kind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut ground = Self::at(kind, std::fs::canonicalize(dir.path()).unwrap());
        ground.dir = Some(dir);
        ground
    }

    fn at(kind: Kind, dir: PathBuf) -> Self {
        Self::with(kind, dir, &[])
    }

    fn with(kind: Kind, dir: PathBuf, options: &[&str]) -> Self {
        assert!(!kind.wire || loads::prepare(), "a network namespace is needed");
        let crashes = Crashes::new();
        let mut command = robust::command_at(&dir);
        command.args(["--holder", "--front", "fuse", "--crash-limit", "60000"]).args(options);
        crashes.watch(&mut command);
        let vdpad = Vdpad::start_command(&dir, LIMIT, command);
        let used = vdpad.add_any("used", kind.mgmtdev);
        let other = vdpad.add_any("other", "blk");
        let load = (kind.start)(&used);
        let mut ground =
            Self { vdpad, crashes, load, kind, other, total: Faults::default(), lossy: 0, dir: None };
        ground.works(0);
        ground
    }

    /// Everything is well: all requests are answered without an error.
    #[track_caller]
    fn works(&mut self, errors: u64) {
        let faults = self.load.burst();
        self.count(faults, errors);
    }

    #[track_caller]
    fn count(&mut self, mut faults: Faults, errors: u64) {
        assert!(faults.errors <= errors, "{faults:?}");
        self.total += faults;
        faults.errors = 0;
        if self.kind.wire {
            faults.again = faults.again.saturating_sub(self.lossy);
        }
        if self.kind.lossy {
            faults.lost = faults.lost.saturating_sub(self.lossy);
            self.lossy = 0;
        }
        let requests = faults.requests;
        assert_eq!(faults, Faults { requests, ..Faults::default() });
    }

    /// Brings a process to `point`, which does `action` there. Returns what went wrong with the requests on the other device.
    fn provoke(&mut self, point: CrashPoint, nth: u64, action: Action) -> Result<(), Errno> {
        let before = self.crashes.fired();
        let client = self.vdpad.client().with_timeout(SOON);
        let mut result = Ok(());
        match way(point) {
            Request => {
                // Which holds the client's address space for the first time.
                client.add(&self.third()).unwrap();
                let path = client.device("third").unwrap().path;
                self.crashes.arm(point, nth, action);
                self.load.begin();
                result = requests(&path);
            }
            Ring => {
                self.crashes.arm(point, nth, action);
                self.load.begin();
                // A burst may come to the point less often.
                for _ in 0..20 {
                    if self.reaches(before + 1, Duration::from_millis(50)) {
                        break;
                    }
                    let faults = self.load.end();
                    self.count(faults, 0);
                    self.load.begin();
                }
            }
            Restore if matches!(point, CrashPoint::RingRecovered | CrashPoint::RepeatTaken) => {
                self.crashes.arm_after(CrashPoint::TakenLogged, point, nth, action);
                self.load.begin();
            }
            Restore => {
                let pid = eventually("the daemon answers", || client.daemon().ok()).pid;
                self.crashes.arm(point, nth, action);
                self.load.begin();
                kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
            }
            Add => {
                self.crashes.arm(point, nth, action);
                self.load.begin();
                // An answer may or may not come.
                let _ = client.add(&self.third());
            }
            Del => {
                client.add(&self.third()).unwrap();
                self.crashes.arm(point, nth, action);
                self.load.begin();
                let _ = client.delete("third", false);
            }
            Upgrade => {
                self.crashes.arm(point, nth, action);
                self.load.begin();
                let _ = client.upgrade(&UpgradeRequest::default());
            }
        }
        let chained = u64::from(matches!(point, CrashPoint::RingRecovered | CrashPoint::RepeatTaken));
        let reached = self.reaches(before + 1 + chained, SOON);
        self.crashes.disarm();
        assert!(reached, "{point:?} was not reached");
        result
    }

    /// Waits until `fired` actions were done.
    fn reaches(&self, fired: u64, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        while self.crashes.fired() < fired && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.crashes.fired() == fired
    }

    fn third(&self) -> AddRequest {
        let image = self.vdpad.dir().join("third.img");
        if !image.exists() {
            self.vdpad.image("third", 1 << 20);
        }
        let mut attrs = Attrs::new();
        attrs.insert("path", image.to_str().unwrap()).unwrap();
        AddRequest { name: "third".into(), mgmtdev: "blk".into(), attrs }
    }

    fn names(&self) -> Vec<String> {
        let names = |ground: &Self| {
            let devices = ground.vdpad.client().devices().ok()?;
            Some(devices.into_iter().map(|info| info.name).collect::<Vec<_>>())
        };
        eventually("the daemon answers", || names(self))
    }

    fn held(&self) -> u64 {
        eventually("the daemon answers", || self.vdpad.client().daemon().ok()).holder.unwrap().held
    }

    /// Waits until as many descriptors are held as at the beginning.
    #[track_caller]
    fn holds(&self, wanted: u64, point: CrashPoint) {
        let deadline = Instant::now() + SOON;
        let mut now = self.held();
        while now != wanted && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
            now = self.held();
        }
        assert_eq!(now, wanted, "{point:?}: descriptors are held");
    }

    /// The service is as it was before the case.
    fn is_restored(&self, point: CrashPoint) {
        let client = self.vdpad.client();
        if !matches!(way(point), Request | Add | Del) {
            assert_eq!(self.names(), ["used", "other"]);
            return;
        }
        // The device is there as a whole or not at all.
        if self.names().contains(&"third".to_owned()) {
            requests(&client.device("third").unwrap().path).unwrap();
        } else {
            client.add(&self.third()).unwrap();
        }
        eventually("the device is deleted", || match client.delete("third", false) {
            Err(ClientError::Refused(error)) if error.errno == Errno::BUSY => None,
            result => {
                result.unwrap();
                Some(())
            }
        });
        assert_eq!(self.names(), ["used", "other"]);
    }
}

/// How many requests may fail with an I/O error: those that were in flight at two crashes in a row.
fn poisoned(point: CrashPoint) -> u64 {
    if way(point) == Restore { DEPTH } else { 0 }
}

/// How many packets may be lost, and how many repeated, when a process was killed at the point.
fn lossy(kind: Kind, point: CrashPoint) -> u64 {
    let twice = u64::from(poisoned(point) > 0);
    if kind.wire { Kind::WIRE * (1 + twice) } else { 2 * twice }
}

/// The daemon is killed at every point: the next one goes on, and nobody notices.
fn daemon_is_killed(kind: Kind) {
    let mut ground = Ground::new(kind);
    // Whatever is made once.
    requests(&ground.other).unwrap();
    ground.vdpad.is_released("other");
    std::thread::sleep(Duration::from_millis(100));
    let held = ground.held();
    let mut cases = BTreeMap::<_, u64>::new();
    for point in points(kind) {
        let times: &[u64] = if way(point) == Ring { &[1, 5] } else { &[1] };
        for &nth in times {
            let begin = Instant::now();
            let result = ground.provoke(point, nth, Action::Kill);
            assert_eq!(result, Ok(()), "{point:?}");
            ground.lossy = lossy(kind, point);
            let faults = ground.load.end();
            ground.count(faults, poisoned(point));
            ground.works(0);
            ground.is_restored(point);
            *cases.entry(format!("{:?}", way(point))).or_default() += 1;
            println!("{} {nth}: {:?}", point.name(), begin.elapsed());
            // Nothing of what had to be given up is held.
            requests(&ground.other).unwrap();
            ground.holds(held, point);
        }
    }
    println!("{}: {cases:?}, {:?}", kind.name, ground.total);
}

/// What is left when the process that has come to `point` has ended, and the holder before it could do anything about that.
fn without_both(point: CrashPoint) -> Outcome {
    use CrashPoint as P;
    match point {
        // It was the candidate that ended; the daemon goes on.
        P::CandidateBegun | P::CandidateChecked | P::CandidateReady => Outcome::Serves,
        // It was the daemon that had just handed over to the candidate.
        P::Committed => Outcome::Serves,
        _ => Outcome::Gone,
    }
}

impl Ground {
    /// Whether the device is served. Its client gets an answer or an error, at once.
    #[track_caller]
    fn outcome(&self) -> Outcome {
        let begin = Instant::now();
        let status = self.load.device().status();
        assert!(begin.elapsed() < SOON, "{status:?}");
        match status {
            Ok(status) => {
                assert!(status.contains(Status::DRIVER_OK), "{status:?}");
                Outcome::Serves
            }
            Err(errno) => {
                assert!(GONE.contains(&errno.raw()), "{errno:?}");
                Outcome::Gone
            }
        }
    }

    /// A new service in the same place has the device again, with everything that was acknowledged.
    fn starts_again(self) {
        let dir = self.vdpad.dir().to_owned();
        let image = dir.join("used.img");
        let attrs = format!("path={} packed=on", image.display());
        let device = match self.kind.mgmtdev {
            "blk" => format!("name=used mgmtdev=blk {attrs}"),
            "net" => "name=used mgmtdev=net tap=tap0 mac=52:54:11:12:34:56 packed=on".to_owned(),
            other => format!("name=used mgmtdev={other}"),
        };
        let again = Vdpad::start_at(&dir, LIMIT, &["--holder", "--front", "fuse", "--dev", &device]);
        if self.kind.mgmtdev == "blk" {
            self.load.check_image(&image);
        }
        let path = again.info("used").path;
        let faults = (self.kind.start)(&path).burst();
        assert_eq!(faults, Faults { requests: faults.requests, ..Faults::default() });
        assert_eq!(self.outcome(), Outcome::Gone, "the old client");
    }
}

/// The holder ends, with or without the daemon.
fn holder_is_killed(kind: Kind, action: Action, wanted: fn(CrashPoint) -> Outcome) {
    let mut cases = BTreeMap::<_, u64>::new();
    let mut wrong = Vec::new();
    for point in points(kind) {
        let begin = Instant::now();
        let mut ground = Ground::new(kind);
        let holder = ground.vdpad.pid();
        let chained = u64::from(matches!(point, CrashPoint::RingRecovered | CrashPoint::RepeatTaken));
        let killer = (action == Action::StopHolderAndKill).then(|| {
            ground.crashes.when_fired(1 + chained, move || kill_process(holder, Signal::KILL).unwrap())
        });
        let result = ground.provoke(point, 1, action);
        if let Some(killer) = killer {
            killer.join().unwrap();
        }
        ground.vdpad.wait();
        // The daemon goes on if the holder has ended before it could say that the upgrade is committed.
        let either = action == Action::StopHolderAndKill && point == CrashPoint::CommitReceived;
        // A daemon that has handed over answers until it has ended.
        let deadline = Instant::now() + SOON / 10;
        let outcome = loop {
            let outcome = ground.outcome();
            if outcome == wanted(point) || Instant::now() > deadline {
                break outcome;
            }
        };
        println!("{}: {outcome:?}, {result:?} in {:?}", point.name(), begin.elapsed());
        if outcome != wanted(point) && !either {
            wrong.push((point, outcome, ground.vdpad.log()));
            continue;
        }
        *cases.entry(format!("{outcome:?}")).or_default() += 1;
        if outcome == Outcome::Serves {
            assert_eq!(result, Ok(()), "{point:?}");
            ground.lossy = lossy(kind, point);
            let faults = ground.load.end();
            ground.count(faults, poisoned(point));
            ground.works(0);
        } else {
            assert!(
                way(point) != Request || result.is_err_and(|errno| GONE.contains(&errno.raw())),
                "{result:?}"
            );
            ground.starts_again();
        }
    }
    println!("{}: {cases:?}", kind.name);
    for (point, outcome, log) in &wrong {
        println!("--- {point:?}: {outcome:?}\n{log}");
    }
    let wrong: Vec<_> = wrong.into_iter().map(|(point, outcome, _)| (point, outcome)).collect();
    assert_eq!(wrong, []);
}

#[test]
fn split_holder() {
    holder_is_killed(KINDS[0], Action::KillHolder, |_| Outcome::Serves);
}

#[test]
fn packed_holder() {
    holder_is_killed(KINDS[1], Action::KillHolder, |_| Outcome::Serves);
}

#[test]
fn sim_holder() {
    holder_is_killed(KINDS[2], Action::KillHolder, |_| Outcome::Serves);
}

#[test]
fn net_holder() {
    holder_is_killed(KINDS[3], Action::KillHolder, |_| Outcome::Serves);
}

#[test]
fn card_holder() {
    holder_is_killed(KINDS[4], Action::KillHolder, |_| Outcome::Serves);
}

#[test]
fn split_both() {
    holder_is_killed(KINDS[0], Action::StopHolderAndKill, without_both);
}

#[test]
fn packed_both() {
    holder_is_killed(KINDS[1], Action::StopHolderAndKill, without_both);
}

#[test]
fn sim_both() {
    holder_is_killed(KINDS[2], Action::StopHolderAndKill, without_both);
}

#[test]
fn net_both() {
    holder_is_killed(KINDS[3], Action::StopHolderAndKill, without_both);
}

#[test]
fn card_both() {
    holder_is_killed(KINDS[4], Action::StopHolderAndKill, without_both);
}

#[test]
fn split_daemon() {
    daemon_is_killed(KINDS[0]);
}

#[test]
fn packed_daemon() {
    daemon_is_killed(KINDS[1]);
}

#[test]
fn sim_daemon() {
    daemon_is_killed(KINDS[2]);
}

#[test]
fn net_daemon() {
    daemon_is_killed(KINDS[3]);
}

#[test]
fn card_daemon() {
    daemon_is_killed(KINDS[4]);
}

/// As on a kernel that does not send requests again: the daemon finds them in its own memory.
#[test]
fn requests_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut ground = Ground::with(KINDS[0], std::fs::canonicalize(dir.path()).unwrap(), &["--keep-requests"]);
    let mut cases = 0;
    for point in points(KINDS[0]).filter(|point| way(*point) == Request) {
        for nth in [1, 7] {
            // Some points are reached fewer times.
            if nth > 1
                && !matches!(
                    point,
                    CrashPoint::RequestRead | CrashPoint::RequestBegun | CrashPoint::ReplySent
                )
            {
                continue;
            }
            let result = ground.provoke(point, nth, Action::Kill);
            assert_eq!(result, Ok(()), "{point:?}");
            let faults = ground.load.end();
            ground.count(faults, 0);
            ground.works(0);
            ground.is_restored(point);
            cases += 1;
        }
    }
    println!("{cases} cases, {:?}", ground.total);
    assert!(cases > 14);
}

/// It is not refused as other requests are: nobody could open the device any more.
#[test]
fn a_close_with_which_two_daemons_die_is_a_close() {
    let ground = Ground::new(KINDS[0]);
    let device = requests::open(&ground.other).unwrap();
    device.set_owner().unwrap();
    ground.crashes.arm_after(CrashPoint::RequestBegun, CrashPoint::RequestBegun, 1, Action::Kill);
    drop(device);
    assert!(ground.reaches(2, SOON));
    requests(&ground.other).unwrap();
    ground.vdpad.is_released("other");
}
